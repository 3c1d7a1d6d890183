"""What a stored device's session does while its broker refuses, is silent, hangs up, or is there again."""

from __future__ import annotations

import json

import attrs
import pytest

from gateway.errors import EndReason, UpstreamFailure
from gateway.session.treatment import Treatment
from tests import mqtt_packets
from tests.stored_world import packet, parsed, publish, read_publish
from tests.test_stored_session import (
    PUBACK,
    PUBREC,
    PUBREL,
    WILL,
    Bench,
    Device,
    acknowledgements,
    bench,
    hang_up,
    with_backlog,
)

__all__ = ["bench"]

PINGREQ, PINGRESP, DISCONNECT = b"\xc0\0", b"\xd0\0", b"\xe0\0"
BUSY = b"\x20\2\0\3"


def absent(bench: Bench, *payloads: bytes) -> None:
    """Let a device store messages and leave."""
    with_backlog(bench, *payloads)
    bench.stored.device_received(DISCONNECT)
    bench.settle()


def refusals(bench: Bench, times: int) -> list[float]:
    """Let a broker refuse so often; return how long the gateway waits each time until it looks for one again."""
    waits = []
    bench.available = True
    for _ in range(times):
        bench.verified()
        bench.stored.upstream_received(BUSY)
        began, dials = bench.now, bench.dials
        while bench.dials == dials and bench.now < began + 100:
            bench.sweep(0.5)
        waits.append(bench.now - began)
    return waits


class Hasty(Device):
    """A device that sends packets behind CONNECT without waiting for CONNACK."""

    def __init__(self, behind: bytes) -> None:
        super().__init__()
        self.sent = behind

    def admit(self, connack: bytes, *, offline: bool) -> bytes:
        """See `gateway.session.visit.Device`."""
        return super().admit(connack, offline=offline) + self.sent


# ---- attempts, and brokers that refuse


def test_each_attempt_waits_twice_as_long_until_the_broker_acknowledges_a_message(bench: Bench) -> None:
    """At most a minute."""
    absent(bench, b"x", b"y")
    assert refusals(bench, 8) == [1, 2, 4, 8, 16, 32, 60, 60]
    upstream = bench.online()
    bench.ack(PUBACK, read_publish(4, upstream.sent[1])[3])
    bench.settle()
    bench.lose()
    dials = bench.dials
    bench.sweep(0.9)
    assert bench.dials == dials
    bench.sweep(0.1)
    assert bench.dials == dials + 1


def test_devices_do_not_all_come_back_at_the_same_time(bench: Bench) -> None:
    """Chance takes up to half of the time away."""
    bench.world = attrs.evolve(bench.world, uniform=lambda: 0.0)
    bench.open()
    absent(bench, b"x")
    assert refusals(bench, 4) == [0.5, 1, 2, 4]


def test_a_password_outlives_a_broker_that_is_busy(bench: Bench) -> None:
    """It is not the password's fault."""
    bench.offline(username="u", password=b"secret")
    bench.up(b"1")
    bench.settle()
    bench.stored.device_received(DISCONNECT)
    bench.verified()
    bench.stored.upstream_received(BUSY)
    assert b"secret" in bench.verified().sent[0]


@pytest.mark.parametrize(("version", "told"), [(4, None), (5, 0x87)])
def test_a_device_that_was_accepted_gets_no_second_connack(bench: Bench, version: int, told: int | None) -> None:
    """In 5.0, a DISCONNECT with the broker's reason."""
    device = bench.offline(version=version)
    bench.verified()
    code = 0x87 if version == 5 else 5
    bench.stored.upstream_received(packet(0x20, bytes((0, code)) + b"\0" * (version == 5)))
    assert device.ended is not None
    assert device.ended[0] is EndReason.UPSTREAM_REFUSED
    assert (device.answer, device.code) == (None, told)


@pytest.mark.parametrize("unanswered", [False, True])
def test_a_connect_that_is_refused_makes_no_new_session(bench: Bench, unanswered: bool) -> None:
    """PUBREL goes on where it was, unless an earlier CONNECT was not answered at all."""
    _, identifier = released(bench)
    if unanswered:
        bench.verified()
        bench.settle()
        bench.lose()
    bench.verified()
    bench.settle()
    bench.stored.upstream_received(BUSY)
    bench.settle()
    again = bench.online(session_present=True)
    assert acknowledgements(again.sent, PUBREL) == [identifier] * (not unanswered)
    assert again.payloads == [b"x"] * unanswered


