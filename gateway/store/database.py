"""The file on disk: SQLite, one connection, whole transactions.

In: `Change`s.  Out: after `commit` they are durable; `StoreError` says that none of them is.  Everything here blocks on
the disk and is called in one thread only (`gateway.store.writer`).

Rows of messages have no index but their number: an index by device would double what is written to flash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TypeAlias, TypeVar

from attrs import frozen

from gateway.disk import sync_directory
from gateway.errors import GatewayError
from gateway.store.row import DamagedRow, Row, decode_row, encode_row, size_of
from gateway.store.salvage import LAST_NUMBER, NAMES, salvage, text

_T = TypeVar("_T")
# Device and inode; None if there is no such file.
_Identity: TypeAlias = tuple[int, int] | None

SCHEMA_VERSION = 1
RESERVE = 16 * 1024 * 1024
"""Bytes of the reserve file, which is given up so that deletes can be written to a full disk."""

_SCHEMA = """
CREATE TABLE device (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL);
CREATE TABLE message (number INTEGER PRIMARY KEY, device INTEGER NOT NULL, stamp INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE released (number INTEGER PRIMARY KEY);
CREATE TABLE received (device INTEGER, identifier INTEGER, PRIMARY KEY (device, identifier)) WITHOUT ROWID;
CREATE TABLE aside (number INTEGER PRIMARY KEY, device INTEGER NOT NULL, stamp INTEGER NOT NULL, data BLOB NOT NULL,
                    why TEXT NOT NULL);
CREATE TABLE probe (number INTEGER PRIMARY KEY, at INTEGER);
"""
# Devices and messages are numbered in one sequence, so that each message has a higher number than its device: where a
# damaged file has lost a device and kept a message of it, no other device gets its number.
_NUMBERED = (
    ("device", "number"),
    ("message", "number"),
    ("released", "number"),
    ("aside", "number"),
    ("received", "device"),
)
# SQLite checkpoints after so many pages; the WAL stays about as large.
_WAL_PAGES = 1000
_WAL_LIMIT = 4 * 1024 * 1024
_VACUUM_ABOVE = 4 * 1024 * 1024
# More than the reserve must be free before a disk counts as not full, or every message would fill it again.
_ROOM = 4 * 1024 * 1024
_COPIED_AT_A_TIME = 100
# Result codes that say something about the disk or another program, and nothing about what is in the file.
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
    }
)
_NOT_OPEN = "the store is not open"


class StoreError(GatewayError):
    """The store cannot write or read; `is_full` says that the disk has no room."""

    def __init__(self, words: str, *, is_full: bool = False) -> None:
        super().__init__(words)
        self.is_full = is_full


class StoreUnusable(StoreError):
    """The store cannot be opened, and no other file may take its place."""


# ---- changes


@frozen(slots=True)
class Append:
    """Store a row; `received`, the device's Packet Identifier of a QoS 2 message, stays known until `Release`."""

    row: Row
    received: int = 0

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        row = self.row
        # A commit that failed may be there all the same, and is then repeated.
        values = (row.number, row.device, row.stamp, encode_row(row))
        connection.execute("INSERT OR REPLACE INTO message VALUES (?,?,?,?)", values)
        if self.received:
            connection.execute("INSERT OR IGNORE INTO received VALUES (?,?)", (row.device, self.received))


@frozen(slots=True)
class Delete:
    """Delete rows."""

    numbers: Sequence[int]

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        numbers = [(number,) for number in self.numbers]
        connection.executemany("DELETE FROM message WHERE number = ?", numbers)
        connection.executemany("DELETE FROM released WHERE number = ?", numbers)


@frozen(slots=True)
class Released:
    """The broker has a QoS 2 message (PUBREC): only PUBREL may follow while its session lives."""

    number: int

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute("INSERT OR IGNORE INTO released VALUES (?)", (self.number,))


@frozen(slots=True)
class Unreleased:
    """The broker forgot a QoS 2 message: it is published anew."""

    number: int

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute("DELETE FROM released WHERE number = ?", (self.number,))


@frozen(slots=True)
class Release:
    """The device released a Packet Identifier (PUBREL), and may use it for another message."""

    device: int
    identifier: int

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute("DELETE FROM received WHERE device = ? AND identifier = ?", (self.device, self.identifier))


@frozen(slots=True)
class Save:
    """Keep what is known of a device: `state` is JSON.  With `forget_received` its session is new."""

    device: int
    name: str
    state: str
    forget_received: bool = False

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        # A device that was forgotten and came again has another number.  Both are written again, in their order, if a
        # commit failed and is there all the same.
        connection.execute("DELETE FROM device WHERE name = ? AND number <> ?", (self.name, self.device))
        connection.execute(
            "INSERT INTO device VALUES (?,?,?) ON CONFLICT (number) DO UPDATE SET state = excluded.state",
            (self.device, self.name, self.state),
        )
        if self.forget_received:
            connection.execute("DELETE FROM received WHERE device = ?", (self.device,))


@frozen(slots=True)
class SetAside:
    """Take a row out of its backlog and keep it for a person to look at."""

    number: int
    why: str

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute(
            "INSERT OR REPLACE INTO aside SELECT number, device, stamp, data, ? FROM message WHERE number = ?",
            (self.why, self.number),
        )
        Delete((self.number,)).apply(connection)


@frozen(slots=True)
class Forget:
    """Delete everything about a device but its messages, of which there are none."""

    device: int

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute("DELETE FROM device WHERE number = ?", (self.device,))
        connection.execute("DELETE FROM received WHERE device = ?", (self.device,))


@frozen(slots=True)
class Probe:
    """Write something that means nothing, to see whether the disk takes it."""

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write it."""
        connection.execute("INSERT OR REPLACE INTO probe VALUES (1, ?)", (time.time_ns(),))


Change = Append | Delete | Released | Unreleased | Release | Save | SetAside | Forget | Probe


# ---- what is found at the start


@frozen(slots=True)
class Device:
    """A device that the store knows; `received` are the Packet Identifiers of QoS 2 messages not yet released."""

    number: int
    name: str
    state: str
    received: frozenset[int]


@frozen(slots=True)
class Opened:
    """What was found: the devices, the rows that the broker has confirmed with PUBREC, the highest number in use.

    Devices and messages are numbered in one sequence.

    `notes` are for the log: what was moved or recovered.  `aside` has how many messages of a device were set aside.
    """

    devices: tuple[Device, ...]
    released: frozenset[int]
    last_number: int
    notes: tuple[str, ...] = ()
    aside: tuple[tuple[int, int], ...] = ()


class Database:
    """The database in a directory.  `open` first; every method raises `StoreError`."""

    def __init__(self, directory: Path, connect: Callable[[Path], sqlite3.Connection] | None = None) -> None:
        """Take the directory, which must exist, and what opens SQLite (tests put faults there)."""
        self.directory = directory
        self.path = directory / "store.db"
        self._reserve = directory / "reserve"
        self._copy = directory / "store.copy"
        self._connect = connect or _connect
        self._connection: sqlite3.Connection | None = None
        self._lock: int | None = None
        # The files that are open, as they must be found in the directory.
        self._files: dict[Path, _Identity] = {}
        # The highest number that was found or written.
        self._highest = 0

    def open(self) -> Opened:
        """Lock the directory and open or make the file.  Raises `StoreUnusable`.

        A damaged file is moved aside, and what can be read of it is taken over.
        """
        self._take_lock()
        notes: list[str] = []
        try:
            self.directory.chmod(0o700)
            # A gateway may have ended in the middle of `recover`.
            self._adopt_copy()
            try:
                self._open_file()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _tells_of_damage(error):
                    raise
                notes.append(self._start_anew(str(error)))
            opened = self._guarded(lambda: self._looked(notes))
        except StoreError:
            self.close()
            raise
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            self.close()
            raise StoreUnusable(f"{self.path} cannot be opened: {error}") from None
        self.keep_reserve()
        return opened

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._close_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- writing and reading

    def commit(self, changes: Sequence[Change]) -> None:
        """Make changes durable, all of them or none.

        Raises StoreError also if a file is not in its directory any more: no start would find what was written.
        """
        self._guarded(lambda: self._commit(changes))
        for path, identity in self._files.items():
            if _identity(path) != identity:
                raise StoreError(f"{path} was removed or replaced while it was in use: restart the gateway")

    def read(self, numbers: Sequence[int]) -> list[Row | int]:
        """Return rows in the order of their numbers; for a damaged or missing one its number.

        There are fewer if the disk fails: those before the first that it does not give.  Raises StoreError if there
        are none.
        """
        return self._guarded(lambda: self._rows(numbers))

    def scan(self, after: int, up_to: int, limit: int) -> list[tuple[int, int, int, int]]:
        """Return (number, device, stamp, size of data) of at most `limit` rows behind `after`.

        Raises StoreError also if the numbers show that the file is damaged: SQLite does not notice that, and rows would
        be passed over.
        """
        return self._guarded(lambda: self._scanned(after, up_to, limit))

    def retry_aside(self, device: int, first: int) -> list[tuple[int, int, int]]:
        """Put what was set aside of a device behind its backlog, numbered from `first`: (number, stamp, size)."""
        return self._guarded(lambda: self._retry_aside(device, first))

    def drop_aside(self, device: int) -> int:
        """Delete what was set aside of a device; return how many there were."""

        def drop() -> int:
            with _Transaction(self._open):
                return self._open.execute("DELETE FROM aside WHERE device = ?", (device,)).rowcount

        return self._guarded(drop)

    def damaged_files(self) -> list[str]:
        """Return the names of the files that were moved aside because they were damaged, the newest last."""
        return sorted(path.name for path in self.directory.glob(f"{self.path.name}.damaged-*") if not _is_wal(path))

    def used(self) -> int:
        """Return the bytes of the files: database and WAL."""
        return sum(_size(path) for path in (self.path, _wal(self.path)))

    def shrink(self) -> None:
        """Give space back to the disk; for a database without messages."""

        def vacuum() -> None:
            if _size(self.path) > _VACUUM_ABOVE:
                self._open.execute("VACUUM")
                self._open.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        self._guarded(vacuum)

    # ---- a disk that is full or fails

    def start_anew(self, why: str) -> str:
        """Move a damaged file aside, and go on with what can be read of it; return words for the log."""
        return self._guarded(lambda: self._start_anew(why, least=1))

    def give_up_reserve(self) -> bool:
        """Delete the reserve file; return whether there was one."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    def keep_reserve(self) -> bool:
        """Make the reserve file if it is not there; return whether it is."""
        if _size(self._reserve) >= RESERVE:
            return True
        try:
            descriptor = os.open(self._reserve, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE + _ROOM)
                os.ftruncate(descriptor, RESERVE)
            finally:
                os.close(descriptor)
        except OSError:
            self.give_up_reserve()
            return False
        return True

    def recover(self) -> None:
        """After an input/output error: copy what can be read, and go on with the copy.

        A failed fsync marks pages as clean that never reached the disk, so a second one would lie.  They can still be
        read, from memory, until the file is closed.
        """
        copy = self._copy
        failed = Path(f"{self.path}.failed-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            if self._connection is not None or self.path.exists():
                for suffix in ("", "-wal"):
                    _copy(Path(f"{self.path}{suffix}"), Path(f"{copy}{suffix}"))
                self._close_file()
                # The copy is complete: from here on an attempt that fails is continued by the next one.
                for suffix in ("", "-wal"):
                    _rename(Path(f"{self.path}{suffix}"), Path(f"{failed}{suffix}"))
            self._adopt_copy()
            self._open_file()
            sync_directory(self.directory)
            # Each attempt leaves a file; the disk has room for one.
            for old in self.directory.glob(f"{self.path.name}.failed-*"):
                if not old.name.startswith(failed.name):
                    old.unlink()
        except (sqlite3.Error, OSError) as error:
            if self.path.exists():
                for suffix in ("", "-wal"):
                    with contextlib.suppress(OSError):
                        Path(f"{copy}{suffix}").unlink(missing_ok=True)
            raise StoreError(f"the store cannot be recovered: {error}", is_full=_is_full(error)) from None

    def _adopt_copy(self) -> None:
        """Put a complete copy in the place of the file, which is not there any more."""
        if not self.path.exists():
            for suffix in ("-wal", ""):
                _rename(Path(f"{self._copy}{suffix}"), Path(f"{self.path}{suffix}"))
            Path(f"{self.path}-shm").unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # what was committed is in the WAL
                self._connection.close()
            self._connection = None

    # ---- inside

    @property
    def _lock_path(self) -> Path:
        return self.directory / "lock"

    @property
    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(_NOT_OPEN)
        return self._connection

    def _take_lock(self) -> None:
        path = self._lock_path
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnusable(f"{path} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreUnusable(f"{self.directory} is in use by another gateway") from None
        except OSError as error:
            os.close(descriptor)
            raise StoreUnusable(f"{path} cannot be locked: {error.strerror}") from None
        self._lock = descriptor

    def _open_file(self) -> None:
        self._connection = self._opened(self.path)
        # Another gateway could take the directory if its lock were removed.
        for path in (self.path, _wal(self.path), self._lock_path):
            self._files[path] = _identity(path)

    def _opened(self, path: Path) -> sqlite3.Connection:
        connection = self._connect(path)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            _check_version(path, version)
            connection.text_factory = text
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
            if not version:
                with _Transaction(connection):
                    for statement in _SCHEMA.split(";\n"):
                        if statement.strip():
                            connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                sync_directory(self.directory)
            connection.execute("SELECT max(number) FROM message").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _looked(self, notes: list[str]) -> Opened:
        """Look at all but the messages; go on with a new file if something there is damaged."""
        try:
            return self._look(notes)
        except sqlite3.DatabaseError as error:
            if notes or not _tells_of_damage(error):
                raise
            notes.append(self._start_anew(str(error)))
        return self._look(notes)

    def _look(self, notes: Sequence[str]) -> Opened:
        received: dict[int, set[int]] = {}
        for device, identifier in self._open.execute("SELECT device, identifier FROM received"):
            received.setdefault(device, set()).add(identifier)
        found = self._open.execute("SELECT number, name, state FROM device ORDER BY number").fetchall()
        # A device whose name is damaged would get the messages of another.
        if set(self._open.execute(NAMES)) != {(number, name) for number, name, _ in found}:
            raise sqlite3.DatabaseError("malformed: a device has two names")
        if not all(isinstance(state, str) for _, _, state in found):
            raise sqlite3.DatabaseError("malformed: a device's state is no text")
        devices = tuple(
            Device(number, name, state, frozenset(received.get(number, ()))) for number, name, state in found
        )
        released = frozenset(number for (number,) in self._open.execute("SELECT number FROM released"))
        highest = [
            self._open.execute(f"SELECT max({column}) FROM {table}").fetchone()[0] or 0  # noqa: S608  our own
            for table, column in _NUMBERED
        ]
        aside = self._open.execute("SELECT device, count(*) FROM aside GROUP BY device").fetchall()
        numbers = [*highest, *released, *(number for row in aside for number in row), *received]
        if not all(isinstance(number, int) and 0 <= number <= LAST_NUMBER for number in numbers):
            raise sqlite3.DatabaseError("malformed: a number that no row has")
        self._highest = max(highest)
        return Opened(devices, released, self._highest, tuple(notes), tuple(aside))

    def _scanned(self, after: int, up_to: int, limit: int) -> list[tuple[int, int, int, int]]:
        # Without an upper limit in the query: SQLite would end at a number that is too high, and pass over the rest.
        query = "SELECT number, device, stamp, length(data) FROM message WHERE number > ? LIMIT ?"
        rows: list[tuple[int, int, int, int]] = []
        last = after
        for row in self._open.execute(query, (after, limit)).fetchall():
            if not all(isinstance(value, int) for value in row) or not last < row[0] <= self._highest or row[1] < 1:
                raise sqlite3.DatabaseError("malformed: rows are out of order")
            if row[0] > up_to:
                break
            rows.append(row)
            last = row[0]
        if rows:
            # The next rows are searched for behind its number.
            query = "SELECT number, device, stamp, data FROM message WHERE number > ? LIMIT 1 OFFSET ?"
            try:
                decode_row(*self._open.execute(query, (after, len(rows) - 1)).fetchone())
            except DamagedRow as error:
                raise sqlite3.DatabaseError(f"malformed: {error}") from None
        return rows

    def _commit(self, changes: Sequence[Change]) -> None:
        with _Transaction(self._open):
            for change in changes:
                change.apply(self._open)
                if isinstance(change, Append):
                    self._highest = max(self._highest, change.row.number)
                elif isinstance(change, Save):
                    self._highest = max(self._highest, change.device)

    def _rows(self, numbers: Sequence[int]) -> list[Row | int]:
        rows: list[Row | int] = []
        for number in numbers:
            try:
                rows.append(self._row(number))
            except sqlite3.Error:
                if not rows:
                    raise
                break
        return rows

    def _row(self, number: int) -> Row | int:
        query = "SELECT device, stamp, data FROM message WHERE number = ?"
        try:
            found = self._open.execute(query, (number,)).fetchone()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            return number  # the file is damaged where this one is
        if found is None:
            return number
        device, stamp, data = found
        try:
            return decode_row(number, device, stamp, data)
        except DamagedRow:
            return number

    def _retry_aside(self, device: int, first: int) -> list[tuple[int, int, int]]:
        moved: list[tuple[int, int, int]] = []
        with _Transaction(self._open):
            query = "SELECT number, stamp, data FROM aside WHERE device = ? ORDER BY number"
            for number, stamp, data in self._open.execute(query, (device,)).fetchall():
                try:
                    row = decode_row(number, device, stamp, data)
                except DamagedRow:
                    continue
                row = Row(first + len(moved), device, stamp, row.message, row.identifier)
                self._highest = max(self._highest, row.number)
                Append(row).apply(self._open)
                self._open.execute("DELETE FROM aside WHERE number = ?", (number,))
                moved.append((row.number, stamp, size_of(row.message)))
        return moved

    def _start_anew(self, why: str, *, least: int = 0) -> str:
        """Move a damaged file aside, and take what can be read of it into a new one; say so in words.

        Everything is as before if that fails, or fewer than `least` rows can be read.
        """
        self._drop_copy()
        try:
            messages = self._salvage_to_copy(least)
        except BaseException:
            self._drop_copy()
            raise
        self._close_file()
        name = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        # There may have been another one in this second.
        aside = next(path for path in map(Path, _numbered(name)) if not path.exists())
        for suffix in ("", "-wal"):
            _rename(Path(f"{self.path}{suffix}"), Path(f"{aside}{suffix}"))
        self._adopt_copy()
        self._open_file()
        sync_directory(self.directory)
        return (
            f"{self.path} was damaged ({why}): it is now {aside.name}, and {messages} messages were recovered from it"
        )

    def _salvage_to_copy(self, least: int) -> int:
        """Put what can be read into a new file; return how many messages.  Raises StoreError: fewer rows than that."""
        taken = messages = 0
        with contextlib.closing(self._opened(self._copy)) as copy:
            # It counts only once it is complete, and is on the disk before it is put in its place.
            copy.execute("PRAGMA synchronous = OFF")
            rows = salvage(self.path)
            while some := list(islice(rows, _COPIED_AT_A_TIME)):
                with _Transaction(copy):
                    for table, row in some:
                        marks = ",".join("?" * len(row))
                        copy.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)  # noqa: S608  our own
                        messages += table == "message"
                taken += len(some)
            # Nothing can be made of a Packet Identifier whose device is not known.
            copy.execute("DELETE FROM received WHERE device NOT IN (SELECT number FROM device)")
        if taken < least:
            raise StoreError("nothing in it can be read")
        _sync(self._copy)
        return messages

    def _drop_copy(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._copy}{suffix}").unlink(missing_ok=True)

    def _guarded(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(str(error), is_full=_is_full(error)) from None


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{path} was written by a newer version (schema {version}; this version supports {SCHEMA_VERSION})"
        )


class _Transaction:
    """A transaction that is rolled back, if that is possible, when something goes wrong."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # SQLite has rolled back, or does when the file is opened again


def _tells_of_damage(error: Exception) -> bool:
    """Whether an error says that the file has something else in it than SQLite has written."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF not in _NOT_DAMAGE


def _numbered(name: str) -> Iterator[str]:
    """Yield a name, and others like it."""
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(path: Path) -> sqlite3.Connection:
    # Made with the right mode from the start; SQLite gives the WAL the mode of the database.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {28, 122}  # ENOSPC, EDQUOT
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def needs_recovery(error: StoreError) -> bool:
    """Whether the disk itself failed, or an attempt to go on with a copy did not end well."""
    return "disk I/O error" in str(error) or str(error) == _NOT_OPEN


def is_damaged(error: StoreError) -> bool:
    """Whether the file has something else in it than SQLite has written."""
    return "malformed" in str(error) or "not a database" in str(error)


def _wal(path: Path) -> Path:
    return Path(f"{path}-wal")


def _is_wal(path: Path) -> bool:
    return path.name.endswith("-wal")


def _rename(source: Path, target: Path) -> None:
    if source.exists():
        source.rename(target)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _identity(path: Path) -> _Identity:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    if not source.exists():
        return
    descriptor = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with source.open("rb") as reading, os.fdopen(descriptor, "wb") as writing:
        while block := reading.read(1 << 20):
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
