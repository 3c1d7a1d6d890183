from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector, TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.mqtt.topics import TopicFilters
from tests.mqtt_packets import (
    acknowledgement,
    disconnect,
    fed,
    packet,
    pingreq,
    pingresp,
    properties_for,
    publish,
    string,
    subscribe,
    text,
    unsubscribe,
    user_property,
    variable_byte_integer,
)
from tests.test_mqtt_framer import cut, valid_packets

LIMIT = 100_000
VERSIONS = [3, 4, 5]
PREFIXES = TopicRules(publish_prefix="up/", subscribe_prefix="down/")
# Rules that look at everything and change nothing that these tests send.
WATCHFUL = TopicRules(publish=TopicFilters(("#",)), subscribe=TopicFilters(("#",)))


def from_device(rules: TopicRules = PREFIXES, version: int = 4, limit: int = LIMIT, **more: bool) -> DeviceInspector:
    return DeviceInspector(rules, ProtocolVersion(version), limit, **more)


def from_broker(rules: TopicRules = PREFIXES, version: int = 4, limit: int = LIMIT) -> BrokerInspector:
    return BrokerInspector(rules, ProtocolVersion(version), limit)


def outcome(inspector, chunks):
    passed = fed(inspector, *chunks)
    fault = inspector.error
    told = fault and (fault.reason, fault.reason_code, fault.detail)
    return passed, told, inspector.packets, inspector.disconnected, inspector.disconnect_code


def subscribe_5(body: bytes, first: int = 0x82) -> bytes:
    return packet(first, body)


# ---- in a framer's place


@settings(max_examples=200)
@given(data=st.data(), version=st.sampled_from(VERSIONS), sender=st.sampled_from(Sender))
def test_what_no_rule_changes_passes_as_through_a_framer(data, version, sender):
    """The same bytes, counts and endings, once the packets are whole."""
    packets = data.draw(st.lists(st.sampled_from(valid_packets(sender, version)), max_size=8))
    stream = b"".join(packets) + data.draw(st.sampled_from([b"", disconnect()]))
    answering = TopicRules(publish_prefix="up/")
    inspector = from_device(WATCHFUL, version) if sender is Sender.DEVICE else from_broker(answering, version)
    framer = Framer(sender, ProtocolVersion(version), LIMIT)
    chunks = cut(stream, data.draw(st.lists(st.integers(0, 2**20), max_size=6)))
    assert outcome(inspector, chunks) == outcome(framer, [stream])
    assert inspector.at_boundary


@settings(max_examples=300)
@given(
    data=st.data(),
    version=st.sampled_from(VERSIONS),
    rules=st.sampled_from(
        [PREFIXES, TopicRules(publish=TopicFilters(("t/#",)), max_qos=1), TopicRules(refuse_retain=True), WATCHFUL]
    ),
)
def test_how_the_stream_is_cut_makes_no_difference(data, version, rules):
    """What passes, and which fault is found, also when the stream is damaged."""
    packets = data.draw(st.lists(st.sampled_from(valid_packets(Sender.DEVICE, version)), max_size=6))
    stream = bytearray(b"".join(packets))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=2)):
        if stream:
            stream[place % len(stream)] = value
    chunks = cut(bytes(stream), data.draw(st.lists(st.integers(0, 2**20), max_size=6)))
    for make in (from_device, from_broker):
        assert outcome(make(rules, version), chunks) == outcome(make(rules, version), [bytes(stream)])


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_of_a_packet_passes_before_it_is_judged(version):
    """Not its first byte, until its last one is there; other packets are passed on as they come."""
    inspector = from_device(version=version)
    whole = publish(version=version)
    assert inspector.feed(pingreq() + whole[:-1]) == pingreq()
    assert inspector.at_boundary
    assert inspector.feed(whole[-1:]) == publish("up/t/1", version=version)


def test_a_packet_that_is_not_read_is_passed_on_in_pieces():
    """And a DISCONNECT could not be written in its middle."""
    inspector = from_broker(version=5)
    suback = packet(0x90, b"\0\1\0" + bytes(100))
    assert inspector.feed(suback[:50]) == suback[:50]
    assert not inspector.at_boundary
    assert inspector.feed(suback[50:]) == suback[50:]
    assert inspector.at_boundary


def test_what_is_held_is_bounded():
    """A packet above the limit is refused by its header."""
    inspector = from_device(limit=1000)
    assert inspector.feed(publish(payload=bytes(2000))[:3]) == b""
    assert inspector.error.reason is EndReason.PACKET_TOO_LARGE
    assert not inspector._held


