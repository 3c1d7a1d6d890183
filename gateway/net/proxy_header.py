r"""Reads the PROXY protocol header, in which a load balancer names the client (HAProxy, doc/proxy-protocol.txt).

In: the first bytes of a connection.  Out: the device's address and the length of the header, or that more is needed.

Version 1 is a line of text, version 2 is binary.  Any deviation from the document is refused as early as possible.  The
destination and the extensions of version 2 (TLVs) are checked and dropped.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from attrs import frozen

from gateway.errors import GatewayError

LARGEST_V1 = 107
"""The longest version 1 line in bytes, including its CRLF (§2.1)."""

LARGEST_V2 = 4096
"""The longest accepted binary header in bytes: at most 232 up to the addresses, the rest for TLVs."""

_SIGNATURE_V1 = b"PROXY "
_SIGNATURE_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_V2 = 16  # signature, version and command, family and protocol, length
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
# Bytes of both addresses (and ports) by address family; none for AF_UNSPEC.
_ADDRESSES_V2 = {0x0: 0, 0x1: 12, 0x2: 36, 0x3: 216}
_PROTOCOLS_V2 = 3  # UNSPEC, STREAM, DGRAM
_TLV_CRC32C = 0x03
_CHECKSUM = 4  # bytes
_CASTAGNOLI = 0x82F63B78  # RFC 4960 appendix B, bits reversed


class MalformedProxyHeader(GatewayError):
    """The bytes are not a valid header; `str()` gives the reason without quoting them."""


@frozen(slots=True)
class ProxyHeader:
    """A complete header.

    `source` is the device's address and port.  It is `None` if the header names none: the connection is the load
    balancer's own (LOCAL, a health check), its client is unknown (UNKNOWN, UNSPEC), or the client did not use TCP (a
    UNIX socket).  Then the connection's own address applies (§2.1, §2.2).
    """

    source: tuple[IPv4Address | IPv6Address, int] | None
    length: int


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Read the header at the start of a connection; `data` is everything received so far.

    Returns `None` if more is needed, but never from `LARGEST_V2` bytes on.  Raises `MalformedProxyHeader`.
    """
    if data[:1] == _SIGNATURE_V2[:1]:
        return _parse_v2(data)
    return _parse_v1(data)


def _parse_v1(data: bytes) -> ProxyHeader | None:
    """Read a line (§2.1)."""
    if not _SIGNATURE_V1.startswith(data[: len(_SIGNATURE_V1)]):
        raise MalformedProxyHeader("the connection does not begin with one")
    head = data[:LARGEST_V1]
    line, end, _ = head.partition(b"\r\n")
    unfinished = not end
    # A carriage return may be the last byte so far; otherwise neither CR nor LF may stand alone.
    if b"\n" in line or b"\r" in (line[:-1] if unfinished else line):
        raise MalformedProxyHeader("its line does not end with CRLF")
    if unfinished:
        if len(data) >= LARGEST_V1:
            raise MalformedProxyHeader(f"its line has not ended after {LARGEST_V1} bytes")
        return None
    words = line.split(b" ")
    length = len(line) + len(end)
    if words[1] == b"UNKNOWN":
        return ProxyHeader(None, length)
    if words[1] not in (b"TCP4", b"TCP6") or len(words) != 6:
        raise MalformedProxyHeader("its line is not PROXY, TCP4 or TCP6, two addresses and two ports")
    source, _ = [_address_v1(word, words[1]) for word in words[2:4]]
    source_port, _ = [_port_v1(word) for word in words[4:]]
    return ProxyHeader((source, source_port), length)


def _address_v1(word: bytes, protocol: bytes) -> IPv4Address | IPv6Address:
    # Python accepts a zone in an IPv6 address; the header must not have one.
    if b"%" not in word:
        try:
            text = word.decode("ascii")
            return IPv4Address(text) if protocol == b"TCP4" else IPv6Address(text)
        except ValueError:
            pass
    raise MalformedProxyHeader(f"an address in its line is not valid for {protocol.decode()}")


def _port_v1(word: bytes) -> int:
    if not word.isdigit() or str(int(word[:6])).encode() != word or int(word) > 0xFFFF:
        raise MalformedProxyHeader("a port in its line is not a number from 0 to 65535")
    return int(word)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    """Read a binary header (§2.2)."""
    if not _SIGNATURE_V2.startswith(data[: len(_SIGNATURE_V2)]):
        raise MalformedProxyHeader("the connection does not begin with one")
    if len(data) > 12 and data[12] not in (_LOCAL, _PROXY):
        raise MalformedProxyHeader(f"version and command are 0x{data[12]:02X}, not 0x20 or 0x21")
    if len(data) < _FIXED_V2:
        return None
    length = _FIXED_V2 + int.from_bytes(data[14:16], "big")
    if length > LARGEST_V2:
        raise MalformedProxyHeader(f"it has {length} bytes, above the limit of {LARGEST_V2}")
    if len(data) < length:
        return None
    if data[12] == _LOCAL:
        # Skip whatever follows.
        return ProxyHeader(None, length)
    header = data[:length]
    family, protocol = divmod(header[13], 16)
    if family not in _ADDRESSES_V2 or protocol >= _PROTOCOLS_V2:
        raise MalformedProxyHeader(f"family and protocol are 0x{header[13]:02X}, which is not defined")
    if family == 0:
        return ProxyHeader(None, length)
    addresses = _FIXED_V2 + _ADDRESSES_V2[family]
    if length < addresses:
        raise MalformedProxyHeader("it is too short for its addresses")
    _check_tlvs(header, addresses)
    if header[13] == _TCP4:
        return ProxyHeader((IPv4Address(header[16:20]), int.from_bytes(header[24:26], "big")), length)
    if header[13] == _TCP6:
        return ProxyHeader((IPv6Address(header[16:32]), int.from_bytes(header[48:50], "big")), length)
    return ProxyHeader(None, length)


def _check_tlvs(header: bytes, position: int) -> None:
    """Check the type, length, value entries after the addresses (§2.2)."""
    checked = False
    while position < len(header):
        value = position + 3
        size = int.from_bytes(header[position + 1 : value], "big")
        if value > len(header) or value + size > len(header):
            raise MalformedProxyHeader("a TLV extends beyond its end")
        if header[position] == _TLV_CRC32C:
            if checked or size != _CHECKSUM:
                raise MalformedProxyHeader("it has more than one checksum, or one that is not four bytes long")
            without = header[:value] + bytes(size) + header[value + size :]
            if int.from_bytes(header[value : value + size], "big") != crc32c(without):
                raise MalformedProxyHeader("its checksum is wrong")
            checked = True
        position = value + size


def _castagnoli_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        entry = byte
        for _ in range(8):
            entry = entry >> 1 ^ (_CASTAGNOLI if entry & 1 else 0)
        table.append(entry)
    return tuple(table)


_TABLE = _castagnoli_table()


def crc32c(data: bytes) -> int:
    """Return the CRC32c checksum (RFC 4960 appendix B)."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF
