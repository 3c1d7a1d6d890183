"""Long work in short pieces: a thread that computes keeps the event loop from running meanwhile.

In: the work of a thread, or of the event loop itself.  Out: the same, with pauses, or a piece per turn.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import merge
from typing import Any, TypeAlias, TypeVar

Pause: TypeAlias = Callable[[], None]
"""Called between two pieces of work."""

# Seconds of work, and of rest, in turn.
_WORK, _REST = 0.001, 0.001
# So many things are sorted in a fraction of a millisecond.
_SORTED_AT_A_TIME = 500
# So many are freed between two looks at the clock.
_FREED_AT_A_TIME = 20
# The event loop looks at so many things in a turn; a few microseconds each.
AT_A_TIME = 250
# mallopt(3): chunks of up to so many bytes are not merged when they are freed; and the default.
_M_MXFAST, _MXFAST = 1, 16 * ctypes.sizeof(ctypes.c_size_t)
# Loaded once: each `CDLL` references itself.  None where the C library is not glibc.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)

_T = TypeVar("_T", bound=Any)

Pieces: TypeAlias = Generator[None, None, _T]
"""Work that yields after each piece and returns its result."""


def at_once(pieces: Pieces[_T]) -> _T:
    """Do all pieces; return the result."""
    try:
        while True:
            next(pieces)
    except StopIteration as stop:
        result: _T = stop.value
        return result


def in_turns(call_later: Callable[..., object], pieces: Pieces[None]) -> None:
    """Do one piece now, and each of the others in a later turn of the event loop."""
    for _ in pieces:
        call_later(0, in_turns, call_later, pieces)
        return


class Chores:
    """Work that is never urgent: one piece of all of it in each turn of the event loop, in rotation.

    What begins at the same time, such as the parts of a sweep, would otherwise make one long turn together.
    """

    def __init__(self, call_later: Callable[..., object]) -> None:
        self._call_later = call_later
        self._waiting: deque[Pieces[None]] = deque()
        self._is_due = False

    def __contains__(self, pieces: object) -> bool:
        """Whether some of these pieces are left to do."""
        return pieces in self._waiting

    def add(self, pieces: Pieces[None]) -> None:
        """Do these pieces from the next turn on."""
        self._waiting.append(pieces)
        self._go_on_later()

    def drop(self) -> None:
        """Forget all of it, also what calls this."""
        self._waiting = deque()

    def _go_on_later(self) -> None:
        if self._waiting and not self._is_due:
            self._is_due = True
            self._call_later(0, self._go_on)

    def _go_on(self) -> None:
        self._is_due = False
        try:
            waiting = self._waiting
            if waiting:
                pieces = waiting.popleft()
                for _ in pieces:
                    waiting.append(pieces)
                    break
        finally:
            self._go_on_later()


def slices(things: Sequence[_T], size: int = 0) -> Iterator[Sequence[_T]]:
    """Yield all things, up to `size` at a time; `AT_A_TIME` by default."""
    size = size or AT_A_TIME
    for first in range(0, len(things), size):
        yield things[first : first + size]


class Pauses:
    """A `Pause` that sleeps for a moment if the last sleep was some time ago."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Sleep if it is time to."""
        if time.monotonic() - self._since >= _WORK:
            time.sleep(_REST)
            self._since = time.monotonic()


@contextmanager
def merging_at_once() -> Iterator[None]:
    """Have glibc merge small chunks of memory as they are freed.

    Otherwise it keeps them, and merges up to a million in one go.  That takes tens of milliseconds, in which no other
    thread runs Python.
    """
    if _mallopt is not None:
        _mallopt(_M_MXFAST, 0)
    try:
        yield
    finally:
        if _mallopt is not None:
            _mallopt(_M_MXFAST, _MXFAST)


def no_pause() -> None:
    """Do not pause: nothing else has to run meanwhile."""


def let_go(things: list[Any], pause: Pause) -> None:
    """Empty a list a few things at a time: no other thread runs Python while thousands are freed in one go."""
    while things:
        del things[-_FREED_AT_A_TIME:]
        pause()


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