# ---- refused


REFUSED = [
    (TopicRules(publish=TopicFilters(("a/#",))), lambda version: publish("b", version=version), 0x87),
    (TopicRules(publish=TopicFilters(("a/#",))), lambda version: publish("$share/g/a/b", version=version), 0x87),
    (TopicRules(publish=TopicFilters(())), lambda version: publish("b", version=version), 0x87),
    (TopicRules(publish=TopicFilters(("#",))), lambda version: publish("$SYS/x", version=version), 0x87),
    (
        TopicRules(publish=TopicFilters(("a/#",))),
        lambda version: publish("a/b" if version == 5 else "b", version=version, properties=text(0x08, "b")),
        0x87,
    ),
    (TopicRules(max_qos=1), lambda version: publish(qos=2, version=version), 0x9B),
    (TopicRules(max_qos=0), lambda version: publish(qos=1, version=version), 0x9B),
    (TopicRules(refuse_retain=True), lambda version: publish(retain=True, version=version), 0x9A),
    (TopicRules(subscribe=TopicFilters(("a/#",))), lambda version: subscribe("a/b", "#", version=version), 0x87),
    (TopicRules(subscribe=TopicFilters(("a/#",))), lambda version: subscribe("$share/g/#", version=version), 0x87),
    (TopicRules(subscribe=TopicFilters(("a/#",))), lambda version: subscribe("$share//b", version=version), 0x87),
    (TopicRules(subscribe=TopicFilters(("a/#",))), lambda version: subscribe("a/b#", version=version), 0x8F),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("rules", "make", "code"), REFUSED)
def test_what_a_rule_forbids_does_not_pass(rules, make, code, version):
    """Nor does anything after it; what came before does."""
    inspector = from_device(rules, version)
    assert inspector.feed(pingreq() + make(version) + pingreq()) == pingreq()
    assert (inspector.error.reason, inspector.error.reason_code) == (EndReason.RULE_REFUSED, code)
    assert inspector.feed(pingreq()) == b""


@pytest.mark.parametrize(
    ("rules", "sent", "topic"),
    [
        (TopicRules(publish=TopicFilters(("a/#",))), publish("b/\u202ec"), r'"b/\u202ec"'),
        (TopicRules(publish=TopicFilters(("a",))), publish("a", version=5, properties=text(0x08, "b" * 999)), '"bbb'),
        (TopicRules(subscribe=TopicFilters(("a/#",))), subscribe("c/#"), '"c/#"'),
    ],
)
def test_what_a_rule_forbids_is_named(rules, sent, topic):
    """The topic, cut and made printable."""
    inspector = from_device(rules, 5 if b"bbb" in sent else 4)
    inspector.feed(sent)
    assert topic in inspector.error.detail
    assert len(inspector.error.detail) < 250


@pytest.mark.parametrize("version", VERSIONS)
def test_a_disconnect_after_what_is_forbidden_is_not_the_end_of_the_story(version):
    """The session ends for what the rule forbids, so the broker publishes the Will."""
    inspector = from_device(TopicRules(refuse_retain=True), version)
    assert inspector.feed(publish(retain=True, version=version) + disconnect()) == b""
    assert not inspector.disconnected


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_rule_permits_passes_as_it_came(version):
    """To the byte, padded Remaining Length included."""
    rules = TopicRules(publish=TopicFilters(("a/#",)), subscribe=TopicFilters(("a/#",)), max_qos=1, refuse_retain=True)
    sent = [
        publish("a/b", qos=1, version=version, length_size=1 if version == 5 else 3),
        subscribe("a/b", "a/+/#", qos=1, version=version),
        unsubscribe("anything", version=version),
        acknowledgement(0x62),
    ]
    assert from_device(rules, version).feed(b"".join(sent)) == b"".join(sent)


def test_an_alias_stands_for_a_topic_that_was_judged_before():
    """MQTT 5.0 §3.3.2.3.4: the broker refuses one that was not set."""
    rules = TopicRules(publish=TopicFilters(("a",)), publish_prefix="up/")
    inspector = from_device(rules, 5)
    alias = b"\x23\0\1"
    assert inspector.feed(publish("a", version=5, properties=alias)) == publish("up/a", version=5, properties=alias)
    assert inspector.feed(publish("", version=5, properties=alias)) == publish("", version=5, properties=alias)
    inspector.feed(publish("b", version=5, properties=alias))
    assert inspector.error.reason is EndReason.RULE_REFUSED


