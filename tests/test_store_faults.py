"""A disk that fails: each kind of write, once and for a while, by SQLite's own errors; a disk that is really full."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.pieces import at_once
from gateway.store import database as database_module
from gateway.store import writer as writer_module
from gateway.store.database import Database, StoreError, StoreUnusable
from gateway.store.row import Row
from tests.harness import eventually
from tests.test_store import ROOT, Threaded, message
from tests.tools import require_tool

pytestmark = pytest.mark.usefixtures("_quick")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "RESERVE", 4096)
    monkeypatch.setattr(writer_module, "_RECOVER_EVERY", 0.0)
    monkeypatch.setattr(writer_module, "_SCAN_AGAIN", 0.01)


class FaultyConnection(sqlite3.Connection):
    """Fails statements that begin with certain words, so many times."""

    words, left, is_full, is_durable = "", 0, False, False

    def _fail(self, statement: str) -> None:
        kind = FaultyConnection
        if kind.left and kind.words and statement.startswith(kind.words):
            kind.left -= 1
            error = sqlite3.OperationalError("database or disk is full" if kind.is_full else "disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL if kind.is_full else sqlite3.SQLITE_IOERR
            raise error

    def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
        """Run a statement, or fail; with `is_durable`, after it was done."""
        if not FaultyConnection.is_durable:
            self._fail(statement)
        done = super().execute(statement, *given)
        self._fail(statement)
        return done

    def executemany(self, statement: str, *given: Any) -> sqlite3.Cursor:
        """Run a statement, or fail."""
        self._fail(statement)
        return super().executemany(statement, *given)


def faulty(path: Path) -> sqlite3.Connection:
    """Open SQLite with faults in it."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=FaultyConnection)


@pytest.fixture(autouse=True)
def _sound() -> None:
    FaultyConnection.words, FaultyConnection.left, FaultyConnection.is_durable = "", 0, False


def fail(words: str, times: int, *, is_full: bool = False, is_durable: bool = False) -> None:
    """From now on, fail."""
    FaultyConnection.is_full, FaultyConnection.is_durable = is_full, is_durable
    FaultyConnection.words, FaultyConnection.left = words, times


def recovered(threaded: Threaded) -> None:
    """Wait until the disk takes writes again."""

    def is_well() -> bool:
        threaded.store._probed = -100.0
        at_once(threaded.store.sweep())
        return threaded.turn() and threaded.store.failure is None

    eventually(is_well, "it recovers")


def rows_of(directory: Path) -> list[bytes]:
    """Return what a gateway finds that starts now."""
    database = Database(directory)
    opened = database.open()
    found = database.read([number for number, *_ in database.scan(0, opened.last_number, 10_000)])
    database.close()
    return [each.message.payload for each in found if isinstance(each, Row)]


@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize("is_full", [True, False])
@pytest.mark.parametrize(
    "words", ["BEGIN", "INSERT OR REPLACE INTO message", "INSERT INTO device", "DELETE FROM message", "COMMIT"]
)
def test_whatever_write_fails_nothing_is_acknowledged_that_is_not_durable(
    words: str, is_full: bool, times: int, tmp_path: Path
) -> None:
    """Once or for a while; then it goes on, and a restart finds what was acknowledged and nothing else."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    store = threaded.store
    store.save(store.backlog("one"), "{}")
    threaded.append(10)
    threaded.wait(10)
    backlog = store.backlog("one")
    fail(words, times, is_full=is_full)
    store.save(backlog, "{}")
    store.finish(backlog, backlog.take(5))
    store.flush()
    threaded.append(10)
    threaded.wait(20)
    FaultyConnection.left = 0
    recovered(threaded)
    threaded.append(10)
    outcomes = threaded.wait(30)
    assert outcomes[20:] == [None] * 10
    durable = [message(number % 10).payload for number, error in enumerate(outcomes) if error is None]
    store.close()
    assert rows_of(tmp_path) == durable[5:]


def test_a_failed_commit_that_is_durable_leaves_nothing_behind(tmp_path: Path) -> None:
    """The device sends the message again, and a restart must not find it twice."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    store = threaded.store
    store.save(store.backlog("one"), "{}")
    threaded.append(1)
    threaded.wait(1)
    fail("COMMIT", 2, is_full=True, is_durable=True)
    threaded.append(1)
    assert threaded.wait(2)[1] is not None
    recovered(threaded)
    store.close()
    assert len(rows_of(tmp_path)) == 1


