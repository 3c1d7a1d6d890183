"""Ending many sessions without all of them coming back at the same moment.

In: what is to be ended, and the time it may take.  Out: at each moment, those whose turn has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Spread(Generic[_T]):
    """Spreads things evenly, in their order, over `seconds` from `now`, when the first is due; with 0 all are."""

    def __init__(self, things: Iterable[_T], now: float, seconds: float) -> None:
        self._left = list(things)[::-1]  # the first is the last, where it is taken from
        self._total = len(self._left)
        self._began = now
        self._seconds = seconds

    def hasten(self, now: float, seconds: float) -> None:
        """Let it be over `seconds` from `now`, if that is sooner than it would be."""
        if now + seconds < self._began + self._seconds:
            self._began, self._seconds, self._total = now, seconds, len(self._left)

    def due(self, now: float) -> Iterator[_T]:
        """Give those whose turn has come since this was asked last."""
        elapsed = now - self._began
        share = elapsed / self._seconds if elapsed < self._seconds else 1.0
        left = max(0, self._total - 1 - int(self._total * share))
        while len(self._left) > left:
            yield self._left.pop()
