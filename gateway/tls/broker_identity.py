"""Checks whether a certificate is for the broker's name (RFC 9525), using service-identity.

In: a parsed certificate and the configured name.  Out: the subjectAltName entry that matched, or `UpstreamFailure`
that says why none did.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address

from attrs import frozen
from cryptography import x509
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import extract_patterns
from service_identity.hazmat import DNS_ID, DNSPattern, IPAddress_ID, IPAddressPattern, verify_service_identity

from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable

_SHOWN_NAMES = 8


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

        Raises `UpstreamFailure` with `tls-name-mismatch`: no entry matches, there is none that could (the common name
        is never looked at, RFC 9525 §2), or an entry is malformed, which makes the whole certificate unfit.
        """
        try:
            return _matching_entry(self.name, certificate)
        except CertificateError as error:
            raise UpstreamFailure(EndReason.TLS_NAME_MISMATCH, self._unfit(certificate, str(error))) from None
        except VerificationError:
            raise UpstreamFailure(EndReason.TLS_NAME_MISMATCH, self._mismatch(certificate)) from None
        except ValueError as error:
            # Of the parser: the extensions are no DER, or say something that they may not.
            raise UpstreamFailure(
                EndReason.TLS_NAME_MISMATCH, printable(f"the certificate's extensions cannot be read: {error}")
            ) from None

    def _unfit(self, certificate: x509.Certificate, why: str) -> str:
        if not subject_alt_names(certificate):
            return f"the certificate has no subjectAltName, and its common name is not used; wanted {self.name}"
        names = shown_names(certificate)
        if "wildcard" in why:
            return f"the certificate has a wildcard that is too wide or misplaced ({names}); wanted {self.name}"
        return f"the certificate has no usable subjectAltName ({names}); wanted {self.name}"

    def _mismatch(self, certificate: x509.Certificate) -> str:
        kind = "an IP address" if self.sni is None else "a host name"
        return f"the certificate is for {shown_names(certificate)}; wanted {self.name}, {kind}"


@lru_cache(maxsize=32)
def _matching_entry(name: str, certificate: x509.Certificate) -> str:
    """Return the entry of a certificate that is `name`; raises what service-identity raises.

    The answer depends only on the arguments (certificates are equal if their bytes are), and a thousand sessions of one
    broker ask the same question.  It does not cover trust, validity period and revocation, which OpenSSL checks for
    each session.
    """
    try:
        service_id: DNS_ID | IPAddress_ID = IPAddress_ID(str(ip_address(name)))
    except ValueError:
        service_id = DNS_ID(name)
    pattern = verify_service_identity(extract_patterns(certificate), [service_id], [])[0].cert_pattern
    if isinstance(pattern, DNSPattern):
        return f"DNS:{pattern.pattern.decode('ascii', 'backslashreplace')}"
    if isinstance(pattern, IPAddressPattern):
        return f"IP:{pattern.pattern}"
    raise CertificateError(f"a {type(pattern).__name__} names no host")


def subject_alt_names(certificate: x509.Certificate) -> list[str]:
    """Return the subjectAltName entries as `DNS:…`, `IP:…`, `email:…`, `URI:…`, `other`; empty if there are none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    labels: dict[type[x509.GeneralName], str] = {
        x509.DNSName: "DNS",
        x509.IPAddress: "IP",
        x509.RFC822Name: "email",
        x509.UniformResourceIdentifier: "URI",
    }
    return [f"{labels[type(name)]}:{name.value}" if type(name) in labels else "other" for name in names]


def shown_names(certificate: x509.Certificate) -> str:
    """Return the first few subjectAltName entries on one printable line."""
    names = subject_alt_names(certificate)
    shown = ", ".join(printable(name, 80) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "") or "no name"