# ---- changed


@pytest.mark.parametrize("version", VERSIONS)
def test_retain_is_stripped(version):
    """Only the flag: the message passes."""
    inspector = from_device(TopicRules(strip_retain=True), version)
    sent = publish(retain=True, qos=1, version=version) + publish(version=version)
    assert inspector.feed(sent) == publish(qos=1, version=version) + publish(version=version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_subscription_asks_for_no_more_than_may_be(version):
    """SUBACK tells the device what it got; the other options stay."""
    inspector = from_device(TopicRules(max_qos=1), version)
    assert inspector.feed(subscribe("a", "b", qos=2, version=version)) == subscribe("a", "b", qos=1, version=version)
    if version == 5:
        wanted, got = (b"\0\1\0" + string("a") + bytes([options]) for options in (0b0010_1110, 0b0010_1101))
        assert inspector.feed(subscribe_5(wanted)) == subscribe_5(got)


@settings(max_examples=200)
@given(
    version=st.sampled_from(VERSIONS),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    payload=st.binary(max_size=300),
    topic=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1).filter(
        lambda topic: not topic.startswith("$")
    ),
)
def test_a_prefix_is_added_and_taken_off_and_nothing_else_changes(version, qos, retain, payload, topic):
    """Packet Identifier, properties, flags and payload are those of the device."""
    rules = TopicRules(publish_prefix="hall/7/", subscribe_prefix="hall/7/")
    properties = user_property() + text(0x03, "text/plain") + b"\x09\0\2\0\xff"
    rest = {"version": version, "qos": qos, "retain": retain, "properties": properties, "packet_identifier": 4711}
    sent, there = (publish(name, payload, **rest) for name in (topic, f"hall/7/{topic}"))
    assert from_device(rules, version).feed(sent) == there
    assert from_broker(rules, version).feed(there) == sent


@pytest.mark.parametrize("version", VERSIONS)
def test_subscriptions_take_the_prefix_both_ways(version):
    """SUBSCRIBE and UNSUBSCRIBE alike, and each with its options and properties."""
    inspector = from_device(version=version)
    # A group without a name is none, and Mosquitto serves it all the same.
    filters = ("a/#", "$share/g/+/b", "$share//b/#", "$SYS/#")
    there = ("down/a/#", "$share/g/down/+/b", "$share//down/b/#", "$SYS/#")
    assert inspector.feed(subscribe(*filters, qos=1, version=version)) == subscribe(*there, qos=1, version=version)
    assert inspector.feed(unsubscribe(*filters, version=version)) == unsubscribe(*there, version=version)
    if version == 5:
        head = b"\0\1" + properties_for(5, b"\x0b" + variable_byte_integer(300) + user_property())
        sent, got = (subscribe_5(head + string(name) + b"\1") for name in ("a", "down/a"))
        assert inspector.feed(sent) == got


def test_an_answer_takes_the_other_prefix():
    """The device will subscribe to the Response Topic it names, and publish to one that it is told."""
    here, there = (
        publish(topic, version=5, properties=user_property() + text(0x08, answer))
        for topic, answer in (("ask", "answers/1"), ("up/ask", "down/answers/1"))
    )
    assert from_device(version=5).feed(here) == there
    asked, got = (
        publish(topic, version=5, properties=text(0x08, answer) + user_property())
        for topic, answer in (("down/do", "up/done"), ("do", "done"))
    )
    assert from_broker(version=5).feed(asked) == got


def test_an_answer_that_the_device_could_not_give_is_not_asked_of_it():
    """A Response Topic outside the prefix would become another one; `$`-topics are left alone both ways."""
    outside, without = (
        publish("down/do", version=5, properties=text(0x08, "elsewhere") + user_property()),
        publish("do", version=5, properties=user_property()),
    )
    assert from_broker(version=5).feed(outside) == without
    dollar = publish("$x/do", version=5, properties=text(0x08, "$x/done"))
    assert from_broker(version=5).feed(dollar) == dollar


# ---- withheld: what the broker sends from subscriptions that the rule does not permit (any more)


NARROW = TopicRules(subscribe=TopicFilters(("a/#", "$SYS/x")))


