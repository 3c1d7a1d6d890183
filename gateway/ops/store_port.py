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
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from gateway.ops.owner_port import OwnerPort, OwnerRequest

NAME = "socket"
"""Its name in the store's directory."""
_LONGEST = 262_144  # bytes of a request; a Client Identifier of 64 KiB can be longer in JSON
_TIMEOUT = 5.0  # seconds for a request to arrive

Change = Callable[[str, str], Deferred[list[tuple[str, int]]]]


class StorePort(OwnerPort):
    """Answers requests for changes of the store."""

    remedy = "for `mqtts-gateway store drop` or `retry`, stop the gateway"

    def __init__(self, reactor: Any, directory: Path, change: Change) -> None:
        """Take a reactor that provides IReactorUNIX, and what makes a change: its action, the device."""
        super().__init__(reactor, directory / NAME)
        self.change = change

    def request(self) -> OwnerRequest:
        """Make the protocol of a request."""
        return _Request(self)


class _Request(TimeoutMixin, OwnerRequest):
    def __init__(self, port: StorePort) -> None:
        super().__init__(port)
        self._of = port
        self._read = b""
        self._is_complete = False

    def callLater(self, period: float, what: Callable[[], None]) -> Any:
        return self._of.reactor.callLater(period, what)

    def connectionMade(self) -> None:
        super().connectionMade()
        self.setTimeout(_TIMEOUT)

    def connectionLost(self, reason: object = None) -> None:
        self.setTimeout(None)
        super().connectionLost(reason)

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
        self.answer(json.dumps(values).encode() + b"\n")


def _parsed(request: bytes) -> tuple[str, str]:
    """Return the action and the device.  Raises ValueError, KeyError, TypeError or RecursionError."""
    values = json.loads(request)
    action, device = values["action"], values["device"]
    if action not in {"drop", "retry"} or not isinstance(device, str):
        raise ValueError(action)
    return action, device
