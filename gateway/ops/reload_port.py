"""A UNIX socket on which a reload is requested and answered.

In: connections.  Out: for each a reload, then its result: `reloaded`, or `refused` and a line for each problem.

SIGHUP has no answer, so `systemctl reload` would succeed whatever came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

from gateway.text import printable

_log = Logger(namespace="gateway")

NAME = "reload.sock"
"""Its name in the service's runtime directory."""
DONE, REFUSED = "reloaded", "refused"
_OWNER_ONLY = 0o600
_MOST_WAITING = 8
_MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 1000

Reload = Callable[[], Deferred[Sequence[str]]]


class ReloadPort(Factory):
    """Answers those who may open the socket: the gateway's own user, and root."""

    noisy = False

    def __init__(self, reactor: Any, path: Path, reload: Reload) -> None:
        """Take a reactor that provides IReactorUNIX, and what reloads and fires with the problems."""
        self._reactor = reactor
        self._path = path
        self._reload = reload
        self._port: IListeningPort | None = None
        self.waiting = 0

    def open(self) -> None:
        """Open the socket; without it, the gateway works, and SIGHUP reloads it."""
        try:
            # Left behind by a process that was killed.
            self._path.unlink(missing_ok=True)
            self._port = self._reactor.listenUNIX(str(self._path), self, mode=_OWNER_ONLY)
        except (OSError, CannotListenError) as error:
            _log.error("cannot listen on {path} ({error}): use SIGHUP to reload", path=str(self._path), error=error)

    def close(self) -> None:
        """Close it."""
        port, self._port = self._port, None
        if port is not None:
            port.stopListening()

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Make the protocol of a request; `None`, which closes the connection, if too many wait."""
        del addr
        return None if self.waiting >= _MOST_WAITING else _Request(self)

    def reload(self) -> Deferred[Sequence[str]]:
        """Reload the gateway."""
        return self._reload()


class _Request(Protocol):
    def __init__(self, port: ReloadPort) -> None:
        self._of = port

    def connectionMade(self) -> None:
        self._of.waiting += 1
        self._of.reload().addCallback(self._answer)

    def connectionLost(self, reason: object = None) -> None:
        del reason
        self._of.waiting -= 1

    def _answer(self, problems: Sequence[str]) -> None:
        shown = [printable(problem, _LONGEST_PROBLEM) for problem in problems[:_MOST_PROBLEMS]]
        lines = [REFUSED if problems else DONE, *shown]
        assert self.transport is not None  # noqa: S101  the connection was made; narrows the type
        self.transport.write("".join(f"{line}\n" for line in lines).encode())
        self.transport.loseConnection()
