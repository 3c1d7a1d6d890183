"""What both sides of a session share: flow control and an orderly close.

In: producer calls of the transports; `hold`, `release` and `close` of the session.  Out: the transport is paused and
resumed, and half-closed without losing data.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPushProducer, ISystemHandle, ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

_KEEPALIVE_PROBES = 3


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


@implementer(IPushProducer)
class RelaySide(Protocol):
    """A network connection that is read only while the session and the other side's buffer permit it.

    There are two independent reasons not to read: the session holds (`hold`), or the other side's transport is full
    (`pauseProducing`, called by that transport, whose producer this is).
    """

    transport: RelayTransport

    def __init__(self) -> None:
        self._held = False
        self._choked = False
        self._closing = False
        self._lost = False

    @property
    def reading(self) -> bool:
        """Whether bytes are being read."""
        return not (self._held or self._choked)

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
        self._held = self._choked = False
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


def how_lost(reason: Failure) -> str:
    """Return how a connection was lost: `closed`, `reset`, or the kernel's error."""
    why = reason.value
    if isinstance(why, ConnectionDone):
        return "closed"
    return str(why.args[0]) if isinstance(why, ConnectionLost) and why.args else "reset"


def tune(transport: RelayTransport, user_timeout: float) -> None:
    """Send small packets at once, and notice within `user_timeout` seconds that the peer is dead.

    Keepalive probes find a peer that is gone while nothing is sent, TCP_USER_TIMEOUT (RFC 5482) one that no longer
    acknowledges.  A UNIX socket needs neither.
    """
    if not ISystemHandle.providedBy(transport):
        return
    handle = ISystemHandle(transport).getHandle()
    if not isinstance(handle, socket.socket):
        return
    try:
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # A UNIX socket.
            return
        raise
    idle = max(1, int(user_timeout / 2))
    interval = max(1, int((user_timeout - idle) / _KEEPALIVE_PROBES))
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout * 1000))
