"""All stored devices: one `StoredSession` for each backlog, and the way of each to its broker.

In: sessions whose rule says `store`, the store, the time.  Out: dials for devices, whether they are connected or not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import Config
from gateway.dial.dialler import Route
from gateway.errors import EndReason, Refusal, SessionEnd, UpstreamFailure, let_frames_go
from gateway.mqtt.reader import Packet
from gateway.pieces import Chores, Pieces, in_turns, slices
from gateway.relay.device import DeviceProtocol
from gateway.relay.side import Gauge
from gateway.relay.upstream import UpstreamProtocol
from gateway.rules.presence import Holder, Holders
from gateway.rules.rules import Caller, Rules
from gateway.session.drain_pace import TICK, DrainPace
from gateway.session.record import Dial, Peer, SessionRecord
from gateway.session.session import Session
from gateway.session.stored import Phase, StoredSession
from gateway.session.treatment import Treatment
from gateway.session.visit import World
from gateway.store.backlog import Backlog, client_identifier_of
from gateway.store.database import StoreError
from gateway.store.forecast import Forecast
from gateway.store.store import Store
from gateway.text import printable

_log = Logger(namespace="gateway")

# So many are swept in one turn of the reactor.
_SWEPT_AT_A_TIME = 200
# So many connections are checked in one turn: each is a question to the kernel.
_CHECKED_AT_A_TIME = 100
# To begin or end so many takes a few milliseconds at most.
_CHANGED_AT_A_TIME = 20
_BUSY = frozenset({EndReason.TOO_MANY_NEW_SESSIONS, EndReason.OUT_OF_RESOURCES})
_LATER = 5.0  # seconds until a dial that was not let through is tried again, on average
_SHOWN = 200  # characters of a name
_TELL_EVERY = 60.0  # seconds
# How often the kernel is asked whether brokers acknowledge: in seconds, and per timeout.
_CHECK_INTERVAL, _CHECKS_PER_TIMEOUT = 5.0, 10
_NO_WILL = '"will": null'


def log_notes(store: Store) -> None:
    """Log what was moved or recovered of a damaged file, once."""
    notes, store.notes = store.notes, []
    for note in notes:
        _log.error("store: {note}", event="store-recovered", note=note)


def _first_failure(failure: Failure) -> Failure:
    """Return what failed in a `gatherResults`."""
    return failure.value.subFailure if isinstance(failure.value, FirstError) else failure


class Lead(Protocol):
    """Who finds a broker for a stored device under the configuration of now; see `gateway.reception.Reception`."""

    def __call__(self, connection: StoredConnection) -> Coroutine[Any, Any, None]:
        """End with `StoredConnection.upstream_verified`, `upstream_failed` or `refused`."""


class StoredConnection:
    """One attempt to connect to a broker on behalf of a stored device, and the connection that comes of it.

    To the dialler and the upstream's protocol it is a session; to the `StoredSession` it is the upstream.
    """

    def __init__(self, devices: StoredDevices, stored: StoredSession) -> None:
        self.stored = stored
        self.record = SessionRecord(0, "", 0.0, client_identifier=stored.name)
        # The dialler asks whether the device has left; here that makes no difference.
        self.pending = 1
        self.treatment: Treatment | None = None
        self.gauge = Gauge(self._full)
        self.dialling: Deferred[None] | None = None
        self.closed_at: float | None = None
        self._devices = devices
        self._protocol: UpstreamProtocol | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection that has not ended."""
        return self._protocol is not None

    # ---- for the dialler

    def dials(self, dial: Dial) -> None:
        """See `Session.dials`."""
        self.stored.dials(dial)

    def upstream_failed(self, failure: SessionEnd) -> None:
        """See `Session.upstream_failed`."""
        if self._devices.forget(self):
            later = _LATER * 2 * self._devices.uniform() if failure.reason in _BUSY else 0.0
            self.stored.upstream_failed(failure, later=later)

    def refuse(self, refusal: Refusal) -> None:
        """See `Session.refuse`: it was not its turn, which says nothing about broker or device."""
        self.postponed(refusal, _LATER * 2 * self._devices.uniform())

    def refused(self, failure: SessionEnd, codes: tuple[int, int]) -> None:
        """Today's rules do not let this device's messages leave."""
        if self._devices.forget(self):
            self.stored.upstream_refused(failure.reason, failure.detail, codes)

    def postponed(self, failure: SessionEnd, later: float) -> None:
        """What is needed for a dial is not there now."""
        if self._devices.forget(self):
            self.stored.upstream_failed(failure, later=later)

    def fail(self, detail: str) -> None:
        """See `Session.fail`."""
        self.abort()
        self.upstream_broken(UpstreamFailure(EndReason.INTERNAL_ERROR, detail))

    # ---- for the upstream's protocol

    def upstream_verified(self, upstream: UpstreamProtocol, peer: Peer) -> None:
        """See `Session.upstream_verified`."""
        self._protocol = upstream
        if self.treatment is None or not self._devices.is_current(self):
            upstream.abort()
            return
        self.stored.upstream_verified(self, peer, self.treatment)

    def upstream_received(self, data: bytes) -> None:
        """See `Session.upstream_received`."""
        if self._devices.is_current(self):
            self.stored.upstream_received(data)

    def upstream_broken(self, failure: SessionEnd) -> None:
        """See `Session.upstream_broken`."""
        if self._devices.is_current(self):
            self.stored.upstream_broken(failure)

    def upstream_gone(self) -> None:
        """See `Session.upstream_gone`."""
        self._protocol = None
        self._devices.gone(self)

    # ---- for the stored session

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self._protocol is not None:
            self._protocol.write(data)

    def write_last(self, data: bytes) -> None:
        """Send bytes behind which there is nothing but `close`."""
        if self._protocol is not None:
            self._protocol.write_last(data)

    @property
    def unread(self) -> bool:
        """Whether bytes have arrived that have not been read yet."""
        return self._protocol is not None and self._protocol.unread

    def hold(self) -> None:
        """Stop reading."""
        if self._protocol is not None:
            self._protocol.hold()

    def release(self) -> None:
        """Read again."""
        if self._protocol is not None:
            self._protocol.release()

    def go_on_later(self) -> None:
        """Go on with what has been read in a later turn."""
        if self._protocol is not None:
            self._protocol.go_on_later()

    def close(self) -> None:
        """End the connection in the orderly way."""
        self._devices.forget(self)
        self.closed_at = self._devices.seconds()
        if self._protocol is not None:
            self._protocol.close()

    def check(self, now: float) -> None:
        """Close the connection if the broker no longer acknowledges what TCP sends; `now` is in seconds."""
        if self._protocol is not None:
            self._protocol.check(now)

    def abort(self) -> None:
        """End the connection now."""
        self._devices.forget(self)
        if self._protocol is not None:
            self._protocol.abort()

    def _full(self, is_full: bool) -> None:
        if self._devices.is_current(self):
            self.stored.upstream_full(is_full)


