"""The path for sessions with topic rules: reads, checks and rewrites PUBLISH, SUBSCRIBE and UNSUBSCRIBE.

In: the bytes of one direction after CONNACK, split anywhere, and the session's rule.  Out: the bytes to pass on;
`error` when the peer violates MQTT or its rule, `disconnected` after a complete DISCONNECT.

An inspector replaces a framer and contains one, so the checks of the fast path apply here too. What it reads is held
until it is complete: of a PUBLISH the head, never the payload. Packets of other types pass.

Reading costs time, so an inspector takes a few packets at a time, as a framer does, and there are limits on sizes and
numbers of elements. A device that exceeds one is disconnected;
what a broker sends beyond them passes unread, as does what cannot be read.

A device that violates its rule is disconnected: closing the connection is understood in every version of MQTT. For a
message that passes, no acknowledgement is written or held back, so QoS stays end to end.

The broker may send what the device's rule no longer permits, from subscriptions that it kept for the device.  Such a
message is withheld, and the gateway acknowledges it, since the device cannot: otherwise the broker would send it again.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import (
    PacketType,
    ProtocolVersion,
    ReasonCode,
    decode_integer,
    decode_remaining_length,
    too_large,
)
from gateway.mqtt.relayed import (
    LARGEST_HEAD,
    Delivery,
    Publish,
    Subscribe,
    head_size,
    lower_qos,
    read_delivery,
    read_publish,
    read_subscribe,
    read_unsubscribe,
    topic_size,
    without_prefixes,
    write_packet,
    write_publish,
    write_subscribe,
)
from gateway.mqtt.topics import TopicFilters, add_prefix, check_filter, remove_prefix
from gateway.text import printable

_PUBLISH = int(PacketType.PUBLISH)
_RETAIN_BIT = 0b0001
_WITH_QOS_1_FLAGS = frozenset({PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE})
# Up to this size, in bytes, a device's packets are held until they are complete.
_HELD_WHOLE = 4096
# The work done at a time: a packet costs some 20 µs, and so do about so many bytes of what is read.
_WORK_AT_ONCE, _BYTES_PER_WORK = 40, 32
_MOST = 2
_SHOWN_TOPIC = 128  # characters


@frozen(slots=True)
class TopicRules:
    """What a device may publish and subscribe to, and how topics change between device and broker.

    `publish` and `subscribe` apply to topics as the device writes them; None permits everything. `strip_retain` and
    `refuse_retain` are mutually exclusive. The prefixes are those of topics at the broker.
    """

    publish: TopicFilters | None = None
    subscribe: TopicFilters | None = None
    max_qos: int = _MOST
    strip_retain: bool = False
    refuse_retain: bool = False
    publish_prefix: str = ""
    subscribe_prefix: str = ""

    @property
    def inspected(self) -> frozenset[PacketType]:
        """The types of the device's packets that must be inspected."""
        types: set[PacketType] = set()
        lowers_qos = self.max_qos < _MOST
        has_prefix = self.publish_prefix or self.subscribe_prefix
        if self.publish is not None or lowers_qos or self.strip_retain or self.refuse_retain or has_prefix:
            types.add(PacketType.PUBLISH)
        if self.subscribe is not None or lowers_qos or self.subscribe_prefix:
            types.add(PacketType.SUBSCRIBE)
        if self.subscribe_prefix:
            types.add(PacketType.UNSUBSCRIBE)
        return frozenset(types)

    @property
    def concern_device(self) -> bool:
        """Whether packets from the device must be inspected."""
        return bool(self.inspected)

    @property
    def concern_broker(self) -> bool:
        """Whether packets from the broker must be inspected."""
        return bool(self.subscribe is not None or self.publish_prefix or self.subscribe_prefix)


