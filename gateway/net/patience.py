"""Timeouts that count only the time in which this process ran, and that are enforced after what arrived was read.

In: a reactor's clock; how many seconds were lost.  Out: a clock for timeouts.

A process that is stopped, or whose machine is suspended, reads nothing meanwhile, and the reactor calls what is due
before it reads.  By an ordinary clock, every peer would then be blamed for its silence.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer


@implementer(IReactorTime)
class PatientClock:
    """A clock for timeouts; whoever notices that time was lost calls `give_back`."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._lost = 0.0
        self._waits: set[_Wait] = set()

    def seconds(self) -> float:
        """Return the time in seconds, without what was lost."""
        return self._clock.seconds() - self._lost

    def callLater(self, delay: float, callable: Callable[..., object], *args: object, **kw: object) -> IDelayedCall:  # noqa: A002  the interface's name
        """See IReactorTime.  What is due waits for one more turn of the reactor, in which sockets are read."""
        wait = _Wait(self, self._clock, delay, lambda: callable(*args, **kw))
        self._waits.add(wait)
        return wait

    def getDelayedCalls(self) -> list[IDelayedCall]:
        """See IReactorTime."""
        return list(self._waits)

    def give_back(self, seconds: float) -> None:
        """Move all that is waiting by `seconds` that were lost, but to no more than its whole delay from now."""
        self._lost += seconds
        for wait in self._waits:
            wait.delay(seconds)

    def over(self, wait: _Wait) -> None:
        """Forget a call that was made or cancelled."""
        self._waits.discard(wait)


@implementer(IDelayedCall)
class _Wait:
    __slots__ = ("_call", "_clock", "_delay", "_ends", "_patience", "_timer")

    def __init__(self, patience: PatientClock, clock: IReactorTime, delay: float, call: Callable[[], object]) -> None:
        self._patience = patience
        self._clock = clock
        self._delay = delay
        self._call = call
        self._ends = clock.seconds() + delay
        self._timer: IDelayedCall = clock.callLater(delay, self._due)

    def _due(self) -> None:
        self._timer = self._clock.callLater(0, self._now)

    def _now(self) -> None:
        self._patience.over(self)
        self._call()

    def active(self) -> bool:
        """See IDelayedCall."""
        return self._timer.active()

    def cancel(self) -> None:
        """See IDelayedCall."""
        self._timer.cancel()
        self._patience.over(self)

    def getTime(self) -> float:  # noqa: N802  the interface's name
        """See IDelayedCall."""
        return self._ends

    def delay(self, secondsLater: float) -> None:  # noqa: N803  the interface's name
        """See IDelayedCall; the whole delay from now is the most."""
        left = self._ends - self._clock.seconds()
        self.reset(max(0.0, min(left + secondsLater, self._delay)))

    def reset(self, secondsFromNow: float) -> None:  # noqa: N803  the interface's name
        """See IDelayedCall."""
        self._timer.cancel()
        self._ends = self._clock.seconds() + secondsFromNow
        self._timer = self._clock.callLater(secondsFromNow, self._due)
