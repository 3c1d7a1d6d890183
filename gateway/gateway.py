"""The gateway itself: all sessions, what they share, and the change from one configuration to the next.

In: a `Config`, connections.  Out: sessions, from beginning to end.

Everything built from one configuration is a `Generation`.  A new one is built completely before any of it is used; a
session takes the generation of the moment when its dial begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from random import random

from attrs import frozen
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway import MADE
from gateway.config import Config, Listener
from gateway.dial.dialler import Dialler, Superseded, Target
from gateway.dial.health import UpstreamHealth, accounts
from gateway.dial.proxy import carried_on
from gateway.drain import Spread
from gateway.errors import ConfigError, EndReason, Refusal
from gateway.fair import FairQueue
from gateway.mqtt.packets import ReasonCode
from gateway.net.listening import ListenerFactory
from gateway.net.network import Network, shown_address
from gateway.net.patience import PatientClock
from gateway.ops.journal import GatewayJournal
from gateway.pieces import Chores, Pause, Pieces, at_once, in_turns, no_pause, slices
from gateway.prepared import Prepared, prepare
from gateway.reception import Helpers, Reception, is_over, password_turns
from gateway.relay.device import DeviceProtocol
from gateway.relay.proxied import Doorstep
from gateway.rules.admission import Doorkeeper, host_of, host_shown
from gateway.rules.presence import Presence
from gateway.rules.rules import Caller, Rules
from gateway.session.record import SessionRecord
from gateway.session.session import Session, State
from gateway.store.store import Store
from gateway.stored_devices import StoredDevices
from gateway.tls.broker_identity import Identity

_log = Logger(namespace="gateway")

SWEEP_INTERVAL = 1.0  # seconds; the precision of timeouts
_LATE = 1.0  # seconds; by which a sweep must be late to give the time back
# This many sessions take a few tenths of a millisecond; as do these, if the kernel is asked about their peers.
_SWEPT_AT_A_TIME = 250
_CHECKED_AT_A_TIME = 50
_ESTABLISHED = frozenset({State.RELAYING, State.STORED})
# To end a session costs far more than to look at it, so this many end in a turn.
_ENDED_AT_A_TIME = 20
# A reload judges those anew; so many in a turn, since each may be ended.
_WAITING = frozenset({State.DIALLING, State.WAIT_CONNACK})
_JUDGED_AT_A_TIME = 20
# So many rules are tried in a turn, a microsecond or two each.
_TRIED_AT_A_TIME = 1000
# The codes of the CONNACK, before 5.0 and in 5.0, for a device that a reload has shut out.
_REFUSED_AFTER_RELOAD = {
    EndReason.NETWORK_NOT_ALLOWED: (5, ReasonCode.NOT_AUTHORIZED),
    EndReason.PROXY_NOT_TRUSTED: (5, ReasonCode.NOT_AUTHORIZED),
    EndReason.CONFIGURATION_CHANGED: (3, ReasonCode.SERVER_UNAVAILABLE),
}
DRAIN_INTERVAL = 0.1  # seconds between two groups of sessions that a drain ends


@frozen(slots=True, eq=False)
class Generation:
    """A configuration and everything built from it, which the sessions that are dialled under it share."""

    prepared: Prepared
    dialler: Dialler
    reception: Reception


class _Opening:
    """An admitted connection, and what its session needs of the gateway; cheaper than closures."""

    __slots__ = ("_device", "_gateway", "accepted", "address", "balancer", "changes", "door", "is_proxied")

    def __init__(
        self,
        gateway: Gateway,
        address: IAddress | None,
        door: ListenerFactory,
        accepted: float,
        balancer: IAddress | None,
        is_proxied: bool,
    ) -> None:
        self._gateway = gateway
        self._device: DeviceProtocol
        self.address = address
        self.changes = gateway.changes
        self.door = door
        self.accepted = accepted
        self.balancer = balancer
        self.is_proxied = is_proxied

    @property
    def via(self) -> str:
        """The address of the load balancer, if the device has another one."""
        return shown_address(self.balancer) if self.is_proxied and self.balancer is not self.address else ""

    def open(self, device: DeviceProtocol) -> Session:
        """Begin the session."""
        self._device = device
        return self._gateway.open(self, device)

    def dial(self, session: Session) -> Deferred[None]:
        """Dial the broker for the session."""
        self._gateway.heard(self, session)
        reason = self._gateway.judge_again(self)
        if reason is not None:
            session.refuse(Refusal(reason, "", *_REFUSED_AFTER_RELOAD[reason]))
            return succeed(None)
        # A reload may have renamed the listener.
        session.record.listener = self.door.listener.name
        caller = Caller(host_of(self.address) or "", session.record.listener)
        dialling = self._gateway.generation.reception.dial(session, self._device, caller)
        dialling.addErrback(self._dial_again, session)
        return dialling

    def _dial_again(self, failure: Failure, session: Session) -> Deferred[None]:
        """Let the configuration of this moment judge the session from the beginning."""
        failure.trap(Superseded)
        session.treat(None)
        self._gateway.leave(session)
        return self.dial(session)

    def gone(self, session: Session) -> None:
        """Forget the session."""
        self._gateway.gone(self, session)


class Gateway:
    """All sessions, and what they share.

    Everything that touches the outside world is a parameter, so that a whole gateway can run in memory on a virtual
    clock.  `carried` is how many sessions this process can carry; `swept` is called after each sweep; `uniform` returns
    random numbers from 0 to 1; `patience` is the clock of timeouts, made of `clock`.  Raises `ConfigError` if the
    certificates or keys of `[tls]` cannot be used.
    """

    def __init__(
        self,
        config: Config,
        clock: IReactorTime,
        network: Network,
        journal: GatewayJournal,
        carried: int,
        swept: Callable[[], None] = lambda: None,
        uniform: Callable[[], float] = random,
        helpers: Helpers = Helpers(),  # noqa: B008  frozen
        patience: PatientClock | None = None,
        chores: Chores | None = None,
    ) -> None:
        self.sessions: set[Session] = set()
        # Sessions that the broker has not accepted yet, and some others until the next sweep.
        self._not_accepted: dict[Session, _Opening] = {}
        self._clock = clock
        # For everything in which somebody else's silence counts.
        self._patience = patience or PatientClock(clock)
        # What is done every second or so.
        self._chores = chores or Chores(clock.callLater)
        self._network = network
        self._journal = journal
        self._carried = carried
        self._swept = swept
        self._uniform = uniform
        self._helpers = helpers
        self.presence: Presence[Session] = Presence(clock.seconds, is_over)
        self._turns = password_turns(self._patience)
        self._numbered = 0
        # How often the configuration was changed.
        self.changes = 0
        self._all_gone: list[Deferred[None]] = []
        self._stopping = False
        self._drain: Spread[Session] | None = None
        # What a stop ends at once, `_ENDED_AT_A_TIME`.
        self._undrained: Spread[Session] | None = None
        self._draining: IDelayedCall | None = None
        self._drained_at = 0.0
        self.stored: StoredDevices | None = None
        # A store that is open and not in use yet.
        self._opened: Store | None = None
        self._generation = self._built(prepare(config, uniform, helpers.programs), None)
        self._open_store(config)
        self._use_store()
        # Sessions whose CONNECT has not come yet, and those that were refused and are not closed yet, by address.
        self._silent: FairQueue[Session] = FairQueue()
        self.doorkeeper = Doorkeeper(config.admission, self.max_sessions, clock.seconds, self._make_room)
        self.doorstep = Doorstep(self.doorkeeper, self._enter, journal.refused, self._check_all_gone, clock.seconds)
        # Sessions that this round of the sweep has not reached, and the seconds that they are to be given back.
        self._round: list[tuple[list[Session], float]] = []
        self._sweeping: Pieces[None] | None = None
        self._steps: Pieces[None] | None = None
        self._swept_at: float | None = None
        self._sweeper = LoopingCall(self._sweep)
        self._drainer = LoopingCall(self._drain_some)
        self._sweeper.clock = self._drainer.clock = clock

    @property
    def config(self) -> Config:
        """The current configuration."""
        return self._generation.prepared.config

    @property
    def generation(self) -> Generation:
        """The generation that new sessions begin under."""
        return self._generation

    @property
    def max_sessions(self) -> int:
        """How many sessions there may be at a time."""
        wanted = self.config.admission.max_sessions
        return min(wanted, self._carried) if wanted else self._carried

    @property
    def upstreams(self) -> list[UpstreamHealth]:
        """The health of the configured brokers, in order of preference."""
        return self.generation.dialler.upstreams

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def prepare(self, config: Config, pause: Pause = no_pause) -> Prepared:
        """Read and build all that sessions need under `config`, without using it yet.  Raises `ConfigError`.

        May be called in another thread, as long as nothing is adopted meanwhile; `pause` then lets this one run.
        """
        if self.stored is not None and config.store.directory != self.config.store.directory:
            raise ConfigError(["store.directory: it is in use: restart the gateway to change it"])
        prepared = prepare(config, self._uniform, self._helpers.programs, self._generation.prepared, pause)
        self._open_store(config)
        return prepared

    def adopt(self, generation: Generation) -> None:
        """Begin new sessions under another configuration; established sessions keep their own.

        Sessions that the broker has not accepted yet are judged again, unless it would come to the same; those whose
        CONNECT has been sent are ended.
        """
        before, self._generation = self._generation, generation
        prepared = generation.prepared
        self.changes += 1
        before.dialler.superseded = not prepared.is_equivalent
        self.doorkeeper.rule(prepared.config.admission, self.max_sessions)
        before.dialler.stop()
        self._use_store()
        if self.stored is not None:
            self.stored.adopt(prepared.config)
        # To end thousands takes long; they are judged by what they were now, since some are accepted meanwhile.
        waiting = [
            (session, opening, session.state is State.WAIT_CONNACK)
            for session, opening in self._not_accepted.items()
            if session.state in _WAITING
        ]
        in_turns(self._clock.callLater, self._judge_all(waiting, is_superseded=before.dialler.superseded))
        if prepared.rules.disables_any:
            in_turns(self._clock.callLater, self._end_disabled(prepared.rules))

    def _judge_all(self, waiting: Sequence[tuple[Session, _Opening, bool]], *, is_superseded: bool) -> Pieces[None]:
        """End sessions that the new configuration does not permit, or that the broker had under the old one."""
        for some in slices(waiting, _JUDGED_AT_A_TIME):
            for session, opening, was_sent in some:
                self._guarded(session, partial(self._judge, opening, was_sent and is_superseded))
            yield

    def _end_disabled(self, rules: Rules) -> Pieces[None]:
        """End the established sessions of devices that the new configuration disables."""
        established = [session for session in self.sessions if session.state is State.RELAYING]
        at_a_time = max(1, min(_JUDGED_AT_A_TIME, _TRIED_AT_A_TIME // rules.tried))
        for some in slices(established, at_a_time):
            for session in some:
                self._guarded(session, partial(self._end_if_disabled, rules))
            yield
        if self.stored is not None:
            yield from self.stored.end_disabled(rules, at_a_time)

    def _end_if_disabled(self, rules: Rules, session: Session) -> None:
        record = session.record
        caller = Caller(host_shown(record.device_address), record.listener)
        refusal = rules.disabling(record.client_identifier, caller, record.rule)
        if refusal is not None and session.state is State.RELAYING:
            session.stop(refusal.reason, detail=refusal.detail)

    def _judge(self, opening: _Opening, is_of_before: bool, session: Session) -> None:
        if session.state is State.ENDED:
            return
        if is_of_before:
            session.stop(EndReason.CONFIGURATION_CHANGED)
        elif reason := self.judge_again(opening):
            session.stop(reason, connack_codes=_REFUSED_AFTER_RELOAD[reason])

    def made(self, prepared: Prepared) -> Generation:
        """Return the generation that `adopt` takes; nothing is changed yet.  Brokers' health carries over."""
        return self._built(prepared, self._generation)

    def _built(self, prepared: Prepared, before: Generation | None) -> Generation:
        config, policy, websockets = prepared.config, prepared.policy, prepared.websockets
        proxies = carried_on(prepared.proxies, () if before is None else before.dialler.proxies, config.failover)
        targets = [
            Target(
                upstream,
                Identity.of(upstream.verify_name),
                prepared.upstream_policies[config.algorithms(upstream)],
                proxy,
                websocket,
            )
            for upstream, proxy, websocket in zip(config.upstream, proxies, websockets, strict=True)
        ]
        healths = accounts(
            config.upstream,
            config.failover,
            self._uniform,
            () if before is None else before.dialler.upstreams,
            [proxy.health if proxy is not None else None for proxy in proxies],
            judged_alike=before is not None and before.prepared.policy is policy,
        )
        dialler = Dialler(targets, healths, self._network, self._clock, config, self._journal, self._patience)
        reception = Reception(
            prepared,
            dialler,
            self.presence,
            self._helpers,
            self._uniform,
            self._take_place,
            self._turns,
            self._patience.seconds,
            lambda: self.stored,
        )
        return Generation(prepared, dialler, reception)

    def start(self) -> None:
        """Start to admit devices and to enforce timeouts."""
        self._stopping = False
        self.doorstep.open()
        self._sweeper.start(SWEEP_INTERVAL, now=False)

    def stop(self, seconds: float = 0.0) -> Deferred[None]:
        """End all sessions; established ones are spread over `seconds`.

        Fires when all are closed, at most `timeouts.close` after that.  May be called again, to shorten the time.
        """
        gone: Deferred[None] = Deferred()
        self._all_gone.append(gone)
        now = self._clock.seconds()
        self.generation.dialler.stop()
        in_turns(self._clock.callLater, self.doorstep.clear())
        if not self._stopping:
            self._stopping = True
            sessions = list(self.sessions)
            self._drain = Spread((each for each in sessions if each.state in _ESTABLISHED), now, seconds)
            # No work is lost here, and waiting would only show that no broker is available.
            self._undrained = Spread((each for each in sessions if each.state not in _ESTABLISHED), now, 0.0)
            self._drained_at = now
            self._drainer.start(DRAIN_INTERVAL)
        elif self._drain is not None:
            self._drain.hasten(now, seconds)
            self._drain_some()
        self._check_all_gone()
        return gone

    def stop_at_once(self) -> None:
        """End all sessions in this turn, however long it takes: the process is about to exit."""
        self.stop()
        at_once(self.doorstep.clear())
        while self._drain_some():
            pass

    def factory(self, listener: Listener) -> ListenerFactory:
        """Return the factory whose connections become sessions of this gateway."""
        return _DeviceFactory(self, listener)

    def admit(self, address: IAddress | None, door: ListenerFactory) -> Protocol | None:
        """Return the protocol for a new connection, or `None` if it is refused."""
        if door.listener.proxies and not self.stopping:
            return self.doorstep.admit(address, door)
        reason = EndReason.GATEWAY_STOPPING if self.stopping else self.doorkeeper.admit(host_of(address))
        if reason is not None:
            self._journal.refused(reason, shown_address(address))
            return None
        return self._enter(address, door, self._clock.seconds())

    def _enter(
        self,
        address: IAddress | None,
        door: ListenerFactory,
        accepted: float,
        balancer: IAddress | None = None,
        *,
        is_proxied: bool = False,
    ) -> DeviceProtocol:
        """Return the protocol for a connection that the doorkeeper admitted; see `gateway.relay.proxied.Enter`."""
        opening = _Opening(self, address, door, accepted, balancer, is_proxied)
        return DeviceProtocol(opening.open, self.config.timeouts.tcp_user)

    def open(self, opening: _Opening, device: DeviceProtocol) -> Session:
        """Begin the session of an accepted connection."""
        self._numbered += 1
        config = self.config
        session = Session(
            SessionRecord(
                self._numbered,
                shown_address(opening.address),
                opening.accepted,
                listener=opening.door.listener.name,
                via=opening.via,
            ),
            device,
            opening.dial,
            self._journal,
            opening.gone,
            self._clock.seconds,
            config.limits,
            config.timeouts,
        )
        self.sessions.add(session)
        self._not_accepted[session] = opening
        self._silent.push(host_of(opening.address) or "", session)
        return session

    def heard(self, opening: _Opening, session: Session) -> None:
        """Take note that a session's CONNECT has come."""
        self._silent.discard(host_of(opening.address) or "", session)

    def _make_room(self, host: str) -> bool:
        """End a connection without a session, of the address that has most of them, unless `host` has about as many."""
        # Where most addresses have one or two, nobody floods, and thousands would be looked at for each connection.
        session = self._silent.shed(host) if len(self._silent) > 2 * self._silent.addresses else None
        if session is None:
            return False
        session.stop(EndReason.TOO_MANY_SESSIONS, "its address had the most connections without CONNECT")
        session.abort()  # The newcomer needs the descriptor now.
        return True

    def judge_again(self, opening: _Opening) -> EndReason | None:
        """Return why a connection may not stay whose CONNECT has come: a reload may have taken effect meanwhile."""
        if opening.changes == self.changes:
            return None
        return self.doorkeeper.judge_again(
            host_of(opening.address), opening.door, host_of(opening.balancer), is_proxied=opening.is_proxied
        )

    def leave(self, session: Session) -> None:
        """Count a session out whose CONNECT is to be judged again."""
        self.presence.leave(session)

    def gone(self, opening: _Opening, session: Session) -> None:
        """Forget a session whose connections are closed."""
        self.sessions.discard(session)
        self._not_accepted.pop(session, None)
        self.heard(opening, session)
        self.presence.leave(session)
        self.doorkeeper.leave(host_of(opening.address))
        self._check_all_gone()

    def close_store(self) -> None:
        """Write what waits for the disk, and close the store; call it when nothing is left of any session."""
        if self.stored is not None:
            self.stored.store.close()
            self.stored = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open_store(self, config: Config) -> None:
        """Open the store if the configuration wants one and it is not open.  Raises `ConfigError`."""
        if self.stored is None and self._opened is None:
            self._opened = self._helpers.open_store(config)

    def _use_store(self) -> None:
        store, self._opened = self._opened, None
        if store is not None:
            self.stored = StoredDevices(
                store,
                self._clock,
                self.config,
                lambda connection: self.generation.reception.lead_stored(connection),
                self._check_all_gone,
                self._uniform,
                self._helpers.now,
                lambda: self._helpers.now() >= MADE.timestamp(),
                self._chores,
            )

    def _check_all_gone(self) -> None:
        if self._all_gone and not self.sessions and not self.doorstep.connections:
            if self.stored is not None:
                self.stored.stop(discard_wills=self.config.drain.wills == "discard")
                if not self.stored.are_gone:
                    return  # it calls this again
            for loop in (self._sweeper, self._drainer):
                if loop.running:
                    loop.stop()
            self._chores.drop()
            if self._draining is not None and self._draining.active():
                self._draining.cancel()
            self._drain = self._undrained = None
            self._journal.flush()
            waiting, self._all_gone = self._all_gone, []
            for gone in waiting:
                gone.callback(None)

    def _sweep(self) -> None:
        """Begin what is done every second; give lost time back at once, since nobody may be judged before that."""
        lost = self._lost_time(self._clock.seconds())
        with _contained():
            self._give_back(lost)
        with _contained():
            self._sweep_all(lost)
        if self._steps not in self._chores:
            self._steps = self._swept_steps()
            self._chores.add(self._steps)

    def _swept_steps(self) -> Pieces[None]:
        """Do all but the sessions, a little in each turn."""
        steps: list[Callable[[], object]] = [
            self._swept,
            self.doorkeeper.sweep,
            self._journal.sweep,
        ]
        if not self.stopping:
            steps.append(self.generation.dialler.sweep)
        if self.stored is not None:
            steps.append(partial(self.stored.sweep, self.config.timeouts.close))
        for step in steps:
            with _contained():
                step()
            yield
        with _contained():
            yield from self.presence.sweep(self.config.devices)
        with _contained():
            yield from self._forget_accepted()
        with _contained():
            yield from self.doorstep.sweep(self._clock.seconds(), self.config.timeouts.connect_packet)

    def _lost_time(self, now: float) -> float:
        """Return for how many seconds this process did not run, or by how many the clock has jumped; usually 0.

        Meanwhile devices have sent what nobody has read, so they must not be judged by the time that has passed.
        """
        before, self._swept_at = self._swept_at, now
        lost = 0.0 if before is None else now - before - SWEEP_INTERVAL
        return lost if abs(lost) > _LATE else 0.0

    def _give_back(self, lost: float) -> None:
        if not lost:
            return
        self._patience.give_back(lost)
        self.doorstep.give_back(lost)
        if self.stored is not None:
            self.stored.give_back(lost)

    def _sweep_all(self, lost: float) -> None:
        """Begin a round; a late one gives each session the `lost` seconds back right before it judges it."""
        # A round that takes longer than a second goes on: starting over would leave out the same sessions each time.
        is_under_way = self._sweeping in self._chores
        if is_under_way and not lost:
            return
        left = [(sessions, owed + lost) for sessions, owed in self._round] if is_under_way else []
        others = self.sessions.difference(*(sessions for sessions, _ in left))
        self._round = [*left, (list(others), lost)]
        if not is_under_way:
            self._sweeping = self._sweep_sessions()
            self._chores.add(self._sweeping)

    def _sweep_sessions(self) -> Pieces[None]:
        while self._round:
            self._sweep_some()
            yield

    def _sweep_some(self) -> None:
        """Sweep some sessions now and the rest in later turns, so that messages do not wait."""
        now = self._clock.seconds()
        sessions, lost = self._round.pop(0)
        swept = checked = ended = 0
        # Without `_guarded`: its two calls per session would be most of the cost.
        for session in sessions[:_SWEPT_AT_A_TIME]:
            try:
                if lost:
                    session.give_back(lost, now)
                checked += session.sweep(now)
            except Exception as error:  # noqa: BLE001  an internal error in one session must not affect the others
                self._mistaken(session, error)
            swept += 1
            ended += session.state is State.ENDED
            if ended == _ENDED_AT_A_TIME or checked == _CHECKED_AT_A_TIME:
                break
        if rest := sessions[swept:]:
            self._round.insert(0, (rest, lost))

    def _forget_accepted(self) -> Pieces[None]:
        for some in slices(list(self._not_accepted), _SWEPT_AT_A_TIME):
            for session in some:
                if session.state is not State.ENDED and session.state not in _ESTABLISHED:
                    continue
                opening = self._not_accepted.pop(session, None)
                if opening is not None and session.state is State.ENDED:
                    # Its device does not close: this, too, makes room for others.
                    self.heard(opening, session)
                    self._silent.push(host_of(opening.address) or "", session)
            yield

    def _drain_some(self) -> bool:
        """End some of the sessions that are due, and the others in the next turns; return whether there are others."""
        now = self._clock.seconds()
        lost, self._drained_at = now - self._drained_at - DRAIN_INTERVAL, now
        if self._drain is None or self._undrained is None:
            return False
        if self._draining is not None and self._draining.active():
            self._draining.cancel()
        if lost > _LATE:
            # What has arrived meanwhile is read first: it may end sessions in order.
            self._drain.give_back(lost)
            return True
        some = list(islice(chain(self._undrained.due(now), self._drain.due(now)), _ENDED_AT_A_TIME))
        for session in some:
            self._end(session)
        are_left = len(some) == _ENDED_AT_A_TIME
        if are_left and self._drain is not None:
            self._draining = self._clock.callLater(0, self._drain_some)
        return are_left

    def _end(self, session: Session) -> None:
        discard_will = self.config.drain.wills == "discard"
        self._guarded(session, lambda session: session.stop(EndReason.GATEWAY_STOPPING, discard_will=discard_will))

    def _take_place(self, session: Session) -> None:
        self._guarded(session, lambda session: session.stop(EndReason.TAKEN_OVER))

    def _guarded(self, session: Session, do: Callable[[Session], None]) -> None:
        """Do something to a session; an internal error ends that session and no other."""
        try:
            do(session)
        except Exception as error:  # noqa: BLE001  see above
            self._mistaken(session, error)

    def _mistaken(self, session: Session, error: Exception) -> None:
        _log.failure("session {number}: internal error", number=session.record.number)
        try:
            session.fail(type(error).__name__)
        except Exception:  # noqa: BLE001  the sweep must go on, and the other sessions
            _log.failure("session {number}: internal error while ending it", number=session.record.number)


@contextmanager
def _contained() -> Iterator[None]:
    try:
        yield
    except Exception:  # noqa: BLE001  without the sweep no timeout would be enforced
        _log.failure("internal error in the periodic sweep")


class _DeviceFactory(ListenerFactory):
    """Makes a session of each connection to one listener."""

    def __init__(self, gateway: Gateway, listener: Listener) -> None:
        super().__init__(listener)
        self._gateway = gateway

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Admit a connection; `None` makes Twisted close it at once."""
        return self._gateway.admit(addr, self)
