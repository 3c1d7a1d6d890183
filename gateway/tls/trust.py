"""Loads what the gateway trusts and shows (certificates, keys and CRLs) into one OpenSSL Context.

In: the `[tls]` section of the configuration, files.  Out: a `TLSPolicy` that all sessions to a broker share, or
`ConfigError` with everything that is wrong with the files.  Sessions share one Context to keep each at a few
kilobytes: a Context per session would load the roots each time.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12
from OpenSSL import SSL, crypto

from gateway.config import TLS
from gateway.config.algorithms import is_of_tls_1_3
from gateway.config.secret_files import SecretUnavailable
from gateway.disk import MEBIBYTE, read_file
from gateway.errors import ConfigError
from gateway.tls.algorithms import Offer, client_hello
from gateway.tls.file_kinds import CERTIFICATE, CRL, KEY, described, is_pkcs12, is_truncated, names_a_token
from gateway.tls.strict import crl_problem

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
VerifyCallback = Callable[[SSL.Connection, crypto.X509, int, int, int], bool]
StapleCallback = Callable[[SSL.Connection, bytes, Any], bool]
_T = TypeVar("_T")
_LISTS = ("ciphers", "groups", "signature_algorithms")
_LARGEST_HELLO = 0x4000
LARGEST_PEM = 16 * MEBIBYTE
"""Of a file with certificates or keys: many times a bundle of all public roots."""
# Those of large CAs have some 10 MiB each, and one file may have several.
_LARGEST_CRLS = 64 * MEBIBYTE

# @SECLEVEL=2 refuses RSA below 2048 bits and SHA-1 signatures in the chain, whatever the platform's default is.
# TLS 1.2 is limited to what TLS 1.3 always has: forward secrecy and authenticated encryption.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"
_SECURITY_LEVEL = "@SECLEVEL=2"
# The bundles of Debian and Red Hat, for builds of OpenSSL that look elsewhere (as in wheels).
_PLATFORM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
_CERTIFICATE_BEGIN = b"-----BEGIN CERTIFICATE-----"
_MIN_VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}


@frozen(slots=True)
class ClientIdentity:
    """The certificate chain (leaf first) and the key that the gateway shows to the broker."""

    chain: tuple[x509.Certificate, ...]
    key: PrivateKey


@frozen(slots=True)
class TLSPolicy:
    """The TLS settings that sessions share.

    `client` is the identity that `context` shows the broker, `own` that of a device, which is given to each connection.
    `roots` is empty if the platform's roots are used.  `strict` requires the second opinion.  `crls_until` is when the
    first CRL is due to be replaced, in seconds since the epoch.  `resumption` allows session tickets.  `offer` is what
    the ClientHello offers, `offered` the same in few words.
    """

    context: SSL.Context
    roots: tuple[x509.Certificate, ...]
    alpn: tuple[str, ...]
    pins: frozenset[bytes]
    strict: bool
    client: ClientIdentity | None
    crls_until: float
    resumption: bool
    offer: Offer
    offered: str
    ocsp: Literal["off", "stapled", "must-staple"] = "off"
    own: ClientIdentity | None = None

    def introduce(self, connection: SSL.Connection) -> None:
        """Give a connection, before its handshake, the identity to show.  Raises `SSL.Error`."""
        if self.own is not None:
            connection.use_certificate(self.own.chain[0])
            connection.use_privatekey(self.own.key)


def read_chain(path: Path, passphrase: bytes | None = None) -> list[x509.Certificate]:
    """Read a client's certificate and those of its CAs: PEM, or PKCS #12.  Raises `ValueError` with the problem."""
    data = _read(path)
    return _pkcs12(data, passphrase)[0] if is_pkcs12(data) else read_certificates(path)


