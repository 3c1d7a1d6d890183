"""Devices, brokers and the gateway between them, each run made of one seed, and the oracles that judge the run.

In: a seed.  Out: `Outcome` with the violations (none, it is hoped) and the trace.  The gateway is the real one, with
real TLS; devices and brokers are models that keep to MQTT or break it as the seed wants.

The oracles know what the models did, not what the gateway believes.  Each is named by the invariant of the
architecture that it watches: `verified`, `truth`, `end-to-end`, `loss`, `memory`, `one-upstream`, `secrets`; `hold` for
"only after CONNACK is the device read again", and `liveness` for "everything ends and nothing is left behind".
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable
from ipaddress import ip_network
from random import Random
from typing import Any

from attrs import define, field, frozen
from twisted.internet.error import ConnectionDone
from twisted.logger import Logger, LogLevel, formatEvent, globalLogPublisher

from gateway.config import TLS, Admission, Config, Drain, Failover, Limits, Listener, Pacing, Timeouts, Upstream
from gateway.dial.dialler import LEFT_WHILE_WAITING
from gateway.errors import EndReason
from gateway.gateway import Gateway
from gateway.net import transport
from gateway.ops.journal import Journal
from gateway.prepared import free
from gateway.session.record import SessionRecord
from gateway.session.session import Session, State
from gateway.tls.channel import ChannelState
from tests.core.virtual import VirtualCore
from tests.simulation.identities import FAULTS, Identities
from tests.simulation.models import (
    CONNACK,
    DISCONNECT,
    PASSWORD,
    PAYLOAD,
    Broker,
    BrokerConnection,
    Device,
)
from tests.simulation.network import (
    Connection,
    Cut,
    GatewayConnection,
    Link,
    Poller,
    VirtualClock,
    VirtualNetwork,
    VirtualRelay,
    Weather,
)
from tests.simulation.packets import packets_of
from tests.simulation.rules import KINDS, pings_in, rule_for, without_pings

# Virtual seconds in which everybody's script has run, every timeout with it; and after which everything must be gone.
SETTLED, GONE = 150.0, 150.0
# Calls of the clock after which a run is taken for an endless loop.
MOST_STEPS = 400_000
# What a session may hold in both directions together: two transports at 64 KiB each and what one read adds to them.
MEMORY = 512 * 1024
_SECRETS = (PASSWORD, PAYLOAD)
MOST_DEVICES = 5


@frozen
class Violation:
    """An oracle's complaint."""

    oracle: str
    what: str


@define
class Outcome:
    """What came of a seed."""

    seed: int
    violations: list[Violation]
    trace: list[str]
    steps: int
    reasons: list[str] = field(factory=list)
    # How often a session was lent to the compiled core, and whether there was one.
    loans: int = 0
    has_core: bool = False


def simulate(seed: int, identities: Identities, core: VirtualCore | None = None) -> Outcome:
    """Run a seed; with `core`, that is what relays, and always under the gateway's own reactor."""
    world = World(seed, identities, core)
    return judge(world)