class StoredDevices:
    """The stored sessions of a gateway.

    `lead` finds a broker; `changed` is called when a connection is gone.  `now` gives the time of day in seconds since
    1970, `is_plausible` whether it can be believed.
    """

    def __init__(
        self,
        store: Store,
        clock: IReactorTime,
        config: Config,
        lead: Lead,
        changed: Callable[[], None],
        uniform: Callable[[], float],
        now: Callable[[], float] = time.time,
        is_plausible: Callable[[], bool] = lambda: True,
        chores: Chores | None = None,
    ) -> None:
        self.store = store
        self.uniform = uniform
        self.sessions: dict[str, StoredSession] = {}
        self.routes: dict[str, Route] = {}
        # Under which name each was last known at the broker, or was about to be.
        self.holders: Holders[StoredSession] = Holders()
        self._clock = clock
        self._chores = chores or Chores(clock.callLater)
        self._lead = lead
        self._changed = changed
        self._now = now
        self._is_plausible = is_plausible
        self._config = config
        self._current: dict[str, StoredConnection] = {}
        self._connections: set[StoredConnection] = set()
        self._sweeping: Pieces[None] | None = None
        self._checking: Pieces[None] | None = None
        # The seconds that were lost since the start, all together.
        self._lost = 0.0
        self._are_known = False
        # What the log has been told.
        self._told: Counter[str] = Counter()
        self._told_at = clock.seconds()
        self._told_failure = ""
        self._told_unreadable = False
        self._stopping = False
        self._are_stopped = False
        self._check_at = 0.0
        self.forecast = Forecast()
        self._drain_pace = DrainPace(config.store.drain_messages_per_second, clock.seconds, self._drain_later)
        self._draining: IDelayedCall | None = None
        # Since when devices are served without a broker, None if none is.
        self.outage_since: float | None = None
        self._delivered_before = 0

    def seconds(self) -> float:
        """Return the time on the injected clock."""
        return self._clock.seconds()

    @property
    def are_gone(self) -> bool:
        """Whether all are stopped, and no connection is left."""
        return self._are_stopped and not self._connections

    def adopt(self, config: Config) -> None:
        """From now on another configuration holds."""
        self._config = config
        self.store.config = config.store
        self._drain_pace.rate = config.store.drain_messages_per_second
        self.routes.clear()

    def end_disabled(self, rules: Rules, at_a_time: int) -> Pieces[None]:
        """End the sessions of devices that the rules disable, also towards the broker; judge so many in a turn."""
        for some in slices(list(self.sessions.values()), at_a_time):
            for stored in some:
                try:
                    self._end_if_disabled(stored, rules)
                except Exception:  # noqa: BLE001  an error in one leaves the others alone
                    _log.failure("internal error while a stored device was judged by new rules")
            yield

    def _end_if_disabled(self, stored: StoredSession, rules: Rules) -> None:
        presented = stored.presented()
        if presented is None or self.sessions.get(stored.name) is not stored:
            return
        caller = Caller(stored.state.address, stored.state.listener)
        try:
            rules.match(presented[1], caller)
        except Refusal as refusal:
            if refusal.reason is EndReason.DEVICE_DISABLED:
                stored.shut_out(refusal)

    def has_backlog(self, name: str) -> bool:
        """Whether messages of this identity wait, or are under way, so that its device must go on as a stored one."""
        backlog = self.store.known(name)
        if backlog is None:
            return False
        return bool(len(backlog) or backlog.loading or name in self.sessions or self.store.received[name])

    def rivals(self, holder: Holder, name: str) -> list[StoredSession]:
        """Return the stored sessions of identities other than `name` that have this Client Identifier at the broker.

        Each has its device, or connects or is connected to the broker.
        """
        return [
            stored
            for stored in self.holders.at(holder)
            if stored.name != name and (stored.has_device or stored.name in self._current)
        ]

    def has_place(self, name: str) -> bool:
        """Whether this identity can be served as a stored device."""
        return self.store.make_place(name, self.sessions)

    def receive(
        self,
        session: Session,
        device: DeviceProtocol,
        name: str,
        packet: Packet,
        treatment: Treatment,
        caller: tuple[str, str],
        holder: Holder,
        *,
        confirm: bool,
    ) -> None:
        """Let a device speak to its stored session; `holder` is the device as the broker will know it."""
        stored = self.sessions.get(name) or self._begin(name)
        self.holders.assign(stored, holder)
        device.transport.registerProducer(Gauge(lambda is_full: self._device_full(stored, session, is_full)), True)
        session.become_stored(stored)
        stored.after = stored.outgoing.after = self._config.store.after
        stored.attach(session, packet, treatment, caller, confirm=confirm)

    def change(self, action: str, device: str) -> Deferred[list[tuple[str, int]]]:
        """Do what a person asks for: `drop` or `retry`; fires with the backlogs of `device` and numbers of messages.

        `device` is the name of a backlog, or the Client Identifier in it.  Fails with StoreError.
        """
        changing = gatherResults(
            (
                self._changed_by_hand(action, backlog)
                for backlog in list(self.store)
                if device in {backlog.name, client_identifier_of(backlog.name)}
            ),
            consumeErrors=True,
        )
        return changing.addErrback(_first_failure)

    def _changed_by_hand(self, action: str, backlog: Backlog) -> Deferred[tuple[str, int]]:
        done: Deferred[tuple[str, int]] = Deferred()
        name = backlog.name

        def changed(count: int, error: StoreError | None) -> None:
            if error is not None:
                left = f"; {count} messages are deleted, those set aside are not" if action == "drop" else ""
                done.errback(StoreError(f"{error}{left}"))
                return
            _log.warn(
                "store: `mqtts-gateway store {action}` changed {count} messages of {device}",
                event="store-changed",
                count=count,
                device=printable(name, _SHOWN),
                action=action,
            )
            stored = self.sessions.get(name)
            if action == "drop" and stored is not None:
                stored.dropped()
            elif action == "retry" and stored is not None:
                stored.resume()
            elif action == "retry" and count and not self._stopping:
                self._begin(name)
            done.callback((name, count))

        if action == "drop":
            self.store.drop(backlog, changed)
        else:
            self.store.retry(backlog, changed)
        return done

    # ---- see `gateway.session.stored.Link`

    def dial(self, stored: StoredSession) -> None:
        """Begin to look for a broker."""
        connection = StoredConnection(self, stored)
        self._current[stored.name] = connection
        self._connections.add(connection)
        dialling = Deferred.fromCoroutine(self._lead(connection))
        connection.dialling = dialling

        def failed(failure: Failure) -> None:
            if failure.check(CancelledError) is None:
                _log.failure("internal error in a dial for a stored device", failure)
                kind = failure.type.__name__ if failure.type is not None else "unknown"
                connection.postponed(SessionEnd(EndReason.INTERNAL_ERROR, kind), _LATER)
            let_frames_go(failure.value)

        dialling.addErrback(failed)

    def cancel(self, stored: StoredSession) -> None:
        """Give up what `dial` began."""
        connection = self._current.get(stored.name)
        if connection is not None:
            self.forget(connection)
            if connection.dialling is not None:
                connection.dialling.cancel()

    def may_dial(self, stored: StoredSession) -> bool:
        """Whether a broker could be had now."""
        route, now = self.routes.get(stored.name), self.seconds()
        return route is None or any(health.is_open or health.is_due(now) for _, health in route)

    def over(self, stored: StoredSession) -> None:
        """Nothing of a stored session is left."""
        if self.sessions.get(stored.name) is stored:
            del self.sessions[stored.name]
            self.routes.pop(stored.name, None)
        self.holders.leave(stored)

    # ---- for connections

    def is_current(self, connection: StoredConnection) -> bool:
        """Whether a connection is the one that its stored session has now."""
        return self._current.get(connection.stored.name) is connection

    def forget(self, connection: StoredConnection) -> bool:
        """It is not the one any more; return whether it was."""
        was_current = self.is_current(connection)
        if was_current:
            del self._current[connection.stored.name]
        if connection.closed_at is None and not connection.is_open:
            self._connections.discard(connection)
        return was_current

    def gone(self, connection: StoredConnection) -> None:
        """A connection is no more."""
        self.forget(connection)
        self._connections.discard(connection)
        self._changed()

    # ---- the time

    def give_back(self, seconds: float) -> None:
        """Move the deadlines by `seconds` in which this process did not run, or by which the clock has jumped.

        Each session gets them right before the sweep judges it: there may be thousands.
        """
        now = self.seconds()
        for connection in self._connections:
            if connection.closed_at is not None:
                connection.closed_at = min(connection.closed_at + seconds, now)
        self._lost += seconds

    def sweep(self, patience: float) -> None:
        """Do what is due; closed connections have `patience` seconds to end.  Called every second or so."""
        now = self.seconds()
        late = (each for each in self._connections if each.closed_at is not None and now - each.closed_at >= patience)
        self._chores.add(self._abort_all(list(late)))
        if now >= self._check_at:
            self._check_at = now + min(_CHECK_INTERVAL, self._config.timeouts.tcp_user / _CHECKS_PER_TIMEOUT)
            if self._checking not in self._chores:
                self._checking = self._check_all()
                self._chores.add(self._checking)
        self._chores.add(self.store.sweep())
        self._tell(now)
        if self._stopping:
            return
        if self.forecast.is_due(now):
            self._chores.add(self._take_sample(now))
        if not self._are_known and not self.store.loading:
            self._are_known = True
            self._chores.add(self._begin_waiting())
        if self._sweeping not in self._chores:
            self._sweeping = self._sweep_all()
            self._chores.add(self._sweeping)

    def _abort_all(self, connections: list[StoredConnection]) -> Pieces[None]:
        for some in slices(connections, _CHANGED_AT_A_TIME):
            for connection in some:
                connection.abort()
                if not connection.is_open:
                    self.gone(connection)
            yield

    def _take_sample(self, now: float) -> Pieces[None]:
        """See how much waits, and whether devices are served without a broker."""
        self.forecast.note(now, self.store.bytes)
        offline: list[float] = []
        for some in slices(list(self.sessions.values())):
            offline += [stored.offline_since for stored in some if stored.phase is Phase.OFFLINE and stored.is_serving]
            yield
        if self._stopping:
            return
        if offline and self.outage_since is None:
            self._delivered_before = self.store.counts.drained
            _log.warn(
                "store: no broker; messages are stored for {count} devices", event="store-outage", count=len(offline)
            )
        elif not offline and self.outage_since is not None:
            _log.info(
                "store: all connected devices have a broker again; {count} stored messages delivered, {left} wait",
                event="store-outage-over",
                count=self.store.counts.drained - self._delivered_before,
                left=self.store.messages,
            )
        self.outage_since = min(offline, default=None)

    def _tell(self, now: float) -> None:
        """Log a disk that fails and recovers, and once a minute what was removed without delivery."""
        log_notes(self.store)
        failure = "" if self.store.failure is None else str(self.store.failure)
        if failure and not self._told_failure:
            _log.error(
                "store: cannot write: {failure}. Without a broker, devices get no acknowledgements until it can write",
                event="store-failing",
                failure=failure,
            )
        elif self._told_failure and not failure:
            _log.info("store: writing again", event="store-recovered")
        self._told_failure = failure
        self._tell_unreadable()
        if now - self._told_at < _TELL_EVERY:
            return
        self._told_at = now
        counts = Counter(self.store.counts.dropped)
        counts["set aside: the broker refused them"] = self.store.counts.set_aside
        for reason, count in (counts - self._told).items():
            _log.warn(
                "store: {count} messages not delivered: {reason}", event="store-dropped", count=count, reason=reason
            )
        self._told = counts

    def _tell_unreadable(self) -> None:
        """Log that stored messages cannot be read, and that they can be again."""
        unreadable = self.store.unreadable
        if unreadable and not self._told_unreadable:
            name, failure = next(iter(unreadable.items()))
            _log.error(
                "store: cannot read stored messages of {device}: {failure}. They and those behind them wait",
                event="store-unreadable",
                device=printable(name, _SHOWN),
                failure=str(failure),
            )
        elif self._told_unreadable and not unreadable:
            _log.info("store: stored messages can be read again", event="store-readable")
        self._told_unreadable = bool(unreadable)

    def stop(self, *, discard_wills: bool) -> None:
        """End everything; what is not on disk has been written before, or is the devices' still."""
        if self._stopping:
            return
        self._stopping = True
        if self._draining is not None and self._draining.active():
            self._draining.cancel()
        in_turns(self._clock.callLater, self._stop_all(discard_wills=discard_wills))

    def _stop_all(self, *, discard_wills: bool) -> Pieces[None]:
        turns = 0
        for some in slices(list(self.sessions.values()), _CHANGED_AT_A_TIME):
            if turns:
                yield
            turns += 1
            for stored in some:
                try:
                    stored.stop(discard_will=discard_wills)
                except Exception:  # noqa: BLE001  the gateway waits until all others are stopped
                    _log.failure("internal error while a stored device was stopped")
        self._are_stopped = True
        if turns > 1:
            self._changed()

    def _check_all(self) -> Pieces[None]:
        for some in slices(list(self._connections), _CHECKED_AT_A_TIME):
            if self._stopping:
                return
            now = self.seconds()
            for connection in some:
                connection.check(now)
            yield

    def _sweep_all(self) -> Pieces[None]:
        left = list(self.sessions.values())
        while left and not self._stopping:
            left = self._sweep_some(left)
            yield

    def _sweep_some(self, left: list[StoredSession]) -> list[StoredSession]:
        """Sweep some of them; return the others."""
        now = self.seconds()
        swept = changed = 0
        for stored in left[:_SWEPT_AT_A_TIME]:
            before = stored.visit, self._current.get(stored.name)
            owed, stored.given_back = self._lost - stored.given_back, self._lost
            try:
                if owed:
                    stored.give_back(owed, now)
                stored.sweep(now)
            except Exception:  # noqa: BLE001  an error in one leaves the others alone
                _log.failure("internal error in the sweep of a stored device")
            swept += 1
            changed += before != (stored.visit, self._current.get(stored.name))
            if changed == _CHANGED_AT_A_TIME:
                break
        return left[swept:]

    def _begin_waiting(self) -> Pieces[None]:
        """Begin to deliver for devices that are away."""
        for some in slices(list(self.store), _CHANGED_AT_A_TIME):
            if self._stopping:
                return
            for backlog in some:
                is_waiting = len(backlog) or _NO_WILL not in self.store.states.get(backlog.name, _NO_WILL)
                if is_waiting and backlog.name not in self.sessions:
                    try:
                        self._begin(backlog.name)
                    except Exception:  # noqa: BLE001  the same
                        _log.failure("internal error while the delivery of a backlog began")
            yield

    def _begin(self, name: str) -> StoredSession:
        config = self._config
        world = World(
            seconds=self._clock.seconds,
            now=self._now,
            is_plausible=self._is_plausible,
            uniform=self.uniform,
            max_packet_size=config.limits.max_packet_size,
            max_connect_size=config.limits.max_connect_size,
            check_bodies=config.limits.check_bodies,
            connack=config.timeouts.connack,
            drain_pace=self._drain_pace,
        )
        backlog = self.store.backlog(name)
        stored = StoredSession(name, self.store, backlog, self, world, after=config.store.after)
        stored.given_back = self._lost
        self.sessions[name] = stored
        return stored

    def _drain_later(self) -> None:
        if not self._stopping and (self._draining is None or not self._draining.active()):
            self._draining = self._clock.callLater(TICK, self._drain_pace.go_on)

    def _device_full(self, stored: StoredSession, session: Session, is_full: bool) -> None:
        if stored.visit is not None and stored.visit.device is session:
            stored.device_full(is_full)
