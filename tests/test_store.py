"""The store: rows on disk, group commit, quotas, and disks that fill, fail and lose their power."""

from __future__ import annotations

import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.config import StoreConfig, from_mapping
from gateway.errors import ConfigError
from gateway.mqtt.message import Message
from gateway.pieces import at_once
from gateway.store import database as database_module
from gateway.store import store as store_module
from gateway.store.backlog import Backlog
from gateway.store.database import (
    SCHEMA_VERSION,
    Append,
    Database,
    Delete,
    Release,
    Released,
    Save,
    SetAside,
    StoreError,
    StoreUnusable,
    is_damaged,
    needs_recovery,
)
from gateway.store.opening import open_store, store_directory
from gateway.store.row import DamagedRow, Row, decode_row, encode_row, size_of
from gateway.store.store import Store
from gateway.store.writer import Writer
from tests.harness import PATIENCE, eventually
from tests.stored_world import Memory, open_memory_store
from tests.tools import require_tool

ROOT = Path(__file__).resolve().parent.parent


def message(number: int = 0, size: int = 20) -> Message:
    """Make a message that can be told from others."""
    return Message(b"t", b"%08d" % number + bytes(size), 1)


def row(number: int, device: int = 1) -> Row:
    """Make a row."""
    return Row(number, device, 1_800_000_000, message(number))


@pytest.fixture(autouse=True)
def _small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "RESERVE", 4096)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An open database."""
    opened = Database(tmp_path)
    opened.open()
    opened.commit([Save(1, "one", "{}")])
    yield opened
    opened.close()


# ---- rows


@pytest.mark.parametrize(
    "stored",
    [
        Message(b"a/b", b"", 0),
        Message(b"a", b"\x00\xff", 2, retain=True),
        Message(b"a", b"x", 1, properties=b""),
        Message(b"a", b"x", 1, properties=b"\x03\0\1t", expiry=0),
        Message(b"a", b"x", 1, properties=b"", expiry=0xFFFF_FFFE),
    ],
)
def test_a_row_is_read_as_it_was_written(stored: Message) -> None:
    """Topic, payload, QoS, Retain, properties, expiry, identifier."""
    written = Row(7, 3, 1_800_000_000, stored, 40_000)
    assert decode_row(7, 3, 1_800_000_000, encode_row(written)) == written


def test_every_changed_bit_of_a_row_is_noticed() -> None:
    """So is a row in another one's place."""
    data = encode_row(row(1))
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRow):
            decode_row(1, 1, 1_800_000_000, bytes(changed))
    for place in ((2, 1, 1_800_000_000), (1, 2, 1_800_000_000), (1, 1, 1_800_000_001)):
        with pytest.raises(DamagedRow):
            decode_row(*place, data)


# ---- the database


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    """Rows, devices, QoS 2 in both directions."""
    first = Database(tmp_path)
    first.open()
    first.commit([Save(1, "one", '{"a":1}'), Append(row(1), 17), Append(row(2), 18), Append(row(3))])
    first.commit([Released(2), Release(1, 18), Delete((1,))])
    first.close()
    second = Database(tmp_path)
    opened = second.open()
    (device,) = opened.devices
    assert (device.name, device.state, device.received) == ("one", '{"a":1}', {17})
    assert (opened.released, opened.last_number) == ({2}, 3)
    assert [found.number if isinstance(found, Row) else None for found in second.read([2, 3])] == [2, 3]
    second.close()


def test_changes_are_durable_together_or_not_at_all(database: Database) -> None:
    """The second change is refused by SQLite."""
    with pytest.raises(StoreError):
        database.commit([Append(row(1)), Save(2, "two", None)])  # type: ignore[arg-type]
    assert database.scan(0, 100, 100) == []


def test_a_second_gateway_is_kept_out(database: Database) -> None:
    """Both would deliver."""
    with pytest.raises(StoreUnusable, match="another gateway"):
        Database(database.directory).open()


