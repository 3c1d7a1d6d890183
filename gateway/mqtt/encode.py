"""CONNECT and CONNACK written from what they say.

In: `Connect`, or what a CONNACK must say.  Out: the bytes of the packet.  Only the order of User Properties is kept; no
other order means anything (MQTT 5.0 §2.2.2, §3.1.2.11.8).
"""

from __future__ import annotations

from gateway.mqtt.connect import (
    BRIDGE_BIT,
    CLEAN_START_FLAG,
    PASSWORD_FLAG,
    USERNAME_FLAG,
    WILL_FLAG,
    WILL_RETAIN_FLAG,
    Connect,
    Will,
)
from gateway.mqtt.packets import PacketType, ProtocolVersion, encode_string
from gateway.mqtt.properties import Properties, PropertyId, encode_properties
from gateway.mqtt.relayed import write_packet


def write_connect(connect: Connect) -> bytes:
    """Write a CONNECT (MQTT 3.1 §3.1, MQTT 3.1.1 §3.1, MQTT 5.0 §3.1).  Raises ValueError for a field too long."""
    name = b"MQIsdp" if connect.version is ProtocolVersion.MQTT_3_1 else b"MQTT"
    is_5 = connect.version is ProtocolVersion.MQTT_5_0
    flags = CLEAN_START_FLAG if connect.clean_start else 0
    will = b""
    if connect.will is not None:
        flags |= WILL_FLAG | connect.will.qos << 3 | (WILL_RETAIN_FLAG if connect.will.retain else 0)
        will = _write_will(connect.will, is_5=is_5)
    flags |= USERNAME_FLAG if connect.username is not None else 0
    flags |= PASSWORD_FLAG if connect.password is not None else 0
    return write_packet(
        PacketType.CONNECT << 4,
        b"".join(
            (
                _binary(name),
                bytes((connect.version | (BRIDGE_BIT if connect.bridge else 0), flags)),
                connect.keep_alive.to_bytes(2, "big"),
                encode_properties(connect.properties or Properties({})) if is_5 else b"",
                encode_string(connect.client_identifier),
                will,
                b"" if connect.username is None else encode_string(connect.username),
                b"" if connect.password is None else _binary(connect.password),
            )
        ),
    )


def without(properties: Properties | None, *identifiers: PropertyId, **more: int) -> Properties:
    """Give properties without some of them; `more` are integers that take their place, by the names of `PropertyId`."""
    values = {} if properties is None else dict(properties.values)
    for identifier in identifiers:
        values.pop(identifier, None)
    values |= {PropertyId[name]: value for name, value in more.items()}
    return Properties(values, () if properties is None else properties.user_properties)


def write_connack(version: ProtocolVersion, properties: Properties, *, session_present: bool) -> bytes:
    """Write a CONNACK that accepts (MQTT 3.1.1 §3.2, MQTT 5.0 §3.2); 3.1 has no Session Present."""
    if version is ProtocolVersion.MQTT_5_0:
        return write_packet(PacketType.CONNACK << 4, bytes((session_present, 0)) + encode_properties(properties))
    return bytes((PacketType.CONNACK << 4, 2, session_present and version is not ProtocolVersion.MQTT_3_1, 0))


def _write_will(will: Will, *, is_5: bool) -> bytes:
    properties = encode_properties(will.properties or Properties({})) if is_5 else b""
    return properties + encode_string(will.topic) + _binary(will.payload)


def _binary(data: bytes) -> bytes:
    if len(data) > 65_535:
        raise ValueError(f"{len(data)} bytes are more than a field of MQTT can carry")
    return len(data).to_bytes(2, "big") + data
