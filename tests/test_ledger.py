"""What the gateway counts and remembers: totals that only grow, the last end of each device, bounded memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger

from gateway import pieces
from gateway.errors import EndReason, UpstreamFailure
from gateway.ops import ledger as module
from gateway.ops.journal import Journal
from gateway.ops.ledger import BUCKETS, REMEMBERED, SAMPLE_INTERVAL, SAMPLES, Histogram, Ledger
from gateway.pieces import at_once, in_turns
from gateway.session.record import Traffic
from gateway.session.session import Session, State
from tests import mqtt_packets as mqtt
from tests.facts import PEER
from tests.test_journal import RECORD
from tests.test_session import Bench
from tests.turn_clock import TurnClock


class Sessions:
    """A ledger that watches sessions of which a test decides what becomes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.events: list[dict[str, Any]] = []
        self.ledger = Ledger(Journal(self.clock.seconds, Logger(observer=self.events.append)), self.clock.seconds)
        self.open: set[Any] = set()
        self.ledger.watch(self.open)

    def bench(self) -> Bench:
        """A session that is open and tells the ledger."""
        bench = Bench()
        bench.session._journal = self.ledger
        self.open.add(bench.session)
        return bench

    def end(self, name: str, reason: EndReason = EndReason.DEVICE_LOST, **fields: Any) -> None:
        """A session that was opened and ended at once."""
        self.ledger.session_ended(attrs.evolve(RECORD, client_identifier=name, reason=reason, **fields))

    def sweep(self, seconds: float = 0.0) -> None:
        """Let time pass with one sweep at its end."""
        self.clock.advance(seconds)
        self.ledger.sweep()


def test_everything_is_passed_on() -> None:
    """The journal hears of all that the ledger counts, in order."""
    sessions = Sessions()
    ledger = sessions.ledger
    ledger.session_started(RECORD)
    ledger.session_ended(RECORD)
    ledger.refused(EndReason.RATE_LIMITED, "10.0.0.1:5", "why")
    failure = UpstreamFailure(EndReason.TCP_REFUSED, "x")
    ledger.passed_over("a:1", failure)
    ledger.left_alone("a:1", failure, 2.0)
    ledger.serves_again("a:1")
    for _ in range(100):
        ledger.refused(EndReason.RATE_LIMITED, "10.0.0.1:5")
    ledger.flush()
    told = [event["event"] for event in sessions.events]
    assert told[:4] == ["session-start", "session-end", "connection-refused", "upstream-passed-over"]
    assert told[-1] == "records-withheld"
    assert any("a:1" in str(event) and "backing off" in event["log_format"] for event in sessions.events)


def test_what_is_relayed_is_counted_once() -> None:
    """While a session stands, when it has ended and still closes, and when it is gone: the total never goes back."""
    sessions = Sessions()
    bench = sessions.bench().relaying()
    bench.session.device_received(mqtt.publish() * 3)
    standing = bench.session.traffic
    assert at_once(sessions.ledger.survey()).traffic == standing
    bench.session.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "x"))
    assert bench.state is State.ENDED
    assert at_once(sessions.ledger.survey()).traffic == standing
    sessions.open.clear()
    assert at_once(sessions.ledger.survey()).traffic == standing
    assert standing.packets_up == 4


def test_sessions_are_counted_by_the_step_they_stand_at() -> None:
    """Each of them, and those that are closing apart."""
    sessions = Sessions()
    sessions.bench()
    sessions.bench().connect()
    sessions.bench().verified()
    sessions.bench().relaying()
    sessions.bench().relaying().session.device_gone("closed")
    assert at_once(sessions.ledger.survey()).steps == dict.fromkeys(set(State) - {State.STORED}, 1)
    assert (sessions.ledger.started, sessions.ledger.ended[EndReason.DEVICE_LOST]) == (2, 1)


def test_durations_are_those_of_the_steps_that_were_done() -> None:
    """At the start of a session that stands, else at its end; none is counted twice."""
    sessions = Sessions()
    sessions.ledger.session_started(RECORD)
    sessions.ledger.session_ended(RECORD)
    sessions.end("a", EndReason.TCP_REFUSED, connack_seconds=None, tls_seconds=None, tcp_seconds=None)
    counts = {step: histogram.cumulative()[-1] for step, histogram in sessions.ledger.durations.items()}
    assert counts == {"connect": 2, "dns": 2, "tcp": 1, "tls": 1, "connack": 1}


