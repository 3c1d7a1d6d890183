"""Reads MQTT 5.0 properties strictly (MQTT 5.0 §2.2.2).

In: the bytes of a packet and the offset of its properties.  Out: `Properties` and the offset after them; `PacketError`
for what the standard calls malformed or a protocol error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum, IntEnum
from functools import lru_cache

from attrs import field, frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import (
    MAX_ELEMENTS,
    ReasonCode,
    decode_binary,
    decode_integer,
    decode_remaining_length,
    decode_string,
    decode_texts,
    encode_remaining_length,
    encode_string,
    is_minimal,
    malformed,
    protocol_error,
    too_large,
)


class PropertyId(IntEnum):
    """Property identifiers of all packets but acknowledgements and AUTH (MQTT 5.0 §2.2.2.2)."""

    PAYLOAD_FORMAT_INDICATOR = 0x01
    MESSAGE_EXPIRY_INTERVAL = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_IDENTIFIER = 0x0B
    SESSION_EXPIRY_INTERVAL = 0x11
    ASSIGNED_CLIENT_IDENTIFIER = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTHENTICATION_METHOD = 0x15
    AUTHENTICATION_DATA = 0x16
    REQUEST_PROBLEM_INFORMATION = 0x17
    WILL_DELAY_INTERVAL = 0x18
    REQUEST_RESPONSE_INFORMATION = 0x19
    RESPONSE_INFORMATION = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_SUBSCRIPTION_AVAILABLE = 0x28
    SUBSCRIPTION_IDENTIFIER_AVAILABLE = 0x29
    SHARED_SUBSCRIPTION_AVAILABLE = 0x2A


class _Kind(Enum):
    """How a property's value is encoded."""

    BIT = "a byte that is 0 or 1"
    TWO_BYTES = "two bytes"
    FOUR_BYTES = "four bytes"
    STRING = "UTF-8 string"
    BINARY = "binary data"
    VARIABLE = "a Variable Byte Integer"


_KINDS: dict[int, _Kind] = {
    PropertyId.PAYLOAD_FORMAT_INDICATOR: _Kind.BIT,
    PropertyId.MESSAGE_EXPIRY_INTERVAL: _Kind.FOUR_BYTES,
    PropertyId.CONTENT_TYPE: _Kind.STRING,
    PropertyId.RESPONSE_TOPIC: _Kind.STRING,
    PropertyId.CORRELATION_DATA: _Kind.BINARY,
    PropertyId.SUBSCRIPTION_IDENTIFIER: _Kind.VARIABLE,
    PropertyId.SESSION_EXPIRY_INTERVAL: _Kind.FOUR_BYTES,
    PropertyId.ASSIGNED_CLIENT_IDENTIFIER: _Kind.STRING,
    PropertyId.SERVER_KEEP_ALIVE: _Kind.TWO_BYTES,
    PropertyId.AUTHENTICATION_METHOD: _Kind.STRING,
    PropertyId.AUTHENTICATION_DATA: _Kind.BINARY,
    PropertyId.REQUEST_PROBLEM_INFORMATION: _Kind.BIT,
    PropertyId.WILL_DELAY_INTERVAL: _Kind.FOUR_BYTES,
    PropertyId.REQUEST_RESPONSE_INFORMATION: _Kind.BIT,
    PropertyId.RESPONSE_INFORMATION: _Kind.STRING,
    PropertyId.SERVER_REFERENCE: _Kind.STRING,
    PropertyId.REASON_STRING: _Kind.STRING,
    PropertyId.RECEIVE_MAXIMUM: _Kind.TWO_BYTES,
    PropertyId.TOPIC_ALIAS_MAXIMUM: _Kind.TWO_BYTES,
    PropertyId.TOPIC_ALIAS: _Kind.TWO_BYTES,
    PropertyId.MAXIMUM_QOS: _Kind.BIT,
    PropertyId.RETAIN_AVAILABLE: _Kind.BIT,
    PropertyId.MAXIMUM_PACKET_SIZE: _Kind.FOUR_BYTES,
    PropertyId.WILDCARD_SUBSCRIPTION_AVAILABLE: _Kind.BIT,
    PropertyId.SUBSCRIPTION_IDENTIFIER_AVAILABLE: _Kind.BIT,
    PropertyId.SHARED_SUBSCRIPTION_AVAILABLE: _Kind.BIT,
}

