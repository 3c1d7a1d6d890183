"""Passwords from outside the configuration: files, systemd credentials, programs.

In: the source of a password.  Out: its bytes; `SecretUnavailable`, which says what is wrong with the source and never
contains its output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IProcessTransport, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from gateway.errors import GatewayError
from gateway.rules.turns import ANYONE, Turns, Visitor

# MQTT allows passwords of up to 65,535 bytes.
_LARGEST = 65_535
# Programs that may run at the same time; after an outage every device may need one.
_PROGRAMS = 8
# How text in UTF-8 or UTF-16 begins that an editor of Windows has saved.
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"


class SecretUnavailable(GatewayError):
    """A password is not available; `str()` says why and contains nothing secret."""


class Spawner(Protocol):
    """Starts programs: a reactor that provides IReactorProcess and IReactorTime."""

    def spawnProcess(self, *arguments: Any, **more: Any) -> IProcessTransport:  # noqa: N802  the reactor's name
        """See `IReactorProcess`."""


def read_secret(path: Path) -> bytes:
    """Read a password from a file; one line end (LF or CRLF) at the end of the file is removed.

    Raises SecretUnavailable. Only regular files are read: anything else could block the event loop.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as problem:
        raise SecretUnavailable(f"{path} cannot be read: {problem.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SecretUnavailable(f"{path} is not a regular file")
        # One read returns everything of a regular file.
        data = os.read(descriptor, _LARGEST + 3)
    except OSError as problem:
        raise SecretUnavailable(f"{path} cannot be read: {problem.strerror}") from None
    finally:
        os.close(descriptor)
    return _checked(data, str(path))


def credential_path(name: str, environment: Mapping[str, str]) -> Path:
    """Return the path of a systemd credential (systemd.exec(5)).  Raises SecretUnavailable."""
    directory = environment.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise SecretUnavailable(
            f"credential {name} not found: CREDENTIALS_DIRECTORY is not set. Set LoadCredential= in the service's unit"
        )
    return Path(directory) / name


class Programs:
    """Runs programs that write a password to standard output, a few at a time.

    Programs run without a shell, with a minimal environment and no standard input; standard error is discarded, since
    it may contain anything. A program that takes too long or writes too much is killed.
    """

    def __init__(self, spawner: Spawner, clock: IReactorTime) -> None:
        self._spawner = spawner
        self._clock = clock
        self._turns = Turns(_PROGRAMS, clock, "a password program")

    async def run(
        self, words: Sequence[str], environment: Mapping[str, str], timeout: float, visitor: Visitor = ANYONE
    ) -> bytes:
        """Return the program's output; `timeout` is in seconds, from its start.

        Raises SecretUnavailable, and Refusal if it was not the visitor's turn in time. Cancelling kills the program.
        """
        await self._turns.take(visitor)
        try:
            program = _Program(words[0])
            try:
                self._spawner.spawnProcess(
                    program,
                    words[0],
                    list(words),
                    env={"PATH": _SEARCH_PATH, "LANG": "C.UTF-8", **environment},
                    path="/",
                    childFDs={0: "w", 1: "r", 2: "r"},
                )
            except OSError as problem:
                raise SecretUnavailable(f"{words[0]} cannot be started: {problem.strerror}") from None
            try:
                return await program.written.addTimeout(timeout, self._clock)
            except DeferredTimeout:
                raise SecretUnavailable(f"{words[0]} took longer than {timeout:g} s") from None
        finally:
            self._turns.give()


class _Program(ProcessProtocol):
    """One run; `written` fires with the password."""

    transport: IProcessTransport

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._output = bytearray()
        self._done = False
        self.written: Deferred[bytes] = Deferred(lambda _: self._give_up())

    def connectionMade(self) -> None:
        """Close the program's standard input."""
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:  # noqa: N802  Twisted's name
        """Collect output, up to the limit."""
        if self._done:
            return
        self._output += data
        if len(self._output) > _LARGEST + 2:
            self._fail(f"{self._shown} wrote more than {_LARGEST} bytes")

    def processEnded(self, reason: Failure) -> None:  # noqa: N802  Twisted's name
        """Fire `written` with the password or the failure."""
        if reason.check(error.ProcessDone) is None:
            ending = reason.value
            status, by_signal = getattr(ending, "exitCode", None), getattr(ending, "signal", None)
            how = f"status {status}" if by_signal is None else f"signal {by_signal}"
            self._fail(f"{self._shown} exited with {how}")
        elif not self._done:
            self._done = True
            try:
                password = _checked(bytes(self._output), self._shown)
            except SecretUnavailable as problem:
                self.written.errback(problem)
            else:
                self.written.callback(password)

    def _fail(self, why: str) -> None:
        if not self._done:
            self._give_up()
            self.written.errback(SecretUnavailable(why))

    def _give_up(self) -> None:
        self._done = True
        self._output.clear()
        with contextlib.suppress(error.ProcessExitedAlready):
            self.transport.signalProcess(signal.SIGKILL.name.removeprefix("SIG"))
        # Even after it has exited: its children may keep the pipes open.
        self.transport.loseConnection()


def _checked(data: bytes, shown: str) -> bytes:
    if data.startswith(_BYTE_ORDER_MARKS):
        raise SecretUnavailable(f"{shown} begins with a byte order mark: save it as plain text without one")
    password = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    if not password:
        raise SecretUnavailable(f"{shown}: the password is empty")
    if len(password) > _LARGEST:
        raise SecretUnavailable(f"{shown}: the password is longer than {_LARGEST} bytes")
    return password
