"""A turn of the event loop is short, whatever peers send: so much is taken at a time, and the rest in later turns."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from twisted.internet.address import IPv6Address
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure

from gateway.config import Listener
from gateway.fair import FairQueue
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector, TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.net import transport
from gateway.net.listening import listen
from gateway.net.transport import RelayReactor
from gateway.net.websocket import FrameReader
from gateway.pieces import Chores, Pieces
from gateway.session.session import State
from tests import mqtt_packets as mqtt
from tests.fuzz.tools import calls
from tests.harness import PATIENCE, eventually
from tests.test_relay_reactor import Descriptor, Idle, make
from tests.turn_clock import TurnClock

__all__ = ["make"]

_V3, _V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
_LIMIT = 100_000
_PREFIXES = TopicRules(publish_prefix="site/", subscribe_prefix="site/")
_TINY = mqtt.publish("a", b"")
_PROPERTIES = mqtt.user_property("", "") * 900
# What is fed, who takes it apart, and how many packets may be taken at a time: about a millisecond's worth.
CROWDS: dict[str, tuple[Callable[[], Any], bytes, int]] = {
    "short": (lambda: Framer(Sender.DEVICE, _V3, _LIMIT), mqtt.pingreq(), 10_000),
    "padded": (lambda: Framer(Sender.DEVICE, _V3, _LIMIT), mqtt.packet(0xC0, length_size=3), 1_000),
    "checked": (lambda: CheckingFramer(Sender.DEVICE, _V3, _LIMIT), _TINY, 1_000),
    "checked, not PUBLISH": (lambda: CheckingFramer(Sender.DEVICE, _V3, _LIMIT), mqtt.acknowledgement(0x40), 500),
    "judged": (lambda: CheckingFramer(Sender.DEVICE, _V3, _LIMIT), mqtt.subscribe("a"), 75),
    "judged, from the broker": (lambda: CheckingFramer(Sender.BROKER, _V5, _LIMIT), mqtt.suback(version=5), 75),
    "judged, with a thousand filters": (
        lambda: CheckingFramer(Sender.DEVICE, _V3, _LIMIT),
        mqtt.subscribe(*["a"] * 1_000),
        1,
    ),
    "judged, with large heads": (
        lambda: CheckingFramer(Sender.DEVICE, _V5, _LIMIT),
        mqtt.publish("a", b"", version=5, properties=_PROPERTIES),
        1,
    ),
    "judged, with large payloads": (
        lambda: CheckingFramer(Sender.DEVICE, _V5, _LIMIT),
        mqtt.publish("a", bytes(700), version=5, properties=mqtt.user_property("", "")),
        75,
    ),
    "under a rule": (lambda: DeviceInspector(_PREFIXES, _V3, _LIMIT), _TINY, 40),
    "under a rule, PINGREQ": (lambda: DeviceInspector(_PREFIXES, _V3, _LIMIT), mqtt.pingreq(), 40),
    "under a rule, padded": (
        lambda: DeviceInspector(_PREFIXES, _V3, _LIMIT),
        mqtt.packet(0xC0, length_size=3),
        40,
    ),
    "under a rule, from the broker": (
        lambda: BrokerInspector(_PREFIXES, _V3, _LIMIT),
        mqtt.publish("site/a", b""),
        40,
    ),
    "withheld": (lambda: BrokerInspector(_PREFIXES, _V5, _LIMIT), mqtt.publish("a", b"", version=5, qos=2), 40),
    "large heads from the broker": (
        lambda: BrokerInspector(_PREFIXES, _V5, _LIMIT),
        mqtt.publish("site/a", b"", version=5, properties=_PROPERTIES),
        1,
    ),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_so_many_packets_are_taken_at_a_time(crowd: str) -> None:
    """However many come in one piece; all of them pass in the end, as if they had come one by one."""
    begin, packet, most = CROWDS[crowd]
    stream = packet * (0x10000 // len(packet))
    one_by_one, framer = begin(), begin()
    expected = b"".join(
        mqtt.fed(one_by_one, stream[at : at + len(packet)]) for at in range(0, len(stream), len(packet))
    )
    passed = [framer.feed(stream)]
    taken = [framer.packets]
    while framer.behind:
        passed.append(framer.feed(b""))
        taken.append(framer.packets - sum(taken))
    assert max(taken) == most
    assert min(taken[:-1]) > 0
    assert b"".join(passed) == expected
    assert framer.packets == one_by_one.packets
    assert framer.at_boundary
    assert framer.error is None


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_fault_behind_a_crowd_is_found_when_the_crowd_has_passed(crowd: str) -> None:
    begin, packet, most = CROWDS[crowd]
    count = most + 10
    faulty, sound = begin(), begin()
    wrong = b"\x06\0\0"
    passed = faulty.feed(packet * count + wrong)
    assert faulty.error is None
    assert not faulty.disconnected
    while faulty.behind:
        passed += faulty.feed(b"")
    assert faulty.error is not None
    assert faulty.rejected == wrong
    assert passed == mqtt.fed(sound, packet * count)
    assert faulty.feed(b"") == b""


def test_more_that_comes_meanwhile_waits_behind_the_crowd() -> None:
    """The side reads nothing then, but what it has read already must not be lost or pass first."""
    for begin, packet, most in CROWDS.values():
        framer, again = begin(), begin()
        passed = framer.feed(packet * (most + 10) + packet[:1]) + framer.feed(packet[1:])
        while framer.behind:
            passed += framer.feed(b"")
        assert passed == mqtt.fed(again, packet * (most + 11))


@pytest.mark.parametrize("frame", [b"\x82\x00", b"\x89\x00", b"\x8a\x01a", b"\x02\x01a\x80\x01b"])
def test_frames_that_carry_little_are_taken_a_thousand_at_a_time(frame: bytes) -> None:
    """They count although no payload shows it: each costs as much as a message."""
    reader, whole = FrameReader(), FrameReader()
    wire = frame * 3000
    passed = reader.feed(wire)
    turns = 0
    while reader.behind:
        passed += reader.feed(b"")
        turns += 1
    assert turns >= 2
    assert passed == b"".join(whole.feed(frame) for _ in range(3000))


def test_frames_of_a_websocket_are_taken_a_thousand_at_a_time() -> None:
    reader = FrameReader()
    wire = b"".join(b"\x82\x01" + bytes([number % 256]) for number in range(0x10000 // 3))
    payloads = [reader.feed(wire)]
    while reader.behind:
        payloads.append(reader.feed(b""))
    assert max(map(len, payloads)) <= 1000
    assert b"".join(payloads) == wire[2::3]


# ---- what is done every second


def test_of_all_chores_one_piece_is_done_in_a_turn() -> None:
    """In rotation, so that a long one keeps no other waiting; one that fails is over, and the others go on."""
    clock, told = TurnClock(), list[str]()

    def chore(name: str, pieces: int) -> Pieces[None]:
        for number in range(pieces):
            told.append(f"{name}{number}")
            yield
        if name == "b":
            raise ZeroDivisionError

    chores = Chores(clock.callLater)
    long = chore("a", 4)
    for pieces in (long, chore("b", 1), chore("c", 2)):
        chores.add(pieces)
    assert not told
    counts = []
    while clock.calls:
        assert long in chores
        with suppress(ZeroDivisionError):
            clock.turn()
        counts.append(len(told))
        if len(told) == 7:
            break
    assert told == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]
    assert max(after - before for before, after in pairwise([0, *counts])) == 1
    chores.drop()
    clock.turn()
    assert long not in chores
    assert not clock.calls


def test_a_chore_may_drop_all_chores() -> None:
    """The end of the last session does, while the gateway stops; it does not go on either."""
    clock, told = TurnClock(), list[str]()
    chores = Chores(clock.callLater)

    def chore() -> Pieces[None]:
        chores.drop()
        yield
        told.append("more")

    for _ in range(2):
        chores.add(chore())
    while clock.calls:
        clock.turn()
    assert not told
    chores.add(chore())
    clock.turn()
    assert not clock.calls


class Looked:
    """Stands for a session that has ended; notes when it is looked at."""

    def __init__(self, told: list[object]) -> None:
        self._told = told

    @property
    def state(self) -> State:
        """See `Session`."""
        self._told.append(self)
        return State.ENDED

    def sweep(self, now: float) -> bool:
        """See `Session`."""
        del now
        return False


def test_a_sweep_does_one_thing_in_a_turn(start_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at 250 sessions, or does one of its other steps; a device that floods makes thousands of sessions."""
    running = start_gateway(upstream=1)
    gateway, clock = running.service.gateway, TurnClock()
    turns: list[set[object]] = []
    told: list[object] = []

    def step(name: str) -> Callable[..., list[None]]:
        def called(*_: object) -> list[None]:
            told.append(name)
            return [None]

        return called

    def swept() -> None:
        sessions = {Looked(told): Mock(address=None) for _ in range(1000)}
        with monkeypatch.context() as patch:
            patch.setattr(gateway, "_chores", Chores(clock.callLater))
            patch.setattr(gateway, "sessions", set(sessions))
            patch.setattr(gateway, "_not_accepted", sessions)
            patch.setattr(gateway, "_silent", FairQueue())
            patch.setattr(gateway, "_swept", step("swept"))
            for name in ("doorkeeper", "doorstep", "presence", "_journal"):
                patch.setattr(getattr(gateway, name), "sweep", step(name))
            patch.setattr(gateway.generation.dialler, "sweep", step("dialler"))
            gateway._sweep()
            assert not told
            while clock.calls:
                clock.turn()
                turns.append(set(told))
                told.clear()

    running.call(swept)
    steps = [{each for each in turn if isinstance(each, str)} for turn in turns]
    assert sorted(name for names in steps for name in names) == [
        *("_journal", "dialler", "doorkeeper", "doorstep", "presence", "swept")
    ]
    assert all(len(turn) == 1 for names, turn in zip(steps, turns, strict=True) if names)
    assert max(map(len, turns)) <= 250


