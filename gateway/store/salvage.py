"""What can still be read of a damaged database file, around the places that cannot.

In: the path of the file.  Out: rows, in the order of their tables.  It opens connections of its own and only reads.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

_Values = tuple[object, ...]

_AT_A_TIME = 500
# So many numbers behind a place that cannot be read are tried one by one, which is more than an interior page of small
# messages covers; then the steps grow.
_TRIED_ONE_BY_ONE = 10_000
_LAST_NUMBER = (1 << 63) - 1
# Here the name of a device whose row is lost can still be found: it is stored a second time, since it is UNIQUE.
_NAMES = "SELECT number, name, '{}' FROM device INDEXED BY sqlite_autoindex_device_1 ORDER BY name"


def salvage(path: Path) -> Iterator[tuple[str, _Values]]:
    """Yield (table, row) for each row that can be read; of those that come twice, the first one counts."""
    for table in ("device", "message", "released", "aside"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            for row in _numbered(connection, table):
                yield table, row
    for table, query in (
        ("device", _NAMES),
        ("received", "SELECT * FROM received ORDER BY device, identifier"),
        ("received", "SELECT * FROM received ORDER BY device DESC, identifier DESC"),
    ):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            read = 0
            for row in _until_damage(connection, query):
                yield table, row
                read += 1
            for row in _until_damage(connection, f"{query} LIMIT 1 OFFSET {read}"):
                yield table, row


def _numbered(connection: sqlite3.Connection, table: str) -> Iterator[_Values]:
    """Yield the rows of a table that has a `number`, and pass over what is damaged."""
    rows = f"SELECT * FROM {table} WHERE number > ? ORDER BY number LIMIT"  # noqa: S608  our own
    after: int | None = -1
    while after is not None:
        before = after
        for most in (_AT_A_TIME, 1):
            for row in _until_damage(connection, f"{rows} {most}", after):
                after = int(str(row[0]))
                yield row
        if after == before:
            after = _behind_damage(connection, table, after)


def _until_damage(connection: sqlite3.Connection, query: str, *values: int) -> Iterator[_Values]:
    """Yield rows up to the first that cannot be read, but for the one before it: Python reads one row ahead."""
    with contextlib.suppress(sqlite3.Error):
        yield from connection.execute(query, values)


def _behind_damage(connection: sqlite3.Connection, table: str, after: int) -> int | None:
    """Return the number behind which rows can be read again; None if there are no more behind `after`."""
    query = f"SELECT number FROM {table} WHERE number > ? ORDER BY number LIMIT 1"  # noqa: S608  our own

    def can_be_read(number: int) -> bool:
        try:
            connection.execute(query, (number,)).fetchone()
        except sqlite3.Error:
            return False
        return True

    with contextlib.suppress(sqlite3.Error):
        # A row has a number, and its content is what cannot be read; or there is none.
        found = connection.execute(query, (after,)).fetchone()
        return None if found is None else int(found[0])
    low, step = after, 1
    while not can_be_read(high := min(low + step, _LAST_NUMBER)):
        if high == _LAST_NUMBER:
            return None
        low = high
        step = 1 if low - after < _TRIED_ONE_BY_ONE else step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if can_be_read(middle) else (middle, high)
    return high
