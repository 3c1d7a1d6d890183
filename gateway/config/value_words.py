"""Words for messages about a configuration.

In: values that somebody wrote into a file or a flag.  Out: text that is safe and short enough to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time

from gateway.text import printable


def quoted(text: str, limit: int = 60) -> str:
    """Give `text` in double quotes on one line: what does not print is escaped; `limit` characters are shown."""
    return '"' + printable(text, limit).replace('"', '\\"') + '"'


def number(value: float) -> str:
    """Give a number as it is written in TOML; one that is absurdly long only by its size."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print very long ones
        return f"a number of {value.bit_length()} bits"
    return str(value)


def described(value: object) -> str:
    """Say in words what kind of value this is, and which: `the text "256M"`, `the number 5`, `a list`."""
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
