"""A damaged store: what can be read around the damage is kept, and nothing of it gets to another device."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest

from gateway.mqtt.message import Message
from gateway.store import database as database_module
from gateway.store import salvage as salvage_module
from gateway.store.database import Append, Database, Opened, Released, Save, SetAside
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
    assert [values for table, values in rows if table == "released"] == [(3,)]
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
    assert found.released == {2}


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
