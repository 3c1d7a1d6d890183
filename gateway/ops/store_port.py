"""A UNIX socket in the store's directory, on which `mqtts-gateway store` asks a running gateway for changes.

In: connections, each with one line: a JSON object with `action` (`drop` or `retry`) and `device`.  Out: one line, a
JSON object with `changed`, a list of names and numbers of messages, or `error`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

_log = Logger(namespace="gateway")

NAME = "socket"
"""Its name in the store's directory."""
_OWNER_ONLY = 0o600
_MOST_REQUESTS = 8
_LONGEST = 262_144  # bytes of a request; a Client Identifier of 64 KiB can be longer in JSON
_TIMEOUT = 5.0  # seconds for a request to arrive

Change = Callable[[str, str], Deferred[list[tuple[str, int]]]]


class StorePort(Factory):
    """Answers those who may open the socket: the gateway's own user, and root."""

    noisy = False

    def __init__(self, reactor: Any, directory: Path, change: Change) -> None:
        """Take a reactor that provides IReactorUNIX, and what makes a change: its action, the device."""
        self.reactor = reactor
        self._path = directory / NAME
        self.change = change
        self._port: IListeningPort | None = None
        self.requests = 0

    def open(self) -> None:
        """Open the socket.  The gateway works without it."""
        try:
            # Left behind by a process that was killed; the lock is this process's.
            self._path.unlink(missing_ok=True)
            self._port = self.reactor.listenUNIX(str(self._path), self, mode=_OWNER_ONLY)
        except (OSError, CannotListenError) as error:
            _log.error(
                "cannot listen on {path} ({error}): for `mqtts-gateway store drop` or `retry`, stop the gateway",
                path=str(self._path),
                error=error,
            )

    def close(self) -> None:
        """Close it."""
        port, self._port = self._port, None
        if port is not None:
            port.stopListening()

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Make the protocol of a request; `None`, which closes the connection, if there are too many."""
        del addr
        return None if self.requests >= _MOST_REQUESTS else _Request(self)


class _Request(TimeoutMixin, Protocol):
    def __init__(self, port: StorePort) -> None:
        self._of = port
        self._read = b""
        self._is_complete = False

    def callLater(self, period: float, what: Callable[[], None]) -> Any:
        return self._of.reactor.callLater(period, what)

    def connectionMade(self) -> None:
        self._of.requests += 1
        self.setTimeout(_TIMEOUT)

    def connectionLost(self, reason: object = None) -> None:
        del reason
        self.setTimeout(None)
        self._of.requests -= 1

    def dataReceived(self, data: bytes) -> None:
        if self._is_complete:
            return
        self._read += data
        if b"\n" not in data and len(self._read) <= _LONGEST:
            return
        self._is_complete = True
        self.setTimeout(None)
        try:
            action, device = _parsed(self._read)
        except (ValueError, KeyError, TypeError, RecursionError):
            self._answer({"error": "this is not a request"})
            return
        changing = self._of.change(action, device)
        changing.addCallbacks(lambda changed: self._answer({"changed": changed}), self._failed)

    def _failed(self, failure: Failure) -> None:
        self._answer({"error": failure.getErrorMessage()})

    def _answer(self, values: dict[str, Any]) -> None:
        assert self.transport is not None  # noqa: S101  the connection was made; narrows the type
        self.transport.write(json.dumps(values).encode() + b"\n")
        self.transport.loseConnection()


def _parsed(request: bytes) -> tuple[str, str]:
    """Return the action and the device.  Raises ValueError, KeyError, TypeError or RecursionError."""
    values = json.loads(request)
    action, device = values["action"], values["device"]
    if action not in {"drop", "retry"} or not isinstance(device, str):
        raise ValueError(action)
    return action, device
