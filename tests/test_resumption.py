"""Resumed TLS sessions: no certificate is shown and no callback asked, and still no broker gets by unverified.

In memory with channels and a time of day that the test sets; on real sockets with brokers that issue tickets.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from twisted.logger import formatEvent, globalLogPublisher

from gateway.config import TLS, Upstream
from gateway.dial.dialler import Target
from gateway.errors import EndReason, UpstreamFailure
from gateway.tls import channel as channel_module
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import ChannelState, NotVerified, TLSChannel, make_policy
from gateway.tls.direct import DirectCalls
from gateway.tls.engine import PublicCalls
from gateway.tls.tickets import MAX_AGE, SUSPENDED_FOR, Ticket, Tickets
from gateway.tls.trust import TLSPolicy, spki_pin
from tests import mqtt_packets as packets
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.pki import CLIENT, NOW, Certified, certify, certify_ca, revocation_list
from tests.ports import free_port
from tests.tools import require_tool

ROOT = certify_ca()
INTERMEDIATE = certify_ca(ROOT, valid_for=3)
BROKER = certify(INTERMEDIATE, names=["DNS:localhost"], valid_for=10)
LOCALHOST = Identity.of("localhost")
START = NOW.timestamp()
DAY = 86400.0
BOTH_ENGINES = pytest.mark.parametrize("engine", [PublicCalls, DirectCalls])


class Watch:
    """A time of day that the test sets, in seconds since the epoch."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class MemoryServer:
    """One connection to a broker in memory; those of one context know each other's tickets."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.received = b""

    def receive(self, ciphertext: bytes) -> bytes:
        """Take what the channel sent; return the answer."""
        self._incoming.write(ciphertext)
        try:
            self.tls.do_handshake()
            self.received += self.tls.read(65536)
        except (ssl.SSLWantReadError, ssl.SSLError):
            pass
        return self._outgoing.read()


class World:
    """A gateway's policy and the tickets for its broker, and the broker."""

    def __init__(self, directory: Path, broker: Certified = BROKER, *, version: str = "1.3", **tls: Any) -> None:
        root = directory / "root.pem"
        root.write_bytes(ROOT.pem)
        self.policy = make_policy(TLS(ca_file=(root,), **tls))
        self.watch = Watch()
        self.tickets = Tickets(self.policy, LOCALHOST, self.watch)
        self.serve(broker, version)

    def serve(self, broker: Certified, version: str = "1.3") -> None:
        """Have the broker start anew, with another certificate or another version."""
        self.context = broker.server().context()
        self.context.maximum_version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]

    def begin(self, policy: TLSPolicy | None = None, tickets: Tickets | None = None) -> tuple[TLSChannel, MemoryServer]:
        """Begin a session."""
        tickets = tickets or self.tickets
        channel = TLSChannel(policy or self.policy, tickets.identity, tickets)
        channel.start()
        return channel, MemoryServer(self.context)

    def session(self) -> tuple[TLSChannel, MemoryServer]:
        """Have a session that is verified, with the tickets that the broker has for it."""
        channel, server = self.begin()
        talk(channel, server)
        assert channel.state is ChannelState.VERIFIED
        return channel, server

    def resumed(self) -> bool:
        """Have a session; return whether it was resumed, of which both ends must be of one opinion."""
        channel, server = self.session()
        assert channel.peer is not None
        assert channel.peer.resumed == server.tls.session_reused
        server.receive(channel.send(b"CONNECT"))
        assert server.received == b"CONNECT"
        channel.close()
        return channel.peer.resumed

    def refused(self, *begin: Any) -> UpstreamFailure:
        """Have a session refused after the broker resumed it; nothing may reach the broker."""
        channel, server = self.begin(*begin)
        with pytest.raises(UpstreamFailure) as caught:
            talk(channel, server)
        assert channel.state is ChannelState.CLOSED
        assert channel.peer is None
        with pytest.raises(NotVerified):
            channel.send(b"CONNECT")
        server.receive(channel.outgoing())
        assert server.tls.session_reused
        assert server.received == b""
        return caught.value


