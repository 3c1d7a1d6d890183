"""The gateway's transports pass Twisted's own transport tests, and do what the gateway adds to them.

Twisted builds its reactor tests by classes that are given a reactor; here they get an epoll reactor whose TCP and UNIX
transports are the relay's.  They run in a process of their own (`tests/test_transport.py`): they install
reactors and signal handlers and use up all descriptors, which no other thread of the process survives.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost, NoProtocol
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.test import test_tcp, test_unix
from twisted.internet.test.reactormixins import ReactorBuilder
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import directlyProvides

from gateway.net.connecting import TCPEndpoint, _for_socket
from gateway.net.transport import RelayReactor
from tests.harness import PATIENCE, open_descriptors


class RelayTestReactor(EPollReactor):
    """An epoll reactor that listens through a `RelayReactor`; `RelayEndpoints` connect through it."""

    def __init__(self) -> None:
        super().__init__()
        self.relay = RelayReactor(self)
        self.relay.start()

    def listenTCP(self, *arguments: Any, **named: Any) -> Any:
        return self.relay.listenTCP(*arguments, **named)

    def listenUNIX(self, *arguments: Any, **named: Any) -> Any:
        return self.relay.listenUNIX(*arguments, **named)

    def getReaders(self) -> list[Any]:
        return super().getReaders() + [
            selectable
            for descriptor, selectable in self.relay._selectables.items()
            if self.relay._events[descriptor] & select.EPOLLIN
        ]

    def adoptStreamPort(self, *arguments: Any, **named: Any) -> Any:
        return self.relay.adoptStreamPort(*arguments, **named)


@pytest.fixture(autouse=True)
def logged_errors() -> None:
    """Leave the log to Twisted's test cases, which watch it themselves and provoke errors."""


