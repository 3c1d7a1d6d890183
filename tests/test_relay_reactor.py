"""The relay's reactor with descriptors of its own making: what it reports, to whom, and how much in one turn."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import tcp
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from gateway.net.transport import RelayReactor, SendsAtOnce


class Idle:
    """A reactor in which nothing else happens."""

    def addReader(self, reader: Any) -> None:  # noqa: N802  the interface's name
        pass

    def removeReader(self, reader: Any) -> None:  # noqa: N802  the interface's name
        pass


class Descriptor:
    """One end of a pair of sockets, which remembers what it was told."""

    def __init__(self) -> None:
        self.socket, self.peer = socket.socketpair()
        self.socket.setblocking(False)
        self.read = 0
        self.written = 0
        self.lost: list[Failure] = []
        self.on_read: Callable[[], object] = lambda: None

    def fileno(self) -> int:
        return self.socket.fileno()

    def doRead(self) -> BaseException | None:  # noqa: N802  the interface's name
        self.read += 1
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(65536)
        self.on_read()
        return None

    def doWrite(self) -> None:  # noqa: N802  the interface's name
        self.written += 1

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)

    def logPrefix(self) -> str:
        return "test"

    def close(self) -> None:
        self.socket.close()
        self.peer.close()


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[RelayReactor]:
    """Return a relay's reactor that is running."""
    # A machine that stands still for a moment must not end a turn; a microsecond passes each time somebody asks.
    ticks = itertools.count()
    monkeypatch.setattr("gateway.net.transport.monotonic", lambda: next(ticks) / 1e6)
    relay = RelayReactor(Idle())
    relay.start()
    yield relay
    relay.stop()


@pytest.fixture
def make() -> Iterator[Callable[[], Descriptor]]:
    """Return a function that makes descriptors; they are closed after the test."""
    made: list[Descriptor] = []

    def new() -> Descriptor:
        made.append(Descriptor())
        return made[-1]

    yield new
    for each in made:
        each.close()


Make = Callable[[], Descriptor]


def test_a_new_owner_of_a_descriptor_is_not_told_what_was_said_of_the_old_one(relay: RelayReactor, make: Make) -> None:
    """Within a batch, descriptors are closed and opened, and the kernel gives the same number again."""
    first, second, new = make(), make(), make()

    def replace(other: Descriptor) -> None:
        if new.read or first.read + second.read > 1:
            return
        number = other.fileno()
        relay.removeReader(other)
        other.socket.close()
        # The lowest number that is free is the one just closed.
        os.dup2(new.fileno(), number)
        new.socket.close()
        new.socket = socket.socket(fileno=number)
        relay.addReader(new)

    first.on_read, second.on_read = lambda: replace(second), lambda: replace(first)
    for each in (first, second):
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert first.read + second.read == 1
    assert new.read == 0
    new.peer.send(b"x")
    relay.doRead()
    assert new.read == 1


def test_a_descriptor_that_leaves_within_a_batch_is_told_nothing_more(relay: RelayReactor, make: Make) -> None:
    first, second = make(), make()
    first.on_read, second.on_read = lambda: relay.removeReader(second), lambda: relay.removeReader(first)
    for each in (first, second):
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert first.read + second.read == 1


def test_what_follows_soon_is_done_in_the_same_turn(relay: RelayReactor, make: Make) -> None:
    """After a small batch the relay looks once more, before the reactor has its turn."""
    asked, answered = make(), make()
    asked.on_read = lambda: answered.peer.send(b"answer")
    for each in (asked, answered):
        relay.addReader(each)
    asked.peer.send(b"question")
    relay.doRead()
    assert (asked.read, answered.read) == (1, 1)


def test_a_large_batch_leaves_the_rest_to_the_next_turn(relay: RelayReactor, make: Make) -> None:
    """So that timers and threads have theirs in between, however many sessions have something to say."""
    descriptors = [make() for _ in range(100)]
    for each in descriptors:
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert sum(each.read for each in descriptors) == 64
    relay.doRead()
    assert all(each.read == 1 for each in descriptors)