def judge_publish(rules: TopicRules, message: Publish, what: str = "PUBLISH") -> PacketError | None:
    """Return why a message of the device is not permitted, or None; `what` names the message in the error."""
    if rules.publish is not None and message.topic and not rules.publish.permits_name(message.topic):
        detail = f"{what} to {_shown(message.topic)}: not allowed by publish of its rule"
        return _refused(ReasonCode.NOT_AUTHORIZED, detail)
    answer = message.response_topic
    if rules.publish is not None and answer is not None and not rules.publish.permits_name(answer):
        # The responder would publish where the device itself may not.
        detail = f"{what} with the Response Topic {_shown(answer)}: not allowed by publish of its rule"
        return _refused(ReasonCode.NOT_AUTHORIZED, detail)
    if message.qos > rules.max_qos:
        detail = f"{what} with QoS {message.qos}: its rule has max_qos = {rules.max_qos}"
        return _refused(ReasonCode.QOS_NOT_SUPPORTED, detail)
    if message.retain and rules.refuse_retain:
        return _refused(ReasonCode.RETAIN_NOT_SUPPORTED, f'{what} with Retain: its rule has retain = "refuse"')
    return None


def at_broker(rules: TopicRules, message: Publish) -> tuple[str, str | None]:
    """Return the Topic Name and the Response Topic that a message of the device has at the broker.

    The device subscribes to the answer, so the Response Topic takes `subscribe_prefix`.
    """
    # An empty topic has a Topic Alias, which the broker maps to the prefixed topic.
    topic = add_prefix(message.topic, rules.publish_prefix) if message.topic else ""
    answer = message.response_topic
    return topic, None if answer is None else add_prefix(answer, rules.subscribe_prefix)


def may_receive(rules: TopicRules, topic: str) -> bool:
    """Whether a topic at the broker, not empty, is one that the device may subscribe to.

    What is outside the prefix is not: neither its parent level, which `#` under a prefix matches too (MQTT 5.0
    §4.7.1.2), nor what the broker sends without being asked. Topics that begin with `$` have no prefix.
    """
    if rules.subscribe_prefix:
        inner = remove_prefix(topic, rules.subscribe_prefix)
        if inner is None and not topic.startswith("$"):
            return False
        topic = inner or topic
    return rules.subscribe is None or rules.subscribe.permits_name(topic)


