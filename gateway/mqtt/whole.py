"""Whole packets out of what a framer or an inspector has passed.

In: the bytes of one direction after CONNACK, cut anywhere.  Out: control packets, each whole, a few at a time.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from gateway.errors import PacketError
from gateway.mqtt.packets import decode_remaining_length

# Packets returned at a time: to store one takes some 50 µs.
_MOST_AT_ONCE = 30


class Checker(Protocol):
    """A framer, or an inspector in its place."""

    error: PacketError | None

    @property
    def packets(self) -> int:
        """How many packets were accepted."""

    @property
    def behind(self) -> bool:
        """Whether bytes that were fed wait for the next `feed`, which may be of none."""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that may be passed on."""


class WholePackets:
    """Cuts what `checker` passes into packets.  The checker limits their size, and so what is held here."""

    __slots__ = ("_held", "_size", "_waiting", "checker")

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        # The beginning of a packet, and its size, 0 while that is not known.
        self._held = bytearray()
        self._size = 0
        # Packets that are put off.
        self._waiting: deque[bytes] = deque()

    @property
    def error(self) -> PacketError | None:
        """The first fault of the peer; the packets before it were returned."""
        return None if self._waiting else self.checker.error

    @property
    def behind(self) -> bool:
        """Whether packets wait for the next `feed`, which may be of no bytes."""
        return bool(self._waiting) or self.checker.behind

    def feed(self, data: bytes) -> list[bytes]:
        """Return the packets that are complete now, as many as are taken at a time."""
        waiting = self._waiting
        if data or not waiting:
            waiting += self._cut(data)
        return [waiting.popleft() for _ in range(min(len(waiting), _MOST_AT_ONCE))]

    def _cut(self, data: bytes) -> list[bytes]:
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
