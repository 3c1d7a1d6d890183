"""The load generator: compiles `load.c` and runs it.

In: what to do, for which relay.  Out: the counts that the program prints, as a dict.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("load.c")
_LIBRARIES = ("-lssl", "-lcrypto", "-lm")
_PR_SET_PDEATHSIG = 1  # in linux/prctl.h
# Long beyond any measurement: a bound on a hang.
_PATIENCE = 300  # seconds


class CannotMeasure(Exception):
    """Something that is needed is missing, or has failed; the message says what."""


def compile_load(directory: Path) -> Path:
    """Compile the program into `directory` and return its path.  Raises `CannotMeasure`, saying what to install."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotMeasure("the load generator cannot be compiled without a C compiler: apt install gcc libc6-dev")
    program = directory / "load"
    done = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(SOURCE), *_LIBRARIES], capture_output=True, text=True, check=False
    )
    if done.returncode and ("openssl/" in done.stderr or "-lssl" in done.stderr):
        raise CannotMeasure("the load generator cannot be compiled without OpenSSL's headers: apt install libssl-dev")
    if done.returncode:
        raise CannotMeasure(f"the load generator cannot be compiled:\n{done.stderr}")
    return program


def start_on(core: int) -> None:
    """Tie this process, which is about to become a relay or the load, to a core and to the life of its parent."""
    os.sched_setaffinity(0, {core})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Load:
    """The compiled program, tied to one core."""

    def __init__(self, program: Path, core: int) -> None:
        self._program = program
        self._core = core

    def run(
        self,
        mode: str,
        pids: Sequence[int],
        *,
        established: Callable[[], None] | None = None,
        finished: Callable[[], None] | None = None,
        **arguments: object,
    ) -> dict[str, Any]:
        """Do the work and return the counts; see `load.c` for modes and arguments.

        `established` is called when all sessions stand and nothing is sent yet, `finished` when all is done and the
        sessions still stand.  Raises `CannotMeasure` if the work could not be done.
        """
        paused = established is not None or finished is not None
        words = [f"{name}={value}" for name, value in arguments.items() if value is not None]
        if pids:
            words.append("pids=" + ",".join(map(str, pids)))
        if paused:
            words.append("pause=1")
        with subprocess.Popen(
            [self._program, mode, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: start_on(self._core),
        ) as process:
            assert process.stdin is not None  # noqa: S101  it is a pipe; narrows the type
            assert process.stdout is not None  # noqa: S101  the same
            counts: dict[str, Any] = {}
            try:
                for line in process.stdout:
                    if line.startswith("{"):
                        counts = json.loads(line)
                        continue
                    call = established if line.startswith("established") else finished
                    if call is not None:
                        call()
                    process.stdin.write("\n")
                    process.stdin.flush()
                _, errors = process.communicate(timeout=_PATIENCE)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise CannotMeasure(errors.strip() or f"the load generator ended with status {process.returncode}")
        return counts
