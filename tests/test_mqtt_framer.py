from __future__ import annotations

import tracemalloc
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import EndReason
from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion
from tests.mqtt_packets import (
    acknowledgement,
    auth,
    connect,
    disconnect,
    fed,
    packet,
    pingreq,
    pingresp,
    publish,
    suback,
    subscribe,
    text,
    unsuback,
    unsubscribe,
    user_property,
    variable_byte_integer,
)

LIMIT = 100_000
WAYS = list(product(Sender, ProtocolVersion))

quick = settings(deadline=None, max_examples=200)


def make_framer(sender: Sender = Sender.DEVICE, version: int = 4, limit: int = LIMIT) -> Framer:
    return Framer(sender, ProtocolVersion(version), limit)


def outcome(framer: Framer, chunks: list[bytes]) -> dict:
    """Everything that a framer says about a stream, cut in this way."""
    passed = fed(framer, *chunks)
    fault = framer.error
    return {
        "passed": passed,
        "packets": framer.packets,
        "fault": fault and (fault.reason, fault.reason_code, fault.detail),
        "disconnected": framer.disconnected,
        "disconnect_code": framer.disconnect_code,
        "at_boundary": framer.at_boundary,
        "held": len(framer._held),
    }


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(each % (len(stream) + 1) for each in cuts), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


def valid_packets(sender: Sender, version: int) -> list[bytes]:
    """At least one of each packet that may be sent, DISCONNECT excepted."""
    both = [
        publish(version=version),
        publish(version=version, qos=1),
        publish(version=version, qos=2, duplicate=True, retain=True, payload=b""),
        publish(version=version, payload=bytes(114)),
        publish(version=version, payload=bytes(200)),
        publish(version=version, payload=bytes(20_000)),
        *(acknowledgement(first) for first in (0x40, 0x50, 0x62, 0x70)),
    ]
    if version == 5:
        both += [
            auth(),
            auth(code=None),
            acknowledgement(0x40, code=0x10),
            publish(topic="", version=5, properties=b"\x23\0\1"),
        ]
    else:
        both += [publish(version=version, length_size=4)]
    if sender is Sender.DEVICE:
        return [*both, subscribe(version=version), unsubscribe(version=version), pingreq()]
    return [*both, suback(version=version), unsuback(version=version), pingresp()]


# The rules once more, written apart from the framer's and as plainly as can be.
ANY = 268_435_455
ORACLE_LENGTHS = {
    # type: ((shortest, longest) before 5.0, the same in 5.0)
    3: ((3, ANY), (4, ANY)),
    4: ((2, 2), (2, ANY)),
    5: ((2, 2), (2, ANY)),
    6: ((2, 2), (2, ANY)),
    7: ((2, 2), (2, ANY)),
    8: ((6, ANY), (7, ANY)),
    9: ((3, ANY), (4, ANY)),
    10: ((5, ANY), (6, ANY)),
    11: ((2, 2), (4, ANY)),
    12: ((0, 0), (0, 0)),
    13: ((0, 0), (0, 0)),
    14: ((0, 0), (0, ANY)),
    15: (None, (0, ANY)),
}
ORACLE_TYPES = {
    (Sender.DEVICE, False): {3, 4, 5, 6, 7, 8, 10, 12, 14},
    (Sender.DEVICE, True): {3, 4, 5, 6, 7, 8, 10, 12, 14, 15},
    (Sender.BROKER, False): {3, 4, 5, 6, 7, 9, 11, 13},
    (Sender.BROKER, True): {3, 4, 5, 6, 7, 9, 11, 13, 14, 15},
}


