"""The table of `mqtts-gateway device import`.

In: a CSV file, as people and Excel write it.  Out: the devices in it, each with its line, or every problem.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from gateway.cli.device_files import DeviceProblem
from gateway.config import DeviceRule
from gateway.config.passwords import hash_password
from gateway.disk import MEBIBYTE, read_file
from gateway.text import printable

SALT_SIZE = 16
_LONGEST_ROW = 65_536
_LONGEST_SHOWN = 100  # characters
_GUESSES_SHOWN = 10
_COLUMNS_SHOWN = 10
_LARGEST_TABLE = 64 * MEBIBYTE
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# CSV columns that are not keys of a rule.
_ID, _COMMON_NAME, _PASSWORD = "id", "common_name", "password"


class Problems(Exception):
    """One or more problems, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(*problems)
        self.problems = problems


@frozen
class NewDevice:
    """A device to add: its Client Identifier, the common name of its certificate, the keys of its rule."""

    client_identifier: str
    common_name: str
    table: Mapping[str, Any]


def value_of(text: str) -> Any:
    """Parse a value as TOML; anything else is taken as a string, so that strings need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, ValueError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def read_table(path: Path) -> tuple[list[tuple[int, NewDevice]], list[str]]:
    """Read a CSV file (RFC 4180) whose first row names the columns: the devices with their lines, and remarks.

    Raises `Problems` and `DeviceProblem`.
    """
    try:
        text, is_guessed = _decoded(path, read_file(path, _LARGEST_TABLE, from_pipe=True))
        remarks = [*_guesses(path, text)] if is_guessed else []
        return list(_rows(path, text)), remarks
    except OSError as error:
        raise DeviceProblem(f"{path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise DeviceProblem(f"{path} is not a valid CSV file: {error}") from None


def _decoded(path: Path, data: bytes) -> tuple[str, bool]:
    """Return the text of a file, and whether its encoding is a guess: Excel writes all of these."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise DeviceProblem(f"{path} is not valid {encoding.upper()}, as its first bytes say") from None
    if b"\0" in data:
        raise DeviceProblem(f"{path} is neither UTF-8 nor Windows-1252: in Excel, save it as “CSV UTF-8”")
    try:
        return data.decode("cp1252"), True
    except UnicodeDecodeError:
        raise DeviceProblem(f"{path} is neither UTF-8 nor Windows-1252: in Excel, save it as “CSV UTF-8”") from None


def _guesses(path: Path, text: str) -> Iterator[str]:
    """Say how a file was read, and show what depends on that."""
    yield f"{path} is not UTF-8; reading it as Windows-1252. Check that these values are right:"
    reader = _reader(text)
    found = 0
    for row in reader:
        for column, value in row.items():
            if not isinstance(value, str) or value.isascii():
                continue
            found += 1
            if found <= _GUESSES_SHOWN:
                shown = "(not shown)" if column == _PASSWORD else printable(value, _LONGEST_SHOWN)
                yield f"  line {reader.line_num}: {printable(str(column))} {shown}"
    if found > _GUESSES_SHOWN:
        yield f"  and {found - _GUESSES_SHOWN} more"


def _reader(text: str) -> csv.DictReader[str]:
    """Return a reader with the names of the columns in lower case."""
    csv.field_size_limit(_LONGEST_ROW)
    first = text.partition("\n")[0]
    # Excel writes semicolons where the comma is the decimal sign, and tabs as "Unicode text".
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    reader.fieldnames = [column.strip().casefold() for column in reader.fieldnames or []]
    return reader


def _column_problems(columns: list[str]) -> Iterator[str]:
    known = {_ID, _COMMON_NAME, _PASSWORD, *(field.name for field in attrs.fields(DeviceRule))}
    counted = Counter(columns)
    if columns and columns[0].startswith("sep="):
        yield f"remove the first line, {printable(columns[0], _LONGEST_SHOWN)}, which is for Excel alone"
        return
    unknown = [printable(column, _LONGEST_SHOWN) or "(without a name)" for column in counted if column not in known]
    if unknown:
        more = f" and {len(unknown) - _COLUMNS_SHOWN} more" if len(unknown) > _COLUMNS_SHOWN else ""
        yield f"unknown column{'s' * (len(unknown) > 1)} {', '.join(unknown[:_COLUMNS_SHOWN])}{more}"
    for column, count in counted.items():
        if count > 1 and column in known:
            yield f"column {column} occurs {count} times: keep one; a list of values goes into one field"
    if _ID not in counted:
        yield f"column {_ID} is missing; the first row must name the columns"


def _rows(path: Path, text: str) -> Iterator[tuple[int, NewDevice]]:
    reader = _reader(text)
    columns = list(reader.fieldnames or [])
    seen: dict[str, int] = {}
    problems = [f"{path}: {problem}" for problem in _column_problems(columns)]
    if problems:
        raise Problems(problems)
    for row in reader:
        if None in row or None in row.values():
            problems.append(f"{path}: line {reader.line_num}: not as many fields as the first row")
            continue
        table = {
            key: value_of(value) for key, value in row.items() if value and key not in {_ID, _COMMON_NAME, _PASSWORD}
        }
        if row.get(_PASSWORD):
            table["lan_password"] = hash_password(row[_PASSWORD].encode(), os.urandom(SALT_SIZE))
        identifier = row[_ID]
        before = seen.setdefault(identifier, reader.line_num)
        if before != reader.line_num:
            shown = printable(identifier)
            problems.append(f'{path}: line {reader.line_num}: "{shown}" is in line {before} already')
            continue
        yield reader.line_num, NewDevice(identifier, row.get(_COMMON_NAME) or identifier, table)
    if problems:
        raise Problems(problems)
