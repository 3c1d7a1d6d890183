"""Packets that the gateway reads and writes as a server or a client of its own, byte by byte; packets made whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import EndReason, PacketError
from gateway.mqtt import message as mqtt
from gateway.mqtt.message import Message, Subscription
from gateway.mqtt.packets import PacketType, ProtocolVersion, decode_remaining_length
from gateway.mqtt.whole import WholePackets

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0

# Version, bytes, what they say, Packet Identifier.
PUBLISHES = [
    (V311, b"\x30\4\0\1tx", Message(b"t", b"x", 0), 0),
    (V31, b"\x31\4\0\1tx", Message(b"t", b"x", 0, retain=True), 0),
    (V311, b"\x32\6\0\1t\1\2x", Message(b"t", b"x", 1), 0x102),
    (V311, b"\x34\5\0\1t\0\7", Message(b"t", b"", 2), 7),
    (V5, b"\x30\5\0\1t\0x", Message(b"t", b"x", 0, properties=b""), 0),
    (V5, b"\x32\x0c\0\1t\0\7\5\2\0\0\1\0x", Message(b"t", b"x", 1, properties=b"", expiry=256), 7),
    (V5, b"\x32\x0e\0\1t\0\7\7\1\1\2\0\0\0\5x", Message(b"t", b"x", 1, properties=b"\1\1", expiry=5), 7),
]


@pytest.mark.parametrize(("version", "packet", "message", "identifier"), PUBLISHES)
def test_a_publish_is_read_and_written(version: ProtocolVersion, packet: bytes, message: Message, identifier: int):
    """Each is what the other takes."""
    assert mqtt.read_message(version, packet) == (message, identifier)
    assert mqtt.write_message(version, message, identifier) == packet
    if identifier:
        assert mqtt.publish_identifier(packet) == identifier


def test_a_publish_that_is_sent_again_has_dup():
    """Not with QoS 0, which is never sent again (MQTT 3.1.1 §3.3.1.1)."""
    assert mqtt.write_message(V311, Message(b"t", b"", 1), 7, duplicate=True)[0] == 0x3A
    assert mqtt.write_message(V311, Message(b"t", b"", 0), 0, duplicate=True)[0] == 0x30


def test_dup_is_no_part_of_a_message():
    """A message that came twice is the same."""
    assert mqtt.read_message(V311, b"\x3a\5\0\1t\0\7") == (Message(b"t", b"", 1), 7)


@pytest.mark.parametrize(("waited", "left"), [(0, 5), (3, 2), (5, 1), (60, 1)])
def test_the_time_that_a_message_waited_is_taken_off(waited: int, left: int):
    """At least a second is left: 0 would be a message that has expired."""
    message = Message(b"t", b"", 0, properties=b"", expiry=5)
    assert mqtt.write_message(V5, message, 0, waited=waited) == b"\x30\x09\0\1t\5\2\0\0\0" + bytes((left,))


@pytest.mark.parametrize("version", [V311, V5])
def test_packet_identifier_0_is_refused(version: ProtocolVersion):
    with pytest.raises(PacketError, match="Packet Identifier 0"):
        mqtt.read_message(version, b"\x32\6\0\1t\0\0\0")


def test_a_topic_alias_is_refused():
    """The gateway grants none."""
    with pytest.raises(PacketError) as raised:
        mqtt.read_message(V5, b"\x30\7\0\1t\3\x23\0\1")
    assert (raised.value.reason, raised.value.reason_code) == (EndReason.PROTOCOL_ERROR, 0x94)


def test_another_qos_is_another_message():
    """The same QoS is the same message."""
    message = Message(b"t", b"x", 0, retain=True)
    assert mqtt.with_qos(message, 0) is message
    assert mqtt.with_qos(message, 1) == Message(b"t", b"x", 1, retain=True)


# Packets, and what writes them.
WRITTEN: list[tuple[bytes, Callable[..., bytes], tuple[Any, ...]]] = [
    (b"\x40\2\1\2", mqtt.acknowledgement, (PacketType.PUBACK, 0x102)),
    (b"\x50\3\0\7\x97", mqtt.acknowledgement, (PacketType.PUBREC, 7, 0x97)),
    (b"\x62\2\0\7", mqtt.acknowledgement, (PacketType.PUBREL, 7)),
    (b"\x70\2\0\7", mqtt.acknowledgement, (PacketType.PUBCOMP, 7)),
    (b"\x82\x06\1\2\0\1t\2", mqtt.subscribe, (V311, 0x102, [Subscription("t", 2)])),
    (b"\x82\x0b\1\2\0\0\1t\2\0\1u\1", mqtt.subscribe, (V5, 0x102, [Subscription("t", 2), Subscription("u", 1)])),
    (b"\x82\x0a\0\7\3\x0b\x80\1\0\1t\0", mqtt.subscribe, (V5, 7, [Subscription("t", 0, 128)])),
    (b"\xa2\5\1\2\0\1t", mqtt.unsubscribe, (V311, 0x102, ["t"])),
    (b"\xa2\x09\0\7\0\0\1t\0\1u", mqtt.unsubscribe, (V5, 7, ["t", "u"])),
    (b"\x90\4\1\2\1\x80", mqtt.suback, (V311, 0x102, [1, 0x80])),
    (b"\x90\4\0\7\0\2", mqtt.suback, (V5, 7, [2])),
    (b"\xb0\2\1\2", mqtt.unsuback, (V311, 0x102, 2)),
    (b"\xb0\5\0\7\0\0\0", mqtt.unsuback, (V5, 7, 2)),
]


@pytest.mark.parametrize(("packet", "write", "values"), WRITTEN)
def test_packets_are_written_as_the_standard_has_them(
    packet: bytes, write: Callable[..., bytes], values: tuple[Any, ...]
):
    """MQTT 3.1.1 §3.4 to §3.11, and MQTT 5.0's."""
    assert write(*values) == packet


