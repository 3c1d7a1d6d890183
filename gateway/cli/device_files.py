"""Files in the directory of device rules: for each device a TOML file, and its key and certificate beside it.

In: Client Identifiers, keys of `[[device]]` with their values, a CA.  Out: files, written completely or not at all.

A file is named after the Client Identifier if that is a safe file name; otherwise after its safe characters and a
digest.  So no Client Identifier can name a file outside the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from attrs import define, frozen
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.disk import read_file, sync_directory
from gateway.errors import GatewayError
from gateway.text import printable
from gateway.tls.renewal import signing_hash
from gateway.tls.trust import PrivateKey, read_certificates, read_private_key

_FIT = re.compile(r"[A-Za-z0-9_@:-][A-Za-z0-9._@:-]{0,99}")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")
_WILDCARD = re.compile(r"([*?\[])")
_EXACT = re.compile(r"\[([*?\[])\]")
# X.520: upper bound of a common name, in characters.
LONGEST_COMMON_NAME = 64
# The broker's clock may be behind the CA's.
_BACKDATED = timedelta(hours=1)
# The modes of keys and passwords: for their owner alone; for the service's group, too.
SECRET, SECRET_OF_GROUP = 0o600, 0o640
PUBLIC = 0o644
KEY_TYPES = ("p256", "rsa2048")


class DeviceProblem(GatewayError):
    """A `device` command failed; `str()` names the file or option, the cause and the remedy."""


@frozen
class Files:
    """The paths of one device's files, whether or not they exist."""

    rule: Path
    key: Path
    request: Path
    certificate: Path
    password: Path

    @classmethod
    def of(cls, directory: Path, client_identifier: str) -> Files:
        """Return the paths for a Client Identifier."""
        stem = stem_of(client_identifier)
        return cls(*(directory / f"{stem}{end}" for end in (".toml", "-key.pem", ".csr.pem", ".pem", ".password")))


