"""Opens verified upstream connections for sessions: which broker, when, and with what result.

In: a session with a complete CONNECT.  Out: `Session.upstream_verified` with a verified side, or
`Session.upstream_failed` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from attrs import Factory as Default
from attrs import evolve, field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Config, Upstream
from gateway.dial.health import UpstreamHealth
from gateway.dial.pacing import Pacer
from gateway.dial.proof import Proof
from gateway.dial.proxy import PROXY_FAILURES, ProxyConnection, ProxyRoute, TLSLayer, intercepted, unreachable_proxy
from gateway.dial.steps import connect, handshake, open_tunnel, open_websocket, resolve, within
from gateway.dial.websocket import WebSocketRoute
from gateway.errors import EndReason, GatewayError, Refusal, SessionEnd, UnknownIssuer, UpstreamFailure, let_frames_go
from gateway.net.network import Network, shown_address
from gateway.relay.device import DeviceProtocol
from gateway.relay.side import Gauge
from gateway.relay.upstream import Served, UpstreamProtocol
from gateway.relay.websocket import WebSocketUpstream
from gateway.rules.turns import ANYONE, Visitor
from gateway.session.record import Dial, Peer
from gateway.session.session import Session
from gateway.text import unprintable_escaped
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel
from gateway.tls.tickets import Tickets
from gateway.tls.trust import TLSPolicy

_log = Logger(namespace="gateway")

_Connection = TypeVar("_Connection", UpstreamProtocol, ProxyConnection | TLSLayer)

LEFT_WHILE_WAITING = "while waiting for its turn"
"""The detail of a session whose device had closed its sending side, or all, when its turn came."""

# They say nothing about the broker.
_NOT_OF_BROKER = PROXY_FAILURES | {EndReason.OUT_OF_RESOURCES}
# How a TLS 1.2 broker ends the handshake if it does not accept the client certificate, or the lack of one; not all send
# an alert.  With TLS 1.3 the client's handshake is done by then.
_AFTER_APPROVAL = frozenset(
    {
        EndReason.TLS_CLIENT_CERTIFICATE_REFUSED,
        EndReason.TLS_HANDSHAKE_FAILED,
        EndReason.TLS_CLOSED,
        EndReason.TLS_TIMEOUT,
    }
)
# Seconds in which a broker of TLS 1.3 refuses a client certificate after the client's handshake is done.
_REFUSED_WITHIN = 2.0


class _IdentityRefused(UpstreamFailure):
    """The broker proved its name, and then ended the handshake: it refused the identity that it was shown."""


@frozen(slots=True)
class Target:
    """One configured broker: its address, the identity that it must prove, and the TLS policy that applies."""

    upstream: Upstream
    identity: Identity
    policy: TLSPolicy
    proxy: ProxyRoute | None = None
    websocket: WebSocketRoute | None = None
    tickets: Tickets | None = field(
        init=False,
        eq=False,
        default=Default(
            lambda target: Tickets(target.policy, target.identity) if target.policy.resumption else None,
            takes_self=True,
        ),
    )


class Superseded(GatewayError):
    """A reload took effect before the session's CONNECT was sent; the new configuration must judge it."""


Route: TypeAlias = Sequence[tuple[Target, "UpstreamHealth"]]
"""Brokers in order of preference, each with its health."""


class Seeker(Served, Protocol):
    """Who wants a broker: a `Session`, or a stored device's connection."""

    @property
    def pending(self) -> int:
        """See `Session.pending`."""

    def dials(self, dial: Dial) -> None:
        """See `Session.dials`."""

    def refuse(self, refusal: Refusal) -> None:
        """See `Session.refuse`."""

    def upstream_failed(self, failure: SessionEnd) -> None:
        """See `Session.upstream_failed`."""


class DialJournal(Protocol):
    """Receives the results of connection attempts; upstreams are named by `host:port`."""

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """A session was served by another broker, because `upstream` failed."""

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """`upstream` failed; the next attempt is in `seconds`."""

    def serves_again(self, upstream: str) -> None:
        """`upstream` was verified again after backing off."""