def oracle(sender: Sender, version: int, first: int, length_field: bytes, limit: int, *, lenient: bool) -> int:
    """Judge one fixed header with a readable Remaining Length: 0 or the reason code of its fault."""
    number, bits = first // 16, f"{first % 16:04b}"
    if number == 0 or (number == 15 and version != 5):
        return 0x81
    if number not in ORACLE_TYPES[sender, version == 5]:
        return 0x82
    qos = bits[1:3]
    if number == 3:
        if qos == "11" or (bits[0] == "1" and qos == "00" and version > 3 and not lenient):
            return 0x81
    elif version > 3 and not lenient and bits != ("0010" if number in (6, 8, 10) else "0000"):
        return 0x81
    length = sum((byte & 127) * 128**index for index, byte in enumerate(length_field))
    if version == 5 and not lenient and length_field != variable_byte_integer(length):
        return 0x81
    shortest, longest = ORACLE_LENGTHS[number][version == 5]
    if number == 3 and qos != "00":
        shortest += 2
    if not shortest <= length <= (ANY if lenient else longest):
        return 0x81
    return 0x95 if 1 + len(length_field) + length > limit else 0


LENGTH_FIELDS = [
    *(
        variable_byte_integer(length)
        for length in (*range(10), 126, 127, 128, 253, 254, 16_383, 16_384, 99_996, 99_997)
    ),
    variable_byte_integer(ANY),
    *(variable_byte_integer(length, size=size) for length in (0, 2, 7, 127, 300) for size in (2, 3, 4)),
]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(("sender", "version"), WAYS)
def test_every_first_byte_and_length_is_judged_as_the_plain_rules_say(sender, version, lenient):
    """The tables of the fast path and the closer look agree with rules that are written down a second time."""
    for first, field, limit in product(range(256), LENGTH_FIELDS, (256, LIMIT)):
        framer = Framer(sender, ProtocolVersion(version), limit, lenient=lenient)
        framer.feed(bytes([first]) + field)
        expected = oracle(sender, version, first, field, limit, lenient=lenient)
        code = framer.error.reason_code if framer.error else 0
        assert code == expected, (hex(first), field.hex(), limit, framer.error)
        assert framer.packets == (not expected)


@quick
@given(st.data(), st.sampled_from(WAYS), st.binary(max_size=40), st.lists(st.integers(0, 2**16), max_size=12))
def test_the_outcome_does_not_depend_on_how_the_stream_is_cut(data, way, noise, cuts):
    """Valid packets, perhaps a DISCONNECT, then anything: whole, byte by byte and cut anywhere give the same."""
    packets = data.draw(st.lists(st.sampled_from(valid_packets(*way)), max_size=4))
    if data.draw(st.booleans()):
        packets.append(
            data.draw(st.sampled_from([disconnect(), disconnect(code=4), disconnect(code=0, properties=b"")]))
        )
    stream = b"".join(packets) + noise
    whole = outcome(make_framer(*way), [stream])
    assert outcome(make_framer(*way), cut(stream, cuts)) == whole
    if len(stream) < 2_000:
        assert outcome(make_framer(*way), [stream[at : at + 1] for at in range(len(stream))]) == whole


HEADERISH = st.lists(
    st.sampled_from([0, 1, 2, 0x10, 0x30, 0x3A, 0x62, 0x7F, 0x80, 0x81, 0xC0, 0xE0, 0xF0, 0xFF]), max_size=60
).map(bytes)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(WAYS), HEADERISH | st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_noise_raises_nothing_and_is_judged_the_same_however_it_is_cut(way, noise, cuts):
    """Bytes that look like fixed headers reach every branch; the passed bytes are always a prefix of the stream."""
    whole = outcome(make_framer(*way), [noise])
    assert outcome(make_framer(*way), cut(noise, cuts)) == whole
    assert outcome(make_framer(*way), [bytes([byte]) for byte in noise]) == whole
    assert noise.startswith(whole["passed"])
    assert whole["held"] <= 4


@pytest.mark.parametrize(("sender", "version"), WAYS)
def test_valid_packets_pass_uncopied_and_are_counted(sender, version):
    """A chunk of whole packets is given back as the very same object."""
    packets = valid_packets(sender, version)
    framer = make_framer(sender, version)
    chunk = b"".join(packets)
    assert framer.feed(chunk) is chunk
    assert framer.packets == len(packets)
    assert framer.error is None
    assert framer.at_boundary