def talk(channel: TLSChannel, server: MemoryServer, *, cut: int = 1 << 20) -> None:
    """Pass bytes both ways, cut into pieces, until neither has any."""
    while ciphertext := channel.outgoing():
        answer = server.receive(ciphertext)
        for start in range(0, len(answer), cut):
            if channel.state is ChannelState.HANDSHAKING:
                with pytest.raises(NotVerified):
                    channel.send(b"too early")
            assert channel.receive(answer[start : start + cut]) == b""


SUPPORTED_GROUPS, SESSION_TICKET = 10, 35


def hello_extensions(hello: bytes) -> dict[int, bytes]:
    """Return the extensions in the record of a ClientHello, by their types (RFC 8446 §4.1.2)."""
    rest = hello[5 + 4 + 2 + 32 :]
    for size_of_length in (1, 2, 1):  # session id, ciphers, compression
        rest = rest[size_of_length + int.from_bytes(rest[:size_of_length], "big") :]
    rest = rest[2:]
    extensions = {}
    while rest:
        end = 4 + int.from_bytes(rest[2:4], "big")
        extensions[int.from_bytes(rest[:2], "big")] = rest[4:end]
        rest = rest[end:]
    return extensions


def groups(extensions: dict[int, bytes]) -> list[int]:
    """Return the groups that a ClientHello offers (RFC 8446 §4.2.7)."""
    listed = extensions[SUPPORTED_GROUPS][2:]
    return [int.from_bytes(listed[start : start + 2], "big") for start in range(0, len(listed), 2)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a world whose broker has had one session."""
    world = World(tmp_path)
    assert not world.resumed()
    return world


# ---- what is resumed


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_a_session_resumes_the_one_before(world: World, cut: int) -> None:
    """The broker shows no certificate and the facts about it are those of the session before; nothing leaves early."""
    first, _ = world.session()
    channel, server = world.begin()
    assert channel.resuming
    talk(channel, server, cut=cut)
    assert server.tls.session_reused
    assert not channel.resuming
    assert channel.approved
    assert channel.peer is not None
    assert channel.peer.resumed
    assert channel.peer == first.peer
    assert channel.peer.matched_san == "DNS:localhost"
    assert server.received == b""


def test_a_resumed_session_asks_no_callback_but_judges_the_identity(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is why it is dangerous, and what is done about it: the certificate is matched all the same."""
    asked: list[int] = []
    matched: list[Any] = []
    judge, match = TLSChannel.judge, Identity.match

    def counting_judge(channel: TLSChannel, *arguments: Any) -> bool:
        asked.append(1)
        return judge(channel, *arguments)

    def counting_match(identity: Identity, certificate: Any) -> str:
        matched.append(certificate)
        return match(identity, certificate)

    monkeypatch.setattr(TLSChannel, "judge", counting_judge)
    monkeypatch.setattr(Identity, "match", counting_match)
    assert world.resumed()
    assert (asked, matched) == ([], [BROKER.certificate])


def test_tickets_are_kept_from_resumed_sessions_too(world: World) -> None:
    """A broker may take each ticket only once, so that the latest is the one to have."""
    kept = []
    for _ in range(3):
        ticket = world.tickets.offer()
        assert ticket is not None
        kept.append(ticket.session)
        assert world.resumed()
    assert len(set(map(id, kept))) == 3


def test_a_session_leaves_one_ticket(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers send several at a time, and to look at each is work for nothing."""
    kept: list[Ticket] = []
    keep = Tickets.keep

    def counting_keep(tickets: Tickets, ticket: Ticket) -> None:
        kept.append(ticket)
        keep(tickets, ticket)

    monkeypatch.setattr(Tickets, "keep", counting_keep)
    world.context.num_tickets = 4
    assert world.resumed()
    assert len(kept) == 1
    assert repr(kept[0].secret) not in repr(kept[0])


def test_a_broker_that_has_lost_its_tickets_is_verified_in_full(world: World) -> None:
    """A broker that was started anew cannot resume; it shows its certificate, and its new tickets are good."""
    world.serve(BROKER)
    assert not world.resumed()
    assert world.resumed()


def test_a_broker_without_tickets_is_verified_in_full(world: World) -> None:
    """What an OpenSSL session is without a ticket is nothing to resume."""
    world.serve(BROKER)
    world.context.num_tickets = 0
    world.tickets.suspend()
    world.watch.now += SUSPENDED_FOR
    assert [world.resumed() for _ in range(3)] == [False] * 3
    assert world.tickets.offer() is None


def test_tls_1_2_is_not_resumed(tmp_path: Path) -> None:
    """Its tickets carry the session's keys: none is asked for, and none is kept."""
    world = World(tmp_path, version="1.2")
    for _ in range(2):
        channel, server = world.begin()
        hello = channel.outgoing()
        assert SESSION_TICKET not in hello_extensions(hello)
        assert channel.receive(server.receive(hello)) == b""
        talk(channel, server)
        assert channel.agreed()[0] == "TLSv1.2"
        assert not server.tls.session_reused
        # What is no application data makes the channel look for a ticket.
        channel._keep_ticket()
        assert world.tickets.offer() is None


def test_a_ticket_of_tls_1_3_is_of_no_use_to_tls_1_2(world: World) -> None:
    """A broker that falls back to TLS 1.2 resumes nothing, and is verified in full when it is tried again."""
    world.serve(BROKER, version="1.2")
    channel, server = world.begin()
    # With a ticket, one group is offered, and the key of the broker's certificate is of another (RFC 8422 §5.1).
    with pytest.raises(UpstreamFailure):
        talk(channel, server)
    assert channel.resuming
    assert server.received == b""
    world.tickets.suspend()
    assert not world.resumed()


@BOTH_ENGINES
def test_a_key_is_made_for_the_group_that_the_broker_chose(
    world: World, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    """With a ticket, that group alone is offered; without, all are, so that it may be a better one an hour later."""
    monkeypatch.setattr(channel_module, "choose", lambda: engine)
    full = hello_extensions(world.begin(tickets=Tickets(world.policy, LOCALHOST, world.watch))[0].outgoing())
    with_ticket = hello_extensions(world.begin()[0].outgoing())
    assert len(groups(full)) > 3
    chosen = {"x25519": 0x001D, "X25519MLKEM768": 0x11EC}[ticket_of(world).verified.group]
    assert groups(with_ticket) == ([chosen] if engine is DirectCalls else groups(full))
    assert world.resumed()


# ---- as long as everything that was verified still holds


def moments() -> Iterator[Any]:
    """Yield how long after its full handshake a session is resumed, and whether it may be."""
    hour = MAX_AGE
    yield pytest.param({}, 0, True, id="at once")
    yield pytest.param({}, hour - 1, True, id="just before the hour")
    yield pytest.param({}, hour, False, id="after the hour")
    yield pytest.param({}, -1, False, id="the clock was set back")
    until_soon = {"valid_from": -1, "valid_for": 1 + 1800 / DAY}
    yield pytest.param({"leaf": until_soon}, 1799, True, id="before the certificate expires")
    yield pytest.param({"leaf": until_soon}, 1800, False, id="when the certificate expires")
    yield pytest.param({"ca": until_soon}, 1799, True, id="before the intermediate expires")
    yield pytest.param({"ca": until_soon}, 1800, False, id="when the intermediate expires")
    yield pytest.param({"crl": until_soon}, 1799, True, id="before the CRL is due")
    yield pytest.param({"crl": until_soon}, 1800, False, id="when the CRL is due")


@pytest.mark.parametrize(("validity", "later", "expected"), list(moments()))
def test_a_ticket_is_offered_while_its_verification_holds(
    tmp_path: Path, validity: dict[str, Any], later: float, expected: bool
) -> None:
    """Certificates, CRLs and the full handshake itself have a time after which OpenSSL must judge anew."""
    ca = certify_ca(ROOT, **validity.get("ca", {}))
    tls: dict[str, Any] = {}
    if "crl" in validity:
        crls = tmp_path / "crls.pem"
        crls.write_bytes(revocation_list(ROOT) + revocation_list(ca, **validity["crl"]))
        tls["crl_file"] = (crls,)
    world = World(tmp_path, certify(ca, **validity.get("leaf", {})), **tls)
    assert not world.resumed()
    world.watch.now += later
    assert world.resumed() is expected


def test_a_chain_of_resumed_sessions_ends_after_an_hour(world: World) -> None:
    """A ticket from a resumed session is as old as the full handshake at the beginning."""
    for _ in range(3):
        world.watch.now += MAX_AGE / 4
        assert world.resumed()
    world.watch.now += MAX_AGE / 4
    assert not world.resumed()
    world.watch.now += MAX_AGE / 4
    assert world.resumed()


def test_a_ticket_that_expires_during_the_handshake_is_refused(world: World) -> None:
    """What holds is asked when the handshake is done, not only when it begins."""
    channel, server = world.begin()
    world.watch.now += MAX_AGE
    with pytest.raises(UpstreamFailure) as caught:
        talk(channel, server)
    assert caught.value.reason is EndReason.TLS_VERIFICATION_ERROR
    assert channel.state is ChannelState.CLOSED
    assert server.received == b""


# ---- a ticket in the wrong place


def ticket_of(world: World) -> Ticket:
    """Return the ticket that is kept."""
    ticket = world.tickets.offer()
    assert ticket is not None
    return ticket


def misplaced(world: World, **changes: Any) -> tuple[TLSPolicy, Tickets]:
    """Return a policy that differs from the world's, but has its Context, with the world's ticket in its tickets."""
    policy = evolve(world.policy, **changes)
    tickets = Tickets(policy, LOCALHOST, world.watch)
    tickets.keep(ticket_of(world))
    return policy, tickets


def test_a_full_handshake_counts_for_an_hour() -> None:
    """As docs/verification.md says; and as long is nothing resumed after a failure."""
    assert (MAX_AGE, SUSPENDED_FOR) == (3600.0, 3600.0)


def test_a_channel_takes_no_tickets_of_another_broker_or_policy(world: World, tmp_path: Path) -> None:
    """Whose they are is fixed when they are made."""
    for policy, identity in (
        (world.policy, Identity.of("other.test")),
        (make_policy(TLS(ca_file=(tmp_path / "root.pem",))), LOCALHOST),
        (evolve(world.policy, strict=True), LOCALHOST),
    ):
        with pytest.raises(ValueError, match="do not belong to"):
            TLSChannel(policy, identity, world.tickets)


def test_a_resumed_session_with_another_name_is_refused(world: World) -> None:
    """The identity is judged again: a certificate for another name does not pass because it is not shown."""
    tickets = Tickets(world.policy, Identity.of("other.test"), world.watch)
    tickets.keep(ticket_of(world))
    assert world.refused(world.policy, tickets).reason is EndReason.TLS_NAME_MISMATCH


def test_a_resumed_session_that_matches_otherwise_is_refused(world: World) -> None:
    """The entry that matches must be the one that matched in the full handshake."""
    ticket = ticket_of(world)
    world.tickets.keep(evolve(ticket, verified=evolve(ticket.verified, matched="DNS:*.localhost")))
    assert world.refused().reason is EndReason.TLS_VERIFICATION_ERROR


def test_pins_are_checked_again(world: World) -> None:
    """A pin that the chain of the full handshake does not have refuses the resumed session."""
    pin = spki_pin(certify().certificate)
    assert world.refused(*misplaced(world, pins=frozenset({pin}))).reason is EndReason.TLS_PIN_MISMATCH


def test_the_application_protocol_is_checked_again(world: World) -> None:
    """What the broker chooses is chosen in each handshake."""
    assert world.refused(*misplaced(world, alpn=("mqtt",))).reason is EndReason.TLS_ALPN_MISMATCH


def test_a_pinned_broker_is_resumed(tmp_path: Path) -> None:
    """The pin of the CA is not in what the broker shows when it resumes, since it shows nothing; it was verified."""
    pin = b64encode(spki_pin(INTERMEDIATE.certificate)).decode()
    world = World(tmp_path, pin=(pin,))
    assert [world.resumed() for _ in range(2)] == [False, True]


def test_a_ticket_of_another_context_is_never_used(world: World, tmp_path: Path) -> None:
    """The same files read again make another policy: its Context takes no ticket of the old one."""
    fresh = World(tmp_path)
    fresh.context = world.context
    fresh.tickets.keep(ticket_of(world))
    with pytest.raises(ValueError, match="same Context"):
        fresh.begin()


def test_a_certificate_other_than_the_tickets_is_refused(world: World) -> None:
    """The certificate that OpenSSL keeps with the session must be the one whose verification is relied on."""
    ticket = ticket_of(world)
    world.tickets.keep(
        evolve(ticket, verified=evolve(ticket.verified, der=certify(ROOT).certificate.public_bytes(Encoding.DER)))
    )
    assert world.refused().reason is EndReason.TLS_VERIFICATION_ERROR


@pytest.mark.parametrize("secrets", [(b"", b""), (b"the ticket's", b""), (b"the ticket's", b"another")])
def test_a_handshake_without_the_tickets_secret_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, secrets: tuple[bytes, bytes]
) -> None:
    """That no callback was asked proves nothing; that the session has the ticket's secret does."""
    of_ticket, of_session = secrets
    world.tickets.keep(evolve(ticket_of(world), secret=of_ticket))
    monkeypatch.setattr(SSL.Connection, "master_key", lambda _: of_session)
    assert world.refused().reason is EndReason.TLS_VERIFICATION_ERROR


def test_a_handshake_in_which_openssl_asks_is_never_taken_for_a_resumed_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with the ticket's certificate and its secret, when the callback lets pass what it does not approve."""

    def lax(channel: TLSChannel, *_: object) -> bool:
        channel._asked = True
        return True

    world.serve(BROKER)
    monkeypatch.setattr(TLSChannel, "judge", lax)
    world.tickets.keep(evolve(ticket_of(world), secret=b"the ticket's"))
    monkeypatch.setattr(SSL.Connection, "master_key", lambda _: b"the ticket's")
    channel, server = world.begin()
    assert channel.resuming
    with pytest.raises(UpstreamFailure) as caught:
        talk(channel, server)
    assert caught.value.reason is EndReason.TLS_VERIFICATION_ERROR
    assert not server.tls.session_reused
    assert server.received == b""


def test_an_unverified_channel_leaves_no_ticket(tmp_path: Path) -> None:
    """A broker that is refused after its handshake, here for its pin, has left nothing to come back with."""
    world = World(tmp_path, pin=(b64encode(spki_pin(certify().certificate)).decode(),))
    channel, server = world.begin()
    with pytest.raises(UpstreamFailure):
        talk(channel, server)
    channel._keep_ticket()
    assert world.tickets.offer() is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (certify(INTERMEDIATE, names=["DNS:other.test"]), EndReason.TLS_NAME_MISMATCH),
        (certify(INTERMEDIATE, valid_from=-30, valid_for=29), EndReason.TLS_EXPIRED),
        (certify(), EndReason.TLS_UNTRUSTED_CHAIN),
    ],
    ids=["wrong name", "expired", "unknown CA"],
)
def test_a_broker_that_does_not_resume_is_judged_by_what_it_shows(
    world: World, other: Certified, reason: EndReason
) -> None:
    """An offered ticket helps nobody who cannot resume: the full handshake decides, with its own reason."""
    world.serve(other)
    channel, server = world.begin()
    assert channel.resuming
    with pytest.raises(UpstreamFailure) as caught:
        talk(channel, server)
    assert caught.value.reason is reason
    assert server.received == b""


