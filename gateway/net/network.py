"""Resolves names and provides client endpoints.

In: host names, ports.  Out: `Deferred`s of addresses, client endpoints.  `ReactorNetwork` is the real one; tests use
one in memory.
"""

from __future__ import annotations

# Import now: the resolver's threads cannot once privileges are dropped or no descriptor is left.
import encodings.idna  # noqa: F401  imported for its side effect
import errno
import os
import socket
from functools import lru_cache, partial
from ipaddress import ip_address
from threading import Thread
from typing import Any, Protocol, TypeAlias

from attrs import define, field
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IAddress, IStreamClientEndpoint
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from gateway.net.connecting import TCPEndpoint

Address = IPv4Address | IPv6Address
_Found: TypeAlias = list[tuple[int, int, int, str, tuple[Any, ...]]]


class Network(Protocol):
    """Resolves hosts and connects to addresses."""

    def resolve(self, host: str, port: int) -> Deferred[list[Address]]:
        """Return the addresses of `host`, best first, possibly none.  Cancelling does not affect other callers.

        Fails with `OSError` if this machine could not even ask.
        """

    def endpoint(self, address: Address) -> IStreamClientEndpoint:
        """Return an endpoint that connects to `address`, without a timeout."""


# Seconds for which callers may join a running lookup.  One whose thread dies unexpectedly never answers; then the next
# session starts a new lookup instead of waiting too.
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
    """The machine's resolver, in the reactor's threads, so that it never blocks, and the reactor's TCP.

    Not Twisted's: it gives no answer if `getaddrinfo` fails with `OSError`, as without a free descriptor.

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
            try:
                found = deferToThreadPool(
                    self._reactor,
                    self._reactor.getThreadPool(),
                    socket.getaddrinfo,
                    host,
                    port,
                    socket.AF_UNSPEC,
                    socket.SOCK_STREAM,
                )
            except RuntimeError as error:
                # No thread could be started: the kernel says EAGAIN, which Python leaves out.
                return fail(OSError(errno.EAGAIN, str(error)))
            look_up = self.under_way[key] = _LookUp(now)
            found.addCallbacks(_addresses, _no_addresses)
            found.addBoth(partial(self._resolved, key, look_up))
        # A caller that cancels is removed; the lookup continues, and others may still join it.
        answer: Deferred[list[Address]] = Deferred(look_up.waiting.remove)
        look_up.waiting.append(answer)
        return answer

    def _resolved(self, key: tuple[str, int], look_up: _LookUp, result: list[Address] | Failure) -> None:
        if self.under_way.get(key) is look_up:
            del self.under_way[key]
        for answer in list(look_up.waiting):
            # One caller's reaction may cancel another.
            if answer.called:
                continue
            if isinstance(result, Failure):
                answer.errback(_copied(result))
            else:
                answer.callback(list(result))

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


def _addresses(found: _Found) -> list[Address]:
    addresses: list[Address] = []
    for family, _, _, _, where in found:
        if family == socket.AF_INET:
            addresses.append(IPv4Address("TCP", *where))
        elif family == socket.AF_INET6:
            addresses.append(IPv6Address("TCP", *where))
    return list(dict.fromkeys(addresses))


def _no_addresses(failure: Failure) -> list[Address]:
    """Return none for a name that has none; any other failure is one of this machine."""
    failure.trap(socket.gaierror)
    if isinstance(failure.value, socket.gaierror) and failure.value.errno == socket.EAI_MEMORY:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    # Without a free descriptor, glibc may also say that there is no such name.  Then this fails, too.
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    return []


def _copied(failure: Failure) -> Failure:
    """Return the failure for one more caller: an exception references the frames of whoever awaits it."""
    error = failure.value
    return Failure(OSError(error.errno, error.strerror) if isinstance(error, OSError) else OSError(0, repr(error)))


def shown_address(address: IAddress | None) -> str:
    """Return an address as `host:port`, with brackets for IPv6; for a UNIX socket, its path or `local`."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return os.fsdecode(getattr(address, "name", None) or "local")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
