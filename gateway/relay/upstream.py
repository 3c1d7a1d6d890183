"""The upstream's side: from a host name to a verified TLS channel, and MQTT over it.

In: a session that wants its broker.  Out: `Session.upstream_verified` with a side that is verified, or
`Session.upstream_failed` with the reason; then decrypted bytes one way and encrypted bytes the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from attrs import Factory as Default
from attrs import field, frozen
from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Config, Timeouts, Upstream
from gateway.relay.device import DeviceProtocol
from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.net.network import Address, Network
from gateway.dial.health import UpstreamHealth
from gateway.dial.pacing import Pacer
from gateway.net.race import AllFailed, interleave, race
from gateway.session.record import Peer, SessionRecord
from gateway.session.session import Session
from gateway.relay.side import RelaySide, how_lost, tune
from gateway.text import printable
from gateway.tls.channel import ChannelState, TLSChannel
from gateway.tls.broker_identity import Identity
from gateway.tls.tickets import Tickets
from gateway.tls.trust import TLSPolicy

_log = Logger(namespace="gateway")

_T = TypeVar("_T")

# Of some 30 bytes each; nobody needs one in a million records.
_MAX_UNREAD_ANSWERS = 1000


class UpstreamProtocol(RelaySide):
    """One TLS connection to the broker.

    `verified` fires with the `Peer` when the handshake is done, the chain is trusted and the identity matches, and
    fails with `UpstreamFailure` otherwise; cancelling it ends the connection.  Only then is there a session to talk to.
    """

    def __init__(self, channel: TLSChannel, user_timeout: float) -> None:
        super().__init__()
        self._channel = channel
        self._user_timeout = user_timeout
        self._session: Session | None = None
        self._device: DeviceProtocol | None = None
        self._unread_answers = 0
        # Ciphertext that waits for `close`.
        self._last = b""
        self.verified: Deferred[Peer] = Deferred(self._given_up)

    def _given_up(self, _: Deferred[Peer]) -> None:
        self.abort()

    @property
    def resuming(self) -> bool:
        """Whether a TLS session is, or was, to be resumed in a handshake that has not been done."""
        return self._channel.resuming

    def connectionMade(self) -> None:
        """Send the ClientHello."""
        tune(self.transport, self._user_timeout)
        try:
            self._channel.start()
        except UpstreamFailure as failure:
            self._refuse(failure)
        else:
            self._flush()

    def serve(self, session: Session, device: DeviceProtocol, peer: Peer) -> None:
        """Become the upstream of `session`."""
        self._session = session
        self._device = device
        self.link(device)
        session.upstream_verified(self, peer)

    def dataReceived(self, data: bytes) -> None:
        """Decrypt what came and give it to the session."""
        if self._closing:
            return
        try:
            self._receive(data)
        except Exception as problem:  # noqa: BLE001  a mistake in one session must not end the others
            _log.failure("a mistake of the gateway in an upstream connection")
            if self._session is not None:
                self._session.fail(type(problem).__name__)
            else:
                self._refuse(UpstreamFailure(EndReason.INTERNAL_ERROR, type(problem).__name__))

    def _receive(self, data: bytes) -> None:
        channel = self._channel
        try:
            plaintext = channel.receive(data)
        except UpstreamFailure as failure:
            self._flush()
            if self._session is None:
                self._refuse(failure)
            else:
                self._session.upstream_broken(failure)
            return
        if self._session is None:
            if channel.broken is not None:
                self._refuse(channel.broken)
                return
            if channel.state is not ChannelState.VERIFIED or channel.peer is None:
                self._flush()
                return
            # The end of the handshake leaves in one piece with the session's CONNECT.
            self.verified.callback(channel.peer)
        if channel.waiting and not self._closing:
            self._flush()
        session = self._session
        if session is None:
            # Whoever waited has gone meanwhile, or wanted to know no more than this and has closed it in order.
            if not self._closing:
                self.abort()
            return
        if plaintext:
            session.upstream_received(plaintext)
        if channel.broken is not None:
            session.upstream_broken(channel.broken)
        elif channel.received_close:
            session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "the broker closed the connection"))

    def write(self, data: bytes) -> None:
        """Encrypt and send.  Raises `NotVerified` before the broker is verified."""
        try:
            ciphertext = self._channel.send(data)
        except UpstreamFailure as failure:
            if self._session is not None:
                self._session.upstream_broken(failure)
            self._flush()
        else:
            self.transport.write(ciphertext)

    def write_last(self, data: bytes) -> None:
        """Encrypt bytes that leave with what `close` sends: DISCONNECT and close_notify in one piece."""
        try:
            self._last = self._channel.send(data)
        except UpstreamFailure as failure:
            if self._session is not None:
                self._session.upstream_broken(failure)
            self._flush()

    def close(self) -> None:
        """Send what is waiting, then close_notify and FIN."""
        if self._closing:
            return
        self._channel.close()
        ciphertext = self._last + self._channel.outgoing()
        if ciphertext:
            self.transport.write(ciphertext)
        self.finish()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell whoever waits."""
        closing = self._closing
        self.lost()
        self._channel.dispose()
        session, self._session = self._session, None
        self._device = None
        if session is not None:
            if not closing:
                detail = f"{how_lost(reason)} by the broker, without close_notify"
                session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, detail))
            session.upstream_gone()
        elif not closing and not self.verified.called:
            self.verified.errback(UpstreamFailure(EndReason.TLS_CLOSED, f"{how_lost(reason)} by the upstream"))

    def _refuse(self, failure: UpstreamFailure) -> None:
        """End a connection that is not to be trusted; its alert is sent, and nothing else ever was."""
        self._flush()
        self._closing = True
        self.transport.loseConnection()
        if not self.verified.called:
            self.verified.errback(failure)

    def _flush(self) -> None:
        ciphertext = self._channel.outgoing()
        if not ciphertext:
            return
        self.transport.write(ciphertext)
        # TLS answers some messages by itself (KeyUpdate, RFC 8446 §4.6.3).  A broker that demands such answers and does
        # not read them would fill this process's memory, past all backpressure.
        self._unread_answers = self._unread_answers + 1 if self._is_full() else 0
        if self._unread_answers > _MAX_UNREAD_ANSWERS and self._session is not None:
            self._session.upstream_broken(
                UpstreamFailure(EndReason.UPSTREAM_PROTOCOL_ERROR, "demands TLS answers and does not read them")
            )
            self.abort()

    def _is_full(self) -> bool:
        """Whether the broker does not keep up: the transport has told its producer, the device's side, to pause."""
        return self._device is not None and self._device.choked


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
        session.record.upstream = route[0][1].address
        if self._choose(route, failures) is None:
            session.upstream_failed(self._summary(route, failures, None))
            return
        if not await self._turn(session, device):
            return
        last: UpstreamFailure | None = None
        while (choice := self._choose(route, failures)) is not None:
            target, health = choice
            session.record.upstream = health.address
            try:
                protocol, peer = await self._attempt(target, health, session.record)
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

    async def _attempt(
        self, target: Target, health: UpstreamHealth, record: SessionRecord
    ) -> tuple[UpstreamProtocol, Peer]:
        """Dial one broker, and keep the account of it.  Raises `UpstreamFailure`."""
        attempt = health.begin(self._clock.seconds())
        try:
            protocol, peer = await self.reach(target, record)
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
        health.last_address = record.upstream_address
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
            protocol, _ = await self._attempt(target, health, SessionRecord(0, "", self._clock.seconds()))
        except (UpstreamFailure, CancelledError):
            return
        except Exception:  # noqa: BLE001  a mistake here must not end the sweep, nor the trials to come
            _log.failure("a mistake of the gateway while it tried {upstream}", upstream=health.address)
            return
        self._closing[protocol] = self._clock.seconds() + self._timeouts.close
        protocol.close()

    async def reach(self, target: Target, record: SessionRecord) -> tuple[UpstreamProtocol, Peer]:
        """Resolve, connect, shake hands, verify.  Returns a verified connection; raises `UpstreamFailure`.

        Some brokers break off when a TLS session is to be resumed (OpenSSL's with client certificates and no session
        id context do).  That must not lock anybody out, nor hide why a broker is refused: it is tried in full at once.
        """
        protocol = await self._connect(target, record, target.tickets)
        try:
            return protocol, await self._shake_hands(protocol, record)
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
        protocol = await self._connect(target, record, None)
        return protocol, await self._shake_hands(protocol, record)

    async def _connect(self, target: Target, record: SessionRecord, tickets: Tickets | None) -> UpstreamProtocol:
        seconds = self._clock.seconds
        record.upstream_address = ""
        record.dns_seconds = record.tcp_seconds = record.tls_seconds = None

        began = seconds()
        addresses = await resolve(self._network, target.upstream, self._clock, self._timeouts)
        resolved = seconds()
        record.dns_seconds = resolved - began

        # No closure, since the transport keeps it for as long as it lives.
        build = partial(_make_upstream, target, tickets, self._timeouts.tcp_user)
        protocol = await connect(self._network, addresses, build, self._clock, self._timeouts)
        record.tcp_seconds = seconds() - resolved
        record.upstream_address = shown_address(protocol.transport.getPeer())
        return protocol

    async def _shake_hands(self, protocol: UpstreamProtocol, record: SessionRecord) -> Peer:
        began = self._clock.seconds()
        peer = await handshake(protocol, self._clock, self._timeouts)
        record.tls_seconds = self._clock.seconds() - began
        return peer


