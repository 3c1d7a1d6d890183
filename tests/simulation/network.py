"""A network and a clock that exist only in memory.

In: a seed's random numbers, what each link does to its bytes (`Weather`).  Out: connections between two protocols, time
that passes only when it is told to.

Only sockets, the polling of them, names and time are made up here.  In half of the runs the gateway's connections are
polled by its own `RelayReactor`, which works off batches of events; then only the epoll is made up (`VirtualRelay`).
There the compiled core may relay, its source unchanged; its system calls are those of `VirtualEpoll`.
The transports are Twisted's own `tcp.Connection` over a virtual socket, on the gateway's side with what
`net/transport.py` puts on top, so that producers, half-closes, aborts and partial writes behave as they do in
production.
"""

# ruff: noqa: N802  the names of IReactorFDSet and of transports are given

from __future__ import annotations

import errno
import heapq
import select
import socket
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from attrs import define, frozen
from twisted.internet import error, tcp
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.base import DelayedCall
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.net.network import Address
from gateway.net.transport import Lent, RelayReactor, SendsAtOnce
from tests.core.virtual import VirtualCore

# How long the gateway waits for a peer that no longer answers (`timeouts.tcp_user`). A peer that answers but takes
# nothing is cut here as well, so that each life ends; the real gateway would wait for it.
USER_TIMEOUT = 60.0