# Values that must not be zero (MQTT 5.0 §3.1.2.11.3, §3.1.2.11.4, §3.3.2.3.4).
_NEVER_ZERO: frozenset[int] = frozenset(
    {
        PropertyId.RECEIVE_MAXIMUM,
        PropertyId.MAXIMUM_PACKET_SIZE,
    }
)


_SIZES = {_Kind.BIT: 1, _Kind.TWO_BYTES: 2, _Kind.FOUR_BYTES: 4}
_USER_PROPERTY = int(PropertyId.USER_PROPERTY)
# For finding the end of a property: the size of its value, or the number of fields with a two-byte length.
_FIXED_SIZES = {int(identifier): _SIZES[kind] for identifier, kind in _KINDS.items() if kind in _SIZES}
_FIELDS = {int(identifier): 1 for identifier, kind in _KINDS.items() if kind in {_Kind.STRING, _Kind.BINARY}} | {
    _USER_PROPERTY: 2
}

_LETTERS = {_Kind.BIT: "1", _Kind.FOUR_BYTES: "4", _Kind.STRING: "s", _Kind.BINARY: "b", _Kind.VARIABLE: "v"}


def written_as(identifier: int) -> str:
    """Give how a property of a PUBLISH is written, as `value_size` in gateway/relay/_core.c has it."""
    if identifier == PropertyId.USER_PROPERTY:
        return "p"
    # The only one of two bytes is Topic Alias, which is never 0.
    return _LETTERS.get(_KINDS[PropertyId(identifier)], "2")


def _name(identifier: int) -> str:
    return PropertyId(identifier).name.replace("_", " ").title().replace("Qos", "QoS")


def _names(values: Mapping[int, int | str | bytes]) -> str:
    return "{" + ", ".join(_name(identifier) for identifier in values) + "}"


@frozen
class Properties:
    """The properties of one packet or Will: values by identifier. User Properties are checked, but not kept.

    `count` is how many properties the packet has up to here, User Properties and those of other sections included.
    Authentication Data may be secret, so `repr()` shows identifiers only.
    """

    values: Mapping[int, int | str | bytes] = field(repr=_names)
    count: int = field(default=0, eq=False, repr=False)

    def integer(self, identifier: PropertyId) -> int | None:
        """Return the value of a numeric property, or None if absent."""
        value = self.values.get(identifier)
        return value if isinstance(value, int) else None

    def text(self, identifier: PropertyId) -> str | None:
        """Return the value of a string property, or None if absent."""
        value = self.values.get(identifier)
        return value if isinstance(value, str) else None


def parse_properties(
    data: bytes, offset: int, permitted: frozenset[int], where: str, *, before: int = 0
) -> tuple[Properties, int]:
    """Read a Property Length and its properties: return them and the offset after them (MQTT 5.0 §2.2.2).

    `permitted` holds the identifiers that the packet may carry; `where` names the packet in errors ("CONNECT").
    `before` is how many properties the packet has before these, in another section. Raises PacketError: malformed
    (0x81) for properties that cannot be read or are not permitted, protocol error (0x82) for properties that contradict
    each other or have a forbidden value, packet too large (0x95) if the packet has more than `MAX_ELEMENTS`.
    """
    if data[offset : offset + 1] == b"\0":
        return Properties({}, before), offset + 1  # As most packets have it.
    try:
        decoded = decode_remaining_length(data, offset)
    except ValueError:
        raise malformed(f"the Property Length of {where} takes more than four bytes (MQTT 5.0 §1.5.5)") from None
    if decoded is None:
        raise malformed(f"the packet ends within the Property Length of {where}")
    length, length_size = decoded
    if not is_minimal(length, length_size):
        raise malformed(f"the Property Length {length} of {where} takes {length_size} bytes (MQTT 5.0 §1.5.5)")
    start = offset + length_size
    end = start + length
    if end > len(data):
        raise malformed(f"the packet ends within the properties of {where}")
    # Slice, so that no value can extend beyond the Property Length.
    return _parse_section(data[start:end], permitted, where, before), end


