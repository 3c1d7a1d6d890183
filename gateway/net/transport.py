"""Twisted's transports with two things taken out of the way of each message.

In: endpoints, which are given a `RelayReactor` in place of the reactor.  Out: Twisted's own TCP and UNIX transports,
which send at once and are polled together.

What is different from the reactor's own, and why (measured in `docs/performance.md`):

* `write` tries to send at once.  Twisted's buffers, asks epoll for writability, and sends when that is reported: two
  system calls and a round of the reactor more for each message.  Only what the kernel does not take is buffered, and
  from there on everything is Twisted's: partial writes, producers, half-close, abort.
* The descriptors of the relay stand in an epoll of their own, whose descriptor the reactor watches.  The reactor wraps
  each event in a logging context, which costs as much as the framing; here the whole batch is one event to it.  Where
  batches are small, what the reactor does for each is most of the cost of a message: then the relay waits a moment for
  the next one itself, before it gives the reactor its turn.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from time import monotonic
from types import FunctionType
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableDescriptor,
    IListeningPort,
    IProtocol,
    IReactorTime,
    IReadDescriptor,
    IReadWriteDescriptor,
    IWriteDescriptor,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger(namespace="gateway")

_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_DISCONNECTED = select.EPOLLHUP | select.EPOLLERR
# Events taken from the kernel at a time; the reactor's timers and threads have their turn in between.
_BATCH = 64
# How small a batch must be for the next one to be waited for, and for how long, in seconds: the least that epoll knows.
# And how long all of one turn may take, before it waits no more: so much later, at worst, are the reactor's timers and
# threads.
_SMALL_BATCH = 16
_LINGER = 0.001
_TURN = 0.004
# Bytes read at a time.  Python allocates what is asked for and gives back what did not come, so a large read is for
# those who send much; it stays below malloc's threshold for mapping pages anew at each call (128 KiB).
_SMALL_READ = 0x1000
_LARGE_READ = 0x10000
# Twisted's own limit on a send: more than that waits its turn, so that one connection does not keep the others waiting.
_SENT_AT_ONCE = tcp.Connection.SEND_LIMIT
# How most connections end; one for all, as Twisted has it, too.
_ORDERLY = Failure(CONNECTION_DONE)


class _SendsAtOnce(tcp.Connection):
    """Mixed into Twisted's transports: `write` sends what the kernel takes and leaves the rest to Twisted.

    Twisted asks for writability as long as it has something to do later, be it to send, to half-close or to close:
    only while it does not may anything overtake its buffer.
    """

    _writing = False
    _send_failed = False
    _wanted = _SMALL_READ

    def __init_subclass__(cls) -> None:
        """Give each class code of its own for what is done with each message.

        Python adapts code to the types that it meets (PEP 659); code that two classes take turns with, as a device's
        transport and a broker's do, is adapted to neither.
        """
        super().__init_subclass__()
        for method in (_SendsAtOnce.doRead, _SendsAtOnce.write):
            own = FunctionType(method.__code__.replace(), method.__globals__, closure=method.__closure__)
            setattr(cls, method.__name__, own)

    def startWriting(self) -> None:
        self._writing = True
        super().startWriting()

    def stopWriting(self) -> None:
        self._writing = False
        super().stopWriting()

    def doRead(self) -> BaseException | None:  # type: ignore[override]  # Twisted's bases do not agree on it
        # As Twisted's, without the two calls in between.
        wanted = self._wanted
        try:
            data = self.socket.recv(wanted)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return CONNECTION_LOST
        except OSError as error:
            # The peer no longer acknowledges, or the network has gone: what the kernel says is worth telling.
            return ConnectionLost(error.strerror)
        size = len(data)
        if size == wanted:
            self._wanted = _LARGE_READ
        elif not size:
            return CONNECTION_DONE
        elif size < _SMALL_READ < wanted:
            self._wanted = _SMALL_READ
        self.protocol.dataReceived(data)
        return None

    def write(self, data: bytes) -> None:
        # A pull producer is asked for more when Twisted's buffer runs empty, so all of it must run through that.
        pushed = self.producer is None or self.streamingProducer
        if not self._writing and pushed and self.connected and len(data) <= _SENT_AT_ONCE:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                # Not the end yet: what the peer sent before is still to be read, and no caller of `write` expects to
                # find the connection gone.  But the kernel tells of an error once, so that the end would look orderly.
                self._send_failed = True
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        super().write(data)

    def loseWriteConnection(self) -> None:
        if self._writing or self.producer is not None or not self.connected:
            super().loseWriteConnection()
            return
        # Nothing waits to be sent.  Twisted would ask for writability, and half-close when that is reported.
        self._writeDisconnecting = self._writeDisconnected = True
        self._writing = True  # What is written from here on is for Twisted's `write`, which drops it.
        self._closeWriteConnection()
        self._shouldShutdown = False  # Before the close, as Twisted does it: FIN has left.

    def abortConnection(self) -> None:
        super().abortConnection()
        self._writing = True  # Until the end, in the reactor's next turn, writes are for Twisted, which drops them.

    def connectionLost(self, reason: Failure) -> None:
        if self._send_failed and reason.check(ConnectionDone):
            reason = Failure(ConnectionLost())
        super().connectionLost(reason)


class _TCPServer(_SendsAtOnce, tcp.Server):
    pass


class TCPClient(_SendsAtOnce):
    """A connection that the gateway has made (`gateway/net/connecting.py`)."""

    logstr = "gateway"

    def __init__(
        self, connected: socket.socket, protocol: IProtocol, peer: IPv4Address | IPv6Address, reactor: RelayReactor
    ) -> None:
        super().__init__(connected, protocol, reactor)  # type: ignore[arg-type]  # it has what transports ask for
        self._peer = peer
        self.connected = True

    def getHost(self) -> IPv4Address | IPv6Address:
        """See ITransport."""
        return type(self._peer)("TCP", *self.socket.getsockname())

    def getPeer(self) -> IPv4Address | IPv6Address:
        """See ITransport."""
        return self._peer


class _UNIXServer(_SendsAtOnce, unix.Server):
    pass


class _TCPPort(tcp.Port):
    transport = _TCPServer


class _UNIXPort(unix.Port):
    transport = _UNIXServer


@implementer(IReactorTime, IReadDescriptor)
class RelayReactor:
    """The part of a reactor that endpoints and transports ask for, on top of a real one.

    It listens on TCP and UNIX sockets and on sockets of systemd; `net/connecting.py` connects.  Time, threads and
    names are the real reactor's.
    """

    def __init__(self, reactor: Any) -> None:
        """Take a reactor that provides IReactorFDSet, IReactorTime and IReactorPluggableNameResolver."""
        self._reactor = reactor
        self._epoll = select.epoll()
        self._epoll.close()
        self._selectables: dict[int, IReadWriteDescriptor] = {}
        self._events: dict[int, int] = {}
        # Descriptors that were registered while a batch is worked off: what the batch says of them is about others.
        self._fresh: set[int] = set()

    @property
    def running(self) -> bool:
        """Whether anything will be reported."""
        return not self._epoll.closed

    def start(self) -> None:
        """Begin to report."""
        self._epoll = select.epoll()
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Report no longer, and end what is still open, as a reactor does when it stops."""
        if self._epoll.closed:
            return
        self._reactor.removeReader(self)
        left = list(self._selectables.values())
        self._selectables.clear()
        self._events.clear()
        self._epoll.close()
        for selectable in left:
            _lose(selectable.connectionLost, ConnectionLost())

    # ---- what endpoints ask for

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

    @property
    def nameResolver(self) -> Any:
        """See IReactorPluggableNameResolver."""
        return self._reactor.nameResolver

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

    # ---- what transports ask for (of IReactorFDSet)

    def addReader(self, reader: IReadDescriptor) -> None:
        """Report when `reader` can be read."""
        self._change(reader, _READ, 0)

    def removeReader(self, reader: IReadDescriptor) -> None:
        """Report it no longer."""
        self._change(reader, 0, _READ)

    def addWriter(self, writer: IWriteDescriptor) -> None:
        """Report when `writer` can be written."""
        self._change(writer, _WRITE, 0)

    def removeWriter(self, writer: IWriteDescriptor) -> None:
        """Report it no longer."""
        self._change(writer, 0, _WRITE)

    def replace(self, before: IReadWriteDescriptor, after: IReadWriteDescriptor) -> None:
        """Report when `after` can be read, in place of `before`, whose descriptor it has taken over."""
        descriptor = before.fileno()
        self._epoll.modify(descriptor, _READ)
        self._selectables[descriptor] = after
        self._events[descriptor] = _READ

    def _change(self, selectable: Any, added: int, removed: int) -> None:
        descriptor = selectable.fileno()
        if descriptor < 0 or self._epoll.closed:
            return  # The kernel has forgotten it.
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
        self._events[descriptor] = after

    # ---- what the real reactor asks for (IReadDescriptor)

    def fileno(self) -> int:
        """Return the descriptor of the epoll, which is readable when anything in it has something to report."""
        return self._epoll.fileno()

    def doRead(self) -> None:
        """Work off what there is to report, and what follows soon."""
        epoll, selectables, fresh = self._epoll, self._selectables, self._fresh
        wait, until = 0.0, monotonic() + _TURN
        while True:
            fresh.clear()
            batch = epoll.poll(wait, _BATCH)
            for descriptor, events in batch:
                selectable = selectables.get(descriptor)
                if selectable is None or (fresh and descriptor in fresh):
                    continue
                if events != _READ:
                    self._report(selectable, events)
                    continue
                # By far the most frequent, so it is spared a call; `_report` would do the same.
                why: BaseException | None
                try:
                    why = selectable.doRead()
                except Exception as error:  # noqa: BLE001  a mistake in one connection must not end the others
                    why = _mistake(error)
                if why is not None:
                    self._disconnect(selectable, why, reading=True)
            if not 0 < len(batch) <= _SMALL_BATCH or epoll.closed or monotonic() >= until:
                return
            wait = _LINGER

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
                # What was sent before has been read; a connection that is read ends so in good order.
                reading = self._events[selectable.fileno()] & _READ != 0
                why = ConnectionDone() if reading else ConnectionLost()
            else:
                if events & _READ:
                    reading = True
                    why = selectable.doRead()
                if why is None and events & _WRITE:
                    reading = False
                    why = selectable.doWrite()
        except Exception as error:  # noqa: BLE001  a mistake in one connection must not end the others
            why = _mistake(error)
        if why is not None:
            self._disconnect(selectable, why, reading=reading)

    def _disconnect(self, selectable: IReadWriteDescriptor, why: BaseException, *, reading: bool) -> None:
        self.removeReader(selectable)
        if reading and isinstance(why, ConnectionDone) and IHalfCloseableDescriptor.providedBy(selectable):
            _lose(IHalfCloseableDescriptor(selectable).readConnectionLost, why)
        else:
            self.removeWriter(selectable)
            _lose(selectable.connectionLost, why)


def _mistake(error: Exception) -> Exception:
    """Log what a descriptor has just raised, which then is the reason for its end."""
    _log.failure("a mistake of the gateway in a connection")
    return error


def _lose(tell: Callable[[Failure], object], why: BaseException) -> None:
    """Tell a descriptor that its connection is lost; a mistake that is made there stays there.

    Let out, it would reach the real reactor, which would take it for the end of the whole relay.
    """
    try:
        tell(_ORDERLY if why is CONNECTION_DONE else Failure(why))
    except Exception:  # noqa: BLE001  a mistake in one connection must not end the others
        _log.failure("a mistake of the gateway at the end of a connection")