def judge(world: World) -> Outcome:
    """Let a world live, and look for what it has left behind."""
    monotonic = transport.monotonic
    globalLogPublisher.addObserver(world.observe)
    try:
        transport.monotonic = world.monotonic
        world.live()
        sessions = world.sessions_ever
        world.gateway = None  # type: ignore[assignment]  # nothing but a leak may hold a session now
        gc.collect()
        if not world.violations:
            left = [type(ref()).__name__ for ref in (*sessions, *world.network.channels_ever) if ref() is not None]
            world.expect(not left, "liveness", f"objects are left: {left}")
    finally:
        transport.monotonic = monotonic
        globalLogPublisher.removeObserver(world.observe)
    reasons = [str(record.reason) for record in world.journal.ended]
    has_core = world.relay is not None and world.relay.core is not None
    loans = 0 if world.relay is None else world.relay.loans
    return Outcome(world.seed, world.violations, world.trace, world.clock.steps, reasons, loans, has_core)


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, identities: Identities, core: VirtualCore | None = None) -> None:
        self.seed = seed
        self._thread = threading.get_ident()
        self.random = random = self.fork("world")
        self.clock = VirtualClock()
        self.trace: list[str] = []
        self.violations: list[Violation] = []
        self.texts: list[str] = []
        self.links: list[Link] = []
        self.upstream_links: list[Link] = []
        self.identities = identities
        self.poller = Poller(self.clock, self.fork("poller"))
        self.poller.after_turn = self._watch_session
        relay = self.fork("relay")
        has_relay = relay.random() < 0.5 or core is not None
        self.relay = VirtualRelay(self.clock, relay, core) if has_relay else None
        if self.relay is not None:
            self.relay.after_turn = self._watch_session
        self.network = VirtualNetwork(self.clock, self.poller, self._make_link, self.relay)
        self.journal = RecordingJournal(self)

        self.most_steps = MOST_STEPS
        self.calm = random.random() < 0.4
        self.flooded = random.random() < 0.06
        self.stop_at = random.uniform(0.5, 15) if random.random() < 0.15 else None
        drain, change = self.fork("drain"), self.fork("change")
        self.drain = Drain(seconds=drain.choice((0.0, 0.0, 2.0, 5.0)), wills=drain.choice(("publish", "discard")))
        self.change_at = change.uniform(0.5, 15) if change.random() < 0.2 else None
        self.brokers = [
            Broker(self, index, self.fork(f"broker {index}")) for index in range(random.choice((1, 1, 2, 3)))
        ]
        trouble = self.fork("trouble")
        failover = Failover(retry_first=trouble.choice((0.5, 1.0, 5.0)), retry_max=trouble.choice((5.0, 30.0)))
        pacing = Pacing(
            new_sessions_per_second=trouble.choice((0.0, 0.5, 1.0, 100.0, 100.0)),
            queue_seconds=trouble.choice((0.0, 2.0, 10.0)),
        )
        # With random numbers of its own, as all that came later: a seed stays what it was.
        self.balanced = self.fork("balancer").random() < 0.25
        rules = self.fork("rules")
        self.ruled = rules.random() < 0.35
        kinds = [kind for kind in KINDS if not (kind == "pace" and self.flooded)]
        self._kinds = [rules.choice((*kinds, "")) if self.ruled else "" for _ in range(MOST_DEVICES)]
        self.config = Config(
            device=tuple(
                rule_for(kind, f"device-{number}", identities.jwt_key)
                for number, kind in enumerate(self._kinds)
                if kind
            ),
            listen=(Listener("1883", proxies=(ip_network("192.168.9.0/24"),) if self.balanced else ()),),
            upstream=tuple(Upstream(host=broker.host) for broker in self.brokers),
            tls=TLS(ca_file=(identities.ca_file,)),
            limits=Limits(max_packet_size=random.choice((512, 70_000, 268_435_460)), max_connect_size=1024),
            timeouts=Timeouts(),
            failover=failover,
            pacing=pacing,
            admission=Admission(max_sessions_per_address=random.choice((0, 0, 0, 1))),
            drain=self.drain,
        )
        self.gateway = Gateway(
            self.config,
            self.clock,
            self.network,
            self.journal,
            random.choice((2, 100, 100, 100)),
            uniform=self.fork("jitter").random,
        )
        sessions = OrderedSessions()
        self.sessions_ever = sessions.ever
        self.gateway.sessions = sessions  # type: ignore[assignment]
        self.factory = self.gateway.factory(self.config.listen[0])
        self.connections: list[BrokerConnection] = []
        # When all brokers are back from an outage, if there is one, and when that must have been noticed: a trial that
        # is under way fails first, then the longest time passes, and the sweep comes once a second.
        self.away_until = trouble.uniform(1, 20) if trouble.random() < 0.25 else 0.0
        self.found_by = self.away_until + self.one_dial + failover.retry_max + 2.0 if self.away_until else 0.0
        for broker in self.brokers if self.away_until else ():
            broker.be_away(self.away_until)
        self.devices = [
            Device(self, number, self.fork(f"device {number}")) for number in range(random.randint(1, MOST_DEVICES))
        ]
        self._stood: dict[int, tuple[State, float]] = {}
        self.stopped: list[float] = []

    def monotonic(self) -> float:
        """Return the time by which turns of the relay are bounded, in the thread of this world and in others."""
        virtual = self.relay is not None and threading.get_ident() == self._thread
        return self.relay.monotonic() if virtual and self.relay is not None else time.monotonic()

    def rule_of(self, number: int) -> str:
        """Return the kind of rule for a device, by its number; empty if it has none."""
        return self._kinds[number % MOST_DEVICES]

    @property
    def settled(self) -> float:
        """When everybody's script has run: also that of those who came after an outage."""
        return SETTLED + self.found_by

    @property
    def over(self) -> float:
        """When everything must be gone."""
        return self.settled + GONE

    @property
    def one_dial(self) -> float:
        """How long a dial to one broker may take."""
        timeouts = self.config.timeouts
        return timeouts.dns + timeouts.tcp + timeouts.tls

    def fork(self, name: str) -> Random:
        """Return random numbers that depend on the seed and the name only."""
        return Random(f"{self.seed} {name}")  # noqa: S311  no secret is made of them

    @property
    def now(self) -> float:
        return self.clock.seconds() - 1000.0

    def note(self, who: str, what: str) -> None:
        """Add to the trace."""
        self.trace.append(f"{self.now:10.4f} {who:12} {what}")

    def expect(self, condition: object, oracle: str, what: str) -> None:
        """Complain unless `condition` is true.  It does not raise: the gateway must not be able to catch it."""
        if not condition:
            self.violations.append(Violation(oracle, f"at {self.now:.4f} s: {what}"))
            self.note("ORACLE", f"{oracle}: {what}")

    # ---- the course of a run

    def live(self) -> None:
        """Let it all happen."""
        self.gateway.start()
        for device in self.devices:
            self.clock.schedule(device.start, device.connect)
        if self.stop_at is not None:
            self.clock.schedule(self.stop_at, self._stop)
        if self.change_at is not None:
            self.clock.schedule(self.change_at, self._change)
        self.clock.schedule(1.0, self._watch_deadlines)
        self._run(self.settled)
        for device in self.devices:
            self._judge_device(device)
        for device in self.devices:
            device.leave()
        for connection in self.connections:
            connection.leave()
        self._run(self.over)
        # Brokers that are left alone are tried for as long as the gateway runs: that is nothing that was left behind.
        dialler = self.gateway.generation.dialler
        dialler.stop()
        dialler.sweep = lambda: None  # type: ignore[method-assign]
        self._run(self.over + 2)
        if not self.violations:
            self._judge_end()

    def _run(self, until: float) -> None:
        try:
            self.clock.run(1000.0 + until, lambda: self.violations, self.most_steps)
        except RuntimeError as endless:
            self.expect(False, "liveness", str(endless))
        for mistake in self.poller.mistakes:
            self.expect(False, "liveness", f"an exception reached the reactor: {mistake}")

    def _stop(self) -> None:
        self.note("gateway", "is stopped")
        self.gateway.stop(self.drain.seconds).addCallback(self._stopped)

    def _change(self) -> None:
        """All is made anew, as at a reload; nobody may notice."""
        self.note("gateway", "changes to another generation")
        prepared = self.gateway.prepare(self.config)
        self.gateway.adopt(self.gateway.made(prepared))
        free(prepared)  # as the service does

    def _stopped(self, _: object) -> None:
        self.note("gateway", "has stopped")
        self.stopped.append(self.now)
        self.clock.schedule(0.01, self._judge_stop)

    def _judge_stop(self) -> None:
        """When the gateway says that it has stopped, nothing of it goes on."""
        calls = self.clock.getDelayedCalls()
        self.expect(not calls, "liveness", f"{len(calls)} delayed calls after the stop")
        own = [each for each in self.network.connections if isinstance(each, GatewayConnection)]
        left = [connection.name for connection in own if "socket" in connection.__dict__]
        self.expect(not left, "liveness", f"open connections after the stop: {left}")

    def _make_link(self, is_device: bool) -> Link:
        random = self.fork(f"link {len(self.links)}")
        # A flood through a narrow, slow link is not over when the run is judged.
        slow = not self.flooded and random.random() < 0.2
        weather = Weather(
            delay=random.choice(((0.0, 0.0), (0.0, 0.01), (0.02, 0.05)) if not slow else ((0.0, 1.0), (0.9, 1.0))),
            segment=random.choice((7, 100, 1460, 16384, 65536)),
            capacity=random.choice((65536, 262_144) if self.flooded else (4096, 16384, 65536, 262_144)),
            partial_writes=random.random() < 0.3,
            harsh=random.random() < 0.5,
        )
        cut = None
        if not self.calm and random.random() < 0.25:
            # Most of what decides happens in the first three kilobytes: the handshake, CONNECT, CONNACK.
            offset = random.randint(1, random.choice((120, 3000) if is_device else (700, 3000, 20_000)))
            cut = Cut(random.choice(("reset", "crash", "silence")), random.random() < 0.5, offset)
        link = Link(self.clock, random, weather, cut)
        self.links.append(link)
        if not is_device:
            self.upstream_links.append(link)
        return link

    # ---- what is watched all the time

    def observe(self, event: dict[str, Any]) -> None:
        """Take a log event: no secret may be in it, and none may be an error."""
        if threading.get_ident() != self._thread:
            return  # Other tests have a reactor in a thread of its own.
        failure = event.get("log_failure")
        text = formatEvent(event) + " ".join(str(value) for key, value in event.items() if not key.startswith("log_"))
        if failure is not None:
            text += failure.getTraceback()
        self.expect(not any(secret in text for secret in _SECRETS), "secrets", f"the log shows a secret: {text}")
        wrong = failure is not None or event.get("log_level") in {LogLevel.error, LogLevel.critical}
        self.expect(not wrong, "liveness", f"an error was logged: {text}")

    def _watch_session(self, connection: Connection) -> None:
        """Complain about a session that holds too much, or that has an upstream which is not verified."""
        session = getattr(connection.__dict__.get("protocol"), "_session", None)
        if not isinstance(session, Session) or not isinstance(connection, GatewayConnection):
            return
        if session._upstream is not None:
            handshaking = session._upstream._channel.state is ChannelState.HANDSHAKING
            self.expect(not handshaking, "verified", f"session {session.record.number} has an upstream too early")
        held = session._device_reader.buffered
        if session._upstream_reader is not None:
            held += session._upstream_reader.buffered
        for side in (session._device, session._upstream):
            if side is not None and "socket" in side.transport.__dict__:
                held += side.transport.buffered
        self.expect(held <= MEMORY, "memory", f"session {session.record.number} holds {held} bytes")

    def _watch_deadlines(self) -> None:
        """Complain about a session that stays in a state longer than that state's timeouts allow."""
        timeouts = self.config.timeouts
        dialling = self.one_dial * len(self.brokers) + self.config.pacing.queue_seconds
        allowed = {
            State.WAIT_CONNECT: timeouts.connect_packet,
            State.DIALLING: dialling,
            State.WAIT_CONNACK: timeouts.connack,
            State.ENDED: timeouts.close,
        }
        for session in self.gateway.sessions:
            number, state = session.record.number, session.state
            known, since = self._stood.get(number, (None, 0.0))
            if known is not state:
                self._stood[number] = (state, self.now)
            elif state in allowed:
                stood = self.now - since
                self.expect(stood <= allowed[state] + 1.5, "liveness", f"session {number}: {state.name} for {stood} s")
        if self.now < self.over:
            self.clock.schedule(1.0, self._watch_deadlines)

    def is_leave(self, device: Device, start: int, plaintext: bytes) -> bool:
        """Whether the gateway may say this in a device's name: DISCONNECT behind `start` bytes, when it was stopped."""
        may = device.rule == "token" or (self.drain.wills == "discard" and self.gateway.stopping)
        ends = [end for end, _, _ in packets_of(device.sent[:start])]
        return may and plaintext == b"\xe0\x00" and ends[-1:] == [start]

    # ---- what is judged when everybody's script has run

    def _judge_device(self, device: Device) -> None:
        connections = [connection for connection in self.connections if connection.device is device]
        self.expect(len(connections) <= 1, "one-upstream", f"{device.name} had {len(connections)} upstream sessions")
        if device.rule:
            asked, answered = pings_in(device.sent, 0xC0), pings_in(device.received, 0xD0)
            self.expect(answered <= asked, "end-to-end", f"{device.name} got {answered} PINGRESPs for {asked}")
        connection = connections[0] if connections else None
        self._judge_answers(device, connection)
        self._judge_truth(device, connection)
        if connection is not None:
            self._judge_disconnect(device, connection)
            self._judge_standing(device, connection)

    def _judge_answers(self, device: Device, connection: BrokerConnection | None) -> None:
        """What the device got is what its broker sent, and at most one farewell of the gateway's."""
        got = self._received(device)
        sent = self._sent(connection) if connection is not None else b""
        if sent.startswith(got):
            return
        common = next((at for at, (one, other) in enumerate(zip(got, sent, strict=False)) if one != other), None)
        if common is None:
            common = min(len(got), len(sent))
        accepted = False
        for end, first, body in [(0, 0, b""), *packets_of(sent)]:
            if end > common:
                break
            accepted = accepted or (first >> 4 == CONNACK and body[1:2] == b"\0")
            if device.is_farewell(got[end:], accepted=accepted):
                return
        self.expect(False, "end-to-end", f"{device.name} got {got[-80:]!r}, its broker sent {sent[-80:]!r}")

    @staticmethod
    def _received(device: Device) -> bytes:
        """Return what a device got; PINGRESPs are judged apart where the gateway has PINGREQs of its own."""
        return without_pings(device.received) if device.rule else bytes(device.received)

    @staticmethod
    def _sent(connection: BrokerConnection) -> bytes:
        """Return what a broker sent to a device, without PINGRESPs where the device gets not all of them."""
        ruled = connection.device is not None and connection.device.rule
        return without_pings(connection.sent) if ruled else bytes(connection.sent)

    def _judge_truth(self, device: Device, connection: BrokerConnection | None) -> None:
        """A device that stood and read was told what became of its CONNECT."""
        # A device that has closed only its sending side is still told, as far as the kernel takes it at once: its FIN
        # ends the connection as soon as it is read.
        half = device.left == "half" and not device.authenticates and not device.link.weather.partial_writes
        here = device.left is None or half
        stood = device.asked and here and not device.link.was_cut and not device.paused
        if self.stop_at is not None and self.stop_at < device.asked_at + 3:
            stood = False
        if not stood or device.turned_away:
            return
        record = self.journal.of(device)
        if record is not None and record.detail == LEFT_WHILE_WAITING:
            # Whether a device that has closed its sending side alone is still there is not to be seen from here.
            self.expect(device.left == "half", "truth", f"{device.name} had not left: {record}")
            return
        if connection is None or not connection.answered:
            told = device.is_refusal(bytes(device.received[device.authenticated :]), whole=True)
            self.expect(told, "truth", f"{device.name} was not told of the failure, but got {bytes(device.received)!r}")
            closed = device.lost is not None and (device.lost.check(ConnectionDone) or device.careless)
            self.expect(closed, "truth", f"{device.name}'s connection ended so: {device.lost}")
        calm = self.stop_at is None and not any(link.was_cut for link in self.upstream_links)
        # A broker that is verified is the one; if it then closes, the next one is not tried.
        calm = calm and not any(broker.kind == "late" and broker.reachable for broker in self.brokers)
        paced = record is not None and record.reason is EndReason.TOO_MANY_NEW_SESSIONS
        if paced:
            self.expect(self.config.pacing.new_sessions_per_second, "liveness", f"{device.name} was paced: {record}")
        in_outage = device.start < self.found_by
        if device.rule == "spoofed":
            return
        if calm and not paced and not in_outage and any(broker.good for broker in self.brokers):
            self.expect(connection is not None, "liveness", f"{device.name} did not get its broker")
            # A broker's reset may destroy the CONNACK that it sent before.
            sure = connection is not None and connection.answer == "accept" and connection.left != "reset"
            if sure and not device.authenticates:
                self.expect(device.accepted, "truth", f"{device.name} did not get its CONNACK")
        if (
            calm
            and not in_outage
            and not paced
            and len(self.brokers) == 1
            and self.brokers[0].reachable
            and self.brokers[0].kind in FAULTS
        ):
            wanted = FAULTS[self.brokers[0].kind]
            self.expect(record is not None and record.reason is wanted, "truth", f"{record} should say {wanted}")

    def _judge_disconnect(self, device: Device, connection: BrokerConnection) -> None:
        """DISCONNECT reached the broker if the device sent it and nothing came between, and only if it sent it."""
        arrived = any(first >> 4 == DISCONNECT for _, first, _ in packets_of(connection.received))
        on_behalf = device.rule == "token" or (self.drain.wills == "discard" and self.stop_at is not None)
        own = not arrived or device.disconnected or on_behalf
        self.expect(own, "loss", f"{device.name}'s broker got a DISCONNECT of nobody's")
        healthy = (
            device.disconnected
            and not self._expired(device)
            and not device.violated
            and device.left in {None, "half"}
            and not device.link.was_cut
            and not device.link.was_reset
            and not connection.link.was_cut
            and connection.left is None
            and not connection.paused
            and connection.accepted
            # What waits in a narrow, slow link may take longer to pass than `timeouts.close` allows.
            and (connection.link.weather.delay[1] < 0.5 or connection.link.weather.capacity > 16384)
            and self.stop_at is None
        )
        if healthy:
            self.expect(arrived, "loss", f"{device.name}'s DISCONNECT did not reach its broker")
            self.expect(connection.got_close_notify, "loss", f"{device.name}'s broker got no close_notify")
            self.expect(
                connection.received == device.sent[: device.legal_end],
                "end-to-end",
                f"{device.name}: bytes lost before DISCONNECT",
            )

    def _expired(self, device: Device) -> bool:
        """Whether a device's session ended because its token was about to expire."""
        record = self.journal.of(device)
        return record is not None and record.reason is EndReason.TOKEN_EXPIRING

    def _judge_standing(self, device: Device, connection: BrokerConnection) -> None:
        """A session that nobody ended stands, and everything sent has arrived."""
        healthy = (
            device.accepted
            and device.left is None
            and connection.left is None
            and not (device.link.was_cut or connection.link.was_cut)
            and not (device.violated or device.disconnected)
            and self.stop_at is None
        )
        if not healthy:
            return
        if device.rule == "token":
            self.expect(device.lost is not None, "liveness", f"{device.name} has outlived its token")
            return
        if device.is_pinged_for and device.lost is None and not connection.device_pings:
            self.expect(connection.own_pings, "liveness", f"nobody has kept {device.name}'s Keep Alive at its broker")
        if device.ending == "silence" and device.keep_alive:
            self.expect(device.lost is not None, "liveness", f"{device.name} is silent, and nobody has noticed")
            return
        self.expect(device.lost is None, "liveness", f"{device.name} lost a session that nobody ended")
        up, down = connection.received == device.sent, self._received(device) == self._sent(connection)
        self.expect(up, "end-to-end", f"{device.name}: {len(device.sent)} sent, {len(connection.received)} arrived")
        self.expect(down, "end-to-end", f"{device.name}: {len(connection.sent)} for it, {len(device.received)} arrived")

    def _judge_end(self) -> None:
        """When everybody has left, nothing is left."""
        for link in self.upstream_links:
            raw = getattr(link, "seen", b"")
            leaked = any(mark.encode() in raw for mark in (*_SECRETS, "device-"))
            self.expect(not leaked, "verified", "a device's bytes went over the wire in the clear")
        self._judge_nothing_left()
        self.expect(self.stopped, "liveness", "the gateway does not come to its end")
        limit = (self.stop_at or self.over) + self.drain.seconds + self.config.timeouts.close + 1.5
        self.expect(not self.stopped or self.stopped[0] <= limit, "liveness", f"the gateway stopped at {self.stopped}")
        self._run(self.over + 3)
        self._judge_records()

    def _judge_nothing_left(self) -> None:
        """No session, connection, count or call is left; then the gateway is stopped, if it was not before."""
        gateway, calls = self.gateway, self.clock.getDelayedCalls()
        self.expect(not gateway.sessions, "liveness", f"sessions are left: {[s.state for s in gateway.sessions]}")
        self.expect(gateway.doorkeeper.sessions == 0, "liveness", f"{gateway.doorkeeper.sessions} sessions counted")
        self.expect(not gateway.doorkeeper.by_address, "liveness", "addresses are still counted")
        left = [connection.name for connection in self.network.connections if "socket" in connection.__dict__]
        self.expect(not left, "liveness", f"open connections: {left}")
        if self.relay is not None:
            descriptors = len(self.relay.epoll.descriptors)
            self.expect(descriptors == 1, "liveness", f"{descriptors} descriptors are open, the listener's among them")
            self.expect(not self.relay.lent, "liveness", f"{self.relay.lent} descriptors are lent to the core")
            self.expect(not self.relay.epoll.mistakes, "liveness", f"mistakes of the core: {self.relay.epoll.mistakes}")
        if self.stop_at is None:
            self.expect(len(calls) == 1, "liveness", f"{len(calls)} delayed calls, the sweep among them")
            self._stop()

    def _judge_records(self) -> None:
        journal = self.journal
        numbers = [record.number for record in journal.ended]
        self.expect(len(numbers) == len(set(numbers)), "liveness", f"end records more than once: {numbers}")
        count, least = len(numbers) + journal.refusals, len(self.devices)
        if self.balanced:
            # A balancer's connection that ends before its header has come is nobody's, and has no record.
            least -= sum(device.link.was_reset or self.stop_at is not None for device in self.devices)
        self.expect(least <= count <= len(self.devices), "liveness", f"{count} records of {len(self.devices)} devices")
        for device in self.devices:
            record = journal.of(device)
            if record is None:
                continue
            reason = record.reason
            connection = next((each for each in self.connections if each.device is device), None)
            accepted = connection is not None and connection.accepted
            self.expect(reason not in {None, EndReason.INTERNAL_ERROR}, "liveness", f"ended so: {record}")
            self.expect(not record.established or accepted, "truth", f"recorded as accepted by nobody: {record}")
            if reason is EndReason.TOKEN_EXPIRING:
                lived = record.duration or 0.0
                self.expect(device.rule == "token", "truth", f"there was no token: {record}")
                self.expect(lived <= self.settled, "liveness", f"a token lived for {lived} s: {record}")
            if device.rule == "spoofed" and device.asked and record.client_identifier:
                self.expect(reason is not EndReason.DEVICE_DISCONNECT, "identity", f"a spoofer was served: {record}")
            if reason is EndReason.DEVICE_DISCONNECT:
                self.expect(device.disconnected, "truth", f"there was no DISCONNECT: {record}")
            if reason is EndReason.KEEPALIVE_TIMEOUT and not device.link.was_cut:
                began = record.started - 1000.0
                silence = began + (record.duration or 0.0) - device.last_heard(began + (record.duration or 0.0))
                allowed = device.keep_alive * 1.5 - 2.5
                self.expect(silence >= allowed, "liveness", f"it was silent for {silence} s only: {record}")