def stem_of(client_identifier: str) -> str:
    """Return the file name of a device's files, without suffix."""
    # A name with such an ending could collide with another device's key or request.
    if _FIT.fullmatch(client_identifier) and not client_identifier.endswith(("-key", ".csr")):
        return client_identifier
    digest = sha256(client_identifier.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{_UNFIT.sub('_', client_identifier)[:40]}-{digest}"


def as_argument(client_identifier: str) -> str:
    """Return a Client Identifier as a shell's argument; one that cannot be printed is escaped, and not to be copied."""
    return shlex.quote(client_identifier if client_identifier.isprintable() else printable(client_identifier))


def exact_pattern(client_identifier: str) -> str:
    """Return the pattern that matches only this Client Identifier."""
    return _WILDCARD.sub(r"[\1]", client_identifier)


def identifier_of(pattern: str) -> str | None:
    """Return the Client Identifier that a pattern of `exact_pattern` matches; `None` if it matches several."""
    client_identifier = _EXACT.sub(r"\1", pattern)
    return client_identifier if exact_pattern(client_identifier) == pattern else None


def rule_text(client_identifier: str, table: Mapping[str, Any], remark: str = "") -> str:
    """Write a device's rule as TOML.  Raises `DeviceProblem` if the table says which device it is for."""
    if "match_client_id" in table:
        raise DeviceProblem("match_client_id cannot be set: a device's own rule is for its Client Identifier")
    lines = [f"# {remark}"] if remark else []
    # Written even where the file name would do, so that the file can be renamed and other conditions added.
    lines.append(f"match_client_id = {toml(exact_pattern(client_identifier))}")
    lines += [f"{key} = {toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings use JSON's escapes, and also escape DEL; they cannot contain surrogates.
        text = json.dumps(value, ensure_ascii=False)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DeviceProblem("a value contains an unpaired surrogate, which TOML cannot store")
        # Whoever prints the file must see the name as it is: U+202E, for one, reverses what comes after it.
        return "".join(each if each.isprintable() else _escaped(each) for each in text)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(each) for each in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    raise DeviceProblem(f"a rule cannot contain a value of type {type(value).__name__}")


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"


@define
class Writer:
    """Creates new files, `written`, and replaces files; undoes all of it if one cannot be written.

    In the end all of it is on disk, or nothing, after a power failure too.
    """

    written: list[Path]
    _replaced: list[tuple[Path, bytes]]

    @classmethod
    @contextlib.contextmanager
    def all_or_nothing(cls) -> Iterator[Writer]:
        """Yield a writer; an exception undoes what it wrote."""
        writer = cls([], [])
        try:
            yield writer
            writer._sync()
        except BaseException:  # Ctrl-C, too, must not leave half a device behind
            for path in writer.written:
                path.unlink(missing_ok=True)
            for path, data in reversed(writer._replaced):
                _replace(path, data)
            with contextlib.suppress(DeviceProblem):
                writer._sync()
            raise

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a file atomically; it keeps its mode, owner and group.  Raises `DeviceProblem`."""
        path = path.resolve()
        try:
            before = read_file(path)
            _replace(path, data)
        except OSError as error:
            raise DeviceProblem(f"{path} cannot be written: {error.strerror}") from None
        self._replaced.append((path, before))

    def _sync(self) -> None:
        """Have the entries of all directories on disk.  Raises `DeviceProblem`."""
        sync_directories([*self.written, *(path for path, _ in self._replaced)])

    def write(self, path: Path, data: bytes, mode: int, group: int | None = None) -> None:
        """Create a file atomically, with its final mode from the start.  Raises `DeviceProblem`."""
        part = path.with_name(f".{path.name}.part")
        try:
            part.unlink(missing_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    if group is not None:
                        os.fchown(file.fileno(), -1, group)
                    os.fchmod(file.fileno(), mode)  # independent of the umask
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                # Unlike a rename, a link does not overwrite.
                path.hardlink_to(part)
                self.written.append(path)
            finally:
                part.unlink(missing_ok=True)
        except FileExistsError:
            remedy = (
                "If no device uses it any more, delete it. To replace the device, use `device remove ID --keys` first"
            )
            raise DeviceProblem(f"{path} already exists. {remedy}") from None
        except OSError as error:
            raise DeviceProblem(f"{path} cannot be written: {error.strerror}") from None


def sync_directories(files: Iterable[Path]) -> None:
    """Have the directories of these files, written or removed, on disk: each once.  Raises `DeviceProblem`."""
    for directory in {path.parent: None for path in files}:
        try:
            sync_directory(directory)
        except OSError as error:
            raise DeviceProblem(f"{directory} cannot be written: {error.strerror}") from None


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    status = path.stat()
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """Return a rule's text with keys set, or removed where the value is `None`; other lines stay as they are.

    Raises `DeviceProblem` if a key is written in a way that only a person can edit.
    """
    wanted = {**tomllib.loads(text), **changes}
    # TOML knows no other line ends; `splitlines` does.
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.removesuffix("\n").removesuffix("\r").split(end)
    for key, value in changes.items():
        own = re.compile(rf"\s*{re.escape(key)}\s*=")
        at = next((index for index, line in enumerate(lines) if own.match(line)), len(lines))
        lines[at : at + 1] = [] if value is None else [f"{key} = {toml(value)}"]
    result = end.join([*lines, ""])
    try:
        is_right = tomllib.loads(result) == {key: value for key, value in wanted.items() if value is not None}
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise DeviceProblem(f"the rule cannot be edited automatically: set {', '.join(changes)} in it by hand")
    return result


def make_key(kind: str) -> PrivateKey:
    """Make a private key of one of `KEY_TYPES`."""
    if kind == "rsa2048":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """Encode a private key (PEM, PKCS #8)."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Encode a certificate (PEM)."""
    return certificate.public_bytes(Encoding.PEM)


def public_pem(file: Path) -> bytes:
    """Return the certificates in a file, and nothing else of it, such as a key.  Raises `DeviceProblem`."""
    try:
        return b"".join(certificate_pem(each) for each in read_certificates(file))
    except ValueError as error:
        raise DeviceProblem(f"{file} {error}") from None


def request_pem(key: PrivateKey, common_name: str) -> bytes:
    """Make a certificate signing request (PEM, RFC 2986) for a device.  Raises `DeviceProblem`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(common_name))
    return builder.sign(key, signing_hash(key)).public_bytes(Encoding.PEM)


@frozen
class Authority:
    """A CA that issues devices' certificates."""

    certificate: x509.Certificate
    key: PrivateKey

    @classmethod
    def read(cls, certificate: Path, key: Path) -> Authority:
        """Read the CA's certificate and key.  Raises `DeviceProblem`."""
        try:
            certified, private = read_certificates(certificate)[0], read_private_key(key)
        except ValueError as error:
            raise DeviceProblem(f"{certificate if 'certificate' in str(error) else key} {error}") from None
        if private.public_key() != certified.public_key():
            raise DeviceProblem(f"{key} is not the key of {certificate}")
        try:
            constraints = certified.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            constraints = None
        if constraints is None or not constraints.ca:
            raise DeviceProblem(f"{certificate} is not a CA certificate. Use the CA that the broker trusts")
        return cls(certified, private)

    def issue(self, key: PrivateKey, common_name: str, days: int, now: datetime) -> x509.Certificate:
        """Issue a device's certificate (RFC 5280), for TLS clients only.  Raises `DeviceProblem`."""
        start, end = now - _BACKDATED, now + timedelta(days=days)
        if end > self.certificate.not_valid_after_utc:
            raise DeviceProblem(
                f"the CA's certificate expires on {self.certificate.not_valid_after_utc:%Y-%m-%d}, before the device's "
                f"certificate would. Use fewer --days than {days}"
            )
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=False,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        public = key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(start, self.certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        return builder.sign(self.key, signing_hash(self.key))


def _subject(common_name: str) -> x509.Name:
    check_common_name(common_name)
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def check_common_name(common_name: str) -> None:
    """Raise `DeviceProblem` if a certificate cannot have this common name."""
    if not 1 <= len(common_name) <= LONGEST_COMMON_NAME:
        raise DeviceProblem(
            f"a common name has 1 to {LONGEST_COMMON_NAME} characters, this one has {len(common_name)}. "
            "Set another with --common-name"
        )


def now() -> datetime:
    """Return the time of day."""
    return datetime.now(UTC)
