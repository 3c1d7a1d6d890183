"""Connections that lead to a broker through a proxy.

In: a connection to a proxy.  Out: once the proxy has opened a tunnel, an `UpstreamProtocol` that owns the connection
from then on, so a session through a proxy costs no more than another; `UpstreamFailure` if there is no tunnel.

Nothing but the request for a tunnel leaves before that, and nothing but TLS with the broker after it.  The connection
to an `https://` proxy has a TLS layer of its own, verified like any other, below the broker's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.config import TLS, Config, Failover, Upstream
from gateway.config.proxies import ENVIRONMENT, ProxyServer, check_credential, from_environment, is_direct
from gateway.dial.health import UpstreamHealth
from gateway.dial.tunnel import Tunnel, other_protocol, tunnel_to
from gateway.disk import read_file
from gateway.errors import ConfigError, EndReason, UpstreamFailure
from gateway.net.network import Address
from gateway.relay.side import RelayTransport, how_lost, tune
from gateway.relay.upstream import MAX_UNREAD_ANSWERS, UpstreamProtocol
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import ChannelState, TLSChannel, make_policy
from gateway.tls.trust import TLSPolicy

_log = Logger(namespace="gateway")

# Bytes read at a time from a proxy with TLS, all of whose records are decrypted in one turn.
_READ_AT_ONCE = 0x4000

# The first byte from a server that speaks TLS: an alert or a handshake message (RFC 8446 §5.1).
_TLS_BEGINS = {0x15, 0x16}
_SPOKEN = {"http": "HTTP", "https": "HTTP over TLS", "socks5": "SOCKS5"}

# What a dial can fail of that says something of the proxy, and nothing of the broker behind it.
PROXY_FAILURES = frozenset({EndReason.PROXY_UNREACHABLE, EndReason.PROXY_REFUSED, EndReason.PROXY_AUTHENTICATION})


@frozen(eq=False)
class ProxyRoute:
    """A proxy as dials use it.  `policy` verifies an `https://` proxy; `health` is shared by all who use the proxy."""

    server: ProxyServer
    policy: TLSPolicy | None
    health: UpstreamHealth

    def connection(
        self, upstream: Upstream, build: Callable[[], UpstreamProtocol], user_timeout: float
    ) -> ProxyConnection | TLSLayer:
        """Return the protocol for a connection to the proxy; `build` makes the one that it becomes for `upstream`."""
        tunnel = tunnel_to(upstream.connect_name, upstream.port, self.server)
        connection = ProxyConnection(self.server, tunnel, build, user_timeout)
        if self.policy is None:
            return connection
        return TLSLayer(TLSChannel(self.policy, Identity.of(self.server.host)), connection, user_timeout)


def proxy_routes(
    config: Config,
    environment: Mapping[str, str],
    uniform: Callable[[], float],
) -> list[ProxyRoute | None]:
    """Return the proxy of each upstream, in their order, `None` for a direct connection.  Raises `ConfigError`.

    `uniform` returns random numbers from 0 to 1.
    """
    problems: list[str] = []
    healths: dict[str, UpstreamHealth] = {}
    routes: list[ProxyRoute | None] = []
    for index, upstream in enumerate(config.upstream):
        route = None
        try:
            server = _server(upstream, environment)
            if server is not None:
                health = healths.setdefault(
                    server.address, UpstreamHealth(server.address, "", config.failover, uniform)
                )
                policy = make_policy(TLS(ca_file=upstream.proxy_ca_file)) if server.scheme == "https" else None
                route = ProxyRoute(server, policy, health)
        except (ValueError, OSError) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            problems.append(f"upstream[{index}].proxy: {words}")
        except ConfigError as error:
            problems += [f"upstream[{index}].proxy_ca_file: {problem}" for problem in error.problems]
        routes.append(route)
    if problems:
        raise ConfigError(problems)
    return routes


def carried_on(
    routes: Iterable[ProxyRoute | None], known: Iterable[ProxyRoute | None], failover: Failover
) -> list[ProxyRoute | None]:
    """Return the routes, in which the health of proxies that are `known` goes on."""
    healths = {
        route.server.address: route.health.under(failover, judged_alike=True) for route in known if route is not None
    }
    return [route and evolve(route, health=healths.get(route.server.address, route.health)) for route in routes]


def _server(upstream: Upstream, environment: Mapping[str, str]) -> ProxyServer | None:
    """Return the proxy of an upstream, if it has one.  Raises `ValueError` and `OSError`."""
    url, direct = upstream.proxy, list(upstream.no_proxy)
    if url == ENVIRONMENT:
        url, entries = from_environment(environment)
        direct += entries
    if not url or is_direct(upstream.connect_name, direct):
        return None
    server = ProxyServer.of(url)
    if upstream.proxy_username:
        password = _password(upstream.proxy_password_file) if upstream.proxy_password_file is not None else ""
        server = evolve(server, username=upstream.proxy_username, password=password)
    return server


def _password(path: Path) -> str:
    try:
        text = read_file(path).decode("utf-8-sig").strip("\r\n")
        check_credential(text)
    except UnicodeDecodeError:
        raise ValueError(f"proxy_password_file {path}: not UTF-8; write it again as UTF-8") from None
    except OSError as error:
        raise ValueError(f"proxy_password_file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"proxy_password_file {path}: {error}") from None
    return text


def unreachable_proxy(server: ProxyServer, failure: UpstreamFailure) -> UpstreamFailure:
    """Return what it means for a session that the proxy itself could not be resolved or connected to."""
    return UpstreamFailure(EndReason.PROXY_UNREACHABLE, f"{server.address}: {failure}")


def intercepted(server: ProxyServer, failure: UpstreamFailure) -> UpstreamFailure:
    """Return what a chain without a trusted root means behind a proxy: the proxy may have made it."""
    return UpstreamFailure(EndReason.PROXY_INTERCEPTS_TLS, f"behind {server.address}: {failure.detail}")


class ProxyConnection(Protocol):
    """A connection to a proxy, until it leads to the broker.

    `opened` fires with the `UpstreamProtocol` that has taken over the connection and sent its ClientHello, and fails
    with `UpstreamFailure`; cancelling it ends the connection.
    """

    transport: RelayTransport

    def __init__(
        self, server: ProxyServer, tunnel: Tunnel, build: Callable[[], UpstreamProtocol], user_timeout: float
    ) -> None:
        self.server = server
        self._tunnel = tunnel
        self._build = build
        self._user_timeout = user_timeout
        self._over = False
        # Whether the proxy has said anything in its protocol.
        self.has_answered = False
        self.opened: Deferred[UpstreamProtocol] = Deferred(lambda _: self.abort())

    def connectionMade(self) -> None:
        """Ask for the tunnel."""
        tune(self.transport, self._user_timeout)
        self.transport.write(self._tunnel.start())

    def dataReceived(self, data: bytes) -> None:
        """Go on with the exchange; when the tunnel is open, hand the connection over."""
        if self._over:
            return
        self.has_answered = True
        try:
            answer = self._tunnel.receive(data)
        except UpstreamFailure as failure:
            self.fail(failure)
            return
        except Exception as problem:  # noqa: BLE001  an internal error in one dial must not end the others
            _log.failure("internal error while a proxy opened a tunnel")
            self.fail(UpstreamFailure(EndReason.INTERNAL_ERROR, type(problem).__name__))
            return
        if answer:
            self.transport.write(answer)
        if self._tunnel.is_open:
            self._hand_over()

    def _hand_over(self) -> None:
        self._over = True
        protocol = self._build()
        transport: Any = self.transport
        transport.protocol = protocol  # this is where Twisted's transports, and the TLS layer, deliver bytes
        protocol.makeConnection(transport)
        if self._tunnel.rest:
            protocol.dataReceived(self._tunnel.rest)
        self.opened.callback(protocol)

    def fail(self, failure: UpstreamFailure) -> None:
        """End the connection; there is no tunnel."""
        if not self._over:
            self._over = True
            self.transport.abortConnection()
            self.opened.errback(failure)

    def abort(self) -> None:
        """End the connection now."""
        self._over = True
        if self.transport is not None:
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The proxy is gone; the broker's protocol has its own ears if there is one."""
        if not self._over:
            self._over = True
            detail = f"{self.server.address}: {how_lost(reason)} by the proxy before the tunnel was open"
            if not self.has_answered:
                detail += f"; it may not speak {_SPOKEN[self.server.scheme]}: check the scheme"
            self.opened.errback(UpstreamFailure(EndReason.PROXY_UNREACHABLE, detail))


