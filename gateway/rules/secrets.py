"""Runs programs: for passwords, and for certificates.

In: a program, and what it reads.  Out: what it writes; `SecretUnavailable`, which says what is wrong and never contains
its output.
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
    """Runs programs that write a password or a certificate to standard output, a few at a time.

    Programs run without a shell and with a minimal environment. A program that takes too long or writes too much is
    killed. Standard error is discarded, since it may contain anything; with `shows_errors` it is this process's.
    """

    def __init__(self, spawner: Spawner, clock: IReactorTime, *, shows_errors: bool = False) -> None:
        self._spawner = spawner
        self._clock = clock
        self._shows_errors = shows_errors
        self._turns = Turns(_PROGRAMS, clock, "a password program")

    async def run(
        self, words: Sequence[str], environment: Mapping[str, str], timeout: float, visitor: Visitor = ANYONE
    ) -> bytes:
        """Return the password that the program writes; `timeout` is in seconds, from its start.

        Raises SecretUnavailable, and Refusal if it was not the visitor's turn in time. Cancelling kills the program.
        """
        output = await self.output(words, environment, timeout, visitor)
        return checked_secret(output, words[0])

    async def output(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        timeout: float,
        visitor: Visitor = ANYONE,
        *,
        given: bytes = b"",
        limit: int = LARGEST_SECRET + 2,
    ) -> bytes:
        """Return all that the program writes, up to `limit` bytes; it reads `given`.  Otherwise like `run`."""
        await self._turns.take(visitor)
        try:
            program = _Program(words[0], given, limit)
            try:
                self._spawner.spawnProcess(
                    program,
                    words[0],
                    list(words),
                    env={"PATH": _SEARCH_PATH, "LANG": "C.UTF-8", **environment},
                    path="/",
                    childFDs={0: "w", 1: "r", 2: 2 if self._shows_errors else "r"},
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
    """One run; `written` fires with the output."""

    transport: IProcessTransport

    def __init__(self, shown: str, given: bytes, limit: int) -> None:
        self._shown = shown
        self._given = given
        self._limit = limit
        self._output = bytearray()
        self._done = False
        self.written: Deferred[bytes] = Deferred(lambda _: self._give_up())

    def connectionMade(self) -> None:
        """Write to the program's standard input, and close it."""
        if self._given:
            self.transport.write(self._given)
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:  # noqa: N802  Twisted's name
        """Collect output, up to the limit."""
        if self._done:
            return
        self._output += data
        if len(self._output) > self._limit:
            self._fail(f"{self._shown} wrote more than {min(self._limit, LARGEST_SECRET)} bytes")

    def processEnded(self, reason: Failure) -> None:  # noqa: N802  Twisted's name
        """Fire `written` with the output or the failure."""
        if reason.check(error.ProcessDone) is None:
            ending = reason.value
            status, by_signal = getattr(ending, "exitCode", None), getattr(ending, "signal", None)
            how = f"status {status}" if by_signal is None else f"signal {by_signal}"
            self._fail(f"{self._shown} exited with {how}")
        elif not self._done:
            self._done = True
            self.written.callback(bytes(self._output))

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