def test_a_device_that_comes_again_after_a_commit_that_is_durable_does_not_block_the_store(tmp_path: Path) -> None:
    """Its old number and its new one are written once more, in their order."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    store = threaded.store
    fail("COMMIT", 1, is_full=True, is_durable=True)
    store.save(store.backlog("one"), "{}")
    store.forget(store.backlog("one"))
    store.save(store.backlog("one"), "{}")
    eventually(lambda: threaded.turn() and store.failure is not None, "it fails")
    recovered(threaded)
    threaded.append(1)
    assert threaded.wait(1) == [None]
    store.close()


def test_what_comes_behind_a_failed_message_does_not_overtake_it(tmp_path: Path) -> None:
    """It was sent before the device could know, and fails, too."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    threaded.store.save(threaded.store.backlog("one"), "{}")
    fail("COMMIT", 1, is_full=True)
    threaded.append(1000)
    outcomes = threaded.wait(1000)
    assert None not in outcomes[next(at for at, error in enumerate(outcomes) if error is not None) :]
    threaded.store.close()


def test_a_recovery_that_breaks_off_is_continued(tmp_path: Path) -> None:
    """With the file closed and moved, and the new one not open yet; also by the next start."""
    opened: list[Path] = []
    fails = [False]

    def connect(path: Path) -> sqlite3.Connection:
        opened.append(path)
        if fails[0]:
            raise sqlite3.OperationalError("unable to open database file")
        return faulty(path)

    threaded = Threaded(tmp_path, Database(tmp_path, connect))
    threaded.store.save(threaded.store.backlog("one"), "{}")
    threaded.append(5)
    threaded.wait(5)
    fails[0] = True
    fail("COMMIT", 1)
    threaded.append(1)
    assert threaded.wait(6)[5] is not None
    fails[0] = False
    recovered(threaded)
    threaded.append(1)
    assert threaded.wait(7)[6] is None
    threaded.store.close()
    assert len(rows_of(tmp_path)) == 6
    assert len(list(tmp_path.glob("store.db.failed-*"))) <= 2, "one failed file, with its WAL"
    (tmp_path / "store.db").rename(tmp_path / "store.copy")
    assert len(rows_of(tmp_path)) == 6


def test_rows_that_cannot_be_read_at_the_start_are_found_later(tmp_path: Path) -> None:
    """They were acknowledged, and must not wait for another start."""
    before = Threaded(tmp_path)
    before.store.save(before.store.backlog("one"), "{}")
    before.append(5)
    before.wait(5)
    before.store.close()
    fail("SELECT number, device, stamp", 3)
    after = Threaded(tmp_path, Database(tmp_path, faulty))
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    assert len(after.store.backlog("one")) == 5
    after.store.close()


def damaged(directory: Path) -> None:
    """Fill a store, and damage a page in the middle of the messages."""
    before = Threaded(directory)
    before.store.save(before.store.backlog("one"), "{}")
    before.append(400)
    before.wait(400)
    before.store.close()
    path = directory / "store.db"
    content = bytearray(path.read_bytes())
    at = content.index(b"%08d" % 200) // 4096 * 4096
    content[at : at + 100] = b"\xff" * 100
    path.write_bytes(bytes(content))


def test_a_damaged_page_does_not_keep_the_other_messages_from_being_found(tmp_path: Path) -> None:
    """They are read from both sides of it into a new file, which takes every delete; the log says so."""
    damaged(tmp_path)
    after = Threaded(tmp_path)
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    backlog = after.store.backlog("one")
    numbers = backlog.take(400)
    assert {2, 401} <= set(numbers)
    assert len(numbers) > 250
    (note,) = after.store.notes
    assert "malformed" in note
    assert ".damaged-" in note
    after.append(1)
    assert after.wait(1) == [None]
    after.store.finish(backlog, numbers)
    after.store.close()
    assert after.store.failure is None
    assert rows_of(tmp_path) == [message(0).payload]


