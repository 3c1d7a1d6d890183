"""A stored device's session at its edges: deadlines, stops, devices that come back, what holds up which side."""

from __future__ import annotations

import attrs
import pytest

from gateway.errors import EndReason, Refusal, SessionEnd
from gateway.mqtt.inspector import TopicRules
from gateway.session.record import Dial
from gateway.session.stored import Phase
from gateway.session.stored_state import DeviceState
from gateway.session.treatment import Treatment
from tests.stored_world import _PEER, packet, parsed, publish, read_publish
from tests.test_stored_session import (
    PUBACK,
    PUBREL,
    WILL,
    Bench,
    Upstream,
    acknowledgements,
    bench,
    go_on,
    hang_up,
    payloads_in_the_end,
    subscribes,
    with_backlog,
)

__all__ = ["bench"]

PINGREQ, PINGRESP = b"\xc0\0", b"\xd0\0"
FAILURE = SessionEnd(EndReason.UPSTREAM_LOST, "test")


def left_with(bench: Bench, *payloads: bytes) -> None:
    """Let a device leave messages for a broker that is not there."""
    with_backlog(bench, *payloads)
    bench.stored.device_received(b"\xe0\0")
    bench.settle()


def pause(bench: Bench, seconds: float) -> None:
    """This process does not run for a while; then comes the sweep."""
    bench.now += seconds
    bench.stored.give_back(seconds, bench.now)
    bench.sweep(0)


# ---- the next attempt


def test_the_next_attempt_waits_as_long_as_the_failure_says(bench: Bench) -> None:
    bench.connect()
    bench.stored.upstream_failed(FAILURE, later=30.0)
    assert bench.stored.trouble is FAILURE
    bench.sweep(29)
    assert bench.dials == 1
    bench.sweep(2)
    assert bench.dials == 2


def test_a_device_that_comes_is_worth_a_new_attempt(bench: Bench) -> None:
    """At the first sweep that finds a broker, although the attempt for its predecessor was to be later."""
    bench.connect()
    bench.stored.upstream_failed(FAILURE, later=60.0)
    bench.available = False
    bench.connect()
    bench.available = True
    bench.sweep()
    assert bench.dials == 2


def test_a_backlog_that_its_rule_does_not_let_leave_is_tried_less_and_less_often(bench: Bench) -> None:
    """The rules may change; without a device there is nobody to tell."""
    left_with(bench, b"x")
    bench.available = True
    bench.sweep()
    for delay in (1.0, 2.0, 4.0):
        dials = bench.dials
        bench.stored.upstream_refused(EndReason.RULE_REFUSED, "test", (5, 0x87))
        assert bench.stored.trouble is not None
        assert bench.stored.trouble.reason is EndReason.RULE_REFUSED
        bench.sweep(delay - 0.1)
        assert bench.dials == dials
        bench.sweep(0.2)
        assert bench.dials == dials + 1
    assert bench.online().payloads == [b"x"]


def test_a_device_that_comes_lets_what_was_given_up_be_tried_again(bench: Bench) -> None:
    """Two messages in a row were set aside; after that only a person or the device starts it again."""
    with_backlog(bench, b"1", b"2", b"3")
    for _ in range(7):
        hang_up(bench)
    bench.sweep(120)
    dials = bench.dials
    bench.connect()
    assert bench.dials == dials + 1


# ---- time that was lost


def test_a_pause_of_the_process_is_not_the_silence_of_a_device(bench: Bench) -> None:
    device = bench.offline()
    pause(bench, 100)
    assert device.ended is None
    bench.sweep(92)
    assert device.ended is not None


def test_a_pause_is_not_the_silence_of_a_broker_that_owes_its_connack(bench: Bench) -> None:
    """Nor has it longer for having been asked at the end of the pause."""
    left_with(bench, b"x")
    upstream = bench.verified()
    pause(bench, 60)
    assert not upstream.aborted
    bench.sweep(9)
    assert not upstream.aborted
    bench.sweep(1)
    assert upstream.aborted
    bench.now += 60
    upstream = bench.verified()
    bench.stored.give_back(60, bench.now)
    bench.sweep(10)
    assert upstream.aborted


def test_a_pause_is_not_the_silence_of_a_broker_that_owes_a_pingresp(bench: Bench) -> None:
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.sweep(61)
    assert upstream.sent[-1] == PINGREQ
    pause(bench, 60)
    assert not upstream.aborted
    bench.sweep(31)
    assert upstream.aborted


