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
from twisted.python.failure import Failure

_log = Logger(namespace="gateway")

NAME = "socket"
"""Its name in the store's directory."""
_OWNER_ONLY = 0o600
_MOST_REQUESTS = 8
_LONGEST = 262_144  # bytes of a request; a Client Identifier of 64 KiB can be longer in JSON

Change = Callable[[str, str], Deferred[list[tuple[str, int]]]]


class StorePort(Factory):
    """Answers those who may open the socket: the gateway's own user, and root."""

    noisy = False

    def __init__(self, reactor: Any, directory: Path, change: Change) -> None:
        """Take a reactor that provides IReactorUNIX, and what makes a change: its action, the device."""
        self._reactor = reactor
        self._path = directory / NAME
        self.change = change
        self._port: IListeningPort | None = None
        self.requests = 0

    def open(self) -> None:
        """Open the socket.  The gateway works without it."""
        try:
            # Left behind by a process that was killed; the lock is this process's.
            self._path.unlink(missing_ok=True)
            self._port = self._reactor.listenUNIX(str(self._path), self, mode=_OWNER_ONLY)
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


class _Request(Protocol):
    def __init__(self, port: StorePort) -> None:
        self._of = port
        self._read = b""

    def connectionMade(self) -> None:
        self._of.requests += 1

    def connectionLost(self, reason: object = None) -> None:
        del reason
        self._of.requests -= 1

    def dataReceived(self, data: bytes) -> None:
        self._read += data
        if b"\n" not in data and len(self._read) <= _LONGEST:
            return
        try:
            values = json.loads(self._read)
            action, device = values["action"], values["device"]
            if action not in {"drop", "retry"} or not isinstance(device, str):
                raise ValueError(action)  # noqa: TRY301  it is answered below, as all that is not a request
        except (ValueError, KeyError, TypeError):
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