@pytest.mark.parametrize(("sender", "version"), WAYS)
def test_every_strict_prefix_of_a_packet_needs_more(sender, version):
    """A prefix is no error and no whole packet; the rest completes it."""
    for each in valid_packets(sender, version):
        for end in [*range(1, min(len(each), 200)), len(each) - 1]:
            framer = make_framer(sender, version)
            passed = framer.feed(each[:end])
            assert framer.error is None
            assert not framer.at_boundary
            assert passed + framer.feed(each[end:]) == each
            assert framer.at_boundary
            assert framer.packets == 1


def test_a_chunk_within_a_body_passes_uncopied():
    """Body bytes are passed on as they arrive, before the packet is whole."""
    framer = make_framer()
    start, middle = publish(payload=bytes(50_000))[:100], bytes(20_000)
    assert framer.feed(start) is start
    assert framer.feed(middle) is middle
    assert framer.packets == 1
    assert not framer.at_boundary


def test_an_unfinished_header_is_held_back_and_prepended():
    """Bytes that may turn out to be a fault do not pass before it is known that they are none."""
    framer = make_framer()
    large = publish(payload=bytes(20_000))
    assert framer.feed(pingreq() + large[:3]) == pingreq()
    assert not framer.at_boundary
    assert framer.packets == 1
    assert framer.feed(b"") == b""
    assert framer.feed(large[3:]) == large
    assert framer.packets == 2


@pytest.mark.parametrize("start", [b"\xff", b"\xff\xff\xff\xff", b"\x30\xff\xff\xff\xff", b"\x36", b"\x00", b"\x10"])
def test_what_is_certain_is_judged_without_waiting_for_more(start):
    """No byte that could follow makes these a packet, so the framer does not wait for it."""
    framer = make_framer()
    assert framer.feed(pingreq() + start) == pingreq()
    assert framer.error is not None
    assert framer.at_boundary


@pytest.mark.parametrize("version", ProtocolVersion)
@pytest.mark.parametrize("topic", ["#", "+", "a/#", "a/+/b", "", "\0"])
def test_a_bad_topic_does_not_pass_even_in_the_first_publish(topic, version):
    """`CheckingFramer` remembers the last good topic; before the first, it must not take any topic for a good one."""
    packet = publish(topic, version=int(version))
    for data in (packet, packet + packet):
        framer = CheckingFramer(Sender.DEVICE, version, 1_000_000)
        assert framer.feed(data) == b""
        assert framer.error is not None


def test_nothing_passes_after_a_fault():
    """The packets before the fault pass; what follows does not, and the first fault stays."""
    framer = make_framer()
    assert framer.feed(publish() + b"\x36\x05" + publish()) == publish()
    fault = framer.error
    assert framer.feed(publish()) == b""
    assert framer.feed(b"\x00") == b""
    assert framer.error is fault
    assert framer.packets == 1


FAULTS = [
    ("device", 4, connect(), 0x82, "a second CONNECT (MQTT 3.1.1 §3.1)"),
    ("device", 5, suback(version=5), 0x82, "SUBACK from the device after CONNACK (MQTT 5.0 §2.1.2)"),
    ("broker", 4, disconnect(), 0x82, "DISCONNECT from the broker after CONNACK (MQTT 3.1.1 §2.2.1)"),
    ("broker", 3, pingreq(), 0x82, "PINGREQ from the broker after CONNACK (MQTT 3.1 §2.1)"),
    ("device", 4, b"\x00", 0x81, "reserved control packet type 0 (MQTT 3.1.1 §2.2.1)"),
    ("device", 4, auth(), 0x81, "reserved control packet type 15 (MQTT 3.1.1 §2.2.1)"),
    ("device", 4, packet(0x36, bytes(5)), 0x81, "PUBLISH with QoS 3 (MQTT 3.1.1 §3.3.1.2)"),
    ("device", 5, packet(0x38, bytes(5)), 0x81, "PUBLISH with DUP and QoS 0 (MQTT 5.0 §3.3.1.1)"),
    ("device", 4, packet(0x80, bytes(9)), 0x81, "SUBSCRIBE with flags 0b0000 instead of 0b0010 (MQTT 3.1.1 §2.2.2)"),
    ("device", 4, packet(0xC0, b"a"), 0x81, "PINGREQ with Remaining Length 1 instead of 0 (MQTT 3.1.1 §3.12)"),
    (
        "device",
        4,
        packet(0x30, b"\0\0"),
        0x81,
        "PUBLISH with Remaining Length 2 where at least 3 is needed (MQTT 3.1.1 §3.3)",
    ),
    (
        "device",
        4,
        b"\x30\xff\xff\xff\xff",
        0x81,
        "PUBLISH with a Remaining Length of more than four bytes (MQTT 3.1.1 §2.2.3)",
    ),
    ("device", 5, packet(0xC0, length_size=2), 0x81, "PINGREQ with Remaining Length 0 in 2 bytes (MQTT 5.0 §1.5.5)"),
    (
        "device",
        4,
        b"\x30\xff\xff\xff\x7f",
        0x95,
        "PUBLISH of 268435460 bytes from the device, above the limit of 100000",
    ),
    (
        "broker",
        5,
        b"\x30\xff\xff\xff\x7f",
        0x95,
        "PUBLISH of 268435460 bytes from the broker, above the limit of 100000",
    ),
]


