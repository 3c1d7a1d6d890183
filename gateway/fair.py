"""A queue that serves addresses in turn, so that one with many waiters cannot delay the others.

In: waiters, each from an address.  Out: the next one: of each address in turn, in order of arrival within an address.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Waiters by address; each operation but `shed` takes constant time."""

    def __init__(self) -> None:
        # An address is removed with its last waiter, and moves to the end with each that is served.
        self._lines: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """Return the number of waiters."""
        return self._size

    @property
    def addresses(self) -> int:
        """The number of addresses that have waiters."""
        return len(self._lines)

    def push(self, address: str, waiter: T) -> None:
        """Add a waiter."""
        self._lines.setdefault(address, OrderedDict())[waiter] = None
        self._size += 1

    def pop(self) -> T:
        """Remove and return the next waiter.  Raises KeyError if there is none."""
        address = next(iter(self._lines), None)
        if address is None:
            raise KeyError("nobody is waiting")
        line = self._lines[address]
        waiter, _ = line.popitem(last=False)
        self._size -= 1
        if line:
            self._lines.move_to_end(address)
        else:
            del self._lines[address]
        return waiter

    def discard(self, address: str, waiter: T) -> None:
        """Remove a waiter if it is there."""
        line = self._lines.get(address)
        if line is not None and waiter in line:
            del line[waiter]
            self._size -= 1
            if not line:
                del self._lines[address]

    def shed(self, newcomer: str) -> T | None:
        """Make room for a waiter from `newcomer` in a full queue: remove and return the last of the longest line.

        Return None if that line is hardly longer than the newcomer's own: then it is the newcomer who must go.
        """
        address = max(self._lines, key=lambda each: len(self._lines[each]), default=None)
        if address is None or len(self._lines[address]) <= len(self._lines.get(newcomer, ())) + 1:
            return None
        waiter = next(reversed(self._lines[address]))
        self.discard(address, waiter)
        return waiter
