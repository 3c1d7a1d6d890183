"""The head of a PUBLISH: how much of it is known to be needed as its bytes come, and its answer's prefix."""

from __future__ import annotations

import pytest

from gateway.errors import PacketError
from gateway.mqtt import packets
from gateway.mqtt.packets import MAX_ELEMENTS, ProtocolVersion
from gateway.mqtt.relayed import (
    Delivery,
    Publish,
    Subscribe,
    head_size,
    lower_qos,
    read_delivery,
    read_publish,
    read_subscribe,
    read_unsubscribe,
    topic_size,
    without_prefixes,
    write_packet,
    write_publish,
    write_subscribe,
)
from tests import mqtt_packets as mqtt

V4, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(("first", "identifier"), [(0x30, 0), (0x31, 0), (0x32, 2), (0x34, 2), (0x3D, 2)])
def test_the_size_of_topic_and_identifier(first: int, identifier: int, start: int) -> None:
    """Two bytes say how long the topic is; a Packet Identifier follows it above QoS 0."""
    data = b"?" * start + mqtt.string("topic") + b"\0\7"
    for known in (0, 1):
        assert topic_size(first, data[: start + known], start) == 2
    for known in (2, 3, 7, 9):
        assert topic_size(first, data[: start + known], start) == 2 + 5 + identifier


@pytest.mark.parametrize("first", [0x30, 0x32])
def test_the_size_of_a_head_is_known_when_its_bytes_are_there(first: int) -> None:
    """In 5.0 the Property Length is part of it, which has up to four bytes; what is behind it does not count."""
    head = mqtt.string("t") + (b"\0\7" if first & 6 else b"")
    properties = mqtt.with_length(mqtt.user_property() * 20)
    assert properties[0] & 0x80
    data = b"?" + head + properties + b"payload"
    for known in range(1, len(data) + 1):
        part = data[:known]
        size = head_size(V5, first, part, 1)
        is_complete = known - 1 >= size and head_size(V5, first, data, 1) == size
        assert is_complete == (known - 1 >= len(head) + len(properties))
        # Who waits for so many bytes waits neither for none nor for what does not belong to it.
        assert is_complete or known - 1 < size <= len(head) + len(properties)
    assert head_size(V5, first, data, 1) == len(head) + len(properties)
    assert head_size(V4, first, data, 1) == len(head)


def test_a_property_length_that_does_not_end_is_read_to_be_refused() -> None:
    """Four bytes of it are enough."""
    head = mqtt.string("t")
    assert head_size(V5, 0x30, head + b"\xff" * 9, 0) == len(head) + 4


@pytest.mark.parametrize(
    ("answer", "kept"), [("in/a", "a"), ("in/", None), ("in", None), ("out/a", None), ("$SYS/a", "$SYS/a")]
)
def test_an_answer_goes_where_the_device_would_subscribe(answer: str, kept: str | None) -> None:
    """Outside the prefix, or with nothing behind it, the Response Topic is removed; those of the broker stay."""
    body = mqtt.publish("in/t", b"x", version=5, properties=mqtt.text(0x08, answer))[2:]
    found = without_prefixes(V5, 0x30, body, 0, b"in/", b"in/")
    assert found == mqtt.publish("t", b"x", version=5, properties=b"" if kept is None else mqtt.text(0x08, kept))


@pytest.mark.parametrize(
    ("first", "qos", "retain"), [(0x30, 0, False), (0x31, 0, True), (0x32, 1, False), (0x3D, 2, True)]
)
@pytest.mark.parametrize("version", [V4, V5])
def test_a_publish_is_read(version: ProtocolVersion, first: int, qos: int, retain: bool) -> None:
    """By a device's rule and, without its Response Topic, from a broker; the payload may be cut."""
    properties = mqtt.text(0x08, "answer") + b"\x23\x01\x02"
    body = mqtt.string("tö") + (b"\x01\x07" if qos else b"")
    body += mqtt.with_length(properties) if version is V5 else b""
    answer, alias = ("answer", 0x0102) if version is V5 else (None, None)
    for payload in (b"", b"payload"):
        assert read_publish(version, first, body + payload) == Publish("tö", qos, retain, answer)
        assert read_delivery(version, first, body + payload) == Delivery("tö", qos, 0x0107 if qos else 0, alias, True)
    for cut in range(len(body)):
        if cut < len(mqtt.string("tö")) + (2 if qos else 0) or version is V5:
            with pytest.raises(PacketError):
                read_publish(version, first, body[:cut])