# ---- suspended, switched off, shared with nobody


def test_suspended_tickets_come_back_after_an_hour(world: World) -> None:
    """The first suspension is news; new tickets are not offered before its end."""
    assert world.tickets.suspend()
    assert not world.tickets.suspend()
    assert [world.resumed() for _ in range(2)] == [False, False]
    world.watch.now += SUSPENDED_FOR
    assert [world.resumed() for _ in range(2)] == [False, True]
    assert world.tickets.suspend()


def test_a_clock_that_is_set_back_does_not_suspend_tickets_for_longer(world: World) -> None:
    """By years, it may be: a box without a clock of its own starts with any time."""
    world.watch.now += 365 * 86_400
    assert world.tickets.suspend()
    world.watch.now -= 365 * 86_400
    assert world.resumed()
    assert world.tickets.suspend()


def test_each_target_has_tickets_of_its_own(tmp_path: Path) -> None:
    """Brokers at other ports, other names or under another policy share none; resumption = false has none at all."""
    world = World(tmp_path)
    upstream = Upstream("localhost")
    one, two = (Target(upstream, LOCALHOST, world.policy) for _ in range(2))
    assert one.tickets is not None
    assert one.tickets is not two.tickets
    off = make_policy(TLS(ca_file=(tmp_path / "root.pem",), resumption=False))
    assert Target(upstream, LOCALHOST, off).tickets is None


