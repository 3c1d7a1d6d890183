from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.mqtt.packets import (
    MAX_REMAINING_LENGTH,
    ProtocolVersion,
    decode_remaining_length,
    encode_remaining_length,
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
