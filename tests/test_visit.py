"""A visit alone: what a device may publish, and what it is told while it is there."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, call

import pytest

from gateway.errors import EndReason, PacketError
from gateway.mqtt.message import Message
from gateway.mqtt.packets import PacketType, ReasonCode
from gateway.session.treatment import Treatment
from gateway.session.visit import LARGEST_HELD, Visit, World
from tests.stored_world import connect_packet, parsed


def visit_of(version: int, largest: int = 5000, **values: Any) -> Visit:
    """Return the visit of a device that has sent CONNECT to a listener; `values` are the rule's."""
    packet, connect = parsed(connect_packet("d", version, clean=False, keep_alive=7))
    world = World(
        seconds=lambda: 12.0,
        now=lambda: 0.0,
        is_plausible=lambda: True,
        uniform=lambda: 1.0,
        max_packet_size=largest,
        max_connect_size=1000,
        check_bodies=True,
        connack=1.0,
    )
    return Visit(Mock(), packet, Treatment(packet.raw, connect.version, **values), connect, world)


def test_a_visit_begins_before_connack() -> None:
    """Nothing has been promised yet, and nothing is read behind CONNECT."""
    visit = visit_of(5)
    assert (visit.since, visit.heard, visit.keep_alive, visit.largest) == (12.0, 12.0, 7, 5000)
    assert (visit.max_qos, visit.may_retain, visit.is_first_upstream, visit.is_held) == (2, True, True, True)
    assert not any((visit.is_admitted, visit.told_session_present, visit.gone, visit.is_saved, visit.is_being_saved))
    assert (visit.requests, visit.releases, visit.pace, list(visit.waiting)) == (0, 0, None, [])


def test_the_largest_packet_is_that_of_the_rule() -> None:
    """Without one, that of the listener, but never more than a megabyte is collected."""
    assert visit_of(5, 2 * LARGEST_HELD).largest == LARGEST_HELD
    assert visit_of(5, max_packet_size=3 * LARGEST_HELD).largest == 3 * LARGEST_HELD
    assert visit_of(5, max_packet_size=300).largest == 300


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Message(b"t", b"", 2), ReasonCode.QOS_NOT_SUPPORTED),
        (Message(b"t", b"", 1, retain=True), ReasonCode.RETAIN_NOT_SUPPORTED),
    ],
)
def test_a_message_that_connack_excluded_is_an_error(message: Message, code: ReasonCode) -> None:
    """Only in 5.0, where CONNACK can say so; before CONNACK has said so, everything may come."""
    visit, older = visit_of(5), visit_of(4)
    visit.check_limits(message)
    for each in (visit, older):
        each.max_qos, each.may_retain = 1, False
    older.check_limits(message)
    visit.check_limits(Message(b"t", b"", 1))
    with pytest.raises(PacketError) as caught:
        visit.check_limits(message)
    assert (caught.value.reason, caught.value.reason_code) == (EndReason.PROTOCOL_ERROR, code)


def test_an_acknowledgement_has_a_reason_code_in_mqtt_5_only() -> None:
    """A success needs none."""
    for version, raw in ((5, b"\x40\3\1\2\x10"), (4, b"\x40\2\1\2")):
        visit = visit_of(version)
        visit.acknowledge(PacketType.PUBACK, 0x102, 0x10)
        visit.acknowledge(PacketType.PUBREL, 3)
        assert visit.device.send.mock_calls == [call(raw), call(b"\x62\2\0\3")]  # type: ignore[attr-defined]


def test_a_device_is_told_that_its_message_is_not_stored() -> None:
    """With "Quota exceeded", 0x97 (MQTT 5.0 §3.14.2.1)."""
    visit = visit_of(5)
    visit.not_stored("the disk is full")
    visit.device.finish.assert_called_once_with(  # type: ignore[attr-defined]
        EndReason.STORE_UNAVAILABLE, "the disk is full", code=0x97
    )


def test_a_device_that_has_gone_is_told_nothing() -> None:
    """Its session is over; the store's answer comes later."""
    visit = visit_of(5)
    visit.gone = True
    visit.acknowledge(PacketType.PUBACK, 1)
    visit.not_stored("the disk is full")
    assert visit.device.mock_calls == []  # type: ignore[attr-defined]
