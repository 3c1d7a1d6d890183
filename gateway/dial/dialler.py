"""From a session that wants its broker to a verified connection: which broker, when, and what became of it.

In: a session whose CONNECT is whole.  Out: `Session.upstream_verified` with a side that is verified, or
`Session.upstream_failed` with the reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias

from attrs import Factory as Default
from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Config, Upstream
from gateway.dial.health import UpstreamHealth
from gateway.dial.pacing import Pacer
from gateway.dial.steps import connect, handshake, resolve
from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.net.network import Network, shown_address
from gateway.relay.device import DeviceProtocol
from gateway.relay.upstream import UpstreamProtocol
from gateway.session.record import Dial, Peer
from gateway.session.session import Session
from gateway.text import printable
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel
from gateway.tls.tickets import Tickets
from gateway.tls.trust import TLSPolicy

_log = Logger(namespace="gateway")


@frozen(slots=True)
class Target:
    """One configured broker: where it is dialled, who it must prove to be, and what it may prove that with."""

    upstream: Upstream
    identity: Identity
    policy: TLSPolicy
    tickets: Tickets | None = field(
        init=False,
        eq=False,
        default=Default(
            lambda target: Tickets(target.policy, target.identity) if target.policy.resumption else None,
            takes_self=True,
        ),
    )


Route: TypeAlias = Sequence[tuple[Target, "UpstreamHealth"]]
"""Brokers in the order of preference, each with how it fares."""


class DialJournal(Protocol):
    """Who is told what became of dials; upstreams are named by `host:port`."""

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """A session found its broker, but not in the first place: `upstream` failed."""

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """`upstream` failed, and for so many seconds no session dials it."""

    def serves_again(self, upstream: str) -> None:
        """`upstream` had been left alone, and was verified again."""


class Dialler:
    """Opens upstream connections: the configured brokers in order, until one is verified.

    A broker that failed is left alone for a while (`UpstreamHealth`).  Sessions that come meanwhile go to the next one
    at once; if there is none, they are told at once.  When the while is over, one dial finds out: the gateway's own,
    up to the verified channel and not a byte further, or that of a session that has no other broker to go to.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        healths: Sequence[UpstreamHealth],
        network: Network,
        clock: IReactorTime,
        config: Config,
        journal: DialJournal,
    ) -> None:
        """Take where to go, the account that is to be kept of each, and whom to tell."""
        self._targets: Route = list(zip(targets, healths, strict=True))
        # Where sessions go that name no upstream.
        self._route = [choice for choice in self._targets if choice[0].upstream.default]
        self._network = network
        self._clock = clock
        self._timeouts = config.timeouts
        self._journal = journal
        self.pacer = Pacer(config.pacing, clock)
        self.identities = any(device.client_cert is not None for device in config.device)
        # The gateway's own dials that are under way, and the connections of those that are done, until they are closed.
        self._trials: set[Deferred[None]] = set()
        self._closing: dict[UpstreamProtocol, float] = {}

    @property
    def upstreams(self) -> list[UpstreamHealth]:
        """How each broker fares, in the order of preference."""
        return [health for _, health in self._targets]

    def route(self, names: Sequence[str], policy: TLSPolicy | None) -> Route:
        """Return a way of their own for some sessions: to the upstreams that are named, or to all that serve everybody.

        With a `policy` of their own they have TLS sessions of their own, too: what is resumed is never another's.
        """
        chosen = (
            [choice for name in names for choice in self._targets if choice[0].upstream.name == name]
            if names
            else self._route
        )
        if policy is None:
            return chosen
        return [(Target(target.upstream, target.identity, policy), health) for target, health in chosen]

    def dial(self, session: Session, device: DeviceProtocol, route: Route | None = None) -> Deferred[None]:
        """Find an upstream for `session`, whose device's side is `device`.  Cancelling it leaves nothing behind."""
        dialling = Deferred.fromCoroutine(self.lead(session, device, self._route if route is None else route))

        def failed(failure: Failure) -> None:
            if failure.check(CancelledError) is None:
                _log.failure("session {number}: a mistake of the gateway", failure, number=session.record.number)
                session.fail(failure.type.__name__ if failure.type is not None else "unknown")

        dialling.addErrback(failed)
        return dialling

    def sweep(self) -> None:
        """Try brokers that have been left alone for long enough; called every second or so."""
        now = self._clock.seconds()
        for target, health in self._targets:
            if health.is_due(now):
                self._try(target, health)
        for protocol in [protocol for protocol, deadline in self._closing.items() if now >= deadline]:
            del self._closing[protocol]
            protocol.abort()

    def stop(self) -> None:
        """Give up the gateway's own dials; sessions give up theirs."""
        for trial in list(self._trials):
            trial.cancel()
        for protocol in self._closing:
            protocol.abort()
        self._closing.clear()

    # ---- a session's dial

    async def lead(self, session: Session, device: DeviceProtocol, route: Route | None = None) -> None:
        """Do what `dial` does; what is raised is a mistake of the gateway."""
        route = self._route if route is None else route
        failures: dict[UpstreamHealth, UpstreamFailure] = {}
        session.dials(Dial(route[0][1].address))
        if self._choose(route, failures) is None:
            session.upstream_failed(self._summary(route, failures, None))
            return
        if not await self._turn(session, device):
            return
        last: UpstreamFailure | None = None
        while (choice := self._choose(route, failures)) is not None:
            target, health = choice
            dial = Dial(health.address)
            session.dials(dial)
            try:
                protocol, peer = await self._attempt(target, health, dial)
            except UpstreamFailure as failure:
                # A copy: what was raised keeps this frame, which would keep it.
                failures[health] = last = UpstreamFailure(failure.reason, failure.detail)
            else:
                self._tell_passed_over(route, health, failures)
                protocol.serve(session, device, peer)
                return
        if last is None:
            self.pacer.give_back()
        session.upstream_failed(self._summary(route, failures, last))

    def _choose(self, route: Route, failures: Container[UpstreamHealth]) -> tuple[Target, UpstreamHealth] | None:
        """Return the next broker to dial: the first that serves; if none does, the first that may be tried again."""
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

    async def _turn(self, session: Session, device: DeviceProtocol) -> bool:
        """Wait for the session's turn; return whether there is one."""
        try:
            turn = self.pacer.turn()
        except SessionEnd as refusal:
            session.upstream_failed(refusal)
            return False
        if turn is None:
            return True
        await turn
        if not session.pending and device.has_left():
            # It was not read while it waited, so this is the first that the gateway knows of it.  To dial for it would
            # take the turn away from one that is still there.  What it sent before it left still counts: some devices
            # wait for nothing and close behind DISCONNECT.
            self.pacer.give_back()
            session.upstream_failed(SessionEnd(EndReason.DEVICE_LOST, "while it waited for its turn"))
            return False
        return True

    def _tell_passed_over(
        self, route: Route, served: UpstreamHealth, failures: Mapping[UpstreamHealth, UpstreamFailure]
    ) -> None:
        for _, health in route:
            if health is served:
                return
            failure = failures.get(health, health.last_failure)
            if failure is not None:
                self._journal.passed_over(health.address, failure)

    def _summary(
        self, route: Route, failures: Mapping[UpstreamHealth, UpstreamFailure], last: UpstreamFailure | None
    ) -> UpstreamFailure:
        """Return why there is no upstream: the broker that was tried last gives the reason, all of them the detail.

        Those that are left alone are told of with what they failed at before.
        """
        now = self._clock.seconds()
        told: list[tuple[str, UpstreamFailure]] = []
        for _, health in route:
            failure = failures.get(health)
            if failure is None and health.last_failure is not None:
                before, standing = health.last_failure, health.standing(now)
                failure = UpstreamFailure(before.reason, f"{before.detail}; {standing}" if before.detail else standing)
            if failure is not None:
                told.append((health.address, failure))
        if len(told) == 1:
            return told[0][1]
        reason = last.reason if last is not None else told[-1][1].reason
        return UpstreamFailure(reason, "; ".join(f"{address}: {failure}" for address, failure in told))

    async def _attempt(self, target: Target, health: UpstreamHealth, dial: Dial) -> tuple[UpstreamProtocol, Peer]:
        """Dial one broker, and keep the account of it.  Raises `UpstreamFailure`."""
        attempt = health.begin(self._clock.seconds())
        try:
            protocol, peer = await self._reach(target, dial)
        except UpstreamFailure as failure:
            if failure.reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED and self.identities:
                # One identity's own matter: the broker may well serve the others.
                health.given_up(attempt)
                raise
            now = self._clock.seconds()
            if health.failed(attempt, failure, now) and health.retry_at is not None:
                self._journal.left_alone(health.address, failure, health.retry_at - now)
            raise
        except BaseException:
            # Cancelled, mostly; whatever it is, it must not keep the place of the one dial that may try.
            health.given_up(attempt)
            raise
        health.last_address = dial.address
        if health.verified(peer, self._clock.seconds()):
            self._journal.serves_again(health.address)
        return protocol, peer

    # ---- the gateway's own dial

    def _try(self, target: Target, health: UpstreamHealth) -> None:
        trial = Deferred.fromCoroutine(self._trial(target, health))
        self._trials.add(trial)
        trial.addBoth(lambda _: self._trials.discard(trial))

    async def _trial(self, target: Target, health: UpstreamHealth) -> None:
        """See whether a broker can be verified; not one MQTT byte is sent."""
        try:
            protocol, _ = await self._attempt(target, health, Dial(health.address))
        except (UpstreamFailure, CancelledError):
            return
        except Exception:  # noqa: BLE001  a mistake here must not end the sweep, nor the trials to come
            _log.failure("a mistake of the gateway while it tried {upstream}", upstream=health.address)
            return
        self._closing[protocol] = self._clock.seconds() + self._timeouts.close
        protocol.close()

    async def _reach(self, target: Target, dial: Dial) -> tuple[UpstreamProtocol, Peer]:
        """Resolve, connect, shake hands, verify.  Returns a verified connection; raises `UpstreamFailure`.

        Some brokers break off when a TLS session is to be resumed (OpenSSL's with client certificates and no session
        id context do).  That must not lock anybody out, nor hide why a broker is refused: it is tried in full at once.
        """
        protocol = await self._connect(target, dial, target.tickets)
        try:
            return protocol, await self._shake_hands(protocol, dial)
        except UpstreamFailure as failure:
            if target.tickets is None or not protocol.resuming:
                raise
            if target.tickets.suspend():
                _log.info(
                    "upstream {upstream}: the handshake failed when a TLS session was to be resumed ({why}); "
                    "for the next hour all handshakes with it are full",
                    event="resumption-suspended",
                    upstream=target.upstream.address,
                    why=printable(str(failure), 400),
                )
            if failure.reason is EndReason.TLS_TIMEOUT:
                raise
        protocol = await self._connect(target, dial, None)
        return protocol, await self._shake_hands(protocol, dial)

    async def _connect(self, target: Target, dial: Dial, tickets: Tickets | None) -> UpstreamProtocol:
        seconds = self._clock.seconds
        dial.address = ""
        dial.dns_seconds = dial.tcp_seconds = dial.tls_seconds = None

        began = seconds()
        addresses = await resolve(self._network, target.upstream, self._clock, self._timeouts)
        resolved = seconds()
        dial.dns_seconds = resolved - began

        # No closure, since the transport keeps it for as long as it lives.
        build = partial(_make_upstream, target, tickets, self._timeouts.tcp_user)
        protocol = await connect(self._network, addresses, build, self._clock, self._timeouts)
        dial.tcp_seconds = seconds() - resolved
        dial.address = shown_address(protocol.transport.getPeer())
        return protocol

    async def _shake_hands(self, protocol: UpstreamProtocol, dial: Dial) -> Peer:
        began = self._clock.seconds()
        peer = await handshake(protocol, self._clock, self._timeouts)
        dial.tls_seconds = self._clock.seconds() - began
        return peer


def _make_upstream(target: Target, tickets: Tickets | None, user_timeout: float) -> UpstreamProtocol:
    return UpstreamProtocol(TLSChannel(target.policy, target.identity, tickets), user_timeout)
