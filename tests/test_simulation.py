"""The simulation: seeds find nothing wrong with the gateway, and find what is made wrong with it on purpose.

`SIMULATION_SEEDS` says how many seeds are run (default 80; CI runs 2,000 others as well).  A seed that fails is
printed with the command that runs it alone.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from gateway.dial.dialler import Dialler
from gateway.dial.health import UpstreamHealth
from gateway.dial.pacing import Pacer
from gateway.dial.steps import _ConnectionFactory
from gateway.errors import SessionEnd
from gateway.mqtt.framer import Framer
from gateway.net.race import _Race
from gateway.net.transport import RelayReactor
from gateway.relay import core as choosing
from gateway.relay.proxied import Doorstep, ProxiedConnection
from gateway.relay.side import RelaySide
from gateway.relay.upstream import UpstreamProtocol
from gateway.rules import rules
from gateway.rules.admission import Doorkeeper
from gateway.session.record import Peer
from gateway.session.session import Session, State
from gateway.tls import channel
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import ChannelState, TLSChannel
from tests import mqtt_packets as mqtt
from tests.core.virtual import VirtualCore, build
from tests.simulation.identities import Identities
from tests.simulation.run import report, run
from tests.simulation.world import simulate

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "80"))
# Seeds beyond them that failed once.  697, 1469: the gateway's DISCONNECT for a device whose forbidden packet had not
# arrived yet.  1330: a device closed its sending side while it waited for its turn.
FAILED_ONCE = (697, 1330, 1469)
# Within so many seeds each mutant must be found.
MUTANT_SEEDS = 400


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    """Return the brokers' certificates."""
    return Identities(tmp_path_factory.mktemp("simulation"))


def test_no_seed_finds_anything(identities: Identities) -> None:
    """Whatever the network, the devices and the brokers do, the invariants hold and nothing is left behind."""
    seeds = sorted({*range(SEEDS), *FAILED_ONCE})
    failed = [report(outcome) for outcome in run(seeds, identities) if outcome.violations]
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def core() -> VirtualCore:
    """Return the compiled core over a made-up kernel."""
    if choosing.engine().core is None and os.environ.get(choosing.SWITCH) != "1":
        pytest.skip(choosing.engine().why)
    return build()


def test_no_seed_finds_anything_with_the_compiled_core(identities: Identities, core: VirtualCore) -> None:
    """Its system calls are those of the virtual network, its source is unchanged.  CI has more seeds, with `--core`."""
    outcomes = list(run(range(12), identities, core))
    failed = [report(outcome) for outcome in outcomes if outcome.violations]
    assert not failed, "\n".join(failed)
    assert sum(outcome.loans > 0 for outcome in outcomes) > len(outcomes) / 5


