"""A connection to a proxy, without sockets: when it leads to the broker, and what comes of it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from gateway.config.proxies import ProxyServer
from gateway.dial.proxy import ProxyConnection, intercepted, unreachable_proxy
from gateway.dial.tunnel import tunnel_to
from gateway.errors import EndReason, UpstreamFailure

SERVER = ProxyServer("http", "proxy.example", 3128)
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport:
    """A socket's end that remembers what was done with it."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = 0
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        self.sent += data

    def abortConnection(self) -> None:
        self.aborted += 1

    def getHandle(self) -> None:  # noqa: N802  the interface's name
        return None


class Upstream:
    """What the connection becomes."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.got = b""
        self.deliveries = 0

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport

    def dataReceived(self, data: bytes) -> None:
        self.got += data
        self.deliveries += 1


class Bench:
    """A connection with its transport, and what `opened` fires with."""

    def __init__(self, *, connected: bool = True, tunnel: Any = None) -> None:
        self.built: list[Upstream] = []
        self.results: list[Any] = []
        self.transport = Transport()
        self.connection = ProxyConnection(SERVER, tunnel or tunnel_to("b.test", 8883, SERVER), self._build, 1.0)
        self.connection.opened.addBoth(self.results.append)
        if connected:
            self.connection.makeConnection(self.transport)  # type: ignore[arg-type]  # what of it is used

    def _build(self) -> Any:
        self.built.append(Upstream())
        return self.built[-1]

    def failed(self) -> tuple[EndReason, str]:
        """Return how it failed."""
        (failure,) = self.results
        assert isinstance(failure.value, UpstreamFailure)
        return failure.value.reason, failure.value.detail


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no socket to tune."""
    monkeypatch.setattr("gateway.dial.proxy.tune", lambda transport, user_timeout: None)


def test_nothing_is_built_before_the_tunnel_is_open() -> None:
    """Then the broker's protocol has the connection, and what came behind the answer."""
    bench = Bench()
    assert bench.transport.sent.startswith(b"CONNECT b.test:8883 ")
    bench.connection.dataReceived(OPEN[:9])
    assert (bench.built, bench.results) == ([], [])
    bench.connection.dataReceived(OPEN[9:] + b"\x16\x03")
    (upstream,) = bench.built
    assert bench.results == [upstream]
    assert upstream.transport is bench.transport
    assert bench.transport.protocol is upstream
    assert upstream.got == b"\x16\x03"
    assert not bench.transport.aborted


def test_the_connection_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one to a broker is: it becomes one."""
    tuned: list[tuple[Any, float]] = []
    monkeypatch.setattr("gateway.dial.proxy.tune", lambda *arguments: tuned.append(arguments))
    bench = Bench()
    assert tuned == [(bench.transport, 1.0)]


def test_a_failure_behind_a_proxy_names_the_proxy() -> None:
    """Whether it could not be reached itself, or what came through it is not trusted."""
    failure = UpstreamFailure(EndReason.TLS_UNTRUSTED_CHAIN, "no root")
    for made, reason in (
        (unreachable_proxy(SERVER, failure), EndReason.PROXY_UNREACHABLE),
        (intercepted(SERVER, failure), EndReason.PROXY_INTERCEPTS_TLS),
    ):
        assert made.reason is reason
        assert "http://proxy.example:3128" in made.detail
        assert "no root" in made.detail


def test_who_has_handed_over_hears_nothing_more() -> None:
    """What is late concerns the broker's protocol alone."""
    bench = Bench()
    bench.connection.dataReceived(OPEN)
    bench.connection.dataReceived(b"late")
    bench.connection.fail(UpstreamFailure(EndReason.PROXY_REFUSED, "late"))
    bench.connection.connectionLost(Failure(ConnectionDone()))
    assert bench.built[0].deliveries == 0
    assert bench.results == bench.built
    assert not bench.transport.aborted


def test_a_refusal_ends_the_connection_once() -> None:
    """Its close, which follows, is no second failure, and nor are further bytes."""
    bench = Bench()
    bench.connection.dataReceived(b"HTTP/1.1 403 Forbidden\r\n\r\n")
    bench.connection.dataReceived(OPEN)
    bench.connection.connectionLost(Failure(ConnectionLost()))
    assert bench.failed()[0] is EndReason.PROXY_REFUSED
    assert (bench.built, bench.transport.aborted) == ([], 1)


def test_a_proxy_that_closes_is_named() -> None:
    bench = Bench()
    bench.connection.connectionLost(Failure(ConnectionDone()))
    reason, detail = bench.failed()
    assert reason is EndReason.PROXY_UNREACHABLE
    assert detail.startswith("http://proxy.example:3128: ")
    assert detail.endswith("by the proxy before the tunnel was open; it may not speak HTTP: check the scheme")
    answered = Bench()
    answered.connection.dataReceived(OPEN[:9])
    answered.connection.connectionLost(Failure(ConnectionDone()))
    assert answered.failed()[1].endswith("by the proxy before the tunnel was open")


@pytest.mark.parametrize("connected", [True, False])
def test_who_gives_up_leaves_no_connection(connected: bool) -> None:
    """Also before there is one; what comes afterwards builds nothing."""
    bench = Bench(connected=connected)
    bench.connection.opened.cancel()
    assert bench.transport.aborted == connected
    bench.connection.dataReceived(OPEN)
    assert not bench.built


def test_an_internal_error_ends_this_dial_alone(logged_errors: list[Any]) -> None:
    """It is logged, the session is told, and the connection ends."""

    class Broken:
        is_open = False

        def start(self) -> bytes:
            return b"?"

        def receive(self, data: bytes) -> bytes:
            raise RuntimeError("secret")

    bench = Bench(tunnel=Broken())
    bench.connection.dataReceived(b"x")
    assert bench.failed() == (EndReason.INTERNAL_ERROR, "RuntimeError")
    assert bench.transport.aborted == 1
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_what_the_exchange_answers_is_sent() -> None:
    """SOCKS5 takes several steps."""
    server = ProxyServer("socks5", "proxy.example", 1080)
    bench = Bench(tunnel=tunnel_to("192.0.2.1", 443, server))
    bench.connection.dataReceived(b"\x05\x00")
    assert bench.transport.sent == b"\x05\x01\x00" + b"\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb"
