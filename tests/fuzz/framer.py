"""The framer: the outcome does not depend on how a stream is cut, and what passes is MQTT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion
from tests import mqtt_packets as mqtt
from tests.fuzz.tools import Choices, calls, cut_in_three, single_bytes
from tests.simulation.packets import packets_of

_LIMITS = (256, 1000, 70_000, 268_435_460)

SEEDS = tuple(
    bytes((sender, version, limit, 100)) + stream
    for sender in (0, 1)
    for version in (0, 1, 2)
    for limit in (0, 3)
    for stream in (
        mqtt.publish("t", b"payload", version=version + 3, qos=1) + mqtt.pingreq() + mqtt.disconnect(),
        mqtt.publish("t", bytes(200), version=version + 3) + mqtt.acknowledgement(0x40) + b"\x30\xff\xff\xff\xff",
        mqtt.subscribe("a/+", version=version + 3) + mqtt.disconnect(code=4, properties=b"") + b"\x00",
        mqtt.suback(0, version=version + 3) + mqtt.pingresp() + mqtt.packet(0x30, bytes(5), length_size=3),
    )
)


def _outcome(framer: Framer, parts: Iterable[bytes]) -> tuple[Any, ...]:
    passed = b"".join(framer.feed(part) for part in parts)
    error = framer.error and (framer.error.reason, framer.error.reason_code, framer.error.detail)
    return passed, framer.packets, error, framer.disconnected, framer.disconnect_code, framer.at_boundary


def check(data: bytes) -> None:
    """Feed one stream whole, in three parts and byte by byte."""
    choices = Choices(data)
    sender, version = choices.of(tuple(Sender)), choices.of(tuple(ProtocolVersion))
    limit, where = choices.of(_LIMITS), choices.number(256)
    stream = choices.rest()

    def fresh() -> Framer:
        return Framer(sender, version, limit)

    whole = _outcome(fresh(), [stream])
    assert _outcome(fresh(), cut_in_three(stream, where)) == whole
    assert _outcome(fresh(), single_bytes(stream)) == whole
    passed, packets, error, disconnected, _, at_boundary = whole
    assert stream.startswith(passed)
    found = packets_of(passed)
    assert len(found) <= packets <= len(found) + 1
    if not error and not disconnected and len(stream) - len(passed) > 4:
        raise AssertionError("more than an unfinished fixed header is held back")
    for end, first, body in found:
        assert len(body) + 2 <= limit
        assert first >> 4 not in {0, 1, 2}, "a packet that does not belong behind CONNACK has passed"
        assert first & 0xF6 != 0x36, "QoS 3 has passed"
        assert first >> 4 != 14 or end == len(passed), "something has passed behind DISCONNECT"
    if disconnected:
        assert found[-1][1] >> 4 == 14  # MQTT 3.1 ignores the flags
        assert at_boundary
    # Work is counted in packets and in what stands in their heads, never bytes by bytes.
    work = calls(lambda: fresh().feed(stream))
    assert work <= 150 + 40 * (packets + 1) + 6 * len(stream), f"{work} calls for {packets} packets"


def forgets_held_bytes() -> None:
    """Bytes of a fixed header that were held back are lost."""
    feed = Framer.feed

    def forgetful(self: Framer, data: bytes) -> bytes:
        passed = feed(self, data)
        self._held = self._held[:2]
        return passed

    Framer.feed = forgetful  # type: ignore[method-assign]


def passes_on_behind_disconnect() -> None:
    """What comes after a DISCONNECT reaches the broker, too."""
    feed = Framer.feed

    def lenient(self: Framer, data: bytes) -> bytes:
        passed = feed(self, data)
        return data if self.disconnected and len(data) > len(passed) else passed

    Framer.feed = lenient  # type: ignore[method-assign]


FAULTS = (forgets_held_bytes, passes_on_behind_disconnect)