def withheld(rules: TopicRules, topic: str, version: int = 4, **more) -> bool:
    """Feed one message; whether nothing of it passes."""
    inspector = from_broker(rules, version)
    passed = inspector.feed(publish(topic, version=version, **more))
    assert inspector.error is None
    assert inspector.withheld == (not passed)
    return not passed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("rules", "passing", "kept_back"),
    [
        (NARROW, ["a", "a/b", "$SYS/x"], ["b", "ab", "$SYS/y", "$a/b"]),
        (PREFIXES, ["down/a", "down//", "$SYS/x"], ["down", "down/", "downa", "up/a", "a"]),
        (
            TopicRules(subscribe=TopicFilters(("a/#",)), subscribe_prefix="p/q/"),
            ["p/q/a", "p/q/a/b"],
            ["p/q", "p/q/", "p/q/b", "a/b", "$SYS/x"],
        ),
        (TopicRules(publish_prefix="up/"), ["a", "$SYS/x"], []),
    ],
)
def test_a_device_gets_what_it_may_subscribe_to(version, rules, passing, kept_back):
    """Also when the broker kept a subscription from before the rule, or `#` matched the parent of the prefix."""
    assert [topic for topic in passing + kept_back if withheld(rules, topic, version)] == kept_back


@pytest.mark.parametrize("version", VERSIONS)
def test_a_message_withheld_is_acknowledged(version):
    """The device cannot, and the broker would send it again; in 5.0 the broker is told why."""
    code = b"\x87" if version == 5 else b""
    inspector = from_broker(NARROW, version)
    for number in (1, 2):
        assert inspector.feed(publish("b", qos=number, packet_identifier=number, version=version)) == b""
    assert inspector.take_owed() == packet(0x40, b"\0\1" + code) + packet(0x50, b"\0\2" + code)
    assert inspector.take_owed() == b""
    inspector.feed(publish("b", version=version))
    assert inspector.take_owed() == b""
    others, released = (acknowledgement(0x62, packet_identifier=number) for number in (7, 2))
    if version == 5:
        # The code has ended the exchange: whatever comes is for the device.
        assert inspector.feed(others + released) == others + released
    else:
        assert inspector.feed(others + released) == others
        assert inspector.take_owed() == packet(0x70, b"\0\2")
        assert inspector.feed(released) == released


def test_what_a_broker_is_owed_is_bounded_by_its_packet_identifiers():
    """However often it sends without reading."""
    inspector = from_broker(NARROW)
    for _ in range(1000):
        inspector.feed(publish("b", qos=1, packet_identifier=7))
    assert inspector.take_owed() == packet(0x40, b"\0\7")


def test_a_topic_alias_stands_for_a_topic_that_was_judged():
    """And for another one when it is set anew; one that was never set is not known to the device either."""

    def message(topic: str, alias: int) -> bytes:
        return publish(topic, version=5, properties=b"\x23" + alias.to_bytes(2, "big"))

    inspector = from_broker(NARROW, 5)
    steps = [("a", 1, True), ("", 1, True), ("b", 1, False), ("", 1, False), ("b", 2, False), ("", 1, False)]
    steps += [("a/2", 1, True), ("", 1, True), ("", 2, False), ("", 3, False)]
    for topic, alias, passes in steps:
        assert bool(inspector.feed(message(topic, alias))) == passes, (topic, alias)


@pytest.mark.parametrize(
    "properties",
    [b"\x23\0\1" + user_property("k", "v" * 60_000) * 3, b"\x7f\x23\0\1"],
    ids=["too long to be read", "malformed"],
)
def test_a_withheld_message_whose_alias_cannot_be_read_may_have_changed_any(properties):
    """The device knows the topic of before, and would take what follows for a message on that."""
    inspector = from_broker(NARROW, 5, limit=1_000_000)
    alias = b"\x23\0\1"
    known = publish("", version=5, properties=alias)
    assert inspector.feed(publish("a", version=5, properties=alias))
    assert inspector.feed(known) == known
    assert inspector.feed(publish("b", version=5, properties=properties)) == b""
    assert inspector.feed(known) == b""
    assert inspector.feed(publish("a", version=5, properties=alias))
    assert inspector.feed(known) == known


def test_a_prefix_that_makes_too_much_of_a_packet():
    """Above the limit for packets, and above what a topic can be."""
    inspector = from_device(limit=300)
    assert inspector.feed(publish("t", bytes(294))) == b""
    assert "with its prefix, above the limit of 300" in inspector.error.detail
    inspector = from_device()
    assert inspector.feed(publish("t" * 65_534)) == b""
    assert (inspector.error.reason, inspector.error.reason_code) == (EndReason.PACKET_TOO_LARGE, 0x95)
    inspector = from_device(limit=300)
    assert inspector.feed(subscribe("t" * 290)) == b""
    assert inspector.error.reason is EndReason.PACKET_TOO_LARGE


