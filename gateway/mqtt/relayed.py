"""Reads PUBLISH, SUBSCRIBE and UNSUBSCRIBE, and rewrites them with other topics.

In: the first byte and the body of a packet whose fixed header has been checked.  Out: the fields the inspector checks,
and the packet with changed topics, everything else byte for byte; `PacketError` for what the version does not allow.

Of a PUBLISH only the head is read: everything before its payload.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import repeat

from attrs import frozen

from gateway.errors import PacketError
from gateway.mqtt.packets import (
    MAX_ELEMENTS,
    ProtocolVersion,
    decode_binary,
    decode_integer,
    decode_remaining_length,
    decode_string,
    decode_texts,
    encode_remaining_length,
    encode_string,
    malformed,
    protocol_error,
    too_large,
)
from gateway.mqtt.properties import (
    PropertyId,
    end_of_properties,
    find_property,
    parse_properties,
    replace_span,
    replace_string_property,
)

_QOS_BITS = 0b0110
_OPTIONS_QOS = 0b0000_0011
_OPTIONS_RESERVED_5 = 0b1100_0000
_RETAIN_HANDLING = 0b0011_0000
_MAX_QOS = 2

LARGEST_HEAD = 131_072
"""The largest head of a PUBLISH, or SUBSCRIBE or UNSUBSCRIBE, that is read, in bytes."""

PUBLISH_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.PAYLOAD_FORMAT_INDICATOR,
        PropertyId.MESSAGE_EXPIRY_INTERVAL,
        PropertyId.TOPIC_ALIAS,
        PropertyId.RESPONSE_TOPIC,
        PropertyId.CORRELATION_DATA,
        PropertyId.USER_PROPERTY,
        PropertyId.SUBSCRIPTION_IDENTIFIER,
        PropertyId.CONTENT_TYPE,
    }
)
_SUBSCRIBE_PROPERTIES: frozenset[int] = frozenset({PropertyId.SUBSCRIPTION_IDENTIFIER, PropertyId.USER_PROPERTY})
_UNSUBSCRIBE_PROPERTIES: frozenset[int] = frozenset({PropertyId.USER_PROPERTY})


@frozen(slots=True)
class Publish:
    """The fields of a PUBLISH that rules check or change (MQTT 5.0 §3.3).

    `topic` is empty only in 5.0, with a Topic Alias. `response_topic` is None if absent.
    """

    topic: str
    qos: int
    retain: bool
    response_topic: str | None


@frozen(slots=True)
class Subscribe:
    """A SUBSCRIBE or an UNSUBSCRIBE (MQTT 5.0 §3.8, §3.10): its Topic Filters, each with its options byte or None.

    `head` is everything before them: the Packet Identifier and the properties.
    """

    head: bytes
    filters: tuple[tuple[str, int | None], ...]


def read_publish(version: ProtocolVersion, first: int, body: bytes) -> Publish:
    """Read the head of a PUBLISH; `body` may go on with any part of the payload.  Raises PacketError."""
    topic, offset = decode_string(body, 0, "Topic Name of PUBLISH")
    if "+" in topic or "#" in topic:
        raise malformed(f"PUBLISH with a wildcard in its Topic Name (MQTT {version.label} §3.3.2)")
    qos = (first & _QOS_BITS) >> 1
    if qos:
        _, offset = decode_integer(body, offset, 2, "Packet Identifier of PUBLISH")
    response_topic = alias = None
    if version is ProtocolVersion.MQTT_5_0:
        properties, _ = parse_properties(body, offset, PUBLISH_PROPERTIES, "PUBLISH")
        response_topic = properties.text(PropertyId.RESPONSE_TOPIC)
        alias = properties.integer(PropertyId.TOPIC_ALIAS)
    if not topic and alias is None:
        raise protocol_error(f"PUBLISH without a Topic Name (MQTT {version.label} §3.3.2)")
    return Publish(topic, qos, bool(first & 1), response_topic)


@frozen(slots=True)
class Delivery:
    """The fields of a broker's PUBLISH that rules check.

    In `topic`, bytes that are not UTF-8 are kept as surrogates. `alias` is None if absent, or if it cannot be read;
    `is_read` tells whether the properties could be read.
    """

    topic: str
    qos: int
    packet_identifier: int
    alias: int | None
    is_read: bool


def read_delivery(version: ProtocolVersion, first: int, body: bytes) -> Delivery:
    """Read the head of a broker's PUBLISH.  Raises PacketError if Topic Name or Packet Identifier are incomplete."""
    topic, offset = decode_binary(body, 0, "Topic Name of PUBLISH")
    qos = (first & _QOS_BITS) >> 1
    packet_identifier = 0
    if qos:
        packet_identifier, offset = decode_integer(body, offset, 2, "Packet Identifier of PUBLISH")
    alias = None
    properties = _readable_properties(version, body, offset)
    # In 5.0 there is at least the Property Length.
    is_read = bool(properties) or version is not ProtocolVersion.MQTT_5_0
    try:
        found = find_property(properties, PropertyId.TOPIC_ALIAS)
    except PacketError:
        found, is_read = None, False
    if found is not None:
        alias = int.from_bytes(properties[found[0] + 1 : found[1]], "big")
    return Delivery(topic.decode("utf-8", "surrogateescape"), qos, packet_identifier, alias, is_read)


