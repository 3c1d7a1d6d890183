"""The TLS channel and what it is made of, without sockets: every state, every cut, every error of OpenSSL's."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import ssl
import weakref
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)
from OpenSSL import SSL, crypto

from gateway import MADE
from gateway.config import TLS
from gateway.errors import ConfigError, EndReason, UnknownIssuer, UpstreamFailure
from gateway.tls import channel as channel_module
from gateway.tls import failures, trust
from gateway.tls.alt_names import shown_names
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import ChannelState, NotVerified, TLSChannel, make_policy
from gateway.tls.direct import DirectCalls
from gateway.tls.engine import PublicCalls
from gateway.tls.failures import handshake_failure, verification_failure
from gateway.tls.trust import TLSPolicy, platform_roots, spki_pin
from tests.pki import (
    CLIENT,
    NOW,
    Certified,
    certify,
    certify_ca,
    element,
    revocation_list,
    rsa_key,
    with_bytes_replaced,
)

ROOT = certify_ca()
BROKER = certify(ROOT)
OTHER = certify(ROOT, names=["DNS:other.test"])
LOCALHOST = Identity.of("localhost")

BOTH_TLS_VERSIONS = pytest.mark.parametrize(
    "maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"]
)
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TLSPolicy:
    """Return a policy that trusts `ROOT`."""
    return make_policy(TLS(ca_file=(write(tmp_path_factory.mktemp("tls") / "root.pem", ROOT.pem),)))


@pytest.fixture(autouse=True, params=[DirectCalls, PublicCalls])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have OpenSSL called in one way and then in the other."""
    monkeypatch.setattr(channel_module, "choose", lambda: request.param)


def write(path: Path, *parts: bytes) -> Path:
    """Write a file."""
    path.write_bytes(b"".join(parts))
    return path


class Server:
    """The standard library's server end, in memory."""

    def __init__(
        self,
        certified: Certified = BROKER,
        *,
        maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        ciphers: str = "",
        group: Path | None = None,
        client_ca: Certified | None = None,
    ) -> None:
        context = certified.server().context()
        context.maximum_version = maximum
        if ciphers:
            context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
        if group is not None:
            context.load_dh_params(group)
        if client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=client_ca.pem.decode())
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.received = b""
        self.error: ssl.SSLError | None = None
        self.ended_cleanly = False

    def receive(self, ciphertext: bytes) -> bytes:
        """Take what the channel sent; return the answer."""
        self._incoming.write(ciphertext)
        try:
            self.tls.do_handshake()
            while data := self.tls.read(65536):
                self.received += data
            self.ended_cleanly = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.error = error
        return self._outgoing.read()

    def send(self, plaintext: bytes) -> bytes:
        """Encrypt."""
        self.tls.write(plaintext)
        return self._outgoing.read()

    def close(self) -> bytes:
        """Send close_notify."""
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._outgoing.read()


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut data into pieces."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def converse(channel: TLSChannel, server: Server, *, cut: int = 1 << 20) -> bytes:
    """Pass bytes both ways, cut into pieces, until neither has any; return all that the channel sent."""
    sent = b""
    while ciphertext := channel.outgoing():
        sent += ciphertext
        for piece in pieces(server.receive(ciphertext), cut):
            assert channel.receive(piece) == b""
    return sent


def established(policy: TLSPolicy, server: Server) -> TLSChannel:
    """Return a channel that is VERIFIED."""
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    converse(channel, server)
    assert channel.state is ChannelState.VERIFIED
    return channel


def refused(channel: TLSChannel, server: Server) -> UpstreamFailure:
    """Have a handshake refused; return the failure.  The server then gets what the channel has for it."""
    channel.start()
    with pytest.raises(UpstreamFailure) as caught:
        converse(channel, server)
    assert channel.state is ChannelState.CLOSED
    server.receive(channel.outgoing())
    return caught.value


def content_types(wire: bytes) -> list[int]:
    """Return the content types of a row of TLS records (RFC 8446 §5.1)."""
    types = []
    while wire:
        types.append(wire[0])
        wire = wire[5 + int.from_bytes(wire[3:5], "big") :]
    return types


# ---- nothing before VERIFIED


@BOTH_TLS_VERSIONS
def test_nothing_can_be_sent_before_verified(policy: TLSPolicy, maximum: ssl.TLSVersion) -> None:
    """At no byte of the handshake does the channel take plaintext, and it keeps none for later."""
    server = Server(maximum=maximum)
    channel = TLSChannel(policy, LOCALHOST)
    attempts = 0

    def attempt() -> None:
        with pytest.raises(NotVerified):
            channel.send(b"secret")

    attempt()
    channel.start()
    attempt()
    while ciphertext := channel.outgoing():
        for piece in pieces(server.receive(ciphertext), 1):
            if channel.state is ChannelState.HANDSHAKING:
                attempt()
                attempts += 1
            channel.receive(piece)
    assert channel.state is ChannelState.VERIFIED
    assert attempts > 500
    assert server.received == b""
    server.receive(channel.send(b"packet"))
    assert server.received == b"packet"


def test_a_handshake_sends_only_handshake_records(policy: TLSPolicy) -> None:
    """In TLS 1.2, where content types are in the clear, nothing but the handshake is sent unasked."""
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    sent = converse(channel, Server(maximum=ssl.TLSVersion.TLSv1_2))
    assert content_types(sent) == [HANDSHAKE, HANDSHAKE, CHANGE_CIPHER_SPEC, HANDSHAKE]


@BOTH_TLS_VERSIONS
def test_a_refused_broker_gets_an_alert_and_nothing_else(policy: TLSPolicy, maximum: ssl.TLSVersion) -> None:
    """A broker with the wrong name sees the handshake fail; sending is refused, and what it sends is dropped."""
    server = Server(OTHER, maximum=maximum)
    channel = TLSChannel(policy, LOCALHOST)
    assert refused(channel, server).reason is EndReason.TLS_NAME_MISMATCH
    assert server.error is not None
    assert "alert" in str(server.error).lower()
    assert server.received == b""
    with pytest.raises(NotVerified):
        channel.send(b"secret")
    assert channel.outgoing() == b""
    assert channel.receive(b"anything") == b""
    assert channel.peer is None


def raise_mistake(*_: object) -> str:
    """Fail as code with a mistake in it does."""
    raise ZeroDivisionError


