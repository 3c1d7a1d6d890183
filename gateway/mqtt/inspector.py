"""The path for sessions with topic rules: reads, checks and rewrites PUBLISH, SUBSCRIBE and UNSUBSCRIBE.

In: the bytes of one direction after CONNACK, split anywhere, and the session's rule.  Out: the bytes to pass on;
`error` when the peer violates MQTT or its rule, `disconnected` after a complete DISCONNECT.

An inspector replaces a framer and contains one, so the checks of the fast path apply here too. Packets of other types
pass as they arrive. A packet that is read whole is held until it is complete, at most `max_packet_size` bytes.

A device that violates its rule is disconnected: closing the connection is understood in every version of MQTT. No
acknowledgement between device and broker is written or held back, so QoS stays end to end.

The broker may send what the device's rule no longer permits, from subscriptions that it kept for the device.  Such a
message is withheld, and the gateway acknowledges it, since the device cannot: otherwise the broker would send it again.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from gateway.errors import EndReason, PacketError
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import PacketType, ProtocolVersion, ReasonCode, decode_integer, decode_remaining_length
from gateway.mqtt.relayed import (
    Publish,
    Subscribe,
    lower_qos,
    read_publish,
    read_subscribe,
    read_unsubscribe,
    write_packet,
    write_publish,
    write_subscribe,
)
from gateway.mqtt.topics import TopicFilters, add_prefix, check_filter, remove_prefix
from gateway.text import printable

_RETAIN_BIT = 0b0001
_PINGRESP_BYTE = PacketType.PINGRESP << 4
# 3.1.1 fixes the flags of these packets at QoS 1; 3.1 gives them other uses (MQTT 3.1.1 §2.2.2).
_FIXED_FIRST_BYTES = {
    packet_type: packet_type << 4 | 0b0010
    for packet_type in (PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE)
}
_HELD_FROM_DEVICE = frozenset({PacketType.PUBLISH, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE})
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
    def concern_device(self) -> bool:
        """Whether packets from the device must be inspected."""
        return (
            self.publish is not None
            or self.subscribe is not None
            or self.max_qos < _MOST
            or self.strip_retain
            or self.refuse_retain
            or self.concern_broker
        )

    @property
    def concern_broker(self) -> bool:
        """Whether packets from the broker must be inspected."""
        return bool(self.subscribe is not None or self.publish_prefix or self.subscribe_prefix)


def judge_publish(rules: TopicRules, message: Publish, what: str = "PUBLISH") -> PacketError | None:
    """Return why a message of the device is not permitted, or None; `what` names the message in the error."""
    if rules.publish is not None and message.topic and not rules.publish.permits_name(message.topic):
        return _refused(ReasonCode.NOT_AUTHORIZED, f"{what} to {_shown(message.topic)}, which publish does not cover")
    answer = message.response_topic
    if rules.publish is not None and answer is not None and not rules.publish.permits_name(answer):
        # The responder would publish where the device itself may not.
        detail = f"{what} with the Response Topic {_shown(answer)}, which publish does not cover"
        return _refused(ReasonCode.NOT_AUTHORIZED, detail)
    if message.qos > rules.max_qos:
        return _refused(ReasonCode.QOS_NOT_SUPPORTED, f"{what} with QoS {message.qos}, above max_qos {rules.max_qos}")
    if message.retain and rules.refuse_retain:
        return _refused(ReasonCode.RETAIN_NOT_SUPPORTED, f"{what} with Retain")
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


def at_device(rules: TopicRules, message: Publish) -> tuple[str, str | None]:
    """Return the Topic Name and the Response Topic that a message of the broker has at the device.

    A topic outside the prefix stays as it is. A Response Topic outside the prefix is removed, since the device's answer
    would get the prefix and go elsewhere.
    """
    topic = message.topic
    if topic and rules.subscribe_prefix:
        topic = remove_prefix(topic, rules.subscribe_prefix) or topic
    answer = message.response_topic
    if answer is not None and rules.publish_prefix and not answer.startswith("$"):
        answer = remove_prefix(answer, rules.publish_prefix)
    return topic, answer


class _Cutter:
    """Splits what a framer passes into packets; held types go whole to `_whole`, others pass as they arrive."""

    __slots__ = ("_framer", "_held", "_held_types", "_passing", "_waiting", "error", "packets")

    def __init__(self, framer: Framer, held_types: frozenset[PacketType]) -> None:
        self._framer = framer
        self._held_types = held_types
        # An incomplete held packet, fixed header included, and how many of its bytes are missing.
        self._held = bytearray()
        self._waiting = 0
        # Remaining bytes of a packet that passes as it arrives.
        self._passing = 0
        # As `Framer.packets`; the framer inside may be ahead.
        self.packets = 0
        self.error: PacketError | None = None

    @property
    def disconnected(self) -> bool:
        """As `Framer.disconnected`."""
        return self.error is None and self._framer.disconnected

    @property
    def disconnect_code(self) -> int | None:
        """As `Framer.disconnect_code`."""
        return self._framer.disconnect_code if self.error is None else None

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes passed on end with a whole packet; held bytes do not count."""
        return not self._passing

    def feed(self, data: bytes) -> bytes:
        """As `Framer.feed`: return the bytes to pass on.  Never raises for what a peer sent."""
        if self.error is not None:
            return b""
        # The framer holds incomplete fixed headers back, so every fixed header in its output is complete.
        data = self._framer.feed(data)
        passed: list[bytes] = []
        offset, size = 0, len(data)
        while offset < size and self.error is None:
            if self._passing:
                end = min(offset + self._passing, size)
                passed.append(data[offset:end])
                self._passing -= end - offset
                offset = end
            elif self._waiting:
                end = min(offset + self._waiting, size)
                self._held += data[offset:end]
                self._waiting -= end - offset
                offset = end
                if not self._waiting:
                    packet, self._held = bytes(self._held), bytearray()
                    passed.append(self._judge(packet))
            else:
                self._begin(data, offset)
        if self.error is None:
            self.error = self._framer.error
        return b"".join(passed)

    def _begin(self, data: bytes, offset: int) -> None:
        length, length_size = decode_remaining_length(data, offset + 1) or (0, 1)
        size = 1 + length_size + length
        self.packets += 1
        if PacketType(data[offset] >> 4) in self._held_types:
            self._waiting = size
        else:
            self._passing = size

    def _judge(self, packet: bytes) -> bytes:
        _, length_size = decode_remaining_length(packet, 1) or (0, 1)
        try:
            return self._whole(packet, packet[0], packet[1 + length_size :])
        except PacketError as error:
            self.error = error
        return b""

    def _whole(self, packet: bytes, first: int, body: bytes) -> bytes:
        """Return the bytes to pass on for a whole packet.  Raises PacketError."""
        raise NotImplementedError


