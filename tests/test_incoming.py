"""What comes down to a stored device: Packet Identifiers of two connections, and a device that is slow."""

from __future__ import annotations

import pytest

from gateway.mqtt.packets import PacketType
from gateway.session.incoming import Incoming
from tests.mqtt_packets import acknowledgement, publish

PUBACK, PUBREC, PUBREL, PUBCOMP = (
    first << 4 for first in (PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP)
)


class Ends:
    """A device's end and a broker's, with what came between them."""

    def __init__(self, receive_maximum: int = 10) -> None:
        self.device: list[bytes] = []
        self.broker: list[bytes] = []
        self.incoming = Incoming(receive_maximum, self.device.append, self.broker.append)
        self.incoming.connected(session_present=False)

    def publish(self, identifier: int, qos: int = 1) -> bytes:
        """The broker publishes; return the packet."""
        packet = publish(qos=qos, packet_identifier=identifier)
        self.incoming.from_broker(packet)
        return packet

    def reply(self, first: int, identifier: int) -> None:
        """The device acknowledges."""
        self.incoming.from_device(acknowledgement(first, packet_identifier=identifier))

    def reconnect(self, *, session_present: bool) -> None:
        """The broker is lost, and comes back."""
        self.incoming.lost()
        self.incoming.connected(session_present=session_present)
        self.device.clear()
        self.broker.clear()


def test_the_broker_is_not_read_while_much_waits_for_the_device() -> None:
    """The device may have two messages open; fifty wait behind them."""
    ends = Ends(receive_maximum=2)
    for identifier in range(1, 52):
        ends.publish(identifier)
        assert not ends.incoming.is_congested
    ends.publish(52)
    assert ends.incoming.is_congested
    ends.reply(PUBACK, 1)
    assert not ends.incoming.is_congested
    assert len(ends.device) == 3


def test_what_is_owed_to_a_connection_that_is_gone_goes_to_nobody() -> None:
    """The new connection has never heard of it."""
    ends = Ends()
    ends.publish(1)
    ends.publish(2)
    ends.reply(PUBACK, 1)
    assert ends.broker == [acknowledgement(PUBACK, packet_identifier=1)]
    ends.reconnect(session_present=True)
    ends.reply(PUBACK, 2)
    assert ends.broker == []


@pytest.mark.parametrize("session_present", [True, False])
def test_a_message_that_comes_again_after_pubrec_is_the_same_one_only_in_the_brokers_session(
    session_present: bool,
) -> None:
    """In a new session it has another message's identifier, and waits until the device has finished with the first."""
    ends = Ends()
    ends.publish(1, qos=2)
    ends.reply(PUBREC, 1)
    ends.reconnect(session_present=session_present)
    again = ends.publish(1, qos=2)
    assert ends.device == [again] * session_present
    ends.reply(PUBREC if session_present else PUBCOMP, 1)
    assert ends.device == [again]


@pytest.mark.parametrize("session_present", [True, False])
def test_a_pubrec_for_a_connection_that_is_gone_is_completed_in_the_brokers_place(session_present: bool) -> None:
    """Unless the broker still has the session, and completes it itself."""
    ends = Ends()
    ends.publish(1, qos=2)
    ends.reconnect(session_present=session_present)
    ends.reply(PUBREC, 1)
    assert ends.device == [acknowledgement(PUBREL | 2, packet_identifier=1)] * (not session_present)
    assert ends.broker == []


def test_half_of_a_qos_2_delivery_is_completed_when_the_brokers_session_is_new() -> None:
    """The device waits for PUBREL, which no broker would send."""
    ends = Ends()
    ends.publish(1, qos=2)
    ends.publish(2, qos=2)
    ends.reply(PUBREC, 1)
    ends.incoming.lost()
    ends.device.clear()
    ends.incoming.connected(session_present=False)
    assert ends.device == [acknowledgement(PUBREL | 2, packet_identifier=1)]
    ends.broker.clear()
    ends.reply(PUBCOMP, 1)
    assert ends.broker == []


def test_what_waits_when_the_broker_is_lost_is_the_brokers_still() -> None:
    """It sends it again."""
    ends = Ends(receive_maximum=1)
    ends.publish(1)
    ends.publish(2)
    ends.reconnect(session_present=True)
    ends.reply(PUBACK, 1)
    assert ends.device == []


def test_a_refused_message_is_finished() -> None:
    """PUBREC with a reason of 0x80 or more ends the exchange (MQTT 5.0 §4.3.3)."""
    ends = Ends(receive_maximum=1)
    ends.publish(1, qos=2)
    waiting = ends.publish(2, qos=2)
    ends.incoming.from_device(b"\x50\3\0\1\x7f")
    assert waiting not in ends.device
    ends.incoming.from_device(b"\x50\3\0\1\x80")
    assert waiting not in ends.device, "it was received already"
    ends.reply(PUBCOMP, 1)
    assert waiting in ends.device
    ends.publish(3, qos=2)
    ends.incoming.from_device(b"\x50\3\0\2\x80")
    assert len(ends.device) == 3