@pytest.mark.parametrize("name", ["store.db", "store.db-wal", "lock"])
def test_what_no_start_would_find_is_not_durable(database: Database, name: str) -> None:
    """Files that were removed or replaced are written to all the same; without the lock there can be two gateways."""
    path, elsewhere = database.directory / name, database.directory / "elsewhere"
    database.commit([Append(row(1))])
    path.rename(elsewhere)
    for replaced in (False, True):
        if replaced:
            path.write_bytes(elsewhere.read_bytes())
        with pytest.raises(StoreError, match="restart the gateway") as caught:
            database.commit([Append(row(2))])
        told = (caught.value.is_full, needs_recovery(caught.value), is_damaged(caught.value))
        assert told == (False, False, False)
    elsewhere.rename(path)
    database.commit([Append(row(3))])


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """The messages in it are somebody's."""
    path = tmp_path / "store.db"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(StoreUnusable, match="newer version"):
        Database(tmp_path).open()
    assert path.exists()


def test_only_the_service_can_read_payloads(database: Database) -> None:
    """Directory and files."""
    database.commit([Append(row(1))])
    assert database.directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in database.directory.iterdir()} >= {"store.db", "store.db-wal", "reserve", "lock"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in database.directory.iterdir())


def test_a_damaged_file_is_moved_aside_and_what_can_be_read_is_taken(tmp_path: Path) -> None:
    """Never deleted: somebody may read more of it."""
    first = Database(tmp_path)
    first.open()
    first.commit([Save(1, "one", "{}"), *(Append(row(number)) for number in range(1, 401))])
    first.close()
    path = tmp_path / "store.db"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    content[:16] = b"not SQLite any m"
    path.write_bytes(bytes(content))
    second = Database(tmp_path)
    opened = second.open()
    assert "damaged" in opened.notes[0]
    assert [each.name for each in tmp_path.iterdir() if ".damaged-" in each.name]
    second.commit([Append(row(1000))])
    second.close()


def test_what_was_set_aside_is_kept_and_can_be_put_back(database: Database) -> None:
    """Behind the backlog, with new numbers."""
    database.commit([Append(row(1)), Append(row(2))])
    database.commit([SetAside(1, "refused")])
    assert [found[0] for found in database.scan(0, 100, 100)] == [2]
    ((number, _, _),) = database.retry_aside(1, 50)
    assert number == 50
    (found,) = database.read([50])
    assert isinstance(found, Row)
    assert found.message == message(1)


# ---- the backlog


def test_a_backlog_keeps_its_order_whatever_is_finished_first() -> None:
    """Against a list."""
    random = Random(1)  # noqa: S311  reproducible
    backlog, model, taken = Backlog(1, "x", loading=False), [], []
    number = 0
    for _ in range(30_000):
        what = random.random()
        if what < 0.4:
            number += 1
            backlog.append(number, number % 7 + 1, 5)
            model.append(number)
        elif what < 0.6:
            taken += backlog.take(random.randint(1, 5))
        elif what < 0.95 and taken:
            done = random.choice(taken[:20])
            taken.remove(done)
            model.remove(done)
            assert backlog.finish(done) == done % 7 + 1
        elif what > 0.995:
            backlog.give_back()
            taken = []
        assert len(backlog) == len(model)
    backlog.give_back()
    assert backlog.take(len(model)) == model
    assert backlog.bytes == sum(each % 7 + 1 for each in model)


def test_rows_that_were_not_read_are_put_back_where_they_were() -> None:
    """Also if one that was sent before it was stored has been taken meanwhile."""
    backlog = Backlog(1, "x", loading=False)
    for number in range(1, 8):
        backlog.append(number, number, 5)
    asked = backlog.take(4)
    backlog.adopt(7)
    backlog.put_back(asked[2:])
    assert backlog.taken == 3
    assert backlog.take(9) == [3, 4, 5, 6]
    assert backlog.finish(7) == 7


def test_a_million_messages_take_less_than_40_bytes_each_in_memory() -> None:
    """They are three numbers."""
    backlog = Backlog(1, "x", loading=False)
    for number in range(100_000):
        backlog.append(number, 200, 1_800_000_000)
    columns = (backlog._numbers, backlog._sizes, backlog._stamps)
    assert sum(sys.getsizeof(column) for column in columns) / 100_000 < 40