class _Cutter:
    """Splits what a framer passes into packets: inspected ones go to `_judge`, others pass.

    If `whole` is set, packets of at most `_HELD_WHOLE` bytes wait until they are complete, so that the gateway can
    insert a packet of its own at almost any time. Of a longer PUBLISH, the head is held and the payload passes.
    """

    __slots__ = (
        "_count",
        "_dropping",
        "_framer",
        "_held",
        "_inspected",
        "_need",
        "_passing",
        "_size",
        "_waiting",
        "_whole",
        "_work",
        "error",
    )

    def __init__(self, framer: Framer, inspected: frozenset[PacketType], *, whole: bool) -> None:
        self._framer = framer
        self._inspected = inspected
        self._whole = whole
        # The beginning of a packet that is held, how many bytes of it are needed, and its size, fixed header included.
        self._held = bytearray()
        self._need = 0
        self._size = 0
        # Remaining bytes of a packet that passes as it arrives, or is dropped.
        self._passing = 0
        self._dropping = False
        # What the framer inside has passed and is put off, and the work done since the last `feed`.
        self._waiting = b""
        self._work = 0
        # The framer inside may be ahead.
        self._count = 0
        self.error: PacketError | None = None

    @property
    def packets(self) -> int:
        """As `Framer.packets`."""
        return self._count

    @property
    def disconnected(self) -> bool:
        """As `Framer.disconnected`."""
        return self.error is None and not self._waiting and self._framer.disconnected

    @property
    def disconnect_code(self) -> int | None:
        """As `Framer.disconnect_code`."""
        return self._framer.disconnect_code if self.error is None and not self._waiting else None

    @property
    def rejected(self) -> bytes:
        """As `Framer.rejected`."""
        return self._framer.rejected

    @property
    def behind(self) -> bool:
        """As `Framer.behind`."""
        return self.error is None and bool(self._waiting or self._framer.behind)

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes passed on end with a whole packet; held bytes do not count."""
        return not self._passing or self._dropping

    @property
    def withholds(self) -> bool:
        """Whether the beginning of a packet is held back."""
        return bool(self._held)

    def feed(self, data: bytes) -> bytes:
        """As `Framer.feed`: return the bytes to pass on.  Never raises for what a peer sent."""
        if self.error is not None:
            return b""
        waiting, self._waiting = self._waiting, b""
        if data or not waiting:
            # The framer holds incomplete fixed headers back, so every fixed header in its output is complete.
            waiting += self._framer.feed(data)
        data = waiting
        passed: list[bytes] = []
        offset, size = 0, len(data)
        self._work = 0
        try:
            while offset < size:
                if self._work >= _WORK_AT_ONCE:
                    self._waiting = data[offset:]
                    break
                if self._passing:
                    offset = self._pass(data, offset, passed)
                elif self._held:
                    offset = self._collect(data, offset, passed)
                else:
                    offset = self._begin(data, offset, passed)
        except PacketError as error:
            self.error = error
        else:
            if not self._waiting:
                self.error = self._framer.error
        return b"".join(passed)

    def _pass(self, data: bytes, offset: int, passed: list[bytes]) -> int:
        end = min(offset + self._passing, len(data))
        if not self._dropping:
            passed.append(data[offset:end])
        self._passing -= end - offset
        if not self._passing and self._dropping:
            self._dropping = False
            self._dropped()
        return end

    def _begin(self, data: bytes, offset: int, passed: list[bytes]) -> int:
        length, length_size = decode_remaining_length(data, offset + 1) or (0, 1)
        self._size = size = 1 + length_size + length
        self._count += 1
        self._work += 1
        # A number: an Enum would cost as much as all else here.
        packet_type = data[offset] >> 4
        end = min(offset + size, len(data))
        if self._drops(packet_type):
            self._passing, self._dropping = size, True
            return offset
        if self._whole and size <= _HELD_WHOLE:
            self._need = size
        elif packet_type not in self._inspected:
            self._passing = size
            return offset
        else:
            self._need = self._needed(packet_type, data, offset, size)
        if end - offset >= self._need:
            self._finish(data[offset:end], passed)
        else:
            self._held += data[offset:end]
        return end

    def _collect(self, data: bytes, offset: int, passed: list[bytes]) -> int:
        end = min(offset + self._need - len(self._held), len(data))
        self._held += data[offset:end]
        if len(self._held) == self._need and self._need < self._size:
            # A Property Length may show that less has to be read than is held by then.
            needed = self._needed(self._held[0] >> 4, self._held, 0, self._size)
            self._need = max(needed, len(self._held))
        if len(self._held) == self._need:
            packet, self._held = bytes(self._held), bytearray()
            self._finish(packet, passed)
        return end

    def _finish(self, packet: bytes, passed: list[bytes]) -> None:
        missing = self._size - len(packet)
        if packet[0] >> 4 in self._inspected:
            self._work += len(packet) // _BYTES_PER_WORK
            packet = self._judge(packet, missing)
        passed.append(packet)
        self._passing = missing
        if self._dropping and not missing:
            self._dropping = False
            self._dropped()

    def _needed(self, packet_type: int, data: bytes | bytearray, offset: int, size: int) -> int:
        """Return how many bytes of the packet at `offset` of `data` are needed to judge it, as far as known."""
        if packet_type != _PUBLISH:
            return size
        _, length_size = decode_remaining_length(data, offset + 1) or (0, 1)
        header = 1 + length_size
        return min(header + self._head_size(data[offset], data, offset + header), size)

    def _drops(self, packet_type: int) -> bool:
        """Whether a packet that begins must not be passed on."""
        del packet_type
        return False

    def _dropped(self) -> None:
        """Called after the last byte of a packet that was not passed on."""

    def _head_size(self, first: int, data: bytes | bytearray, start: int) -> int:
        """Return how many bytes of a PUBLISH's body are needed to judge it, as far as known.  Raises PacketError."""
        raise NotImplementedError

    def _judge(self, packet: bytes, missing: int) -> bytes:
        """Return the bytes to pass on for a packet of which `missing` bytes follow later.  Raises PacketError.

        With `_dropping` set, what follows is not passed on either.
        """
        raise NotImplementedError