def test_a_histogram_counts_up_to_each_bound() -> None:
    """A bound belongs to its bucket, and what is above all of them is in the last."""
    histogram = Histogram()
    for seconds in (0.0005, BUCKETS[0], 1.5, 99.0):
        histogram.observe(seconds)
    counts = dict(zip([*BUCKETS, float("inf")], histogram.cumulative(), strict=True))
    assert (counts[BUCKETS[0]], counts[1.0], counts[2.5], counts[10.0], counts[float("inf")]) == (2, 2, 3, 3, 4)
    assert histogram.total == pytest.approx(0.0005 + BUCKETS[0] + 1.5 + 99.0)


def test_who_was_passed_over_and_whom_was_found_is_kept() -> None:
    """For the metrics, and for the end of the broker's certificate."""
    sessions = Sessions()
    sessions.ledger.session_started(RECORD)
    sessions.ledger.passed_over("a:1", UpstreamFailure(EndReason.TLS_EXPIRED, ""))
    assert sessions.ledger.peers == {"broker.example:8883": PEER}
    assert sessions.ledger.passes == {("a:1", EndReason.TLS_EXPIRED): 1}


# ---- the last end of each device


def test_a_storm_does_not_push_a_device_out_of_sight() -> None:
    """Thousands of ends of others, but one entry for each device: the silent one is still found."""
    sessions = Sessions()
    sessions.end("device-17", EndReason.TLS_EXPIRED, detail="over")
    for number in range(3):
        sessions.clock.advance(1)
        for other in range(500):
            sessions.end(f"other-{other}", number=number)
    ends = {end.client_identifier: end for end in sessions.ledger.ends()}
    assert len(ends) == 501
    assert (ends["device-17"].reason, ends["device-17"].times) == (EndReason.TLS_EXPIRED, 1)
    assert (ends["other-7"].times, ends["other-7"].since, ends["other-7"].ended) == (3, 1, 3)
    assert next(sessions.ledger.ends()).client_identifier == "other-499"


def test_without_an_identifier_a_device_is_its_address() -> None:
    """Its port is another each time; being turned away at the door is an end, too."""
    sessions = Sessions()
    sessions.end("", EndReason.NOT_MQTT, device_address="10.0.0.7:1000")
    sessions.ledger.refused(EndReason.RATE_LIMITED, "10.0.0.7:1001")
    (end,) = sessions.ledger.ends()
    assert (end.reason, end.times, end.number) == (EndReason.RATE_LIMITED, 2, 0)
    assert sessions.ledger.last_end("") is None


def test_since_when_a_device_is_absent_does_not_move_with_its_attempts() -> None:
    """From the end of its last established session; its failed attempts are counted from the first in a row."""
    sessions = Sessions()
    kept = []
    for established in (False, False, True, False, False):
        sessions.clock.advance(10)
        sessions.end("pump-2", EndReason.TCP_REFUSED, connack_seconds=0.1 if established else None)
        end = sessions.ledger.last_end("pump-2")
        assert end is not None
        kept.append((end.absent_since, end.failing_since, end.ended))
    assert kept == [(10, 10, 10), (10, 10, 20), (30, 30, 30), (30, 40, 40), (30, 40, 50)]


