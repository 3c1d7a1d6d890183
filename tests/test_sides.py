"""The two sides, happy eyeballs, name look-ups and the dialler: Twisted's protocols on transports in memory.

The broker at the far end of the memory is real TLS of the standard library's; the clock is virtual.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import attrs
import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from gateway.config import Limits, Timeouts, from_mapping
from gateway.config.proxies import ProxyServer
from gateway.dial.dialler import Dialler, Superseded, Target
from gateway.dial.health import UpstreamHealth, accounts
from gateway.dial.proxy import ProxyConnection, ProxyRoute, TLSLayer
from gateway.dial.tunnel import tunnel_to
from gateway.errors import EndReason, Refusal, UpstreamFailure
from gateway.net.network import ReactorNetwork, shown_address
from gateway.net.race import ATTEMPT_DELAY, AllFailed, interleave, race
from gateway.ops.journal import Journal
from gateway.relay.device import DeviceProtocol
from gateway.relay.upstream import UpstreamProtocol
from gateway.session.record import Dial, Peer, SessionRecord
from gateway.session.session import Session
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import NotVerified, TLSChannel, make_policy
from tests import mqtt_packets as mqtt
from tests.harness import ServerTLS

LOST = Failure(error.ConnectionLost())
DONE = Failure(error.ConnectionDone())
DEAD = Failure(error.ConnectionLost("Connection timed out"))


class Transport(StringTransport):
    """Twisted's transport in memory, which remembers how it was ended."""

    half_closed = False
    aborted = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def later(self, call: Callable[[], object]) -> None:
        self.calls.append(call)

    def turn(self) -> None:
        """Make the calls that were to be made in a later turn."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def unregisterProducer(self) -> None:
        # Twisted's real transports do not mind when there is none.
        self.producer = None

    def loseWriteConnection(self) -> None:  # noqa: N802  Twisted's name
        self.half_closed = True

    def abortConnection(self) -> None:
        self.aborted = True

    @property
    def read(self) -> bool:
        return bool(self.producerState == "producing")


class RememberingSession:
    """What the sides see of a session."""

    def __init__(self) -> None:
        self.record = SessionRecord(7, "192.0.2.7:40000", 0.0)
        self.calls: list[tuple[Any, ...]] = []
        self.pending = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))

    def named(self, name: str) -> list[Any]:
        return [call[1] if len(call) > 1 else None for call in self.calls if call[0] == name]

    @property
    def dial(self) -> Dial:
        """The last broker that was dialled."""
        dialled: Dial = self.named("dials")[-1]
        return dialled

    @property
    def received(self) -> bytes:
        return b"".join(self.named("upstream_received"))


class MemoryBroker:
    """The far end of an upstream connection: a TLS server without a socket."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._in, self.out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self.out, server_side=True)
        self.received = b""
        self.ended_cleanly = False
        self._shaken = False

    def talk(self, upstream: UpstreamProtocol) -> None:
        """Carry bytes to and fro until neither side has any; an aborted connection carries none."""
        transport: Any = upstream.transport
        while not transport.aborted and (self.take(transport.value(), transport) or self.out.pending):
            if self.out.pending:
                upstream.dataReceived(self.out.read())

    def take(self, ciphertext: bytes, transport: Transport) -> bool:
        transport.clear()
        self._in.write(ciphertext)
        try:
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
            while data := self.tls.read(65536):
                self.received += data
            self.ended_cleanly = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended_cleanly = True
        return bool(ciphertext)

    def encrypt(self, plaintext: bytes, *, close: bool = False) -> bytes:
        """Return the records that carry `plaintext`, and then close_notify."""
        self.tls.write(plaintext)
        if close:
            with pytest.raises(ssl.SSLWantReadError):
                self.tls.unwrap()
        return self.out.read()


class World:
    """Makes upstreams and their brokers."""

    def __init__(self, ca_file: Path, server_tls: ServerTLS) -> None:
        config = from_mapping({"upstream": [{"host": "localhost"}], "tls": {"ca_file": str(ca_file)}})
        self.policy = make_policy(config.tls)
        self.context = server_tls.context()

    def upstream(self, name: str = "localhost") -> tuple[UpstreamProtocol, Transport, MemoryBroker]:
        """A connection whose ClientHello has been sent."""
        protocol, transport = UpstreamProtocol(TLSChannel(self.policy, Identity.of(name)), 60.0), Transport()
        protocol.makeConnection(transport)
        return protocol, transport, MemoryBroker(self.context)

    def serving(self) -> tuple[UpstreamProtocol, Transport, MemoryBroker, Any, DeviceProtocol]:
        """A connection that serves a session."""
        upstream, transport, broker = self.upstream()
        session: Any = RememberingSession()
        device = device_side(session)
        upstream.verified.addCallback(lambda peer: upstream.serve(session, device, peer))
        broker.talk(upstream)
        assert session.named("upstream_verified") == [upstream]
        return upstream, transport, broker, session, device


@pytest.fixture(scope="module")
def world(ca_file: Path, server_tls: ServerTLS) -> World:
    return World(ca_file, server_tls)


def device_side(session: Any) -> DeviceProtocol:
    protocol = DeviceProtocol(lambda device: session, 60.0)
    protocol.makeConnection(Transport())
    return protocol


def transport_of(side: Protocol) -> Transport:
    transport: Any = side.transport
    return transport  # type: ignore[no-any-return]


# ---- flow control


def test_a_side_is_read_only_when_neither_the_session_nor_the_other_side_objects() -> None:
    """Two reasons not to read, neither of which undoes the other."""
    side = device_side(RememberingSession())
    transport = transport_of(side)
    side.hold()
    side.pauseProducing()
    side.resumeProducing()
    assert not transport.read
    side.release()
    assert transport.read
    side.pauseProducing()
    side.hold()
    side.release()
    assert not transport.read
    assert not side.reading
    side.resumeProducing()
    assert transport.read
    assert side.reading


def test_each_sides_full_buffer_stops_the_other_sides_reading(world: World) -> None:
    """Each is the streaming producer of the other's transport."""
    upstream, transport, _, _, device = world.serving()
    assert transport.producer is device
    assert transport_of(device).producer is upstream
    assert transport.streaming
    transport.producer.pauseProducing()
    assert not transport_of(device).read
    assert transport.read
    transport.producer.resumeProducing()
    assert transport_of(device).read


def test_a_side_that_closes_reads_on_and_drops_what_comes() -> None:
    """Unread bytes would turn the close into a reset, which can destroy what the peer has not read yet."""
    session = RememberingSession()
    side = device_side(session)
    transport = transport_of(side)
    transport.registerProducer(device_side(RememberingSession()), True)
    side.hold()
    side.pauseProducing()
    side.write(b"last words")
    side.close()
    assert transport.value() == b"last words"
    assert transport.half_closed
    assert transport.producer is None
    assert transport.read
    side.dataReceived(b"late")
    assert not session.named("device_received")


def test_a_side_that_closes_is_not_held_or_paused_again() -> None:
    """Late calls of the session and of the other side's transport find the door closed."""
    side = device_side(RememberingSession())
    side.close()
    side.pauseProducing()
    side.hold()
    assert transport_of(side).read


