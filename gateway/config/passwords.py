"""Hashes of passwords of devices and of the status page: `scrypt$N$R$P$SALT$HASH`, salt and hash in base64 (RFC 7914).

In: the text of such a hash; a password.  Out: whether it is correct; `ValueError` for a text that is not a hash.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re

from attrs import field, frozen
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

# RFC 7914 §2: N is the cost, R the block size, P the parallelism; 128·N·R bytes are needed.
_COST, _BLOCK_SIZE, _PARALLELISM = 2**14, 8, 1
_MAX_MEMORY = 64 * 2**20
_MAX_PARALLELISM = 16
_HASH_SIZE = 32
_SMALLEST_SALT, _SMALLEST_HASH, _LARGEST = 8, 16, 64


@frozen
class PasswordHash:
    """A parsed hash to check passwords against."""

    cost: int
    block_size: int
    parallelism: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    def verify(self, password: bytes) -> bool:
        """Return whether this is the password; takes about 30 ms either way."""
        derived = _derive(password, self.salt, self.cost, self.block_size, self.parallelism, len(self.digest))
        return hmac.compare_digest(derived, self.digest)


def parse_hash(text: str) -> PasswordHash:
    """Parse a hash.  Raises ValueError, whose message never contains it."""
    match = re.fullmatch(r"scrypt\$([0-9]{1,9})\$([0-9]{1,3})\$([0-9]{1,3})\$([^$]+)\$([^$]+)", text)
    if match is None:
        raise ValueError("not a password hash: it must have the form scrypt$N$R$P$SALT$HASH")
    cost, block_size, parallelism = (int(match[index]) for index in (1, 2, 3))
    try:
        salt, digest = (base64.b64decode(match[index], validate=True) for index in (4, 5))
    except binascii.Error:
        raise ValueError("the salt and the hash must be base64") from None
    fits = 128 * cost * block_size <= _MAX_MEMORY
    if cost <= 1 or cost & (cost - 1) or not fits or not 1 <= parallelism <= _MAX_PARALLELISM:
        raise ValueError(
            f"scrypt with N={cost}, R={block_size}, P={parallelism} cannot be used: N must be a power of two, P at "
            f"most 16, and 128·N·R at most {_MAX_MEMORY} bytes"
        )
    if not (block_size and _SMALLEST_SALT <= len(salt) <= _LARGEST and _SMALLEST_HASH <= len(digest) <= _LARGEST):
        raise ValueError("the salt must have 8 to 64 bytes, the hash 16 to 64")
    return PasswordHash(cost, block_size, parallelism, salt, digest)


def check_hash(text: str) -> None:
    """Refuse what is no hash; "" is none.  Raises ValueError."""
    if text:
        parse_hash(text)


def hash_password(password: bytes, salt: bytes) -> str:
    """Return the hash of a password; `salt` is 16 random bytes."""
    digest = _derive(password, salt, _COST, _BLOCK_SIZE, _PARALLELISM, _HASH_SIZE)
    shown = "$".join(base64.b64encode(part).decode("ascii") for part in (salt, digest))
    return f"scrypt${_COST}${_BLOCK_SIZE}${_PARALLELISM}${shown}"


def _derive(password: bytes, salt: bytes, cost: int, block_size: int, parallelism: int, length: int) -> bytes:
    try:
        return Scrypt(salt=salt, length=length, n=cost, r=block_size, p=parallelism).derive(password)
    except UnsupportedAlgorithm:
        raise ValueError("passwords need scrypt, which this build of OpenSSL lacks") from None
