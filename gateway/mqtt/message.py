"""PUBLISH, acknowledgements and subscriptions, for when the gateway is itself a server or a client.

In: whole packets whose fixed header has been checked.  Out: what they say, and packets that the gateway writes;
`PacketError` for what the version does not allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve, field, frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import (
    PacketType,
    ProtocolVersion,
    ReasonCode,
    decode_binary,
    decode_integer,
    decode_remaining_length,
    encode_remaining_length,
    encode_string,
    malformed,
    protocol_error,
)
from gateway.mqtt.properties import PropertyId, end_of_properties, parse_properties, replace_string_property
from gateway.mqtt.relayed import write_packet

_DUP = 0b1000
_EXPIRY = PropertyId.MESSAGE_EXPIRY_INTERVAL
_PUBLISH_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.PAYLOAD_FORMAT_INDICATOR,
        PropertyId.MESSAGE_EXPIRY_INTERVAL,
        PropertyId.RESPONSE_TOPIC,
        PropertyId.CORRELATION_DATA,
        PropertyId.USER_PROPERTY,
        PropertyId.CONTENT_TYPE,
        PropertyId.TOPIC_ALIAS,
    }
)
_WITH_FLAGS = {PacketType.PUBREL: 0b0010, PacketType.SUBSCRIBE: 0b0010, PacketType.UNSUBSCRIBE: 0b0010}


@frozen(slots=True)
class Message:
    """A PUBLISH without DUP and Packet Identifier (MQTT 5.0 §3.3).

    `properties` are the bytes behind the Property Length, without Message Expiry Interval, None for a message of 3.x.
    `expiry` is in seconds, None for never.
    """

    topic: bytes
    payload: bytes = field(repr=False)
    qos: int
    retain: bool = False
    properties: bytes | None = field(default=None, repr=False)
    expiry: int | None = None


@frozen(slots=True)
class Subscription:
    """One Topic Filter, its options (MQTT 5.0 §3.8.3.1) and its Subscription Identifier, 0 for none."""

    topic_filter: str
    options: int
    identifier: int = 0

    @property
    def qos(self) -> int:
        """The QoS that is asked for."""
        return self.options & 0b11


def body_of(packet: bytes) -> bytes:
    """Give what the Remaining Length counts."""
    _, size = decode_remaining_length(packet, 1) or (0, 1)
    return packet[1 + size :]


def read_message(version: ProtocolVersion, packet: bytes) -> tuple[Message, int]:
    """Read a PUBLISH: the message, and its Packet Identifier, 0 with QoS 0.  Raises PacketError.

    A Topic Alias is a fault: the gateway grants none to a device that it serves itself (MQTT 5.0 §3.3.2.3.4).
    """
    first, body = packet[0], body_of(packet)
    qos, identifier = first >> 1 & 0b11, 0
    topic, offset = decode_binary(body, 0, "Topic Name of PUBLISH")
    if qos:
        identifier, offset = decode_integer(body, offset, 2, "Packet Identifier of PUBLISH")
        if not identifier:
            raise protocol_error(f"PUBLISH with Packet Identifier 0 (MQTT {version.label} §2.3.1)")
    properties = expiry = None
    if version is ProtocolVersion.MQTT_5_0:
        parsed, end = parse_properties(body, offset, _PUBLISH_PROPERTIES, "PUBLISH")
        if parsed.integer(PropertyId.TOPIC_ALIAS) is not None:
            detail = "PUBLISH with a Topic Alias, of which there are none here (MQTT 5.0 §3.3.2.3.4)"
            raise PacketError(EndReason.PROTOCOL_ERROR, ReasonCode.TOPIC_ALIAS_INVALID, detail)
        expiry = parsed.integer(_EXPIRY)
        section = body[offset:end]
        if expiry is not None:
            section = replace_string_property(section, _EXPIRY, None)
        properties = section[end_of_length(section) :]
        offset = end
    return Message(topic, body[offset:], qos, bool(first & 1), properties, expiry), identifier


def write_message(
    version: ProtocolVersion, message: Message, identifier: int, *, duplicate: bool = False, waited: int = 0
) -> bytes:
    """Write a PUBLISH; `waited` seconds are taken off its Message Expiry Interval (MQTT 5.0 §3.3.2.3.3)."""
    first = PacketType.PUBLISH << 4 | message.qos << 1 | message.retain
    parts = [len(message.topic).to_bytes(2, "big"), message.topic]
    if message.qos:
        first |= _DUP if duplicate else 0
        parts.append(identifier.to_bytes(2, "big"))
    if version is ProtocolVersion.MQTT_5_0:
        section = message.properties or b""
        if message.expiry is not None:
            section += bytes((_EXPIRY,)) + max(1, message.expiry - waited).to_bytes(4, "big")
        parts += [encode_remaining_length(len(section)), section]
    parts.append(message.payload)
    return write_packet(first, b"".join(parts))


def with_qos(message: Message, qos: int) -> Message:
    """Give the message with another QoS."""
    return message if message.qos == qos else evolve(message, qos=qos)


def identifier_of(packet: bytes) -> int:
    """Give the Packet Identifier at the start of an acknowledgement, a SUBSCRIBE, a SUBACK …  Raises PacketError."""
    return decode_integer(body_of(packet), 0, 2, "Packet Identifier")[0]


def publish_identifier(packet: bytes) -> int:
    """Give the Packet Identifier of a PUBLISH with QoS 1 or 2.  Raises PacketError."""
    body = body_of(packet)
    length, start = decode_integer(body, 0, 2, "Topic Name of PUBLISH")
    return decode_integer(body, start + length, 2, "Packet Identifier of PUBLISH")[0]


def code_of(packet: bytes) -> int:
    """Give the reason code of an acknowledgement, 0 where it is left out (MQTT 5.0 §3.4.2.1)."""
    body = body_of(packet)
    return body[2] if len(body) > 2 else 0


def with_identifier(packet: bytes, identifier: int) -> bytes:
    """Give a packet with another Packet Identifier at the beginning of its body."""
    start = len(packet) - len(body_of(packet))
    return packet[:start] + identifier.to_bytes(2, "big") + packet[start + 2 :]


def acknowledgement(packet_type: PacketType, identifier: int, code: int = 0) -> bytes:
    """Write PUBACK, PUBREC, PUBREL or PUBCOMP; only 5.0 has a `code` (MQTT 5.0 §3.4)."""
    body = identifier.to_bytes(2, "big") + (bytes((code,)) if code else b"")
    return write_packet(packet_type << 4 | _WITH_FLAGS.get(packet_type, 0), body)


def read_subscriptions(
    version: ProtocolVersion, packet: bytes, filters: Iterable[tuple[str, int | None]]
) -> list[Subscription]:
    """Give the subscriptions of a SUBSCRIBE, whose `filters` have been read."""
    identifier = 0
    if version is ProtocolVersion.MQTT_5_0:
        permitted = frozenset({PropertyId.SUBSCRIPTION_IDENTIFIER, PropertyId.USER_PROPERTY})
        properties, _ = parse_properties(body_of(packet), 2, permitted, "SUBSCRIBE")
        identifier = properties.integer(PropertyId.SUBSCRIPTION_IDENTIFIER) or 0
    return [Subscription(text, options or 0, identifier) for text, options in filters]


def subscribe(version: ProtocolVersion, identifier: int, wanted: Sequence[Subscription]) -> bytes:
    """Write a SUBSCRIBE; all of `wanted` have the same Subscription Identifier."""
    parts = [identifier.to_bytes(2, "big")]
    if version is ProtocolVersion.MQTT_5_0:
        number = wanted[0].identifier
        section = bytes((PropertyId.SUBSCRIPTION_IDENTIFIER,)) + encode_remaining_length(number) if number else b""
        parts += [encode_remaining_length(len(section)), section]
    for each in wanted:
        parts += [encode_string(each.topic_filter), bytes((each.options,))]
    return write_packet(PacketType.SUBSCRIBE << 4 | 0b0010, b"".join(parts))


def unsubscribe(version: ProtocolVersion, identifier: int, filters: Iterable[str]) -> bytes:
    """Write an UNSUBSCRIBE."""
    parts = [identifier.to_bytes(2, "big"), b"\0" if version is ProtocolVersion.MQTT_5_0 else b""]
    parts += [encode_string(text) for text in filters]
    return write_packet(PacketType.UNSUBSCRIBE << 4 | 0b0010, b"".join(parts))


def suback(version: ProtocolVersion, identifier: int, codes: Iterable[int]) -> bytes:
    """Write a SUBACK."""
    properties = b"\0" if version is ProtocolVersion.MQTT_5_0 else b""
    return write_packet(PacketType.SUBACK << 4, identifier.to_bytes(2, "big") + properties + bytes(codes))


def unsuback(version: ProtocolVersion, identifier: int, count: int) -> bytes:
    """Write an UNSUBACK for `count` Topic Filters; only 5.0 has a code for each."""
    rest = b"\0" + bytes(count) if version is ProtocolVersion.MQTT_5_0 else b""
    return write_packet(PacketType.UNSUBACK << 4, identifier.to_bytes(2, "big") + rest)


def suback_codes(version: ProtocolVersion, packet: bytes) -> bytes:
    """Give the codes of a SUBACK.  Raises PacketError."""
    body = body_of(packet)
    if len(body) < 2:
        raise malformed("SUBACK without a Packet Identifier")
    return body[end_of_properties(body, 2) if version is ProtocolVersion.MQTT_5_0 else 2 :]


def end_of_length(section: bytes) -> int:
    """Give the bytes that a Property Length takes."""
    _, size = decode_remaining_length(section, 0) or (0, 1)
    return size
