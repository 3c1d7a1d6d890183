"""Spreads the end of many sessions over time, so that their devices do not all reconnect at once.

In: the things to end, and the time it may take.  Out: at each moment, those that are due.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Spread(Generic[_T]):
    """Spreads things evenly, in order, over `seconds` from `now`; the first is due at once, and with 0 all are."""

    def __init__(self, things: Iterable[_T], now: float, seconds: float) -> None:
        self._left = list(things)[::-1]  # reversed, since pop() takes from the end
        self._total = len(self._left)
        self._began = now
        self._seconds = seconds

    def hasten(self, now: float, seconds: float) -> None:
        """Finish within `seconds` from `now`, if that is sooner than planned."""
        if now + seconds < self._began + self._seconds:
            self._began, self._seconds, self._total = now, seconds, len(self._left)

    def give_back(self, seconds: float) -> None:
        """Continue as if the last `seconds` had not passed: nobody ended anything meanwhile."""
        self._began += seconds

    def due(self, now: float) -> Iterator[_T]:
        """Yield those that became due since the last call."""
        elapsed = now - self._began
        share = elapsed / self._seconds if 0 < self._seconds > elapsed else 1.0
        left = max(0, self._total - 1 - int(self._total * share))
        while len(self._left) > left:
            yield self._left.pop()
