"""Whole packets out of what a framer or an inspector has passed.

In: the bytes of one direction after CONNACK, cut anywhere.  Out: control packets, each whole.
"""

from __future__ import annotations

from typing import Protocol

from gateway.errors import PacketError
from gateway.mqtt.packets import decode_remaining_length


class Checker(Protocol):
    """A framer, or an inspector in its place."""

    error: PacketError | None

    @property
    def packets(self) -> int:
        """How many packets were accepted."""

    def feed(self, data: bytes) -> bytes:
        """Give the bytes that may be passed on."""


class WholePackets:
    """Cuts what `checker` passes; it also bounds what is held, by its `max_packet_size`."""

    __slots__ = ("_buffer", "checker")

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        self._buffer = b""

    @property
    def error(self) -> PacketError | None:
        """The first fault of the peer; the packets before it were given."""
        return self.checker.error

    def feed(self, data: bytes) -> list[bytes]:
        """Give the packets that are whole now."""
        passed = self.checker.feed(data)
        data = self._buffer + passed if self._buffer else passed
        packets = []
        start, size = 0, len(data)
        while start < size:
            decoded = decode_remaining_length(data, start + 1)
            if decoded is None:
                break
            end = start + 1 + decoded[1] + decoded[0]
            if end > size:
                break
            packets.append(data[start:end])
            start = end
        self._buffer = data[start:]
        return packets
