"""What a stored device sends while its broker is there: how much is in flight, and what is acknowledged or repeated."""

from __future__ import annotations

import pytest

from gateway.session.outgoing import WINDOW
from tests.stored_world import publish, read_publish
from tests.test_stored_session import PUBACK, PUBREC, PUBREL, Bench, Upstream, bench, with_backlog

__all__ = ["bench"]

DUP = 0x08


def publishes(upstream: Upstream) -> list[bytes]:
    """The PUBLISHes that the broker got."""
    return [raw for raw in upstream.sent if raw[0] >> 4 == 3]


def acknowledge_all(bench: Bench, upstream: Upstream) -> int:
    """Acknowledge each message of QoS 1 once, also those that are sent meanwhile; return how many there were."""
    done = 0
    while done < len(publishes(upstream)):
        bench.ack(PUBACK, read_publish(4, publishes(upstream)[done])[3])
        bench.settle()
        done += 1
    return done


def test_a_window_is_in_flight_and_the_next_follows_each_acknowledgement(bench: Bench) -> None:
    bench.connect()
    upstream = bench.online()
    for number in range(1, WINDOW + 6):
        bench.up(b"x", identifier=number)
    bench.settle()
    assert len(upstream.payloads) == WINDOW
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    assert len(upstream.payloads) == WINDOW + 1


def test_what_a_device_sends_again_is_not_written_for_it(bench: Bench) -> None:
    """It has no acknowledgement for any of it, and comes anew."""
    bench.connect()
    bench.online()
    for number in range(1, WINDOW + 6):
        bench.up(b"x", identifier=number)
    bench.settle()
    bench.connect()
    bench.settle()
    assert not bench.store.messages


@pytest.mark.parametrize("size", [1, 300_000])
def test_what_was_acknowledged_counts_no_more(bench: Bench, size: int) -> None:
    """However much passes, nothing is written while the broker keeps up."""
    bench.connect()
    upstream = bench.online()
    for number in range(1, 11):
        bench.up(bytes(size), identifier=number)
        bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
        assert not bench.disk.queue
    assert not bench.store.messages


def test_what_goes_to_disk_at_last_is_sent_once(bench: Bench) -> None:
    """Also what was in flight before, and what waited behind it."""
    bench.connect()
    upstream = bench.online()
    for number in range(1, 302):
        bench.up(number.to_bytes(2, "big"), identifier=number)
    bench.settle()
    assert bench.store.messages
    assert acknowledge_all(bench, upstream) == 301
    assert upstream.payloads == [number.to_bytes(2, "big") for number in range(1, 302)]
    assert not bench.store.messages


def test_a_device_gets_no_acknowledgement_for_qos_0(bench: Bench) -> None:
    """Though the broker gives one, since `confirm` sends it with QoS 1."""
    device = bench.connect(confirm=True)
    upstream = bench.online()
    device.take()
    bench.up(b"x", 0, 0)
    bench.settle()
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert device.got == []


def test_a_message_that_is_received_twice_is_released_once(bench: Bench) -> None:
    """The broker repeats PUBREC before the disk has the first one."""
    bench.connect()
    upstream = bench.online()
    bench.up(b"x", 2)
    bench.settle()
    identifier = read_publish(4, upstream.sent[-1])[3]
    upstream.take()
    for _ in range(2):
        bench.ack(PUBREC, identifier)
    bench.settle()
    assert [raw[0] for raw in upstream.sent] == [PUBREL]


@pytest.mark.parametrize("code", [0x80, 0x83])
def test_a_reason_that_may_pass_is_no_success(bench: Bench, code: int) -> None:
    """The message is sent again as a new one."""
    device = bench.offline(version=5)
    bench.stored.device_received(publish(5, b"t", b"x", 1, 1))
    bench.settle()
    assert device.connack
    upstream = bench.online(version=5)
    bench.ack(PUBACK, read_publish(5, upstream.sent[-1])[3], code)
    bench.settle()
    assert upstream.payloads == [b"x", b"x"]
    assert bench.store.messages == 1


@pytest.mark.parametrize("kept", [True, False])
def test_after_a_restart_the_first_messages_may_be_repeated(bench: Bench, kept: bool) -> None:
    """If the broker has kept the session, it may know them: DUP tells it (MQTT 3.1.1 §3.3.1.1)."""
    with_backlog(bench, b"1", b"2")
    bench.start()
    bench.offline()
    upstream = bench.online(session_present=kept)
    assert upstream.payloads == [b"1", b"2"]
    assert [bool(raw[0] & DUP) for raw in publishes(upstream)] == [kept, kept]
    bench.up(b"3", identifier=3)
    bench.settle()
    assert not publishes(upstream)[-1][0] & DUP


def test_after_a_restart_no_more_messages_are_repeated_than_were_in_flight(bench: Bench) -> None:
    """Twice a window at most; the broker cannot have seen those behind them. A session that is new has seen none."""
    with_backlog(bench, *(number.to_bytes(2, "big") for number in range(45)))
    bench.start()
    bench.offline()
    upstream = bench.online(session_present=True)
    assert acknowledge_all(bench, upstream) == 45
    assert [bool(raw[0] & DUP) for raw in publishes(upstream)] == [True] * (2 * WINDOW) + [False] * (45 - 2 * WINDOW)


def test_a_session_that_was_new_after_a_restart_has_seen_nothing_of_before(bench: Bench) -> None:
    """Nor is it told of repetitions on its next connection, but for what was sent on this one."""
    with_backlog(bench, *(number.to_bytes(2, "big") for number in range(25)))
    bench.start()
    bench.offline()
    assert not any(raw[0] & DUP for raw in publishes(bench.online()))
    bench.lose()
    upstream = bench.online(session_present=True)
    acknowledge_all(bench, upstream)
    assert [bool(raw[0] & DUP) for raw in publishes(upstream)] == [True] * WINDOW + [False] * 5
