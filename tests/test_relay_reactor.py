"""The relay's reactor with descriptors of its own making: what it reports, to whom, and how much in one turn."""

from __future__ import annotations

import contextlib
import errno
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
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.net.transport import RelayReactor, SendsAtOnce, tune_socket


class Idle:
    """A reactor in which nothing else happens."""

    def addReader(self, reader: Any) -> None:  # noqa: N802  the interface's name
        pass

    def removeReader(self, reader: Any) -> None:  # noqa: N802  the interface's name
        pass


class Lending:
    """A core that takes what it is lent, reports nothing, and remembers who took something back."""

    HELD = 0
    DESCRIPTORS = 1000
    Pair = None

    def __init__(self) -> None:
        self.recalled = 0

    def poll(self, epoll: int, milliseconds: int, most: int, /) -> tuple[int, list[Any], list[tuple[int, int]]]:
        return 0, [], []

    def recall(self) -> None:
        self.recalled += 1

    def hand_over(self) -> None:
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


def test_a_stop_drops_calls_for_later_turns_and_takes_back_what_is_lent(transport_of: TransportOf) -> None:
    class Calling(Idle):
        def callLater(self, delay: float, call: Callable[[], object]) -> Any:
            made.append(Clock().callLater(delay, call))
            return made[-1]

    made: list[Any] = []
    core, called = Lending(), []
    relay = RelayReactor(Calling(), core)
    relay.start()
    transport = transport_of(relay)
    assert relay.lend(core, transport)
    relay.later(lambda: called.append(True))
    relay.stop()
    assert [call.active() for call in made] == [False]
    assert core.recalled == 1
    assert len(transport.ended) == 1
    relay.start()
    relay.later(lambda: called.append(False))
    made[-1].func()
    relay.stop()
    assert called == [False]


def test_only_a_connection_that_waits_to_be_read_is_lent(transport_of: TransportOf) -> None:
    """All else is Python's matter: what waits to be sent, what is not read, what has failed, what is too many."""
    core = Lending()
    relay = RelayReactor(Idle(), core)
    relay.start()
    one, two = transport_of(relay), transport_of(relay)
    two.stopReading()
    assert not relay.lend(core, one, two)
    two.startReading()
    assert relay.lend(core, one, two)
    relay.reclaim(one.fileno(), two.fileno())
    two.startWriting()
    assert not relay.lend(core, one, two)
    two.stopWriting()
    two._send_failed = True
    assert not relay.lend(core, one, two)
    two._send_failed = False
    core.DESCRIPTORS = max(one.fileno(), two.fileno())
    assert not relay.lend(core, one, two)
    core.DESCRIPTORS += 1
    relay.core = None
    assert not relay.lend(core, one, two)
    relay.core = core
    assert relay.lend(core, one, two)
    relay.reclaim(one.fileno(), two.fileno())
    relay.stop()
    assert not relay.lend(core, one, two)
    assert not core.recalled


def test_what_is_lent_is_taken_back_before_it_is_watched_otherwise(transport_of: TransportOf) -> None:
    """And is left where it is if nothing changes."""
    core = Lending()
    relay = RelayReactor(Idle(), core)
    relay.start()
    transport = transport_of(relay)
    assert relay.lend(core, transport)
    relay.removeWriter(transport)
    assert not core.recalled
    relay.addWriter(transport)
    assert core.recalled == 1
    relay.reclaim(transport.fileno())
    relay.removeWriter(transport)
    assert relay.lend(core, transport)
    relay.removeReader(transport)
    assert core.recalled == 2
    relay.reclaim(transport.fileno())
    assert relay.lend(core, transport) is False
    relay.removeReader(transport)
    assert core.recalled == 2
    relay.stop()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (0, ConnectionDone, "Connection was closed cleanly"),
        (
            errno.ECONNRESET,
            ConnectionLost,
            "Connection to the other side was lost in a non-clean fashion: Connection lost.",
        ),
        (errno.ETIMEDOUT, ConnectionLost, "Connection timed out"),
    ],
)
def test_an_end_that_the_core_found_is_as_if_python_had(
    relay: RelayReactor, transport: Transport, number: int, kind: type, words: str
) -> None:
    relay.end(transport, number)
    (end,) = transport.ended
    assert end.check(kind)
    assert words in str(end.value)
    relay.end(transport, number)
    assert len(transport.ended) == 1


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


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_connections_inherit_how_their_listener_is_tuned(timeout: float | None) -> None:
    """A device that is gone is found by TCP keepalive, from the first moment of its connection."""
    relay = RelayReactor(Idle(), None, timeout)
    relay.start()
    accepted: list[Any] = []

    class Accepting(Factory):
        def buildProtocol(self, address: Any) -> Protocol:
            protocol = Protocol()
            protocol.connectionMade = lambda: accepted.append(protocol.transport)  # type: ignore[method-assign]
            return protocol

    port: Any = relay.listenTCP(0, Accepting(), interface="127.0.0.1")
    assert port.tuned_for == timeout
    with socket.create_connection(("127.0.0.1", port.getHost().port)):
        relay.doRead()
        (connection,) = accepted
        options = [
            connection.socket.getsockopt(level, option)
            for level, option in [
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            ]
        ]
        assert (options == [1, 30, 10, 3]) == (timeout is not None)
        relay.stop()