def test_a_pause_is_not_the_silence_of_a_broker_that_owes_pubacks(bench: Bench) -> None:
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.up(b"x")
    pause(bench, 100)
    bench.settle()
    assert not upstream.aborted
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(59)
    assert not upstream.aborted
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(2)
    assert upstream.aborted


def test_a_pause_is_not_the_silence_of_a_broker_that_owes_subacks(bench: Bench) -> None:
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.stored.device_received(subscribes(100))
    pause(bench, 100)
    assert not upstream.aborted
    assert upstream.sent[-1] == PINGREQ
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(59)
    assert not upstream.aborted
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(2)
    assert upstream.aborted


def test_after_a_pause_the_broker_gets_its_pingreq_at_once(bench: Bench) -> None:
    """Its Keep Alive has gone on meanwhile."""
    bench.connect()
    upstream = bench.online()
    upstream.take()
    pause(bench, 65)
    assert upstream.sent == [PINGREQ]


@pytest.mark.parametrize("waits", [False, True])
def test_a_pause_does_not_shorten_the_delay_of_a_will(bench: Bench, waits: bool) -> None:
    """The device could not come back meanwhile; or it did, and waits for a broker that does not accept it."""
    device = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    if waits:
        bench.available = True
        device = bench.connect(5)
        bench.now += 100
        bench.stored.give_back(100, bench.now)
        device.finish(EndReason.DEVICE_LOST)
        bench.sweep(0)
    else:
        pause(bench, 100)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(61)
    bench.settle()
    assert bench.store.messages == 1


# ---- what holds up which side


def test_the_broker_is_not_read_while_its_device_takes_nothing(bench: Bench) -> None:
    bench.connect()
    upstream = bench.online()
    bench.stored.device_full(True)
    assert upstream.held
    bench.stored.device_full(False)
    assert not upstream.held


def test_the_broker_is_not_read_while_many_of_its_messages_wait_for_the_device(bench: Bench) -> None:
    """It goes on once the device has acknowledged some."""
    device = bench.connect(5, receive_maximum=1)
    upstream = bench.online(version=5)
    for number in range(1, 52):
        assert not upstream.held
        bench.stored.upstream_received(publish(5, b"t", b"x", 1, number))
    assert upstream.held
    assert len(device.take()) == 1
    bench.stored.device_received(packet(PUBACK, b"\0\1"))
    assert not upstream.held


def test_what_comes_while_the_brokers_connection_takes_nothing_is_stored(bench: Bench) -> None:
    """And leaves as soon as it takes something again."""
    device = bench.connect()
    upstream = bench.online()
    bench.stored.upstream_full(True)
    bench.up(b"x", identifier=3)
    bench.settle()
    assert upstream.payloads == []
    assert acknowledgements(device.take(), PUBACK) == [3]
    bench.stored.upstream_full(False)
    bench.settle()
    assert upstream.payloads == [b"x"]


def test_a_connection_that_was_full_before_connack_does_not_hold_up_the_next(bench: Bench) -> None:
    left_with(bench, b"x")
    bench.verified()
    bench.stored.upstream_full(True)
    bench.lose()
    assert bench.online().payloads == [b"x"]


