"""Builds MQTT packets for tests, right ones by default, so that a test shows only what is wrong.

In: keyword arguments.  Out: bytes.  Written apart from `gateway.mqtt`, so that the two check one another.
"""

from __future__ import annotations

from typing import Any


def variable_byte_integer(value: int, *, size: int = 1) -> bytes:
    """Write a Variable Byte Integer, padded to `size` bytes if that is more than it needs."""
    encoded = []
    while value > 127 or size > 1:
        encoded.append(value % 128 + 128)
        value, size = value // 128, size - 1
    return bytes([*encoded, value])


def packet(first: int, body: bytes = b"", *, length: int | None = None, length_size: int = 1) -> bytes:
    """Put a fixed header before a body; `length` overrides what it says, `length_size` pads it."""
    return bytes([first]) + variable_byte_integer(len(body) if length is None else length, size=length_size) + body


def binary(data: bytes) -> bytes:
    """Write data after its two-byte length."""
    return len(data).to_bytes(2, "big") + data


def string(text: str) -> bytes:
    """Write text after its two-byte length."""
    return binary(text.encode("utf-8", "surrogatepass"))


def number(identifier: int, value: int, *, size: int) -> bytes:
    """Write a numeric property."""
    return bytes([identifier]) + value.to_bytes(size, "big")


def text(identifier: int, value: str) -> bytes:
    """Write a string property."""
    return bytes([identifier]) + string(value)


def user_property(key: str = "key", value: str = "value") -> bytes:
    """Write a User Property."""
    return b"\x26" + string(key) + string(value)


def with_length(properties: bytes) -> bytes:
    """Put the Property Length before properties."""
    return variable_byte_integer(len(properties)) + properties


def properties_for(version: int, properties: bytes) -> bytes:
    """Give the properties as `version` writes them: not at all before 5.0."""
    return with_length(properties) if version == 5 else b""


def connect(
    client_identifier: str | bytes = "sensor-1",
    *,
    version: int = 4,
    name: bytes | None = None,
    level: int | None = None,
    flags: int | None = None,
    clean_start: bool = True,
    keep_alive: int = 60,
    will_topic: str | bytes | None = None,
    will_payload: bytes = b"gone",
    will_qos: int = 0,
    will_retain: bool = False,
    will_properties: bytes = b"",
    username: str | bytes | None = None,
    password: bytes | None = None,
    properties: bytes = b"",
    extra: bytes = b"",
    length_size: int = 1,
) -> bytes:
    """Write a CONNECT; `name`, `level` and `flags` override what the other arguments imply, `extra` ends the body."""
    if flags is None:
        flags = clean_start << 1
        flags |= (will_topic is not None) << 2 | will_qos << 3 | will_retain << 5
        flags |= (password is not None) << 6 | (username is not None) << 7
    body = binary(name if name is not None else b"MQIsdp" if version == 3 else b"MQTT")
    body += bytes([version if level is None else level, flags]) + keep_alive.to_bytes(2, "big")
    body += properties_for(version, properties) + binary(as_bytes(client_identifier))
    if will_topic is not None:
        body += properties_for(version, will_properties) + binary(as_bytes(will_topic)) + binary(will_payload)
    if username is not None:
        body += binary(as_bytes(username))
    if password is not None:
        body += binary(password)
    return packet(0x10, body + extra, length_size=length_size)


def as_bytes(value: str | bytes) -> bytes:
    """Encode text, and leave bytes, which tests use for text that is wrong, as they are."""
    return value.encode() if isinstance(value, str) else value


def connack(
    *,
    version: int = 4,
    code: int = 0,
    flags: int = 0,
    properties: bytes = b"",
    extra: bytes = b"",
    length_size: int = 1,
) -> bytes:
    """Write a CONNACK."""
    return packet(0x20, bytes([flags, code]) + properties_for(version, properties) + extra, length_size=length_size)


def publish(
    topic: str = "t/1",
    payload: bytes = b"21.5",
    *,
    version: int = 4,
    qos: int = 0,
    retain: bool = False,
    duplicate: bool = False,
    packet_identifier: int = 1,
    properties: bytes = b"",
    length_size: int = 1,
) -> bytes:
    """Write a PUBLISH."""
    body = string(topic) + (packet_identifier.to_bytes(2, "big") if qos else b"")
    body += properties_for(version, properties) + payload
    return packet(0x30 | duplicate << 3 | qos << 1 | retain, body, length_size=length_size)


def acknowledgement(first: int, *, packet_identifier: int = 1, code: int | None = None) -> bytes:
    """Write a PUBACK (0x40), PUBREC (0x50), PUBREL (0x62) or PUBCOMP (0x70); only 5.0 has a `code`."""
    return packet(first, packet_identifier.to_bytes(2, "big") + (b"" if code is None else bytes([code])))


def subscribe(*topic_filters: str, version: int = 4, qos: int = 0, packet_identifier: int = 1) -> bytes:
    """Write a SUBSCRIBE, to `t/#` when no Topic Filter is given."""
    body = packet_identifier.to_bytes(2, "big") + properties_for(version, b"")
    return packet(0x82, body + b"".join(string(each) + bytes([qos]) for each in topic_filters or ("t/#",)))


def suback(*codes: int, version: int = 4, packet_identifier: int = 1) -> bytes:
    """Write a SUBACK that grants QoS 0 when no code is given."""
    return packet(0x90, packet_identifier.to_bytes(2, "big") + properties_for(version, b"") + bytes(codes or (0,)))


def unsubscribe(*topic_filters: str, version: int = 4, packet_identifier: int = 1) -> bytes:
    """Write an UNSUBSCRIBE, from `t/#` when no Topic Filter is given."""
    body = packet_identifier.to_bytes(2, "big") + properties_for(version, b"")
    return packet(0xA2, body + b"".join(string(each) for each in topic_filters or ("t/#",)))


def unsuback(*codes: int, version: int = 4, packet_identifier: int = 1) -> bytes:
    """Write an UNSUBACK; only in 5.0 does it carry codes, 0 when none is given."""
    body = packet_identifier.to_bytes(2, "big")
    if version == 5:
        body += with_length(b"") + bytes(codes or (0,))
    return packet(0xB0, body)


def pingreq() -> bytes:
    """Write a PINGREQ."""
    return packet(0xC0)


def pingresp() -> bytes:
    """Write a PINGRESP."""
    return packet(0xD0)


def disconnect(*, code: int | None = None, properties: bytes | None = None) -> bytes:
    """Write a DISCONNECT; only 5.0 has a `code` and `properties`."""
    body = b"" if code is None else bytes([code])
    return packet(0xE0, body + (b"" if properties is None else with_length(properties)))


def auth(*, code: int | None = 0x18, method: str = "SCRAM-SHA-256") -> bytes:
    """Write an AUTH of 5.0, an empty one when `code` is None."""
    return packet(0xF0, b"" if code is None else bytes([code]) + with_length(text(0x15, method)))


def fed(framer: Any, *pieces: bytes) -> bytes:
    """Feed a framer, or what is like one, pieces of a stream, in as many turns as it takes; return what passes."""
    passed = []
    for piece in pieces:
        passed.append(framer.feed(piece))
        while framer.behind:
            passed.append(framer.feed(b""))
    return b"".join(passed)