@BOTH_TLS_VERSIONS
@pytest.mark.parametrize(
    ("owner", "name", "broken", "words"),
    [
        (Identity, "match", raise_mistake, "ZeroDivisionError"),
        (TLSChannel, "judge", raise_mistake, "ZeroDivisionError"),
        (SSL.Connection, "get_app_data", lambda *_: None, "certificate verify failed"),
    ],
    ids=["match raises", "judge raises", "no channel found"],
)
def test_a_mistake_in_the_callback_fails_the_handshake_itself(
    policy: TLSPolicy,
    monkeypatch: pytest.MonkeyPatch,
    maximum: ssl.TLSVersion,
    owner: type,
    name: str,
    broken: object,
    words: str,
) -> None:
    """The callback refuses on any exception, though a second look would follow: the broker sees no handshake's end."""
    monkeypatch.setattr(owner, name, broken)
    server = Server(maximum=maximum)
    failure = refused(TLSChannel(policy, LOCALHOST), server)
    assert failure.reason is EndReason.TLS_VERIFICATION_ERROR
    assert words in failure.detail
    assert "alert" in str(server.error).lower()


def test_a_handshake_without_a_certificate_is_refused(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever OpenSSL says of it."""
    monkeypatch.setattr(SSL.Connection, "get_peer_certificate", lambda *_: None)
    failure = refused(TLSChannel(policy, LOCALHOST), Server())
    assert (failure.reason, "without a certificate" in failure.detail) == (EndReason.TLS_VERIFICATION_ERROR, True)


@pytest.mark.parametrize("end", [TLSChannel.close, TLSChannel.dispose])
def test_nothing_can_be_sent_after_the_end(policy: TLSPolicy, end: Callable[[TLSChannel], None]) -> None:
    """A channel that was closed takes nothing more, in either direction."""
    server = Server()
    channel = established(policy, server)
    late = server.send(b"late")
    end(channel)
    with pytest.raises(NotVerified):
        channel.send(b"secret")
    assert channel.receive(late) == b""
    server.receive(channel.outgoing())
    assert server.received == b""


def test_a_channel_closed_in_the_handshake_says_nothing(policy: TLSPolicy) -> None:
    """There is no close_notify before there is anything to close."""
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    channel.outgoing()
    channel.close()
    assert channel.outgoing() == b""
    assert channel.state is ChannelState.CLOSED


# ---- plaintext both ways


@BOTH_TLS_VERSIONS
@pytest.mark.parametrize("cut", [1, 5, 7, 1000])
def test_a_handshake_may_be_cut_anywhere(policy: TLSPolicy, maximum: ssl.TLSVersion, cut: int) -> None:
    """However the network cuts it, the handshake comes to its end, with the facts about the broker."""
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    converse(channel, Server(maximum=maximum), cut=cut)
    assert channel.state is ChannelState.VERIFIED
    assert channel.peer is not None
    assert channel.peer.subject == "CN=broker"
    assert channel.peer.issuer == "CN=Root CA"
    assert channel.peer.matched_san == "DNS:localhost"
    assert channel.peer.not_after == BROKER.certificate.not_valid_after_utc
    assert channel.peer.tls_version == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[maximum.name]
    assert channel.peer.alpn == ""


@BOTH_TLS_VERSIONS
@pytest.mark.parametrize("size", [1, 16384, 16385, 100_000])
def test_plaintext_passes_both_ways(policy: TLSPolicy, maximum: ssl.TLSVersion, size: int) -> None:
    """Anything that is sent arrives, in both directions, in one record or in many."""
    server = Server(maximum=maximum)
    channel = established(policy, server)
    plaintext = bytes(index * 7 % 251 for index in range(size))
    server.receive(channel.send(plaintext))
    assert server.received == plaintext
    assert channel.outgoing() == b""
    assert channel.receive(server.send(plaintext)) == plaintext


@BOTH_TLS_VERSIONS
@pytest.mark.parametrize("cut", [1, 4, 6, 16384, 16411, 40_000])
def test_records_may_be_cut_anywhere(policy: TLSPolicy, maximum: ssl.TLSVersion, cut: int) -> None:
    """Each record's plaintext comes with its last byte: none is left in the channel when all has been received."""
    server = Server(maximum=maximum)
    channel = established(policy, server)
    parts = [b"x", b"yy" * 30, b"z" * 16384, b"w" * 20_000, b"v"]
    wire = b"".join(server.send(part) for part in parts)
    assert b"".join(channel.receive(piece) for piece in pieces(wire, cut)) == b"".join(parts)


@BOTH_TLS_VERSIONS
def test_plaintext_behind_the_handshake_is_received(policy: TLSPolicy, maximum: ssl.TLSVersion) -> None:
    """What a broker sends in one piece with the handshake's end is not left lying."""
    server = Server(maximum=maximum)
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    received = b""
    while ciphertext := channel.outgoing():
        answer = server.receive(ciphertext)
        with contextlib.suppress(ssl.SSLWantReadError):  # The handshake is not done at the server.
            answer += server.send(b"early")
        received += channel.receive(answer)
    assert received.startswith(b"early")


def test_close_says_goodbye(policy: TLSPolicy) -> None:
    """The broker gets everything that was sent, then close_notify."""
    server = Server()
    channel = established(policy, server)
    server.receive(channel.send(b"last"))
    channel.close()
    server.receive(channel.outgoing())
    assert (server.received, server.ended_cleanly, server.error) == (b"last", True, None)


@BOTH_TLS_VERSIONS
def test_the_brokers_close_notify_is_noticed(policy: TLSPolicy, maximum: ssl.TLSVersion) -> None:
    """close_notify is told apart from a connection that is just gone, and what came before it counts."""
    server = Server(maximum=maximum)
    channel = established(policy, server)
    assert not channel.received_close
    assert channel.receive(server.send(b"last") + server.close()) == b"last"
    assert channel.received_close


@BOTH_TLS_VERSIONS
@pytest.mark.parametrize("position", [0, 1, 5, -1])
def test_a_tampered_record_ends_the_channel(policy: TLSPolicy, maximum: ssl.TLSVersion, position: int) -> None:
    """One wrong bit in a record, header or body, and the channel is lost; nothing of the record is let through."""
    server = Server(maximum=maximum)
    channel = established(policy, server)
    record = bytearray(server.send(b"packet"))
    record[position] ^= 0x40
    with pytest.raises(UpstreamFailure) as caught:
        channel.receive(bytes(record))
    assert caught.value.reason is EndReason.UPSTREAM_LOST
    assert channel.state is ChannelState.CLOSED
    with pytest.raises(NotVerified):
        channel.send(b"more")


def test_a_renegotiation_is_declined(policy: TLSPolicy) -> None:
    """A TLS 1.2 broker cannot show another certificate later: the channel stays what was verified."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate(BROKER.certificate)
    context.use_privatekey(BROKER.key)
    server = SSL.Connection(context, None)
    server.set_accept_state()
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    for _ in range(2):
        server.bio_write(channel.outgoing())
        with contextlib.suppress(SSL.WantReadError):
            server.do_handshake()
        channel.receive(server.bio_read(100_000))
    assert channel.state is ChannelState.VERIFIED
    peer = channel.peer
    server.renegotiate()
    server.do_handshake()
    assert channel.receive(server.bio_read(100_000)) == b""
    # no_renegotiation, encrypted; a ClientHello would be a handshake record.
    assert content_types(channel.outgoing()) == [ALERT]
    assert (channel.state, channel.peer) == (ChannelState.VERIFIED, peer)


# ---- sessions that share a Context


def test_channels_of_one_policy_do_not_mix(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handshakes that take turns byte by byte come each to its own end, also when a callback met an exception."""
    match = Identity.match

    def failing(identity: Identity, certificate: x509.Certificate) -> str:
        if identity.name == "broken.test":
            raise ZeroDivisionError
        return match(identity, certificate)

    monkeypatch.setattr(Identity, "match", failing)
    names = ["localhost", "other.test", "broken.test", "localhost"] * 3
    channels = [TLSChannel(policy, Identity.of(name)) for name in names]
    servers = [Server() for _ in names]
    verdicts: list[EndReason | None] = [None] * len(names)
    waiting: list[list[bytes]] = [[] for _ in names]
    for channel in channels:
        channel.start()
    moved = True
    while moved:
        moved = False
        for index, (channel, server) in enumerate(zip(channels, servers, strict=True)):
            if ciphertext := channel.outgoing():
                waiting[index] += pieces(server.receive(ciphertext), 50)
            if waiting[index]:
                moved = True
                try:
                    channel.receive(waiting[index].pop(0))
                except UpstreamFailure as failure:
                    verdicts[index] = failure.reason
    assert verdicts == [None, EndReason.TLS_NAME_MISMATCH, EndReason.TLS_VERIFICATION_ERROR, None] * 3
    assert [channel.state for channel in channels] == [
        ChannelState.CLOSED if verdict else ChannelState.VERIFIED for verdict in verdicts
    ]


def test_a_disposed_channel_goes_without_the_garbage_collector(policy: TLSPolicy) -> None:
    """OpenSSL's part and the channel hold one another until `dispose`; after that, nothing holds either."""
    channel = established(policy, Server())
    kept = weakref.ref(channel), weakref.ref(channel._connection)
    gc.disable()
    try:
        channel.dispose()
        del channel
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


# ---- OpenSSL's words


def answered(policy: TLSPolicy, answer: bytes) -> UpstreamFailure:
    """Answer a ClientHello with bytes; return the failure."""
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    assert content_types(channel.outgoing()) == [HANDSHAKE]
    with pytest.raises(UpstreamFailure) as caught:
        channel.receive(answer)
    assert channel.state is ChannelState.CLOSED
    assert channel.outgoing()[:1] != bytes([APPLICATION_DATA])
    return caught.value


def alert(description: int, *, level: int = 2) -> bytes:
    """Write an alert as it is before anything is encrypted (RFC 8446 §6)."""
    return bytes([ALERT, 3, 3, 0, 2, level, description])


def server_hello(version: int) -> bytes:
    """Write the ServerHello of a server that knows nothing after `version`, with an AES-GCM suite."""
    body = version.to_bytes(2, "big") + bytes(32) + b"\0" + b"\xc0\x2f" + b"\0"
    message = b"\x02" + len(body).to_bytes(3, "big") + body
    return bytes([HANDSHAKE]) + version.to_bytes(2, "big") + len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (10, EndReason.TLS_HANDSHAKE_FAILED),  # unexpected_message
        (40, EndReason.TLS_HANDSHAKE_FAILED),  # handshake_failure
        (42, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # bad_certificate
        (43, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # unsupported_certificate
        (44, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # certificate_revoked
        (45, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # certificate_expired
        (46, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # certificate_unknown
        (47, EndReason.TLS_HANDSHAKE_FAILED),  # illegal_parameter
        (48, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # unknown_ca
        (49, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # access_denied
        (50, EndReason.TLS_HANDSHAKE_FAILED),  # decode_error
        (51, EndReason.TLS_HANDSHAKE_FAILED),  # decrypt_error
        (70, EndReason.TLS_VERSION),  # protocol_version
        (71, EndReason.TLS_HANDSHAKE_FAILED),  # insufficient_security
        (80, EndReason.TLS_HANDSHAKE_FAILED),  # internal_error
        (112, EndReason.TLS_HANDSHAKE_FAILED),  # unrecognized_name
        (116, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),  # certificate_required
        (120, EndReason.TLS_ALPN_MISMATCH),  # no_application_protocol
        (255, EndReason.TLS_HANDSHAKE_FAILED),
    ],
)
def test_alerts_are_named(policy: TLSPolicy, description: int, reason: EndReason) -> None:
    """Each alert in the handshake has the reason that a person can act on, and OpenSSL's words for it."""
    failure = answered(policy, alert(description))
    assert failure.reason is reason
    assert failure.detail
    assert not set(failure.detail) & set("[('")


def test_close_notify_in_the_handshake_is_a_close(policy: TLSPolicy) -> None:
    """A server that says goodbye in place of a ServerHello has closed."""
    assert answered(policy, alert(0, level=1)).reason is EndReason.TLS_CLOSED


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT broker:8883 HTTP/1.1\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"220 mail.test ESMTP\r\n",
        b"\x20\x02\x00\x05\x00",
        bytes(20),
        b"\xff" * 20,
    ],
)
def test_what_is_not_tls_is_named(policy: TLSPolicy, answer: bytes) -> None:
    """A server of another protocol is told from a broken TLS server."""
    assert answered(policy, answer).reason is EndReason.TLS_NOT_TLS


@pytest.mark.parametrize("version", [0x0300, 0x0301, 0x0302])
def test_a_server_that_knows_only_old_versions_is_named(policy: TLSPolicy, version: int) -> None:
    """Servers of before TLS 1.3 answer with what they have, not with an alert: OpenSSL declines it."""
    assert answered(policy, server_hello(version)).reason is EndReason.TLS_VERSION


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA256", "ECDHE-RSA-AES128-SHA"])
def test_weak_ciphers_are_not_offered(tmp_path: Path, cipher: str) -> None:
    """Without forward secrecy, or without authenticated encryption, there is no channel."""
    root = certify_ca(key=rsa_key())
    server = Server(certify(root, key=rsa_key()), maximum=ssl.TLSVersion.TLSv1_2, ciphers=cipher)
    policy = make_policy(TLS(ca_file=(write(tmp_path / "root.pem", root.pem),)))
    channel = TLSChannel(policy, LOCALHOST)
    channel.start()
    answer = server.receive(channel.outgoing())
    with pytest.raises(UpstreamFailure) as caught:
        channel.receive(answer)
    assert caught.value.reason is EndReason.TLS_HANDSHAKE_FAILED
    assert "handshake failure" in caught.value.detail


# The 1024-bit group of RFC 2409 §6.2, which many old servers are set up with.
OAKLEY_GROUP_2 = bytes.fromhex(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE65381FFFFFFFFFFFFFFFF"
)


def test_a_small_diffie_hellman_group_is_not_blamed_on_the_certificate(tmp_path: Path) -> None:
    """A broker with a weak group fails in the handshake, and OpenSSL's words say that it is the group."""
    # A SEQUENCE of two INTEGERs, the prime and the generator 2 (PKCS #3 §9).
    parameters = b64encode(bytes.fromhex("308187028181 00") + OAKLEY_GROUP_2 + b"\x02\x01\x02")
    pem = b"-----BEGIN DH PARAMETERS-----\n%b\n-----END DH PARAMETERS-----\n" % parameters
    group = write(tmp_path / "dh.pem", pem)
    root = certify_ca(key=rsa_key())
    server = Server(
        certify(root, key=rsa_key()), maximum=ssl.TLSVersion.TLSv1_2, ciphers="DHE-RSA-AES128-GCM-SHA256", group=group
    )
    policy = make_policy(TLS(ca_file=(write(tmp_path / "root.pem", root.pem),)))
    failure = refused(TLSChannel(policy, LOCALHOST), server)
    assert failure.reason is EndReason.TLS_HANDSHAKE_FAILED
    assert "dh key too small" in failure.detail


@BOTH_TLS_VERSIONS
def test_a_missing_client_certificate_is_named(policy: TLSPolicy, maximum: ssl.TLSVersion) -> None:
    """A broker that demands a client certificate says so by another alert in each version: one reason for both."""
    server = Server(maximum=maximum, client_ca=ROOT)
    channel = TLSChannel(policy, LOCALHOST)
    assert refused(channel, server).reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED


@BOTH_TLS_VERSIONS
def test_a_client_certificate_is_shown_with_its_chain(tmp_path: Path, maximum: ssl.TLSVersion) -> None:
    """The broker gets the gateway's certificate, and can verify it to its root."""
    client = certify(certify_ca(ROOT), subject="gateway", names=(), purposes=[CLIENT])
    tls = TLS(
        ca_file=(write(tmp_path / "root.pem", ROOT.pem),),
        client_cert=write(tmp_path / "cert.pem", *(each.pem for each in client.chain)),
        client_key=write(tmp_path / "key.pem", client.key_pem),
    )
    server = Server(maximum=maximum, client_ca=ROOT)
    established(make_policy(tls), server)
    assert server.tls.getpeercert(binary_form=True) == client.certificate.public_bytes(Encoding.DER)


VERIFICATION_CODES = {
    SSL.X509VerificationCodes.ERR_CERT_HAS_EXPIRED: EndReason.TLS_EXPIRED,
    SSL.X509VerificationCodes.ERR_ERROR_IN_CERT_NOT_AFTER_FIELD: EndReason.TLS_EXPIRED,
    SSL.X509VerificationCodes.ERR_CERT_NOT_YET_VALID: EndReason.TLS_NOT_YET_VALID,
    SSL.X509VerificationCodes.ERR_ERROR_IN_CERT_NOT_BEFORE_FIELD: EndReason.TLS_NOT_YET_VALID,
    SSL.X509VerificationCodes.ERR_CERT_REVOKED: EndReason.TLS_REVOKED,
    SSL.X509VerificationCodes.ERR_UNABLE_TO_GET_CRL: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_UNABLE_TO_DECRYPT_CRL_SIGNATURE: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_CRL_SIGNATURE_FAILURE: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_CRL_NOT_YET_VALID: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_CRL_HAS_EXPIRED: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_ERROR_IN_CRL_LAST_UPDATE_FIELD: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_ERROR_IN_CRL_NEXT_UPDATE_FIELD: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_UNABLE_TO_GET_CRL_ISSUER: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_KEYUSAGE_NO_CRL_SIGN: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_UNHANDLED_CRITICAL_CRL_EXTENSION: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_DIFFERENT_CRL_SCOPE: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_CRL_PATH_VALIDATION_ERROR: EndReason.TLS_CRL_UNUSABLE,
    SSL.X509VerificationCodes.ERR_INVALID_PURPOSE: EndReason.TLS_WRONG_PURPOSE,
    66: EndReason.TLS_WEAK_CERTIFICATE,
    67: EndReason.TLS_WEAK_CERTIFICATE,
    68: EndReason.TLS_WEAK_CERTIFICATE,
} | dict.fromkeys(range(80, 95), EndReason.TLS_STRICT_REFUSED)


def test_every_verification_code_refuses_with_its_reason() -> None:
    """OpenSSL's codes have the reasons that fit them; all others, those to come included, are an untrusted chain."""
    for code in range(1, 200):
        failure = verification_failure(code, 0, NOW)
        assert failure.reason is VERIFICATION_CODES.get(code, EndReason.TLS_UNTRUSTED_CHAIN), code
        assert f"(OpenSSL error {code})" in failure.detail


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (SSL.X509VerificationCodes.ERR_DEPTH_ZERO_SELF_SIGNED_CERT, "self-signed"),
        (SSL.X509VerificationCodes.ERR_SELF_SIGNED_CERT_IN_CHAIN, "root"),
        (SSL.X509VerificationCodes.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY, "issuer"),
        (SSL.X509VerificationCodes.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE, "one certificate"),
        (SSL.X509VerificationCodes.ERR_CERT_CHAIN_TOO_LONG, "too long"),
        (SSL.X509VerificationCodes.ERR_PATH_LENGTH_EXCEEDED, "path length"),
        (SSL.X509VerificationCodes.ERR_PERMITTED_VIOLATION, "name constraints"),
        (SSL.X509VerificationCodes.ERR_EXCLUDED_VIOLATION, "name constraints"),
        (SSL.X509VerificationCodes.ERR_UNHANDLED_CRITICAL_EXTENSION, "critical extension"),
    ],
)
def test_an_untrusted_chain_says_what_is_wrong_with_it(code: int, word: str) -> None:
    """Each of OpenSSL's codes has the words that belong to it."""
    assert word in verification_failure(code, 0, NOW).detail


def test_an_unknown_issuer_is_named() -> None:
    """Escaped and cut; if a trusted CA has the same name, its key is not the issuer's."""
    ca = certify_ca(subject="Example\x1b Plant CA")
    leaf = crypto.X509.from_cryptography(certify(ca).certificate)
    details = {code: verification_failure(code, 0, NOW, leaf).detail for code in range(1, 100)}
    assert [code for code, detail in details.items() if "issued by" in detail] == [2, 7, 18, 19, 20, 21]
    assert details[21].endswith(r"issued by CN=Example\x1b Plant CA")
    again = certify_ca(subject="Example\x1b Plant CA").certificate
    assert "its key does not match" in verification_failure(20, 0, NOW, leaf, [again]).detail
    other = certify_ca(subject="Other").certificate
    assert verification_failure(20, 0, NOW, leaf, [other]).detail == details[20]
    long = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * 64)] * 9)
    hostile: Any = SimpleNamespace(to_cryptography=lambda: SimpleNamespace(issuer=long))
    assert len(verification_failure(20, 0, NOW, hostile).detail) < 300


