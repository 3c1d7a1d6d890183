"""What lies at the head of a relayed packet's body: topic, Packet Identifier, properties, Topic Filters.

In: a first byte and as much of the body as has come.  Out: 0 if the head is in order, or how many bytes of the body are
needed to say so; `PacketError` for what the version does not allow.

The payload of a PUBLISH is never looked at.  What must be waited for is at most `MOST_HELD` bytes; a head that is
longer is judged as far as that.
"""

from __future__ import annotations

from gateway.mqtt.packets import (
    PacketType,
    ProtocolVersion,
    decode_integer,
    decode_remaining_length,
    malformed,
    protocol_error,
)
from gateway.mqtt.properties import PropertyId, parse_properties
from gateway.mqtt.relayed import read_publish, read_subscribe, read_unsubscribe
from gateway.mqtt.topics import check_filter

MOST_HELD = 0x20000
"""Most bytes of a body that are waited for: the longest topic fits twice."""

_QOS_BITS = 0b0110
_ACKNOWLEDGEMENTS = frozenset({PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP})
_OF_SUBSCRIPTIONS = frozenset({PacketType.SUBACK, PacketType.UNSUBACK})
_ANSWER_PROPERTIES: frozenset[int] = frozenset({PropertyId.REASON_STRING, PropertyId.USER_PROPERTY})


def judge(version: ProtocolVersion, first: int, body: bytes, length: int, *, any_topic: bool = False) -> int:
    """Judge the head of a body of `length` bytes, of which `body` has come, or all of it.

    Gives 0 if it is in order, or how many bytes are needed, more than have come.  Raises PacketError.  The verdict does
    not depend on how the body is cut.  With `any_topic`, a Topic Name may contain any bytes: a broker's are for the
    device to judge, as under a rule (`read_delivery`).
    """
    number = first >> 4
    if number == PacketType.PUBLISH:
        return _judge_publish(version, first, body, length, any_topic)
    if number == PacketType.SUBSCRIBE or number == PacketType.UNSUBSCRIBE:
        return _judge_filters(version, PacketType(number), body, length)
    if number in _ACKNOWLEDGEMENTS or number in _OF_SUBSCRIPTIONS:
        return _judge_answer(version, PacketType(number), body, length)
    return 0


def _judge_publish(version: ProtocolVersion, first: int, body: bytes, length: int, any_topic: bool) -> int:
    """Judge a PUBLISH (MQTT 3.1.1 §3.3, MQTT 5.0 §3.3)."""
    if len(body) < 2:
        return 2
    number_size = 2 if first & _QOS_BITS else 0
    topic_end = 2 + int.from_bytes(body[:2], "big")
    end = topic_end + number_size
    is_5 = version is ProtocolVersion.MQTT_5_0
    if end + is_5 > length:
        raise malformed("the packet ends within the head of PUBLISH")
    if len(body) < end:
        return end
    if number_size:
        _check_identifier(body, topic_end, "PUBLISH")
    if any_topic and topic_end > 2:
        body = body[:2] + b"t" * (topic_end - 2) + body[topic_end:]
    if not is_5:
        read_publish(version, first, body[:end])
        return 0
    properties = _properties_end(body, end, length, "PUBLISH")
    if properties < 0:
        return len(body) + 1
    if properties > MOST_HELD:
        # As if there were none, but for the topic: it may be empty where there are some.
        read_publish(version, first, body[:end] + (b"\x03\x23\0\1" if topic_end == 2 else b"\0"))
        return 0
    if len(body) < properties:
        return properties
    read_publish(version, first, body[:properties])
    return 0


def _judge_filters(version: ProtocolVersion, packet_type: PacketType, body: bytes, length: int) -> int:
    """Judge a SUBSCRIBE or an UNSUBSCRIBE (MQTT 3.1.1 §3.8, §3.10, MQTT 5.0 §3.8, §3.10)."""
    if len(body) < 2:
        return 2
    _check_identifier(body, 0, packet_type.name)
    if length > MOST_HELD:
        return 0
    if len(body) < length:
        return length
    read = read_subscribe if packet_type is PacketType.SUBSCRIBE else read_unsubscribe
    for text, _ in read(version, body).filters:
        try:
            check_filter(text)
        except ValueError as error:
            raise malformed(f"{packet_type.name}: {error} (MQTT {version.label} §4.7)") from None
    return 0


def _judge_answer(version: ProtocolVersion, packet_type: PacketType, body: bytes, length: int) -> int:
    """Judge the Packet Identifier of an acknowledgement, and its properties in 5.0 (MQTT 5.0 §3.4 to §3.7, §3.9)."""
    if len(body) < 2:
        return 2
    _check_identifier(body, 0, packet_type.name)
    # An acknowledgement of a PUBLISH has a reason code before the properties, and may end before either.
    start = 3 if packet_type in _ACKNOWLEDGEMENTS else 2
    if version is not ProtocolVersion.MQTT_5_0 or length <= start:
        return 0
    if len(body) <= start:
        return start + 1
    end = _properties_end(body, start, length, packet_type.name)
    if end < 0:
        return len(body) + 1
    if end > MOST_HELD:
        return 0
    if len(body) < end:
        return end
    parse_properties(body[:end], start, _ANSWER_PROPERTIES, packet_type.name)
    return 0


def _check_identifier(body: bytes, offset: int, name: str) -> None:
    identifier, _ = decode_integer(body, offset, 2, f"Packet Identifier of {name}")
    if not identifier:
        raise protocol_error(f"{name} with Packet Identifier 0 (MQTT 5.0 §2.2.1, MQTT 3.1.1 §2.3.1)")


def _properties_end(body: bytes, offset: int, length: int, name: str) -> int:
    """Give where the properties that begin at `offset` end; -1 while it is not known.  Raises PacketError."""
    try:
        decoded = decode_remaining_length(body, offset)
    except ValueError:
        raise malformed(f"the Property Length of {name} takes more than four bytes (MQTT 5.0 §1.5.5)") from None
    if decoded is None:
        if len(body) >= length:
            raise malformed(f"the packet ends within the Property Length of {name}")
        return -1
    size, taken = decoded
    end = offset + taken + size
    if end > length:
        raise malformed(f"the packet ends within the properties of {name}")
    return end
