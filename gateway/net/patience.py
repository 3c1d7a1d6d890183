"""Timeouts that count only the time in which this process ran, and that are enforced after what arrived was read.

In: a reactor's clock; how many seconds were lost.  Out: a clock for timeouts.

A process that is stopped, or whose machine is suspended, reads nothing meanwhile, and the reactor calls what is due
before it reads.  By an ordinary clock, every peer would then be blamed for its silence.

Nearly all timeouts are cancelled, and most are of a few lengths.  So there is one timer for each length, for the first
that is due; a timer for each would be a tenth of the Python code that runs for a session.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

_LATE = 1.0  # seconds; by which a timeout must be late to get its whole time again, once
# So many are called in one turn of the reactor: a pause of the process makes all that wait due at the same time.
_CALLED_AT_A_TIME = 20


@implementer(IReactorTime)
class PatientClock:
    """A clock for timeouts; whoever notices that time was lost calls `give_back`."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._lost = 0.0
        # By delay; those in which nothing waits are dropped.
        self._queues: dict[float, _Queue] = {}

    def seconds(self) -> float:
        """Return the time in seconds, without what was lost."""
        return self._clock.seconds() - self._lost

    def callLater(self, delay: float, callable: Callable[..., object], *args: object, **kw: object) -> IDelayedCall:  # noqa: A002  the interface's name
        """See IReactorTime.  What is due waits for one more turn of the reactor, in which sockets are read."""
        queue = self._queues.get(delay)
        if queue is None:
            queue = self._queues[delay] = _Queue(self._clock, delay, self._queues)
        return _Wait(queue, partial(callable, *args, **kw) if args or kw else callable)

    def getDelayedCalls(self) -> list[IDelayedCall]:
        """See IReactorTime."""
        return [wait for queue in self._queues.values() for wait in queue.waits]

    def give_back(self, seconds: float) -> None:
        """Move all that is waiting by `seconds` that were lost, but to no more than its whole delay from now."""
        self._lost += seconds
        for queue in self._queues.values():
            queue.give_back(seconds)


class _Queue:
    """Timeouts of one length, in the order in which they are due."""

    __slots__ = ("_all", "_timer", "clock", "delay", "waits")

    def __init__(self, clock: IReactorTime, delay: float, queues: dict[float, _Queue]) -> None:
        self.clock = clock
        self.delay = delay
        self.waits: dict[_Wait, None] = {}
        self._all = queues
        # For the first wait, or for one before it that was cancelled.
        self._timer: IDelayedCall | None = None

    def add(self, wait: _Wait) -> None:
        """Let a timeout wait."""
        self.waits[wait] = None
        if self._timer is None:
            self._timer = self.clock.callLater(self.delay, self._due)

    def remove(self, wait: _Wait) -> None:
        """Forget a timeout that is over or was cancelled."""
        if wait not in self.waits:
            return
        del self.waits[wait]
        if not self.waits:
            self._stop()
            del self._all[self.delay]

    def give_back(self, seconds: float) -> None:
        """See `PatientClock`; the order stays the same."""
        latest = self.clock.seconds() + self.delay
        # There may be thousands: no calls for each.
        for wait in self.waits:
            ends = wait.ends + seconds
            wait.ends = ends if ends < latest else latest
            if wait.soon is not None:
                wait.put_off(wait.ends)
        self._stop()
        self._due()

    def _due(self) -> None:
        """Have those called that are due, and wait for the next one."""
        self._timer = None
        now, called = self.clock.seconds(), 0
        late: list[_Wait] = []
        for wait in self.waits:
            if called == _CALLED_AT_A_TIME:
                self._timer = self.clock.callLater(0, self._due)
                break
            if wait.ends > now:
                self._timer = self.clock.callLater(wait.ends - now, self._due)
                break
            if now - wait.ends > _LATE and not wait.was_late:
                # The process was stopped, and nobody has given the time back yet.
                wait.was_late = True
                wait.put_off(now + self.delay)
                late.append(wait)
                continue
            wait.call_soon()
            called += 1
        # Nothing is due after these now, and what is due before them must not wait for them.
        for wait in late:
            del self.waits[wait]
            self.waits[wait] = None
        if late and self._timer is None:
            self._timer = self.clock.callLater(self.delay, self._due)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@implementer(IDelayedCall)
class _Wait:
    __slots__ = ("_call", "_queue", "ends", "soon", "was_late")

    def __init__(self, queue: _Queue, call: Callable[[], object]) -> None:
        self._queue = queue
        self._call = call
        self.ends = queue.clock.seconds() + queue.delay
        self.was_late = False
        # Set once it is due.
        self.soon: IDelayedCall | None = None
        queue.add(self)

    def call_soon(self) -> None:
        """Call it in the next turn of the reactor."""
        if self.soon is None:
            self.soon = self._queue.clock.callLater(0, self._now)

    def put_off(self, ends: float) -> None:
        """Call it at this time of the clock instead."""
        self.ends = ends
        if self.soon is not None:
            self.soon.cancel()
            self.soon = None

    def _now(self) -> None:
        self._queue.remove(self)
        # It would hold on to what waited, and Twisted's call to this.
        call, self._call, self.soon = self._call, _nothing, None
        call()

    def active(self) -> bool:
        """See IDelayedCall."""
        return self in self._queue.waits

    def cancel(self) -> None:
        """See IDelayedCall."""
        if self.soon is not None:
            self.soon.cancel()
        self._queue.remove(self)

    def getTime(self) -> float:  # noqa: N802  the interface's name
        """See IDelayedCall."""
        return self.ends

    def delay(self, secondsLater: float) -> None:  # noqa: N803  the interface's name
        """Fail: nobody moves a single timeout."""
        raise NotImplementedError

    def reset(self, secondsFromNow: float) -> None:  # noqa: N803  the interface's name
        """Fail: nobody moves a single timeout."""
        raise NotImplementedError


def _nothing() -> None:
    """Stands for what has been called."""