def test_damage_that_a_delete_meets_does_not_stop_all_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delete is owed, and would fail every later transaction."""
    damaged(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "scan", lambda *_: [])
        after = Threaded(tmp_path, Database(tmp_path))
        eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    store = after.store
    store.finish(store.backlog("one"), list(range(2, 402)))
    store.flush()
    eventually(lambda: after.turn() and store.counts.commits > 0, "it is written")
    recovered(after)
    after.append(1)
    assert after.wait(1) == [None]
    store.close()
    assert rows_of(tmp_path) == [message(0).payload]


def test_damage_inside_a_large_message_costs_only_that_message(tmp_path: Path) -> None:
    """The scan does not read it; whoever delivers it does, and the messages behind it would wait forever."""
    before = Threaded(tmp_path)
    store = before.store
    store.save(store.backlog("one"), "{}")
    for number in (1, 2, 3):
        sent = message(number, size=20_000 if number == 2 else 20)
        store.append(store.backlog("one"), sent, lambda _, error: before.outcomes.append(error))
    before.wait(3)
    store.close()
    path = tmp_path / "store.db"
    content = bytearray(path.read_bytes())
    inside = next(at for at in range(0, len(content), 4096) if not any(content[at + 4 : at + 4096]))
    content[inside : inside + 4] = b"\xff" * 4
    path.write_bytes(bytes(content))
    after = Threaded(tmp_path)
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    backlog = after.store.backlog("one")
    got: list[Any] = []
    after.store.read(backlog, backlog.take(3), got.append)
    eventually(lambda: after.turn() and bool(got), "it is read")
    assert [each if isinstance(each, int) else each.message.payload[:8] for each in got[0]] == [
        b"00000001",
        3,
        b"00000003",
    ]
    after.store.finish(backlog, [3], "damaged")
    after.store.flush()
    after.append(1)
    eventually(lambda: after.turn() and bool(after.outcomes), "it is written")
    recovered(after)
    after.store.close()
    assert {b"00000001", b"00000003"} <= {payload[:8] for payload in rows_of(tmp_path)}


def test_rows_that_can_never_be_read_do_not_keep_devices_waiting(tmp_path: Path) -> None:
    """Neither where they are nor in a new file; devices are served without them, and the log says so."""
    before = Threaded(tmp_path)
    before.store.save(before.store.backlog("one"), "{}")
    before.append(5)
    before.wait(5)
    before.store.close()
    fail("SELECT number, device, stamp", 1 << 30)
    after = Threaded(tmp_path, Database(tmp_path, faulty))
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    assert "disk I/O error" in after.store.notes[-1]
    after.append(1)
    assert after.wait(1) == [None]
    after.store.close()
    assert len(rows_of(tmp_path)) == 6


def test_a_file_of_which_nothing_can_be_read_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is away for a while must not cost the backlog."""
    before = Threaded(tmp_path)
    before.store.save(before.store.backlog("one"), "{}")
    before.append(5)
    before.wait(5)
    before.store.close()
    monkeypatch.setattr(database_module, "salvage", lambda _: iter([]))
    fail("SELECT number, device, stamp", 1 << 30)
    after = Threaded(tmp_path, Database(tmp_path, faulty))
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    after.store.close()
    assert len(rows_of(tmp_path)) == 5
    assert not [each for each in tmp_path.iterdir() if "damaged" in each.name or "copy" in each.name]


class UnreadableRow(Database):
    """Cannot give one row from its own file; the copy that can be made of it has the row."""

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__(directory)
        self.number, self.is_well = number, False

    def _row(self, number: int) -> Row | int:
        if number == self.number and not (self.is_well or self.damaged_files()):
            raise sqlite3.OperationalError("disk I/O error")
        return super()._row(number)


def test_rows_before_one_that_cannot_be_read_are_read(tmp_path: Path) -> None:
    """The others wait, and it is known why; once the disk gives the row, nothing is remembered of it."""
    database = UnreadableRow(tmp_path, 4)
    threaded = Threaded(tmp_path, database)
    store = threaded.store
    threaded.append(5)
    threaded.wait(5)
    backlog, got = store.backlog("one"), list[list[int]]()

    def read() -> list[int]:
        asked = backlog.take(5)
        store.read(backlog, asked, lambda rows: got.append([row.number for row in rows if isinstance(row, Row)]))
        eventually(lambda: threaded.turn() and bool(got), "it is read")
        numbers = got.pop()
        backlog.put_back(asked[len(numbers) :])
        return numbers

    assert read() == [2, 3]
    assert not store.unreadable
    assert read() == []
    assert "disk I/O error" in str(store.unreadable["one"])
    database.is_well = True
    assert read() == [4, 5, 6]
    assert not store.unreadable
    store.close()


