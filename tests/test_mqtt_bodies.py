"""Heads of bodies: what is in order passes, what is not ends the session, and nothing waits longer than it must."""

from __future__ import annotations

import pytest

from gateway.mqtt.bodies import MOST_HELD, judge
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Sender
from gateway.mqtt.packets import ProtocolVersion
from tests.mqtt_packets import (
    acknowledgement,
    packet,
    pingreq,
    pingresp,
    publish,
    string,
    suback,
    subscribe,
    text,
    unsuback,
    unsubscribe,
    user_property,
    with_length,
)

DEVICE, BROKER = Sender.DEVICE, Sender.BROKER
LIMIT = 268_435_460
_ID = b"\0\1"
_LONG = user_property("k", "v" * 60_000) * 3


def fresh(sender: Sender = DEVICE, version: int = 4) -> CheckingFramer:
    return CheckingFramer(sender, ProtocolVersion(version), LIMIT)


def passes_at(sender: Sender, version: int, sent: bytes) -> int:
    """Feed byte by byte; return with how many bytes the first ones pass.  All have passed at the end."""
    framer, passed, first = fresh(sender, version), b"", 0
    for at in range(len(sent)):
        assert framer.at_boundary is (at == 0)
        passed += framer.feed(sent[at : at + 1])
        assert framer.packets == (1 if passed else 0)
        first = first or (at + 1 if passed else 0)
    assert (passed, framer.error) == (sent, None)
    assert framer.at_boundary
    return first


def refused_at(sender: Sender, version: int, sent: bytes) -> tuple[int, int]:
    """Feed byte by byte; return with how many bytes the packet is refused, and the reason code.  Nothing passes."""
    framer = fresh(sender, version)
    for at in range(len(sent)):
        assert framer.feed(sent[at : at + 1]) == b""
        if framer.error is not None:
            return at + 1, framer.error.reason_code
    raise AssertionError("it was not refused")


@pytest.mark.parametrize(
    ("sender", "version", "sent", "head"),
    [
        (DEVICE, 4, publish("a/b", b"payload"), 7),
        (DEVICE, 4, publish("a/b"), 7),
        (DEVICE, 4, publish("a/b", b"payload", qos=1), 9),
        (DEVICE, 4, publish("a/b", b"", qos=2), 9),
        (DEVICE, 4, publish("é", b"payload"), 6),
        (DEVICE, 5, publish("a/b", b"payload", version=5), 8),
        (DEVICE, 5, publish("a/b", b"", version=5), 8),
        (DEVICE, 5, publish("a/b", b"payload", version=5, qos=1), 10),
        (DEVICE, 5, publish("a/b", b"payload", version=5, properties=b"\x01\x01"), 10),
        (DEVICE, 5, publish("", b"payload", version=5, properties=b"\x23\0\1"), 8),
        (DEVICE, 5, publish("a", b"x", version=5, properties=user_property("k" * 100, "v" * 100)), 3 + 3 + 2 + 205),
        (DEVICE, 4, subscribe("a/+", "#"), 2 + 2 + 6 + 4),
        (DEVICE, 5, subscribe("a/+", version=5), 2 + 2 + 1 + 6),
        (DEVICE, 4, unsubscribe("a/+"), 2 + 2 + 5),
        (DEVICE, 4, acknowledgement(0x40), 4),
        (DEVICE, 5, acknowledgement(0x40), 4),
        (DEVICE, 5, acknowledgement(0x50, code=0x10), 4),
        (DEVICE, 5, packet(0x62, _ID + b"\0" + with_length(text(0x1F, "why"))), 12),
        (DEVICE, 5, packet(0x70, _ID + b"\0\0"), 6),
        (BROKER, 4, suback(0, 1), 4),
        (BROKER, 5, suback(0, 1, version=5), 5),
        (BROKER, 5, packet(0x90, _ID + with_length(user_property()) + b"\0"), 2 + 2 + 14),
        (BROKER, 4, unsuback(), 4),
        (BROKER, 5, unsuback(0, version=5), 5),
        (DEVICE, 4, pingreq(), 2),
        (BROKER, 4, pingresp(), 2),
    ],
)
def test_a_packet_passes_as_soon_as_its_head_is_whole(sender, version, sent, head):
    assert passes_at(sender, version, sent) == head
    framer = fresh(sender, version)
    assert framer.feed(sent + sent) == sent + sent
    assert (framer.packets, framer.error) == (2, None)


