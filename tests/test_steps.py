"""The steps of a connection attempt by themselves: their results, timeouts and words, on a clock of the test's own."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.config import Timeouts
from gateway.config.proxies import ProxyServer
from gateway.dial.steps import connect, handshake, open_tunnel, open_websocket, resolve, within
from gateway.errors import EndReason, UpstreamFailure

TIMEOUTS = Timeouts(dns=3.0, tcp=7.0, tls=7.0)
FOUR, OTHER_FOUR = IPv4Address("TCP", "192.0.2.1", 8883), IPv4Address("TCP", "192.0.2.2", 8883)
SIX = IPv6Address("TCP", "2001:db8::1", 8883)


class Endpoint:
    """An address, and what comes of connecting to it."""

    def __init__(self, outcome: Deferred[Any] | None) -> None:
        self.outcome = outcome
        self.factory: Any = None

    def connect(self, factory: Any) -> Deferred[Any]:
        """See IStreamClientEndpoint."""
        self.factory = factory
        return succeed(factory.buildProtocol(None)) if self.outcome is None else self.outcome


class Network:
    """A resolver, and one endpoint for each address."""

    def __init__(self, *endpoints: Endpoint, resolved: Deferred[Any] | None = None) -> None:
        self.endpoints = list(endpoints)
        self.resolved: Deferred[Any] = Deferred() if resolved is None else resolved

    def resolve(self, host: str, port: int) -> Deferred[Any]:
        """See `gateway.net.network.Network`."""
        return self.resolved

    def endpoint(self, address: Any) -> Any:
        """See `gateway.net.network.Network`."""
        return self.endpoints.pop(0)


def begun(step: Coroutine[Any, Any, Any]) -> tuple[list[Any], Deferred[Any]]:
    """Start a step; return where its result or failure will be."""
    results: list[Any] = []
    deferred = Deferred.fromCoroutine(step)
    deferred.addBoth(results.append)
    return results, deferred


def failed(results: list[Any]) -> tuple[EndReason, str]:
    """Return how a step failed."""
    (failure,) = results
    assert isinstance(failure, Failure)
    assert isinstance(failure.value, UpstreamFailure)
    return failure.value.reason, failure.value.detail


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_is_there_already_needs_no_timer() -> None:
    """Most steps of a storm end so."""
    no_timers: Any = object()
    assert begun(within(5.0, succeed("it"), no_timers))[0] == ["it"]


def test_what_comes_in_time_leaves_no_timer(clock: Clock) -> None:
    awaited: Deferred[str] = Deferred()
    results, _ = begun(within(5.0, awaited, clock))
    clock.advance(4.9)
    awaited.callback("it")
    assert results == ["it"]
    assert clock.getDelayedCalls() == []


def test_what_does_not_come_is_cancelled(clock: Clock) -> None:
    cancelled: list[Any] = []
    results, _ = begun(within(5.0, Deferred(cancelled.append), clock))
    clock.advance(4.9)
    assert not results
    clock.advance(0.2)
    assert results[0].type is TimeoutError
    assert len(cancelled) == 1
    assert clock.getDelayedCalls() == []


def test_who_gives_up_is_told_of_no_timeout(clock: Clock) -> None:
    """And leaves no timer."""
    results, step = begun(within(5.0, Deferred(), clock))
    step.cancel()
    assert results[0].type is CancelledError
    assert clock.getDelayedCalls() == []


def test_the_families_of_a_name_take_turns(clock: Clock) -> None:
    """RFC 8305 §4."""
    network: Any = Network(resolved=succeed([FOUR, OTHER_FOUR, SIX]))
    assert begun(resolve(network, "b", 8883, clock, TIMEOUTS))[0] == [[FOUR, SIX, OTHER_FOUR]]


def test_a_name_without_an_answer(clock: Clock) -> None:
    """No address is one failure, silence another; both name the host."""
    empty: Any = Network(resolved=succeed([]))
    assert failed(begun(resolve(empty, "b.test", 1, clock, TIMEOUTS))[0]) == (
        EndReason.DNS_FAILED,
        "b.test: no address",
    )
    silent: Any = Network()
    results, _ = begun(resolve(silent, "b.test", 1, clock, TIMEOUTS))
    clock.advance(2.9)
    assert not results
    clock.advance(0.2)
    assert failed(results) == (EndReason.DNS_FAILED, "b.test: no answer within 3 s")


def test_an_address_that_answers_gets_its_protocol(clock: Clock) -> None:
    """One that answers later gets none, which closes it."""
    endpoint, made = Endpoint(None), object()
    network: Any = Network(endpoint)
    assert begun(connect(network, [FOUR], lambda: made, clock, TIMEOUTS))[0] == [made]
    assert endpoint.factory.buildProtocol(None) is None


def test_addresses_that_do_not_answer_are_named(clock: Clock) -> None:
    """All of them, when the time is over."""
    network: Any = Network(Endpoint(Deferred()), Endpoint(Deferred()))
    results, _ = begun(connect(network, [FOUR, SIX], object, clock, TIMEOUTS))
    clock.pump([0.3] * 23)
    assert not results
    clock.advance(0.3)
    assert failed(results) == (
        EndReason.TCP_TIMEOUT,
        "192.0.2.1:8883, [2001:db8::1]:8883: no answer within 7 s",
    )


@pytest.mark.parametrize(
    ("errors", "reason", "words"),
    [
        ([error.ConnectionRefusedError(osError=errno.ECONNREFUSED)], EndReason.TCP_REFUSED, "Connection refused"),
        ([error.TCPTimedOutError(osError=errno.ETIMEDOUT)], EndReason.TCP_TIMEOUT, "Connection timed out"),
        ([error.TimeoutError()], EndReason.TCP_TIMEOUT, "User timeout caused connection failure."),
        ([error.ConnectError(osError=errno.EHOSTUNREACH)], EndReason.TCP_UNREACHABLE, "No route to host"),
        ([OSError("odd")], EndReason.TCP_UNREACHABLE, "odd"),
        (
            [error.ConnectError(osError=errno.EADDRNOTAVAIL)],
            EndReason.OUT_OF_RESOURCES,
            "Cannot assign requested address",
        ),
        (
            [error.ConnectError(osError=errno.EADDRNOTAVAIL), error.ConnectionRefusedError(osError=errno.ECONNREFUSED)],
            EndReason.TCP_REFUSED,
            "Cannot assign requested address; Connection refused",
        ),
        (
            [error.ConnectError(osError=errno.ENETUNREACH), error.ConnectionRefusedError(osError=errno.ECONNREFUSED)],
            EndReason.TCP_UNREACHABLE,
            "Network is unreachable; Connection refused",
        ),
        (
            [
                error.ConnectionRefusedError(osError=errno.ECONNREFUSED),
                error.ConnectionRefusedError(osError=errno.ECONNREFUSED),
            ],
            EndReason.TCP_REFUSED,
            "Connection refused",
        ),
    ],
)
def test_the_first_address_gives_the_reason_and_all_give_words(
    clock: Clock, errors: list[Exception], reason: EndReason, words: str
) -> None:
    """In the kernel's words where it has any, and none of them twice."""
    network: Any = Network(*(Endpoint(fail(each)) for each in errors))
    results, _ = begun(connect(network, [FOUR, SIX][: len(errors)], object, clock, TIMEOUTS))
    assert failed(results) == (reason, words)


PROXY = ProxyServer("http", "proxy.test", 3128)
STEPS: list[tuple[Callable[[Any, Any], Any], str, EndReason, str]] = [
    (
        lambda awaited, clock: open_tunnel(SimpleNamespace(opened=awaited), PROXY, clock, TIMEOUTS),  # type: ignore[arg-type]
        "it",
        EndReason.TCP_TIMEOUT,
        "http://proxy.test:3128 did not open a tunnel within 7 s",
    ),
    (
        lambda awaited, clock: handshake(SimpleNamespace(verified=awaited), clock, TIMEOUTS),  # type: ignore[arg-type]
        "it",
        EndReason.TLS_TIMEOUT,
        "the handshake did not finish within 7 s",
    ),
    (
        lambda awaited, clock: open_websocket(
            SimpleNamespace(upgrade=lambda request: awaited),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            clock,
            TIMEOUTS,
        ),
        "",
        EndReason.WEBSOCKET_REFUSED,
        "no answer to the opening handshake within 7 s",
    ),
]


@pytest.mark.parametrize(("step", "result", "reason", "words"), STEPS, ids=["tunnel", "handshake", "websocket"])
def test_a_step_has_a_result_or_a_reason(clock: Clock, step: Any, result: str, reason: EndReason, words: str) -> None:
    """What the other side gives in time, its failure, or that it gave nothing."""
    assert begun(step(succeed("it"), clock))[0] == [result or None]
    own = UpstreamFailure(EndReason.PROXY_REFUSED, "own")
    assert failed(begun(step(fail(own), clock))[0]) == (own.reason, own.detail)
    results, _ = begun(step(Deferred(), clock))
    clock.advance(6.9)
    assert not results
    clock.advance(0.2)
    assert failed(results) == (reason, words)