@pytest.mark.parametrize("topic", ["a/+", "#", "a+b"])
def test_a_topic_name_with_a_wildcard_is_malformed(topic: str) -> None:
    """From a device. What a broker sends is judged by nobody here."""
    with pytest.raises(PacketError) as caught:
        read_publish(V4, 0x30, mqtt.string(topic))
    assert caught.value.reason_code == 0x81
    assert read_delivery(V4, 0x30, mqtt.string(topic)).topic == topic


def test_a_topic_name_is_empty_only_with_an_alias() -> None:
    """MQTT 5.0 §3.3.2.1."""
    assert read_publish(V5, 0x30, mqtt.string("") + b"\x03\x23\x00\x01") == Publish("", 0, False, None)
    for version, body in ((V4, mqtt.string("") + b"payload"), (V5, mqtt.string("") + b"\x00")):
        with pytest.raises(PacketError) as caught:
            read_publish(version, 0x30, body)
        assert caught.value.reason_code == 0x82


@pytest.mark.parametrize(
    "properties",
    [
        b"",  # no Property Length
        b"\x80",  # half a Property Length
        b"\x80\x80\x80\x80\x01",
        b"\x05\x23\x00",  # the packet ends within them
        b"\x0a" + mqtt.text(0x03, "c"),  # as well, cut between two
        b"\x02\x04\x00",  # an unknown one
        b"\x02\x23\x00",  # half a one
        mqtt.with_length(mqtt.user_property("x" * 50_000, "x" * 50_000) * 2),  # more than is read
    ],
)
def test_a_delivery_whose_properties_cannot_be_read_is_told_apart(properties: bytes) -> None:
    """It may have a Topic Alias; and it passes a prefix as it is, but for its Topic Name."""
    body = mqtt.string("in/t") + b"\0\7" + properties
    assert read_delivery(V5, 0x32, body) == Delivery("in/t", 1, 7, None, False)
    assert read_delivery(V4, 0x32, body) == Delivery("in/t", 1, 7, None, True)
    assert without_prefixes(V5, 0x32, body, 0, b"in/", b"in/") == write_packet(
        0x32, mqtt.string("t") + b"\0\7" + properties
    )


def test_a_topic_of_a_broker_may_be_any_bytes() -> None:
    """What is not UTF-8 stays the same when it is written."""
    assert read_delivery(V4, 0x30, b"\0\3t\xff/").topic == "t\udcff/"
    for body in (b"\0", b"\0\2t", b"\0\1t\0"):
        with pytest.raises(PacketError):
            read_delivery(V4, 0x32, body)


def test_a_prefix_is_taken_away_only_from_topics_below_it() -> None:
    """The parent topic, which `prefix/#` also matches, and others stay; nothing is written if nothing changes."""

    def without(topic: bytes, prefix: bytes, first: int = 0x30, missing: int = 0) -> bytes | None:
        body = len(topic).to_bytes(2, "big") + topic + (b"\0\7" if first & 6 else b"") + b"payload"
        return without_prefixes(V4, first, body, missing, prefix, b"in/")

    assert without(b"in/\xff+", b"in/") == write_packet(0x30, b"\0\2\xff+payload")
    empty = b"\0\4in/a"
    assert without_prefixes(V4, 0x30, empty, 0, b"in/", b"in/") == write_packet(0x30, b"\0\1a")
    assert without(b"in/a", b"in/", 0x34) == write_packet(0x34, b"\0\1a\0\7payload")
    assert without(b"in/a", b"in/", 0x30, 300) == b"\x30\xb6\x02\0\1apayload"
    for topic, prefix in ((b"in/", b"in/"), (b"in", b"in/"), (b"out/a", b"in/"), (b"in/a", b"")):
        assert without(topic, prefix) is None
    assert without_prefixes(V4, 0x30, b"\0\x09in/a", 0, b"in/", b"in/") is None, "the topic is not whole"


