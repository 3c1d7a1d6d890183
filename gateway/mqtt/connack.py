"""Reads the broker's CONNACK; writes the two packets the gateway sends itself, a refusing CONNACK and DISCONNECT.

In: a whole CONNACK from `reader`, or a code.  Out: `Connack`, or the bytes to send; `PacketError` for a CONNACK that
its version does not allow.
"""

from __future__ import annotations

from attrs import frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import (
    PacketType,
    ProtocolVersion,
    ReasonCode,
    decode_remaining_length,
    encode_remaining_length,
    encode_string,
    malformed,
    protocol_error,
)
from gateway.mqtt.properties import (
    Properties,
    PropertyId,
    parse_properties,
    replace_property,
    replace_string_property,
)
from gateway.mqtt.reader import Packet

# The body of a CONNACK before 5.0: flags and code.
_BODY_SIZE_3 = 2
# 5.0 reason codes from here on are refusals (MQTT 5.0 §2.4).
_FIRST_REFUSAL = 0x80

CONNACK_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.SESSION_EXPIRY_INTERVAL,
        PropertyId.RECEIVE_MAXIMUM,
        PropertyId.MAXIMUM_QOS,
        PropertyId.RETAIN_AVAILABLE,
        PropertyId.MAXIMUM_PACKET_SIZE,
        PropertyId.ASSIGNED_CLIENT_IDENTIFIER,
        PropertyId.TOPIC_ALIAS_MAXIMUM,
        PropertyId.REASON_STRING,
        PropertyId.USER_PROPERTY,
        PropertyId.WILDCARD_SUBSCRIPTION_AVAILABLE,
        PropertyId.SUBSCRIPTION_IDENTIFIER_AVAILABLE,
        PropertyId.SHARED_SUBSCRIPTION_AVAILABLE,
        PropertyId.SERVER_KEEP_ALIVE,
        PropertyId.RESPONSE_INFORMATION,
        PropertyId.SERVER_REFERENCE,
        PropertyId.AUTHENTICATION_METHOD,
        PropertyId.AUTHENTICATION_DATA,
    }
)
"""What the CONNACK of MQTT 5.0 may carry (§3.2.2.3)."""

# What a server's DISCONNECT may carry (MQTT 5.0 §3.14.2.2).
_DISCONNECT_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.SESSION_EXPIRY_INTERVAL,
        PropertyId.REASON_STRING,
        PropertyId.USER_PROPERTY,
        PropertyId.SERVER_REFERENCE,
    }
)