def _readable_properties(version: ProtocolVersion, body: bytes, offset: int) -> bytes:
    """Return the properties at `offset`, Property Length included, or nothing if they are too many to be read."""
    if version is not ProtocolVersion.MQTT_5_0:
        return b""
    try:
        decoded = decode_remaining_length(body, offset)
    except ValueError:
        decoded = None
    if decoded is None:
        return b""
    length, length_size = decoded
    end = offset + length_size + length
    return body[offset:end] if end <= min(len(body), LARGEST_HEAD) else b""


def topic_size(first: int, data: bytes | bytearray, start: int) -> int:
    """Return the size of the Topic Name and Packet Identifier of a PUBLISH, as far as known; its body is at `start`."""
    if len(data) < start + 2:
        return 2
    return 2 + int.from_bytes(data[start : start + 2], "big") + (2 if first & _QOS_BITS else 0)


def head_size(version: ProtocolVersion, first: int, data: bytes | bytearray, start: int) -> int:
    """Return the size of the head of a PUBLISH whose body begins at `start`, as far as known.

    If so many bytes are there, and the answer stays the same, then the head is complete.
    """
    size = topic_size(first, data, start)
    if version is not ProtocolVersion.MQTT_5_0 or len(data) < start + size:
        return size
    try:
        decoded = decode_remaining_length(data, start + size)
    except ValueError:
        return size + 4  # The reader refuses it.
    if decoded is None:
        return len(data) - start + 1
    length, length_size = decoded
    return size + length_size + length


def write_publish(
    version: ProtocolVersion, first: int, body: bytes, missing: int, topic: str, response_topic: str | None
) -> bytes:
    """Write a PUBLISH that has been read, with another Topic Name and, if it has one, another Response Topic.

    `missing` is how many bytes of the payload follow later. A `response_topic` of None removes that property. Raises
    ValueError for a topic of more than 65,535 bytes, or a packet above the largest Remaining Length.
    """
    start = offset = 2 + int.from_bytes(body[:2], "big")
    if first & _QOS_BITS:
        offset += 2
    parts = [encode_string(topic), body[start:offset]]
    if version is ProtocolVersion.MQTT_5_0:
        end = end_of_properties(body, offset)
        parts.append(replace_string_property(body[offset:end], PropertyId.RESPONSE_TOPIC, response_topic))
        offset = end
    parts.append(body[offset:])
    return write_packet(first, b"".join(parts), missing)


def without_prefixes(
    version: ProtocolVersion, first: int, body: bytes, missing: int, topic_prefix: bytes, answer_prefix: bytes
) -> bytes | None:
    """Write a broker's PUBLISH without the prefixes of its Topic Name and Response Topic, or None if nothing changes.

    Topics are compared as bytes, so it makes no difference whether they are valid. A Topic Name outside its prefix
    stays as it is; a Response Topic outside its prefix is removed, unless it begins with `$`. Properties that cannot be
    read stay as they are. `missing` is as for `write_publish`.
    """
    start = 2 + int.from_bytes(body[:2], "big")
    if start > len(body):
        return None
    topic = body[2:start]
    is_inside = topic_prefix and topic.startswith(topic_prefix) and len(topic) > len(topic_prefix)
    new_topic = topic[len(topic_prefix) :] if is_inside else topic
    offset = start + 2 if first & _QOS_BITS else start
    properties = changed = _readable_properties(version, body, offset) if answer_prefix else b""
    # What cannot be read passes as it is.
    with suppress(PacketError):
        changed = _without_answer_prefix(properties, answer_prefix)
    if new_topic == topic and changed == properties:
        return None
    rest = changed + body[offset + len(properties) :]
    new_body = len(new_topic).to_bytes(2, "big") + new_topic + body[start:offset] + rest
    return write_packet(first, new_body, missing)


def _without_answer_prefix(properties: bytes, prefix: bytes) -> bytes:
    found = find_property(properties, PropertyId.RESPONSE_TOPIC)
    if found is None:
        return properties
    start, end = found
    answer = properties[start + 3 : end]
    if answer.startswith(b"$"):
        return properties
    new = b""
    if answer.startswith(prefix) and len(answer) > len(prefix):
        answer = answer[len(prefix) :]
        new = bytes((PropertyId.RESPONSE_TOPIC,)) + len(answer).to_bytes(2, "big") + answer
    return replace_span(properties, start, end, new)