def test_few_roots_are_compared_with_an_issuer() -> None:
    """Each takes 50 µs of a turn of the event loop, and a public bundle has a hundred and fifty."""
    taken = itertools.count()
    roots = (SimpleNamespace(subject=next(taken)) for _ in range(1000))
    leaf = crypto.X509.from_cryptography(certify().certificate)
    verification_failure(20, 0, NOW, leaf, roots)  # type: ignore[arg-type]
    assert next(taken) == 20


def test_the_clock_is_shown_where_it_matters() -> None:
    """Beside what another time of day would have let pass, and nowhere else; the dates, for certificates."""
    certificate = crypto.X509.from_cryptography(certify().certificate)
    details = {code: verification_failure(code, 0, NOW, certificate).detail for code in range(1, 100)}
    assert [code for code, detail in details.items() if "clock says" in detail] == [9, 10, 11, 12]
    assert [code for code, detail in details.items() if "valid from" in detail] == [9, 10]


def test_a_failure_says_which_certificate() -> None:
    """A chain has several certificates, and it matters whose is wrong."""
    assert "the broker's certificate" in verification_failure(10, 0, NOW).detail
    assert "the CA certificate at depth 2" in verification_failure(10, 2, NOW).detail


def test_a_clock_before_this_versions_day_is_named_as_the_cause() -> None:
    """Of what is not yet valid, certificate or CRL, and of nothing else; the day itself is plausible."""
    before = MADE - timedelta(minutes=1)
    reasons = {code: verification_failure(code, 0, before).reason for code in range(1, 200)}
    assert [code for code, reason in reasons.items() if reason is EndReason.CLOCK_IMPLAUSIBLE] == [9, 11]
    assert verification_failure(9, 0, MADE).reason is EndReason.TLS_NOT_YET_VALID
    assert f"clock says {before:%Y-%m-%d} 23:59 UTC" in verification_failure(9, 0, before).detail


