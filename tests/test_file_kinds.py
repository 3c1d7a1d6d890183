"""What a file holds instead of what it should: each has words and a command of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    pkcs7,
    pkcs12,
)

from gateway.tls.trust import read_certificates, read_crls, read_private_key
from tests.pki import certify, revocation_list

LEAF = certify()
REQUEST = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(LEAF.key, hashes.SHA256())
CRL = x509.load_pem_x509_crl(revocation_list(LEAF))
DER_KEY = LEAF.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
P12 = pkcs12.serialize_key_and_certificates(b"x", LEAF.key, LEAF.certificate, None, BestAvailableEncryption(b"x"))
TRUSTED = LEAF.pem.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE")

CASES: dict[str, tuple[Callable[[Path], Any], bytes, str]] = {
    "empty": (read_certificates, b"\n", "is empty"),
    "UTF-16": (read_certificates, LEAF.pem.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (read_certificates, LEAF.pem.decode().encode("utf-16-le"), "UTF-16"),
    "DER": (read_certificates, LEAF.certificate.public_bytes(Encoding.DER), "openssl x509 -inform der"),
    "PKCS #12": (read_certificates, P12, "openssl pkcs12 -nodes"),
    "PKCS #7": (
        read_certificates,
        pkcs7.serialize_certificates([LEAF.certificate], Encoding.PEM),
        "openssl pkcs7 -print_certs -in",
    ),
    "PKCS #7 in DER": (
        read_certificates,
        pkcs7.serialize_certificates([LEAF.certificate], Encoding.DER),
        "openssl pkcs7 -inform der -print_certs",
    ),
    "TRUSTED CERTIFICATE": (read_certificates, TRUSTED, "openssl x509 -in FILE"),
    "CSR": (read_certificates, REQUEST.public_bytes(Encoding.PEM), "a certificate signing request: send it to a CA"),
    "CSR in DER": (read_certificates, REQUEST.public_bytes(Encoding.DER), "a certificate signing request"),
    "CRL": (read_certificates, CRL.public_bytes(Encoding.PEM), "tls.crl_file"),
    "a key": (read_certificates, LEAF.key_pem, "contains a private key, but no certificate: perhaps the two files"),
    "truncated": (read_certificates, LEAF.pem[:-40], "is cut short"),
    "damaged": (read_certificates, LEAF.pem.replace(LEAF.pem[60:90], b"A" * 30), "damaged certificate"),
    "text": (read_certificates, b"hello", "contains no PEM certificate"),
    "key: a certificate": (read_private_key, LEAF.pem, "a certificate: perhaps the two files are swapped"),
    "key: PKCS #11 URI": (read_private_key, b"pkcs11:object=x;pin-value=1\n", "names a key in a token or TPM"),
    "key: PKCS #11 URI in PEM": (
        read_private_key,
        LEAF.pem + b"-----BEGIN PKCS#11 PROVIDER URI-----\nAAAA\n-----END PKCS#11 PROVIDER URI-----\n",
        "names a key in a token or TPM",
    ),
    "key: TPM": (
        read_private_key,
        b"-----BEGIN TSS2 PRIVATE KEY-----\nAAAA\n-----END TSS2 PRIVATE KEY-----\n",
        "names a key in a token or TPM",
    ),
    "key: DER": (read_private_key, DER_KEY, "openssl pkey -inform der"),
    "key: public": (
        read_private_key,
        LEAF.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "a public key",
    ),
    "key: truncated": (read_private_key, LEAF.key_pem[:-40], "is cut short"),
    "key: empty": (read_private_key, b"", "is empty"),
    "CRL: DER": (read_crls, CRL.public_bytes(Encoding.DER), "openssl crl -inform der"),
    "CRL: a certificate": (read_crls, LEAF.pem, "a certificate"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_holds_instead_is_named(tmp_path: Path, name: str) -> None:
    """Without anything of its content."""
    read, data, words = CASES[name]
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r".") as caught:
        read(path)
    assert words in str(caught.value)
    assert "MII" not in str(caught.value)
