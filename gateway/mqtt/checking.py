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
# Packets taken at a time, up to 2 µs each; and those of them that are judged one by one, some 15 µs each.  So many
# bytes of a head that is judged count as one packet more: it may hold a thousand filters or properties.
_MOST_AT_ONCE, _MOST_JUDGED_AT_ONCE, _BYTES_PER_JUDGED = 500, 75, 32
_holds_forbidden = re.compile(rb"[\0#+]").search

# What the compiled core knows of a body, by these bits (`enum body` in gateway/relay/_core.c).
_NAMED, _NUMBERED, _PROPERTIES, _SHORT = 1, 2, 4, 8
_NEVER = 255
_ACKNOWLEDGEMENTS = frozenset({PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP})
_SELDOM = frozenset({PacketType.SUBSCRIBE, PacketType.SUBACK, PacketType.UNSUBSCRIBE, PacketType.UNSUBACK})


class CheckingFramer(Framer):
    """A `Framer` that judges the heads of bodies, too.  `packets` counts those whose head was accepted."""

    __slots__ = ("_collected", "_is_5", "_judged", "_known", "_wanted")

    def __init__(self, sender: Sender, version: ProtocolVersion, max_packet_size: int) -> None:
        super().__init__(sender, version, max_packet_size)
        self._is_5 = version is ProtocolVersion.MQTT_5_0
        # A packet whose head is not whole, and how many bytes of it are needed before it can be judged further.
        self._collected = bytearray()
        self._wanted = 0
        # The last Topic Name that was accepted.
        self._known: bytes | None = None
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
                if self._is_plain(data, first, 2, size) or self._may_pass(data, first, 0, 2, size):
                    self.packets += 1
                    return data
                return b""
        return self._walk(data, position, size)

    def _walk(self, data: bytes, position: int, size: int) -> bytes:
        low, high = self._low, self._high
        packets = self._judged = 0
        while position < size and not self._special:
            if packets == _MOST_AT_ONCE or self._judged >= _MOST_JUDGED_AT_ONCE:
                self._put_off(data, position)
                break
            packets += 1
            first = data[position]
            length = data[position + 1] if position + 1 < size else 128
            if low[first] <= length <= high[first]:
                body, end = position + 2, position + 2 + length
            else:
                end = self._look_closer(data, position)
                if end < 0:
                    break
                body = position + 1 + _length_size(data, position + 1)
            if not (
                self._disconnecting
                or self._is_plain(data, first, body, min(end, size))
                or self._may_pass(data, first, position, body, end)
            ):
                break
            self.packets += 1
            position = end
        if self._special:
            self._skip = 0
            return self._pass_disconnect(data, position) if self._disconnecting else self._stop(data, position)
        self._skip = max(position - size, 0)
        return data

    def _is_plain(self, data: bytes, first: int, body: int, there: int) -> bool:
        """Whether this is a PUBLISH of the plainest kind, its head whole and in order; `judge` is ten times slower."""
        start = body + 2
        if first >> 4 != _PUBLISH or start > there:
            return False
        topic_end = start + (data[body] << 8 | data[body + 1])
        topic = data[start:topic_end]
        if topic != self._known and not self._learn(topic):
            return False
        if first & _QOS_BITS:
            topic_end += 2
            if topic_end > there or data[topic_end - 2 : topic_end] == b"\0\0":
                return False
        if self._is_5:
            return topic_end < there and not data[topic_end]
        return topic_end <= there

    def _learn(self, topic: bytes) -> bool:
        """Whether this is a Topic Name of ASCII characters; the last one is remembered, as many devices have one."""
        if not topic or not topic.isascii() or _holds_forbidden(topic):
            return False
        if len(topic) <= _LONGEST_KNOWN:
            self._known = topic
        return True

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
