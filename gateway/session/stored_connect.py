"""What a stored session reads in CONNECT and CONNACK.

In: packets, and CONNECTs that the gateway wrote itself.  Out: what they say.
"""

from __future__ import annotations

from gateway.errors import EndReason, PacketError
from gateway.mqtt.connack import CONNACK_PROPERTIES
from gateway.mqtt.connect import Connect, parse_connect
from gateway.mqtt.message import Message, end_of_length
from gateway.mqtt.packets import PacketType, ProtocolVersion, ReasonCode
from gateway.mqtt.properties import Properties, PropertyId, parse_properties, without_properties
from gateway.mqtt.reader import Packet, PacketReader
from gateway.mqtt.rewrite import will_properties


def packet_of(raw: bytes, limit: int) -> tuple[Packet, Connect]:
    """Read a CONNECT that the gateway wrote, or has read before."""
    reader = PacketReader(frozenset({PacketType.CONNECT}), max(limit, len(raw)), EndReason.NOT_MQTT)
    reader.feed(raw)
    packet = reader.next_packet()
    if packet is None:
        raise PacketError(EndReason.NOT_MQTT, ReasonCode.MALFORMED_PACKET, "half a CONNECT")
    return packet, parse_connect(packet)


def are_readable(connect: bytes, limits: bytes) -> bool:
    """Whether a CONNECT and the properties of a CONNACK, or nothing, are what they were when they were stored."""
    try:
        if connect:
            packet_of(connect, len(connect))
        limits_of(limits)
    except PacketError:
        return False
    return True


def integer_of(properties: Properties | None, identifier: PropertyId, default: int) -> int:
    """Return the value of a property, or `default` if it is not there."""
    found = None if properties is None else properties.integer(identifier)
    return default if found is None else found


def limits_of(section: bytes) -> Properties:
    """Read the properties of a CONNACK; `section` is empty in 3.x."""
    return parse_properties(section, 0, CONNACK_PROPERTIES, "CONNACK")[0] if section else Properties({})


def is_persistent(connect: Connect) -> bool:
    """Whether a session outlives its connection (MQTT 3.1.1 §3.1.2.4, MQTT 5.0 §3.1.2.11.2)."""
    if connect.version is ProtocolVersion.MQTT_5_0:
        return integer_of(connect.properties, PropertyId.SESSION_EXPIRY_INTERVAL, 0) > 0
    return not connect.clean_start


def will_of(packet: Packet, connect: Connect) -> tuple[Message | None, float]:
    """Read the Will as the message that it becomes, and its delay in seconds."""
    will = connect.will
    if will is None:
        return None, 0.0
    delay = integer_of(will.properties, PropertyId.WILL_DELAY_INTERVAL, 0)
    properties = expiry = None
    if connect.version is ProtocolVersion.MQTT_5_0:
        expiry = None if will.properties is None else will.properties.integer(PropertyId.MESSAGE_EXPIRY_INTERVAL)
        left_out = (PropertyId.WILL_DELAY_INTERVAL, PropertyId.MESSAGE_EXPIRY_INTERVAL)
        section = without_properties(will_properties(packet, connect), *left_out)
        properties = section[end_of_length(section) :]
    return Message(will.topic.encode(), will.payload, will.qos, will.retain, properties, expiry), float(delay)