# ---- what 3.1 has and 3.1.1 has not


def test_an_upgraded_device_sends_flags_that_3_1_1_allows():
    """DUP of SUBSCRIBE, UNSUBSCRIBE and PUBREL, DUP with QoS 0 and their unused bits would end the session."""
    inspector = from_device(TopicRules(), 3, upgraded=True)
    for first, wanted in ((0x8A, 0x82), (0x8B, 0x82), (0x82, 0x82)):
        sent = bytes([first]) + subscribe(version=3)[1:]
        assert inspector.feed(sent) == bytes([wanted]) + subscribe(version=3)[1:]
    assert inspector.feed(bytes([0xAA]) + unsubscribe()[1:]) == unsubscribe()
    assert inspector.feed(acknowledgement(0x6A)) == acknowledgement(0x62)
    assert inspector.feed(publish(version=3, duplicate=True)) == publish()
    assert inspector.feed(publish(version=3, qos=1, duplicate=True)) == publish(qos=1, duplicate=True)


def test_a_device_that_is_not_upgraded_keeps_its_flags():
    """A broker of 3.1 may use them."""
    sent = bytes([0x8A]) + subscribe(version=3)[1:]
    assert from_device(WATCHFUL, 3).feed(sent) == sent


# ---- the gateway's own PINGREQ


def test_the_answer_to_the_gateways_own_ping_does_not_reach_the_device():
    """One PINGRESP for each; the next one is the device's."""
    inspector = from_broker(TopicRules())
    inspector.expect_answer()
    inspector.expect_answer()
    assert inspector.feed(pingresp() + publish() + pingresp() + pingresp()) == publish() + pingresp()
    assert inspector.pings == 0


@pytest.mark.parametrize("version", [3, 4])
def test_an_answer_whose_length_is_padded_is_one(version):
    """Before 5.0 a Remaining Length may take more bytes than it needs."""
    padded = packet(0xD0, length_size=2)
    inspector = from_broker(version=version)
    inspector.expect_answer()
    assert inspector.feed(padded + padded) == padded
    assert (inspector.error, inspector.pings) == (None, 0)


# ---- packets that no version allows


@pytest.mark.parametrize(
    "sent",
    [
        publish("a/+"),
        publish("#"),
        packet(0x30, string("") + b"xx"),
        packet(0x32, string("abc")),
        packet(0x30, b"\0\x09abc"),
        packet(0x30, b"\0\1\xffx"),
        packet(0x82, b"\0\1" + string("a") + b"\3"),
        packet(0x82, b"\0\1" + string("a") + b"\x04"),
        packet(0x82, b"\0\1" + string("abc")),
    ],
)
def test_a_body_that_cannot_be_read_is_malformed(sent):
    """What is read is read strictly."""
    inspector = from_device(WATCHFUL)
    assert inspector.feed(sent) == b""
    assert inspector.error.reason in {EndReason.MALFORMED_PACKET, EndReason.PROTOCOL_ERROR}


@pytest.mark.parametrize(
    "properties",
    [b"\x23\0\0", b"\x23\0\1\x23\0\2", b"\x11\0\0\0\1", text(0x08, "a") * 2, b"\x0b\0", b"\x0b\x80\0"],
)
def test_properties_that_a_publish_must_not_have(properties):
    """Topic Alias 0, duplicates, what belongs elsewhere; from the broker they pass, for the device to judge."""
    inspector = from_device(WATCHFUL, 5)
    assert inspector.feed(publish(version=5, properties=properties)) == b""
    assert inspector.error.reason in {EndReason.MALFORMED_PACKET, EndReason.PROTOCOL_ERROR}
    inspector = from_broker(version=5)
    assert inspector.feed(publish("down/t", version=5, properties=properties)).endswith(b"21.5")
    assert inspector.error is None


def test_the_identifiers_of_several_subscriptions_may_come_with_one_message():
    """MQTT 5.0 §3.3.2.3.8; they stay."""
    properties = b"\x0b\x01\x0b\xac\x02"
    sent, got = (publish(topic, version=5, properties=properties) for topic in ("down/a", "a"))
    assert from_broker(version=5).feed(sent) == got


