"""Long work in short pieces: a thread that computes keeps the event loop from running meanwhile.

In: the work of a thread.  Out: the same, with pauses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from heapq import merge
from typing import Any, TypeAlias, TypeVar

Pause: TypeAlias = Callable[[], None]
"""Called between two pieces of work."""

# Seconds of work, and of rest, in turn.
_WORK, _REST = 0.001, 0.001
# So many things are sorted in a fraction of a millisecond.
_SORTED_AT_A_TIME = 500

_T = TypeVar("_T", bound=Any)


class Pauses:
    """A `Pause` that sleeps for a moment if the last sleep was some time ago."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Sleep if it is time to."""
        if time.monotonic() - self._since >= _WORK:
            time.sleep(_REST)
            self._since = time.monotonic()


def no_pause() -> None:
    """Do not pause: nothing else has to run meanwhile."""


def in_order(things: Iterable[_T], pause: Pause) -> list[_T]:
    """Return what `sorted` returns, which no other thread can interrupt."""
    all_things = list(things)
    pieces = []
    for first in range(0, len(all_things), _SORTED_AT_A_TIME):
        pieces.append(sorted(all_things[first : first + _SORTED_AT_A_TIME]))
        pause()
    found = []
    for thing in merge(*pieces):
        found.append(thing)
        pause()
    return found