def test_a_certificate_that_is_not_valid_yet_is_shown_beside_the_clock(policy: TLSPolicy) -> None:
    """Whoever reads the log can tell which of the two is wrong."""
    begins = NOW + timedelta(days=1)
    failure = refused(TLSChannel(policy, LOCALHOST), Server(certify(ROOT, valid_from=1)))
    assert failure.reason is EndReason.TLS_NOT_YET_VALID
    assert f"it is valid from {begins:%Y-%m-%d %H:%M} UTC to " in failure.detail
    assert f"this machine's clock says {NOW:%Y-%m-%d }" in failure.detail


def test_a_box_whose_clock_is_implausible_refuses_and_says_so(
    policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No check is skipped: the same is refused, in other words.  Here it is the day that is moved, not the clock."""
    monkeypatch.setattr(failures, "MADE", NOW + timedelta(days=1))
    assert (
        refused(TLSChannel(policy, LOCALHOST), Server(certify(ROOT, valid_from=1))).reason
        is EndReason.CLOCK_IMPLAUSIBLE
    )
    expired = Server(certify(ROOT, valid_from=-2, valid_for=1))
    assert refused(TLSChannel(policy, LOCALHOST), expired).reason is EndReason.TLS_EXPIRED
    established(policy, Server(certify(ROOT)))


@pytest.mark.parametrize("queue", [[], [-1, "Unexpected EOF"], [("", "", "")], [104, "ECONNRESET"]])
@pytest.mark.parametrize("approved", [True, False])
def test_any_error_queue_makes_a_failure(queue: Sequence[object], approved: bool) -> None:
    """The exceptions of pyOpenSSL have several shapes, and sometimes nothing in them."""
    failure = handshake_failure(queue, approved=approved)
    assert failure.reason is EndReason.TLS_HANDSHAKE_FAILED
    assert failure.detail


def test_the_reason_in_an_error_queue_is_what_is_shown() -> None:
    """Of an entry with a library, a function and a reason, the reason; the library if there is none."""
    queue = [("SSL routines", "f", "tlsv1 alert internal error"), ("BIO routines", "g", "")]
    assert handshake_failure(queue, approved=False).detail == "tlsv1 alert internal error; BIO routines"


# ---- identity


@pytest.mark.parametrize(
    ("name", "canonical", "sni"),
    [
        ("broker.test", "broker.test", b"broker.test"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", b"xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1", None),
        ("2001:DB8::0:1", "2001:db8::1", None),
    ],
)
def test_an_identity_is_a_name_or_an_address(name: str, canonical: str, sni: bytes | None) -> None:
    """Names are sent as SNI, addresses are not (RFC 6066 §3)."""
    identity = Identity.of(name)
    assert (identity.name, identity.sni) == (canonical, sni)


@pytest.mark.parametrize("name", ["", "not a name"])
def test_what_is_no_name_makes_no_identity(name: str) -> None:
    """The configuration lets none of these through; nor does the identity."""
    with pytest.raises(ValueError, match="Invalid"):
        Identity.of(name)


@pytest.mark.parametrize(
    ("wanted", "names", "matched"),
    [
        ("broker.test", ["DNS:other.test", "DNS:broker.test"], "DNS:broker.test"),
        ("broker.test", ["DNS:BROKER.Test"], "DNS:broker.test"),
        ("a.example.test", ["DNS:*.example.test"], "DNS:*.example.test"),
        ("192.0.2.1", ["DNS:broker.test", "IP:192.0.2.1"], "IP:192.0.2.1"),
        ("2001:db8::1", ["IP:2001:db8:0::1"], "IP:2001:db8::1"),
        ("broker.test", ["DNS:broker.test", "DNS:127.0.0.1"], "DNS:broker.test"),
        ("broker.test", ["DNS:*", "DNS:*.lan", "DNS:b*.test", "DNS:broker.test"], "DNS:broker.test"),
        ("broker.test", ["DNS:broker.test ", "DNS:", "DNS:a\0b", "DNS:7", "DNS:broker.test"], "DNS:broker.test"),
        ("192.0.2.1", ["DNS:192.0.2.1", "DNS:*.lan", "IP:192.0.2.1"], "IP:192.0.2.1"),
    ],
)
def test_the_entry_that_matches_is_named(wanted: str, names: list[str], matched: str) -> None:
    """The record says which entry of the certificate it was."""
    assert Identity.of(wanted).match(certify(names=names).certificate) == matched


@pytest.mark.parametrize(
    ("wanted", "names", "words"),
    [
        ("broker.test", [], "the certificate has no subjectAltName, and its common name is not used"),
        (
            "broker.test",
            ["DNS:a.test", "IP:192.0.2.1"],
            "is for DNS:a.test, IP:192.0.2.1; expected broker.test",
        ),
        ("192.0.2.1", ["DNS:a.test"], "is for DNS:a.test; expected 192.0.2.1, an IP address"),
        ("broker.test", ["email:a@b.test"], "no usable subjectAltName (email:a@b.test)"),
        ("broker.test", ["URI:mqtts://broker.test"], "no usable subjectAltName (URI:mqtts://broker.test)"),
        ("broker.test", ["DNS:*"], "a wildcard that is too wide or misplaced (DNS:*)"),
        ("broker.lan", ["DNS:*.lan"], "a wildcard that is too wide or misplaced (DNS:*.lan)"),
        (
            "broker.test",
            ["DNS:broker.test ", "DNS:\tbroker.test"],
            r"no usable subjectAltName (DNS:broker.test , DNS",
        ),
        ("broker.test", ["DNS:broker.test\r\n", "DNS:broker.test\0"], r"no usable subjectAltName (DNS:broker.test\r\n"),
        ("broker.test", ["DNS:broker.test.", "DNS:.broker.test"], "no usable subjectAltName"),
        ("127.0.0.1", ["DNS:127.0.0.1", "DNS:*.lan"], "a wildcard that is too wide"),
        ("a.test", [f"DNS:{index}.test" for index in range(20)], "DNS:7.test and 12 more; expected a.test"),
    ],
)
def test_a_mismatch_says_why(wanted: str, names: list[str], words: str) -> None:
    """The detail names what the certificate is for and what was wanted."""
    with pytest.raises(UpstreamFailure) as caught:
        Identity.of(wanted).match(certify(subject=wanted, names=names).certificate)
    assert caught.value.reason is EndReason.TLS_NAME_MISMATCH
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("tag", "contents"),
    [
        (0x87, b"12345"),
        (0x87, b"127.0.0.1"),
        (0xA3, b""),
        (0xA5, b""),
        (0x89, b"x"),
        (0x82, b"\xff"),
        (0x82, b""),
        (0x86, b"http://["),
        (0xA0, b"\x06\x08\x2b\x06\x01\x05\x05\x07\x08\x07\xa0\x01\x00"),
    ],
    ids=["IP of 5 bytes", "IP as text", "X.400", "EDI", "unknown kind", "not ASCII", "empty", "URI", "SRV"],
)
def test_an_entry_that_cannot_be_used_does_not_hide_the_others(tag: int, contents: bytes) -> None:
    """`cryptography` and service-identity give up on the whole extension for most of these."""
    odd = element(tag, contents)
    certificate = with_alt_names(odd + element(0x82, b"broker.test") + odd)
    assert Identity.of("broker.test").match(certificate) == "DNS:broker.test"
    assert shown_names(certificate).isprintable()
    with pytest.raises(UpstreamFailure, match="no usable subjectAltName"):
        Identity.of("broker.test").match(with_alt_names(odd))


def test_a_name_that_is_too_long_for_dns_is_not_read() -> None:
    """It is no broker's, and reading one of 64 KiB takes longer than a turn may."""
    long = "DNS:" + "a." * 125 + "test"
    assert Identity.of("broker.test").match(certify(names=[long, "DNS:broker.test"]).certificate)
    with pytest.raises(UpstreamFailure, match="no usable subjectAltName"):
        Identity.of("broker.test").match(certify(names=[long]).certificate)


@pytest.mark.parametrize(
    "contents",
    [b"\x82", b"\x82\x80", b"\x82\x85\0\0\0\0\1x", b"\x82\x0cbroker.test", b"\x82\x82\x00"],
    ids=["no length", "indefinite length", "long length", "too short", "half a length"],
)
def test_a_malformed_extension_is_a_refusal(contents: bytes) -> None:
    """An extension that is not DER is refused, and shown without an exception."""
    certificate = with_alt_names(element(0x82, b"broker.test") + contents)
    with pytest.raises(UpstreamFailure, match="cannot be read"):
        Identity.of("broker.test").match(certificate)
    assert shown_names(certificate) == "unreadable"


def test_two_extensions_with_names_are_a_refusal() -> None:
    """RFC 5280 §4.2 allows one of each kind."""
    certified = certify(names=["DNS:a.test"], permitted=["DNS:b.test"])
    # The OBJECT IDENTIFIERs of name constraints and subjectAltName differ in their last byte.
    twice = with_bytes_replaced(certified, b"\x55\x1d\x1e", b"\x55\x1d\x11").certificate
    for wanted in ("a.test", "b.test"):
        with pytest.raises(UpstreamFailure, match="several subjectAltName extensions"):
            Identity.of(wanted).match(twice)


def with_alt_names(contents: bytes) -> x509.Certificate:
    """Make a certificate whose subjectAltName has these bytes in it."""
    room = "x" * (len(contents) - 2)
    before = element(0x30, element(0x82, room.encode()))
    return with_bytes_replaced(certify(names=[f"DNS:{room}"]), before, element(0x30, contents)).certificate


def test_a_name_is_escaped_once() -> None:
    """A backslash is doubled, so that it is no escape; a byte that is not UTF-8 is an escape."""
    names = [rb"a\b", rb"\xff", b"\xff", "ü".encode(), b"\x1b"]
    certificate = with_alt_names(b"".join(element(0x82, name) for name in names))
    assert shown_names(certificate) == r"DNS:a\\b, DNS:\\xff, DNS:\xff, DNS:ü, DNS:\x1b"


def test_an_unknown_issuer_is_told_apart() -> None:
    """A proxy that intercepts TLS shows one; other untrusted chains have a trusted root."""
    unknown = [code for code in range(1, 100) if isinstance(verification_failure(code, 0, NOW), UnknownIssuer)]
    assert unknown == [2, 18, 19, 20, 21]


def test_after_approval_a_failed_handshake_is_the_client_certificates() -> None:
    """Before, it is about ciphers or extensions, and what was offered is told."""
    queue = [("SSL routines", "", "sslv3 alert handshake failure")]
    after = handshake_failure(queue, approved=True, offered="ciphers")
    before = handshake_failure(queue, approved=False, offered="ciphers")
    assert after.reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED
    assert (before.reason, "offered: ciphers" in before.detail) == (EndReason.TLS_HANDSHAKE_FAILED, True)
    assert "offered" not in after.detail
    other = [("SSL routines", "", "tlsv1 alert internal error")]
    assert "offered" not in handshake_failure(other, approved=True, offered="ciphers").detail
    assert "offered" not in handshake_failure(other, approved=False).detail


def test_the_first_eight_names_are_shown() -> None:
    """Each with its kind; of the others their number."""
    names = ["email:a@b.test", "URI:mqtts://b.test", "IP:10.0.0.1", *(f"DNS:{number}.test" for number in range(7))]
    shown = (
        "email:a@b.test, URI:mqtts://b.test, IP:10.0.0.1, DNS:0.test, DNS:1.test, DNS:2.test, DNS:3.test, DNS:4.test"
    )
    assert shown_names(certify(names=names).certificate) == f"{shown} and 2 more"
    assert shown_names(certify(names=names[:8]).certificate) == shown


def test_a_hostile_certificate_cannot_write_into_the_log() -> None:
    """Names in a certificate are a stranger's text: control characters are escaped, long ones cut."""
    names = ["DNS:a\x1b[2Jb.test", "DNS:a\nb.test", "email:" + "x" * 500 + "@a.test"]
    shown = shown_names(certify(names=names).certificate)
    assert shown.isprintable()
    assert "\\x1b[2J" in shown
    assert len(shown) < 300


def test_a_hostile_subject_cannot_write_into_the_log(tmp_path: Path) -> None:
    """The same holds for subject and issuer of a broker that is trusted."""
    root = certify_ca(subject="Root\n2020-01-01 CA")
    policy = make_policy(TLS(ca_file=(write(tmp_path / "root.pem", root.pem),)))
    peer = established(policy, Server(certify(root, subject="broker\x1b[2J\u202e"))).peer
    assert peer is not None
    assert (peer.subject + peer.issuer).isprintable()


# ---- trust


def problems(**tls: object) -> list[str]:
    """Return what is wrong with the files of a configuration."""
    with pytest.raises(ConfigError) as caught:
        make_policy(TLS(**tls))  # type: ignore[arg-type]  # by keyword, as the tests need it
    return caught.value.problems


DER = ROOT.certificate.public_bytes(Encoding.DER)
ENCRYPTED_KEY = ROOT.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase"))
BROKEN_PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
# Begins like a key, and holds the word "secret".
BROKEN_KEY = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"
BROKEN_CRL = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("ca_file", None, "cannot be read: No such file or directory"),
        ("ca_file", b"", "is empty"),
        ("ca_file", DER, "convert it with `openssl x509 -inform der"),
        ("ca_file", ROOT.key_pem, "but no certificate: perhaps the two files are swapped"),
        ("ca_file", BROKEN_PEM, "contains a damaged certificate"),
        ("crl_file", None, "cannot be read: No such file or directory"),
        ("crl_file", ROOT.pem, "contains no PEM CRL"),
        ("crl_file", BROKEN_CRL, "contains a CRL that cannot be read"),
        ("client_cert", ROOT.pem, "contains no PEM private key"),
        ("client_cert", ROOT.pem + ENCRYPTED_KEY, "contains an encrypted private key"),
        ("client_cert", ROOT.pem + BROKEN_KEY, "contains a damaged private key"),
        ("client_cert", BROKER.pem + ROOT.key_pem, "is not the key of the first certificate"),
        ("client_cert", ROOT.pem + BROKER.pem + BROKER.key_pem, "is not the key of the first certificate"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, key: str, content: bytes | None, words: str) -> None:
    """Each problem names the key, the file and what is wrong, and shows nothing of a private key."""
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems(**{key: path if key == "client_cert" else (path,)})
    assert problem.startswith(f"tls.{key}: {path} " if "key" not in words else "tls.client_key: ")
    assert words in problem
    assert "c2VjcmV0" not in problem


@pytest.mark.parametrize("key", ["ca_file", "ca_dir", "crl_file", "client_cert", "client_key"])
@pytest.mark.parametrize("kind", ["fifo", "huge"])
def test_a_file_that_cannot_be_read_to_its_end_is_named(tmp_path: Path, key: str, kind: str) -> None:
    """A FIFO would block the reload and all after it; a disk image would fill the memory."""
    path = tmp_path / "file.pem"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 3 << 30)
    values: dict[str, Any] = {key: path if key.startswith("client") else (path,)}
    if key == "client_key":
        (tmp_path / "own").write_bytes(ROOT.pem)
        values["client_cert"] = tmp_path / "own"
    if key == "ca_dir":
        values = {"ca_dir": tmp_path}
    found = problems(**values)
    words = "it is a FIFO, not a regular file" if kind == "fifo" else "it is larger than "
    assert all(f"{path} cannot be read: {words}" in problem for problem in found)
    assert found


