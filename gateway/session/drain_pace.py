"""The pace at which backlogs leave, all of them together.

In: the rate, the time, backlogs that want to send.  Out: whether one may send a message now; if not, its turn later.

When the broker is back, thousands of backlogs are sent at the same time.  Without a pace, the messages of devices that
have none would wait behind them.
"""

from __future__ import annotations

from collections.abc import Callable

TICK = 0.01
"""Seconds between two turns of those that wait."""
# No more is sent at a time than this makes of a second's messages.  A machine that is too slow for the rate is late for
# its turns, and so drains more slowly instead of holding up others.
_BURST_SECONDS = 2 * TICK
_ONE = 1 - 1e-9  # with the rounding error of the count


class DrainPace:
    """`rate` messages per second, 0 for no limit; backlogs that have to wait take turns.

    `later` must call `go_on` after `TICK` seconds, once for any number of calls before that.
    """

    def __init__(
        self, rate: float = 0.0, seconds: Callable[[], float] = lambda: 0.0, later: Callable[[], None] = lambda: None
    ) -> None:
        self.rate = rate
        self._seconds = seconds
        self._later = later
        self._since = seconds()
        self._tokens = self._burst
        self._waiting: dict[Callable[[], None], None] = {}
        self._is_turn = False

    def may_send(self, again: Callable[[], None]) -> bool:
        """Take the right to send a message; if there is none, `again` is called when there may be."""
        if not self.rate:
            return True
        self._refill()
        if self._tokens >= _ONE and (self._is_turn or not self._waiting):
            self._tokens -= 1
            return True
        self._waiting[again] = None
        self._later()
        return False

    def go_on(self) -> None:
        """Give those that wait their turns."""
        self._refill()
        try:
            for again in list(self._waiting):
                if self._tokens < _ONE and self.rate:
                    break
                del self._waiting[again]
                self._is_turn = True
                again()
        finally:
            # Also after an error in one of them.
            self._is_turn = False
            if self._waiting:
                self._later()

    @property
    def _burst(self) -> float:
        return max(1.0, self.rate * _BURST_SECONDS)

    def _refill(self) -> None:
        now = self._seconds()
        passed, self._since = max(0.0, now - self._since), now
        self._tokens = min(self._burst, self._tokens + passed * self.rate)
