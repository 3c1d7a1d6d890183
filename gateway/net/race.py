"""Happy Eyeballs: connects to the first of several addresses that answers (RFC 8305 §5).

In: endpoints in order of preference.  Out: the protocol of the first that connected; the others are cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from twisted.internet.address import IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IDelayedCall, IProtocol, IProtocolFactory, IReactorTime, IStreamClientEndpoint
from twisted.python.failure import Failure

from gateway.net.network import Address

ATTEMPT_DELAY = 0.25  # seconds, RFC 8305 §8


def interleave(addresses: Sequence[Address]) -> list[Address]:
    """Alternate the address families, starting with the first address's, otherwise in the given order (RFC 8305 §4)."""
    if len(addresses) == 1:
        return list(addresses)
    sixes = [address for address in addresses if isinstance(address, IPv6Address)]
    fours = [address for address in addresses if not isinstance(address, IPv6Address)]
    first: Sequence[Address] = fours
    second: Sequence[Address] = sixes
    if addresses and isinstance(addresses[0], IPv6Address):
        first, second = second, first
    mixed: list[Address] = []
    for index in range(max(len(first), len(second))):
        mixed += [*first[index : index + 1], *second[index : index + 1]]
    return mixed


def race(
    endpoints: Sequence[IStreamClientEndpoint], factory: IProtocolFactory, clock: IReactorTime
) -> Deferred[IProtocol]:
    """Connect to the endpoints in order, 0.25 s apart or as soon as one fails; the first to connect wins.

    The `Deferred` fires with the winner's protocol, or fails with `AllFailed`.  Cancelling it cancels all attempts.
    """
    if len(endpoints) == 1:
        return endpoints[0].connect(factory).addErrback(_alone_failed)
    return _Race(list(endpoints), factory, clock).begin()


def _alone_failed(failure: Failure) -> NoReturn:
    if failure.check(CancelledError, ConnectingCancelledError) is not None:
        raise CancelledError
    raise AllFailed([failure])


class AllFailed(Exception):
    """No endpoint could be connected; `failures` holds one `Failure` for each, in order of failure."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__(f"{len(failures)} connection attempts failed")
        self.failures = failures


class _Race:
    def __init__(self, endpoints: list[IStreamClientEndpoint], factory: IProtocolFactory, clock: IReactorTime) -> None:
        self._waiting = endpoints
        self._factory = factory
        self._clock = clock
        self._running: list[Deferred[IProtocol]] = []
        self._failures: list[Failure] = []
        self._next: IDelayedCall | None = None
        self._over = False
        self._result: Deferred[IProtocol] = Deferred(lambda _: self._stop())

    def begin(self) -> Deferred[IProtocol]:
        self._advance()
        return self._result

    def _advance(self) -> None:
        """Start the next attempt; if none is left and none is running, all have failed."""
        self._next = None
        if self._waiting:
            attempt = self._waiting.pop(0).connect(self._factory)
            self._running.append(attempt)
            if self._waiting:
                self._next = self._clock.callLater(ATTEMPT_DELAY, self._advance)
            attempt.addCallbacks(self._won, self._failed, callbackArgs=(attempt,), errbackArgs=(attempt,))
        elif not self._running:
            self._over = True
            self._result.errback(AllFailed(self._failures))

    def _won(self, protocol: IProtocol, attempt: Deferred[IProtocol]) -> None:
        self._running.remove(attempt)
        if self._over:
            # Two connected in the same reactor turn, or a cancelled one connected anyway.
            protocol.abort()  # type: ignore[attr-defined]  # the gateway's factories build sides
            return
        self._stop()
        self._result.callback(protocol)

    def _failed(self, failure: Failure, attempt: Deferred[IProtocol]) -> None:
        self._running.remove(attempt)
        if self._over:
            return
        self._failures.append(failure)
        if self._next is not None:
            self._next.cancel()
        if self._waiting or not self._running:
            self._advance()

    def _stop(self) -> None:
        self._over = True
        if self._next is not None:
            self._next.cancel()
            self._next = None
        for attempt in list(self._running):
            attempt.cancel()