def test_results_of_password_checks_share_the_limit_of_the_turn(
    start_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins the next check and ends a session, in the same turn as events and sessions that go on."""
    service = start_gateway(upstream=1).service
    later: list[Callable[[], object]] = []
    results: list[object] = []
    monkeypatch.setattr(service._relay, "later", later.append)

    def check(*outcomes: Callable[[], bool]) -> None:
        for outcome in outcomes:
            service.gateway._helpers.in_thread(outcome).addBoth(results.append)

    service._reactor.callFromThread(check, lambda: True, lambda: bool(1 / 0))
    eventually(lambda: len(later) == 2, "both checks are done")
    assert not results
    for call in later:
        call()
    assert True in results
    assert any(isinstance(each, Failure) and each.check(ZeroDivisionError) for each in results)


# ---- in one turn of the reactor


class Clocked(Idle):
    """A reactor whose calls are made by hand."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def callLater(self, delay: float, call: Callable[..., object], *arguments: Any) -> Any:
        assert delay == 0
        self.calls.append(lambda: call(*arguments))
        return self

    def cancel(self) -> None:
        self.calls.clear()

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Work:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def some(self, seconds: float = 0.0005) -> None:
        self.now += seconds


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Return the clock of the relay's reactor."""
    work = Work()
    monkeypatch.setattr("gateway.net.transport.monotonic", work)
    return work


def test_events_that_cost_much_share_several_turns(make: Callable[[], Descriptor], work: Work) -> None:
    """All have their turn, none twice before the others, though all of them have more to say each time."""
    relay = RelayReactor(Clocked())
    relay.start()
    descriptors = [make() for _ in range(40)]
    for each in descriptors:
        each.on_read = lambda each=each: (work.some(), each.peer.send(b"more"))
        relay.addReader(each)
        each.peer.send(b"x")
    read = 0
    for _ in range(100):
        relay.doRead()
        now = sum(each.read for each in descriptors)
        assert 1 <= now - read <= 4
        read = now
        assert max(each.read for each in descriptors) - min(each.read for each in descriptors) <= 1
    relay.stop()


def left_waiting(relay: RelayReactor, make: Callable[[], Descriptor], work: Work) -> list[Descriptor]:
    """Let ten descriptors have something at once; return those for which the turn has no time."""
    relay.start()
    descriptors = [make() for _ in range(10)]
    for each in descriptors:
        each.on_read = work.some
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    waiting = [each for each in descriptors if not each.read]
    assert waiting
    return waiting


def test_an_event_that_was_left_is_not_reported_to_who_waits_for_it_no_longer(
    make: Callable[[], Descriptor], work: Work
) -> None:
    relay = RelayReactor(Clocked())
    paused = left_waiting(relay, make, work)
    for each in paused:
        relay.removeReader(each)
    relay.doRead()
    assert not any(each.read for each in paused)
    for each in paused:
        relay.addReader(each)
    for _ in paused:
        relay.doRead()
    assert all(each.read == 1 for each in paused)
    relay.stop()


def test_an_event_that_was_left_is_not_reported_to_a_successor(make: Callable[[], Descriptor], work: Work) -> None:
    """A descriptor that is closed gives its number to the next one, in the same turn and between turns."""
    relay = RelayReactor(Clocked())
    relay.start()
    descriptors = [make() for _ in range(10)]
    successors: list[Descriptor] = []

    def replace_last() -> None:
        old, new = descriptors.pop(), make()
        relay.removeReader(old)
        number = old.fileno()
        old.socket.close()
        os.dup2(new.fileno(), number)
        new.fileno = lambda: number  # type: ignore[method-assign]
        successors.append(new)
        relay.addReader(new)

    descriptors[0].on_read = replace_last
    for each in descriptors:
        each.on_read = lambda call=each.on_read: (call(), work.some())
        relay.addReader(each)
        each.peer.close()
    relay.doRead()
    assert len(successors) == 1
    replace_last()
    for _ in range(10):
        relay.doRead()
    assert not any(each.read or each.lost for each in successors)
    relay.stop()


class Reports:
    """A core that relays nothing, and whose others all have something in each turn."""

    HELD, DESCRIPTORS = 0, 0x20000
    Pair = None

    def __init__(self) -> None:
        self.is_silent = False

    def poll(self, epoll: int, milliseconds: int, most: int) -> tuple[int, list[Any], list[tuple[int, int]]]:
        if self.is_silent:
            return 0, [], []
        batch = select.epoll.fromfd(os.dup(epoll)).poll(0, most)  # closed with the object
        return len(batch), [], batch


def test_an_event_that_was_left_is_the_cores_once_its_descriptor_is_lent(
    make: Callable[[], Descriptor], work: Work
) -> None:
    core = Reports()
    relay = RelayReactor(Clocked(), core)
    relay.start()
    descriptors = [make() for _ in range(10)]
    for each in descriptors:
        each.on_read = work.some
        each.is_ordinary = True  # type: ignore[attr-defined]
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    waiting = [each for each in descriptors if not each.read]
    assert len(waiting) > 4
    loan: Any = SimpleNamespace(recall=lambda: None)
    assert relay.lend(loan, *waiting[:4])  # type: ignore[arg-type]
    core.is_silent = True
    for _ in range(3):
        relay.doRead()
    assert [each.read for each in waiting] == [0] * 4 + [1] * (len(waiting) - 4)
    relay.stop()


@pytest.mark.parametrize("core", [None, Reports()], ids=["python", "core"])
def test_a_turn_does_not_go_through_all_that_waits(
    make: Callable[[], Descriptor], work: Work, core: Reports | None
) -> None:
    """It costs as much as what it does, whatever is left for later turns."""
    relay = RelayReactor(Clocked(), core)
    relay.start()
    descriptors = [make() for _ in range(400)]
    for each in descriptors:
        each.on_read = work.some
        relay.addReader(each)
        each.peer.send(b"x")
    costs = [calls(relay.doRead) for _ in range(60)]
    assert max(costs[30:]) <= max(costs[:3]) + 20
    relay.stop()


def test_sessions_that_go_on_share_several_turns(work: Work) -> None:
    """In order, a few in each turn, however many there are; those that are added meanwhile come last."""
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    done: list[int] = []

    def go_on(number: int) -> None:
        work.some()
        done.append(number)
        if len(done) < 40:
            relay.later(lambda: go_on(number + 100))

    for number in range(20):
        relay.later(lambda number=number: go_on(number))
    before = 0
    while reactor.calls:
        reactor.turn()
        assert 1 <= len(done) - before <= 2
        before = len(done)
    assert done[:20] == list(range(20))
    assert done[20:40] == [number + 100 for number in range(20)]
    relay.stop()


def test_events_have_the_rest_of_the_turn(make: Callable[[], Descriptor], work: Work) -> None:
    """Sessions that go on and events share the limit; neither keeps the other waiting."""
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    descriptors = [make() for _ in range(20)]
    for each in descriptors:
        each.on_read = work.some
        relay.addReader(each)
        each.peer.send(b"x")
    for _ in range(20):
        relay.later(work.some)
    began = work.now
    reactor.turn()
    relay.doRead()
    assert 0 < sum(each.read for each in descriptors) <= 2
    assert work.now - began <= 0.0025
    # Without calls before them, all of it is theirs.
    read = sum(each.read for each in descriptors)
    relay.doRead()
    assert sum(each.read for each in descriptors) == read + 4
    relay.stop()


def test_sessions_that_go_on_have_the_rest_of_the_turn(make: Callable[[], Descriptor], work: Work) -> None:
    """Both happen between two waits of the reactor, events first."""
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    descriptors = [make() for _ in range(20)]
    for each in descriptors:
        each.on_read = work.some
        relay.addReader(each)
        each.peer.send(b"x")
    done: list[int] = []
    for number in range(20):
        relay.later(lambda number=number: (work.some(), done.append(number)))
    relay.doRead()
    assert sum(each.read for each in descriptors) == 4
    reactor.turn()
    assert done == [0]
    # Without events, all of it is theirs.
    reactor.turn()
    assert done == [0, 1, 2]
    relay.stop()


def test_time_counts_whenever_the_machine_was_started(make: Callable[[], Descriptor], work: Work) -> None:
    """Each has what the other left of the turn, in the turn after it; then all of it again."""
    work.some(1000)
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    descriptors = [make() for _ in range(20)]
    for each in descriptors[:1]:
        each.on_read = lambda: work.some(0.0012)
        relay.addReader(each)
        each.peer.send(b"x")
    done: list[int] = []
    for number in range(20):
        relay.later(lambda number=number: (work.some(0.0003), done.append(number)))
    relay.doRead()
    reactor.turn()
    assert done == [0, 1, 2]  # 0.8 ms
    for each in descriptors[1:]:
        each.on_read = lambda: work.some(0.0003)
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert sum(each.read for each in descriptors[1:]) == 4  # 1.1 ms
    relay.stop()


def test_events_that_follow_soon_share_the_limit_of_the_turn(make: Callable[[], Descriptor], work: Work) -> None:
    work.some(1000)
    relay = RelayReactor(Clocked())
    relay.start()
    endless = make()
    endless.on_read = lambda: (work.some(0.0007), endless.peer.send(b"again"))
    relay.addReader(endless)
    endless.peer.send(b"x")
    relay.doRead()
    assert endless.read == 3
    relay.stop()


def test_a_call_that_stops_the_relay_is_the_last(work: Work) -> None:
    del work  # Time stands still.
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    done: list[int] = []
    relay.later(relay.stop)
    relay.later(lambda: done.append(1))
    reactor.turn()
    assert not done
    assert not reactor.calls


def test_an_event_that_was_left_is_not_reported_to_who_waits_for_another(
    make: Callable[[], Descriptor], work: Work
) -> None:
    """A side that is paused still sends."""
    relay = RelayReactor(Clocked())
    paused = left_waiting(relay, make, work)
    for each in paused:
        each.doWrite = work.some  # type: ignore[assignment,method-assign]
        relay.addWriter(each)
        relay.removeReader(each)
    for _ in range(3):
        relay.doRead()
    assert not any(each.read for each in paused)
    relay.stop()


class Tells:
    """A core that tells what it is given, each event once, and takes some time."""

    HELD, DESCRIPTORS = 0, 0x20000
    Pair = None

    def __init__(self, work: Work, *told: tuple[float, int, list[Any], list[Descriptor]]) -> None:
        self.work = work
        self.told = list(told)

    def poll(self, epoll: int, milliseconds: int, most: int) -> tuple[int, list[Any], list[tuple[int, int]]]:
        if not self.told:
            return 0, [], []
        took, count, handed_over, ready = self.told.pop(0)
        self.work.some(took)
        return count, handed_over, [(each.fileno(), select.EPOLLIN) for each in ready]


@pytest.fixture
def told(
    make: Callable[[], Descriptor], work: Work
) -> Iterator[tuple[RelayReactor, Tells, list[Descriptor], list[int]]]:
    """Return a relay's reactor, its core, twenty descriptors, and the numbers of those that have read, in order."""
    core = Tells(work)
    relay = RelayReactor(Clocked(), core)
    relay.start()
    descriptors = [make() for _ in range(20)]
    read: list[int] = []
    for number, each in enumerate(descriptors):
        each.on_read = lambda number=number: (work.some(0.0003), read.append(number))
        relay.addReader(each)
    yield relay, core, descriptors, read
    relay.stop()


Told = tuple[RelayReactor, Tells, list[Descriptor], list[int]]


def test_events_are_processed_in_order_whatever_turn_they_come_in(told: Told) -> None:
    relay, core, descriptors, read = told
    core.told = [(0, 10, [], descriptors[:10]), (0, 10, [], descriptors[10:])]
    for _ in range(5):
        relay.doRead()
    assert read == list(range(20))


def test_events_that_come_while_only_the_core_has_to_do_are_processed(told: Told) -> None:
    """So are those for which it needs Python."""
    relay, core, descriptors, read = told
    lent = [Mock(), Mock()]
    nobody: list[Descriptor] = []
    core.told = [(0, 1, [], nobody), (0, 1, lent[:1], nobody), (0, 1, lent[1:], descriptors[:1]), (0, 1, [], nobody)]
    relay.doRead()
    relay.doRead()
    assert read == [0]
    assert [each.hand_over.call_count for each in lent] == [1, 1]


def test_waiting_for_the_core_is_no_work(told: Told) -> None:
    relay, core, descriptors, read = told
    core.told = [(0, 1, [], descriptors[:1]), (0.0015, 10, [], descriptors[1:11])]
    relay.doRead()
    assert len(read) == 7  # 2 ms


def test_a_mistake_while_the_core_hands_over_leaves_the_others(told: Told, logged_errors: list[dict[str, Any]]) -> None:
    relay, core, descriptors, read = told
    lent = [Mock(**{"hand_over.side_effect": ZeroDivisionError}), Mock()]
    core.told = [(0, 3, lent, descriptors[:1])]
    relay.doRead()
    assert read == [0]
    lent[1].hand_over.assert_called_once_with()
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()


def test_messages_that_only_the_core_has_to_do_with_cost_python_two_calls_each(work: Work) -> None:
    """One to wait and one for the time, until the turn has lasted long enough."""

    class Alone(Reports):
        def poll(self, epoll: int, milliseconds: int, most: int) -> tuple[int, list[Any], list[tuple[int, int]]]:
            polled.append(milliseconds)
            work.some(0.0001)
            return 1, [], []

    polled: list[int] = []
    relay = RelayReactor(Clocked(), Alone())
    relay.start()
    cost = calls(relay.doRead)
    assert 35 <= len(polled) <= 41
    assert polled[:3] == [0, 1, 1]
    # Two calls in each `poll` are the test's own.
    assert cost <= (2 + 2) * len(polled) + 30
    relay.stop()


@pytest.mark.parametrize(("took", "read"), [(0.0, 7), (0.0009, 4), (0.0017, 2), (0.003, 2)])
def test_what_the_core_did_counts(make: Callable[[], Descriptor], work: Work, took: float, read: int) -> None:
    """It relays before it tells of other events; these get what it left of the turn, and half a millisecond always."""

    class Busy:
        HELD = DESCRIPTORS = 0
        Pair = None

        def poll(self, epoll: int, milliseconds: int, most: int) -> tuple[int, list[Any], list[tuple[int, int]]]:
            work.now += took
            batch = select.epoll.fromfd(os.dup(epoll)).poll(0, most)  # closed with the object
            return len(batch), [], batch

    relay = RelayReactor(Clocked(), Busy())
    relay.start()
    work.some(1000)
    descriptors = [make() for _ in range(20)]
    for each in descriptors:
        each.on_read = lambda: work.some(0.0003)
        relay.addReader(each)
        each.peer.send(b"x")
    relay.doRead()
    assert sum(each.read for each in descriptors) == read
    relay.stop()


def test_a_mistake_of_one_that_goes_on_leaves_the_others(logged_errors: list[dict[str, Any]]) -> None:
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    done: list[int] = []
    relay.later(lambda: 1 // 0)
    relay.later(lambda: done.append(1))
    while reactor.calls:
        reactor.turn()
    assert done == [1]
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()
    relay.later(lambda: done.append(2))
    relay.stop()
    reactor.turn()
    assert done == [1]


@pytest.mark.parametrize(("cost", "most"), [(0.0, 5), (0.0002, 3), (0.001, 1)])
def test_few_connections_are_accepted_at_a_time(work: Work, cost: float, most: int) -> None:
    """Five, and fewer if that takes long, but in each turn; Twisted would take a hundred and more at once.

    An event that comes meanwhile is not for nothing: the reactor's loop would spin on it.
    """
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    factory = Factory.forProtocol(Protocol)
    factory.noisy = False
    built: list[object] = []

    def build(address: object) -> None:
        work.now += cost
        built.append(address)

    factory.buildProtocol = build  # type: ignore[assignment, method-assign]
    port: Any = relay.listenTCP(0, factory, backlog=100, interface="127.0.0.1")
    clients = [socket.create_connection(("127.0.0.1", port.getHost().port)) for _ in range(30)]
    port.doRead()
    for expected in range(most, 30 + most, most):
        assert len(built) == expected
        assert len(reactor.calls) == 1
        reactor.turn()
    # Nobody waits any more.
    reactor.turn()
    assert not reactor.calls
    clients.append(socket.create_connection(("127.0.0.1", port.getHost().port)))
    port.doRead()
    assert len(built) == 31
    clients += [socket.create_connection(("127.0.0.1", port.getHost().port)) for _ in range(15)]
    for expected in (31 + most, 31 + 2 * most):
        port.doRead()
        assert len(built) == expected
        assert len(reactor.calls) == 1
    for client in clients:
        client.close()
    port.connectionLost(None)
    relay.stop()


@pytest.mark.usefixtures("work")
def test_a_port_that_is_closed_accepts_no_more() -> None:
    reactor = Clocked()
    relay = RelayReactor(reactor)
    relay.start()
    factory = Factory.forProtocol(Protocol)
    factory.noisy = False
    factory.buildProtocol = built = Mock(return_value=None)  # type: ignore[method-assign]
    port: Any = relay.listenTCP(0, factory, backlog=100, interface="127.0.0.1")
    clients = [socket.create_connection(("127.0.0.1", port.getHost().port)) for _ in range(7)]
    port.doRead()
    port.connectionLost(None)
    reactor.turn()
    assert not reactor.calls
    assert built.call_count == 5
    for client in clients:
        client.close()
    relay.stop()


class Failing:
    """A listening socket whose `accept` fails, as often as it is told."""

    def __init__(self, listening: socket.socket, numbers: list[int]) -> None:
        self._listening = listening
        self._numbers = numbers

    def accept(self) -> tuple[socket.socket, Any]:
        if self._numbers:
            number = self._numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return self._listening.accept()


@pytest.fixture
def accepting(work: Work) -> Iterator[tuple[Any, list[Any]]]:
    """Return a port, and the addresses of which its factory is told."""
    del work  # Time stands still.
    relay = RelayReactor(Clocked())
    relay.start()
    factory = Factory.forProtocol(Protocol)
    factory.noisy = False
    built: list[Any] = []
    factory.buildProtocol = built.append  # type: ignore[assignment, method-assign]
    port: Any = relay.listenTCP(0, factory, interface="::1")
    yield port, built
    port.connectionLost(None)
    relay.stop()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.EPERM])
