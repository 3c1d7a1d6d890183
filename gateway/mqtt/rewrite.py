"""Rewrites a CONNECT with some fields changed and all others as the device sent them.

In: a whole CONNECT, its fields, and the changes.  Out: the bytes of the changed CONNECT; `ValueError` if no valid
CONNECT can carry the changes.

Properties and the Will are copied byte for byte, except for the Will's topic, Retain and Response Topic if changed.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, Literal

from attrs import field, frozen

from gateway.mqtt.connect import (
    BRIDGE_BIT,
    CLEAN_START_FLAG,
    PASSWORD_FLAG,
    RESERVED_FLAG,
    USERNAME_FLAG,
    WILL_FLAG,
    WILL_QOS_FLAGS,
    WILL_RETAIN_FLAG,
    Connect,
)
from gateway.mqtt.packets import (
    MAX_STRING_BYTES,
    PacketType,
    ProtocolVersion,
    decode_binary,
    decode_remaining_length,
    encode_remaining_length,
    encode_string,
)
from gateway.mqtt.properties import PropertyId, end_of_properties, replace_property, replace_string_property
from gateway.mqtt.reader import Packet

_PROTOCOL_NAMES = {
    ProtocolVersion.MQTT_3_1: b"MQIsdp",
    ProtocolVersion.MQTT_3_1_1: b"MQTT",
    ProtocolVersion.MQTT_5_0: b"MQTT",
}


class _Kept(Enum):
    """The type of `KEPT`."""

    KEPT = auto()


Kept = Literal[_Kept.KEPT]
KEPT: Final = _Kept.KEPT
"""Marks a field that stays as the device sent it. None removes an optional field."""


@frozen
class ConnectChanges:
    """Changes to a CONNECT; `repr()` shows no credentials.

    `keep_alive` is in seconds. `version` can only raise 3.1 to 3.1.1. `properties` are valid ones of CONNECT with their
    Property Length, and have no effect before 5.0. The Will's fields have no effect without a Will.
    """

    client_identifier: str | Kept = KEPT
    username: str | Kept | None = field(default=KEPT, repr=False)
    password: bytes | Kept | None = field(default=KEPT, repr=False)
    keep_alive: int | Kept = KEPT
    clean_start: bool | Kept = KEPT
    version: ProtocolVersion | Kept = KEPT
    properties: bytes | Kept = KEPT
    will: Kept | None = KEPT
    will_topic: str | Kept = KEPT
    will_retain: bool | Kept = KEPT
    will_response_topic: str | Kept = KEPT


def rewrite_connect(packet: Packet, connect: Connect, changes: ConnectChanges, max_size: int) -> bytes:
    """Write `packet`, parsed as `connect`, with `changes` (MQTT 3.1 §3.1, MQTT 3.1.1 §3.1, MQTT 5.0 §3.1).

    Returns the bytes of `packet` if nothing changes. `max_size` is the largest CONNECT in bytes, fixed header
    included. Raises ValueError for a password without a user name before 5.0 (MQTT 3.1.1 §3.1.2.9), for a field
    that is too long, and for any change of version other than from 3.1 to 3.1.1.
    """
    if _says_the_same(connect, changes):
        return packet.raw
    version = connect.version if changes.version is KEPT else changes.version
    if version is not connect.version and (connect.version, version) != (
        ProtocolVersion.MQTT_3_1,
        ProtocolVersion.MQTT_3_1_1,
    ):
        raise ValueError(f"a CONNECT of MQTT {connect.version.label} cannot become one of {version.label}")
    username = connect.username if changes.username is KEPT else changes.username
    password = connect.password if changes.password is KEPT else changes.password
    if password is not None and username is None and version is not ProtocolVersion.MQTT_5_0:
        raise ValueError(f"MQTT {version.label} allows no password without a user name")
    clean_start = connect.clean_start if changes.clean_start is KEPT else changes.clean_start
    keep_alive = connect.keep_alive if changes.keep_alive is KEPT else changes.keep_alive
    client_identifier = connect.client_identifier if changes.client_identifier is KEPT else changes.client_identifier
    flags, properties, will = _parts(packet.body, _flags_at(connect.version), connect)
    if changes.properties is not KEPT and version is ProtocolVersion.MQTT_5_0:
        properties = changes.properties
    if changes.will is None:
        flags &= ~(WILL_FLAG | WILL_QOS_FLAGS | WILL_RETAIN_FLAG)
        will = b""
    will_retain = bool(flags & WILL_RETAIN_FLAG) if changes.will_retain is KEPT else changes.will_retain
    flags = _set(flags, CLEAN_START_FLAG, clean_start)
    # MQTT 3.1 lets a device set these without the field; write them only with it.
    flags = _set(_set(flags, USERNAME_FLAG, username is not None), PASSWORD_FLAG, password is not None)
    if will:
        flags = _set(flags, WILL_RETAIN_FLAG, will_retain)
    if version is not connect.version:
        # Bits that have no meaning in 3.1 must be 0 in 3.1.1 (MQTT 3.1.1 §3.1.2.3, §3.1.2.6, §3.1.2.7).
        flags &= ~RESERVED_FLAG
        if connect.will is None:
            flags &= ~(WILL_QOS_FLAGS | WILL_RETAIN_FLAG)
    level = version | (BRIDGE_BIT if connect.bridge else 0)
    name = _PROTOCOL_NAMES[version]
    body = b"".join(
        (
            len(name).to_bytes(2, "big") + name + bytes((level, flags)) + keep_alive.to_bytes(2, "big"),
            properties,
            encode_string(client_identifier),
            _rewrite_will(will, connect, changes),
            b"" if username is None else encode_string(username),
            b"" if password is None else _encode_binary(password),
        )
    )
    rewritten = bytes((PacketType.CONNECT << 4,)) + encode_remaining_length(len(body)) + body
    if len(rewritten) > max_size:
        raise ValueError(f"the rewritten CONNECT has {len(rewritten)} bytes, above the limit of {max_size}")
    return rewritten


def connect_properties(packet: Packet, connect: Connect) -> bytes:
    """Return the bytes of the properties of a validated CONNECT, Property Length included; nothing before 5.0."""
    return _parts(packet.body, _flags_at(connect.version), connect)[1]


def will_properties(packet: Packet, connect: Connect) -> bytes:
    """Return the bytes of the properties of a validated CONNECT's Will, with their length; nothing before 5.0."""
    will = _parts(packet.body, _flags_at(connect.version), connect)[2]
    if not will or connect.version is not ProtocolVersion.MQTT_5_0:
        return b""
    return will[: end_of_properties(will, 0)]


