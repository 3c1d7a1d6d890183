"""The PROXY protocol header, read from bytes: what is in it, when more is needed, what is refused."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.net.proxy_header import (
    LARGEST_V1,
    LARGEST_V2,
    MalformedProxyHeader,
    ProxyHeader,
    crc32c,
    parse_proxy_header,
)
from tests.proxy_headers import SIGNATURE, local, tlv, v1, v2, v2_raw

DEVICE = (IPv4Address("192.168.7.9"), 51234)
LONGEST_UNKNOWN = b"PROXY UNKNOWN " + b"ffff:" * 15 + b"ffff 65535 65535\r\n"
TCP4_BODY = bytes([192, 168, 7, 9, 192, 168, 7, 1, 0xC8, 0x22, 0x07, 0x5B])


def checked(body: bytes, protocol: int = 0x11, command: int = 0x21) -> bytes:
    """Return a header that ends with its checksum (§2.2.3)."""
    blank = v2_raw(command, protocol, body + tlv(3, bytes(4)))
    return blank[:-4] + crc32c(blank).to_bytes(4, "big")


_BLANK = v2_raw(0x21, 0x11, TCP4_BODY + tlv(3, bytes(4)) * 2)
# The first is right, and covers the second.
TWO_CHECKSUMS = _BLANK[:31] + crc32c(_BLANK).to_bytes(4, "big") + _BLANK[35:]

WHOLE = {
    "v1 TCP4": (v1(), DEVICE),
    "v1 TCP4, the longest": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        (IPv4Address("255.255.255.255"), 65535),
    ),
    "v1 TCP4, port 0": (b"PROXY TCP4 10.0.0.1 10.0.0.2 0 0\r\n", (IPv4Address("10.0.0.1"), 0)),
    "v1 TCP6": (v1("fd12::9", to="fd12::1"), (IPv6Address("fd12::9"), 51234)),
    "v1 TCP6, capitals, nothing left out": (
        b"PROXY TCP6 FD12:0000:0000:0000:0000:0000:0000:0009 FD12:0:0:0:0:0:0:1 1 2\r\n",
        (IPv6Address("fd12::9"), 1),
    ),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "v1 UNKNOWN, with anything behind it": (b"PROXY UNKNOWN \xff\x00 1 2 3 4 5 6 7\r\n", None),
    "v1 UNKNOWN, the longest": (LONGEST_UNKNOWN, None),
    "v2 TCP4": (v2(), DEVICE),
    "v2 TCP6": (v2("fd12::9", to="fd12::1"), (IPv6Address("fd12::9"), 51234)),
    "v2 with TLVs": (v2(tlvs=tlv(1, b"mqtt") + tlv(4, b"") + tlv(0xEA, bytes(500))), DEVICE),
    "v2 with a checksum": (checked(TCP4_BODY + tlv(5, b"id")), DEVICE),
    "v2, the largest": (v2(tlvs=tlv(4, bytes(LARGEST_V2 - 16 - 12 - 3))), DEVICE),
    "v2 LOCAL": (local(), None),
    "v2 LOCAL, with bytes to skip": (local(bytes(range(256))), None),
    "v2 LOCAL, whatever its family": (v2_raw(0x20, 0xFF, b"\x01"), None),
    "v2 UNSPEC": (v2_raw(0x21, 0x00, b""), None),
    "v2 UNSPEC, with bytes to skip": (v2_raw(0x21, 0x00, b"\x01\xff\xff"), None),
    "v2 UNIX": (v2_raw(0x21, 0x31, b"/run/a".ljust(108, b"\0") + bytes(108)), None),
    "v2 UDP": (v2_raw(0x21, 0x12, TCP4_BODY), None),
}


@pytest.mark.parametrize(("header", "source"), WHOLE.values(), ids=WHOLE)
def test_a_header_names_the_device_or_nobody(header: bytes, source: object) -> None:
    """Its length is that of the header, whatever follows."""
    assert parse_proxy_header(header) == ProxyHeader(source, len(header))
    assert parse_proxy_header(header + b"\x10\x0c\r\n") == ProxyHeader(source, len(header))


@pytest.mark.parametrize("header", [header for header, _ in WHOLE.values()], ids=WHOLE)
def test_every_strict_prefix_needs_more(header: bytes) -> None:
    """Wherever the network cuts it."""
    assert [parse_proxy_header(header[:end]) for end in range(len(header))] == [None] * len(header)


LINE = "its line"
REFUSED = {
    # Something else.
    "MQTT": (b"\x10\x0c\x00\x04MQTT", "does not begin with one"),
    "HTTP": (b"GET / HTTP/1.1\r\n", "does not begin with one"),
    "POST": (b"POST", "does not begin with one"),
    "TLS": (b"\x16\x03\x01", "does not begin with one"),
    "a NUL": (b"\0", "does not begin with one"),
    "a line feed": (b"\n", "does not begin with one"),
    "lower case": (b"proxy TCP4", "does not begin with one"),
    "no space": (b"PROXY\tTCP4", "does not begin with one"),
    "the signature, one byte wrong": (SIGNATURE[:11] + b"\r", "does not begin with one"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n", "does not begin with one"),
    # Lines.
    "a protocol that there is not": (b"PROXY TCP5 10.0.0.1 10.0.0.2 1 2\r\n", LINE),
    "a protocol in small letters": (b"PROXY tcp4 10.0.0.1 10.0.0.2 1 2\r\n", LINE),
    "no protocol": (b"PROXY \r\n", LINE),
    "UNKNOWN and more": (b"PROXY UNKNOWNS\r\n", LINE),
    "too few words": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1\r\n", LINE),
    "too many words": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2 3\r\n", LINE),
    "two spaces": (b"PROXY TCP4  10.0.0.1 10.0.0.2 1 2\r\n", LINE),
    "a space at the end": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2 \r\n", LINE),
    "IPv6 in TCP4": (b"PROXY TCP4 ::1 ::1 1 2\r\n", "an address"),
    "IPv4 in TCP6": (b"PROXY TCP6 10.0.0.1 10.0.0.2 1 2\r\n", "an address"),
    "a zone": (b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", "an address"),
    "a network": (b"PROXY TCP4 10.0.0.0/8 10.0.0.2 1 2\r\n", "an address"),
    "an octal number": (b"PROXY TCP4 010.0.0.1 10.0.0.2 1 2\r\n", "an address"),
    "three numbers": (b"PROXY TCP4 10.0.1 10.0.0.2 1 2\r\n", "an address"),
    "a number above 255": (b"PROXY TCP4 10.0.0.256 10.0.0.2 1 2\r\n", "an address"),
    "a bad destination": (b"PROXY TCP4 10.0.0.1 10.0.0.x 1 2\r\n", "an address"),
    "no ASCII": (b"PROXY TCP4 \xd9\xa1.0.0.1 10.0.0.2 1 2\r\n", "an address"),
    "two double colons": (b"PROXY TCP6 1::2::3 ::1 1 2\r\n", "an address"),
    "a port above 65535": (b"PROXY TCP4 10.0.0.1 10.0.0.2 65536 2\r\n", "a port"),
    "a destination port above 65535": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 65536\r\n", "a port"),
    "a port with zeroes": (b"PROXY TCP4 10.0.0.1 10.0.0.2 01 2\r\n", "a port"),
    "a negative port": (b"PROXY TCP4 10.0.0.1 10.0.0.2 -1 2\r\n", "a port"),
    "a port with a sign": (b"PROXY TCP4 10.0.0.1 10.0.0.2 +1 2\r\n", "a port"),
    "a port of many digits": (b"PROXY TCP4 10.0.0.1 10.0.0.2 " + b"1" * 60 + b" 2\r\n", "a port"),
    "a port of no digits": (b"PROXY TCP4 10.0.0.1 10.0.0.2 x 2\r\n", "a port"),
    "a line feed alone": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\n", "CRLF"),
    "a carriage return alone": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\rX", "CRLF"),
    "a carriage return in UNKNOWN": (b"PROXY UNKNOWN \r \r\n", "CRLF"),
    "a line feed in UNKNOWN": (b"PROXY UNKNOWN \n \r\n", "CRLF"),
    "a line too long": (LONGEST_UNKNOWN[:-2] + b"0\r\n", "107 bytes"),
    "a line that does not end": (b"PROXY UNKNOWN " + b"x" * 93, "107 bytes"),
    # Binary.
    "version 1, binary": (v2_raw(0x11, 0x11, TCP4_BODY), "0x11"),
    "version 3": (SIGNATURE + b"\x31", "0x31"),
    "command 2": (SIGNATURE + b"\x22", "0x22"),
    "a family that there is not": (v2_raw(0x21, 0x41, bytes(300)), "0x41"),
    "a protocol that there is not, in binary": (v2_raw(0x21, 0x13, TCP4_BODY), "0x13"),
    "too short for IPv4": (v2_raw(0x21, 0x11, TCP4_BODY[:-1]), "too short"),
    "too short for IPv6": (v2_raw(0x21, 0x21, bytes(35)), "too short"),
    "too short for UNIX": (v2_raw(0x21, 0x31, bytes(215)), "too short"),
    "too short for UDP": (v2_raw(0x21, 0x12, bytes(11)), "too short"),
    "too large": (SIGNATURE + b"\x21\x11" + (LARGEST_V2 - 16 + 1).to_bytes(2, "big"), "4097 bytes"),
    "LOCAL, too large": (SIGNATURE + b"\x20\x00\xff\xff", "65551 bytes"),
    "half a TLV": (v2(tlvs=b"\x04\x00"), "a TLV"),
    "a TLV that reaches too far": (v2(tlvs=b"\x04\x00\x02\x00"), "a TLV"),
    "a byte after the TLVs": (v2(tlvs=tlv(4, b"") + b"\x04"), "a TLV"),
    "a wrong checksum": (v2(tlvs=tlv(3, bytes(4))), "its checksum"),
    "a checksum of three bytes": (v2(tlvs=tlv(3, bytes(3))), "four bytes"),
    "a checksum of another header": (checked(TCP4_BODY)[:20] + b"\x0a" + checked(TCP4_BODY)[21:], "its checksum"),
    "two checksums": (TWO_CHECKSUMS, "more than one checksum"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_exactly_a_header_is_refused(data: bytes, reason: str) -> None:
    """With a reason that repeats nothing of what a stranger sent."""
    with pytest.raises(MalformedProxyHeader, match=reason):
        parse_proxy_header(data)


@pytest.mark.parametrize("data", [data for data, _ in REFUSED.values()], ids=REFUSED)
def test_what_is_refused_is_never_taken_on_the_way(data: bytes) -> None:
    """Byte by byte, more is needed until it is refused; and it stays refused, whatever comes."""
    seen = []
    for end in range(len(data) + 1):
        try:
            seen.append(parse_proxy_header(data[:end]))
        except MalformedProxyHeader:
            break
    assert seen == [None] * len(seen)
    with pytest.raises(MalformedProxyHeader):
        parse_proxy_header(data + b"\r\n" * 60)


def test_the_checksum_is_the_documents() -> None:
    """The check value of CRC-32C, and the example of RFC 3720 appendix B.4 for 32 zeroes."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


