"""A damaged store: what can be read around the damage is kept, and nothing of it gets to another device."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest

from gateway.mqtt.message import Message
from gateway.store import database as database_module
from gateway.store import salvage as salvage_module
from gateway.store.database import Append, Database, Opened, Released, Save, SetAside, StoreError
from gateway.store.row import Row
from gateway.store.salvage import salvage
from tests.harness import eventually
from tests.test_store import Threaded, message, row

_PAGE = 4096
# Long enough that a page has few of them.
_STATE = '{"is": "state %d", "more": "' + "x" * 600 + '"}'


@pytest.fixture(autouse=True)
def _small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "RESERVE", 4096)


def fill(directory: Path, changes: Iterable[database_module.Change]) -> Path:
    """Make a store and commit changes; return its file."""
    directory.mkdir(exist_ok=True)
    database = Database(directory)
    database.open()
    database.commit(list(changes))
    database.close()
    return database.path


def spoil(path: Path, *marks: bytes) -> None:
    """Damage the head of each page that has one of `marks` in it."""
    content = bytearray(path.read_bytes())
    for mark in marks:
        pages = [at for at in range(0, len(content), _PAGE) if mark in content[at : at + _PAGE]]
        assert pages, mark
        for at in pages:
            content[at : at + 100] = b"\xff" * 100
    path.write_bytes(bytes(content))


def numbers(path: Path, table: str = "message") -> set[object]:
    """Return the numbers of the rows that can be salvaged."""
    return {values[0] for found, values in salvage(path) if found == table}


def start(directory: Path) -> Opened:
    """Return what a gateway finds that starts now."""
    database = Database(directory)
    found = database.open()
    database.close()
    return found


def test_only_the_messages_of_damaged_pages_are_lost(tmp_path: Path) -> None:
    """Those between two of them are found."""
    path = fill(tmp_path, (Append(row(number)) for number in range(1, 2001)))
    spoil(path, b"%08d" % 500, b"%08d" % 1500)
    found = numbers(path)
    assert {1, 1000, 2000} <= found
    assert 1800 < len(found) < 2000
    assert not {500, 1500} & found


def test_a_page_in_the_middle_of_much_damage_is_found(tmp_path: Path) -> None:
    """No step passes over it."""
    path = fill(tmp_path, (Append(row(number)) for number in range(1, 2001)))
    content = path.read_bytes()
    sound = content.index(b"%08d" % 1200) // _PAGE
    marks = [b"%08d" % n for n in range(300, 1900) if content.index(b"%08d" % n) // _PAGE != sound]
    spoil(path, *marks)
    assert {1, 1200, 2000} <= numbers(path)


def test_messages_far_behind_the_damage_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers have gaps of a million where messages were set aside."""
    monkeypatch.setattr(salvage_module, "_TRIED_ONE_BY_ONE", 10)
    far = 5_000_000
    path = fill(tmp_path, (Append(row(number)) for number in [*range(1, 400), *range(far, far + 400)]))
    spoil(path, *{b"%08d" % number for number in range(200, 400)})
    found = numbers(path)
    assert max(number for number in found if number < far) < 200
    assert far + 399 in found
    assert len([number for number in found if number >= far]) > 380


def test_damage_inside_a_message_costs_only_that_message(tmp_path: Path) -> None:
    """Its number can be read, its content not."""
    large = Row(2, 1, 1_800_000_000, message(2, 20_000))
    path = fill(tmp_path, [Append(row(1)), Append(large), Append(row(3))])
    content = bytearray(path.read_bytes())
    inside = next(at for at in range(0, len(content), _PAGE) if not any(content[at + 4 : at + _PAGE]))
    content[inside : inside + 4] = b"\xff" * 4
    path.write_bytes(bytes(content))
    assert numbers(path) == {1, 3}


