"""Notices that files have changed: certificates and keys are renewed while the gateway runs.

In: paths, looked at every few seconds.  Out: which of them have changed, once they have come to rest.

Looking is asking for the state of a file (stat), which costs microseconds; symbolic links are followed, since renewal
tools put a new file in place by turning one.  Nothing is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

# What of a file's state changes with its content, with what it is (device, inode), or with who may read it (ctime).
FileState = tuple[int, ...]


def states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Return the state of each file; that of one that cannot be looked at is why not."""
    return {path: _state(path) for path in paths}


def differing(before: Mapping[Path, FileState], after: Mapping[Path, FileState]) -> list[Path]:
    """Return the files whose states differ, or that stand in one of the two only."""
    return [path for path in (*before, *(after.keys() - before.keys())) if before.get(path) != after.get(path)]


class Watch:
    """Compares files with what they were.

    A change is told when two looks one after the other agree on it, and told once: a certificate and its key are two
    files, and each may be half written when it is looked at.
    """

    def __init__(self, known: Mapping[Path, FileState]) -> None:
        self._known = known
        self._seen = known

    def know(self, known: Mapping[Path, FileState]) -> None:
        """Compare with these states from now on."""
        self._known = self._seen = known

    def look(self, seen: Mapping[Path, FileState]) -> list[Path]:
        """Take the states of this moment; return the files that have changed and come to rest, and know them so."""
        at_rest = seen == self._seen
        self._seen = seen
        if not at_rest or seen == self._known:
            return []
        changed = differing(self._known, seen)
        self._known = seen
        return changed


def _state(path: Path) -> FileState:
    try:
        found = os.stat(path)  # noqa: PTH116  Path.stat is the same and slower
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
