from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason, PacketError
from gateway.mqtt.connack import (
    Connack,
    connack_acceptance,
    connack_for_device,
    connack_properties,
    connack_refusal,
    connack_without_session,
    disconnect,
    disconnect_for_device,
    parse_connack,
)
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import PacketType, ProtocolVersion, describe_connack, describe_disconnect
from gateway.mqtt.reader import Packet, PacketReader
from tests import mqtt_packets
from tests.mqtt_packets import binary, connack, number, packet, text, user_property

VERSIONS = [3, 4, 5]


def parse(data: bytes, version: int = 4) -> Connack:
    """Read one CONNACK, and nothing after it, the way the gateway does."""
    reader = PacketReader(frozenset({PacketType.CONNACK}), 1_000_000, EndReason.UPSTREAM_PROTOCOL_ERROR)
    reader.feed(data)
    found = reader.next_packet()
    assert found is not None
    assert reader.buffered == 0
    return parse_connack(found, ProtocolVersion(version))


def read_all(data: bytes) -> list[Packet]:
    """Cut CONNACKs from the stream."""
    reader = PacketReader(frozenset({PacketType.CONNACK}), 1_000_000, EndReason.UPSTREAM_PROTOCOL_ERROR)
    reader.feed(data)
    return list(iter(reader.next_packet, None))


@pytest.mark.parametrize("version", VERSIONS)
def test_success_is_accepted(version):
    """Code 0 takes the session in every version."""
    parsed = parse(connack(version=version), version)
    assert parsed == Connack(session_present=False, code=0)
    assert parsed.accepted


@pytest.mark.parametrize(("version", "code"), [(3, 2), (4, 5), (4, 6), (5, 0x80), (5, 0x87), (5, 0xFE)])
def test_a_refusal_is_read_with_its_code(version, code):
    """Codes that no specification knows are refusals too."""
    parsed = parse(connack(version=version, code=code), version)
    assert (parsed.code, parsed.accepted) == (code, False)


@pytest.mark.parametrize(("version", "present"), [(3, False), (4, True), (5, True)])
def test_session_present_is_read_where_it_exists(version, present):
    """In 3.1 that byte is not used, whatever it holds."""
    assert parse(connack(version=version, flags=1), version).session_present is present


def test_what_mqtt_5_tells_the_client_is_read():
    """The broker's Keep Alive, limit, Client Identifier and reason."""
    properties = number(0x13, 30, size=2) + number(0x27, 4096, size=4) + text(0x12, "auto-1") + text(0x1F, "welcome")
    assert parse(connack(version=5, properties=properties + user_property() * 2), 5) == Connack(
        session_present=False,
        code=0,
        server_keep_alive=30,
        maximum_packet_size=4096,
        assigned_client_identifier="auto-1",
        reason_string="welcome",
    )


def test_every_property_of_connack_may_stand_in_it():
    """The whole of MQTT 5.0 §3.2.2.3 at once."""
    properties = b"".join(
        [
            number(0x11, 1, size=4),
            number(0x21, 1, size=2),
            number(0x24, 1, size=1),
            number(0x25, 0, size=1),
            number(0x27, 1, size=4),
            text(0x12, "a"),
            number(0x22, 0, size=2),
            text(0x1F, "b"),
            number(0x28, 1, size=1),
            number(0x29, 1, size=1),
            number(0x2A, 1, size=1),
            number(0x13, 0, size=2),
            text(0x1A, "c"),
            text(0x1C, "d"),
            text(0x15, "e"),
            b"\x16" + binary(b"f"),
        ]
    )
    assert parse(connack(version=5, properties=properties), 5).server_keep_alive == 0


@pytest.mark.parametrize("code", [1, 5, 0x84])
def test_a_broker_without_mqtt_5_refuses_in_the_form_of_mqtt_3(code):
    """Two bytes are enough to say no."""
    assert parse(connack(version=4, code=code), 5) == Connack(session_present=False, code=code)


def test_a_padded_remaining_length_passes_before_mqtt_5():
    """Only 5.0 forbids it."""
    assert parse(connack(version=4, length_size=2), 4).accepted


