"""TCP connections to addresses, on the relay's transports.

In: an address.  Out: an endpoint (`IStreamClientEndpoint`), whose connections are `TCPClient`s of
`gateway/net/transport.py`.

Twisted's own endpoints make a connector, a client and a wrapper around the protocol for each connection, wait a turn of
the reactor before they connect, and look at the socket anew when it has connected.  That is for names, for bound
addresses, for reconnecting, and for reactors that are not epoll's, none of which the gateway needs here, and it was a
twelfth of what a session costs (`docs/performance.md`).
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
    """Connects to one address, for as long as it is not cancelled."""

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
    """A socket that is being connected; the kernel reports that it can be written when it is, or has failed."""

    __slots__ = ("_address", "_factory", "_failing", "_reactor", "_socket", "connected")

    def __init__(self, reactor: RelayReactor, address: IPv4Address | IPv6Address, factory: IProtocolFactory) -> None:
        self._reactor = reactor
        self._address = address
        self._factory = factory
        self._socket: socket.socket | None = None
        self._failing: IDelayedCall | None = None
        # Whoever gives up gets `CancelledError`, which Deferred sees to.
        self.connected: Deferred[IProtocol] = Deferred(lambda _: self._close())

    def begin(self) -> None:
        """Connect."""
        try:
            family, address = _for_socket(self._address)
            self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            problem = self._socket.connect_ex(address)
            if not self._reactor.running:
                raise ConnectError(string="the relay has stopped")  # noqa: TRY301  told as all the others
            # On loopback it may have been done at once; then it can be written, too.
            if problem in {0, errno.EINPROGRESS}:
                self._reactor.addWriter(self)
            else:
                self._fail_soon(getConnectError((problem, os.strerror(problem))))
        except OSError as error:
            self._fail_soon(getConnectError((error.errno or 0, error.strerror or str(error))))
        except Exception as error:  # noqa: BLE001  whoever waits is told, whatever it is
            self._fail_soon(error)

    # ---- what the reactor asks for

    def fileno(self) -> int:
        """Return the descriptor."""
        return -1 if self._socket is None else self._socket.fileno()

    def doRead(self) -> None:
        """Never reported, since it is not asked for."""

    def doWrite(self) -> None:
        """Go on: the socket has connected, or could not."""
        assert self._socket is not None  # noqa: S101  it is watched, so it is open; narrows the type
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._fail(getConnectError((problem, os.strerror(problem))))
        else:
            self._succeed(self._socket)

    def connectionLost(self, reason: Failure) -> None:
        """It failed, or the relay stops."""
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

    # ---- how it ends

    def _succeed(self, connected: socket.socket) -> None:
        try:
            protocol: Any = self._factory.buildProtocol(self._address)
        except Exception as error:  # noqa: BLE001  whoever waits is told, whatever it is
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
            # Whoever waited has given up meanwhile.
            transport.abortConnection()

    def _fail_soon(self, error: Exception) -> None:
        """Fail in the reactor's next turn, as everything else does: nobody expects to be told while they ask."""
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
    """Return the family and the address as sockets want it: for IPv6 with its scope, which may stand in the host."""
    if isinstance(address, IPv4Address):
        return socket.AF_INET, (address.host, address.port)
    if address.scopeID:
        return socket.AF_INET6, (address.host, address.port, address.flowInfo, address.scopeID)
    found = socket.getaddrinfo(address.host, address.port, socket.AF_INET6, socket.SOCK_STREAM, 0, _NUMERIC)
    return socket.AF_INET6, found[0][4]