def test_an_answer_stays_where_no_prefix_is_for_it() -> None:
    """Only the topic changes then; a packet in which only the answer changes is written as well."""
    properties = mqtt.text(0x03, "c") + mqtt.text(0x08, "in/a")
    body = mqtt.publish("in/t", b"x", version=5, properties=properties)[2:]
    assert without_prefixes(V5, 0x30, body, 0, b"in/", b"") == mqtt.publish("t", b"x", version=5, properties=properties)
    changed = mqtt.publish("in/t", b"x", version=5, properties=mqtt.text(0x03, "c") + mqtt.text(0x08, "a"))
    assert without_prefixes(V5, 0x30, body, 0, b"", b"in/") == changed
    # Behind a Packet Identifier, too.
    numbered = mqtt.publish("in/t", b"x", version=5, qos=1, properties=properties)[2:]
    answer = mqtt.text(0x03, "c") + mqtt.text(0x08, "a")
    assert without_prefixes(V5, 0x32, numbered, 0, b"", b"in/") == mqtt.publish(
        "in/t", b"x", version=5, qos=1, properties=answer
    )
    plain = mqtt.publish("t", b"x", version=5, properties=mqtt.text(0x03, "c"))[2:]
    assert without_prefixes(V5, 0x30, plain, 0, b"in/", b"in/") is None


@pytest.mark.parametrize("answer", ["in/", "in", "out/a"])
def test_an_answer_that_is_not_below_its_prefix_is_removed(answer: str) -> None:
    """The prefix itself would leave an empty Response Topic, which is malformed."""
    body = mqtt.publish("t", b"x", version=5, properties=mqtt.text(0x03, "c") + mqtt.text(0x08, answer))[2:]
    without = mqtt.publish("t", b"x", version=5, properties=mqtt.text(0x03, "c"))
    assert without_prefixes(V5, 0x30, body, 0, b"", b"in/") == without


@pytest.mark.parametrize("first", [0x30, 0x32])
def test_a_publish_is_written_with_other_topics(first: int) -> None:
    """All else stays byte for byte; the rest of the payload follows."""
    identifier = b"\0\7" if first & 6 else b""
    properties = mqtt.text(0x03, "c") + mqtt.text(0x08, "a")
    body = mqtt.string("t") + identifier
    assert write_publish(V4, first, body + b"payload", 0, "in/t", None) == write_packet(
        first, mqtt.string("in/t") + identifier + b"payload"
    )
    whole = body + mqtt.with_length(properties) + b"pay"
    for answer, expected in (("in/a", mqtt.text(0x08, "in/a")), (None, b"")):
        new = mqtt.string("in/t") + identifier + mqtt.with_length(mqtt.text(0x03, "c") + expected) + b"pay"
        assert write_publish(V5, first, whole, 4, "in/t", answer) == write_packet(first, new, 4)
    assert write_packet(0x30, b"x", 4) == b"\x30\x05x"
    with pytest.raises(ValueError, match="65"):
        write_publish(V4, first, body, 0, "x" * 65536, None)


V3 = ProtocolVersion.MQTT_3_1


@pytest.mark.parametrize(
    ("version", "options", "is_good", "is_tolerated"),
    [
        *((version, qos, True, True) for version in (V3, V4, V5) for qos in (0, 1, 2)),
        *((version, 3, False, False) for version in (V3, V4, V5)),
        *((V4, 1 << bit, False, True) for bit in range(2, 8)),
        *((V3, 1 << bit | 1, True, True) for bit in range(2, 8)),
        (V5, 0b00101110, True, True),
        (V5, 0b00011101, True, True),
        (V5, 0b00110000, False, False),  # Retain Handling 3
        (V5, 0b00110001, False, False),
        (V5, 0b01000000, False, True),
        (V5, 0b10000000, False, True),
    ],
)
def test_subscription_options(version: ProtocolVersion, options: int, is_good: bool, is_tolerated: bool) -> None:
    """MQTT 5.0 §3.8.3.1, MQTT 3.1.1 §3.8.3, MQTT 3.1 §3.8: what is reserved, and what nobody can serve."""
    head = b"\0\7" + (b"\0" if version is V5 else b"")
    body = head + mqtt.string("a/#") + bytes((options,))
    for lenient, is_read in ((False, is_good), (True, is_tolerated)):
        if is_read:
            assert read_subscribe(version, body, lenient=lenient) == Subscribe(head, (("a/#", options),))
            continue
        with pytest.raises(PacketError) as caught:
            read_subscribe(version, body, lenient=lenient)
        assert caught.value.reason_code == 0x81