def end_of_properties(data: bytes, offset: int) -> int:
    """Return the offset after a Property Length and its already validated properties (MQTT 5.0 §2.2.2.1)."""
    decoded = decode_remaining_length(data, offset)
    if decoded is None:
        raise malformed("the packet ends within a Property Length")
    length, length_size = decoded
    return offset + length_size + length


def replace_string_property(properties: bytes, identifier: PropertyId, value: str | None) -> bytes:
    """Return `properties` (validated before, Property Length included) with a new value for a string property.

    None removes the property. If it is absent, nothing changes. All others are copied byte for byte.
    Raises ValueError for a value that is too long.
    """
    found = find_property(properties, identifier)
    if found is None:
        return properties
    return replace_span(properties, *found, b"" if value is None else bytes((identifier,)) + encode_string(value))


def replace_property(properties: bytes, identifier: PropertyId, value: bytes) -> bytes:
    """Return `properties` (validated before, Property Length included) with an encoded value set or added."""
    end = len(properties)
    start, end = find_property(properties, identifier) or (end, end)
    return replace_span(properties, start, end, bytes((identifier,)) + value)


def without_properties(properties: bytes, *identifiers: PropertyId) -> bytes:
    """Return `properties` (validated before, Property Length included) without some; others stay byte for byte."""
    for identifier in identifiers:
        found = find_property(properties, identifier)
        if found is not None:
            properties = replace_span(properties, *found, b"")
    return properties


def find_property(properties: bytes, identifier: PropertyId) -> tuple[int, int] | None:
    """Return where a property of `properties` (Property Length included) begins and ends, or None if absent.

    Raises PacketError if the properties cannot be read, or are more than `MAX_ELEMENTS`. Values are not checked.
    """
    if len(properties) <= 1:
        return None
    return next(((start, end) for found, start, end in _spans(properties) if found == identifier), None)


def replace_span(properties: bytes, start: int, end: int, new: bytes) -> bytes:
    """Return `properties` (Property Length included) with `new` in place of the bytes from `start` to `end`."""
    _, length_size = decode_remaining_length(properties, 0) or (0, 0)
    section = properties[length_size:start] + new + properties[end:]
    return encode_remaining_length(len(section)) + section


