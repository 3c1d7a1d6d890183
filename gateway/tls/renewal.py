"""Renews client certificates: the request, the checks of what a CA gives back, the files.

In: a certificate with its key, the output of a program, the time of day.  Out: a certificate signing request, a checked
chain, a replaced file; `RenewalFailed` with what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from attrs import frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway import MADE
from gateway.config import TLS, DeviceRule
from gateway.disk import read_file, sync_directory
from gateway.errors import GatewayError
from gateway.text import printable
from gateway.tls.file_kinds import is_pkcs12
from gateway.tls.trust import LARGEST_PEM, ClientIdentity, PrivateKey, public_key_bytes, read_client_identity

Renewable: TypeAlias = TLS | DeviceRule
"""The table of the configuration that names the certificate."""

_CERTIFICATE = re.compile(rb"-----BEGIN (X509 )?CERTIFICATE-----.*?-----END (X509 )?CERTIFICATE-----[ \t]*\r?\n?", re.S)
# The part of the lifetime after which a certificate is due.
_DUE = 2 / 3


class RenewalFailed(GatewayError):
    """A certificate was not renewed; `str()` says why."""


@frozen
class Held:
    """A certificate that may be renewed: its file as it is now, and what was read from it."""

    file: Path
    content: bytes
    identity: ClientIdentity

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return self.identity.chain[0]


def read_held(table: Renewable) -> Held:
    """Read a table's certificate and key.  Raises `RenewalFailed`."""
    if table.client_cert is None:
        raise RenewalFailed("client_cert is not set")
    try:
        file = table.client_cert.resolve(strict=True)
        content = read_file(file, LARGEST_PEM)
    except OSError as error:
        raise RenewalFailed(f"{table.client_cert} cannot be read: {error.strerror}") from None
    if is_pkcs12(content):
        raise RenewalFailed(f"{file} is PKCS #12, which cannot be renewed: convert it to PEM files with openssl pkcs12")
    identity, problems = read_client_identity(
        TLS(
            client_cert=table.client_cert,
            client_key=table.client_key,
            client_key_password_file=table.client_key_password_file,
            client_key_password_credential=table.client_key_password_credential,
        )
    )
    if identity is None:
        raise RenewalFailed("; ".join(problem.removeprefix("tls.") for problem in problems))
    return Held(file, content, identity)


def due_at(certificate: x509.Certificate, share: float = _DUE) -> datetime:
    """Return when this share of a certificate's lifetime is over."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return start + (end - start) * share


def check_clock(certificate: x509.Certificate, now: datetime) -> None:
    """Raise `RenewalFailed` if the time of day cannot be right."""
    earliest = max(MADE, certificate.not_valid_before_utc)
    if now < earliest:
        raise RenewalFailed(f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, which cannot be right: set it first")


def obstacle(file: Path) -> str:
    """Return why this process cannot replace a file; "" if it can."""
    with contextlib.suppress(OSError):
        file = file.resolve(strict=True)
    if os.access(file.parent, os.W_OK | os.X_OK):
        return ""
    return f"{file.parent} is not writable for this process"


def key_for(identity: ClientIdentity, *, rotate: bool) -> PrivateKey:
    """Return the key of the next certificate: the same, or a new one of the same kind."""
    key = identity.key
    if not rotate:
        return key
    if isinstance(key, rsa.RSAPrivateKey):
        return rsa.generate_private_key(public_exponent=65537, key_size=key.key_size)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return ec.generate_private_key(key.curve)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return ed25519.Ed25519PrivateKey.generate()
    return ed448.Ed448PrivateKey.generate()


def signing_hash(key: PrivateKey) -> hashes.SHA256 | None:
    """Return the hash to sign with; Edwards curves have their own."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()


