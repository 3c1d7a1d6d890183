"""The TLS layer of an `https://` proxy, without sockets: nothing is asked before the proxy is verified."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from gateway.config import TLS
from gateway.config.proxies import ProxyServer
from gateway.dial.proxy import ProxyConnection, TLSLayer
from gateway.dial.tunnel import tunnel_to
from gateway.errors import EndReason, UpstreamFailure
from gateway.relay.upstream import MAX_UNREAD_ANSWERS
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel, make_policy
from gateway.tls.trust import TLSPolicy
from tests.pki import Certified
from tests.test_proxy_connection import OPEN
from tests.test_tls_channel import BROKER, OTHER, ROOT, Server

PROXY = ProxyServer("https", "localhost", 443)


class Socket:
    """A socket's end that remembers what was done with it, and answers with the name of what it is asked."""

    def __init__(self) -> None:
        self.sent = b""
        self.done: list[Any] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def limit_reads(self, size: int) -> None:
        self.done.append(("limit_reads", size))

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> str:
            self.done.append((name, *arguments) if arguments else name)
            return name

        return call

    def taken(self) -> bytes:
        """Return what was sent, and forget it."""
        sent, self.sent = self.sent, b""
        return sent


class Broker:
    """What the connection becomes."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.got = b""
        self.lost = 0

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Failure) -> None:
        self.lost += 1


class Bench:
    """A layer between a socket's end and a proxy in memory."""

    def __init__(self, policy: TLSPolicy, certified: Certified = BROKER) -> None:
        self.socket = Socket()
        self.proxy = Server(certified)
        self.broker = Broker()
        self.results: list[Any] = []
        built: Any = lambda: self.broker  # noqa: E731  typed
        connection = ProxyConnection(PROXY, tunnel_to("b.test", 8883, PROXY), built, 1.0)
        self.layer = TLSLayer(TLSChannel(policy, Identity.of("localhost")), connection, 1.0)
        self.layer.opened.addBoth(self.results.append)

    def connect(self) -> Bench:
        """Let the socket be connected."""
        transport: Any = self.socket
        self.layer.makeConnection(transport)
        return self

    def converse(self, cut: int = 1 << 20) -> Bench:
        """Pass bytes both ways until neither has any."""
        while sent := self.socket.taken():
            answer = self.proxy.receive(sent)
            for start in range(0, len(answer), cut):
                self.layer.dataReceived(answer[start : start + cut])
        return self

    def opened(self) -> Bench:
        """Have the tunnel opened."""
        self.connect().converse()
        self.layer.dataReceived(self.proxy.send(OPEN))
        assert self.results == [self.broker]
        return self

    def failed(self) -> str:
        """Return the detail of what it failed with."""
        (failure,) = self.results
        assert isinstance(failure.value, UpstreamFailure)
        assert failure.value.reason is EndReason.PROXY_UNREACHABLE
        return failure.value.detail


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TLSPolicy:
    """Return a policy that trusts the proxy's CA."""
    path = tmp_path_factory.mktemp("proxy") / "root.pem"
    path.write_bytes(ROOT.pem)
    return make_policy(TLS(ca_file=(path,)))


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """There is no socket to tune; return what would be."""
    calls: list[tuple[Any, float]] = []
    monkeypatch.setattr("gateway.dial.proxy.tune", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("cut", [1, 100, 1 << 20])
def test_the_request_follows_the_verified_handshake(
    policy: TLSPolicy, tuned: list[tuple[Any, float]], cut: int
) -> None:
    """However the records are cut; the tunnel's own bytes are the broker's."""
    bench = Bench(policy).connect()
    assert tuned == [(bench.socket, 1.0)]
    assert bench.socket.done == [("limit_reads", 0x4000)]
    assert bench.socket.sent[0] == 0x16
    assert not bench.layer.has_answered
    bench.converse(cut)
    assert bench.layer.has_answered
    assert bench.proxy.received == b"CONNECT b.test:8883 HTTP/1.1\r\nHost: b.test:8883\r\n\r\n"
    answer = bench.proxy.send(OPEN + b"\x16\x03")
    for start in range(0, len(answer), cut):
        bench.layer.dataReceived(answer[start : start + cut])
    assert bench.results == [bench.broker]
    assert bench.broker.got == b"\x16\x03"
    assert bench.broker.transport is bench.layer
    bench.broker.transport.writeSequence([b"hel", b"lo"])
    bench.proxy.receive(bench.socket.taken())
    assert bench.proxy.received.endswith(b"\r\n\r\nhello")
    assert "abortConnection" not in bench.socket.done


def test_a_proxy_that_is_not_verified_is_asked_nothing(policy: TLSPolicy) -> None:
    """It gets the alert; the failure is the proxy's."""
    bench = Bench(policy, OTHER).connect().converse()
    assert bench.failed().startswith("TLS with the proxy: tls-name-mismatch")
    assert bench.socket.done[-1] == "abortConnection"
    assert bench.proxy.received == b""
    assert bench.proxy.error is not None


@pytest.mark.parametrize(("first", "hint"), [(b"H", "use http://"), (b"\x05", "use socks5://"), (b"S", "is not TLS")])
def test_an_answer_without_tls_is_a_failure_at_its_first_byte(policy: TLSPolicy, first: bytes, hint: str) -> None:
    """Only the first: later records have other types."""
    bench = Bench(policy).connect()
    bench.layer.dataReceived(first)
    assert hint in bench.failed()
    assert not bench.layer.has_answered
    assert bench.socket.done[-1] == "abortConnection"


def test_a_policy_that_cannot_start_fails_the_dial(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a byte."""

    def fail(_: TLSChannel) -> None:
        raise UpstreamFailure(EndReason.TLS_HANDSHAKE_FAILED, "why")

    monkeypatch.setattr(TLSChannel, "start", fail)
    bench = Bench(policy).connect()
    assert bench.failed() == "TLS with the proxy: tls-handshake-failed: why"
    assert bench.socket.done[-1] == "abortConnection"
    assert bench.socket.sent == b""


def test_a_forged_record_ends_the_connection_behind_what_was_whole(policy: TLSPolicy) -> None:
    """The broker's side hears of it as of any loss."""
    bench = Bench(policy).opened()
    whole, forged = bench.proxy.send(b"whole"), bytearray(bench.proxy.send(b"forged"))
    forged[-1] ^= 1
    bench.layer.dataReceived(whole + bytes(forged))
    assert bench.broker.got == b"whole"
    assert bench.socket.done[-1] == "abortConnection"
    bench.layer.connectionLost(Failure(ConnectionDone()))
    assert bench.broker.lost == 1
    assert bench.results == [bench.broker]


def test_many_records_at_once_are_all_read(policy: TLSPolicy) -> None:
    """More than a channel decrypts at a time."""
    bench = Bench(policy).opened()
    bench.layer.dataReceived(b"".join(bench.proxy.send(b"%03d" % number) for number in range(300)))
    assert bench.broker.got == b"".join(b"%03d" % number for number in range(300))


def test_the_proxys_close_notify_closes_the_connection(policy: TLSPolicy) -> None:
    """What came before it is passed on."""
    bench = Bench(policy).opened()
    bench.layer.dataReceived(bench.proxy.send(b"last") + bench.proxy.close())
    assert bench.broker.got == b"last"
    assert bench.socket.done[-1] == "loseConnection"
    assert "abortConnection" not in bench.socket.done


@pytest.mark.parametrize("close", ["loseConnection", "loseWriteConnection"])
def test_what_closes_says_so_in_tls_first(policy: TLSPolicy, close: str) -> None:
    """Otherwise the end could be forged."""
    bench = Bench(policy).opened()
    getattr(bench.layer, close)()
    bench.proxy.receive(bench.socket.taken())
    assert bench.proxy.ended_cleanly
    assert bench.socket.done[-1] == close


def test_what_cannot_be_encrypted_ends_the_connection(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker's side hears of it as of any loss, and of no exception."""
    bench = Bench(policy).opened()

    def fail(_: TLSChannel, _plaintext: bytes) -> bytes:
        raise UpstreamFailure(EndReason.TLS_CLOSED, "why")

    monkeypatch.setattr(TLSChannel, "send", fail)
    bench.layer.write(b"more")
    assert bench.socket.sent == b""
    assert bench.socket.done[-1] == "abortConnection"
    assert bench.results == [bench.broker]


@pytest.mark.parametrize("is_connected", [True, False])
def test_giving_up_aborts_the_socket(policy: TLSPolicy, is_connected: bool) -> None:
    """At any time."""
    bench = Bench(policy)
    if is_connected:
        bench.connect()
    bench.layer.abort()
    assert ("abortConnection" in bench.socket.done) == is_connected


def test_a_tunnel_that_is_refused_ends_the_connection(policy: TLSPolicy) -> None:
    """As without TLS."""
    bench = Bench(policy).connect().converse()
    bench.layer.dataReceived(bench.proxy.send(b"HTTP/1.1 403 Forbidden\r\n\r\n"))
    (failure,) = bench.results
    assert failure.value.reason is EndReason.PROXY_REFUSED
    assert bench.socket.done[-1] == "abortConnection"


def test_answers_that_nobody_reads_come_to_an_end(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while the socket takes nothing, from the last time that it took something."""

    class Producer:
        choked = True

    bench = Bench(policy).opened()
    producer: Any = Producer()
    bench.layer.registerProducer(producer, True)
    assert bench.socket.done[-1] == ("registerProducer", producer, True)
    answers = [b"answer"]
    monkeypatch.setattr(TLSChannel, "receive", lambda *_: b"")
    monkeypatch.setattr(TLSChannel, "outgoing", lambda *_: answers[0])

    def ask(count: int) -> bool:
        for _ in range(count):
            bench.layer.dataReceived(b"x")
        return "abortConnection" in bench.socket.done

    assert not ask(MAX_UNREAD_ANSWERS)
    answers[0] = b""
    assert not ask(1)
    answers[0] = b"answer"
    Producer.choked = False
    assert not ask(1)
    Producer.choked = True
    assert not ask(MAX_UNREAD_ANSWERS)
    bench.socket.taken()
    assert ask(1)
    assert bench.socket.sent == b""
    bench.layer.unregisterProducer()
    assert bench.socket.done[-1] == "unregisterProducer"


def test_all_else_is_the_sockets(policy: TLSPolicy) -> None:
    """Flow control, addresses and options; reads are never longer than one turn can decrypt."""
    bench = Bench(policy).connect()
    layer = bench.layer
    bench.socket.done.clear()
    layer.limit_reads(1024)
    layer.limit_reads(1 << 20)
    layer.later(print)
    layer.pauseProducing()
    layer.resumeProducing()
    layer.stopProducing()
    layer.setTcpNoDelay(True)
    layer.setTcpKeepAlive(False)
    layer.abortConnection()
    answers = [layer.getPeer(), layer.getHost(), layer.getTcpNoDelay(), layer.getTcpKeepAlive()]
    assert answers == ["getPeer", "getHost", "getTcpNoDelay", "getTcpKeepAlive"]
    assert bench.socket.done == [
        ("limit_reads", 1024),
        ("limit_reads", 0x4000),
        ("later", print),
        "pauseProducing",
        "resumeProducing",
        "stopProducing",
        ("setTcpNoDelay", True),
        ("setTcpKeepAlive", False),
        "abortConnection",
        *answers,
    ]
    assert not layer.disconnecting


def test_a_producer_that_was_unregistered_does_not_count(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows any more whether its transport is full."""

    class Producer:
        choked = True

    bench = Bench(policy).opened()
    producer: Any = Producer()
    bench.layer.registerProducer(producer, True)
    bench.layer.unregisterProducer()
    monkeypatch.setattr(TLSChannel, "receive", lambda *_: b"")
    monkeypatch.setattr(TLSChannel, "outgoing", lambda *_: b"answer")
    for _ in range(MAX_UNREAD_ANSWERS + 1):
        bench.layer.dataReceived(b"x")
    assert "abortConnection" not in bench.socket.done


def test_the_channel_is_disposed_of_with_its_connection(policy: TLSPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be kept alive by what OpenSSL calls back."""
    bench = Bench(policy).opened()
    disposed: list[TLSChannel] = []
    monkeypatch.setattr(TLSChannel, "dispose", lambda channel: disposed.append(channel))
    bench.layer.connectionLost(Failure(ConnectionDone()))
    assert len(disposed) == 1
    assert bench.broker.lost == 1
