"""The engine that calls OpenSSL without pyOpenSSL's methods: the only place that uses its private names.

In: a pyOpenSSL `Connection` without a socket.  Out: an `Engine` (`gateway/tls/engine.py`).  Importing this raises
`ImportError` or `AttributeError` if pyOpenSSL is not as expected; `choice.choose` tests whether it works.

The library, the objects and the calls are pyOpenSSL's own; what is omitted for each call is a conversion, a context
manager, a buffer and an error check.  All connections of a thread share one buffer, which no method needs after it
returns; so a connection must be used by the thread that made it, which is the reactor's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from gateway.tls.engine import RECORD_SIZE, Addresses

# Looked up once, because the lookup is a large part of a call's cost.
_ssl_write = lib.SSL_write
_ssl_read = lib.SSL_read
_bio_write = lib.BIO_write
_bio_read = lib.BIO_read
# Before OpenSSL 4.0, SSL_get_error(3) reads the thread's error queue, which may hold errors of other calls.
_clear_errors = lib.ERR_clear_error
_unpack = ffi.unpack
_get_error = lib.SSL_get_error
_WANT_READ = lib.SSL_ERROR_WANT_READ
# Optional: it only saves work.
_set_groups = getattr(lib, "SSL_set1_curves_list", None)
# By the key of `[tls]` that they are for.  Those called "curves" have set all groups since OpenSSL 1.1.1.
_LISTS = {"groups": "SSL_CTX_set1_curves_list", "signature_algorithms": "SSL_CTX_set1_sigalgs_list"}

# More than the transports read and write at a time.
_BUFFER_SIZE = 0x20000
_of_this_thread = threading.local()


class DirectCalls:
    """Uses OpenSSL's functions directly, on pyOpenSSL's objects.  See `Engine`."""

    __slots__ = ("_buffer", "_connection", "_from_ssl", "_into_ssl", "_ssl")

    def __init__(self, connection: Any) -> None:
        """Take a connection.  Raises `AttributeError` or `TypeError` if its internals are not as expected."""
        self._connection = connection
        # Both BIOs belong to the SSL object, which is freed with the last reference to `_ssl`.
        self._ssl = connection._ssl  # noqa: SLF001  see above
        self._into_ssl = connection._into_ssl  # noqa: SLF001  see above
        self._from_ssl = connection._from_ssl  # noqa: SLF001  see above
        if not hasattr(_of_this_thread, "buffer"):
            _of_this_thread.buffer = ffi.new("char[]", _BUFFER_SIZE)
        self._buffer = _of_this_thread.buffer
        # pyOpenSSL ends a write after one record.  To memory, all of them can be written at once.
        lib.SSL_clear_mode(self._ssl, lib.SSL_MODE_ENABLE_PARTIAL_WRITE)

    def offer_group(self, name: str) -> None:
        """See `Engine`."""
        if _set_groups is not None and _set_groups(self._ssl, name.encode()) != 1:
            _clear_errors()

    def encrypt(self, plaintext: bytes) -> bytes:
        """See `Engine`."""
        size = len(plaintext)
        _clear_errors()
        written = _ssl_write(self._ssl, plaintext, size)
        if written != size:
            raise self.why(written)
        taken = _bio_read(self._from_ssl, self._buffer, _BUFFER_SIZE)
        ciphertext: bytes = _unpack(self._buffer, taken)
        return ciphertext if taken < _BUFFER_SIZE else ciphertext + self.waiting()

    def waiting(self) -> bytes:
        """See `Engine`."""
        waiting = b""
        while True:
            taken = _bio_read(self._from_ssl, self._buffer, _BUFFER_SIZE)
            if taken > 0:
                waiting += _unpack(self._buffer, taken)
            if taken < _BUFFER_SIZE:
                return waiting

    def decrypt(self, ciphertext: bytes, records: int) -> tuple[bytes, SSL.Error | None]:
        """See `Engine`."""
        size = len(ciphertext)
        if size and _bio_write(self._into_ssl, ciphertext, size) != size:
            raise MemoryError
        buffer = self._buffer
        if records == 1:
            _clear_errors()
            got = _ssl_read(self._ssl, buffer, RECORD_SIZE)
            return (_unpack(buffer, got), None) if got > 0 else (b"", self.why(got))
        plaintext, filled = b"", 0
        ended: SSL.Error | None = None
        for _ in range(records):
            if filled > _BUFFER_SIZE - RECORD_SIZE:
                plaintext += _unpack(buffer, filled)
                filled = 0
            _clear_errors()
            got = _ssl_read(self._ssl, buffer + filled, RECORD_SIZE)
            if got <= 0:
                ended = self.why(got)
                break
            filled += got
        return plaintext + _unpack(buffer, filled), ended

    def addresses(self) -> Addresses:
        """See `Engine`."""
        return Addresses(self._ssl, *(_address(each) for each in (self._ssl, self._into_ssl, self._from_ssl)))

    def why(self, result: int) -> SSL.Error:
        """See `Engine`: what pyOpenSSL would have raised for the call that has just returned `result`."""
        if _get_error(self._ssl, result) == _WANT_READ:
            return SSL.WantReadError()  # The usual answer, after tickets: no error, so it is not raised first.
        try:
            self._connection._raise_ssl_error(self._ssl, result)  # noqa: SLF001  see above
        except SSL.Error as error:
            return error.with_traceback(None)  # Its frames reference it: a cycle.
        return SSL.Error([("", "", f"OpenSSL returned {result} without an error")])


def set_list(context: SSL.Context, key: str, names: Sequence[str]) -> bool:
    """Let a Context offer these groups or signature algorithms; return whether OpenSSL knows all of them.

    Raises `AttributeError` if pyOpenSSL is not as expected.
    """
    done: int = getattr(lib, _LISTS[key])(context._context, ":".join(names).encode())  # noqa: SLF001  see above
    _clear_errors()
    return done == 1


def functions() -> tuple[int, int, int, int, int]:
    """Return the addresses of SSL_write, SSL_read, BIO_write, BIO_read and ERR_clear_error, for the compiled core.

    Raises `AttributeError` or `TypeError` if cryptography is not made as it is known here.
    """
    write, read, into, out, clear = (
        # pyOpenSSL's `lib` is a module around cffi's, which alone gives addresses.
        _address(ffi.addressof(getattr(lib, name).__self__, name))
        for name in ("SSL_write", "SSL_read", "BIO_write", "BIO_read", "ERR_clear_error")
    )
    return write, read, into, out, clear


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))