# ---- on real sockets


def session(gateway: RunningGateway, count: int = 1) -> None:
    """Have `count` sessions, one after the other, each with a message that the broker has read when it ends."""
    for _ in range(count):
        with Device(gateway.port) as device:
            device.send(packets.connect())
            assert device.read(4) == packets.connack(), gateway.ended[-1:]
            device.send(packets.disconnect())
            device.read_to_end()
    gateway.wait_empty()


def resumptions(gateway: RunningGateway) -> list[bool]:
    """Return for each session that began whether it was resumed."""
    return [record.peer.resumed for record in gateway.journal.started if record.peer is not None]


def with_tickets(connection: BrokerConnection, reused: list[bool] | None = None) -> None:
    """Serve as a broker that accepts CONNECT; notes whether the TLS session was resumed."""
    if reused is not None:
        reused.append(connection.socket.session_reused)
    connection.read_packet()
    connection.send(packets.connack())
    connection.read_to_end()


def test_sessions_are_resumed_on_real_sockets(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway]
) -> None:
    """From the second on: the broker says so, the record says so, and what is relayed arrives."""
    reused: list[bool] = []
    broker = start_broker(serve=lambda connection: with_tickets(connection, reused))
    gateway = start_gateway(upstream=broker.port)
    session(gateway, 4)
    assert reused == resumptions(gateway) == [False, True, True, True]
    eventually(lambda: len(broker.received) == 4 * len(packets.connect() + packets.disconnect()), "all has arrived")


