"""Resolves names and provides client endpoints.

In: host names, ports.  Out: `Deferred`s of addresses, client endpoints.  `ReactorNetwork` is the real one; tests use
one in memory.
"""

from __future__ import annotations

# Import now: the resolver's threads cannot once privileges are dropped or no descriptor is left.
import encodings.idna  # noqa: F401  imported for its side effect
import os
from functools import lru_cache, partial
from ipaddress import ip_address
from threading import Thread
from typing import Any, Protocol

from attrs import define, field
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IHostResolution, IResolutionReceiver, IStreamClientEndpoint
from zope.interface import implementer

from gateway.net.connecting import TCPEndpoint

Address = IPv4Address | IPv6Address


class Network(Protocol):
    """Resolves hosts and connects to addresses."""

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """Return the addresses of `host`, best first, possibly none.  Cancelling does not affect other callers."""

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """Return an endpoint that connects to `address`, without a timeout."""


# Seconds for which callers may join a running lookup.  Twisted's resolver never answers if its thread dies unexpectedly
# (for example without a free descriptor); after this time the next session starts a new lookup instead of waiting too.
_JOINED_FOR = 30.0
_LAST_PATIENCE = 0.2  # seconds per thread; a pool has ten threads, and idle ones end at once


@define(slots=True)
class _LookUp:
    """A running lookup: when it began, and its waiting callers."""

    began: float
    waiting: list[Deferred[list[Address]]] = field(factory=list)


class PatientlessThread(Thread):
    """A resolver thread that does not delay a stop, although `getaddrinfo` may hang for long.

    A thread pool creates its threads with it (`threadFactory`).  When it stops, the pool joins each thread, and Python
    joins all that are not daemons.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords | {"daemon": True})

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, but only briefly."""
        super().join(_LAST_PATIENCE if timeout is None else timeout)


class ReactorNetwork:
    """The reactor's resolver, which runs in threads and never blocks, and its TCP.

    Concurrent lookups of one name share one lookup: in a reconnect storm, a thousand sessions resolve the same broker.
    Results are not cached.
    """

    def __init__(self, reactor: Any) -> None:
        """Take the relay's reactor."""
        self._reactor = reactor
        self.under_way: dict[tuple[str, int], _LookUp] = {}

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """See `Network.resolve`."""
        literal = _literal(host, port)
        if literal is not None:
            return succeed([literal])
        key = (host, port)
        now = self._reactor.seconds()
        look_up = self.under_way.get(key)
        is_new = look_up is None or now - look_up.began >= _JOINED_FOR
        if look_up is None or is_new:
            look_up = self.under_way[key] = _LookUp(now)
        # A caller that cancels is removed; the lookup continues, and others may still join it.
        answer: Deferred[list[Address]] = Deferred(look_up.waiting.remove)
        look_up.waiting.append(answer)
        if is_new:
            receiver = _Receiver(partial(self._resolved, key, look_up))
            self._reactor.nameResolver.resolveHostName(receiver, host, port)
        return answer

    def _resolved(self, key: tuple[str, int], look_up: _LookUp, addresses: list[Address]) -> None:
        if self.under_way.get(key) is look_up:
            del self.under_way[key]
        for answer in list(look_up.waiting):
            # One caller's reaction may cancel another.
            if not answer.called:
                answer.callback(list(addresses))

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """See `Network.endpoint`."""
        # No timeout here: the caller has one for all addresses together.
        return TCPEndpoint(self._reactor, address)


@lru_cache(maxsize=32)
def _literal(host: str, port: int) -> Address | None:
    """Return the address if `host` is an IP address, not a name."""
    try:
        version = ip_address(host).version
    except ValueError:
        return None
    return IPv4Address("TCP", host, port) if version == 4 else IPv6Address("TCP", host, port)


@implementer(IResolutionReceiver)
class _Receiver:
    """Collects the addresses of one lookup."""

    def __init__(self, done: Any) -> None:
        self._done = done
        self._addresses: list[Address] = []

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:  # noqa: N803  the interface's name
        """Nothing to do."""

    def addressResolved(self, address: IAddress) -> None:
        """Add an address."""
        if isinstance(address, IPv4Address | IPv6Address) and address not in self._addresses:
            self._addresses.append(address)

    def resolutionComplete(self) -> None:
        """Hand over the addresses."""
        self._done(self._addresses)


def shown_address(address: IAddress | None) -> str:
    """Return an address as `host:port`, with brackets for IPv6; for a UNIX socket, its path or `local`."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return os.fsdecode(getattr(address, "name", None) or "local")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
