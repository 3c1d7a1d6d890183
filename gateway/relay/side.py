"""What both sides of a session share: flow control and an orderly close.

In: producer calls of the transports; `hold`, `release` and `close` of the session.  Out: the transport is paused and
resumed, and half-closed without losing data.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPushProducer, ITCPTransport
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.net.acknowledged import AcknowledgementWatch
from gateway.net.transport import UNIXServer, tune_socket


@implementer(IPushProducer)
class Gauge:
    """Registered with a transport in place of a side that would be stopped: calls `changed` with whether it is full."""

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self.choked = False

    def pauseProducing(self) -> None:
        """The transport is full."""
        self.choked = True
        self._changed(True)

    def resumeProducing(self) -> None:
        """The transport has room again."""
        self.choked = False
        self._changed(False)

    def stopProducing(self) -> None:
        """The transport is gone; the session is told by its side."""


class RelayTransport(ITCPTransport, IConsumer, IPushProducer):
    """The interface a side needs of its transport: writes, half-close, abort, flow control both ways."""

    protocol: Protocol

    def later(call: Callable[[], object]) -> None:  # noqa: N805  zope's interfaces have no self
        """Call this in a later turn of the reactor."""


@implementer(IPushProducer)
class RelaySide(Protocol):
    """A network connection that is read only while the session and the other side's buffer permit it.

    There are three independent reasons not to read: the session holds (`hold`), the session goes on with what it has
    in a later turn (`go_on_later`), or the other side's transport is full (`pauseProducing`, called by that transport,
    whose producer this is).
    """

    transport: RelayTransport

    def __init__(self) -> None:
        self._held = False
        self._choked = False
        # Whether the session goes on in a later turn.
        self._behind = False
        self._closing = False
        self._lost = False
        self._socket: socket.socket | None = None
        # Seconds within which the peer must acknowledge, if it is watched; and who watches, once there was a `check`.
        self._patience: float | None = None
        self._watch: AcknowledgementWatch | None = None
        self._is_dead = False

    @property
    def reading(self) -> bool:
        """Whether bytes are being read."""
        return not (self._held or self._choked or self._behind)

    @property
    def behind(self) -> bool:
        """Whether the session goes on in a later turn with what has been read."""
        return self._behind

    @property
    def choked(self) -> bool:
        """Whether the other side's transport is full."""
        return self._choked

    def hold(self) -> None:
        """Stop reading until `release`."""
        self._held = True
        self._apply()

    def release(self) -> None:
        """Read again, unless the other side is full."""
        self._held = False
        self._apply()

    def go_on_later(self) -> None:
        """Give the session no bytes in a later turn of the event loop, and read nothing until then."""
        if self._behind or self._closing:
            return
        self._behind = True
        self._apply()
        self.transport.later(self._go_on)

    def _go_on(self) -> None:
        if self._closing:
            return
        self._behind = False
        self.go_on()
        if not self._behind:
            self._apply()

    def go_on(self) -> None:
        """Give the session no bytes, so that it goes on with what it has."""
        raise NotImplementedError

    @property
    def unread(self) -> bool:
        """Whether bytes from the peer wait in the socket."""
        return _has_unread(self._socket)

    def watch(self, user_timeout: float) -> None:
        """Send small packets at once, and find out within `user_timeout` seconds that the peer is dead.

        TCP keepalive does that while nothing is sent, `check` otherwise.  A UNIX socket needs neither.
        """
        transport: object = self.transport
        self._socket = _socket_of(transport)
        if self._socket is not None and not isinstance(transport, UNIXServer):
            _tune(transport, self._socket, user_timeout)
            self._patience = user_timeout

    def check(self, now: float) -> None:
        """Close the connection if the peer no longer acknowledges; `now` is in seconds."""
        if self._patience is None or self._socket is None or self._closing or self._is_dead:
            return
        if self._watch is None:
            self._watch = AcknowledgementWatch(self._socket, self._patience)
        if self._watch.is_dead(now):
            self._is_dead = True
            self.transport.abortConnection()

    def limit_reads(self, size: int) -> None:
        """Read at most `size` bytes at a time."""
        limit = getattr(self.transport, "limit_reads", None)
        if limit is not None:
            limit(size)

    def pauseProducing(self) -> None:
        """The other side's transport is full."""
        self._choked = True
        self._apply()

    def resumeProducing(self) -> None:
        """The other side's transport has room again."""
        self._choked = False
        self._apply()

    def stopProducing(self) -> None:
        """The other side's transport is closed; that side tells the session."""

    def link(self, other: RelaySide) -> None:
        """Let the full buffer of each side pause reading on the other."""
        self.transport.registerProducer(other, True)
        other.transport.registerProducer(self, True)

    def abort(self) -> None:
        """Close the connection at once."""
        if not self._lost:
            self._closing = True
            self.transport.abortConnection()

    def finish(self) -> None:
        """Send pending bytes, then FIN; discard what arrives until the peer's FIN.

        Closing a socket with unread bytes makes the kernel send RST, which can destroy what the peer has not read yet:
        the CONNACK that tells a device the truth, or the DISCONNECT that keeps a Will from being published.  So keep
        reading until the peer closes too; the session's deadline bounds that.
        """
        if self._closing or self._lost:
            return
        self._closing = True
        self.transport.unregisterProducer()
        self._held = self._choked = self._behind = False
        self.transport.resumeProducing()
        self.transport.loseWriteConnection()

    def lost(self) -> None:
        """The connection is closed."""
        self._lost = True
        self._closing = True

    def _apply(self) -> None:
        if self._closing:
            return
        if self.reading:
            self.transport.resumeProducing()
        else:
            self.transport.pauseProducing()

    def how_lost(self, reason: Failure) -> str:
        """Return how the connection was lost: `closed`, `reset`, or the kernel's error."""
        return os.strerror(errno.ETIMEDOUT) if self._is_dead else how_lost(reason)


def how_lost(reason: Failure) -> str:
    """Return how a connection was lost: `closed`, `reset`, or the kernel's error."""
    why = reason.value
    if isinstance(why, ConnectionDone):
        return "closed"
    # Twisted's own words for a reset say less.
    return str(why.args[0]) if isinstance(why, ConnectionLost) and why.args and why is not CONNECTION_LOST else "reset"


def tune(transport: object, user_timeout: float) -> None:
    """Send small packets at once, and let TCP keepalive find a dead peer within `user_timeout` seconds.

    A UNIX socket needs neither.
    """
    handle = _socket_of(transport)
    if handle is not None and not isinstance(transport, UNIXServer):
        _tune(transport, handle, user_timeout)


def _tune(transport: object, handle: socket.socket, user_timeout: float) -> None:
    listener = getattr(transport, "server", None)
    if getattr(listener, "tuned_for", None) != user_timeout:
        tune_socket(handle, user_timeout)


def has_unread(transport: ITCPTransport) -> bool:
    """Whether bytes from the peer wait in the socket of a transport."""
    return _has_unread(_socket_of(transport))


def _has_unread(handle: socket.socket | None) -> bool:
    if handle is None:
        return False
    try:
        return bool(handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _socket_of(transport: object) -> socket.socket | None:
    # Not by ISystemHandle: asking an interface costs as much as all else here.
    get_handle = getattr(transport, "getHandle", None)
    handle = get_handle() if get_handle is not None else None
    return handle if isinstance(handle, socket.socket) else None