def test_nothing_is_resumed_if_that_is_switched_off(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway]
) -> None:
    """`tls.resumption = false`: the broker is verified in full each time, though it issues tickets."""
    reused: list[bool] = []
    broker = start_broker(serve=lambda connection: with_tickets(connection, reused))
    gateway = start_gateway(upstream=broker.port, tls={"resumption": False})
    session(gateway, 3)
    assert reused == resumptions(gateway) == [False] * 3


def test_a_gateway_with_other_trust_does_not_know_the_tickets(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], tmp_path: Path
) -> None:
    """A broker that was resumed a moment ago is refused by a gateway whose CRL has its certificate."""
    ca_file, crl_file = tmp_path / "root.pem", tmp_path / "crl.pem"
    ca_file.write_bytes(ROOT.pem)
    crl_file.write_bytes(revocation_list(ROOT) + revocation_list(INTERMEDIATE, BROKER))
    broker = start_broker(tls=BROKER.server(), serve=with_tickets)
    before = start_gateway(upstream=broker.port, ca_file=ca_file)
    session(before, 2)
    assert resumptions(before) == [False, True]
    received = broker.received
    after = start_gateway(upstream=broker.port, ca_file=ca_file, tls={"crl_file": [str(crl_file)]})
    with Device(after.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    assert after.wait_ended().reason is EndReason.TLS_REVOKED
    assert broker.received == received


def test_a_reload_voids_the_tickets(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], tmp_path: Path
) -> None:
    """A certificate that the new CRL revokes is not resumed, though the running gateway had tickets a moment ago."""
    ca_file, crl_file = tmp_path / "root.pem", tmp_path / "crl.pem"
    ca_file.write_bytes(ROOT.pem)
    crl_file.write_bytes(revocation_list(ROOT) + revocation_list(INTERMEDIATE))
    broker = start_broker(tls=BROKER.server(), serve=with_tickets)
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file, tls={"crl_file": [str(crl_file)]})
    session(gateway, 2)
    assert resumptions(gateway) == [False, True]
    received = broker.received
    crl_file.write_bytes(revocation_list(ROOT) + revocation_list(INTERMEDIATE, BROKER))
    gateway.call(gateway.service.change, gateway.config)
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    assert gateway.wait_ended(3).reason is EndReason.TLS_REVOKED
    assert broker.received == received


