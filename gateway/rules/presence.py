"""Presence: which Client Identifiers have sessions, from which address, and how often each connects.

In: CONNECTs and ends of sessions.  Out: nothing, sessions to end, or `Refusal`.  Memory is bounded by the number of
sessions, and by a fixed number of names for the rates.

A broker ends a session when another client connects with its Client Identifier.  So anyone who knows a sensor's name
could disconnect it, and two sensors with the same name disconnect each other as fast as they can reconnect.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from hashlib import sha256
from typing import Generic, TypeAlias, TypeVar

from gateway.config import Devices
from gateway.errors import EndReason, Refusal

# Names whose rate is kept; the least recently used are forgotten first.
_MAX_NAMES = 100_000
# A longer name, up to 64 KiB, is stored as its digest.
_LONGEST_NAME = 64
_SECONDS = 60.0
_TAKEOVER_COST = 10.0

_S = TypeVar("_S", bound=Hashable)
# A name; or, for password attempts, the address and the name.
_Key: TypeAlias = str | bytes | tuple[str, str | bytes]


class Presence(Generic[_S]):
    """Counts sessions by Client Identifier and admits or refuses new ones; `ended` says whether a session has ended."""

    def __init__(self, seconds: Callable[[], float], ended: Callable[[_S], bool]) -> None:
        self._seconds = seconds
        self._ended = ended
        self._standing: dict[str | bytes, dict[_S, str]] = {}
        self._names: dict[_S, str | bytes] = {}
        # Token buckets (tokens left, time of that count); a full bucket is the same as none.
        self._buckets: dict[_Key, tuple[float, float]] = {}

    def judge(self, client_identifier: str, address: str, devices: Devices) -> None:
        """Raise Refusal if `enter` would refuse a session with this name now; nothing is counted."""
        if client_identifier:
            self._judge(_name(client_identifier), address, devices)

    def attempt(self, client_identifier: str, address: str, devices: Devices) -> None:
        """Count an attempt at a device's password.  Raises Refusal when there were too many.

        Attempts are counted per address, so that a stranger who guesses does not lock out the device.
        """
        if devices.connects_per_minute:
            key = (address, _name(client_identifier))
            self._fill(key, self._taken(key, 1.0, devices))

    def enter(self, session: _S, client_identifier: str, address: str, devices: Devices) -> list[_S]:
        """Add a session; return the sessions that it takes over.

        A session without a Client Identifier is not counted. Raises Refusal; the session is then not counted.
        """
        if not client_identifier:
            return []
        name = _name(client_identifier)
        others, tokens = self._judge(name, address, devices)
        if tokens is not None:
            self._fill(name, tokens)
        self._standing.setdefault(name, {})[session] = address
        self._names[session] = name
        return others if devices.same_client_id == "take-over" else []

    def leave(self, session: _S) -> None:
        """Remove a session if it was counted."""
        name = self._names.pop(session, None)
        if name is not None:
            standing = self._standing[name]
            del standing[session]
            if not standing:
                del self._standing[name]

    def sweep(self, devices: Devices) -> None:
        """Forget names whose rate has recovered."""
        rate, now = devices.connects_per_minute / _SECONDS, self._seconds()
        burst = _burst(devices)
        full = [name for name, (tokens, since) in self._buckets.items() if tokens + (now - since) * rate >= burst]
        for name in full:
            del self._buckets[name]

    def _judge(self, name: str | bytes, address: str, devices: Devices) -> tuple[list[_S], float | None]:
        """Return the sessions with this name from other addresses, and the tokens left for it.  Raises Refusal."""
        standing = {each: host for each, host in self._standing.get(name, {}).items() if not self._ended(each)}
        others = [each for each, host in standing.items() if host != address]
        if others and devices.same_client_id == "refuse":
            where = ", ".join(sorted({standing[each] or "a local socket" for each in others}))
            raise Refusal(EndReason.CLIENT_ID_IN_USE, f"it has a session from {where}", 2, 0x85)
        if not devices.connects_per_minute:
            return others, None
        cost = min(_TAKEOVER_COST, _burst(devices)) if standing else 1.0
        return others, self._taken(name, cost, devices)

    def _taken(self, key: _Key, cost: float, devices: Devices) -> float:
        """Return the tokens left after taking `cost` from a bucket.  Raises Refusal when there are not enough."""
        burst, now = _burst(devices), self._seconds()
        tokens, since = self._buckets.get(key, (burst, now))
        tokens = min(burst, tokens + max(0.0, now - since) * devices.connects_per_minute / _SECONDS)
        if tokens < cost:
            detail = f"more often than {devices.connects_per_minute:g} times a minute"
            raise Refusal(EndReason.CLIENT_ID_PACED, detail, 3, 0x9F)
        return tokens - cost

    def _fill(self, key: _Key, tokens: float) -> None:
        self._buckets.pop(key, None)  # move it to the end: most recently used
        while len(self._buckets) >= _MAX_NAMES:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[key] = (tokens, self._seconds())


def _burst(devices: Devices) -> float:
    return max(1.0, devices.connects_per_minute)


def _name(client_identifier: str) -> str | bytes:
    if len(client_identifier) <= _LONGEST_NAME:
        return client_identifier
    return sha256(client_identifier.encode()).digest()