@pytest.mark.parametrize(("sender", "version", "data", "code", "detail"), FAULTS)
def test_a_fault_names_the_packet_and_the_rule(sender, version, data, code, detail):
    """The detail is what an operator sends to the device's maker."""
    framer = make_framer(Sender(sender), version)
    assert framer.feed(data) == b""
    assert (framer.error.reason_code, framer.error.detail) == (code, detail)


@pytest.mark.parametrize(
    ("sender", "data", "reason"),
    [
        (Sender.DEVICE, b"\x36", EndReason.MALFORMED_PACKET),
        (Sender.DEVICE, b"\x10", EndReason.PROTOCOL_ERROR),
        (Sender.DEVICE, b"\x30\xff\xff\xff\x7f", EndReason.PACKET_TOO_LARGE),
        (Sender.BROKER, b"\x36", EndReason.UPSTREAM_PROTOCOL_ERROR),
        (Sender.BROKER, b"\x10", EndReason.UPSTREAM_PROTOCOL_ERROR),
        (Sender.BROKER, b"\x30\xff\xff\xff\x7f", EndReason.PACKET_TOO_LARGE),
    ],
)
def test_the_reason_says_whose_fault_it_is(sender, data, reason):
    """A device is not blamed for what the broker sent."""
    framer = make_framer(sender)
    framer.feed(data)
    assert framer.error.reason is reason


def test_mqtt_3_1_lets_retries_and_padding_of_old_firmware_pass():
    """DUP on PUBREL, SUBSCRIBE and UNSUBSCRIBE, DUP with QoS 0, and a padded Remaining Length are no faults in 3.1."""
    framer = make_framer(version=3)
    chunk = b"\x6a\x02\0\1" + b"\x8a" + subscribe()[1:] + b"\xaa" + unsubscribe()[1:] + b"\x38" + publish()[1:]
    chunk += packet(0xC0, length_size=4)
    assert framer.feed(chunk) is chunk
    assert framer.packets == 5


def test_a_brokers_disconnect_passes_whole_and_without_its_server_reference():
    """However it is cut; a device's passes as it comes."""
    kept = user_property()
    sent, got = (
        publish(version=5) + disconnect(code=0x9D, properties=kept + extra) for extra in (text(0x1C, "elsewhere"), b"")
    )
    for size in range(1, len(sent)):
        framer = make_framer(Sender.BROKER, 5)
        assert b"".join(framer.feed(sent[at : at + size]) for at in range(0, len(sent), size)) == got
        assert (framer.disconnected, framer.disconnect_code) == (True, 0x9D)
    framer = make_framer(Sender.BROKER, 5)
    assert framer.feed(sent[:-1]) == publish(version=5)


def test_a_brokers_disconnect_that_is_too_long_loses_its_properties():
    """What is kept of it until its end is bounded."""
    framer = make_framer(Sender.BROKER, 5, 10_000_000)
    sent = disconnect(code=0x9D, properties=user_property("k", "v" * 60_000) * 2)
    passed = b"".join(framer.feed(sent[at : at + 1000]) for at in range(0, len(sent), 1000))
    assert passed == disconnect(code=0x9D)


