"""The head of a PUBLISH: how much of it is known to be needed as its bytes come, and its answer's prefix."""

from __future__ import annotations

import pytest

from gateway.mqtt.packets import ProtocolVersion
from gateway.mqtt.relayed import head_size, topic_size, without_prefixes
from tests import mqtt_packets as mqtt

V4, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(("first", "identifier"), [(0x30, 0), (0x31, 0), (0x32, 2), (0x34, 2), (0x3D, 2)])
def test_the_size_of_topic_and_identifier(first: int, identifier: int, start: int) -> None:
    """Two bytes say how long the topic is; a Packet Identifier follows it above QoS 0."""
    data = b"?" * start + mqtt.string("topic") + b"\0\7"
    for known in (0, 1):
        assert topic_size(first, data[: start + known], start) == 2
    for known in (2, 3, 7, 9):
        assert topic_size(first, data[: start + known], start) == 2 + 5 + identifier


@pytest.mark.parametrize("first", [0x30, 0x32])
def test_the_size_of_a_head_is_known_when_its_bytes_are_there(first: int) -> None:
    """In 5.0 the Property Length is part of it, which has up to four bytes; what is behind it does not count."""
    head = mqtt.string("t") + (b"\0\7" if first & 6 else b"")
    properties = mqtt.with_length(mqtt.user_property() * 20)
    assert properties[0] & 0x80
    data = b"?" + head + properties + b"payload"
    for known in range(1, len(data) + 1):
        part = data[:known]
        size = head_size(V5, first, part, 1)
        is_complete = known - 1 >= size and head_size(V5, first, data, 1) == size
        assert is_complete == (known - 1 >= len(head) + len(properties))
    assert head_size(V5, first, data, 1) == len(head) + len(properties)
    assert head_size(V4, first, data, 1) == len(head)


def test_a_property_length_that_does_not_end_is_read_to_be_refused() -> None:
    """Four bytes of it are enough."""
    head = mqtt.string("t")
    assert head_size(V5, 0x30, head + b"\xff" * 9, 0) == len(head) + 4


@pytest.mark.parametrize(
    ("answer", "kept"), [("in/a", "a"), ("in/", None), ("in", None), ("out/a", None), ("$SYS/a", "$SYS/a")]
)
def test_an_answer_goes_where_the_device_would_subscribe(answer: str, kept: str | None) -> None:
    """Outside the prefix, or with nothing behind it, the Response Topic is removed; those of the broker stay."""
    body = mqtt.publish("in/t", b"x", version=5, properties=mqtt.text(0x08, answer))[2:]
    found = without_prefixes(V5, 0x30, body, 0, b"in/", b"in/")
    assert found == mqtt.publish("t", b"x", version=5, properties=b"" if kept is None else mqtt.text(0x08, kept))