def test_an_error_while_accepting_is_left_to_twisted(accepting: tuple[Any, list[Any]], number: int) -> None:
    """Without a free descriptor, it closes what waits; in any case the next connections are accepted."""
    port, built = accepting
    real, where = port.socket, ("::1", port.getHost().port)
    # Twisted tries again, and gets the same error.
    port.socket = Failing(real, [number] * 2)
    with socket.create_connection(where):
        port.doRead()
        port.doRead()
    port.socket = real
    with socket.create_connection(where) as client:
        port.doRead()
        assert built[-1] == IPv6Address("TCP", *client.getsockname()[:2])


def test_connections_that_cannot_be_accepted_are_told_once_a_minute(
    accepting: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds all descriptors could otherwise fill the log with three lines for each connection."""
    told: list[dict[str, Any]] = []
    now = [1000.0]
    notes = transport._NotAccepted()
    monkeypatch.setattr(transport, "monotonic", lambda: now[0])
    monkeypatch.setattr(transport, "_log", Logger(observer=told.append))
    port, _ = accepting
    real, where = port.socket, ("::1", port.getHost().port)

    def fail(number: int) -> None:
        monkeypatch.setattr(port, "_logger", Logger(observer=notes))
        # Twisted tries again, and gets the same error.
        port.socket = Failing(real, [number] * 2)
        with socket.create_connection(where):
            port.doRead()
        port.socket = real

    fail(errno.ECONNABORTED)
    assert told == []
    for _ in range(20):
        fail(errno.EMFILE)
    now[0] += 59.9
    fail(errno.ENFILE)
    (first,) = told
    assert "closed, or wait: Too many open files. Raise" in formatEvent(first)
    now[0] += 0.2
    fail(errno.ENFILE)
    assert "Too many open files in system. Raise" in formatEvent(told[1])


def test_twisteds_ports_log_through_it() -> None:
    """Both kinds."""
    for kind in (transport._TCPPort, transport._UNIXPort):
        assert isinstance(kind._logger.observer, transport._NotAccepted)


def test_an_error_in_one_new_connection_leaves_the_others(
    accepting: tuple[Any, list[Any]], logged_errors: list[dict[str, Any]]
) -> None:
    port, built = accepting
    where = ("::1", port.getHost().port)
    with socket.create_connection(where, PATIENCE) as first, socket.create_connection(where, PATIENCE) as second:
        port.factory.buildProtocol = Mock(side_effect=[ZeroDivisionError, None])
        port.doRead()
        assert port.factory.buildProtocol.call_count == 2
        # Both are closed.
        assert first.recv(1) == second.recv(1) == b""
    assert not built
    assert [event["log_failure"].type for event in logged_errors] == [ZeroDivisionError]
    logged_errors.clear()


@pytest.mark.parametrize(("given", "expected"), [("", 4096), (":backlog=7", 7)])
def test_a_thousand_connections_can_wait_to_be_accepted(given: str, expected: int) -> None:
    """Twisted lets 50; the kernel drops the others, whose devices come again after 1, 3, 7 and 15 seconds."""
    relay = RelayReactor(Clocked())
    relay.start()
    factory = Factory.forProtocol(Protocol)
    factory.noisy = False
    port: Any = listen(relay, Listener(f"tcp:0:interface=127.0.0.1{given}"), factory)
    # tcpi_sacked of a listening socket (tcp(7), linux/tcp.h).
    (backlog,) = struct.unpack_from("I", port.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
    assert backlog == min(expected, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    port.connectionLost(None)
    relay.stop()
