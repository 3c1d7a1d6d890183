"""Certificates of every kind for tests, right ones by default, so that a test shows only what is wrong.

In: keyword arguments.  Out: `Certified`, a certificate with its key and its issuer; files and servers made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.harness import ServerTLS

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
NOW = datetime.now(UTC).replace(microsecond=0)

# The OBJECT IDENTIFIERs of RSA signatures (RFC 8017, RFC 4055) differ in their last byte.
_RSA_SIGNATURE = bytes.fromhex("2a864886f70d0101")
_SHA256_WITH_RSA = 0x0B
_WEAK_HASHES: dict[str, tuple[int, hashes.HashAlgorithm]] = {
    "MD5": (0x04, hashes.MD5()),  # noqa: S303  to be refused
    "SHA-1": (0x05, hashes.SHA1()),  # noqa: S303  to be refused
}


@frozen(eq=False)
class Certified:
    """A certificate, its key, and who issued it (`None`: itself)."""

    certificate: x509.Certificate
    key: PrivateKey
    issuer: Certified | None

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def chain(self) -> list[Certified]:
        """What a server should send: this and all issuers below the root."""
        if self.issuer is None or self.issuer.issuer is None:
            return [self]
        return [self, *self.issuer.chain]

    def server(self, *, chain: Sequence[Certified] | None = None) -> ServerTLS:
        """Make a server of it; `chain` overrides what it sends."""
        sent = self.chain if chain is None else chain
        return ServerTLS(b"".join(each.pem for each in sent), self.key_pem)

    def write(self, path: Path) -> Path:
        """Write chain and key into one file, as a client certificate is configured."""
        path.write_bytes(b"".join(each.pem for each in self.chain) + self.key_pem)
        return path


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return an RSA key; there is one of each size, since making them takes long."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def name(common_name: str) -> x509.Name:
    """Write a distinguished name; empty text gives an empty one."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def general_name(text: str) -> x509.GeneralName:
    """Read `DNS:…`, `IP:…`, `email:…` or `URI:…`, the names in certificates."""
    kind, _, value = text.partition(":")
    if kind == "IP":
        return x509.IPAddress(ip_network(value) if "/" in value else ip_address(value))
    kinds = {"DNS": x509.DNSName, "email": x509.RFC822Name, "URI": x509.UniformResourceIdentifier}
    return kinds[kind](value)


def certify(
    issuer: Certified | None = None,
    *,
    subject: str = "broker",
    names: Sequence[str] = ("DNS:localhost",),
    names_critical: bool = False,
    valid_from: float = -1,
    valid_for: float = 90,
    ca: bool | None = False,
    ca_critical: bool = True,
    path_length: int | None = None,
    key_usage: bool = True,
    signs_certificates: bool | None = None,
    purposes: Sequence[x509.ObjectIdentifier] = (SERVER,),
    permitted: Sequence[str] = (),
    excluded: Sequence[str] = (),
    constraints_critical: bool = True,
    policy_constraints_critical: bool | None = None,
    authority_key_identifier: bool = True,
    subject_key_identifier: bool = True,
    digital_signature: bool = True,
    key: PrivateKey | None = None,
) -> Certified:
    """Issue a broker's certificate; without `issuer` it is signed by itself.

    Times are days: `valid_from` counts from now.  `ca=None` leaves basicConstraints out, no `names` the
    subjectAltName, no `purposes` the extended key usage, `policy_constraints_critical=None` the policy constraints.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    start = NOW + timedelta(days=valid_from)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(issuer.certificate.subject if issuer else name(subject))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=valid_for))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(map(general_name, names)), names_critical)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, path_length), ca_critical)
    if key_usage:
        usage = _key_usage(bool(ca) if signs_certificates is None else signs_certificates, digital_signature)
        builder = builder.add_extension(usage, critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if permitted or excluded:
        constraints = x509.NameConstraints(_constraints(permitted), _constraints(excluded))
        builder = builder.add_extension(constraints, constraints_critical)
    if policy_constraints_critical is not None:
        builder = builder.add_extension(x509.PolicyConstraints(0, None), policy_constraints_critical)
    if subject_key_identifier:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if authority_key_identifier:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(authority, critical=False)
    return Certified(builder.sign(signer, hashes.SHA256()), key, issuer)


def certify_ca(issuer: Certified | None = None, **arguments: Any) -> Certified:
    """Issue a CA's certificate: a root without `issuer`, an intermediate with it."""
    defaults = {"subject": "Intermediate CA" if issuer else "Root CA", "names": (), "ca": True, "purposes": ()}
    return certify(issuer, **defaults | arguments)


