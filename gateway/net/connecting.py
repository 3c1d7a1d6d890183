"""TCP connections to addresses, on the relay's transports.

In: an address.  Out: an endpoint (`IStreamClientEndpoint`), whose connections are `TCPClient`s of
`gateway/net/transport.py`.

For each connection, Twisted's own endpoints create a connector, a client and a wrapper around the protocol, wait for
the next reactor turn before connecting, and check the socket again once it is connected.  That supports names, bound
addresses, reconnecting and other reactors than epoll, none of which is needed here, and it was a twelfth of the cost of
a session (`docs/performance.md`).
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, NoProtocol, getConnectError
from twisted.internet.interfaces import (
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IReadWriteDescriptor,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.net.transport import RelayReactor, TCPClient

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


@implementer(IStreamClientEndpoint)
class TCPEndpoint:
    """Connects to one address, without a timeout."""

    __slots__ = ("_address", "_reactor")

    def __init__(self, reactor: RelayReactor, address: IPv4Address | IPv6Address) -> None:
        self._reactor = reactor
        self._address = address

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """See IStreamClientEndpoint.  Fails with `ConnectError`, or with `NoProtocol` if the factory makes none."""
        attempt = _Attempt(self._reactor, self._address, protocolFactory)
        attempt.begin()
        return attempt.connected


@implementer(IReadWriteDescriptor)
class _Attempt:
    """A socket that is connecting; it becomes writable when it has connected or failed."""

    __slots__ = ("_address", "_factory", "_failing", "_reactor", "_socket", "connected")

    def __init__(self, reactor: RelayReactor, address: IPv4Address | IPv6Address, factory: IProtocolFactory) -> None:
        self._reactor = reactor
        self._address = address
        self._factory = factory
        self._socket: socket.socket | None = None
        self._failing: IDelayedCall | None = None
        # A cancelled Deferred fails with `CancelledError` automatically.
        self.connected: Deferred[IProtocol] = Deferred(lambda _: self._close())

    def begin(self) -> None:
        """Connect."""
        try:
            family, address = _for_socket(self._address)
            self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            problem = self._socket.connect_ex(address)
            if not self._reactor.running:
                raise ConnectError(string="the relay has stopped")  # noqa: TRY301  reported like the others
            # On loopback it may be connected at once; then it is writable as well.
            if problem in {0, errno.EINPROGRESS}:
                self._reactor.addWriter(self)
            else:
                self._fail_soon(getConnectError((problem, os.strerror(problem))))
        except OSError as error:
            self._fail_soon(getConnectError((error.errno or 0, error.strerror or str(error))))
        except Exception as error:  # noqa: BLE001  the caller must be told of any error
            self._fail_soon(error)

    # ---- for the reactor

    def fileno(self) -> int:
        """Return the descriptor."""
        return -1 if self._socket is None else self._socket.fileno()

    def doRead(self) -> None:
        """Never called: this is never added as a reader."""

    def doWrite(self) -> None:
        """The socket has connected, or failed."""
        assert self._socket is not None  # noqa: S101  it is watched, so it is open; narrows the type
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._fail(getConnectError((problem, os.strerror(problem))))
        else:
            self._succeed(self._socket)

    def connectionLost(self, reason: Failure) -> None:
        """The attempt failed, or the relay stops."""
        if self._socket is None:
            return
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._fail(getConnectError((problem, os.strerror(problem))))
        else:
            self._fail(ConnectError(string=reason.getErrorMessage()))

    def logPrefix(self) -> str:
        """See ILoggingContext."""
        return "gateway"

    # ---- the result

    def _succeed(self, connected: socket.socket) -> None:
        try:
            protocol: Any = self._factory.buildProtocol(self._address)
        except Exception as error:  # noqa: BLE001  the caller must be told of any error
            self._fail(error)
            return
        if protocol is None:
            self._fail(NoProtocol())
            return
        transport = TCPClient(connected, protocol, self._address, self._reactor)
        self._reactor.replace(self, transport)
        self._socket = None
        try:
            protocol.makeConnection(transport)
        except Exception as error:  # noqa: BLE001  the same
            transport.abortConnection()
            self.connected.errback(error)
            return
        if not self.connected.called:
            self.connected.callback(protocol)
        else:
            # The caller has cancelled meanwhile.
            transport.abortConnection()

    def _fail_soon(self, error: Exception) -> None:
        """Fail in the next reactor turn: callers do not expect a result before `connect` returns."""
        self._failing = self._reactor.callLater(0, self._fail, error.with_traceback(None))

    def _fail(self, error: Exception) -> None:
        self._close()
        self.connected.errback(error)

    def _close(self) -> None:
        if self._failing is not None and self._failing.active():
            self._failing.cancel()
        if self._socket is not None:
            self._reactor.removeWriter(self)
            with suppress(OSError):
                self._socket.close()
            self._socket = None


def _for_socket(address: IPv4Address | IPv6Address) -> tuple[socket.AddressFamily, Any]:
    """Return the family and the socket address; for IPv6 with the scope, which may be part of the host."""
    if isinstance(address, IPv4Address):
        return socket.AF_INET, (address.host, address.port)
    if address.scopeID:
        return socket.AF_INET6, (address.host, address.port, address.flowInfo, address.scopeID)
    found = socket.getaddrinfo(address.host, address.port, socket.AF_INET6, socket.SOCK_STREAM, 0, _NUMERIC)
    return socket.AF_INET6, found[0][4]
