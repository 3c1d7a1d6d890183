"""Keeps the kernel's own threads off the relay's core while something is measured.

In: a core.  Out: how many threads were moved; at the end they may run again where they could before.

In *paced* the load never sleeps, so the scheduler gives whatever else there is to do to the relay's core.  A thread of
the kernel that works for three milliseconds each second (one that watches memory, say) keeps fifteen messages waiting
then, and those that come while these are worked off: near enough to one in a hundred to decide what p99 is, for any
relay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.load import CannotMeasure

_KTHREADD = "2"  # the parent of all threads of the kernel's own


def kernel_threads() -> list[int]:
    """Return the process ids of the kernel's own threads; none where a container hides them."""
    threads = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # `pid (name) state parent …`, and the name may hold anything.
            if (entry / "stat").read_text().rpartition(")")[2].split()[1] == _KTHREADD:
                threads.append(int(entry.name))
    return threads


@contextlib.contextmanager
def shielded(core: int, threads: Iterable[int]) -> Iterator[int]:
    """Keep `threads` off `core`, as far as they may be moved.  Raises `CannotMeasure` for who may not move them."""
    before: dict[int, set[int]] = {}
    try:
        for thread in threads:
            try:
                cores = os.sched_getaffinity(thread)
                if core in cores and len(cores) > 1:
                    os.sched_setaffinity(thread, cores - {core})
                    before[thread] = cores
            except PermissionError:
                raise CannotMeasure("only root may keep other threads off a core") from None
            except OSError:
                continue  # It has gone, or belongs to one core.
        yield len(before)
    finally:
        for thread, cores in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, cores)