class Dialler:
    """Opens upstream connections: the configured brokers in order, until one is verified.

    After a failure, the dialler backs off from that broker (`UpstreamHealth`).  Meanwhile sessions use the next one at
    once; if there is none, they fail at once.  After the delay, one attempt tries the broker again: either the
    gateway's own trial, which stops at the verified channel, or that of a session that has no other broker to use.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        healths: Sequence[UpstreamHealth],
        network: Network,
        clock: IReactorTime,
        config: Config,
        journal: DialJournal,
        patience: IReactorTime,
    ) -> None:
        """Take the brokers, the health of each, who receives the results, and the clock of timeouts."""
        self._targets: Route = list(zip(targets, healths, strict=True))
        # For sessions whose rule names no upstream.
        self._route = [choice for choice in self._targets if choice[0].upstream.default]
        self._network = network
        self._clock = clock
        self._patience = patience
        self._timeouts = config.timeouts
        self._journal = journal
        self.pacer = Pacer(config.pacing, patience)
        # Whether a configuration that judges sessions differently has replaced this one.
        self.superseded = False
        self.identities = any(device.client_cert is not None for device in config.device)
        # The gateway's own trials in progress, and the connections of finished ones until they are closed.
        self.trials: set[Deferred[None]] = set()
        self._closing: dict[UpstreamProtocol, float] = {}

    @property
    def proxies(self) -> list[ProxyRoute | None]:
        """The proxy of each broker, in the order of preference."""
        return [target.proxy for target, _ in self._targets]

    @property
    def default_route(self) -> Route:
        """The route of sessions whose rule names no upstream."""
        return self._route

    @property
    def upstreams(self) -> list[UpstreamHealth]:
        """The health of each broker, in order of preference."""
        return [health for _, health in self._targets]

    def route(self, names: Sequence[str], policy_for: Callable[[Upstream], TLSPolicy] | None) -> Route:
        """Return the route for sessions of one rule: the named upstreams, or all default ones.

        With its own policies, a route has its own TLS tickets: a session is never resumed under another identity.
        """
        chosen = (
            [choice for name in names for choice in self._targets if choice[0].upstream.name == name]
            if names
            else self._route
        )
        if policy_for is None:
            return chosen
        return [(evolve(target, policy=policy_for(target.upstream)), health) for target, health in chosen]

    def dial(
        self, session: Session, device: DeviceProtocol, route: Route | None = None, visitor: Visitor = ANYONE
    ) -> Deferred[None]:
        """Find an upstream for `session`, whose device side is `device`.  Cancelling the result releases everything."""
        return begin(self.lead(session, device, route, visitor), session)

    def sweep(self) -> None:
        """Try brokers whose back-off delay is over; called about once a second."""
        now = self._clock.seconds()
        for target, health in self._targets:
            if health.is_due(now):
                self._try(target, health)
        for protocol in [protocol for protocol, deadline in self._closing.items() if now >= deadline]:
            del self._closing[protocol]
            protocol.abort()

    def stop(self) -> None:
        """Cancel the gateway's own trials; sessions cancel their own attempts."""
        for trial in list(self.trials):
            trial.cancel()
        for protocol in self._closing:
            protocol.abort()
        self._closing.clear()

    # ---- sessions

    async def lead(
        self,
        session: Seeker,
        device: DeviceProtocol | Gauge,
        route: Route | None = None,
        visitor: Visitor = ANYONE,
    ) -> None:
        """Do what `dial` does.  Raises `Superseded`; anything else that is raised is an internal error."""
        self._check_current()
        route = self._route if route is None else route
        failures: dict[UpstreamHealth, UpstreamFailure] = {}
        session.dials(Dial(route[0][1].address))
        if self._choose(route, failures) is None:
            session.upstream_failed(self._summary(route, failures, None))
            return
        if not await self._turn(session, device, visitor):
            return
        self._check_current()
        last: UpstreamFailure | None = None
        while (choice := self._choose(route, failures)) is not None:
            target, health = choice
            dial = Dial(health.address)
            session.dials(dial)
            try:
                protocol, peer = await self._attempt(target, health, dial, visitor)
            except UpstreamFailure as failure:
                # A copy: the raised exception references this frame, which would keep it alive.
                failures[health] = last = UpstreamFailure(failure.reason, failure.detail)
                let_frames_go(failure)
                self._check_current()
            except Refusal as refusal:
                # It was not its turn at the program that opens WebSockets, which says nothing about the broker.
                let_frames_go(refusal)
                self._check_current()
                if last is None:
                    self.pacer.give_back()
                session.refuse(refusal)
                return
            else:
                if self.superseded:
                    protocol.abort()
                    raise Superseded
                self._tell_passed_over(route, health, failures)
                protocol.serve(session, device, peer)
                return
        if last is None:
            self.pacer.give_back()
        session.upstream_failed(self._summary(route, failures, last))

    def _check_current(self) -> None:
        if self.superseded:
            raise Superseded

    def _choose(self, route: Route, failures: Container[UpstreamHealth]) -> tuple[Target, UpstreamHealth] | None:
        """Return the next broker to try: the first open one; if there is none, the first that is due for a trial."""
        due: tuple[Target, UpstreamHealth] | None = None
        now = self._clock.seconds()
        for choice in route:
            health = choice[1]
            if health not in failures:
                if health.is_open:
                    return choice
                if due is None and health.is_due(now):
                    due = choice
        return due

    async def _turn(self, session: Seeker, device: DeviceProtocol | Gauge, visitor: Visitor) -> bool:
        """Wait for the session's turn; return whether it still wants one."""
        try:
            turn = self.pacer.turn(visitor)
            if turn is None:
                return True
            await turn
        except SessionEnd as refusal:
            let_frames_go(refusal)
            session.upstream_failed(refusal)
            return False
        if isinstance(device, DeviceProtocol) and not session.pending and device.has_left():
            # The device was not read while it waited, so this is the first check.  To connect for it wastes a turn.
            # What it sent before it left still counts: some devices send everything, then DISCONNECT, and close.
            self.pacer.give_back()
            session.upstream_failed(SessionEnd(EndReason.DEVICE_LOST, LEFT_WHILE_WAITING))
            return False
        return True

    def _tell_passed_over(
        self, route: Route, served: UpstreamHealth, failures: Mapping[UpstreamHealth, UpstreamFailure]
    ) -> None:
        for _, health in route:
            if health is served:
                return
            failure = failures.get(health, health.decisive.last_failure)
            if failure is not None:
                self._journal.passed_over(health.address, failure)

    def _summary(
        self, route: Route, failures: Mapping[UpstreamHealth, UpstreamFailure], last: UpstreamFailure | None
    ) -> UpstreamFailure:
        """Return why no broker is available: the reason of the broker tried last, with the details of all.

        For brokers in back-off, the detail is that of their last failure.
        """
        told: list[tuple[str, UpstreamFailure]] = []
        for _, health in route:
            failure = failures.get(health)
            before = health.decisive.last_failure
            if failure is None and before is not None:
                standing = health.standing()
                failure = UpstreamFailure(before.reason, f"{before.detail}; {standing}" if before.detail else standing)
            if failure is not None:
                told.append((health.address, failure))
        if len(told) == 1:
            return told[0][1]
        reason = last.reason if last is not None else told[-1][1].reason
        return UpstreamFailure(reason, "; ".join(f"{address}: {failure}" for address, failure in told))

    async def _attempt(
        self, target: Target, health: UpstreamHealth, dial: Dial, visitor: Visitor
    ) -> tuple[UpstreamProtocol, Peer]:
        """Try one broker and record the result in its health.  Raises `UpstreamFailure`, and `Refusal` for no turn."""
        attempt = health.begin(self._clock.seconds())
        try:
            protocol, peer = await self._reach(target, dial, visitor)
        except UpstreamFailure as failure:
            if failure.reason in _NOT_OF_BROKER:
                health.given_up(attempt)
                raise
            now = self._clock.seconds()
            if self.identities and isinstance(failure, _IdentityRefused):
                # This concerns one identity, which in a trial is the gateway's own: the broker may serve the others.
                if health.refused_identity(failure, now):
                    self._journal.serves_again(health.address)
                raise
            if health.failed(attempt, failure, now) and health.retry_at is not None:
                self._journal.left_alone(health.address, failure, health.retry_at - now)
            raise
        except BaseException:
            # Usually a cancellation; whatever it is, it must not block further trials.
            health.given_up(attempt)
            raise
        health.last_address = dial.address
        if health.verified(peer, self._clock.seconds()):
            self._journal.serves_again(health.address)
        return protocol, peer

    # ---- the gateway's own trials

    def _try(self, target: Target, health: UpstreamHealth) -> None:
        trial = Deferred.fromCoroutine(self._trial(target, health))
        self.trials.add(trial)
        trial.addBoth(lambda _: self.trials.discard(trial))

    async def _trial(self, target: Target, health: UpstreamHealth) -> None:
        """Check whether a broker can be verified; not one MQTT byte is sent."""
        try:
            protocol, _ = await self._attempt(target, health, Dial(health.address), ANYONE)
        except (UpstreamFailure, Refusal, CancelledError) as ended:
            let_frames_go(ended)
            return
        except Exception:  # noqa: BLE001  an error here must not stop the sweep or later trials
            _log.failure("internal error while trying {upstream}", upstream=health.address)
            return
        self._closing[protocol] = self._clock.seconds() + self._timeouts.close
        protocol.close()

    async def prove(self, names: Sequence[str], policy_for: Callable[[Upstream], TLSPolicy]) -> None:
        """Show a client certificate to the first broker of a rule's that can be reached; not one MQTT byte is sent.

        Raises `UpstreamFailure` if none accepts it.
        """
        failures: list[str] = []
        last = UpstreamFailure(EndReason.TCP_UNREACHABLE, "no broker")
        for target, health in self.route(names, policy_for):
            try:
                await self._prove(evolve(target, websocket=None), health)
            except UpstreamFailure as failure:
                last = UpstreamFailure(failure.reason, failure.detail)
                failures.append(f"{health.address}: {last}")
                let_frames_go(failure)
            else:
                return
        raise UpstreamFailure(last.reason, "; ".join(failures))

    async def _prove(self, target: Target, health: UpstreamHealth) -> None:
        dial = Dial(health.address)
        protocol = await self._connect(target, dial, None)
        peer = await self._shake_hands(protocol, dial)
        proof = Proof()
        protocol.serve(proof, proof.gauge, peer)
        try:
            await within(min(_REFUSED_WITHIN, self._timeouts.tls), proof.ended, self._patience)
        except TimeoutError:
            return
        except SessionEnd as end:
            raise UpstreamFailure(end.reason, end.detail) from None
        finally:
            proof.ended.addErrback(lambda _: None)
            protocol.close()
            self._closing[protocol] = self._clock.seconds() + self._timeouts.close

    async def _reach(self, target: Target, dial: Dial, visitor: Visitor) -> tuple[UpstreamProtocol, Peer]:
        """Resolve, connect, shake hands, verify.  Returns a verified connection; raises as `_attempt`.

        Some brokers abort the handshake when a session ticket is offered (OpenSSL with client certificates and no
        session id context does).  That must not lock devices out or hide why a broker is refused, so a full handshake
        is tried at once.
        """
        # Made first, because the WebSocket has to be asked for in the turn in which the broker is verified.
        request = await target.websocket.request(visitor) if target.websocket is not None else None
        try:
            protocol, peer = await self._reach_verified(target, dial)
        except UnknownIssuer as failure:
            if target.proxy is not None:
                raise intercepted(target.proxy.server, failure) from None
            raise
        if request is not None:
            assert isinstance(protocol, WebSocketUpstream)  # noqa: S101  made for this target; narrows the type
            await open_websocket(protocol, request, self._patience, self._timeouts)
        return protocol, peer

    async def _reach_verified(self, target: Target, dial: Dial) -> tuple[UpstreamProtocol, Peer]:
        protocol = await self._connect(target, dial, target.tickets)
        try:
            return protocol, await self._shake_hands(protocol, dial)
        except UpstreamFailure as failure:
            if target.tickets is None or not protocol.resuming:
                raise
            if target.tickets.suspend():
                _log.info(
                    "upstream {upstream}: resuming a TLS session failed ({why}); "
                    "using full handshakes for the next hour",
                    event="resumption-suspended",
                    upstream=target.upstream.address,
                    why=unprintable_escaped(str(failure), 400),
                )
            if failure.reason is EndReason.TLS_TIMEOUT:
                raise
        protocol = await self._connect(target, dial, None)
        return protocol, await self._shake_hands(protocol, dial)

    async def _connect(self, target: Target, dial: Dial, tickets: Tickets | None) -> UpstreamProtocol:
        dial.address = ""
        dial.dns_seconds = dial.tcp_seconds = dial.tls_seconds = None
        # Not a closure, because the transport keeps it for its lifetime.
        build = partial(_make_upstream, target, tickets, self._timeouts.tcp_user, self._clock)
        if target.proxy is None:
            upstream = target.upstream
            return await self._connect_to(upstream.connect_name, upstream.port, build, dial)
        return await self._connect_through(target.proxy, target.upstream, build, dial)

    async def _connect_to(self, host: str, port: int, build: Callable[[], _Connection], dial: Dial) -> _Connection:
        seconds = self._clock.seconds
        began = seconds()
        addresses = await resolve(self._network, host, port, self._patience, self._timeouts)
        resolved = seconds()
        dial.dns_seconds = resolved - began
        connection = await connect(self._network, addresses, build, self._patience, self._timeouts)
        dial.tcp_seconds = seconds() - resolved
        dial.address = shown_address(connection.transport.getPeer())
        return connection

    async def _connect_through(
        self, proxy: ProxyRoute, upstream: Upstream, build: Callable[[], UpstreamProtocol], dial: Dial
    ) -> UpstreamProtocol:
        """Connect to the broker through a proxy, and record how the proxy does."""
        health = proxy.health
        attempt = health.begin(self._clock.seconds())
        try:
            to_proxy = partial(proxy.connection, upstream, build, self._timeouts.tcp_user)
            try:
                connection = await self._connect_to(proxy.server.host, proxy.server.port, to_proxy, dial)
            except UpstreamFailure as failure:
                if failure.reason is EndReason.OUT_OF_RESOURCES:
                    raise
                raise unreachable_proxy(proxy.server, failure) from None
            protocol = await open_tunnel(connection, proxy.server, self._patience, self._timeouts)
        except UpstreamFailure as failure:
            now = self._clock.seconds()
            if failure.reason is EndReason.OUT_OF_RESOURCES:
                health.given_up(attempt)
            elif failure.reason not in PROXY_FAILURES:
                # The proxy answered, and could not reach the broker.
                self._proxy_works(health)
            elif health.failed(attempt, failure, now) and health.retry_at is not None:
                self._journal.left_alone(health.address, failure, health.retry_at - now)
            raise
        except BaseException:
            health.given_up(attempt)
            raise
        self._proxy_works(health)
        return protocol

    def _proxy_works(self, health: UpstreamHealth) -> None:
        if health.works(self._clock.seconds()):
            self._journal.serves_again(health.address)

    async def _shake_hands(self, protocol: UpstreamProtocol, dial: Dial) -> Peer:
        began = self._clock.seconds()
        try:
            peer = await handshake(protocol, self._patience, self._timeouts)
        except UpstreamFailure as failure:
            if protocol.approved and failure.reason in _AFTER_APPROVAL:
                raise _IdentityRefused(failure.reason, failure.detail) from None
            raise
        dial.tls_seconds = self._clock.seconds() - began
        return peer


def begin(steps: Coroutine[Any, Any, None], session: Session) -> Deferred[None]:
    """Begin the steps to a session's broker.  An internal error ends the session; only `Superseded` is passed on."""

    def failed(failure: Failure) -> None:
        if failure.check(Superseded, CancelledError) is None:
            _log.failure("session {number}: internal error", failure, number=session.record.number)
            session.fail(failure.type.__name__ if failure.type is not None else "unknown")
        let_frames_go(failure.value)
        if failure.check(Superseded):
            # Another one: the same would reference this frame, and this frame it.
            raise Superseded

    return Deferred.fromCoroutine(steps).addErrback(failed)


def _make_upstream(
    target: Target, tickets: Tickets | None, user_timeout: float, clock: IReactorTime
) -> UpstreamProtocol:
    return make_upstream(target, TLSChannel(target.policy, target.identity, tickets), user_timeout, clock)


def make_upstream(target: Target, channel: TLSChannel, user_timeout: float, clock: IReactorTime) -> UpstreamProtocol:
    """Return the protocol for a connection to `target`, with `user_timeout` in seconds."""
    if target.websocket is None:
        return UpstreamProtocol(channel, user_timeout)
    return WebSocketUpstream(channel, user_timeout, clock)
