"""Reads PUBLISH, SUBSCRIBE and UNSUBSCRIBE, and rewrites them with other topics.

In: the first byte and the body of a packet whose fixed header has been checked.  Out: the fields the inspector checks,
and the packet with changed topics, everything else byte for byte; `PacketError` for what the version does not allow.
"""

from __future__ import annotations

from attrs import frozen

from gateway.mqtt.packets import (
    ProtocolVersion,
    decode_integer,
    decode_string,
    encode_remaining_length,
    encode_string,
    malformed,
    protocol_error,
)
from gateway.mqtt.properties import (
    PropertyId,
    end_of_properties,
    parse_properties,
    replace_string_property,
)

_QOS_BITS = 0b0110
_OPTIONS_QOS = 0b0000_0011
_OPTIONS_RESERVED_5 = 0b1100_0000
_RETAIN_HANDLING = 0b0011_0000
_MAX_QOS = 2

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
    packet_identifier: int = 0
    alias: int | None = None


@frozen(slots=True)
class Subscribe:
    """A SUBSCRIBE or an UNSUBSCRIBE (MQTT 5.0 §3.8, §3.10): its Topic Filters, each with its options byte or None.

    `head` is everything before them: the Packet Identifier and the properties.
    """

    head: bytes
    filters: tuple[tuple[str, int | None], ...]


def read_publish(version: ProtocolVersion, first: int, body: bytes) -> Publish:
    """Read a PUBLISH, except for its payload.  Raises PacketError."""
    topic, offset = decode_string(body, 0, "Topic Name of PUBLISH")
    if "+" in topic or "#" in topic:
        raise malformed(f"PUBLISH with a wildcard in its Topic Name (MQTT {version.label} §3.3.2)")
    qos = (first & _QOS_BITS) >> 1
    packet_identifier = 0
    if qos:
        packet_identifier, offset = decode_integer(body, offset, 2, "Packet Identifier of PUBLISH")
    response_topic = alias = None
    if version is ProtocolVersion.MQTT_5_0:
        properties, _ = parse_properties(body, offset, PUBLISH_PROPERTIES, "PUBLISH")
        response_topic = properties.text(PropertyId.RESPONSE_TOPIC)
        alias = properties.integer(PropertyId.TOPIC_ALIAS)
    if not topic and alias is None:
        raise protocol_error(f"PUBLISH without a Topic Name (MQTT {version.label} §3.3.2)")
    return Publish(topic, qos, bool(first & 1), response_topic, packet_identifier, alias)


def write_publish(version: ProtocolVersion, first: int, body: bytes, topic: str, response_topic: str | None) -> bytes:
    """Write a PUBLISH that has been read, with another Topic Name and, where it has one, another Response Topic.

    A `response_topic` of None takes that property out. Raises ValueError for a topic of more than 65,535 bytes.
    """
    _, offset = decode_string(body, 0, "Topic Name of PUBLISH")
    start = offset
    if first & _QOS_BITS:
        offset += 2
    parts = [encode_string(topic), body[start:offset]]
    if version is ProtocolVersion.MQTT_5_0:
        end = end_of_properties(body, offset)
        parts.append(replace_string_property(body[offset:end], PropertyId.RESPONSE_TOPIC, response_topic))
        offset = end
    parts.append(body[offset:])
    return write_packet(first, b"".join(parts))


def read_subscribe(version: ProtocolVersion, body: bytes) -> Subscribe:
    """Read a SUBSCRIBE.  Raises PacketError."""
    return _read_filters(version, body, "SUBSCRIBE", _SUBSCRIBE_PROPERTIES, has_options=True)


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


def write_packet(first: int, body: bytes) -> bytes:
    """Write a packet.  Raises ValueError for a body above the largest Remaining Length."""
    return bytes((first,)) + encode_remaining_length(len(body)) + body


def _read_filters(
    version: ProtocolVersion, body: bytes, name: str, permitted: frozenset[int], *, has_options: bool
) -> Subscribe:
    _, offset = decode_integer(body, 0, 2, f"Packet Identifier of {name}")
    is_5 = version is ProtocolVersion.MQTT_5_0
    if is_5:
        _, offset = parse_properties(body, offset, permitted, name)
    head = body[:offset]
    filters: list[tuple[str, int | None]] = []
    while offset < len(body):
        text, offset = decode_string(body, offset, f"Topic Filter of {name}")
        options = None
        if has_options:
            options, offset = decode_integer(body, offset, 1, f"options of {name}")
            reserved = _OPTIONS_RESERVED_5 if is_5 else ~_OPTIONS_QOS & 0xFF
            wrong = options & _OPTIONS_QOS > _MAX_QOS or (is_5 and options & _RETAIN_HANDLING == _RETAIN_HANDLING)
            # MQTT 3.1 §3.8 reserves the upper six bits but does not require 0.
            if wrong or (options & reserved and version is not ProtocolVersion.MQTT_3_1):
                raise malformed(f"{name} with the options 0b{options:08b} (MQTT {version.label} §3.8.3)")
        filters.append((text, options))
    if not filters:
        raise protocol_error(f"{name} without a Topic Filter (MQTT {version.label} §3.{8 if has_options else 10}.3)")
    return Subscribe(head, tuple(filters))
