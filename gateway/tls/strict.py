"""What `verification = "strict"` requires beyond OpenSSL: a second opinion, and rules of public web certificates.

In: the chain that OpenSSL verified, the trusted roots, the name.  Out: nothing, or `UpstreamFailure` with
`tls-strict-refused` that names the rule.

OpenSSL's own part is X509_STRICT (`gateway/tls/trust.py`).  The rules here are those of RFC 5280 and of the CA/Browser
Forum's Baseline Requirements (BR) that neither OpenSSL nor `cryptography` applies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from ipaddress import ip_address
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable
from gateway.tls.alt_names import alt_names
from gateway.tls.broker_identity import Identity

_E = TypeVar("_E", bound=x509.ExtensionType)


def judge(chain: Sequence[x509.Certificate], roots: Collection[x509.Certificate], identity: Identity) -> None:
    """Check a verified chain, the broker's own certificate first, the root last.

    Raises `UpstreamFailure`; what `cryptography` cannot parse raises `ValueError` or its kin, a refusal as well.
    """
    for index, certificate in enumerate(chain):
        shown = "the broker's certificate" if index == 0 else f"the CA certificate at depth {index}"
        for rule in _broken(certificate):
            raise _refused(f"{shown}: {rule}")
    for rule in _broken_by_broker(chain[0]):
        raise _refused(f"the broker's certificate: {rule}")
    if _extension(chain[-1], x509.ExtendedKeyUsage) is not None:
        raise _refused("the root: it has an extended key usage (BR 7.1.2.1.2)")
    if chain[-1] not in roots:
        raise _refused("the chain does not end in a trusted root")
    _second_opinion(chain, identity)


def crl_problem(crl: x509.CertificateRevocationList) -> str:
    """Return what is wrong with a CRL (RFC 5280 §5.2.3), or an empty text."""
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber)
    except x509.ExtensionNotFound:
        return "no CRL number"
    return "a CRL number that is critical" if number.critical else ""


def _broken(certificate: x509.Certificate) -> Iterator[str]:
    """Yield the rules that any certificate breaks."""
    if certificate.serial_number <= 0:
        yield "its serial number is not positive (RFC 5280 §4.1.2.2)"
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size % 8:
        yield f"its RSA key has {key.key_size} bits, which is not divisible by 8 (BR 6.1.5)"
    for kind, words in ((x509.NameConstraints, "name constraints"), (x509.PolicyConstraints, "policy constraints")):
        found = _extension(certificate, kind)
        if found is not None and not found.critical:
            yield f"its {words} are not critical (RFC 5280 §4.2.1)"


def _broken_by_broker(certificate: x509.Certificate) -> Iterator[str]:
    """Yield the rules that a broker's own certificate breaks."""
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is None or ExtendedKeyUsageOID.SERVER_AUTH not in purposes.value:
        yield "it has no extended key usage serverAuth (BR 7.1.2.7.10)"
    elif ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes.value:
        yield "it has the extended key usage anyExtendedKeyUsage (BR 7.1.2.7.10)"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.value.digital_signature:
        yield "it has a key usage without digitalSignature, which TLS 1.3 needs (RFC 8446 §4.4.2.2)"
    names = {str(name.ip) if name.ip is not None else name.dns for name in alt_names(certificate)}
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        if attribute.value not in names:
            yield "its common name is not in its subjectAltName (BR 7.1.4.3)"


def _second_opinion(chain: Sequence[x509.Certificate], identity: Identity) -> None:
    """Require that cryptography's verifier agrees (RFC 5280 as profiled by the CA/Browser Forum).

    It counts self-issued certificates against a path length, which RFC 5280 §4.2.1.9 does not.  So a chain is verified
    in parts: up to each self-issued CA, and from there on.
    """
    subject = x509.IPAddress(ip_address(identity.name)) if identity.sni is None else x509.DNSName(identity.name)
    last = len(chain) - 1
    ends = [index for index in range(1, last) if chain[index].subject == chain[index].issuer] + [last]
    start = 0
    for end in ends:
        builder = verification.PolicyBuilder().store(verification.Store([chain[end]]))
        between = list(chain[start + 1 : end])
        try:
            if start == 0:
                builder.build_server_verifier(subject).verify(chain[0], between)
            else:
                policies = {
                    "ca_policy": verification.ExtensionPolicy.webpki_defaults_ca(),
                    "ee_policy": verification.ExtensionPolicy.permit_all(),
                }
                builder.extension_policies(**policies).build_client_verifier().verify(chain[start], between)
        except verification.VerificationError as error:
            raise _refused(printable(str(error))) from None
        start = end


def _extension(certificate: x509.Certificate, kind: type[_E]) -> x509.Extension[_E] | None:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _refused(detail: str) -> UpstreamFailure:
    return UpstreamFailure(EndReason.TLS_STRICT_REFUSED, detail)
