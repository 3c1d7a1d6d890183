"""What the gateway does with brokers of every kind, on real sockets: not one byte of MQTT leaves before verification.

In each refusal the device gets the CONNACK of its version that says so, the record has the exact reason, the broker
has no application byte, and nothing stays behind in the gateway.
"""

from __future__ import annotations

import gc
import socket
import ssl
import threading
import time
import warnings
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trustme
from attrs import evolve, field, frozen
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto

from gateway.config import TLS
from gateway.dial.dialler import Dialler
from gateway.errors import ConfigError, EndReason, UpstreamFailure
from gateway.relay.upstream import UpstreamProtocol
from gateway.session.record import SessionRecord
from gateway.session.session import Session
from gateway.tls import channel as channel_module
from gateway.tls import strict
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel, make_policy
from gateway.tls.trust import platform_roots, spki_pin
from tests import mqtt_packets as packets
from tests.harness import THROUGH, Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.pki import (
    CLIENT,
    SERVER,
    Certified,
    as_version_1,
    certify,
    certify_ca,
    revocation_list,
    rsa_key,
    signed_with,
    with_bytes_replaced,
    with_serial,
)

ANY_PURPOSE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
ROOT = certify_ca()
INTERMEDIATE = certify_ca(ROOT)
EXPIRED_ROOT = certify_ca(subject="Expired Root CA", valid_from=-30, valid_for=29)
# Seconds after which a handshake that hangs, and only such a one, is given up.
SHORT = 0.3
# Seconds for which a broker that was refused is left alone: the least that can be configured.
LEFT_ALONE = 0.001

VERSIONS = pytest.mark.parametrize("version", [4, 5])


def refusal(version: int, reason: EndReason) -> bytes:
    """Write the CONNACK that a device gets when there is no upstream."""
    if version == 5:
        properties = packets.text(0x1F, f"{reason}: {reason.meaning}")
        return packets.connack(version=5, code=0x88, properties=properties)
    return packets.connack(version=version, code=3)


def on_the_way(*reasons: EndReason) -> tuple[EndReason, ...]:
    """Return what a session ends with for these reasons, also if the tests go through a proxy."""
    if THROUGH and EndReason.TLS_UNTRUSTED_CHAIN in reasons:
        return (*reasons, EndReason.PROXY_INTERCEPTS_TLS)
    return reasons


@frozen
class Trial:
    """A gateway in front of brokers, and what is to come of a device's session."""

    gateway: RunningGateway
    brokers: tuple[Broker, ...]

    def refused(self, *reasons: EndReason, version: int = 4, after: int = 0) -> SessionRecord:
        """Have a session refused for one of `reasons`, after `after` others have ended; return its record."""
        with Device(self.gateway.port) as device:
            # What comes along with CONNECT, as some devices send it, must not leave either.
            device.send(packets.connect(version=version) + packets.publish(version=version) + packets.disconnect())
            answer = device.read_to_end()
        record = self.gateway.wait_ended(after + 1)
        assert record.reason in on_the_way(*reasons), record.detail
        assert answer == refusal(version, record.reason)
        assert (record.bytes_up, record.packets_up, record.peer) == (0, 0, None)
        for broker in self.brokers:
            settle(broker)
            assert application_bytes(broker) == b""
        self.gateway.wait_empty()
        return record

    def trusted(self, *, version: int = 4, after: int = 0) -> SessionRecord:
        """Have a session accepted and end in good order; return its record."""
        already = len(self.brokers[-1].received)
        with Device(self.gateway.port) as device:
            device.send(packets.connect(version=version))
            accepted = packets.connack(version=version)
            answer = device.read(len(accepted))
            assert answer == accepted, self.gateway.wait_ended(after + 1)
            device.send(packets.disconnect())
            device.read_to_end()
        record = self.gateway.wait_ended(after + 1)
        assert record.reason is EndReason.DEVICE_DISCONNECT
        settle(self.brokers[-1])
        assert self.brokers[-1].received[already:] == packets.connect(version=version) + packets.disconnect()
        self.gateway.wait_empty()
        return record


def settle(broker: Broker) -> None:
    """Wait until the broker has read everything that was sent to it, and may be dialled again if it was refused."""
    time.sleep(2 * LEFT_ALONE)
    eventually(
        lambda: (
            broker.accepted
            and broker.accepted
            == len(broker.handshake_errors) + sum(each.finished.is_set() for each in list(broker.connections))
        ),
        "the broker's connections have ended",
    )


def application_bytes(broker: Broker) -> bytes:
    """Return what reached the broker's application; without TLS, what on the wire is no handshake of TLS."""
    if broker._context is not None:
        return broker.received
    return b"".join(data for kind, data in records(broker.received) if kind not in {HANDSHAKE, ALERT})


HANDSHAKE, ALERT = 22, 21


def records(wire: bytes) -> list[tuple[int, bytes]]:
    """Cut what was on the wire into TLS records: content types and fragments (RFC 8446 §5.1)."""
    found = []
    while wire:
        size = int.from_bytes(wire[3:5], "big")
        found.append((wire[0], wire[5 : 5 + size]))
        wire = wire[5 + size :]
    return found


@pytest.fixture
def begin(
    start_broker: Callable[..., Broker],
    start_gateway: Callable[..., RunningGateway],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Trial]:
    """Return a function that starts a broker, and a gateway in front of it."""
    numbers = count()
    # Each dial is to be a session's: the gateway's own, to see whether a broker is well again, would take a turn away.
    monkeypatch.setattr(Dialler, "sweep", lambda _: None)

    def write(*parts: bytes) -> Path:
        path = tmp_path / f"{next(numbers)}.pem"
        path.write_bytes(b"".join(parts))
        return path

    def start(
        *servers: Any,
        roots: Sequence[Certified] | None = (ROOT,),
        host: str = "localhost",
        server_name: str = "",
        crls: Sequence[bytes] = (),
        client: Certified | None = None,
        serve: Callable[[BrokerConnection], None] | None = None,
        address: str = "127.0.0.1",
        hangs: bool = False,
        **tls: Any,
    ) -> Trial:
        brokers = tuple(start_broker(tls=server, serve=serve, address=address) for server in servers)
        if crls:
            tls["crl_file"] = [str(write(*crls))]
        if client is not None:
            tls["client_cert"] = str(client.write(tmp_path / "client.pem"))
        gateway = start_gateway(
            upstream=[{"host": host, "port": broker.port, "server_name": server_name} for broker in brokers],
            ca_file=None if roots is None else write(*(root.pem for root in roots)),
            tls=tls,
            timeouts={"tls": SHORT if hangs else 20},
            failover={"retry_first": LEFT_ALONE, "retry_max": LEFT_ALONE},
        )
        return Trial(gateway, brokers)

    return start


