"""Decide what happens to a CONNECT: admit the device or not, with which identity, and to which broker.

In: sessions with a complete CONNECT.  Out: `Session.refuse`, or `Session.treat` and a dial.

Checks run in order of trust: the rule, the address, whose name it is at the broker, other sessions with that name,
the password.  Only after these
is an established session ended, or a file, program or key used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from attrs import evolve, frozen
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Config, DeviceRule, Upstream
from gateway.dial.dialler import Dialler, Route, Superseded, begin
from gateway.errors import EndReason, Refusal, SessionEnd, let_frames_go
from gateway.mqtt.connect import Connect
from gateway.mqtt.reader import Packet
from gateway.mqtt.rewrite import KEPT
from gateway.prepared import Prepared
from gateway.relay.device import DeviceProtocol
from gateway.rules.credentials import Credentials
from gateway.rules.names import brokers, name_at_broker
from gateway.rules.presence import Holder, Presence
from gateway.rules.rules import Caller, Matched, treat, wrong_password
from gateway.rules.secrets import Programs
from gateway.rules.turns import Turns, Visitor
from gateway.session.record import SessionRecord
from gateway.session.session import Session, State
from gateway.store.store import Store
from gateway.stored_devices import StoredConnection, StoredDevices
from gateway.tls.trust import TLSPolicy

_log = Logger(namespace="gateway")
_T = TypeVar("_T")

# Password checks share the threads with the resolver and the CPU with the relay.
_PASSWORDS_AT_A_TIME = 2
# Seconds until a stored device's messages are tried again: when a password could not be had; when a person is needed.
_SOON, _SELDOM = 5.0, 60.0


def _at_once(work: Callable[[], _T]) -> Deferred[_T]:
    return succeed(work())


@frozen
class Helpers:
    """Resources outside the event loop: programs, and threads for slow work."""

    programs: Programs | None = None
    in_thread: Callable[[Callable[[], bool]], Deferred[bool]] = _at_once
    open_store: Callable[[Config], Store | None] = lambda _: None
    now: Callable[[], float] = time.time


def password_turns(clock: IReactorTime) -> Turns:
    """Return what limits the password checks of a gateway."""
    return Turns(_PASSWORDS_AT_A_TIME, clock, "a password check")


class Reception:
    """Handles CONNECTs under one configuration.

    `presence` and `turns`, at password checks, are shared across configurations; `seconds` is the gateway's clock.
    `end` ends a session that another one takes over.
    """

    def __init__(
        self,
        prepared: Prepared,
        dialler: Dialler,
        presence: Presence[Session],
        helpers: Helpers,
        uniform: Callable[[], float],
        end: Callable[[Session], None],
        turns: Turns,
        seconds: Callable[[], float],
        stored: Callable[[], StoredDevices | None] = lambda: None,
    ) -> None:
        self._prepared = prepared
        self._config = config = prepared.config
        self._dialler = dialler
        self._presence = presence
        self._helpers = helpers
        self._end = end
        self._turns = turns
        self._seconds = seconds
        self._stored = stored
        self._rules = prepared.rules
        self._names = prepared.names
        self._everyone = brokers(config, ())
        self.credentials = Credentials(config.device, helpers.programs, uniform, keys=prepared.keys)
        # Made when the first device of a rule comes: there may be thousands of rules.
        self._routes: dict[DeviceRule, Route | None] = {}
        self._subjects: dict[DeviceRule | None, str] = {}
        self._is_plain = not config.device and config.devices.unknown == "pass"

    def dial(self, session: Session, device: DeviceProtocol, caller: Caller) -> Deferred[None]:
        """Check a session's CONNECT and dial its broker.  Cancelling cleans up.

        Fails with `Superseded` if another configuration must do so.
        """
        if self._is_plain:
            _, connect = session.connect
            try:
                self._enter(session, Holder(connect.client_identifier, caller.address, self._everyone), None)
            except Refusal as refusal:
                session.refuse(refusal)
                return succeed(None)
            session.record.upstream_certificate = self._subject(None)
            return self._dialler.dial(session, device, visitor=self._visitor(session, device, caller))
        return begin(self._receive(session, device, caller), session)

    async def _receive(self, session: Session, device: DeviceProtocol, caller: Caller) -> None:
        packet, connect = session.connect
        route = None
        visitor = self._visitor(session, device, caller)
        try:
            matched = self._rules.match(connect, caller)
            if matched is not None:
                session.record.rule = matched.rule.device.name
                self._check_rule(matched.rule.device)
                route = self._route(matched.rule.device)
            holder = self._holder(matched, connect, caller)
            self._names.check(holder.client_identifier, matched, caller, holder.brokers)
            self._record_identity(session.record, matched, holder)
            if matched is None:
                self._enter(session, holder, None)
            else:
                await self._check_password(matched, connect, visitor, holder)
                self._enter(session, holder, matched)
                if self._is_stored(session, device, matched, packet, connect, caller, holder):
                    return
                password, lives = await self.credentials.password(matched, visitor)
                limit = self._config.limits.max_connect_size
                session.treat(treat(matched, packet, connect, password, lives, limit))
        except Refusal as refusal:
            let_frames_go(refusal)
            session.refuse(refusal)
            return
        await self._dialler.lead(session, device, route, visitor)

    def _record_identity(self, record: SessionRecord, matched: Matched | None, holder: Holder) -> None:
        """Record who the device is at the broker.  Raises Refusal."""
        device = None if matched is None else matched.rule.device
        record.upstream_certificate = self._subject(device)
        if matched is not None and device is not None and device.username:
            record.upstream_username = matched.expand("username", device.username)
        if holder.client_identifier != record.client_identifier:
            record.upstream_client_identifier = holder.client_identifier

    def _subject(self, device: DeviceRule | None) -> str:
        """Return the subject of the client certificate that the broker is offered for a rule's devices; "" for none."""
        if device not in self._subjects:
            own = None if device is None else self.credentials.client_identity(device)
            client = own or self._prepared.policy.client
            self._subjects[device] = "" if client is None else client.chain[0].subject.rfc4514_string()
        return self._subjects[device]

    def _holder(self, matched: Matched | None, connect: Connect, caller: Caller) -> Holder:
        """Return a device as the broker will know it.  Raises Refusal."""
        named = () if matched is None else matched.rule.device.upstream
        at = brokers(self._config, named) if named else self._everyone
        return Holder(name_at_broker(matched, connect.client_identifier), caller.address, at)

    async def lead_stored(self, connection: StoredConnection) -> None:
        """Find a broker for a stored device, by the rules of now; see `gateway.stored_devices.Lead`."""
        stored = connection.stored
        presented = stored.presented()
        if presented is None:
            connection.postponed(SessionEnd(EndReason.INTERNAL_ERROR, "its CONNECT is not known"), _SELDOM)
            return
        packet, connect = presented
        caller = Caller(stored.state.address, stored.state.listener)
        until = self._seconds() + self._config.pacing.queue_seconds
        visitor = Visitor(caller.address, lambda: until - self._seconds())
        try:
            matched = self._rules.match(connect, caller)
            if matched is not None:
                # Of a rule that cannot be used, not even the identity at the broker is known.
                self._check_rule(matched.rule.device)
            if matched is None or self.backlog_name(matched, connect) != stored.name:
                detail = "the rules now give this device another identity, or none"
                connection.refused(SessionEnd(EndReason.STORED_SESSION_DIFFERS, detail), (3, 0x88))
                return
            holder = self._holder(matched, connect, caller)
            self._names.check(holder.client_identifier, matched, caller, holder.brokers)
            devices = self._stored()
            if devices is not None:
                if not stored.has_device and (
                    self._presence.established(holder) or devices.rivals(holder, stored.name)
                ):
                    detail = "another device, or another backlog, has its Client Identifier at the broker"
                    connection.postponed(SessionEnd(EndReason.CLIENT_ID_IN_USE, detail), _SOON)
                    return
                devices.holders.assign(stored, holder)
            password, lives = await self.credentials.password(matched, visitor)
            if password is KEPT and stored.state.had_password and connect.password is None:
                detail = "its own password is not kept on disk, so its messages wait until it connects"
                connection.postponed(SessionEnd(EndReason.CREDENTIALS_UNAVAILABLE, detail), _SELDOM)
                return
            limit = self._config.limits.max_connect_size
            connection.treatment = treat(matched, packet, connect, password, lives, limit)
        except Refusal as refusal:
            let_frames_go(refusal)
            if refusal.reason is EndReason.CREDENTIALS_UNAVAILABLE:
                connection.postponed(refusal, _SOON)
            else:
                connection.refused(refusal, (refusal.code_3, refusal.code_5))
            return
        route = self._route(matched.rule.device) or self._dialler.default_route
        if devices is not None:
            devices.routes[stored.name] = route
        try:
            await self._dialler.lead(connection, connection.gauge, route, visitor)
        except Superseded:
            # The configuration changed; the next dial goes by the new one.
            connection.postponed(SessionEnd(EndReason.CONFIGURATION_CHANGED), 0.0)

    def backlog_name(self, matched: Matched, connect: Connect) -> str:
        """Name the identity that a device has at the broker: no message of one ever leaves under another.

        Client Identifier, user name, subject of the certificate.  Raises Refusal.
        """
        device = matched.rule.device
        client_identifier = connect.client_identifier
        if device.client_id:
            client_identifier = matched.expand("client_id", device.client_id)
        username = None if device.credentials == "drop" else connect.username
        if device.username:
            username = matched.expand("username", device.username)
        client = self.credentials.client_identity(device)
        subject = "" if client is None else client.chain[0].subject.rfc4514_string()
        return json.dumps([client_identifier, username or "", subject], ensure_ascii=False)

    def _is_stored(
        self,
        session: Session,
        device: DeviceProtocol,
        matched: Matched,
        packet: Packet,
        connect: Connect,
        caller: Caller,
        holder: Holder,
    ) -> bool:
        """Give a device to the store if its rule wants that, or what it stored before has not all left.

        Raises Refusal.
        """
        devices = self._stored()
        if devices is None or not connect.client_identifier or connect.authentication_method is not None:
            return False
        name = self.backlog_name(matched, connect)
        if not (matched.rule.device.store or devices.has_backlog(name)):
            return False
        if not devices.has_place(name):
            detail = "no more devices can be remembered; `mqtts-gateway store drop` removes those that are gone"
            raise Refusal(EndReason.STORE_UNAVAILABLE, detail, 3, 0x97)
        # The broker's password is asked for with each dial; the device may be served without one.
        treatment = treat(matched, packet, connect, None, None, self._config.limits.max_connect_size)
        where = (caller.address, caller.listener)
        confirm = matched.rule.device.store_qos0 == "confirm"
        devices.receive(session, device, name, packet, treatment, where, holder, confirm=confirm)
        return True

    def _enter(self, session: Session, holder: Holder, matched: Matched | None) -> None:
        """Add the session to `presence` and end those it takes over.  Raises Refusal."""
        for other in self._presence.enter(session, holder, self._config.devices):
            self._end(other)
        devices = self._stored()
        if devices is not None and devices.holders.at(holder):
            name = "" if matched is None else self.backlog_name(matched, session.connect[1])
            for rival in devices.rivals(holder, name):
                rival.give_way()
        if not holder.client_identifier:
            session.when_assigned(lambda name: self._presence.assign(session, evolve(holder, client_identifier=name)))

    def _visitor(self, session: Session, device: DeviceProtocol, caller: Caller) -> Visitor:
        """Return the session as one that waits, for all its turns together at most `pacing.queue_seconds`."""
        until = self._seconds() + self._config.pacing.queue_seconds
        return Visitor(
            caller.address, lambda: until - self._seconds(), lambda: not session.pending and device.has_left()
        )

    async def _check_password(self, matched: Matched, connect: Connect, visitor: Visitor, holder: Holder) -> None:
        """Raise Refusal if the rule asks for a password and the device did not send the right one."""
        wanted, given = matched.rule.password, connect.password
        if wanted is None:
            return
        # A check takes about 30 ms of CPU, so cheaper checks come first.
        self._presence.judge(holder, self._config.devices)
        if given is None:
            raise wrong_password(matched.rule)
        devices = self._config.devices
        self._presence.attempt(connect.client_identifier, visitor.address, devices)
        await self._turns.take(visitor)
        try:
            # Others from its address may have been wrong while it waited.
            self._presence.check_guesses(visitor.address, devices)
        except Refusal:
            self._turns.give()
            raise
        if not await self._verify(lambda: wanted.verify(given)):
            self._presence.wrong(visitor.address, devices)
            raise wrong_password(matched.rule)

    def _verify(self, verify: Callable[[], bool]) -> Deferred[bool]:
        """Check a password, and give the turn back when the thread is done, even if nobody waits for it any more."""
        verified: Deferred[bool] = Deferred()

        def done(result: bool | Failure) -> None:
            self._turns.give()
            if isinstance(result, Failure):
                verified.errback(result)
            else:
                verified.callback(result)

        self._helpers.in_thread(verify).addBoth(done)
        return verified

    def _check_rule(self, device: DeviceRule) -> None:
        """Raise Refusal for a rule that cannot be used."""
        problem = self._prepared.refused.get(device)
        if problem is not None:
            raise Refusal(EndReason.DEVICE_RULE_BROKEN, f"rule {device.name}: {problem}", 3, 0x88)

    def _route(self, device: DeviceRule) -> Route | None:
        """Return the rule's own route to its broker; None for the common one."""
        if device not in self._routes:
            has_policy = self._prepared.policies.get(device) is not None
            has_own = bool(device.upstream) or has_policy
            policy_for = partial(self._policy, device) if has_policy else None
            self._routes[device] = self._dialler.route(device.upstream, policy_for) if has_own else None
        return self._routes[device]

    def _policy(self, device: DeviceRule, upstream: Upstream) -> TLSPolicy:
        policy = self._prepared.policies.get(device, self._prepared.config.algorithms(upstream))
        if policy is None:
            raise AssertionError("a device with a certificate of its own must never show another")
        return policy


def is_over(session: Session) -> bool:
    """Whether a session has ended, though its connections may not be closed yet."""
    return session.state is State.ENDED
