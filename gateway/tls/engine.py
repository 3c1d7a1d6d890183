"""OpenSSL's record layer for one connection: plaintext to ciphertext, and back.

In: a pyOpenSSL `Connection` without a socket.  Out: an `Engine`, which has OpenSSL encrypt and decrypt.  Handshake and
verification are not its business: they stay with pyOpenSSL.

There are two engines.  `PublicCalls` uses pyOpenSSL's methods, whose wrapping takes twice as long as what they wrap.
`gateway/tls/direct.py` makes the same calls without it, and needs names for that which pyOpenSSL does not promise to
keep.  `gateway/tls/choice.py` tries it at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from OpenSSL import SSL
from twisted.logger import Logger

_log = Logger(namespace="gateway")

# A TLS record carries at most 2**14 bytes (RFC 8446 §5.1); OpenSSL gives one at a time.
RECORD_SIZE = 0x4000


class Engine(Protocol):
    """What a channel asks of OpenSSL when its handshake is done, and one thing before."""

    def offer_group(self, name: str) -> None:
        """Offer this group alone for the key exchange, where OpenSSL can be told so; before the handshake begins."""

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return what is to be sent: what was waiting, then the records of `plaintext`.  Raises `SSL.Error`."""

    def waiting(self) -> bytes:
        """Return what is to be sent, and forget it: handshake messages, alerts.  Empty if there is nothing."""

    def decrypt(self, ciphertext: bytes, records: int) -> tuple[bytes, SSL.Error | None]:
        """Take ciphertext; return the plaintext of up to `records` whole records, and what came in place of the rest.

        That is `None` if nothing did, and `SSL.WantReadError` if some were no application data.
        """


MakeEngine = Callable[[SSL.Connection], Engine]


class PublicCalls:
    """By pyOpenSSL's methods.  See `Engine`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection

    def offer_group(self, name: str) -> None:
        """See `Engine`; pyOpenSSL has no method for it."""

    def encrypt(self, plaintext: bytes) -> bytes:
        """See `Engine`."""
        with memoryview(plaintext) as view:
            for start in range(0, len(view), RECORD_SIZE):
                self._connection.send(view[start : start + RECORD_SIZE])
        return self.waiting()

    def waiting(self) -> bytes:
        """See `Engine`."""
        parts: list[bytes] = []
        try:
            while not parts or len(parts[-1]) == RECORD_SIZE:  # A full read may have left something.
                parts.append(self._connection.bio_read(RECORD_SIZE))
        except SSL.Error:
            pass  # pyOpenSSL's way to say that there is nothing.
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def decrypt(self, ciphertext: bytes, records: int) -> tuple[bytes, SSL.Error | None]:
        """See `Engine`."""
        if ciphertext:
            self._connection.bio_write(ciphertext)
        parts: list[bytes] = []
        ended: SSL.Error | None = None
        try:
            for _ in range(records):
                parts.append(self._connection.recv(RECORD_SIZE))  # noqa: PERF401  what came before an error counts
        except SSL.Error as error:
            ended = error.with_traceback(None)  # Whose frames know it by name: a cycle.
        return parts[0] if len(parts) == 1 else b"".join(parts), ended
