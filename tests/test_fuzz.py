"""The fuzz targets on the inputs that are kept, without atheris: `.ci/run` runs the fuzzers themselves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests import fuzz
from tests.fuzz.tools import Choices, calls, cut_in_three

_CORPUS = Path(fuzz.__file__).with_name("corpus")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_is_kept_finds_nothing(name: str) -> None:
    """Neither the inputs to begin with, nor those that once found something."""
    target: Any = importlib.import_module(f"tests.fuzz.{name}")
    kept = [path.read_bytes() for path in sorted(_CORPUS.glob(f"{name}/*"))]
    assert target.SEEDS
    for data in (*target.SEEDS, *kept):
        target.check(data)


def test_the_corpus_is_small_and_of_targets_that_exist() -> None:
    files = [path for path in _CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(fuzz.TARGETS)
    assert sum(path.stat().st_size for path in files) < 200_000


def test_every_target_knows_a_way_to_break_the_gateway() -> None:
    """`python -m tests.fuzz --planted` shows that each is found."""
    targets: list[Any] = [importlib.import_module(f"tests.fuzz.{name}") for name in fuzz.TARGETS]
    assert all(target.FAULTS for target in targets)


def test_calls_are_counted() -> None:
    assert calls(lambda: [ord(character) for character in 100 * "a"]) >= 100
    assert calls(lambda: None) < 5


@pytest.mark.parametrize("data", [b"", b"a", b"abc", bytes(range(256))])
@pytest.mark.parametrize("where", [0, 1, 127, 255])
def test_a_cut_stream_is_the_whole_stream(data: bytes, where: int) -> None:
    assert b"".join(cut_in_three(data, where)) == data


def test_choices_end_where_the_input_ends() -> None:
    choices = Choices(b"\x05")
    assert (choices.number(4), choices.number(4), choices.of("ab"), choices.rest()) == (1, 0, "a", b"")
