"""OCSP stapling: a broker whose response is not valid gets not one byte of MQTT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

import gateway.tls.channel as channel_module
from gateway.cli import check
from gateway.cli.login import make_login
from gateway.cli.report import Report, Status
from gateway.config import TLS
from gateway.errors import EndReason, UpstreamFailure
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import ChannelState, TLSChannel, make_policy
from gateway.tls.direct import DirectCalls
from gateway.tls.engine import PublicCalls
from gateway.tls.ocsp import has_signed, judge
from gateway.tls.tickets import Tickets
from tests import mqtt_packets as mqtt
from tests.harness import Broker, Device, RunningGateway
from tests.pki import Certified, certify, certify_ca
from tests.test_verification import OpenSSLServer

NOW = datetime.now(UTC).replace(microsecond=0)
ROOT = certify_ca()
OTHER_ROOT = certify_ca(subject="other")
LEAF = certify(ROOT)
SIGNER = certify(ROOT, subject="responder", names=(), purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,))
NO_SIGNER = certify(ROOT, subject="responder", names=())
FOREIGN = certify(OTHER_ROOT, subject="responder", names=(), purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,))
LATE = certify(
    ROOT, subject="responder", names=(), purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,), valid_from=-9, valid_for=3
)
GOOD, REVOKED, UNKNOWN = ocsp.OCSPCertStatus.GOOD, ocsp.OCSPCertStatus.REVOKED, ocsp.OCSPCertStatus.UNKNOWN
UNUSABLE = EndReason.TLS_OCSP_UNUSABLE


def response(
    status: ocsp.OCSPCertStatus = GOOD,
    *,
    about: Certified = LEAF,
    issuer: Certified = ROOT,
    signer: Certified = ROOT,
    begins: timedelta = timedelta(hours=-1),
    ends: timedelta | None = timedelta(days=1),
    shown: bool = True,
) -> bytes:
    """Return a response in DER."""
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=about.certificate,
        issuer=issuer.certificate,
        algorithm=SHA1(),  # noqa: S303  names the issuer only; what everybody uses
        cert_status=status,
        this_update=NOW + begins,
        next_update=None if ends is None else NOW + ends,
        revocation_time=NOW - timedelta(days=2) if status is REVOKED else None,
        revocation_reason=None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, signer.certificate)
    if signer is not ROOT and shown:
        builder = builder.certificates([signer.certificate])
    return builder.sign(signer.key, SHA256()).public_bytes(Encoding.DER)  # type: ignore[arg-type]


# What is stapled, and the reason for a refusal with its words.
CASES: dict[str, tuple[bytes, EndReason | None, str]] = {
    "good": (response(), None, ""),
    "good, by a responder that the issuer authorized": (response(signer=SIGNER), None, ""),
    "revoked": (response(REVOKED), EndReason.TLS_REVOKED, "revoked on"),
    "revoked, by a responder": (response(REVOKED, signer=SIGNER), EndReason.TLS_REVOKED, "revoked on"),
    "unknown": (response(UNKNOWN), UNUSABLE, "does not know"),
    "outdated": (response(begins=timedelta(days=-9), ends=timedelta(minutes=-1)), UNUSABLE, "was valid until"),
    "not yet valid": (response(begins=timedelta(hours=1)), UNUSABLE, "not valid before"),
    "valid for ever": (response(ends=None), UNUSABLE, "no nextUpdate"),
    "about another certificate": (response(about=certify(ROOT)), UNUSABLE, "about another"),
    "about another CA's": (response(issuer=OTHER_ROOT), UNUSABLE, "about another"),
    "by the broker itself": (response(signer=LEAF), UNUSABLE, "signed"),
    "by a certificate for other purposes": (response(signer=NO_SIGNER), UNUSABLE, "signed"),
    "by another CA's responder": (response(signer=FOREIGN), UNUSABLE, "signed"),
    "by another CA": (response(signer=OTHER_ROOT), UNUSABLE, "signed"),
    "by a responder whose time is over": (response(signer=LATE), UNUSABLE, "signed"),
    "by a responder that is not shown": (response(signer=SIGNER, shown=False), UNUSABLE, "signed"),
    "forged": (response()[:-1] + bytes([response()[-1] ^ 1]), UNUSABLE, "signed"),
    "garbage": (b"garbage", UNUSABLE, "cannot be read"),
    "cut": (response()[:100], UNUSABLE, "cannot be read"),
    "too long": (b"\x30" + bytes(70_000), UNUSABLE, "too long"),
    "a refusal of the responder": (
        ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER).public_bytes(Encoding.DER),
        UNUSABLE,
        "try_later",
    ),
    "none": (b"", UNUSABLE, "sent no OCSP response"),
}
CHAIN = [LEAF.certificate, ROOT.certificate]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("required", [True, False])
def test_only_a_valid_response_that_says_good_is_accepted(name: str, required: bool) -> None:
    """Whether it is required or not; if not, there may be none."""
    staple, reason, words = CASES[name]
    if reason is None or (name == "none" and not required):
        until = judge(staple, CHAIN, NOW, required=required)
        assert until == (NOW + timedelta(days=1) if staple else None)
        return
    with pytest.raises(UpstreamFailure, match=words) as caught:
        judge(staple, CHAIN, NOW, required=required)
    assert caught.value.reason is reason


def test_a_response_holds_from_five_minutes_before_it_begins_until_it_ends() -> None:
    """The responder's clock may be ahead; at its nextUpdate a response is outdated."""
    begins, ends, second = timedelta(hours=-1), timedelta(days=1), timedelta(seconds=1)
    staple = response(begins=begins, ends=ends)
    for moment in (NOW + begins - timedelta(minutes=5), NOW + ends - second):
        assert judge(staple, CHAIN, moment, required=True) == NOW + ends
    for moment, words in (
        (NOW + begins - timedelta(minutes=5) - second, "not valid before"),
        (NOW + ends, "was valid until"),
    ):
        with pytest.raises(UpstreamFailure, match=words):
            judge(staple, CHAIN, moment, required=True)