def test_all_files_are_complained_of_at_once(tmp_path: Path) -> None:
    """One start shows everything that is wrong."""
    missing = tmp_path / "missing.pem"
    found = problems(ca_file=(missing,), ca_dir=missing, crl_file=(missing, missing), client_cert=missing)
    assert {problem.partition(":")[0] for problem in found} == {
        "tls.ca_file",
        "tls.ca_dir",
        "tls.crl_file",
        "tls.client_cert",
        "tls.client_key",
    }


def test_a_directory_of_roots_is_read(tmp_path: Path) -> None:
    """Every *.pem, *.crt and *.cer in `ca_dir` counts, beside `ca_file`; one without any is a mistake."""
    assert f"{tmp_path} contains no certificate" in problems(ca_dir=tmp_path)[0]
    roots = [certify_ca(subject=f"Root {index}") for index in range(4)]
    for root, name in zip(roots, ("a.pem", "b.crt", "c.cer", "d.txt"), strict=True):
        write(tmp_path / name, root.pem)
    policy = make_policy(TLS(ca_file=(write(tmp_path / "root", ROOT.pem),), ca_dir=tmp_path))
    assert list(policy.roots) == [each.certificate for each in (ROOT, *roots[:3])]
    for root in (ROOT, *roots[:3]):
        established(policy, Server(certify(root)))
    unread = refused(TLSChannel(policy, LOCALHOST), Server(certify(roots[3])))
    assert unread.reason is EndReason.TLS_UNTRUSTED_CHAIN