def test_a_row_that_is_unreadable_for_long_does_not_keep_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from a new file, and the log says so."""
    monkeypatch.setattr(writer_module, "_UNREADABLE_FOR", 0.0)
    threaded = Threaded(tmp_path, UnreadableRow(tmp_path, 2))
    store = threaded.store
    threaded.append(3)
    threaded.wait(3)
    got: list[list[Row | int]] = []
    store.read(store.backlog("one"), [2, 3, 4], got.append)
    eventually(lambda: threaded.turn() and bool(got), "it is read")
    assert len(got[0]) == 3
    assert any("damaged" in note for note in store.notes)
    at_once(store.sweep())
    eventually(lambda: threaded.turn() and bool(store.damaged_files), "the damaged file is listed")
    store.close()


def test_a_full_disk_is_full_until_the_reserve_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room at once when it is given up, and that must not be taken for the end."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    threaded.store.save(threaded.store.backlog("one"), "{}")
    fail("COMMIT", 1, is_full=True)
    threaded.append(1)
    threaded.wait(1)
    answers: list[bool] = []

    def keep(_: Database) -> bool:
        answers.append(len(answers) >= 2)
        return answers[-1]

    monkeypatch.setattr(Database, "keep_reserve", keep)
    recovered(threaded)
    assert answers == [False, False, True]
    threaded.store.close()


def test_what_was_set_aside_is_still_counted_if_it_cannot_be_moved(tmp_path: Path) -> None:
    """It is on the disk still."""
    threaded = Threaded(tmp_path, Database(tmp_path, faulty))
    store = threaded.store
    backlog = store.backlog("one")
    store.save(backlog, "{}")
    threaded.append(1)
    threaded.wait(1)
    store.set_aside(backlog, backlog.take(1)[0], "test")
    done: list[tuple[int, StoreError | None]] = []
    for ask, words in ((store.retry, "SELECT number, stamp, data FROM aside"), (store.drop, "DELETE FROM aside")):
        fail(words, 1)
        ask(backlog, lambda count, error: done.append((count, error)))
        eventually(lambda: threaded.turn() and bool(done), "it is answered")
        count, error = done.pop()
        assert count == 0
        assert "disk I/O error" in str(error)
        assert store.aside["one"] == 1
    store.close()


def test_a_lock_that_cannot_be_had_is_not_taken_for_another_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator would look for a process that is not there."""

    def flock(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreUnusable, match="Input/output error"):
        Database(tmp_path).open()


_FILL = """
import sys
from pathlib import Path
from gateway.store import database
database.RESERVE = 1 << 20
from tests.test_store import row
from gateway.store.database import Append, Database, Delete, Save, StoreError
directory = Path(sys.argv[1])
store = Database(directory)
store.open()
store.commit([Save(1, "one", "{}")])
(directory / "ballast").write_bytes(bytes(8 << 20))
kept, number = [], 0
while True:
    numbers = list(range(number + 1, number + 101))
    try:
        store.commit([Append(row(each)) for each in numbers])
    except StoreError as error:
        assert error.is_full, error
        break
    kept += numbers
    number = numbers[-1]
assert kept
assert store.give_up_reserve()
store.commit([Delete(kept[:50])])
assert not store.keep_reserve()
(directory / "ballast").unlink()
assert store.keep_reserve()
store.commit([Append(row(number + 1000))])
store.close()
store = Database(directory)
opened = store.open()
found = [each[0] for each in store.scan(0, opened.last_number, 1 << 30)]
assert found == [*kept[50:], number + 1000], (len(found), len(kept))
print("end")
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_takes_deletes_and_recovers(tmp_path: Path) -> None:
    """A tmpfs of 16 MiB in a mount namespace of its own."""
    mounted = f'mount -t tmpfs -o size=16m tmpfs {tmp_path} && exec {sys.executable} -c "$1" {tmp_path}'
    words = [require_tool("unshare"), "--mount", "sh", "-ec", mounted, "sh", _FILL]
    if os.geteuid():
        words[1:1] = ["--user", "--map-root-user"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert "end" in done.stdout, done.stderr
