"""How the bytes that wait on disk change, and what comes of it.

In: how many bytes wait, from time to time.  Out: seconds until the store is full, or empty, at the rate of late.
"""

from __future__ import annotations

from collections import deque

_EVERY = 10.0  # seconds between two samples
_SAMPLES = 31  # of five minutes
_LATE = 4  # of the last half minute


class Forecast:
    """The last five minutes."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def is_due(self, now: float) -> bool:
        """Whether it is time for the next sample."""
        return not self._samples or now - self._samples[-1][0] >= _EVERY

    def note(self, now: float, waiting: int) -> None:
        """At `now`, in seconds, so many bytes wait."""
        self._samples.append((now, waiting))

    def _rate(self, samples: int) -> float:
        """Return by how much the bytes have grown each second, in the last `samples`."""
        if len(self._samples) < 2:
            return 0.0
        (began, before), (now, waiting) = self._samples[max(0, len(self._samples) - samples)], self._samples[-1]
        return (waiting - before) / max(now - began, 1e-9)

    def until_full(self, limit: int) -> float | None:
        """Return the seconds until `limit` bytes are reached; None if they are not, at this rate."""
        rate = self._rate(_SAMPLES)
        return None if rate <= 0 else max(0.0, limit - self._samples[-1][1]) / rate

    def until_empty(self) -> float | None:
        """Return the seconds until nothing waits; None if that is not to be seen."""
        # Of late: most of the time before may have been the outage itself.
        rate = self._rate(_LATE)
        if rate >= 0 or not self._samples[-1][1]:
            return None
        return self._samples[-1][1] / -rate
