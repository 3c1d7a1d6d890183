"""The rate at which new sessions are opened to the broker: one rate for all devices, and a short queue.

In: sessions that want to connect, the time.  Out: their turns, addresses in turn; `SessionEnd` if the wait is too
long.

A TLS handshake costs about a thousand times as much as a message.  When a broker, a switch or the gateway itself comes
back, every device connects at once; without pacing the broker drowns in handshakes, and established sessions wait
behind them.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.config import Pacing
from gateway.errors import EndReason, SessionEnd
from gateway.fair import FairQueue
from gateway.rules.turns import ANYONE, Visitor

# This fraction of a second's sessions may begin at the same moment.  A whole second's would be a second's work in one
# piece, and established sessions would wait for it.
BURST_SECONDS = 0.1
# Turns come a little late on a busy machine; so many seconds later a waiter is refused.
_GRACE = 1.0
# Allowed rounding error of the floating-point token count.
_ROUNDING = 1e-9


@frozen(eq=False)
class _Waiter:
    """A session that waits for its turn, until `expires` on the clock."""

    address: str
    turn: Deferred[None]
    expires: float


class Pacer:
    """Grants turns at `pacing.new_sessions_per_second`, with one timer for all waiters.

    The addresses are served in turn.  In a full queue, the address with most waiters makes room. Cancelling its
    `Deferred` removes a waiter at once.  `refused` counts sessions that got no turn in time.
    """

    def __init__(self, pacing: Pacing, clock: IReactorTime) -> None:
        self._rate = pacing.new_sessions_per_second
        self._burst = max(1, math.ceil(self._rate * BURST_SECONDS))
        self._room = int(self._rate * pacing.queue_seconds)
        self._patience = pacing.queue_seconds
        self._clock = clock
        self._tokens = float(self._burst)
        self._since = clock.seconds()
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._waiters: dict[Deferred[None], _Waiter] = {}
        # A heap by expiry; a waiter that got its turn stays in it until then.
        self._expiring: list[tuple[float, int, _Waiter]] = []
        self._arrivals = 0
        self._timer: IDelayedCall | None = None
        self.refused = 0

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._queue)

    def turn(self, visitor: Visitor = ANYONE) -> Deferred[None] | None:
        """Return `None` if it is the visitor's turn now, otherwise a `Deferred` that fires when it is.

        Raises `SessionEnd` when the queue is full; the `Deferred` fails with it when the wait takes too long, or when a
        waiter from another address takes the place.
        """
        if not self._rate:
            return None
        if not self._queue and self._take():
            return None
        if len(self._queue) >= self._room:
            shed = self._queue.shed(visitor.address)
            if shed is None:
                self.refused += 1
                raise SessionEnd(EndReason.TOO_MANY_NEW_SESSIONS, self._why_full())
            self._refuse(shed, "its address has the most waiting devices")
        if not self._queue:
            self._expiring.clear()
        expires = self._clock.seconds() + min(self._patience, visitor.patience()) + _GRACE
        turn: Deferred[None] = Deferred(self._forget)
        waiter = _Waiter(visitor.address, turn, expires)
        self._queue.push(visitor.address, waiter)
        self._waiters[turn] = waiter
        self._arrivals += 1
        heappush(self._expiring, (expires, self._arrivals, waiter))
        self._arm()
        return turn

    def _why_full(self) -> str:
        if self._room:
            return f"{len(self._queue)} devices are already waiting"
        return f"at {self._rate:g} new sessions per second, the next turn comes later than pacing.queue_seconds"

    def give_back(self) -> None:
        """Return an unused turn."""
        self._tokens += 1

    def _take(self) -> bool:
        now = self._clock.seconds()
        self._tokens = min(float(self._burst), self._tokens + (now - self._since) * self._rate)
        self._since = now
        if self._tokens < 1 - _ROUNDING:
            return False
        self._tokens -= 1
        return True

    def _forget(self, turn: Deferred[None]) -> None:
        waiter = self._waiters.pop(turn)
        self._queue.discard(waiter.address, waiter)
        if not self._queue and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, waiter: _Waiter, why: str) -> None:
        """Refuse a waiter that is no longer in the queue."""
        del self._waiters[waiter.turn]
        self.refused += 1
        waiter.turn.errback(SessionEnd(EndReason.TOO_MANY_NEW_SESSIONS, why))

    def _arm(self) -> None:
        if self._timer is None and self._queue:
            until_turn = max(0.0, 1 - self._tokens) / self._rate
            until_expiry = self._first_to_expire().expires - self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, min(until_turn, until_expiry)), self._next)

    def _first_to_expire(self) -> _Waiter:
        """Return the waiter with the least patience; somebody must be waiting."""
        while (waiter := self._expiring[0][2]).turn not in self._waiters:
            heappop(self._expiring)
        return waiter

    def _next(self) -> None:
        """Grant the turns that are due; at most one burst at a time, even if they are not used."""
        self._timer = None
        for _ in range(self._burst):
            if not self._queue or not self._take():
                break
            waiter = self._queue.pop()
            del self._waiters[waiter.turn]
            waiter.turn.callback(None)
        self._expire()
        self._arm()

    def _expire(self) -> None:
        """Refuse those who have waited too long, at most one burst of them at a time."""
        now = self._clock.seconds()
        for _ in range(self._burst):
            if not self._queue or (waiter := self._first_to_expire()).expires > now:
                return
            self._queue.discard(waiter.address, waiter)
            self._refuse(waiter, "timed out in the queue")