# What is wrong; the version of the CONNECT; the packet; the reason code; the detail.
WRONG = [
    ("empty", 4, packet(0x20), 0x81, "CONNACK with Remaining Length 0 (MQTT 3.1.1 §3.2)"),
    ("one byte", 5, packet(0x20, b"\0"), 0x81, "CONNACK with Remaining Length 1 (MQTT 5.0 §3.2)"),
    ("three bytes", 3, connack(extra=b"\0"), 0x81, "CONNACK with Remaining Length 3 (MQTT 3.1 §3.2)"),
    ("properties before 5.0", 4, connack(version=5), 0x81, "CONNACK with Remaining Length 3 (MQTT 3.1.1 §3.2)"),
    ("reserved flags", 4, connack(flags=2), 0x81, "flags 0b00000010 (MQTT 3.1.1 §3.2.2.1)"),
    ("reserved flags in 5.0", 5, connack(version=5, flags=0x81), 0x81, "flags 0b10000001"),
    ("session with refusal", 4, connack(flags=1, code=5), 0x82, "Session Present and code 0x05"),
    ("session with refusal in 5.0", 5, connack(version=5, flags=1, code=0x87), 0x82, "Session Present and code 0x87"),
    ("success without properties", 5, connack(version=4), 0x81, "packet ends within the Property Length of CONNACK"),
    ("undefined code", 5, connack(version=5, code=0x10), 0x82, "code 0x10, neither success nor refusal"),
    ("trailing bytes", 5, connack(version=5, extra=b"\0"), 0x81, "1 bytes after its properties"),
    ("padded", 5, connack(version=5, length_size=2), 0x81, "in more bytes than it needs"),
    (
        "foreign property",
        5,
        connack(version=5, properties=number(0x18, 1, size=4)),
        0x81,
        "0x18 is not allowed in CONNACK",
    ),
    ("property twice", 5, connack(version=5, properties=text(0x1F, "x") * 2), 0x82, "Reason String more than once"),
    ("Maximum QoS 2", 5, connack(version=5, properties=number(0x24, 2, size=1)), 0x82, "Maximum QoS of CONNACK is 2"),
]


@pytest.mark.parametrize(("version", "data", "code", "detail"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_a_wrong_connack_is_the_fault_of_the_upstream(version, data, code, detail):
    """Each rule broken alone; the device is not blamed for it."""
    with pytest.raises(PacketError) as caught:
        parse(data, version)
    assert (caught.value.reason, caught.value.reason_code) == (EndReason.UPSTREAM_PROTOCOL_ERROR, code)
    assert detail in caught.value.detail


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(VERSIONS), st.sampled_from([b"", b"\0\0", b"\0\x80"]), st.binary(max_size=40))
def test_noise_raises_nothing_but_packet_errors(version, start, noise):
    """Whatever stands in a CONNACK, it is read or refused."""
    try:
        reason = None
        parse(packet(0x20, start + noise), version)
    except PacketError as fault:
        reason = fault.reason
    assert reason in {None, EndReason.UPSTREAM_PROTOCOL_ERROR}


@pytest.mark.parametrize(
    ("version", "reason_string", "written"),
    [
        (3, "why", "20020003"),
        (4, "", "20020003"),
        (5, "", "2003008800"),
        (5, "why", "2009008806" + "1f0003" + "776879"),
    ],
)
def test_a_refusal_is_written_in_the_devices_own_version(version, reason_string, written):
    """Return code before 5.0, reason code and perhaps a Reason String in it; it reads back as a refusal."""
    data = connack_refusal(ProtocolVersion(version), 3, 0x88, reason_string)
    assert data.hex() == written
    parsed = parse(data, version)
    assert parsed.code == (0x88 if version == 5 else 3)
    assert parsed.reason_string == (reason_string if version == 5 and reason_string else None)


@pytest.mark.parametrize(
    ("version", "present", "written"),
    [
        (3, False, "20020000"),
        (3, True, "20020000"),
        (4, False, "20020000"),
        (4, True, "20020100"),
        (5, False, "2003000000"),
        (5, True, "2003010000"),
    ],
)
def test_an_acceptance_is_written_in_the_devices_own_version(version, present, written):
    """Session Present where it exists, properties in 5.0 only."""
    data = connack_acceptance(ProtocolVersion(version), b"", session_present=present)
    assert data.hex() == written
    assert parse(data, version) == Connack(session_present=present and version > 3, code=0)
    properties = b"\3" + number(0x21, 5, size=2)
    data = connack_acceptance(ProtocolVersion(version), properties, session_present=present)
    assert data.endswith(properties) is (version == 5)
    if version == 5:
        (found,) = read_all(data)
        assert connack_properties(found) == properties


@pytest.mark.parametrize(
    ("code", "reason_string", "written"),
    [
        (0, "", "e000"),
        (0x8B, "", "e0018b"),
        (0x8B, "why", "e0088b06" + "1f0003" + "776879"),
        (0, "x", "e00600041f000178"),
    ],
)
def test_a_disconnect_is_written_in_the_fewest_bytes(code, reason_string, written):
    """What may be left out is left out; the framer takes it for a whole DISCONNECT."""
    data = disconnect(code, reason_string)
    assert data.hex() == written
    framer = Framer(Sender.BROKER, ProtocolVersion.MQTT_5_0, 256)
    assert framer.feed(data) == data
    assert (framer.disconnected, framer.disconnect_code) == (True, code)


def test_a_long_reason_takes_longer_lengths():
    """Remaining Length and Property Length take two bytes each above 127."""
    data = connack_refusal(ProtocolVersion.MQTT_5_0, 3, 0x88, "x" * 200)
    assert parse(data, 5).reason_string == "x" * 200


def test_a_reason_that_no_string_can_carry_is_refused():
    """It would otherwise be cut or wrap around."""
    with pytest.raises(ValueError, match="65536 bytes"):
        disconnect(0x80, "x" * 65_536)


@pytest.mark.parametrize(
    ("version", "code", "words"),
    [
        (3, 0, "connection accepted"),
        (4, 5, "not authorized"),
        (4, 0x87, "unknown code 0x87"),
        (5, 0, "success"),
        (5, 0x87, "not authorized"),
        (5, 0x04, "bad user name or password"),
        (5, 0x7F, "unknown code 0x7F"),
    ],
)
def test_connack_codes_have_words(version, code, words):
    """5.0 also knows the refusals of brokers that only speak 3.x."""
    assert describe_connack(ProtocolVersion(version), code) == words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "normal disconnection"),
        (4, "disconnect with Will Message"),
        (0x8E, "session taken over"),
        (1, "unknown code 0x01"),
    ],
)
def test_disconnect_codes_have_words(code, words):
    """Zero has a name of its own in DISCONNECT."""
    assert describe_disconnect(code) == words