def test_a_device_that_exceeds_the_rates_of_its_rule_is_not_read_for_a_while(bench: Bench) -> None:
    """The burst is two seconds' worth."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, packets_per_second=2.0)
    device = bench.offline()
    bench.stored.device_received(PINGREQ * 6)
    assert device.held
    assert device.take() == [PINGRESP] * 6
    bench.sweep(2)
    assert not device.held


def test_whatever_a_device_sends_proves_that_it_lives(bench: Bench) -> None:
    device = bench.offline()
    for _ in range(3):
        bench.sweep(80)
        bench.stored.device_received(PINGREQ)
    assert device.ended is None
    bench.sweep(92)
    assert device.ended is not None


def test_a_fault_is_judged_behind_what_waits_for_a_suback(bench: Bench) -> None:
    """The packets before it were right."""
    device, upstream = bench.connect(), bench.online()
    bench.stored.device_received(subscribes(21) + b"\xf0\0")
    assert device.ended is None
    asked = [raw for raw in upstream.take() if raw[0] == 0x82]
    bench.stored.upstream_received(b"".join(packet(0x90, raw[2:4] + b"\1") for raw in asked))
    assert [raw[0] for raw in upstream.take()] == [0x82]
    go_on(bench, device)
    bench.stored.device_received(b"")
    assert device.ended is not None


def test_a_broker_has_its_time_for_subscribes_after_a_long_rest(bench: Bench) -> None:
    """It had nothing to answer before."""
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.sweep(61)
    bench.stored.upstream_received(PINGRESP)
    bench.stored.device_received(subscribes(100))
    bench.sweep()
    assert not upstream.aborted


def test_a_device_whose_session_has_ended_is_not_asked_to_go_on(bench: Bench) -> None:
    """Although more has come behind the packet that ended it than is taken in one turn."""
    device = bench.offline(version=5)
    bench.stored.device_received(PINGREQ * 29 + b"\xf0\0" + PINGREQ * 10)
    assert device.ended is not None
    assert device.ended[0] is EndReason.PROTOCOL_ERROR
    assert not device.behind


# ---- stops


def test_a_stop_with_nothing_in_memory_is_done_at_once(bench: Bench) -> None:
    bench.connect()
    bench.online()
    settled: list[bool] = []
    bench.stored.settle(lambda: settled.append(True))
    assert settled


def test_once_the_gateway_stops_no_broker_is_asked(bench: Bench) -> None:
    """It may have been found already."""
    device = bench.connect(5)
    bench.stored.settle(lambda: None)
    late = Upstream()
    treatment = Treatment(b"", device.stored.visit.version)  # type: ignore[union-attr]
    bench.stored.upstream_verified(late, _PEER, treatment)
    assert late.aborted
    assert not late.sent


def test_a_device_that_the_gateway_stops_gets_time_to_come_back_before_its_will(bench: Bench) -> None:
    """It has not vanished."""
    device = bench.offline(will=WILL)
    bench.stored.settle(lambda: None)
    device.finish(EndReason.GATEWAY_STOPPING)
    bench.stored.stop(discard_will=False)
    bench.settle()
    bench.start()
    bench.sweep(89)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(2)
    bench.settle()
    assert bench.store.messages == 1


@pytest.mark.parametrize("how", ["settle", "stop"])
def test_a_state_that_waits_for_an_earlier_one_is_in_the_last_commit(bench: Bench, how: str) -> None:
    """None follows it if the disk ends behind it."""
    with_backlog(bench, b"x")
    bench.stored.device_received(subscribes(1))
    bench.stored.device_received(packet(0x82, b"\0\2\0\1d\1"))
    if how == "settle":
        bench.stored.settle(lambda: None)
    else:
        bench.stored.device_received(b"\xe0\0")
        bench.stored.stop(discard_will=False)
    bench.disk.close()
    bench.start()
    assert DeviceState.load(bench.store.states["dev"]).subscriptions.untold.keys() == {"c", "d"}


def test_after_a_stop_nothing_is_dialled(bench: Bench) -> None:
    """Neither for a device's backlog; what is under way is cancelled."""
    left_with(bench, b"x")
    bench.available = True
    bench.sweep()
    dials, cancelled = bench.dials, bench.cancelled
    bench.stored.stop(discard_will=False)
    assert bench.cancelled == cancelled + 1
    bench.sweep(120)
    assert bench.dials == dials


def test_only_a_dial_is_cancelled(bench: Bench) -> None:
    """At each of the ways that lead away from a broker; what is connected is left otherwise."""
    refusal = Refusal(EndReason.DEVICE_DISABLED, "test", 5, 0x87)

    def new() -> Bench:
        bench.settle()
        bench.cancelled = 0
        bench.open()
        return bench

    new().connect()
    assert bench.cancelled == 0, "there was none before"
    bench.connect()
    assert (bench.cancelled, bench.dials) == (1, 2)
    bench.stored.shut_out(refusal)
    assert bench.cancelled == 2
    left_with(new(), b"x")
    bench.available = True
    bench.sweep(5)
    bench.cancelled = 0
    bench.stored.give_way()
    assert bench.cancelled == 1
    for leave in (
        lambda: bench.stored.shut_out(refusal),
        lambda: bench.stored.give_way(),
        lambda: bench.stored.stop(discard_will=False),
        lambda: bench.connect(),
    ):
        device = new().connect()
        upstream = bench.online()
        bench.up(b"x")
        device.finish(EndReason.DEVICE_LOST)
        leave()
        assert bench.cancelled == 0
        assert upstream.aborted or upstream.closed