def test_a_side_closes_once(world: World) -> None:
    """A second close sends nothing and unregisters nobody's producer."""
    upstream, transport, *_ = world.serving()
    upstream.close()
    sent = transport.value()
    transport.half_closed = False
    upstream.close()
    assert transport.value() == sent
    assert not transport.half_closed


@pytest.mark.parametrize("ending", ["close", "abort", "pauseProducing", "resumeProducing", "hold", "release"])
def test_a_side_that_is_lost_leaves_its_transport_alone(ending: str) -> None:
    """Twisted's transport is an empty shell by then: any call could raise."""
    session = RememberingSession()
    side = device_side(session)
    side.connectionLost(LOST)
    side.transport = None  # type: ignore[assignment]
    getattr(side, ending)()
    assert session.named("device_gone") == ["reset"]


def test_bytes_after_an_abort_are_dropped() -> None:
    """A session may abort its side in the middle of what it receives."""
    session = RememberingSession()
    side = device_side(session)
    side.abort()
    assert transport_of(side).aborted
    side.dataReceived(b"late")
    assert not session.named("device_received")


# ---- the device's side


def test_a_devices_clean_close_is_told_apart_from_its_loss() -> None:
    """In the record's detail; both are losses to MQTT."""
    clean, lost = RememberingSession(), RememberingSession()
    device_side(clean).connectionLost(DONE)
    device_side(lost).connectionLost(LOST)
    assert clean.named("device_gone") == ["closed"]
    assert lost.named("device_gone") == ["reset"]


def test_a_mistake_of_the_gateway_ends_only_the_session_it_was_made_in(logged_errors: list[dict[str, Any]]) -> None:
    """The traceback is in the log, the session is told to fail, and the exception goes no further."""

    class Broken(RememberingSession):
        def device_received(self, data: bytes) -> None:
            raise ZeroDivisionError("secret in the message")

    session = Broken()
    device_side(session).dataReceived(b"\x10")
    assert session.named("fail") == ["ZeroDivisionError"]
    assert logged_errors.pop()["log_failure"].check(ZeroDivisionError)


# ---- the upstream's side: before it is verified


def test_no_byte_is_taken_before_the_broker_is_verified(world: World) -> None:
    """`write` raises, it does not keep; only the handshake is on the wire, at each of its steps."""
    upstream, transport, broker = world.upstream()
    with pytest.raises(NotVerified):
        upstream.write(b"CONNECT")
    broker.take(transport.value(), transport)
    flight = broker.out.read()
    for index in range(len(flight) - 1):
        upstream.dataReceived(flight[index : index + 1])
        with pytest.raises(NotVerified):
            upstream.write(b"CONNECT")
    assert not upstream.verified.called
    upstream.dataReceived(flight[-1:])
    broker.talk(upstream)
    assert upstream.verified.called
    assert broker.received == b""
    upstream.verified.addErrback(lambda failure: None)


def test_a_wrong_broker_is_refused_with_an_alert_and_nothing_else(world: World) -> None:
    """The waiting session hears why."""
    upstream, transport, broker = world.upstream("other.example")
    failures: list[Failure] = []
    upstream.verified.addErrback(failures.append)
    broker.take(transport.value(), transport)
    upstream.dataReceived(broker.out.read())
    assert failures[0].value.reason is EndReason.TLS_NAME_MISMATCH  # type: ignore[attr-defined]
    assert transport.disconnecting
    with pytest.raises(ssl.SSLError, match="ALERT"):
        broker.take(transport.value(), transport)
    upstream.dataReceived(b"late")
    upstream.connectionLost(DONE)
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("reason", "words"), [(DONE, "closed by the upstream"), (LOST, "reset"), (DEAD, "Connection timed out")]
)
def test_a_connection_that_ends_in_the_handshake_fails_the_wait(world: World, reason: Failure, words: str) -> None:
    """With `tls-closed`."""
    upstream, *_ = world.upstream()
    failures: list[Failure] = []
    upstream.verified.addErrback(failures.append)
    upstream.connectionLost(reason)
    assert failures[0].value.reason is EndReason.TLS_CLOSED  # type: ignore[attr-defined]
    assert words in failures[0].value.detail  # type: ignore[attr-defined]


def test_a_handshake_that_cannot_begin_is_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL may refuse its own configuration as late as here."""
    failure = UpstreamFailure(EndReason.TLS_HANDSHAKE_FAILED, "no protocols available")

    def start(channel: TLSChannel) -> None:
        raise failure

    monkeypatch.setattr(TLSChannel, "start", start)
    upstream, transport, _ = world.upstream()
    failures: list[Failure] = []
    upstream.verified.addErrback(failures.append)
    assert failures[0].value is failure
    assert transport.disconnecting
    upstream.connectionLost(DONE)


def test_cancelling_the_wait_cuts_the_connection(world: World) -> None:
    """And its end is then news to nobody."""
    upstream, transport, broker = world.upstream()
    failures: list[Failure] = []
    upstream.verified.addErrback(failures.append)
    upstream.verified.cancel()
    assert transport.aborted
    assert failures[0].check(CancelledError)
    broker.talk(upstream)
    upstream.dataReceived(b"late")
    upstream.connectionLost(Failure(error.ConnectionAborted()))
    assert len(failures) == 1


def test_a_connection_that_nobody_waits_for_any_more_is_cut(world: World) -> None:
    """Whoever waited took the peer and did not serve: nothing may be left open."""
    upstream, transport, broker = world.upstream()
    upstream.verified.addCallback(lambda peer: None)
    broker.talk(upstream)
    assert transport.aborted


def test_a_mistake_in_the_handshake_is_a_refusal(
    world: World, logged_errors: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything unexpected is; the traceback is in the log."""
    upstream, transport, broker = world.upstream()
    failures: list[Failure] = []
    upstream.verified.addErrback(failures.append)
    monkeypatch.setattr(TLSChannel, "receive", lambda channel, data: 1 / 0)
    broker.talk(upstream)
    assert failures[0].value.reason is EndReason.INTERNAL_ERROR  # type: ignore[attr-defined]
    assert transport.disconnecting
    assert logged_errors.pop()["log_failure"].check(ZeroDivisionError)


# ---- the upstream's side: serving a session


def test_a_session_gets_its_upstream_when_it_is_verified(world: World) -> None:
    """With the peer's facts; then bytes pass both ways."""
    upstream, _, broker, session, _ = world.serving()
    (peer,) = [call[2] for call in session.calls if call[0] == "upstream_verified"]
    assert isinstance(peer, Peer)
    assert peer.matched_san == "DNS:localhost"
    upstream.write(b"up" * 20_000)
    broker.talk(upstream)
    assert broker.received == b"up" * 20_000
    for start in range(0, len(ciphertext := broker.encrypt(b"down" * 5_000)), 1000):
        upstream.dataReceived(ciphertext[start : start + 1000])
    assert session.received == b"down" * 5_000


