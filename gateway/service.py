"""The gateway as a whole: everything built from a `Config`, its start and its stop.

In: a `Config`, a reactor.  Out: listeners that turn connections into sessions, and a Twisted service around them.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import IAddress, IListeningPort, IReactorTime
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from gateway.config import Config, Listener
from gateway.device import DeviceProtocol
from gateway.errors import ConfigError, EndReason, UpstreamFailure
from gateway.listening import ListenFailed, listen
from gateway.network import Network, ReactorNetwork
from gateway.ops.journal import Journal
from gateway.policy.admission import Doorkeeper, plain_address
from gateway.record import SessionRecord
from gateway.session import Journal as SessionJournal
from gateway.session import Session
from gateway.tls.channel import make_policy
from gateway.tls.identity import Identity
from gateway.transport import RelayReactor
from gateway.upstream import Dialler, Target, shown_address

_log = Logger(namespace="gateway")

SWEEP_INTERVAL = 1.0  # seconds; deadlines are kept to this precision
# Descriptors that are no session's: listeners, logs, the reactor's own, attempts of happy eyeballs.
_RESERVED_DESCRIPTORS = 64
_DESCRIPTORS_PER_SESSION = 2
# Objects that may come into being before young ones are looked at: some dozens of sessions' worth.
_COLLECTOR_THRESHOLD = 20_000


class GatewayJournal(SessionJournal, Protocol):
    """Who is told what the gateway does."""

    def refused(self, reason: EndReason, device_address: str) -> None:
        """A connection was closed at once."""

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """A session found its broker, but not in the first place: `upstream` (`host:port`) failed."""

    def sweep(self) -> None:
        """About a second has passed."""

    def flush(self) -> None:
        """The gateway stops: what was kept for later is to be told now."""


class Gateway:
    """All sessions, and what they share.

    Everything that touches the world is a parameter, so that a whole gateway can run in memory on a virtual clock.
    Raises `ConfigError` if certificates or keys cannot be used.
    """

    def __init__(
        self, config: Config, clock: IReactorTime, network: Network, journal: GatewayJournal, max_sessions: int
    ) -> None:
        self.config = config
        self.sessions: set[Session] = set()
        self.doorkeeper = Doorkeeper(config.admission, max_sessions, clock.seconds)
        self._clock = clock
        self._journal = journal
        self._numbered = 0
        self._stopping = False
        self._all_gone: Deferred[None] | None = None
        policy = make_policy(config.tls)
        targets = [Target(upstream, Identity.of(upstream.verify_name), policy) for upstream in config.upstream]
        self._dialler = Dialler(targets, network, clock, config.timeouts, journal.passed_over)
        self._sweeper = LoopingCall(self._sweep)
        self._sweeper.clock = clock

    def start(self) -> None:
        """Begin to let devices in and to keep deadlines."""
        self._stopping = False
        self._sweeper.start(SWEEP_INTERVAL, now=False)

    def stop(self) -> Deferred[None]:
        """End all sessions; fires when nothing of them is left, at the latest after `timeouts.close`."""
        self._stopping = True
        gone: Deferred[None] = Deferred()
        for session in list(self.sessions):
            self._guarded(session, lambda session: session.stop(EndReason.GATEWAY_STOPPING))
        self._all_gone = gone
        self._check_all_gone()
        return gone

    def factory(self, listener: Listener) -> Factory:
        """Return the factory whose connections become sessions of this gateway."""
        return _DeviceFactory(self, listener.name)

    def admit(self, address: IAddress | None, listener: str) -> DeviceProtocol | None:
        """Return the protocol for a new connection, or `None` if it is not let in."""
        host = _host(address)
        reason = EndReason.GATEWAY_STOPPING if self._stopping else self.doorkeeper.admit(host)
        if reason is not None:
            self._journal.refused(reason, shown_address(address))
            return None

        def open_session(device: DeviceProtocol) -> Session:
            self._numbered += 1
            record = SessionRecord(self._numbered, shown_address(address), self._clock.seconds(), listener=listener)
            session = Session(
                record,
                device,
                lambda session: self._dialler.dial(session, device),
                self._journal,
                lambda session: self._gone(session, host),
                self._clock.seconds,
                self.config.limits,
                self.config.timeouts,
            )
            self.sessions.add(session)
            return session

        return DeviceProtocol(open_session, self.config.timeouts.tcp_user)

    def _gone(self, session: Session, host: str | None) -> None:
        self.sessions.discard(session)
        self.doorkeeper.leave(host)
        self._check_all_gone()

    def _check_all_gone(self) -> None:
        if self._all_gone is not None and not self.sessions:
            if self._sweeper.running:
                self._sweeper.stop()
            self._journal.flush()
            gone, self._all_gone = self._all_gone, None
            gone.callback(None)

    def _sweep(self) -> None:
        now = self._clock.seconds()
        for session in list(self.sessions):
            self._guarded(session, lambda session: session.sweep(now))
        try:
            self.doorkeeper.sweep()
            self._journal.sweep()
        except Exception:  # noqa: BLE001  without the sweep no session would have a deadline any more
            _log.failure("a mistake of the gateway in its sweep")

    def _guarded(self, session: Session, do: Callable[[Session], None]) -> None:
        """Do something to a session; a mistake that is made there ends that session and leaves the others alone."""
        try:
            do(session)
        except Exception as error:  # noqa: BLE001  see above
            _log.failure("session {number}: a mistake of the gateway", number=session.record.number)
            session.fail(type(error).__name__)


class _DeviceFactory(Factory):
    """Makes each connection to one listener a session."""

    noisy = False

    def __init__(self, gateway: Gateway, listener: str) -> None:
        self._gateway = gateway
        self._listener = listener

    def buildProtocol(self, addr: IAddress | None) -> DeviceProtocol | None:
        """Admit a connection; `None` makes Twisted close it at once."""
        return self._gateway.admit(addr, self._listener)


class GatewayService(Service):
    """The gateway under `twistd`.

    `ports` are the open listeners, in the order of the configuration.  A listener that cannot be opened is a
    `ConfigError` from `privilegedStartService`, so that the service never runs deaf.
    """

    def __init__(self, config: Config, reactor: Any, journal: GatewayJournal | None = None) -> None:
        """Take a reactor that provides IReactorTime, IReactorTCP and IReactorPluggableNameResolver."""
        self.config = config
        self.ports: list[IListeningPort] = []
        self._relay = RelayReactor(reactor)
        carried = raise_descriptor_limit()
        max_sessions = config.admission.max_sessions or carried
        if max_sessions > carried:
            _log.warn(
                "admission.max_sessions is {wanted}, but the descriptor limit carries {carried}: raise LimitNOFILE",
                wanted=max_sessions,
                carried=carried,
            )
            max_sessions = carried
        self.gateway = Gateway(
            config, reactor, ReactorNetwork(self._relay), journal or Journal(reactor.seconds), max_sessions
        )

    def privilegedStartService(self) -> None:
        """Open the listeners, with the rights to open ports below 1024."""
        super().privilegedStartService()
        self._relay.start()
        problems: list[str] = []
        for index, listener in enumerate(self.config.listen):
            try:
                self.ports.append(listen(self._relay, listener, self.gateway.factory(listener)))
            except ListenFailed as error:
                problems.append(f"listen[{index}].endpoint: cannot listen on {listener.endpoint}: {error}")
        if problems:
            self._relay.stop()
            raise ConfigError(problems)

    def startService(self) -> None:
        """Begin."""
        if not self.ports:
            self.privilegedStartService()
        super().startService()
        spare_the_collector()
        self.gateway.start()
        for port in self.ports:
            _log.info("listening for plain MQTT on {address}", address=shown_address(port.getHost()))
        for upstream in self.config.upstream:
            _log.info("upstream {upstream}, verified as {name}", upstream=upstream.address, name=upstream.verify_name)

    def stopService(self) -> Deferred[Any]:
        """Close the listeners, end the sessions; fires when nothing is left."""
        super().stopService()
        waiting: list[Deferred[Any]] = [maybeDeferred(port.stopListening) for port in self.ports]
        self.ports = []
        return DeferredList([*waiting, self.gateway.stop()]).addCallback(lambda _: self._relay.stop())


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


def _host(address: IAddress | None) -> str | None:
    host = getattr(address, "host", None)
    if host is None:
        return None
    try:
        return str(plain_address(host))
    except ValueError:
        return str(host)