def test_a_resumed_session_is_still_that_of_the_client_certificate(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], tmp_path: Path
) -> None:
    """The broker knows the gateway in a resumed session by the certificate that it showed in the full handshake."""
    client = certify(ROOT, subject="gateway", names=(), purposes=[CLIENT])
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(ROOT.pem)
    context = BROKER.server().context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca_file)
    seen: list[tuple[bool, Any]] = []

    def serve(connection: BrokerConnection) -> None:
        seen.append((connection.socket.session_reused, connection.socket.getpeercert()["subject"]))
        with_tickets(connection)

    broker = start_broker(tls=context, serve=serve)
    certificate = str(client.write(tmp_path / "client.pem"))
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file, tls={"client_cert": certificate})
    session(gateway, 3)
    name = ((("commonName", "gateway"),),)
    assert seen == [(False, name), (True, name), (True, name)]


class _PyOpenSSLSocket:
    """A server's pyOpenSSL connection with the manners of a socket, as `BrokerConnection` uses one."""

    def __init__(self, connection: SSL.Connection, raw: socket.socket) -> None:
        self._connection = connection
        self._raw = raw

    def recv(self, size: int) -> bytes:
        try:
            return self._connection.recv(size)
        except SSL.ZeroReturnError:
            return b""

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data)

    def shutdown(self, how: int) -> None:
        self._raw.shutdown(how)

    def close(self) -> None:
        self._raw.close()