# ---- properties

ports = st.integers(0, 65535)
addresses = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)
tlvs = st.lists(
    st.builds(tlv, st.integers(0, 255).filter(lambda kind: kind != 3), st.binary(max_size=60)), max_size=5
).map(b"".join)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, object]:
    """Draw a good header and the address that it names."""
    source, to = draw(addresses)
    port, to_port = draw(ports), draw(ports)
    if draw(st.booleans()):
        return v1(str(source), port, to=str(to), to_port=to_port), (source, port)
    return v2(str(source), port, to=str(to), to_port=to_port, tlvs=draw(tlvs)), (source, port)


@given(headers(), st.binary(max_size=40))
def test_a_header_is_read_as_it_was_written(header: tuple[bytes, object], rest: bytes) -> None:
    """Any address and port, any TLVs, whatever follows; and each prefix needs more."""
    data, source = header
    assert parse_proxy_header(data + rest) == ProxyHeader(source, len(data))
    assert {parse_proxy_header(data[:end]) for end in range(len(data))} == {None}


def outcome(data: bytes) -> object:
    """Return what the parser says of some bytes: a header, `None` for more, `False` for no."""
    try:
        return parse_proxy_header(data)
    except MalformedProxyHeader:
        return False


noise = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=100).map(lambda data: b"PROXY " + data),
    st.text("TCP46UNKOW 0123456789.:\r\n", max_size=110).map(lambda text: b"PROXY " + text.encode()),
    st.binary(max_size=300).map(lambda data: SIGNATURE + data),
    st.builds(v2_raw, st.sampled_from([0x20, 0x21, 0x22]), st.integers(0, 255), st.binary(max_size=300)),
)


@given(noise)
def test_whatever_comes_bytewise_and_whole_agree_and_nothing_else_is_raised(data: bytes) -> None:
    """What was decided stays decided: more bytes never change it, and a header never grows."""
    outcomes = [outcome(data[:end]) for end in range(len(data) + 1)]
    decided = [each for each in outcomes if each is not None]
    assert len(set(decided)) <= 1
    assert outcomes[len(outcomes) - len(decided) :] == decided
    if decided and isinstance(decided[0], ProxyHeader):
        assert len(outcomes) - len(decided) == decided[0].length


@given(st.one_of(noise, st.binary(min_size=LARGEST_V2, max_size=LARGEST_V2)))
def test_memory_is_bounded_whatever_comes(data: bytes) -> None:
    """A line is decided after 107 bytes, anything after 4096."""
    if data.startswith(b"PROXY ") or data[:1] not in (b"\r", b""):
        assert outcome(data[:LARGEST_V1].ljust(LARGEST_V1, b"x")) is not None
    assert outcome(data.ljust(LARGEST_V2, b"\0")) is not None