def test_a_client_certificate_that_openssl_declines_is_named(tmp_path: Path) -> None:
    """A weak client certificate would be refused by brokers: it is a problem of the configuration, not a traceback."""
    weak = certify(ROOT, key=rsa_key(1024))
    (problem,) = problems(client_cert=weak.write(tmp_path / "client.pem"))
    assert problem.startswith(f"tls.client_cert: {tmp_path / 'client.pem'} ")


def test_a_pin_is_the_digest_of_the_public_key() -> None:
    """As `openssl` computes it: the key counts, not the certificate."""
    renewed = certify(ROOT, key=BROKER.key, subject="renewed")
    assert spki_pin(renewed.certificate) == spki_pin(BROKER.certificate) != spki_pin(OTHER.certificate)
    public = BROKER.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki_pin(BROKER.certificate) == sha256(public).digest()


@pytest.mark.parametrize("digest", [bytes(32), b"\xff" * 32, b"\xfc" + bytes(31), bytes(range(32))])
@pytest.mark.parametrize("prefix", ["", "sha256/", "sha256//"])
def test_a_pin_may_be_any_digest(prefix: str, digest: bytes) -> None:
    """A slash is a digit of base64, too: one in 64 pins begins with it, whatever stands before."""
    assert TLS(pin=(prefix + b64encode(digest).decode(),)).pin_digests == {digest}