def test_a_connect_that_has_not_left_makes_no_new_session(bench: Bench) -> None:
    """The connection broke while it waited for the disk."""
    _, identifier = released(bench)
    upstream = bench.verified()
    bench.lose()
    bench.settle()
    assert upstream.sent == []
    again = bench.online(session_present=True)
    assert acknowledgements(again.sent, PUBREL) == [identifier]
    assert again.payloads == []


def released(bench: Bench) -> tuple[Device, int]:
    """Lose a broker that has received a QoS 2 message; return the device, and the message's Packet Identifier."""
    device = bench.offline()
    bench.up(b"x", qos=2)
    bench.settle()
    identifier = read_publish(4, bench.online().sent[-1])[3]
    bench.ack(PUBREC, identifier)
    bench.settle()
    bench.lose()
    return device, identifier


@pytest.mark.parametrize("version", [4, 5])
def test_a_password_that_a_broker_refuses_is_not_tried_again_for_a_device_that_left(bench: Bench, version: int) -> None:
    """The account might be locked."""
    bench.offline(version=version, username="u", password=b"secret")
    bench.up(b"1", version=version)
    bench.settle()
    bench.stored.device_received(DISCONNECT)
    bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\x86\0" if version == 5 else b"\0\4"))
    assert b"secret" not in bench.verified().sent[0]


def test_credentials_of_the_rule_that_are_refused_in_5_0_are_an_outage(bench: Bench) -> None:
    """The device cannot help it."""
    ours = mqtt_packets.connect("dev", version=5, username="r", password=b"rule's")
    bench.treatment = lambda raw, connect: Treatment(connect=ours, version=connect.version)
    device = bench.connect(5)
    bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\x86\0"))
    assert device.connack
    assert device.ended is None


@pytest.mark.parametrize("packets", [b"\xe0\0", b"\xe0\1\x8b"])
def test_a_broker_that_disconnects_is_an_outage(bench: Bench, packets: bytes) -> None:
    """It shuts down, or says nothing; the device stays."""
    device, upstream = bench.connect(5), bench.online(version=5)
    bench.stored.upstream_received(packets)
    assert upstream.aborted
    assert bench.stored.trouble is not None
    assert bench.stored.trouble.reason is EndReason.UPSTREAM_DISCONNECT
    assert device.ended is None


def test_somebody_with_the_name_of_a_device_that_left_ends_its_connection_only(bench: Bench) -> None:
    """Its messages wait."""
    bench.connect(5)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    bench.stored.device_received(DISCONNECT)
    bench.stored.upstream_received(b"\xe0\1\x8e")
    bench.settle()
    assert upstream.aborted
    assert bench.store.messages == 1


# ---- CONNACK


@pytest.mark.parametrize("known", ["nowhere", "by the broker", "by the gateway"])
def test_a_session_is_present_that_the_broker_or_the_gateway_knows(bench: Bench, known: str) -> None:
    """What the broker has lost, the gateway restores."""
    if known == "by the gateway":
        bench.offline()
        bench.stored.device_received(DISCONNECT)
        bench.settle()
    bench.available = True
    device = bench.connect()
    assert not device.connack
    bench.online(session_present=known == "by the broker")
    assert device.connack[2] == (known != "nowhere")


def test_the_broker_is_told_the_receive_maximum_of_a_device_that_is_there(bench: Bench) -> None:
    """One at a time would be slow."""
    bench.connect(5, receive_maximum=30)
    properties = parsed(bench.verified().sent[0])[1].properties
    assert properties is not None
    assert properties.values[0x21] == 30


@pytest.mark.parametrize(("of_device", "told"), [(0, 1 << 20), (2000, 2000), (1 << 22, 1 << 20)])
def test_the_broker_is_told_the_smaller_limit_of_device_and_gateway(bench: Bench, of_device: int, told: int) -> None:
    """Packets are held until they are whole."""
    limit = mqtt_packets.number(0x27, of_device, size=4) if of_device else b""
    attached(bench, mqtt_packets.connect("dev", version=5, properties=limit))
    properties = parsed(bench.verified().sent[0])[1].properties
    assert properties is not None
    assert properties.values[0x27] == told


def test_a_broker_that_refuses_what_the_device_was_granted_ends_the_session(bench: Bench) -> None:
    """In 5.0, behind the properties of SUBACK."""
    device = bench.offline(version=5)
    bench.stored.device_received(mqtt_packets.subscribe("a/b", version=5))
    bench.settle()
    upstream = bench.online(version=5)
    bench.stored.upstream_received(packet(0x90, upstream.sent[-1][2:4] + b"\0\x87"))
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORED_SESSION_DIFFERS