def test_one_turn_ends_however_soon_the_next_event_follows(
    relay: RelayReactor, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sides that answer each other at once would otherwise keep the reactor to themselves."""
    times = iter(range(1000))
    monkeypatch.setattr("gateway.net.transport.monotonic", lambda: next(times) / 5000)
    endless = make()
    endless.on_read = lambda: endless.peer.send(b"again")
    relay.addReader(endless)
    endless.peer.send(b"x")
    relay.doRead()
    assert 1 < endless.read < 10


def test_a_mistake_in_one_connection_ends_that_one_alone(
    relay: RelayReactor, make: Make, logged_errors: list[dict[str, Any]]
) -> None:
    wrong, well = make(), make()

    def fail() -> None:
        raise ZeroDivisionError

    wrong.on_read = fail
    for each in (wrong, well):
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert well.read == 1
    assert not well.lost
    (reason,) = wrong.lost
    assert reason.check(ZeroDivisionError)
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()


def test_a_mistake_at_the_end_of_a_connection_leaves_the_others(
    relay: RelayReactor, make: Make, logged_errors: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, well = make(), make()

    def fail(_: Failure) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(wrong, "doRead", lambda: ConnectionLost())
    monkeypatch.setattr(wrong, "connectionLost", fail)
    for each in (wrong, well):
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert well.read == 1
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()


def test_reading_and_writing_are_watched_apart(relay: RelayReactor, make: Make) -> None:
    each = make()
    relay.addReader(each)
    relay.addWriter(each)
    each.peer.send(b"x")
    relay.doRead()
    assert each.read == 1
    assert each.written >= 1
    relay.removeWriter(each)
    written = each.written
    each.peer.send(b"x")
    relay.doRead()
    assert (each.read, each.written) == (2, written)
    relay.removeReader(each)
    each.peer.send(b"x")
    relay.doRead()
    assert each.read == 2


@pytest.mark.parametrize(("watched_for", "end"), [("reading", ConnectionDone), ("writing", ConnectionLost)])
def test_a_hang_up_ends_a_connection(relay: RelayReactor, make: Make, watched_for: str, end: type) -> None:
    """In good order where it is read, since all that came before has been read then."""
    each = make()
    if watched_for == "reading":
        relay.addReader(each)
        # EPOLLHUP without EPOLLIN, which a socket pair that is shut down in both directions does not give.
        relay._report(each, 0x10)
    else:
        relay.addWriter(each)
        each.peer.close()
        relay.doRead()
    (reason,) = each.lost
    assert reason.check(end)


def test_a_stop_ends_all_connections(make: Make) -> None:
    relay = RelayReactor(Idle())
    relay.start()
    descriptors = [make() for _ in range(3)]
    for each in descriptors:
        relay.addReader(each)
    relay.stop()
    assert not relay.running
    for each in descriptors:
        (reason,) = each.lost
        assert reason.check(ConnectionLost)
    # Whoever comes later is not watched, and nobody is told twice.
    relay.addReader(make())
    relay.stop()
    assert all(len(each.lost) == 1 for each in descriptors)


def test_a_reactor_that_stops_ends_all_connections(relay: RelayReactor, make: Make) -> None:
    """It tells what it watches that it is over, and the relay's set is one descriptor among others."""
    descriptor = make()
    relay.addReader(descriptor)
    relay.connectionLost(Failure(ConnectionLost()))
    assert not relay.running
    (reason,) = descriptor.lost
    assert reason.check(ConnectionLost)


@pytest.mark.parametrize(("family", "kind"), [(socket.AF_UNIX, UNIXAddress), (socket.AF_INET, IPv4Address)])
def test_a_socket_that_listens_already_is_adopted(
    relay: RelayReactor, tmp_path: Path, family: socket.AddressFamily, kind: type
) -> None:
    """As systemd hands it over, of either family."""
    built: list[Any] = []

    class Accepting(Factory):
        def buildProtocol(self, address: Any) -> None:
            built.append(address)

    with socket.socket(family) as ears, socket.socket(family) as device:
        ears.bind(str(tmp_path / "socket") if family is socket.AF_UNIX else ("127.0.0.1", 0))
        ears.listen()
        ears.setblocking(False)
        port: Any = relay.adoptStreamPort(ears.fileno(), family, Accepting())
        assert type(port.getHost()) is kind
        device.connect(ears.getsockname())
        relay.doRead()
        assert [type(address) for address in built] == [kind]
        port.connectionLost(Failure(ConnectionDone()))


# ---- a transport that sends at once


class Transport(SendsAtOnce, tcp.Connection):
    """A transport over one end of a pair of sockets."""

    def __init__(self, relay: RelayReactor) -> None:
        end, self.peer = socket.socketpair()
        end.setblocking(False)
        self.peer.settimeout(10)
        self.ended: list[Failure] = []
        protocol = Protocol()
        protocol.connectionLost = self.ended.append  # type: ignore[assignment]
        super().__init__(end, protocol, relay)  # type: ignore[arg-type]  # it has what transports ask for
        self.connected = True
        protocol.makeConnection(self)


@pytest.fixture
def transport(relay: RelayReactor) -> Iterator[Transport]:
    transport = Transport(relay)
    yield transport
    transport.peer.close()
    if not transport.ended:
        transport.connectionLost(Failure(ConnectionDone()))


def test_nothing_is_sent_after_a_half_close(transport: Transport) -> None:
    transport.write(b"before")
    assert transport.is_ordinary
    transport.loseWriteConnection()
    assert not transport.is_ordinary
    transport.write(b"after")
    assert (transport.peer.recv(100), transport.peer.recv(100)) == (b"before", b"")


def test_what_the_kernel_does_not_take_is_sent_when_it_does(relay: RelayReactor, transport: Transport) -> None:
    """In order; meanwhile nothing overtakes it."""
    # What is longer is left to Twisted's buffer from the start.
    pieces = [bytes([number]) * 20_000 for number in range(100)]
    for piece in pieces:
        transport.write(piece)
    assert not transport.is_ordinary
    received = bytearray()
    while len(received) < 2_000_000:
        received += transport.peer.recv(65536)
        relay.doRead()
    assert bytes(received) == b"".join(pieces)
    assert transport.is_ordinary


def test_a_send_that_failed_does_not_end_a_connection_orderly(transport: Transport) -> None:
    """The kernel tells of an error once, and here `write` was told."""
    transport.peer.close()
    transport.write(b"into the void")
    assert not transport.is_ordinary
    assert not transport.ended
    transport.connectionLost(Failure(ConnectionDone()))
    (end,) = transport.ended
    assert end.check(ConnectionLost)