@pytest.mark.parametrize("topic", [b"\xff\xfe", b"a\0b", b"a/+/#", b"\xed\xa0\x80"])
@pytest.mark.parametrize("version", VERSIONS)
def test_topics_of_the_broker_are_compared_as_bytes(version, topic):
    """Whatever they are: within the prefix they lose it and pass, as on the fast path; outside they are withheld."""
    properties = properties_for(version, text(0x03, "x"))
    outside, there, here = (
        packet(0x30, len(name).to_bytes(2, "big") + name + properties + b"21.5")
        for name in (b"x/" + topic, b"down/" + topic, topic)
    )
    inspector = from_broker(version=version)
    assert inspector.feed(outside) == b""
    assert inspector.feed(there) == here
    assert inspector.error is None
    answers = from_broker(TopicRules(publish_prefix="up/"), version)
    assert answers.feed(outside) == outside
    wide, narrow = (from_broker(TopicRules(subscribe=TopicFilters((text_,))), version) for text_ in ("x/#", "y/#"))
    assert wide.feed(outside) == outside
    assert narrow.feed(outside) == b""
    assert wide.error is narrow.error is None


@pytest.mark.parametrize("body", [b"\0\1a" + b"\xff\xff\xff\xff\xff", b"\0\1a" + b"\x20\x26\0\1"])
def test_properties_of_the_brokers_that_cannot_be_read_pass(body):
    """The length of the packet is known, so nothing is lost."""
    inspector = from_broker(TopicRules(publish_prefix="up/"), version=5)
    sent = packet(0x30, body)
    assert inspector.feed(sent + publish("a", version=5)) == sent + publish("a", version=5)
    assert inspector.error is None


def test_a_topic_that_ends_beyond_its_packet_is_the_brokers_fault():
    """It cannot be judged, so it does not pass."""
    inspector = from_broker()
    assert inspector.feed(packet(0x30, b"\0\x09abc")) == b""
    assert inspector.error.reason is EndReason.UPSTREAM_PROTOCOL_ERROR


@pytest.mark.parametrize("version", VERSIONS)
def test_a_long_message_withheld_is_acknowledged_when_it_has_come(version):
    """Not before: the broker is still sending it."""
    sent = publish("b", bytes(9000), qos=1, version=version)
    inspector = from_broker(NARROW, version)
    assert inspector.feed(sent[:5000]) == b""
    assert inspector.at_boundary
    assert inspector.take_owed() == b""
    assert inspector.feed(sent[5000:] + pingresp()) == pingresp()
    assert inspector.take_owed()
    assert inspector.withheld == 1


# ---- what costs time or memory


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", [from_device, from_broker])
def test_a_payload_is_not_held(way, version):
    """Only the head is read; the payload passes as it arrives, whatever its size."""
    here, there = (
        publish(topic, bytes(60_000), version=version, properties=text(0x03, "text/plain")) for topic in ("t", "up/t")
    )
    inspector = from_device(version=version)
    if way is from_broker:
        here, there = there, here
        inspector = from_broker(TopicRules(subscribe_prefix="up/"), version)
    passed = b""
    for size in range(0, len(here), 7000):
        passed += inspector.feed(here[size : size + 7000])
        assert len(passed) >= size
        assert not inspector.withholds
    assert passed == there
    assert inspector.at_boundary


def test_a_device_may_send_a_thousand_elements_in_a_packet():
    """Properties or Topic Filters: more would take too long to read."""
    few, many = (user_property("", "") * count for count in (1000, 1001))
    cases = [
        (publish(version=5, properties=few), publish(version=5, properties=many)),
        (subscribe_5(b"\0\1" + properties_for(5, few) + string("a") + b"\0"), None),
        (None, subscribe_5(b"\0\1" + properties_for(5, many) + string("a") + b"\0")),
        (subscribe(*["a"] * 1000, version=5), subscribe(*["a"] * 1001, version=5)),
        (unsubscribe(*["a"] * 1000, version=5), unsubscribe(*["a"] * 1001, version=5)),
    ]
    for passes, refused in cases:
        if passes is not None:
            inspector = from_device(version=5)
            assert inspector.feed(passes)
            assert inspector.error is None
        if refused is not None:
            inspector = from_device(version=5)
            assert inspector.feed(refused) == b""
            assert (inspector.error.reason, inspector.error.reason_code) == (EndReason.PACKET_TOO_LARGE, 0x95)


