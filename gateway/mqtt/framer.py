"""The fast path: checks the fixed header of every relayed packet in place and passes the bytes on.

In: the bytes of one direction after CONNACK, split anywhere.  Out: the same bytes, as far as they may pass; `error`
after a fault, `disconnected` after a complete DISCONNECT.

What is fed in one piece may hold many packets.  A framer takes so many at a time and puts the rest off, so that a turn
of the event loop stays short: while it is `behind`, `feed(b"")` goes on.

Bodies are not read: once a fixed header is checked, its body is counted and passed on as it arrives. Only an incomplete
fixed header is held back, at most four bytes. The result does not depend on how the stream is split. The exception is a
broker's DISCONNECT, which is read whole and loses its Server Reference.

MQTT 3.1 leaves the flags of most packets unused, so they are ignored there. For 3.1.1 and 5.0 a framer can be lenient:
deviations that do not affect the framing then pass, for the receiver to decide.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from itertools import product

from attrs import frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.connack import disconnect_for_device
from gateway.mqtt.packets import (
    MAX_REMAINING_LENGTH,
    PacketType,
    ProtocolVersion,
    ReasonCode,
    decode_remaining_length,
    is_minimal,
)


class Sender(Enum):
    """Who sends the bytes that a framer checks."""

    # Enum's own is a function in Python.
    __hash__ = object.__hash__

    DEVICE = "device"
    BROKER = "broker"


_PERMITTED_3 = {
    Sender.DEVICE: {
        PacketType.PUBLISH,
        PacketType.PUBACK,
        PacketType.PUBREC,
        PacketType.PUBREL,
        PacketType.PUBCOMP,
        PacketType.SUBSCRIBE,
        PacketType.UNSUBSCRIBE,
        PacketType.PINGREQ,
        PacketType.DISCONNECT,
    },
    Sender.BROKER: {
        PacketType.PUBLISH,
        PacketType.PUBACK,
        PacketType.PUBREC,
        PacketType.PUBREL,
        PacketType.PUBCOMP,
        PacketType.SUBACK,
        PacketType.UNSUBACK,
        PacketType.PINGRESP,
    },
}
_ADDED_BY_5 = {PacketType.DISCONNECT, PacketType.AUTH}

_ACKNOWLEDGEMENTS = {PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP}
_WITH_QOS_1_FLAGS = {PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE}
_NO_LIMIT = MAX_REMAINING_LENGTH

_SMALLEST_LIMIT = 256
# A broker's DISCONNECT is read whole; what is longer loses its properties.
_LONGEST_DISCONNECT = 65_536

# Bytes kept of a packet with a fault.
_REMEMBERED = 16
# Packets taken at a time, some 0.1 µs each; and those of them that need a closer look, some 1 µs each.
_MOST_AT_ONCE = 10_000
_MOST_LOOKS_AT_ONCE = 1_000

# A Remaining Length of one byte is at most this.
_ONE_BYTE_MAX = 127
# As a lower bound in the tables below, no one-byte Remaining Length reaches this, so the packet takes the slow path.
_CLOSER_LOOK = 256
# The same in a byte, for the compiled core: no Remaining Length of one byte is as large.
_NEVER = 255


# Where each version defines the fixed header. Lengths are defined with each packet, in §3.
_SECTIONS = {
    ProtocolVersion.MQTT_3_1: {"type": "§2.1", "flags": "§2.1", "length": "§2.1", "DUP": "§2.1", "QoS": "§2.1"},
    ProtocolVersion.MQTT_3_1_1: {
        "type": "§2.2.1",
        "flags": "§2.2.2",
        "length": "§2.2.3",
        "DUP": "§3.3.1.1",
        "QoS": "§3.3.1.2",
    },
    ProtocolVersion.MQTT_5_0: {
        "type": "§2.1.2",
        "flags": "§2.1.3",
        "length": "§1.5.5",
        "DUP": "§3.3.1.1",
        "QoS": "§3.3.1.2",
    },
}


def _cite(version: ProtocolVersion, rule: str) -> str:
    return f"MQTT {version.label} {_SECTIONS[version][rule]}"


def _first_byte_fault(
    sender: Sender, version: ProtocolVersion, first: int, *, lenient: bool
) -> tuple[ReasonCode, str] | None:
    """Return the fault of a first byte (type and flags), or None (MQTT 3.1.1 §2.2, MQTT 5.0 §2.1)."""
    number, flags = first >> 4, first & 0x0F
    is_5 = version is ProtocolVersion.MQTT_5_0
    if number == 0 or (number == PacketType.AUTH and not is_5):
        return ReasonCode.MALFORMED_PACKET, f"reserved control packet type {number} ({_cite(version, 'type')})"
    packet_type = PacketType(number)
    name = packet_type.name
    if packet_type not in _PERMITTED_3[sender] and not (is_5 and packet_type in _ADDED_BY_5):
        detail = f"{name} from the {sender.value} after CONNACK ({_cite(version, 'type')})"
        if packet_type is PacketType.CONNECT and sender is Sender.DEVICE:
            detail = f"a second CONNECT (MQTT {version.label} §3.1)"
        return ReasonCode.PROTOCOL_ERROR, detail
    if packet_type is PacketType.PUBLISH:
        qos, duplicate = flags >> 1 & 0b11, flags & 0b1000
        if qos == 3:
            return ReasonCode.MALFORMED_PACKET, f"PUBLISH with QoS 3 ({_cite(version, 'QoS')})"
        # MQTT 3.1 does not forbid DUP with QoS 0.
        if duplicate and qos == 0 and not lenient:
            return ReasonCode.MALFORMED_PACKET, f"PUBLISH with DUP and QoS 0 ({_cite(version, 'DUP')})"
        return None
    wanted = 0b0010 if packet_type in _WITH_QOS_1_FLAGS else 0b0000
    # In MQTT 3.1 most packets do not use them, and devices set some.
    if flags != wanted and not lenient:
        detail = f"{name} with flags 0b{flags:04b} instead of 0b{wanted:04b} ({_cite(version, 'flags')})"
        return ReasonCode.MALFORMED_PACKET, detail
    return None


def _length_limits(version: ProtocolVersion, first: int, *, lenient: bool) -> tuple[int, int]:
    """Return the shortest and longest Remaining Length of a packet that may pass (MQTT 3.1.1 §3, MQTT 5.0 §3)."""
    shortest, longest = _standard_limits(version, first)
    return shortest, _NO_LIMIT if lenient else longest


def _standard_limits(version: ProtocolVersion, first: int) -> tuple[int, int]:
    packet_type = PacketType(first >> 4)
    is_5 = version is ProtocolVersion.MQTT_5_0
    # The Property Length takes at least one byte.
    properties = 1 if is_5 else 0
    if packet_type is PacketType.PUBLISH:
        # Topic length and one character; in 5.0 an empty topic needs a Topic Alias, which is longer.
        packet_identifier = 2 if first & 0b0110 else 0
        return 3 + packet_identifier + properties, _NO_LIMIT
    if packet_type in _ACKNOWLEDGEMENTS:
        # In 5.0 a reason code and properties are optional.
        return 2, _NO_LIMIT if is_5 else 2
    if packet_type is PacketType.SUBSCRIBE:
        # Packet Identifier; length, one character and options of one Topic Filter.
        return 6 + properties, _NO_LIMIT
    if packet_type is PacketType.UNSUBSCRIBE:
        # Packet Identifier; length and one character of one Topic Filter.
        return 5 + properties, _NO_LIMIT
    if packet_type is PacketType.SUBACK or (packet_type is PacketType.UNSUBACK and is_5):
        # Packet Identifier and one code.
        return 3 + properties, _NO_LIMIT
    if packet_type is PacketType.UNSUBACK:
        return 2, 2
    if packet_type in _ADDED_BY_5 and is_5:
        # The reason code and the properties are optional.
        return 0, _NO_LIMIT
    # PINGREQ, PINGRESP, and DISCONNECT before 5.0.
    return 0, 0


@frozen
class _Rules:
    """What one sender may send in one version, for each of the 256 first bytes.

    `limits` holds the shortest and longest Remaining Length, or None where the first byte is a fault. `low` and `high`
    bound a one-byte Remaining Length that may pass at once; `high` is 127 where a longer length is allowed. Everything
    else takes the slow path: a long packet, a DISCONNECT, a fault.
    """

    limits: tuple[tuple[int, int] | None, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


def _build_rules(sender: Sender, version: ProtocolVersion, lenient: bool) -> _Rules:
    limits: list[tuple[int, int] | None] = [None] * 256
    low, high = [_CLOSER_LOOK] * 256, [0] * 256
    for first in range(256):
        ignores_flags = lenient or version is ProtocolVersion.MQTT_3_1
        if _first_byte_fault(sender, version, first, lenient=ignores_flags) is None:
            limits[first] = shortest, longest = _length_limits(version, first, lenient=lenient)
            if first >> 4 != PacketType.DISCONNECT:
                low[first], high[first] = shortest, min(longest, _ONE_BYTE_MAX)
    return _Rules(tuple(limits), tuple(low), tuple(high))


_RULES = {key: _build_rules(*key) for key in product(Sender, ProtocolVersion, (False, True))}


@cache
def _tables(sender: Sender, version: ProtocolVersion, lenient: bool) -> bytes:
    """Give the shortest and the longest Remaining Length for each first byte; nothing is known of bodies."""
    rules = _RULES[sender, version, lenient]
    return bytes(min(low, _NEVER) for low in rules.low) + bytes(rules.high) + bytes(512)


_END_REASONS: dict[int, EndReason] = {
    ReasonCode.MALFORMED_PACKET: EndReason.MALFORMED_PACKET,
    ReasonCode.PROTOCOL_ERROR: EndReason.PROTOCOL_ERROR,
    ReasonCode.TOPIC_ALIAS_INVALID: EndReason.PROTOCOL_ERROR,
    ReasonCode.PACKET_TOO_LARGE: EndReason.PACKET_TOO_LARGE,
}


class Framer:
    """Passes on the bytes of one direction while they are well-framed MQTT.

    `max_packet_size` is the largest packet in bytes, fixed header included (MQTT 5.0 §3.1.2.11.4), at least 256.
    `lenient` lets unused flags, DUP with QoS 0, longer packets than the version defines, and padded lengths pass.

    `packets` counts the accepted fixed headers. The first fault sets `error`, a complete DISCONNECT sets
    `disconnected`; nothing passes after either. `disconnect_code` is the reason code of a 5.0 DISCONNECT, known
    from its first body byte on. `rejected` is the beginning of the packet with the fault. `behind` tells that bytes
    that were fed wait for the next `feed`, which may be of none.
    """

    __slots__ = (
        "_disconnect",
        "_disconnect_at",
        "_disconnecting",
        "_held",
        "_high",
        "_lenient",
        "_limits",
        "_low",
        "_sender",
        "_skip",
        "_special",
        "_version",
        "behind",
        "disconnect_code",
        "disconnected",
        "error",
        "max_packet_size",
        "packets",
        "rejected",
    )

    def __init__(
        self, sender: Sender, version: ProtocolVersion, max_packet_size: int, *, lenient: bool = False
    ) -> None:
        if max_packet_size < _SMALLEST_LIMIT:
            raise ValueError(f"max_packet_size is {max_packet_size}; it must be at least {_SMALLEST_LIMIT} bytes")
        self._sender = sender
        self._version = version
        self._lenient = lenient
        self.max_packet_size = max_packet_size
        rules = _RULES[sender, version, lenient]
        self._limits = rules.limits
        self._low = rules.low
        self._high = rules.high
        # Remaining bytes of the current packet.
        self._skip = 0
        # An incomplete fixed header, or what is put off.
        self._held = b""
        self.behind = False
        self._disconnecting = False
        # A broker's incomplete DISCONNECT, up to the limit, and where it continues in the bytes being fed.
        self._disconnect = b""
        self._disconnect_at = 0
        # Whether `feed` must look at more than `_skip`: held bytes, an incomplete DISCONNECT, or an error.
        self._special = False
        self.packets = 0
        self.error: PacketError | None = None
        self.rejected = b""
        self.disconnected = False
        self.disconnect_code: int | None = None

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes passed on end with a whole packet and no part of one is held back."""
        return not self._skip and (self.behind or not self._held)

    @property
    def tables(self) -> bytes:
        """What the compiled core needs to know (`struct rules` in gateway/relay/_core.c): four tables of 256 bytes."""
        return _tables(self._sender, self._version, self._lenient)

    def lend(self) -> tuple[int, bytes] | None:
        """Give where the stream stands: body bytes still to come, and bytes held.  None if only Python can go on."""
        if self.error is not None or self._disconnecting or self.behind:
            return None
        return self._skip, self._held

    def take_back(self, skip: int, held: bytes) -> None:
        """Go on from where `lend` began and others have ended."""
        self._skip = skip
        self._held = held
        self._special = bool(held)

    @property
    def remaining(self) -> int:
        """How many bytes of the packet being passed on are still to come; a broker's DISCONNECT passes whole."""
        return 0 if self._disconnecting else self._skip

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that may pass: usually `data` itself, not a copy.

        Never raises for what a peer sent: a fault sets `error`, and the bytes before the faulty packet are returned.
        """
        if self._special:
            if self._disconnecting:
                return self._pass_disconnect(data, self._skip)
            if self.error is not None:
                return b""
            data = self._held + data
            self._held = b""
            self._special = self.behind = False
        size = len(data)
        position = self._skip
        if not position and size > 1:
            # Most chunks are exactly one short packet.
            first = data[0]
            length = data[1]
            if length + 2 == size and self._low[first] <= length <= self._high[first]:
                self.packets += 1
                return data
        if position >= size:
            self._skip = position - size
            return data
        low = self._low
        high = self._high
        limit = self.max_packet_size
        last = size - 1
        packets = looks = 0
        # No packet is shorter than two bytes, so this bounds their number.
        bound = min(last, 2 * _MOST_AT_ONCE)
        while True:
            while position < bound:
                first = data[position]
                length = data[position + 1]
                if low[first] <= length <= high[first]:
                    position += length + 2
                    packets += 1
                    continue
                if length > _ONE_BYTE_MAX and high[first] == _ONE_BYTE_MAX and position + 2 < size:
                    # A two-byte Remaining Length is common enough to be read here; zero in the second byte is padding.
                    second = data[position + 2]
                    end = position + 3 + length - 128 + (second << 7)
                    if 0 < second <= _ONE_BYTE_MAX and end - position <= limit:
                        position = end
                        packets += 1
                        continue
                end = self._look_closer(data, position)
                if end < 0:
                    break
                packets += 1
                position = end
                looks += 1
                if self._disconnecting:
                    break
                if looks == _MOST_LOOKS_AT_ONCE:
                    self._put_off(data, position)
                    break
            if position >= last or self._special:
                break
            bound = min(last, position + 2 * (_MOST_AT_ONCE - packets))
            if position >= bound:
                self._put_off(data, position)
                break
        if position == last and not self._special:
            self._look_closer(data, position)
        self.packets += packets
        if self._special:
            self._skip = 0
            return self._pass_disconnect(data, position) if self._disconnecting else self._stop(data, position)
        self._skip = position - size
        return data

    def _stop(self, data: bytes, position: int) -> bytes:
        """Pass what comes before `position`, and remember what a fault was found in."""
        if self.error is not None:
            self.rejected = data[position : position + _REMEMBERED]
        return data[:position]

    def _put_off(self, data: bytes, position: int) -> None:
        """Leave the packets from `position` on to the next `feed`."""
        if position < len(data):
            self._held = data[position:]
            self._special = self.behind = True

    def _look_closer(self, data: bytes, position: int) -> int:
        """Check the fixed header at `position` in full: return where its packet ends, or -1 if it cannot pass (yet).

        Each byte is checked as soon as it is there, in order, so the result does not depend on how the stream is split.
        """
        first = data[position]
        limits = self._limits[first]
        if limits is None:
            return self._fail(first)
        try:
            decoded = decode_remaining_length(data, position + 1)
        except ValueError:
            return self._fail(first)
        if decoded is None:
            self._held = data[position:]
            self._special = True
            return -1
        length, length_size = decoded
        body = position + 1 + length_size
        end = body + length
        shortest, longest = limits
        if (
            not shortest <= length <= longest
            or end - position > self.max_packet_size
            or (self._forbids_padding and not is_minimal(length, length_size))
        ):
            return self._fail(first, length, length_size)
        if first >> 4 == PacketType.DISCONNECT:
            self._special = self._disconnecting = True
            self._disconnect_at = position
            if length and body < len(data):
                self.disconnect_code = data[body]
            elif not length and self._version is ProtocolVersion.MQTT_5_0:
                # No reason code means normal disconnection (MQTT 5.0 §3.14.2.1).
                self.disconnect_code = ReasonCode.SUCCESS
        return end

    @property
    def _forbids_padding(self) -> bool:
        """Whether a Remaining Length must use the fewest bytes: only 5.0 says so, and old firmware does not."""
        return self._version is ProtocolVersion.MQTT_5_0 and not self._lenient

    def _pass_disconnect(self, data: bytes, end: int) -> bytes:
        """Pass a DISCONNECT that ends at `end`, possibly beyond `data`, and nothing after it.

        A broker's is passed once it is complete, without its Server Reference.
        """
        if self.disconnected:
            return b""
        size = len(data)
        if self._skip and self.disconnect_code is None and data:
            # The body begins with this chunk; only 5.0 has one.
            self.disconnect_code = data[0]
        self._skip = max(end - size, 0)
        self.disconnected = not self._skip
        if self._sender is Sender.DEVICE:
            return data[:end]
        start, self._disconnect_at = self._disconnect_at, 0
        self._disconnect = (self._disconnect + data[start:end])[:_LONGEST_DISCONNECT]
        return data[:start] + (disconnect_for_device(self._disconnect) if self.disconnected else b"")

    def _fail(self, first: int, length: int | None = None, length_size: int = 0) -> int:
        """Set `error` for a fixed header that cannot pass; `length` is None if the Remaining Length is unreadable."""
        self._set_error(*self._explain(first, length, length_size))
        return -1

    def _set_error(self, code: int, detail: str) -> None:
        """End the stream for its sender's fault."""
        if self._sender is Sender.DEVICE or code == ReasonCode.PACKET_TOO_LARGE:
            reason = _END_REASONS[code]
        else:
            # A broker's faults share one reason, except the one that the gateway's configuration can fix.
            reason = EndReason.UPSTREAM_PROTOCOL_ERROR
        self.error = PacketError(reason, code, detail)
        self._special = True

    def _explain(self, first: int, length: int | None, length_size: int) -> tuple[ReasonCode, str]:
        version, lenient = self._version, self._lenient
        ignores_flags = lenient or version is ProtocolVersion.MQTT_3_1
        fault = _first_byte_fault(self._sender, version, first, lenient=ignores_flags)
        if fault is not None:
            return fault
        packet_type = PacketType(first >> 4)
        name = packet_type.name
        if length is None:
            detail = f"{name} with a Remaining Length of more than four bytes ({_cite(version, 'length')})"
            return ReasonCode.MALFORMED_PACKET, detail
        if self._forbids_padding and not is_minimal(length, length_size):
            detail = f"{name} with Remaining Length {length} in {length_size} bytes ({_cite(version, 'length')})"
            return ReasonCode.MALFORMED_PACKET, detail
        shortest, longest = _length_limits(version, first, lenient=lenient)
        if not shortest <= length <= longest:
            wanted = f"instead of {longest}" if shortest == longest else f"where at least {shortest} is needed"
            detail = f"{name} with Remaining Length {length} {wanted} (MQTT {version.label} §3.{packet_type.value})"
            return ReasonCode.MALFORMED_PACKET, detail
        size = 1 + length_size + length
        detail = f"{name} of {size} bytes from the {self._sender.value}, above the limit of {self.max_packet_size}"
        return ReasonCode.PACKET_TOO_LARGE, detail
