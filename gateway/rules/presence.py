"""Presence: which Client Identifiers at the broker have sessions, from which address, and how often each connects.

In: CONNECTs and ends of sessions.  Out: nothing, sessions to end, or `Refusal`.  Memory is bounded by the number of
sessions, and by a fixed number of names for the rates.

A broker ends a session when another client connects with its Client Identifier.  So anyone who knows a sensor's name
could disconnect it, and two sensors with the same name disconnect each other as fast as they can reconnect.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from hashlib import sha256
from typing import Generic, TypeAlias, TypeVar

from attrs import Factory, field, frozen

from gateway.config import Devices
from gateway.errors import EndReason, Refusal
from gateway.pieces import Pieces
from gateway.rules.names import Brokers

# Names whose rate is kept; the least recently used are forgotten first.
_MAX_NAMES = 100_000
# Names looked at in one sweep: a millisecond's work.
_CHECKED_AT_A_TIME = 5_000
# A longer name, up to 64 KiB, is stored as its digest.
_LONGEST_NAME = 64
_SECONDS = 60.0
# What a CONNECT costs while a session with its name is established.  From another address it may be a stranger, or two
# devices with one name; from the same address it is most likely the device itself, which wakes without having said
# that it went to sleep.
_TAKEOVER_COST = 10.0
_RETURN_COST = 2.0

_S = TypeVar("_S", bound=Hashable)
_Name: TypeAlias = str | bytes
# A name and where it counts: at brokers; or, for password attempts, from an address, and None for all names together.
_Key: TypeAlias = tuple[_Name | None, Brokers | str]
_Buckets: TypeAlias = dict[_Key, tuple[float, float]]


@frozen
class Holder:
    """A device as the broker knows it: its Client Identifier there, its address, the brokers it may be led to."""

    client_identifier: str
    address: str
    brokers: Brokers
    # The Client Identifier, or its digest if it is long.
    name: _Name = field(
        init=False, eq=False, default=Factory(lambda holder: _name(holder.client_identifier), takes_self=True)
    )


class Holders(Generic[_S]):
    """Who has which Client Identifier at which brokers.  Names at different brokers are different names."""

    def __init__(self) -> None:
        self._by_name: dict[_Name, dict[_S, Holder]] = {}
        self._names: dict[_S, _Name] = {}

    def __len__(self) -> int:
        """Return how many have a name."""
        return len(self._names)

    def assign(self, who: _S, holder: Holder) -> None:
        """Add `who` under this Client Identifier; forget any other."""
        self.leave(who)
        self._by_name.setdefault(holder.name, {})[who] = holder
        self._names[who] = holder.name

    def leave(self, who: _S) -> None:
        """Remove `who`, if it has a name."""
        name = self._names.pop(who, None)
        if name is not None:
            holders = self._by_name[name]
            del holders[who]
            if not holders:
                del self._by_name[name]

    def at(self, holder: Holder) -> dict[_S, Holder]:
        """Return those that have this name at one of these brokers."""
        return {
            who: each
            for who, each in self._by_name.get(holder.name, {}).items()
            if not each.brokers.isdisjoint(holder.brokers)
        }


class Presence(Generic[_S]):
    """Counts sessions by Client Identifier at the broker and admits or refuses new ones.

    `ended` says whether a session has ended.
    """

    def __init__(self, seconds: Callable[[], float], ended: Callable[[_S], bool]) -> None:
        self._seconds = seconds
        self._ended = ended
        self.holders: Holders[_S] = Holders()
        # Token buckets (tokens left, time of that count); a full bucket is the same as none.
        self._buckets: _Buckets = {}
        # Apart, so that those who come with many names do not push these out.
        self._attempts: _Buckets = {}
        # What the sweep has not come to yet.
        self._unchecked: list[_Key] = []
        self._unchecked_attempts: list[_Key] = []

    def judge(self, holder: Holder, devices: Devices) -> None:
        """Raise Refusal if `enter` would refuse a session of this holder now; nothing is counted."""
        if holder.client_identifier:
            self._judge(holder, devices)

    def attempt(self, client_identifier: str, address: str, devices: Devices) -> None:
        """Count an attempt at a device's password.  Raises Refusal when there were too many.

        Attempts are counted per address, so that a stranger who guesses does not lock out the device: all of them for
        each name, and the wrong ones for all names together.
        """
        if devices.connects_per_minute:
            self.check_guesses(address, devices)
            key = (_name(client_identifier), address)
            self._fill(self._attempts, key, self._taken(self._attempts, key, 1.0, devices))

    def check_guesses(self, address: str, devices: Devices) -> None:
        """Raise Refusal if this address has sent too many wrong passwords."""
        if devices.connects_per_minute:
            self._taken(self._attempts, (None, address), 1.0, devices)

    def wrong(self, address: str, devices: Devices) -> None:
        """Count a wrong password."""
        if devices.connects_per_minute:
            key = (None, address)
            self._fill(self._attempts, key, max(0.0, self._left(self._attempts, key, devices) - 1.0))

    def enter(self, session: _S, holder: Holder, devices: Devices) -> list[_S]:
        """Add a session; return the sessions that it takes over.

        A session without a Client Identifier is not counted until `assign`. Raises Refusal; the session is then not
        counted.
        """
        if not holder.client_identifier:
            return []
        others, tokens = self._judge(holder, devices)
        if tokens is not None:
            self._fill(self._buckets, (holder.name, holder.brokers), tokens)
        self.assign(session, holder)
        return others if devices.same_client_id == "take-over" else []

    def assign(self, session: _S, holder: Holder) -> None:
        """Add a session under the Client Identifier that it has, or that the broker assigned; forget any other."""
        self.holders.assign(session, holder)

    def leave(self, session: _S) -> None:
        """Remove a session if it was counted."""
        self.holders.leave(session)

    def established(self, holder: Holder) -> dict[_S, Holder]:
        """Return the sessions that have not ended and have this name at one of these brokers."""
        return {session: each for session, each in self.holders.at(holder).items() if not self._ended(session)}

    def sweep(self, devices: Devices) -> Pieces[None]:
        """Forget names whose rate has recovered: of some thousand names each time, since there may be many."""
        self._unchecked = self._checked(self._buckets, self._unchecked, devices)
        yield
        self._unchecked_attempts = self._checked(self._attempts, self._unchecked_attempts, devices)
        yield

    def _checked(self, buckets: _Buckets, unchecked: list[_Key], devices: Devices) -> list[_Key]:
        """Forget those of the next names whose buckets are full; return the names that are still to be checked."""
        rate, now = devices.connects_per_minute / _SECONDS, self._seconds()
        burst = _burst(devices)
        unchecked = unchecked or list(buckets)
        for key in unchecked[-_CHECKED_AT_A_TIME:]:
            found = buckets.get(key)
            if found is not None and found[0] + (now - found[1]) * rate >= burst:
                del buckets[key]
        del unchecked[-_CHECKED_AT_A_TIME:]
        return unchecked

    def _judge(self, holder: Holder, devices: Devices) -> tuple[list[_S], float | None]:
        """Return the sessions with this name from other addresses, and the tokens left for it.  Raises Refusal."""
        standing = self.established(holder)
        others = [session for session, each in standing.items() if each.address != holder.address]
        if others and devices.same_client_id == "refuse":
            where = ", ".join(sorted({standing[each].address or "a local socket" for each in others}))
            raise Refusal(EndReason.CLIENT_ID_IN_USE, f"it has a session from {where}", 2, 0x85)
        if not devices.connects_per_minute:
            return others, None
        cost = _TAKEOVER_COST if others else _RETURN_COST if standing else 1.0
        return others, self._taken(self._buckets, (holder.name, holder.brokers), cost, devices)

    def _left(self, buckets: _Buckets, key: _Key, devices: Devices) -> float:
        """Return the tokens in a bucket."""
        burst, now = _burst(devices), self._seconds()
        tokens, since = buckets.get(key, (burst, now))
        return min(burst, tokens + max(0.0, now - since) * devices.connects_per_minute / _SECONDS)

    def _taken(self, buckets: _Buckets, key: _Key, cost: float, devices: Devices) -> float:
        """Return the tokens left after taking `cost` from a bucket.  Raises Refusal when there are not enough."""
        tokens = self._left(buckets, key, devices)
        counted = "" if cost == 1.0 else f"; one that ends an established session counts as {cost:g}"
        cost = min(cost, _burst(devices))
        if tokens < cost:
            detail = f"more than {devices.connects_per_minute:g} CONNECTs a minute{counted}"
            raise Refusal(EndReason.CLIENT_ID_PACED, detail, 3, 0x9F)
        return tokens - cost

    def _fill(self, buckets: _Buckets, key: _Key, tokens: float) -> None:
        buckets.pop(key, None)  # move it to the end: most recently used
        while len(buckets) >= _MAX_NAMES:
            del buckets[next(iter(buckets))]
        buckets[key] = (tokens, self._seconds())


def _burst(devices: Devices) -> float:
    return max(1.0, devices.connects_per_minute)


def _name(client_identifier: str) -> str | bytes:
    if len(client_identifier) <= _LONGEST_NAME:
        return client_identifier
    return sha256(client_identifier.encode()).digest()
