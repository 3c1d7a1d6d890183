"""Reads TOML files.

In: a path.  Out: the file's table, or `ConfigError` with the line of the problem.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from gateway.config.value_words import quoted
from gateway.disk import read_file
from gateway.errors import ConfigError
from gateway.text import printable


def read_table(path: Path, when_empty: str) -> dict[str, Any]:
    """Read a TOML file (UTF-8); `when_empty` is the remedy for an empty file.  Raises ConfigError."""
    shown = quoted(str(path), limit=4096)
    try:
        content = read_file(path)
    except FileNotFoundError as error:
        remedy = "`mqtts-gateway init FILE` writes one"
        raise ConfigError([f"{shown} cannot be read: {error.strerror}; {remedy}"]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([f"{shown} cannot be read: {reason}"]) from None
    try:
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{shown} is not UTF-8: see line {line}"]) from None
    if not text.strip():
        raise ConfigError([f"{shown} is empty: {when_empty}"])
    return _parse_toml(text, shown)


def _parse_toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = printable(str(error))
        if found := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message):
            message = f"line {found[2]}, column {found[3]}: {found[1]}"
        else:  # "(at end of document)" names no line
            last = text.rstrip().count("\n") + 1
            message = f"line {last}, at the end: {message.partition(' (at end')[0]}"
        raise ConfigError([f"{shown} is not TOML: {message}"]) from None
    except ValueError:  # Python does not parse integers of more than 4300 digits
        raise ConfigError([f"{shown} is not a configuration: it contains a number that is absurdly long"]) from None
    except RecursionError:
        raise ConfigError([f"{shown} is not a configuration: it is nested too deeply"]) from None