# ---- quotas


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., tuple[Store, Any]]:
    """Open stores in memory, with a configuration."""
    opened: list[Any] = []

    def make(**values: Any) -> tuple[Store, Any]:
        name = f"file:{tmp_path.name}{len(opened)}?mode=memory&cache=shared"
        opened.append(Memory(name))
        return open_memory_store(tmp_path, name, StoreConfig(**values), lambda: 0.0, lambda: clock[0])

    clock = [1_800_000_000.0]
    make.clock = clock  # type: ignore[attr-defined]
    return make


def put(store: Store, name: str, count: int, size: int = 1000) -> None:
    """Store messages for a device, where there is room."""
    for number in range(count):
        each = message(number, size)
        if store.has_room(store.backlog(name), size_of(each)):
            store.append(store.backlog(name), each, lambda *_: None)
        store._writer.commit()  # type: ignore[attr-defined]


def test_a_full_store_drops_the_oldest_of_the_device_that_has_most(kept: Any) -> None:
    """Never what is in flight; and it says how many."""
    store, _ = kept(max_size=1_048_576, max_size_per_device=1_048_576)
    put(store, "small", 20)
    put(store, "large", 900)
    large = store.backlog("large")
    in_flight = large.take(5)
    put(store, "large", 300)
    assert store.bytes <= 1_048_576
    assert len(store.backlog("small")) == 20
    assert store.counts.dropped["evicted"] > 100
    assert [large._numbers[large._head + at] for at in range(5)] == in_flight


def test_a_full_store_refuses_if_it_is_told_to(kept: Any) -> None:
    """Nothing is dropped."""
    store, _ = kept(max_size=1_048_576, full="refuse")
    put(store, "one", 1200)
    assert not store.has_room(store.backlog("one"), 1000)
    assert not store.counts.dropped


def test_a_device_has_a_quota_of_its_own(kept: Any) -> None:
    """Others have room."""
    store, _ = kept(max_size_per_device=65_536, full="refuse")
    put(store, "one", 100)
    assert not store.has_room(store.backlog("one"), 1000)
    assert store.has_room(store.backlog("two"), 1000)


def test_messages_that_are_too_old_are_dropped_and_counted(kept: Any) -> None:
    """But not while the clock cannot be believed."""
    store, _ = kept(max_age=100.0)
    put(store, "one", 3)
    kept.clock[0] += 101
    store._is_plausible = lambda: False
    at_once(store.sweep())
    assert len(store.backlog("one")) == 3
    store._is_plausible = lambda: True
    at_once(store.sweep())
    assert len(store.backlog("one")) == 0
    assert store.counts.dropped["too old"] == 3


