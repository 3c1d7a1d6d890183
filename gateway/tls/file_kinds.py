"""Names what a file contains instead of the PEM that was expected, and how to convert it.

In: the file's content.  Out: words that follow the file's name, without any of its content.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key

CERTIFICATE, KEY, CRL = "certificate", "private key", "CRL"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LABEL = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_IN_HARDWARE = re.compile(rb"-----BEGIN (PKCS#11 PROVIDER URI|TSS2 (KEY BLOB|PRIVATE KEY))-----")
_CONTENT_TYPE_PKCS7 = bytes.fromhex("06092a864886f70d0107")  # 1.2.840.113549.1.7

_REQUEST = "a certificate signing request: send it to a CA, and use the certificate that it issues"
_PKCS7 = "PKCS #7: convert it with `openssl pkcs7 -print_certs -in FILE -out FILE.pem`"
# What PEM labels mean where something else was expected.
_OTHER_LABELS = {
    b"CERTIFICATE REQUEST": _REQUEST,
    b"NEW CERTIFICATE REQUEST": _REQUEST,
    b"PKCS7": _PKCS7,
    b"CMS": _PKCS7,
    b"TRUSTED CERTIFICATE": "OpenSSL's own format: convert it with `openssl x509 -in FILE -out FILE.pem`",
    b"PUBLIC KEY": "a public key: use the certificate, or the private key",
    b"OPENSSH PRIVATE KEY": "an SSH key: convert a copy with `ssh-keygen -p -N '' -m PKCS8 -f COPY`",
    b"CERTIFICATE": "a certificate: perhaps the two files are swapped",
    b"X509 CRL": "a CRL: name it in tls.crl_file",
}


def described(data: bytes, wanted: str) -> str:
    """Say what is wrong with a file that should contain `wanted` in PEM, and does not."""
    if not data.strip():
        return "is empty"
    if data.startswith(_UTF_16) or b"\0-\0-\0B" in data:
        return "is UTF-16 text: save it as plain ASCII or UTF-8"
    labels = _LABEL.findall(data)
    if any(b"PRIVATE KEY" in label for label in labels) and wanted != KEY:
        return f"contains a private key, but no {wanted}: perhaps the two files are swapped"
    for label in labels:
        if label in _OTHER_LABELS:
            return f"contains no PEM {wanted} but {_OTHER_LABELS[label]}"
    if data[:1] == b"\x30":
        return f"contains no PEM {wanted} but {_binary(data)}"
    return f"contains no PEM {wanted}"


def names_a_token(data: bytes) -> bool:
    """Say whether it names a key in a token or TPM (for a provider or an engine of OpenSSL) instead of having one."""
    return data.lstrip().startswith(b"pkcs11:") or _IN_HARDWARE.search(data) is not None


def is_pkcs12(data: bytes) -> bool:
    """Say whether it is PKCS #12: PFX ::= SEQUENCE { version INTEGER 3, … } (RFC 7292 §4)."""
    return data[:1] == b"\x30" and b"\x02\x01\x03\x30" in data[:12]


def is_truncated(data: bytes) -> bool:
    """Say whether a PEM block begins and does not end."""
    return data.count(b"-----BEGIN ") > data.count(b"-----END ")


def _binary(data: bytes) -> str:
    """Say what ASN.1 in DER is."""
    if is_pkcs12(data):
        return "PKCS #12, which only client_cert and client_key read: convert it with `openssl pkcs12 -nodes`"
    if _CONTENT_TYPE_PKCS7 in data[:24]:
        return "PKCS #7 in DER: convert it with `openssl pkcs7 -inform der -print_certs -in FILE -out FILE.pem`"
    if _parses(x509.load_der_x509_certificate, data):
        return "DER: convert it with `openssl x509 -inform der -in FILE -out FILE.pem`"
    if _parses(x509.load_der_x509_csr, data):
        return _REQUEST
    if _parses(x509.load_der_x509_crl, data):
        return "a CRL in DER: convert it with `openssl crl -inform der -in FILE -out FILE.pem`"
    if _parses(lambda der: load_der_private_key(der, None), data):
        return "a private key in DER: convert it with `openssl pkey -inform der -in FILE -out FILE.pem`"
    return "binary data"


def _parses(load: Callable[[bytes], object], data: bytes) -> bool:
    try:
        load(data)
    except (ValueError, TypeError):
        return False
    return True