@pytest.mark.parametrize(
    ("sender", "version", "sent", "at", "code"),
    [
        # The length of the topic alone says that it goes beyond its packet.
        (DEVICE, 4, packet(0x30, b"\0\7topic!"), 4, 0x81),
        (DEVICE, 4, packet(0x32, b"\0\5topic\1"), 4, 0x81),
        (DEVICE, 5, packet(0x30, b"\0\5topic"), 4, 0x81),
        (DEVICE, 4, publish("a/+"), 7, 0x81),
        (DEVICE, 4, publish("#", b"payload"), 5, 0x81),
        (DEVICE, 4, publish("a\0b"), 7, 0x81),
        (DEVICE, 4, packet(0x30, b"\0\2\xff\xffx"), 6, 0x81),
        (DEVICE, 4, publish("", b"payload"), 4, 0x82),
        (DEVICE, 5, publish("", b"payload", version=5), 5, 0x82),
        (DEVICE, 4, publish("a", qos=1, packet_identifier=0), 7, 0x82),
        (DEVICE, 5, publish("a", version=5, properties=b"\x23\0\0"), 9, 0x94),
        (DEVICE, 5, publish("a", version=5, properties=b"\x11\0\0\0\1"), 11, 0x81),
        (DEVICE, 5, packet(0x30, b"\0\1a\x05\x26\0\0"), 6, 0x81),
        (DEVICE, 5, packet(0x30, b"\0\1a\xff\xff\xff\xff\1"), 9, 0x81),
        (DEVICE, 5, packet(0x30, b"\0\1a\x80"), 6, 0x81),
        (DEVICE, 4, subscribe("a/+", packet_identifier=0), 4, 0x82),
        (DEVICE, 4, unsubscribe("a/+", packet_identifier=0), 4, 0x82),
        (DEVICE, 4, subscribe("a+"), 2 + 2 + 5, 0x81),
        (DEVICE, 4, unsubscribe("#/a"), 2 + 2 + 5, 0x81),
        (DEVICE, 4, packet(0x82, _ID + string("a") + b"\3"), 8, 0x81),
        (DEVICE, 4, acknowledgement(0x40, packet_identifier=0), 4, 0x82),
        (DEVICE, 5, acknowledgement(0x40, packet_identifier=0, code=0), 4, 0x82),
        (DEVICE, 5, packet(0x40, _ID + b"\0" + with_length(b"\x23\0\1")), 9, 0x81),
        (DEVICE, 5, packet(0x40, _ID + b"\0\x05\x26\0\0"), 6, 0x81),
        (BROKER, 4, suback(0, packet_identifier=0), 4, 0x82),
        (BROKER, 5, packet(0x90, _ID + with_length(b"\x23\0\1") + b"\0"), 8, 0x81),
        (BROKER, 4, unsuback(packet_identifier=0), 4, 0x82),
    ],
)
def test_a_packet_is_refused_as_soon_as_its_fault_is_there(sender, version, sent, at, code):
    assert refused_at(sender, version, sent) == (at, code)
    good = pingreq() if sender is DEVICE else pingresp()
    framer = fresh(sender, version)
    assert framer.feed(good + sent + good) == good
    assert framer.error is not None
    assert (framer.error.reason_code, framer.packets) == (code, 1)
    assert framer.feed(good) == b""


@pytest.mark.parametrize("topic", [b"\xff\xfe", b"a\0b", b"a/+/#", b"\xed\xa0\x80"])
@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_topic_of_a_broker_may_be_any_bytes(version, topic):
    """They are for the device to judge, with and without a rule; the rest of the head is checked as ever."""
    head = len(topic).to_bytes(2, "big") + topic
    rest = b"\0" if version == 5 else b""
    for sent in (packet(0x30, head + rest + b"x"), packet(0x32, head + _ID + rest + b"x")):
        passes_at(BROKER, version, sent)
        refused_at(DEVICE, version, sent)
        framer = fresh(BROKER, version)
        assert framer.feed(sent + pingresp()) == sent + pingresp()
    assert refused_at(BROKER, version, packet(0x32, head + b"\0\0" + rest)) == (2 + len(head) + 2, 0x82)
    if version == 5:
        assert refused_at(BROKER, 5, packet(0x30, head + with_length(b"\x23\0\0")))[1] == 0x94


