"""Reads CONNECT of MQTT 3.1, 3.1.1 and 5.0 strictly.

In: a whole CONNECT from `reader`.  Out: `Connect`; `UnsupportedVersion`, which carries the CONNACK to answer with, for
an unsupported protocol level; `PacketError` for anything else the version does not allow.
"""

from __future__ import annotations

from attrs import evolve, field, frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import (
    ProtocolVersion,
    ReasonCode,
    decode_binary,
    decode_integer,
    decode_string,
    malformed,
)
from gateway.mqtt.properties import Properties, PropertyId, parse_properties
from gateway.mqtt.reader import Packet

# Mosquitto sets this bit of the level in the CONNECT of a bridge; there is no such level in 5.0.
BRIDGE_BIT = 0x80

_VERSIONS = {
    (b"MQIsdp", 3): ProtocolVersion.MQTT_3_1,
    (b"MQIsdp", 3 | BRIDGE_BIT): ProtocolVersion.MQTT_3_1,
    (b"MQTT", 4): ProtocolVersion.MQTT_3_1_1,
    (b"MQTT", 4 | BRIDGE_BIT): ProtocolVersion.MQTT_3_1_1,
    (b"MQTT", 5): ProtocolVersion.MQTT_5_0,
}
_PROTOCOL_NAMES = frozenset(name for name, _ in _VERSIONS)

# Show at most this many bytes of a wrong protocol name.
_SHOWN_NAME = 16

USERNAME_FLAG = 0b1000_0000
PASSWORD_FLAG = 0b0100_0000
WILL_RETAIN_FLAG = 0b0010_0000
WILL_QOS_FLAGS = 0b0001_1000
WILL_FLAG = 0b0000_0100
CLEAN_START_FLAG = 0b0000_0010
RESERVED_FLAG = 0b0000_0001

CONNECT_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.SESSION_EXPIRY_INTERVAL,
        PropertyId.RECEIVE_MAXIMUM,
        PropertyId.MAXIMUM_PACKET_SIZE,
        PropertyId.TOPIC_ALIAS_MAXIMUM,
        PropertyId.REQUEST_RESPONSE_INFORMATION,
        PropertyId.REQUEST_PROBLEM_INFORMATION,
        PropertyId.USER_PROPERTY,
        PropertyId.AUTHENTICATION_METHOD,
        PropertyId.AUTHENTICATION_DATA,
    }
)
"""The properties a 5.0 CONNECT may carry (§3.1.2.11)."""

WILL_PROPERTIES: frozenset[int] = frozenset(
    {
        PropertyId.WILL_DELAY_INTERVAL,
        PropertyId.PAYLOAD_FORMAT_INDICATOR,
        PropertyId.MESSAGE_EXPIRY_INTERVAL,
        PropertyId.CONTENT_TYPE,
        PropertyId.RESPONSE_TOPIC,
        PropertyId.CORRELATION_DATA,
        PropertyId.USER_PROPERTY,
    }
)
"""The properties a 5.0 Will may carry (§3.1.3.2)."""


class UnsupportedVersion(PacketError):
    """The device asked for a protocol level that the gateway does not support.

    `answer` is the CONNACK that says so, in the form the device most likely understands (MQTT 3.1.1 §3.1.2.2,
    MQTT 5.0 §3.1.2.2).
    """

    def __init__(self, level: int, detail: str) -> None:
        super().__init__(EndReason.UNSUPPORTED_PROTOCOL_VERSION, ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, detail)
        self.answer = b"\x20\x02\x00\x01" if level < ProtocolVersion.MQTT_5_0 else b"\x20\x03\x00\x84\x00"