def test_connack_may_come_in_pieces_and_with_what_is_behind_it(bench: Bench) -> None:
    device = bench.connect()
    bench.verified()
    bench.stored.upstream_received(b"\x20\2")
    assert not device.connack
    bench.stored.upstream_received(b"\0\0" + publish(4, b"c", b"1", 0, 0))
    assert device.take() == [publish(4, b"c", b"1", 0, 0)]


@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_behind_connect_is_read(bench: Bench, leaves: bool) -> None:
    """Also if that is all that the device wants."""
    packets = publish(4, b"t", b"x", 1, 5) + DISCONNECT * leaves
    device = attached(bench, mqtt_packets.connect("dev", clean_start=False), packets)
    assert acknowledgements(device.take(), PUBACK) == [5] * (not leaves)
    assert (device.ended is not None) == leaves
    assert bench.online().payloads == [b"x"]


def test_people_are_told_why_there_is_no_broker_until_there_is_one(bench: Bench) -> None:
    bench.connect()
    bench.verified()
    bench.stored.upstream_received(BUSY)
    assert bench.stored.trouble is not None
    assert bench.stored.trouble.reason is EndReason.UPSTREAM_REFUSED
    bench.online()
    assert bench.stored.trouble is None
    bench.lose()
    assert str(bench.stored.trouble) == "upstream-lost: test"


def test_an_outage_begins_when_the_broker_is_lost(bench: Bench) -> None:
    """And goes on while attempts fail."""
    bench.connect()
    bench.now += 10
    bench.online()
    bench.now += 10
    bench.lose()
    lost = bench.now
    assert bench.stored.offline_since == lost
    bench.now += 10
    bench.verified()
    bench.stored.upstream_received(BUSY)
    assert bench.stored.offline_since == lost


def test_server_keep_alive_holds_for_both_sides(bench: Bench) -> None:
    """It replaces the Keep Alive that the device had asked for (MQTT 5.0 §3.2.2.3.14)."""
    device = bench.connect(5)
    upstream = bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\0\3\x13\0\x0a"))
    upstream.take()
    bench.sweep(4)
    assert upstream.take() == []
    bench.sweep(1)
    assert upstream.take() == [PINGREQ]
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(10)
    assert device.ended is None
    bench.sweep(1)
    assert device.ended is not None
    assert device.ended[0] is EndReason.KEEPALIVE_TIMEOUT


def test_the_time_a_device_waited_for_the_broker_does_not_count_as_silence(bench: Bench) -> None:
    """Its Keep Alive may be shorter than that."""
    device = bench.connect(keep_alive=2)
    bench.verified()
    bench.sweep(4.1)
    assert device.connack
    bench.sweep(2)
    assert device.ended is None
    bench.sweep(2)
    assert device.ended is not None


@pytest.mark.parametrize("available", [False, True])
def test_a_connack_that_says_nothing_new_is_not_written(bench: Bench, available: bool) -> None:
    """Nor is a CONNECT written twice."""
    bench.available = available
    bench.connect()
    assert not bench.disk.queue
    bench.online()
    bench.lose()
    bench.verified()
    bench.stored.upstream_received(b"\x20\2\1\0")
    assert not bench.disk.queue


@pytest.mark.parametrize("is_there", [False, True])
def test_the_broker_is_given_the_will_and_asked_for_subscriptions_of_a_device_that_is_there(
    bench: Bench, is_there: bool
) -> None:
    """Not on the connection for what a device has left behind."""
    bench.offline(will=WILL)
    bench.stored.device_received(mqtt_packets.subscribe("a/b"))
    bench.up(b"x")
    bench.settle()
    if not is_there:
        bench.stored.device_received(DISCONNECT)
    upstream = bench.online()
    assert (parsed(upstream.sent[0])[1].will is not None) == is_there
    assert [raw[0] for raw in upstream.sent].count(0x82) == is_there
    assert upstream.payloads == [b"x"]


def test_every_connect_of_3_1_1_says_that_no_session_is_kept(bench: Bench) -> None:
    """There is no Session Expiry Interval that says it (MQTT 3.1.1 §3.1.2.4)."""
    bench.connect(clean=True)
    for _ in range(2):
        assert parsed(bench.online().sent[0])[1].clean_start
        bench.lose()


# ---- brokers that are silent, connections that are held