def test_the_end_of_the_handshake_leaves_in_one_piece_with_connect(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One send, and one packet for the broker: ClientHello is the first, and there is no third."""
    upstream, transport, broker = world.upstream()
    writes: list[bytes] = [transport.value()]
    write = Transport.write
    monkeypatch.setattr(Transport, "write", lambda self, data: (writes.append(data), write(self, data))[1])
    session: Any = RememberingSession()
    session.upstream_verified = lambda upstream, peer: upstream.write(b"CONNECT")
    upstream.verified.addCallback(lambda peer: upstream.serve(session, device_side(session), peer))
    broker.talk(upstream)
    assert broker.received == b"CONNECT"
    assert len(writes) == 2


def test_what_the_broker_said_before_it_closed_is_heard_first(world: World) -> None:
    """Data and close_notify in one piece: the session gets the data, then the end."""
    upstream, _, broker, session, _ = world.serving()
    upstream.dataReceived(broker.encrypt(b"last words", close=True))
    assert [name for name, *_ in session.calls[1:]] == ["upstream_received", "upstream_broken"]
    assert session.received == b"last words"
    assert session.named("upstream_broken")[0].reason is EndReason.UPSTREAM_LOST


def test_the_end_of_a_channel_waits_until_the_session_has_caught_up(world: World) -> None:
    """What came before the broker's close is relayed first, though the session takes several turns for it."""
    upstream, transport, broker, session, _ = world.serving()
    turns: list[bytes] = []

    def receive(data: bytes) -> None:
        turns.append(data)
        if len(turns) < 3:
            upstream.go_on_later()

    session.upstream_received = receive
    upstream.dataReceived(broker.encrypt(b"last words", close=True))
    for expected in range(1, 3):
        assert len(turns) == expected
        assert not transport.read
        assert not upstream.reading
        assert not session.named("upstream_broken")
        transport.turn()
    assert turns == [b"last words", b"", b""]
    assert transport.read
    assert session.named("upstream_broken")[0].reason is EndReason.UPSTREAM_LOST


def test_records_are_decrypted_some_hundred_at_a_time(world: World) -> None:
    """A read may hold thousands of small ones; nothing more is read until all have been passed on."""
    upstream, transport, broker, session, _ = world.serving()
    ciphertext = b"".join(broker.encrypt(bytes([number % 256])) for number in range(1400)) + broker.encrypt(
        b"", close=True
    )
    upstream.dataReceived(ciphertext)
    while transport.calls:
        assert not transport.read
        assert not session.named("upstream_broken")
        transport.turn()
    assert max(map(len, session.named("upstream_received"))) <= 500
    assert session.received == bytes(number % 256 for number in range(1400))
    assert session.named("upstream_broken")[0].reason is EndReason.UPSTREAM_LOST


def test_a_side_that_is_lost_meanwhile_does_not_go_on(world: World) -> None:
    upstream, transport, _, session, device = world.serving()
    for side in (upstream, device):
        side.go_on_later()
    calls = len(session.calls)
    device.connectionLost(DONE)
    upstream.connectionLost(DONE)
    told = len(session.calls)
    transport.turn()
    transport_of(device).turn()
    assert len(session.calls) == told > calls


def test_an_orderly_close_sends_close_notify_then_fin(world: World) -> None:
    """After all that was written."""
    upstream, transport, broker, session, _ = world.serving()
    upstream.write(b"DISCONNECT")
    upstream.close()
    broker.talk(upstream)
    assert broker.received == b"DISCONNECT"
    assert broker.ended_cleanly
    assert transport.half_closed
    upstream.connectionLost(DONE)
    assert not session.named("upstream_broken")
    assert len(session.named("upstream_gone")) == 1


@pytest.mark.parametrize(
    ("reason", "words"), [(DONE, "closed by the broker"), (LOST, "reset"), (DEAD, "Connection timed out")]
)
def test_a_lost_upstream_is_told_once(world: World, reason: Failure, words: str) -> None:
    """First that it broke, and why; then that it is gone."""
    upstream, _, _, session, _ = world.serving()
    upstream.connectionLost(reason)
    assert [name for name, *_ in session.calls[1:]] == ["upstream_broken", "upstream_gone"]
    assert words in session.named("upstream_broken")[0].detail


def test_a_forged_record_ends_the_session(world: World) -> None:
    """The broker gets an alert, the session hears that the upstream is lost, and none of it is plaintext."""
    upstream, transport, broker, session, _ = world.serving()
    record = bytearray(broker.encrypt(b"x" * 100))
    record[-1] ^= 1
    upstream.dataReceived(bytes(record))
    assert session.received == b""
    assert session.named("upstream_broken")[0].reason is EndReason.UPSTREAM_LOST
    assert transport.value()
    upstream.close()
    assert transport.half_closed


def test_plaintext_after_an_abort_is_dropped(world: World) -> None:
    """The session aborted its upstream while more of it was on its way."""
    upstream, _, broker, session, _ = world.serving()
    upstream.abort()
    upstream.dataReceived(broker.encrypt(b"late"))
    assert session.received == b""


@pytest.mark.parametrize("write", [UpstreamProtocol.write, UpstreamProtocol.write_last])
def test_a_channel_that_breaks_under_a_write_ends_the_session(
    world: World, monkeypatch: pytest.MonkeyPatch, write: Callable[[UpstreamProtocol, bytes], None]
) -> None:
    """OpenSSL may refuse to encrypt; the session hears of it as of any other loss, and the side closes all the same."""
    upstream, transport, _, session, _ = world.serving()
    failure = UpstreamFailure(EndReason.UPSTREAM_LOST, "bad length")

    def send(channel: TLSChannel, plaintext: bytes) -> None:
        raise failure

    monkeypatch.setattr(TLSChannel, "send", send)
    write(upstream, b"x")
    assert session.named("upstream_broken") == [failure]
    upstream.close()
    assert transport.half_closed


def test_the_last_packets_and_close_notify_leave_in_one_piece(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """DISCONNECT is mostly the last thing that a session sends: one send for both, and FIN behind it."""
    upstream, transport, broker, *_ = world.serving()
    writes: list[bytes] = []
    write = transport.write

    def counting_write(data: bytes) -> None:
        writes.append(data)
        write(data)

    monkeypatch.setattr(transport, "write", counting_write)
    upstream.write_last(b"the last")
    upstream.close()
    assert len(writes) == 1
    assert transport.half_closed
    broker.talk(upstream)
    assert (broker.received, broker.ended_cleanly) == (b"the last", True)


@pytest.mark.parametrize("behind", [mqtt.disconnect(), mqtt.pingreq()], ids=["DISCONNECT", "PINGREQ"])
def test_a_channel_that_breaks_behind_connack_is_a_lost_upstream(world: World, behind: bytes) -> None:
    """Whatever the device sent behind CONNECT is relayed with CONNACK, when the channel is broken already."""
    upstream, _, broker = world.upstream()
    journal: Any = RememberingSession()
    sessions: list[Session] = []

    def open_session(device: DeviceProtocol) -> Session:
        record = SessionRecord(1, "192.0.2.7:40000", 0.0)
        dial = Deferred[None]
        sessions.append(
            Session(record, device, lambda _: dial(), journal, lambda _: None, lambda: 0.0, Limits(), Timeouts())
        )
        return sessions[0]

    device = DeviceProtocol(open_session, 60.0)
    device.makeConnection(Transport())
    upstream.verified.addCallback(lambda peer: upstream.serve(sessions[0], device, peer))
    device.dataReceived(mqtt.connect() + behind)
    broker.talk(upstream)
    whole, broken = broker.encrypt(mqtt.connack()), bytearray(broker.encrypt(b"x" * 30))
    broken[-1] ^= 1
    upstream.dataReceived(whole + bytes(broken))
    assert [call for call, *_ in journal.calls] == ["session_started", "session_ended"]
    assert sessions[0].record.reason is EndReason.UPSTREAM_LOST


def test_a_mistake_while_the_broker_is_read_ends_only_that_session(
    world: World, logged_errors: list[dict[str, Any]]
) -> None:
    """The same as for the device's side."""
    upstream, _, broker, session, _ = world.serving()
    session.upstream_received = lambda data: 1 / 0
    upstream.dataReceived(broker.encrypt(b"x"))
    assert session.named("fail") == ["ZeroDivisionError"]
    assert logged_errors.pop()["log_failure"].check(ZeroDivisionError)


def test_a_lost_upstream_lets_go_of_its_session_and_of_openssl(world: World) -> None:
    """What is left of it refers to neither."""
    upstream, _, _, _, _ = world.serving()
    channel = upstream._channel
    upstream.connectionLost(LOST)
    assert upstream._session is None
    assert channel._connection.get_app_data() is None


# ---- happy eyeballs


class Endpoint:
    """A client endpoint whose attempt is answered by the test."""

    def __init__(self, *, obedient: bool = True) -> None:
        self.attempts: list[Deferred[IProtocol]] = []
        self.cancelled = False
        self._obedient = obedient
        self.factory: Any = None

    def connect(self, factory: Any) -> Deferred[IProtocol]:
        self.factory = factory
        self.attempts.append(Deferred(self._cancel))
        return self.attempts[0]

    def _cancel(self, attempt: Deferred[IProtocol]) -> None:
        self.cancelled = True
        if not self._obedient:
            attempt.callback(self.protocol())

    @property
    def tried(self) -> bool:
        return bool(self.attempts)

    def protocol(self) -> Any:
        protocol = Protocol() if self.factory is None else self.factory.buildProtocol(None)
        protocol.makeConnection(Transport())
        return protocol

    def succeed(self) -> Any:
        protocol = self.protocol()
        self.attempts[0].callback(protocol)
        return protocol

    def fail(self, problem: Exception | None = None) -> None:
        self.attempts[0].errback(problem or error.ConnectionRefusedError())


class Contest:
    """A race between endpoints on a virtual clock."""

    def __init__(self, *endpoints: Any) -> None:
        self.clock = Clock()
        self.result: list[Any] = []
        self.deferred = race(endpoints, None, self.clock)  # type: ignore[arg-type]
        self.deferred.addBoth(self.result.append)

    def over(self) -> bool:
        return not self.clock.getDelayedCalls()


def addresses(*hosts: str) -> list[IPv4Address | IPv6Address]:
    return [IPv6Address("TCP", host, 8883) if ":" in host else IPv4Address("TCP", host, 8883) for host in hosts]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], []),
        (["192.0.2.1"], ["192.0.2.1"]),
        (
            ["2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"],
            ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"],
        ),
        (["192.0.2.1", "192.0.2.2", "2001:db8::1"], ["192.0.2.1", "2001:db8::1", "192.0.2.2"]),
        (
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"],
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"],
        ),
    ],
)
def test_families_alternate_beginning_with_the_preferred_one(given: list[str], wanted: list[str]) -> None:
    """RFC 8305 §4; within a family the resolver's order stays."""
    assert [address.host for address in interleave(addresses(*given))] == wanted


