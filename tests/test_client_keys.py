"""`client_cert` and `client_key` in PKCS #12 and encrypted PEM, with the passphrase from a file or a credential."""

from __future__ import annotations

import base64
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)

from gateway.config import TLS, from_mapping
from gateway.config.devices import DeviceRule
from gateway.errors import ConfigError
from gateway.rules.credentials import key_files, read_keys
from gateway.tls.channel import make_policy
from gateway.tls.devices import DevicePolicies
from gateway.tls.trust import ClientIdentity, policy_files, read_client_identity, read_private_key
from tests.pki import CLIENT, Certified, certify, certify_ca, rsa_key
from tests.tools import require_tool

PASSPHRASE = b"correct horse"
ROOT = certify_ca()
MIDDLE = certify_ca(ROOT, subject="middle")
LEAF = certify(MIDDLE, subject="gateway", names=(), purposes=(CLIENT,))
STRANGER = certify_ca(subject="stranger")


def p12(encryption: KeySerializationEncryption, *, key: bool = True, others: tuple[Certified, ...] = ()) -> bytes:
    """Return PKCS #12 with the leaf, and these."""
    private = LEAF.key if key else None
    certificate = LEAF.certificate if key else None
    extra = [each.certificate for each in others or (ROOT, STRANGER, MIDDLE)]
    return pkcs12.serialize_key_and_certificates(b"gateway", private, certificate, extra, encryption)


def pem(encryption: KeySerializationEncryption, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    """Return the leaf's key."""
    return LEAF.key.private_bytes(Encoding.PEM, form, encryption)


ENCRYPTED = BestAvailableEncryption(PASSPHRASE)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with the leaf in all forms."""
    contents = {
        "chain.pem": LEAF.certificate.public_bytes(Encoding.PEM) + MIDDLE.certificate.public_bytes(Encoding.PEM),
        "pkcs8.pem": pem(ENCRYPTED),
        "traditional.pem": pem(ENCRYPTED, PrivateFormat.TraditionalOpenSSL),
        "plain.pem": pem(NoEncryption()),
        "both.p12": p12(ENCRYPTED),
        "plain.p12": p12(NoEncryption()),
        "certificates.p12": p12(ENCRYPTED, key=False),
        "both.pem": LEAF.certificate.public_bytes(Encoding.PEM)
        + MIDDLE.certificate.public_bytes(Encoding.PEM)
        + pem(ENCRYPTED),
        "right": PASSPHRASE + b"\n",
        "wrong": b"incorrect horse\n",
        "empty": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def settings(files: Path, **names: str) -> dict[str, Any]:
    """Return keys of `[tls]` or a rule, with paths."""
    return {key: files / name if name and not key.endswith("credential") else name for key, name in names.items()}


@pytest.mark.parametrize(
    "names",
    [
        {"client_cert": "chain.pem", "client_key": "pkcs8.pem"},
        {"client_cert": "chain.pem", "client_key": "traditional.pem"},
        {"client_cert": "chain.pem", "client_key": "plain.pem"},
        {"client_cert": "both.pem"},
        {"client_cert": "both.p12"},
        {"client_cert": "plain.p12"},
        {"client_cert": "both.p12", "client_key": "pkcs8.pem"},
        {"client_cert": "chain.pem", "client_key": "both.p12"},
    ],
)
@pytest.mark.parametrize("source", [{"client_key_password_file": "right"}, {"client_key_password_credential": "right"}])
def test_each_form_gives_the_same_identity(
    files: Path, names: dict[str, str], source: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `[tls]` and in a rule; the chain in its order, without the root and without certificates of others."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(files))
    keys = settings(files, **names, **source)
    client, problems = read_client_identity(TLS(**keys))
    assert not problems
    assert client is not None
    assert client.chain == (LEAF.certificate, MIDDLE.certificate)
    assert client.key.public_key() == LEAF.key.public_key()
    shown = make_policy(TLS(ca_file=(files / "chain.pem",), **keys)).client
    assert shown is not None
    assert shown.chain == client.chain
    read = read_keys(DeviceRule(**keys))
    assert (read.client is not None, read.problems) == (True, ())


def test_an_unencrypted_file_needs_no_passphrase(files: Path) -> None:
    """PKCS #12 without one."""
    client, problems = read_client_identity(TLS(**settings(files, client_cert="plain.p12")))
    assert (client is not None, problems) == (True, [])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"client_cert": "both.p12"}, "tls.client_cert: *both.p12 is encrypted: write its passphrase to a file"),
        (
            {"client_cert": "chain.pem", "client_key": "pkcs8.pem"},
            "tls.client_key: *contains an encrypted private key: write",
        ),
        (
            {"client_cert": "both.p12", "client_key_password_file": "wrong"},
            "tls.client_cert: *cannot be decrypted: the passphrase is wrong, *`openssl pkcs12 -noout",
        ),
        (
            {"client_cert": "chain.pem", "client_key": "pkcs8.pem", "client_key_password_file": "wrong"},
            "tls.client_key: *cannot be decrypted: the passphrase is wrong, *`openssl pkey -noout",
        ),
        (
            {"client_cert": "both.p12", "client_key_password_file": "nowhere"},
            "tls.client_key_password_file: *nowhere cannot be read: No such file",
        ),
        (
            {"client_cert": "both.p12", "client_key_password_file": "empty"},
            "tls.client_key_password_file: *empty: the password is empty",
        ),
        (
            {"client_cert": "both.p12", "client_key_password_credential": "right"},
            "tls.client_key_password_credential: credential right not found: CREDENTIALS_DIRECTORY is not set",
        ),
        (
            {"client_cert": "certificates.p12", "client_key_password_file": "right"},
            "tls.client_cert: *contains no certificate with its private key: export it again",
        ),
    ],
)
def test_each_mistake_has_its_own_remedy(files: Path, names: dict[str, str], words: str) -> None:
    """Without the passphrase or any of the key."""
    client, problems = read_client_identity(TLS(**settings(files, **names)), {})
    assert client is None
    (problem,) = problems
    at = 0
    for part in words.split("*"):
        assert part in problem[at:], problem
        at = problem.index(part, at) + len(part)
    assert "horse" not in problem
    assert "MII" not in problem