# ---- certificates


@frozen
class Case:
    """A broker's server, what the gateway is told, and the reason for which it refuses (`None`: it does not)."""

    reason: EndReason | None
    server: Callable[[], Any]
    settings: dict[str, Any] = field(factory=dict)
    roots: Callable[[], Sequence[Certified]] = lambda: (ROOT,)


def leaf(issuer: Callable[[], Certified] = lambda: ROOT, **arguments: Any) -> Callable[[], ServerTLS]:
    """Return a function that makes a server whose certificate has something wrong, or nothing.

    Its common name is the first of its names, as public CAs have it.
    """
    names = arguments.get("names", ["DNS:localhost"])
    if names:
        arguments.setdefault("subject", names[0].partition(":")[2])
    return lambda: certify(issuer(), **arguments).server()


def rsa_root() -> Certified:
    """Make a root that signs with RSA; there is one key, so all that it makes are the same to a verifier."""
    return certify_ca(subject="RSA Root CA", key=rsa_key())


def below(**arguments: Any) -> Callable[[], Certified]:
    """Return a function that makes an intermediate CA below the trusted root."""
    return lambda: certify_ca(ROOT, **arguments)


def alone(certified: Certified) -> ServerTLS:
    """Make a server that sends its own certificate only."""
    return certified.server(chain=[certified])


REVOKED = certify(ROOT)
SELF_SIGNED = certify()
PINNED = certify(INTERMEDIATE)


def pin(certified: Certified) -> str:
    """Write a certificate's key as it is configured."""
    return "sha256/" + b64encode(spki_pin(certified.certificate)).decode()


def with_root(certified: Certified) -> ServerTLS:
    """Make a server that sends its root, too."""
    assert certified.issuer is not None
    return certified.server(chain=[certified, certified.issuer])


UNTRUSTED = EndReason.TLS_UNTRUSTED_CHAIN
MISMATCH = EndReason.TLS_NAME_MISMATCH
WEAK = EndReason.TLS_WEAK_CERTIFICATE
CRL_UNUSABLE = EndReason.TLS_CRL_UNUSABLE