@frozen
class Will:
    """The message the broker publishes when the connection is lost (MQTT 5.0 §3.1.2.5)."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool
    properties: Properties | None


@frozen
class Connect:
    """The fields of a CONNECT.

    `bridge` is Mosquitto's bridge bit; `clean_start` is called Clean Session before 5.0; `keep_alive` is in seconds, 0
    for none; `properties` is None before 5.0. `repr()` shows no credentials.
    """

    version: ProtocolVersion
    bridge: bool
    clean_start: bool
    keep_alive: int
    client_identifier: str
    will: Will | None
    username: str | None = field(repr=False)
    password: bytes | None = field(repr=False)
    properties: Properties | None

    def without_content(self) -> Connect:
        """Return a copy without what only the broker needs: identifier, Will, credentials, Authentication Data."""
        properties = self.properties
        if properties is not None:
            data = PropertyId.AUTHENTICATION_DATA
            properties = Properties({key: value for key, value in properties.values.items() if key != data})
        return evolve(self, client_identifier="", will=None, username=None, password=None, properties=properties)

    @property
    def authentication_method(self) -> str | None:
        """The enhanced authentication method, or None (MQTT 5.0 §3.1.2.11.9)."""
        return self.properties.text(PropertyId.AUTHENTICATION_METHOD) if self.properties is not None else None

    @property
    def maximum_packet_size(self) -> int | None:
        """The largest packet in bytes that the device accepts, or None for no limit (MQTT 5.0 §3.1.2.11.4)."""
        return self.properties.integer(PropertyId.MAXIMUM_PACKET_SIZE) if self.properties is not None else None


def parse_connect(packet: Packet) -> Connect:
    """Read a CONNECT (MQTT 3.1 §3.1, MQTT 3.1.1 §3.1, MQTT 5.0 §3.1).

    Raises UnsupportedVersion for an unsupported level, PacketError for any other fault.
    A Client Identifier may be empty or of any length; the broker decides.
    """
    body = packet.body
    name, offset = decode_binary(body, 0, "protocol name of CONNECT")
    if name not in _PROTOCOL_NAMES:
        shown = name[:_SHOWN_NAME]
        raise malformed(f"the protocol name of CONNECT is {shown!r}, neither MQTT nor MQIsdp (MQTT 5.0 §3.1.2.1)")
    level, offset = decode_integer(body, offset, 1, "protocol level of CONNECT")
    version = _VERSIONS.get((name, level))
    if version is None:
        raise UnsupportedVersion(level, f"protocol name {name.decode()} with level {level}")
    if packet.flags and version is not ProtocolVersion.MQTT_3_1:
        raise malformed(f"CONNECT with flags 0b{packet.flags:04b} instead of 0b0000 (MQTT {version.label} §2)")
    if version is ProtocolVersion.MQTT_5_0 and not packet.minimal_length:
        raise malformed("CONNECT with a Remaining Length in more bytes than it needs (MQTT 5.0 §1.5.5)")
    flags, offset = decode_integer(body, offset, 1, "flags of CONNECT")
    _check_flags(version, flags)
    keep_alive, offset = decode_integer(body, offset, 2, "Keep Alive of CONNECT")
    properties = None
    if version is ProtocolVersion.MQTT_5_0:
        properties, offset = parse_properties(body, offset, CONNECT_PROPERTIES, "CONNECT")
    client_identifier, offset = decode_string(body, offset, "Client Identifier of CONNECT")
    will = None
    if flags & WILL_FLAG:
        will, offset = _parse_will(version, flags, body, offset, 0 if properties is None else properties.count)
    username = password = None
    # MQTT 3.1 §3.1: the Remaining Length takes precedence over these two flags, so either may be set without its field.
    may_be_absent = version is ProtocolVersion.MQTT_3_1
    if flags & USERNAME_FLAG and not (may_be_absent and offset == len(body)):
        username, offset = decode_string(body, offset, "user name of CONNECT")
    if flags & PASSWORD_FLAG and not (may_be_absent and offset == len(body)):
        password, offset = decode_binary(body, offset, "password of CONNECT")
    if offset != len(body):
        raise malformed(f"CONNECT with {len(body) - offset} bytes after its last field (MQTT {version.label} §3.1)")
    return Connect(
        version=version,
        bridge=bool(level & BRIDGE_BIT),
        clean_start=bool(flags & CLEAN_START_FLAG),
        keep_alive=keep_alive,
        client_identifier=client_identifier,
        will=will,
        username=username,
        password=password,
        properties=properties,
    )


def _check_flags(version: ProtocolVersion, flags: int) -> None:
    """Refuse Connect Flags that contradict each other (MQTT 3.1.1 §3.1.2.3, MQTT 5.0 §3.1.2.3)."""
    spec = f"MQTT {version.label}"
    # MQTT 3.1 does not use the reserved bit, nor the Will bits without a Will, so their values have no meaning.
    lenient = version is ProtocolVersion.MQTT_3_1
    if flags & RESERVED_FLAG and not lenient:
        raise malformed(f"CONNECT with its reserved flag set ({spec} §3.1.2.3)")
    if flags & WILL_FLAG:
        if flags & WILL_QOS_FLAGS == WILL_QOS_FLAGS:
            raise malformed(f"CONNECT with Will QoS 3 ({spec} {'§3.1' if lenient else '§3.1.2.6'})")
    elif not lenient:
        if flags & WILL_QOS_FLAGS:
            raise malformed(f"CONNECT with a Will QoS but no Will ({spec} §3.1.2.6)")
        if flags & WILL_RETAIN_FLAG:
            raise malformed(f"CONNECT with Will Retain but no Will ({spec} §3.1.2.7)")
    if flags & PASSWORD_FLAG and not flags & USERNAME_FLAG and version is not ProtocolVersion.MQTT_5_0:
        raise malformed(f"CONNECT with a password but no user name ({spec} {'§3.1' if lenient else '§3.1.2.9'})")


def _parse_will(version: ProtocolVersion, flags: int, body: bytes, offset: int, before: int) -> tuple[Will, int]:
    """Read the Will; `before` is how many properties CONNECT has before it."""
    properties = None
    if version is ProtocolVersion.MQTT_5_0:
        properties, offset = parse_properties(body, offset, WILL_PROPERTIES, "the Will of CONNECT", before=before)
    topic, offset = decode_string(body, offset, "Will Topic of CONNECT")
    payload, offset = decode_binary(body, offset, "Will Payload of CONNECT")
    qos = (flags & WILL_QOS_FLAGS) >> 3
    return Will(topic, payload, qos, bool(flags & WILL_RETAIN_FLAG), properties), offset
