"""PROXY protocol headers as a load balancer makes them, written from the document and not from the parser."""

from __future__ import annotations

import socket
import struct

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def v1(source: str = "192.168.7.9", port: int = 51234, *, to: str = "192.168.7.1", to_port: int = 1883) -> bytes:
    """A line (§2.1)."""
    protocol = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {protocol} {source} {to} {port} {to_port}\r\n".encode()


def v2(
    source: str = "192.168.7.9",
    port: int = 51234,
    *,
    to: str = "192.168.7.1",
    to_port: int = 1883,
    tlvs: bytes = b"",
) -> bytes:
    """A binary header for TCP (§2.2)."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    addresses = b"".join(socket.inet_pton(family, address) for address in (source, to))
    protocol = 0x21 if family is socket.AF_INET6 else 0x11
    return v2_raw(0x21, protocol, addresses + struct.pack("!HH", port, to_port) + tlvs)


def v2_raw(command: int, protocol: int, body: bytes) -> bytes:
    """A binary header with these bytes in it; their length is right."""
    return SIGNATURE + struct.pack("!BBH", command, protocol, len(body)) + body


def local(body: bytes = b"") -> bytes:
    """A health check of the load balancer's own."""
    return v2_raw(0x20, 0, body)


def tlv(kind: int, value: bytes) -> bytes:
    """Type, length, value (§2.2)."""
    return struct.pack("!BH", kind, len(value)) + value