@pytest.mark.parametrize("legacy", [False, True], ids=["modern", "legacy"])
def test_what_openssl_exports_is_read(files: Path, legacy: bool) -> None:
    """With its defaults, and as old programs do (RC2 and 3DES)."""
    openssl = require_tool("openssl")
    command = [openssl, "pkcs12", "-export", "-in", "chain.pem", "-inkey", "plain.pem", "-out", "openssl.p12"]
    command += ["-passout", "file:right", *(["-legacy"] if legacy else [])]
    subprocess.run(command, cwd=files, check=True, capture_output=True)
    keys = settings(files, client_cert="openssl.p12", client_key_password_file="right")
    client, problems = read_client_identity(TLS(**keys))
    assert not problems
    assert client is not None
    assert client.chain == (LEAF.certificate, MIDDLE.certificate)


def test_a_passphrase_that_would_have_no_effect_is_refused() -> None:
    """Without a certificate, and from two sources; in `[tls]` and in a rule."""
    for table in ("tls", "device"):
        for keys, words in (
            ({"client_key_password_file": "x"}, "client_cert is missing"),
            ({"client_key_password_credential": "x"}, "client_cert is missing"),
            (
                {"client_cert": "c", "client_key_password_file": "x", "client_key_password_credential": "y"},
                "a passphrase has one source",
            ),
            ({"client_cert": "c", "client_key_password_credential": "../x"}, "not a credential name"),
        ):
            with pytest.raises(ConfigError, match=words):
                from_mapping({"upstream": [{"host": "a"}], table: keys if table == "tls" else [keys]})