def read_subscribe(version: ProtocolVersion, body: bytes, *, lenient: bool = False) -> Subscribe:
    """Read a SUBSCRIBE; `lenient` accepts reserved options.  Raises PacketError."""
    return _read_filters(version, body, "SUBSCRIBE", _SUBSCRIBE_PROPERTIES, has_options=True, lenient=lenient)


def read_unsubscribe(version: ProtocolVersion, body: bytes) -> Subscribe:
    """Read an UNSUBSCRIBE.  Raises PacketError."""
    return _read_filters(version, body, "UNSUBSCRIBE", _UNSUBSCRIBE_PROPERTIES, has_options=False)


def write_subscribe(first: int, packet: Subscribe) -> bytes:
    """Write a SUBSCRIBE or an UNSUBSCRIBE.  Raises ValueError for a Topic Filter of more than 65,535 bytes."""
    parts = [packet.head]
    for text, options in packet.filters:
        parts.append(encode_string(text))
        if options is not None:
            parts.append(bytes((options,)))
    return write_packet(first, b"".join(parts))


def lower_qos(options: int, max_qos: int) -> int:
    """Return subscription options with the requested QoS lowered to `max_qos` (MQTT 5.0 §3.8.3.1)."""
    return options if options & _OPTIONS_QOS <= max_qos else options & ~_OPTIONS_QOS | max_qos


def write_packet(first: int, body: bytes, missing: int = 0) -> bytes:
    """Write a packet, or its beginning if `missing` bytes of the body follow later.

    Raises ValueError for a body above the largest Remaining Length.
    """
    return bytes((first,)) + encode_remaining_length(len(body) + missing) + body


def _read_filters(
    version: ProtocolVersion,
    body: bytes,
    name: str,
    permitted: frozenset[int],
    *,
    has_options: bool,
    lenient: bool = False,
) -> Subscribe:
    _, offset = decode_integer(body, 0, 2, f"Packet Identifier of {name}")
    is_5 = version is ProtocolVersion.MQTT_5_0
    if is_5:
        _, offset = parse_properties(body, offset, permitted, name)
    head = body[:offset]
    texts: list[bytes] = []
    options: list[int] = []
    what = f"Topic Filter of {name}"
    try:
        _take_filters(version, body, offset, name, texts, options if has_options else None, lenient=lenient)
    except PacketError:
        # A filter before the fault may have a fault of its own, and the first one counts.
        decode_texts(texts, what)
        raise
    if not texts:
        raise protocol_error(f"{name} without a Topic Filter (MQTT {version.label} §3.{8 if has_options else 10}.3)")
    filters = decode_texts(texts, what)
    return Subscribe(head, tuple(zip(filters, options or repeat(None), strict=False)))


def _take_filters(
    version: ProtocolVersion,
    body: bytes,
    offset: int,
    name: str,
    texts: list[bytes],
    options: list[int] | None,
    *,
    lenient: bool,
) -> None:
    """Put the Topic Filters from `offset` on into `texts`, unchecked, and their options into `options`, if not None."""
    size = len(body)
    valid = _valid_options(version, lenient)
    while offset < size:
        if len(texts) == MAX_ELEMENTS:
            raise too_large(f"{name} has more than {MAX_ELEMENTS} Topic Filters")
        start = offset + 2
        offset = start + (body[offset] << 8 | body[offset + 1]) if start <= size else start
        if offset > size:
            raise malformed(f"the packet ends within the Topic Filter of {name}")
        texts.append(body[start:offset])
        if options is None:
            continue
        if offset == size:
            raise malformed(f"the packet ends within the options of {name}")
        option = body[offset]
        if option not in valid:
            raise malformed(f"{name} with the options 0b{option:08b} (MQTT {version.label} §3.8.3)")
        options.append(option)
        offset += 1


@cache
def _valid_options(version: ProtocolVersion, lenient: bool) -> frozenset[int]:
    """Return the options that a Topic Filter may have (MQTT 3.1.1 §3.8.3, MQTT 5.0 §3.8.3.1)."""
    is_5 = version is ProtocolVersion.MQTT_5_0
    reserved = _OPTIONS_RESERVED_5 if is_5 else ~_OPTIONS_QOS & 0xFF
    # MQTT 3.1 §3.8 reserves the upper six bits but does not require 0.
    if lenient or version is ProtocolVersion.MQTT_3_1:
        reserved = 0
    return frozenset(
        options
        for options in range(256)
        if options & _OPTIONS_QOS <= _MAX_QOS
        and not (is_5 and options & _RETAIN_HANDLING == _RETAIN_HANDLING)
        and not options & reserved
    )
