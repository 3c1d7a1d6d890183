"""The tool that changes a module in one place at a time: what it changes, and what it leaves alone."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import Places, changes, mutant, replace

SOURCE = """
class A:
    __slots__ = ("b",)

    def f(self, x: int | None = None) -> bool:
        if x is None and self.b:
            raise ValueError(f"{x + 1}")
        self.b = x + 1
        return x < 3
"""


def bodies(source: str) -> list[str]:
    return [ast.unparse(mutant(source, index)) for index in range(len(changes(ast.parse(source))))]


def test_every_mutant_differs_from_the_module_and_the_others() -> None:
    """In one place; types, slots and the words of errors stay."""
    made = bodies(SOURCE)
    original = ast.unparse(ast.parse(SOURCE))
    assert len(made) == len(set(made)) == 11
    for each in made:
        differing = [pair for pair in zip(each.split("\n"), original.split("\n"), strict=True) if pair[0] != pair[1]]
        assert len(differing) == 1
        assert "__slots__ = ('b',)" in each
        assert "x: int | None=" in each
    changed = "\n".join(made)
    for line in (
        "if x is not None and self.b:",
        "if x is None or self.b:",
        "if True:",
        "if False:",
        "self.b = x - 1",
        "self.b = x + 2",
        "return x <= 3",
        "return x < 4",
        "return None",
    ):
        assert line in changed


def test_a_change_is_told_by_its_line() -> None:
    """As people look for it."""
    words = [change.words() for change in changes(ast.parse(SOURCE))]
    assert "9: x < 3  \u2192  x <= 3" in words


def test_a_change_is_made_in_the_loaded_functions_that_have_it() -> None:
    """Whoever refers to one, also under another name, gets the change; what runs at loading is no function's."""
    source = "LIMIT = 3\n\nclass A:\n    def f(self, x: int = 1) -> bool:\n        return (lambda: x < LIMIT)()\n"
    loaded: dict[str, Any] = {}
    exec(compile(source, "made.py", "exec"), loaded)  # noqa: S102 - it is written above
    tree = ast.parse(source)
    places = Places(tree)
    words = {change.words(): (index, change) for index, change in enumerate(changes(tree))}
    assert places.function(words["1: 3  \u2192  4"][1].node) is None
    assert places.lines(words["1: 3  \u2192  4"][1].node) == {5}
    assert places.function(words["4: 1  \u2192  2"][1].node) is None
    index, change = words["5: x < LIMIT  \u2192  x <= LIMIT"]
    assert (places.function(change.node), places.lines(change.node)) == (("A.f", 4), {5})
    known = loaded["A"].f
    assert not known(None, 3)
    assert replace(("A.f", 4), compile(mutant(source, index), "made.py", "exec"), "made.py")
    assert known(None, 3)


def test_what_a_changed_function_has_kept_is_forgotten() -> None:
    """And whoever uses it must notice, though it runs for the first alone."""
    source = "from functools import cache\n\n@cache\ndef f() -> int:\n    return 1\n\ndef g() -> int:\n    return f()\n"
    loaded: dict[str, Any] = {}
    exec(compile(source, "kept.py", "exec"), loaded)  # noqa: S102 - it is written above
    assert loaded["f"]() == 1
    tree = ast.parse(source)
    index, change = next(each for each in enumerate(changes(tree)) if each[1].words() == "5: 1  \u2192  2")
    assert Places(tree).lines(change.node) == {5, 8}
    assert replace(("f", 3), compile(mutant(source, index), "kept.py", "exec"), "kept.py")
    assert loaded["f"]() == 2


@pytest.mark.slow
def test_what_no_test_notices_is_printed(tmp_path: Path) -> None:
    """With its line, whether it acts in a function or when the module is loaded."""
    (tmp_path / "tests").mkdir()
    for name in ("__init__", "mutate", "mutants"):
        shutil.copy(Path("tests", f"{name}.py"), tmp_path / "tests")
    (tmp_path / "made.py").write_text(
        "MOST = 7\n\n\ndef few(number):\n    return number < MOST\n\n\ndef unused():\n    return 1\n"
    )
    (tmp_path / "tests" / "test_made.py").write_text("from made import few\n\n\ndef test_few():\n    assert few(1)\n")
    command = [sys.executable, "-m", "tests.mutate", "made.py", "tests/test_made.py", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("alive")]
    assert sorted(told) == [
        "alive (no test executes it) made.py:9: 1  \u2192  2",
        "alive (no test executes it) made.py:9: return 1  \u2192  return None",
        "alive made.py:1: 7  \u2192  8",
        "alive made.py:5: number < MOST  \u2192  number <= MOST",
    ]
    assert done.stdout.splitlines()[-1] == "5 changes tried: {'alive': 4, 'noticed': 1}"