class DeviceInspector(_Cutter):
    """Checks and rewrites what a device sends.

    `version` is the device's. `upgraded` tells that the broker was sent a 3.1.1 CONNECT instead, so the stricter flags
    of 3.1.1 apply. `max_packet_size` is in bytes, fixed header included, and also limits rewritten packets.
    """

    __slots__ = ("_max_packet_size", "_rules", "_upgraded", "_version")

    def __init__(
        self, rules: TopicRules, version: ProtocolVersion, max_packet_size: int, *, upgraded: bool = False
    ) -> None:
        held = _HELD_FROM_DEVICE | ({PacketType.PUBREL} if upgraded else set())
        super().__init__(Framer(Sender.DEVICE, version, max_packet_size), held)
        self._rules = rules
        self._version = version
        self._max_packet_size = max_packet_size
        self._upgraded = upgraded

    def _whole(self, packet: bytes, first: int, body: bytes) -> bytes:
        packet_type = PacketType(first >> 4)
        if packet_type is PacketType.PUBLISH:
            return self._publish(packet, first, body)
        if self._upgraded:
            first = _FIXED_FIRST_BYTES[packet_type]
            packet = bytes((first,)) + packet[1:]
        if packet_type is PacketType.SUBSCRIBE:
            return self._subscribe(packet, first, read_subscribe(self._version, body))
        if packet_type is PacketType.UNSUBSCRIBE:
            return self._unsubscribe(packet, first, read_unsubscribe(self._version, body))
        return packet

    def _publish(self, packet: bytes, first: int, body: bytes) -> bytes:
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
        return self._fit(lambda: write_publish(self._version, first, body, topic, answer), "PUBLISH")

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

    def _fit(self, write: Callable[[], bytes], name: str) -> bytes:
        try:
            packet = write()
        except ValueError as error:
            raise PacketError(EndReason.PACKET_TOO_LARGE, ReasonCode.PACKET_TOO_LARGE, f"{name}: {error}") from None
        if len(packet) > self._max_packet_size:
            detail = f"{name} of {len(packet)} bytes with its prefix, above the limit of {self._max_packet_size}"
            raise PacketError(EndReason.PACKET_TOO_LARGE, ReasonCode.PACKET_TOO_LARGE, detail)
        return packet