REFUSED = {
    "expired": Case(EndReason.TLS_EXPIRED, leaf(valid_from=-30, valid_for=29)),
    "not yet valid": Case(EndReason.TLS_NOT_YET_VALID, leaf(valid_from=1)),
    "expired intermediate": Case(EndReason.TLS_EXPIRED, leaf(below(valid_from=-30, valid_for=29))),
    "expired root": Case(
        EndReason.TLS_EXPIRED,
        leaf(lambda: EXPIRED_ROOT),
        roots=lambda: (EXPIRED_ROOT,),
    ),
    "other name": Case(MISMATCH, leaf(names=["DNS:other.test"])),
    "longer name": Case(MISMATCH, leaf(names=["DNS:localhost.test", "DNS:a.localhost"])),
    "no SAN, matching CN": Case(MISMATCH, leaf(names=(), subject="localhost")),
    "other SAN, matching CN": Case(MISMATCH, leaf(names=["DNS:other.test"], subject="localhost")),
    "e-mail SAN only": Case(MISMATCH, leaf(names=["email:broker@localhost"], subject="localhost")),
    "URI SAN only": Case(MISMATCH, leaf(names=["URI:mqtts://localhost"])),
    "SAN *": Case(MISMATCH, leaf(names=["DNS:*"])),
    "SAN with white space": Case(MISMATCH, leaf(names=["DNS:localhost "])),
    "SAN with line ends": Case(MISMATCH, leaf(names=["DNS:\tlocalhost\r\n"])),
    "SAN *.*.example": Case(MISMATCH, leaf(names=["DNS:*.*.example"]), {"server_name": "a.b.example"}),
    "SAN *.lan": Case(MISMATCH, leaf(names=["DNS:*.lan"]), {"server_name": "broker.lan"}),
    "wildcard above two labels": Case(
        MISMATCH, leaf(names=["DNS:*.example.test"]), {"server_name": "a.b.example.test"}
    ),
    "wildcard above no label": Case(MISMATCH, leaf(names=["DNS:*.example.test"]), {"server_name": "example.test"}),
    "wildcard within a label": Case(
        MISMATCH, leaf(names=["DNS:b*.example.test"]), {"server_name": "broker.example.test"}
    ),
    "wildcard in the second label": Case(
        MISMATCH, leaf(names=["DNS:a.*.example.test"]), {"server_name": "a.b.example.test"}
    ),
    "server_name differs, host matches": Case(MISMATCH, leaf(), {"server_name": "broker.test"}),
    "IP host, DNS SAN": Case(MISMATCH, leaf(names=["DNS:localhost"]), {"host": "127.0.0.1"}),
    "IP host, its digits as DNS SAN": Case(MISMATCH, leaf(names=["DNS:127.0.0.1"]), {"host": "127.0.0.1"}),
    "IP host, other IP SAN": Case(MISMATCH, leaf(names=["IP:127.0.0.2"]), {"host": "127.0.0.1"}),
    "DNS host, IP SAN": Case(MISMATCH, leaf(names=["IP:127.0.0.1"])),
    "IPv6 host, mapped IPv4 SAN": Case(
        MISMATCH, leaf(names=["IP:127.0.0.1", "IP:::ffff:127.0.0.1"]), {"host": "::1", "address": "::1"}
    ),
    "IDNA name, other name": Case(MISMATCH, leaf(names=["DNS:bucher.example"]), {"server_name": "bücher.example"}),
    "self-signed": Case(UNTRUSTED, lambda: certify().server()),
    "unknown CA": Case(UNTRUSTED, leaf(lambda: certify_ca(subject="Another"))),
    "unknown CA, sent along": Case(UNTRUSTED, lambda: with_root(certify(certify_ca(subject="Another")))),
    "CA that has the trusted one's name": Case(UNTRUSTED, leaf(certify_ca, authority_key_identifier=False)),
    "intermediate missing": Case(UNTRUSTED, lambda: alone(certify(certify_ca(ROOT)))),
    "intermediate trusted, root unknown": Case(UNTRUSTED, leaf(lambda: INTERMEDIATE), roots=lambda: (INTERMEDIATE,)),
    "intermediate without CA flag": Case(UNTRUSTED, leaf(below(ca=False))),
    "intermediate without basicConstraints": Case(UNTRUSTED, leaf(below(ca=None))),
    "intermediate that may not sign": Case(UNTRUSTED, leaf(below(signs_certificates=False))),
    "intermediate of version 1": Case(UNTRUSTED, leaf(lambda: as_version_1(certify_ca(ROOT)))),
    "issued by a broker": Case(UNTRUSTED, leaf(lambda: certify(ROOT, names=["DNS:other.test"]))),
    "path length broken": Case(
        UNTRUSTED, leaf(lambda: certify_ca(certify_ca(ROOT, path_length=0), subject="Second CA"))
    ),
    "name not permitted": Case(UNTRUSTED, leaf(below(permitted=["DNS:example.test"]))),
    "name excluded": Case(UNTRUSTED, leaf(below(excluded=["DNS:localhost"]))),
    "address not permitted": Case(
        UNTRUSTED, leaf(below(permitted=["IP:10.0.0.0/8"]), names=["IP:127.0.0.1"]), {"host": "127.0.0.1"}
    ),
    "client purpose only": Case(EndReason.TLS_WRONG_PURPOSE, leaf(purposes=[CLIENT])),
    "intermediate for clients only": Case(EndReason.TLS_WRONG_PURPOSE, leaf(below(purposes=[CLIENT]))),
    "RSA 1024": Case(WEAK, leaf(key=rsa_key(1024))),
    "intermediate with RSA 1024": Case(WEAK, leaf(below(key=rsa_key(1024)))),
    "SHA-1 signature": Case(
        WEAK, lambda: signed_with("SHA-1", certify(rsa_root())).server(), roots=lambda: (rsa_root(),)
    ),
    "intermediate with SHA-1 signature": Case(
        WEAK, leaf(lambda: signed_with("SHA-1", certify_ca(rsa_root()))), roots=lambda: (rsa_root(),)
    ),
    "MD5 signature": Case(WEAK, lambda: signed_with("MD5", certify(rsa_root())).server(), roots=lambda: (rsa_root(),)),
    "SAN that is not ASCII": Case(
        EndReason.TLS_NAME_MISMATCH,
        lambda: with_bytes_replaced(certify(ROOT), b"localhost", b"localhos\xff").server(),
    ),
    "revoked": Case(EndReason.TLS_REVOKED, REVOKED.server, {"crls": [revocation_list(ROOT, REVOKED)]}),
    "CRL expired": Case(CRL_UNUSABLE, leaf(), {"crls": [revocation_list(ROOT, valid_from=-9, valid_for=2)]}),
    "CRL not valid yet": Case(CRL_UNUSABLE, leaf(), {"crls": [revocation_list(ROOT, valid_from=1)]}),
    "CRL of another CA": Case(CRL_UNUSABLE, leaf(), {"crls": [revocation_list(certify_ca(subject="Another"))]}),
    "CRL signed by another": Case(
        CRL_UNUSABLE, leaf(), {"crls": [revocation_list(ROOT, signer=certify_ca(subject="Another"))]}
    ),
    "CRL of the root only": Case(CRL_UNUSABLE, leaf(below()), {"crls": [revocation_list(ROOT)]}),
    "intermediate revoked": Case(
        EndReason.TLS_REVOKED,
        leaf(lambda: INTERMEDIATE),
        {"crls": [revocation_list(ROOT, INTERMEDIATE), revocation_list(INTERMEDIATE)]},
    ),
    "wrong pin": Case(EndReason.TLS_PIN_MISMATCH, leaf(), {"pin": [pin(certify())]}),
    "pin of a CA that is only sent along": Case(
        EndReason.TLS_PIN_MISMATCH,
        lambda: PINNED.server(chain=[*PINNED.chain, REVOKED]),
        {"pin": [pin(REVOKED)]},
    ),
}
"""Brokers that are refused, by what is wrong with them."""

TRUSTED = {
    "as it should be": Case(None, leaf()),
    "intermediate sent": Case(None, leaf(below())),
    "two intermediates": Case(None, leaf(lambda: certify_ca(certify_ca(ROOT, path_length=1), subject="Second CA"))),
    "root sent, too": Case(None, lambda: with_root(certify(ROOT))),
    "chain in the wrong order": Case(None, lambda: PINNED.server(chain=[PINNED, ROOT, INTERMEDIATE])),
    "self-signed, and trusted itself": Case(None, lambda: SELF_SIGNED.server(), roots=lambda: (SELF_SIGNED,)),
    "one of several roots": Case(None, leaf(), roots=lambda: (EXPIRED_ROOT, rsa_root(), ROOT, ROOT)),
    "RSA 2048, signed with SHA-256": Case(None, leaf(rsa_root, key=rsa_key()), roots=lambda: (rsa_root(),)),
    "no purposes named": Case(None, leaf(purposes=())),
    "a CA that is a broker, too": Case(None, leaf(ca=True)),
    "name permitted": Case(None, leaf(below(permitted=["DNS:localhost"], excluded=["DNS:example.test"]))),
    "right name among others": Case(None, leaf(names=["DNS:other.test", "email:a@b.test", "DNS:LOCALHOST", "IP:::1"])),
    "server_name matches, host differs": Case(None, leaf(names=["DNS:broker.test"]), {"server_name": "broker.test"}),
    "server_name with trailing dot": Case(None, leaf(names=["DNS:broker.test"]), {"server_name": "broker.test."}),
    "server_name is an address": Case(None, leaf(names=["IP:192.0.2.1"]), {"server_name": "192.0.2.1"}),
    "address as a name beside the right one": Case(None, leaf(names=["DNS:localhost", "DNS:127.0.0.1"])),
    "wide wildcard beside the right one": Case(None, leaf(names=["DNS:localhost", "DNS:*.lan", "DNS:*"])),
    "address of five bytes beside the right one": Case(
        None,
        lambda: with_bytes_replaced(
            certify(ROOT, names=["DNS:localhost", "URI:12345"]), b"\x86\x0512345", b"\x87\x0512345"
        ).server(),
    ),
    "wildcard": Case(None, leaf(names=["DNS:*.example.test"]), {"server_name": "broker.example.test"}),
    "IDNA name": Case(None, leaf(names=["DNS:xn--bcher-kva.example"]), {"server_name": "Bücher.example"}),
    "IPv4 host": Case(None, leaf(names=["IP:127.0.0.1"]), {"host": "127.0.0.1"}),
    "IPv6 host": Case(None, leaf(names=["IP:::1"]), {"host": "::1", "address": "::1"}),
    "not on the CRL": Case(None, leaf(), {"crls": [revocation_list(ROOT, REVOKED)]}),
    "CRL for each CA": Case(
        None, leaf(lambda: INTERMEDIATE), {"crls": [revocation_list(ROOT), revocation_list(INTERMEDIATE, REVOKED)]}
    ),
    "pin of its key": Case(None, PINNED.server, {"pin": [pin(REVOKED), pin(PINNED)]}),
    "pin of its intermediate": Case(None, PINNED.server, {"pin": [pin(INTERMEDIATE)]}),
    "pin of its root": Case(None, PINNED.server, {"pin": [pin(ROOT)]}),
}
"""Brokers that are trusted, by what is particular about them."""


