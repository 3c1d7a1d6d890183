"""The PROXY header: more bytes never change a verdict, and a header says what its own bytes say."""

from __future__ import annotations

from ipaddress import ip_address

from gateway.net import proxy_header as header_module
from gateway.net.proxy_header import LARGEST_V1, LARGEST_V2, MalformedProxyHeader, ProxyHeader, parse_proxy_header
from tests.fuzz.tools import Choices
from tests.proxy_headers import SIGNATURE, tlv, v1, v2

SEEDS = tuple(
    bytes((30,)) + stream
    for stream in (
        v1("192.0.2.7", 1234) + b"\x10\x0c",
        v1("2001:db8::7", 1234, to="2001:db8::1"),
        v2("192.0.2.7", 1234) + b"\x10\x0c",
        v2("2001:db8::7", 65535, to="2001:db8::1", tlvs=tlv(0x04, bytes(4))),
        b"PROXY UNKNOWN a b\r\n",
        SIGNATURE + b"\x20\x00\x00\x00",
        SIGNATURE + b"\x21\x11\x00\x13" + bytes(12) + b"\x03\x00\x04" + bytes(4),
        SIGNATURE + b"\x21\x11\x00\x10" + bytes(12) + b"\xee\x00\x01\x00",
    )
)


def _verdict(data: bytes) -> ProxyHeader | str | None:
    try:
        return parse_proxy_header(data)
    except MalformedProxyHeader as error:
        return str(error)


def check(data: bytes) -> None:
    """Parse a beginning, all, and all with more behind it."""
    choices = Choices(data)
    where = choices.number(256)
    stream = choices.rest()[: LARGEST_V2 + 16]
    verdict = _verdict(stream)
    for early in {where % (len(stream) + 1), len(stream) // 2, max(len(stream) - 1, 0)}:
        before = _verdict(stream[:early])
        assert before is None or isinstance(before, str) == isinstance(verdict, str), "a verdict has changed"
        assert not isinstance(before, ProxyHeader) or before == verdict
    if verdict is None:
        assert len(stream) < (LARGEST_V2 if stream.startswith(b"\r") else LARGEST_V1)
        return
    if isinstance(verdict, str):
        assert verdict.isprintable()
        return
    header = stream[: verdict.length]
    assert len(header) == verdict.length <= LARGEST_V2
    assert _verdict(header) == verdict == _verdict(header + b"\r\n\0PROXY ")
    if verdict.source is None:
        return
    address, port = verdict.source
    if header.startswith(b"PROXY "):
        words = header.removesuffix(b"\r\n").decode("ascii").split(" ")
        assert len(words) == 6
        assert (ip_address(words[2]), int(words[4])) == (address, port)
    else:
        assert header.startswith(SIGNATURE)
        size = len(address.packed)
        assert header[16 : 16 + size] == address.packed
        assert header[16 + 2 * size : 18 + 2 * size] == port.to_bytes(2, "big")


def takes_the_destination_for_the_source() -> None:
    """The second address of a version 2 header counts."""
    parse = header_module._parse_v2

    def faulty(data: bytes) -> ProxyHeader | None:
        found = parse(data)
        if found is None or found.source is None or data[13] != 0x11:
            return found
        return ProxyHeader((type(found.source[0])(data[20:24]), found.source[1]), found.length)

    header_module._parse_v2 = faulty


def reads_ports_leniently() -> None:
    """A port may have a sign, blanks and underscores, as Python's numbers may."""
    header_module._port_v1 = int


FAULTS = (takes_the_destination_for_the_source, reads_ports_leniently)
