"""The framers: the outcome does not depend on how a stream is cut, what passes is MQTT, and only what must wait waits.

What a framer may hold back is worked out here apart from the gateway's code: a fixed header that is not whole, a
broker's DISCONNECT that is not whole, and, where bodies are checked, a packet whose head is not whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gateway.mqtt.bodies import MOST_HELD
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import MAX_ELEMENTS, ProtocolVersion
from tests import mqtt_packets as mqtt
from tests.fuzz.tools import Choices, calls, cut_in_three, single_bytes
from tests.simulation.packets import packets_of

_LIMITS = (256, 1000, 70_000, 268_435_460)
_KINDS = tuple((kind, sender) for kind in (Framer, CheckingFramer) for sender in Sender)

_PUBLISH, _SUBSCRIBE, _SUBACK, _UNSUBSCRIBE, _UNSUBACK, _DISCONNECT = 3, 8, 9, 10, 11, 14
_ACKNOWLEDGEMENTS = (4, 5, 6, 7)
_SERVER_REFERENCE, _USER_PROPERTY = 0x1C, 0x26
# How many strings each property of a server's DISCONNECT has; Session Expiry Interval (0x11) has four bytes instead.
_STRINGS = {0x11: 0, _SERVER_REFERENCE: 1, 0x1F: 1, _USER_PROPERTY: 2}

SEEDS = tuple(
    bytes((kind, version, limit, 100)) + stream
    for kind in range(len(_KINDS))
    for version in (0, 1, 2)
    for limit in (0, 3)
    for stream in (
        mqtt.publish("t", b"payload", version=version + 3, qos=1) + mqtt.pingreq() + mqtt.disconnect(),
        mqtt.publish("t", bytes(200), version=version + 3) + mqtt.acknowledgement(0x40) + b"\x30\xff\xff\xff\xff",
        mqtt.subscribe("a/+", version=version + 3) + mqtt.disconnect(code=4, properties=b"") + b"\x00",
        mqtt.suback(0, version=version + 3) + mqtt.pingresp() + mqtt.packet(0x30, bytes(5), length_size=3),
        mqtt.disconnect(code=0x9D, properties=mqtt.text(0x1C, "other:1883") + mqtt.user_property()),
        mqtt.publish("t", version=5, properties=mqtt.text(0x08, "answer") + mqtt.user_property())[:-6],
    )
)


def _outcome(framer: Framer, parts: Iterable[bytes]) -> tuple[Any, ...]:
    passed = mqtt.fed(framer, *parts)
    error = framer.error and (framer.error.reason, framer.error.reason_code, framer.error.detail)
    return passed, framer.packets, error, framer.disconnected, framer.disconnect_code, framer.at_boundary


def _variable(data: bytes) -> tuple[int, int] | None:
    """Read a Variable Byte Integer: its value and size, None if it is not whole."""
    value = 0
    for size, byte in enumerate(data[:4], 1):
        value |= (byte & 0x7F) << 7 * (size - 1)
        if byte < 0x80:
            return value, size
    return None


def _head_end(version: ProtocolVersion, first: int, body: bytes, length: int) -> int:
    """Say how many bytes of a body of `length` are its head, as far as is to be seen from those that are there.

    If that is more than are there, the head is not whole.
    """
    is_5, kind = version is ProtocolVersion.MQTT_5_0, first >> 4
    if kind == _PUBLISH:
        end = 2 + int.from_bytes(body[:2], "big") + (2 if first & 0b0110 else 0)
    elif kind in {_SUBSCRIBE, _UNSUBSCRIBE}:
        return length if length <= MOST_HELD else 2
    elif kind in {_SUBACK, _UNSUBACK}:
        end = 2
    elif kind in _ACKNOWLEDGEMENTS:
        if not is_5 or length <= 3:
            return 2  # A Reason Code may follow, without properties (MQTT 5.0 §3.4.2.2.1).
        end = 3
    else:
        return 0
    if len(body) < end or not is_5 or length <= end:
        return max(end, 2)
    properties = _variable(body[end:])
    if properties is None:
        return len(body) + 1
    end += sum(properties)
    return end if end <= MOST_HELD else 0


def _may_wait(kind: type[Framer], sender: Sender, version: ProtocolVersion, begun: bytes) -> bool:
    """Say whether the beginning of a packet, or a whole one, is too little to be passed on."""
    header = _variable(begun[1:])
    if header is None:
        return True
    length, size = header
    body = begun[1 + size :]
    if begun[0] >> 4 == _DISCONNECT and sender is Sender.BROKER:
        return len(body) < length
    return kind is CheckingFramer and len(body) < _head_end(version, begun[0], body, length)


def _check_what_waits(kind: type[Framer], sender: Sender, version: ProtocolVersion, stream: bytes, whole: Any) -> None:
    """All that can be judged has passed, and nothing else, of a stream that has neither a fault nor an end."""
    passed, packets, _, _, _, at_boundary = whole
    found = packets_of(passed)
    begun, waits = passed[found[-1][0] if found else 0 :], stream[len(passed) :]
    assert not (begun and waits), "something is held back within a packet that passes"
    assert not begun or not _may_wait(kind, sender, version, begun), "a packet has passed that could not be judged"
    assert not waits or _may_wait(kind, sender, version, waits), "a packet is held back that can be judged"
    assert at_boundary is not bool(begun or waits)
    # A broker's DISCONNECT is counted when its fixed header is there.
    counted = begun or (waits and waits[0] >> 4 == _DISCONNECT and _variable(waits[1:]))
    assert packets == len(found) + bool(counted)


def _for_device(disconnect: bytes) -> bytes:
    """Return a broker's DISCONNECT as its device gets it: without a Server Reference (MQTT 5.0 §3.14.2.2.5).

    Properties that break the standard are left out, all of them.
    """
    ((_, _, body),) = packets_of(disconnect)
    if len(body) < 2:
        return disconnect
    code, properties = body[:1], _properties(body[1:])
    if properties is None:
        return mqtt.packet(0xE0, code if code != b"\0" else b"")
    kept = [each for each in properties if each[0] != _SERVER_REFERENCE]
    if kept == properties:
        return disconnect
    section = b"".join(kept)
    return mqtt.packet(0xE0, code + mqtt.variable_byte_integer(len(section)) + section)


def _properties(data: bytes) -> list[bytes] | None:
    """Cut the properties of a server's DISCONNECT apart; None if they break the standard (MQTT 5.0 §2.2.2)."""
    header = _variable(data)
    if header is None or mqtt.variable_byte_integer(header[0]) != data[: header[1]] or sum(header) != len(data):
        return None
    found, at = [], header[1]
    while at < len(data):
        start, strings = at, _STRINGS.get(data[at])
        at += 1 if strings else 5
        for _ in range(strings or 0):
            end = at + 2 + int.from_bytes(data[at : at + 2], "big")
            try:
                is_text = "\0" not in data[at + 2 : end].decode()
            except UnicodeDecodeError:
                is_text = False
            if at + 2 > len(data) or not is_text:
                return None
            at = end
        if strings is None or at > len(data):
            return None
        found.append(data[start:at])
    once = [each[0] for each in found if each[0] != _USER_PROPERTY]
    return found if len(once) == len(set(once)) and len(found) <= MAX_ELEMENTS else None