class DeviceInspector(_Cutter):
    """Checks and rewrites what a device sends.

    `version` is the device's. `upgraded` tells that the broker was sent a 3.1.1 CONNECT instead, so the stricter flags
    of 3.1.1 apply. `max_packet_size` is in bytes, fixed header included; `largest_at_broker` is the same for packets
    that rules made longer. `lenient` is as for `Framer`.
    """

    __slots__ = ("_largest_at_broker", "_lenient", "_rules", "_upgraded", "_version")

    def __init__(
        self,
        rules: TopicRules,
        version: ProtocolVersion,
        max_packet_size: int,
        *,
        upgraded: bool = False,
        lenient: bool = False,
        largest_at_broker: int | None = None,
    ) -> None:
        super().__init__(
            Framer(Sender.DEVICE, version, max_packet_size, lenient=lenient),
            frozenset(PacketType) if upgraded else rules.inspected,
            whole=True,
        )
        self._rules = rules
        self._version = version
        self._largest_at_broker = min(max_packet_size, largest_at_broker or max_packet_size)
        self._upgraded = upgraded
        self._lenient = lenient

    def _head_size(self, first: int, data: bytes | bytearray, start: int) -> int:
        size = head_size(self._version, first, data, start)
        if size > LARGEST_HEAD:
            raise too_large(f"PUBLISH with {size} bytes before its payload, above the limit of {LARGEST_HEAD}")
        return size

    def _needed(self, packet_type: int, data: bytes | bytearray, offset: int, size: int) -> int:
        if packet_type != _PUBLISH and size > LARGEST_HEAD:
            raise too_large(
                f"{PacketType(packet_type).name} of {size} bytes, above the limit of {LARGEST_HEAD} where it is read"
            )
        return super()._needed(packet_type, data, offset, size)

    def _judge(self, packet: bytes, missing: int) -> bytes:
        _, length_size = decode_remaining_length(packet, 1) or (0, 1)
        first, body = packet[0], packet[1 + length_size :]
        packet_type = first >> 4
        if packet_type == _PUBLISH:
            return self._publish(packet, first, body, missing)
        if self._upgraded:
            first = packet_type << 4 | (0b0010 if packet_type in _WITH_QOS_1_FLAGS else 0)
            packet = bytes((first,)) + packet[1:]
        if packet_type == PacketType.SUBSCRIBE:
            return self._subscribe(packet, first, read_subscribe(self._version, body, lenient=self._lenient))
        if packet_type == PacketType.UNSUBSCRIBE:
            return self._unsubscribe(packet, first, read_unsubscribe(self._version, body))
        return packet

    def _publish(self, packet: bytes, first: int, body: bytes, missing: int) -> bytes:
        rules = self._rules
        message = read_publish(self._version, first, body)
        refused = judge_publish(rules, message)
        if refused is not None:
            raise refused
        if rules.strip_retain:
            first &= ~_RETAIN_BIT
        if self._upgraded and not message.qos:
            first &= ~0b1000  # DUP with QoS 0 is allowed in 3.1 and malformed in 3.1.1 [MQTT-3.3.1-2].
        topic, answer = at_broker(rules, message)
        if (topic, answer) == (message.topic, message.response_topic):
            return packet if first == packet[0] else bytes((first,)) + packet[1:]
        return self._fit(lambda: write_publish(self._version, first, body, missing, topic, answer), "PUBLISH", missing)

    def _subscribe(self, packet: bytes, first: int, wanted: Subscribe) -> bytes:
        rules = self._rules
        if rules.subscribe is not None:
            for text, _ in wanted.filters:
                _check_permitted(rules.subscribe, text)
        filters = tuple(
            # Lower the requested QoS instead of refusing; SUBACK tells the device what was granted.
            (add_prefix(text, rules.subscribe_prefix), None if options is None else lower_qos(options, rules.max_qos))
            for text, options in wanted.filters
        )
        if filters == wanted.filters:
            return packet
        return self._fit(lambda: write_subscribe(first, Subscribe(wanted.head, filters)), "SUBSCRIBE")

    def _unsubscribe(self, packet: bytes, first: int, wanted: Subscribe) -> bytes:
        filters = tuple((add_prefix(text, self._rules.subscribe_prefix), None) for text, _ in wanted.filters)
        if filters == wanted.filters:
            return packet
        return self._fit(lambda: write_subscribe(first, Subscribe(wanted.head, filters)), "UNSUBSCRIBE")

    def _fit(self, write: Callable[[], bytes], name: str, missing: int = 0) -> bytes:
        try:
            packet = write()
        except ValueError as error:
            raise too_large(f"{name}: {error}") from None
        size = len(packet) + missing
        if size > self._largest_at_broker:
            raise too_large(f"{name} of {size} bytes with its prefix, above the limit of {self._largest_at_broker}")
        return packet


