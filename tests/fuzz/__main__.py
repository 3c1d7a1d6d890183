"""Runs the fuzzers: `python -m tests.fuzz [TARGET …] [--seconds N] [--jobs N] [--planted]`.

In: targets, all of them by default.  Out: a line for each, and for one that found something what it was and the file
that repeats it; exit status 1 if anything was found.  With `--planted` it is the other way round: the gateway is broken
in each way that a target knows, and exit status 1 means that a fault was not found.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz import TARGETS

_ROOT = Path(__file__).parent.parent.parent
_FOUND = _ROOT / "fuzz-found"
# Beyond its time a worker needs some for its start, and for an input that it has begun.
_SPARE = 600


def _run(target: str, seconds: int, fault: str) -> tuple[bool, str]:
    """Run one target; return whether it found anything, and what there is to say about it."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tests.fuzz.worker", target, str(seconds), fault]
        worker = subprocess.run(
            command,
            cwd=directory,
            env={"PYTHONPATH": str(_ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=seconds + _SPARE,
            check=False,
        )
        inputs = [path for path in Path(directory).iterdir() if path.is_file()]
        runs = re.search(r"number_of_executed_units: (\d+)", worker.stderr)
        if worker.returncode == 0:
            return False, f"{runs[1] if runs else '?'} inputs, nothing found"
        if fault:
            # A worker that could not begin has found nothing.
            return bool(inputs), f"found, {runs[1] if runs else '?'} inputs" if inputs else worker.stderr[-3000:]
        _FOUND.mkdir(exist_ok=True)
        kept = [shutil.copy(path, _FOUND / f"{target}-{path.name}") for path in inputs]
        repeat = [f"repeat: python -m tests.fuzz {target} --replay {path}" for path in kept]
        return True, "\n".join([worker.stdout[-3000:], *repeat])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input of one target, without atheris")
    options = parser.parse_args(arguments)
    targets = options.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    if options.replay is not None:
        importlib.import_module(f"tests.fuzz.{targets[0]}").check(options.replay.read_bytes())
        return 0
    runs = [
        (target, options.seconds, fault)
        for target in targets
        for fault in ([each.__name__ for each in _faults(target)] if options.planted else [""])
    ]
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (target, _, fault), (found, words) in zip(runs, pool.map(lambda run: _run(*run), runs), strict=True):
            print(f"{target}{f', {fault}' if fault else ''}: {words}", flush=True)
            wrong += found is not bool(fault)
    return 1 if wrong else 0


def _faults(target: str) -> Sequence[type]:
    faults: Sequence[type] = importlib.import_module(f"tests.fuzz.{target}").FAULTS
    return faults


if __name__ == "__main__":
    sys.exit(main())
