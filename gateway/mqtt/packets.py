"""Constants of MQTT 3.1, 3.1.1 and 5.0, and the encoding of integers and strings.

In: bytes and an offset.  Out: numbers, text, and descriptions of codes; `PacketError` for what no version allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum

from gateway.errors import EndReason, PacketError

MAX_REMAINING_LENGTH = 268_435_455
"""The largest Remaining Length that four bytes can encode (MQTT 5.0 §1.5.5)."""

LARGEST_PACKET = 1 + 4 + MAX_REMAINING_LENGTH
"""The largest packet that MQTT can carry, in bytes, fixed header included."""

MAX_STRING_BYTES = 65_535
"""The longest string or binary field that a two-byte length can encode (MQTT 5.0 §1.5.4)."""


MAX_ELEMENTS = 1_000
"""How many properties or Topic Filters one packet may have where the gateway reads them.

Each costs some microseconds, so that a packet takes a few milliseconds of the event loop at most (docs/performance.md).
"""


class PacketType(IntEnum):
    """The control packet types (MQTT 5.0 §2.1.2); AUTH exists in 5.0 only."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class ProtocolVersion(IntEnum):
    """The MQTT versions; values are the protocol levels in CONNECT."""

    MQTT_3_1 = 3
    MQTT_3_1_1 = 4
    MQTT_5_0 = 5

    @property
    def label(self) -> str:
        """The version number as in the specification's title: "3.1", "3.1.1" or "5.0"."""
        return _LABELS[self]


_LABELS = {ProtocolVersion.MQTT_3_1: "3.1", ProtocolVersion.MQTT_3_1_1: "3.1.1", ProtocolVersion.MQTT_5_0: "5.0"}


class ReasonCode(IntEnum):
    """The MQTT 5.0 reason codes that the gateway itself uses (MQTT 5.0 §2.4)."""

    SUCCESS = 0x00
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    ADMINISTRATIVE_ACTION = 0x98
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0