def test_messages_of_some_devices_are_dropped_in_each_turn(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no second round begins before the first has reached all devices."""
    monkeypatch.setattr(store_module, "_AGED_IN_A_TURN", 20)
    store, _ = kept(max_age=100.0)
    for name in "abcdef":
        put(store, name, 1)
    kept.clock[0] += 101
    sweep, left = store.sweep(), []
    for _ in sweep:
        left.append(store.messages)
        at_once(store.sweep())
        assert store.messages == left[-1]
    assert (left, store.messages) == ([4, 2], 0)


def test_a_device_is_not_forgotten_before_its_rows_are_deleted(kept: Any) -> None:
    """After a crash in between, its rows would have no device."""
    store, writer = kept()
    store.save(store.backlog("one"), "{}")
    put(store, "one", 1)
    backlog = store.backlog("one")
    store.finish(backlog, backlog.take(1))
    store.forget(backlog)
    kinds = [type(getattr(each, "change", None)).__name__ for each in writer.queue]
    assert kinds.index("Delete") < kinds.index("Forget")


def test_an_error_in_one_callback_does_not_keep_the_others_from_being_told(tmp_path: Path) -> None:
    """They are other devices', and would wait for their acknowledgements forever; the error is still raised."""
    store, disk = open_memory_store(tmp_path, ":memory:", StoreConfig(), lambda: 0.0, lambda: 0.0)
    outcomes: list[object] = []

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for done in (fail, lambda _, error: outcomes.append(error)):
        store.append(store.backlog("one"), message(), done)
        store.read(store.backlog("one"), [1], lambda rows, done=done: done(rows, None))
    with pytest.raises(ZeroDivisionError):
        disk.commit()
    assert outcomes == [None, None]


def test_what_is_remembered_of_devices_is_bounded(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may connect under any number of names must not fill memory and disk."""
    monkeypatch.setattr(store_module, "MOST_REMEMBERED", 100_000)
    store, writer = kept()
    for number in range(100):
        name = f"d{number}"
        assert store.make_place(name, {"d1"})
        store.save(store.backlog(name), "x" * 10_000)
        if number == 2:
            put(store, name, 1)
        if number == 3:
            store.received[name].add(7)
        writer.commit()
        assert store.remembered <= 120_000
    known = {backlog.name for backlog in store}
    assert known >= {"d1", "d2", "d3", "d99"}, "in use, with a message, with an open QoS 2 exchange, the newest"
    assert known == store.states.keys() == store.received.keys()
    assert {name for _, name in writer.database._open.execute("SELECT number, name FROM device")} == known
    assert not store.make_place("one more", known)


# ---- the thread


class Threaded:
    """A store with its real thread; callbacks run when `turn` is called, as in the reactor."""

    def __init__(self, directory: Path, database: Database | None = None) -> None:
        self.calls: queue.Queue[Callable[[], None]] = queue.Queue()
        stores: list[Store] = []
        self.writer = Writer(
            database or Database(directory),
            self.calls.put,
            lambda *given: stores[0].committed(*given),
            lambda rows: stores[0].scanned(rows),
            lambda words: stores[0].noted(words),
        )
        self.store = Store(StoreConfig(), self.writer.open(), self.writer, time.monotonic, time.time)
        stores.append(self.store)
        self.outcomes: list[StoreError | None] = []

    def append(self, count: int, name: str = "one") -> None:
        """Store messages."""
        for number in range(count):
            self.store.append(self.store.backlog(name), message(number), lambda _, error: self.outcomes.append(error))

    def turn(self) -> bool:
        """Call back; always true."""
        while not self.calls.empty():
            self.calls.get()()
        return True

    def wait(self, count: int) -> list[StoreError | None]:
        """Wait for so many outcomes."""
        eventually(lambda: self.turn() and len(self.outcomes) >= count, f"{count} outcomes")
        return self.outcomes


def test_what_waited_for_a_commit_is_one_commit(tmp_path: Path) -> None:
    """Otherwise each message would cost an fsync."""
    threaded = Threaded(tmp_path)
    threaded.append(1000)
    assert threaded.wait(1000) == [None] * 1000
    assert threaded.store.counts.commits < 50
    threaded.store.close()


def test_acknowledgements_do_not_wait_for_what_is_read_for_drains(tmp_path: Path) -> None:
    """A commit is told at once, whatever else was asked for before it was begun."""
    threaded = Threaded(tmp_path)
    begun, asked, told = threading.Event(), threading.Event(), threading.Event()
    threaded.writer.work(lambda _: (begun.set(), asked.wait(PATIENCE)), lambda *_: None)
    assert begun.wait(PATIENCE)
    # These two are taken together, and the commit comes first.
    threaded.writer.work(lambda _: told.wait(PATIENCE), lambda *_: None)
    threaded.append(1)
    asked.set()
    try:
        assert threaded.wait(1) == [None]
    finally:
        told.set()
        threaded.store.close()


def test_a_backlog_from_before_is_found_while_new_messages_are_stored(tmp_path: Path) -> None:
    """The order is that of their coming."""
    before = Threaded(tmp_path)
    before.store.save(before.store.backlog("one"), "{}")
    before.append(3000)
    before.wait(3000)
    before.store.close()
    after = Threaded(tmp_path)
    after.append(10)
    after.wait(10)
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    numbers = after.store.backlog("one").take(6000)
    assert len(numbers) == 3010
    assert numbers == sorted(numbers)
    after.store.close()


def test_a_full_disk_acknowledges_nothing_deletes_and_recovers(tmp_path: Path) -> None:
    """SQLite's own "database or disk is full"."""
    connections: list[sqlite3.Connection] = []

    def connect(path: Path) -> sqlite3.Connection:
        connections.append(database_module._connect(path))
        return connections[-1]

    threaded = Threaded(tmp_path, Database(tmp_path, connect))
    threaded.store.save(threaded.store.backlog("one"), "{}")
    threaded.append(50)
    threaded.wait(50)
    threaded.writer.work(lambda _: connections[-1].execute("PRAGMA max_page_count = 1"), lambda *_: None)
    threaded.append(2000)
    outcomes = threaded.wait(2050)
    failed = [outcome for outcome in outcomes[50:] if outcome is not None]
    assert failed
    assert all(outcome.is_full for outcome in failed)
    assert threaded.store.failure is not None
    assert not (tmp_path / "reserve").exists()
    durable = outcomes.count(None)
    backlog = threaded.store.backlog("one")
    assert len(backlog) == durable
    threaded.store.finish(backlog, backlog.take(40))
    threaded.store.flush()
    threaded.writer.work(lambda _: connections[-1].execute("PRAGMA max_page_count = 100000"), lambda *_: None)
    threaded.store._probed = -100.0
    at_once(threaded.store.sweep())
    eventually(lambda: threaded.turn() and threaded.store.failure is None, "it recovers by itself")
    threaded.append(1)
    assert threaded.wait(2051)[-1] is None
    threaded.store.close()
    again = Threaded(tmp_path)
    eventually(lambda: again.turn() and not again.store.loading, "the scan ends")
    assert len(again.store.backlog("one")) == durable - 40 + 1
    again.store.close()


# ---- a disk below SQLite that fails

_WRITE = """
import os, sys, time
from pathlib import Path
from gateway.store import database
database.RESERVE = 4096
from gateway.mqtt.message import Message
from gateway.store.database import Append, Database, Delete, Save, StoreError
from gateway.store.row import Row
directory, control = Path(sys.argv[1]), Path(sys.argv[2])
acks = os.open(directory / "acks", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
store = Database(directory)
store.open()
store.commit([Save(1, "one", "{}")])
number = 0
for step in range(int(sys.argv[3])):
    rows = []
    for _ in range(11):
        number += 1
        rows.append(Row(number, 1, 1800000000, Message(b"t", b"%08d" % number * 30, 1)))
    changes = [Append(row) for row in rows] + ([Delete([number - 40])] if number > 40 else [])
    if number > 40:
        os.write(acks, b"-%d\\n" % (number - 40))
    if sys.argv[4] == str(step):
        control.write_text(sys.argv[5])
    try:
        store.commit(changes)
    except StoreError as error:
        print("failed", error, flush=True)
        control.write_text("")
        if "I/O" in str(error):
            store.recover()
        store.commit(changes)
    os.write(acks, b"".join(b"%d\\n" % row.number for row in rows))
print("end", flush=True)
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a disk fail."""
    built = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    source = ROOT / "tests" / "faulty_disk.c"
    compiler = require_tool("gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
    return built


def write_on(shim: Path, tmp_path: Path, steps: int, at: int = -1, fault: str = "") -> tuple[Path, str]:
    """Run the program above on a faulty disk; return the directory and what it said."""
    directory, control = tmp_path / "disk", tmp_path / "control"
    directory.mkdir()
    control.write_text("")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "FAULTY_DIRECTORY": str(directory),
        "FAULTY_CONTROL": str(control),
        "FAULTY_LOG": str(tmp_path / "log"),
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-c", _WRITE, str(directory), str(control), str(steps), str(at), fault]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "end" in done.stdout, done.stderr
    return directory, done.stdout


def acknowledged(text: bytes) -> set[int]:
    """Return the numbers that were acknowledged and not deleted."""
    numbers = [int(line) for line in text.split(b"\n")[:-1]]
    return {number for number in numbers if number > 0} - {-number for number in numbers if number < 0}


@pytest.mark.parametrize(("fault", "word"), [("n", "full"), ("e", "I/O"), ("s", "I/O")])
@pytest.mark.parametrize("at", [0, 7])
def test_a_disk_that_fails_loses_nothing_acknowledged(
    shim: Path, tmp_path: Path, fault: str, word: str, at: int
) -> None:
    """ENOSPC and EIO of writes, EIO of fsync; then it goes on."""
    directory, said = write_on(shim, tmp_path, 20, at, fault)
    assert word in said
    database = Database(directory)
    opened = database.open()
    found = {number for number, *_ in database.scan(0, opened.last_number, 10_000)}
    assert acknowledged((directory / "acks").read_bytes()) <= found
    database.close()


def test_a_power_cut_at_any_moment_loses_nothing_acknowledged(shim: Path, tmp_path: Path) -> None:
    """The disk keeps what was synced, and of the rest whatever it likes, torn in sectors."""
    write_on(shim, tmp_path, 60)
    operations = read_log((tmp_path / "log").read_bytes())
    random = Random(3)  # noqa: S311  reproducible
    lost = 0
    for attempt in range(25):
        cut = random.randrange(20, len(operations))
        directory = tmp_path / f"cut{attempt}"
        directory.mkdir()
        files = after_power_cut(operations[:cut], random)
        # What a person was told is known without the disk.
        told = b"".join(data for kind, name, _, data in operations[:cut] if kind == "w" and name == "acks")
        for name, content in files.items():
            if name.startswith("store.db") and not name.endswith("-shm"):
                (directory / name).write_bytes(content)
        database = Database(directory)
        opened = database.open()
        assert not opened.notes
        rows = database.read([number for number, *_ in database.scan(0, opened.last_number, 10_000)])
        found = {each.number for each in rows if isinstance(each, Row)}
        assert acknowledged(told) <= found
        lost += len(rows) != len(found)
        database.close()
    assert not lost


def read_log(log: bytes) -> list[tuple[str, str, int, bytes]]:
    """Return (kind, file, offset, data) of each operation."""
    operations = []
    at = 0
    while at < len(log):
        end = log.index(b"\n", at)
        kind, name, offset, size = log[at:end].decode().split(" ")
        at = end + 1 + int(size)
        operations.append((kind, name, int(offset), log[end + 1 : at]))
    return operations


def after_power_cut(operations: list[tuple[str, str, int, bytes]], random: Random) -> dict[str, bytes]:
    """Make the files that a power cut behind these operations leaves."""
    synced: dict[str, int] = {}
    for index, (kind, name, _, _) in enumerate(operations):
        if kind == "s":
            synced[name] = index
    files: dict[str, bytearray] = {}
    for index, (kind, name, offset, data) in enumerate(operations):
        content = files.setdefault(name, bytearray())
        if kind == "u":
            # SQLite syncs the directory behind it.
            del files[name]
            continue
        is_durable = index < synced.get(name, -1)
        if kind == "t" and (is_durable or random.random() < 0.5):
            del content[offset:]
        if kind != "w":
            continue
        for start in range(0, len(data), 512):
            if is_durable or random.random() < 0.5:
                piece = data[start : start + 512]
                place = offset + start
                content.extend(bytes(max(0, place + len(piece) - len(content))))
                content[place : place + len(piece)] = piece
    return {name: bytes(content) for name, content in files.items()}


# ---- where it is


def rules(**store: Any) -> Any:
    """Make a configuration with a device that wants a store."""
    return from_mapping(
        {
            "upstream": [{"host": "broker.example.com"}],
            "device": [{"match_client_id": "s", "store": True, "bound_to": "10.0.0.1"}],
            "store": store,
        }
    )


def test_the_store_is_in_the_services_state_unless_configured(tmp_path: Path) -> None:
    """STATE_DIRECTORY is a list; the first counts."""
    assert store_directory(rules(), {"STATE_DIRECTORY": "/var/lib/a:/b"}) == Path("/var/lib/a/store")
    assert store_directory(rules(directory=str(tmp_path)), {"STATE_DIRECTORY": "/x"}) == tmp_path


def test_a_store_without_a_place_is_refused() -> None:
    """A rule wants it, and nobody says where."""
    with pytest.raises(ConfigError, match=r"store\.directory"):
        open_store(rules(), lambda call: call(), time.monotonic, environment={})


def test_no_store_is_opened_if_nobody_wants_one(tmp_path: Path) -> None:
    """Not even a directory is made."""
    config = from_mapping({"upstream": [{"host": "broker"}], "store": {"directory": str(tmp_path / "none")}})
    assert open_store(config, lambda call: call(), time.monotonic, environment={}) is None
    assert not (tmp_path / "none").exists()


def test_a_rule_with_store_must_know_its_device() -> None:
    """Without the broker nobody else can tell who it is."""
    with pytest.raises(ConfigError, match="bound_to or lan_password"):
        from_mapping({"upstream": [{"host": "b"}], "device": [{"match_client_id": "s", "store": True}]})
