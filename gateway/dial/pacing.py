"""How fast new sessions are led to the broker: a rate for all devices together, and a short queue.

In: sessions that want to dial, the time.  Out: their turns, in the order in which they came; `SessionEnd` for those who
would have to wait too long.

A TLS handshake costs about a thousand times what a message does.  When a broker, a switch or the gateway itself comes
back, every device comes at once; without a pace the broker drowns in handshakes, and the sessions that stand wait
behind them.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.config import Pacing
from gateway.errors import EndReason, SessionEnd

# So much of a second's sessions may begin at one moment.  All of a second's would be a second's work in one piece, and
# the sessions that stand would wait for it.
BURST_SECONDS = 0.1
# What a sum of floating-point numbers may be short of a whole.
_ROUNDING = 1e-9


class Pacer:
    """Gives turns, `pacing.new_sessions_per_second` of them; one timer for all who wait.

    Who waits is forgotten at once when its `Deferred` is cancelled.  `refused` counts those for whom there was no room.
    """

    def __init__(self, pacing: Pacing, clock: IReactorTime) -> None:
        self._rate = pacing.new_sessions_per_second
        self._burst = max(1, math.ceil(self._rate * BURST_SECONDS))
        self._room = int(self._rate * pacing.queue_seconds)
        self._clock = clock
        self._tokens = float(self._burst)
        self._since = clock.seconds()
        # In their order, and each found at once when it gives up.
        self._queue: OrderedDict[Deferred[None], None] = OrderedDict()
        self._timer: IDelayedCall | None = None
        self.refused = 0

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    def turn(self) -> Deferred[None] | None:
        """Return `None` if it is the caller's turn now, or what fires when it is.

        Raises `SessionEnd` when the queue is full.
        """
        if not self._rate:
            return None
        if not self._queue and self._take():
            return None
        if len(self._queue) >= self._room:
            self.refused += 1
            raise SessionEnd(EndReason.TOO_MANY_NEW_SESSIONS, f"{len(self._queue)} wait for their turn already")
        turn: Deferred[None] = Deferred(self._forget)
        self._queue[turn] = None
        self._arm()
        return turn

    def give_back(self) -> None:
        """Return a turn of which no use was made."""
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
        del self._queue[turn]
        if not self._queue and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None and self._queue:
            self._timer = self._clock.callLater(max(0.0, 1 - self._tokens) / self._rate, self._next)

    def _next(self) -> None:
        """Give the turns that are due; not more than a burst in one go, even if nobody makes use of them."""
        self._timer = None
        for _ in range(self._burst):
            if not self._queue or not self._take():
                break
            turn, _nothing = self._queue.popitem(last=False)
            turn.callback(None)
        self._arm()
