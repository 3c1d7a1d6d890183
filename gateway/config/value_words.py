"""Describes values in messages about a configuration.

In: values from a file or a flag.  Out: text that is safe and short enough to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time

from gateway.text import printable


def quoted(text: str, limit: int = 60) -> str:
    """Return `text` in double quotes on one line, unprintable characters escaped, cut to `limit` characters."""
    return '"' + printable(text, limit).replace('"', '\\"') + '"'


def number(value: float) -> str:
    """Return a number as written in TOML; an absurdly long one as its size."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python does not format very long ones
        return f"a number of {value.bit_length()} bits"
    return str(value)


def described(value: object) -> str:
    """Describe a value by type and content: `the text "256M"`, `the number 5`, `a list`."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {number(value)}"
        case str():
            return f"the text {quoted(value)}"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "a list"
        case date() | time():
            return "a date or time"
        case _:
            return "nothing" if value is None else "something else"