def test_attempts_begin_a_quarter_of_a_second_apart() -> None:
    """RFC 8305 §5: not before, and whether or not the first has failed by then."""
    first, second, third = Endpoint(), Endpoint(), Endpoint()
    contest = Contest(first, second, third)
    assert (first.tried, second.tried) == (True, False)
    contest.clock.advance(ATTEMPT_DELAY - 0.01)
    assert not second.tried
    contest.clock.advance(0.01)
    assert (second.tried, third.tried) == (True, False)
    contest.clock.advance(ATTEMPT_DELAY)
    assert third.tried
    assert contest.over()


def test_a_failure_starts_the_next_attempt_at_once() -> None:
    """And the quarter of a second counts anew from there."""
    first, second, third = Endpoint(), Endpoint(), Endpoint()
    contest = Contest(first, second, third)
    contest.clock.advance(0.2)
    first.fail()
    assert second.tried
    contest.clock.advance(0.2)
    assert not third.tried
    contest.clock.advance(0.05)
    assert third.tried


def test_a_failure_starts_the_next_attempt_also_while_another_runs() -> None:
    """The first is slow, the second fails: the third need not wait."""
    first, second, third = Endpoint(), Endpoint(), Endpoint()
    contest = Contest(first, second, third)
    contest.clock.advance(ATTEMPT_DELAY)
    second.fail()
    assert third.tried
    assert contest.over()


def test_the_first_that_connects_wins_and_the_others_are_given_up() -> None:
    """Nothing is left: no attempt, no timer."""
    first, second, third = Endpoint(), Endpoint(), Endpoint()
    contest = Contest(first, second, third)
    contest.clock.advance(ATTEMPT_DELAY)
    winner = second.succeed()
    assert contest.result == [winner]
    assert first.cancelled
    assert not third.tried
    assert contest.over()


def test_an_attempt_that_fails_before_it_returns_is_no_trouble() -> None:
    """Endpoints may fail, and win, synchronously."""

    class Instant(Endpoint):
        def connect(self, factory: Any) -> Deferred[IProtocol]:
            super().connect(factory)
            return fail(error.ConnectionRefusedError())

    contest = Contest(Instant(), Instant(), last := Endpoint())
    assert last.tried
    winner = last.succeed()
    assert contest.result == [winner]
    assert contest.over()
    failed = Contest(Instant(), Instant())
    assert len(failed.result[0].value.failures) == 2
    assert failed.over()


def test_all_failures_are_reported_in_their_order() -> None:
    """When nobody is left."""
    first, second = Endpoint(), Endpoint()
    contest = Contest(first, second)
    contest.clock.advance(ATTEMPT_DELAY)
    second.fail(error.NoRouteError())
    assert not contest.result
    first.fail()
    failure = contest.result[0]
    assert failure.check(AllFailed)
    assert [type(each.value) for each in failure.value.failures] == [error.NoRouteError, error.ConnectionRefusedError]
    assert contest.over()


def test_cancelling_a_race_leaves_nothing_behind() -> None:
    """All attempts are given up, and no further one begins."""
    first, second, third = Endpoint(), Endpoint(), Endpoint()
    contest = Contest(first, second, third)
    contest.clock.advance(ATTEMPT_DELAY)
    contest.deferred.cancel()
    assert first.cancelled
    assert second.cancelled
    assert contest.over()
    contest.clock.advance(10)
    assert not third.tried
    assert contest.result[0].check(CancelledError)


