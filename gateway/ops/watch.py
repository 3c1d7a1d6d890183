"""Detects changed files: certificates and keys are renewed while the gateway runs.

In: the states of files, taken every few seconds.  Out: the files that changed, once they no longer change.

Only stat() is called; no file is read.  Symbolic links are followed, since renewal tools often install a new file by
retargeting one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from gateway.pieces import Pause, let_go, no_pause

FileState: TypeAlias = str
"""Changes with the content, with the identity of the file (device, inode), and with who may read it (ctime).

A text, not a tuple: of tens of thousands, the garbage collector would look at each.
"""


def states(paths: Iterable[Path], pause: Pause = no_pause) -> dict[Path, FileState]:
    """Return the state of each file; for one that stat() fails on, the error number.  `pause` is called in between."""
    found: dict[Path, FileState] = {}
    for path in paths:
        found[path] = _state(path)
        pause()
    return found


def differing(before: Mapping[Path, FileState], after: Mapping[Path, FileState], pause: Pause = no_pause) -> list[Path]:
    """Return the files whose states differ, or that are in only one of the two.  `pause` is called in between."""
    found: list[Path] = []
    for path, state in before.items():
        if after.get(path) != state:
            found.append(path)
        pause()
    for path in after:
        if path not in before:
            found.append(path)
        pause()
    return found


class Watch:
    """Compares files with their known states.

    A change is reported once, when two consecutive looks agree on it: a certificate and its key are two files, and
    either may be half written at the time of a look.
    """

    def __init__(self, known: Mapping[Path, FileState]) -> None:
        self._known = known
        self._seen = known
        # What is no longer needed; the next look frees it, in its thread.
        self._forgotten: list[Mapping[Path, FileState]] = []

    def know(self, known: Mapping[Path, FileState]) -> None:
        """Compare with these states from now on."""
        self._forgotten += [self._known, self._seen]
        self._known = self._seen = known

    def look(self, seen: Mapping[Path, FileState], pause: Pause = no_pause) -> list[Path]:
        """Take the current states; return the files that changed and are stable now, and remember these states."""
        while self._forgotten:
            files = self._forgotten.pop()
            parts = [*files, *files.values()]
            del files
            let_go(parts, pause)
        if differing(self._seen, seen, pause):
            self._seen = seen
            return []
        changed = differing(self._known, seen, pause)
        self._known = self._seen
        return changed


def _state(path: Path) -> FileState:
    try:
        found = os.stat(path)  # noqa: PTH116  Path.stat is slower
    except OSError as error:
        return str(error.errno)
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
