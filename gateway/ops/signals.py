"""Process signals as calls in the reactor.

In: signals of the process.  Out: calls, in the reactor's thread and turn.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

# Signals that arrived before anything could be done about them.
_early: set[int] = set()


def note_early(number: signal.Signals) -> None:
    """Until `call_on_signal` takes over, only note that the signal arrives: by default it could end the process."""
    if threading.current_thread() is threading.main_thread():
        # Not SIG_IGN, which programs that are started meanwhile would inherit.
        signal.signal(number, lambda number, _frame: _early.add(number))


def call_on_signal(reactor: Any, number: signal.Signals, call: Callable[[], object]) -> None:
    """Call `call` in the reactor (IReactorFromThreads) whenever the signal arrives, and once if it was noted before.

    Python allows handlers in the main thread only.  In another thread this has no effect: the program that runs the
    reactor there handles the signals itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def handler(_number: int, _frame: object) -> None:
        # It may run between any two bytecodes, so it only schedules the call.
        reactor.callFromThread(call)

    signal.signal(number, handler)
    if number in _early:
        _early.remove(number)
        reactor.callFromThread(call)