def test_a_broker_that_sends_no_connack_is_given_up(bench: Bench) -> None:
    """Unless one has arrived and has not been read."""
    bench.connect()
    upstream = bench.verified()
    bench.sweep(9.9)
    assert not upstream.aborted
    upstream.unread = True
    bench.sweep(1)
    assert not upstream.aborted
    upstream.unread = False
    bench.sweep(1)
    assert upstream.aborted
    assert str(bench.stored.trouble) == "upstream-silent: no CONNACK in 10 s"


def test_a_broker_that_answers_pingreq_but_acknowledges_nothing_is_given_up(bench: Bench) -> None:
    """After a minute."""
    absent(bench, b"x")
    upstream = bench.online()
    for _ in range(60):
        bench.sweep()
        while PINGREQ in upstream.sent:
            upstream.sent.remove(PINGREQ)
            bench.stored.upstream_received(PINGRESP)
    assert not upstream.aborted
    bench.sweep()
    assert upstream.aborted


def test_a_pingreq_is_sent_only_after_a_rest(bench: Bench) -> None:
    """Messages keep the connection alive as well (MQTT 3.1.1 §3.1.2.10)."""
    bench.connect()
    upstream = bench.online()
    for _ in range(5):
        bench.stored.device_received(publish(4, b"t", b"x", 0, 0))
        bench.sweep(20)
    assert PINGREQ not in upstream.sent


@pytest.mark.parametrize("malformed", [b"\x20\1\0", b"\x20\2\2\0", b"\x30\2\0\0"])
def test_a_broker_that_answers_with_something_else_is_left(bench: Bench, malformed: bytes) -> None:
    """The device is served."""
    device = bench.connect()
    upstream = bench.verified()
    bench.stored.upstream_received(malformed)
    assert upstream.aborted
    assert device.connack
    assert bench.stored.trouble is not None
    assert bench.stored.trouble.reason is EndReason.UPSTREAM_PROTOCOL_ERROR


def test_another_pingreq_gives_a_silent_broker_no_more_time(bench: Bench) -> None:
    """Here the one that asks whether a message of QoS 0 has arrived."""
    bench.connect()
    upstream = bench.online()
    bench.sweep(31)
    bench.stored.upstream_full(True)
    bench.up(b"x", 0)
    bench.settle()
    bench.stored.device_received(PINGREQ)
    bench.now += 20
    bench.stored.upstream_full(False)
    bench.settle()
    assert upstream.sent.count(PINGREQ) == 2
    bench.sweep(11)
    assert upstream.aborted


def test_a_pingresp_that_never_came_is_not_expected_of_the_next_connection(bench: Bench) -> None:
    """It would take the place of the one that confirms messages of QoS 0."""
    bench.connect()
    bench.online()
    bench.sweep(31)
    bench.lose()
    bench.up(b"x", 0)
    bench.settle()
    upstream = bench.online(session_present=True)
    assert upstream.sent[-1] == PINGREQ
    bench.stored.upstream_received(PINGRESP)
    bench.settle()
    assert bench.store.messages == 0


def test_a_broker_is_not_silent_because_the_one_before_was(bench: Bench) -> None:
    """Neither for a PINGREQ that the last connection did not answer, nor for messages that it did not acknowledge."""
    bench.connect()
    first = bench.online()
    bench.up(b"x")
    bench.settle()
    bench.sweep(31)
    assert PINGREQ in first.sent
    bench.sweep(25)
    bench.lose()
    bench.now += 600
    upstream = bench.online(session_present=True)
    assert upstream.payloads == [b"x"]
    bench.sweep(20)
    assert not upstream.aborted


def test_a_broker_that_hangs_up_without_a_message_suspects_none(bench: Bench) -> None:
    """What comes later is sent together, as usual."""
    device = bench.connect()
    bench.online()
    bench.stored.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "test", is_orderly=True))
    bench.available = False
    for number, payload in enumerate((b"1", b"2"), 1):
        bench.up(payload, identifier=number)
    bench.settle()
    assert not device.ended
    bench.sweep(61)
    assert bench.online(session_present=True).payloads == [b"1", b"2"]


def test_a_message_is_not_suspected_for_the_one_before_it(bench: Bench) -> None:
    """Each is set aside only after the broker has hung up three times on it alone."""
    with_backlog(bench, b"1", b"2")
    assert hang_up(bench) == [b"1", b"2"]
    for _ in range(2):
        assert hang_up(bench) == [b"1"]
    bench.stored.device_received(PINGREQ)
    bench.sweep(61)
    upstream = bench.online()
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    bench.store.counts.confirmed += 1
    bench.stored.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "test", is_orderly=True))
    assert hang_up(bench) == [b"2"]
    assert not bench.store.aside
    assert hang_up(bench) == [b"2"]
    assert sum(bench.store.aside.values()) == 1