class BreaksOffWhenResumed:
    """Wraps sockets as a broker does that asks for client certificates and has no session id context.

    OpenSSL then issues tickets, and ends the handshake with an alert when one of them comes back.
    """

    def __init__(self, certified: Certified) -> None:
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        self._context.use_certificate(certified.certificate)
        for each in certified.chain[1:]:
            self._context.add_extra_chain_cert(each.certificate)
        self._context.use_privatekey(certified.key)
        self._context.set_verify(SSL.VERIFY_PEER, lambda *_: True)

    def wrap_socket(self, raw: socket.socket, *, server_side: bool) -> _PyOpenSSLSocket:
        assert server_side
        raw.settimeout(None)
        connection = SSL.Connection(self._context, raw)
        connection.set_accept_state()
        try:
            connection.do_handshake()
        except SSL.Error as error:
            raise ssl.SSLError(str(error)) from None
        return _PyOpenSSLSocket(connection, raw)


def test_a_broker_that_breaks_off_when_resumed_locks_nobody_out(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], tmp_path: Path
) -> None:
    """It is tried in full at once, so that the device notices nothing, and no further ticket is offered."""
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(ROOT.pem)
    broker = start_broker(tls=BreaksOffWhenResumed(BROKER), serve=with_tickets)
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file)
    session(gateway, 4)
    assert resumptions(gateway) == [False] * 4
    (error,) = broker.handshake_errors
    assert "session id context" in str(error)
    assert {record.reason for record in gateway.ended} == {EndReason.DEVICE_DISCONNECT}