class Recorder(Protocol):
    """Keeps what comes."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.reason: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reason = reason


class RelayEndpoints(test_tcp.TCPCreator):
    """What Twisted's tests connect by: the relay's endpoint."""

    def client(self, reactor: RelayTestReactor, serverAddress: IPv4Address) -> TCPEndpoint:
        return TCPEndpoint(reactor.relay, serverAddress)


class _OnRelay(SynchronousTestCase):
    reactorFactory = RelayTestReactor
    endpoints = RelayEndpoints()


class SendsAtOnceTests(_OnRelay, ReactorBuilder):
    """What the relay adds."""

    def connected_pair(self) -> tuple[RelayTestReactor, Recorder, Recorder]:
        """Return a reactor, and a server's and a client's protocol that are connected in it."""
        reactor = self.buildReactor()
        server, client = Recorder(), Recorder()
        factory = Factory.forProtocol(lambda: server)
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        TCPEndpoint(reactor.relay, port.getHost()).connect(Factory.forProtocol(lambda: client))
        self.turn(reactor, lambda: server.connected and client.connected)
        return reactor, server, client

    def turn(self, reactor: RelayTestReactor, until: Callable[[], object]) -> None:
        """Let the reactor work until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline
            reactor.iterate(0.01)

    def test_a_write_has_left_when_it_returns(self) -> None:
        """No turn of the reactor lies between a write and the send."""
        _, server, client = self.connected_pair()
        client.transport.write(b"now")
        assert server.transport.getHandle().recv(10) == b"now"

    def test_what_is_written_while_something_waits_does_not_overtake_it(self) -> None:
        """Bytes arrive in the order in which they were written, however full the kernel was between."""
        reactor, server, client = self.connected_pair()
        server.transport.pauseProducing()
        expected = b""
        for number in range(400):
            part = bytes([number % 251]) * 50_000 if number % 2 else b"small"
            client.transport.write(part)
            expected += part
            if number % 50 == 0:
                reactor.iterate(0)
        server.transport.resumeProducing()
        self.turn(reactor, lambda: len(server.received) == len(expected))
        assert bytes(server.received) == expected

    def test_a_send_that_fails_ends_the_connection_as_lost_and_not_within_the_write(self) -> None:
        """The kernel tells of an error once; the end must not look orderly because a write was told."""
        reactor, server, client = self.connected_pair()
        client.transport.pauseProducing()
        server.transport.abortConnection()
        self.turn(reactor, lambda: server.reason is not None)
        client.transport.write(b"into the void")
        assert client.reason is None
        client.transport.resumeProducing()
        self.turn(reactor, lambda: client.reason is not None)
        assert client.reason.check(ConnectionLost)

    def test_nothing_overtakes_a_half_close(self) -> None:
        """What waits is sent before FIN, and what is written after it is dropped."""
        reactor, server, client = self.connected_pair()
        server.transport.pauseProducing()
        client.transport.write(b"x" * 8_000_000)
        client.transport.loseWriteConnection()
        client.transport.write(b"late")
        server.transport.resumeProducing()
        self.turn(reactor, lambda: server.reason is not None)
        assert bytes(server.received).strip(b"x") in {b"", b"late"}
        assert server.received.startswith(b"x" * 8_000_000)

    def test_a_half_close_has_left_when_it_returns(self) -> None:
        """If nothing waits to be sent; what is written after it is dropped, and the end is orderly."""
        reactor, server, client = self.connected_pair()
        client.transport.write(b"last")
        client.transport.loseWriteConnection()
        handle = server.transport.getHandle()
        assert (handle.recv(10), handle.recv(10)) == (b"last", b"")
        client.transport.write(b"late")
        server.transport.loseConnection()
        self.turn(reactor, lambda: client.reason is not None)
        assert client.reason.check(ConnectionDone)

    def test_nothing_leaves_after_an_abort(self) -> None:
        """Twisted ends the connection a moment later; until then what is written is dropped, as Twisted drops it."""
        reactor, server, client = self.connected_pair()
        client.transport.write(b"before")
        client.transport.abortConnection()
        client.transport.write(b"after")
        self.turn(reactor, lambda: server.reason is not None)
        assert client.reason is not None
        assert b"after" not in bytes(server.received)

    def test_a_mistake_at_the_end_of_one_connection_leaves_the_others_alone(self) -> None:
        """Were it let out, the real reactor would take it for the end of the whole relay."""
        reactor, server, client = self.connected_pair()

        def mistake(_: Failure) -> None:
            raise KeyError("a mistake")

        server.connectionLost = mistake  # type: ignore[method-assign]
        client.transport.abortConnection()
        self.turn(reactor, lambda: client.reason is not None)
        self.turn(reactor, lambda: server.transport not in reactor.getReaders())
        assert len(self.flushLoggedErrors(KeyError)) == 1
        assert reactor.relay in reactor.getReaders()
        assert not reactor.relay._epoll.closed

    def test_a_mistake_with_what_came_ends_that_connection_alone(self) -> None:
        """The log has it, and the relay goes on."""
        reactor, server, client = self.connected_pair()

        def mistake(_: bytes) -> None:
            raise KeyError("a mistake")

        server.dataReceived = mistake  # type: ignore[method-assign]
        client.transport.write(b"data")
        self.turn(reactor, lambda: server.reason is not None and client.reason is not None)
        assert server.reason.check(KeyError)
        assert len(self.flushLoggedErrors(KeyError)) == 1
        assert reactor.relay in reactor.getReaders()

    def test_who_wants_to_know_of_a_half_close_may_still_write(self) -> None:
        """The end of what a peer sends is not the end of the connection."""
        reactor, server, client = self.connected_pair()
        ended: list[str] = []
        server.readConnectionLost = lambda: ended.append("read")
        server.writeConnectionLost = lambda: ended.append("write")
        directlyProvides(server, IHalfCloseableProtocol)
        client.transport.loseWriteConnection()
        self.turn(reactor, lambda: ended)
        assert (ended, server.reason) == (["read"], None)
        server.transport.write(b"answer")
        self.turn(reactor, lambda: bytes(client.received) == b"answer")
        server.transport.abortConnection()
        self.turn(reactor, lambda: server.reason is not None and client.reason is not None)

    def playing(self) -> tuple[RelayTestReactor, Recorder, Recorder]:
        """Return a reactor, and a server and a client that throw a byte to and fro."""
        reactor, server, client = self.connected_pair()
        deadline = time.monotonic() + PATIENCE
        for side in (server, client):

            def throw_back(data: bytes, side: Recorder = side) -> None:
                side.received += data
                if time.monotonic() < deadline:
                    side.transport.write(data)

            side.dataReceived = throw_back  # type: ignore[method-assign]
        client.transport.write(b"x")
        return reactor, server, client

    def test_what_follows_soon_is_worked_off_in_the_same_turn(self) -> None:
        """A turn of the reactor costs more than a message does."""
        reactor, server, client = self.playing()
        reactor.iterate(0.01)
        assert len(server.received + client.received) > 2
        client.transport.abortConnection()
        self.turn(reactor, lambda: server.reason is not None)

    def test_however_much_follows_the_reactor_has_its_turn(self) -> None:
        """Its timers and threads wait for a moment, not until there is nothing to relay."""
        reactor, server, client = self.playing()
        called: list[float] = []
        asked = time.monotonic()
        reactor.callLater(0.001, lambda: called.append(time.monotonic()))
        self.turn(reactor, lambda: called)
        assert called[0] - asked < PATIENCE / 2, "it came when there was nothing left to relay"
        client.transport.abortConnection()
        self.turn(reactor, lambda: server.reason is not None)

    def test_the_relay_may_stop_while_it_works_off(self) -> None:
        """As when a session's end is the last that the gateway waited for."""
        reactor, server, client = self.connected_pair()
        server.dataReceived = lambda _: reactor.relay.stop()  # type: ignore[method-assign]
        client.transport.write(b"the last")
        self.turn(reactor, lambda: server.reason is not None)
        reactor.iterate(0)
        assert client.reason is not None

    def test_each_kind_of_transport_has_code_of_its_own(self) -> None:
        """Python adapts code to the types that it meets, and what is shared by two it adapts to neither."""
        _, server, client = self.connected_pair()
        for name in ("doRead", "write"):
            codes = [getattr(type(side.transport), name).__code__ for side in (server, client)]
            assert codes[0] is not codes[1]

    def test_stopping_ends_what_is_still_open(self) -> None:
        """A relay reactor that stops leaves no connection and no descriptor behind."""
        reactor, server, client = self.connected_pair()
        reactor.relay.stop()
        assert server.reason is not None
        assert client.reason is not None


