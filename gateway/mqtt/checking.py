"""The fast path with an eye on what lies behind each fixed header (`gateway/mqtt/bodies.py`).

In and out as `gateway/mqtt/framer.py`.  A packet passes once its head has been judged; until that is whole, nothing of
the packet passes.  What waits so is at most `bodies.MOST_HELD` bytes and a fixed header.
"""

from __future__ import annotations

import re
from functools import cache

from gateway.errors import PacketError
from gateway.mqtt.bodies import judge
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import PacketType, ProtocolVersion, decode_remaining_length
from gateway.mqtt.properties import written_as
from gateway.mqtt.relayed import PUBLISH_PROPERTIES, head_size

_PUBLISH = int(PacketType.PUBLISH)
_QOS_BITS = 0b0110
_LONGEST_KNOWN = 100
# Packets taken at a time, some 0.4 µs each; those of them that are not short and on the topic of the one before, up to
# 2 µs each; and those that are judged one by one, some 15 µs each.  So many bytes of a head that is judged count as one
# packet more: it may hold a thousand filters or properties.
_MOST_AT_ONCE, _MOST_OTHERS_AT_ONCE, _MOST_JUDGED_AT_ONCE, _BYTES_PER_JUDGED = 1_000, 500, 75, 32
_holds_unusual = re.compile(rb"[\0#+\x80-\xff]").search
# As a length of what is behind a topic or in front of it: no packet is that long.
_CLOSER_LOOK = 1 << 30
# As a Remaining Length of one byte that is not there yet, or of more bytes.
_CUT = 0x80
_NO_IDENTIFIER = b"\0\0"
_SHORTEST_TOPIC = 3  # its length and one character

# What the compiled core knows of a body, by these bits (`enum body` in gateway/relay/_core.c).
_NAMED, _NUMBERED, _PROPERTIES, _SHORT = 1, 2, 4, 8
_NEVER = 255
_ACKNOWLEDGEMENTS = frozenset({PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP})
_PINGS = frozenset({PacketType.PINGREQ, PacketType.PINGRESP})
_SELDOM = frozenset({PacketType.SUBSCRIBE, PacketType.SUBACK, PacketType.UNSUBSCRIBE, PacketType.UNSUBACK})


class CheckingFramer(Framer):
    """A `Framer` that judges the heads of bodies, too.  `packets` counts those whose head was accepted."""

    __slots__ = ("_bare", "_behind_topic", "_collected", "_judged", "_known", "_least", "_wanted")

    def __init__(self, sender: Sender, version: ProtocolVersion, max_packet_size: int) -> None:
        super().__init__(sender, version, max_packet_size)
        self._behind_topic, self._bare = _plainest(version)
        # A packet whose head is not whole, and how many bytes of it are needed before it can be judged further.
        self._collected = bytearray()
        self._wanted = 0
        # The last Topic Name that was accepted, with its length before it, and how many bytes that is.
        self._known, self._least = b"", _CLOSER_LOOK
        # How many packets of the piece being fed were not of the plainest kind; large ones count as several.
        self._judged = 0

    @property
    def at_boundary(self) -> bool:
        """See `Framer`."""
        return not self._collected and super().at_boundary

    def lend(self) -> tuple[int, bytes] | None:
        """See `Framer`."""
        lent = super().lend()
        return lent if lent is None or not self._collected else (0, bytes(self._collected))

    def take_back(self, skip: int, held: bytes) -> None:
        """See `Framer`."""
        self._collected = bytearray()
        self._wanted = 0
        super().take_back(skip, held)

    @property
    def tables(self) -> bytes:
        """See `Framer`."""
        return _tables(self._sender, self._version, super().tables)

    def feed(self, data: bytes) -> bytes:
        """See `Framer`."""
        if self._special:
            if self._disconnecting:
                return self._pass_disconnect(data, self._skip)
            if self.error is not None:
                return b""
            if self._collected:
                self._collected += data
                if len(self._collected) < self._wanted:
                    return b""
                data = bytes(self._collected)
                self._collected = bytearray()
                self._wanted = 0
            else:
                data = self._held + data
                self._held = b""
            self._special = self.behind = False
        size = len(data)
        position = self._skip
        if not position and size > 1:
            first, length = data[0], data[1]
            if length + 2 == size and self._low[first] <= length <= self._high[first]:
                # One short packet and nothing else is what most messages are.
                behind = self._behind_topic[first]
                if (
                    (
                        self._least + behind <= length
                        and data.startswith(self._known, 2)
                        and (not behind or _is_plain_behind(data, 2 + self._least, behind, size))
                    )
                    or self._is_plain(data, first, 2, size, size)
                    or self._may_pass(data, first, 0, 2, size)
                ):
                    self.packets += 1
                    return data
                return b""
        return self._walk(data, position, size)

    def _walk(self, data: bytes, position: int, size: int) -> bytes:
        high, behind_topic, is_at = self._high, self._behind_topic, data.startswith
        known, least = self._known, self._least
        packets = others = self._judged = 0
        last = size - 1
        while position < size:
            if packets == _MOST_AT_ONCE:
                self._put_off(data, position)
                break
            if position < last:
                # A short PUBLISH on the same topic as the one before is what most floods are.
                first, length = data[position], data[position + 1]
                behind = behind_topic[first]
                if (
                    least + behind <= length <= high[first]
                    and is_at(known, position + 2)
                    and (not behind or _is_plain_behind(data, position + 2 + least, behind, size))
                ):
                    position += length + 2
                    packets += 1
                    continue
            end = self._pass(data, position, size)
            if end < 0:
                break
            packets += 1
            others += 1
            position = end
            if self._disconnecting:
                break
            if others == _MOST_OTHERS_AT_ONCE or self._judged >= _MOST_JUDGED_AT_ONCE:
                self._put_off(data, position)
                break
            known, least = self._known, self._least
        self.packets += packets
        if self._special:
            self._skip = 0
            return self._pass_disconnect(data, position) if self._disconnecting else self._stop(data, position)
        self._skip = max(position - size, 0)
        return data

    def _pass(self, data: bytes, position: int, size: int) -> int:
        """Check the packet at `position`: return where it ends, or -1 if it cannot pass (yet)."""
        first = data[position]
        length = data[position + 1] if position + 1 < size else _CUT
        second = data[position + 2] if position + 2 < size else _CUT
        if self._low[first] <= length <= self._high[first]:
            body = position + 2
            end = body + length
        elif length >= _CUT > second > 0 and self._high[first] == _CUT - 1:
            # A Remaining Length of two bytes, as in `Framer.feed`.
            body = position + 3
            end = body + length - _CUT + (second << 7)
            if end - position > self.max_packet_size:
                return self._look_closer(data, position)
        else:
            end = self._look_closer(data, position)
            if end < 0 or self._disconnecting:
                return end
            body = position + 1 + _length_size(data, position + 1)
        if self._is_plain(data, first, body, end, size) or self._may_pass(data, first, position, body, end):
            return end
        return -1

    def _is_plain(self, data: bytes, first: int, body: int, end: int, size: int) -> bool:
        """Whether a packet of the plainest kinds has its head whole and in order; `judge` is ten times slower.

        These are a PUBLISH whose topic is ASCII and that has no properties, and what holds a Packet Identifier and a
        reason code at most.  The topic is remembered, as many devices have one.
        """
        behind = self._behind_topic[first]
        if behind == _CLOSER_LOOK:
            return end <= size and end - body <= self._bare[first] and data[body : body + 2] != _NO_IDENTIFIER
        start = body + 2
        if start > end or start > size:
            return False
        topic_end = start + (data[body] << 8 | data[body + 1])
        if topic_end > end or topic_end > size:
            return False
        topic = data[body:topic_end]
        if topic != self._known:
            if len(topic) < _SHORTEST_TOPIC or _holds_unusual(topic, 2):
                return False
            if len(topic) <= _LONGEST_KNOWN:
                self._known, self._least = topic, len(topic)
        return topic_end + behind <= end and _is_plain_behind(data, topic_end, behind, size)

    def _may_pass(self, data: bytes, first: int, position: int, body: int, end: int) -> bool:
        """Judge the head of the packet at `position`; if it cannot pass (yet), keep it or set `error`."""
        self._judged += 1
        try:
            is_brokers = self._sender is Sender.BROKER
            needed = judge(self._version, first, data[body:end], end - body, any_topic=is_brokers)
        except PacketError as error:
            self._set_error(error.reason_code, error.detail)
            return False
        if needed:
            self._collected = bytearray(data[position:])
            self._wanted = body - position + needed
            self._special = True
            return False
        head = head_size(self._version, first, data, body) if first >> 4 == _PUBLISH else end - body
        self._judged += head // _BYTES_PER_JUDGED
        return True


