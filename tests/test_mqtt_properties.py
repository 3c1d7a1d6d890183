"""Properties of MQTT 5.0 (§2.2.2): read strictly, found and replaced in place; held against paho's tables."""

from __future__ import annotations

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from gateway.errors import PacketError
from gateway.mqtt import packets
from gateway.mqtt.packets import MAX_ELEMENTS, decode_text, encode_remaining_length
from gateway.mqtt.properties import (
    PropertyId,
    end_of_properties,
    find_property,
    parse_properties,
    replace_property,
    replace_string_property,
    without_properties,
    written_as,
)

PAHO = PahoProperties(PacketTypes.CONNECT)
ALL = frozenset(map(int, PropertyId))
# By paho's words for how a value is written: an example of it on the wire, and what is read.
WRITTEN: dict[str, tuple[bytes, int | str | bytes]] = {
    "Byte": (b"\x01", 1),
    "Two Byte Integer": (b"\x12\x34", 0x1234),
    "Four Byte Integer": (b"\x12\x34\x56\x78", 0x12345678),
    "Variable Byte Integer": (b"\x80\x01", 128),
    "Binary Data": (b"\x00\x02\x00\xff", b"\x00\xff"),
    "UTF-8 Encoded String": (b"\x00\x03a\xc3\xbc", "aü"),
}
PAIR = "UTF-8 String Pair"
CONTENT_TYPE = b"\x03\x00\x01c"
USER_PROPERTY = b"\x26\x00\x01n\x00\x02vv"
EXPIRY = b"\x02\x00\x00\x00\x09"


def type_of(identifier: int) -> str:
    """Return how paho writes a property."""
    return str(PAHO.types[PAHO.properties[identifier][0]])


def section(*properties: bytes) -> bytes:
    """Return properties with their Property Length, which is below 128."""
    data = b"".join(properties)
    return bytes((len(data),)) + data


def read(data: bytes) -> dict[int, int | str | bytes]:
    """Return the values of properties."""
    properties, end = parse_properties(data, 0, ALL, "TEST")
    assert end == len(data)
    return dict(properties.values)


def refused(data: bytes) -> int:
    """Return the reason code with which properties are refused."""
    with pytest.raises(PacketError) as caught:
        parse_properties(data, 0, ALL, "TEST")
    return caught.value.reason_code


def test_identifiers_are_those_of_another_implementation() -> None:
    """All of them, under the same names."""
    assert {each.name.replace("_", ""): int(each) for each in PropertyId} == {
        name.replace(" ", "").upper(): identifier for name, identifier in PAHO.names.items()
    }


@pytest.mark.parametrize("identifier", PropertyId, ids=lambda each: each.name)
def test_a_value_is_read_and_found_as_it_is_written(identifier: PropertyId) -> None:
    """Between others, which are found as well; no value reaches beyond its end."""
    kind = type_of(identifier)
    wire, value = (USER_PROPERTY[1:], None) if kind == PAIR else WRITTEN[kind]
    before, behind = (EXPIRY, CONTENT_TYPE) if identifier > PropertyId.CONTENT_TYPE else (b"", b"")
    written = bytes((identifier,)) + wire
    data = section(before, written, behind)
    if identifier == PropertyId.AUTHENTICATION_DATA:
        data = section(before, b"\x15\x00\x01m", written, behind)
    values = read(data)
    assert values.get(identifier) == value
    if behind:
        assert values[PropertyId.CONTENT_TYPE] == "c"
    start, end = find_property(data, identifier) or (0, 0)
    assert data[start:end] == written
    if behind:
        found = find_property(data, PropertyId.CONTENT_TYPE)
        assert found == (len(data) - len(CONTENT_TYPE), len(data))
    for cut in range(1, len(written)):
        assert refused(section(written[:cut])) == 0x81
        with pytest.raises(PacketError):
            find_property(section(written[:cut]), PropertyId.REASON_STRING)
        # The Property Length says more than there is.
        assert refused(section(written)[: 1 + cut]) == 0x81