class BrokerInspector(_Cutter):
    """Removes prefixes from what the broker sends, and withholds what is not for the device.

    That is messages that its rule does not permit, and PINGRESPs to the gateway's own PINGREQs.  `version` is the
    device's. `pings` counts the gateway's unanswered PINGREQs. `withheld` counts messages that the device did not get;
    `take_owed` returns the acknowledgements for them. While there is nothing to remove or withhold, bytes only pass
    through the framer.

    Topics are compared as bytes, valid or not, as they pass on the fast path.
    """

    __slots__ = (
        "_aliases",
        "_answer_prefix",
        "_cutting",
        "_incomplete",
        "_owed",
        "_rules",
        "_topic_prefix",
        "_unacknowledged",
        "_version",
        "pings",
        "withheld",
    )

    def __init__(
        self, rules: TopicRules, version: ProtocolVersion, max_packet_size: int, *, lenient: bool = False
    ) -> None:
        inspected = {PacketType.PUBLISH, PacketType.PUBREL} if rules.concern_broker else set()
        super().__init__(
            Framer(Sender.BROKER, version, max_packet_size, lenient=lenient), frozenset(inspected), whole=False
        )
        self._rules = rules
        self._topic_prefix = rules.subscribe_prefix.encode()
        self._answer_prefix = rules.publish_prefix.encode()
        self._version = version
        self._cutting = rules.concern_broker
        # Whether the topic that each Topic Alias stands for may be received (MQTT 5.0 §3.3.2.3.4).
        self._aliases: dict[int, bool] = {}
        # Withheld messages of QoS 2 whose PUBREL is still to come.
        self._incomplete: set[int] = set()
        # By Packet Identifier, so that a broker that does not read cannot make it grow without limit.
        self._owed: dict[int, bytes] = {}
        # The message being withheld, if it must be acknowledged.
        self._unacknowledged: Delivery | None = None
        self.pings = 0
        self.withheld = 0

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes passed on end with a whole packet; held bytes do not count."""
        return super().at_boundary if self._cutting else self._framer.at_boundary

    def expect_answer(self) -> None:
        """Count a PINGREQ of the gateway."""
        self.pings += 1
        if not self._cutting:
            self._cutting = True
            self._passing = self._framer.remaining

    def take_owed(self) -> bytes:
        """Return the acknowledgements that the broker is still to get, and forget them."""
        owed = b"".join(self._owed.values())
        self._owed.clear()
        return owed

    def feed(self, data: bytes) -> bytes:
        """As `Framer.feed`."""
        if not self._cutting:
            passed = self._framer.feed(data)
            self.error = self._framer.error
            self._count = self._framer.packets
            return passed
        passed = super().feed(data)
        self._cutting = bool(self._inspected or self.pings or self._dropping or self._waiting)
        return passed

    def _drops(self, packet_type: int) -> bool:
        if not self.pings or packet_type != PacketType.PINGRESP:
            return False
        self.pings -= 1
        return True

    def _head_size(self, first: int, data: bytes | bytearray, start: int) -> int:
        size = head_size(self._version, first, data, start)
        # The broker cannot be told to send fewer properties, so these pass unread.
        return size if size <= LARGEST_HEAD else topic_size(first, data, start)

    def _judge(self, packet: bytes, missing: int) -> bytes:
        _, length_size = decode_remaining_length(packet, 1) or (0, 1)
        first, body = packet[0], packet[1 + length_size :]
        try:
            if first >> 4 == PacketType.PUBREL:
                return self._release(packet, body)
            message = read_delivery(self._version, first, body)
        except PacketError as error:
            raise PacketError(EndReason.UPSTREAM_PROTOCOL_ERROR, error.reason_code, error.detail) from None
        if not self._may_receive(message):
            self.withheld += 1
            self._dropping = True
            self._unacknowledged = message if message.qos else None
            return b""
        changed = without_prefixes(self._version, first, body, missing, self._topic_prefix, self._answer_prefix)
        return packet if changed is None else changed

    def _may_receive(self, message: Delivery) -> bool:
        if self._rules.subscribe is None and not self._rules.subscribe_prefix:
            return True
        if not message.topic:
            return self._aliases.get(message.alias or 0, False)
        permitted = may_receive(self._rules, message.topic)
        if message.alias is not None:
            self._aliases[message.alias] = permitted
        elif not (permitted or message.is_read):
            # It may have changed any alias, and the device, which does not get it, knows the topic of before.
            self._aliases.clear()
        return permitted

    def _dropped(self) -> None:
        message, self._unacknowledged = self._unacknowledged, None
        if message is None:
            return
        is_5 = self._version is ProtocolVersion.MQTT_5_0
        first = (PacketType.PUBACK if message.qos == 1 else PacketType.PUBREC) << 4
        code = bytes((ReasonCode.NOT_AUTHORIZED,)) if is_5 else b""
        self._owe(first, message.packet_identifier, code)
        # In 5.0 the reason code ends the exchange (§4.3.3).
        if message.qos == _MOST and not is_5:
            self._incomplete.add(message.packet_identifier)

    def _release(self, packet: bytes, body: bytes) -> bytes:
        identifier, _ = decode_integer(body, 0, 2, "Packet Identifier of PUBREL")
        if identifier not in self._incomplete:
            return packet
        self._incomplete.remove(identifier)
        self._owe(PacketType.PUBCOMP << 4, identifier)
        return b""

    def _owe(self, first: int, identifier: int, code: bytes = b"") -> None:
        self._owed[identifier] = write_packet(first, identifier.to_bytes(2, "big") + code)


def _check_permitted(permitted: TopicFilters, wanted: str) -> None:
    try:
        check_filter(wanted)
    except ValueError as error:
        raise _refused(ReasonCode.TOPIC_FILTER_INVALID, f"SUBSCRIBE with an invalid Topic Filter: {error}") from None
    if not permitted.permits(wanted):
        detail = f"SUBSCRIBE to {_shown(wanted)}: not allowed by subscribe of its rule"
        raise _refused(ReasonCode.NOT_AUTHORIZED, detail)


def _shown(topic: str) -> str:
    return f'"{printable(topic, _SHOWN_TOPIC)}"'


def _refused(code: ReasonCode, detail: str) -> PacketError:
    return PacketError(EndReason.RULE_REFUSED, code, detail)