@cache
def _plainest(version: ProtocolVersion) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give, for each first byte, what is of the plainest kinds.

    How many bytes are between the topic and the payload of a PUBLISH without properties, `_CLOSER_LOOK` for others; and
    the longest Remaining Length of a packet that holds a Packet Identifier and a reason code at most, -1 for others.
    """
    is_5 = version is ProtocolVersion.MQTT_5_0
    behind_topic, bare = [_CLOSER_LOOK] * 256, [-1] * 256
    for first in range(256):
        number = first >> 4
        if number == PacketType.PUBLISH:
            behind_topic[first] = (2 if first & _QOS_BITS else 0) + is_5
        elif number in _ACKNOWLEDGEMENTS:
            bare[first] = 2 + is_5
        elif number in _PINGS:
            bare[first] = 0
    return tuple(behind_topic), tuple(bare)


def _is_plain_behind(data: bytes, topic_end: int, behind: int, size: int) -> bool:
    """Whether the Packet Identifier and the Property Length behind a topic, so many bytes, are there and in order."""
    if topic_end + behind > size or (behind > 1 and data[topic_end : topic_end + 2] == _NO_IDENTIFIER):
        return False
    return not behind & 1 or not data[topic_end + behind - 1]


def _length_size(data: bytes, offset: int) -> int:
    decoded = decode_remaining_length(data, offset)
    return 0 if decoded is None else decoded[1]


@cache
def _tables(sender: Sender, version: ProtocolVersion, headers: bytes) -> bytes:
    """Give the tables of a framer that checks bodies: packets that are seldom sent need a look, always."""
    del sender
    low, high, body = bytearray(headers[:256]), headers[256:512], bytearray(256)
    is_5 = version is ProtocolVersion.MQTT_5_0
    for first in range(256):
        number = first >> 4
        if number == PacketType.PUBLISH:
            body[first] = _NAMED | (_NUMBERED if first & _QOS_BITS else 0) | (_PROPERTIES if is_5 else 0)
        elif number in _ACKNOWLEDGEMENTS:
            body[first] = _NUMBERED | _SHORT
        elif number in _SELDOM:
            low[first] = _NEVER
    kinds = bytes(written_as(number).encode()[0] if number in PUBLISH_PROPERTIES else 0 for number in range(256))
    return bytes(low) + high + bytes(body) + kinds
