"""Turns at slow work, such as password checks and programs: a few at a time, in a short and fair queue.

In: sessions that need a turn.  Out: their turns; `Refusal` for those that would wait too long, or have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IReactorTime

from gateway.errors import EndReason, Refusal
from gateway.fair import FairQueue

_ROOM = 256


def _forever() -> float:
    return math.inf


def _stays() -> bool:
    return False


@frozen
class Visitor:
    """A session that waits: its address, how many more seconds it may wait, and whether its device has left."""

    address: str = ""
    patience: Callable[[], float] = _forever
    has_left: Callable[[], bool] = _stays


ANYONE: Final = Visitor()
"""Who waits for as long as it takes."""


@frozen(eq=False)
class _Waiter:
    visitor: Visitor
    turn: Deferred[None]


class Turns:
    """Up to `width` turns at a time; `what` names the work in refusals.

    The addresses are served in turn.  In a full queue, the address with most waiters makes room.
    """

    def __init__(self, width: int, clock: IReactorTime, what: str) -> None:
        self._free = width
        self._clock = clock
        self._what = what
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._is_giving = False

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._queue)

    async def take(self, visitor: Visitor) -> None:
        """Wait for a turn; `give` must be called once for it.  Raises Refusal.  Cancelling leaves the queue."""
        if self._free and not self._queue:
            self._free -= 1
            return
        if len(self._queue) >= _ROOM:
            shed = self._queue.shed(visitor.address)
            if shed is None:
                raise self._too_many(f"{len(self._queue)} devices are already waiting")
            shed.turn.errback(self._too_many("its address has the most waiting devices"))
        turn: Deferred[None] = Deferred(lambda _: self._queue.discard(visitor.address, waiter))
        waiter = _Waiter(visitor, turn)
        self._queue.push(visitor.address, waiter)
        patience = visitor.patience()
        if patience != math.inf:
            turn.addTimeout(max(0.0, patience), self._clock)
        try:
            await turn
        except DeferredTimeout:
            raise self._too_many("timed out in the queue") from None

    def give(self) -> None:
        """Pass a turn on to the next waiter."""
        if not self._queue:
            self._free += 1
            return
        if self._is_giving:
            # The waiter that was just served needed no time.  One in each turn of the event loop: so may thousands.
            self._clock.callLater(0, self.give)
            return
        waiter = self._queue.pop()
        if waiter.visitor.has_left():
            waiter.turn.errback(Refusal(EndReason.DEVICE_LOST, f"while waiting for {self._what}", 3, 0x88))
            # Here, too: thousands may have left.
            self._clock.callLater(0, self.give)
            return
        self._is_giving = True
        try:
            waiter.turn.callback(None)
        finally:
            self._is_giving = False

    def _too_many(self, why: str) -> Refusal:
        return Refusal(EndReason.TOO_MANY_NEW_SESSIONS, f"waiting for {self._what}: {why}", 3, 0x88)