# ---- towards the device

REFERENCE = text(0x1C, "elsewhere.example:1883")


@pytest.mark.parametrize("code", [0, 0x9C, 0x9D])
@pytest.mark.parametrize("rest", [b"", user_property() + text(0x1F, "why")])
def test_a_device_is_sent_to_no_other_server(code, rest):
    """It would take its password there, in plain text; everything else stays as the broker sent it."""
    for properties in (REFERENCE + rest, rest + REFERENCE):
        (found,) = read_all(connack(version=5, code=code, properties=properties))
        assert connack_for_device(found) == connack(version=5, code=code, properties=rest)
        if code:
            sent = mqtt_packets.disconnect(code=code, properties=properties)
            assert disconnect_for_device(sent) == mqtt_packets.disconnect(code=code, properties=rest)


@pytest.mark.parametrize("body", [b"\x9c\x05\x1c", b"\x9c\x05", b"\x9c\x02\x11\0", b"\x9c\0x", b"\x9c" + b"\xff" * 9])
def test_a_disconnect_that_cannot_be_read_keeps_its_code_alone(body):
    """A Server Reference could be anywhere in it."""
    assert disconnect_for_device(packet(0xE0, body)) == packet(0xE0, body[:1])


@pytest.mark.parametrize("body", [b"", b"\x9c", b"\x9c\0"])
def test_what_names_no_other_server_passes_as_it_is(body):
    """As nearly all do."""
    assert disconnect_for_device(packet(0xE0, body)) == packet(0xE0, body)
    (found,) = read_all(packet(0x20, b"\0\x9c"))
    assert connack_for_device(found) == found.raw


SIZE, OTHERS = number(0x27, 9000, size=4), user_property() + number(0x21, 5, size=2)


@pytest.mark.parametrize(
    ("change", "flags", "properties"),
    [
        ({}, 1, SIZE + OTHERS),
        ({"hide_session": True}, 0, SIZE + OTHERS),
        ({"maximum_packet_size": 300}, 1, number(0x27, 300, size=4) + OTHERS),
        ({"maximum_packet_size": 1}, 1, number(0x27, 1, size=4) + OTHERS),
        ({"assigned": "hall-3"}, 1, SIZE + OTHERS + text(0x12, "hall-3")),
    ],
)
def test_only_what_the_gateway_changed_differs_for_the_device(change, flags, properties):
    """Session Present, the packet size, the Client Identifier; each by itself."""
    (found,) = read_all(connack(version=5, flags=1, properties=SIZE + OTHERS))
    assert connack_for_device(found, **change) == connack(version=5, flags=flags, properties=properties)


@pytest.mark.parametrize("version", [4, 5])
def test_session_present_is_cleared_and_nothing_else(version):
    """Also where it was clear before."""
    properties = OTHERS if version == 5 else b""
    for flags in (0, 1):
        (found,) = read_all(connack(version=version, flags=flags, properties=properties))
        assert connack_without_session(found) == connack(version=version, properties=properties)