def _make_upstream(target: Target, tickets: Tickets | None, user_timeout: float) -> UpstreamProtocol:
    return UpstreamProtocol(TLSChannel(target.policy, target.identity, tickets), user_timeout)


async def resolve(network: Network, upstream: Upstream, clock: IReactorTime, timeouts: Timeouts) -> list[Address]:
    """Return the broker's addresses in the order in which they are to be tried.  Raises `UpstreamFailure`."""
    try:
        addresses = await within(timeouts.dns, network.resolve(upstream.connect_name, upstream.port), clock)
    except TimeoutError:
        raise UpstreamFailure(EndReason.DNS_FAILED, f"{upstream.host}: no answer within {timeouts.dns:g} s") from None
    if not addresses:
        raise UpstreamFailure(EndReason.DNS_FAILED, f"{upstream.host}: no address")
    return interleave(addresses)


async def connect(
    network: Network,
    addresses: Sequence[Address],
    build: Callable[[], UpstreamProtocol],
    clock: IReactorTime,
    timeouts: Timeouts,
) -> UpstreamProtocol:
    """Return a connection to whichever address answers first.  Raises `UpstreamFailure`."""
    endpoints = [network.endpoint(address) for address in addresses]
    factory = _UpstreamFactory(build)
    try:
        protocol = await within(timeouts.tcp, race(endpoints, factory, clock), clock)
    except TimeoutError:
        shown = ", ".join(shown_address(address) for address in addresses)
        raise UpstreamFailure(EndReason.TCP_TIMEOUT, f"{shown}: no answer within {timeouts.tcp:g} s") from None
    except AllFailed as failed:
        raise _tcp_failure(failed.failures) from None
    finally:
        factory.close()
    assert isinstance(protocol, UpstreamProtocol)  # noqa: S101  the factory builds nothing else; narrows the type
    return protocol


