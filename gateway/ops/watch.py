"""Detects changed files: certificates and keys are renewed while the gateway runs.

In: the states of files, taken every few seconds.  Out: the files that changed, once they no longer change.

Only stat() is called; no file is read.  Symbolic links are followed, since renewal tools often install a new file by
retargeting one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

# Changes with the content, with the identity of the file (device, inode), and with who may read it (ctime).
FileState = tuple[int, ...]


def states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Return the state of each file; for one that stat() fails on, the error number."""
    return {path: _state(path) for path in paths}


def differing(before: Mapping[Path, FileState], after: Mapping[Path, FileState]) -> list[Path]:
    """Return the files whose states differ, or that are in only one of the two."""
    return [path for path in (*before, *(after.keys() - before.keys())) if before.get(path) != after.get(path)]


class Watch:
    """Compares files with their known states.

    A change is reported once, when two consecutive looks agree on it: a certificate and its key are two files, and
    either may be half written at the time of a look.
    """

    def __init__(self, known: Mapping[Path, FileState]) -> None:
        self._known = known
        self._seen = known

    def know(self, known: Mapping[Path, FileState]) -> None:
        """Compare with these states from now on."""
        self._known = self._seen = known

    def look(self, seen: Mapping[Path, FileState]) -> list[Path]:
        """Take the current states; return the files that changed and are stable now, and remember these states."""
        at_rest = seen == self._seen
        self._seen = seen
        if not at_rest or seen == self._known:
            return []
        changed = differing(self._known, seen)
        self._known = seen
        return changed


def _state(path: Path) -> FileState:
    try:
        found = os.stat(path)  # noqa: PTH116  Path.stat is slower
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
