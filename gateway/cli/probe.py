"""The test session of a check: a session to a broker through the gateway's code, with a report of each step.

In: a target, a CONNECT.  Out: `Step`s as they happen.

The session and the protocols on both sides are the real ones, so that the result holds for the gateway, and no MQTT
byte leaves before the broker is verified.  Only the device is simulated: `_Device` is its transport.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from attrs import asdict, evolve, fields_dict
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure

from gateway.cli.device_identity import Guise
from gateway.cli.login import Login
from gateway.cli.report import Status, Step
from gateway.cli.verdict import failed, tls_steps
from gateway.config import TLS, Config
from gateway.config.algorithms import Algorithms
from gateway.dial.dialler import Target, make_upstream
from gateway.dial.proxy import ProxyConnection, ProxyRoute, TLSLayer, intercepted, unreachable_proxy
from gateway.dial.steps import connect, handshake, open_tunnel, open_websocket, resolve, within
from gateway.errors import EndReason, UnknownIssuer, UpstreamFailure
from gateway.gateway import SWEEP_INTERVAL
from gateway.mqtt.connect import Connect
from gateway.mqtt.packets import PacketType
from gateway.net.network import Network, shown_address
from gateway.net.websocket import Request
from gateway.relay.device import DeviceProtocol
from gateway.relay.upstream import UpstreamProtocol
from gateway.relay.websocket import WebSocketUpstream
from gateway.session.record import Peer, SessionRecord
from gateway.session.session import Session
from gateway.text import printable, unprintable_escaped
from gateway.tls.algorithms import Offer, shown
from gateway.tls.channel import TLSChannel
from gateway.tls.survey import Answer, Reader, Survey

# Failures that a broker may give as its answer to a ClientHello with nothing that it has.
_OF_ALGORITHMS = {EndReason.TLS_HANDSHAKE_FAILED, EndReason.TLS_VERSION, EndReason.TLS_CLOSED}
_DISCONNECT = bytes((PacketType.DISCONNECT << 4, 0))
_SHOWN_ADDRESSES = 8
_Connection = TypeVar("_Connection", UpstreamProtocol, ProxyConnection | TLSLayer)

# Return codes of CONNACK (MQTT 3.1.1 §3.2.2.3), and remedies for refusals.
_IDENTIFIER_REJECTED, _BAD_CREDENTIALS, _NOT_AUTHORIZED = 2, 4, 5
_CONNACK_REMEDIES = {
    1: "The broker does not accept MQTT 3.1.1: devices must use another version.",
    2: "Use a Client Identifier that the broker accepts: --client-id.",
    3: "Check the broker's log: it answers, but is unavailable.",
    4: "Ask the broker's administrator for the correct user name and password.",
    5: "Ask the broker's administrator what this user name, Client Identifier and client certificate may do.",
}


def upstream_steps(tls: TLS, *, proxied: bool = False, websocket: bool = False) -> list[str]:
    """Return the names of the steps to a broker, in order."""
    stapled = [] if tls.ocsp == "off" else ["ocsp"]
    optional = [*stapled, *(["pin"] if tls.pin else []), *(["strict"] if tls.verification == "strict" else [])]
    before = ["dns", "tcp", *(["proxy"] if proxied else []), "client-hello", "certificate", "chain", "identity", "tls"]
    return [*before, *optional, *(["websocket"] if websocket else []), "connect", "connack"]


class Probe:
    """One session to one broker; `run` once."""

    def __init__(
        self,
        target: Target,
        config: Config,
        network: Network,
        clock: IReactorTime,
        login: Login,
        add: Callable[[Step], None],
        guise: Guise | None = None,
        stops_before_connect: str = "",
    ) -> None:
        """Make a probe; `guise` is what the device's rule changes, `stops_before_connect` why no CONNECT is sent."""
        self._target = target
        self._config = config
        self._network = network
        self._clock = clock
        self._login = login
        self._add_step = add
        self._guise = guise
        self._stops_before_connect = stops_before_connect
        self._left = upstream_steps(
            config.tls, proxied=target.proxy is not None, websocket=target.websocket is not None
        )
        self._failed_at = ""
        self._gone: Deferred[None] = Deferred()
        self._device = DeviceProtocol(self._open_session, config.timeouts.tcp_user)
        self._transport = _Device(self._device, clock)
        self._session: Session

    async def run(self) -> None:
        """Run the session from CONNECT to its end."""
        self._device.makeConnection(self._transport)
        sweeper = LoopingCall(lambda: self._session.sweep(self._clock.seconds()))
        sweeper.clock = self._clock
        sweeper.start(SWEEP_INTERVAL, now=False)
        try:
            self._device.dataReceived(self._login.packet)
            await self._gone
        finally:
            sweeper.stop()
            self._session.stop(EndReason.GATEWAY_STOPPING)
            self._session.abort()
        self._conclude(self._session.record)

    # ---- for the session

    def _open_session(self, device: DeviceProtocol) -> Session:
        self._session = Session(
            SessionRecord(1, "mqtts-gateway check", self._clock.seconds()),
            device,
            self._dial,
            self,
            lambda _: self._finish(None),
            self._clock.seconds,
            self._config.limits,
            self._config.timeouts,
        )
        return self._session

    def session_started(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`: the broker accepted; disconnect."""
        del record
        self._clock.callLater(0, self._device.dataReceived, _DISCONNECT)

    def session_ended(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`; the end is reported when the session is closed."""

    def _dial(self, session: Session) -> Deferred[None]:
        if self._guise is not None and self._guise.treatment is not None:
            session.treat(self._guise.treatment)
        dialling = Deferred.fromCoroutine(self._reach(session))
        dialling.addErrback(lambda failure: None if failure.check(CancelledError) else self._finish(failure))
        return dialling

    def _finish(self, failure: Failure | None) -> None:
        if self._gone.called:
            return
        if failure is None:
            self._gone.callback(None)
        else:
            self._gone.errback(failure)

    # ---- the steps of `Dialler`, reported

    async def _reach(self, session: Session) -> None:
        try:
            # Made first, because the WebSocket has to be asked for in the turn in which the broker is verified.
            request = await self._request()
            protocol, channel = await self._connect()
            peer = await self._handshake(protocol, channel, request)
        except UpstreamFailure as failure:
            session.upstream_failed(failure)
            return
        if self._stops_before_connect:
            protocol.abort()
            session.upstream_failed(UpstreamFailure(EndReason.GATEWAY_STOPPING, ""))
            return
        protocol.serve(session, self._device, peer)
        if session.record.packets_up:
            sent: Login | Connect = self._login if self._guise is None else self._guise.connect
            name = f'"{printable(sent.client_identifier)}"'
            credentials = "a" if sent.username is not None else "no"
            kind = "clean session" if self._is_clean else "the broker keeps its session"
            self._pass("connect", f"MQTT 3.1.1, Client Identifier {name}, {kind}, {credentials} user name")

    async def _request(self) -> Request | None:
        if self._target.websocket is None:
            return None
        try:
            return await self._target.websocket.request()
        except UpstreamFailure as failure:
            self._add(failed("websocket", failure))
            raise

    async def _connect(self) -> tuple[UpstreamProtocol, TLSChannel]:
        target, timeouts = self._target, self._config.timeouts
        channels: dict[UpstreamProtocol, TLSChannel] = {}

        def build() -> UpstreamProtocol:
            channel = TLSChannel(target.policy, target.identity)
            protocol = make_upstream(target, channel, timeouts.tcp_user, self._clock)
            channels[protocol] = channel
            return protocol

        if target.proxy is None:
            upstream = target.upstream
            protocol = await self._connect_to(upstream.connect_name, upstream.port, build)
        else:
            protocol = await self._connect_through(target.proxy, build)
        sni = "no SNI (IP address)" if target.identity.sni is None else f"SNI {target.identity.name}"
        alpn = f"ALPN {', '.join(target.policy.alpn)}" if target.policy.alpn else "no ALPN"
        message = f"sent with {sni}, {alpn}, TLS {self._config.tls.min_version} or later"
        chosen = self._config.algorithms(target.upstream)
        offer = target.policy.offer
        for key, words, names in zip(fields_dict(Algorithms), *zip(*offer.lists, strict=True), strict=True):
            if getattr(chosen, key):
                message += f"; {shown(words, names)}"
        self._pass("client-hello", message, offer=asdict(offer))
        return protocol, channels[protocol]

    async def _connect_to(self, host: str, port: int, build: Callable[[], _Connection]) -> _Connection:
        clock, timeouts, proxy = self._clock, self._config.timeouts, self._target.proxy
        began = clock.seconds()
        try:
            addresses = await resolve(self._network, host, port, clock, timeouts)
        except UpstreamFailure as failure:
            self._add(failed("dns", failure if proxy is None else unreachable_proxy(proxy.server, failure)))
            raise
        resolved = clock.seconds()
        hosts = [address.host for address in addresses]
        more = f" and {len(hosts) - _SHOWN_ADDRESSES} more" if len(hosts) > _SHOWN_ADDRESSES else ""
        whose = "" if proxy is None else "the proxy "
        message = f"{whose}{host} resolves to {', '.join(hosts[:_SHOWN_ADDRESSES])}{more}"
        self._pass("dns", message, resolved - began, addresses=hosts)
        try:
            connection = await connect(self._network, addresses, build, clock, timeouts)
        except UpstreamFailure as failure:
            self._add(failed("tcp", failure if proxy is None else unreachable_proxy(proxy.server, failure)))
            raise
        address = shown_address(connection.transport.getPeer())
        self._pass("tcp", f"connected to {whose}{address}", clock.seconds() - resolved, address=address)
        return connection

    async def _connect_through(self, proxy: ProxyRoute, build: Callable[[], UpstreamProtocol]) -> UpstreamProtocol:
        upstream, clock, timeouts = self._target.upstream, self._clock, self._config.timeouts
        to_proxy = partial(proxy.connection, upstream, build, timeouts.tcp_user)
        connection = await self._connect_to(proxy.server.host, proxy.server.port, to_proxy)
        began = clock.seconds()
        try:
            protocol = await open_tunnel(connection, proxy.server, clock, timeouts)
        except UpstreamFailure as failure:
            self._add(failed("proxy", failure))
            raise
        message = f"{proxy.server.address} opened a tunnel to {upstream.address}"
        self._pass("proxy", message, clock.seconds() - began)
        return protocol

    async def _handshake(self, protocol: UpstreamProtocol, channel: TLSChannel, request: Request | None) -> Peer:
        target = self._target
        try:
            peer = await handshake(protocol, self._clock, self._config.timeouts)
        except UpstreamFailure as failure:
            found = await self._survey() if failure.reason in _OF_ALGORITHMS and not channel.approved else None
            for step in tls_steps(channel, target.identity, target.policy, failure, found):
                if self._stops_before_connect and step.facts.get("reason") is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED:
                    step = Step(step.name, Status.SKIP, self._stops_before_connect)
                is_chain = step.facts.get("reason") is EndReason.TLS_UNTRUSTED_CHAIN
                if target.proxy is not None and is_chain and isinstance(failure, UnknownIssuer):
                    detail = step.message.partition(": ")[2]
                    step = failed(step.name, intercepted(target.proxy.server, UpstreamFailure(failure.reason, detail)))
                self._add(step)
            raise
        for step in tls_steps(channel, target.identity, target.policy, None):
            self._add(step)
        if request is not None and isinstance(protocol, WebSocketUpstream):
            began = self._clock.seconds()
            try:
                await open_websocket(protocol, request, self._clock, self._config.timeouts)
            except UpstreamFailure as failure:
                self._add(failed("websocket", failure))
                raise
            message = f"opened at {request.authority}, subprotocol mqtt"
            self._pass("websocket", message, self._clock.seconds() - began)
        return peer

    async def _survey(self) -> Offer | None:
        """Return what the broker has, where a handshake may have failed for want of a common algorithm."""
        survey = Survey()
        while survey.hello is not None:
            record = survey.hello.record(_server_name(self._target), self._target.policy.alpn)
            try:
                asked = await self._asked(record)
                survey.answered(await within(self._config.timeouts.tls, asked.answer, self._clock))
            except (UpstreamFailure, TimeoutError):
                break
        return survey.offer

    async def _asked(self, record: bytes) -> Question:
        """Connect as a session does, and send a ClientHello.  Raises `UpstreamFailure`."""
        upstream, clock, timeouts, proxy = self._target.upstream, self._clock, self._config.timeouts, self._target.proxy
        build: Any = partial(Question, record)
        if proxy is None:
            addresses = await resolve(self._network, upstream.connect_name, upstream.port, clock, timeouts)
            direct: Question = await connect(self._network, addresses, build, clock, timeouts)
            return direct
        addresses = await resolve(self._network, proxy.server.host, proxy.server.port, clock, timeouts)
        to_proxy: Any = partial(proxy.connection, upstream, build, timeouts.tcp_user)
        connection = await connect(self._network, addresses, to_proxy, clock, timeouts)
        opened: Any = await open_tunnel(connection, proxy.server, clock, timeouts)
        question: Question = opened
        return question

    # ---- results

    @property
    def made_session(self) -> bool:
        """Whether the broker has made a session for the device's name that it keeps, and that was not there before."""
        return not self._is_clean and self._transport.received[:4] == b"\x20\2\0\0"

    @property
    def _is_clean(self) -> bool:
        return self._login.clean if self._guise is None else self._guise.connect.clean_start

    def _conclude(self, record: SessionRecord) -> None:
        """Report the answer to CONNECT, and the steps that were not reached."""
        if self._stops_before_connect and not self._failed_at:
            for name in list(self._left):
                self._add(Step(name, Status.SKIP, self._stops_before_connect))
        elif "connect" not in self._left:
            self._add(self._connack(record))
        elif not self._failed_at:
            reason = record.reason or EndReason.INTERNAL_ERROR
            self._add(failed(self._left[0], UpstreamFailure(reason, record.detail)))
        for name in list(self._left):
            self._add(Step(name, Status.SKIP, f"not reached: {self._failed_at} failed"))

    def _connack(self, record: SessionRecord) -> Step:
        reason = record.reason or EndReason.INTERNAL_ERROR
        detail = unprintable_escaped(record.detail, 256)
        if record.connack_seconds is not None:
            facts = {"code": 0, "seconds": record.connack_seconds}
            if reason is EndReason.DEVICE_DISCONNECT:
                message = f"0x00, connection accepted{_in(record.connack_seconds)}"
                return Step("connack", Status.PASS, message, facts=facts)
            message = f"0x00, connection accepted, then {reason}: {detail}"
            return Step("connack", Status.WARN, message, reason.remedy, facts=facts)
        if reason is not EndReason.UPSTREAM_REFUSED:
            return failed("connack", UpstreamFailure(reason, detail))
        code = self._transport.received[3]  # the session has checked that this is a CONNACK of four bytes
        message = detail.removeprefix("CONNACK ")
        status, remedy = self._refusal(code)
        return Step("connack", status, message, remedy, facts={"reason": reason, "code": code})

    def _refusal(self, code: int) -> tuple[Status, str]:
        """Distinguish a refusal of this CONNECT's content from one that every device will get."""
        login = self._login
        if self._guise is not None:
            return Status.FAIL, _CONNACK_REMEDIES.get(code, EndReason.UPSTREAM_REFUSED.remedy)
        if code in {_BAD_CREDENTIALS, _NOT_AUTHORIZED} and login.username is None:
            words = "The connection works; the broker requires credentials, which devices send."
            return Status.WARN, f"{words} Test some with --username and --password-file."
        if code == _IDENTIFIER_REJECTED and not login.chose_identifier:
            words = "The connection works; the broker requires another Client Identifier: devices have their own."
            return Status.WARN, f"{words} Test one with --client-id."
        return Status.FAIL, _CONNACK_REMEDIES.get(code, EndReason.UPSTREAM_REFUSED.remedy)

    def _pass(self, name: str, message: str, seconds: float | None = None, **facts: object) -> None:
        if seconds is not None:
            message += _in(seconds)
            facts["seconds"] = seconds
        self._add(Step(name, Status.PASS, message, facts=facts))

    def _add(self, step: Step) -> None:
        self._left.remove(step.name)
        if step.status is Status.FAIL and not self._failed_at:
            self._failed_at = step.name
        self._add_step(evolve(step, upstream=self._target.upstream.address))


def _server_name(target: Target) -> str | None:
    return None if target.identity.sni is None else target.identity.sni.decode("ascii")


class Question(Protocol):
    """A connection that sends one ClientHello, reads the answer and ends.

    `answer` fires with what the broker chose, `None` if it chose nothing; cancelling it ends the connection.
    """

    def __init__(self, record: bytes) -> None:
        self._record = record
        self._reader = Reader()
        self.answer: Deferred[Answer | None] = Deferred(lambda _: self._end())

    def connectionMade(self) -> None:
        """Send the ClientHello."""
        assert self.transport is not None  # noqa: S101  narrows the type
        self.transport.write(self._record)

    def dataReceived(self, data: bytes) -> None:
        """Read the answer."""
        is_complete, answer = self._reader.feed(data)
        if is_complete and not self.answer.called:
            self.answer.callback(answer)
            self._end()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take it as a refusal."""
        del reason
        if not self.answer.called:
            self.answer.callback(None)

    def _end(self) -> None:
        transport: Any = self.transport
        transport.abortConnection()


class _Device:
    """The transport of the simulated device: keeps what it is sent, and closes when told to."""

    def __init__(self, protocol: DeviceProtocol, clock: IReactorTime) -> None:
        self.received = b""
        self._protocol = protocol
        self._clock = clock
        self._present = True

    def write(self, data: bytes) -> None:
        """Keep bytes."""
        self.received += data

    def loseWriteConnection(self) -> None:  # noqa: N802  Twisted's name
        """Close, as a device does after the gateway has closed."""
        self.abortConnection()

    def abortConnection(self) -> None:
        """Close, after the caller has finished."""
        if self._present:
            self._present = False
            self._clock.callLater(0, self._protocol.connectionLost, Failure(ConnectionDone()))

    def registerProducer(self, producer: object, streaming: bool) -> None:
        """Writes never block here, so there is nothing to pause."""

    def unregisterProducer(self) -> None:
        """See `registerProducer`."""

    def pauseProducing(self) -> None:
        """This device sends nothing unasked."""

    def resumeProducing(self) -> None:
        """See `pauseProducing`."""


def _in(seconds: float) -> str:
    return f" ({seconds * 1000:.0f} ms)"