def test_a_value_of_one_type_is_not_given_as_another() -> None:
    """Neither of the accessors guesses; `repr` shows no value."""
    properties, _ = parse_properties(section(EXPIRY, CONTENT_TYPE), 0, ALL, "TEST")
    assert properties.integer(PropertyId.MESSAGE_EXPIRY_INTERVAL) == 9
    assert properties.text(PropertyId.CONTENT_TYPE) == "c"
    assert properties.text(PropertyId.MESSAGE_EXPIRY_INTERVAL) is None
    assert properties.integer(PropertyId.CONTENT_TYPE) is None
    assert properties.integer(PropertyId.RECEIVE_MAXIMUM) is properties.text(PropertyId.RESPONSE_TOPIC) is None
    assert repr(properties) == "Properties(values={Message Expiry Interval, Content Type})"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (section(b"\x01\x02"), 0x82),  # a bit
        (section(b"\x21\x00\x00"), 0x82),  # Receive Maximum 0
        (section(b"\x27\x00\x00\x00\x00"), 0x82),  # Maximum Packet Size 0
        (section(b"\x23\x00\x00"), 0x94),  # Topic Alias 0
        (section(b"\x0b\x00"), 0x82),  # Subscription Identifier 0
        (section(b"\x0b\x81\x00"), 0x81),  # not the shortest form
        (section(b"\x0b\x80\x80\x80\x80\x01"), 0x81),  # five bytes
        (section(CONTENT_TYPE, CONTENT_TYPE), 0x82),
        (section(b"\x16\x00\x01d"), 0x82),  # Authentication Data without a method
        (section(b"\x26\x00\x01\x00\x00\x00"), 0x81),  # U+0000 in the name of a User Property
        (section(b"\x26\x00\x00\x00\x01\xff"), 0x81),  # not UTF-8
        (section(b"\x04\x00"), 0x81),  # no property
        (b"\x0a" + CONTENT_TYPE, 0x81),  # more than there is, cut between two
        (b"", 0x81),
        (b"\x80", 0x81),
        (b"\x80\x00", 0x81),
        (b"\x80\x80\x80\x80\x01", 0x81),
    ],
)
def test_what_the_standard_forbids_is_refused(data: bytes, code: int) -> None:
    """Malformed is 0x81, a protocol error is 0x82."""
    assert refused(data) == code


def test_what_may_be_zero_or_occur_twice() -> None:
    """Most numbers may; Subscription Identifiers and User Properties repeat (MQTT 5.0 §3.3.2.3)."""
    assert read(section(b"\x01\x00", b"\x11\x00\x00\x00\x00", b"\x22\x00\x00", b"\x13\x00\x00")) == {
        PropertyId.PAYLOAD_FORMAT_INDICATOR: 0,
        PropertyId.SESSION_EXPIRY_INTERVAL: 0,
        PropertyId.TOPIC_ALIAS_MAXIMUM: 0,
        PropertyId.SERVER_KEEP_ALIVE: 0,
    }
    twice = section(b"\x0b\x01", b"\x0b\x02", USER_PROPERTY, USER_PROPERTY)
    assert read(twice) == {PropertyId.SUBSCRIPTION_IDENTIFIER: 2}
    assert find_property(twice, PropertyId.USER_PROPERTY) == (5, 13)


def test_what_a_packet_may_not_carry_is_malformed() -> None:
    with pytest.raises(PacketError, match="0x03 is not allowed in CONNACK") as caught:
        parse_properties(section(CONTENT_TYPE), 0, frozenset({PropertyId.REASON_STRING}), "CONNACK")
    assert caught.value.reason_code == 0x81


def test_properties_are_counted() -> None:
    """So many, and no more: each costs time."""
    for count, is_permitted in ((MAX_ELEMENTS, True), (MAX_ELEMENTS + 1, False)):
        data = USER_PROPERTY * count
        length = len(data)
        whole = bytes((length & 0x7F | 0x80, length >> 7)) + data
        if is_permitted:
            assert read(whole) == {}
            assert find_property(whole, PropertyId.CONTENT_TYPE) is None
            continue
        assert refused(whole) == 0x95
        with pytest.raises(PacketError) as caught:
            find_property(whole, PropertyId.CONTENT_TYPE)
        assert caught.value.reason_code == 0x95