def check(data: bytes) -> None:
    """Feed one stream whole, in three parts and byte by byte."""
    choices = Choices(data)
    (kind, sender), version = choices.of(_KINDS), choices.of(tuple(ProtocolVersion))
    limit, where = choices.of(_LIMITS), choices.number(256)
    stream = choices.rest()

    def fresh() -> Framer:
        return kind(sender, version, limit)

    whole = _outcome(fresh(), [stream])
    assert _outcome(fresh(), cut_in_three(stream, where)) == whole
    assert _outcome(fresh(), single_bytes(stream)) == whole
    passed, packets, error, disconnected, _, at_boundary = whole
    found = packets_of(passed)
    if disconnected and sender is Sender.BROKER:
        start = found[-2][0] if len(found) > 1 else 0
        (sent, *_) = packets_of(stream[start:])
        assert passed[start:] == _for_device(stream[start : start + sent[0]]), "this is not the broker's DISCONNECT"
        assert stream.startswith(passed[:start])
    else:
        assert stream.startswith(passed)
    if not error and not disconnected:
        _check_what_waits(kind, sender, version, stream, whole)
    else:
        assert packets == len(found), "a stream has come to its end within a packet"
    for end, first, body in found:
        assert len(body) + 2 <= limit
        assert first >> 4 not in {0, 1, 2}, "a packet that does not belong behind CONNACK has passed"
        assert first & 0xF6 != 0x36, "QoS 3 has passed"
        assert first >> 4 != _DISCONNECT or end == len(passed), "something has passed behind DISCONNECT"
    if disconnected:
        assert found[-1][1] >> 4 == _DISCONNECT  # MQTT 3.1 ignores the flags
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
