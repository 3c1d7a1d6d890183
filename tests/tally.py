"""Counts what a run of the tests gave, and keeps the list of tests that failed once and then passed.

In: pytest's JUnit file; `tests/repeats.toml`.  Out: lines for the result of `.ci/run`; new entries in the list; exit
status 1 if a test was skipped, or if the list lacks an analysis.

A relay's one failure in a thousand runs is the fault to look for, so a test that passes when it is repeated is not
passed over: it gets an entry here, for somebody to write down what was late and why that is no fault of the gateway, or
what was repaired.  Each failure needs an analysis of its own.  Without it a committed entry fails the run at its
beginning; at its end the run fails if a test that has an entry failed at first again, or if more than `--new` tests did
so for the first time.  Those few are named, with what the entry needs.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPEATS = Path(__file__).with_name("repeats.toml")
# What an analysis consists of.
_ANALYSIS = ("late", "because")
_MOST_SHOWN = 300


@dataclass(frozen=True)
class Run:
    """What a JUnit file says: how many tests passed and were skipped, and which failed with which message."""

    passed: int
    skipped: int
    failed: dict[str, str]


def read(junit: Path) -> Run:
    """Read a JUnit file.  A test whose body and whose fixture both failed counts once."""
    skipped, failed, names = 0, {}, set()
    for case in ElementTree.parse(junit).iter("testcase"):  # noqa: S314  pytest has just written it
        name = f"{str(case.get('classname')).replace('.', '/')}.py::{case.get('name')}"
        names.add(name)
        skipped += case.find("skipped") is not None
        problems = [*case.findall("failure"), *case.findall("error")]
        if problems:
            failed.setdefault(name, " ".join(str(problems[0].get("message")).split())[:_MOST_SHOWN])
    return Run(len(names) - skipped - len(failed), skipped, failed)


def record(repeats: Path, run: str, failed: dict[str, str]) -> None:
    """Add an entry without an analysis for each test that failed and passed when it was repeated."""
    with repeats.open("a") as file:
        for test, failure in failed.items():
            values = {"test": test, "run": run, "failure": failure, "late": "", "because": ""}
            file.write(f"\n[[repeat]]\nseen = {datetime.now(UTC).date()}\n")
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def complaints(repeats: Path) -> tuple[list[str], list[str]]:
    """Return what the list lacks: analyses of first failures; analyses of later ones, and copies of an earlier one."""
    first, later = [], []
    earlier: dict[str, list[Any]] = {}
    for entry in tomllib.loads(repeats.read_text()).get("repeat", []):
        test, analysis = entry["test"], [str(entry.get(key, "")).strip() for key in _ANALYSIS]
        before = earlier.setdefault(test, [])
        what = f"{test}, which failed on {entry['seen']} and then passed ({entry['failure']})"
        if not all(analysis):
            again = "; its earlier analysis did not hold, so it needs a new one" if before else ""
            (later if before else first).append(f"no analysis of {what}{again}")
        elif analysis in before:
            later.append(f"only a copy of an earlier analysis of {what}")
        before.append(analysis)
    return first, later


def main(arguments: Sequence[str] | None = None) -> int:
    """Count one run (`--run NAME --junit FILE`, with `--repeated` if its failures passed later), or `--check`."""
    parser = argparse.ArgumentParser(prog="python -m tests.tally")
    parser.add_argument("--repeats", type=Path, default=REPEATS)
    parser.add_argument("--run")
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--repeated", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--new", type=int, default=0, help="so many first failures may lack an analysis")
    options = parser.parse_args(arguments)
    if options.check:
        first, later = complaints(options.repeats)
        for each in first + later:
            print(f"{options.repeats.name}: {each}")
        return 1 if later or len(first) > options.new else 0
    run = read(options.junit)
    passed = run.passed + (len(run.failed) if options.repeated else 0)
    failed = 0 if options.repeated else len(run.failed)
    print(f"{options.run}: {passed} passed, {failed} failed, {run.skipped} skipped")
    if options.repeated:
        record(options.repeats, options.run, run.failed)
        print(*(f"{options.run}: failed at first: {test}" for test in run.failed), sep="\n")
    return 1 if run.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