def read_client_key(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Read a client's private key: PEM, which may be encrypted, or PKCS #12.  Raises `ValueError` with the problem."""
    data = _read(path)
    return _pkcs12(data, passphrase)[1] if is_pkcs12(data) else _pem_key(data, passphrase, _IS_MISSING)


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Read all PEM certificates of a file.  Raises `ValueError` that says what is wrong with it."""
    data = _read(path)
    if b"-----BEGIN CERTIFICATE-----" not in data and b"-----BEGIN X509 CERTIFICATE-----" not in data:
        raise ValueError(described(data, CERTIFICATE))
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        if is_truncated(data):
            raise ValueError("is cut short: a certificate in it has no END line. Copy the file again") from None
        raise ValueError(f"contains a damaged certificate ({error})") from None


def read_crls(path: Path, *, strict: bool = False) -> list[x509.CertificateRevocationList]:
    """Read all PEM CRLs of a file, which must have CRL numbers if `strict`.  Raises `ValueError` with the problem."""
    begin = b"-----BEGIN X509 CRL-----"
    data = _read(path, _LARGEST_CRLS)
    parts = data.split(begin)[1:]
    if not parts:
        raise ValueError(described(data, CRL))
    try:
        crls = [x509.load_pem_x509_crl(begin + part) for part in parts]
        broken = next(filter(None, map(crl_problem, crls)), "") if strict else ""
    except ValueError as error:
        raise ValueError(f"contains a CRL that cannot be read ({error})") from None
    if broken:
        raise ValueError(f"contains a CRL with {broken}, which strict verification refuses; have the CA issue another")
    return crls


def lacks_passphrase(path: Path) -> bool:
    """Whether the private key in a file, PEM or PKCS #12, cannot be read without a passphrase."""
    try:
        read_client_key(path)
    except ValueError as problem:
        return _IS_MISSING in str(problem)
    return False


def read_private_key(path: Path) -> PrivateKey:
    """Read a PEM private key that is not encrypted.  Raises `ValueError` with the problem, without its content."""
    return _pem_key(_read(path), None, _DECRYPT)


def _pem_key(data: bytes, passphrase: bytes | None, when_encrypted: str) -> PrivateKey:
    """Return a private key; `when_encrypted` is the remedy if it needs a passphrase that is not there."""
    if names_a_token(data):
        raise ValueError(
            "names a key in a token or TPM, which the gateway cannot use itself: let a local nginx sign, "
            "see docs/hardware-keys.md"
        )
    if b"PRIVATE KEY-----" not in data:
        raise ValueError(described(data, KEY))
    try:
        # OpenSSL's check takes tens of milliseconds for an RSA key, in which no other thread runs; see _check_rsa.
        # A passphrase for a key that is not encrypted is an error to cryptography, but harms nobody.
        used = passphrase if b"ENCRYPTED" in data else None
        key = load_pem_private_key(data, password=used, unsafe_skip_rsa_key_validation=True)
        if isinstance(key, rsa.RSAPrivateKey):
            _check_rsa(key)
    except TypeError:
        raise ValueError(f"contains an encrypted private key: {when_encrypted}") from None
    except ValueError:
        if is_truncated(data):
            raise ValueError("is cut short: the private key in it has no END line. Copy the file again") from None
        if used is not None:
            raise ValueError(f"cannot be decrypted: {_IS_WRONG} `openssl pkey -noout -in FILE`") from None
        raise ValueError("contains a damaged private key") from None
    return _of_tls(key)


def _pkcs12(data: bytes, passphrase: bytes | None) -> tuple[list[x509.Certificate], PrivateKey]:
    """Return the chain, the own certificate first, and the key of PKCS #12.  Raises `ValueError` with the problem."""
    held = None
    # It may be unencrypted, or encrypted under an empty passphrase; a passphrase then harms nobody.
    for each in dict.fromkeys((passphrase, None, b"")):
        with contextlib.suppress(ValueError):
            held = load_pkcs12(data, each)
            break
    if held is None and passphrase is None:
        raise ValueError(f"is encrypted: {_IS_MISSING}")
    if held is None:
        raise ValueError(f"cannot be decrypted: {_IS_WRONG} `openssl pkcs12 -noout -in FILE`")
    if held.key is None or held.cert is None:
        remedy = "export it again with its private key, `openssl pkcs12 -export -inkey KEY -in CERTIFICATE -out FILE`"
        raise ValueError(f"contains no certificate with its private key: {remedy}")
    chain = [held.cert.certificate]
    others = [each.certificate for each in held.additional_certs]
    # They are in no particular order.  A root need not be shown.
    while chain[-1].issuer != chain[-1].subject:
        upper = next((each for each in others if each.subject == chain[-1].issuer), None)
        if upper is None or upper.issuer == upper.subject or upper in chain:
            break
        chain.append(upper)
    return chain, _of_tls(held.key)


def _of_tls(key: object) -> PrivateKey:
    if not isinstance(key, PrivateKey):
        # TRY004: it is the file that is wrong, not an argument's type.
        raise ValueError(f"contains a private key of a kind that TLS does not use ({type(key).__name__})")  # noqa: TRY004
    return key


_DECRYPT = "nobody can type its passphrase at start; decrypt it with `openssl pkey` and protect it by its file mode"
_IS_MISSING = (
    "write its passphrase to a file and name that in client_key_password_file, or name a systemd credential in "
    "client_key_password_credential"
)
_IS_WRONG = "the passphrase is wrong, or the file is damaged; test both with"


def _check_rsa(key: rsa.RSAPrivateKey) -> None:
    """Raise ValueError for an RSA key whose numbers do not belong together, or that does not sign (RFC 8017 §3.2)."""
    numbers = key.private_numbers()
    p, q, n = numbers.p, numbers.q, numbers.public_numbers.n
    if not (
        p * q == n
        and all(numbers.public_numbers.e * numbers.d % (prime - 1) == 1 for prime in (p, q))
        and (numbers.dmp1, numbers.dmq1) == (numbers.d % (p - 1), numbers.d % (q - 1))
        and numbers.iqmp * q % p == 1
    ):
        raise ValueError("not an RSA key")
    # Only primes give signatures that hold.
    try:
        key.public_key().verify(key.sign(b"", PKCS1v15(), SHA256()), b"", PKCS1v15(), SHA256())
    except InvalidSignature:
        raise ValueError("not an RSA key") from None


def read_roots(tls: TLS) -> tuple[tuple[x509.Certificate, ...], list[str]]:
    """Return the configured roots, and any problems."""
    roots: list[x509.Certificate] = []
    problems: list[str] = []
    for path in tls.ca_file:
        roots += _collect(problems, "tls.ca_file", path, read_certificates)
    if tls.ca_dir is not None:
        before = len(roots)
        try:
            files = ca_dir_files(tls.ca_dir)
        except OSError as error:
            problems.append(f"tls.ca_dir: {tls.ca_dir}: {error.strerror}")
            files = []
        for path in files:
            roots += _collect(problems, "tls.ca_dir", path, read_certificates)
        if len(roots) == before and not problems:
            problems.append(f"tls.ca_dir: {tls.ca_dir} contains no certificate (*.pem, *.crt or *.cer)")
    return tuple(roots), problems


def policy_files(tls: TLS) -> list[Path]:
    """Return the files that `load_policy` reads, including those of a directory or of the platform that exist."""
    files = [*tls.ca_file, *tls.crl_file]
    files += [path for path in (tls.client_cert, tls.client_key, tls.client_key_password_file) if path is not None]
    with contextlib.suppress(OSError, ValueError):
        if tls.ca_dir is not None:
            files += ca_dir_files(tls.ca_dir)
        elif not tls.ca_file:
            files.append(platform_bundle())
    return files


def ca_dir_files(directory: Path) -> list[Path]:
    """Return the files of a `ca_dir` that are read.  Raises `OSError`."""
    return sorted(path for path in directory.iterdir() if path.suffix in {".pem", ".crt", ".cer"})


def _is_pkcs12_file(path: Path) -> bool:
    try:
        return is_pkcs12(_read(path))
    except ValueError:
        return False  # said where it is read


def read_client_identity(
    tls: TLS, environment: Mapping[str, str] = os.environ
) -> tuple[ClientIdentity | None, list[str]]:
    """Return the gateway's own certificate and key, if configured, and any problems.

    `environment` says where the service's credentials are.
    """
    if tls.client_cert is None:
        return None, []
    problems: list[str] = []
    key_path = tls.client_key or tls.client_cert
    try:
        passphrase = tls.passphrase.read(environment)
    except SecretUnavailable as error:
        return None, [f"tls.{tls.passphrase.key}: {error}"]
    chain: list[x509.Certificate] = []
    keys: list[PrivateKey] = []
    if tls.client_key is None and _is_pkcs12_file(tls.client_cert):
        # Decrypted once for both.
        for held in _collect(
            problems, "tls.client_cert", tls.client_cert, lambda path: [_pkcs12(_read(path), passphrase)]
        ):
            chain, keys = held[0], [held[1]]
    else:
        chain = _collect(problems, "tls.client_cert", tls.client_cert, lambda path: read_chain(path, passphrase))
        keys = _collect(problems, "tls.client_key", key_path, lambda path: [read_client_key(path, passphrase)])
    if not chain or not keys:
        return None, problems
    if public_key_bytes(chain[0].public_key()) != public_key_bytes(keys[0].public_key()):
        problems.append(
            f"tls.client_key: {key_path} is not the key of the first certificate in {tls.client_cert}; "
            "put the certificate of this key first, then its CAs' certificates"
        )
        return None, problems
    return ClientIdentity(tuple(chain), keys[0]), problems


def load_policy(
    tls: TLS, verify: VerifyCallback, staple: StapleCallback, intermediates: Sequence[x509.Certificate] = ()
) -> TLSPolicy:
    """Build the policy that `tls` describes; `verify` is called for each certificate (SSL_CTX_set_verify).

    `staple` is called with the OCSP response that the broker sent, `b""` for none, if `tls` asks for one.

    `intermediates` are shown after the certificates of devices, where `tls` has none of the gateway's.
    Raises `ConfigError` with every problem in every file.
    """
    strict = tls.verification == "strict"
    roots, problems = read_roots(tls)
    client, client_problems = read_client_identity(tls)
    problems += client_problems
    crls: list[x509.CertificateRevocationList] = []
    for path in tls.crl_file:
        crls += _collect(problems, "tls.crl_file", path, lambda path: read_crls(path, strict=strict))
    if problems:
        raise ConfigError(problems)

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(_MIN_VERSIONS[tls.min_version])
    _set_algorithms(context, tls)
    # No TLS 1.2 tickets (the option does not affect 1.3): they would put a session's keys on the wire, encrypted with a
    # key that brokers keep for long.  OpenSSL's own cache does not know what a ticket is bound to.
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_verify(SSL.VERIFY_PEER, verify)
    if tls.ocsp != "off":
        context.set_ocsp_client_callback(staple)
    store = context.get_cert_store()
    if store is None:
        raise ConfigError(["tls: OpenSSL gave a Context without a certificate store"])
    if tls.ca_file or tls.ca_dir is not None:
        for root in roots:
            store.add_cert(crypto.X509.from_cryptography(root))
    else:
        context.set_default_verify_paths()
        platform_roots.cache_clear()  # They may have changed.
    if crls:
        for crl in crls:
            store.add_crl(crl)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
    if strict:
        store.set_flags(crypto.X509StoreFlags.X509_STRICT)
    if tls.alpn:
        context.set_alpn_protos([name.encode("ascii") for name in tls.alpn])
    if client is not None:
        _show(context, client, tls)
    for certificate in intermediates:
        context.add_extra_chain_cert(certificate)
    return TLSPolicy(
        context=context,
        roots=roots,
        alpn=tls.alpn,
        pins=tls.pin_digests,
        strict=strict,
        client=client,
        crls_until=_first_next_update(crls),
        resumption=tls.resumption,
        offer=_offer(context, tls),
        offered=_offered(tls),
        ocsp=tls.ocsp,
    )


def _set_algorithms(context: SSL.Context, tls: TLS) -> None:
    """Let a Context offer the algorithms of `tls`.  Raises `ConfigError`."""
    of_tls_1_3 = [cipher for cipher in tls.ciphers if is_of_tls_1_3(cipher)]
    of_tls_1_2 = [cipher for cipher in tls.ciphers if not is_of_tls_1_3(cipher)]
    try:
        context.set_cipher_list(":".join((*(of_tls_1_2 or [_CIPHERS]), _SECURITY_LEVEL)).encode())
        if of_tls_1_3:
            context.set_tls13_ciphersuites(":".join(of_tls_1_3).encode())
    except SSL.Error:
        raise ConfigError([f"tls.ciphers: the installed OpenSSL has not all of {', '.join(tls.ciphers)}"]) from None
    for key in ("groups", "signature_algorithms"):
        names = getattr(tls, key)
        if not names:
            continue
        try:
            # Not at the top of the module: the import itself may fail.
            from gateway.tls.direct import set_list

            is_done = set_list(context, key, names)
        except (ImportError, AttributeError, TypeError):
            remedy = "install the versions that the gateway was made for, or leave the key out"
            raise ConfigError([f"tls.{key}: the installed pyOpenSSL cannot set it; {remedy}"]) from None
        if not is_done:
            raise ConfigError([f"tls.{key}: the installed OpenSSL has not all of {', '.join(names)}"])


def _offer(context: SSL.Context, tls: TLS) -> Offer:
    """Return what the gateway's ClientHello offers.  Raises `ConfigError` if something configured is not in it.

    OpenSSL leaves out silently what its security level, its build or `min_version` forbid.
    """
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        pass
    except SSL.Error as error:
        keys = ", ".join(f"tls.{key}" for key in _LISTS if getattr(tls, key)) or "tls"
        words = f"OpenSSL cannot begin a handshake with these ({_reasons(error)}); name more of them"
        raise ConfigError([f"{keys}: {words}"]) from None
    offer = client_hello(connection.bio_read(_LARGEST_HELLO))
    missing = offer.missing(tls.ciphers, tls.groups, tls.signature_algorithms)
    if missing:
        why = f'the installed OpenSSL does not offer it with min_version = "{tls.min_version}"; remove it'
        raise ConfigError([f"tls.{key}: {name}: {why}" for key, name in missing])
    return offer


def _offered(tls: TLS) -> str:
    """Return what is offered, for the log: what is configured, and the defaults in few words."""
    ciphers = ", ".join(tls.ciphers) or "ECDHE or DHE with AES-GCM or ChaCha20-Poly1305"
    groups = ", ".join(tls.groups) or "X25519, P-256, X448, P-384, P-521, ffdhe2048, ffdhe3072 and those with ML-KEM"
    parts = [f"TLS {tls.min_version} or later", f"ciphers {ciphers}", f"groups {groups}"]
    if tls.signature_algorithms:
        parts.append(f"signature algorithms {', '.join(tls.signature_algorithms)}")
    return "; ".join(parts)


def _first_next_update(crls: list[x509.CertificateRevocationList]) -> float:
    # A CRL without nextUpdate never falls due (RFC 5280 §5.1.2.5 requires nextUpdate).
    due = [crl.next_update_utc for crl in crls]
    return min((each.timestamp() for each in due if each is not None), default=float("inf"))


def _show(context: SSL.Context, client: ClientIdentity, tls: TLS) -> None:
    try:
        context.use_certificate(client.chain[0])
        for certificate in client.chain[1:]:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(client.key)
        context.check_privatekey()
    except SSL.Error as error:
        words = _reasons(error)
        remedy = "use at least RSA 2048 or P-256, signed with SHA-256"
        raise ConfigError([f"tls.client_cert: {tls.client_cert} is refused by OpenSSL ({words}); {remedy}"]) from None


def _reasons(error: SSL.Error) -> str:
    queue = error.args[0] if error.args else []
    return "; ".join(str(reason) for _, _, reason in queue) or "no reason given"


def spki_pin(certificate: x509.Certificate) -> bytes:
    """Return the pin of a certificate's key: the SHA-256 of its SubjectPublicKeyInfo (RFC 7469 §2.4), 32 bytes."""
    return sha256(public_key_bytes(certificate.public_key())).digest()


def platform_bundle() -> Path:
    """Return the file with the platform's roots.  Raises `ValueError` if there is none."""
    paths = ssl.get_default_verify_paths()
    candidates = (paths.cafile, *_PLATFORM_BUNDLES)
    bundle = next((Path(path) for path in candidates if path and Path(path).is_file()), None)
    if bundle is None:
        raise ValueError("this machine has no bundle of root certificates; install ca-certificates or set tls.ca_file")
    return bundle


@cache
def platform_roots() -> tuple[x509.Certificate, ...]:
    """Return the platform's roots, for the second opinion; OpenSSL reads them from the same place.

    Raises `OSError` or `ValueError` if there are none, which refuses the session.
    """
    # One by one: bundles have contained certificates that a stricter parser rejects; the others are still usable.
    roots = []
    for part in _read(platform_bundle()).split(_CERTIFICATE_BEGIN)[1:]:
        with contextlib.suppress(ValueError):
            roots.append(x509.load_pem_x509_certificate(_CERTIFICATE_BEGIN + part))
    if not roots:
        raise ValueError(f"{platform_bundle()} contains no readable certificate")
    return tuple(roots)


def public_key_bytes(public_key: PublicKeyTypes) -> bytes:
    """Return the SubjectPublicKeyInfo (RFC 5280 §4.1.2.7) in DER."""
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path, limit: int = LARGEST_PEM) -> bytes:
    try:
        return read_file(path, limit)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _collect(problems: list[str], key: str, path: Path, read: Callable[[Path], list[_T]]) -> list[_T]:
    try:
        return read(path)
    except ValueError as error:
        problems.append(f"{key}: {path} {error}")
        return []