def test_the_passphrase_s_file_is_watched(files: Path) -> None:
    """A renewed key comes with another passphrase."""
    keys = settings(files, client_cert="both.p12", client_key_password_file="right")
    assert files / "right" in policy_files(TLS(**keys))
    assert files / "right" in key_files(DeviceRule(**keys))
    config = from_mapping(
        {"upstream": [{"host": "a"}], "tls": {"client_cert": "a.p12", "client_key_password_file": "b"}}, files
    )
    assert config.tls.client_key_password_file == files / "b"


def test_certificates_of_a_wrong_kind_are_not_shown(files: Path) -> None:
    """A loop among the certificates of PKCS #12 ends."""
    own = certify(STRANGER, subject="stranger", names=(), purposes=(CLIENT,), ca=True)
    data = pkcs12.serialize_key_and_certificates(b"x", own.key, own.certificate, [own.certificate], NoEncryption())
    (files / "loop.p12").write_bytes(data)
    client, problems = read_client_identity(TLS(**settings(files, client_cert="loop.p12")))
    assert not problems
    assert client is not None
    assert len(client.chain) == 1
    assert isinstance(client.chain[0], x509.Certificate)


def test_devices_have_their_own_certificates_beside_an_encrypted_one_of_the_gateway(files: Path) -> None:
    """The gateway's passphrase is not for them."""
    tls = TLS(**settings(files, client_cert="both.p12", client_key_password_file="right"))
    policies: DevicePolicies[str] = DevicePolicies(tls)
    policies.add("d1", ClientIdentity((LEAF.certificate, MIDDLE.certificate), LEAF.key))
    policy = policies.get("d1")
    assert policy is not None
    assert policy.client is None
    assert policy.own is not None


# ---- RSA keys, which the gateway checks itself


def of_der(tag: int, content: bytes) -> bytes:
    """Encode a value of less than 64 KiB, in DER."""
    size = len(content)
    length = bytes((size,)) if size < 128 else b"\x81%c" % size if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes((tag,)) + length + content


def written(path: Path, p: int, q: int, **wrong: int) -> Path:
    """Write an RSA key of these primes (RFC 8017 A.1.2); numbers in `wrong` are not what belongs to them."""
    d = wrong.get("d") or pow(65537, -1, (p - 1) * (q - 1))
    right = {"n": p * q, "e": 65537, "d": d, "p": p, "q": q}
    right |= {"dmp1": d % (p - 1), "dmq1": d % (q - 1), "iqmp": pow(q, -1, p)}
    numbers = [0, *(right | wrong).values()]
    content = b"".join(of_der(2, each.to_bytes(each.bit_length() // 8 + 1, "big")) for each in numbers)
    encoded = base64.encodebytes(of_der(0x30, content)).decode()
    path.write_text(f"-----BEGIN RSA PRIVATE KEY-----\n{encoded}-----END RSA PRIVATE KEY-----\n")
    return path


def test_an_rsa_key_whose_numbers_do_not_belong_together_is_damaged(tmp_path: Path) -> None:
    """Each of them counts, and the primes must be primes: such a key would fail in the handshake, or leak itself."""
    numbers = rsa_key().private_numbers()
    p, q, d, n = numbers.p, numbers.q, numbers.d, numbers.public_numbers.n
    file = tmp_path / "key.pem"
    read = read_private_key(written(file, p, q))
    assert isinstance(read, rsa.RSAPrivateKey)
    assert read.private_numbers().p == p
    for wrong in (
        {"n": n + 2},
        {"d": d + 2},
        {"d": d + (p - 1)},
        {"d": d + (q - 1)},
        {"dmp1": numbers.dmp1 + 2},
        {"dmq1": numbers.dmq1 + 2},
        {"iqmp": numbers.iqmp - 1},
    ):
        with pytest.raises(ValueError, match="contains a damaged private key"):
            read_private_key(written(file, p, q, **wrong))
    composite = next(number for number in range(p + 2, p + 2000, 2) if math.gcd(65537 * q, (number - 1) * number) == 1)
    with pytest.raises(ValueError, match="contains a damaged private key"):
        read_private_key(written(file, composite, q))
