"""Who is there: which Client Identifiers have sessions, from where, and how often each comes.

In: CONNECTs and ends of sessions.  Out: nothing, sessions that are to end, or `Refusal`.  What is kept is bounded by
the sessions that stand, and by a number of names for the rates.

A broker ends a session when another one with its Client Identifier comes.  So whoever knows a sensor's name could throw
it out, and two sensors that were given one name throw each other out, as fast as they can reconnect.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from hashlib import sha256
from typing import Generic, TypeAlias, TypeVar

from gateway.config import Devices
from gateway.errors import EndReason, Refusal

# Names whose rate is kept; those that have not come for longest are forgotten first.
_MAX_NAMES = 100_000
# A longer name is known by its digest: it could be of 64 KiB.
_LONGEST_NAME = 64
_SECONDS = 60.0
_TAKEOVER_COST = 10.0

_S = TypeVar("_S", bound=Hashable)
# A name; or, for attempts at its password, the address that they come from and the name.
_Key: TypeAlias = str | bytes | tuple[str, str | bytes]


class Presence(Generic[_S]):
    """Counts sessions by Client Identifier and decides about new ones; `ended` says whether one is over."""

    def __init__(self, seconds: Callable[[], float], ended: Callable[[_S], bool]) -> None:
        self._seconds = seconds
        self._ended = ended
        self._standing: dict[str | bytes, dict[_S, str]] = {}
        self._names: dict[_S, str | bytes] = {}
        # Token buckets (tokens left, when that was so); a full bucket is the same as none.
        self._buckets: dict[_Key, tuple[float, float]] = {}

    def judge(self, client_identifier: str, address: str, devices: Devices) -> None:
        """Raise Refusal if a session with this name could not be entered now; nothing is counted."""
        if client_identifier:
            self._judge(_name(client_identifier), address, devices)

    def attempt(self, client_identifier: str, address: str, devices: Devices) -> None:
        """Count an attempt at a device's password.  Raises Refusal when there were too many.

        Counted for each address apart: a stranger who guesses must not lock out the device that knows.
        """
        if devices.connects_per_minute:
            key = (address, _name(client_identifier))
            self._fill(key, self._taken(key, 1.0, devices))

    def enter(self, session: _S, client_identifier: str, address: str, devices: Devices) -> list[_S]:
        """Count a session in; return those that it takes the place of.

        A session without a name is nobody's. Raises Refusal, and then the session is not counted.
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
        """Count a session out, if it was in."""
        name = self._names.pop(session, None)
        if name is not None:
            standing = self._standing[name]
            del standing[session]
            if not standing:
                del self._standing[name]

    def sweep(self, devices: Devices) -> None:
        """Forget the names whose rate has recovered."""
        rate, now = devices.connects_per_minute / _SECONDS, self._seconds()
        burst = _burst(devices)
        full = [name for name, (tokens, since) in self._buckets.items() if tokens + (now - since) * rate >= burst]
        for name in full:
            del self._buckets[name]

    def _judge(self, name: str | bytes, address: str, devices: Devices) -> tuple[list[_S], float | None]:
        """Return the sessions of others with this name, and what is left in its bucket.  Raises Refusal."""
        standing = {each: host for each, host in self._standing.get(name, {}).items() if not self._ended(each)}
        others = [each for each, host in standing.items() if host != address]
        if others and devices.same_client_id == "refuse":
            where = ", ".join(sorted({standing[each] or "a local socket" for each in others}))
            raise Refusal(EndReason.CLIENT_ID_IN_USE, f"its session is from {where}", 2, 0x85)
        if not devices.connects_per_minute:
            return others, None
        cost = min(_TAKEOVER_COST, _burst(devices)) if standing else 1.0
        return others, self._taken(name, cost, devices)

    def _taken(self, key: _Key, cost: float, devices: Devices) -> float:
        """Return what is left in a bucket when `cost` is taken from it.  Raises Refusal when there is not so much."""
        burst, now = _burst(devices), self._seconds()
        tokens, since = self._buckets.get(key, (burst, now))
        tokens = min(burst, tokens + max(0.0, now - since) * devices.connects_per_minute / _SECONDS)
        if tokens < cost:
            detail = f"more often than {devices.connects_per_minute:g} times a minute"
            raise Refusal(EndReason.CLIENT_ID_PACED, detail, 3, 0x9F)
        return tokens - cost

    def _fill(self, key: _Key, tokens: float) -> None:
        self._buckets.pop(key, None)  # so that it is the youngest again
        while len(self._buckets) >= _MAX_NAMES:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[key] = (tokens, self._seconds())


def _burst(devices: Devices) -> float:
    return max(1.0, devices.connects_per_minute)


def _name(client_identifier: str) -> str | bytes:
    if len(client_identifier) <= _LONGEST_NAME:
        return client_identifier
    return sha256(client_identifier.encode()).digest()