@VERSIONS
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_broker_is_refused(begin: Callable[..., Trial], case: Case, version: int) -> None:
    """Nothing leaks to a broker that something is wrong with, and the device is told."""
    assert case.reason is not None
    begin(case.server(), roots=case.roots(), **case.settings).refused(case.reason, version=version)


@pytest.mark.parametrize("case", TRUSTED.values(), ids=TRUSTED)
def test_a_broker_is_trusted(begin: Callable[..., Trial], case: Case) -> None:
    """A broker that is what it should be gets what the device sends, and nothing else."""
    record = begin(case.server(), roots=case.roots(), **case.settings).trusted()
    assert record.peer is not None
    assert record.peer.tls_version == "TLSv1.3"


@VERSIONS
@pytest.mark.parametrize("case", ["expired", "other name", "unknown CA", "SAN *", "no SAN, matching CN", "wrong pin"])
def test_a_broker_is_refused_in_tls_1_2(begin: Callable[..., Trial], case: str, version: int) -> None:
    """In TLS 1.2, where certificates are in the clear and the handshake ends otherwise, the verdicts are the same."""
    wrong = REFUSED[case]
    assert wrong.reason is not None
    context = wrong.server().context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    begin(context, roots=wrong.roots(), **wrong.settings).refused(wrong.reason, version=version)


def test_a_broker_is_trusted_in_tls_1_2(begin: Callable[..., Trial]) -> None:
    """TLS 1.2 is enough."""
    record = begin(server_context(maximum=ssl.TLSVersion.TLSv1_2)).trusted(version=5)
    assert record.peer is not None
    assert (record.peer.tls_version, record.peer.matched_san) == ("TLSv1.2", "DNS:localhost")


def server_context(
    certified: Certified | None = None,
    *,
    minimum: ssl.TLSVersion | None = None,
    maximum: ssl.TLSVersion | None = None,
    client_ca: Certified | None = None,
) -> ssl.SSLContext:
    """Make a server's context, with a right certificate unless another is given."""
    context = (certified or certify(ROOT)).server().context()
    with warnings.catch_warnings():
        # The standard library warns of TLS 1.1, as it should.
        warnings.simplefilter("ignore", DeprecationWarning)
        if minimum is not None:
            context.minimum_version = minimum
        if maximum is not None:
            context.maximum_version = maximum
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=client_ca.pem.decode())
    return context


# ---- versions


@VERSIONS
def test_tls_1_1_is_refused(begin: Callable[..., Trial], version: int) -> None:
    """A broker that has nothing above TLS 1.1 is refused."""
    context = server_context(minimum=ssl.TLSVersion.TLSv1_1, maximum=ssl.TLSVersion.TLSv1_1)
    begin(context).refused(EndReason.TLS_VERSION, version=version)


@VERSIONS
def test_a_minimum_of_tls_1_3_is_kept(begin: Callable[..., Trial], version: int) -> None:
    """With `min_version = "1.3"` a broker that has only TLS 1.2 is refused."""
    context = server_context(maximum=ssl.TLSVersion.TLSv1_2)
    begin(context, min_version="1.3").refused(EndReason.TLS_VERSION, version=version)


# ---- what is no TLS, or no end of it


def answers(*parts: bytes, then_close: bool) -> Callable[[BrokerConnection], None]:
    """Serve bytes without regard to what comes, then close or hang."""

    def serve(connection: BrokerConnection) -> None:
        connection.read()
        for part in parts:
            connection.send(part)
        if not then_close:
            connection.read_to_end()

    return serve


SERVER_HELLO_BEGINNING = bytes.fromhex("160303007a 020000760303".replace(" ", ""))


@VERSIONS
@pytest.mark.parametrize(
    ("reason", "serve"),
    [
        (EndReason.TLS_TIMEOUT, answers(then_close=False)),
        (EndReason.TLS_TIMEOUT, answers(SERVER_HELLO_BEGINNING, then_close=False)),
        (EndReason.TLS_CLOSED, answers(then_close=True)),
        (EndReason.TLS_CLOSED, answers(SERVER_HELLO_BEGINNING, then_close=True)),
        (EndReason.TLS_CLOSED, answers(bytes.fromhex("15030300020100"), then_close=False)),
        (EndReason.TLS_NOT_TLS, answers(b"HTTP/1.1 400 Bad Request\r\n\r\n", then_close=True)),
        (EndReason.TLS_NOT_TLS, answers(b"\x20\x02\x00\x00" * 2, then_close=False)),
        (EndReason.TLS_HANDSHAKE_FAILED, answers(bytes.fromhex("15030300020228"), then_close=True)),
    ],
    ids=["hang", "hang in a record", "close", "close in a record", "close_notify", "HTTP", "plain MQTT", "alert"],
)
def test_what_does_not_finish_a_handshake_is_refused(
    begin: Callable[..., Trial], reason: EndReason, serve: Callable[[BrokerConnection], None], version: int
) -> None:
    """Nothing but a handshake is ever on the wire to a server that hangs, closes or does not speak TLS."""
    trial = begin(None, serve=serve, hangs=reason is EndReason.TLS_TIMEOUT)
    trial.refused(reason, version=version)
    assert {kind for kind, _ in records(trial.brokers[0].received)} <= {HANDSHAKE, ALERT}
    assert b"sensor-1" not in trial.brokers[0].received


