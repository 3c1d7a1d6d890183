"""OpenSSL's record layer for one connection: plaintext to ciphertext, and back.

In: a pyOpenSSL `Connection` without a socket.  Out: an `Engine`, which encrypts and decrypts with OpenSSL.  Handshake
and verification are done by pyOpenSSL.

There are two engines.  `PublicCalls` uses pyOpenSSL's methods, whose overhead is twice the time of the calls that they
wrap.  `gateway/tls/direct.py` makes the same calls directly, using private names that pyOpenSSL may change.
`gateway/tls/choice.py` tests it at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from OpenSSL import SSL
from twisted.logger import Logger

_log = Logger(namespace="gateway")

# A TLS record carries at most 2**14 bytes (RFC 8446 §5.1); OpenSSL returns one at a time.
RECORD_SIZE = 0x4000


class Addresses(NamedTuple):
    """Where OpenSSL's objects of one connection are, for the compiled core, and what keeps them there."""

    keep: object
    ssl: int
    into_ssl: int
    from_ssl: int


class Engine(Protocol):
    """What a channel needs of OpenSSL after its handshake, and one thing before."""

    def offer_group(self, name: str) -> None:
        """Offer only this group for the key exchange, if OpenSSL supports it; call before the handshake."""

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return what to send: what was waiting, then the records of `plaintext`.  Raises `SSL.Error`."""

    def waiting(self) -> bytes:
        """Return and clear what to send: handshake messages, alerts.  Empty if there is nothing."""

    def decrypt(self, ciphertext: bytes, records: int) -> tuple[bytes, SSL.Error | None]:
        """Take ciphertext; return the plaintext of up to `records` complete records, and the error that stopped it.

        The error is `None` if there was none, and `SSL.WantReadError` if some were not application data.
        """

    def addresses(self) -> Addresses | None:
        """Return where OpenSSL's objects are; `None` if the compiled core must not use them."""

    def why(self, result: int) -> SSL.Error:
        """Return why OpenSSL has just failed with `result`, in the core."""


MakeEngine = Callable[[SSL.Connection], Engine]


class PublicCalls:
    """Uses pyOpenSSL's methods.  See `Engine`."""

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
            while not parts or len(parts[-1]) == RECORD_SIZE:  # After a full read there may be more.
                parts.append(self._connection.bio_read(RECORD_SIZE))
        except SSL.Error:
            pass  # pyOpenSSL raises if there is nothing.
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def decrypt(self, ciphertext: bytes, records: int) -> tuple[bytes, SSL.Error | None]:
        """See `Engine`."""
        if ciphertext:
            self._connection.bio_write(ciphertext)
        parts: list[bytes] = []
        ended: SSL.Error | None = None
        try:
            for _ in range(records):
                parts.append(self._connection.recv(RECORD_SIZE))  # noqa: PERF401  what came before an error is kept
        except SSL.Error as error:
            ended = error.with_traceback(None)  # Its frames reference it: a cycle.
        return parts[0] if len(parts) == 1 else b"".join(parts), ended

    def addresses(self) -> None:
        """See `Engine`."""

    def why(self, result: int) -> SSL.Error:
        """See `Engine`; there is no core that could ask."""
        raise NotImplementedError(result)