def test_revocation_lists_are_all_read(tmp_path: Path) -> None:
    """A file may hold the CRLs of several CAs."""
    intermediate = certify_ca(ROOT)
    revoked = certify(intermediate)
    both = write(tmp_path / "crl.pem", revocation_list(ROOT), b"text between\n", revocation_list(intermediate, revoked))
    policy = make_policy(TLS(ca_file=(write(tmp_path / "root.pem", ROOT.pem),), crl_file=(both,)))
    established(policy, Server(certify(intermediate)))
    assert refused(TLSChannel(policy, LOCALHOST), Server(revoked)).reason is EndReason.TLS_REVOKED


def test_a_platform_without_roots_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second opinion needs roots; where there are none, it says what to install."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    monkeypatch.setattr(trust, "_PLATFORM_BUNDLES", ())
    platform_roots.cache_clear()
    with pytest.raises(ValueError, match=r"install ca-certificates or set tls\.ca_file"):
        platform_roots()


def test_what_came_whole_before_a_bad_record_is_not_lost(policy: TLSPolicy) -> None:
    """It may be the broker's refusal, or why it goes."""
    server = Server()
    channel = established(policy, server)
    good = server.send(b"refused")
    bad = bytearray(server.send(b"forged"))
    bad[-1] ^= 1
    assert channel.receive(good + bytes(bad)) == b"refused"
    assert channel.broken is not None
    assert channel.broken.reason is EndReason.UPSTREAM_LOST
    assert channel.outgoing()  # the alert
    with pytest.raises(UpstreamFailure) as caught:
        channel.send(b"more")
    assert caught.value.reason is EndReason.UPSTREAM_LOST
    assert channel.outgoing() == b""