def test_a_root_answers_for_itself() -> None:
    """A broker's certificate may be the root itself; the chain is then that alone."""
    assert judge(response(about=ROOT), [ROOT.certificate], NOW, required=True) == NOW + timedelta(days=1)
    with pytest.raises(UpstreamFailure, match="signed"):
        judge(response(about=ROOT, signer=OTHER_ROOT), [ROOT.certificate], NOW, required=True)


def test_a_certificate_may_require_a_response() -> None:
    """RFC 7633: a thief of the key cannot leave it out."""
    key = LEAF.key
    builder = x509.CertificateBuilder().subject_name(LEAF.certificate.subject).issuer_name(ROOT.certificate.subject)
    builder = builder.public_key(key.public_key()).serial_number(7).not_valid_before(NOW - timedelta(days=1))
    builder = builder.not_valid_after(NOW + timedelta(days=1))
    feature = x509.TLSFeature([x509.TLSFeatureType.status_request])
    leaf = builder.add_extension(feature, critical=False).sign(ROOT.key, SHA256())  # type: ignore[arg-type]
    with pytest.raises(UpstreamFailure, match="RFC 7633"):
        judge(b"", [leaf, ROOT.certificate], NOW, required=False)


def test_a_signature_with_sha_1_is_none() -> None:
    """`cryptography` makes no such response, so this is what one would look like."""
    for hashed in (SHA1(), SHA256()):  # noqa: S303  what is refused
        signature = ROOT.key.sign(b"response", ec.ECDSA(hashed))  # type: ignore[call-arg, arg-type]
        made: Any = SimpleNamespace(
            signature_hash_algorithm=hashed, signature=signature, tbs_response_bytes=b"response"
        )
        assert has_signed(made, ROOT.certificate) == isinstance(hashed, SHA256)


# ---- in a handshake


@pytest.fixture(params=[DirectCalls, PublicCalls])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have OpenSSL called in one way and then in the other."""
    monkeypatch.setattr(channel_module, "choose", lambda: request.param)


@pytest.fixture
def root_file(tmp_path: Path) -> Path:
    """Return the file with the root."""
    path = tmp_path / "root.pem"
    path.write_bytes(ROOT.pem)
    return path


def server_context(staple: bytes) -> SSL.Context:
    """Return the context of a server that staples this."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate(LEAF.certificate)
    context.use_privatekey(LEAF.key)
    context.set_ocsp_server_callback(lambda _connection, _data: staple)
    return context


