"""OpenSSL's record layer for one connection: plaintext to ciphertext, and back.

In: a pyOpenSSL `Connection` without a socket.  Out: an `Engine`, which has OpenSSL encrypt and decrypt.  Handshake and
verification are not its business: they stay with pyOpenSSL.

There are two engines.  `PublicCalls` uses pyOpenSSL's methods, whose wrapping takes twice as long as what they wrap.
`gateway/tls/direct.py` makes the same calls without it, and needs names for that which pyOpenSSL does not promise to
keep.  So `choose` tries it at start-up, in handshakes in memory: where it cannot be had, or does not do what the public
calls do, the log says so, and the public calls are used.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL import SSL
from twisted.logger import Logger

_log = Logger(namespace="gateway")

# A TLS record carries at most 2**14 bytes (RFC 8446 §5.1); OpenSSL gives one at a time.
RECORD_SIZE = 0x4000
# What the direct engine is tried with: one byte, whole records, more than its buffer holds.
_TRIED_SIZES = (1, RECORD_SIZE, 5 * RECORD_SIZE // 2, 0x50000)


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


@cache
def choose() -> MakeEngine:
    """Return the class of engine that is to be used with the pyOpenSSL that is installed."""
    try:
        # Not at the top: that it can be imported is the first thing to be found out.
        from gateway.tls.direct import DirectCalls

        _compare(DirectCalls)
    except Exception as error:  # noqa: BLE001  whatever a pyOpenSSL that nobody knows yet comes up with
        _log.warn(
            "pyOpenSSL {version} does not let OpenSSL be called directly ({error!r}): each message costs more CPU",
            version=metadata.version("pyopenssl"),
            error=error,
        )
        return PublicCalls
    return DirectCalls


def _compare(direct_calls: MakeEngine) -> None:
    """Raise if an engine does anything but what the public calls do."""
    client, server = _connected_pair()
    direct, public = direct_calls(client), PublicCalls(server)
    _expect("nothing waits", direct.waiting(), b"")
    for size in _TRIED_SIZES:
        plaintext = bytes(index % 251 for index in range(size))
        records = -(-size // RECORD_SIZE)
        _expect(f"encrypt {size} bytes", public.decrypt(direct.encrypt(plaintext), records), (plaintext, None))
        _expect(f"decrypt {size} bytes", direct.decrypt(public.encrypt(plaintext), records), (plaintext, None))
    record = public.encrypt(b"record")
    plaintext, ended = direct.decrypt(record[:-1], 1)
    _expect("half a record", (plaintext, type(ended)), (b"", SSL.WantReadError))
    _expect("its other half", direct.decrypt(record[-1:], 1), (b"record", None))
    whole, forged = public.encrypt(b"whole"), bytearray(public.encrypt(b"forged"))
    forged[-1] ^= 1
    plaintext, ended = direct.decrypt(whole + forged, 2)
    _expect("a forged record", (plaintext, type(ended)), (b"whole", SSL.Error))
    client, server = _connected_pair()
    direct, public = direct_calls(client), PublicCalls(server)
    last = public.encrypt(b"last")
    server.shutdown()
    plaintext, ended = direct.decrypt(last + public.waiting(), 2)
    _expect("close_notify", (plaintext, type(ended)), (b"last", SSL.ZeroReturnError))


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RuntimeError(f"{what}: not what pyOpenSSL does")


def _connected_pair() -> tuple[SSL.Connection, SSL.Connection]:
    """Return a client and a server that have shaken hands in memory, with a certificate made for that."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    context.use_certificate(builder.sign(key, SHA256()))
    context.use_privatekey(key)
    client, server = SSL.Connection(context, None), SSL.Connection(context, None)
    client.set_connect_state()
    server.set_accept_state()
    done = 0
    for end, other in ((client, server), (server, client), (client, server), (server, client)):
        try:
            end.do_handshake()
            done += 1
        except SSL.WantReadError:
            pass
        flight = PublicCalls(end).waiting()
        if flight:
            other.bio_write(flight)
    if done < 2:
        raise RuntimeError("a handshake in memory does not end")
    PublicCalls(client).decrypt(b"", 1)  # The tickets that a server sends behind the handshake.
    return client, server