class OrderedSessions(dict[Session, None]):
    """Sessions in the order in which they came: a set's order depends on addresses, which no seed repeats."""

    def __init__(self) -> None:
        self.ever: list[weakref.ref[Session]] = []

    def add(self, session: Session) -> None:
        self[session] = None
        self.ever.append(weakref.ref(session))

    def discard(self, session: Session) -> None:
        self.pop(session, None)

    def difference(self, *others: Iterable[Session]) -> list[Session]:
        left_out = set[Session]().union(*others)
        return [session for session in self if session not in left_out]


class RecordingJournal(Journal):
    """The gateway's journal; what it writes goes to the oracles."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock.seconds, Logger(namespace="gateway", observer=world.observe))
        self._world = world
        self.ended: list[SessionRecord] = []
        self.refusals = 0

    def session_started(self, record: SessionRecord) -> None:
        self._world.note("gateway", f"session {record.number} started")
        super().session_started(record)

    def session_ended(self, record: SessionRecord) -> None:
        # The time of day is no seed's.
        detail = record.detail.partition("; this machine's clock")[0]
        self._world.note("gateway", f"session {record.number} ended: {record.reason} ({detail})")
        self.ended.append(record)
        super().session_ended(record)

    def refused(self, reason: EndReason, device_address: str, detail: str = "") -> None:
        self._world.note("gateway", f"{device_address} not let in: {reason}")
        self.refusals += 1
        for device in self._world.devices:
            if device_address in {f"{each.host}:{each.port}" for each in (device.address, device.connects_from)}:
                device.turned_away = True
        super().refused(reason, device_address)

    def of(self, device: Device) -> SessionRecord | None:
        """Return the end record of a device's session."""
        shown = f"{device.address.host}:{device.address.port}"
        return next((record for record in self.ended if record.device_address == shown), None)
