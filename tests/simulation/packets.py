"""Packets in a stream, cut out without a look at what they are.

In: bytes.  Out: first bytes and bodies; every length is believed.
"""

from __future__ import annotations

from collections.abc import Iterator


class Cutter:
    """Cuts whole packets out of a stream, believing every length."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return first bytes and bodies of the packets that `data` completes."""
        self.rest += data
        found = []
        used = 0
        for end, first, body in packets_of(self.rest):
            used = end
            found.append((first, body))
        del self.rest[:used]
        return found


def packets_of(data: bytes | bytearray) -> list[tuple[int, int, bytes]]:
    """Return where each whole packet of a stream ends, its first byte and its body."""
    return list(_packets(data))


def _packets(data: bytes | bytearray) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    while start + 1 < len(data):
        at, length, shift = start + 1, 0, 0
        while at < len(data) and at < start + 5:
            length |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if data[at - 1] < 0x80:
                break
        else:
            return
        if at + length > len(data):
            return
        yield at + length, data[start], bytes(data[at : at + length])
        start = at + length