@pytest.mark.parametrize("code", [None, 0, 4])
@pytest.mark.parametrize("sender", Sender)
def test_nothing_passes_after_a_whole_disconnect(sender, code):
    """A peer that goes on after DISCONNECT is not heard, not even its faults."""
    framer = make_framer(sender, 5)
    last = disconnect(code=code)
    assert framer.feed(publish(version=5) + last + b"\x00" + publish()) == publish(version=5) + last
    assert framer.disconnected
    assert framer.disconnect_code == (code or 0)
    assert framer.feed(publish()) == b""
    assert framer.error is None
    assert framer.packets == 2
    assert framer.at_boundary


def test_a_disconnect_counts_only_when_it_is_whole():
    """A connection that is lost within DISCONNECT was lost, and the broker publishes the Will."""
    framer = make_framer(version=5)
    last = disconnect(code=0x98, properties=b"\x1f\0\3why")
    assert framer.feed(last[:2]) == last[:2]
    assert (framer.disconnected, framer.disconnect_code) == (False, None)
    assert framer.feed(last[2:3]) == last[2:3]
    assert (framer.disconnected, framer.disconnect_code) == (False, 0x98)
    assert framer.feed(last[3:-1]) == last[3:-1]
    assert not framer.disconnected
    assert framer.feed(last[-1:] + pingreq()) == last[-1:]
    assert framer.disconnected
    assert framer.disconnect_code == 0x98


def test_a_disconnect_after_a_packet_in_two_chunks_keeps_its_own_code():
    """The code is the first byte of DISCONNECT's body, not of whatever chunk it came in."""
    framer = make_framer(version=5)
    before = publish(version=5, payload=bytes(50))
    framer.feed(before[:20])
    framer.feed(before[20:] + disconnect(code=4)[:2])
    assert framer.disconnect_code is None
    framer.feed(disconnect(code=4)[2:])
    assert (framer.disconnected, framer.disconnect_code) == (True, 4)


@pytest.mark.parametrize("version", [3, 4])
def test_a_disconnect_before_mqtt_5_has_no_code(version):
    """Only MQTT 5.0 gives a reason."""
    framer = make_framer(version=version)
    assert framer.feed(disconnect()) == disconnect()
    assert framer.disconnected
    assert framer.disconnect_code is None


@pytest.mark.parametrize("payload_size", [300, 20_000])
def test_the_limit_counts_the_whole_packet(payload_size):
    """A packet of exactly the limit passes, one byte more does not, whichever way its length is read."""
    exact = publish(payload=bytes(payload_size))
    framer = make_framer(limit=len(exact))
    assert framer.feed(exact) is exact
    assert framer.feed(publish(payload=bytes(payload_size + 1))) == b""
    assert framer.error.reason is EndReason.PACKET_TOO_LARGE


def test_a_limit_too_small_for_the_fast_path_is_refused():
    """The one-byte lengths are not compared with the limit, so it has to admit them all."""
    with pytest.raises(ValueError, match="at least 256"):
        make_framer(limit=255)


def test_a_huge_packet_passes_in_constant_memory():
    """A PUBLISH of 100 MB in chunks of 64 KiB leaves nothing behind while it passes."""
    framer = make_framer(limit=200_000_000)
    chunk, chunks = bytes(65_536), 1_600
    start = b"\x30" + variable_byte_integer(65_536 * chunks)
    assert framer.feed(start) is start
    tracemalloc.start()
    try:
        for _ in range(chunks - 1):
            assert framer.feed(chunk) is chunk
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(chunk)
    assert not framer.at_boundary
    framer.feed(chunk)
    assert framer.at_boundary


def test_no_bytes_change_nothing_in_the_middle_of_a_disconnect():
    """Not even before the reason code has come."""
    framer = Framer(Sender.DEVICE, ProtocolVersion.MQTT_5_0, 1000)
    whole = disconnect(code=4, properties=b"")
    assert framer.feed(whole[:2]) == whole[:2]
    assert framer.feed(b"") == b""
    assert not framer.disconnected
    assert framer.feed(whole[2:]) == whole[2:]
    assert (framer.disconnected, framer.disconnect_code) == (True, 4)