CONNACK_WORDS_3 = {
    0: "connection accepted",
    1: "unacceptable protocol version",
    2: "identifier rejected",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
"""The CONNACK return codes of MQTT 3.1 and 3.1.1 (MQTT 3.1.1 §3.2.2.3)."""

REASON_WORDS_5 = {
    0x00: "success",
    0x04: "disconnect with Will Message",
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "Client Identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "Keep Alive timeout",
    0x8E: "session taken over",
    0x8F: "Topic Filter invalid",
    0x90: "Topic Name invalid",
    0x93: "Receive Maximum exceeded",
    0x94: "Topic Alias invalid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "Shared Subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "Subscription Identifiers not supported",
    0xA2: "Wildcard Subscriptions not supported",
}
"""The reason codes that CONNACK and DISCONNECT carry in MQTT 5.0 (§2.4)."""


def describe_connack(version: ProtocolVersion, code: int) -> str:
    """Describe a CONNACK code (MQTT 3.1.1 §3.2.2.3, MQTT 5.0 §3.2.2.2).

    A broker without 5.0 refuses a 5.0 CONNECT with a 3.x code; 5.0 does not use those numbers.
    """
    of_3 = version < ProtocolVersion.MQTT_5_0 or ReasonCode.SUCCESS < code < ReasonCode.UNSPECIFIED_ERROR
    return (CONNACK_WORDS_3 if of_3 else REASON_WORDS_5).get(code, f"unknown code 0x{code:02X}")


def describe_disconnect(code: int) -> str:
    """Describe the reason code of a DISCONNECT (MQTT 5.0 §3.14.2.1)."""
    if code == ReasonCode.SUCCESS:
        return "normal disconnection"
    return REASON_WORDS_5.get(code, f"unknown code 0x{code:02X}")


def disconnect_detail(code: int) -> str:
    """Return the detail of a session that the broker ended with this reason code: the code, and its words."""
    return f"0x{code:02X}, {describe_disconnect(code)}"


def encode_remaining_length(length: int) -> bytes:
    """Encode a Remaining Length, or any Variable Byte Integer, in the fewest bytes (MQTT 5.0 §1.5.5).

    Raises ValueError for a number that does not fit in four bytes.
    """
    if not 0 <= length <= MAX_REMAINING_LENGTH:
        raise ValueError(f"Remaining Length {length} is not between 0 and {MAX_REMAINING_LENGTH}")
    encoded = bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def decode_remaining_length(data: bytes | bytearray, offset: int) -> tuple[int, int] | None:
    """Decode a Remaining Length, or any Variable Byte Integer: return its value and size in bytes (MQTT 5.0 §1.5.5).

    Returns None if more bytes are needed. Raises ValueError if the fourth byte announces a fifth.
    """
    value = size = 0
    for byte in data[offset : offset + 4]:
        value |= (byte & 0x7F) << 7 * size
        size += 1
        if byte < 0x80:
            return value, size
    if size == 4:
        raise ValueError("a Variable Byte Integer takes at most four bytes")
    return None


def is_minimal(value: int, size: int) -> bool:
    """Return whether a Variable Byte Integer of `size` bytes uses the fewest bytes possible (MQTT 5.0 §1.5.5)."""
    return size == 1 or value >> 7 * (size - 1) > 0


def malformed(detail: str) -> PacketError:
    """Return the error for bytes that the MQTT version does not allow (MQTT 5.0 §4.13.1)."""
    return PacketError(EndReason.MALFORMED_PACKET, ReasonCode.MALFORMED_PACKET, detail)


def too_large(detail: str) -> PacketError:
    """Return the error for a packet above a limit (MQTT 5.0 §4.13.1)."""
    return PacketError(EndReason.PACKET_TOO_LARGE, ReasonCode.PACKET_TOO_LARGE, detail)


def protocol_error(detail: str) -> PacketError:
    """Return the error for a packet that can be read but is not allowed (MQTT 5.0 §4.13.1)."""
    return PacketError(EndReason.PROTOCOL_ERROR, ReasonCode.PROTOCOL_ERROR, detail)


def decode_integer(data: bytes, offset: int, size: int, what: str) -> tuple[int, int]:
    """Read a big-endian integer of `size` bytes: return its value and the offset after it (MQTT 5.0 §1.5.2).

    Raises PacketError (malformed) naming `what` when the bytes end too soon.
    """
    end = offset + size
    if end > len(data):
        raise malformed(f"the packet ends within the {what}")
    return int.from_bytes(data[offset:end], "big"), end


def decode_binary(data: bytes, offset: int, what: str) -> tuple[bytes, int]:
    """Read binary data with a two-byte length: return the data and the offset after it (MQTT 5.0 §1.5.6).

    Raises PacketError (malformed) naming `what` when the bytes end too soon.
    """
    length, start = decode_integer(data, offset, 2, what)
    end = start + length
    if end > len(data):
        raise malformed(f"the packet ends within the {what}")
    return data[start:end], end


def decode_string(data: bytes, offset: int, what: str) -> tuple[str, int]:
    """Read a UTF-8 string with a two-byte length: return the text and the offset after it (MQTT 5.0 §1.5.4).

    Raises PacketError (malformed) naming `what`, without quoting it, if it ends too soon, is not UTF-8 (surrogates
    included), or contains U+0000.
    """
    encoded, end = decode_binary(data, offset, what)
    return decode_text(encoded, what), end


def decode_text(encoded: bytes, what: str) -> str:
    """Decode the bytes of a UTF-8 string.  Raises PacketError (malformed) as `decode_string`."""
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise malformed(f"the {what} is not UTF-8 (MQTT 5.0 §1.5.4)") from None
    if "\0" in text:
        raise malformed(f"the {what} contains the character U+0000 (MQTT 5.0 §1.5.4)")
    return text


def decode_texts(encoded: Sequence[bytes], what: str) -> list[str]:
    """Decode the bytes of many UTF-8 strings at once.  Raises PacketError as `decode_text` for the first with a fault.

    In UTF-8 no character continues behind U+0000, so strings with that between them are as valid together as they are
    alone.  If a string contains it, or is not UTF-8, they are decoded one by one.
    """
    with suppress(UnicodeDecodeError):
        texts = b"\0".join(encoded).decode("utf-8").split("\0")
        if len(texts) == len(encoded):
            return texts
    return [decode_text(each, what) for each in encoded]


def encode_string(text: str) -> bytes:
    """Encode a UTF-8 string with its two-byte length (MQTT 5.0 §1.5.4).

    Raises ValueError above 65,535 bytes.
    """
    encoded = text.encode("utf-8")
    if len(encoded) > MAX_STRING_BYTES:
        raise ValueError(f"a string of {len(encoded)} bytes is above the {MAX_STRING_BYTES} that MQTT can carry")
    return len(encoded).to_bytes(2, "big") + encoded
