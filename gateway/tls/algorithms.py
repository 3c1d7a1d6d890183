"""The names of TLS's algorithms, and what a ClientHello offers (RFC 8446 §4.1.2).

In: the record of a ClientHello.  Out: an `Offer`, in the names that `[tls]` uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen

# IANA's registries "TLS Cipher Suites", "TLS Supported Groups" and "TLS SignatureScheme", in OpenSSL's names.
# Those that no gateway offers are here so that `check` can say what a broker has.
CIPHERS: Mapping[int, str] = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0x1304: "TLS_AES_128_CCM_SHA256",
    0x1305: "TLS_AES_128_CCM_8_SHA256",
    0xC02B: "ECDHE-ECDSA-AES128-GCM-SHA256",
    0xC02C: "ECDHE-ECDSA-AES256-GCM-SHA384",
    0xC02F: "ECDHE-RSA-AES128-GCM-SHA256",
    0xC030: "ECDHE-RSA-AES256-GCM-SHA384",
    0xCCA8: "ECDHE-RSA-CHACHA20-POLY1305",
    0xCCA9: "ECDHE-ECDSA-CHACHA20-POLY1305",
    0xCCAA: "DHE-RSA-CHACHA20-POLY1305",
    0x009E: "DHE-RSA-AES128-GCM-SHA256",
    0x009F: "DHE-RSA-AES256-GCM-SHA384",
    0x00A2: "DHE-DSS-AES128-GCM-SHA256",
    0x00A3: "DHE-DSS-AES256-GCM-SHA384",
    0xC0AC: "ECDHE-ECDSA-AES128-CCM",
    0xC0AD: "ECDHE-ECDSA-AES256-CCM",
    0xC0AE: "ECDHE-ECDSA-AES128-CCM8",
    0xC0AF: "ECDHE-ECDSA-AES256-CCM8",
    0xC09E: "DHE-RSA-AES128-CCM",
    0xC09F: "DHE-RSA-AES256-CCM",
    0xC0A2: "DHE-RSA-AES128-CCM8",
    0xC0A3: "DHE-RSA-AES256-CCM8",
    0xC05C: "ECDHE-ECDSA-ARIA128-GCM-SHA256",
    0xC05D: "ECDHE-ECDSA-ARIA256-GCM-SHA384",
    0xC060: "ECDHE-ARIA128-GCM-SHA256",
    0xC061: "ECDHE-ARIA256-GCM-SHA384",
    0xC052: "DHE-RSA-ARIA128-GCM-SHA256",
    0xC053: "DHE-RSA-ARIA256-GCM-SHA384",
    0xC023: "ECDHE-ECDSA-AES128-SHA256",
    0xC024: "ECDHE-ECDSA-AES256-SHA384",
    0xC027: "ECDHE-RSA-AES128-SHA256",
    0xC028: "ECDHE-RSA-AES256-SHA384",
    0xC009: "ECDHE-ECDSA-AES128-SHA",
    0xC00A: "ECDHE-ECDSA-AES256-SHA",
    0xC013: "ECDHE-RSA-AES128-SHA",
    0xC014: "ECDHE-RSA-AES256-SHA",
    0xC072: "ECDHE-ECDSA-CAMELLIA128-SHA256",
    0xC073: "ECDHE-ECDSA-CAMELLIA256-SHA384",
    0xC076: "ECDHE-RSA-CAMELLIA128-SHA256",
    0xC077: "ECDHE-RSA-CAMELLIA256-SHA384",
    0x0067: "DHE-RSA-AES128-SHA256",
    0x006B: "DHE-RSA-AES256-SHA256",
    0x0033: "DHE-RSA-AES128-SHA",
    0x0039: "DHE-RSA-AES256-SHA",
    0x0045: "DHE-RSA-CAMELLIA128-SHA",
    0x0088: "DHE-RSA-CAMELLIA256-SHA",
    0x00BE: "DHE-RSA-CAMELLIA128-SHA256",
    0x00C4: "DHE-RSA-CAMELLIA256-SHA256",
    0x009C: "AES128-GCM-SHA256",
    0x009D: "AES256-GCM-SHA384",
    0xC09C: "AES128-CCM",
    0xC09D: "AES256-CCM",
    0xC0A0: "AES128-CCM8",
    0xC0A1: "AES256-CCM8",
    0xC050: "ARIA128-GCM-SHA256",
    0xC051: "ARIA256-GCM-SHA384",
    0x003C: "AES128-SHA256",
    0x003D: "AES256-SHA256",
    0x002F: "AES128-SHA",
    0x0035: "AES256-SHA",
    0x0041: "CAMELLIA128-SHA",
    0x0084: "CAMELLIA256-SHA",
    0x00BA: "CAMELLIA128-SHA256",
    0x00C0: "CAMELLIA256-SHA256",
    0xC008: "ECDHE-ECDSA-DES-CBC3-SHA",
    0xC012: "ECDHE-RSA-DES-CBC3-SHA",
    0x0016: "DHE-RSA-DES-CBC3-SHA",
    0x000A: "DES-CBC3-SHA",
    0xC007: "ECDHE-ECDSA-RC4-SHA",
    0xC011: "ECDHE-RSA-RC4-SHA",
    0x0005: "RC4-SHA",
    0x0004: "RC4-MD5",
    0x0096: "SEED-SHA",
    0x0007: "IDEA-CBC-SHA",
}
GROUPS: Mapping[int, str] = {
    0x11EC: "X25519MLKEM768",
    0x11EB: "SecP256r1MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
    0x0200: "MLKEM512",
    0x0201: "MLKEM768",
    0x0202: "MLKEM1024",
    0x001D: "X25519",
    0x001E: "X448",
    0x0017: "P-256",
    0x0018: "P-384",
    0x0019: "P-521",
    0x001A: "brainpoolP256r1",
    0x001B: "brainpoolP384r1",
    0x001C: "brainpoolP512r1",
    0x001F: "brainpoolP256r1tls13",
    0x0020: "brainpoolP384r1tls13",
    0x0021: "brainpoolP512r1tls13",
    0x0100: "ffdhe2048",
    0x0101: "ffdhe3072",
    0x0102: "ffdhe4096",
    0x0103: "ffdhe6144",
    0x0104: "ffdhe8192",
    0x0016: "secp256k1",
    0x0015: "secp224r1",
    0x0013: "secp192r1",
    0x0029: "curveSM2",
    0x11EE: "curveSM2MLKEM768",
}
SIGNATURE_ALGORITHMS: Mapping[int, str] = {
    0x0403: "ecdsa_secp256r1_sha256",
    0x0503: "ecdsa_secp384r1_sha384",
    0x0603: "ecdsa_secp521r1_sha512",
    0x0807: "ed25519",
    0x0808: "ed448",
    0x0804: "rsa_pss_rsae_sha256",
    0x0805: "rsa_pss_rsae_sha384",
    0x0806: "rsa_pss_rsae_sha512",
    0x0809: "rsa_pss_pss_sha256",
    0x080A: "rsa_pss_pss_sha384",
    0x080B: "rsa_pss_pss_sha512",
    0x0401: "rsa_pkcs1_sha256",
    0x0501: "rsa_pkcs1_sha384",
    0x0601: "rsa_pkcs1_sha512",
    0x081A: "ecdsa_brainpoolP256r1tls13_sha256",
    0x081B: "ecdsa_brainpoolP384r1tls13_sha384",
    0x081C: "ecdsa_brainpoolP512r1tls13_sha512",
    0x0904: "mldsa44",
    0x0905: "mldsa65",
    0x0906: "mldsa87",
    0x0301: "rsa_pkcs1_sha224",
    0x0303: "ecdsa_sha224",
    0x0302: "dsa_sha224",
    0x0402: "dsa_sha256",
    0x0502: "dsa_sha384",
    0x0602: "dsa_sha512",
    0x0201: "rsa_pkcs1_sha1",
    0x0203: "ecdsa_sha1",
    0x0202: "dsa_sha1",
    0x0101: "rsa_pkcs1_md5",
    0x0708: "sm2sig_sm3",
}
VERSIONS: Mapping[int, str] = {0x0304: "TLS 1.3", 0x0303: "TLS 1.2", 0x0302: "TLS 1.1", 0x0301: "TLS 1.0"}
# Other names for the same groups.
_ALIASES = {"prime256v1": "P-256", "secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}

SUPPORTED_GROUPS, SIGNATURES, SUPPORTED_VERSIONS = 10, 13, 43
_RECORD_AND_HANDSHAKE_HEADER = 5 + 4
_VERSION_AND_RANDOM = 2 + 32


@frozen
class Offer:
    """What one side offers, in order of preference."""

    versions: tuple[str, ...]
    ciphers: tuple[str, ...]
    groups: tuple[str, ...]
    signature_algorithms: tuple[str, ...]

    def __str__(self) -> str:
        """All of it, for people."""
        parts = (", ".join(self.versions), *(shown(name, values) for name, values in self.lists))
        return "; ".join(part for part in parts if part)

    @property
    def lists(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The lists that can be configured, with their words."""
        return (
            ("ciphers", self.ciphers),
            ("groups", self.groups),
            ("signature algorithms", self.signature_algorithms),
        )

    def missing(
        self, ciphers: Iterable[str], groups: Iterable[str], signatures: Iterable[str]
    ) -> list[tuple[str, str]]:
        """Return which of these are not offered, each with the key of its list."""
        wanted = [("ciphers", name, name in self.ciphers) for name in ciphers]
        wanted += [("groups", name, _ALIASES.get(name, name) in self.groups) for name in groups]
        wanted += [("signature_algorithms", name, name in self.signature_algorithms) for name in signatures]
        return [(key, name) for key, name, is_offered in wanted if not is_offered]