def _spans(properties: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the identifier, start and end of each property."""
    _, offset = decode_remaining_length(properties, 0) or (0, 0)
    size, count = len(properties), 0
    while offset < size:
        count += 1
        if count > MAX_ELEMENTS:
            raise _too_many("the packet")
        start, identifier = offset, properties[offset]
        offset += 1
        fields = _FIELDS.get(identifier, 0)
        if fields:
            for _ in range(fields):
                offset += 2 + int.from_bytes(properties[offset : offset + 2], "big")
        elif identifier in _FIXED_SIZES:
            offset += _FIXED_SIZES[identifier]
        elif identifier == PropertyId.SUBSCRIPTION_IDENTIFIER:
            _, offset = _parse_variable(properties, offset, "property")
        else:
            raise malformed(f"unknown property 0x{identifier:02X} (MQTT 5.0 §2.2.2.2)")
        if offset > size:
            raise malformed("the packet ends within a property")
        yield identifier, start, offset


def _too_many(what: str) -> PacketError:
    return too_large(f"{what} has more than {MAX_ELEMENTS} properties")


def _parse_section(section: bytes, permitted: frozenset[int], where: str, before: int) -> Properties:
    texts: list[bytes] = []
    try:
        properties = _read_section(section, permitted, where, before, texts)
    except PacketError:
        # A text before the fault may have a fault of its own, and the first one counts.
        decode_texts(texts, f"User Property of {where}")
        raise
    decode_texts(texts, f"User Property of {where}")
    return properties


def _read_section(section: bytes, permitted: frozenset[int], where: str, before: int, texts: list[bytes]) -> Properties:
    """Read properties; what User Properties consist of goes into `texts`, unchecked."""
    values: dict[int, int | str | bytes] = {}
    offset, count = 0, before
    while offset < len(section):
        count += 1
        if count > MAX_ELEMENTS:
            raise _too_many("the packet" if before else where)
        identifier = section[offset]
        offset += 1
        # Identifiers are Variable Byte Integers, but all defined ones take one byte.
        if identifier not in permitted:
            raise malformed(f"property 0x{identifier:02X} is not allowed in {where} (MQTT 5.0 §2.2.2.2)")
        if identifier == _USER_PROPERTY:
            offset = _take_user_property(section, offset, where, texts)
            continue
        # A message that matches several subscriptions carries all their identifiers (MQTT 5.0 §3.3.2.3.8).
        if identifier in values and identifier != PropertyId.SUBSCRIPTION_IDENTIFIER:
            raise protocol_error(f"{where} contains {_name(identifier)} more than once (MQTT 5.0 §2.2.2)")
        values[identifier], offset = _parse_value(section, offset, identifier, _what(identifier, where))
    if PropertyId.AUTHENTICATION_DATA in values and PropertyId.AUTHENTICATION_METHOD not in values:
        raise protocol_error(f"{where} contains Authentication Data without a method (MQTT 5.0 §3.1.2.11.10)")
    return Properties(values, count)


def _take_user_property(section: bytes, offset: int, where: str, texts: list[bytes]) -> int:
    """Take the name and the value of a User Property; return the offset after them.  Raises PacketError."""
    size = len(section)
    for _ in ("name", "value"):
        start = offset + 2
        offset = start + (section[offset] << 8 | section[offset + 1]) if start <= size else start
        if offset > size:
            raise malformed(f"the packet ends within the User Property of {where}")
        texts.append(section[start:offset])
    return offset


@lru_cache(maxsize=128)
def _what(identifier: int, where: str) -> str:
    """Name a property in errors; `where` names the packet, and there are few of those."""
    return f"{_name(identifier)} of {where}"


def _parse_value(section: bytes, offset: int, identifier: int, what: str) -> tuple[int | str | bytes, int]:
    kind = _KINDS[identifier]
    if kind is _Kind.STRING:
        return decode_string(section, offset, what)
    if kind is _Kind.BINARY:
        return decode_binary(section, offset, what)
    if kind is _Kind.VARIABLE:
        return _parse_variable(section, offset, what)
    number, offset = decode_integer(section, offset, _SIZES[kind], what)
    if kind is _Kind.BIT and number > 1:
        raise protocol_error(f"the {what} is {number}, neither 0 nor 1 (MQTT 5.0 §2.2.2)")
    if number == 0 and identifier == PropertyId.TOPIC_ALIAS:
        raise PacketError(
            EndReason.PROTOCOL_ERROR, ReasonCode.TOPIC_ALIAS_INVALID, f"the {what} is 0 (MQTT 5.0 §3.3.2.3.4)"
        )
    if number == 0 and identifier in _NEVER_ZERO:
        raise protocol_error(f"the {what} is 0 (MQTT 5.0 §2.2.2)")
    return number, offset


def _parse_variable(section: bytes, offset: int, what: str) -> tuple[int, int]:
    if 0 < int.from_bytes(section[offset : offset + 1]) < 0x80:
        return section[offset], offset + 1  # A message may have hundreds of these.
    try:
        decoded = decode_remaining_length(section, offset)
    except ValueError:
        decoded = None
    if decoded is None or not is_minimal(*decoded):
        raise malformed(f"the {what} is not a valid Variable Byte Integer (MQTT 5.0 §1.5.5)")
    number, size = decoded
    if number == 0:
        raise protocol_error(f"the {what} is 0 (MQTT 5.0 §2.2.2)")
    return number, offset + size