def test_a_device_that_is_disabled_loses_its_broker(bench: Bench) -> None:
    """It is told, if it is there; its messages stay."""
    device = with_backlog(bench, b"x")
    upstream = bench.online()
    refusal = Refusal(EndReason.DEVICE_DISABLED, "test", 5, 0x87)
    bench.stored.shut_out(refusal)
    assert device.ended == (EndReason.DEVICE_DISABLED, "test")
    assert upstream.aborted
    assert bench.stored.phase is Phase.OFFLINE
    upstream = bench.online()
    bench.stored.shut_out(refusal)
    assert upstream.aborted
    assert bench.stored.trouble is not None
    assert bench.stored.trouble.reason is EndReason.DEVICE_DISABLED
    assert bench.store.messages == 1


def test_the_operator_of_a_device_sees_which_broker_it_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its record: what is dialled, and what is verified."""
    device = bench.connect()
    seen: list[object] = []
    monkeypatch.setattr(device, "dials", seen.append)
    monkeypatch.setattr(device, "verified", seen.append)
    dial = Dial("broker", "192.0.2.1:8883")
    bench.stored.dials(dial)
    bench.verified()
    assert seen == [dial, _PEER]
    device.finish(EndReason.DEVICE_LOST)
    bench.stored.dials(dial)
    assert len(seen) == 2


# ---- Wills


def test_dropped_messages_leave_the_will_of_a_device_that_is_there(bench: Bench) -> None:
    device = bench.offline(will=WILL)
    bench.stored.dropped()
    device.finish(EndReason.DEVICE_LOST)
    bench.sweep()
    bench.settle()
    assert bench.online().payloads == [b"gone"]


def test_a_will_that_is_delayed_is_not_published_for_a_device_that_came_back(bench: Bench) -> None:
    """Neither its own nor that of its next connection, at any time."""
    first = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    first.finish(EndReason.DEVICE_LOST)
    bench.sweep(10)
    bench.offline(version=5, will=WILL)
    for _ in range(3):
        bench.sweep(40)
        bench.stored.device_received(PINGREQ)
    bench.settle()
    assert bench.store.messages == 0


def test_a_will_that_is_due_survives_two_connects_of_which_none_is_accepted(bench: Bench) -> None:
    """No session was resumed (MQTT 5.0 §3.1.3.2.2)."""
    first = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    first.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.available = True
    bench.connect(5)
    bench.connect(5).finish(EndReason.DEVICE_LOST)
    bench.settle()
    assert payloads_in_the_end(bench) == [b"gone"]


def test_a_will_that_the_broker_publishes_is_not_kept_for_a_connect_that_is_not_accepted(bench: Bench) -> None:
    """Also not over a restart."""
    bench.connect(5, will=WILL)
    first = bench.online(version=5)
    second = bench.connect(5)
    assert first.closed
    assert first.sent[-1] != b"\xe0\0"
    second.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.start()
    assert payloads_in_the_end(bench) == []


def test_a_device_that_came_back_after_a_restart_vanishes_like_any_other(bench: Bench) -> None:
    """Clean Start ends its session within the Will Delay, and so publishes the Will (MQTT 5.0 §3.1.3.2.2)."""
    bench.offline(version=5, will=WILL)
    bench.settle()
    bench.start()
    device = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.offline(version=5, clean=True)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"]


def test_a_device_that_came_back_before_a_restart_has_not_left(bench: Bench) -> None:
    """It gets time to return, although it had left once."""
    bench.offline(will=WILL).finish(EndReason.DEVICE_LOST)
    bench.stored.dropped()
    bench.settle()
    bench.offline(will=WILL)
    bench.settle()
    bench.start()
    bench.sweep(80)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(11)
    bench.settle()
    assert bench.store.messages == 1


def test_a_backlog_without_a_will_is_over_when_it_is_delivered(bench: Bench) -> None:
    """After a restart, too."""
    left_with(bench, b"x")
    bench.start()
    assert bench.stored.phase is Phase.OFFLINE
    bench.available = True
    bench.sweep()
    assert bench.dials == 1
    upstream = bench.online()
    bench.settle()
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert upstream.closed
    assert bench.over_called


@pytest.mark.parametrize("restarts", [False, True])
def test_a_connect_that_is_not_accepted_does_not_change_whether_a_device_had_vanished(
    bench: Bench, restarts: bool
) -> None:
    """The end of its session publishes the Will of one that had, and not of one that the gateway left alone."""
    first = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    if not restarts:
        first.finish(EndReason.DEVICE_LOST)
    bench.settle()
    if restarts:
        bench.start()
    bench.available = True
    bench.connect(5).finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.offline(version=5, clean=True)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"] * (not restarts)


@pytest.mark.parametrize("clean", [False, True])
def test_the_broker_publishes_the_will_of_a_device_that_is_half_open_and_nobody_else(bench: Bench, clean: bool) -> None:
    """Without the DISCONNECT with which an earlier one had left."""
    left_with(bench, b"x")
    bench.connect(will=WILL)
    upstream = bench.online()
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    bench.connect(clean=clean)
    assert upstream.closed
    assert upstream.sent[-1] != b"\xe0\0"
    bench.settle()
    assert bench.online().payloads == []


def test_a_stop_that_discards_wills_discards_that_of_a_device_that_vanished(bench: Bench) -> None:
    """For the broker, and for the gateway that starts next."""
    device = bench.connect(will=WILL)
    upstream = bench.online()
    bench.up(b"x")
    bench.settle()
    device.finish(EndReason.DEVICE_LOST)
    bench.stored.settle(lambda: None)
    bench.settle()
    bench.stored.stop(discard_will=True)
    assert bench.stored.phase is Phase.OFFLINE
    bench.settle()
    assert upstream.sent[-1] == b"\xe0\0"
    bench.start()
    bench.sweep(200)
    bench.settle()
    assert bench.online().payloads == [b"x"]


def test_a_status_is_not_said_again_after_a_connection_that_ended_in_order(bench: Bench) -> None:
    """DISCONNECT has made the broker discard the Will that would overwrite it."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    bench.connect(will=attrs.evolve(WILL, retain=True))
    upstream = bench.online()
    bench.stored.device_received(packet(0x33, b"\0\1s\0\1here"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.sweep(21)
    assert upstream.sent[-1] == b"\xe0\0"
    again = bench.online(session_present=True)
    bench.settle()
    assert again.payloads == []


# ---- sessions


def test_a_session_that_is_not_kept_is_not_present_for_the_next(bench: Bench) -> None:
    """Also if its device comes again without having left."""
    bench.offline(clean=True)
    assert bench.offline().connack == b"\x20\2\0\0"


def test_a_device_that_keeps_its_session_does_not_start_clean_at_the_broker(bench: Bench) -> None:
    """That would wipe what waits for it there."""
    bench.offline(version=5)
    assert not parsed(bench.verified().sent[0])[1].clean_start


def test_what_a_device_sends_again_after_it_was_half_open_is_delivered_once(bench: Bench) -> None:
    """It has no acknowledgement for what was on its way to the broker, and so sends all of that."""
    bench.connect()
    bench.online()
    bench.up(b"x")
    bench.connect()
    bench.settle()
    bench.up(b"x", dup=True)
    bench.settle()
    assert bench.online(session_present=True).payloads == [b"x"]


def test_what_a_rule_withholds_from_a_device_that_is_away_stays_the_brokers(bench: Bench) -> None:
    """It is not acknowledged in the device's place: the rule may be another when the device comes."""
    rules = TopicRules(subscribe_prefix="p/")
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, topics=rules)
    device = with_backlog(bench, b"x")
    upstream = bench.online()
    bench.stored.upstream_received(publish(4, b"other", b"y", 1, 7))
    assert device.take() == [packet(PUBACK, b"\0\1")]
    assert acknowledgements(upstream.take(), PUBACK) == [7]
    device.finish(EndReason.DEVICE_LOST)
    bench.lose()
    upstream = bench.online()
    upstream.take()
    bench.stored.upstream_received(publish(4, b"other", b"y", 1, 9))
    assert acknowledgements(upstream.sent, PUBACK) == []
    assert not upstream.aborted


def test_a_connect_that_has_not_left_costs_no_message_its_place(bench: Bench) -> None:
    """It waits for the disk, as PUBRELs are due, while its connection breaks: the broker's session is the old one."""
    bench.offline()
    bench.up(b"x", qos=2)
    bench.settle()
    upstream = bench.online()
    identifier = read_publish(4, upstream.sent[-1])[3]
    bench.ack(0x50, identifier)
    bench.settle()
    bench.lose()
    unsent = bench.verified()
    bench.lose()
    bench.settle()
    assert unsent.sent == []
    again = bench.verified()
    bench.settle()
    bench.stored.upstream_received(b"\x20\2\1\0")
    bench.settle()
    assert acknowledgements(again.sent, PUBREL) == [identifier]
    assert again.payloads == []
