"""Reads whole packets from a stream: CONNECT, CONNACK, and AUTH before CONNACK.

In: bytes as they arrive, split anywhere.  Out: one `Packet` at a time, None while more is needed, the unread rest on
demand; `PacketError` at the first byte that cannot begin an expected packet.

After the packet it needs, the owner creates another reader or a framer and passes it `take_rest()`. A reader therefore
holds at most `max_size` bytes and one chunk.
"""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import PacketType, ReasonCode, decode_remaining_length, is_minimal

# The first bytes of protocols that often reach the wrong port. Naming the protocol helps the operator most.
_STRANGERS = (
    (b"GET ", "an HTTP request"),
    (b"POST ", "an HTTP request"),
    (b"HEAD ", "an HTTP request"),
    (b"PUT ", "an HTTP request"),
    (b"OPTIONS ", "an HTTP request"),
    (b"PRI * HTTP/2", "an HTTP/2 request"),
    (b"HTTP/", "an HTTP response: the port that was dialled speaks HTTP, not MQTT"),
    (b"PROXY ", "a PROXY protocol header"),
    (b"\x16\x03", "a TLS ClientHello"),
)


@frozen
class Packet:
    """One whole control packet.

    `flags` are the low four bits of the first byte; `body` is what the Remaining Length counts; `raw` is the whole
    packet, fixed header included; `minimal_length` tells whether the Remaining Length uses the fewest bytes.
    """

    type: PacketType
    flags: int
    body: bytes
    raw: bytes
    minimal_length: bool

    def __repr__(self) -> str:
        # A CONNECT contains the password.
        return f"Packet({self.type.name}, {len(self.raw)} bytes)"


class PacketReader:
    """Reads whole packets of the permitted types from a stream.

    Their fixed header flags must be zero. `any_flags` accepts others, since MQTT 3.1 does not use them, except QoS 3,
    so that a TLS ClientHello is still recognised by its first byte.

    `max_size` is the largest packet in bytes, fixed header included (MQTT 5.0 §3.1.2.11.4). `unexpected` is the reason
    for an unexpected first byte: NOT_MQTT, PROTOCOL_ERROR or UPSTREAM_PROTOCOL_ERROR.
    """

    __slots__ = ("_buffer", "_first_bytes", "_max_size", "_unexpected")

    def __init__(
        self, permitted: frozenset[PacketType], max_size: int, unexpected: EndReason, *, any_flags: bool = False
    ) -> None:
        self._first_bytes = _first_bytes(permitted, any_flags)
        self._max_size = max_size
        self._unexpected = unexpected
        self._buffer = bytearray()

    @property
    def buffered(self) -> int:
        """How many bytes were fed and not yet returned."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream; `next_packet` checks them."""
        self._buffer += data

    def take_rest(self) -> bytes:
        """Return and drop the bytes after the last packet."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def next_packet(self) -> Packet | None:
        """Return the next whole packet, or None if more bytes are needed (MQTT 5.0 §2.1).

        Raises PacketError as early as possible: for type and flags at the first byte, for the size at the end of the
        fixed header, before the body has arrived.
        """
        buffer = self._buffer
        if not buffer:
            return None
        packet_type = self._first_bytes.get(buffer[0])
        if packet_type is None:
            raise self._unexpected_first_byte()
        try:
            decoded = decode_remaining_length(buffer, 1)
        except ValueError:
            raise PacketError(
                self._malformed_reason(EndReason.MALFORMED_PACKET),
                ReasonCode.MALFORMED_PACKET,
                f"{packet_type.name} with a Remaining Length of more than four bytes (MQTT 5.0 §1.5.5)",
            ) from None
        if decoded is None:
            return None
        length, length_size = decoded
        header_size = 1 + length_size
        size = header_size + length
        if size > self._max_size:
            raise PacketError(
                EndReason.PACKET_TOO_LARGE,
                ReasonCode.PACKET_TOO_LARGE,
                f"{packet_type.name} of {size} bytes, above the limit of {self._max_size}",
            )
        if len(buffer) < size:
            return None
        raw = bytes(buffer[:size])
        del buffer[:size]
        return Packet(packet_type, raw[0] & 0x0F, raw[header_size:], raw, is_minimal(length, length_size))

    def _malformed_reason(self, of_device: EndReason) -> EndReason:
        """All faults of the broker share one reason; faults of the device have several."""
        upstream = EndReason.UPSTREAM_PROTOCOL_ERROR
        return upstream if self._unexpected is upstream else of_device

    def _unexpected_first_byte(self) -> PacketError:
        first = self._buffer[0]
        wanted = " or ".join(sorted({packet_type.name for packet_type in self._first_bytes.values()}))
        packet_type, flags = first >> 4, first & 0x0F
        if packet_type == 0:
            reason, code, seen = self._unexpected, ReasonCode.MALFORMED_PACKET, "of the reserved type 0"
        elif packet_type << 4 in self._first_bytes:
            # After CONNECT, an expected packet with wrong flags is malformed, as in the framer.
            reason = self._unexpected
            if reason is EndReason.PROTOCOL_ERROR:
                reason = EndReason.MALFORMED_PACKET
            code = ReasonCode.MALFORMED_PACKET
            seen = f"of {PacketType(packet_type).name} with flags 0b{flags:04b} instead of 0b0000"
        else:
            reason, code, seen = self._unexpected, ReasonCode.PROTOCOL_ERROR, f"of {PacketType(packet_type).name}"
        for opening, name in _STRANGERS:
            if self._buffer.startswith(opening):
                return PacketError(reason, code, name)
        return PacketError(reason, code, f"first byte 0x{first:02X}, {seen}, where {wanted} was expected")


@lru_cache(maxsize=32)
def _first_bytes(permitted: frozenset[PacketType], any_flags: bool) -> dict[int, PacketType]:
    """Return the types by their permitted first bytes; readers share it."""
    flags = [low for low in range(16) if low & 0b0110 != 0b0110] if any_flags else [0]
    return {packet_type << 4 | low: packet_type for packet_type in permitted for low in flags}
