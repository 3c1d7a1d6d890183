"""Tokens against what their standards publish and against the openssl program."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from gateway.rules.tokens import check_signing_key, json_web_token, sas_key, sas_token, sign

NOW = 1_700_000_000


def openssl(*arguments: str, data: bytes) -> bytes:
    return subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=True).stdout


def decoded(part: bytes | str) -> bytes:
    part = part.encode() if isinstance(part, str) else part
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


# ---- Azure


@pytest.mark.parametrize("resource", ["myhub.azure-devices.net/devices/device1", "hub/a b:c@d", "hub/ä"])
@pytest.mark.parametrize("policy", ["", "device", "a policy&more"])
def test_a_sas_token_is_what_openssl_computes(resource: str, policy: str) -> None:
    """HMAC-SHA256 of the encoded resource, a line feed and the expiry, by another program."""
    key = b"\0a key with any byte\xff"
    token = sas_token(resource, key, NOW, policy).decode()
    kind, _, fields = token.partition(" ")
    assert kind == "SharedAccessSignature"
    raw = dict(field.split("=", 1) for field in fields.split("&"))
    assert list(raw) == ["sr", "sig", "se"] + (["skn"] if policy else [])
    values = {name: value[0] for name, value in parse_qs(fields).items()}
    assert values["sr"] == resource
    assert values["se"] == str(NOW)
    assert values.get("skn", "") == policy
    signed = f"{raw['sr']}\n{NOW}".encode()
    digest = openssl("dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}", "-binary", data=signed)
    assert unquote(raw["sig"]) == base64.b64encode(digest).decode()


@given(
    resource=st.text(st.characters(codec="utf-8"), max_size=60),
    key=st.binary(min_size=1),
    policy=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_nothing_in_a_resource_can_add_a_field(resource: str, key: bytes, policy: str) -> None:
    """Whatever the characters, the fields are those three or four."""
    _, _, fields = sas_token(resource, key, NOW, policy).decode().partition(" ")
    assert len(fields.split("&")) == (4 if policy else 3)
    assert parse_qs(fields, keep_blank_values=True)["sr"] == [resource]


def test_a_key_is_read_as_the_portal_shows_it() -> None:
    """Base64, with or without a line feed; nothing else, and the message does not quote it."""
    assert sas_key(base64.b64encode(b"key") + b"\n") == b"key"
    for wrong in (b"", b"\n", b"hunter2!", b"a2V5*"):
        with pytest.raises(ValueError, match="base64"):
            sas_key(wrong)


# ---- JSON Web Tokens

# RFC 7515 appendix A.2: the key, which is nobody's, what is signed, and the signature.
RFC_7515_KEY = {
    "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yR"
    "T-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXB"
    "dQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9ia"
    "GNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ",
    "e": "AQAB",
    "d": "Eq5xpGnNCivDflJsRQBXHx1hdR1k6Ulwe2JZD50LpXyWPEAeP88vLNO97IjlA7_GQ5sLKMgvfTeXZx9SE-7YwVol2NXOoAJe46su"
    "i395IW_GO-pWJ1O0BkTGoVEn2bKVRUCgu-GjBVaYLU6f3l9kJfFNS3E0QbVdxzubSu3Mkqzjkn439X0M_V51gfpRLI9JYanrC4D4"
    "qAdGcopV_0ZHHzQlBjudU2QvXt4ehNYTCBr6XCLQUShb1juUO1ZdiYoFaFQT5Tw8bGUl_x_jTj3ccPDVZFD9pIuhLhBOneufuBiB"
    "4cS98l2SR_RQyGWSeWjnczT0QU91p1DhOVRuOopznQ",
    "p": "4BzEEOtIpmVdVEZNCqS7baC4crd0pqnRH_5IB3jw3bcxGn6QLvnEtfdUdiYrqBdss1l58BQ3KhooKeQTa9AB0Hw_Py5PJdTJNPY8"
    "cQn7ouZ2KKDcmnPGBY5t7yLc1QlQ5xHdwW1VhvKn-nXqhJTBgIPgtldC-KDV5z-y2XDwGUc",
    "q": "uQPEfgmVtjL0Uyyx88GZFF1fOunH3-7cepKmtH4pxhtCoHqpWmT8YAmZxaewHgHAjLYsp1ZSe7zFYHj7C6ul7TjeLQeZD_YwD66t"
    "62wDmpe_HlB-TnBA-njbglfIsRLtXlnDzQkv5dTltRJ11BKBBypeeF6689rjcJIDEz9RWdc",
}
RFC_7515_HEADER = b'{"alg":"RS256"}'
RFC_7515_PAYLOAD = b'{"iss":"joe",\r\n "exp":1300819380,\r\n "http://example.com/is_root":true}'
RFC_7515_SIGNATURE = (
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQ"
    "jbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqt"
    "FZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
)


def rfc_7515_key() -> rsa.RSAPrivateKey:
    numbers = {name: int.from_bytes(decoded(value), "big") for name, value in RFC_7515_KEY.items()}
    n, e, d, p, q = (numbers[name] for name in "nedpq")
    public = rsa.RSAPublicNumbers(e, n)
    return rsa.RSAPrivateNumbers(
        p, q, d, rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q), public
    ).private_key()


def test_rs256_signs_as_the_standard_shows() -> None:
    """The example of RFC 7515 appendix A.2, to the byte: RS256 has no randomness."""
    token = sign(rfc_7515_key(), RFC_7515_HEADER, RFC_7515_PAYLOAD)
    header, payload, signature = token.decode().split(".")
    assert header == "eyJhbGciOiJSUzI1NiJ9"
    assert decoded(payload) == RFC_7515_PAYLOAD
    assert signature == RFC_7515_SIGNATURE


@pytest.fixture(scope="module", params=["RS256", "ES256"])
def key(request: pytest.FixtureRequest) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if request.param == "RS256":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1())


def test_a_json_web_token_is_accepted_by_openssl(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    """The claims are those that were asked for, and another program verifies the signature."""
    token = json_web_token(key, 'a "project"', NOW, NOW + 3600)
    header, claims, signature = token.split(b".")
    is_rsa = isinstance(key, rsa.RSAPrivateKey)
    assert json.loads(decoded(header)) == {"alg": "RS256" if is_rsa else "ES256", "typ": "JWT"}
    assert json.loads(decoded(claims)) == {"aud": 'a "project"', "iat": NOW, "exp": NOW + 3600}
    raw = decoded(signature)
    if not is_rsa:
        assert len(raw) == 64
        raw = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    (tmp_path / "signature").write_bytes(raw)
    (tmp_path / "public.pem").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    arguments = ["dgst", "-sha256", "-verify", str(tmp_path / "public.pem"), "-signature", str(tmp_path / "signature")]
    assert openssl(*arguments, data=header + b"." + claims) == b"Verified OK\n"


def test_small_numbers_of_a_signature_keep_their_length() -> None:
    """ES256 writes 64 bytes whatever the numbers (RFC 7518 §3.4); every 128th has a leading zero byte."""
    key = ec.generate_private_key(ec.SECP256R1())
    assert {len(decoded(sign(key, b"{}", bytes([index])).split(b".")[2])) for index in range(256)} == {64}


def test_keys_that_sign_no_token() -> None:
    """Another curve, another algorithm, and RSA keys that RFC 7518 §3.3 does not allow."""
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505  to be refused
    for wrong in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate(), weak):
        with pytest.raises(ValueError, match=r"RSA key|P-256"):
            check_signing_key(wrong)
