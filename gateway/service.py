"""The gateway as a whole: everything built from a `Config`, its start, its change to another, its stop.

In: a `Config`, a reactor.  Out: listeners that turn connections into sessions, and a Twisted service around them.

What is made of one configuration is a `Generation`.  A new one is made whole before anything of it is used; sessions
keep the one that they began under.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import random
from socket import gethostname
from typing import Any

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IAddress, IDelayedCall, IListeningPort, IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from gateway.config import Config, Listener, changed_keys
from gateway.relay.device import DeviceProtocol
from gateway.errors import ConfigError, EndReason
from gateway.net.listening import ListenerFactory, Listeners
from gateway.net.network import Network, ReactorNetwork
from gateway.ops.expiry import Certificate, ExpiryWatch, configured, of_devices
from gateway.ops.journal import GatewayJournal, Journal
from gateway.ops.ledger import Ledger
from gateway.ops.notify import Notifier
from gateway.ops.sight import Sight, Sources
from gateway.ops.watch import FileState, Watch, differing, states
from gateway.ops.web.port import StatusPort
from gateway.rules.admission import Doorkeeper, host_of
from gateway.drain import Spread
from gateway.dial.health import UpstreamHealth, accounts
from gateway.rules.presence import Presence
from gateway.rules.rules import Caller
from gateway.rules.secrets import Programs
from gateway.relay.proxied import Doorstep
from gateway.reception import Helpers, Reception, is_over
from gateway.session.record import SessionRecord
from gateway.session.session import Session, State
from gateway.tls.channel import make_policy
from gateway.tls.broker_identity import Identity
from gateway.tls.trust import TLSPolicy, policy_files
from gateway.net.transport import RelayReactor
from gateway.relay.upstream import Dialler, Target, shown_address

_log = Logger(namespace="gateway")

SWEEP_INTERVAL = 1.0  # seconds; deadlines are kept to this precision
# So many sessions take a few tenths of a millisecond.
_SWEPT_AT_A_TIME = 250
DRAIN_INTERVAL = 0.1  # seconds; so often some of the sessions are ended that end spread over a time
# Sweeps between two looks at the files.  A change counts when two looks agree on it, so it takes up to twice as long.
_SWEEPS_PER_LOOK = 2
# Seconds that systemd is asked for beyond those that a stop may take by the configuration.
_STOP_MARGIN = 10.0
# Descriptors that are no session's: listeners, logs, the reactor's own, attempts of happy eyeballs.
_RESERVED_DESCRIPTORS = 64
_DESCRIPTORS_PER_SESSION = 2
# Objects that may come into being before young ones are looked at: some dozens of sessions' worth.
_COLLECTOR_THRESHOLD = 20_000


@frozen(slots=True, eq=False)
class Generation:
    """A configuration and what was made of it: what the sessions share that begin under it.

    `files` has the states of the certificates, keys and lists from just before they were read.
    """

    config: Config
    files: Mapping[Path, FileState]
    policy: TLSPolicy
    dialler: Dialler
    reception: Reception


class _Opening:
    """A connection that was let in, and what its session needs of the gateway: instead of a closure for each."""

    __slots__ = ("_device", "_gateway", "accepted", "address", "generation", "listener", "via")

    def __init__(
        self,
        gateway: Gateway,
        generation: Generation,
        address: IAddress | None,
        listener: str,
        accepted: float,
        via: str,
    ) -> None:
        self._gateway = gateway
        self._device: DeviceProtocol
        self.generation = generation
        self.address = address
        self.listener = listener
        self.accepted = accepted
        self.via = via

    def open(self, device: DeviceProtocol) -> Session:
        """Begin the session."""
        self._device = device
        return self._gateway.open(self, device)

    def dial(self, session: Session) -> Deferred[None]:
        """Lead the session to its broker."""
        caller = Caller(host_of(self.address) or "", self.listener)
        return self.generation.reception.dial(session, self._device, caller)

    def gone(self, session: Session) -> None:
        """Forget the session."""
        self._gateway.gone(self, session)


class Gateway:
    """All sessions, and what they share.

    Everything that touches the world is a parameter, so that a whole gateway can run in memory on a virtual clock.
    `carried` is how many sessions this process can carry; `swept` is called after each sweep,
    `uniform` returns random numbers from 0 to 1.
    Raises `ConfigError` if certificates or keys cannot be used.
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
    ) -> None:
        self.sessions: set[Session] = set()
        self._clock = clock
        self._network = network
        self._journal = journal
        self._carried = carried
        self._swept = swept
        self._uniform = uniform
        self._helpers = helpers
        self._presence: Presence[Session] = Presence(clock.seconds, is_over)
        self._numbered = 0
        self._all_gone: list[Deferred[None]] = []
        self._stopping = False
        self._drain: Spread[Session] | None = None
        self._generation: Generation | None = None
        self._generation = self.prepare(config)
        self.doorkeeper = Doorkeeper(config.admission, self.max_sessions, clock.seconds)
        self._doorstep = Doorstep(self.doorkeeper, self._enter, journal.refused, self._check_all_gone, clock.seconds)
        self._sweeping: IDelayedCall | None = None
        self._sweeper = LoopingCall(self._sweep)
        self._drainer = LoopingCall(self._drain_some)
        self._sweeper.clock = self._drainer.clock = clock

    @property
    def config(self) -> Config:
        """The configuration under which new sessions begin."""
        return self.generation.config

    @property
    def generation(self) -> Generation:
        """What new sessions begin under."""
        assert self._generation is not None  # noqa: S101  only while the first one is made; narrows the type
        return self._generation

    @property
    def max_sessions(self) -> int:
        """How many sessions there may be at a time."""
        wanted = self.config.admission.max_sessions
        return min(wanted, self._carried) if wanted else self._carried

    @property
    def upstreams(self) -> list[UpstreamHealth]:
        """How the brokers fare that new sessions are led to, in the order of preference."""
        return self.generation.dialler.upstreams

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def prepare(self, config: Config) -> Generation:
        """Make of `config` all that its sessions need, and use nothing of it yet.  Raises `ConfigError`."""
        files = states(watched_files(config))
        before = self._generation
        known: Sequence[UpstreamHealth] = ()
        judged_alike = False
        if before is not None:
            known = before.dialler.upstreams
            judged_alike = (config.tls, files) == (before.config.tls, before.files)
        # If nothing would be another, the sessions of two generations share what they verify with.
        policy = before.policy if before is not None and judged_alike else make_policy(config.tls)
        targets = [Target(upstream, Identity.of(upstream.verify_name), policy) for upstream in config.upstream]
        healths = accounts(config.upstream, config.failover, self._uniform, known, judged_alike=judged_alike)
        dialler = Dialler(targets, healths, self._network, self._clock, config, self._journal)
        reception = Reception(config, dialler, self._presence, self._helpers, self._uniform, self._take_place)
        return Generation(config, files, policy, dialler, reception)

    def adopt(self, generation: Generation) -> None:
        """Let new sessions begin under `generation`; those that stand go on under their own."""
        self.generation.dialler.stop()
        self._generation = generation
        self.doorkeeper.rule(generation.config.admission, self.max_sessions)

    def start(self) -> None:
        """Begin to let devices in and to keep deadlines."""
        self._stopping = False
        self._sweeper.start(SWEEP_INTERVAL, now=False)

    def stop(self, seconds: float = 0.0) -> Deferred[None]:
        """End all sessions; those that stand are spread over `seconds`.

        Fires when nothing of them is left, at the latest `timeouts.close` later.  To call it again is to be told, too,
        and may make it quicker.
        """
        gone: Deferred[None] = Deferred()
        self._all_gone.append(gone)
        now = self._clock.seconds()
        self.generation.dialler.stop()
        self._doorstep.clear()
        if not self._stopping:
            self._stopping = True
            sessions = list(self.sessions)
            self._drain = Spread((each for each in sessions if each.state is State.RELAYING), now, seconds)
            self._drainer.start(DRAIN_INTERVAL)
            for session in sessions:
                # Nobody's work is cut short here, and to wait would be to learn that there is no broker.
                if session.state is not State.RELAYING:
                    self._end(session)
        elif self._drain is not None:
            self._drain.hasten(now, seconds)
            self._drain_some()
        self._check_all_gone()
        return gone

    def factory(self, listener: Listener) -> ListenerFactory:
        """Return the factory whose connections become sessions of this gateway."""
        return _DeviceFactory(self, listener)

    def admit(self, address: IAddress | None, listener: Listener) -> Protocol | None:
        """Return the protocol for a new connection, or `None` if it is not let in."""
        if listener.proxies and not self.stopping:
            return self._doorstep.admit(address, listener)
        reason = EndReason.GATEWAY_STOPPING if self.stopping else self.doorkeeper.admit(host_of(address))
        if reason is not None:
            self._journal.refused(reason, shown_address(address))
            return None
        return self._enter(address, listener.name, self._clock.seconds())

    def _enter(self, address: IAddress | None, listener: str, accepted: float, via: str = "") -> DeviceProtocol:
        """Return the protocol for a connection that the doorkeeper has let in; see `gateway.relay.proxied.Enter`."""
        generation = self.generation
        opening = _Opening(self, generation, address, listener, accepted, via)
        return DeviceProtocol(opening.open, generation.config.timeouts.tcp_user)

    def open(self, opening: _Opening, device: DeviceProtocol) -> Session:
        """Begin the session of a connection that stands."""
        self._numbered += 1
        config = opening.generation.config
        session = Session(
            SessionRecord(
                self._numbered,
                shown_address(opening.address),
                opening.accepted,
                listener=opening.listener,
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
        return session

    def gone(self, opening: _Opening, session: Session) -> None:
        """Forget a session of which nothing is left."""
        self.sessions.discard(session)
        self._presence.leave(session)
        self.doorkeeper.leave(host_of(opening.address))
        self._check_all_gone()

    def _check_all_gone(self) -> None:
        if self._all_gone and not self.sessions and not self._doorstep.connections:
            for loop in (self._sweeper, self._drainer):
                if loop.running:
                    loop.stop()
            if self._sweeping is not None and self._sweeping.active():
                self._sweeping.cancel()
            self._drain = None
            self._journal.flush()
            waiting, self._all_gone = self._all_gone, []
            for gone in waiting:
                gone.callback(None)

    def _sweep(self) -> None:
        now = self._clock.seconds()
        # One that did not reach all of them within a second goes on, since to begin anew would leave the same ones out.
        if self._sweeping is None or not self._sweeping.active():
            self._sweep_sessions(list(self.sessions))
        try:
            self._doorstep.sweep(now, self.config.timeouts.connect_packet)
            self.doorkeeper.sweep()
            self._presence.sweep(self.config.devices)
            if not self.stopping:
                self.generation.dialler.sweep()
            self._journal.sweep()
            self._swept()
        except Exception:  # noqa: BLE001  without the sweep no session would have a deadline any more
            _log.failure("a mistake of the gateway in its sweep")

    def _sweep_sessions(self, left: list[Session]) -> None:
        """Sweep some sessions now and the others in the next turns of the reactor, so that messages need not wait."""
        now = self._clock.seconds()
        # Without `_guarded`, whose two calls for each of ten thousand sessions would be most of it.
        for session in left[:_SWEPT_AT_A_TIME]:
            try:
                session.sweep(now)
            except Exception as error:  # noqa: BLE001  a mistake in one session leaves the others alone
                self._mistaken(session, error)
        rest = left[_SWEPT_AT_A_TIME:]
        self._sweeping = self._clock.callLater(0, self._sweep_sessions, rest) if rest else None

    def _drain_some(self) -> None:
        if self._drain is not None:
            for session in self._drain.due(self._clock.seconds()):
                self._end(session)

    def _end(self, session: Session) -> None:
        discard_will = self.config.drain.wills == "discard"
        self._guarded(session, lambda session: session.stop(EndReason.GATEWAY_STOPPING, discard_will=discard_will))

    def _take_place(self, session: Session) -> None:
        self._guarded(session, lambda session: session.stop(EndReason.TAKEN_OVER))

    def _guarded(self, session: Session, do: Callable[[Session], None]) -> None:
        """Do something to a session; a mistake that is made there ends that session and leaves the others alone."""
        try:
            do(session)
        except Exception as error:  # noqa: BLE001  see above
            self._mistaken(session, error)

    def _mistaken(self, session: Session, error: Exception) -> None:
        _log.failure("session {number}: a mistake of the gateway", number=session.record.number)
        session.fail(type(error).__name__)


class _DeviceFactory(ListenerFactory):
    """Makes each connection to one listener a session."""

    def __init__(self, gateway: Gateway, listener: Listener) -> None:
        super().__init__(listener)
        self._gateway = gateway

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Admit a connection; `None` makes Twisted close it at once."""
        return self._gateway.admit(addr, self.listener)


class GatewayService(Service):
    """The gateway under `twistd`.

    `reread` gives the configuration as it is now, for a reload.  A listener that cannot be opened is a `ConfigError`
    from `privilegedStartService`, so that the service never runs deaf.  A status endpoint that cannot be opened then is
    an error in the log, and is tried again: that nobody can look is no reason for devices to be without their broker.
    """

    def __init__(
        self,
        config: Config,
        reactor: Any,
        journal: GatewayJournal | None = None,
        notifier: Notifier | None = None,
        reread: Callable[[], Config] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Take a reactor with IReactorTime, IReactorTCP, IReactorUNIX, IReactorCore and IReactorPluggableNameResolver.

        `now` gives the time of day: for certificates and for people, and for nothing that is measured.
        """
        self._reactor = reactor
        self._relay = RelayReactor(reactor)
        self._notifier = notifier or Notifier()
        self._reread = reread or (lambda: config)
        self.ledger = Ledger(journal or Journal(reactor.seconds), reactor.seconds)
        self.gateway = Gateway(
            config,
            reactor,
            ReactorNetwork(self._relay),
            self.ledger,
            raise_descriptor_limit(),
            self._swept,
            helpers=Helpers(Programs(reactor, reactor), partial(deferToThreadPool, reactor, reactor.getThreadPool())),
        )
        self._listeners = Listeners(self._relay, self.gateway.factory)
        self._watch = Watch(self.gateway.generation.files)
        self._sweeps = 0
        # Why a reload was refused and nothing better has come since: another configuration, or the files of this one.
        self._refused = {"configuration": "", "files": ""}
        self.ledger.watch(self.gateway.sessions)
        self.sight = Sight(self.ledger, self._sources(now))
        self._expiry = ExpiryWatch(now, reactor.seconds)
        self.status_port = StatusPort(reactor, self.sight)

    def _sources(self, now: Callable[[], datetime]) -> Sources:
        gateway = self.gateway
        return Sources(
            host=gethostname(),
            upstreams=lambda: gateway.upstreams,
            certificates=lambda: configured(gateway.generation.policy),
            listeners=lambda: [(name, shown_address(port.getHost())) for name, port in self._listeners.named],
            is_stopping=lambda: gateway.stopping,
            refused_reloads=lambda: [words for words in self._refused.values() if words],
            max_sessions=lambda: gateway.max_sessions,
            seconds=self._reactor.seconds,
            now=now,
        )

    @property
    def ports(self) -> list[IListeningPort]:
        """The open listeners, in the order of the configuration."""
        return self._listeners.ports

    def privilegedStartService(self) -> None:
        """Open the listeners, with the rights to open ports below 1024."""
        super().privilegedStartService()
        self._relay.start()
        try:
            self._listeners.change(self.gateway.config.listen)
        except ConfigError:
            self._relay.stop()
            raise
        self.status_port.open(self.gateway.config.status)

    def startService(self) -> None:
        """Begin."""
        if not self.ports:
            self.privilegedStartService()
        super().startService()
        spare_the_collector()
        self.gateway.start()
        self._tell_limits()
        for port in self.ports:
            _tell_listening(port)
        for upstream in self.gateway.config.upstream:
            _log.info("upstream {upstream}, verified as {name}", upstream=upstream.address, name=upstream.verify_name)
        # Everything is open and loaded; what comes between this and the reactor's first turn may still end the process.
        self._reactor.callWhenRunning(self._tell_ready)

    @property
    def status(self) -> str:
        """How the gateway is, in one line."""
        count = len(self.gateway.sessions)
        sessions = f"{count} session{'' if count == 1 else 's'}"
        if self.gateway.stopping:
            return f"stopping, {sessions} left"
        upstreams = ", ".join(_fares(upstream) for upstream in self.gateway.upstreams)
        return "; ".join(part for part in (*self._refused.values(), sessions, upstreams) if part)

    def stopService(self) -> Deferred[Any]:
        """Close the listeners, end the sessions, spread over `drain.seconds`; fires when nothing is left."""
        super().stopService()
        config = self.gateway.config
        _log.info(
            "stopping: {sessions} sessions end within {seconds:g} s; a second signal ends them at once",
            sessions=len(self.gateway.sessions),
            seconds=config.drain.seconds,
        )
        waiting = self._listeners.close()
        gone = self.gateway.stop(config.drain.seconds)
        self._notifier.stopping(self.status, config.drain.seconds + config.timeouts.close + _STOP_MARGIN)
        return DeferredList([*waiting, gone]).addCallback(lambda _: self._stopped())

    def stop_at_once(self) -> None:
        """End all sessions now, and leave to the kernel what it has of their last words."""
        _log.info("stopping at once: {sessions} sessions are left", sessions=len(self.gateway.sessions))
        self.gateway.stop()
        # A turn later, so that what is closed in this one is closed in order.
        self._relay.callLater(0, self._relay.stop)

    def reload(self) -> None:
        """Read the configuration and all its files anew, and change to them.

        What cannot be used is refused with every problem in the log, and the gateway goes on as it was.
        """
        self._reload(self._reread)

    def _reload(self, read: Callable[[], Config]) -> None:
        if self.gateway.stopping:
            return
        self._notifier.reloading()
        refused = "configuration"
        try:
            config = read()
            if config == self.gateway.config:
                refused = "files"
            changed = self.change(config)
        except ConfigError as error:
            self.ledger.refused_reloads += 1
            problems = error.problems
            for problem in problems:
                _log.error("reload refused: {problem}", event="reload-refused", problem=problem)
            more = f" (and {len(problems) - 1} more, see the log)" if len(problems) > 1 else ""
            self._refused[refused] = f"reload refused, all goes on as before: {problems[0]}{more}"
        except Exception:  # noqa: BLE001  whatever it is, systemd must not wait for the end of this reload
            self.ledger.refused_reloads += 1
            _log.failure("reload refused: a mistake of the gateway")
            self._refused[refused] = "reload refused, all goes on as before: a mistake of the gateway, see the log"
        else:
            what = ", ".join(changed) if changed else "nothing has changed"
            _log.info("reloaded: {what}", event="reloaded", what=what)
            self._refused["files"] = ""
            self.ledger.reloads += 1
            if read is self._reread:
                self._refused["configuration"] = ""
        self._notifier.ready(self.status)

    def change(self, config: Config) -> list[str]:
        """Let new sessions begin under another configuration; those that stand go on under their own.

        Returns the keys and the files that are not the same.  Raises `ConfigError` with everything that is wrong with
        it, and then all is as it was before.
        """
        before, generation = self.gateway.generation, self.gateway.prepare(config)
        status = self.status_port.prepare(config.status)
        # Nothing of what follows lets the reactor run, so no connection comes in between.
        try:
            opened, closed = self._listeners.change(config.listen)
        except ConfigError:
            self.status_port.discard(status)
            raise
        self.gateway.adopt(generation)
        self.status_port.adopt(status)
        self._watch.know(generation.files)
        self._tell_limits()
        for port in opened:
            _tell_listening(port)
        for listener in closed:
            _log.info("no longer listening on {endpoint}", endpoint=listener.endpoint)
            if listener.endpoint.startswith("systemd:"):
                _log.warn("systemd keeps {endpoint} open: whoever connects waits", endpoint=listener.endpoint)
        files = [str(path) for path in differing(before.files, generation.files)]
        return changed_keys(before.config, config) + files

    def _swept(self) -> None:
        self._notifier.alive(self.status, SWEEP_INTERVAL)
        self._sweeps += 1
        if self._sweeps % _SWEEPS_PER_LOOK == 0 and not self.gateway.stopping:
            config = self.gateway.config
            if self._watch.look(states(watched_files(config))):
                # The configuration as such is only read when somebody says so: who edits it may not be done.
                self._reload(lambda: config)
        self.status_port.sweep()
        self._expiry.sweep(self._certificates)

    def _stopped(self) -> Deferred[Any]:
        self._relay.stop()
        self._notifier.close()
        # Last, so that whoever looks sees the sessions end.
        return self.status_port.close()

    def _tell_ready(self) -> None:
        if self.running and not self.gateway.stopping:
            self._notifier.ready(self.status)

    def _certificates(self) -> Iterator[Certificate]:
        """Yield all certificates whose end would end some service."""
        yield from self.sight.certificates()
        yield from of_devices(self.gateway.generation.reception.credentials.client_identities)

    def _tell_limits(self) -> None:
        carried, wanted = self.gateway.max_sessions, self.gateway.config.admission.max_sessions
        if wanted > carried:
            _log.warn(
                "admission.max_sessions is {wanted}, but the descriptor limit carries {carried}: raise LimitNOFILE",
                wanted=wanted,
                carried=carried,
            )
        _log.info("up to {carried} sessions at a time", carried=carried)


def _fares(upstream: UpstreamHealth) -> str:
    """Say in a few words how an upstream fares."""
    failure = None if upstream.is_open else upstream.last_failure
    why = f" ({failure.reason})" if failure is not None else ""
    return f"{upstream.address} {upstream.state.value}{why}"


def watched_files(config: Config) -> list[Path]:
    """Return the files that are read at the start and change without the configuration: certificates, keys, lists."""
    keys = ("client_cert", "client_key", "sas_key_file", "jwt_key_file")
    of_devices = [path for device in config.device for key in keys if (path := getattr(device, key)) is not None]
    return [*policy_files(config.tls), *of_devices]


def _tell_listening(port: IListeningPort) -> None:
    _log.info("listening for plain MQTT on {address}", address=shown_address(port.getHost()))


def spare_the_collector() -> None:
    """Keep Python's cycle collector from going over everything a hundred times a second.

    Messages make garbage that is no cycle, and only sessions that end make cycles.  What was loaded until now stays
    for good, so it is not looked at again.
    """
    gc.freeze()
    gc.set_threshold(_COLLECTOR_THRESHOLD, *gc.get_threshold()[1:])


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on descriptors to the hard one; return how many sessions that carries."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, (hard - _RESERVED_DESCRIPTORS) // _DESCRIPTORS_PER_SESSION)