@pytest.mark.parametrize(
    "start",
    [
        b"\x30" + variable_byte_integer(1_000_000) + string("t") + variable_byte_integer(500_000),
        b"\x82" + variable_byte_integer(500_000),
    ],
    ids=["properties", "filters"],
)
def test_what_is_read_is_of_limited_size(start):
    """It is refused by its length, and not collected."""
    inspector = from_device(version=5, limit=2_000_000)
    assert inspector.feed(start) == b""
    assert inspector.error.reason is EndReason.PACKET_TOO_LARGE
    assert not inspector._held


@pytest.mark.parametrize("properties", [user_property("", "") * 1001, text(0x03, "x" * 60_000) * 3])
def test_what_a_broker_sends_beyond_the_limits_passes_unread(properties):
    """The Topic Name loses its prefix all the same: a retained message would end the session again and again."""
    answer = text(0x08, "up/answer")
    there, here = (publish(topic, b"x" * 9000, version=5, properties=properties + answer) for topic in ("down/t", "t"))
    inspector = from_broker(version=5, limit=1_000_000)
    chunks = [there[at : at + 500] for at in range(0, len(there), 500)]
    assert outcome(inspector, chunks)[:2] == (here, None)
    assert from_broker(version=5, limit=1_000_000).feed(there) == here


@pytest.mark.parametrize("size", [131_072, 268_000_000])
def test_a_property_length_that_comes_byte_by_byte_ends_the_reading(size, monkeypatch):
    """It says that the properties pass unread when a part of it is held already: there is nothing to go back to."""
    turns = []

    def collect(self, *arguments):
        turns.append(arguments)
        assert len(turns) < 1000, "the inspector makes no progress"
        return real(self, *arguments)

    real = BrokerInspector._collect
    monkeypatch.setattr(BrokerInspector, "_collect", collect)
    head = string("down/t") + variable_byte_integer(size)
    sent = packet(0x30, head + bytes(100), length=len(head) + size)
    inspector = from_broker(version=5, limit=268_435_460)
    passed = b"".join(inspector.feed(sent[at : at + 1]) for at in range(len(sent)))
    assert passed == packet(0x30, string("t") + head[8:] + bytes(100), length=len(head) + size - 5)
    assert (inspector.packets, inspector.error) == (1, None)


def test_small_packets_are_passed_on_whole():
    """So that the gateway can send a PINGREQ of its own while a slow device is in the middle of one."""
    inspector = from_device(WATCHFUL)
    sent = publish("t", bytes(1000))
    for packet_ in (sent, acknowledgement(0x40)):
        assert inspector.feed(packet_[:-1]) == b""
        assert inspector.at_boundary
        assert inspector.withholds
        assert inspector.feed(packet_[-1:]) == packet_
        assert not inspector.withholds


def test_a_pingresp_in_the_middle_of_what_passes():
    """The gateway may ping while the broker is in the middle of a packet; that one passes first."""
    inspector = from_broker(TopicRules())
    sent = publish("t", bytes(1000))
    assert inspector.feed(sent[:500]) == sent[:500]
    inspector.expect_answer()
    assert not inspector.at_boundary
    assert inspector.feed(sent[500:] + pingresp()[:1]) == sent[500:]
    assert inspector.feed(pingresp()[1:] + pingresp() + sent[:5]) == pingresp() + sent[:5]
    assert not inspector.at_boundary
    assert (inspector.pings, inspector.packets) == (0, 4)


# ---- conformance


@pytest.mark.parametrize("version", [4, 5])
def test_a_lenient_rule_lets_pass_what_does_not_disturb_the_framing(version):
    """Both ways, inspected or not; the same is refused without it."""
    device = [
        publish(version=version, duplicate=True),
        packet(0x41, b"\0\1\0\0"),
        packet(0xC0, b"x"),
        packet(0x80, subscribe(version=version)[2:]),
    ]
    broker = [packet(0xD0, b"x"), packet(0xB0, b"\0\1\0\0"), packet(0x42, b"\0\1\0")]
    for sender, packets in ((Sender.DEVICE, device), (Sender.BROKER, broker)):
        for sent in packets:
            way = DeviceInspector if sender is Sender.DEVICE else BrokerInspector
            checkers = [
                Framer(sender, ProtocolVersion(version), LIMIT, lenient=True),
                way(WATCHFUL, ProtocolVersion(version), LIMIT, lenient=True),
            ]
            for checker in checkers:
                assert checker.feed(sent) == sent
                assert checker.error is None
    for checker in (Framer(Sender.DEVICE, ProtocolVersion(version), LIMIT), from_device(WATCHFUL, version)):
        assert checker.feed(packet(0xC0, b"x")) == b""
        assert checker.error.reason is EndReason.MALFORMED_PACKET


@pytest.mark.parametrize("first", range(16))
def test_the_flags_that_3_1_does_not_use_mean_nothing(first):
    """They pass to a broker of 3.1, and are as 3.1.1 wants them where the device is upgraded."""
    sent = [
        bytes([0x80 | first]) + subscribe(version=3)[1:],
        bytes([0xA0 | first]) + unsubscribe(version=3)[1:],
        *(bytes([kind | first]) + acknowledgement(0x40)[1:] for kind in (0x40, 0x50, 0x60, 0x70)),
        bytes([0xC0 | first, 0]),
        bytes([0xE0 | first, 0]),
    ]
    wanted = [
        subscribe(),
        unsubscribe(),
        *(acknowledgement(kind) for kind in (0x40, 0x50, 0x62, 0x70)),
        pingreq(),
        disconnect(),
    ]
    framer = Framer(Sender.DEVICE, ProtocolVersion(3), LIMIT)
    assert framer.feed(b"".join(sent)) == b"".join(sent)
    assert framer.disconnected
    inspector = from_device(TopicRules(), 3, upgraded=True)
    assert inspector.feed(b"".join(sent)) == b"".join(wanted)
    assert inspector.disconnected
    broker = Framer(Sender.BROKER, ProtocolVersion(3), LIMIT)
    down = [bytes([0xD0 | first, 0]), bytes([0x90 | first]) + b"\3\0\1\0", bytes([0xB0 | first]) + b"\2\0\1"]
    assert broker.feed(b"".join(down)) == b"".join(down)


def test_which_rules_need_the_slow_path():
    """Those that ask for nothing leave the session on the fast one."""
    assert not TopicRules().concern_device
    assert not TopicRules().concern_broker
    assert WATCHFUL.concern_broker
    assert not TopicRules(publish=TopicFilters(("#",)), max_qos=1).concern_broker
    for rules in (WATCHFUL, PREFIXES, TopicRules(max_qos=1), TopicRules(strip_retain=True)):
        assert rules.concern_device


@pytest.mark.parametrize(
    "rules",
    [
        {"publish": TopicFilters(("a",))},
        {"subscribe": TopicFilters(("a",))},
        {"max_qos": 1},
        {"strip_retain": True},
        {"refuse_retain": True},
        {"publish_prefix": "up/"},
        {"subscribe_prefix": "down/"},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_each_rule_alone_has_the_device_read(rules):
    """A rule that nobody applies is none; without any, packets pass unread."""
    assert TopicRules(**rules).concern_device
    assert not TopicRules().concern_device


@pytest.mark.parametrize("prefix", ["publish_prefix", "subscribe_prefix"])
def test_each_prefix_alone_has_the_broker_read(prefix):
    assert TopicRules(**{prefix: "p/"}).concern_broker
    assert not TopicRules(publish=TopicFilters(("a",))).concern_broker


def test_a_packet_may_be_as_large_as_the_limit_with_its_prefix():
    """And not a byte larger."""
    whole = publish("up/t", bytes(300), version=4)
    sent = publish("t", bytes(300), version=4)
    inspector = from_device(limit=len(whole))
    assert inspector.feed(sent) == whole
    assert inspector.error is None
    inspector = from_device(limit=len(whole) - 1)
    assert inspector.feed(sent) == b""
    assert inspector.error.reason is EndReason.PACKET_TOO_LARGE


def test_a_disconnect_has_its_code_behind_a_rule_too():
    inspector = from_device(version=5)
    inspector.feed(disconnect(code=4))
    assert (inspector.disconnected, inspector.disconnect_code) == (True, 4)


def test_no_turn_takes_more_than_a_few_packets() -> None:
    """However many come at once; the rest passes in the turns that follow, in order."""
    inspector = from_device(TopicRules(max_qos=1))
    packets = [publish(payload=b"%d" % number) for number in range(500)]
    passed = [inspector.feed(b"".join(packets))]
    while inspector.behind:
        passed.append(inspector.feed(b""))
    assert b"".join(passed) == b"".join(packets)
    assert max(part.count(b"t/1") for part in passed) <= 100
