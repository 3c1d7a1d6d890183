"""Certificates for the simulation's brokers, made once per process.

In: a directory for the CA's file.  Out: OpenSSL server contexts, of a right broker and of wrong ones.  Keys are Ed25519
and sessions are not resumed, so that the messages of a handshake have the same lengths in every run: ciphertext is what
a seed cannot repeat, its length is what the virtual network cuts by.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from gateway.errors import EndReason

# Host names of brokers; the last one is dialled by its address.
HOSTS = ("one.broker.test", "two.broker.test", "10.9.0.3")

# What is wrong with a broker's certificate, and the reason that a session must end with.
FAULTS = {
    "wrong-name": EndReason.TLS_NAME_MISMATCH,
    "no-name": EndReason.TLS_NAME_MISMATCH,
    "wildcard": EndReason.TLS_NAME_MISMATCH,
    "unknown-ca": EndReason.TLS_UNTRUSTED_CHAIN,
    "expired": EndReason.TLS_EXPIRED,
    "not-yet-valid": EndReason.TLS_NOT_YET_VALID,
}


class _Authority:
    def __init__(self, name: str) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self.certificate = self._build(self._name, self._key, -1, 3650).add_extension(constraints, critical=True)
        self.certificate = self.certificate.sign(self._key, None)

    def issue(self, names: list[x509.GeneralName], first_day: int, last_day: int) -> tuple[x509.Certificate, object]:
        key = Ed25519PrivateKey.generate()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOSTS[0])])
        builder = self._build(subject, key, first_day, last_day)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, None), key

    def _build(self, subject: x509.Name, key: Ed25519PrivateKey, first: int, last: int) -> x509.CertificateBuilder:
        today = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(0x1000)
            .not_valid_before(today + timedelta(days=first))
            .not_valid_after(today + timedelta(days=last))
        )


class Identities:
    """Server contexts by what is wrong with them ("right" if nothing is) and by TLS version ("1.2", "1.3")."""

    def __init__(self, directory: Path) -> None:
        trusted, unknown = _Authority("trusted"), _Authority("unknown")
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(trusted.certificate.public_bytes(Encoding.PEM))
        self.jwt_key = directory / "jwt-key.pem"
        key = ec.generate_private_key(ec.SECP256R1())
        self.jwt_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        right: list[x509.GeneralName] = [x509.DNSName(host) for host in HOSTS[:2]]
        right.append(x509.IPAddress(ip_address(HOSTS[2])))
        issued = {
            "right": trusted.issue(right, -1, 365),
            "wrong-name": trusted.issue([x509.DNSName("other.test")], -1, 365),
            "no-name": trusted.issue([], -1, 365),
            "wildcard": trusted.issue([x509.DNSName("*")], -1, 365),
            "unknown-ca": unknown.issue(right, -1, 365),
            "expired": trusted.issue(right, -30, -1),
            "not-yet-valid": trusted.issue(right, 1, 365),
        }
        self.contexts = {
            (kind, version): _server_context(version, *pair)
            for kind, pair in issued.items()
            for version in ("1.2", "1.3")
        }


def _server_context(version: str, certificate: x509.Certificate, key: object) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION if version == "1.2" else SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.use_certificate(certificate)
    context.use_privatekey(key)  # type: ignore[arg-type]  # pyOpenSSL takes cryptography's keys
    return context
