"""Translates OpenSSL's errors into the gateway's reasons.

In: verification codes, error queues, alerts.  Out: an `UpstreamFailure` with a reason that people can act on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice

from cryptography import x509
from OpenSSL import crypto

from gateway import MADE
from gateway.errors import EndReason, UnknownIssuer, UpstreamFailure
from gateway.text import printable

# X509_V_ERR_* (openssl/x509_vfy.h) with their own reason or words; any other is an untrusted chain with OpenSSL's
# number, which fails closed.
_VERIFY_ERRORS: dict[int, tuple[EndReason, str]] = {
    2: (EndReason.TLS_UNTRUSTED_CHAIN, "the issuer's certificate was not found"),
    3: (EndReason.TLS_CRL_UNUSABLE, "no CRL of the issuer was found"),
    5: (EndReason.TLS_CRL_UNUSABLE, "the CRL's signature cannot be read"),
    7: (EndReason.TLS_UNTRUSTED_CHAIN, "the signature is wrong"),
    8: (EndReason.TLS_CRL_UNUSABLE, "the CRL's signature is wrong"),
    9: (EndReason.TLS_NOT_YET_VALID, "not yet valid"),
    10: (EndReason.TLS_EXPIRED, "expired"),
    11: (EndReason.TLS_CRL_UNUSABLE, "the CRL is not yet valid"),
    12: (EndReason.TLS_CRL_UNUSABLE, "the CRL has expired"),
    13: (EndReason.TLS_NOT_YET_VALID, "its notBefore field is malformed"),
    14: (EndReason.TLS_EXPIRED, "its notAfter field is malformed"),
    15: (EndReason.TLS_CRL_UNUSABLE, "the CRL's lastUpdate field is malformed"),
    16: (EndReason.TLS_CRL_UNUSABLE, "the CRL's nextUpdate field is malformed"),
    18: (EndReason.TLS_UNTRUSTED_CHAIN, "self-signed, and not a trusted root"),
    19: (EndReason.TLS_UNTRUSTED_CHAIN, "the chain ends in a root that is not trusted"),
    20: (
        EndReason.TLS_UNTRUSTED_CHAIN,
        "its issuer is neither a trusted root nor sent by the broker",
    ),
    21: (EndReason.TLS_UNTRUSTED_CHAIN, "the broker sent one certificate, and no trusted root issued it"),
    22: (EndReason.TLS_UNTRUSTED_CHAIN, "the chain is too long"),
    23: (EndReason.TLS_REVOKED, "revoked"),
    24: (EndReason.TLS_UNTRUSTED_CHAIN, "an issuer is not a CA, or has no public key"),
    25: (EndReason.TLS_UNTRUSTED_CHAIN, "the path length that a CA allows is exceeded"),
    26: (EndReason.TLS_WRONG_PURPOSE, "not for a TLS server (extendedKeyUsage)"),
    32: (EndReason.TLS_UNTRUSTED_CHAIN, "an issuer may not sign certificates (keyUsage)"),
    33: (EndReason.TLS_CRL_UNUSABLE, "the CRL's issuer was not found"),
    34: (EndReason.TLS_UNTRUSTED_CHAIN, "a critical extension is unknown"),
    35: (EndReason.TLS_CRL_UNUSABLE, "the issuer may not sign CRLs (keyUsage)"),
    36: (EndReason.TLS_CRL_UNUSABLE, "the CRL has a critical extension that is unknown"),
    44: (EndReason.TLS_CRL_UNUSABLE, "the CRL is for another scope"),
    47: (EndReason.TLS_UNTRUSTED_CHAIN, "a CA's name constraints forbid this name"),
    48: (EndReason.TLS_UNTRUSTED_CHAIN, "a CA's name constraints forbid this name"),
    54: (EndReason.TLS_CRL_UNUSABLE, "the CRL's own chain cannot be verified"),
    66: (EndReason.TLS_WEAK_CERTIFICATE, "the key is too small"),
    67: (EndReason.TLS_WEAK_CERTIFICATE, "a CA's key is too small"),
    68: (EndReason.TLS_WEAK_CERTIFICATE, "the signature's hash is too weak"),
    79: (EndReason.TLS_UNTRUSTED_CHAIN, "an issuer is not a CA (basicConstraints)"),
    # The rules that only X509_STRICT applies (RFC 5280 §4.2, §6).
    80: (EndReason.TLS_STRICT_REFUSED, "a path length on a certificate that is not a CA"),
    81: (EndReason.TLS_STRICT_REFUSED, "a path length without the key usage keyCertSign"),
    82: (EndReason.TLS_STRICT_REFUSED, "the key usage keyCertSign on a certificate that is not a CA"),
    83: (EndReason.TLS_STRICT_REFUSED, "its issuer's name is empty"),
    84: (EndReason.TLS_STRICT_REFUSED, "a CA's subject is empty"),
    85: (EndReason.TLS_STRICT_REFUSED, "no authority key identifier"),
    86: (EndReason.TLS_STRICT_REFUSED, "no subject key identifier"),
    87: (EndReason.TLS_STRICT_REFUSED, "its subjectAltName is empty"),
    88: (EndReason.TLS_STRICT_REFUSED, "its subject is empty and its subjectAltName is not critical"),
    89: (EndReason.TLS_STRICT_REFUSED, "a CA's basicConstraints are not critical"),
    90: (EndReason.TLS_STRICT_REFUSED, "its authority key identifier is critical"),
    91: (EndReason.TLS_STRICT_REFUSED, "its subject key identifier is critical"),
    92: (EndReason.TLS_STRICT_REFUSED, "a CA without key usage"),
    93: (EndReason.TLS_STRICT_REFUSED, "extensions in a certificate below version 3"),
    94: (EndReason.TLS_STRICT_REFUSED, "an elliptic curve given by explicit parameters"),
}

# No trusted root issued the chain; other untrusted chains have one, but break a rule.
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})
# With the signature that no key fits: a CA that was made again has the same name, but another key.
_OF_ISSUER = _UNKNOWN_ISSUER | {7}
_MOST_ISSUER = 128  # characters shown of an issuer's name
# Roots whose names are compared, at some 50 µs each in the event loop.  A CA of one's own is one of few.
_MOST_ROOTS = 20
OTHER_KEY = "a trusted CA has this name, but its key does not match"
# Errors that depend on the clock: certificates not yet valid or expired, then CRLs.
_OF_CERTIFICATES_TIME = frozenset({9, 10})
_OF_TIME = _OF_CERTIFICATES_TIME | {11, 12}
_NOT_YET = frozenset({9, 11})

# Parts of OpenSSL's reason strings, in the order in which they are searched.  The strings changed between 1.1.1, 3.x
# and 4.0 ("sslv3 alert bad certificate" became "ssl/tls alert bad certificate"), their endings did not.
_HANDSHAKE_ERRORS: tuple[tuple[str, EndReason], ...] = (
    ("wrong version number", EndReason.TLS_NOT_TLS),
    ("packet length too long", EndReason.TLS_NOT_TLS),  # OpenSSL 3.4 to 3.5.2 check a record's length first
    ("http request", EndReason.TLS_NOT_TLS),
    ("https proxy request", EndReason.TLS_NOT_TLS),
    ("unsupported protocol", EndReason.TLS_VERSION),
    ("alert protocol version", EndReason.TLS_VERSION),
    ("no application protocol", EndReason.TLS_ALPN_MISMATCH),
    ("alert certificate required", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert bad certificate", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert unsupported certificate", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert certificate revoked", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert certificate expired", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert certificate unknown", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert unknown ca", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    ("alert access denied", EndReason.TLS_CLIENT_CERTIFICATE_REFUSED),
    # Only if verification refused without giving a reason, because its own reason takes precedence.
    ("certificate verify failed", EndReason.TLS_VERIFICATION_ERROR),
)


def verification_failure(
    code: int,
    depth: int,
    now: datetime,
    certificate: crypto.X509 | None = None,
    roots: Iterable[x509.Certificate] = (),
) -> UpstreamFailure:
    """Return the failure for X509_V_ERR_* `code` at `depth` of the chain (0: the broker's own certificate).

    `now` is the time of this machine's clock.  A machine without a clock battery starts in the past: this gets its own
    reason, different from a `certificate` that starts too late, and is still a refusal.  `roots` are the configured
    ones.
    """
    reason, words = _VERIFY_ERRORS.get(code, (EndReason.TLS_UNTRUSTED_CHAIN, "verification failed"))
    whose = "the broker's certificate" if depth == 0 else f"the CA certificate at depth {depth}"
    detail = f"{whose}: {words} (OpenSSL error {code})"
    if code in _NOT_YET and now < MADE:
        reason = EndReason.CLOCK_IMPLAUSIBLE
    if code in _OF_CERTIFICATES_TIME and certificate is not None:
        # If `cryptography` cannot parse it, it is refused all the same.
        with contextlib.suppress(ValueError):
            own = certificate.to_cryptography()
            detail += f"; it is valid from {_shown(own.not_valid_before_utc)} to {_shown(own.not_valid_after_utc)}"
    if code in _OF_ISSUER and certificate is not None:
        # As above; a hostile certificate may make the parser raise anything.
        with contextlib.suppress(Exception):
            detail += f"; {_issued_by(certificate.to_cryptography(), roots)}"
    if code in _OF_TIME:
        detail += f"; this machine's clock says {_shown(now)}"
    return UnknownIssuer(reason, detail) if code in _UNKNOWN_ISSUER else UpstreamFailure(reason, detail)


def _issued_by(certificate: x509.Certificate, roots: Iterable[x509.Certificate]) -> str:
    name = certificate.issuer
    words = f"issued by {printable(name.rfc4514_string(), _MOST_ISSUER) or 'an empty name'}"
    return f"{words}: {OTHER_KEY}" if any(root.subject == name for root in islice(roots, _MOST_ROOTS)) else words


def handshake_failure(queue: Sequence[object], *, approved: bool, offered: str = "") -> UpstreamFailure:
    """Return the failure for OpenSSL's error queue: pyOpenSSL's (library, function, reason)s or errno pair.

    `approved` says whether the broker's certificate had been approved.  After that, only the client certificate can
    make a broker send the alert handshake_failure (RFC 5246 §7.4.6); before, it is about ciphers or extensions.
    `offered` is what the ClientHello offered, for brokers that have none of it.
    """
    words = "; ".join(
        str(entry[2] or entry[0]) if isinstance(entry, tuple) and len(entry) == 3 else str(entry) for entry in queue
    )
    lowered = words.lower()
    if approved and "alert handshake failure" in lowered:
        return UpstreamFailure(EndReason.TLS_CLIENT_CERTIFICATE_REFUSED, words)
    for part, reason in _HANDSHAKE_ERRORS:
        if part in lowered:
            return UpstreamFailure(reason, words)
    words = words or "OpenSSL gave no reason"
    return UpstreamFailure(
        EndReason.TLS_HANDSHAKE_FAILED, words if approved or not offered else f"{words}; offered: {offered}"
    )


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