class BrokerInspector(_Cutter):
    """Removes prefixes from what the broker sends, and withholds what is not for the device.

    That is messages that its rule does not permit, and PINGRESPs to the gateway's own PINGREQs.  `version` is the
    device's. `pings` counts the gateway's unanswered PINGREQs. `withheld` counts messages that the device did not get;
    `take_owed` returns the acknowledgements for them.
    """

    __slots__ = ("_aliases", "_incomplete", "_owed", "_rules", "_version", "pings", "withheld")

    def __init__(self, rules: TopicRules, version: ProtocolVersion, max_packet_size: int) -> None:
        held = {PacketType.PINGRESP}
        if rules.concern_broker:
            held |= {PacketType.PUBLISH, PacketType.PUBREL}
        super().__init__(Framer(Sender.BROKER, version, max_packet_size), frozenset(held))
        self._rules = rules
        self._version = version
        # Whether the topic that each Topic Alias stands for may be received (MQTT 5.0 §3.3.2.3.4).
        self._aliases: dict[int, bool] = {}
        # Withheld messages of QoS 2 whose PUBREL is still to come.
        self._incomplete: set[int] = set()
        # By Packet Identifier, so that a broker that does not read cannot make it grow without limit.
        self._owed: dict[int, bytes] = {}
        self.pings = 0
        self.withheld = 0

    def take_owed(self) -> bytes:
        """Return the acknowledgements that the broker is still to get, and forget them."""
        owed = b"".join(self._owed.values())
        self._owed.clear()
        return owed

    def _whole(self, packet: bytes, first: int, body: bytes) -> bytes:
        if first == _PINGRESP_BYTE:
            if self.pings:
                self.pings -= 1
                return b""
            return packet
        try:
            if PacketType(first >> 4) is PacketType.PUBREL:
                return self._release(packet, body)
            message = read_publish(self._version, first, body)
            if not self._may_receive(message):
                self._withhold(message)
                return b""
            topic, answer = at_device(self._rules, message)
            if (topic, answer) == (message.topic, message.response_topic):
                return packet
            return write_publish(self._version, first, body, topic, answer)
        except PacketError as error:
            raise PacketError(EndReason.UPSTREAM_PROTOCOL_ERROR, error.reason_code, error.detail) from None

    def _may_receive(self, message: Publish) -> bool:
        if self._rules.subscribe is None and not self._rules.subscribe_prefix:
            return True
        if not message.topic:
            return self._aliases.get(message.alias or 0, False)
        permitted = may_receive(self._rules, message.topic)
        if message.alias is not None:
            self._aliases[message.alias] = permitted
        return permitted

    def _withhold(self, message: Publish) -> None:
        self.withheld += 1
        if not message.qos:
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
        raise _refused(ReasonCode.NOT_AUTHORIZED, f"SUBSCRIBE to {_shown(wanted)}, which subscribe does not cover")


def _shown(topic: str) -> str:
    return f'"{printable(topic, _SHOWN_TOPIC)}"'


def _refused(code: ReasonCode, detail: str) -> PacketError:
    return PacketError(EndReason.RULE_REFUSED, code, detail)
