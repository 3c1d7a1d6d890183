"""Twisted's transports with less work per message.

In: endpoints, which get a `RelayReactor` instead of the reactor.  Out: Twisted's own TCP and UNIX transports, which
send at once and are polled together.

Differences to the reactor's own transports (measured in `docs/performance.md`):

* `write` tries to send at once.  Twisted's `write` buffers, asks epoll for writability, and sends when it is reported:
  two more system calls and another reactor iteration per message.  Only what the kernel does not accept is buffered,
  and from there on everything is Twisted's: partial writes, producers, half-close, abort.
* The relay's descriptors are in an epoll of their own, whose descriptor the reactor watches.  The reactor wraps each
  event in a logging context, which costs as much as the framing; here a whole batch is one event.  With small batches,
  the reactor's work per event is most of the cost of a message, so the relay waits briefly for the next batch itself
  before it returns to the reactor.
* A turn of the reactor is short, whatever peers send: events for which there is no time wait for the next turn, in
  order, and so do calls of `later`.  What both may take in a turn is one limit for them together.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from types import FunctionType
from typing import Any, Protocol

from twisted.internet import tcp, unix
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IListeningPort,
    IProtocol,
    IReactorTime,
    IReadDescriptor,
    IReadWriteDescriptor,
    IWriteDescriptor,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger(namespace="gateway")
_TELL_EVERY = 60.0  # seconds

_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_DISCONNECTED = select.EPOLLHUP | select.EPOLLERR
# Events taken from the kernel at a time; the reactor's timers and threads run in between.
_BATCH = 64
# After a batch this small, wait for the next one, and for how long, in seconds (epoll's minimum). _TURN is how long one
# turn may last before waiting stops; the reactor's timers and threads are delayed by at most that.
_SMALL_BATCH = 16
_LINGER = 0.001
_LINGER_MS = int(_LINGER * 1000)
_TURN = 0.004
# Seconds of work in a turn after which what is left waits for the next one: of events, and of calls of `later`.
_WORK, _LATER_WORK = 0.002, 0.001
# And what is left of either where the other has taken all of it.
_LEAST_WORK = 0.0005
# Connections accepted at a time, and the seconds after which no more are.
_ACCEPTED_AT_ONCE, _ACCEPT_WORK = 5, 0.0005
# Host, port, flow and scope.
_IPV6_ADDRESS_SIZE = 4
# Bytes read at a time.  Python allocates the requested size and shrinks it afterwards, so large reads are only for
# connections that send much; they stay below malloc's threshold for mapping new pages at each call (128 KiB).
_SMALL_READ = 0x1000
_LARGE_READ = 0x10000
# Twisted's own limit for one send: the rest waits, so that one connection does not block the others.
_SENT_AT_ONCE = tcp.Connection.SEND_LIMIT
# How most connections end; shared, as in Twisted.
_ORDERLY = Failure(CONNECTION_DONE)


class Lent(Protocol):
    """A session whose two connections are lent to the compiled core (`gateway/relay/carrier.py`)."""

    def recall(self) -> None:
        """Take everything back; the core touches neither connection any more."""

    def hand_over(self) -> None:
        """Take everything back, and do what the core could not."""


class Core(Protocol):
    """The compiled core (`gateway/relay/_core.c`)."""

    HELD: int
    DESCRIPTORS: int
    Pair: Any

    def poll(self, epoll: int, milliseconds: int, most: int, /) -> tuple[int, list[Lent], list[tuple[int, int]]]:
        """Give how many events there were, who has something handed over, and the events that are not the core's."""