@pytest.mark.parametrize(("timeout", "idle", "interval"), [(60.0, 30, 10), (9.0, 4, 1), (1.0, 1, 1)])
def test_a_dead_peer_is_found_within_the_timeout(timeout: float, idle: int, interval: int) -> None:
    """Half of it is silence, the other half three probes; the kernel counts whole seconds, one at least."""
    with socket.socket() as handle:
        tune_socket(handle, timeout)
        names = (socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [handle.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [1, idle, interval, 3]
        assert handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_the_address_of_a_device_has_its_scope(relay: RelayReactor) -> None:
    """`fe80::1` alone may be a device at each interface."""
    built: list[Any] = []

    class Accepting(Factory):
        def buildProtocol(self, address: Any) -> None:
            built.append(address)

    port: Any = relay.listenTCP(0, Accepting(), interface="::1")
    port._begin(socket.socket(socket.AF_INET6), ("fe80::1", 1883, 0, socket.if_nametoindex("lo")))
    assert [(address.host, address.port) for address in built] == [("fe80::1%lo", 1883)]


def test_a_connection_that_cannot_begin_does_not_keep_others_waiting(
    relay: RelayReactor, logged_errors: list[dict[str, Any]]
) -> None:
    """It is closed and logged; those that wait behind it are accepted in the same turn."""
    built: list[Any] = []

    class Accepting(Factory):
        def buildProtocol(self, address: Any) -> None:
            built.append(address)
            if len(built) == 1:
                raise ZeroDivisionError

    port: Any = relay.listenTCP(0, Accepting(), interface="127.0.0.1")
    with contextlib.ExitStack() as devices:
        for _ in range(3):
            devices.enter_context(socket.create_connection(("127.0.0.1", port.getHost().port)))
        relay.doRead()
        assert len(built) == 3
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()


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


TransportOf = Callable[[RelayReactor], Transport]


@pytest.fixture
def transport_of() -> Iterator[TransportOf]:
    """Return a function that makes a transport of a relay's reactor, which reads; it ends with the test."""
    made: list[Transport] = []

    def make(relay: RelayReactor) -> Transport:
        made.append(Transport(relay))
        made[-1].startReading()
        return made[-1]

    yield make
    for transport in made:
        transport.peer.close()
        if not transport.ended:
            transport.connectionLost(Failure(ConnectionDone()))


@pytest.fixture
def transport(relay: RelayReactor, transport_of: TransportOf) -> Transport:
    return transport_of(relay)


def test_nothing_is_sent_after_a_half_close(relay: RelayReactor, transport: Transport) -> None:
    transport.write(b"before")
    assert transport.is_ordinary
    transport.loseWriteConnection()
    assert not transport.is_ordinary
    transport.write(b"after")
    relay.doRead()
    assert (transport.peer.recv(100), transport.peer.recv(100)) == (b"before", b"")
    assert not transport.ended


def test_a_half_close_waits_for_what_is_not_sent_yet(relay: RelayReactor, transport: Transport) -> None:
    """FIN comes after the last byte."""
    while transport.is_ordinary:
        transport.write(bytes(20_000))
    transport.write(b"the end")
    transport.loseWriteConnection()
    received = bytearray()
    while piece := transport.peer.recv(65536):
        received += piece
        relay.doRead()
    assert received.endswith(b"the end")
    assert not transport.ended


def test_nothing_is_sent_after_an_abort(transport: Transport) -> None:
    transport.write(b"before")
    transport.reactor.callLater = lambda *_: None  # type: ignore[method-assign]  # it closes in a later turn
    transport.abortConnection()
    transport.write(b"after")
    transport.socket.shutdown(socket.SHUT_WR)
    assert (transport.peer.recv(100), transport.peer.recv(100)) == (b"before", b"")


def test_who_sends_much_is_read_in_larger_pieces(relay: RelayReactor, transport: Transport) -> None:
    """Until it sends little again: large pieces cost more to ask for."""
    sizes: list[int] = []
    transport.protocol.dataReceived = lambda data: sizes.append(len(data))
    for sent in (10_000, 20_000, 100, 10_000):
        transport.peer.send(bytes(sent))
        for _ in range(2):
            transport.doRead()
    assert sizes == [4096, 5904, 20_000, 100, 4096, 5904]


def test_an_orderly_end_stays_one(transport: Transport) -> None:
    transport.connectionLost(Failure(ConnectionDone()))
    (end,) = transport.ended
    assert end.check(ConnectionDone)


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
