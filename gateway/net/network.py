"""The network as the gateway uses it: names to addresses, addresses to endpoints.

In: host names, ports.  Out: `Deferred`s of addresses, client endpoints.  `ReactorNetwork` is the real one; tests pass
one that exists only in memory.
"""

from __future__ import annotations

# Read now, since the resolver's threads cannot when the gateway has shed its rights or has no descriptor left.
import encodings.idna  # noqa: F401  for its effect
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
    """Where addresses come from and how they are reached."""

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """Return the addresses of `host`, best first; none if there are none.  Cancelling it disturbs no one else."""

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """Return the endpoint that connects to `address`, for as long as it is not cancelled."""


# Seconds for which a look-up may be joined.  Twisted's resolver does not answer at all when its thread ends in an
# unforeseen way (no descriptor left, say): then the next session asks anew instead of waiting with the others for ever.
_JOINED_FOR = 30.0
_LAST_PATIENCE = 0.2  # seconds; a pool has ten threads, and an idle one ends at once


@define(slots=True)
class _LookUp:
    """A look-up under way: when it began, and who waits for it."""

    began: float
    waiting: list[Deferred[list[Address]]] = field(factory=list)


class PatientlessThread(Thread):
    """A thread of the resolver's, for whose end nobody waits: `getaddrinfo` may hang much longer than a stop may take.

    It is what a thread pool makes its threads with (`threadFactory`).  The pool waits for each of them when it stops,
    and Python for all that are no daemons.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords | {"daemon": True})

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, but not for long."""
        super().join(_LAST_PATIENCE if timeout is None else timeout)


class ReactorNetwork:
    """The reactor's resolver, which runs in threads and so never blocks, and its TCP.

    Look-ups of one name that are under way at the same time are one look-up: in a reconnect storm a thousand sessions
    ask for the same broker.  Nothing is kept beyond that; the next session asks anew.
    """

    def __init__(self, reactor: Any) -> None:
        """Take the relay's reactor."""
        self._reactor = reactor
        self._under_way: dict[tuple[str, int], _LookUp] = {}

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """See `Network.resolve`."""
        literal = _literal(host, port)
        if literal is not None:
            return succeed([literal])
        key = (host, port)
        now = self._reactor.seconds()
        look_up = self._under_way.get(key)
        is_new = look_up is None or now - look_up.began >= _JOINED_FOR
        if look_up is None or is_new:
            look_up = self._under_way[key] = _LookUp(now)
        # Whoever gives up is forgotten; the look-up goes on, and others may still join it.
        answer: Deferred[list[Address]] = Deferred(look_up.waiting.remove)
        look_up.waiting.append(answer)
        if is_new:
            receiver = _Receiver(partial(self._resolved, key, look_up))
            self._reactor.nameResolver.resolveHostName(receiver, host, port)
        return answer

    def _resolved(self, key: tuple[str, int], look_up: _LookUp, addresses: list[Address]) -> None:
        if self._under_way.get(key) is look_up:
            del self._under_way[key]
        for answer in list(look_up.waiting):
            # What one of them does with it may make another give up.
            if not answer.called:
                answer.callback(list(addresses))

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """See `Network.endpoint`."""
        # No time-out of its own: whoever connects keeps one for all addresses together.
        return TCPEndpoint(self._reactor, address)


@lru_cache(maxsize=32)
def _literal(host: str, port: int) -> Address | None:
    """Return the address that `host` is, if it is one and no name."""
    try:
        version = ip_address(host).version
    except ValueError:
        return None
    return IPv4Address("TCP", host, port) if version == 4 else IPv6Address("TCP", host, port)


@implementer(IResolutionReceiver)
class _Receiver:
    """Collects the addresses of one look-up."""

    def __init__(self, done: Any) -> None:
        self._done = done
        self._addresses: list[Address] = []

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:  # noqa: N803  the interface's name
        """Nothing has come yet."""

    def addressResolved(self, address: IAddress) -> None:
        """Keep an address."""
        if isinstance(address, IPv4Address | IPv6Address) and address not in self._addresses:
            self._addresses.append(address)

    def resolutionComplete(self) -> None:
        """Hand over what came."""
        self._done(self._addresses)


def shown_address(address: IAddress | None) -> str:
    """Return an address as `host:port`, with brackets for IPv6; that of a UNIX socket as its path, if it has one."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return os.fsdecode(getattr(address, "name", None) or "local")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