class SendsAtOnce(tcp.Connection):
    """Mixin for Twisted's transports: `write` sends what the kernel accepts and leaves the rest to Twisted.

    Twisted asks for writability while it still has to send, half-close or close; nothing may overtake its buffer then.
    """

    _largest_read = _LARGE_READ
    _writing = False
    _send_failed = False
    _wanted = _SMALL_READ
    reactor: RelayReactor  # type: ignore[assignment]  # it has what transports ask for

    def __init_subclass__(cls) -> None:
        """Give each class its own copy of the code that runs for each message.

        Python specialises code for the types it sees (PEP 659); code shared by two classes, here the transports of
        devices and brokers, is specialised for neither.
        """
        super().__init_subclass__()
        for method in (SendsAtOnce.doRead, SendsAtOnce.write):
            own = FunctionType(method.__code__.replace(), method.__globals__, closure=method.__closure__)
            setattr(cls, method.__name__, own)

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing waits to be sent, and nothing has failed or is ending."""
        return bool(self.connected) and not self._writing and not self._send_failed

    def startWriting(self) -> None:
        """See FileDescriptor."""
        self._writing = True
        self.reactor.addWriter(self)

    def stopWriting(self) -> None:
        """See FileDescriptor."""
        self._writing = False
        self.reactor.removeWriter(self)

    def limit_reads(self, size: int) -> None:
        """Read at most `size` bytes at a time."""
        self._largest_read = self._wanted = size

    def later(self, call: Callable[[], object]) -> None:
        """Call this in a later turn of the reactor."""
        self.reactor.later(call)

    def doRead(self) -> BaseException | None:  # type: ignore[override]  # Twisted's base classes disagree about it
        """See IReadDescriptor: as in Twisted, without two intermediate calls."""
        wanted = self._wanted
        try:
            data = self.socket.recv(wanted)
        except BlockingIOError:
            return None
        except OSError as error:
            return _lost_by(error.errno or 0)
        size = len(data)
        if size == wanted:
            self._wanted = self._largest_read
        elif not size:
            return CONNECTION_DONE
        elif size < _SMALL_READ < wanted:
            self._wanted = _SMALL_READ
        self.protocol.dataReceived(data)
        return None

    def write(self, data: bytes) -> None:
        """See ITransport."""
        # A pull producer is asked for more when Twisted's buffer is empty, so all its data must go through the buffer.
        pushed = self.producer is None or self.streamingProducer
        if not self._writing and pushed and self.connected and len(data) <= _SENT_AT_ONCE:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                # Do not close yet: what the peer sent before must still be read, and callers of `write` do not expect
                # the connection to close.  The kernel reports an error only once, so remember it; otherwise the end
                # would look orderly.
                self._send_failed = True
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        super().write(data)

    def loseWriteConnection(self) -> None:
        """See ITCPTransport."""
        if self._writing or self.producer is not None or not self.connected:
            super().loseWriteConnection()
            return
        # Nothing is pending.  Twisted would ask for writability and half-close when it is reported.
        self._writeDisconnecting = self._writeDisconnected = True
        self._writing = True  # Later writes go to Twisted's `write`, which drops them.
        if IHalfCloseableProtocol.providedBy(self.protocol):
            self._closeWriteConnection()
        else:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        self._shouldShutdown = False  # As Twisted does before the close: FIN has been sent.

    def readConnectionLost(self, reason: Failure) -> None:
        """See IHalfCloseableDescriptor; Twisted would look for an adapter of the protocol, which costs more."""
        if IHalfCloseableProtocol.providedBy(self.protocol):
            super().readConnectionLost(reason)
        else:
            self.connectionLost(reason)

    def abortConnection(self) -> None:
        """See ITCPTransport."""
        super().abortConnection()
        self._writing = True  # Until it closes in the next reactor turn, writes go to Twisted, which drops them.

    def connectionLost(self, reason: Failure) -> None:
        """See IReadDescriptor."""
        if self._send_failed and reason.check(ConnectionDone):
            reason = Failure(ConnectionLost())
        super().connectionLost(reason)


class _TCPServer(SendsAtOnce, tcp.Server):
    pass


class TCPClient(SendsAtOnce):
    """An outgoing connection (`gateway/net/connecting.py`)."""

    logstr = "gateway"

    def __init__(
        self, connected: socket.socket, protocol: IProtocol, peer: IPv4Address | IPv6Address, reactor: RelayReactor
    ) -> None:
        super().__init__(connected, protocol, reactor)  # type: ignore[arg-type]  # it provides what transports use
        self._peer = peer
        self.connected = True

    def getHost(self) -> IPv4Address | IPv6Address:
        """See ITransport."""
        return type(self._peer)("TCP", *self.socket.getsockname())

    def getPeer(self) -> IPv4Address | IPv6Address:
        """See ITransport."""
        return self._peer


class UNIXServer(SendsAtOnce, unix.Server):
    """A device's connection to a UNIX socket."""


