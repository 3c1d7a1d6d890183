"""Runs programs: for passwords, and for certificates.

In: a program, and what it reads.  Out: what it writes; `SecretUnavailable`, which says what is wrong and never contains
its output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IReactorTime
from twisted.internet.process import Process, reapProcessHandlers
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from gateway.config.secret_files import LARGEST_SECRET, SecretUnavailable, checked_secret
from gateway.rules.turns import ANYONE, Turns, Visitor

# Programs that may run at the same time; after an outage every device may need one.
_PROGRAMS = 8
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"


class Programs:
    """Runs programs that write a password or a certificate to standard output, a few at a time.

    Programs run without a shell and with a minimal environment. One that takes too long or writes too much is killed.
    What a program has started is killed when the program ends or is killed, and when the reactor stops. Standard error
    is discarded, since it may contain anything; with `shows_errors` it is this process's.
    """

    def __init__(self, reactor: Any, clock: IReactorTime, *, shows_errors: bool = False) -> None:
        """Take a reactor that provides IReactorCore, IReactorProcess and IReactorFDSet, and the clock of timeouts."""
        self._reactor = reactor
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
                # With a person before it, a program keeps the terminal, where it may ask something.
                kind = Process if self._shows_errors else _OwnGroup
                kind(
                    self._reactor,
                    words[0],
                    list(words),
                    {"PATH": _SEARCH_PATH, "LANG": "C.UTF-8", **environment},
                    "/",
                    program,
                    childFDs={0: "w", 1: "r", 2: 2 if self._shows_errors else "r"},
                )
            except (OSError, ValueError) as problem:  # ValueError: the locale lacks a character of the environment
                cause = problem.strerror if isinstance(problem, OSError) else problem
                raise SecretUnavailable(f"{words[0]} cannot be started: {cause}") from None
            trigger = self._reactor.addSystemEventTrigger("during", "shutdown", program.kill)
            try:
                return await program.written.addTimeout(timeout, self._clock)
            except DeferredTimeout:
                raise SecretUnavailable(f"{words[0]} took longer than {timeout:g} s") from None
            finally:
                # A ValueError says that the trigger has fired.
                with contextlib.suppress(ValueError):
                    self._reactor.removeSystemEventTrigger(trigger)
        finally:
            self._turns.give()


class _OwnGroup(Process):
    """A process with a process group of its own; signals are sent to the whole group.

    It is reaped when all its pipes are closed. Until then no other process and no other group can get its number, so
    a signal never goes to a stranger.
    """

    pid: int | None

    def __init__(self, *arguments: Any, **more: Any) -> None:
        try:
            super().__init__(*arguments, **more)
        except RuntimeError:
            # The last that Twisted does is to register it, after it has reaped one that has ended already.
            if self not in reapProcessHandlers.values():
                raise

    def _trySpawnInsteadOfFork(  # noqa: N802  Twisted's name
        self, path: str, _uid: None, _gid: None, _executable: str, args: list[str], environment: Any, kwargs: Any
    ) -> bool:
        """Start it without a copy of this process: fork(2) takes 9 ms for one of 300 MiB, this 0.3 ms.

        Twisted's own way, `posix_spawn`, has no group here, and asks about each open descriptor before.
        """
        stdin, stdout, stderr = (kwargs["fdmap"][number] for number in range(3))
        started = subprocess.Popen(  # noqa: S603  the program is from the configuration
            args, stdin=stdin, stdout=stdout, stderr=stderr, cwd=path, env=environment, process_group=0
        )
        self.pid, self.status = started.pid, -1
        # This object reaps it.
        started.returncode = 0
        reapProcessHandlers[started.pid] = self
        return True

    def signalProcess(self, signalID: str) -> None:  # noqa: N802, N803  Twisted's names
        """Send a signal to the group; raises `ProcessExitedAlready` if the process was reaped."""
        if self.pid is None:
            raise error.ProcessExitedAlready
        number = signal.Signals[f"SIG{signalID}"]
        # Who has changed its user may not be ours to signal.
        with contextlib.suppress(PermissionError):
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                # It has left the group.
                os.kill(self.pid, number)

    def reapProcess(self) -> None:  # noqa: N802  Twisted's name
        """Reap the process if it has ended and its pipes are closed; kill what is left of its group before."""
        if self.pipes or self.pid is None:
            return
        # Of one that somebody else has reaped, nothing is known, as in Twisted; the others must still be reaped.
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.signalProcess("KILL")
                super().reapProcess()


class _Program(ProcessProtocol):
    """One run; `written` fires with the output."""

    transport: Process

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
        self.kill()
        # Even after it has exited: its children may keep the pipes open.
        self.transport.loseConnection()

    def kill(self) -> None:
        """Kill the program."""
        with contextlib.suppress(error.ProcessExitedAlready):
            self.transport.signalProcess("KILL")