def test_an_end_is_forgotten_after_a_day() -> None:
    """The sweep does that."""
    sessions = Sessions()
    sessions.end("old")
    sessions.sweep(REMEMBERED - 1)
    sessions.end("new")
    assert sessions.ledger.last_end("old") is not None
    sessions.sweep(1)
    assert [end.client_identifier for end in sessions.ledger.ends()] == ["new"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number, and in what each takes, whatever a device calls itself."""
    monkeypatch.setattr(module, "_MAX_ENDS", 10)
    sessions = Sessions()
    for number in range(100):
        sessions.end(f"{number:03}" + "x" * 65_000, detail="y" * 65_000)
    ends = list(sessions.ledger.ends())
    assert len(ends) == 10
    assert ends[0].client_identifier.startswith("099xxx")
    assert all(len(end.client_identifier) + len(end.detail) + len(end.key) < 1000 for end in ends)


def test_long_identifiers_that_begin_alike_are_two_devices() -> None:
    """And hostile ones are printable here, lone surrogates too."""
    sessions = Sessions()
    sessions.end("x" * 300 + "\ud8001")
    sessions.end("x" * 300 + "\ud8002")
    sessions.end("\ud800\x1b\u202e")
    assert len(list(sessions.ledger.ends())) == 3
    assert sessions.ledger.last_end("x" * 300 + "\ud8001") is not None
    assert next(sessions.ledger.ends()).client_identifier == r"\ud800\x1b\u202e"


def test_failures_are_all_ends_but_those_in_good_order() -> None:
    """DISCONNECT, the gateway's own stop, a reload and a disabled device are none."""
    sessions = Sessions()
    for reason in EndReason:
        sessions.end("a", reason)
    assert sessions.ledger.failures == len(EndReason) - 4


# ---- samples


def test_a_quarter_of_an_hour_of_samples_is_kept() -> None:
    """One every ten seconds, of what happened between them; the oldest go."""
    sessions = Sessions()
    bench = sessions.bench().relaying()
    for second in range(1, 2001):
        if second % 10 == 1:
            bench.session.device_received(mqtt.publish() * 5)
            sessions.end("a")
        sessions.sweep(1)
    intervals = list(sessions.ledger.intervals())
    assert len(intervals) == SAMPLES
    assert intervals[-1].ended == 2000
    assert {
        (each.packets - RECORD.packets_up - RECORD.packets_down, each.failures, each.open) for each in intervals
    } == {(5, 1, 1)}
    assert {each.ended - each.began for each in intervals} == {SAMPLE_INTERVAL}
    assert sessions.ledger.ended_lately() == {EndReason.DEVICE_LOST: SAMPLES}


def test_a_sample_that_came_late_is_a_longer_interval() -> None:
    """A busy machine sweeps late; the rate is still right."""
    sessions = Sessions()
    sessions.sweep(25)
    (interval,) = sessions.ledger.intervals()
    assert (interval.began, interval.ended) == (0, 25)


def watched(monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[Sessions, list[Bench], list[int]]:
    """Sessions of which two are looked at in a turn, in the order of the list; how often each was asked."""
    monkeypatch.setattr(pieces, "AT_A_TIME", 2)
    sessions = Sessions()
    benches = [sessions.bench().relaying() for _ in range(count)]
    # A set has no order.
    sessions.ledger.watch([bench.session for bench in benches])
    asked: list[int] = []
    traffic = Session.traffic.fget
    assert traffic is not None
    numbers = {id(bench.session): number for number, bench in enumerate(benches)}

    def counted(session: Session) -> Traffic:
        asked.append(numbers[id(session)])
        return traffic(session)

    monkeypatch.setattr(Session, "traffic", property(counted))
    return sessions, benches, asked


def test_a_sample_looks_at_a_few_sessions_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the moment when it began, and no other begins meanwhile."""
    sessions, benches, asked = watched(monkeypatch, 5)
    ledger, clock, turns = sessions.ledger, sessions.clock, TurnClock()
    ledger._spread = partial(in_turns, turns.callLater)
    counts = []
    sessions.sweep(10)
    while turns.getDelayedCalls():
        counts.append(len(asked))
        sessions.sweep(20)
        turns.turn()
    assert counts == [2, 4, 5]
    assert [(each.ended, each.open) for each in ledger.intervals()][-1] == (10, len(benches))
    assert clock.seconds() == 70


def test_what_ends_during_a_survey_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was reached before its end or not; what begins meanwhile waits for the next survey."""
    sessions, benches, _ = watched(monkeypatch, 5)
    for bench in benches:
        bench.session.device_received(mqtt.publish() * 3)
    benches[1].session.device_gone("closed")  # it has ended before, and still closes
    before = at_once(sessions.ledger.survey()).traffic
    survey = sessions.ledger.survey()
    next(survey)
    for number in (0, 4):
        benches[number].session.device_gone("closed")
    sessions.bench().relaying()
    found = at_once(survey)
    assert found.traffic == before
    assert (found.steps[State.RELAYING], found.steps[State.ENDED]) == (3, 2)
    assert at_once(sessions.ledger.survey()).traffic == before
    next(survey := sessions.ledger.survey())
    survey.close()
    assert not sessions.ledger._ended_meanwhile


def test_nothing_is_asked_of_sessions_but_what_is_told() -> None:
    """A ledger that nobody watches with has no traffic."""
    clock = Clock()
    assert at_once(Ledger(Journal(clock.seconds), clock.seconds).survey()).traffic == Traffic()