class ConnectingTests(_OnRelay, ReactorBuilder):
    """What becomes of a connection that is being made."""

    def attempt(
        self,
        address: IPv4Address | IPv6Address,
        make: Callable[[], Any] = Recorder,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin to connect, just after `before`; `outcome` is what becomes of it."""
        self.reactor = self.buildReactor()
        factory = Factory()
        factory.buildProtocol = lambda _: make()  # type: ignore[method-assign]
        self.outcomes: list[Any] = []
        self.before = open_descriptors()
        before()
        self.connecting = TCPEndpoint(self.reactor.relay, address).connect(factory)
        self.connecting.addBoth(self.outcomes.append)

    def outcome(self) -> Any:
        """Wait for it."""
        deadline = time.monotonic() + PATIENCE
        while not self.outcomes:
            assert time.monotonic() < deadline
            self.reactor.iterate(0.01)
        return self.outcomes[0]

    def assert_nothing_is_left(self) -> None:
        """No descriptor is watched that was not before, or open."""
        assert not self.reactor.relay._selectables
        assert not self.reactor.relay._events
        assert open_descriptors() == self.before

    @contextmanager
    def listening(self, backlog: int = 5, host: str = "127.0.0.1") -> Iterator[Any]:
        """Return the address of a socket on which somebody listens, and accepts nobody."""
        with socket.create_server((host, 0), backlog=backlog, family=_family(host)) as listener:
            self.listener = listener
            kind = IPv6Address if ":" in host else IPv4Address
            yield kind("TCP", host, listener.getsockname()[1])

    def test_a_connection_knows_both_its_ends(self) -> None:
        """By which a record says where a session went."""
        for host in ("127.0.0.1", "::1"):
            with self.listening(host=host) as address:
                self.attempt(address)
                transport = self.outcome().transport
                accepted, peer = self.listener.accept()
                assert transport.getPeer() == address
                assert (transport.getHost().host, transport.getHost().port) == peer[:2]
                assert type(transport.getHost()) is type(address)
                transport.write(b"here")
                assert accepted.recv(10) == b"here"
                accepted.close()
                self.turn_until_lost(transport)

    def turn_until_lost(self, transport: Any) -> None:
        """Wait for the end of a connection."""
        protocol = transport.protocol
        deadline = time.monotonic() + PATIENCE
        while protocol.reason is None:
            assert time.monotonic() < deadline
            self.reactor.iterate(0.01)

    def test_a_refusal_is_told_as_one(self) -> None:
        """With what the kernel says."""
        with self.listening() as address:
            pass
        self.attempt(address)
        failure = self.outcome()
        assert failure.check(error.ConnectionRefusedError)
        assert failure.value.osError == errno.ECONNREFUSED
        self.assert_nothing_is_left()

    def test_what_the_kernel_refuses_at_once_is_told(self) -> None:
        """Before anything was watched: here a link-local address that does not say on which link."""
        self.attempt(IPv6Address("TCP", "fe80::1", 8883))
        assert self.outcome().check(ConnectError)
        self.assert_nothing_is_left()

    def test_without_descriptors_it_fails(self) -> None:
        """And says why."""
        with self.listening() as address:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            try:
                self.attempt(address, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1])))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert self.outcome().value.osError == errno.EMFILE
            self.assert_nothing_is_left()

    def test_who_asks_is_not_told_while_they_ask(self) -> None:
        """A failure takes a turn of the reactor, like all else; who gives up before it hears of that alone."""
        self.attempt(IPv6Address("TCP", "fe80::1", 8883))
        assert not self.outcomes
        self.connecting.cancel()
        assert self.outcome().check(CancelledError)
        assert not self.reactor.getDelayedCalls()
        self.assert_nothing_is_left()

    def test_a_mistake_of_the_protocol_at_its_beginning_ends_the_connection(self) -> None:
        """Whoever waits is told."""

        class Mistaken(Recorder):
            def connectionMade(self) -> None:
                raise KeyError("a mistake")

        with self.listening() as address:
            self.attempt(address, Mistaken)
            assert self.outcome().check(KeyError)
            self.reactor.iterate(0)
            self.assert_nothing_is_left()

    def test_who_gives_up_at_the_last_moment_has_no_connection(self) -> None:
        """While the protocol is told that it is connected."""

        class Last(Recorder):
            def connectionMade(protocol) -> None:  # noqa: N805  the test is the other
                self.connecting.cancel()

        with self.listening() as address:
            self.attempt(address, Last)
            assert self.outcome().check(CancelledError)
            self.reactor.iterate(0)
            self.assert_nothing_is_left()

    def test_nobody_connects_when_the_relay_has_stopped(self) -> None:
        """Nothing would be reported; so it fails at once, and not when somebody's patience ends."""
        with self.listening() as address:
            self.attempt(address, before=lambda: self.reactor.relay.stop())
            assert self.outcome().check(ConnectError)

    def test_who_gives_up_leaves_nothing(self) -> None:
        """Here while the listener's queue is full, so that nobody answers."""
        with self.listening(backlog=0) as address, socket.create_connection((address.host, address.port)):
            self.attempt(address)
            self.reactor.iterate(0)
            assert not self.outcomes
            self.connecting.cancel()
            assert self.outcome().check(CancelledError)
            self.assert_nothing_is_left()

    def test_a_factory_that_wants_no_protocol_closes_the_connection(self) -> None:
        """As when somebody else was quicker."""
        with self.listening() as address:
            self.attempt(address, lambda: None)
            assert self.outcome().check(NoProtocol)
            self.assert_nothing_is_left()

    def test_a_mistake_of_the_factory_closes_the_connection(self) -> None:
        """And whoever waits is told."""
        with self.listening() as address:
            self.attempt(address, lambda: 1 / 0)
            assert self.outcome().check(ZeroDivisionError)
            self.assert_nothing_is_left()

    def test_who_still_waits_when_the_relay_stops_is_told(self) -> None:
        """Nothing of it is left."""
        with self.listening(backlog=0) as address, socket.create_connection((address.host, address.port)):
            self.attempt(address)
            self.reactor.relay.stop()
            assert self.outcome().check(ConnectError)
            assert open_descriptors() == self.before - 1  # and the relay's epoll is closed, too

    def test_the_scope_of_an_address_is_the_sockets(self) -> None:
        """A link-local address is one on each link, and `%` says which (RFC 4007 §11)."""
        loopback = socket.if_nametoindex("lo")
        for named in (IPv6Address("TCP", "fe80::1%lo", 8883), IPv6Address("TCP", "fe80::1", 8883, 0, loopback)):
            family, address = _for_socket(named)
            assert (family, address[1], address[3]) == (socket.AF_INET6, 8883, loopback)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class TCP4ClientTests(_OnRelay, test_tcp.TCP4ClientTestsBuilder):
    """Twisted's tests of TCP clients."""

    # The relay's events are not wrapped in a logging context each, on purpose: it costs as much as the framing.
    test_logPrefix = None
    # The relay has no connectSSL; TLS is gateway/tls's.
    test_badContext = None
    # Nor has it connectTCP, whose connector and bound address these two are about.
    test_interface = None
    test_addresses = None
    # The configuration knows ports by their number alone.
    test_connectPortNotNumeric = None


class TCPConnectionTests(_OnRelay, test_tcp.TCPConnectionTestsBuilder):
    """Twisted's tests of connections, half-close among them."""


class TCPPortTests(_OnRelay, test_tcp.TCPPortTestsBuilder):
    """Twisted's tests of listening ports."""


class TCPFDPortTests(_OnRelay, test_tcp.TCPFDPortTestsBuilder):
    """Twisted's tests of ports on sockets that somebody else opened, as systemd does."""


class TCPTransportTests(_OnRelay, test_tcp.TCPTransportTestsBuilder):
    """Twisted's tests of what a transport does with what is written to it."""


class AbortConnectionTests(_OnRelay, test_tcp.AbortConnectionTests):
    """Twisted's tests of abortConnection."""

    # These three write, abort at once, and want nothing to have left.  Here it has: that is what sending at once means,
    # and whoever aborts a connection has no claim on what the peer has seen of it.
    test_dataReceivedAbort = None
    test_clientAbortsConnectionTwice = None
    test_clientAbortsConnectionThenLosesConnection = None


class UNIXPortTests(_OnRelay, test_unix.UNIXPortTestsBuilder):
    """Twisted's tests of UNIX ports."""
