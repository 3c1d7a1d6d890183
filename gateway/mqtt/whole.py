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
        """Return the bytes that may be passed on."""


class WholePackets:
    """Cuts what `checker` passes into packets.  The checker limits their size, and so what is held here."""

    __slots__ = ("_held", "_size", "checker")

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        # The beginning of a packet, and its size, 0 while that is not known.
        self._held = bytearray()
        self._size = 0

    @property
    def error(self) -> PacketError | None:
        """The first fault of the peer; the packets before it were returned."""
        return self.checker.error

    def feed(self, data: bytes) -> list[bytes]:
        """Return the packets that are complete now."""
        data = self.checker.feed(data)
        if self._held:
            self._held += data
            if len(self._held) < self._size:
                return []
            data = bytes(self._held)
            self._held.clear()
        packets: list[bytes] = []
        start, size = 0, len(data)
        self._size = 0
        while start < size:
            decoded = decode_remaining_length(data, start + 1)
            if decoded is None:
                break
            end = start + 1 + decoded[1] + decoded[0]
            if end > size:
                self._size = end - start
                break
            packets.append(data[start:end])
            start = end
        self._held += data[start:]
        return packets