def test_what_the_broker_confirms_clears_the_messages_behind_it(bench: Bench) -> None:
    """One at a time only until one is confirmed; and two that are set aside are in a row only if nothing was."""
    with_backlog(bench, b"1", b"2", b"3", b"4")
    for _ in range(4):
        hang_up(bench)
    assert sum(bench.store.aside.values()) == 1
    bench.stored.device_received(PINGREQ)
    bench.sweep(61)
    upstream = bench.online()
    assert upstream.payloads == [b"2"]
    confirmed = bench.store.counts.confirmed
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert bench.store.counts.confirmed == confirmed + 1
    assert upstream.payloads == [b"2", b"3", b"4"]
    bench.stored.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "test", is_orderly=True))
    for _ in range(3):
        hang_up(bench)
    assert sum(bench.store.aside.values()) == 2
    bench.stored.device_received(PINGREQ)
    bench.sweep(61)
    assert bench.online().payloads == [b"4"]


@pytest.mark.parametrize(("size", "most"), [(1, 220), (300_000, 3)])
def test_what_the_broker_does_not_acknowledge_goes_to_disk_when_it_is_much(bench: Bench, size: int, most: int) -> None:
    """More than 200 messages that wait behind those in flight, or a mebibyte."""
    bench.connect()
    bench.online()
    for number in range(1, most + 1):
        bench.up(bytes(size), identifier=number)
        bench.settle()
        assert not bench.store.messages
    bench.up(bytes(size), identifier=most + 1)
    bench.settle()
    assert bench.store.messages == most + 1


def test_a_device_that_was_told_wrongly_of_no_session_is_told_of_it_the_next_time(bench: Bench) -> None:
    """The connection for it is left, since what is sent on it would be for another session."""
    device = bench.offline()
    assert device.connack[2] == 0
    upstream = bench.online(session_present=True)
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORED_SESSION_DIFFERS
    assert upstream.closed
    assert bench.offline().connack[2] == 1


def test_a_device_that_comes_again_may_send_as_much_as_before(bench: Bench) -> None:
    """What it had not been acknowledged counts no more, since it sends that again."""
    payload = bytes(300_000)
    for _ in range(3):
        bench.connect()
        if bench.stored._upstream is None:
            bench.online()
        for number in (1, 2, 3):
            bench.up(payload, identifier=number)
        bench.settle()
        assert not bench.store.messages


def test_each_pingresp_is_that_of_the_oldest_pingreq(bench: Bench) -> None:
    """The first confirms no message that was sent behind its PINGREQ, and leaves another one due."""
    bench.connect()
    upstream = bench.online()
    bench.sweep(31)
    bench.stored.upstream_full(True)
    bench.up(b"x", 0)
    bench.settle()
    bench.stored.upstream_full(False)
    bench.settle()
    assert upstream.sent.count(PINGREQ) == 2
    bench.stored.upstream_received(PINGRESP)
    bench.settle()
    assert bench.store.messages == 1
    bench.stored.device_received(PINGREQ)
    bench.sweep(29)
    assert not upstream.aborted
    bench.sweep(2)
    assert upstream.aborted


def test_a_broker_that_answers_pingreq_is_asked_again(bench: Bench) -> None:
    """And one that answers what nobody asked does no harm."""
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.stored.upstream_received(PINGRESP)
    bench.sweep(59)
    assert PINGREQ not in upstream.sent
    for number in (1, 2, 3):
        bench.sweep(60)
        assert upstream.sent.count(PINGREQ) == number
        bench.stored.upstream_received(PINGRESP)
    assert not upstream.aborted


def test_a_device_without_keep_alive_may_be_silent(bench: Bench) -> None:
    device = bench.offline(keep_alive=0)
    bench.sweep(10_000)
    assert device.ended is None


def test_a_device_is_not_silent_while_it_is_not_read(bench: Bench) -> None:
    """Its Keep Alive counts from the end of that."""
    device = bench.offline()
    bench.stored.device_full(True)
    bench.sweep(100)
    bench.stored.device_full(False)
    bench.sweep(89)
    assert device.ended is None
    bench.sweep(2)
    assert device.ended is not None