def test_a_file_without_damage_is_read_whole(tmp_path: Path) -> None:
    """Each row of each table, in pieces and beyond."""
    count = salvage_module._AT_A_TIME * 2
    changes: list[database_module.Change] = [Save(1, "one", "{}"), *(Append(row(n), n) for n in range(2, count + 2))]
    path = fill(tmp_path, [*changes, Released(3), SetAside(4, "refused")])
    rows = list(dict.fromkeys(salvage(path)))
    assert [values for table, values in rows if table == "device"] == [(1, "one", "{}")]
    assert len([1 for table, _ in rows if table == "message"]) == count - 1
    assert not [values for table, values in rows if table == "released"], "it might be damaged, too"
    assert len([1 for table, _ in rows if table == "received"]) == count
    assert [values[0] for table, values in rows if table == "aside"] == [4]


def test_a_device_whose_row_is_damaged_keeps_its_name_and_messages(tmp_path: Path) -> None:
    """Its name is in the index as well; the gateway starts, and says what it did."""
    changes = [each for n in range(1, 41) for each in (Save(n, f"name {n}", _STATE % n), Append(row(n + 100, n), n))]
    spoil(fill(tmp_path, changes), b'"state 20"')
    found = start(tmp_path)
    assert "damaged" in found.notes[0]
    assert {device.name: device.number for device in found.devices} == {f"name {n}": n for n in range(1, 41)}
    states = {device.name: device.state for device in found.devices}
    assert states["name 20"] == "{}"
    assert states["name 1"] == _STATE % 1
    assert all(device.received == {device.number} for device in found.devices)


def test_no_device_gets_the_messages_of_one_that_is_lost(tmp_path: Path) -> None:
    """They wait for a person, under a name that no device has, also after the next start."""
    changes = [each for n in range(1, 41) for each in (Save(n, f"name {n}", _STATE % n), Append(row(n + 100, n)))]
    path = fill(tmp_path, [*changes, Append(row(141, 40)), SetAside(141, "refused")])
    spoil(path, *(b'"state %d"' % n for n in range(20, 41)), *(b"name %d" % n for n in range(20, 41)))
    for _ in range(2):
        after = Threaded(tmp_path)
        store = after.store
        new = [store.backlog(f"new {n}") for n in range(100)]
        eventually(lambda after=after: after.turn() and not after.store.loading, "the scan ends")  # type: ignore[misc]
        assert not [backlog for backlog in new if len(backlog)]
        lost = store.known("device 40")
        assert lost is not None
        assert lost.first(10) == [140]
        assert store.aside["device 40"] == 1
        store.close()
    assert "device 40" in {device.name for device in start(tmp_path).devices}


def test_a_new_message_is_not_taken_for_one_that_the_broker_has(tmp_path: Path) -> None:
    """PUBREC came for a message that is lost: only PUBREL would be sent of the next one with its number."""
    sent = [Append(Row(n, 1, 1_800_000_000, Message(b"t", b"%08d" % n, 2), 40_000)) for n in range(2, 400)]
    path = fill(tmp_path, [Save(1, "one", "{}"), *sent, Released(399), Released(2)])
    unharmed = path.read_bytes()
    # SQLite does not notice all damage.
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM message WHERE number > 300")
    found = start(tmp_path)
    assert (found.notes, found.last_number) == ((), 399)
    path.write_bytes(unharmed)
    spoil(path, b"%08d" % 399)
    found = start(tmp_path)
    assert found.notes
    assert not found.released