def announce_packet_size(connect: bytes, limit: int) -> bytes:
    """Return a 5.0 CONNECT with a Maximum Packet Size of `limit` bytes (MQTT 5.0 §3.1.2.11.4)."""
    _, length_size = decode_remaining_length(connect, 1) or (0, 1)
    body = connect[1 + length_size :]
    start = 2 + len(_PROTOCOL_NAMES[ProtocolVersion.MQTT_5_0]) + 4  # level, flags, Keep Alive
    end = end_of_properties(body, start)
    properties = replace_property(body[start:end], PropertyId.MAXIMUM_PACKET_SIZE, limit.to_bytes(4, "big"))
    body = body[:start] + properties + body[end:]
    return connect[:1] + encode_remaining_length(len(body)) + body


def _says_the_same(connect: Connect, changes: ConnectChanges) -> bool:
    will = connect.will
    if changes.properties is not KEPT or (changes.will is None and will is not None):
        return False
    wanted: list[tuple[object, object]] = [
        (changes.client_identifier, connect.client_identifier),
        (changes.username, connect.username),
        (changes.password, connect.password),
        (changes.keep_alive, connect.keep_alive),
        (changes.clean_start, connect.clean_start),
        (changes.version, connect.version),
    ]
    if will is not None:
        has = will.properties.text(PropertyId.RESPONSE_TOPIC) if will.properties is not None else None
        wanted += [(changes.will_topic, will.topic), (changes.will_retain, will.retain)]
        if has is not None:
            wanted.append((changes.will_response_topic, has))
    return all(new is KEPT or new == old for new, old in wanted)


def _flags_at(version: ProtocolVersion) -> int:
    return 2 + len(_PROTOCOL_NAMES[version]) + 1


def _parts(body: bytes, flags_at: int, connect: Connect) -> tuple[int, bytes, bytes]:
    """Split a validated body: return its flags, and the bytes of its properties and its Will."""
    flags = body[flags_at]
    start = offset = flags_at + 3
    is_5 = connect.version is ProtocolVersion.MQTT_5_0
    if is_5:
        offset = end_of_properties(body, start)
    properties = body[start:offset]
    _, offset = decode_binary(body, offset, "Client Identifier")
    start = offset
    if flags & WILL_FLAG:
        if is_5:
            offset = end_of_properties(body, offset)
        _, offset = decode_binary(body, offset, "Will Topic")
        _, offset = decode_binary(body, offset, "Will Payload")
    return flags, properties, body[start:offset]


def _rewrite_will(will: bytes, connect: Connect, changes: ConnectChanges) -> bytes:
    if not will or (changes.will_topic is KEPT and changes.will_response_topic is KEPT):
        return will
    offset = 0
    properties = b""
    if connect.version is ProtocolVersion.MQTT_5_0:
        offset = end_of_properties(will, 0)
        properties = will[:offset]
        if changes.will_response_topic is not KEPT:
            properties = replace_string_property(properties, PropertyId.RESPONSE_TOPIC, changes.will_response_topic)
    topic, payload_at = decode_binary(will, offset, "Will Topic")
    encoded = _encode_binary(topic) if changes.will_topic is KEPT else encode_string(changes.will_topic)
    return properties + encoded + will[payload_at:]


def _set(flags: int, flag: int, value: bool) -> int:
    return flags | flag if value else flags & ~flag


def _encode_binary(data: bytes) -> bytes:
    if len(data) > MAX_STRING_BYTES:
        raise ValueError(f"{len(data)} bytes are above the limit of {MAX_STRING_BYTES} for an MQTT field")
    return len(data).to_bytes(2, "big") + data
