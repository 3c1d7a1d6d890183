"""The tool that changes a module in one place at a time: what it changes, and what it leaves alone."""

from __future__ import annotations

import ast

from tests.mutate import changes, mutant

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
