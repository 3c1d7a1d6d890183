"""Runs a gateway and measures the turns of its reactor; `benchmarks.turns` starts it with a tree in PYTHONPATH.

In: a configuration, a file for the results.  Out: at each SIGUSR2 a line of JSON with the longest turn since the last:
its time on the clock, the processor time of the reactor's thread in it, both in milliseconds, and how many there were.

A turn is all that happens between two waits of the reactor.  Processor time leaves out what a busy machine or the
relay's own short waits add; a turn that blocks shows in the time on the clock.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from twisted.internet import epollreactor


class Timed:
    """The reactor's epoll, which looks at the clocks whenever the reactor waits and when it goes on."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self._wall = self._cpu = 0.0
        self.longest = [0.0, 0.0]
        self.turns = 0

    def poll(self, *arguments: Any) -> Any:
        """Wait, which ends one turn and begins the next."""
        if self._wall:
            took = time.perf_counter() - self._wall, time.thread_time() - self._cpu
            self.longest = [max(pair) for pair in zip(self.longest, took, strict=True)]
            self.turns += 1
        try:
            return self._poller.poll(*arguments)
        finally:
            self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)


def main(config: str, results: str) -> None:
    """Run until the end."""
    epollreactor.install()
    from twisted.internet import reactor
    from twisted.scripts.twistd import run

    reactor_: Any = reactor
    timed = reactor_._poller = Timed(reactor_._poller)  # noqa: SLF001  nobody else sees when the reactor waits

    def report(*_: object) -> None:
        wall, cpu = (1000 * seconds for seconds in timed.longest)
        line = json.dumps({"wall": wall, "cpu": cpu, "turns": timed.turns})
        timed.longest, timed.turns = [0.0, 0.0], 0
        with Path(results).open("a") as file:
            file.write(line + "\n")

    signal.signal(signal.SIGUSR2, report)
    sys.argv = ["twistd", "--nodaemon", "--pidfile=", "mqtts-gateway", "--config", config]
    run()


main(*sys.argv[1:])
