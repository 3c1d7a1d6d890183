"""Signals as calls in the reactor.

In: signals of the process.  Out: calls, in the reactor's thread and turn.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


def call_on_signal(reactor: Any, number: signal.Signals, call: Callable[[], object]) -> None:
    """Let `call` be called in the reactor (IReactorFromThreads) from now on when the signal comes, until the end.

    Python lets only the main thread have handlers.  Elsewhere nothing is done: whoever runs the reactor in a thread
    uses the process, and its signals, for something else.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def handler(_number: int, _frame: object) -> None:
        # It runs between any two steps of the program, so all it may do is to leave word.
        reactor.callFromThread(call)

    signal.signal(number, handler)
