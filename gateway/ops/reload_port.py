"""A UNIX socket on which a reload is requested and answered.

In: connections.  Out: for each a reload, then its result: `reloaded`, or `refused` and a line for each problem.

SIGHUP has no answer, so `systemctl reload` would succeed whatever came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from gateway.ops.owner_port import OwnerPort, OwnerRequest
from gateway.text import unprintable_escaped

NAME = "reload.sock"
"""Its name in the service's runtime directory."""
DONE, REFUSED = "reloaded", "refused"
_MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 1000

Reload = Callable[[], Deferred[Sequence[str]]]


class ReloadPort(OwnerPort):
    """Answers requests for a reload."""

    remedy = "use SIGHUP to reload"

    def __init__(self, reactor: Any, path: Path, reload: Reload) -> None:
        """Take a reactor that provides IReactorUNIX, and what reloads and fires with the problems."""
        super().__init__(reactor, path)
        self.reload = reload

    def request(self) -> OwnerRequest:
        """Make the protocol of a request."""
        return _Request(self)


class _Request(OwnerRequest):
    def __init__(self, port: ReloadPort) -> None:
        super().__init__(port)
        self._of = port

    def connectionMade(self) -> None:
        super().connectionMade()
        self._of.reload().addCallback(self._answer)

    def _answer(self, problems: Sequence[str]) -> None:
        shown = [unprintable_escaped(problem, _LONGEST_PROBLEM) for problem in problems[:_MOST_PROBLEMS]]
        lines = [REFUSED if problems else DONE, *shown]
        self.answer("".join(f"{line}\n" for line in lines).encode())
