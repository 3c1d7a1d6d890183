"""The rate at which new sessions are opened to the broker: one rate for all devices, and a short queue.

In: sessions that want to connect, the time.  Out: their turns, in order of arrival; `SessionEnd` if the wait would be
too long.

A TLS handshake costs about a thousand times as much as a message.  When a broker, a switch or the gateway itself comes
back, every device connects at once; without pacing the broker drowns in handshakes, and established sessions wait
behind them.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from gateway.config import Pacing
from gateway.errors import EndReason, SessionEnd

# This fraction of a second's sessions may begin at the same moment.  A whole second's would be a second's work in one
# piece, and established sessions would wait for it.
BURST_SECONDS = 0.1
# Allowed rounding error of the floating-point token count.
_ROUNDING = 1e-9


class Pacer:
    """Grants turns at `pacing.new_sessions_per_second`, with one timer for all waiters.

    Cancelling its `Deferred` removes a waiter at once.  `refused` counts sessions refused because the queue was full.
    """

    def __init__(self, pacing: Pacing, clock: IReactorTime) -> None:
        self._rate = pacing.new_sessions_per_second
        self._burst = max(1, math.ceil(self._rate * BURST_SECONDS))
        self._room = int(self._rate * pacing.queue_seconds)
        self._clock = clock
        self._tokens = float(self._burst)
        self._since = clock.seconds()
        # In order of arrival, with constant-time removal.
        self._queue: OrderedDict[Deferred[None], None] = OrderedDict()
        self._timer: IDelayedCall | None = None
        self.refused = 0

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._queue)

    def turn(self) -> Deferred[None] | None:
        """Return `None` if it is the caller's turn now, otherwise a `Deferred` that fires when it is.

        Raises `SessionEnd` when the queue is full.
        """
        if not self._rate:
            return None
        if not self._queue and self._take():
            return None
        if len(self._queue) >= self._room:
            self.refused += 1
            raise SessionEnd(EndReason.TOO_MANY_NEW_SESSIONS, f"{len(self._queue)} are already waiting")
        turn: Deferred[None] = Deferred(self._forget)
        self._queue[turn] = None
        self._arm()
        return turn

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
        del self._queue[turn]
        if not self._queue and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None and self._queue:
            self._timer = self._clock.callLater(max(0.0, 1 - self._tokens) / self._rate, self._next)

    def _next(self) -> None:
        """Grant the turns that are due; at most one burst at a time, even if they are not used."""
        self._timer = None
        for _ in range(self._burst):
            if not self._queue or not self._take():
                break
            turn, _nothing = self._queue.popitem(last=False)
            turn.callback(None)
        self._arm()
