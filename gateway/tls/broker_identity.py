"""Checks whether a certificate is for the broker's name (RFC 9525), using service-identity.

In: a parsed certificate and the configured name.  Out: the subjectAltName entry that matched, or `UpstreamFailure`
that says why none did.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address

from attrs import frozen
from cryptography import x509
from service_identity import CertificateError
from service_identity.hazmat import DNS_ID, DNSPattern, IPAddress_ID, IPAddressPattern

from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable
from gateway.tls.alt_names import AltName, alt_names, shown_names

# RFC 1035 §2.3.4, as text.  What is longer is not read: an alternative name of a certificate can have 64 KiB.
_LONGEST_NAME = 253
# Stricter than service-identity, which trims white space and takes control characters and wildcards within a label.
_DNS_NAME = re.compile(r"(?:\*\.)?(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}", re.ASCII)


@frozen(slots=True)
class Identity:
    """A broker's name, as verified and as sent in SNI.

    `name` is an A-label host name in lower case or an IP address in its canonical form; `sni` goes into the
    ClientHello; it is `None` for an IP address, which RFC 6066 §3 does not allow.
    """

    name: str
    sni: bytes | None

    @classmethod
    def of(cls, name: str) -> Identity:
        """Make the identity for a normalized name.  Raises `ValueError` if it is neither an address nor a host name."""
        try:
            address = ip_address(name)
        except ValueError:
            DNS_ID(name)
            return cls(name, name.encode("ascii"))
        return cls(str(address), None)

    def match(self, certificate: x509.Certificate) -> str:
        """Return the subjectAltName entry that is this identity (RFC 9525 §6), as `DNS:…` or `IP:…`.

        Entries that are malformed are skipped, as are those of other kinds and wildcards that RFC 9525 §6.3 does not
        allow; the common name is never used (RFC 9525 §2).  Raises `UpstreamFailure` with `tls-name-mismatch` if no
        entry matches.
        """
        try:
            matched = _matching_entry(self.name, certificate)
            detail = "" if matched else self._mismatch(certificate)
        except ValueError as error:
            raise UpstreamFailure(
                EndReason.TLS_NAME_MISMATCH, printable(f"the certificate's subjectAltName cannot be read: {error}")
            ) from None
        if not matched:
            raise UpstreamFailure(EndReason.TLS_NAME_MISMATCH, detail)
        return matched

    def _mismatch(self, certificate: x509.Certificate) -> str:
        expected = f"expected {self.name}, {'an IP address' if self.sni is None else 'a host name'}"
        names, shown = alt_names(certificate), shown_names(certificate)
        if not names:
            return f"the certificate has no subjectAltName, and its common name is not used; {expected}"
        if any(_pattern(name) is not None for name in names):
            return f"the certificate is for {shown}; {expected}"
        if any("*" in (name.dns or "") for name in names):
            return f"the certificate has a wildcard that is too wide or misplaced ({shown}); {expected}"
        return f"the certificate has no usable subjectAltName ({shown}); {expected}"


@lru_cache(maxsize=32)
def _matching_entry(name: str, certificate: x509.Certificate) -> str:
    """Return the entry of a certificate that is `name`, or an empty text.  Raises `ValueError` as `alt_names`.

    The answer depends only on the arguments (certificates are equal if their bytes are), and a thousand sessions of one
    broker ask the same question.  It does not cover trust, validity period and revocation, which OpenSSL checks for
    each session.
    """
    try:
        wanted: DNS_ID | IPAddress_ID = IPAddress_ID(str(ip_address(name)))
    except ValueError:
        wanted = DNS_ID(name)
    for entry in alt_names(certificate):
        pattern = _pattern(entry)
        if pattern is not None and wanted.verify(pattern):
            return f"DNS:{pattern.pattern.decode('ascii')}" if isinstance(pattern, DNSPattern) else f"IP:{entry.ip}"
    return ""


def _pattern(name: AltName) -> DNSPattern | IPAddressPattern | None:
    """Return what `name` can match; `None` if that is nothing."""
    if name.ip is not None:
        return IPAddressPattern(name.ip)
    if name.dns is None or len(name.dns) > _LONGEST_NAME or not _DNS_NAME.fullmatch(name.dns):
        return None
    try:
        return DNSPattern.from_bytes(name.dns.encode("ascii"))
    except CertificateError:
        return None  # An IP address written as a name, or a wildcard that is too wide.