@frozen
class Connack:
    """The broker's answer to CONNECT.

    `code` is the return code before 5.0 and the reason code in 5.0; `server_keep_alive` is in seconds and
    `maximum_packet_size` in bytes, both None when the broker sets none.
    """

    session_present: bool
    code: int
    server_keep_alive: int | None = None
    assigned_client_identifier: str | None = None
    maximum_packet_size: int | None = None
    reason_string: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the broker accepted the session."""
        return self.code == ReasonCode.SUCCESS


def parse_connack(packet: Packet, version: ProtocolVersion, *, lenient: bool = False) -> Connack:
    """Read the CONNACK that answers a CONNECT of `version` (MQTT 3.1 §3.2, MQTT 3.1.1 §3.2, MQTT 5.0 §3.2).

    A broker without 5.0 refuses a 5.0 CONNECT with a CONNACK of 3.x; it is read as a refusal. `lenient` ignores what
    does not change the meaning: unused flags, and bytes after the code before 5.0.
    Raises PacketError (UPSTREAM_PROTOCOL_ERROR) for anything the version does not allow.
    """
    try:
        return _parse(packet, version, lenient=lenient)
    except PacketError as fault:
        raise PacketError(EndReason.UPSTREAM_PROTOCOL_ERROR, fault.reason_code, fault.detail) from None


def _parse(packet: Packet, version: ProtocolVersion, *, lenient: bool) -> Connack:
    body = packet.body
    is_5 = version is ProtocolVersion.MQTT_5_0
    if len(body) < _BODY_SIZE_3 or (len(body) > _BODY_SIZE_3 and not (is_5 or lenient)):
        raise malformed(f"CONNACK with Remaining Length {len(body)} (MQTT {version.label} §3.2)")
    flags, code = body[0], body[1]
    if version is ProtocolVersion.MQTT_3_1:
        # 3.1 calls this byte "reserved, not used", so its value has no meaning.
        flags = 0
    elif lenient:
        flags &= 1
    if flags > 1:
        raise malformed(f"CONNACK with flags 0b{flags:08b} (MQTT {version.label} §3.2.2.1)")
    session_present = bool(flags)
    if session_present and code:
        raise protocol_error(f"CONNACK with Session Present and code 0x{code:02X} (MQTT {version.label} §3.2.2)")
    properties = Properties({})
    if is_5 and not (len(body) == _BODY_SIZE_3 and code):
        properties = _parse_properties_5(packet, code, lenient=lenient)
    return Connack(
        session_present=session_present,
        code=code,
        server_keep_alive=properties.integer(PropertyId.SERVER_KEEP_ALIVE),
        assigned_client_identifier=properties.text(PropertyId.ASSIGNED_CLIENT_IDENTIFIER),
        maximum_packet_size=properties.integer(PropertyId.MAXIMUM_PACKET_SIZE),
        reason_string=properties.text(PropertyId.REASON_STRING),
    )


def _parse_properties_5(packet: Packet, code: int, *, lenient: bool) -> Properties:
    if not packet.minimal_length and not lenient:
        raise malformed("CONNACK with a Remaining Length in more bytes than it needs (MQTT 5.0 §1.5.5)")
    if 0 < code < _FIRST_REFUSAL:
        raise protocol_error(f"CONNACK with reason code 0x{code:02X}, neither success nor refusal (MQTT 5.0 §3.2.2.2)")
    properties, end = parse_properties(packet.body, _BODY_SIZE_3, CONNACK_PROPERTIES, "CONNACK")
    if end != len(packet.body):
        raise malformed(f"CONNACK with {len(packet.body) - end} bytes after its properties (MQTT 5.0 §3.2.3)")
    return properties


def connack_properties(packet: Packet) -> bytes:
    """Return the bytes of the properties of a 5.0 CONNACK that `parse_connack` has read, Property Length included."""
    return packet.body[_BODY_SIZE_3:]


def connack_acceptance(version: ProtocolVersion, properties: bytes, *, session_present: bool) -> bytes:
    """Write a CONNACK that accepts; `properties` are used in 5.0 only, Property Length included.

    MQTT 3.1 has no Session Present.
    """
    if version is ProtocolVersion.MQTT_5_0:
        return _packet(PacketType.CONNACK, bytes((session_present, 0)) + (properties or b"\0"))
    return _packet(PacketType.CONNACK, bytes((session_present and version is not ProtocolVersion.MQTT_3_1, 0)))


def connack_refusal(version: ProtocolVersion, code_3: int, code_5: int, reason_string: str = "") -> bytes:
    """Write the CONNACK that refuses a CONNECT of `version` (MQTT 3.1.1 §3.2, MQTT 5.0 §3.2).

    `code_3` is the return code before 5.0, `code_5` the reason code in 5.0. `reason_string` is sent in 5.0 only.
    """
    if version is not ProtocolVersion.MQTT_5_0:
        return _packet(PacketType.CONNACK, bytes((0, code_3)))
    return _packet(PacketType.CONNACK, bytes((0, code_5)) + _reason_properties(reason_string))


def disconnect(code: int, reason_string: str = "") -> bytes:
    """Write an MQTT 5.0 DISCONNECT with a reason code (§3.14). Servers cannot send DISCONNECT before 5.0.

    A reason code of 0 and empty properties are left out.
    """
    if reason_string:
        return _packet(PacketType.DISCONNECT, bytes((code,)) + _reason_properties(reason_string))
    return _packet(PacketType.DISCONNECT, bytes((code,)) if code else b"")


def connack_without_session(packet: Packet) -> bytes:
    """Return a CONNACK with Session Present cleared, all else byte for byte."""
    return _packet(PacketType.CONNACK, b"\0" + packet.body[1:])


def connack_for_device(
    packet: Packet, *, hide_session: bool = False, maximum_packet_size: int | None = None, assigned: str | None = None
) -> bytes:
    """Return a CONNACK of MQTT 5.0 that `parse_connack` has read, without its Server Reference (§3.2.2.3.16).

    A device that followed the reference would connect to that server without the gateway, in plain text.
    `hide_session` clears Session Present; `maximum_packet_size` in bytes and `assigned`, a Client Identifier, set these
    properties (§3.2.2.3.6, §3.2.2.3.7), None leaves them as they are.
    """
    properties = packet.body[_BODY_SIZE_3:]
    if not properties:
        return packet.raw
    properties = replace_string_property(properties, PropertyId.SERVER_REFERENCE, None)
    if maximum_packet_size is not None:
        size = maximum_packet_size.to_bytes(4, "big")
        properties = replace_property(properties, PropertyId.MAXIMUM_PACKET_SIZE, size)
    if assigned is not None:
        properties = replace_property(properties, PropertyId.ASSIGNED_CLIENT_IDENTIFIER, encode_string(assigned))
    flags = b"\0" if hide_session else packet.body[:1]
    body = flags + packet.body[1:_BODY_SIZE_3] + properties
    return packet.raw if body == packet.body else _packet(PacketType.CONNACK, body)


def disconnect_for_device(packet: bytes) -> bytes:
    """Return a broker's DISCONNECT of MQTT 5.0 without its Server Reference (§3.14.2.2.5).

    Properties that cannot be read are left out, all of them.
    """
    _, length_size = decode_remaining_length(packet, 1) or (0, 1)
    body = packet[1 + length_size :]
    if len(body) <= 1:
        return packet
    try:
        properties, end = parse_properties(body, 1, _DISCONNECT_PROPERTIES, "DISCONNECT")
    except PacketError:
        return disconnect(body[0])
    if end != len(body):
        return disconnect(body[0])
    if properties.text(PropertyId.SERVER_REFERENCE) is None:
        return packet
    kept = replace_string_property(body[1:], PropertyId.SERVER_REFERENCE, None)
    return _packet(PacketType.DISCONNECT, body[:1] + kept)


def _reason_properties(reason_string: str) -> bytes:
    properties = bytes((PropertyId.REASON_STRING,)) + encode_string(reason_string) if reason_string else b""
    return encode_remaining_length(len(properties)) + properties


def _packet(packet_type: PacketType, body: bytes) -> bytes:
    return bytes((packet_type << 4,)) + encode_remaining_length(len(body)) + body
