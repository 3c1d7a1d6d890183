"""The gateway as a Twisted service: start, reload, watching files, systemd, stop.

In: a `Config`, a reactor, signals.  Out: open listeners, the gateway behind them, a status endpoint.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import random
from socket import gethostname
from typing import Any, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.interfaces import IListeningPort
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from gateway import MADE
from gateway.config import Config, Listener, changed_keys, weak_ciphers
from gateway.config.listen import is_open_to_all
from gateway.dial.health import UpstreamHealth
from gateway.disk import all_read
from gateway.errors import ConfigError, NotNow
from gateway.gateway import SWEEP_INTERVAL, Gateway
from gateway.net.listening import Listeners
from gateway.net.network import ReactorNetwork, shown_address
from gateway.net.patience import PatientClock
from gateway.net.transport import RelayReactor
from gateway.ops.expiry import Certificate, ExpiryWatch, configured
from gateway.ops.file_work import FileWork
from gateway.ops.journal import GatewayJournal, Journal
from gateway.ops.ledger import Ledger
from gateway.ops.notify import Notifier
from gateway.ops.reload_port import NAME as RELOAD_SOCKET
from gateway.ops.reload_port import ReloadPort
from gateway.ops.renewal import Renewals, Renewer
from gateway.ops.sight import Sight, Sources
from gateway.ops.status_words import shown_state
from gateway.ops.store_port import StorePort
from gateway.ops.watch import Watch
from gateway.ops.web.port import StatusPort
from gateway.pieces import Chores, Pauses
from gateway.prepared import Prepared, free, look
from gateway.reception import Helpers
from gateway.relay.core import engine
from gateway.rules.secrets import Programs
from gateway.store.opening import open_store, store_directory, stores_all
from gateway.store.store import Store
from gateway.stored_devices import log_notes
from gateway.text import printable, unprintable_escaped

_log = Logger(namespace="gateway")
_T = TypeVar("_T")

# Sweeps between two looks at the files.  A change counts when two looks agree, so it takes up to twice as long.
_SWEEPS_PER_LOOK = 2
# Seconds that systemd is asked for beyond the configured time for a stop.
_STOP_MARGIN = 10.0
# Descriptors not used by sessions: listeners, logs, the reactor's own, happy eyeballs attempts.
_RESERVED_DESCRIPTORS = 64
_DESCRIPTORS_PER_SESSION = 2
# New objects that make Python's collector look at them: a few dozen sessions' worth, about a millisecond.
_COLLECTOR_THRESHOLD = 1_000
# After how many more such looks it looks at what they have left, and after how many of those at everything.
_SECOND_LOOKS, _FULL_LOOKS = 1, 1_000
# Since this version, Python looks at a part of the older objects each time.
_SINCE_PARTS = (3, 14)
# More new objects than these, after a reload, are left alone: looking at them would take several milliseconds.
_MOST_LOOKED_AT = 3_000
_CHANGES_SHOWN = 20
_MAX_PROBLEM = 1000  # characters
_STOPPING = ["the gateway is stopping"]
# Begins each line about a refused reload.
_REFUSED = "reload refused, previous configuration still active"
# Seconds after which a thread that computes must let the event loop run, when that is due.
_SWITCH_INTERVAL = 0.0005


class GatewayService(Service):
    """The gateway under `twistd`.

    `reread` reads the configuration again, for a reload.  If a listener cannot be opened, `privilegedStartService`
    raises `ConfigError`, so the service never runs without one.  If the status endpoint cannot be opened, that is
    logged and retried: devices are served without it.
    """

    def __init__(
        self,
        config: Config,
        reactor: Any,
        journal: GatewayJournal | None = None,
        notifier: Notifier | None = None,
        reread: Callable[[], Config] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        runtime_directory: Path | None = None,
    ) -> None:
        """Take a reactor with the interfaces Core, FDSet, Process, Threads, Time and UNIX.

        `now` gives the time of day, for certificates and for display; nothing is measured with it.  In
        `runtime_directory` a socket answers requests for a reload.
        """
        self._reactor = reactor
        self.engine = engine(wanted=config.relay.engine == "auto")
        self._relay = RelayReactor(reactor, self.engine.core, config.timeouts.tcp_user)
        self._notifier = notifier or Notifier()
        self.reread = reread or (lambda: config)
        journal = journal or Journal(reactor.seconds, sessions=lambda: self.gateway.config.log.sessions)
        chores = Chores(reactor.callLater)
        self.ledger = Ledger(journal, reactor.seconds, chores.add)
        patience = PatientClock(reactor)
        self.gateway = Gateway(
            config,
            reactor,
            ReactorNetwork(self._relay),
            self.ledger,
            raise_descriptor_limit(),
            self._swept,
            helpers=Helpers(
                Programs(reactor, patience),
                self._checked_in_thread,
                partial(_open_store, reactor),
            ),
            patience=patience,
            chores=chores,
        )
        self.renewals = Renewals(
            Renewer(
                programs=Programs(reactor, patience),
                in_thread=self._in_thread,
                now=now,
                current=lambda: (self.gateway.config, self.gateway.generation.dialler),
            ),
            lambda: self.gateway.generation.prepared,
            reactor.seconds,
            random,
        )
        self._listeners = Listeners(self._relay, self.gateway.factory)
        self._watch = Watch(self.gateway.generation.prepared.files)
        self._sweeps = 0
        # One thread at a time has to do with files: a reload, or a look at them.
        self._files = DeferredLock()
        self._file_work = FileWork(self._in_thread)
        # Requests for a reload that has not begun.
        self._requests: list[Deferred[Sequence[str]]] = []
        # Why the last reload was refused, until one succeeds: of another configuration, or of this one's files.
        self._refused = {"configuration": "", "files": ""}
        self.ledger.watch(self.gateway.sessions)
        self.sight = Sight(self.ledger, self._sources(now))
        self._now = now
        self._expiry = ExpiryWatch(now, reactor.seconds)
        # Its connections share the limit on the work of a turn with the sessions.
        self.status_port = StatusPort(self._relay, self.sight, self._in_thread)
        self._store_port: StorePort | None = None
        self._reload_port = (
            None
            if runtime_directory is None
            else ReloadPort(reactor, runtime_directory / RELOAD_SOCKET, self.reload, self._refused_rules)
        )

    def _sources(self, now: Callable[[], datetime]) -> Sources:
        gateway = self.gateway
        return Sources(
            host=gethostname(),
            upstreams=lambda: gateway.upstreams,
            certificates=lambda: chain(configured(gateway.generation.prepared.policy), self.status_port.certificates()),
            listeners=lambda: [(name, shown_address(port.getHost())) for name, port in self._listeners.named],
            is_stopping=lambda: gateway.stopping,
            device_certificates=lambda: gateway.generation.prepared.certificates,
            refused_rules=self._refused_rules,
            refused_reloads=self._not_in_effect,
            max_sessions=lambda: gateway.max_sessions,
            engine=self.engine,
            seconds=self._reactor.seconds,
            now=now,
            store=lambda: gateway.stored,
            stores_all=lambda: stores_all(gateway.config),
            log=lambda: self.lost_lines,
            renewals=lambda: self.renewals,
            weak_ciphers=lambda: weak_ciphers(gateway.config),
        )

    @property
    def lost_lines(self) -> tuple[int, bool]:
        """How many lines of the log were lost, and whether lines are being lost now."""
        return 0, False

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
        """Start."""
        if not self.ports:
            self.privilegedStartService()
        super().startService()
        spare_the_collector()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self.gateway.start()
        self._tell_limits()
        self._tell_open_sockets()
        self._tell_weak_ciphers()
        self._tell_refused_rules()
        tell = _log.warn if self.engine.remedy else _log.info
        tell("{words}", words=" ".join(filter(None, (self.engine.words, self.engine.remedy))))
        for port in self.ports:
            _tell_listening(port)
        for upstream in self.gateway.config.upstream:
            _log.info(
                "upstream {upstream}, certificate name {name}", upstream=upstream.address, name=upstream.verify_name
            )
        if self._reload_port is not None:
            self._reload_port.open()
        self._follow_store()
        # Everything is open and loaded, but the process may still end before the reactor's first turn.
        self._reactor.callWhenRunning(self._tell_ready)

    @property
    def status(self) -> str:
        """The state of the gateway in one line, for systemd."""
        count = len(self.gateway.sessions)
        sessions = f"{count} session{'' if count == 1 else 's'}"
        if self.gateway.stopping:
            return f"stopping, {sessions} left"
        upstreams = ", ".join(_fares(upstream) for upstream in self.gateway.upstreams)
        return "; ".join(part for part in (*self._not_in_effect(), sessions, upstreams) if part)

    def _not_in_effect(self) -> list[str]:
        """Say why what is on disk is not in effect."""
        return [words for words in (self._file_work.problem, *self._refused.values()) if words]

    def stopService(self) -> Deferred[Any]:
        """Close the listeners and end the sessions, spread over `drain.seconds`; fires when all are closed."""
        super().stopService()
        config = self.gateway.config
        count, seconds = len(self.gateway.sessions), config.drain.seconds
        _log.info("stopping: {shown}", shown=_shown_drain(count, seconds), sessions=count, seconds=seconds)
        self.renewals.stop()
        if self._reload_port is not None:
            self._reload_port.close()
        if self._store_port is not None:
            self._store_port.close()
        waiting = self._listeners.close()
        gone = self.gateway.stop(config.drain.seconds)
        self._notifier.stopping(self.status, config.drain.seconds + config.timeouts.close + _STOP_MARGIN)
        return DeferredList([*waiting, gone]).addCallback(lambda _: self._stopped())

    def stop_at_once(self) -> None:
        """End all sessions now; the kernel sends what it still has buffered."""
        _log.info("stopping now: closing the remaining {sessions} sessions", sessions=len(self.gateway.sessions))
        self.gateway.stop_at_once()
        # One turn later, so that connections closed in this turn are closed in order.
        self._relay.callLater(0, self._relay.stop)

    def reload(self) -> Deferred[Sequence[str]]:
        """Read the configuration and its files again, and change to them; what takes long is done in a thread.

        Fires with the problems, none if it was done.  If the new configuration cannot be used, every problem is logged
        and the previous one stays active.  Requests that come while one waits are answered together with that one.
        """
        answer: Deferred[Sequence[str]] = Deferred()
        self._requests.append(answer)
        if len(self._requests) == 1:
            if self._file_work.problem:
                _log.warn("the reload begins when this has ended: {problem}", problem=self._file_work.problem)
            self._files.run(lambda: Deferred.fromCoroutine(self._serve_requests()))
        return answer

    async def _serve_requests(self) -> None:
        requests, self._requests = self._requests, []
        problems = await self._reload(self.reread)
        if problems is _STOPPING:
            _log.warn(f"{_REFUSED}: {{problem}}", event="reload-refused", problem=_STOPPING[0])
        for request in requests:
            request.callback(problems)

    async def _reload(self, read: Callable[[], Config]) -> Sequence[str]:
        if self._is_stopping():
            return _STOPPING
        self._notifier.reloading()
        now = self.gateway.config
        refused = ["configuration"]
        problems: Sequence[str] = ()

        def prepare() -> Prepared:
            config, pause = read(), Pauses()
            if config is now or not changed_keys(now, config, pause):
                refused[:] = ["files"]
            return self.gateway.prepare(config, pause)

        try:
            prepared = await self._prepared(prepare)
            if self._is_stopping():
                # systemd has been told so; READY=1 would take it back.
                return _STOPPING
            self.adopt(prepared)
        except ConfigError as error:
            self.ledger.refused_reloads += 1
            problems = error.problems
            for problem in problems:
                _log.error(f"{_REFUSED}: {{problem}}", event="reload-refused", problem=problem)
            more = f" (and {len(problems) - 1} more, see the log)" if len(problems) > 1 else ""
            self._refused[refused[0]] = f"{_REFUSED}: {problems[0]}{more}"
            if isinstance(error, NotNow):
                # The files that have changed do so once more for the watch, which tells a change once.
                self._watch.know(self.gateway.generation.prepared.files)
        except Exception:  # noqa: BLE001  systemd must not wait for the end of this reload, whatever happens
            self.ledger.refused_reloads += 1
            problems = ["internal error, see the log"]
            _log.failure(f"{_REFUSED}: internal error")
            self._refused[refused[0]] = f"{_REFUSED}: {problems[0]}"
        else:
            what = _listed(prepared.changed) or "no changes"
            _log.info("reloaded: {what}", event="reloaded", what=what)
            self._refused["files"] = ""
            self.ledger.reloads += 1
            if read is self.reread:
                self._refused["configuration"] = ""
        if not self._is_stopping():
            self._notifier.ready(self.status)
        return problems

    def _is_stopping(self) -> bool:
        # A call, since the answer changes while a coroutine waits.
        return self.gateway.stopping

    def change(self, config: Config) -> Deferred[Sequence[str]]:
        """Change to another configuration; fires with the changed keys and files.

        Fails with `ConfigError` and every problem; the previous configuration then stays active.
        """
        return self._files.run(lambda: Deferred.fromCoroutine(self._change(config)))

    async def _change(self, config: Config) -> Sequence[str]:
        prepared = await self._prepared(lambda: self.gateway.prepare(config, Pauses()))
        if self._is_stopping():
            raise ConfigError(_STOPPING)
        self.adopt(prepared)
        return prepared.changed

    async def _prepared(self, prepare: Callable[[], Prepared]) -> Prepared:
        """Return what `prepare` returns in a thread.

        The collector would hold up the event loop to look at thousands of new objects, which are no garbage.  If there
        are so many, it never looks at them, nor at anything else that is alive then, so garbage is freed before.
        """
        gc.collect(0)
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            prepared = await self._file_work.do("a reload", partial(_outcome, prepare))
        finally:
            if gc.get_count()[0] > _MOST_LOOKED_AT:
                gc.freeze()
            if is_collecting:
                gc.enable()
        if isinstance(prepared, Prepared):
            return prepared
        # Another one: the same would reference this frame, and this frame it.
        raise type(prepared)(prepared.problems)

    def adopt(self, prepared: Prepared) -> None:
        """Begin new sessions under another configuration; established sessions keep their own.

        Raises `ConfigError` with every problem; after any exception the previous configuration stays active.
        """
        config = prepared.config
        status = self.status_port.prepare(config.status)
        # The reactor does not run during what follows, so no connection can come in between.
        try:
            generation = self.gateway.made(prepared)
            opened, closed = self._listeners.change(config.listen)
        except BaseException:
            self.status_port.discard(status)
            raise
        # From here on the new configuration is active, so an internal error must not look like a refusal.
        steps: list[Callable[[], object]] = [
            partial(self.gateway.adopt, generation),
            self.renewals.let_go,
            self._follow_store,
            partial(self.status_port.adopt, status),
            partial(self._watch.know, prepared.files),
            partial(self._tell_adopted, opened, closed),
            partial(self._in_thread, partial(free, prepared, Pauses())),
        ]
        for step in steps:
            try:
                step()
            except Exception:  # noqa: BLE001  see above
                _log.failure("internal error during a reload; the new configuration is active")

    def _tell_adopted(self, opened: Sequence[IListeningPort], closed: Sequence[Listener]) -> None:
        self._tell_limits()
        self._tell_open_sockets()
        self._tell_weak_ciphers()
        self._tell_refused_rules()
        for port in opened:
            _tell_listening(port)
        for listener in closed:
            _log.info("no longer listening on {endpoint}", endpoint=listener.endpoint)
            if listener.endpoint.startswith("systemd:"):
                _log.warn(
                    "systemd keeps {endpoint} open: devices that connect there will hang; stop its .socket unit",
                    endpoint=listener.endpoint,
                )

    def _in_thread(self, work: Callable[[], _T]) -> Deferred[_T]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def _checked_in_thread(self, check: Callable[[], bool]) -> Deferred[bool]:
        """Do this for a session; what the result leads to shares the limit on the work of a turn."""
        checked: Deferred[bool] = Deferred()
        self._in_thread(check).addBoth(lambda result: self._relay.later(partial(checked.callback, result)))
        return checked

    def _swept(self) -> None:
        self._notifier.alive(self.status, SWEEP_INTERVAL)
        self._sweeps += 1
        if self._file_work.sweep():
            # A reload keeps the collector off; this one may never end.
            gc.enable()
        if self._sweeps % _SWEEPS_PER_LOOK == 0 and not self.gateway.stopping and not self._files.locked:
            self._files.run(lambda: Deferred.fromCoroutine(self._look()))
        self.status_port.sweep()
        self._expiry.sweep(self._certificates)
        if not self.gateway.stopping:
            self.renewals.sweep()

    def _looked(self, prepared: Prepared) -> list[Path]:
        pause = Pauses()
        return self._watch.look(look(prepared, pause), pause)

    async def _look(self) -> None:
        """Look whether files have changed; if so, reload them."""
        prepared = self.gateway.generation.prepared
        try:
            changed = await self._file_work.do("a check for changed files", lambda: self._looked(prepared))
        except Exception:  # noqa: BLE001  the next look may do better
            _log.failure("internal error while checking for changed files")
            return
        if changed:
            # The configuration itself is read only on request: somebody may still be editing it.
            await self._reload(lambda: prepared.config)

    def _stopped(self) -> Deferred[Any]:
        self.gateway.close_store()
        self._notifier.close()
        # Last, so that the status page shows the sessions ending.
        return self.status_port.close().addBoth(lambda _: self._relay.stop())

    def _follow_store(self) -> None:
        """Open the socket of a store that has come into use."""
        directory, stored = store_directory(self.gateway.config), self.gateway.stored
        if self._store_port is None and stored is not None and directory is not None:
            self._store_port = StorePort(self._reactor, directory, stored.change)
            self._store_port.open()

    def _tell_ready(self) -> None:
        if self.running and not self.gateway.stopping:
            self._notifier.ready(self.status)

    def _certificates(self) -> Iterator[Certificate]:
        """Yield all certificates to warn of: those of the status document, and of devices the first to expire."""
        yield from self.sight.certificates()
        yield from self.gateway.generation.prepared.certificates.due(self._now())

    def _tell_open_sockets(self) -> None:
        config = self.gateway.config
        for endpoint in filter(None, (*(each.endpoint for each in config.listen), config.status.endpoint)):
            if is_open_to_all(endpoint):
                _log.warn(
                    "{endpoint}: every user of this machine can connect; use mode=660 or stricter",
                    event="socket-open-to-all",
                    endpoint=endpoint,
                )

    def _tell_weak_ciphers(self) -> None:
        for key, words in weak_ciphers(self.gateway.config):
            _log.warn(
                "{key}: weaker than the defaults: {cipher}; remove it as soon as the broker has a better one",
                event="weak-cipher",
                key=key,
                cipher=words,
            )

    def _tell_refused_rules(self) -> None:
        refused = self.gateway.generation.prepared.refused
        for device, problem in islice(refused.items(), _CHANGES_SHOWN):
            _log.error(
                "rule {rule} cannot be used, so its devices are refused: {problem}",
                event="rule-refused",
                rule=printable(device.name),
                problem=unprintable_escaped(problem, _MAX_PROBLEM),
            )
        if len(refused) > _CHANGES_SHOWN:
            _log.error("{count} more rules cannot be used", count=len(refused) - _CHANGES_SHOWN)

    def _refused_rules(self) -> list[tuple[str, str]]:
        return [(device.name, problem) for device, problem in self.gateway.generation.prepared.refused.items()]

    def _tell_limits(self) -> None:
        carried, wanted = self.gateway.max_sessions, self.gateway.config.admission.max_sessions
        if wanted > carried:
            _log.warn(
                "admission.max_sessions is {wanted}, but the descriptor limit allows {carried}: raise LimitNOFILE",
                wanted=wanted,
                carried=carried,
            )
        _log.info("session limit: {carried}", carried=carried)


def _shown_drain(count: int, seconds: float) -> str:
    if not count:
        return "no session is open"
    sessions = f"{count} session{'' if count == 1 else 's'}"
    return f"closing {sessions} over {seconds:g} s; a second signal closes them at once"


def _listed(changed: Sequence[str]) -> str:
    """List what changed, cut: it may be thousands of files."""
    more = f" and {len(changed) - _CHANGES_SHOWN} more" if len(changed) > _CHANGES_SHOWN else ""
    return ", ".join(changed[:_CHANGES_SHOWN]) + more


def _open_store(reactor: Any, config: Config) -> Store | None:
    store = open_store(
        config,
        lambda call: reactor.callFromThread(call),
        lambda: reactor.seconds(),
        lambda: time.time() >= MADE.timestamp(),
    )
    if store is not None:
        log_notes(store)
    return store


def _outcome(prepare: Callable[[], Prepared]) -> Prepared | ConfigError:
    """Return what `prepare` returns, or the problems.

    An exception that leaves a thread of Twisted's references its frames, and they reference it: only the collector
    could free them, with all that was prepared.
    """
    try:
        with all_read():
            return prepare()
    except ConfigError as error:
        return type(error)(error.problems)


def _fares(upstream: UpstreamHealth) -> str:
    """Say in a few words how an upstream fares."""
    deciding = upstream.decisive
    failure = None if upstream.is_open else deciding.last_failure
    why = f" ({failure.reason})" if failure is not None else ""
    return f"{upstream.address} {shown_state(deciding.state.value)}{why}"


def _tell_listening(port: IListeningPort) -> None:
    _log.info("listening for plain MQTT on {address}", address=shown_address(port.getHost()))


def spare_the_collector() -> None:
    """Keep Python's cycle collector from holding up the event loop.

    Everything loaded until now stays, so it need not be scanned.  What is new is looked at twice, in small portions:
    thousands of sessions that begin leave hundreds of thousands of objects.  Cycles are rare (`tests/test_cycles.py`),
    so everything is looked at almost never.
    """
    gc.freeze()
    older = gc.get_threshold()[1:] if sys.version_info >= _SINCE_PARTS else (_SECOND_LOOKS, _FULL_LOOKS)
    gc.set_threshold(_COLLECTOR_THRESHOLD, *older)


def raise_descriptor_limit() -> int:
    """Raise this process's soft descriptor limit to the hard limit; return how many sessions that allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, (hard - _RESERVED_DESCRIPTORS) // _DESCRIPTORS_PER_SESSION)
