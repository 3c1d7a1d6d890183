"""Chooses the engine that encrypts and decrypts, by a self-test at each start.

In: the installed pyOpenSSL.  Out: the class of engine to use, and a warning in the log if it is the slow one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL import SSL
from twisted.logger import Logger

from gateway.tls.engine import RECORD_SIZE, MakeEngine, PublicCalls

_log = Logger(namespace="gateway")

# Sizes for the self-test: one byte, whole records, more than the buffer holds.
_TRIED_SIZES = (1, RECORD_SIZE, 5 * RECORD_SIZE // 2, 0x50000)


@cache
def choose() -> MakeEngine:
    """Return the class of engine to use with the installed pyOpenSSL."""
    try:
        # Not at the top of the module: the import itself may fail.
        from gateway.tls.direct import DirectCalls

        _compare(DirectCalls)
    except Exception as error:  # noqa: BLE001  anything that an unknown pyOpenSSL may raise
        _log.warn(
            "OpenSSL cannot be called directly with pyOpenSSL {version} ({error!r}): each message costs more CPU",
            version=metadata.version("pyopenssl"),
            error=error,
        )
        return PublicCalls
    return DirectCalls


def _compare(direct_calls: MakeEngine) -> None:
    """Raise if an engine behaves differently from the public calls."""
    client, server = connected_pair()
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
    client, server = connected_pair()
    direct, public = direct_calls(client), PublicCalls(server)
    last = public.encrypt(b"last")
    server.shutdown()
    plaintext, ended = direct.decrypt(last + public.waiting(), 2)
    _expect("close_notify", (plaintext, type(ended)), (b"last", SSL.ZeroReturnError))


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RuntimeError(f"{what}: differs from pyOpenSSL")


def connected_pair() -> tuple[SSL.Connection, SSL.Connection]:
    """Return a client and a server after a handshake in memory, with a temporary certificate."""
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
        other.bio_write(PublicCalls(end).waiting())
    if done < 2:
        raise RuntimeError("a handshake in memory does not finish")
    PublicCalls(client).decrypt(b"", 1)  # The tickets that a server sends after the handshake.
    return client, server