def test_the_texts_of_user_properties_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet may have a thousand of them; none is decoded by itself while all are in order."""
    decoded: list[str] = []

    def decode(encoded: bytes, what: str) -> str:
        decoded.append(what)
        return decode_text(encoded, what)

    monkeypatch.setattr(packets, "decode_text", decode)
    pair = b"\x26\0\2\xc3\xbc\0\3\xe2\x82\xac"
    data = pair * MAX_ELEMENTS
    assert read(encode_remaining_length(len(data)) + data) == {}
    assert not decoded
    assert read(section(pair, CONTENT_TYPE)) == {PropertyId.CONTENT_TYPE: "c"}
    assert decoded == ["Content Type of TEST"]


@pytest.mark.parametrize(
    ("name", "value", "detail"),
    [
        (b"\0\1\xff", b"\0\0", "not UTF-8"),
        (b"\0\0", b"\0\1\xff", "not UTF-8"),
        # Together they would be a character.
        (b"\0\1\xc3", b"\0\1\xbc", "not UTF-8"),
        (b"\0\1\0", b"\0\1\xff", "U\\+0000"),
        (b"\0\1a", b"\0\1\0", "U\\+0000"),
        (b"\0\1\xff", b"\0\2a", "not UTF-8"),
        (b"\0\1a", b"\0\2a", "ends within the User Property"),
        (b"\0\1a", b"\0", "ends within the User Property"),
        (b"\0", b"", "ends within the User Property"),
    ],
)
@pytest.mark.parametrize("rest", [b"", b"\x00", USER_PROPERTY * MAX_ELEMENTS], ids=["alone", "unknown", "too many"])
def test_the_first_fault_is_the_one_that_is_named(name: bytes, value: bytes, detail: str, rest: bytes) -> None:
    """That of a text before anything that is wrong behind it."""
    if "ends" in detail or value == b"\0\2a":
        rest = b""
    data = USER_PROPERTY + b"\x26" + name + value + rest
    with pytest.raises(PacketError, match=detail) as caught:
        parse_properties(encode_remaining_length(len(data)) + data, 0, ALL, "TEST")
    assert caught.value.reason_code == 0x81


def test_the_end_of_properties_is_found_without_reading_them() -> None:
    """Wherever they begin; a Property Length that is not whole has none."""
    assert end_of_properties(b"xx" + section(EXPIRY) + b"rest", 2) == 8
    assert end_of_properties(b"\x80\x01", 0) == 130
    with pytest.raises(PacketError) as caught:
        end_of_properties(b"x\x80", 1)
    assert caught.value.reason_code == 0x81


def test_a_property_is_replaced_added_or_removed_and_the_others_stay() -> None:
    """Byte for byte, with a Property Length of their own."""
    data = section(EXPIRY, CONTENT_TYPE, USER_PROPERTY)
    assert replace_property(data, PropertyId.MESSAGE_EXPIRY_INTERVAL, bytes(4)) == section(
        b"\x02\0\0\0\0", CONTENT_TYPE, USER_PROPERTY
    )
    assert replace_property(data, PropertyId.RECEIVE_MAXIMUM, b"\0\7") == section(
        EXPIRY, CONTENT_TYPE, USER_PROPERTY, b"\x21\0\7"
    )
    assert replace_property(b"\0", PropertyId.RECEIVE_MAXIMUM, b"\0\7") == section(b"\x21\0\7")
    assert replace_string_property(data, PropertyId.CONTENT_TYPE, "long") == section(
        EXPIRY, b"\x03\0\4long", USER_PROPERTY
    )
    assert replace_string_property(data, PropertyId.CONTENT_TYPE, None) == section(EXPIRY, USER_PROPERTY)
    assert replace_string_property(data, PropertyId.REASON_STRING, "new") == data
    long = replace_string_property(data, PropertyId.CONTENT_TYPE, "x" * 200)
    assert long[:2] == bytes((0x80 | (len(long) - 2 & 0x7F), len(long) - 2 >> 7))
    assert without_properties(data, PropertyId.CONTENT_TYPE, PropertyId.REASON_STRING) == section(EXPIRY, USER_PROPERTY)
    assert without_properties(data, PropertyId.USER_PROPERTY, PropertyId.MESSAGE_EXPIRY_INTERVAL) == section(
        CONTENT_TYPE
    )
    with pytest.raises(ValueError, match="65"):
        replace_string_property(data, PropertyId.CONTENT_TYPE, "x" * 65536)


def test_the_compiled_core_is_told_how_properties_of_a_publish_are_written() -> None:
    """In its own letters."""
    letters = {0x01: "1", 0x02: "4", 0x03: "s", 0x08: "s", 0x09: "b", 0x0B: "v", 0x23: "2", 0x26: "p"}
    assert {identifier: written_as(identifier) for identifier in letters} == letters