def test_a_reset_in_the_handshake_is_refused(begin: Callable[..., Trial]) -> None:
    """RST in place of a ServerHello is a refusal like any other."""

    def serve(connection: BrokerConnection) -> None:
        connection.read()
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    begin(None, serve=serve).refused(EndReason.TLS_CLOSED)


# ---- ALPN


class OpenSSLServer:
    """A server by way of pyOpenSSL, for what the standard library's never does.

    It stands in for an `ssl.SSLContext`; `select` is pyOpenSSL's callback for ALPN.
    """

    def __init__(self, certified: Certified, select: Callable[[SSL.Connection, list[bytes]], Any]) -> None:
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        self._context.use_certificate(certified.certificate)
        self._context.use_privatekey(certified.key)
        self._context.set_alpn_select_callback(select)

    def wrap_socket(self, raw: socket.socket, *, server_side: bool) -> _OpenSSLSocket:
        """Shake hands."""
        assert server_side
        raw.setblocking(True)
        connection = SSL.Connection(self._context, raw)
        connection.set_accept_state()
        try:
            connection.do_handshake()
        except (SSL.Error, RuntimeError) as error:
            raise ssl.SSLError(str(error)) from None
        return _OpenSSLSocket(connection)


class _OpenSSLSocket:
    """A pyOpenSSL connection with the standard library's exceptions."""

    def __init__(self, connection: SSL.Connection) -> None:
        self.close = connection.close
        self.shutdown = connection.sock_shutdown
        self.sendall = connection.sendall
        self._connection = connection

    def recv(self, size: int) -> bytes:
        """Read some bytes; empty at the end."""
        try:
            return self._connection.recv(size)
        except SSL.Error:
            return b""


