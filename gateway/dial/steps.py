"""The steps of one connection attempt: resolve, connect, TLS handshake.

In: a configured broker, then its addresses, then a connection.  Out: the result of each step within its timeout, or
`UpstreamFailure`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from gateway.config import Timeouts
from gateway.config.proxies import ProxyServer
from gateway.dial.proxy import ProxyConnection, TLSLayer
from gateway.disk import EXHAUSTED
from gateway.errors import EndReason, UpstreamFailure
from gateway.net.network import Address, Network, shown_address
from gateway.net.race import AllFailed, interleave, race
from gateway.net.websocket import Request
from gateway.relay.upstream import UpstreamProtocol
from gateway.relay.websocket import WebSocketUpstream
from gateway.session.record import Peer

_T = TypeVar("_T")
# Of this machine: nothing was asked of the broker.  EAGAIN is a lack of threads; EADDRNOTAVAIL of local ports, or for
# IPv6 of an address.
_EXHAUSTED = EXHAUSTED | {errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL}


async def resolve(network: Network, host: str, port: int, clock: IReactorTime, timeouts: Timeouts) -> list[Address]:
    """Return the addresses of a broker or a proxy in the order in which to try them.  Raises `UpstreamFailure`."""
    try:
        addresses = await within(timeouts.dns, network.resolve(host, port), clock)
    except TimeoutError:
        raise UpstreamFailure(EndReason.DNS_FAILED, f"{host}: no answer within {timeouts.dns:g} s") from None
    except OSError as problem:
        raise UpstreamFailure(
            EndReason.OUT_OF_RESOURCES if problem.errno in _EXHAUSTED else EndReason.DNS_FAILED,
            f"{host}: {problem.strerror}",
        ) from None
    if not addresses:
        raise UpstreamFailure(EndReason.DNS_FAILED, f"{host}: no address")
    return interleave(addresses)


async def connect(
    network: Network,
    addresses: Sequence[Address],
    build: Callable[[], _T],
    clock: IReactorTime,
    timeouts: Timeouts,
) -> _T:
    """Return a connection to the address that answers first.  Raises `UpstreamFailure`."""
    endpoints = [network.endpoint(address) for address in addresses]
    factory = _ConnectionFactory(build)
    try:
        protocol: Any = await within(timeouts.tcp, race(endpoints, factory, clock), clock)
    except TimeoutError:
        shown = ", ".join(shown_address(address) for address in addresses)
        raise UpstreamFailure(EndReason.TCP_TIMEOUT, f"{shown}: no answer within {timeouts.tcp:g} s") from None
    except AllFailed as failed:
        raise _tcp_failure(failed.failures) from None
    finally:
        factory.close()
    connection: _T = protocol  # the factory builds nothing else
    return connection


async def open_tunnel(
    connection: ProxyConnection | TLSLayer, proxy: ProxyServer, clock: IReactorTime, timeouts: Timeouts
) -> UpstreamProtocol:
    """Wait until the proxy has opened a tunnel to the broker.  Raises `UpstreamFailure`.

    Most of the time a silent proxy waits for the broker, so this counts as the broker's timeout.  One that has not even
    said that it speaks SOCKS5 or TLS waits for no broker.
    """
    try:
        return await within(timeouts.tcp, connection.opened, clock)
    except TimeoutError:
        detail = f"{proxy.address} did not open a tunnel within {timeouts.tcp:g} s"
        if proxy.scheme != "http" and not connection.has_answered:
            detail += "; it has sent nothing: check the scheme"
            raise UpstreamFailure(EndReason.PROXY_UNREACHABLE, detail) from None
        raise UpstreamFailure(EndReason.TCP_TIMEOUT, detail) from None


async def handshake(protocol: UpstreamProtocol, clock: IReactorTime, timeouts: Timeouts) -> Peer:
    """Wait until the broker is verified.  Raises `UpstreamFailure`."""
    try:
        return await within(timeouts.tls, protocol.verified, clock)
    except TimeoutError:
        raise UpstreamFailure(
            EndReason.TLS_TIMEOUT, f"the handshake did not finish within {timeouts.tls:g} s"
        ) from None


async def open_websocket(
    protocol: WebSocketUpstream, request: Request, clock: IReactorTime, timeouts: Timeouts
) -> None:
    """Wait until the verified broker has opened a WebSocket.  Raises `UpstreamFailure`."""
    try:
        await within(timeouts.tls, protocol.upgrade(request), clock)
    except TimeoutError:
        detail = f"no answer to the opening handshake within {timeouts.tls:g} s"
        raise UpstreamFailure(EndReason.WEBSOCKET_REFUSED, detail) from None


async def within(seconds: float, awaited: Deferred[_T], clock: IReactorTime) -> _T:
    """Return the result of `awaited`.  Raises `TimeoutError` after `seconds`, and cancels it.

    Like `Deferred.addTimeout`, without its callbacks, which cost more than everything else here.
    """
    if awaited.called:
        return await awaited
    timer = clock.callLater(seconds, awaited.cancel)
    try:
        return await awaited
    except CancelledError:
        if timer.active():
            raise
        raise TimeoutError from None
    finally:
        if timer.active():
            timer.cancel()


def _tcp_failure(failures: list[Failure]) -> UpstreamFailure:
    """Return the reason of the address that failed first, which was the preferred one, and the details of all.

    What this machine lacks is the reason only if no address was tried at all.
    """
    reasons = sorted(map(_tcp_reason, failures), key=EndReason.OUT_OF_RESOURCES.__eq__)
    details = dict.fromkeys(_tcp_words(failure) for failure in failures)
    return UpstreamFailure(reasons[0], "; ".join(details))


def _tcp_reason(failure: Failure) -> EndReason:
    if getattr(failure.value, "osError", None) in _EXHAUSTED:
        return EndReason.OUT_OF_RESOURCES
    if failure.check(error.ConnectionRefusedError):
        return EndReason.TCP_REFUSED
    if failure.check(error.TimeoutError, error.TCPTimedOutError):
        return EndReason.TCP_TIMEOUT
    return EndReason.TCP_UNREACHABLE


def _tcp_words(failure: Failure) -> str:
    """Return the kernel's words, which Twisted's exceptions repeat in words of their own."""
    number = getattr(failure.value, "osError", None)
    return os.strerror(number) if isinstance(number, int) and number else str(failure.value)


class _ConnectionFactory(Factory):
    noisy = False

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build: Callable[[], Any] | None = build

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the protocol for a connection that stands; `None`, which closes it, when the race is over."""
        del addr
        return self._build() if self._build is not None else None

    def close(self) -> None:
        """End the race: connections that are established later are closed."""
        self._build = None