@implementer(ILogObserver)
class _NotAccepted:
    """Tells at most once a minute that connections cannot be accepted; Twisted has up to three lines for each."""

    def __init__(self) -> None:
        self._next = -math.inf

    def __call__(self, event: LogEvent) -> None:
        """Take an event of Twisted's port."""
        # Only for want of a descriptor of this process, it names no error.
        why = event.get("acceptError", "EMFILE")
        now = monotonic()
        # A client that has left already is no problem.
        if why == "ECONNABORTED" or now < self._next:
            return
        self._next = now + _TELL_EVERY
        _log.warn(
            "new connections of devices are closed, or wait: {why}. Raise the unit's LimitNOFILE, or find what uses up "
            "this machine's descriptors or memory.",
            event="connections-not-accepted",
            why=os.strerror(getattr(errno, why)),
        )


class _AcceptsFew(tcp.Port):
    """Mixin for Twisted's ports, which accept a hundred and more connections in one event.

    Here they accept a few in each event, and more in each turn until nobody waits.  With events alone, which take
    turns, a flood would be spread over more turns; but sessions that begin together cost less, because they take the
    same steps one after the other.
    """

    _logger = Logger(namespace="gateway", observer=_NotAccepted())
    # Whether more are to be accepted in a later turn.
    _goes_on = False

    def doRead(self) -> None:
        """See IReadDescriptor."""
        until = monotonic() + _ACCEPT_WORK
        for _ in range(_ACCEPTED_AT_ONCE):
            if self.disconnecting or not self._accept():
                return
            if monotonic() >= until:
                break
        if not self._goes_on:
            self._goes_on = True
            self.reactor.later(self._go_on)  # type: ignore[attr-defined]  # it is a RelayReactor

    def _go_on(self) -> None:
        self._goes_on = False
        if self.connected:
            self.doRead()

    def _accept(self) -> bool:
        """Accept one connection; return false if none waits.

        As in Twisted, which for each call also makes two loggers, a buffer for what they log, and a generator.
        """
        try:
            accepted, address = self.socket.accept()
        except BlockingIOError:
            return False
        except OSError:
            # Twisted knows what to do, for example if there is no free descriptor; it will get the same error.
            self.numberAccepts = 1
            super().doRead()
            return False
        try:
            self._begin(accepted, address)
        except Exception:  # noqa: BLE001  an error in one connection must not affect the others
            _log.failure("internal error in a new connection")
        return True

    def _begin(self, accepted: socket.socket, address: Any) -> None:
        try:
            if len(address) == _IPV6_ADDRESS_SIZE:
                # With its scope, which is not part of `address`.
                host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
                address = (host, *address[1:])
            protocol = self.factory.buildProtocol(self._buildAddr(address))  # type: ignore[union-attr]  # it listens
        except Exception:
            accepted.close()  # What is logged would keep it open.
            raise
        if protocol is None:
            accepted.close()
            return
        number = self.sessionno
        self.sessionno += 1
        protocol.makeConnection(self.transport(accepted, protocol, address, self, number, self.reactor))


class _TCPPort(_AcceptsFew):
    transport = _TCPServer
    # The timeout whose options (`tune_socket`) connections inherit; None if they inherit none.
    tuned_for: float | None = None

    def createInternetSocket(self) -> socket.socket:
        """See Port: connections inherit what is set before they come."""
        created: socket.socket = super().createInternetSocket()
        timeout = self.reactor.user_timeout  # type: ignore[attr-defined]  # it is a RelayReactor
        if timeout is not None:
            tune_socket(created, timeout)
            self.tuned_for = timeout
        return created


class _UNIXPort(_AcceptsFew, unix.Port):
    transport = UNIXServer


_KEEPALIVE_PROBES = 3


def tune_socket(handle: socket.socket, user_timeout: float) -> None:
    """Send small packets at once, and let TCP keepalive find a dead peer within `user_timeout` seconds."""
    idle = max(1, int(user_timeout / 2))
    interval = max(1, int((user_timeout - idle) / _KEEPALIVE_PROBES))
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


