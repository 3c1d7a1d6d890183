"""Judges the OCSP response that a broker staples to its certificate (RFC 6066 §8, RFC 6960).

In: the response, the verified chain, the time.  Out: until when it holds, or `UpstreamFailure`.

The gateway never asks a responder itself: that would cost time, tell the CA about each connection, and need another way
out of the plant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable

# How far the responder's clock may be ahead.
_SKEW = timedelta(minutes=5)
_LARGEST = 65_536
_SMALLEST_RSA = 2048


def judge(staple: bytes, chain: Sequence[x509.Certificate], now: datetime, *, required: bool) -> datetime | None:
    """Return until when the response for a verified chain holds; `None` if there is none and none is `required`.

    A certificate may itself require one (RFC 7633).  Raises `UpstreamFailure` for everything but a valid response that
    says "good".
    """
    if not staple:
        if required or _requires_staple(chain[0]):
            whose = "" if required else ", although its certificate requires one (RFC 7633)"
            raise _unusable(f"the broker sent no OCSP response{whose}")
        return None
    if len(staple) > _LARGEST:
        raise _unusable("the response is too long")
    try:
        response = ocsp.load_der_ocsp_response(staple)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise _unusable(f"the responder answered {response.response_status.name.lower()}")
        issuer = chain[1] if len(chain) > 1 else chain[0]
        single = _about(response, chain[0], issuer)
        if not any(has_signed(response, signer) for signer in _signers(response, issuer, now)):
            raise _unusable("neither the certificate's issuer nor a responder of its own signed the response")
        return _status(single, now)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType) as problem:
        raise _unusable(printable(f"the response cannot be read ({problem})", 200)) from None


def _status(single: ocsp.OCSPSingleResponse, now: datetime) -> datetime:
    """Return until when a response holds.  Raises `UpstreamFailure`."""
    until = single.next_update_utc
    if single.this_update_utc > now + _SKEW:
        raise _unusable(f"the response is not valid before {single.this_update_utc:%Y-%m-%d %H:%M} UTC")
    if until is None:
        raise _unusable("the response has no nextUpdate, so nothing says how old it may be")
    if until <= now:
        raise _unusable(f"the response was valid until {until:%Y-%m-%d %H:%M} UTC")
    if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        since = single.revocation_time_utc
        raise UpstreamFailure(EndReason.TLS_REVOKED, f"the OCSP response says: revoked on {since:%Y-%m-%d %H:%M} UTC")
    if single.certificate_status is not ocsp.OCSPCertStatus.GOOD:
        raise _unusable("the responder does not know the certificate")
    return until


def _about(
    response: ocsp.OCSPResponse, certificate: x509.Certificate, issuer: x509.Certificate
) -> ocsp.OCSPSingleResponse:
    """Return the part about a certificate.  Raises `UpstreamFailure` and `ValueError`."""
    for single in response.responses:
        if single.serial_number != certificate.serial_number:
            continue
        # A request says how issuers are named.
        wanted = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, single.hash_algorithm).build()
        if (single.issuer_name_hash, single.issuer_key_hash) == (wanted.issuer_name_hash, wanted.issuer_key_hash):
            return single
    raise _unusable("the response is about another certificate")


def _signers(response: ocsp.OCSPResponse, issuer: x509.Certificate, now: datetime) -> Iterator[x509.Certificate]:
    """Yield who may have signed: the issuer, and those whom the issuer has authorized (RFC 6960 §4.2.2.2)."""
    yield issuer
    for certificate in response.certificates:
        with contextlib.suppress(ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
            certificate.verify_directly_issued_by(issuer)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            is_valid = certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc
            if (
                is_valid
                and ExtendedKeyUsageOID.OCSP_SIGNING in usage
                and _is_strong(certificate.signature_hash_algorithm)
            ):
                yield certificate


def has_signed(response: ocsp.OCSPResponse, signer: x509.Certificate) -> bool:
    """Whether a certificate's key has signed a response, with an algorithm that is strong enough."""
    algorithm = response.signature_hash_algorithm
    key: CertificateIssuerPublicKeyTypes = signer.public_key()  # type: ignore[assignment]  # others fail below
    signature, signed = response.signature, response.tbs_response_bytes
    try:
        if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            key.verify(signature, signed)
            return True
        if algorithm is None or not _is_strong(algorithm):
            return False
        if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _SMALLEST_RSA:
            key.verify(signature, signed, padding.PKCS1v15(), algorithm)
            return True
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, signed, ec.ECDSA(algorithm))
            return True
    except InvalidSignature:
        pass
    return False


def _is_strong(algorithm: object) -> bool:
    """Whether a hash is strong enough to sign with; Ed25519 and Ed448 have none."""
    return algorithm is None or isinstance(algorithm, SHA256 | SHA384 | SHA512)


def _requires_staple(certificate: x509.Certificate) -> bool:
    try:
        features = certificate.extensions.get_extension_for_class(x509.TLSFeature).value
    except x509.ExtensionNotFound:
        return False
    return x509.TLSFeatureType.status_request in features


def _unusable(detail: str) -> UpstreamFailure:
    return UpstreamFailure(EndReason.TLS_OCSP_UNUSABLE, detail)
