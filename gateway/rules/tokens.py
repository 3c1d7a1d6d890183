"""Tokens made at CONNECT, with an expiry: Azure shared access signatures and JSON Web Tokens.

In: a key, the token's resource or audience, times in whole seconds since 1970.  Out: the token, as a password.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from urllib.parse import quote_plus

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

SigningKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_P256_BYTES = 32


def sas_key(text: bytes) -> bytes:
    """Read a device key or policy key in base64, as the portal shows it.  Raises ValueError, without the key."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise ValueError("does not contain a base64 key")
    return key


def sas_token(resource: str, key: bytes, expires: int, policy: str = "") -> bytes:
    """Make a shared access signature (Azure, "Control access to IoT Hub by using shared access signatures").

    The signature is HMAC-SHA256 over the encoded resource, a line feed and the expiry. `policy` names the shared access
    policy that the key belongs to; leave it empty for a device's own key.
    """
    encoded = quote_plus(resource)
    signature = base64.b64encode(hmac.digest(key, f"{encoded}\n{expires}".encode(), "sha256"))
    token = f"SharedAccessSignature sr={encoded}&sig={quote_plus(signature)}&se={expires}"
    return (f"{token}&skn={quote_plus(policy)}" if policy else token).encode("ascii")


def check_signing_key(key: object) -> SigningKey:
    """Return the key if it can sign tokens, otherwise raise ValueError."""
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < 2048:
            raise ValueError("contains an RSA key shorter than 2048 bits, too short to sign tokens")
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise ValueError("contains a key that cannot sign tokens. Use an RSA key or a P-256 key")


def json_web_token(key: SigningKey, audience: str, issued: int, expires: int) -> bytes:
    """Make a token with the claims `aud`, `iat` and `exp` (RFC 7519), signed RS256 or ES256 (RFC 7518 §3.3, §3.4)."""
    header = {"alg": algorithm(key), "typ": "JWT"}
    claims = {"aud": audience, "iat": issued, "exp": expires}
    return sign(key, *(json.dumps(part, separators=(",", ":")).encode("ascii") for part in (header, claims)))


def algorithm(key: SigningKey) -> str:
    """Return the name of a key's signature algorithm (RFC 7518 §3.1)."""
    return "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"


def sign(key: SigningKey, header: bytes, payload: bytes) -> bytes:
    """Make a JSON Web Signature in compact form (RFC 7515 §3.1)."""
    signed = _encode(header) + b"." + _encode(payload)
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed, padding.PKCS1v15(), SHA256())
    else:
        # Two fixed-length numbers instead of DER (RFC 7518 §3.4).
        numbers = decode_dss_signature(key.sign(signed, ec.ECDSA(SHA256())))
        signature = b"".join(number.to_bytes(_P256_BYTES, "big") for number in numbers)
    return signed + b"." + _encode(signature)


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
