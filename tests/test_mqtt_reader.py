from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason, PacketError
from gateway.mqtt.packets import PacketType
from gateway.mqtt.reader import Packet, PacketReader
from tests.mqtt_packets import auth, connack, connect, packet, pingreq, publish

LIMIT = 1_000


def connect_reader(limit: int = LIMIT) -> PacketReader:
    return PacketReader(frozenset({PacketType.CONNECT}), limit, EndReason.NOT_MQTT)


def connack_reader(limit: int = LIMIT) -> PacketReader:
    return PacketReader(frozenset({PacketType.CONNACK, PacketType.AUTH}), limit, EndReason.UPSTREAM_PROTOCOL_ERROR)


def auth_reader() -> PacketReader:
    return PacketReader(frozenset({PacketType.AUTH}), LIMIT, EndReason.PROTOCOL_ERROR)


def read(reader: PacketReader, data: bytes) -> Packet | None:
    reader.feed(data)
    return reader.next_packet()


def test_a_whole_packet_is_given_with_its_parts():
    """Flags, body and the whole are what was on the wire."""
    raw = connect()
    assert read(connect_reader(), raw) == Packet(PacketType.CONNECT, 0, raw[2:], raw, minimal_length=True)


def test_every_strict_prefix_needs_more_and_the_rest_completes_it():
    """However a CONNECT is cut in two, it is the same packet in the end."""
    raw = connect(username="u", password=b"p" * 200)
    for end in range(len(raw)):
        reader = connect_reader()
        assert read(reader, raw[:end]) is None
        assert read(reader, raw[end:]).raw == raw


def test_a_packet_that_trickles_in_is_read_like_any_other():
    """Byte by byte, nothing is given before the last."""
    raw, reader = connect(), connect_reader()
    given_out = [read(reader, bytes([byte])) for byte in raw]
    assert given_out[:-1] == [None] * (len(raw) - 1)
    assert given_out[-1].raw == raw


def test_the_rest_is_what_came_after_the_packet():
    """Bytes that a device pipelines behind CONNECT are kept for the framer, once."""
    reader = connect_reader()
    rest = publish() + pingreq()[:1]
    assert read(reader, connect() + rest).raw == connect()
    assert reader.buffered == len(rest)
    assert reader.take_rest() == rest
    assert (reader.buffered, reader.take_rest()) == (0, b"")


def test_packets_of_all_permitted_types_follow_one_another():
    """A broker's AUTH packets precede its CONNACK."""
    reader = connack_reader()
    reader.feed(auth() + auth(code=None) + connack(version=5))
    packets = [reader.next_packet() for _ in range(4)]
    assert [each and each.type for each in packets] == [PacketType.AUTH, PacketType.AUTH, PacketType.CONNACK, None]


def test_a_padded_remaining_length_is_noted():
    """Only MQTT 5.0 forbids it, and the version stands in the body."""
    assert not read(connect_reader(), connect(length_size=2)).minimal_length
    assert read(connect_reader(), connect(client_identifier="x" * 200)).minimal_length