@implementer(IReactorTime)
class VirtualClock:
    """Time as a queue of calls: `callLater` for the gateway, `schedule` for the world, told apart by `waiting`."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._order = count()
        self._queue: list[tuple[float, int, Callable[..., Any] | None, tuple[Any, ...], DelayedCall | None]] = []
        self.steps = 0

    def seconds(self) -> float:
        return self._now

    def callLater(self, delay: float, callable: Callable[..., Any], *args: Any, **kw: Any) -> DelayedCall:  # noqa: A002  the interface's name
        assert delay >= 0
        call = DelayedCall(self._now + delay, callable, args, kw, lambda _: None, self._moved, self.seconds)
        heapq.heappush(self._queue, (call.getTime(), next(self._order), None, (), call))
        return call

    def getDelayedCalls(self) -> list[DelayedCall]:
        """Return the gateway's calls that are still to come."""
        return [call for *_, call in self._queue if call is not None and call.active()]

    def schedule(self, delay: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function of the world's own later; it cannot be cancelled."""
        heapq.heappush(self._queue, (self._now + delay, next(self._order), function, arguments, None))

    def stall(self, seconds: float) -> None:
        """Let time pass in which nothing is done, as when the process is stopped or the machine sleeps.

        Afterwards a reactor makes the calls that are overdue before it looks at any socket.
        """
        self._now += seconds
        for call in sorted(self.getDelayedCalls(), key=DelayedCall.getTime):
            if call.active() and call.getTime() <= self._now:
                call.called = 1
                call.func(*call.args, **call.kw)

    def run(self, until: float, stop: Callable[[], Any], limit: int) -> None:
        """Let time pass until `until`, or until `stop` is true; `limit` bounds the calls made, ever."""
        queue = self._queue
        while queue and queue[0][0] <= until and not stop():
            at, _, function, arguments, call = heapq.heappop(queue)
            self._now = max(self._now, at)
            if function is not None:
                function(*arguments)
            elif call is not None and call.active():
                call.called = 1
                call.func(*call.args, **call.kw)
            self.steps += 1
            if self.steps > limit:
                raise RuntimeError(f"{limit} steps, and no end")
        self._now = max(self._now, until)

    def _moved(self, call: DelayedCall) -> None:
        raise NotImplementedError("nobody here moves a delayed call")


@frozen
class Weather:
    """What a link does to the bytes it carries.

    `delay` is the least and the most seconds a segment takes, `segment` the most bytes of one, `capacity` the bytes
    between the two ends that nobody has read.  `harsh` links lose with a reset what was on the way and not read yet.
    """

    delay: tuple[float, float] = (0.0, 0.02)
    segment: int = 1460
    capacity: int = 65536
    partial_writes: bool = False
    harsh: bool = False


@frozen
class Cut:
    """An end that a link comes to after `offset` bytes from one of its ends.

    `kind` is "reset" (by something in between, seen by both), "crash" (the model's process dies: its kernel closes) or
    "silence" (a cable is pulled).
    """

    kind: str
    from_gateway: bool
    offset: int


class Poller:
    """What a reactor does for transports: reports readable and writable sockets, level-triggered, and disconnects."""

    def __init__(self, clock: VirtualClock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._readers: set[Any] = set()
        self._writers: set[Any] = set()
        self._awake: set[Any] = set()
        self.mistakes: list[str] = []
        self.after_turn: Callable[[Connection], None] = lambda _: None

    def callLater(self, delay: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call later: Twisted's transports ask for it to abort."""
        self._clock.schedule(delay, function, *arguments)

    def later(self, call: Callable[[], object]) -> None:
        """Call in a later turn: the gateway goes on with what it has read."""
        self._clock.schedule(0.0, call)

    def addReader(self, connection: Any) -> None:
        self._readers.add(connection)
        self.wake(connection)

    def addWriter(self, connection: Any) -> None:
        self._writers.add(connection)
        self.wake(connection)

    def removeReader(self, connection: Any) -> None:
        self._readers.discard(connection)

    def removeWriter(self, connection: Any) -> None:
        self._writers.discard(connection)

    def wake(self, connection: Any) -> None:
        """Look at a connection soon; in which order within a moment is up to the seed."""
        if connection not in self._awake:
            self._awake.add(connection)
            self._clock.schedule(self._random.choice((0.0, 0.0, 0.0002)), self._turn, connection)

    def _turn(self, connection: Any) -> None:
        self._awake.discard(connection)
        virtual = connection.__dict__.get("socket")
        reading, writing = connection in self._readers, connection in self._writers
        if virtual is None or not (reading or writing):
            return  # A descriptor that is watched for nothing is not watched for its end either.
        in_read = False
        why: BaseException | None = None
        readable, writable = reading and virtual.readable, writing and virtual.writable
        try:
            if virtual.ended and not readable:
                why = ConnectionDone() if reading else ConnectionLost()
                in_read = reading
            else:
                if readable:
                    in_read = True
                    why = connection.doRead()
                if why is None and writable and "socket" in connection.__dict__:
                    in_read = False
                    why = connection.doWrite()
        except Exception as mistake:  # noqa: BLE001  what a reactor would log
            self.mistakes.append(f"{connection.name}: {Failure().getTraceback()}")
            why = mistake
        if why is not None:
            self._disconnect(connection, why, in_read)
        virtual = connection.__dict__.get("socket")
        if virtual is not None and (
            (connection in self._readers and virtual.readable)
            or (connection in self._writers and virtual.writable)
            or (virtual.ended and (connection in self._readers or connection in self._writers))
        ):
            self.wake(connection)
        self.after_turn(connection)

    def _disconnect(self, connection: Any, why: BaseException, in_read: bool) -> None:
        self.removeReader(connection)
        if in_read and isinstance(why, ConnectionDone):
            connection.readConnectionLost(Failure(why))
        else:
            self.removeWriter(connection)
            connection.connectionLost(Failure(why))


class VirtualEpoll:
    """What `RelayReactor` asks of the kernel's epoll.  Descriptors are given out as the kernel does it: the lowest."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._open: dict[int, Any] = {}
        self._events: dict[int, int] = {}
        self.closed = False
        # What the core has done that it must not do.
        self.mistakes: list[str] = []

    def fileno(self) -> int:
        return 0

    def open(self, end: Any) -> int:
        """Give `end`, which has `readable`, `writable` and `ended`, the lowest free descriptor."""
        descriptor = next(number for number in count(3) if number not in self._open)
        self._open[descriptor] = end
        return descriptor

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that are open."""
        return list(self._open)

    def forget(self, descriptor: int) -> None:
        """Close a descriptor; the kernel then watches it no longer."""
        self._open.pop(descriptor, None)
        self._events.pop(descriptor, None)

    def register(self, descriptor: int, events: int) -> None:
        if descriptor in self._events:
            raise FileExistsError(errno.EEXIST, "registered already")
        self._events[descriptor] = events

    def modify(self, descriptor: int, events: int) -> None:
        if descriptor not in self._events:
            raise FileNotFoundError(errno.ENOENT, "not registered")
        self._events[descriptor] = events

    def unregister(self, descriptor: int) -> None:
        if descriptor not in self._events:
            raise FileNotFoundError(errno.ENOENT, "not registered")
        del self._events[descriptor]

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """Return what there is to report, in an order that is up to the seed; nothing comes while it waits."""
        del timeout
        ready = self.ready()
        self._random.shuffle(ready)
        return ready[:most]

    # ---- for the compiled core (`tests.core.virtual.Kernel`)

    def wait(self, most: int) -> list[tuple[int, int]]:
        return self.poll(0.0, most)

    def recv(self, descriptor: int, size: int) -> bytes:
        received: bytes = self._of(descriptor).recv(size)
        return received

    def send(self, descriptor: int, data: bytes) -> int:
        sent: int = self._of(descriptor).send(data)
        return sent

    def _of(self, descriptor: int) -> Any:
        if descriptor not in self._open:
            self.mistakes.append(f"descriptor {descriptor} is closed")
            raise OSError(errno.EBADF, "closed")
        return self._open[descriptor]

    def ready(self) -> list[tuple[int, int]]:
        """Return what there is to report."""
        found = []
        for descriptor, wanted in self._events.items():
            end = self._open[descriptor]
            events = wanted & ((select.EPOLLIN if end.readable else 0) | (select.EPOLLOUT if end.writable else 0))
            if end.ended:
                events |= select.EPOLLHUP
            if events:
                found.append((descriptor, events))
        return found

    def close(self) -> None:
        self.closed = True


class VirtualRelay(RelayReactor):
    """The gateway's own reactor over a made-up epoll."""

    def __init__(self, clock: VirtualClock, random: Random, core: VirtualCore | None = None) -> None:
        super().__init__(clock, core)
        self._clock = clock
        self._random = random
        self._epoll: Any = VirtualEpoll(random)
        if core is not None:
            core.use_kernel(self._epoll)
        # How often a session was lent to the core.
        self.loans = 0
        self._awake = False
        self._turns = 0.0
        self.after_turn: Callable[[Connection], None] = lambda _: None

    @property
    def epoll(self) -> VirtualEpoll:
        return self._epoll  # type: ignore[no-any-return]

    def callLater(self, delay: float, callable: Callable[..., Any], *args: object, **kw: object) -> Any:  # noqa: A002  the interface's name
        """Call later: Twisted's transports ask for it to abort."""
        self._clock.schedule(delay, lambda: callable(*args, **kw))

    def monotonic(self) -> float:
        """Return the time within a turn: it passes with each look, so that a turn does not depend on the machine."""
        self._turns += 0.0015
        return self._turns

    def _change(self, selectable: Any, added: int, removed: int) -> None:
        super()._change(selectable, added, removed)
        if added:
            self.wake(selectable)

    def lend(self, lent: Lent, *connections: SendsAtOnce) -> bool:
        is_lent = super().lend(lent, *connections)
        self.loans += is_lent
        return is_lent

    @property
    def lent(self) -> int:
        """How many descriptors are lent."""
        return len(self._lent)

    def wake(self, _: object) -> None:
        """Have a turn soon."""
        if not self._awake:
            self._awake = True
            self._clock.schedule(self._random.choice((0.0, 0.0, 0.0002)), self._turn)

    def _turn(self) -> None:
        self._awake = False
        served = list(self._selectables.values())
        self.doRead()
        for connection in served:
            if isinstance(connection, Connection):
                self.after_turn(connection)
        if self.epoll.ready():
            self.wake(None)


class Backlog:
    """A listening socket of the gateway's: connections that wait to be accepted, in a turn of the relay."""

    readable = writable = ended = False

    def __init__(self, relay: VirtualRelay) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._relay = relay
        self._descriptor = relay.epoll.open(self)
        relay.addReader(self)  # type: ignore[arg-type]  # it has what is asked of it

    def put(self, accept: Callable[[], None]) -> None:
        """Let a connection wait."""
        self._waiting.append(accept)
        self.readable = True
        self._relay.wake(self)

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        while self._waiting:
            self._waiting.popleft()()
        self.readable = False


class Connecting:
    """A socket of the gateway's that connects: writable when it is connected or has failed."""

    readable = ended = False

    def __init__(self, relay: VirtualRelay, done: Callable[[], None], mistakes: list[str]) -> None:
        self._relay = relay
        self._done = done
        self._mistakes = mistakes
        self.writable = False
        self._descriptor = relay.epoll.open(self)
        relay.addWriter(self)  # type: ignore[arg-type]  # it has what is asked of it

    def ready(self) -> None:
        """The network has answered."""
        self.writable = True
        self._relay.wake(self)

    def fileno(self) -> int:
        return self._descriptor

    def doWrite(self) -> None:
        if not self.writable:
            self._mistakes.append("a socket that still connects was told that it is connected")
            return
        self.close()
        self._done()

    def close(self) -> None:
        """Close the descriptor, which the next one that is opened then gets."""
        if self._descriptor >= 0:
            self._relay.removeWriter(self)  # type: ignore[arg-type]  # the same
            self._relay.epoll.forget(self._descriptor)
            self._descriptor = -1

    def connectionLost(self, _: Failure) -> None:
        self.close()


class Pipe:
    """One direction of a link: bytes in flight, bytes that arrived and nobody has read."""

    def __init__(self, link: Link, weather: Weather, cut_at: int | None) -> None:
        self._link = link
        self._weather = weather
        self._cut_at = cut_at
        self.sender: VirtualSocket
        self.receiver: VirtualSocket
        self._flight: deque[tuple[float, bytes]] = deque()  # empty bytes are a FIN
        self._flying = 0
        self._last_arrival = 0.0
        self._timer = False
        self.inbox = bytearray()
        self.carried = 0
        self._taken = 0
        self._probing = False
        self.finished = False
        self.void = False

    @property
    def room(self) -> int:
        return self._weather.capacity - self._flying - len(self.inbox)

    def put(self, data: memoryview | bytes) -> int:
        """Take what fits, cut into segments; return how much that was."""
        random, weather = self._link.random, self._weather
        size = min(len(data), self.room)
        if weather.partial_writes and size > 1 and random.random() < 0.3:
            size = random.randint(1, size)
        cut = self._cut_at is not None and not self.void and self.carried + size >= self._cut_at
        whole = size
        if cut and self._cut_at is not None:
            size = max(0, self._cut_at - self.carried)
        self.carried += size
        self._flying += whole
        if not self.void:
            start = 0
            while start < size:
                # Small segments matter where few bytes decide; a flood in them would only take long.
                most = weather.segment if self.carried < 8192 else max(weather.segment, 8192)
                end = min(size, start + random.randint((most + 1) // 2 if most > 1460 else 1, most))
                self._send(bytes(data[start:end]))
                start = end
        if cut:
            self._link.cut_now()
        if self.room <= 0 and self.sender is self._link.gateway and not self._probing:
            self._probing = True
            self._link.clock.schedule(USER_TIMEOUT, self._probed, self._taken)
        return whole

    def finish(self) -> None:
        """Send FIN."""
        self._send(b"")

    def take(self, size: int) -> bytes:
        """Read."""
        data = bytes(self.inbox[:size])
        del self.inbox[:size]
        self._taken += len(data)
        self.sender.wake()
        return data

    def lose(self) -> None:
        """Lose what is on the way."""
        self._flight.clear()

    def arrival(self) -> float:
        """Return when something that is sent now arrives: never before what was sent earlier."""
        now = self._link.clock.seconds()
        self._last_arrival = max(self._last_arrival, now + self._link.random.uniform(*self._weather.delay))
        return self._last_arrival

    def _probed(self, taken: int) -> None:
        """Give up a connection whose peer has left no room for as long as the gateway's kernel is to wait."""
        self._probing = False
        if self.room <= 0 and not self.sender.closed:
            if taken == self._taken:
                self.sender.break_off(keep=True)
            else:
                self._probing = True
                self._link.clock.schedule(USER_TIMEOUT, self._probed, self._taken)

    def _send(self, data: bytes) -> None:
        if self.void:
            return
        self._flight.append((self.arrival(), data))
        if not self._timer:
            self._timer = True
            self._link.clock.schedule(self._flight[0][0] - self._link.clock.seconds(), self._deliver)

    def _deliver(self) -> None:
        self._timer = False
        now = self._link.clock.seconds()
        while self._flight and self._flight[0][0] <= now + 1e-9:
            _, data = self._flight.popleft()
            self._flying -= len(data)
            if not data:
                self.finished = True
            elif self.receiver.closed:
                # There is nobody to read it any more: the kernel answers with a reset.
                self._link.reset_by(self.receiver)
                return
            else:
                self.inbox += data
        self.receiver.wake()
        if self._flight:
            self._timer = True
            self._link.clock.schedule(max(0.0, self._flight[0][0] - now), self._deliver)


class VirtualSocket:
    """One end of a link, with what `tcp.Connection` asks of a socket."""

    def __init__(self, link: Link, incoming: Pipe, outgoing: Pipe) -> None:
        self._link = link
        self.incoming = incoming
        self.outgoing = outgoing
        self.connection: Connection | None = None
        self.broken = False
        self.shut = False
        self.closed = False
        # Only the gateway's own sockets have one, where its own reactor polls them.
        self.descriptor = 0
        self.epoll: VirtualEpoll | None = None
        self._reset_at_close = False

    @property
    def readable(self) -> bool:
        return bool(self.incoming.inbox) or self.broken or self.incoming.finished

    @property
    def writable(self) -> bool:
        return self.broken or self.outgoing.room > 0

    @property
    def ended(self) -> bool:
        """Whether epoll would report EPOLLHUP."""
        return self.broken or (self.shut and self.incoming.finished)

    def wake(self) -> None:
        if self.connection is not None and not self.closed:
            self.connection.reactor.wake(self.connection)

    def break_off(self, keep: bool) -> None:
        """Learn of a reset, or of a timeout."""
        if not self.closed:
            self.broken = True
            if not keep:
                self.incoming.inbox.clear()
            self.wake()

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def fileno(self) -> int:
        return self.descriptor

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.incoming.inbox:
            return bytes(self.incoming.inbox[:size]) if flags & socket.MSG_PEEK else self.incoming.take(size)
        if self.broken:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        if self.incoming.finished:
            return b""
        raise BlockingIOError(errno.EWOULDBLOCK, "nothing to read")

    def send(self, data: memoryview) -> int:
        if self.broken or self.shut:
            raise BrokenPipeError(errno.EPIPE, "broken")
        if not len(data):
            return 0
        size = self.outgoing.put(data)
        if not size:
            raise BlockingIOError(errno.EWOULDBLOCK, "full")
        return size

    def shutdown(self, how: int) -> None:
        del how
        if self.broken:
            raise OSError(errno.ENOTCONN, "not connected")
        if not self.shut:
            self.shut = True
            self.outgoing.finish()

    def setsockopt(self, level: int, option: int, value: object) -> None:
        del value
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER)
        self._reset_at_close = True

    def close(self) -> None:
        self.closed = True
        if self.epoll is not None:
            self.epoll.forget(self.descriptor)
            self.descriptor = -1
        if self.broken:
            return
        if self._reset_at_close or self.incoming.inbox:
            self._link.reset_by(self)
        elif not self.shut:
            self.shut = True
            self.outgoing.finish()


class Link:
    """One TCP connection: between the gateway and a model, a device or a broker."""

    def __init__(self, clock: VirtualClock, random: Random, weather: Weather, cut: Cut | None) -> None:
        self.clock = clock
        self.random = random
        self.weather = weather
        self._cut = cut
        self.was_cut = False
        self.was_reset = False
        up = Pipe(self, weather, cut.offset if cut is not None and cut.from_gateway else None)
        down = Pipe(self, weather, cut.offset if cut is not None and not cut.from_gateway else None)
        self.gateway = VirtualSocket(self, down, up)
        self.model = VirtualSocket(self, up, down)
        for pipe, sender, receiver in ((up, self.gateway, self.model), (down, self.model, self.gateway)):
            pipe.sender, pipe.receiver = sender, receiver
        self._ends = (self.gateway, self.model)

    def reset_by(self, end: VirtualSocket) -> None:
        """Send RST to the other end; on a harsh link it overtakes what was sent before."""
        if self.was_reset:
            return
        self.was_reset = True
        self._break([self.gateway if end is self.model else self.model])

    def cut_now(self) -> None:
        """Come to the end that was planned."""
        assert self._cut is not None
        if self.was_cut or self.was_reset:
            return
        self.was_cut = True
        if self._cut.kind == "crash":
            self.clock.schedule(0.0, self._crash)
        elif self._cut.kind == "reset":
            self.was_reset = True
            self._break(list(self._ends))
        else:
            for end in self._ends:
                end.outgoing.void = True
                end.outgoing.lose()
                self.clock.schedule(USER_TIMEOUT, end.break_off, True)

    def _break(self, ends: list[VirtualSocket]) -> None:
        for end in self._ends:
            end.outgoing.void = True
            if self.weather.harsh:
                end.outgoing.lose()
        for end in ends:
            delay = end.incoming.arrival() - self.clock.seconds()
            self.clock.schedule(delay + 1e-6, end.break_off, not self.weather.harsh)

    def _crash(self) -> None:
        connection = self.model.connection
        if connection is not None and "socket" in connection.__dict__:
            connection.connectionLost(Failure(ConnectionDone()))


class Connection(tcp.Connection):
    """A model's transport: Twisted's, over a virtual socket."""

    def __init__(
        self, name: str, virtual: VirtualSocket, poller: Poller | VirtualRelay, host: Address, peer: Address
    ) -> None:
        super().__init__(virtual, None, poller)  # type: ignore[arg-type]  # it is no real socket, that is the point
        self.name = name
        self.connected = 1
        virtual.connection = self
        self._addresses = (host, peer)

    def begin(self, protocol: Protocol) -> None:
        """Give the connection to its protocol."""
        self.protocol = protocol
        self.startReading()
        protocol.makeConnection(self)

    @property
    def buffered(self) -> int:
        """How many bytes wait in user space."""
        return len(self.dataBuffer) - self.offset + self._tempDataLen

    def getHost(self) -> Address:
        return self._addresses[0]

    def getPeer(self) -> Address:
        return self._addresses[1]

    def reset(self) -> None:
        """End the connection with RST, now."""
        if "socket" in self.__dict__:
            self.connectionLost(Failure(error.ConnectionAborted()))


class GatewayConnection(SendsAtOnce, Connection):
    """The gateway's transport."""


@define
class Route:
    """What happens to a connection attempt to one address: "accept", "refuse", "unreachable" or "blackhole"."""

    kind: str
    delay: float
    accept: Callable[[Link], Protocol] | None = None


@frozen
class Name:
    """What a name server says: addresses after `delay` seconds, None if it never answers."""

    delay: float | None
    addresses: tuple[Address, ...]


class VirtualNetwork:
    """The network as `gateway.net.network.Network` has it, and the listener that devices connect to.

    `make_link` chooses the weather of each new link from the seed; its argument says whether it is a device's.
    """

    def __init__(
        self,
        clock: VirtualClock,
        poller: Poller,
        make_link: Callable[[bool], Link],
        relay: VirtualRelay | None = None,
    ) -> None:
        """Poll the gateway's connections by `relay` if there is one, otherwise like all others by `poller`."""
        self._clock = clock
        self._poller = poller
        self.relay = relay
        self._backlog = None if relay is None else Backlog(relay)
        self._make_link = make_link
        self.names: dict[str, Name] = {}
        self.routes: dict[str, Route] = {}
        self.connections: list[Connection] = []
        self.channels_ever: list[weakref.ref[Any]] = []

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """See `Network.resolve`."""
        name = self.names[host]
        answer: Deferred[list[Address]] = Deferred()

        def answered() -> None:
            if not answer.called:
                answer.callback([type(address)("TCP", address.host, port) for address in name.addresses])

        if name.delay is not None:
            self._clock.schedule(name.delay, answered)
        return answer

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """See `Network.endpoint`."""
        return Endpoint(self, self._clock, address)

    def connect_device(self, device: Protocol, address: IPv4Address, factory: Factory) -> Link:
        """Connect a device to the gateway, as a listening port would accept it."""
        link = self._make_link(True)
        listener = IPv4Address("TCP", "192.168.0.1", 1883)
        model = self._keep(Connection(f"device {address.host}", link.model, self._poller, address, listener))
        model.begin(device)

        def accept() -> None:
            if self._backlog is None:
                accepted()
            else:
                self._backlog.put(accepted)

        def accepted() -> None:
            protocol = factory.buildProtocol(address)
            if protocol is None:
                link.gateway.close()
                return
            name = f"gateway to device {address.host}"
            self._own(name, link, listener, address).begin(protocol)

        self._clock.schedule(link.random.uniform(*link.weather.delay), accept)
        return link

    def connecting(self, done: Callable[[], None]) -> Connecting | None:
        """Open a socket that connects, if the gateway's own reactor polls it."""
        return None if self.relay is None else Connecting(self.relay, done, self._poller.mistakes)

    def connect_upstream(self, address: Address, accept: Callable[[Link], Protocol], protocol: Protocol) -> None:
        """Connect the gateway to a broker."""
        link = self._make_link(False)
        local = IPv4Address("TCP", "192.168.0.1", 40000)
        model = self._keep(Connection(f"broker {address.host}", link.model, self._poller, address, local))
        model.begin(accept(link))
        name = f"gateway to broker {address.host}"
        self._own(name, link, local, address).begin(protocol)
        self.channels_ever.append(weakref.ref(protocol.__dict__["_channel"]))

    def _own(self, name: str, link: Link, host: Address, peer: Address) -> GatewayConnection:
        if self.relay is not None:
            link.gateway.epoll = self.relay.epoll
            link.gateway.descriptor = self.relay.epoll.open(link.gateway)
        connection: GatewayConnection = self._keep(
            GatewayConnection(name, link.gateway, self.relay or self._poller, host, peer)
        )
        return connection

    def _keep(self, connection: Connection) -> Any:
        self.connections.append(connection)
        return connection


@implementer(IStreamClientEndpoint)
class Endpoint:
    """Connects like Twisted's TCP endpoints without a timeout of their own: cancellable."""

    def __init__(self, network: VirtualNetwork, clock: VirtualClock, address: Address) -> None:
        self._network = network
        self._clock = clock
        self._address = address

    def connect(self, factory: Factory) -> Deferred[Protocol]:
        """See IStreamClientEndpoint."""
        route = self._network.routes[self._address.host]

        def given_up(_: object) -> None:
            if attempt is not None:
                attempt.close()
            result.errback(error.ConnectingCancelledError(self._address))

        def failed(problem: Exception) -> None:
            if not result.called:
                result.errback(problem)

        def connected() -> None:
            if not result.called:
                protocol = factory.buildProtocol(self._address)
                if protocol is None:
                    result.errback(error.NoProtocol())
                    return
                assert route.accept is not None
                self._network.connect_upstream(self._address, route.accept, protocol)
                result.callback(protocol)

        def done() -> None:
            if route.kind == "accept":
                connected()
            elif route.kind == "refuse":
                failed(error.ConnectionRefusedError())
            else:
                failed(error.NoRouteError())

        result: Deferred[Protocol] = Deferred(given_up)
        attempt = self._network.connecting(done)
        if route.kind != "blackhole":
            self._clock.schedule(route.delay, done if attempt is None else attempt.ready)
        return result


def make_address(host: str) -> Address:
    """Return an address without a port of its own."""
    return IPv6Address("TCP", host, 0) if ":" in host else IPv4Address("TCP", host, 0)
