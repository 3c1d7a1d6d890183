"""Checks the files of a configuration.

In: a configuration.  Out: a `Step` for each file of `[tls]`; of the rules' files, a `Step` for each that has a problem,
and one that counts the rest, which may be thousands.

A world-writable file is a FAIL: any local user could change whom the gateway trusts, or its identity.  A world-readable
private key is a FAIL too: any local user could impersonate the gateway.  A group-readable key is a WARN unless root
owns it: root:SERVICE 0640 is the usual way to give a service a key.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from attrs import evolve
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway.cli.certificates import expiry, first_to_expire, is_ca, issuer, now, subject
from gateway.cli.report import Status, Step
from gateway.cli.service_view import KEY_GROUP, ServiceView
from gateway.config import TLS, Config, DeviceRule, weak_ciphers
from gateway.config import Status as StatusEndpoint
from gateway.config.secret_files import Passphrase, SecretUnavailable, read_secret
from gateway.disk import read_file
from gateway.rules.tokens import check_signing_key, sas_key
from gateway.text import printable
from gateway.tls.file_kinds import is_pkcs12
from gateway.tls.renewal import obstacle
from gateway.tls.trust import (
    LARGEST_PEM,
    ca_dir_files,
    platform_bundle,
    read_certificates,
    read_chain,
    read_client_key,
    read_crls,
    read_private_key,
    spki_pin,
)

_STEP = "file"
_T = TypeVar("_T")


def _whatever_it_holds(look: Callable[[Path, _T], Step]) -> Callable[[Path, _T], Step]:
    """Turn a parse error of `look` into a failed step."""

    def step(path: Path, content: _T) -> Step:
        try:
            return look(path, content)
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            return _step(Status.FAIL, path, f"contains a malformed certificate ({error})", "Have it reissued.")

    return step


def file_steps(config: Config, view: ServiceView | None = None) -> Iterator[Step]:
    """Check each file that `config` names; with `view`, also whether the service can read it."""
    for step in (*_tls_steps(config.tls), *_proxy_steps(config), *_status_steps(config.status)):
        yield _as_seen(step, view)
    yield from _renewal(config.tls, view)
    for key, words in weak_ciphers(config):
        remedy = "Remove it as soon as the broker has a better one."
        yield Step(_STEP, Status.WARN, f"{key}: weaker than the defaults: {words}", remedy)
    yield from _rule_steps(config, view)


def _as_seen(step: Step, view: ServiceView | None) -> Step:
    """Return a step, failed if the service cannot read its file."""
    if view is None or step.status is Status.FAIL or "path" not in step.facts:
        return step
    path = Path(step.facts["path"])
    obstacle = view.obstacle(path)
    if not obstacle:
        return step
    remedy = _readable_remedy(path, secret=step.facts["secret"])
    return Step(_STEP, Status.FAIL, f"{path}: {view.unit} cannot read it: {obstacle}", remedy, facts=step.facts)


def _readable_remedy(path: Path, *, secret: bool) -> str:
    if not secret:
        return f"chmod o+r {path}; directories above it need o+x."
    return (
        f"chgrp {KEY_GROUP} {path} && chmod 640 {path}; or move it to the directory credentials beside the "
        "configuration, and restart the service."
    )


def _tls_steps(tls: TLS) -> Iterator[Step]:
    if tls.ca_file or tls.ca_dir is not None:
        for path in tls.ca_file:
            yield _roots(path)
    else:
        yield _platform_roots()
    if tls.ca_dir is not None:
        yield from _directory(tls.ca_dir)
    yield from _same_names(tls)
    if tls.client_cert is not None:
        yield from _client(tls.client_cert, tls.client_key or tls.client_cert, tls.passphrase)
    for path in tls.crl_file:
        yield _crls(path, strict=tls.verification == "strict")


def _proxy_steps(config: Config) -> Iterator[Step]:
    for upstream in config.upstream:
        for path in upstream.proxy_ca_file:
            yield _roots(path)
        if upstream.request_file is not None:
            yield _secret(upstream.request_file, "request", read_secret)
        if upstream.proxy_password_file is not None:
            yield _secret(upstream.proxy_password_file, "password", read_secret)


def _status_steps(status: StatusEndpoint) -> Iterator[Step]:
    if status.server_cert is not None:
        yield from _client(status.server_cert, status.server_key or status.server_cert, Passphrase())


def _same_names(tls: TLS) -> Iterator[Step]:
    """Warn of CA certificates that OpenSSL cannot tell apart: it chooses an issuer by name, then by key identifier."""
    by_name: dict[bytes, dict[bytes, x509.Certificate]] = {}
    for path in (*tls.ca_file, *(_listed(tls.ca_dir) if tls.ca_dir is not None else ())):
        try:
            for certificate in read_certificates(path):
                by_name.setdefault(certificate.subject.public_bytes(), {})[spki_pin(certificate)] = certificate
        except (ValueError, OSError):
            continue  # said where the file is looked at
    for alike in by_name.values():
        certificates = list(alike.values())
        if len(certificates) > 1 and not all(_has_key_identifier(each) for each in certificates):
            message = f"{len(certificates)} CAs with different keys are named {subject(certificates[0])}"
            remedy = "Without key identifiers the wrong one may be tried. Keep only the one that issued the broker's."
            yield Step(_STEP, Status.WARN, message, remedy)


def _listed(directory: Path) -> list[Path]:
    try:
        return ca_dir_files(directory)
    except OSError:
        return []


def _has_key_identifier(certificate: x509.Certificate) -> bool:
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return False
    return True


def _rule_steps(config: Config, view: ServiceView | None) -> Iterator[Step]:
    """Check the rules for devices and their files."""
    checked = passed = 0
    if config.devices.directory is not None and view is not None:
        yield from _unseen_rules(config.devices.directory, view)
    for device in config.device:
        for step in (*_device_steps(device), *_renewal(device, view), *_credential_steps(device, view)):
            seen = _as_seen(step, view)
            checked += 1
            if seen.status is Status.PASS:
                passed += 1
            else:
                yield evolve(seen, message=f"rule {printable(device.name)}: {seen.message}")
    if passed:
        rules, share = _count(config.device, "rule"), str(passed) if passed == checked else f"{passed} of {checked}"
        yield Step(_STEP, Status.PASS, f"{rules}: {share} keys, certificates and passwords passed")


def _unseen_rules(directory: Path, view: ServiceView) -> Iterator[Step]:
    """Yield what keeps the service from reading the directory of rules."""
    for path in (directory, *sorted(directory.glob("*.toml"))):
        obstacle = view.obstacle(path)
        if obstacle:
            remedy = f"chmod o+r{'x' if path.is_dir() else ''} {path}; directories above it need o+x."
            yield _step(Status.FAIL, path, f"{view.unit} cannot read it: {obstacle}", remedy)


def _device_steps(device: DeviceRule) -> Iterator[Step]:
    if device.client_cert is not None:
        yield from _client(device.client_cert, device.client_key or device.client_cert, device.passphrase)
    if device.sas_key_file is not None:
        yield _secret(device.sas_key_file, "SAS key", lambda path: sas_key(read_secret(path)))
    if device.jwt_key_file is not None:
        yield _secret(device.jwt_key_file, "signing key", lambda path: check_signing_key(read_private_key(path)))
    if device.password_file is not None:
        yield _secret(device.password_file, "password", read_secret)
    if device.password_command:
        yield _program(Path(device.password_command[0]), "password_command")
    for key in ("publish", "subscribe"):
        if getattr(device, f"{key}_prefix") and getattr(device, key) is None:
            message = f"{key}_prefix leaves topics that begin with $ as they are, and {key} permits them all"
            remedy = f"Set {key} to the Topic Filters that the device needs; # matches none that begin with $."
            yield Step(_STEP, Status.WARN, message, remedy)


def _credential_steps(device: DeviceRule, view: ServiceView | None) -> Iterator[Step]:
    """Check that a credential comes from a file; only the service has the credential itself."""
    for directory in view.credentials if view is not None else ():
        prefix = f"{directory.name}_"
        path = directory / device.password_credential.removeprefix(prefix)
        if device.password_credential.startswith(prefix) and not path.exists():
            message = f"no file for password_credential {printable(device.password_credential)}"
            yield _step(Status.FAIL, path, message, "Create it, and restart the service.", secret=True)


def _secret(path: Path, what: str, read: Callable[[Path], object]) -> Step:
    """Check a file with a secret."""
    try:
        read(path)
        mode = path.stat().st_mode
    except SecretUnavailable as error:
        words = str(error).removeprefix(f"{path} ")
        return _step(Status.FAIL, path, words, _unreadable(path) if "cannot be read" in words else "", secret=True)
    except (OSError, ValueError) as error:
        return _step(Status.FAIL, path, str(error), secret=True)
    return _mode_step(path, mode, what) or _blank_step(path, what) or _step(Status.PASS, path, what, secret=True)


def _blank_step(path: Path, what: str) -> Step | None:
    """Return a warning if a password has white space around it, which is sent; keys are read without it."""
    if what != "password":
        return None
    password = read_secret(path)
    if password == password.strip():
        return None
    message = "the password begins or ends with white space, which is sent too"
    return _step(Status.WARN, path, message, "Remove it, unless it belongs to the password.", secret=True)


def _exposed_key(path: Path) -> Step | None:
    """Return a failure if a file with certificates, which everyone may read, has a private key in it, too."""
    if not path.stat().st_mode & stat.S_IROTH or b"PRIVATE KEY-----" not in read_file(path, LARGEST_PEM):
        return None
    remedy = "Move the key to a file of its own with mode 0600, and replace it, because anyone can have read it."
    return _step(Status.FAIL, path, "contains a private key and is world-readable", remedy)


def _mode_step(path: Path, mode: int, what: str) -> Step | None:
    """Return what is wrong with the mode of a file with a secret, if anything."""
    shown = f"mode {stat.S_IMODE(mode):04o}"
    if mode & stat.S_IWOTH:
        return _step(Status.FAIL, path, f"world-writable ({shown})", f"chmod o-w {path}, and check its content.")
    if mode & stat.S_IROTH:
        return _step(Status.FAIL, path, f"{what} is world-readable ({shown})", f"chmod o= {path}, and replace it.")
    if mode & stat.S_IRGRP and path.stat().st_uid != 0:
        remedy = f"chmod g= {path}, or make root its owner: root:{KEY_GROUP} 0640."
        return _step(Status.WARN, path, f"{what} is group-readable ({shown})", remedy, secret=True)
    return None


def _renewal(table: TLS | DeviceRule, view: ServiceView | None) -> Iterator[Step]:
    """Check what a renewal needs: the program, and the right to replace the file."""
    if not table.renew_command or table.client_cert is None:
        return
    yield _program(Path(table.renew_command[0]), "renew_command")
    file = table.client_cert
    problem = obstacle(file) if view is None else view.unwritable(file)
    if problem:
        remedy = "Keep it in /var/lib/mqtts-gateway, or run `mqtts-gateway device renew --due` from a timer."
        yield _step(Status.WARN, file, f"the gateway cannot replace it when it is renewed: {problem}", remedy)
    with contextlib.suppress(OSError):
        if is_pkcs12(read_file(file, LARGEST_PEM)):
            yield _step(Status.FAIL, file, "renew_command cannot renew PKCS #12", "Convert it to PEM files.")


def _program(path: Path, key: str) -> Step:
    if path.is_absolute() and not os.access(path, os.X_OK):
        why = "is not executable" if path.exists() else "does not exist"
        return _step(Status.FAIL, path, f"{key}: {why}", "Correct its path, or install the program.")
    return Step(_STEP, Status.PASS, f"{path}: {key}")


def _roots(path: Path) -> Step:
    certificates = _read(path, read_certificates)
    return certificates if isinstance(certificates, Step) else _exposed_key(path) or _roots_step(path, certificates)


@_whatever_it_holds
def _roots_step(path: Path, certificates: Sequence[x509.Certificate]) -> Step:
    expired = [certificate for certificate in certificates if expiry(certificate)[0] is Status.FAIL]
    if expired and all(certificate.not_valid_before_utc > now() for certificate in expired):
        message = f"{len(expired)} of {_count(certificates)} not yet valid: {_dated(expired)}"
        status = Status.FAIL if len(expired) == len(certificates) else Status.WARN
        return _step(status, path, message, f"Check this machine's clock first: it says {now():%Y-%m-%d %H:%M} UTC.")
    if len(expired) == len(certificates):
        return _step(
            Status.FAIL, path, f"no CA certificate is valid: {_dated(expired)}", "Get the CA's current certificate."
        )
    if expired:
        message = f"{len(expired)} of {_count(certificates)} not valid: {_dated(expired)}"
        return _step(Status.WARN, path, message, "Remove the certificates that are no longer valid.")
    others = [certificate for certificate in certificates if not is_ca(certificate)]
    if others:
        message = f"{subject(others[0])} is not a CA certificate (basicConstraints)"
        return _step(Status.WARN, path, message, "Use the CA's certificate, unless the broker's is self-signed.")
    message = f"{_count(certificates)}; {_dated(certificates)}"
    status, _ = expiry(first_to_expire(certificates))
    return _step(
        status, path, message, "Get the CA's next certificate before this one expires." if status is Status.WARN else ""
    )


def _platform_roots() -> Step:
    try:
        bundle = platform_bundle()
        # Counted, not parsed: platform bundles contain old certificates that parsers warn about.
        count = read_file(bundle, LARGEST_PEM).count(b"-----BEGIN CERTIFICATE-----")
    except (OSError, ValueError) as error:
        return Step(_STEP, Status.FAIL, str(error), "Without CA certificates no broker is trusted.")
    return _step(Status.PASS, bundle, f"{count} certificates (the platform's: neither ca_file nor ca_dir is set)")


def _directory(directory: Path) -> Iterator[Step]:
    try:
        files = ca_dir_files(directory)
    except OSError as error:
        yield _step(Status.FAIL, directory, f"cannot be read: {error.strerror}", _unreadable(directory))
        return
    if not files:
        yield _step(Status.FAIL, directory, "contains no *.pem, *.crt or *.cer", "Put the CA's certificate there.")
    for path in files:
        yield _roots(path)


def _client(certificate_path: Path, key_path: Path, source: Passphrase) -> Iterator[Step]:
    if source.file is not None:
        yield _secret(source.file, "passphrase", read_secret)
    try:
        passphrase = source.read()
    except SecretUnavailable as error:
        if source.file is None:
            remedy = "Name a file in client_key_password_file instead, or check as the service does."
            yield Step(_STEP, Status.FAIL, f"{source.key}: {error}", remedy)
        return
    chain = _read(certificate_path, lambda path: read_chain(path, passphrase))
    if isinstance(chain, Step):
        yield chain
        return
    yield (_exposed_key(certificate_path) if certificate_path != key_path else None) or _chain(certificate_path, chain)
    key = _read(key_path, lambda path: [read_client_key(path, passphrase)])
    if isinstance(key, Step):
        yield key
        return
    if key[0].public_key() != chain[0].public_key():
        message = f"is not the key of the first certificate in {certificate_path}, {subject(chain[0])}"
        remedy = "Put the gateway's own certificate first, then its CAs'; or name the matching key."
        yield _step(Status.FAIL, key_path, message, remedy)
        return
    mode = key_path.stat().st_mode
    message = f"private key of {certificate_path.name}, mode {stat.S_IMODE(mode):04o}"
    yield _mode_step(key_path, mode, "private key") or _step(Status.PASS, key_path, message, secret=True)


@_whatever_it_holds
def _chain(path: Path, chain: Sequence[x509.Certificate]) -> Step:
    leaf = chain[0]
    for lower, upper in pairwise(chain):
        if not _issued(lower, upper):
            message = f"{subject(lower)} was not issued by the certificate after it, {subject(upper)}"
            return _step(
                Status.FAIL,
                path,
                message,
                "Put the key's own certificate first, then each issuer.",
            )
    status, words = expiry(leaf)
    order = " in the right order" if len(chain) > 1 else ""
    message = f"client certificate {subject(leaf)}, issuer {issuer(leaf)}, {_count(chain)}{order}; {words}"
    if status is not Status.PASS:
        return _step(status, path, message, "Renew it: brokers reject a certificate that is not valid.")
    if not _is_for_clients(leaf):
        remedy = "Have it reissued with the extended key usage clientAuth: many brokers require it."
        return _step(Status.WARN, path, f"{message}; not issued for TLS clients (extendedKeyUsage)", remedy)
    return _step(Status.PASS, path, message)


def _crls(path: Path, *, strict: bool) -> Step:
    crls = _read(path, lambda path: read_crls(path, strict=strict))
    if isinstance(crls, Step):
        return crls
    time = now()
    dated = [(crl.next_update_utc, crl.issuer.rfc4514_string()) for crl in crls]
    late = [name for next_update, name in dated if next_update is not None and next_update < time]
    if late:
        remedy = "Get the current CRL: until then every broker below this CA is rejected (tls-crl-unusable)."
        return _step(Status.FAIL, path, f"the CRL of {late[0]} has expired", remedy)
    known = [(next_update, name) for next_update, name in dated if next_update is not None]
    if not known:
        return _step(Status.PASS, path, f"{_count(crls, 'CRL')}, without a date for the next update")
    next_update, name = min(known)
    words = f"next update, of {name}, due by {next_update:%Y-%m-%d %H:%M} UTC"
    return _step(Status.PASS, path, f"{_count(crls, 'CRL')}; {words}")


def _read(path: Path, read: Callable[[Path], list[_T]]) -> list[_T] | Step:
    """Return the content of a file, or a failed step."""
    try:
        found = read(path)
        mode = path.stat().st_mode
    except OSError as error:
        return _step(Status.FAIL, path, f"cannot be read: {error.strerror}", _unreadable(path))
    except ValueError as error:
        return _step(Status.FAIL, path, str(error), _unreadable(path) if "cannot be read: " in str(error) else "")
    if mode & stat.S_IWOTH:
        message = f"world-writable (mode {stat.S_IMODE(mode):04o})"
        return _step(Status.FAIL, path, message, f"chmod o-w {path}, and check its content.")
    return found


def _step(status: Status, path: Path, message: str, remedy: str = "", *, secret: bool = False) -> Step:
    return Step(_STEP, status, f"{path}: {message}", remedy, facts={"path": str(path), "secret": secret})


def _unreadable(path: Path) -> str:
    """Return what to do about a file that cannot be read."""
    try:
        if path.exists():
            return "" if os.access(path, os.R_OK) else _reader()
        above = next(parent for parent in path.parents if parent.exists())
        if above != path.parent:
            return f"Correct the path: there is no {path.parent}; {above} exists."
        alike = get_close_matches(path.name, [each.name for each in above.iterdir()], n=1)
    except OSError:
        return _reader()
    hint = f" Is {printable(alike[0])} meant?" if alike else ""
    return f"Correct the path, or create the file: {above} does not contain it.{hint}"


def _reader() -> str:
    return f"This check runs as {_user()}. Run it as the gateway's user, and give that user read access to the file."


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "an unnamed user"


def _count(things: Sequence[object], kind: str = "certificate") -> str:
    return f"{len(things)} {kind}{'s' if len(things) > 1 else ''}"


def _dated(certificates: Sequence[x509.Certificate]) -> str:
    first = first_to_expire(certificates)
    return f"{subject(first)}: {expiry(first)[1]}"


def _issued(lower: x509.Certificate, upper: x509.Certificate) -> bool:
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_for_clients(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}.isdisjoint(usage)