def test_a_loser_that_connects_although_it_was_given_up_is_cut(world: World) -> None:
    """It happens when two connect at one moment; the connection is ended, and nobody hears of it."""

    class Factory:
        def buildProtocol(self, addr: object) -> UpstreamProtocol:
            return UpstreamProtocol(TLSChannel(world.policy, Identity.of("localhost")), 60.0)

    first, second = Endpoint(obedient=False), Endpoint()
    clock = Clock()
    kept: list[Any] = []
    results: list[Any] = []
    first.protocol = lambda: (kept.append(Endpoint.protocol(first)), kept[0])[1]  # type: ignore[method-assign,func-returns-value]
    race([first, second], Factory(), clock).addBoth(results.append)  # type: ignore[list-item,arg-type]
    clock.advance(ATTEMPT_DELAY)
    winner = second.succeed()
    assert results == [winner]
    (loser,) = kept
    assert loser.transport.aborted
    loser.connectionLost(Failure(error.ConnectionAborted()))
    assert not loser.verified.called


# ---- names


class Resolver:
    """A thread pool whose lookups the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str, int]] = []
        self.is_full = False

    def callInThreadWithCallback(self, on_result: Any, function: Any, host: str, port: int, *_: Any) -> None:  # noqa: N802  the interface's name
        if self.is_full:
            raise RuntimeError("can't start new thread")
        assert function is socket.getaddrinfo
        self.asked.append((on_result, host, port))

    def answer(self, index: int, *hosts: str) -> None:
        families = {IPv4Address: socket.AF_INET, IPv6Address: socket.AF_INET6}
        found = [
            (families[type(each)], socket.SOCK_STREAM, 6, "", (each.host, each.port)) for each in addresses(*hosts)
        ]
        self.asked[index][0](True, found)

    def fail(self, index: int, problem: Exception) -> None:
        self.asked[index][0](False, Failure(problem))


class ResolvingReactor:
    def __init__(self) -> None:
        self.resolver = Resolver()
        self.now = 0.0

    def getThreadPool(self) -> Resolver:  # noqa: N802  the interface's name
        return self.resolver

    def callFromThread(self, function: Any, *arguments: Any) -> None:  # noqa: N802  the interface's name
        function(*arguments)

    def seconds(self) -> float:
        return self.now


def lookup(network: ReactorNetwork, host: str = "broker.example", port: int = 8883) -> tuple[Any, list[Any]]:
    results: list[Any] = []
    answer = network.resolve(host, port)
    answer.addBoth(results.append)
    return answer, results


def test_look_ups_of_one_name_at_one_time_are_one_look_up() -> None:
    """In a reconnect storm a thousand sessions ask for the same broker; each gets a list of its own."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    found = [lookup(network)[1] for _ in range(1000)]
    lookup(network, "other.example")
    assert [host for _, host, _ in reactor.resolver.asked] == ["broker.example", "other.example"]
    reactor.resolver.answer(0, "192.0.2.1", "2001:db8::1", "192.0.2.1")
    assert all(results == [addresses("192.0.2.1", "2001:db8::1")] for results in found)
    found[0][0].clear()
    assert found[1][0]


def test_an_answer_is_not_kept() -> None:
    """The next session asks anew, so that a broker that moves is found."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    lookup(network)
    reactor.resolver.answer(0, "192.0.2.1")
    _, second = lookup(network)
    assert len(reactor.resolver.asked) == 2
    reactor.resolver.answer(1, "192.0.2.2")
    assert second == [addresses("192.0.2.2")]


def test_a_name_without_an_address_is_told_from_a_machine_that_cannot_ask() -> None:
    """Python reports EAI_SYSTEM, as without a free descriptor, as an OSError; every caller gets one of its own."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    found = [lookup(network)[1] for _ in range(2)]
    reactor.resolver.fail(0, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert found == [[[]], [[]]]
    found = [lookup(network)[1] for _ in range(2)]
    reactor.resolver.fail(1, OSError(errno.EMFILE, "Too many open files"))
    first, second = (results[0].value for results in found)
    assert (first.errno, second.strerror) == (errno.EMFILE, "Too many open files")
    assert first is not second
    _, results = lookup(network)
    reactor.resolver.fail(2, UnicodeError("label too long"))
    assert "label too long" in results[0].value.strerror
    assert not network.under_way


@pytest.mark.parametrize(
    ("told", "lacks", "expected"),
    [
        (socket.EAI_NONAME, None, []),
        (socket.EAI_NONAME, errno.EMFILE, errno.EMFILE),
        (socket.EAI_AGAIN, errno.ENFILE, errno.ENFILE),
        (socket.EAI_MEMORY, None, errno.ENOMEM),
    ],
)
def test_a_lack_of_descriptors_may_look_like_a_lack_of_names(
    monkeypatch: pytest.MonkeyPatch, told: int, lacks: int | None, expected: Any
) -> None:
    """The C library without a descriptor says `Name or service not known`, even of localhost."""
    reactor = ResolvingReactor()
    _, results = lookup(ReactorNetwork(reactor))
    if lacks is not None:
        monkeypatch.setattr(socket, "socket", Mock(side_effect=OSError(lacks, os.strerror(lacks))))
    reactor.resolver.fail(0, socket.gaierror(told, "words"))
    (result,) = results
    assert (result.value.errno if isinstance(result, Failure) else result) == expected


def test_without_a_thread_a_look_up_fails_at_once() -> None:
    """And the next one tries again."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    reactor.resolver.is_full = True
    _, results = lookup(network)
    assert (results[0].value.errno, results[0].value.strerror) == (errno.EAGAIN, "can't start new thread")
    reactor.resolver.is_full = False
    _, results = lookup(network)
    reactor.resolver.answer(0, "192.0.2.1")
    assert results == [addresses("192.0.2.1")]


def test_a_look_up_that_is_given_up_disturbs_no_one_else() -> None:
    """The others get their answer, and nothing is kept of the one that went."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    first, gone = lookup(network)
    _, second = lookup(network)
    first.cancel()
    reactor.resolver.answer(0, "192.0.2.1")
    assert gone[0].check(CancelledError)
    assert second == [addresses("192.0.2.1")]
    assert not network.under_way


def test_look_ups_that_are_given_up_do_not_heap_up() -> None:
    """A resolver that hangs holds one look-up, not a thousand sessions that have gone."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    for _ in range(1000):
        answer, _ = lookup(network)
        answer.cancel()
    assert not any(look_up.waiting for look_up in network.under_way.values())
    assert len(reactor.resolver.asked) == 1


def test_a_session_may_make_another_give_up_when_it_gets_its_answer() -> None:
    """The one that gave up is passed over, the third gets its answer."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    first, _ = lookup(network)
    second, gone = lookup(network)
    _, third = lookup(network)
    first.addCallback(lambda _: second.cancel())
    reactor.resolver.answer(0, "192.0.2.1")
    assert gone[0].check(CancelledError)
    assert third == [addresses("192.0.2.1")]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "::1", "fe80::1%eth0"])
def test_an_address_is_not_looked_up(host: str) -> None:
    """It is one."""
    reactor = ResolvingReactor()
    _, results = lookup(ReactorNetwork(reactor), host)
    assert results == [addresses(host)]
    assert not reactor.resolver.asked


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (IPv4Address("TCP", "192.0.2.1", 1883), "192.0.2.1:1883"),
        (IPv6Address("TCP", "2001:db8::1", 1883), "[2001:db8::1]:1883"),
        (UNIXAddress("/run/mqtt.sock"), "/run/mqtt.sock"),
        (UNIXAddress(None), "local"),
        (None, "local"),
    ],
)
def test_addresses_are_shown_as_people_write_them(address: Any, shown: str) -> None:
    """With brackets for IPv6."""
    assert shown_address(address) == shown


