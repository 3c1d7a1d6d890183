"""What `.ci/run` makes of a test that fails and then passes, and of one that is skipped."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.tally import main, read

_JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="tests.test_one" name="test_well" time="0.1" />
<testcase classname="tests.test_one" name="test_late[a b]" time="0.1">
<failure message="TimeoutError: waited&#10;&quot;10 s&quot; \\ long">...</failure></testcase>
<testcase classname="tests.test_one" name="test_late[a b]"><error message="at teardown">...</error></testcase>
%s</testsuite></testsuites>"""
_LATE = "tests/test_one.py::test_late[a b]"


@pytest.fixture
def junit(tmp_path: Path) -> Path:
    """Return a JUnit file with a test that passed and one that failed."""
    path = tmp_path / "junit.xml"
    path.write_text(_JUNIT % "")
    return path


@pytest.fixture
def repeats(tmp_path: Path) -> Path:
    """Return an empty list."""
    path = tmp_path / "repeats.toml"
    path.write_text("# A list.\n")
    return path


def _repeat(junit: Path, repeats: Path) -> int:
    return main(["--run", "a run", "--junit", str(junit), "--repeats", str(repeats), "--repeated"])


def _analyse(repeats: Path, late: str) -> None:
    text = repeats.read_text().replace('late = ""', f'late = "{late}"').replace('because = ""', 'because = "a reason"')
    repeats.write_text(text)


def _check(repeats: Path, new: int = 0) -> int:
    return main(["--check", "--new", str(new), "--repeats", str(repeats)])


def test_a_run_is_counted(junit: Path, repeats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test that failed twice, in its body and at its end, is one test."""
    assert main(["--run", "a run", "--junit", str(junit), "--repeats", str(repeats)]) == 0
    assert capsys.readouterr().out == "a run: 1 passed, 1 failed, 0 skipped\n"
    assert read(junit).failed == {_LATE: 'TimeoutError: waited "10 s" \\ long'}


def test_a_skipped_test_fails_the_run(junit: Path, repeats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit.write_text(_JUNIT % '<testcase classname="tests.test_one" name="test_no"><skipped message="x"/></testcase>')
    assert _repeat(junit, repeats) == 1
    assert "2 passed, 0 failed, 1 skipped" in capsys.readouterr().out


def test_a_repeat_that_is_not_on_the_list_is_put_there(
    junit: Path, repeats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its analysis is missing: a list that is committed like this fails the next run at its beginning."""
    assert _repeat(junit, repeats) == 0
    assert _LATE in capsys.readouterr().out
    assert _check(repeats) == 1
    assert f"no analysis of {_LATE}" in capsys.readouterr().out
    (entry,) = tomllib.loads(repeats.read_text())["repeat"]
    assert (entry["test"], entry["run"]) == (_LATE, "a run")
    assert entry["failure"] == 'TimeoutError: waited "10 s" \\ long'


@pytest.mark.parametrize("missing", ["late", "because"])
def test_half_an_analysis_is_none(junit: Path, repeats: Path, missing: str) -> None:
    _repeat(junit, repeats)
    _analyse(repeats, "the broker's process")
    assert _check(repeats) == 0
    lines = repeats.read_text().splitlines()
    repeats.write_text("\n".join(f'{missing} = " "' if line.startswith(missing) else line for line in lines))
    assert _check(repeats) == 1


def test_a_repeat_of_a_test_on_the_list_needs_a_new_analysis(
    junit: Path, repeats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The analysis of its last failure does not count, and neither does a copy of it."""
    _repeat(junit, repeats)
    _analyse(repeats, "the broker's process")
    _repeat(junit, repeats)
    assert _check(repeats) == 1
    assert "needs a new one" in capsys.readouterr().out
    unanalysed = repeats.read_text()
    _analyse(repeats, "the broker's process")
    assert _check(repeats) == 1
    assert "copy of an earlier analysis" in capsys.readouterr().out
    repeats.write_text(unanalysed)
    _analyse(repeats, "the name server")
    assert _check(repeats) == 0


def test_a_few_first_failures_do_not_fail_the_run_that_sees_them(
    junit: Path, repeats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named; a second failure of one of them is one too many."""
    _repeat(junit, repeats)
    assert _check(repeats, new=1) == 0
    assert f"no analysis of {_LATE}" in capsys.readouterr().out
    _repeat(junit, repeats)
    assert _check(repeats, new=2) == 1


def test_many_first_failures_fail_the_run(junit: Path, repeats: Path) -> None:
    another = '<testcase classname="tests.test_one" name="test_no"><failure message="x"/></testcase>'
    junit.write_text(_JUNIT % another)
    _repeat(junit, repeats)
    assert _check(repeats, new=1) == 1
    assert _check(repeats, new=2) == 0


def test_a_run_without_failures_adds_nothing(junit: Path, repeats: Path) -> None:
    junit.write_text('<testsuites><testsuite><testcase classname="tests.a" name="test_b"/></testsuite></testsuites>')
    before = repeats.read_text()
    assert main(["--run", "a run", "--junit", str(junit), "--repeats", str(repeats)]) == 0
    assert repeats.read_text() == before
