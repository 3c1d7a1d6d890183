"""Does work with files in a thread, and notices when that takes too long.

In: the work.  Out: its result; while it takes too long, words for the log and the status.

A system call to a network file system whose server does not answer can block for ever, whatever the flags.  Then no
reload would take effect any more, not even one that disables a device, and nothing would show it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable
from os import PathLike, fspath
from typing import Any, TypeVar

from attrs import define
from twisted.logger import Logger

from gateway.text import printable

_log = Logger(namespace="gateway")
_T = TypeVar("_T")

# Sweeps, so about seconds.  They are counted instead of time, since a pause of the process is no fault of the files.
_TOO_LONG = 60


@define(eq=False)
class _Work:
    what: str
    thread: int | None = None
    sweeps: int = 0


class FileWork:
    """Does one piece of work at a time.  `problem` says what takes too long, and which file it uses; empty if none."""

    def __init__(self, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._in_thread = in_thread
        self._current: _Work | None = None
        self.problem = ""

    async def do(self, what: str, work: Callable[[], _T]) -> _T:
        """Return what `work` returns in a thread; `what` names it, as the subject of a sentence."""
        current = self._current = _Work(what)

        def run() -> _T:
            current.thread = threading.get_ident()
            return work()

        try:
            result: _T = await self._in_thread(run)
        finally:
            self._current = None
            if self.problem:
                self.problem = ""
                _log.info("{what} that took too long has ended", event="files-answer", what=what)
        return result

    def sweep(self) -> bool:
        """Count the time; called about once a second.  Return whether the work has just begun to take too long."""
        current = self._current
        if current is None:
            return False
        current.sweeps += 1
        if current.sweeps < _TOO_LONG:
            return False
        was_told = bool(self.problem)
        path = _path_in_use(current.thread)
        at = f"it is at {printable(path)}" if path else "it is between two files"
        self.problem = (
            f"{current.what} has not ended after {_TOO_LONG} s, so no change of the configuration or of a file takes "
            f"effect: {at}. If it stays there, check the file system that the file is on"
        )
        if not was_told:
            _log.error("{problem}", event="files-hang", problem=self.problem)
        return not was_told


def _path_in_use(thread: int | None) -> str:
    """Return the path that a thread uses, from the innermost function with a variable of that name; empty if none.

    To note each path beforehand would cost every look at thousands of files.
    """
    frame = sys._current_frames().get(thread or 0)  # noqa: SLF001  documented, for debuggers
    while frame is not None:
        for name in ("path", "directory"):
            found = frame.f_locals.get(name)
            if isinstance(found, (str, PathLike)):
                return str(fspath(found))
        frame = frame.f_back
    return ""
