"""What fuzz targets share: choices made of bytes, a count of calls, streams cut in different ways."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Choices:
    """Makes choices of the first bytes of an input; the rest is the input proper."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, count: int) -> int:
        """Return a number from 0 to `count` - 1, at most 256."""
        value = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return value % count

    def of(self, values: Sequence[_T]) -> _T:
        """Return one of `values`."""
        return values[self.number(len(values))]

    def rest(self) -> bytes:
        """Return what no choice was made of."""
        return self._data[self._at :]


def cut_in_three(data: bytes, where: int) -> Iterator[bytes]:
    """Give `data` in three parts whose places depend on `where`, from 0 to 255."""
    first = where * len(data) // 256
    second = first + (len(data) - first) // 2
    yield from (data[:first], data[first:second], data[second:])


def single_bytes(data: bytes) -> Iterator[bytes]:
    """Give `data` byte by byte."""
    return (data[at : at + 1] for at in range(len(data)))


def calls(function: Callable[[], object]) -> int:
    """Return how many calls of Python and built-in functions `function` takes: work that no busy machine changes."""
    count = 0

    def called(_: object, event: str, function: object) -> None:
        nonlocal count
        # What atheris puts into the code to see which way it goes is no work of the code's.
        module = getattr(function, "__module__", None) or ""
        count += event == "call" or (event == "c_call" and not module.startswith("atheris."))

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