# ---- the dialler


@attrs.define
class FakeNetwork:
    """Names and endpoints that the test answers."""

    names: dict[str, Deferred[Any]] = attrs.Factory(dict)
    endpoints: dict[str, Endpoint] = attrs.Factory(dict)

    def resolve(self, host: str, port: int) -> Deferred[Any]:
        return self.names.setdefault(host, Deferred())

    def endpoint(self, address: Any) -> Any:
        return self.endpoints.setdefault(address.host, Endpoint())


class Dialling:
    """A session that wants its broker: `one.example`, or else `two.example`."""

    def __init__(self, world: World, *hosts: str, proxy: ProxyServer | None = None, **timeouts: float) -> None:
        hosts = hosts or ("one.example",)
        config = from_mapping(
            {"upstream": [{"host": host, "server_name": "localhost"} for host in hosts], "timeouts": timeouts}
        )
        via = None
        if proxy is not None:
            via = ProxyRoute(proxy, None, UpstreamHealth(proxy.address, "", config.failover, lambda: 1.0))
        targets = [Target(each, Identity.of(each.verify_name), world.policy, via) for each in config.upstream]
        self.world = world
        self.clock = Clock()
        self.network = FakeNetwork()
        self.session: Any = RememberingSession()
        self.device = device_side(self.session)
        self.passed_over: list[tuple[str, UpstreamFailure]] = []
        journal = Journal(self.clock.seconds)
        journal.passed_over = lambda *told: self.passed_over.append(told)  # type: ignore[method-assign]
        vias = [via and via.health] * len(targets)
        healths = accounts(config.upstream, config.failover, lambda: 1.0, vias=vias)
        self.dialler = Dialler(targets, healths, self.network, self.clock, config, journal, self.clock)
        self.deferred = self.dialler.dial(self.session, self.device)

    def resolved(self, host: str = "one.example", *hosts: str) -> None:
        self.network.names[host].callback(addresses(*hosts))

    def connected(self, host: str) -> tuple[UpstreamProtocol, MemoryBroker]:
        return self.network.endpoints[host].succeed(), MemoryBroker(self.world.context)

    @property
    def failure(self) -> UpstreamFailure:
        (failure,) = self.session.named("upstream_failed")
        assert not self.clock.getDelayedCalls()
        return failure  # type: ignore[no-any-return]


def test_a_broker_is_reached_in_four_steps_that_are_timed(world: World) -> None:
    """DNS, TCP, TLS and verification; then the session has its upstream."""
    dialling = Dialling(world)
    dialling.clock.advance(1)
    dialling.resolved("one.example", "192.0.2.1")
    dialling.clock.advance(2)
    upstream, broker = dialling.connected("192.0.2.1")
    dialling.clock.advance(3)
    broker.talk(upstream)
    assert dialling.session.named("upstream_verified") == [upstream]
    dial = dialling.session.dial
    assert (dial.dns_seconds, dial.tcp_seconds, dial.tls_seconds) == (1, 2, 3)
    assert (dial.upstream, dial.address) == ("one.example:8883", "192.168.1.1:54321")
    assert not dialling.clock.getDelayedCalls()


def test_a_name_that_does_not_resolve_is_named(world: World) -> None:
    """`dns-failed`, with the host."""
    dialling = Dialling(world)
    dialling.resolved("one.example")
    assert dialling.failure.reason is EndReason.DNS_FAILED
    assert "one.example" in dialling.failure.detail


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL]
)
@pytest.mark.parametrize("step", ["dns", "tcp"])
def test_what_this_machine_lacks_does_not_count_against_the_broker(world: World, step: str, number: int) -> None:
    """Neither with its own words nor with a back-off, which would refuse the next devices."""
    dialling = Dialling(world)
    if step == "dns":
        dialling.network.names["one.example"].errback(OSError(number, os.strerror(number)))
    else:
        dialling.resolved("one.example", "192.0.2.1")
        dialling.network.endpoints["192.0.2.1"].fail(error.getConnectError((number, os.strerror(number))))
    assert dialling.failure.reason is EndReason.OUT_OF_RESOURCES
    assert os.strerror(number) in dialling.failure.detail
    assert dialling.dialler.upstreams[0].is_open


def test_what_this_machine_lacks_does_not_count_against_the_proxy(world: World) -> None:
    """All brokers behind it would be left alone."""
    dialling = Dialling(world, proxy=ProxyServer.of("http://proxy.example:3128"))
    dialling.network.names["proxy.example"].errback(OSError(errno.EMFILE, "Too many open files"))
    assert dialling.failure.reason is EndReason.OUT_OF_RESOURCES
    assert dialling.dialler.upstreams[0].is_open
    via = dialling.dialler.upstreams[0].via
    assert via is not None
    assert (via.is_open, via.reached_at) == (True, None)


def test_a_resolver_that_this_machine_cannot_use_is_named(world: World) -> None:
    """Its files cannot be read, say."""
    dialling = Dialling(world)
    dialling.network.names["one.example"].errback(OSError(errno.EACCES, "Permission denied"))
    assert dialling.failure.reason is EndReason.DNS_FAILED
    assert dialling.failure.detail == "one.example: Permission denied"


@pytest.mark.parametrize(
    ("step", "reason"), [("dns", EndReason.DNS_FAILED), ("tcp", EndReason.TCP_TIMEOUT), ("tls", EndReason.TLS_TIMEOUT)]
)
def test_each_step_has_its_timeout(world: World, step: str, reason: EndReason) -> None:
    """And leaves nothing behind when it has passed."""
    dialling = Dialling(world, dns=3, tcp=3, tls=3)
    if step != "dns":
        dialling.resolved("one.example", "192.0.2.1", "192.0.2.2")
        dialling.clock.advance(1)
    upstream = dialling.connected("192.0.2.2")[0] if step == "tls" else None
    dialling.clock.pump([0.5] * 5)
    assert step == "tcp" or not dialling.session.named("upstream_failed")
    dialling.clock.pump([0.5] * 2)
    assert dialling.failure.reason is reason
    assert "3 s" in dialling.failure.detail
    if step == "tcp":
        assert dialling.network.endpoints["192.0.2.1"].cancelled
        assert dialling.network.endpoints["192.0.2.2"].cancelled
    if upstream is not None:
        assert transport_of(upstream).aborted


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (error.ConnectionRefusedError(), EndReason.TCP_REFUSED),
        (error.TimeoutError(), EndReason.TCP_TIMEOUT),
        (error.TCPTimedOutError(), EndReason.TCP_TIMEOUT),
        (error.NoRouteError(), EndReason.TCP_UNREACHABLE),
        (OSError("no such network"), EndReason.TCP_UNREACHABLE),
    ],
)
def test_the_preferred_addresss_failure_gives_the_reason(world: World, problem: Exception, reason: EndReason) -> None:
    """The detail names all."""
    dialling = Dialling(world)
    dialling.resolved("one.example", "192.0.2.1", "192.0.2.2")
    dialling.network.endpoints["192.0.2.1"].fail(problem)
    dialling.network.endpoints["192.0.2.2"].fail(error.UserError("another"))
    assert dialling.failure.reason is reason
    assert str(problem) in dialling.failure.detail
    assert "another" in dialling.failure.detail