def revocation_list(
    issuer: Certified,
    *revoked: Certified,
    valid_from: float = -1,
    valid_for: float = 30,
    signer: Certified | None = None,
    number: int | None = 1,
    number_critical: bool = False,
) -> bytes:
    """Issue a CRL as PEM; `signer` signs it in the issuer's place.  Times are days, as for `certify`."""
    start = NOW + timedelta(days=valid_from)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(start)
        .next_update(start + timedelta(days=valid_for))
    )
    if number is not None:
        builder = builder.add_extension(x509.CRLNumber(number), number_critical)
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number).revocation_date(start)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign((signer or issuer).key, hashes.SHA256()).public_bytes(Encoding.PEM)


def signed_with(hash_name: str, certified: Certified) -> Certified:
    """Sign a certificate of an RSA issuer anew with `MD5` or `SHA-1`, which no library does any more."""
    last, weak = _WEAK_HASHES[hash_name]
    before, after = (_RSA_SIGNATURE + bytes([each]) for each in (_SHA256_WITH_RSA, last))
    body = certified.certificate.tbs_certificate_bytes.replace(before, after)
    return _sealed(body, certified, weak)


def as_version_1(certified: Certified) -> Certified:
    """Make a version 1 certificate of it: without version field and extensions (RFC 5280 §4.1.2.1)."""
    fields = elements(elements(certified.certificate.tbs_certificate_bytes)[0][1])
    kept = b"".join(element(tag, content) for tag, content in fields if tag not in {0xA0, 0xA3})
    return _sealed(element(0x30, kept), certified)


def with_serial(certified: Certified, serial: int) -> Certified:
    """Give a certificate another serial number, below 128, and sign it anew."""
    fields = elements(elements(certified.certificate.tbs_certificate_bytes)[0][1])
    assert fields[1][0] == 0x02
    fields[1] = (0x02, bytes([serial]))
    return _sealed(element(0x30, b"".join(element(tag, content) for tag, content in fields)), certified)


def with_bytes_replaced(certified: Certified, before: bytes, after: bytes) -> Certified:
    """Replace bytes in a certificate by as many others and sign it anew: what no builder agrees to write."""
    assert len(before) == len(after)
    body = certified.certificate.tbs_certificate_bytes
    assert before in body
    return _sealed(body.replace(before, after), certified)


def _key_usage(signs_certificates: bool, digital_signature: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _constraints(names: Sequence[str]) -> list[x509.GeneralName] | None:
    return [general_name(each) for each in names] or None


def _sealed(body: bytes, certified: Certified, digest: hashes.HashAlgorithm | None = None) -> Certified:
    """Sign a TBSCertificate with the issuer's key and put the three parts together (RFC 5280 §4.1)."""
    signer = certified.issuer.key if certified.issuer else certified.key
    digest = digest or hashes.SHA256()
    if isinstance(signer, rsa.RSAPrivateKey):
        signature = signer.sign(body, padding.PKCS1v15(), digest)
    else:
        signature = signer.sign(body, ec.ECDSA(digest))
    # The algorithm stands in the body already: as its first SEQUENCE, before the issuer.
    algorithm = next(content for tag, content in elements(elements(body)[0][1]) if tag == 0x30)
    der = element(0x30, body + element(0x30, algorithm) + element(0x03, b"\0" + signature))
    return Certified(x509.load_der_x509_certificate(der), certified.key, certified.issuer)


def element(tag: int, content: bytes) -> bytes:
    """Write a DER element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def elements(data: bytes) -> list[tuple[int, bytes]]:
    """Read a row of DER elements: tags and contents."""
    elements = []
    while data:
        tag, size, start = data[0], data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        elements.append((tag, data[start : start + size]))
        data = data[start + size :]
    return elements