@pytest.mark.parametrize(
    ("version", "sent", "head"),
    [
        (5, publish("a", b"x", version=5, properties=_LONG), 4 + 3 + 3),
        (5, publish("", b"x", version=5, properties=_LONG), 4 + 2 + 3),
        (5, packet(0x40, _ID + b"\0" + with_length(_LONG)), 4 + 3 + 3),
        (4, packet(0x82, _ID + bytes(MOST_HELD)), 4 + 2),
    ],
    ids=["properties", "properties and no topic", "properties of an acknowledgement", "Topic Filters"],
)
def test_what_is_too_long_to_be_held_passes_unread(version, sent, head):
    framer = fresh(version=version)
    assert [framer.feed(sent[at : at + 1]) for at in range(head)] == [b""] * (head - 1) + [sent[:head]]
    assert framer.feed(sent[head:]) == sent[head:]
    assert (framer.packets, framer.error, framer.at_boundary) == (1, None, True)


def test_the_most_that_is_held():
    """A SUBSCRIBE of that many bytes is read, and of one more is not."""
    filters = string("a" * 65_535) + b"\0" + string("b" * (MOST_HELD - 2 - 65_538 - 3)) + b"\0"
    good = packet(0x82, _ID + filters)
    assert len(good) == MOST_HELD + 4
    bad = good[:-1] + b"\3"
    framer = fresh()
    assert framer.feed(bad) == b""
    assert framer.error is not None
    assert fresh().feed(good) == good
    longer = packet(0x82, _ID + filters[:-1] + b"\3\0")
    assert fresh().feed(longer) == longer


@pytest.mark.parametrize("topic", ["a/+", "a\0"])
def test_a_topic_is_read_where_its_properties_are_too_long(topic):
    framer = fresh(version=5)
    assert framer.feed(publish(topic, version=5, properties=_LONG)) == b""
    assert framer.error is not None


def test_the_second_message_on_a_topic_is_judged_as_the_first():
    """The topic is known then; the rest of the head is not."""
    for version, again in (
        (4, publish("t", qos=1, packet_identifier=0)),
        (5, publish("t", version=5, qos=1, packet_identifier=0)),
        (5, publish("t", version=5, properties=b"\x23\0\0")),
    ):
        framer = fresh(version=version)
        first = publish("t", version=version)
        assert framer.feed(first + again) == first
        assert framer.error is not None


def test_a_head_that_waits_is_not_judged_again_with_each_byte(monkeypatch):
    """Only when as many bytes have come as were asked for: a slow sender must not cost more than a fast one."""
    asked = []

    def counted(*arguments, **options):
        asked.append(arguments)
        return judge(*arguments, **options)

    monkeypatch.setattr("gateway.mqtt.checking.judge", counted)
    sent = subscribe("a" * 1000)
    framer = fresh()
    assert b"".join(framer.feed(sent[at : at + 1]) for at in range(len(sent))) == sent
    assert len(asked) < 5


@pytest.mark.parametrize(
    ("sender", "version", "sent"),
    [
        *((DEVICE, version, publish("a/b", bytes(64), version=version)) for version in (4, 5)),
        *((DEVICE, version, publish("a/b", bytes(64), version=version, qos=1)) for version in (4, 5)),
        *((BROKER, version, publish("a/b", bytes(200), version=version, qos=2)) for version in (4, 5)),
        (DEVICE, 4, publish("a/b", b"") + publish("b/c", b"")),
        (DEVICE, 4, publish("a" * 200, bytes(20_000))),
        *((BROKER, version, acknowledgement(kind)) for version in (4, 5) for kind in (0x40, 0x50, 0x62, 0x70)),
        (DEVICE, 5, acknowledgement(0x50, code=0x10)),
        (DEVICE, 4, pingreq()),
        (BROKER, 5, pingresp()),
    ],
)
def test_packets_of_the_plainest_kinds_take_no_closer_look(monkeypatch, sender, version, sent):
    """They are most of what is relayed, and `judge` costs ten times as much as all else that is done to them."""
    monkeypatch.setattr("gateway.mqtt.checking.judge", None)
    framer = fresh(sender, version)
    assert [framer.feed(sent * count) for count in (1, 3, 1)] == [sent, sent * 3, sent]
    assert framer.error is None


def test_a_stream_is_lent_where_it_stands():
    """With a head that is not whole, which whoever borrows it goes on from."""
    sent = publish("topic", b"payload")
    for end, lent in ((0, (0, b"")), (1, (0, sent[:1])), (5, (0, sent[:5])), (10, (len(sent) - 10, b""))):
        framer = fresh()
        framer.feed(sent[:end])
        assert framer.lend() == lent
        framer.take_back(*lent)
        assert framer.feed(sent[end:] + pingreq()).endswith(sent[max(end, 10) :] + pingreq())
        assert framer.at_boundary
    framer = fresh()
    framer.feed(publish("#"))
    assert framer.lend() is None
