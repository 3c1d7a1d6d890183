"""Runs one fuzz target under atheris, in a process of its own: `python -m tests.fuzz.worker TARGET SECONDS [FAULT]`.

In: a target; with `FAULT`, the gateway is broken so first.  Out: libFuzzer's report on standard error; exit status 0 if
nothing was found in `SECONDS`.  What is found is in the current directory, in a file `crash-…` or `timeout-…`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import atheris

_CORPUS = Path(__file__).with_name("corpus")
# Bytes of the longest input, seconds that one may take, MiB that the process may have.
_LONGEST, _SLOWEST, _MEMORY = 4096, 10, 2048


def main(name: str, seconds: str, fault: str = "") -> None:
    """Fuzz until the time is over; does not return."""
    with atheris.instrument_imports(include=["gateway"]):
        target: Any = importlib.import_module(f"tests.fuzz.{name}")
    for plant in target.FAULTS:
        if plant.__name__ == fault:
            plant()
    with TemporaryDirectory() as directory:
        for number, seed in enumerate(target.SEEDS):
            (Path(directory) / f"seed-{number}").write_bytes(seed)
        kept = _CORPUS / name
        options = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", f"-timeout={_SLOWEST}"]
        options += [f"-rss_limit_mb={_MEMORY}", "-verbosity=0", "-print_final_stats=1"]
        corpora = [directory, *([str(kept)] if kept.is_dir() else [])]
        # Planted faults are sought with the same numbers each time.
        atheris.Setup([sys.argv[0], *options, *(["-seed=1"] if fault else []), *corpora], target.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
