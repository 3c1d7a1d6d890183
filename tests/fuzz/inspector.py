"""The inspectors: what passes is what the rule permits, is well-framed MQTT, and does not depend on how bytes come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gateway.mqtt import inspector as inspector_module
from gateway.mqtt import relayed as relayed_module
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.inspector import BrokerInspector, DeviceInspector, TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.mqtt.topics import TopicFilters
from tests import mqtt_packets as mqtt
from tests.fuzz.tools import Choices, calls, cut_in_three, single_bytes
from tests.simulation.packets import packets_of

_VERSIONS = tuple(ProtocolVersion)
_LIMIT = 4096
_PREFIX = "site/"

_FILTERS = (None, TopicFilters(("t/#",)), TopicFilters(("t/1", "+/x")), TopicFilters(()))
_DEVICE = tuple(
    TopicRules(
        publish=publish, subscribe=subscribe, max_qos=qos, strip_retain=strip, publish_prefix=p, subscribe_prefix=p
    )
    for publish in _FILTERS
    for subscribe in (None, TopicFilters(("t/#",)))
    for qos, strip in ((2, False), (0, True), (1, False))
    for p in ("", _PREFIX)
)

SEEDS = tuple(
    bytes((side, version, rules, 90)) + stream
    for side in (0, 1)
    for version in (0, 1, 2)
    for rules in (0, 1, 13, 25)
    for stream in (
        mqtt.publish("t/1", b"x", version=version + 3, qos=1)
        + mqtt.subscribe("t/1", "$share/g/t/#", version=version + 3, qos=2)
        + mqtt.unsubscribe("t/1", version=version + 3)
        + mqtt.pingreq(),
        mqtt.publish(_PREFIX + "t/1", bytes(30), version=version + 3)
        + mqtt.pingresp()
        + mqtt.publish("$SYS/x", version=version + 3),
        mqtt.subscribe(*(f"t/{number}" for number in range(50)), version=version + 3),
        mqtt.publish("t/1", b"", version=5, properties=mqtt.text(0x08, "t/2") + mqtt.user_property()),
    )
)


def _outcome(inspector: Any, parts: Iterable[bytes]) -> tuple[Any, ...]:
    passed = mqtt.fed(inspector, *parts)
    error = inspector.error and (inspector.error.reason, inspector.error.reason_code)
    return passed, inspector.packets, error, inspector.disconnected, inspector.at_boundary


def _topic(first: int, body: bytes) -> str | None:
    """Return a PUBLISH's topic, read apart from the gateway's code; None if it is no PUBLISH or no text."""
    if first >> 4 != 3:
        return None
    try:
        return body[2 : 2 + int.from_bytes(body[:2], "big")].decode()
    except UnicodeDecodeError:
        return None


def _matches(wanted: str, topic: str) -> bool:
    """Say whether a Topic Filter matches a Topic Name, level by level (MQTT 5.0 §4.7)."""
    levels, names = wanted.split("/"), topic.split("/")
    if topic.startswith("$") and levels[0] in {"+", "#"}:
        return False
    for at, level in enumerate(levels):
        if level == "#":
            return True
        if at >= len(names) or level not in {"+", names[at]}:
            return False
    return len(levels) == len(names)


def check(data: bytes) -> None:
    """Inspect one direction, whole and cut."""
    choices = Choices(data)
    side, version, rules = choices.of(tuple(Sender)), choices.of(_VERSIONS), choices.of(_DEVICE)
    where = choices.number(256)
    stream = choices.rest()
    fresh: Callable[[], Any]
    if side is Sender.DEVICE:
        upgraded = version is ProtocolVersion.MQTT_3_1 and bool(where & 1)
        fresh = lambda: DeviceInspector(rules, version, _LIMIT, upgraded=upgraded)  # noqa: E731
    else:
        fresh = lambda: BrokerInspector(rules, version, _LIMIT)  # noqa: E731
    inspector = fresh()
    whole = _outcome(inspector, [stream])
    assert _outcome(fresh(), cut_in_three(stream, where)) == whole
    if len(stream) <= 300:
        assert _outcome(fresh(), single_bytes(stream)) == whole
    passed, packets, error, disconnected, at_boundary = whole
    sent = packets_of(stream)
    if error is None and not disconnected and stream == stream[: sent[-1][0] if sent else 0]:
        assert packets == len(sent)
        assert at_boundary
        assert not inspector.withholds, "a whole packet is held back"
    towards = ProtocolVersion.MQTT_3_1_1 if side is Sender.DEVICE and upgraded else version
    # A broker's packet may only become shorter; a device's that became too long would have been refused.
    framer = Framer(side, towards, _LIMIT)
    assert mqtt.fed(framer, passed) == passed, "what was passed on is no MQTT"
    assert framer.error is None
    if side is Sender.DEVICE:
        _check_device(rules, stream, passed)
    else:
        _check_broker(rules, stream, passed)
    # Work is counted in what there is to look at: bytes at most, never bytes by bytes.
    assert calls(lambda: fresh().feed(stream)) <= 300 + 25 * len(stream)


def _check_device(rules: TopicRules, stream: bytes, passed: bytes) -> None:
    sent = [_topic(first, body) for _, first, body in packets_of(stream)]
    for _, first, body in packets_of(passed):
        topic = _topic(first, body)
        if topic is None:
            continue
        assert not (rules.strip_retain and first & 1), "Retain has passed"
        assert (first >> 1 & 0b11) <= rules.max_qos, "a QoS above max_qos has passed"
        if topic and rules.publish_prefix and not topic.startswith("$"):
            assert topic.startswith(_PREFIX), "a topic has passed without its prefix"
            topic = topic.removeprefix(_PREFIX)
        assert topic in sent, "a topic that the device never named has passed"
        if rules.publish is not None and topic:
            assert any(_matches(each, topic) for each in rules.publish.filters), (
                "a topic that the rule does not name has passed"
            )


def _check_broker(rules: TopicRules, stream: bytes, passed: bytes) -> None:
    sent = [_topic(first, body) for _, first, body in packets_of(stream)]
    for _, first, body in packets_of(passed):
        topic = _topic(first, body)
        if not topic:
            continue
        came = topic in sent if topic.startswith("$") or not rules.subscribe_prefix else _PREFIX + topic in sent
        assert came, "a topic has passed that the broker never named, or not with the prefix"
        if rules.subscribe is not None:
            assert any(_matches(each, topic) for each in rules.subscribe.filters), (
                "a topic has passed that the device may not subscribe to"
            )


def receives_what_it_may_not() -> None:
    """What the broker sends is not judged by what the device may subscribe to."""
    inspector_module.may_receive = lambda *_: True


def permits_the_first_level() -> None:
    """Only the first level of a topic is compared."""
    TopicFilters.permits_name = lambda self, wanted: any(  # type: ignore[method-assign]
        each.split("/")[0] in {wanted.split("/")[0], "#", "+"} for each in self.filters
    )


def judges_only_what_comes_whole() -> None:
    """A packet that comes in parts passes as it is."""
    collect = inspector_module._Cutter._collect

    def faulty(self: Any, data: bytes, offset: int, passed: list[bytes]) -> int:
        if not isinstance(self, DeviceInspector):
            return collect(self, data, offset, passed)
        held, self._held = bytes(self._held), bytearray()
        passed.append(held)
        self._passing = self._size - len(held)
        return offset

    inspector_module._Cutter._collect = faulty  # type: ignore[method-assign]


def is_quadratic_in_topic_filters() -> None:
    """Each Topic Filter is compared with all that came before."""
    read = relayed_module._read_filters

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        found = read(*arguments, **keywords)
        for text, _ in found.filters:
            for other, _ in found.filters:
                for _ in range(20):
                    other.startswith(text)
        return found

    relayed_module._read_filters = faulty


FAULTS = (
    receives_what_it_may_not,
    permits_the_first_level,
    judges_only_what_comes_whole,
    is_quadratic_in_topic_filters,
)