def request_for(leaf: x509.Certificate, key: PrivateKey) -> bytes:
    """Return a certificate signing request (RFC 2986, PEM) with the names of `leaf`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(leaf.subject)
    names = _alt_names(leaf)
    if names is not None:
        builder = builder.add_extension(names.value, critical=names.critical)
    return builder.sign(key, signing_hash(key)).public_bytes(Encoding.PEM)


def checked_chain(output: bytes, key: PrivateKey, before: x509.Certificate, now: datetime) -> list[x509.Certificate]:
    """Return the chain in a program's output, which may replace `before`.  Raises `RenewalFailed`."""
    if b"PRIVATE KEY-----" in output:
        raise RenewalFailed("renew_command wrote a private key; it must write certificates only")
    try:
        chain = x509.load_pem_x509_certificates(output)
        _check_chain(chain, key, before, now)
    except (ValueError, TypeError) as error:
        raise RenewalFailed(f"renew_command wrote no usable certificate ({error})") from None
    return chain


def _check_chain(chain: list[x509.Certificate], key: PrivateKey, before: x509.Certificate, now: datetime) -> None:
    leaf = chain[0]
    if public_key_bytes(leaf.public_key()) != public_key_bytes(key.public_key()):
        raise RenewalFailed("the new certificate is not for the key of the request")
    if leaf.subject != before.subject:
        names = f"{_shown(leaf.subject)} instead of {_shown(before.subject)}"
        raise RenewalFailed(f"the new certificate has another subject: {names}")
    old, new = _alt_names(before), _alt_names(leaf)
    if set(old.value if old is not None else ()) != set(new.value if new is not None else ()):
        raise RenewalFailed("the new certificate has other subjectAltNames than the old one")
    for lower, upper in pairwise(chain):
        try:
            lower.verify_directly_issued_by(upper)
        except (ValueError, TypeError, InvalidSignature):
            raise RenewalFailed(
                f"{_shown(lower.subject)} was not issued by the certificate after it, {_shown(upper.subject)}"
            ) from None
    for each in chain:
        start, end = each.not_valid_before_utc, each.not_valid_after_utc
        if not start <= now < end:
            raise RenewalFailed(f"{_shown(each.subject)} is valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}")
    if leaf.not_valid_after_utc <= max(before.not_valid_after_utc, now + timedelta(minutes=1)):
        raise RenewalFailed(
            f"the new certificate expires no later than the old one, on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )


def replace(held: Held, chain: list[x509.Certificate], new_key: PrivateKey | None) -> None:
    """Replace the file atomically, and keep the one before as `NAME.old`.  Raises `RenewalFailed`.

    A private key in the file stays, unless there is a `new_key`.
    """
    content = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    if new_key is None:
        content += _CERTIFICATE.sub(b"", held.content).lstrip()
    else:
        content += new_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    part, kept = (held.file.with_name(f".{held.file.name}.{secrets.token_hex(8)}{end}") for end in (".new", ".old"))
    try:
        if read_file(held.file, LARGEST_PEM) != held.content:
            raise RenewalFailed(f"{held.file} has been changed meanwhile")
        like = held.file.stat()
        _write(part, content, like)
        # Not a link: the kernel refuses one to another user's file (proc(5), protected_hardlinks).
        _write(kept, held.content, like)
        kept.replace(held.file.with_name(f"{held.file.name}.old"))
        part.replace(held.file)
        sync_directory(held.file.parent)
    except OSError as error:
        raise RenewalFailed(f"{held.file} cannot be replaced: {error.strerror}") from None
    finally:
        for each in (part, kept):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)


def _write(path: Path, content: bytes, like: os.stat_result) -> None:
    """Write a new file with the mode and, where the kernel permits it, the owner of another."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        own = os.fstat(descriptor)
        for old, new, owner in ((like.st_uid, own.st_uid, True), (like.st_gid, own.st_gid, False)):
            if old != new:
                # Only root can give a file away.  Otherwise it belongs to this process's user, which reads it.
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, old if owner else -1, -1 if owner else old)
        os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _alt_names(certificate: x509.Certificate) -> x509.Extension[x509.SubjectAlternativeName] | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return None


def _shown(name: x509.Name) -> str:
    return printable(name.rfc4514_string()) or "an empty subject"
