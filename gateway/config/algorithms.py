"""The algorithms that the gateway offers a broker in TLS: which may be named, and which are weak.

In: names as OpenSSL writes them.  Out: `Algorithms`; ValueError for a name that is unknown or never permitted.

Only known names are permitted, not OpenSSL's expressions such as `ALL` or `@SECLEVEL=0`: so no list can offer, without
saying so, what is anonymous, unencrypted or broken.  Whether the installed OpenSSL has an algorithm is tested when the
policy is built (`gateway/tls/trust.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from gateway.config.value_words import quoted

_TLS_1_3 = re.compile(r"TLS_(?:AES_(?:128|256)_(?:GCM|CCM)|CHACHA20_POLY1305)_SHA(?:256|384)")
_TLS_1_2 = re.compile(
    r"(?P<ephemeral>(?:ECDHE|DHE)-)?(?:(?:RSA|ECDSA)-)?(?:"
    r"(?:AES|ARIA|CAMELLIA)(?:128|256)-(?:(?P<aead>GCM-SHA(?:256|384)|CCM)|(?P<cbc>SHA(?:256|384)?))"
    r"|(?P<chacha>CHACHA20-POLY1305))"
)
# What people may look for, and why it is not there.
_NEVER = (
    ("NULL", "it does not encrypt"),
    ("TLS_SHA", "it does not encrypt"),
    ("ADH", "it does not authenticate the broker"),
    ("AECDH", "it does not authenticate the broker"),
    ("ANON", "it does not authenticate the broker"),
    ("EXP", "export ciphers are broken"),
    ("PSK", "the gateway verifies certificates, not pre-shared keys"),
    ("SRP", "the gateway verifies certificates, not passwords"),
    ("RC4", "RC4 is prohibited (RFC 7465)"),
    ("DES", "its blocks of 64 bits are too small"),
    ("IDEA", "its blocks of 64 bits are too small"),
    ("RC2", "its blocks of 64 bits are too small"),
    ("MD5", "MD5 is broken"),
    ("CCM8", "its authentication tags of 64 bits are too short"),
    ("CCM_8", "its authentication tags of 64 bits are too short"),
)
_EXPRESSION = re.compile(r"[:+!@*/?, ]")

_GROUPS = frozenset(
    (
        *("X25519", "X448", "P-256", "P-384", "P-521", "prime256v1", "secp256r1", "secp384r1", "secp521r1"),
        *("X25519MLKEM768", "SecP256r1MLKEM768", "SecP384r1MLKEM1024", "MLKEM512", "MLKEM768", "MLKEM1024"),
        *("ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"),
        *("brainpoolP256r1", "brainpoolP384r1", "brainpoolP512r1"),
        *("brainpoolP256r1tls13", "brainpoolP384r1tls13", "brainpoolP512r1tls13"),
    )
)
_SIGNATURE_ALGORITHMS = frozenset(
    (
        *("ecdsa_secp256r1_sha256", "ecdsa_secp384r1_sha384", "ecdsa_secp521r1_sha512", "ed25519", "ed448"),
        *("rsa_pss_rsae_sha256", "rsa_pss_rsae_sha384", "rsa_pss_rsae_sha512"),
        *("rsa_pss_pss_sha256", "rsa_pss_pss_sha384", "rsa_pss_pss_sha512"),
        *("rsa_pkcs1_sha256", "rsa_pkcs1_sha384", "rsa_pkcs1_sha512"),
        *("ecdsa_brainpoolP256r1tls13_sha256", "ecdsa_brainpoolP384r1tls13_sha384"),
        *("ecdsa_brainpoolP512r1tls13_sha512", "mldsa44", "mldsa65", "mldsa87"),
    )
)


@frozen
class Algorithms:
    """What is offered, in order of preference; an empty list stands for the defaults."""

    ciphers: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    signature_algorithms: tuple[str, ...] = ()


def is_of_tls_1_3(cipher: str) -> bool:
    """Whether a cipher is one of TLS 1.3, which are separate from those of TLS 1.2."""
    return cipher.startswith("TLS_")


def check_cipher(text: str) -> None:
    """Refuse what is not the name of one permitted cipher suite."""
    if _TLS_1_3.fullmatch(text) or _TLS_1_2.fullmatch(text):
        return
    if _EXPRESSION.search(text):
        raise ValueError(f"{quoted(text)} is not the name of one cipher suite: list each name by itself")
    if "_WITH_" in text:
        raise ValueError(f"{quoted(text)}: use OpenSSL's name, such as ECDHE-RSA-AES128-GCM-SHA256")
    for part, why in _NEVER:
        if part in text.upper():
            raise ValueError(f"{quoted(text)} is never permitted: {why}")
    raise ValueError(f"{quoted(text)} is not a cipher suite that the gateway permits; `openssl ciphers -v` lists names")


def check_group(text: str) -> None:
    """Refuse what is not the name of one permitted group."""
    if text not in _GROUPS:
        raise ValueError(f"{quoted(text)} is not a group that the gateway permits: use {', '.join(sorted(_GROUPS))}")


def check_signature_algorithm(text: str) -> None:
    """Refuse what is not the name of one permitted signature algorithm."""
    if re.search("sha1(?!\\d)|md5|sha224", text, re.IGNORECASE):
        raise ValueError(f"{quoted(text)} is never permitted: its hash is too weak")
    if text not in _SIGNATURE_ALGORITHMS:
        known = ", ".join(sorted(_SIGNATURE_ALGORITHMS))
        raise ValueError(f"{quoted(text)} is not a signature algorithm that the gateway permits: use {known}")


def weakness(cipher: str) -> str:
    """Return in what a permitted cipher is weaker than the defaults; "" if it is not."""
    found = _TLS_1_3.fullmatch(cipher) or _TLS_1_2.fullmatch(cipher)
    parts = found.groupdict() if found is not None else {}
    words = []
    if not is_of_tls_1_3(cipher) and not parts.get("ephemeral"):
        words.append("no forward secrecy")
    if parts.get("cbc"):
        words.append("CBC without authenticated encryption")
    return " and ".join(words)


def weak(ciphers: Iterable[str]) -> list[str]:
    """Return the ciphers that are weaker than the defaults, each with its weakness."""
    return [f"{cipher} ({words})" for cipher in ciphers if (words := weakness(cipher))]
