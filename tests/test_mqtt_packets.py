from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import connack_string
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode as PahoReasonCode

from gateway.errors import PacketError
from gateway.mqtt.packets import (
    CONNACK_WORDS_3,
    LARGEST_PACKET,
    MAX_REMAINING_LENGTH,
    REASON_WORDS_5,
    PacketType,
    ProtocolVersion,
    ReasonCode,
    decode_remaining_length,
    decode_string,
    decode_texts,
    encode_remaining_length,
    encode_string,
    is_minimal,
)
from tests.mqtt_packets import variable_byte_integer

# The borders in MQTT 5.0 §1.5.5, table 1-1.
BORDERS = [
    (0, "00"),
    (127, "7f"),
    (128, "8001"),
    (16_383, "ff7f"),
    (16_384, "808001"),
    (2_097_151, "ffff7f"),
    (2_097_152, "80808001"),
    (268_435_455, "ffffff7f"),
]


@pytest.mark.parametrize(("length", "written"), BORDERS)
def test_the_borders_of_the_remaining_length(length, written):
    """The table of the standard, both ways."""
    assert encode_remaining_length(length).hex() == written
    assert decode_remaining_length(bytes.fromhex(written), 0) == (length, len(written) // 2)


@settings(deadline=None)
@given(st.integers(0, MAX_REMAINING_LENGTH), st.binary(max_size=3), st.binary(max_size=3))
def test_what_is_written_is_read_back_wherever_it_stands(length, before, after):
    """The offset counts, and what follows does not."""
    written = encode_remaining_length(length)
    assert written == variable_byte_integer(length)
    assert decode_remaining_length(before + written + after, len(before)) == (length, len(written))
    assert is_minimal(length, len(written))
    for end in range(len(written)):
        assert decode_remaining_length(before + written[:end], len(before)) is None


@pytest.mark.parametrize(("length", "size"), [(0, 2), (127, 2), (127, 4), (128, 3), (16_383, 3), (2_097_151, 4)])
def test_padding_is_noticed(length, size):
    """A length that takes more bytes than it needs reads as itself, but not as minimal."""
    assert decode_remaining_length(variable_byte_integer(length, size=size), 0) == (length, size)
    assert not is_minimal(length, size)


def test_a_fifth_byte_is_refused_as_soon_as_the_fourth_announces_it():
    """Nothing that follows could make it right, so it is not waited for."""
    assert decode_remaining_length(b"\xff\xff\xff", 0) is None
    with pytest.raises(ValueError, match="at most four bytes"):
        decode_remaining_length(b"\xff\xff\xff\xff", 0)


@pytest.mark.parametrize("length", [-1, MAX_REMAINING_LENGTH + 1])
def test_a_length_that_four_bytes_cannot_say_is_not_written(length):
    """The writer refuses what no reader could take."""
    with pytest.raises(ValueError, match="is not between"):
        encode_remaining_length(length)


def test_versions_are_called_as_their_specifications_are():
    """The label is what people read in records."""
    assert [version.label for version in ProtocolVersion] == ["3.1", "3.1.1", "5.0"]


def plain(words):
    """Spell words as any implementation would."""
    return words.lower().replace("_", " ").replace("subscriptions", "subscription").replace("ised", "ized")


def test_reason_codes_are_those_of_another_implementation():
    """The numbers, names and words of all that CONNACK and DISCONNECT carry in 5.0, as paho has them."""
    names = PahoReasonCode(PacketTypes.CONNACK, "Success").names
    theirs = {code: {plain(name) for name in packets} for code, packets in names.items()}
    carried = {
        code
        for code, packets in names.items()
        if any({PacketTypes.CONNACK, PacketTypes.DISCONNECT} & set(found) for found in packets.values())
    }
    assert set(REASON_WORDS_5) == carried
    for code, words in REASON_WORDS_5.items():
        assert plain(words) in theirs[code]
    for code in ReasonCode:
        assert plain(code.name) in theirs[code]


def test_return_codes_before_5_0_are_those_of_another_implementation():
    """The words for CONNACK of 3.1 and 3.1.1, as paho has them; what it calls a broker is a server in the standard."""
    assert set(CONNACK_WORDS_3) == set(range(6))
    for code, words in CONNACK_WORDS_3.items():
        assert plain(connack_string(code)).removeprefix("connection refused: ").rstrip(".").replace(
            "broker", "server"
        ) == plain(words)


def test_packet_types_are_those_of_another_implementation():
    """As paho has them."""
    for packet_type in PacketType:
        assert getattr(PacketTypes, packet_type.name) == packet_type


def test_the_largest_packet_has_the_longest_header():
    """One byte, four of Remaining Length, and what these can say."""
    assert LARGEST_PACKET == 5 + 268_435_455


@pytest.mark.parametrize("text", ["", "a", "\u00e9\U0001f321", "x" * 65_535])
def test_a_string_is_read_back_wherever_it_stands(text):
    """And what is behind it is left for others."""
    assert decode_string(b"?" + encode_string(text) + b"!", 1, "name") == (text, 3 + len(text.encode()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends within the name"),
        (b"\0", "ends within the name"),
        (b"\0\2a", "ends within the name"),
        (b"\0\1\xff", "the name is not UTF-8"),
        (b"\0\3\xed\xa0\x80", "the name is not UTF-8"),
        (b"\0\3a\0b", "the name contains the character U+0000"),
    ],
)
def test_what_no_string_may_be_is_refused(data, words):
    """MQTT 5.0 §1.5.4; the text itself is not shown."""
    with pytest.raises(PacketError, match=f".*{words[:20]}") as caught:
        decode_string(data, 0, "name")
    assert words in caught.value.detail


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a", "", "\u00e9\U0001f321"]])
def test_many_strings_are_decoded_as_one_by_one(texts):
    assert decode_texts([text.encode() for text in texts], "name") == texts


@pytest.mark.parametrize("wrong", [b"\xff", b"\0", b"a\0", b"\xc3"])
def test_a_fault_in_one_of_many_strings_is_found(wrong):
    """Also where one string would go on in the next, or where NUL makes up for one that is missing."""
    for texts in ([wrong], [b"a", wrong], [wrong, b"\xbc"], [wrong, b""]):
        with pytest.raises(PacketError):
            decode_texts(texts, "name")


def test_a_string_that_is_too_long_is_not_written():
    """Two bytes cannot say its length."""
    with pytest.raises(ValueError, match="65536 bytes"):
        encode_string("x" * 65_536)