def test_an_identifier_is_read_and_replaced():
    """Whatever follows it, and however long the Remaining Length is."""
    assert mqtt.identifier_of(b"\x40\2\1\2") == 0x102
    assert mqtt.with_identifier(b"\x90\3\0\5\1", 0x102) == b"\x90\3\1\2\1"
    long = b"\x82\x81\1\0\5" + bytes(127)
    assert mqtt.body_of(long) == long[3:]
    assert mqtt.with_identifier(long, 0x102) == long[:3] + b"\1\2" + long[5:]


def test_a_code_that_is_left_out_is_success():
    """MQTT 5.0 §3.4.2.1."""
    assert mqtt.code_of(b"\x40\2\0\7") == 0
    assert mqtt.code_of(b"\x40\3\0\7\x10") == 0x10
    assert mqtt.code_of(b"\x40\4\0\7\x97\0") == 0x97


def test_subscriptions_are_read_with_their_identifier():
    """0 is none; options that 3.1.1's reader leaves out are 0."""
    assert mqtt.read_subscriptions(V5, b"\x82\x09\0\7\2\x0b\5\0\1t\1", [("t", 1)]) == [Subscription("t", 1, 5)]
    assert mqtt.read_subscriptions(V5, b"\x82\x07\0\7\0\0\1t\1", [("t", 1)]) == [Subscription("t", 1, 0)]
    assert mqtt.read_subscriptions(V311, b"\x82\x06\0\7\0\1t\1", [("t", None)]) == [Subscription("t", 0, 0)]
    assert Subscription("t", 0b101110).qos == 2


def test_the_codes_of_a_suback_are_read():
    """Behind the properties."""
    assert mqtt.suback_codes(V311, b"\x90\4\0\7\1\x80") == b"\1\x80"
    assert mqtt.suback_codes(V5, b"\x90\x08\0\7\4\x1f\0\1x\2") == b"\2"
    assert mqtt.suback_codes(V311, b"\x90\2\0\7") == b""
    with pytest.raises(PacketError, match="SUBACK"):
        mqtt.suback_codes(V311, b"\x90\1\0")


class Passes:
    """A checker that passes everything."""

    error: PacketError | None = None
    packets = 0
    behind = False

    def feed(self, data: bytes) -> bytes:
        """Return it."""
        return data


def test_packets_are_whole_however_they_are_cut():
    """Each once, in order."""
    packets = [b"\xc0\0", b"\x30\x80\1" + bytes(128), b"\x40\2\0\1", b"\xe0\0"]
    data = b"".join(packets)
    for size in (1, 2, 3, 130, 131, 132, 133, 134, len(data)):
        checker: Any = Passes()
        whole = WholePackets(checker)
        got = [each for at in range(0, len(data), size) for each in whole.feed(data[at : at + size])]
        assert got == packets, size
        assert not whole.behind


def test_thirty_packets_are_returned_at_a_time():
    """A fault behind them is told when they have been taken."""
    checker: Any = Passes()
    whole = WholePackets(checker)
    assert len(whole.feed(b"\xc0\0" * 70)) == 30
    checker.error = PacketError(EndReason.PROTOCOL_ERROR, 0x82, "fault")
    assert whole.behind
    assert whole.error is None
    assert len(whole.feed(b"")) == 30
    assert len(whole.feed(b"\xc0\0")) == 11
    assert not whole.behind
    assert whole.error is checker.error
    checker.behind = True
    assert whole.behind


def test_a_packet_is_not_read_anew_with_each_of_its_bytes(monkeypatch: pytest.MonkeyPatch):
    """Its size is known once its header is."""
    read: list[int] = []

    def decode(data: bytes, offset: int) -> tuple[int, int] | None:
        read.append(len(data))
        return decode_remaining_length(data, offset)

    monkeypatch.setattr("gateway.mqtt.whole.decode_remaining_length", decode)
    checker: Any = Passes()
    whole = WholePackets(checker)
    packet = b"\x30\x7e" + bytes(126)
    assert [each for byte in packet for each in whole.feed(bytes((byte,)))] == [packet]
    assert len(read) == 3


def test_what_was_fed_and_not_passed_comes_with_a_later_turn():
    """Not before the packets that wait already: what is held stays bounded."""

    class Hesitates(Passes):
        fed = 0

        def feed(self, data: bytes) -> bytes:
            """Return a packet more, each time."""
            self.fed += 1
            return data + b"\xe0\0"

    checker: Any = Hesitates()
    whole = WholePackets(checker)
    assert len(whole.feed(b"\xc0\0" * 40)) == 30
    assert len(whole.feed(b"")) == 11
    assert checker.fed == 1
    assert whole.feed(b"") == [b"\xe0\0"]


def test_a_message_does_not_show_its_content() -> None:
    """Logs must not have it."""
    shown = repr(Message(b"topic", b"secret", 0, properties=b"hidden"))
    assert "topic" in shown
    assert "secret" not in shown
    assert "hidden" not in shown