def shake(channel: TLSChannel, context: SSL.Context) -> SSL.Connection:
    """Have the handshake in memory, to its end; raises what the channel raises."""
    server = SSL.Connection(context, None)
    server.set_accept_state()
    channel.start()
    for _ in range(4):
        if sent := channel.outgoing():
            server.bio_write(sent)
        with contextlib.suppress(SSL.WantReadError):
            server.do_handshake()
        with contextlib.suppress(SSL.WantReadError):
            channel.receive(server.bio_read(65_536))
    return server


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("newest", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION])
@pytest.mark.parametrize("mode", ["off", "stapled", "must-staple"])
@pytest.mark.parametrize("name", ["good", "revoked", "forged", "none"])
def test_a_handshake_ends_as_the_response_says(root_file: Path, name: str, mode: Any, newest: int) -> None:
    """In both versions of TLS; without `tls.ocsp` nobody asks."""
    staple, reason, _ = CASES[name]
    asked: list[bytes] = []
    context = server_context(staple)
    context.set_ocsp_server_callback(lambda _connection, _data: asked.append(staple) or staple)
    context.set_max_proto_version(newest)
    channel = TLSChannel(make_policy(TLS(ca_file=(root_file,), ocsp=mode)), Identity.of("localhost"))
    if mode == "off" or reason is None or (name == "none" and mode == "stapled"):
        shake(channel, context)
        assert channel.state is ChannelState.VERIFIED
    else:
        with pytest.raises(UpstreamFailure) as caught:
            shake(channel, context)
        assert caught.value.reason is reason
        assert channel.state is ChannelState.CLOSED
    assert bool(asked) == (mode != "off")


def test_a_ticket_holds_no_longer_than_the_response(root_file: Path) -> None:
    """A resumed session has no response of its own."""
    policy = make_policy(TLS(ca_file=(root_file,), ocsp="must-staple"))
    identity = Identity.of("localhost")
    clock = [NOW.timestamp()]
    tickets = Tickets(policy, identity, lambda: clock[0])
    context = server_context(response(ends=timedelta(minutes=10)))
    shake(TLSChannel(policy, identity, tickets), context)
    assert tickets.offer() is not None
    again = TLSChannel(policy, identity, tickets)
    shake(again, context)
    assert again.peer is not None
    assert again.peer.resumed
    clock[0] += 601
    assert tickets.offer() is None


def stapling(staple: bytes) -> OpenSSLServer:
    """Return a broker's TLS with this response."""
    server = OpenSSLServer(LEAF, lambda _connection, _offered: SSL.NO_OVERLAPPING_PROTOCOLS)
    server._context.set_ocsp_server_callback(lambda _connection, _data: staple)
    return server


@pytest.mark.parametrize("name", CASES)
def test_sessions_and_check_agree_and_nothing_leaks(
    start_broker: Callable[..., Broker],
    start_gateway: Callable[..., RunningGateway],
    reactor: Any,
    root_file: Path,
    name: str,
) -> None:
    """With must-staple; `check` has a step for it."""
    staple, reason, _ = CASES[name]
    broker = start_broker(tls=stapling(staple))
    gateway = start_gateway(upstream=broker.port, ca_file=root_file, tls={"ocsp": "must-staple"})
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        if reason is None:
            assert device.read(4) == mqtt.connack()
        else:
            assert device.read_to_end() == mqtt.connack(code=3)
    assert gateway.wait_ended().reason is (reason or EndReason.DEVICE_LOST)
    assert bool(broker.received) == (reason is None)
    path = root_file.with_name("gateway.toml")
    lines = ["[[listen]]", 'endpoint = "127.0.0.1:0"', "[[upstream]]", 'host = "localhost"', f"port = {broker.port}"]
    path.write_text("\n".join([*lines, "[tls]", f"ca_file = {str(root_file)!r}", 'ocsp = "must-staple"']))
    report = Report(lambda _: None)
    given = {flag.name: [] for flag in check.FLAGS} | {"config": [str(path)]}
    coroutine = check.examine(reactor, given, make_login(None, None, None), report)
    blockingCallFromThread(reactor, Deferred.fromCoroutine, coroutine)
    (step,) = (step for step in report.steps if step.name == "ocsp")
    assert step.status is (Status.PASS if reason is None else Status.FAIL)
    assert step.facts.get("reason") is reason