PASSED_OVER = {
    "dns": EndReason.DNS_FAILED,
    "tcp": EndReason.TCP_REFUSED,
    "tls": EndReason.TLS_NOT_TLS,
    "hang": EndReason.TLS_TIMEOUT,
}


@pytest.mark.parametrize("step", list(PASSED_OVER))
def test_the_next_broker_is_tried_when_one_fails(world: World, step: str) -> None:
    """Whatever step it failed at; the record is about the broker that was reached."""
    dialling = Dialling(world, "one.example", "two.example")
    if step == "dns":
        dialling.resolved("one.example")
    else:
        dialling.resolved("one.example", "192.0.2.1")
        if step == "tcp":
            dialling.network.endpoints["192.0.2.1"].fail()
        else:
            upstream, _ = dialling.connected("192.0.2.1")
            if step == "tls":
                upstream.dataReceived(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            else:
                dialling.clock.advance(10)
                assert transport_of(upstream).aborted
    dialling.clock.advance(1)
    dialling.resolved("two.example", "192.0.2.9")
    upstream, broker = dialling.connected("192.0.2.9")
    broker.talk(upstream)
    assert dialling.session.named("upstream_verified") == [upstream]
    assert not dialling.session.named("upstream_failed")
    ((address, failure),) = dialling.passed_over
    assert address == "one.example:8883"
    assert failure.reason is PASSED_OVER[step]
    assert dialling.session.dial.upstream == "two.example:8883"
    assert dialling.session.dial.dns_seconds == 1
    assert not dialling.clock.getDelayedCalls()


def test_when_all_brokers_fail_the_detail_tells_of_each(world: World) -> None:
    """The last one gives the reason, in fixed words."""
    dialling = Dialling(world, "one.example", "two.example")
    dialling.resolved("one.example")
    dialling.resolved("two.example", "192.0.2.9")
    dialling.network.endpoints["192.0.2.9"].fail()
    assert dialling.failure.reason is EndReason.TCP_REFUSED
    assert "one.example:8883: dns-failed" in dialling.failure.detail
    assert "two.example:8883: tcp-refused" in dialling.failure.detail


def test_the_record_is_about_the_broker_that_was_tried_last(world: World) -> None:
    """Times and addresses of the one before it would mislead."""
    dialling = Dialling(world, "one.example", "two.example")
    dialling.resolved("one.example", "192.0.2.1")
    dialling.connected("192.0.2.1")[0].connectionLost(DONE)
    dialling.resolved("two.example")
    dial = dialling.session.dial
    assert dialling.failure.reason is EndReason.DNS_FAILED
    assert (dial.upstream, dial.address) == ("two.example:8883", "")
    assert (dial.dns_seconds, dial.tcp_seconds, dial.tls_seconds) == (None, None, None)


def test_the_address_families_of_a_broker_take_turns(world: World) -> None:
    """A name with many addresses of a family that is broken costs a quarter of a second, not one for each."""
    dialling = Dialling(world)
    dialling.resolved("one.example", "2001:db8::1", "2001:db8::2", "192.0.2.1")
    dialling.clock.advance(ATTEMPT_DELAY)
    assert [host for host, endpoint in dialling.network.endpoints.items() if endpoint.tried] == [
        "2001:db8::1",
        "192.0.2.1",
    ]
    dialling.deferred.cancel()


def test_the_time_that_dialling_takes_is_bounded(world: World) -> None:
    """Each broker's steps have their timeouts, and nothing waits beyond their sum."""
    dialling = Dialling(world, "one.example", "two.example", dns=2, tcp=3, tls=4)
    for host in ("one.example", "two.example"):
        dialling.clock.advance(1.5)
        dialling.resolved(host, f"{host}.1", f"{host}.2", f"{host}.3")
        dialling.clock.pump([0.25] * 10)
        dialling.connected(f"{host}.3")
        dialling.clock.pump([0.25] * 16)
    assert dialling.failure.reason is EndReason.TLS_TIMEOUT
    assert dialling.clock.seconds() <= 2 * (2 + 3 + 4)


@pytest.mark.parametrize("step", ["dns", "tcp", "tls"])
def test_cancelling_at_any_step_leaves_nothing_behind(world: World, step: str) -> None:
    """The device has gone: no attempt, no timer, no connection, and the session is not told a thing."""
    dialling = Dialling(world, "one.example", "two.example")
    upstream = None
    if step != "dns":
        dialling.resolved("one.example", "192.0.2.1", "192.0.2.2")
        dialling.clock.advance(0.3)
    if step == "tls":
        upstream, broker = dialling.connected("192.0.2.1")
        broker.take(transport_of(upstream).value(), transport_of(upstream))
    dialling.deferred.cancel()
    assert not dialling.clock.getDelayedCalls()
    assert {call[0] for call in dialling.session.calls} <= {"dials"}
    assert "two.example" not in dialling.network.names
    if step == "tcp":
        assert all(endpoint.cancelled for endpoint in dialling.network.endpoints.values())
    if upstream is not None:
        assert transport_of(upstream).aborted
        upstream.connectionLost(Failure(error.ConnectionAborted()))


def test_a_mistake_while_dialling_fails_only_that_session(world: World, logged_errors: list[dict[str, Any]]) -> None:
    """The traceback is in the log."""
    dialling = Dialling(world)
    dialling.network.names["one.example"].callback(17)
    assert dialling.session.named("fail") == ["TypeError"]
    assert logged_errors.pop()["log_failure"].check(TypeError)


def test_nobody_but_the_verified_broker_is_served(world: World) -> None:
    """An upstream that breaks in its handshake never meets the session."""
    dialling = Dialling(world)
    dialling.resolved("one.example", "192.0.2.1")
    upstream, _ = dialling.connected("192.0.2.1")
    upstream.connectionLost(DONE)
    assert dialling.failure.reason is EndReason.TLS_CLOSED
    assert not dialling.session.named("upstream_verified")


@pytest.mark.parametrize("step", ["before", "dns", "tls"])
def test_a_reload_stops_a_dial_by_the_configuration_before(world: World, step: str) -> None:
    """Whoever began it begins anew. No other broker of the old configuration is tried, none of it is served."""
    dialling = Dialling(world, "one.example", "two.example")
    ended: list[Failure] = []
    if step == "before":
        dialling.deferred.cancel()
        dialling.dialler.superseded = True
        dialling.session.calls.clear()
        dialling.deferred = dialling.dialler.dial(dialling.session, dialling.device)
    dialling.deferred.addErrback(ended.append)
    dialling.dialler.superseded = True
    if step == "dns":
        dialling.resolved("one.example")
    elif step == "tls":
        dialling.resolved("one.example", "192.0.2.1")
        upstream, broker = dialling.connected("192.0.2.1")
        broker.talk(upstream)
        assert transport_of(upstream).aborted
        assert not broker.received
        upstream.connectionLost(Failure(error.ConnectionAborted()))
    assert [failure.type for failure in ended] == [Superseded]
    assert {call[0] for call in dialling.session.calls} <= {"dials"}
    assert "two.example" not in dialling.network.names
    assert not dialling.clock.getDelayedCalls()


def in_trial(world: World) -> tuple[Dialling, UpstreamProtocol]:
    """Return a dialler whose own trial of its broker, after a failure, has just verified it."""
    dialling = Dialling(world, close=5.0)
    dialling.resolved("one.example")
    assert dialling.failure.reason is EndReason.DNS_FAILED
    del dialling.network.names["one.example"]
    while "one.example" not in dialling.network.names:
        dialling.clock.advance(1)
        dialling.dialler.sweep()
    dialling.resolved("one.example", "192.0.2.1")
    upstream, broker = dialling.connected("192.0.2.1")
    broker.talk(upstream)
    assert not broker.received
    return dialling, upstream


def test_the_connection_of_a_trial_is_closed_and_then_cut(world: World) -> None:
    """A broker that does not close its end must not keep it; the broker works again meanwhile."""
    dialling, upstream = in_trial(world)
    assert not dialling.dialler.trials
    assert dialling.dialler.upstreams[0].is_open
    assert transport_of(upstream).half_closed
    for _ in range(4):
        dialling.clock.advance(1)
        dialling.dialler.sweep()
    assert not transport_of(upstream).aborted
    dialling.clock.advance(1)
    dialling.dialler.sweep()
    assert transport_of(upstream).aborted
    assert not dialling.dialler._closing
    upstream.connectionLost(Failure(error.ConnectionAborted()))


def test_a_stop_cuts_the_connections_of_trials(world: World) -> None:
    dialling, upstream = in_trial(world)
    dialling.dialler.stop()
    assert transport_of(upstream).aborted
    assert not dialling.dialler._closing
    upstream.connectionLost(Failure(error.ConnectionAborted()))


def proving(world: World, *hosts: str) -> tuple[Dialling, list[Any]]:
    """Return a dialler that shows a client certificate to its brokers, and what came of it."""
    dialling = Dialling(world, *hosts, close=5.0)
    dialling.deferred.cancel()
    dialling.network.names.clear()
    results: list[Any] = []
    Deferred.fromCoroutine(dialling.dialler.prove([], lambda _: world.policy)).addBoth(results.append)
    return dialling, results


def test_the_connection_that_proved_a_certificate_is_closed_and_then_cut(world: World) -> None:
    """A broker of TLS 1.3 that says nothing for a moment has accepted it. Not one MQTT byte is sent."""
    dialling, results = proving(world)
    dialling.resolved("one.example", "192.0.2.1")
    upstream, broker = dialling.connected("192.0.2.1")
    broker.talk(upstream)
    assert not results
    dialling.clock.advance(2)
    assert results == [None]
    assert transport_of(upstream).half_closed
    assert not broker.received
    dialling.clock.advance(4)
    dialling.dialler.sweep()
    assert not transport_of(upstream).aborted
    dialling.clock.advance(1)
    dialling.dialler.sweep()
    assert transport_of(upstream).aborted
    upstream.connectionLost(Failure(error.ConnectionAborted()))


def test_a_certificate_that_no_broker_could_see_is_told_with_each(world: World) -> None:
    dialling, results = proving(world, "one.example", "two.example")
    dialling.resolved("one.example")
    dialling.resolved("two.example", "192.0.2.9")
    dialling.network.endpoints["192.0.2.9"].fail()
    (failure,) = results
    assert failure.value.reason is EndReason.TCP_REFUSED
    assert "one.example:8883: dns-failed" in failure.value.detail
    assert "two.example:8883: tcp-refused" in failure.value.detail


def test_a_session_that_got_no_turn_at_a_program_gives_its_own_back(world: World) -> None:
    """And is refused; this says nothing about the broker, so no other one is tried."""
    dialling = Dialling(world, "one.example", "two.example")
    dialling.deferred.cancel()
    dialling.session.calls.clear()
    given_back: list[bool] = []
    refusal = Refusal(EndReason.CREDENTIALS_UNAVAILABLE, "too many wait", 3, 0x97)

    async def no_turn(*_: Any) -> Any:
        raise refusal

    dialling.dialler._attempt = no_turn  # type: ignore[method-assign]
    dialling.dialler.pacer.give_back = lambda: given_back.append(True)  # type: ignore[method-assign]
    dialling.dialler.dial(dialling.session, dialling.device)
    assert dialling.session.named("refuse") == [refusal]
    assert given_back == [True]
    assert "two.example" not in dialling.network.names


def test_a_look_up_that_never_ends_is_joined_for_a_bounded_time_only() -> None:
    """Twisted's resolver does not answer when its thread ends in an unforeseen way; the next session must ask anew."""
    reactor = ResolvingReactor()
    network = ReactorNetwork(reactor)
    lookup(network)
    reactor.now = 29.9
    lookup(network)
    assert len(reactor.resolver.asked) == 1
    reactor.now = 30.0
    _, results = lookup(network)
    assert len(reactor.resolver.asked) == 2
    reactor.resolver.answer(1, "192.0.2.1")
    assert results == [addresses("192.0.2.1")]


def test_a_broker_that_demands_tls_answers_and_does_not_read_them_is_cut_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL answers each KeyUpdate, past all backpressure; a thousand unread ones are enough."""
    upstream, _, _, session, device = world.serving()

    def answered(channel: TLSChannel, _: bytes) -> bytes:
        channel.waiting = True
        return b""

    monkeypatch.setattr(TLSChannel, "receive", answered)
    monkeypatch.setattr(TLSChannel, "outgoing", lambda *_: b"answer")
    for _ in range(3000):
        upstream.dataReceived(b"key update")
    assert not session.named("upstream_broken")
    device.pauseProducing()
    for _ in range(1000):
        upstream.dataReceived(b"key update")
    assert not session.named("upstream_broken")
    upstream.dataReceived(b"key update")
    assert session.named("upstream_broken")[0].reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    assert transport_of(upstream).aborted


def test_a_proxy_that_demands_tls_answers_and_does_not_read_them_is_cut_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broker is: the TLS layer with an https:// proxy answers KeyUpdates, too."""
    server = ProxyServer.of("https://proxy.example:3128")
    tunnel = tunnel_to("one.example", 8883, server)
    upstream, _, _, _, device = world.serving()
    layer = TLSLayer(upstream._channel, ProxyConnection(server, tunnel, lambda: upstream, 60.0), 60.0)
    transport = Transport()
    monkeypatch.setattr(TLSChannel, "start", lambda _: None)
    layer.makeConnection(transport)
    layer.registerProducer(device, True)
    monkeypatch.setattr(TLSChannel, "receive", lambda *_: b"")
    monkeypatch.setattr(TLSChannel, "outgoing", lambda *_: b"answer")
    for _ in range(3000):
        layer.dataReceived(b"\x16key update")
    assert not transport.aborted
    device.pauseProducing()
    for _ in range(1000):
        layer.dataReceived(b"\x16key update")
    assert not transport.aborted
    layer.dataReceived(b"\x16key update")
    assert transport.aborted
