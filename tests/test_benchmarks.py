"""The benchmark works: its load generator compiles, it measures, and its table says what was counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import CannotMeasure, compile_load
from benchmarks.measurements import DIRECT, Figure, Measurement
from benchmarks.shield import kernel_threads, shielded
from benchmarks.table import number, render
from tests.tools import require_tool

ROOT = Path(__file__).parent.parent


def printed(module: str, *arguments: str, seconds: float = 120) -> str:
    """Run a benchmark, which must succeed within so many seconds; return what it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_quick_run_gives_a_table(tmp_path: Path) -> None:
    """One command prints it and saves it with the counts."""
    require_compiler(tmp_path)
    table = printed(
        "benchmarks", "--quick", "--only=roundtrip", "--relays=gateway", f"--save={tmp_path / 'it'}", seconds=60
    )
    assert "CPU per round trip" in table
    assert table == (tmp_path / "it.md").read_text()
    (results,) = json.loads((tmp_path / "it.json").read_text())["rounds"]
    counts = results["roundtrip"]["gateway"]
    assert counts["units"] > 0
    assert counts["relay_cpu"] > 0
    assert counts["cipher"].startswith("TLSv1.3 ")


def require_compiler(directory: Path) -> None:
    """Skip on a user's machine without OpenSSL's headers; fail in CI."""
    require_tool("cc")
    try:
        compile_load(directory)
    except CannotMeasure as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line tells a user what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMeasure, match="apt install gcc"):
        compile_load(tmp_path)


COST = Figure("cost", "s", lambda own, direct: own["cost"] - direct.get("cost", 0), ("nginx",))
WORK = Measurement("work", "work", "some work", "up", figures=(COST,))


def cells(table: str, label: str) -> list[str]:
    """Return the row of the table that begins with `label`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(row for row in rows if row[0] == label)


def rounds(**costs: list[float]) -> list[dict[str, dict[str, dict[str, float]]]]:
    """Return counts of as many rounds as each relay has costs."""
    turns = zip(*costs.values(), strict=True)
    return [{"work": {name: {"cost": cost} for name, cost in zip(costs, turn, strict=True)}} for turn in turns]


def test_threads_are_kept_off_a_core_and_put_back() -> None:
    """As far as they may be moved; one that has gone is no reason to stop."""
    cores = os.sched_getaffinity(0)
    core = max(cores)
    with subprocess.Popen(["sleep", "60"]) as sleeping, subprocess.Popen(["true"]) as gone:
        try:
            gone.wait(20)
            with shielded(core, [sleeping.pid, gone.pid]) as count:
                assert os.sched_getaffinity(sleeping.pid) == (cores - {core} or cores)
                assert count == (len(cores) > 1)
            assert os.sched_getaffinity(sleeping.pid) == cores
        finally:
            sleeping.kill()


def test_the_threads_of_the_kernel_are_no_processes() -> None:
    """A container may hide them, but none of what this process and its parents are is among them."""
    threads = kernel_threads()
    assert os.getpid() not in threads
    assert 1 not in threads


def test_the_table_shows_medians_and_spread() -> None:
    """The median is not the mean: one disturbed round does not change it."""
    table = render([WORK], ["gateway"], rounds(gateway=[1, 2, 90]))
    assert cells(table, "cost") == ["cost", "s", "2.00 (1.00..90.0)"]


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which the machine was slow for all changes no ratio."""
    table = render([WORK], ["gateway", "nginx"], rounds(gateway=[2, 20, 4], nginx=[1, 10, 2]))
    assert cells(table, "cost / nginx's") == ["cost / nginx's", "ratio", "2.00 (2.00..2.00)", "1.00 (1.00..1.00)"]


def test_what_goes_without_a_relay_is_taken_off() -> None:
    """Added cost is that above the same round's cost without a relay, and no relay has no ratio."""
    table = render([WORK], ["gateway", "nginx", DIRECT], rounds(gateway=[5], nginx=[3], direct=[1]))
    assert cells(table, "cost")[2:4] == ["4.00", "2.00"]
    assert cells(table, "cost / nginx's")[2:] == ["2.00", "1.00", "-"]


def test_a_relay_that_failed_is_shown_as_failed() -> None:
    """It does not disappear from the table."""
    results = [*rounds(gateway=[1], nginx=[1]), {"work": {"gateway": {"failed": "it fell"}, "nginx": {"cost": 1}}}]
    table = render([WORK], ["gateway", "nginx"], results)
    assert cells(table, "cost")[2] == "failed"
    assert cells(table, "cost / nginx's")[2:] == ["failed", "1.00 (1.00..1.00)"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (123456, "123456"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.12"), (0.0123, "0.012")],
)
def test_numbers_have_two_or_three_digits(value: float, shown: str) -> None:
    """More would be noise."""
    assert number(value) == shown


@pytest.mark.slow
def test_outages_and_storms_are_measured() -> None:
    """A small one of each: everybody is told, and served again in the end."""
    told = printed("benchmarks.outage", "--only=storm,killed", "--storm=30", "--pacing=0,50", "--seconds=4")
    unpaced, paced, killed = told.splitlines()
    assert unpaced.startswith("storm of 30, pacing 0/s: ")
    assert paced.startswith("storm of 30, pacing 50/s: ")
    assert "20 standing sessions: p50 " in paced
    assert killed.startswith("killed for ")
    assert "100 sessions that stood all told within " in killed


@pytest.mark.slow
def test_the_store_is_measured() -> None:
    """How many messages a second are written, on the disk as it is and on a slow one."""
    told = printed("benchmarks.store", "--only=write", "--seconds=1")
    # The rate is that of one second, in which a busy disk may write nothing.
    line = r"^write, [^:]+: [0-9,]+ messages of 200 bytes a second, .*acknowledged after ([0-9,]+) ms \(p50\)"
    waits = re.findall(line, told, re.MULTILINE)
    assert len(waits) == 2, told
    assert all(int(wait.replace(",", "")) > 0 for wait in waits), told


@pytest.mark.slow
def test_the_longest_turn_is_measured() -> None:
    """One hostile input, this tree alone: a row with a time."""
    told = printed("benchmarks.turns", "--only", "CONNECT of", seconds=300)
    assert re.fullmatch(r"\| CONNECT of [^|]+ \| [0-9.,]+ \([0-9.,]+\) \|", told.splitlines()[-1]), told