@pytest.mark.parametrize(
    "offer", [{"ciphers": "AES128-GCM-SHA256"}, {"ciphers": "ECDHE-RSA-AES128-SHA256"}], ids=["RSA only", "CBC only"]
)
def test_a_broker_without_a_common_cipher_is_told_what_was_offered(policy: TLSPolicy, offer: dict[str, str]) -> None:
    """Whoever configures the broker reads what it lacks."""
    server = Server(certify(ROOT, key=rsa_key(2048)), maximum=ssl.TLSVersion.TLSv1_2, **offer)
    failure = refused(TLSChannel(policy, LOCALHOST), server)
    assert failure.reason is EndReason.TLS_HANDSHAKE_FAILED
    assert "ECDHE or DHE with AES-GCM or ChaCha20-Poly1305; groups X25519, P-256" in failure.detail


def test_a_renegotiation_that_is_declined_is_no_refused_certificate() -> None:
    """TLS 1.2 settles certificates in its handshake; in TLS 1.3 the same alert comes later, and means one."""
    queue = [("SSL routines", "", "ssl/tls alert handshake failure")]
    for version, reason in (
        ("TLSv1.2", EndReason.UPSTREAM_LOST),
        ("TLSv1.3", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ):
        channel = object.__new__(TLSChannel)
        channel._connection = SimpleNamespace(get_protocol_version_name=lambda version=version: version)
        with pytest.raises(UpstreamFailure) as caught:
            channel._ended(b"", SSL.Error(queue))
        assert caught.value.reason is reason
        assert ("renegotiation" in caught.value.detail) is (version == "TLSv1.2")
