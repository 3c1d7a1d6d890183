"""Passwords from programs.

In: a program.  Out: the password that it writes; `SecretUnavailable`, which says what is wrong and never contains its
output.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IProcessTransport, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from gateway.config.secret_files import LARGEST_SECRET, SecretUnavailable, checked_secret
from gateway.rules.turns import ANYONE, Turns, Visitor

# Programs that may run at the same time; after an outage every device may need one.
_PROGRAMS = 8
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"


class Spawner(Protocol):
    """Starts programs: a reactor that provides IReactorProcess and IReactorTime."""

    def spawnProcess(self, *arguments: Any, **more: Any) -> IProcessTransport:  # noqa: N802  the reactor's name
        """See `IReactorProcess`."""


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
        if len(self._output) > LARGEST_SECRET + 2:
            self._fail(f"{self._shown} wrote more than {LARGEST_SECRET} bytes")

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
                password = checked_secret(bytes(self._output), self._shown)
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