@implementer(IReactorTime, IReadDescriptor)
class RelayReactor:
    """The part of a reactor that endpoints and transports use, on top of a real reactor.

    It listens on TCP and UNIX sockets and on sockets from systemd; `net/connecting.py` connects.  Time, threads and
    name resolution are the real reactor's.
    """

    def __init__(self, reactor: Any, core: Core | None = None, user_timeout: float | None = None) -> None:
        """Take a reactor that provides IReactorFDSet, IReactorTime and IReactorThreads, and the core.

        `user_timeout` is what listening sockets are tuned for (`tune_socket`), for their connections to inherit.
        """
        self._reactor = reactor
        self.core = core
        self.user_timeout = user_timeout
        # Who has lent a descriptor to the core.  It is watched for reading, and for nothing else.
        self._lent: dict[int, Lent] = {}
        self._epoll = select.epoll()
        self._epoll.close()
        self._selectables: dict[int, IReadWriteDescriptor] = {}
        self._events: dict[int, int] = {}
        # Descriptors registered while a batch is processed: events in the batch belong to their predecessors.  And
        # those lent meanwhile: their events are for the core, and will be reported again.
        self._fresh: set[int] = set()
        # Events for which there was no time, by descriptor, the oldest first; none of a predecessor, and none of lent
        # descriptors.  There may be thousands, so a turn must not go through all of them.
        self._left: OrderedDict[int, int] = OrderedDict()
        # Calls for later turns, and the next turn for them.
        self._later: deque[Callable[[], object]] = deque()
        self._next: IDelayedCall | None = None
        # How long the last of these calls took, and the last events, in seconds: what runs next has less time.
        self._spent = self._worked = 0.0

    @property
    def running(self) -> bool:
        """Whether events are reported."""
        return not self._epoll.closed

    def start(self) -> None:
        """Start reporting events."""
        self._epoll = select.epoll()
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Stop reporting events and close what is still open, as a stopping reactor does."""
        if self._epoll.closed:
            return
        self._reactor.removeReader(self)
        self._left.clear()
        self._later.clear()
        if self._next is not None:
            self._next.cancel()
            self._next = None
        for lent in list(self._lent.values()):
            lent.recall()
        left = list(self._selectables.values())
        self._selectables.clear()
        self._events.clear()
        self._epoll.close()
        for selectable in left:
            _lose(selectable.connectionLost, ConnectionLost())

    # ---- for endpoints

    def listenTCP(self, port: int, factory: Factory, backlog: int = 50, interface: str = "") -> IListeningPort:
        """See IReactorTCP."""
        listening = _TCPPort(port, factory, backlog, interface, self)
        listening.startListening()
        return listening

    def listenUNIX(
        self,
        address: str,
        factory: Factory,
        backlog: int = 50,
        mode: int = 0o666,
        wantPID: bool = False,
    ) -> IListeningPort:
        """See IReactorUNIX."""
        listening: IListeningPort = _UNIXPort(address.encode(), factory, backlog, mode, self, wantPID)
        listening.startListening()
        return listening

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: Factory) -> IListeningPort:
        """See IReactorSocket."""
        listening: IListeningPort
        if addressFamily == socket.AF_UNIX:
            listening = _UNIXPort._fromListeningDescriptor(self, fileDescriptor, factory)  # noqa: SLF001  as reactors do
        else:
            listening = _TCPPort._fromListeningDescriptor(self, fileDescriptor, addressFamily, factory)  # noqa: SLF001  as reactors do
        listening.startListening()
        return listening

    def getThreadPool(self) -> Any:
        """See IReactorThreads."""
        return self._reactor.getThreadPool()

    def callFromThread(self, callable: Callable[..., Any], *args: object, **kw: object) -> None:  # noqa: A002  the interface's name
        """See IReactorFromThreads."""
        self._reactor.callFromThread(callable, *args, **kw)

    def seconds(self) -> float:
        """See IReactorTime."""
        seconds: float = self._reactor.seconds()
        return seconds

    def callLater(self, delay: float, callable: Callable[..., Any], *args: object, **kw: object) -> IDelayedCall:  # noqa: A002  the interface's name
        """See IReactorTime."""
        call: IDelayedCall = self._reactor.callLater(delay, callable, *args, **kw)
        return call

    def getDelayedCalls(self) -> Any:
        """See IReactorTime."""
        return self._reactor.getDelayedCalls()

    def later(self, call: Callable[[], object]) -> None:
        """Call this in a later turn of the reactor, after what waits already.

        For work that goes on: together the calls take little time of one turn, however many there are.
        """
        self._later.append(call)
        if self._next is None:
            self._next = self._reactor.callLater(0, self._go_on)

    def _go_on(self) -> None:
        self._next = None
        work = min(_LATER_WORK, max(_WORK - self._worked, _LEAST_WORK))
        self._worked = 0.0
        began = now = monotonic()
        # Those that are added meanwhile are for another turn.
        for _ in range(len(self._later)):
            if not self._later:
                return  # It was stopped.
            try:
                self._later.popleft()()
            except Exception as error:  # noqa: BLE001  an error in one connection must not affect the others
                _internal_error(error)
            now = monotonic()
            if now >= began + work:
                break
        self._spent = now - began
        if self._later and self._next is None:
            self._next = self._reactor.callLater(0, self._go_on)

    # ---- for transports (part of IReactorFDSet)

    def addReader(self, reader: IReadDescriptor) -> None:
        """Report when `reader` is readable."""
        self._change(reader, _READ, 0)

    def removeReader(self, reader: IReadDescriptor) -> None:
        """Report it no longer."""
        if self._events.get(reader.fileno(), 0) & _READ:
            self._change(reader, 0, _READ)

    def addWriter(self, writer: IWriteDescriptor) -> None:
        """Report when `writer` is writable."""
        self._change(writer, _WRITE, 0)

    def removeWriter(self, writer: IWriteDescriptor) -> None:
        """Report it no longer."""
        if self._events.get(writer.fileno(), 0) & _WRITE:
            self._change(writer, 0, _WRITE)

    def replace(self, before: IReadWriteDescriptor, after: IReadWriteDescriptor) -> None:
        """Report when `after` is readable; it has taken over the descriptor of `before`."""
        descriptor = before.fileno()
        self._epoll.modify(descriptor, _READ)
        self._selectables[descriptor] = after
        self._events[descriptor] = _READ

    def _change(self, selectable: Any, added: int, removed: int) -> None:
        descriptor = selectable.fileno()
        if descriptor < 0 or self._epoll.closed:
            return  # The kernel has removed it.
        if descriptor in self._lent:
            self._lent[descriptor].recall()
        before = self._events[descriptor] if self._selectables.get(descriptor) is selectable else 0
        after = (before | added) & ~removed
        if after == before:
            return
        if not after:
            self._epoll.unregister(descriptor)
            del self._events[descriptor], self._selectables[descriptor]
            return
        if before:
            self._epoll.modify(descriptor, after)
        else:
            self._epoll.register(descriptor, after)
            self._selectables[descriptor] = selectable
            self._fresh.add(descriptor)
            self._left.pop(descriptor, None)
        self._events[descriptor] = after

    # ---- for carriers

    def lend(self, lent: Lent, *connections: SendsAtOnce) -> bool:
        """Leave the events of these connections to the core, if all that they wait for is to be read."""
        for each in connections:
            descriptor = each.fileno()
            watched: object = self._selectables.get(descriptor)
            if watched is not each or self._events[descriptor] != _READ:
                return False
            if not each.is_ordinary or self._epoll.closed or self.core is None or descriptor >= self.core.DESCRIPTORS:
                return False
        for each in connections:
            self._lent[each.fileno()] = lent
            self._fresh.add(each.fileno())
            self._left.pop(each.fileno(), None)
        return True

    def reclaim(self, *descriptors: int) -> None:
        """Report the events of these descriptors again."""
        for descriptor in descriptors:
            del self._lent[descriptor]

    def end(self, connection: SendsAtOnce, number: int) -> None:
        """End a connection as if reading from it had failed with this errno, or had found its end, 0."""
        if connection.connected:
            self._disconnect(connection, _lost_by(number) if number else CONNECTION_DONE, reading=True)

    # ---- for the real reactor (IReadDescriptor)

    def fileno(self) -> int:
        """Return the descriptor of the epoll, which is readable when it has events."""
        return self._epoll.fileno()

    def doRead(self) -> None:
        """Process the pending events, and those that follow soon, as far as there is time."""
        epoll, selectables, fresh, core, left = self._epoll, self._selectables, self._fresh, self.core, self._left
        number, began = epoll.fileno(), monotonic()
        allowed = work = max(_WORK - self._spent, _LEAST_WORK)
        wait, until = 0.0, began + _TURN
        self._spent = 0.0
        while True:
            fresh.clear()
            if core is None:
                # What was left comes first, and is no less than there is time for, mostly.
                batch = epoll.poll(wait, _BATCH) if not left else []
                count = len(batch) or len(left)
                stop = min(monotonic() + work, until)
            else:
                count, handed_over, batch = core.poll(number, int(wait * 1000), _BATCH)
                now = monotonic()
                while wait and 0 < count <= _SMALL_BATCH and now < until and not (batch or handed_over or left):
                    # Only the core has something to do, and all else is as it was.
                    count, handed_over, batch = core.poll(number, _LINGER_MS, _BATCH)
                    now = monotonic()
                # The core has worked in there, and later also waited, which is no work.
                stop = min(now + (work if wait else max(work - (now - began), _LEAST_WORK)), until)
                for lent in handed_over:
                    try:
                        lent.hand_over()
                    except Exception as error:  # noqa: BLE001  an error in one session must not affect the others
                        _internal_error(error)
            rest = iter(batch)
            events: Iterator[tuple[int, int]] = rest
            if left:
                self._leave(rest)
                events = self._oldest()
            for descriptor, event in events:
                selectable = selectables.get(descriptor)
                if selectable is None or (fresh and descriptor in fresh):
                    continue
                if event == _READ:
                    # The most frequent case, inlined to save a call; `_report` would do the same.
                    why: BaseException | None
                    try:
                        why = selectable.doRead()
                    except Exception as error:  # noqa: BLE001  an error in one connection must not affect the others
                        why = _internal_error(error)
                    if why is not None:
                        self._disconnect(selectable, why, reading=True)
                else:
                    self._report(selectable, event)
                if monotonic() >= stop:
                    self._leave(rest)
                    self._worked = allowed
                    return
            now = monotonic()
            work = stop - now
            self._worked = allowed - work
            if not 0 < count <= _SMALL_BATCH or epoll.closed or now >= until or work <= 0:
                return
            wait = _LINGER

    def _leave(self, events: Iterator[tuple[int, int]]) -> None:
        """Leave events of this batch to the next turn, but for those of predecessors."""
        for descriptor, event in events:
            if descriptor not in self._fresh:
                self._left[descriptor] = event

    def _oldest(self) -> Iterator[tuple[int, int]]:
        """Take the events that were left, of those who still wait for them."""
        left, events = self._left, self._events
        while left:
            descriptor, event = left.popitem(last=False)
            if event & (events.get(descriptor, 0) | _DISCONNECTED):
                yield descriptor, event

    def connectionLost(self, reason: Failure) -> None:
        """See IReadDescriptor: the reactor stops."""
        del reason
        self.stop()

    def logPrefix(self) -> str:
        """See ILoggingContext."""
        return "gateway"

    def _report(self, selectable: IReadWriteDescriptor, events: int) -> None:
        why: BaseException | None = None
        reading = False
        try:
            if events & _DISCONNECTED and not events & _READ:
                # Everything sent before has been read; for a connection that is being read this is an orderly end.
                reading = self._events[selectable.fileno()] & _READ != 0
                why = ConnectionDone() if reading else ConnectionLost()
            else:
                if events & _READ:
                    reading = True
                    why = selectable.doRead()
                if why is None and events & _WRITE:
                    reading = False
                    why = selectable.doWrite()
        except Exception as error:  # noqa: BLE001  an error in one connection must not affect the others
            why = _internal_error(error)
        if why is not None:
            self._disconnect(selectable, why, reading=reading)

    def _disconnect(self, selectable: IReadWriteDescriptor, why: BaseException, *, reading: bool) -> None:
        self.removeReader(selectable)
        # Not by IHalfCloseableDescriptor: asking an interface costs more than all else here.
        half_lost = getattr(selectable, "readConnectionLost", None) if reading else None
        if half_lost is not None and isinstance(why, ConnectionDone):
            _lose(half_lost, why)
        else:
            self.removeWriter(selectable)
            _lose(selectable.connectionLost, why)


def _lost_by(number: int) -> BaseException:
    """Return how a connection was lost, by the errno of `recv`."""
    if number == errno.ECONNRESET:
        return CONNECTION_LOST
    # The peer no longer acknowledges, or the network is down: report the kernel's error.
    return ConnectionLost(os.strerror(number))


def _internal_error(error: Exception) -> Exception:
    """Log an exception of a descriptor and return it as the reason for its end."""
    _log.failure("internal error in a connection")
    return error


def _lose(tell: Callable[[Failure], object], why: BaseException) -> None:
    """Tell a descriptor that its connection is lost, and contain any exception.

    Otherwise it would reach the real reactor, which would disconnect the whole relay.
    """
    try:
        tell(_ORDERLY if why is CONNECTION_DONE else Failure(why))
    except Exception:  # noqa: BLE001  an error in one connection must not affect the others
        _log.failure("internal error while closing a connection")
