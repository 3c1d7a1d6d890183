"""A UNIX socket for the gateway's own user and root, on which each connection is one request.

In: a path.  Out: a protocol for each connection, a bounded number at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

_log = Logger(namespace="gateway")

_OWNER_ONLY = 0o600
_MOST_REQUESTS = 8


class OwnerPort(Factory):
    """Opens the socket and answers on it with what `request` makes."""

    noisy = False
    remedy = ""
    """What to do where the socket cannot be had."""

    def __init__(self, reactor: Any, path: Path) -> None:
        """Take a reactor that provides IReactorUNIX, and where the socket is."""
        self.reactor = reactor
        self._path = path
        self._port: IListeningPort | None = None
        self.requests = 0

    def open(self) -> None:
        """Open the socket.  The gateway works without it."""
        try:
            # Left behind by a process that was killed.
            self._path.unlink(missing_ok=True)
            self._port = self.reactor.listenUNIX(str(self._path), self, mode=_OWNER_ONLY)
        except (OSError, CannotListenError) as error:
            _log.error(
                "cannot listen on {path} ({error}): {remedy}", path=str(self._path), error=error, remedy=self.remedy
            )

    def close(self) -> None:
        """Close it."""
        port, self._port = self._port, None
        if port is not None:
            port.stopListening()

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Make the protocol of a request; `None`, which closes the connection, if there are too many."""
        del addr
        return None if self.requests >= _MOST_REQUESTS else self.request()

    def request(self) -> OwnerRequest:
        """Make the protocol of a request."""
        raise NotImplementedError


class OwnerRequest(Protocol):
    """One request and its answer."""

    def __init__(self, port: OwnerPort) -> None:
        """Take the port that counts it."""
        self._counting = port

    def connectionMade(self) -> None:
        """Count it."""
        self._counting.requests += 1

    def connectionLost(self, reason: object = None) -> None:
        """Count it no longer."""
        del reason
        self._counting.requests -= 1

    def answer(self, data: bytes) -> None:
        """Send the answer, and close."""
        assert self.transport is not None  # noqa: S101  the connection was made; narrows the type
        self.transport.write(data)
        self.transport.loseConnection()
