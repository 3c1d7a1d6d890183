"""The backlog of one device, as far as it is in memory: which rows there are, not what is in them.

In: rows that became durable, rows that are finished.  Out: which row is next.  16 bytes a message.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence

# So many finished entries may stand before the first one that counts; then they are removed in one piece.
_COMPACTED_AT = 4096
_LOOKED_AT = 1000


class Backlog:
    """Rows of one device in their order: `number` on disk, size (bytes), stamp (seconds since 1970).

    The first `taken` of them are in somebody's hands: read, sent, not yet confirmed.  `number` is the device's in the
    store.  `loading` is true until all rows from before the start are known.
    """

    __slots__ = ("_head", "_numbers", "_sizes", "_stamps", "bytes", "loading", "name", "number", "taken")

    def __init__(self, number: int, name: str, *, loading: bool) -> None:
        self.number = number
        self.name = name
        self.loading = loading
        self.bytes = 0
        self.taken = 0
        self._head = 0
        self._numbers = array("q")
        self._sizes = array("I")
        self._stamps = array("I")

    def __len__(self) -> int:
        return len(self._numbers) - self._head

    @property
    def oldest(self) -> int | None:
        """The stamp of the first row."""
        return self._stamps[self._head] if len(self) else None

    def append(self, number: int, size: int, stamp: int) -> None:
        """A row became durable."""
        self._numbers.append(number)
        self._sizes.append(size)
        self._stamps.append(_clamped(stamp))
        self.bytes += size

    def put_first(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Rows from before the start, found one after the other; those of this run are behind them."""
        numbers, sizes, stamps = array("q"), array("I"), array("I")
        for number, size, stamp in rows:
            numbers.append(number)
            sizes.append(size)
            stamps.append(_clamped(stamp))
            self.bytes += size
        # While `loading`, nothing is taken, so what was found before ends where the rows of this run begin.
        at = self._bisect(numbers[0]) if numbers else self._head
        self._numbers[at:at] = numbers
        self._sizes[at:at] = sizes
        self._stamps[at:at] = stamps

    def first(self, most: int) -> list[int]:
        """Return the numbers of the first rows, taken or not."""
        return self._numbers[self._head : self._head + most].tolist()

    def take(self, most: int) -> list[int]:
        """Take the next rows into one's hands; return their numbers."""
        start = self._head + self.taken
        numbers = self._numbers[start : start + most].tolist()
        self.taken += len(numbers)
        return numbers

    def put_back(self, numbers: Sequence[int]) -> None:
        """Put back rows that were taken and could not be read; others may have been taken since."""
        for number in reversed(numbers):
            last = self._head + self.taken - 1
            if self._numbers[last] == number:
                self.taken -= 1
                continue
            at = self._numbers.index(number, self._head, last + 1)
            for column in (self._numbers, self._sizes, self._stamps):
                column.insert(last, column.pop(at))
            self.taken -= 1

    def give_back(self) -> None:
        """Put back what was taken and is not finished."""
        self.taken = 0

    def adopt(self, number: int) -> None:
        """Count a row that became durable as taken, before all that are not: it was sent before it was stored."""
        numbers, first = self._numbers, self._head + self.taken
        # It is the last one, unless a person has put rows back that had been set aside.
        at = len(numbers) - 1
        while at > first and numbers[at] != number:
            at -= 1
        for column in (numbers, self._sizes, self._stamps):
            column.insert(first, column.pop(at))
        self.taken += 1

    def finish(self, number: int) -> int:
        """Remove one of the first rows; return its size, 0 if it is not there."""
        numbers, head = self._numbers, self._head
        # One that was confirmed just before its connection broke may have been given back.
        for at in range(head, min(len(numbers), head + max(self.taken, _LOOKED_AT))):
            if numbers[at] == number:
                break
        else:
            return 0
        size = self._sizes[at]
        for column in (numbers, self._sizes, self._stamps):
            column[head + 1 : at + 1] = column[head:at]
        self.taken -= at < head + self.taken
        self._head += 1
        self.bytes -= size
        if self._head >= _COMPACTED_AT or self._head == len(numbers):
            for column in (numbers, self._sizes, self._stamps):
                del column[: self._head]
            self._head = 0
        return size

    def evict(self, size: int) -> tuple[list[int], int]:
        """Remove the oldest rows that are not taken, until `size` bytes are free; return their numbers and bytes."""
        start = end = self._head + self.taken
        freed = 0
        while freed < size and end < len(self._numbers):
            freed += self._sizes[end]
            end += 1
        return self._cut(start, end), freed

    def evict_before(self, stamp: int, most: int) -> tuple[list[int], int]:
        """Remove at most `most` rows that are not taken, from the oldest on, stored before `stamp`."""
        start = end = self._head + self.taken
        freed = 0
        while end < len(self._numbers) and end - start < most and self._stamps[end] < stamp:
            freed += self._sizes[end]
            end += 1
        return self._cut(start, end), freed

    def _cut(self, start: int, end: int) -> list[int]:
        numbers = self._numbers[start:end].tolist()
        self.bytes -= sum(self._sizes[start:end])
        for column in (self._numbers, self._sizes, self._stamps):
            del column[start:end]
        return numbers

    def _bisect(self, number: int) -> int:
        low, high = self._head, len(self._numbers)
        while low < high:
            middle = (low + high) // 2
            if self._numbers[middle] < number:
                low = middle + 1
            else:
                high = middle
        return low


def client_identifier_of(name: str) -> str:
    """Return the Client Identifier in the name of a backlog, or the name if there is none."""
    try:
        return str(json.loads(name)[0])
    except (ValueError, IndexError, TypeError, KeyError):
        return name


def _clamped(stamp: int) -> int:
    return max(0, min(stamp, 0xFFFF_FFFF))