class BreaksOffLater:
    """Wraps sockets as a server does, but for those after the first, which it resets."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._wrapped = 0

    def wrap_socket(self, raw: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
        self._wrapped += 1
        if self._wrapped > 1:
            raise OSError("breaks off")
        return self._context.wrap_socket(raw, server_side=server_side)


def test_a_broker_that_breaks_off_anyway_is_tried_in_full_and_told_of(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], server_tls: ServerTLS
) -> None:
    """The ticket is not to blame: the session makes two attempts, and the record has the reason of the full one."""
    broker = start_broker(tls=BreaksOffLater(server_tls.context()), serve=with_tickets)
    gateway = start_gateway(upstream=broker.port, failover={"retry_first": 30.0})
    session(gateway)
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    assert gateway.wait_ended(2).reason is EndReason.TLS_CLOSED
    assert broker.accepted == 3
    gateway.wait_empty()


class HangsLater(BreaksOffLater):
    """Wraps sockets as a server does, but for the second, with which it never shakes hands."""

    def wrap_socket(self, raw: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
        self._wrapped += 1
        if self._wrapped == 2:
            while raw.recv(65536):
                pass
            raise OSError("hung")
        return self._context.wrap_socket(raw, server_side=server_side)


def test_a_broker_that_hangs_is_not_waited_for_twice(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway], server_tls: ServerTLS
) -> None:
    """The time-out for TLS is that of one handshake; the next session does without the ticket."""
    broker = start_broker(tls=HangsLater(server_tls.context()), serve=with_tickets)
    gateway = start_gateway(upstream=broker.port, timeouts={"tls": 0.5}, failover={"retry_first": 2.0})
    session(gateway)

    def answer() -> bytes:
        with Device(gateway.port) as device:
            device.send(packets.connect() + packets.disconnect())
            return device.read_to_end()

    assert answer() == packets.connack(code=3)
    assert gateway.wait_ended(2).reason is EndReason.TLS_TIMEOUT
    assert broker.accepted == 2
    # Until then it is left alone.
    eventually(lambda: answer() == packets.connack(), "the broker serves again")
    assert resumptions(gateway) == [False, False]


def test_mosquitto_resumes_and_knows_the_gateway(start_gateway: Callable[..., RunningGateway], tmp_path: Path) -> None:
    """A real broker that takes the user name from the client certificate takes it from the resumed session, too."""
    program = require_tool("mosquitto")
    client = certify(ROOT, subject="gateway", names=(), purposes=[CLIENT]).write(tmp_path / "client.pem")
    broker = BROKER.write(tmp_path / "broker.pem")
    ca_file, log = tmp_path / "root.pem", tmp_path / "log"
    ca_file.write_bytes(ROOT.pem)
    port = free_port()
    configuration = tmp_path / "mosquitto.conf"
    configuration.write_text(
        f"user root\nlog_dest file {log}\nlog_type all\nlistener {port} 127.0.0.1\ncafile {ca_file}\n"
        f"certfile {broker}\nkeyfile {broker}\nrequire_certificate true\nuse_identity_as_username true\n"
    )
    process = subprocess.Popen([program, "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: log.exists() and "running" in log.read_text(), "mosquitto runs")
        gateway = start_gateway(upstream=port, ca_file=ca_file, tls={"client_cert": str(client)})
        session(gateway, 3)
        assert resumptions(gateway) == [False, True, True]
        eventually(
            lambda: log.read_text().count("u'gateway'") == 3, lambda: f"three log-ins as gateway: {log.read_text()}"
        )
    finally:
        process.terminate()
        process.wait(20)


def test_the_record_says_that_a_session_was_resumed(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway]
) -> None:
    """People see it in the line, programs in the field."""
    events: list[dict[str, Any]] = []
    broker = start_broker(serve=with_tickets)
    gateway = start_gateway(upstream=broker.port)
    globalLogPublisher.addObserver(events.append)
    try:
        session(gateway, 2)
    finally:
        globalLogPublisher.removeObserver(events.append)
    first, second = (event for event in events if event.get("event") == "session-start")
    assert (first["resumed"], second["resumed"]) == (False, True)
    assert [" resumed;" in formatEvent(event) for event in (first, second)] == [False, True]