@implementer(ITCPTransport, IConsumer, IPushProducer)
class TLSLayer(Protocol):
    """TLS with the proxy: a protocol to the socket, and a transport to `protocol` above it.

    Flow control is the socket's: producers are registered with it, and pausing stops its reading.
    """

    transport: RelayTransport
    disconnecting = False

    def __init__(self, channel: TLSChannel, protocol: ProxyConnection, user_timeout: float) -> None:
        self.protocol: Protocol = protocol
        self.opened = protocol.opened
        self._connection = protocol
        self._channel = channel
        self._user_timeout = user_timeout
        self._producer: IProducer | None = None
        self._unread_answers = 0
        self.has_answered = False

    # ---- to the socket: a protocol

    def connectionMade(self) -> None:
        """Send the ClientHello to the proxy."""
        tune(self.transport, self._user_timeout)
        self.limit_reads(_READ_AT_ONCE)
        # From here on, to give up is to abort the socket, also while there is no tunnel yet to ask for.
        self._connection.transport = self  # type: ignore[assignment]  # provides what a RelayTransport does
        try:
            self._channel.start()
        except UpstreamFailure as failure:
            self._fail(failure)
        else:
            self._flush()

    def dataReceived(self, data: bytes) -> None:
        """Decrypt, and pass on."""
        if not self.has_answered and data[0] not in _TLS_BEGINS:
            detail = f"the answer is not TLS{other_protocol(data[0], self._connection.server)}"
            self._fail(UpstreamFailure(EndReason.TLS_HANDSHAKE_FAILED, detail))
            return
        self.has_answered = True
        was_verified = self._channel.state is ChannelState.VERIFIED
        try:
            plaintext = self._channel.receive(data)
            while self._channel.due:
                plaintext += self._channel.receive(b"")
        except UpstreamFailure as failure:
            self._flush()
            self._fail(failure)
            return
        self._answer()
        if self._channel.broken is None and not was_verified and self._channel.state is ChannelState.VERIFIED:
            self.protocol.makeConnection(self)
        if plaintext:
            self.protocol.dataReceived(plaintext)
        if self._channel.broken is not None:
            self._fail(self._channel.broken)
        elif self._channel.received_close:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Pass it on."""
        self._channel.dispose()
        self.protocol.connectionLost(reason)

    def abort(self) -> None:
        """End the connection now."""
        self._connection.abort()

    def _fail(self, failure: UpstreamFailure) -> None:
        """The TLS with the proxy failed.  Who has the connection by now hears of it as of any other loss."""
        self._connection.fail(
            UpstreamFailure(EndReason.PROXY_UNREACHABLE, f"TLS with the proxy: {failure}"),
        )
        self.transport.abortConnection()

    def _answer(self) -> None:
        """Send what TLS answers by itself, unless the proxy requests that and does not read; as for a broker."""
        ciphertext = self._channel.outgoing()
        if not ciphertext:
            return
        is_full = getattr(self._producer, "choked", False)
        self._unread_answers = self._unread_answers + 1 if is_full else 0
        if self._unread_answers > MAX_UNREAD_ANSWERS:
            self.transport.abortConnection()
        else:
            self.transport.write(ciphertext)

    def _flush(self) -> None:
        if ciphertext := self._channel.outgoing():
            self.transport.write(ciphertext)

    # ---- to the protocol above: a transport

    def limit_reads(self, size: int) -> None:
        """Read at most `size` bytes at a time."""
        limit = getattr(self.transport, "limit_reads", None)
        if limit is not None:
            limit(min(size, _READ_AT_ONCE))

    def later(self, call: Callable[[], object]) -> None:
        """See RelayTransport."""
        self.transport.later(call)

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        try:
            self.transport.write(self._channel.send(data))
        except UpstreamFailure as failure:
            self._fail(failure)

    def writeSequence(self, data: list[bytes]) -> None:  # type: ignore[override]  # as in IProtocol's own transports
        """Encrypt and send."""
        self.write(b"".join(data))

    def loseWriteConnection(self) -> None:
        """Send close_notify, then FIN."""
        self._channel.close()
        self._flush()
        self.transport.loseWriteConnection()

    def loseConnection(self) -> None:
        """Send what is waiting and close_notify, then close."""
        self._channel.close()
        self._flush()
        self.transport.loseConnection()

    def abortConnection(self) -> None:
        """End the connection now."""
        self.transport.abortConnection()

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """See IConsumer."""
        self._producer = producer
        self.transport.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """See IConsumer."""
        self._producer = None
        self.transport.unregisterProducer()

    def pauseProducing(self) -> None:
        """See IPushProducer."""
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """See IPushProducer."""
        self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """See IPushProducer."""
        self.transport.stopProducing()

    def getPeer(self) -> Address:
        """Return the proxy's address."""
        return self.transport.getPeer()

    def getHost(self) -> Address:
        """Return the gateway's address."""
        return self.transport.getHost()

    def getTcpNoDelay(self) -> bool:
        """See ITCPTransport."""
        return self.transport.getTcpNoDelay()

    def setTcpNoDelay(self, enabled: bool) -> None:
        """See ITCPTransport."""
        self.transport.setTcpNoDelay(enabled)

    def getTcpKeepAlive(self) -> bool:
        """See ITCPTransport."""
        return self.transport.getTcpKeepAlive()

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """See ITCPTransport."""
        self.transport.setTcpKeepAlive(enabled)