def shown(what: str, names: Iterable[str]) -> str:
    """Return a list in words, "" for an empty one."""
    listed = ", ".join(names)
    return f"{what} {listed}" if listed else ""


def client_hello(record: bytes) -> Offer:
    """Return what a ClientHello offers, which is the gateway's own.  Raises `ValueError` if it is not one."""
    try:
        at = _RECORD_AND_HANDSHAKE_HEADER + _VERSION_AND_RANDOM
        at += 1 + record[at]  # legacy_session_id
        ciphers, at = _vector(record, at)
        at += 1 + record[at]  # legacy_compression_methods
        known = extensions(record, at)
    except IndexError:
        raise ValueError("not a ClientHello") from None
    # supported_versions has a length of one byte; the others of two.
    return Offer(
        _named(VERSIONS, known.get(SUPPORTED_VERSIONS, b"")[1:]) or ("TLS 1.2",),
        _named(CIPHERS, ciphers),
        _named(GROUPS, known.get(SUPPORTED_GROUPS, b"")[2:]),
        _named(SIGNATURE_ALGORITHMS, known.get(SIGNATURES, b"")[2:]),
    )


def extensions(message: bytes, at: int) -> dict[int, bytes]:
    """Return the extensions of a hello whose block begins at `at`.  Raises `IndexError` if it is cut short."""
    block, _ = _vector(message, at) if at < len(message) else (b"", at)
    found: dict[int, bytes] = {}
    at = 0
    while at < len(block):
        kind = int.from_bytes(block[at : at + 2])
        found[kind], at = _vector(block, at + 2)
    return found


def _vector(data: bytes, at: int) -> tuple[bytes, int]:
    """Return a vector with a length of two bytes, and where it ends."""
    end = at + 2 + (data[at] << 8 | data[at + 1])
    if end > len(data):
        raise IndexError
    return data[at + 2 : end], end


def _named(names: Mapping[int, str], codes: bytes) -> tuple[str, ...]:
    found = (int.from_bytes(codes[at : at + 2]) for at in range(0, len(codes), 2))
    return tuple(names.get(code, f"0x{code:04x}") for code in found)
