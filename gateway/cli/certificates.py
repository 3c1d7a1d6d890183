"""Certificates in words.

In: parsed certificates, the time.  Out: names that are safe to show, and remaining validity.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from gateway.cli.report import Status
from gateway.ops.expiry import SOON
from gateway.text import printable
from gateway.tls.alt_names import subject_alt_names


def subject(certificate: x509.Certificate) -> str:
    """Return the subject of a certificate."""
    return printable(certificate.subject.rfc4514_string()) or "an empty subject"


def issuer(certificate: x509.Certificate) -> str:
    """Return the issuer of a certificate."""
    return printable(certificate.issuer.rfc4514_string()) or "an empty issuer"


def now() -> datetime:
    """Return the time that certificates are checked against."""
    return datetime.now(UTC)


def expiry(certificate: x509.Certificate) -> tuple[Status, str]:
    """Return whether a certificate needs renewal, and its remaining days in words."""
    time, start, end = now(), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if time > end:
        return Status.FAIL, f"expired on {end:%Y-%m-%d %H:%M} UTC"
    if time < start:
        return Status.FAIL, f"not valid before {start:%Y-%m-%d %H:%M} UTC"
    left = end - time
    return Status.WARN if left <= SOON else Status.PASS, f"{left.days} days left (until {end:%Y-%m-%d})"


def first_to_expire(certificates: Sequence[x509.Certificate]) -> x509.Certificate:
    """Return the certificate that expires first."""
    return min(certificates, key=lambda certificate: certificate.not_valid_after_utc)


def is_ca(certificate: x509.Certificate) -> bool:
    """Return whether a certificate may issue others (RFC 5280 §4.2.1.9)."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def as_facts(certificate: x509.Certificate) -> dict[str, Any]:
    """Return the facts of a certificate as JSON values; times are ISO 8601."""
    return {
        "subject": subject(certificate),
        "names": [printable(name) for name in subject_alt_names(certificate)],
        "issuer": issuer(certificate),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }
