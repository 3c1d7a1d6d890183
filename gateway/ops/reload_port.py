"""A UNIX socket on which a reload is requested and answered.

In: connections.  Out: for each a reload, then its result: `reloaded` and a line for each rule that cannot be used, or
`refused` and a line for each problem.

SIGHUP has no answer, so `systemctl reload` would succeed whatever came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from gateway.ops.owner_port import OwnerPort, OwnerRequest
from gateway.text import printable, unprintable_escaped

NAME = "reload.sock"
"""Its name in the service's runtime directory."""
DONE, REFUSED = "reloaded", "refused"
_MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 1000
_MOST_RULES = 10

Reload = Callable[[], Deferred[Sequence[str]]]
RefusedRules = Callable[[], Sequence[tuple[str, str]]]


class ReloadPort(OwnerPort):
    """Answers requests for a reload."""

    remedy = "use SIGHUP to reload"

    def __init__(self, reactor: Any, path: Path, reload: Reload, refused_rules: RefusedRules) -> None:
        """Take a reactor that provides IReactorUNIX, and what reloads and fires with the problems.

        `refused_rules` returns the rules that cannot be used, each with its problem.
        """
        super().__init__(reactor, path)
        self.reload = reload
        self.refused_rules = refused_rules

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
        lines = problems[:_MOST_PROBLEMS] if problems else self._warnings()
        shown = [REFUSED if problems else DONE, *(unprintable_escaped(line, _LONGEST_PROBLEM) for line in lines)]
        self.answer("".join(f"{line}\n" for line in shown).encode())

    def _warnings(self) -> list[str]:
        refused = self._of.refused_rules()
        lines = [f'rule "{printable(name)}": {problem}' for name, problem in refused[:_MOST_RULES]]
        more = len(refused) - len(lines)
        return [*lines, f"… and {more} more, see the status page or the log"] if more > 0 else lines
