"""Whom the gateway lets in: networks, numbers of sessions, rates.

In: the address of a connection that was just accepted.  Out: nothing, or the `EndReason` for which it is closed at
once.  What is kept per address is forgotten when the address has no session and its rate has recovered, so memory is
bounded by the addresses that are active.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from gateway.config import Admission
from gateway.errors import EndReason


class Doorkeeper:
    """Counts sessions and decides about new ones.

    `max_sessions` is what the gateway can carry in all.  `refused` counts refusals by reason.
    """

    def __init__(self, admission: Admission, max_sessions: int, seconds: Callable[[], float]) -> None:
        self._admission = admission
        self._max_sessions = max_sessions
        self._seconds = seconds
        self._sessions = 0
        self._by_address: Counter[str] = Counter()
        # Token buckets (address: tokens left, when that was so); a full bucket is the same as none.
        self._buckets: dict[str, tuple[float, float]] = {}
        self.refused: Counter[EndReason] = Counter()

    def rule(self, admission: Admission, max_sessions: int) -> None:
        """Decide by other rules from now on; the sessions and rates that were counted so far count on."""
        self._admission = admission
        self._max_sessions = max_sessions

    def admit(self, host: str | None) -> EndReason | None:
        """Let a connection from `host` in, or return why not.

        `host` is `None` for a UNIX socket, whose file mode decides who may connect.  Whoever is let in must be
        announced to `leave` once.
        """
        reason = self._judge(host)
        if reason is not None:
            self.refused[reason] += 1
            return reason
        self._sessions += 1
        if host is not None:
            self._by_address[host] += 1
        return None

    def leave(self, host: str | None) -> None:
        """Count a session out."""
        self._sessions -= 1
        if host is not None:
            self._by_address[host] -= 1
            if self._by_address[host] <= 0:
                del self._by_address[host]

    def sweep(self) -> None:
        """Forget the addresses whose rate has recovered."""
        rate, burst, now = self._admission.new_sessions_per_second, self._admission.burst, self._seconds()
        full = [host for host, (tokens, since) in self._buckets.items() if tokens + (now - since) * rate >= burst]
        for host in full:
            del self._buckets[host]

    def _judge(self, host: str | None) -> EndReason | None:
        if self._sessions >= self._max_sessions:
            return EndReason.TOO_MANY_SESSIONS
        if host is None:
            return None
        if not self._allowed(host):
            return EndReason.NETWORK_NOT_ALLOWED
        limit = self._admission.max_sessions_per_address
        if limit and self._by_address[host] >= limit:
            return EndReason.TOO_MANY_FROM_ADDRESS
        if self._admission.new_sessions_per_second and not self._take_token(host):
            return EndReason.RATE_LIMITED
        return None

    def _allowed(self, host: str) -> bool:
        try:
            address = plain_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._admission.allow)

    def _take_token(self, host: str) -> bool:
        now = self._seconds()
        burst = self._admission.burst
        tokens, since = self._buckets.get(host, (float(burst), now))
        tokens = min(burst, tokens + (now - since) * self._admission.new_sessions_per_second)
        taken = tokens >= 1
        self._buckets[host] = (tokens - 1 if taken else tokens, now)
        return taken


def plain_address(host: str) -> IPv4Address | IPv6Address:
    """Parse the address of a socket: without its zone, and an IPv4 address that came in by IPv6 as what it is."""
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