def refuse_protocols(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Answer ALPN with the alert no_application_protocol (RFC 7301 §3.2)."""
    raise RuntimeError("none of these")


@VERSIONS
@pytest.mark.parametrize(
    "select",
    [
        lambda connection, offered: SSL.NO_OVERLAPPING_PROTOCOLS,
        refuse_protocols,
    ],
    ids=["none", "alert"],
)
def test_a_broker_without_the_application_protocol_is_refused(
    begin: Callable[..., Trial], select: Callable[[SSL.Connection, list[bytes]], Any], version: int
) -> None:
    """A server that takes none of the configured protocols is refused."""
    begin(OpenSSLServer(certify(ROOT), select), alpn=["mqtt"]).refused(EndReason.TLS_ALPN_MISMATCH, version=version)


def test_an_application_protocol_that_was_not_offered_is_refused(begin: Callable[..., Trial]) -> None:
    """A server that takes another protocol is refused: by OpenSSL from some version on, before by the gateway."""
    trial = begin(OpenSSLServer(certify(ROOT), lambda connection, offered: b"http/1.1"), alpn=["mqtt"])
    trial.refused(EndReason.TLS_ALPN_MISMATCH, EndReason.TLS_HANDSHAKE_FAILED)


def test_a_broker_without_alpn_is_refused_if_alpn_is_configured(begin: Callable[..., Trial]) -> None:
    """A server that knows no ALPN has not agreed to anything."""
    record = begin(server_context(), alpn=["mqtt"]).refused(EndReason.TLS_ALPN_MISMATCH)
    assert record.detail == "offered mqtt; the broker chose none"


def test_the_application_protocol_is_recorded(begin: Callable[..., Trial]) -> None:
    """A server that takes one of the configured protocols is trusted."""
    context = server_context()
    context.set_alpn_protocols(["mqtt"])
    record = begin(context, alpn=["x-amzn-mqtt-ca", "mqtt"]).trusted()
    assert record.peer is not None
    assert record.peer.alpn == "mqtt"


# ---- SNI


@pytest.mark.parametrize(
    ("host", "server_name", "sent"),
    [
        ("localhost", "", "localhost"),
        ("localhost", "Broker.Example.Test.", "broker.example.test"),
        ("127.0.0.1", "broker.example.test", "broker.example.test"),
        ("localhost", "bücher.example", "xn--bcher-kva.example"),
        ("127.0.0.1", "", None),
        ("localhost", "192.0.2.1", None),
    ],
)
def test_the_verified_name_is_sent_as_sni(
    begin: Callable[..., Trial], host: str, server_name: str, sent: str | None
) -> None:
    """SNI is the name that is verified, and is left out for addresses (RFC 6066 §3)."""
    context = server_context(certify(ROOT, names=["DNS:wrong.test"]))
    asked: list[str | None] = []
    context.sni_callback = lambda connection, name, context: asked.append(name)
    begin(context, host=host, server_name=server_name).refused(EndReason.TLS_NAME_MISMATCH)
    assert asked == [sent]


# ---- client certificates

CLIENTS = certify_ca(subject="Client CA")
BOTH_TLS_VERSIONS = pytest.mark.parametrize(
    "maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"]
)


@BOTH_TLS_VERSIONS
def test_a_client_certificate_is_shown(begin: Callable[..., Trial], maximum: ssl.TLSVersion) -> None:
    """A broker that demands a client certificate gets it, with the intermediates that belong to it."""
    client = certify(certify_ca(CLIENTS), subject="gateway", names=(), purposes=[CLIENT])
    begin(server_context(maximum=maximum, client_ca=CLIENTS), client=client).trusted()


@BOTH_TLS_VERSIONS
@VERSIONS
@pytest.mark.parametrize("issuer", [None, ROOT], ids=["none", "of an unknown CA"])
def test_a_refused_client_certificate_is_named(
    begin: Callable[..., Trial], maximum: ssl.TLSVersion, issuer: Certified | None, version: int
) -> None:
    """No client certificate, or the wrong one: the reason says so in both versions of TLS."""
    client = issuer and certify(issuer, subject="gateway", names=(), purposes=[CLIENT])
    trial = begin(server_context(maximum=maximum, client_ca=CLIENTS), client=client)
    if maximum is ssl.TLSVersion.TLSv1_2:
        trial.refused(EndReason.TLS_CLIENT_CERTIFICATE_REFUSED, version=version)
        return
    # TLS 1.3 lets a client send before it can know that it was refused (RFC 8446 §4.4.2.4): here to a verified broker.
    with Device(trial.gateway.port) as device:
        device.send(packets.connect(version=version))
        assert device.read_to_end() == refusal(version, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED)
    record = trial.gateway.wait_ended()
    assert record.reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED
    assert record.peer is not None
    assert trial.brokers[0].received == b""
    trial.gateway.wait_empty()


# ---- from one session to the next


class Rotating:
    """A server that shows another certificate at each connection; `barrier` lets handshakes begin together."""

    def __init__(self, *servers: Any, barrier: threading.Barrier | None = None) -> None:
        self._contexts = [each.context() if isinstance(each, ServerTLS) else each for each in servers]
        self._turn = count()
        self._barrier = barrier

    def wrap_socket(self, raw: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
        """Shake hands with the next certificate, and again with the first after the last."""
        context = self._contexts[next(self._turn) % len(self._contexts)]
        if self._barrier is not None:
            self._barrier.wait()
        return context.wrap_socket(raw, server_side=server_side)


def test_each_session_is_verified_anew(begin: Callable[..., Trial]) -> None:
    """A broker whose certificate changes is judged by the one that it shows, whatever it showed before."""
    other = certify(ROOT, names=["DNS:other.test"])
    trial = begin(Rotating(certify(ROOT).server(), other.server(), certify(ROOT).server(), certify().server()))
    trial.trusted(after=0)
    received = trial.brokers[0].received
    for after, reason in [(1, EndReason.TLS_NAME_MISMATCH), (3, EndReason.TLS_UNTRUSTED_CHAIN)]:
        with Device(trial.gateway.port) as device:
            device.send(packets.connect())
            assert device.read_to_end() == refusal(4, reason)
        assert trial.gateway.wait_ended(after + 1).reason is reason
        settle(trial.brokers[0])
        assert trial.brokers[0].received == received
        if after == 1:
            trial.trusted(after=2)
            received = trial.brokers[0].received


SIMULTANEOUS = 50


def test_sessions_at_the_same_time_are_judged_each_by_its_own(begin: Callable[..., Trial]) -> None:
    """Fifty handshakes that share one Context: each fails, or not, for the reason that is its own."""
    kinds = [
        (certify(ROOT), None),
        (certify(ROOT, names=["DNS:other.test"]), EndReason.TLS_NAME_MISMATCH),
        (certify(ROOT, valid_from=-30, valid_for=29), EndReason.TLS_EXPIRED),
        (certify(ROOT), None),
        (certify(), EndReason.TLS_UNTRUSTED_CHAIN),
    ]
    barrier = threading.Barrier(SIMULTANEOUS)
    trial = begin(Rotating(*(certified.server() for certified, _ in kinds), barrier=barrier))
    devices = [Device(trial.gateway.port) for _ in range(SIMULTANEOUS)]
    for number, device in enumerate(devices):
        device.send(packets.connect(f"sensor-{number:02}", version=5) + packets.disconnect())
    answers = Counter(device.read_to_end() for device in devices)
    for device in devices:
        device.close()
    trial.gateway.wait_ended(SIMULTANEOUS)
    settle(trial.brokers[0])
    trial.gateway.wait_empty()

    each = SIMULTANEOUS // len(kinds)
    bad = [reason for _, reason in kinds if reason is not None]
    accepted = packets.connack(version=5)
    assert answers == {accepted: 2 * each} | {refusal(5, reason): each for reason in bad}
    reasons = Counter(record.reason for record in trial.gateway.ended)
    assert reasons == {EndReason.DEVICE_DISCONNECT: 2 * each} | dict.fromkeys(bad, each)
    admitted = {
        record.client_identifier for record in trial.gateway.ended if record.reason is EndReason.DEVICE_DISCONNECT
    }
    arrived = {bytes(connection.received) for connection in trial.brokers[0].connections if connection.received}
    assert arrived == {packets.connect(each, version=5) + packets.disconnect() for each in admitted}
    # It is the admitted ones that are in the records with a broker's name.
    assert {record.client_identifier for record in trial.gateway.ended if record.peer is not None} == admitted


def test_nothing_of_a_session_is_left(begin: Callable[..., Trial]) -> None:
    """When sessions have ended, well or badly, no session, channel or connection of theirs exists any more."""
    kept = (TLSChannel, Session, UpstreamProtocol, SSL.Connection)

    def left() -> Counter[str]:
        gc.collect()
        return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kept)

    trial = begin(Rotating(certify(ROOT).server(), certify().server(), certify(ROOT, names=["DNS:a.test"]).server()))
    for number in range(12):
        with Device(trial.gateway.port) as device:
            device.send(packets.connect() + packets.disconnect())
            device.read_to_end()
        trial.gateway.wait_ended(number + 1)
    trial.gateway.wait_empty()
    assert {record.reason for record in trial.gateway.ended} == {
        EndReason.DEVICE_DISCONNECT,
        EndReason.TLS_UNTRUSTED_CHAIN,
        EndReason.TLS_NAME_MISMATCH,
    }
    eventually(lambda: not left(), "nothing is left of twelve sessions")


# ---- failover


@VERSIONS
@pytest.mark.parametrize("case", ["expired", "other name", "SAN *", "wrong pin"])
def test_a_bad_broker_is_passed_over(begin: Callable[..., Trial], case: str, version: int) -> None:
    """The second broker serves when the first is refused, and nothing leaks to the first."""
    wrong = REFUSED[case]
    right = certify(INTERMEDIATE)
    settings = {"pin": [pin(INTERMEDIATE)]} if case == "wrong pin" else wrong.settings
    trial = begin(wrong.server(), right.server(), **settings)
    trial.trusted(version=version)
    settle(trial.brokers[0])
    assert trial.brokers[0].received == b""


def test_of_several_bad_brokers_all_are_named(begin: Callable[..., Trial]) -> None:
    """When no broker will do, the record names each and what was wrong with it; the last one's reason counts."""
    trial = begin(*(REFUSED[case].server() for case in ("expired", "self-signed", "other name")))
    record = trial.refused(EndReason.TLS_NAME_MISMATCH)
    for broker, word in zip(trial.brokers, ("tls-expired", "tls-untrusted-chain", "tls-name-mismatch"), strict=True):
        assert f"localhost:{broker.port}: {word}" in record.detail


# ---- the platform's roots


def test_the_platforms_roots_are_used_if_none_are_configured(
    begin: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without `ca_file` the platform decides, and SSL_CERT_FILE is how one tells OpenSSL where its roots are."""
    roots = tmp_path / "roots.pem"
    roots.write_bytes(ROOT.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(roots))
    platform_roots.cache_clear()
    begin(leaf()(), roots=None).trusted()
    begin(leaf()(), roots=None, verification="strict").trusted()
    begin(certify().server(), roots=None).refused(EndReason.TLS_UNTRUSTED_CHAIN)
    platform_roots.cache_clear()


def test_the_platforms_roots_do_not_issue_for_tests(
    begin: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private CA is unknown to the platform."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    begin(leaf()(), roots=None).refused(EndReason.TLS_UNTRUSTED_CHAIN)


def test_configured_roots_replace_the_platforms(
    begin: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With `ca_file` set, whom else the platform trusts is of no account."""
    roots = tmp_path / "roots.pem"
    roots.write_bytes(ROOT.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(roots))
    begin(leaf()(), roots=[certify_ca(subject="Another")]).refused(EndReason.TLS_UNTRUSTED_CHAIN)


# ---- strict

FOR_SERVERS = certify_ca(subject="Root CA for servers", purposes=[SERVER])
PLAIN_ROOT = certify_ca(subject="Plain Root CA", subject_key_identifier=False, authority_key_identifier=False)
HAND_MADE: dict[str, tuple[Certified, Callable[[], ServerTLS]]] = {
    "root without subject key identifier": (PLAIN_ROOT, leaf(lambda: PLAIN_ROOT)),
    "no authority key identifier": (ROOT, leaf(authority_key_identifier=False)),
    "intermediate without key usage": (ROOT, leaf(below(key_usage=False))),
    "intermediate with basicConstraints that are not critical": (ROOT, leaf(below(ca_critical=False))),
    "empty subject, SAN not critical": (ROOT, leaf(subject="")),
    "subject, SAN critical": (ROOT, leaf(names_critical=True)),
    "a CA as broker": (ROOT, leaf(ca=True)),
    "common name that is no SAN": (ROOT, leaf(subject="broker.test")),
    "common name in other case than the SAN": (ROOT, leaf(subject="LOCALHOST")),
    "no purposes": (ROOT, leaf(subject="localhost", purposes=())),
    "any purpose": (ROOT, leaf(subject="localhost", purposes=[SERVER, ANY_PURPOSE])),
    "root with a purpose": (FOR_SERVERS, leaf(lambda: FOR_SERVERS, subject="localhost")),
    "serial number zero": (ROOT, lambda: with_serial(certify(ROOT, subject="localhost"), 0).server()),
    "RSA key of 2052 bits": (ROOT, leaf(subject="localhost", key=rsa_key(2052))),
    "intermediate with name constraints that are not critical": (
        ROOT,
        leaf(below(permitted=["DNS:localhost"], constraints_critical=False), subject="localhost"),
    ),
    "intermediate with policy constraints that are not critical": (
        ROOT,
        leaf(below(policy_constraints_critical=False), subject="localhost"),
    ),
    "key usage without digitalSignature": (ROOT, leaf(subject="localhost", digital_signature=False)),
}
RULES = {
    "common name that is no SAN": "common name",
    "common name in other case than the SAN": "common name",
    "no purposes": "no extended key usage serverAuth",
    "any purpose": "anyExtendedKeyUsage",
    "root with a purpose": "the root: it has an extended key usage",
    "serial number zero": "serial number",
    "RSA key of 2052 bits": "2052 bits",
    "intermediate with name constraints that are not critical": "at depth 1: its name constraints",
    "intermediate with policy constraints that are not critical": "at depth 1: its policy constraints",
    "key usage without digitalSignature": "digitalSignature",
}
"""The words for rules that the gateway applies itself."""


@VERSIONS
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("case", HAND_MADE)
def test_strict_refuses_what_standard_accepts(begin: Callable[..., Trial], case: str, version: int) -> None:
    """Certificates that OpenSSL lets pass by default are refused under `strict`, and the record names the rule."""
    root, server = HAND_MADE[case]
    begin(server(), roots=[root]).trusted(version=version)
    record = begin(server(), roots=[root], verification="strict").refused(EndReason.TLS_STRICT_REFUSED, version=version)
    assert RULES.get(case, "") in record.detail
    assert record.detail


@pytest.mark.parametrize("intermediates", [1, 2])
def test_strict_counts_no_self_issued_certificate_against_a_path_length(
    begin: Callable[..., Trial], intermediates: int
) -> None:
    """RFC 5280 §4.2.1.9: a CA that renews its key by a certificate of its own name needs no longer path."""
    issuer = certify_ca(ROOT, path_length=0)
    for _ in range(intermediates):
        issuer = certify_ca(issuer, path_length=0)
        assert issuer.certificate.subject == issuer.certificate.issuer
    begin(certify(issuer, subject="localhost").server(), verification="strict").trusted()


def test_strict_looks_at_all_parts_of_a_path_with_a_self_issued_certificate(begin: Callable[..., Trial]) -> None:
    """What is wrong above it is found as well as what is wrong below it."""
    for wrong_above in (True, False):
        above = certify_ca(ROOT, key=rsa_key(2052) if wrong_above else None)
        below_it = certify_ca(above, ca_critical=wrong_above)
        server = certify(below_it, subject="localhost").server()
        begin(server).trusted()
        begin(server, verification="strict").refused(EndReason.TLS_STRICT_REFUSED)


@pytest.mark.parametrize(
    ("arguments", "words"), [({"number": None}, "no CRL number"), ({"number_critical": True}, "is critical")]
)
def test_strict_refuses_a_crl_without_a_proper_number(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    """RFC 5280 §5.2.3; it is found when the file is read, and `standard` takes it."""
    root = tmp_path / "root.pem"
    root.write_bytes(ROOT.pem)
    crl = tmp_path / "list.crl"
    crl.write_bytes(revocation_list(ROOT) + revocation_list(ROOT, **arguments))
    tls = TLS(ca_file=(root,), crl_file=(crl,))
    make_policy(tls)
    with pytest.raises(ConfigError) as caught:
        make_policy(evolve(tls, verification="strict"))
    assert words in str(caught.value)


@frozen
class FromTrustme:
    """A root of trustme's, as the fixture takes roots."""

    ca: trustme.CA

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.ca.cert_pem.bytes()


def test_trustme_passes_unless_strict(begin: Callable[..., Trial]) -> None:
    """Certificates of trustme's are trusted, but not by `strict`: their subjectAltName is critical beside a subject."""
    root = trustme.CA()
    for issuer in (root, root.create_child_ca()):
        server = ServerTLS.from_trustme(issuer.issue_cert("localhost"))
        begin(server, roots=[FromTrustme(root)]).trusted()
        record = begin(server, roots=[FromTrustme(root)], verification="strict").refused(EndReason.TLS_STRICT_REFUSED)
        assert "MUST NOT be critical" in record.detail


@pytest.mark.parametrize(
    "case",
    ["as it should be", "intermediate sent", "two intermediates", "wildcard", "IDNA name", "IPv4 host", "IPv6 host"],
)
def test_strict_accepts_what_is_right(begin: Callable[..., Trial], case: str) -> None:
    """`strict` asks for nothing that a careful private CA does not do."""
    right = TRUSTED[case]
    begin(right.server(), verification="strict", **right.settings).trusted()


def test_strict_accepts_rsa_and_the_serial_number_one(begin: Callable[..., Trial]) -> None:
    """RSA of a usual size, and a number that many roots have."""
    root = with_serial(rsa_root(), 1)
    server = with_serial(certify(root, subject="localhost", key=rsa_key()), 1).server()
    begin(server, roots=[root], verification="strict").trusted()


def test_strict_accepts_no_chain_that_ends_elsewhere() -> None:
    """OpenSSL sees to that before; this opinion has roots of its own."""
    leaf_certificate = certify(ROOT, subject="localhost").certificate
    chain, identity = [leaf_certificate, ROOT.certificate], Identity.of("localhost")
    strict.judge(chain, (ROOT.certificate,), identity)
    for roots in ((), (EXPIRED_ROOT.certificate,)):
        with pytest.raises(UpstreamFailure, match="does not end in a trusted root"):
            strict.judge(chain, roots, identity)


@pytest.mark.parametrize(
    ("subject", "names", "host"),
    [
        ("", ["DNS:localhost"], "localhost"),
        ("localhost", ["DNS:other.test", "DNS:localhost"], "localhost"),
        ("127.0.0.1", ["IP:127.0.0.1"], "127.0.0.1"),
    ],
)
def test_strict_accepts_a_common_name_that_is_a_san(
    begin: Callable[..., Trial], subject: str, names: list[str], host: str
) -> None:
    """Or none at all, with a subjectAltName that is critical then."""
    certificate = certify(ROOT, subject=subject, names=names, names_critical=not subject)
    begin(certificate.server(), host=host, verification="strict").trusted()


# ---- fail closed


def raising(problem: BaseException) -> Callable[..., Any]:
    """Return a function that only raises."""

    def fail(*arguments: Any) -> Any:
        raise problem

    return fail


@VERSIONS
@BOTH_TLS_VERSIONS
@pytest.mark.parametrize(
    "problem",
    [RuntimeError("mistake"), KeyError("key"), AssertionError(), MemoryError(), RecursionError(), StopIteration()],
    ids=repr,
)
def test_any_exception_of_the_identity_check_is_a_refusal(
    begin: Callable[..., Trial],
    monkeypatch: pytest.MonkeyPatch,
    problem: BaseException,
    maximum: ssl.TLSVersion,
    version: int,
) -> None:
    """Whatever is raised while the identity is checked, the broker is refused."""
    monkeypatch.setattr(Identity, "match", raising(problem))
    trial = begin(server_context(maximum=maximum))
    record = trial.refused(EndReason.TLS_VERIFICATION_ERROR, version=version)
    assert type(problem).__name__ in record.detail


def without_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave OpenSSL's default in place, which asks nobody."""
    monkeypatch.setattr(SSL.Context, "set_verify", lambda *_: None)


def changing_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each look at the certificate find another name."""
    numbers = count()
    monkeypatch.setattr(Identity, "match", lambda *_: f"DNS:{next(numbers)}.test")


BREAKAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the last look raises": lambda patch: patch.setattr(TLSChannel, "_confirm", raising(RuntimeError())),
    "the last look finds no certificate": lambda patch: patch.setattr(
        SSL.Connection, "get_peer_certificate", lambda *_, **__: None
    ),
    "the last look finds no verified chain": lambda patch: patch.setattr(
        SSL.Connection, "get_verified_chain", lambda *_, **__: None
    ),
    "the last look finds an empty chain": lambda patch: patch.setattr(
        SSL.Connection, "get_verified_chain", lambda *_, **__: []
    ),
    "the last look finds another name": changing_names,
    "the callback approves without looking": lambda patch: patch.setattr(channel_module, "_verify", lambda *_: True),
    "the callback refuses without a reason": lambda patch: patch.setattr(channel_module, "_verify", lambda *_: False),
    "the callback is broken": lambda patch: patch.setattr(channel_module, "_verify", raising(RuntimeError())),
    "the callback does not know whose connection it is": lambda patch: patch.setattr(
        SSL.Connection, "get_app_data", lambda *_: None
    ),
    "the judge raises": lambda patch: patch.setattr(TLSChannel, "judge", raising(ZeroDivisionError())),
    "the certificate cannot be parsed": lambda patch: patch.setattr(
        crypto.X509, "to_cryptography", raising(ValueError("no certificate"))
    ),
    "nobody is asked": without_verification,
}


@VERSIONS
@BOTH_TLS_VERSIONS
@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_verification_refuses(
    begin: Callable[..., Trial],
    monkeypatch: pytest.MonkeyPatch,
    breakage: Callable[[pytest.MonkeyPatch], None],
    maximum: ssl.TLSVersion,
    version: int,
) -> None:
    """Whatever part of the verification is broken, a broker that would be trusted is refused."""
    breakage(monkeypatch)
    begin(server_context(maximum=maximum)).refused(EndReason.TLS_VERIFICATION_ERROR, version=version)


@pytest.mark.parametrize(
    "problem", [RuntimeError("mistake"), UpstreamFailure(EndReason.TLS_PIN_MISMATCH, "x")], ids=["exception", "failure"]
)
def test_a_failure_does_not_reach_the_next_session(
    begin: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    """What is raised in one session's verification ends that session and no other."""
    trial = begin(server_context())
    with monkeypatch.context() as patch:
        patch.setattr(Identity, "match", raising(problem))
        trial.refused(problem.reason if isinstance(problem, UpstreamFailure) else EndReason.TLS_VERIFICATION_ERROR)
    trial.trusted(after=1)
