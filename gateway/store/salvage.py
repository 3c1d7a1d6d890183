"""What can still be read of a damaged database file, around the places that cannot.

In: the path of the file.  Out: rows, in the order of their tables.  It opens connections of its own.

Nothing that stands in the file is believed: a row of a message must have the checksum that belongs to its place, or a
broken number would lead past others, or back to them for ever; a device must have the same name in both places where it
is stored, or it would get another one's messages.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gateway.store.row import DamagedRow, decode_row

_Values = tuple[object, ...]

_AT_A_TIME = 500
# So many numbers behind a place that cannot be read are tried one by one, which is more than an interior page of small
# messages covers; then the steps grow.
_TRIED_ONE_BY_ONE = 10_000
LAST_NUMBER = (1 << 62) - 1
"""No row has a higher number."""

# The names of devices are stored a second time, since they are UNIQUE.
NAMES = "SELECT number, name FROM device INDEXED BY sqlite_autoindex_device_1 ORDER BY name"
_RECEIVED = "SELECT * FROM received ORDER BY device, identifier"
_RECEIVED_BACKWARDS = "SELECT * FROM received ORDER BY device DESC, identifier DESC"


def salvage(path: Path) -> Iterator[tuple[str, _Values]]:
    """Yield (table, row) for each row that can be read; of those that come twice, the first one counts.

    What the broker has confirmed of QoS 2 messages is left out: they are published once more, with the Packet
    Identifier by which it recognises them.
    """
    with _open(path) as connection:
        names: dict[object, object] = {row[0]: row[1] for row in _whole(connection, NAMES)}
        yield from (("device", row) for row in _devices(connection, names))
    for table in ("message", "aside"):
        with _open(path) as connection:
            yield from ((table, row) for row in _numbered(connection, table))
    for query in (_RECEIVED, _RECEIVED_BACKWARDS):
        with _open(path) as connection:
            yield from (("received", row) for row in _whole(connection, query))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = text
        # Or a file that has been cut short could not be read at all.
        connection.execute("PRAGMA writable_schema = ON")
        yield connection


def text(data: bytes) -> str:
    """Read text from a file that may be damaged."""
    return data.decode(errors="replace")


def _devices(connection: sqlite3.Connection, names: dict[object, object]) -> Iterator[_Values]:
    """Yield devices; those whose name is doubtful are left out, so that their messages wait for a person."""
    owners = {name: number for number, name in names.items()}
    seen = set()
    for number, name, state in _numbered(connection, "device"):
        seen.add(number)
        if names.get(number, name) == name and owners.get(name, number) == number:
            yield number, name, state
    for number, name in names.items():
        if number not in seen and isinstance(number, int) and isinstance(name, str):
            yield number, name, "{}"


def _whole(connection: sqlite3.Connection, query: str) -> Iterator[_Values]:
    """Yield the rows of a query up to the damage."""
    read = 0
    for row in _until_damage(connection, query):
        yield row
        read += 1
    yield from _until_damage(connection, f"{query} LIMIT 1 OFFSET {read}")


def _numbered(connection: sqlite3.Connection, table: str) -> Iterator[_Values]:
    """Yield the rows of a table that has a `number`, and pass over what is damaged."""
    query = f"SELECT * FROM {table} WHERE number >= ? ORDER BY number LIMIT"  # noqa: S608  our own
    at = 1
    while at <= LAST_NUMBER:
        before = at
        for most in (_AT_A_TIME, 1):
            for row in _until_damage(connection, f"{query} {most}", at):
                if not _is_sound(table, row, at):
                    break
                at = int(str(row[0])) + 1
                yield row
        if at == before and _first(connection, table, f"{query} 1", at) is None:
            return
        if at == before:
            at = _behind_damage(connection, table, f"{query} 1", at)


def _until_damage(connection: sqlite3.Connection, query: str, *values: int) -> Iterator[_Values]:
    """Yield rows up to the first that cannot be read, but for the one before it: Python reads one row ahead."""
    with contextlib.suppress(sqlite3.Error):
        yield from connection.execute(query, values)


def _is_sound(table: str, row: _Values, at: int) -> bool:
    """Whether a row is one that was written, and comes where it belongs: its number is `at` or higher."""
    number = row[0]
    if not isinstance(number, int) or not at <= number <= LAST_NUMBER:
        return False
    if table == "device":
        return isinstance(row[1], str) and isinstance(row[2], str)
    try:
        # It looks at their types itself.
        decode_row(*row[:4])  # type: ignore[arg-type]
    except DamagedRow:
        return False
    return table != "aside" or isinstance(row[4], str)


def _first(connection: sqlite3.Connection, table: str, query: str, at: int) -> bool | None:
    """Whether the first row from number `at` on can be read; None if there is none."""
    try:
        row = connection.execute(query, (at,)).fetchone()
    except sqlite3.Error:
        return False
    return None if row is None else _is_sound(table, row, at)


def _behind_damage(connection: sqlite3.Connection, table: str, query: str, at: int) -> int:
    """Return the number from which on rows can be read again, where those from `at` on cannot."""
    low, step = at, 1
    while _first(connection, table, query, high := min(low + step, LAST_NUMBER + 1)) is False:
        if high > LAST_NUMBER:
            return high
        low = high
        step = 1 if low - at < _TRIED_ONE_BY_ONE else step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _first(connection, table, query, middle) is False else (low, middle)
    return high
