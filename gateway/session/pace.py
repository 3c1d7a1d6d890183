"""Limits how fast a device may send, with two token buckets: packets and bytes.

In: what arrived, and the time.  Out: whether to pause reading, and whether to resume.

Excess data waits in the device's socket; nothing is lost and no device is disconnected.
"""

from __future__ import annotations

from collections.abc import Callable

# A pause ends with the sweep, up to a second late; smaller buckets could not sustain the configured rate.
_BURST_SECONDS = 2.0


class Pace:
    """The two rates of one session, per second; 0 means no limit.

    The burst is two seconds' worth. What has been read counts in full, so a large packet causes a longer pause.
    """

    __slots__ = ("_bytes", "_packets", "_rates", "_seconds", "_seen_packets", "_since", "paused")

    def __init__(self, packets_per_second: float, bytes_per_second: float, seconds: Callable[[], float]) -> None:
        self._rates = packets_per_second, bytes_per_second
        self._packets, self._bytes = (self._full(rate) for rate in self._rates)
        self._seconds = seconds
        self._since = seconds()
        self._seen_packets = 0
        # Whether reading is paused.
        self.paused = False

    def overdrawn(self, packets: int, size: int) -> bool:
        """Count `size` bytes, with `packets` the total so far; return whether to pause reading."""
        self._refill(self._seconds())
        self._packets -= packets - self._seen_packets
        self._seen_packets = packets
        self._bytes -= size
        self.paused = self._is_overdrawn()
        return self.paused

    def recovered(self, now: float) -> bool:
        """Return whether reading may resume."""
        self._refill(now)
        self.paused = self._is_overdrawn()
        return not self.paused

    def _is_overdrawn(self) -> bool:
        packets_per_second, bytes_per_second = self._rates
        return bool((packets_per_second and self._packets < 0) or (bytes_per_second and self._bytes < 0))

    def _refill(self, now: float) -> None:
        passed, self._since = max(0.0, now - self._since), now
        packets_per_second, bytes_per_second = self._rates
        self._packets = min(self._full(packets_per_second), self._packets + passed * packets_per_second)
        self._bytes = min(self._full(bytes_per_second), self._bytes + passed * bytes_per_second)

    @staticmethod
    def _full(rate: float) -> float:
        return max(1.0, rate * _BURST_SECONDS)