async def handshake(protocol: UpstreamProtocol, clock: IReactorTime, timeouts: Timeouts) -> Peer:
    """Wait until the broker is verified.  Raises `UpstreamFailure`."""
    try:
        return await within(timeouts.tls, protocol.verified, clock)
    except TimeoutError:
        raise UpstreamFailure(EndReason.TLS_TIMEOUT, f"no end of the handshake within {timeouts.tls:g} s") from None


async def within(seconds: float, awaited: Deferred[_T], clock: IReactorTime) -> _T:
    """Return what `awaited` comes to, if it does within `seconds`.  Raises `TimeoutError`; then it was cancelled.

    As `Deferred.addTimeout`, without its callbacks, which cost more than all the rest of it.
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


def shown_address(address: IAddress | None) -> str:
    """Return an address as `host:port`, with brackets for IPv6; that of a UNIX socket as its path, if it has one."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if host is None:
        return os.fsdecode(getattr(address, "name", None) or "local")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tcp_failure(failures: list[Failure]) -> UpstreamFailure:
    """Give the reason of the address that failed first, since that was the preferred one, and the details of all."""
    reasons = [_tcp_reason(failure) for failure in failures]
    details = dict.fromkeys(str(failure.value) for failure in failures)
    return UpstreamFailure(reasons[0], "; ".join(details))


def _tcp_reason(failure: Failure) -> EndReason:
    if failure.check(error.ConnectionRefusedError):
        return EndReason.TCP_REFUSED
    if failure.check(error.TimeoutError, error.TCPTimedOutError):
        return EndReason.TCP_TIMEOUT
    return EndReason.TCP_UNREACHABLE


class _UpstreamFactory(Factory):
    noisy = False

    def __init__(self, build: Callable[[], UpstreamProtocol]) -> None:
        self._build: Callable[[], UpstreamProtocol] | None = build

    def buildProtocol(self, addr: IAddress | None) -> UpstreamProtocol | None:
        """Make the protocol for a connection that stands; `None`, which closes it, when the race is over."""
        del addr
        return self._build() if self._build is not None else None

    def close(self) -> None:
        """The race is over: what still connects is closed."""
        self._build = None
