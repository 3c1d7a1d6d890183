"""Validators for attrs fields.

In: configured values.  Out: nothing, or ValueError with the reason.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from gateway.config.value_words import number, quoted

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Validator: TypeAlias = Callable[[Any, "attrs.Attribute[Any]", Any], None]


class MisfitError(ValueError):
    """A part of a value is invalid; `where` leads from the value to that part: `[1]`, `.client_key`."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def checked(judge: Callable[[Any], object]) -> Validator:
    """Make a validator of a function that raises ValueError."""

    def validate(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
        judge(value)

    return validate


def checked_each(judge: Callable[[Any], object]) -> Validator:
    """Make a validator of a function that raises ValueError for an element; it reports all invalid elements."""

    def validate(_instance: Any, _attribute: attrs.Attribute[Any], values: Iterable[Any]) -> None:
        problems = []
        for index, value in enumerate(values):
            try:
                judge(value)
            except ValueError as error:
                problems.append(MisfitError(f"[{index}]", str(error)))
        if problems:
            raise ExceptionGroup("invalid elements", problems)

    return validate


def between(low: float, high: float, what: str = "") -> Validator:
    """Make a validator for numbers from `low` to `high`, both included."""
    span = f"({number(low)} to {number(high)})"

    def judge(value: float) -> None:
        if not low <= value <= high:  # written so that NaN is refused, too
            raise ValueError(f"{number(value)} is {what} {span}" if what else f"{number(value)} is out of range {span}")

    return checked(judge)


def check_label(text: str) -> None:
    """Refuse labels that are unfit for a log line."""
    if len(text) > 64 or not text.isprintable():
        raise ValueError(f"{quoted(text)} is not a label: use up to 64 printable characters")


def check_path(path: Path) -> None:
    """Refuse paths that no file can have."""
    if "\0" in str(path):
        raise ValueError(f"{quoted(str(path))} is not a path: it contains a NUL character")


def check_optional_path(path: Path | None) -> None:
    """As `check_path`, if there is a path."""
    if path is not None:
        check_path(path)


def check_command(words: tuple[str, ...]) -> None:
    """Refuse a command that could not be started; an empty one is none."""
    if words and not words[0].startswith("/"):
        raise ValueError(
            f"{quoted(words[0])} is not an absolute path: give the program's full path, such as /usr/bin/x"
        )
    for word in words:
        if "\0" in word:
            raise ValueError(f"{quoted(word)} contains a NUL character")
