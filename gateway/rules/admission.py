"""Admission control: allowed networks, session limits and connection rates.

In: the address of a newly accepted connection.  Out: nothing, or the `EndReason` for closing it at once.  State is
kept per address only while the address has sessions or its rate has not recovered, so memory is bounded by the active
addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from twisted.internet.interfaces import IAddress

from gateway.config import Admission, Proxy
from gateway.errors import EndReason
from gateway.net.listening import ListenerFactory

# Addresses looked at in one sweep.
_CHECKED_AT_A_TIME = 2_500


class Doorkeeper:
    """Counts sessions and admits or refuses new connections.

    `max_sessions` is the limit for the whole gateway.  `refused` counts refusals by reason.  `make_room` is asked for
    room for a connection from an address, "" for a UNIX socket, where the limit is reached.
    """

    def __init__(
        self,
        admission: Admission,
        max_sessions: int,
        seconds: Callable[[], float],
        make_room: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._admission = admission
        self._max_sessions = max_sessions
        self._seconds = seconds
        self._make_room = make_room
        self.sessions = 0
        self.by_address: Counter[str] = Counter()
        # Token buckets (address: tokens left, time of that count); a full bucket is the same as none.
        self._buckets: dict[str, tuple[float, float]] = {}
        # Those that the next sweeps look at.
        self._unchecked: list[str] = []
        self.refused: Counter[EndReason] = Counter()

    def rule(self, admission: Admission, max_sessions: int) -> None:
        """Replace the limits; existing session counts and rates are kept."""
        self._admission = admission
        self._max_sessions = max_sessions

    def admit(self, host: str | None) -> EndReason | None:
        """Admit a connection from `host`, or return the reason for refusing it.

        `host` is `None` for a UNIX socket, whose file mode controls access.  Call `leave` once for each admitted
        connection.
        """
        reason = self._judge_number(host) or self._judge_address(host)
        if reason is not None:
            self.refused[reason] += 1
            return reason
        self.sessions += 1
        self._count(host)
        return None

    def admit_proxy(self, host: str | None, proxies: Sequence[Proxy]) -> EndReason | None:
        """Admit a load balancer's connection, or return the reason for refusing it.

        It counts towards the limit for all sessions. The device's address is judged later, by `admit_device`; if the
        connection ends before that, call `leave(None)`.
        """
        reason = None if _is_one_of(host, proxies) else EndReason.PROXY_NOT_TRUSTED
        reason = reason or self._judge_number(None)
        if reason is not None:
            self.refused[reason] += 1
            return reason
        self.sessions += 1
        return None

    def admit_device(self, host: str | None) -> EndReason | None:
        """Judge a connection admitted by `admit_proxy` by its device's address, and count it for that address."""
        reason = self._judge_address(host)
        if reason is not None:
            self.refused[reason] += 1
            return reason
        self._count(host)
        return None

    def judge_again(
        self, host: str | None, door: ListenerFactory, balancer: str | None, *, is_proxied: bool
    ) -> EndReason | None:
        """Return why a connection accepted before a reload may not become a session after it.

        `is_proxied` tells that the connection began with a PROXY header, sent by the load balancer at `balancer`.
        """
        if not door.is_open:
            return EndReason.CONFIGURATION_CHANGED
        proxies = door.listener.proxies
        if not (_is_one_of(balancer, proxies) if is_proxied else not proxies):
            return EndReason.PROXY_NOT_TRUSTED
        return None if self._is_allowed(host) else EndReason.NETWORK_NOT_ALLOWED

    def leave(self, host: str | None) -> None:
        """Remove a session from the counts."""
        self.sessions -= 1
        if host is not None:
            self.by_address[host] -= 1
            if self.by_address[host] <= 0:
                del self.by_address[host]

    def sweep(self) -> None:
        """Forget addresses whose rate has recovered; look at some of them, and at the others in the next sweeps."""
        rate, burst, now = self._admission.new_sessions_per_second, self._admission.burst, self._seconds()
        self._unchecked = self._unchecked or list(self._buckets)
        for host in self._unchecked[-_CHECKED_AT_A_TIME:]:
            bucket = self._buckets.get(host)
            if bucket is not None and bucket[0] + (now - bucket[1]) * rate >= burst:
                del self._buckets[host]
        del self._unchecked[-_CHECKED_AT_A_TIME:]

    def _count(self, host: str | None) -> None:
        if host is not None:
            self.by_address[host] += 1

    def _judge_number(self, host: str | None) -> EndReason | None:
        if self.sessions < self._max_sessions or (self._is_allowed(host) and self._make_room(host or "")):
            return None
        return EndReason.TOO_MANY_SESSIONS

    def _is_allowed(self, host: str | None) -> bool:
        # A UNIX socket's mode decides who may connect there.
        return host is None or _is_one_of(host, self._admission.allow)

    def _judge_address(self, host: str | None) -> EndReason | None:
        if host is None:
            return None
        if not self._is_allowed(host):
            return EndReason.NETWORK_NOT_ALLOWED
        limit = self._admission.max_sessions_per_address
        if limit and self.by_address[host] >= limit:
            return EndReason.TOO_MANY_FROM_ADDRESS
        if self._admission.new_sessions_per_second and not self._take_token(host):
            return EndReason.RATE_LIMITED
        return None

    def _take_token(self, host: str) -> bool:
        now = self._seconds()
        burst = self._admission.burst
        tokens, since = self._buckets.get(host, (float(burst), now))
        tokens = min(burst, tokens + (now - since) * self._admission.new_sessions_per_second)
        taken = tokens >= 1
        self._buckets[host] = (tokens - 1 if taken else tokens, now)
        return taken


# Called several times per session; the cache keeps the most active addresses.
@lru_cache(maxsize=1024)
def plain_address(host: str) -> IPv4Address | IPv6Address:
    """Parse a socket's address: drop the IPv6 zone, and turn an IPv4-mapped IPv6 address into IPv4."""
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def host_of(address: IAddress | None) -> str | None:
    """Return the host by which a connection is counted; `None` for a UNIX socket."""
    host = getattr(address, "host", None)
    return None if host is None else _counted_host(host)


def host_shown(address: str) -> str:
    """Return the host in an address as `shown_address` writes it, as `host_of` would; "" for a UNIX socket."""
    host, colon, port = address.rpartition(":")
    return _counted_host(host.strip("[]")) if colon and port.isdecimal() else ""


@lru_cache(maxsize=1024)
def _counted_host(host: str) -> str:
    try:
        return str(plain_address(host))
    except ValueError:
        return str(host)


def _is_one_of(host: str | None, networks: Sequence[Proxy]) -> bool:
    if host is None:
        return "unix" in networks
    try:
        address = plain_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks if not isinstance(network, str))