def changed(path: Path, *statements: str) -> None:
    """Write what SQLite would accept and the gateway has never written."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("what", "statement"),
    [
        ("a text for the payload", "UPDATE message SET data = 'text' WHERE number = 105"),
        ("a device that is no number", "UPDATE message SET device = 'x' WHERE number = 105"),
        ("a stamp that is no number", "UPDATE message SET stamp = 'x' WHERE number = 105"),
        ("a state that is no text", "UPDATE device SET state = x'00' WHERE number = 5"),
        ("a name that is not UTF-8", "UPDATE device SET name = CAST(x'ff41' AS TEXT) WHERE number = 5"),
        ("a number beyond all", "UPDATE message SET number = 9000000000000000000 WHERE number = 105"),
        ("a number beyond all, as released", "INSERT INTO released VALUES (9000000000000000000)"),
    ],
)
def test_values_that_nobody_has_written_cost_only_their_row(what: str, statement: str, tmp_path: Path) -> None:
    """The gateway starts, finds the others, and takes new messages."""
    changes = [each for n in range(1, 41) for each in (Save(n, f"name {n}", "{}"), Append(row(n + 100, n)))]
    path = fill(tmp_path, changes)
    changed(path, statement)
    after = Threaded(tmp_path)
    store = after.store
    eventually(lambda: after.turn() and not store.loading, "the scan ends")
    got: dict[str, list[Row | int]] = {}
    for n in set(range(1, 41)) - {5}:
        backlog = store.known(f"name {n}")
        assert backlog is not None
        store.read(backlog, backlog.take(9), lambda rows, name=backlog.name: got.update({name: rows}))
    eventually(lambda: after.turn() and len(got) == 39, "they are read")
    for name, rows in got.items():
        (found,) = rows
        assert isinstance(found, Row)
        assert f"name {found.number - 100}" == name
    after.append(1)
    assert after.wait(1) == [None], what
    store.close()


@pytest.mark.parametrize(
    ("number", "wrong", "limit"),
    [(150, 192, 400), (150, 192, 149), (300, 16_383, 1000)],
    ids=["within", "last", "beyond"],
)
def test_a_row_with_a_wrong_number_does_not_hide_others(number: int, wrong: int, limit: int, tmp_path: Path) -> None:
    """SQLite notices nothing, and the rows behind it would be searched for elsewhere."""
    path = fill(tmp_path, [Save(1, "one", "{}"), *(Append(row(each)) for each in range(2, 401))])
    content = bytearray(path.read_bytes())
    mark = content.index(b"%08d" % number)
    # Numbers of SQLite have seven bits in each byte.
    at = content.rindex(bytes((0x80 | number >> 7, number & 0x7F)), mark - 60, mark)
    content[at : at + 2] = bytes((0x80 | wrong >> 7, wrong & 0x7F))
    path.write_bytes(bytes(content))
    database = Database(tmp_path)
    found = database.open()
    with pytest.raises(StoreError, match="malformed"):
        database.scan(0, found.last_number, limit)
    database.close()
    after = Threaded(tmp_path)
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    assert len(after.store.backlog("one")) > 340
    after.store.close()


def test_a_table_with_other_columns_is_damage(tmp_path: Path) -> None:
    """SQLite takes it for a mistake in the query, and it would be met at each start."""
    path = fill(tmp_path, [Save(1, "one", '{"a": 1}'), Append(row(2))])
    changed(path, "UPDATE sqlite_schema SET sql = replace(sql, 'state TEXT', 'stale TEXT') WHERE name = 'device'")
    (device,) = start(tmp_path).devices
    assert device.state == '{"a": 1}'


def test_an_internal_error_does_not_end_the_thread(tmp_path: Path) -> None:
    """Without it, no device would get an acknowledgement any more."""
    threaded = Threaded(tmp_path)
    errors: list[object] = []
    threaded.writer.work(lambda _: 1 // 0, lambda _, error: errors.append(error))
    threaded.append(1)
    assert threaded.wait(1) == [None]
    assert isinstance(errors[0], StoreError)
    threaded.store.close()


def test_a_device_with_two_names_gets_nobodys_messages(tmp_path: Path) -> None:
    """Its name stands in the file twice; which of them is right cannot be known."""
    changes = [each for n in range(11, 31) for each in (Save(n, f"sensor-{n}", "{}"), Append(row(n + 100, n)))]
    path = fill(tmp_path, changes)
    content = path.read_bytes()
    assert content.count(b"sensor-17") == 2
    path.write_bytes(content.replace(b"sensor-17", b"sensor-16", 1))
    found = start(tmp_path)
    assert found.notes
    names = {device.number: device.name for device in found.devices}
    assert names.get(17) is None
    assert names[18] == "sensor-18"
    after = Threaded(tmp_path)
    eventually(lambda: after.turn() and not after.store.loading, "the scan ends")
    lost = after.store.known("device 17")
    assert lost is not None
    assert lost.first(9) == [117]
    after.store.close()


def test_devices_that_are_known_are_written_into_a_new_file(tmp_path: Path) -> None:
    """The damaged one may have lost them; their next messages must not wait for a person after a restart."""
    threaded = Threaded(tmp_path)
    store = threaded.store
    for n in range(1, 251):
        store.save(store.backlog(f"name {n}"), "{}")
    threaded.append(1, "name 1")
    threaded.wait(1)
    changed(tmp_path / "store.db", "DELETE FROM device WHERE number < 200")
    done: list[object] = []
    threaded.writer.work(lambda database: database.start_anew("test"), lambda words, _: done.append(words))
    eventually(lambda: threaded.turn() and bool(done), "there is a new file")
    store.noted(str(done[0]))
    pieces = list(store.sweep())
    assert len(pieces) == 3, "so many turns"
    store.close()
    assert len(start(tmp_path).devices) == 250


def test_a_file_that_is_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """SQLite alone would refuse it as a whole."""
    path = fill(tmp_path, (Append(row(number)) for number in range(1, 2001)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4 // _PAGE * _PAGE])
    found = start(tmp_path)
    assert "damaged" in found.notes[0]
    assert found.last_number > 1000


def test_two_damages_in_one_second_leave_two_files(tmp_path: Path) -> None:
    """The first one may have what the second has not."""
    path = fill(tmp_path, [Save(1, "one", "{}"), *(Append(row(number)) for number in range(2, 401))])
    database = Database(tmp_path)
    database.open()
    database.start_anew("test")
    database.start_anew("test")
    database.close()
    assert path.exists()
    assert len(database.damaged_files()) == 2


def test_random_damage_never_stops_the_store(tmp_path: Path) -> None:
    """Whatever a page has in it: an end, new messages are taken, and none is under another identity.

    Where the damaged page is one by which others are found, those are lost as well.
    """
    random = Random(1)  # noqa: S311  reproducible
    devices = {n: f"sensor-{n}" for n in range(1, 11)}
    changes: list[database_module.Change] = [Save(n, name, "{}") for n, name in devices.items()]
    changes += [Append(Row(n, n % 10 + 1, 1_800_000_000, message(n, n % 300))) for n in range(11, 500)]
    sound = fill(tmp_path / "sound", changes).read_bytes()
    counts = []
    for trial in range(10):
        directory = tmp_path / str(trial)
        directory.mkdir()
        content = bytearray(sound)
        for _ in range(random.choice((1, 3))):
            page = random.randrange(_PAGE, len(content), _PAGE)
            at = page + random.choice((0, random.randrange(_PAGE - 64)))
            size = random.choice((1, 2, 60))
            content[at : at + size] = random.choice((random.randbytes(size), bytes(size), b"\xff" * size))
        (directory / "store.db").write_bytes(bytes(content))
        after = Threaded(directory)
        store = after.store
        eventually(lambda after=after: after.turn() and not after.store.loading, "the scan ends")  # type: ignore[misc]
        rows: list[Row | int] = []
        for backlog in list(store):
            numbers = backlog.take(1000)
            done: list[list[Row | int]] = []
            if numbers:
                store.read(backlog, numbers, done.append)
                eventually(lambda after=after, done=done: after.turn() and bool(done), "it is read")  # type: ignore[misc]
                rows += done[0]
                wrong = [
                    each.number
                    for each in done[0]
                    if isinstance(each, Row)
                    and backlog.name not in {devices[each.number % 10 + 1], f"device {each.device}"}
                ]
                assert not wrong, (trial, backlog.name)
        counts.append(len([each for each in rows if isinstance(each, Row)]))
        after.append(1)
        assert after.wait(1) == [None]
        store.close()
    assert sorted(counts)[2] > 300, counts


def test_a_device_has_a_lower_number_than_its_messages(tmp_path: Path) -> None:
    """So a message that is found is proof that its device's number is used up."""
    threaded = Threaded(tmp_path)
    store = threaded.store
    names = [f"d{n}" for n in range(5)]
    for name in names:
        store.save(store.backlog(name), "{}")
    threaded.append(1, "d0")
    threaded.wait(1)
    last = max(store.backlog(name).number for name in names)
    assert store.backlog("d0").first(1)[0] > last
    store.finish(store.backlog("d0"), store.backlog("d0").take(1))
    store.close()
    assert start(tmp_path).last_number == last
