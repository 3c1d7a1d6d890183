"""Checks of values, as attrs wants them.

In: values that somebody wrote.  Out: nothing, or ValueError that says what is wrong.
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
    """A part of a value makes no sense; `where` leads from the value to that part: `[1]`, `.client_key`."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def checked(judge: Callable[[Any], object]) -> Validator:
    """Make a validator of a function that raises ValueError."""

    def validate(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
        judge(value)

    return validate


def checked_each(judge: Callable[[Any], object]) -> Validator:
    """Make a validator of a function that raises ValueError for an element; it finds all of them."""

    def validate(_instance: Any, _attribute: attrs.Attribute[Any], values: Iterable[Any]) -> None:
        problems = []
        for index, value in enumerate(values):
            try:
                judge(value)
            except ValueError as error:
                problems.append(MisfitError(f"[{index}]", str(error)))
        if problems:
            raise ExceptionGroup("elements that make no sense", problems)

    return validate


def between(low: float, high: float, what: str = "") -> Validator:
    """Make a validator for numbers from `low` to `high`, both included."""
    span = f"({number(low)} to {number(high)})"

    def judge(value: float) -> None:
        if not low <= value <= high:  # so that not-a-number is refused, too
            raise ValueError(f"{number(value)} is {what} {span}" if what else f"{number(value)} is out of range {span}")

    return checked(judge)


def check_label(text: str) -> None:
    """Refuse what cannot stand in a line of a log."""
    if len(text) > 64 or not text.isprintable():
        raise ValueError(f"{quoted(text)} is no label: use up to 64 characters that print")


def check_path(path: Path) -> None:
    """Refuse what the system cannot open whatever there is."""
    if "\0" in str(path):
        raise ValueError(f"{quoted(str(path))} is no path: it holds a NUL character")


def check_optional_path(path: Path | None) -> None:
    """As `check_path`, where there is a path."""
    if path is not None:
        check_path(path)