@pytest.mark.parametrize(
    ("opening", "code", "detail"),
    [
        (b"GET / HTTP/1.1\r\n", 0x82, "an HTTP request"),
        (b"POST /x HTTP/1.1\r\n", 0x82, "an HTTP request"),
        (b"HEAD / HTTP/1.0\r\n", 0x82, "an HTTP request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0x82, "an HTTP/2 request"),
        (b"PROXY TCP4 ", 0x82, "a PROXY protocol header"),
        (b"\x16\x03\x01\x02\0\x01", 0x81, "a TLS ClientHello"),
        (b"\x16", 0x81, "first byte 0x16, of CONNECT with flags 0b0110 instead of 0b0000, where CONNECT was expected"),
        (b"\x00", 0x81, "first byte 0x00, of the reserved type 0, where CONNECT was expected"),
        (b"\xff\xff\xff\xff", 0x82, "first byte 0xFF, of AUTH, where CONNECT was expected"),
        (publish(), 0x82, "first byte 0x30, of PUBLISH, where CONNECT was expected"),
    ],
)
def test_strangers_are_recognised_by_their_first_bytes(opening, code, detail):
    """What is no CONNECT is named, so that an operator knows what knocks at the wrong port."""
    with pytest.raises(PacketError) as caught:
        read(connect_reader(), opening)
    assert (caught.value.reason, caught.value.reason_code) == (EndReason.NOT_MQTT, code)
    assert caught.value.detail.startswith(detail)


@pytest.mark.parametrize("first", [byte for byte in range(256) if byte != 0x10])
def test_no_first_byte_but_that_of_connect_is_waited_on(first):
    """One byte is enough to refuse whatever is not CONNECT."""
    with pytest.raises(PacketError) as caught:
        read(connect_reader(), bytes([first]))
    assert caught.value.reason is EndReason.NOT_MQTT


@pytest.mark.parametrize(
    ("reader", "data", "reason", "code"),
    [
        (connect_reader, b"\x10\xff\xff\xff\xff", EndReason.MALFORMED_PACKET, 0x81),
        (connack_reader, b"\x20\x80\x80\x80\x80", EndReason.UPSTREAM_PROTOCOL_ERROR, 0x81),
        (connack_reader, b"HTTP/1.1 400 Bad Request", EndReason.UPSTREAM_PROTOCOL_ERROR, 0x82),
        (connack_reader, b"\x21", EndReason.UPSTREAM_PROTOCOL_ERROR, 0x81),
        (connack_reader, publish(), EndReason.UPSTREAM_PROTOCOL_ERROR, 0x82),
        (auth_reader, publish(), EndReason.PROTOCOL_ERROR, 0x82),
        (auth_reader, b"\xf1", EndReason.MALFORMED_PACKET, 0x81),
        (auth_reader, b"\xf0\xff\xff\xff\xff", EndReason.MALFORMED_PACKET, 0x81),
    ],
)
def test_a_fault_has_the_reason_of_the_side_that_is_read(reader, data, reason, code):
    """The broker's faults are the upstream's, the device's are its own."""
    with pytest.raises(PacketError) as caught:
        read(reader(), data)
    assert (caught.value.reason, caught.value.reason_code) == (reason, code)


def test_which_flags_a_reader_that_ignores_them_accepts():
    """All but those of QoS 3, which stand at the beginning of a TLS ClientHello."""
    accepted = []
    for flags in range(16):
        reader = PacketReader(frozenset({PacketType.CONNECT}), LIMIT, EndReason.NOT_MQTT, any_flags=True)
        try:
            found = read(reader, bytes([0x10 | flags]) + connect()[1:])
        except PacketError:
            continue
        assert found is not None
        assert (found.type, found.flags) == (PacketType.CONNECT, flags)
        accepted.append(flags)
    assert accepted == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


def test_a_declared_size_above_the_limit_is_refused_before_the_body():
    """A claim of 256 MB costs five bytes, and a packet of exactly the limit is read."""
    raw = connect(client_identifier="x" * 300)
    assert read(connect_reader(len(raw)), raw).raw == raw
    for limit, data in ((len(raw) - 1, raw[:3]), (LIMIT, b"\x10\xff\xff\xff\x7f")):
        with pytest.raises(PacketError, match="above the limit") as caught:
            read(connect_reader(limit), data)
        assert (caught.value.reason, caught.value.reason_code) == (EndReason.PACKET_TOO_LARGE, 0x95)


def test_a_fault_stays_a_fault():
    """Whoever asks again is told again."""
    reader = connect_reader()
    reader.feed(b"\x00")
    for _ in range(2):
        with pytest.raises(PacketError):
            reader.next_packet()


def test_repr_does_not_show_the_bytes():
    """The bytes of a CONNECT hold the password."""
    assert repr(read(connect_reader(), connect(username="u", password=b"hunter2"))) == "Packet(CONNECT, 34 bytes)"


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([b"", b"\x10", b"\x20", b"\x20\x02"]),
    st.binary(max_size=50),
    st.sampled_from([connect_reader, connack_reader]),
)
def test_noise_raises_nothing_but_packet_errors(start, noise, reader):
    """Whatever comes, it is a packet, a wait for more, or a PacketError; a packet and its rest are the input."""
    reader = reader()
    try:
        found = read(reader, start + noise)
    except PacketError:
        return
    assert (found.raw if found else b"") + reader.take_rest() == start + noise


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 100), max_size=6))
def test_any_cutting_gives_the_same_packet_and_rest(cuts):
    """The reader does not mind where the stream is cut."""
    stream = connect(username="u", password=b"p" * 50) + publish()
    edges = [0, *sorted(min(each, len(stream)) for each in cuts), len(stream)]
    reader, found = connect_reader(), None
    for start, end in itertools.pairwise(edges):
        reader.feed(stream[start:end])
        found = found or reader.next_packet()
    assert found.raw + reader.take_rest() == stream
    assert found.raw == packet(0x10, found.body)
