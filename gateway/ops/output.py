"""Log output that never blocks its caller.

In: text, a function that writes it.  Out: the text, written in a background thread; the number of lines that were lost.

A pipe that nobody reads, a stalled journal or a hung mount blocks write(2).  In the event loop that would stop every
session, so a thread does the writing.  The text that waits for it is limited; what exceeds the limit is dropped and
counted, and the count is reported when the output accepts text again.
"""

from __future__ import annotations

import atexit
import os
import select
import threading
from collections.abc import Callable
from typing import TextIO

LIMIT = 1024 * 1024  # characters that may wait to be written
_AT_EXIT = 2.0  # seconds that the end of the process waits for the output
# Seconds that the thread waits for more lines before it writes: each time that it wakes, the event loop must give the
# interpreter away and take it back, which costs more than making a line.
_GATHERING = 0.05

Writer = Callable[[str], object]


class BackgroundOutput:
    """Writes text with `write`, in the caller's thread until `start`, then in a thread until `finish`.

    `lost` is called in that thread with the number of lost lines, once writing works again.  If `write` raises
    `OSError`, the lines that it was given count as lost.
    """

    def __init__(self, write: Writer, lost: Callable[[int], object] = lambda _: None) -> None:
        self.lost = lost
        self._write = write
        # `write` takes it without the condition, whose methods are written in Python.  Reentrant, because a signal
        # handler that logs may interrupt `write`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: list[str] = []
        self._calls: list[Callable[[], object]] = []
        # Of all text that is not written yet, including what the thread is writing now.
        self._size = 0
        self._lost = 0
        self._lost_before = 0
        self._in_background = False
        self._is_urgent = False

    def start(self) -> None:
        """Write in a thread from now on.  Call it after the process has forked: threads do not survive that."""
        if not self._in_background:
            self._in_background = True
            # A daemon thread, since one that is blocked in write(2) must not keep the process from ending.
            threading.Thread(target=self._run, name="log", daemon=True).start()
            atexit.register(self.finish)

    def finish(self) -> None:
        """Write what waits, if that takes no longer than two seconds; from then on write in the caller's thread."""
        if self._in_background and self.flush(_AT_EXIT):
            self._in_background = False

    @property
    def lost_lines(self) -> int:
        """How many lines have been lost so far."""
        return self._lost_before + self._lost

    @property
    def is_losing(self) -> bool:
        """Whether lines have been lost since writing last worked."""
        return self._lost > 0

    def write(self, text: str) -> None:
        """Write whole lines, or drop them if too many are waiting.  Never blocks between `start` and `finish`."""
        if not self._in_background:
            self._write(text)
            return
        with self._lock:
            if self._size and self._size + len(text) > LIMIT:
                self._lost += text.count("\n")
                return
            self._waiting.append(text)
            self._size += len(text)
            if len(self._waiting) == 1:  # Otherwise the thread knows already.
                self._changed.notify_all()

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` between two writes, such as to rotate a file."""
        if not self._in_background:
            function()
            return
        with self._changed:
            self._calls.append(function)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, at most for `seconds`; return whether it is."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not (self._size or self._calls), seconds)
            self._is_urgent = False
            return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._calls)
                self._changed.wait_for(lambda: self._is_urgent or self._calls, _GATHERING)
                waiting, self._waiting = self._waiting, []
                calls, self._calls = self._calls, []
            text = "".join(waiting)
            done = bool(text) and _succeeds(self._write, text)
            for call in calls:
                _succeeds(call)
            with self._changed:
                self._size -= len(text)
                if text and not done:
                    self._lost += text.count("\n")
                lost = 0
                if done:
                    lost, self._lost = self._lost, 0
                    self._lost_before += lost
                self._changed.notify_all()
            if lost:
                self.lost(lost)


def _succeeds(function: Callable[..., object], *arguments: str) -> bool:
    try:
        function(*arguments)
    except (OSError, ValueError):  # ValueError: the file is closed
        return False
    return True


def stream_writer(stream: TextIO) -> Writer:
    """Return a function that writes text to a stream; characters that its encoding lacks are escaped.

    It bypasses the stream's buffer: Python aborts at exit if a thread blocks with that buffer's lock held.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return stream.write
    stream.flush()
    encoding = stream.encoding or "utf-8"

    def write(text: str) -> None:
        data = memoryview(text.encode(encoding, "backslashreplace"))
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                # Another process that shares the description has made it non-blocking.
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll()

    return write
