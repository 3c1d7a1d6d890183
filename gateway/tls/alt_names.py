"""The subjectAltName entries of a certificate, read one by one (RFC 5280 §4.2.1.6).

In: a parsed certificate.  Out: its entries as `AltName`, or `ValueError` if the extension cannot be read.

`cryptography` reads all extensions at once and gives up on all of them if one entry is of a kind or a length that it
does not support.  One such entry must not hide the others, so this module reads the DER itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

from attrs import frozen
from cryptography import x509

from gateway.text import printable

_SEQUENCE, _OBJECT_IDENTIFIER, _OCTET_STRING = 0x30, 0x06, 0x04
_EXTENSIONS = 0xA3  # of a TBSCertificate (RFC 5280 §4.1)
_SUBJECT_ALT_NAME = bytes.fromhex("551d11")  # 2.5.29.17
_EMAIL, _DNS, _URI, _IP = 0x81, 0x82, 0x86, 0x87
_LABELS = {_EMAIL: "email", _DNS: "DNS", _URI: "URI", _IP: "IP"}
_LONG_FORM = 0x80
_MOST_LENGTH_OCTETS = 4
_SHOWN_NAMES = 8


@frozen(slots=True)
class AltName:
    """One GeneralName: its context tag and its contents."""

    tag: int
    contents: bytes

    @property
    def dns(self) -> str | None:
        """The DNS name, with bytes outside of ASCII escaped; `None` for an entry of another kind."""
        return self.contents.decode("ascii", "backslashreplace") if self.tag == _DNS else None

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The IP address; `None` for an entry of another kind or with a wrong length."""
        return ip_address(self.contents) if self.tag == _IP and len(self.contents) in {4, 16} else None

    def __str__(self) -> str:
        label = _LABELS.get(self.tag)
        if label is None:
            return "other"
        if self.tag == _IP:
            return f"IP:{self.ip or self.contents.hex()}"
        return f"{label}:{self.contents.decode('utf-8', 'surrogateescape')}"


def alt_names(certificate: x509.Certificate) -> list[AltName]:
    """Return the subjectAltName entries; empty if there are none.

    Raises `ValueError` if the extension is malformed, or there are several of them.
    """
    found = [value for oid, value in _extensions(certificate.tbs_certificate_bytes) if oid == _SUBJECT_ALT_NAME]
    if not found:
        return []
    if len(found) > 1:
        raise ValueError("there are several subjectAltName extensions")
    return [AltName(tag, contents) for tag, contents in _elements(_only(found[0], _SEQUENCE))]


def subject_alt_names(certificate: x509.Certificate) -> list[str]:
    """Return the entries as `DNS:…`, `IP:…`, `email:…`, `URI:…` or `other`; `unreadable` if they cannot be read.

    Bytes that are not UTF-8 are surrogates, as in file names: show entries with `printable` alone.
    """
    try:
        return [str(name) for name in alt_names(certificate)]
    except ValueError:
        return ["unreadable"]


def shown_names(certificate: x509.Certificate) -> str:
    """Return the first few entries on one printable line."""
    names = subject_alt_names(certificate)
    shown = ", ".join(printable(name, 80) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "") or "no name"


def _extensions(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the OBJECT IDENTIFIER and the value of each extension of a TBSCertificate."""
    for tag, contents in _elements(_only(body, _SEQUENCE)):
        if tag == _EXTENSIONS:
            for _, extension in _elements(_only(contents, _SEQUENCE)):
                parts = list(_elements(extension))
                if len(parts) < 2 or parts[0][0] != _OBJECT_IDENTIFIER or parts[-1][0] != _OCTET_STRING:
                    raise ValueError("an extension is malformed")
                yield parts[0][1], parts[-1][1]


def _only(data: bytes, expected: int) -> bytes:
    """Return the contents of the one element in `data`, which must have the tag `expected`."""
    found = list(_elements(data))
    if len(found) != 1 or found[0][0] != expected:
        raise ValueError(f"expected one DER element with the tag {expected:#x}")
    return found[0][1]


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the contents of each DER element in `data` (X.690 §8.1)."""
    position = 0
    while position < len(data):
        if len(data) - position < 2:
            raise ValueError("a DER element ends early")
        tag, size = data[position], data[position + 1]
        position += 2
        if size & _LONG_FORM:
            count = size & ~_LONG_FORM
            if not 1 <= count <= _MOST_LENGTH_OCTETS:
                raise ValueError("a DER element has an unusable length")
            size = int.from_bytes(data[position : position + count], "big")
            position += count
        if position + size > len(data):
            raise ValueError("a DER element ends early")
        yield tag, data[position : position + size]
        position += size