@pytest.mark.parametrize("version", [V4, V5])
def test_filters_are_read_and_written(version: ProtocolVersion) -> None:
    """With the identifier and the properties before them as they are; there is at least one, and each is whole."""
    head = b"\1\7" + (mqtt.with_length(b"\x0b\x05" + mqtt.user_property()) if version is V5 else b"")
    options = head + mqtt.string("a") + b"\1" + mqtt.string("b/+") + b"\2"
    subscribe = read_subscribe(version, options)
    assert subscribe == Subscribe(head, (("a", 1), ("b/+", 2)))
    assert write_subscribe(0x82, subscribe) == write_packet(0x82, options)
    bare = b"\1\7" + (mqtt.with_length(mqtt.user_property()) if version is V5 else b"")
    plain = bare + mqtt.string("a") + mqtt.string("b/+")
    unsubscribe = read_unsubscribe(version, plain)
    assert unsubscribe == Subscribe(bare, (("a", None), ("b/+", None)))
    assert write_subscribe(0xA2, unsubscribe) == write_packet(0xA2, plain)
    for read, start, whole in ((read_subscribe, head, options), (read_unsubscribe, bare, plain)):
        with pytest.raises(PacketError) as caught:
            read(version, start)
        assert caught.value.reason_code == 0x82
        assert "without a Topic Filter" in caught.value.detail
        with pytest.raises(PacketError) as caught:
            read(version, whole[:-1])
        assert caught.value.reason_code == 0x81
    if version is V5:
        with pytest.raises(PacketError, match="not allowed in UNSUBSCRIBE"):
            read_unsubscribe(V5, head + mqtt.string("a"))


def test_the_number_of_filters_is_limited() -> None:
    """Each costs time."""
    one = mqtt.string("a")
    assert len(read_unsubscribe(V4, b"\0\7" + one * MAX_ELEMENTS).filters) == MAX_ELEMENTS
    with pytest.raises(PacketError) as caught:
        read_unsubscribe(V4, b"\0\7" + one * (MAX_ELEMENTS + 1))
    assert caught.value.reason_code == 0x95


def test_topic_filters_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet may have a thousand of them; none is decoded by itself while all are in order."""
    monkeypatch.setattr(packets, "decode_text", lambda encoded, what: pytest.fail(f"{encoded!r}, {what}"))
    filters = [f"ü/{number}" for number in range(MAX_ELEMENTS)]
    body = b"".join(mqtt.string(text) for text in filters)
    assert [text for text, _ in read_unsubscribe(V4, b"\0\7" + body).filters] == filters
    body = b"".join(mqtt.string(text) + bytes((number % 3,)) for number, text in enumerate(filters))
    assert read_subscribe(V4, b"\0\7" + body).filters == tuple(
        (text, number % 3) for number, text in enumerate(filters)
    )


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        (b"\0\1\xff\0", "not UTF-8"),
        (b"\0\1\0\0", r"U\+0000"),
        (b"\0\1\xff", "not UTF-8"),
        (b"\0\1\xff\3", "not UTF-8"),
        (b"\0\1a\3", "options 0b00000011"),
        # Together they would be a character.
        (b"\0\1\xc3\0\0\1\xbc\0", "not UTF-8"),
    ],
)
@pytest.mark.parametrize("rest", [b"", b"\0", b"\0\1a\3", (b"\0\1a\0") * MAX_ELEMENTS], ids=len)
def test_the_first_fault_of_a_filter_is_the_one_that_is_named(wrong: bytes, detail: str, rest: bytes) -> None:
    """Not one behind it."""
    if wrong == b"\0\1\xff" and rest:
        rest = b"\3"  # Its options, which are as wrong, but come later.
    with pytest.raises(PacketError, match=detail) as caught:
        read_subscribe(V4, b"\0\7" + mqtt.string("a") + b"\0" + wrong + rest)
    assert caught.value.reason_code == 0x81


@pytest.mark.parametrize("rest", [b"\0", b"\0\1", b"\0\5", b"\0\2a"])
def test_a_filter_that_is_cut_short_is_malformed(rest: bytes) -> None:
    with pytest.raises(PacketError, match="ends within the Topic Filter"):
        read_unsubscribe(V4, b"\0\7" + mqtt.string("a") + rest)


def test_a_qos_is_lowered_and_the_other_options_stay() -> None:
    """Never raised."""
    assert [lower_qos(0b00101110, limit) for limit in (0, 1, 2)] == [0b00101100, 0b00101101, 0b00101110]
    assert [lower_qos(0b00000001, limit) for limit in (0, 1, 2)] == [0, 1, 1]