# Faults that are planted in the core's source: each text, and what it becomes.
CORE_FAULTS = {
    "a short send loses the rest": (
        "hand_over(pair, rest, data + gone, size - gone, 0);",
        "hand_over(pair, NOTHING, NULL, 0, 0);",
    ),
    "what is held is forgotten": ("stream->held_size = size - found->passed;", "stream->held_size = 0;"),
    "the device is never heard": ("pair->heard = true;", ""),
    "an unfinished record is forgotten": ("records->missing -= taken;", "records->missing = 0;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE_FAULTS)
def test_a_broken_core_is_found(name: str, identities: Identities, logged_errors: list[dict[str, Any]]) -> None:
    """Within as many seeds as a broken gateway."""
    broken = build(CORE_FAULTS[name])
    found = next((outcome for outcome in run(range(MUTANT_SEEDS), identities, broken) if outcome.violations), None)
    logged_errors.clear()
    assert found is not None


@pytest.mark.slow
def test_a_seed_is_the_same_each_time(identities: Identities) -> None:
    """What a seed finds can be found again: the traces of two runs are equal, line by line."""
    for seed in range(25):
        first, second = simulate(seed, identities), simulate(seed, identities)
        assert first.trace == second.trace
        assert first.steps == second.steps


def test_seeds_differ(identities: Identities) -> None:
    """A simulation that does the same for every seed would find nothing either."""
    assert len({tuple(outcome.trace) for outcome in run(range(25), identities)}) == 25


Mutate = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[set[str], Mutate]] = {}


def mutant(*oracles: str) -> Callable[[Mutate], Mutate]:
    """Register a way to break the gateway, and the oracles of which one must notice it first."""

    def register(mutate: Mutate) -> Mutate:
        MUTANTS[mutate.__name__] = (set(oracles), mutate)
        return mutate

    return register


@mutant("verified", "truth")
def any_name_will_do(patch: pytest.MonkeyPatch) -> None:
    """The certificate's names are not looked at."""
    patch.setattr(Identity, "match", lambda *_: "DNS:any")


@mutant("verified", "truth")
def any_chain_will_do(patch: pytest.MonkeyPatch) -> None:
    """OpenSSL's verdict on the chain is overruled."""
    judge = TLSChannel.judge

    def lenient(self: TLSChannel, certificate: Any, error: int, depth: int, accepted: bool) -> bool:
        return judge(self, certificate, error, depth, True)

    patch.setattr(TLSChannel, "judge", lenient)


@mutant("verified")
def connect_waits_in_the_channel(patch: pytest.MonkeyPatch) -> None:
    """CONNECT is given to the channel before it is verified, which keeps it until then."""
    made, send, handshake = UpstreamProtocol.connectionMade, TLSChannel.send, TLSChannel._handshake
    outgoing = TLSChannel.outgoing
    kept: dict[int, bytes] = {}
    encrypted: dict[int, bytes] = {}

    def connection_made(self: UpstreamProtocol) -> None:
        made(self)
        # Who waits for the handshake is told at once that it is done.
        self.transport.reactor.callLater(0.0, self.verified.callback, None)

    def keep(self: TLSChannel, plaintext: bytes) -> bytes:
        if self.state is not ChannelState.HANDSHAKING:
            return send(self, plaintext)
        kept[id(self)] = kept.get(id(self), b"") + plaintext
        return b""

    def flush(self: TLSChannel) -> bool:
        done = handshake(self)
        if done and id(self) in kept:
            encrypted[id(self)] = send(self, kept.pop(id(self)))
        return done

    patch.setattr(UpstreamProtocol, "connectionMade", connection_made)
    patch.setattr(TLSChannel, "send", keep)
    patch.setattr(TLSChannel, "_handshake", flush)
    patch.setattr(TLSChannel, "outgoing", lambda self: outgoing(self) + encrypted.pop(id(self), b""))


@mutant("truth", "end-to-end")
def accepts_in_the_brokers_name(patch: pytest.MonkeyPatch) -> None:
    """The device gets CONNACK before the broker has answered."""
    verified = UpstreamProtocol.serve

    def serve(self: UpstreamProtocol, session: Session, device: Any, peer: Peer) -> None:
        assert session._connect is not None
        device.write(mqtt.connack(version=session._connect.version))
        verified(self, session, device, peer)

    patch.setattr(UpstreamProtocol, "serve", serve)


@mutant("truth")
def says_nothing_when_there_is_no_upstream(patch: pytest.MonkeyPatch) -> None:
    """The device is closed without the CONNACK that says why."""
    patch.setattr(Session, "_farewell", lambda *_: b"")


@mutant("truth", "end-to-end")
def refuses_in_the_wrong_version(patch: pytest.MonkeyPatch) -> None:
    """Every device gets the CONNACK of 3.x."""
    farewell = Session._farewell
    patch.setattr(Session, "_farewell", lambda *arguments: farewell(*arguments) and b"\x20\x02\x00\x03")


@mutant("truth", "loss", "end-to-end")
def closes_at_once(patch: pytest.MonkeyPatch) -> None:
    """Both sides close without reading on, so that unread bytes make the kernel send RST."""

    def finish(self: RelaySide) -> None:
        if not self._closing and not self._lost:
            self._closing = True
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    patch.setattr(RelaySide, "finish", finish)


@mutant("end-to-end")
def acknowledges_in_the_brokers_name(patch: pytest.MonkeyPatch) -> None:
    """A PUBLISH with QoS 1 is acknowledged by the gateway."""
    relay_up = Session._relay_up

    def acknowledging(self: Session, data: bytes) -> None:
        relay_up(self, data)
        if data[:1] == b"\x32" and self._state is State.RELAYING:
            self._device.write(mqtt.acknowledgement(0x40))

    patch.setattr(Session, "_relay_up", acknowledging)


@mutant("end-to-end")
def writes_into_the_middle_of_a_packet(patch: pytest.MonkeyPatch) -> None:
    """A 5.0 device gets DISCONNECT while a packet is half relayed."""
    patch.setattr(Framer, "at_boundary", property(lambda _: True))


@mutant("end-to-end")
def passes_what_breaks_the_rules(patch: pytest.MonkeyPatch) -> None:
    """Bytes go past the framer."""

    def relay_up(self: Session, data: bytes) -> None:
        if self._upstream is not None:
            self._heard = True
            self._upstream.write(data)

    patch.setattr(Session, "_relay_up", relay_up)


@mutant("loss", "end-to-end")
def says_goodbye_for_a_lost_device(patch: pytest.MonkeyPatch) -> None:
    """A device that vanished is passed on as one that sent DISCONNECT."""
    device_gone = Session.device_gone

    def gone(self: Session, detail: str) -> None:
        if self._state is State.RELAYING and self._upstream is not None:
            self._upstream.write(mqtt.disconnect())
        device_gone(self, detail)

    patch.setattr(Session, "device_gone", gone)


@mutant("loss", "end-to-end")
def cuts_the_upstream_off(patch: pytest.MonkeyPatch) -> None:
    """The upstream ends by RST, and DISCONNECT with it."""
    patch.setattr(UpstreamProtocol, "close", RelaySide.abort)


@mutant("hold")
def passes_on_before_connack(patch: pytest.MonkeyPatch) -> None:
    """What the device sent behind CONNECT goes out with it."""
    verified = Session.upstream_verified

    def upstream_verified(self: Session, upstream: Any, peer: Peer) -> None:
        verified(self, upstream, peer)
        if self._state is State.WAIT_CONNACK and (rest := self._device_reader.take_rest()):
            upstream.write(rest)

    patch.setattr(Session, "upstream_verified", upstream_verified)


@mutant("memory", "truth")
def reads_on_while_dialling(patch: pytest.MonkeyPatch) -> None:
    """The device is read while there is no upstream yet: its bytes pile up, or its FIN is taken for its end."""
    patch.setattr(RelaySide, "hold", lambda _: None)


@mutant("memory")
def knows_no_backpressure(patch: pytest.MonkeyPatch) -> None:
    """A slow reader on one side does not stop the reading on the other."""
    patch.setattr(RelaySide, "link", lambda *_: None)


@mutant("end-to-end", "liveness")
def stays_choked(patch: pytest.MonkeyPatch) -> None:
    """A side that was stopped is not read again."""
    patch.setattr(RelaySide, "resumeProducing", lambda _: None)


@mutant("one-upstream", "end-to-end")
def tries_again_behind_the_devices_back(patch: pytest.MonkeyPatch) -> None:
    """When the broker closes before CONNACK, CONNECT is sent to it once more."""
    verified, broken = Session.upstream_verified, Session.upstream_broken
    packets: dict[int, Any] = {}

    def upstream_verified(self: Session, upstream: Any, peer: Peer) -> None:
        packets.setdefault(self.record.number, self._connect_packet)
        verified(self, upstream, peer)

    def upstream_broken(self: Session, failure: SessionEnd) -> None:
        packet = packets.pop(self.record.number, None)
        if self._state is State.WAIT_CONNACK and packet is not None:
            self._device.transport.unregisterProducer()
            self._state, self._connect_packet = State.DIALLING, packet
            self._dialling = self._dial(self)
        else:
            broken(self, failure)

    patch.setattr(Session, "upstream_verified", upstream_verified)
    patch.setattr(Session, "upstream_broken", upstream_broken)


@mutant("secrets")
def logs_the_connect(patch: pytest.MonkeyPatch) -> None:
    """The record's detail quotes CONNECT."""
    write_record = Session._write_record

    def write(self: Session, reason: Any, detail: str) -> None:
        write_record(self, reason, f"{detail} {self._connect and self._connect.password!r}")

    patch.setattr(Session, "_write_record", write)


@mutant("liveness")
def forgets_to_let_a_session_go(patch: pytest.MonkeyPatch) -> None:
    """The end of the upstream's connection is not looked at."""
    patch.setattr(Session, "upstream_gone", lambda _: None)


@mutant("liveness")
def forgets_to_count_out(patch: pytest.MonkeyPatch) -> None:
    """Sessions are counted in, and never out."""
    patch.setattr(Doorkeeper, "leave", lambda *_: None)


@mutant("liveness")
def forgets_a_balancer_that_came_for_nobody(patch: pytest.MonkeyPatch) -> None:
    """A connection whose header has not come is not let go of when it ends."""
    patch.setattr(Doorstep, "gone", lambda *_: None)


@mutant("truth", "end-to-end", "liveness")
def drops_what_comes_with_the_header(patch: pytest.MonkeyPatch) -> None:
    """CONNECT in one piece with the PROXY header is lost."""
    become = ProxiedConnection.become
    patch.setattr(ProxiedConnection, "become", lambda self, device, _: become(self, device, b""))


@mutant("end-to-end", "liveness")
def keeps_the_connection_that_it_passes_on(patch: pytest.MonkeyPatch) -> None:
    """The transport's bytes go on coming to the one who read the header."""

    def become(self: ProxiedConnection, device: Any, rest: bytes) -> None:
        device.makeConnection(self.transport)
        device.dataReceived(rest)

    patch.setattr(ProxiedConnection, "become", become)


@mutant("liveness")
def keeps_no_keep_alive(patch: pytest.MonkeyPatch) -> None:
    """A silent device is not noticed."""
    sweep = Session.sweep

    def lenient(self: Session, now: float) -> bool:
        self._heard = True
        return sweep(self, now)

    patch.setattr(Session, "sweep", lenient)


@mutant("liveness")
def is_impatient(patch: pytest.MonkeyPatch) -> None:
    """A device is taken for silent after its Keep Alive, not after one and a half times that."""
    relay = Session._relay
    patch.setattr(Session, "_relay", lambda self, keep_alive, *rest: relay(self, keep_alive * 0.5, *rest))


@mutant("liveness")
def dials_on_for_a_device_that_is_gone(patch: pytest.MonkeyPatch) -> None:
    """The attempt to reach the upstream is not given up when its session ends, or the gateway."""
    dial = Dialler.dial

    def unstoppable(self: Dialler, session: Session, device: Any) -> Any:
        dialling = dial(self, session, device)
        dialling.cancel = lambda: None
        return dialling

    patch.setattr(Dialler, "dial", unstoppable)


@mutant("liveness")
def keeps_the_losers_of_the_race(patch: pytest.MonkeyPatch) -> None:
    """Connections that were not needed stay open."""
    patch.setattr(_Race, "_stop", lambda self: setattr(self, "_over", True))
    patch.setattr(_Race, "_won", _won_without_abort)
    patch.setattr(_ConnectionFactory, "close", lambda self: None)


def _won_without_abort(self: Any, protocol: Any, attempt: Any) -> None:
    self._running.remove(attempt)
    if not self._over:
        self._stop()
        self._result.callback(protocol)


@mutant("liveness")
def tries_the_first_upstream_only(patch: pytest.MonkeyPatch) -> None:
    """There is no failover."""
    lead = Dialler.lead

    async def first_only(self: Dialler, session: Session, device: Any, route: Any = None) -> None:
        await lead(self, session, device, (self._route if route is None else route)[:1])

    patch.setattr(Dialler, "lead", first_only)


@mutant("liveness")
def leaves_a_broker_alone_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A broker that failed is never tried again."""
    patch.setattr(UpstreamHealth, "is_due", lambda *_: False)


@mutant("liveness")
def lets_sessions_wait_in_the_queue_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Nobody gets a turn who has had to wait for it."""
    patch.setattr(Pacer, "_arm", lambda _: None)


@mutant("end-to-end", "verified")
def says_something_to_a_broker_that_it_tries(patch: pytest.MonkeyPatch) -> None:
    """The gateway's own dial sends a packet in nobody's name."""
    close = UpstreamProtocol.close

    def with_a_word(self: UpstreamProtocol) -> None:
        if self._session is None and not self._closing:
            self.write(mqtt.connect("gateway"))
        close(self)

    patch.setattr(UpstreamProtocol, "close", with_a_word)


@mutant("liveness")
def waits_for_connack_forever(patch: pytest.MonkeyPatch) -> None:
    """No deadline is kept but the keep-alive."""
    patch.setattr(Session, "_deadline_passed", lambda _: None)


@mutant("liveness")
def has_callbacks_pile_up(patch: pytest.MonkeyPatch) -> None:
    """The verification callback keeps its channels."""
    kept: list[Any] = []
    verify = channel._verify

    def keep(connection: Any, *arguments: Any) -> bool:
        kept.append(connection.get_app_data())
        return verify(connection, *arguments)

    patch.setattr(channel, "_verify", keep)


@mutant("end-to-end", "liveness", "truth")
def does_not_write_on(patch: pytest.MonkeyPatch) -> None:
    """The relay's reactor does not report that there is room again."""
    report = RelayReactor._report

    def deaf(self: RelayReactor, selectable: Any, events: int) -> None:
        if events & ~select.EPOLLOUT:
            report(self, selectable, events & ~select.EPOLLOUT)
        else:
            self.removeWriter(selectable)

    patch.setattr(RelayReactor, "_report", deaf)


@mutant("identity", "truth")
def believes_a_spoofer(patch: pytest.MonkeyPatch) -> None:
    """A device is served that is not where its rule binds it to."""
    patch.setattr(rules, "is_in", lambda *_: True)


@mutant("end-to-end")
def keeps_the_devices_own_password(patch: pytest.MonkeyPatch) -> None:
    """The CONNECT that a rule has made is not the one that is sent."""
    treat = Session.treat

    def forgetful(self: Session, treatment: Any) -> None:
        treat(self, attrs.evolve(treatment, connect=self.connect[0].raw))

    patch.setattr(Session, "treat", forgetful)


# These take ten seconds and more.
HARD_TO_FIND = {"forgets_a_balancer_that_came_for_nobody", "writes_into_the_middle_of_a_packet"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in HARD_TO_FIND else []) for name in MUTANTS]
)
def test_a_broken_gateway_is_found(
    name: str, identities: Identities, monkeypatch: pytest.MonkeyPatch, logged_errors: list[dict[str, Any]]
) -> None:
    """A gateway that is broken in this way fails a seed, and by the oracle that watches for it."""
    oracles, mutate = MUTANTS[name]
    mutate(monkeypatch)
    outcomes = run(range(MUTANT_SEEDS), identities)
    violations = next((outcome.violations for outcome in outcomes if outcome.violations), [])
    # What a broken gateway logs is expected.
    logged_errors.clear()
    assert violations, f"{MUTANT_SEEDS} seeds did not find it: {mutate.__doc__}"
    assert oracles & {violation.oracle for violation in violations}, violations
