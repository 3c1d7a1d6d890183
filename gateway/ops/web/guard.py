"""The password of the status endpoint: HTTP Basic authentication (RFC 7617) with any user name.

In: the Authorization header of a request.  Out: whether it may be answered.

To check a password takes some 30 ms of CPU and 16 MB, so passwords are checked in a thread, one at a time, and only a
few per second, whoever asks.  One that was right before is recognised without that, so guesses do not keep out a page
that is open already.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Callable
from enum import Enum
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config.passwords import PasswordHash, parse_hash

_log = Logger(namespace="gateway")

# Checks per second, and the burst.
_RATE, _BURST = 1.0, 10.0
# Per window (seconds), so many wrong passwords are logged with their address; the rest are counted.
WINDOW = 60.0
LOGGED = 5


class Access(Enum):
    """Whether a request may be answered; BUSY if there were too many attempts to check another one."""

    GRANTED = "granted"
    DENIED = "denied"
    BUSY = "busy"


Told = Callable[[Access], object]


class Guard:
    """Asks for a password, if there is one.

    `seconds` is a clock; `in_thread` does work in a thread.
    """

    def __init__(self, seconds: Callable[[], float], in_thread: Callable[[Callable[[], bool]], Deferred[bool]]) -> None:
        self._seconds = seconds
        self._in_thread = in_thread
        self._text = ""
        self._hash: PasswordHash | None = None
        # The last password that was right, as a digest with a key that only this process knows.
        self._key = secrets.token_bytes(32)
        self._known: bytes | None = None
        self._one_at_a_time = DeferredLock()
        self._tokens = _BURST
        self._tokens_at = self._window_began = seconds()
        self._wrong = 0  # in this window

    @property
    def asks(self) -> bool:
        """Whether a password is needed."""
        return self._hash is not None

    def require(self, text: str) -> None:
        """Ask for the password with this hash; "" for none."""
        if text != self._text:
            self._text, self._known = text, None
            self._hash = parse_hash(text) if text else None

    def judge(self, authorization: str, address: str, told: Told) -> None:
        """Call `told`, now or later; `address` is the client's, for the log."""
        wanted, password = self._hash, _password(authorization)
        if wanted is None:
            told(Access.GRANTED)
        elif password is None:
            told(Access.DENIED)
        elif self._known is not None and hmac.compare_digest(self._digest(password), self._known):
            told(Access.GRANTED)
        elif not self._may_check():
            told(Access.BUSY)
        else:
            checked: Deferred[Any] = self._one_at_a_time.run(self._in_thread, lambda: wanted.verify(password))
            checked.addBoth(self._checked, wanted, password, address).addCallback(told)

    def sweep(self) -> None:
        """Log how many wrong passwords were not logged; called about once a second."""
        now = self._seconds()
        if now - self._window_began < WINDOW:
            return
        if self._wrong > LOGGED:
            _log.warn(
                "{count} more wrong passwords for the status page in the last {window} s",
                event="status-passwords-withheld",
                count=self._wrong - LOGGED,
                window=round(now - self._window_began),
            )
        self._window_began, self._wrong = now, 0

    def _checked(self, is_right: bool | Failure, wanted: PasswordHash, password: bytes, address: str) -> Access:
        if isinstance(is_right, Failure):
            # Without the failure: its frames hold the password.
            _log.error("internal error: the password of the status page cannot be checked")
            return Access.BUSY
        if not is_right:
            self._tell_wrong(address)
            return Access.DENIED
        # A reload may have changed the password meanwhile.
        if wanted is not self._hash:
            return Access.DENIED
        self._known = self._digest(password)
        return Access.GRANTED

    def _tell_wrong(self, address: str) -> None:
        self._wrong += 1
        if self._wrong <= LOGGED:
            _log.warn(
                "wrong password for the status page from {address}", event="status-password-wrong", address=address
            )

    def _digest(self, password: bytes) -> bytes:
        return hmac.digest(self._key, password, "sha256")

    def _may_check(self) -> bool:
        now = self._seconds()
        self._tokens = min(_BURST, self._tokens + (now - self._tokens_at) * _RATE)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _password(authorization: str) -> bytes | None:
    """Return the password in an Authorization header; None if there is none (RFC 7617 §2)."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        _, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return password if colon else None