def test_a_broker_is_asked_at_once_whether_it_lives_while_a_backlog_is_in_flight(bench: Bench) -> None:
    """Not if what is in flight is all there is, and as fresh as that."""
    bench.connect()
    upstream = bench.online()
    bench.up(b"y")
    bench.sweep()
    assert upstream.sent[-1] != PINGREQ
    bench.lose()
    absent(bench, *(b"%d" % number for number in range(30)))
    upstream = bench.online()
    bench.sweep()
    assert upstream.sent[-1] == PINGREQ


def test_a_broker_that_is_not_read_is_not_given_up_as_silent(bench: Bench) -> None:
    """The device takes nothing; what the broker has answered nobody knows."""
    bench.connect(keep_alive=0)
    upstream = bench.online()
    bench.stored.device_full(True)
    bench.sweep(60)
    assert upstream.sent[-1] == PINGREQ
    bench.sweep(40)
    assert not upstream.aborted
    bench.stored.device_full(False)
    bench.sweep(1)
    assert upstream.aborted


def test_while_the_device_takes_nothing_the_broker_is_not_read(bench: Bench) -> None:
    """On whichever connection."""
    device, upstream = bench.connect(), bench.online()
    bench.stored.device_full(True)
    assert upstream.held
    bench.sweep()
    assert (device.held, upstream.held) == (True, True)
    bench.lose()
    again = bench.online()
    assert again.held
    bench.stored.device_full(False)
    assert (device.held, again.held) == (False, False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("returns", [False, True])
def test_what_a_device_did_not_take_holds_up_nobody_once_it_is_gone(bench: Bench, full: bool, returns: bool) -> None:
    """The broker's acknowledgements are read again, and so is the device itself when it comes back."""
    device = bench.connect(5, receive_maximum=1)
    upstream = bench.online(version=5)
    if full:
        bench.stored.device_full(True)
    else:
        for number in range(1, 60):
            bench.stored.upstream_received(publish(5, b"c", b"1", 1, number))
    assert upstream.held
    bench.up(b"x", version=5)
    bench.settle()
    if returns:
        again, upstream = bench.connect(5), bench.online(version=5)
        assert not again.held
    else:
        device.finish(EndReason.DEVICE_LOST)
    assert not upstream.held


def test_a_device_that_is_held_because_it_is_fast_is_read_again(bench: Bench) -> None:
    """Its rule allows it a message each second."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, packets_per_second=1.0)
    device = bench.offline()
    for number in range(1, 6):
        bench.up(b"x", identifier=number)
    assert device.held
    bench.sweep()
    assert device.held
    bench.sweep(5)
    assert not device.held


def test_a_device_is_read_as_soon_as_the_disk_has_caught_up(bench: Bench) -> None:
    """Not a sweep later."""
    device = bench.offline()
    for number in (1, 2):
        bench.up(b"x" * 600_000, identifier=number)
    assert device.held
    bench.settle()
    assert not device.held


# ---- Wills and what they overwrite


def test_nothing_is_said_again_unless_a_will_may_have_overwritten_it(bench: Bench) -> None:
    """Only what is retained in the Will's topic, and only if the broker had accepted the Will."""
    bench.offline(will=attrs.evolve(WILL, retain=True))
    bench.stored.device_received(packet(0x33, b"\0\1s\0\1here"))
    bench.settle()
    bench.verified()
    bench.stored.upstream_received(BUSY)
    upstream = bench.online()
    assert upstream.payloads == [b"here"]
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    bench.stored.device_received(DISCONNECT)
    bench.settle()
    bench.connect(will=attrs.evolve(WILL, retain=True))
    upstream = bench.online()
    bench.stored.device_received(packet(0x33, b"\0\5other\0\1retained"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.stored.device_received(packet(0x32, b"\0\1s\0\2not retained"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.lose()
    bench.settle()
    assert bench.online(session_present=True).payloads == []


def test_what_the_will_overwrote_is_said_again_once_and_in_its_turn(bench: Bench) -> None:
    """Behind what was stored meanwhile."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    bench.connect(will=attrs.evolve(WILL, retain=True))
    upstream = bench.online()
    bench.stored.device_received(packet(0x33, b"\0\1s\0\1here"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.lose()
    bench.up(b"x", identifier=2)
    bench.settle()
    upstream = bench.online(session_present=True)
    assert upstream.payloads == [b"x", b"here"]
    for raw in upstream.sent[1:]:
        bench.ack(PUBACK, read_publish(4, raw)[3])
    bench.settle()
    bench.sweep(20)
    assert upstream.closed
    assert bench.online(session_present=True).payloads == []


def test_what_the_device_has_said_since_takes_the_place_of_what_the_will_overwrote(bench: Bench) -> None:
    """It follows the Will anyway."""
    bench.connect(will=attrs.evolve(WILL, retain=True))
    upstream = bench.online()
    bench.stored.device_received(packet(0x33, b"\0\1s\0\1here"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.lose()
    bench.stored.device_received(packet(0x33, b"\0\1s\0\2warm"))
    bench.settle()
    assert bench.online(session_present=True).payloads == [b"warm"]


def test_a_will_is_published_once_if_the_gateway_crashes_afterwards(bench: Bench) -> None:
    device = bench.offline(version=5, will=WILL)
    device.finish(EndReason.DEVICE_LOST)
    bench.sweep()
    bench.settle()
    bench.start()
    bench.sweep(200)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"]


def test_a_will_that_the_broker_publishes_is_not_sent_after_a_crash(bench: Bench) -> None:
    """The device vanished while the broker was there, which gets no DISCONNECT."""
    device, upstream = bench.connect(version=5, will=WILL), bench.online(version=5)
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    assert upstream.closed
    assert upstream.sent[-1] != DISCONNECT
    bench.start()
    bench.sweep(200)
    bench.settle()
    assert bench.store.messages == 0


def test_a_disconnect_of_5_0_that_gives_its_reason_takes_the_will_with_it(bench: Bench) -> None:
    """Normal disconnection (MQTT 5.0 §3.14.2.1)."""
    bench.offline(version=5, will=WILL)
    bench.stored.device_received(b"\xe0\1\0")
    bench.settle()
    assert bench.over_called
    assert bench.store.messages == 0


def test_nothing_is_left_once_a_will_is_delivered(bench: Bench) -> None:
    device = bench.offline(will=WILL)
    device.finish(EndReason.DEVICE_LOST)
    bench.sweep()
    bench.settle()
    upstream = bench.online()
    assert read_publish(4, upstream.sent[-1])[1:3] == (b"gone", 1)  # to learn that it has arrived
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert upstream.closed
    assert bench.over_called


def test_no_broker_is_looked_for_until_a_delayed_will_is_due(bench: Bench) -> None:
    """Nothing else of the device waits."""
    will = mqtt_packets.connect("dev", version=5, will_topic="s", will_properties=b"\x18\0\0\0\x3c")
    device = attached(bench, will)
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.available = True
    bench.sweep(10)
    bench.sweep(40)
    assert bench.dials == 0
    bench.sweep(20)
    bench.settle()
    bench.sweep()
    assert bench.dials == 1


def test_a_will_outlives_a_connect_that_is_damaged(bench: Bench) -> None:
    """Nobody knows the device's Keep Alive: it has vanished."""
    bench.offline(will=WILL)
    bench.settle()
    values = json.loads(bench.store.states["dev"])
    values["connect"] = "10ff"
    bench.store.states["dev"] = json.dumps(values)
    bench.open()
    bench.sweep()
    bench.settle()
    assert bench.store.messages == 1


def attached(bench: Bench, raw: bytes, behind: bytes = b"") -> Device:
    """Serve a device with this CONNECT, and what is `behind` it, without a broker."""
    if bench.stored.is_over:
        bench.open()
    bench.available = False
    device = Hasty(behind)
    device.stored = bench.stored
    found, connect = parsed(raw)
    bench.stored.attach(device, found, bench.treatment(raw, connect), ("10.0.0.1", ""), confirm=False)
    bench.settle()
    assert device.connack
    return device


# ---- leaving


def test_a_session_ends_with_a_device_that_keeps_none(bench: Bench) -> None:
    """It resumed one without Clean Start, and set no Session Expiry Interval (MQTT 5.0 §3.1.2.11.2)."""
    bench.offline(version=5)
    bench.stored.device_received(DISCONNECT)
    bench.settle()
    resumes = mqtt_packets.connect("dev", version=5, clean_start=False)
    assert attached(bench, resumes).connack[2] == 1
    bench.stored.device_received(DISCONNECT)
    bench.settle()
    assert attached(bench, resumes).connack[2] == 0


@pytest.mark.parametrize("how", ["starts anew", "keeps none"])
def test_subscriptions_end_with_their_session(bench: Bench, how: str) -> None:
    """The broker is not asked for them."""
    resumes = mqtt_packets.connect("dev", version=5, clean_start=False)
    attached(bench, resumes)
    bench.stored.device_received(mqtt_packets.subscribe("a/b", version=5) + publish(5, b"t", b"x", 1, 1))
    bench.settle()
    if how == "keeps none":
        bench.stored.device_received(DISCONNECT)
        bench.settle()
        bench.start()
        attached(bench, resumes)
    else:
        bench.offline(version=5, clean=True)
    assert 0x82 not in [raw[0] for raw in bench.online(version=5).sent]


def test_a_token_that_expires_is_followed_by_another_dial_at_once(bench: Bench) -> None:
    """The Will of a device that is away is the broker's then, also if the gateway crashes."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    device = bench.connect(5, will=WILL)
    bench.online(version=5)
    bench.up(b"x", version=5)
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    dials = bench.dials
    bench.sweep(21)
    assert bench.dials == dials + 1
    bench.settle()
    bench.start()
    bench.sweep(200)
    bench.settle()
    assert bench.online(version=5).payloads == [b"x"]


def test_bodies_of_messages_that_are_stored_are_always_checked(bench: Bench) -> None:
    """Whatever the configuration says: they are written again.  This has a wildcard in its topic."""
    bench.world = attrs.evolve(bench.world, check_bodies=False)
    bench.open()
    device = bench.offline()
    bench.stored.device_received(publish(4, b"t/#", b"x", 1, 1))
    assert device.ended is not None
    bench.settle()
    assert bench.store.messages == 0


def test_pubrels_that_the_disk_is_done_with_wait_no_more(bench: Bench) -> None:
    """A device is held for as many as the first time."""
    device = bench.offline()
    for _ in range(2):
        bench.stored.device_received(packet(PUBREL, b"\0\1") * 1000)
        while device.behind:
            device.behind = False
            bench.stored.device_received(b"")
        assert device.held
        bench.settle()
        assert not device.held


def test_a_device_that_leaves_with_nothing_waiting_is_gone_at_once(bench: Bench) -> None:
    """So is its connection to the broker, and what the store knew of it, since it kept no session."""
    device, upstream = bench.connect(clean=True), bench.online()
    bench.stored.device_received(mqtt_packets.subscribe("a/b"))
    bench.stored.upstream_received(packet(0x90, upstream.sent[-1][2:4] + b"\0"))
    bench.stored.device_received(DISCONNECT)
    assert device.ended == (EndReason.DEVICE_DISCONNECT, "")
    assert upstream.sent[-1] == DISCONNECT
    assert upstream.closed
    assert bench.over_called
    assert bench.stored.is_over
    assert not bench.cancelled
    bench.settle()
    assert "dev" not in bench.store.states


@pytest.mark.parametrize("is_found", [False, True])
def test_a_device_that_leaves_takes_its_connect_with_it(bench: Bench, is_found: bool) -> None:
    """What is looked for next is a connection for its messages, without its Will."""
    bench.offline(will=WILL)
    bench.up(b"x")
    bench.settle()
    bench.available = True
    bench.sweep()
    bench.sweep()
    assert bench.dials == 1
    upstream = bench.verified() if is_found else None
    bench.stored.device_received(DISCONNECT)
    assert bench.cancelled == (not is_found)
    assert upstream is None or upstream.closed
    bench.sweep()
    assert bench.dials == 2
    assert parsed(bench.verified().sent[0])[1].will is None


def test_a_half_done_delivery_does_not_keep_the_messages_of_a_device_that_is_gone(bench: Bench) -> None:
    """Nobody is there to complete it."""
    device = bench.connect()
    bench.online()
    bench.stored.upstream_received(publish(4, b"c", b"1", 2, 7))
    bench.stored.device_received(packet(PUBREC, b"\0\7"))
    bench.up(b"x")
    device.finish(EndReason.DEVICE_LOST)
    bench.lose()
    bench.settle()
    assert bench.online(session_present=False).payloads == [b"x"]


def test_a_subscription_that_is_granted_after_the_device_left_is_not_restored(bench: Bench) -> None:
    """The device does not know that it has it, and asks again."""
    device, upstream = bench.connect(), bench.online()
    bench.up(b"x")
    bench.stored.device_received(mqtt_packets.subscribe("a/b"))
    asked = upstream.sent[-1]
    device.finish(EndReason.DEVICE_LOST)
    bench.stored.upstream_received(packet(0x90, asked[2:4] + b"\0"))
    bench.settle()
    bench.connect()
    assert 0x82 not in [raw[0] for raw in bench.online(session_present=False).sent]


def test_a_device_whose_messages_are_removed_is_over_with_the_next_sweep(bench: Bench) -> None:
    """The store removes what is too old, and tells no session."""
    absent(bench, b"x")
    assert not bench.over_called
    bench.store.drop(bench.stored.backlog, lambda count, error: None)
    bench.settle()
    bench.sweep()
    assert bench.over_called
