"""`mqtts-gateway store`: what waits on disk for a broker, and what was set aside.

In: the directory of a store, or the configuration that names it.  Out: lines, or JSON; an exit status: 0, or 1 if the
store cannot be read.  `list`, `show` and `export` only read.  `drop` and `retry` ask the gateway that uses the store,
if one runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.cli.report import complain
from gateway.config import load_file
from gateway.errors import ConfigError
from gateway.ops.store_port import NAME as SOCKET
from gateway.store.backlog import client_identifier_of
from gateway.store.database import Database, Delete, Forget, StoreError
from gateway.store.opening import store_directory
from gateway.store.row import DamagedRow, Row, decode_row
from gateway.text import capitalized, printable

_DEFAULT = Path("/var/lib/mqtts-gateway/store")
_SHOWN = 200  # characters of a name or a topic
_PATIENCE = 60.0  # seconds until the gateway has answered
_DELETED = 1_000  # rows in one transaction
_CHANGES = frozenset({"retry", "drop"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    for name, summary in (
        ("list", "list devices with messages on disk"),
        ("show", "list the messages of a device"),
        ("export", "write the messages of a device with their payloads, as JSON lines"),
        ("retry", "deliver again what was set aside"),
        ("drop", "delete all messages of a device"),
    ):
        action = actions.add_parser(name, help=summary, description=f"{capitalized(summary)}.", allow_abbrev=False)
        action.set_defaults(own_parser=action)
        if name != "list":
            action.add_argument("device", metavar="ID", help="the Client Identifier at the broker")
        place = action.add_mutually_exclusive_group()
        place.add_argument("--config", type=Path, metavar="FILE", help="the gateway's configuration")
        place.add_argument("--directory", type=Path, metavar="DIR", help=f"the store's directory; default {_DEFAULT}")


def run(options: argparse.Namespace) -> int:
    """Do what was asked."""
    try:
        directory = _directory(options)
        if options.action in _CHANGES:
            return _change(directory, options.action, options.device)
        with _reading(directory) as connection:
            if options.action == "list":
                return _list(directory, connection)
            return _show(connection, options.device, with_payload=options.action == "export")
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
    except (sqlite3.Error, StoreError, OSError) as error:
        complain(f"the store cannot be {'changed' if options.action in _CHANGES else 'read'}: {error}")
    return 1


def _directory(options: argparse.Namespace) -> Path:
    if options.directory is not None:
        return Path(options.directory)
    if options.config is not None:
        return store_directory(load_file(options.config), {}) or _DEFAULT
    return _DEFAULT


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[sqlite3.Connection]:
    path = directory / "store.db"
    if not path.exists():
        raise StoreError(f"there is no {path}")
    # Each query is a short transaction of its own, so that the gateway's checkpoints are not held up.
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)
    try:
        yield connection
    finally:
        connection.close()


def _list(directory: Path, connection: sqlite3.Connection) -> int:
    names = dict(connection.execute("SELECT number, name FROM device"))
    waiting = connection.execute(
        "SELECT device, count(*), sum(length(data)), min(stamp) FROM message GROUP BY device ORDER BY 2 DESC"
    ).fetchall()
    aside = dict(connection.execute("SELECT device, count(*) FROM aside GROUP BY device"))
    print(f"{'messages':>10} {'bytes':>13} {'set aside':>10}  {'oldest':<20}  device")
    rows = [(device, count, size, _time(stamp)) for device, count, size, stamp in waiting]
    rows += [(device, 0, 0, "") for device in aside if device not in {row[0] for row in rows}]
    for device, count, size, oldest in rows:
        print(f"{count:>10} {size:>13} {aside.get(device, 0):>10}  {oldest:<20}  {_shown(names.get(device, '?'))}")
    damaged = Database(directory).damaged_files()
    if damaged:
        print(f"\nThe store was damaged, and messages may be lost. Damaged files: {', '.join(damaged)}")
    return 0


def _show(connection: sqlite3.Connection, wanted: str, *, with_payload: bool) -> int:
    devices = _find(connection, wanted)
    if not devices:
        complain(f"the store knows no device {printable(wanted, _SHOWN)}")
        return 1
    for device in devices:
        for table, why in (("message", "''"), ("aside", "why")):
            last = 0
            query = f"SELECT number, stamp, data, {why} FROM {table}"  # noqa: S608  our own words
            query += " WHERE device = ? AND number > ? ORDER BY number LIMIT 500"
            while rows := connection.execute(query, (device, last)).fetchall():
                last = rows[-1][0]
                for number, stamp, data, reason in rows:
                    try:
                        row = decode_row(number, device, stamp, data)
                    except DamagedRow as error:
                        complain(str(error))
                        continue
                    print(_exported(row, reason) if with_payload else _line(row, reason))
    return 0


def _change(directory: Path, action: str, wanted: str) -> int:
    changed = _ask(directory / SOCKET, action, wanted)
    if changed is None:
        changed = _change_file(directory, action, wanted)
    if not changed:
        complain(f"the store knows no device {printable(wanted, _SHOWN)}")
        return 1
    for name, count in changed:
        words = "queued again" if action == "retry" else "deleted"
        print(f"{words}: {count} message{'' if count == 1 else 's'} of {_shown(name)}")
    return 0


def _ask(path: Path, action: str, wanted: str) -> list[tuple[str, int]] | None:
    """Ask the gateway that uses the store; return None if there is none.  Raises StoreError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        connection.sendall(json.dumps({"action": action, "device": wanted}).encode() + b"\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    values = json.loads(answer) if answer else {"error": "the gateway gave no answer"}
    if "error" in values:
        raise StoreError(printable(str(values["error"]), _SHOWN))
    return [(str(each[0]), int(each[1])) for each in values["changed"]]


def _change_file(directory: Path, action: str, wanted: str) -> list[tuple[str, int]]:
    """Make the change without a gateway.  Raises StoreError."""
    changed: list[tuple[str, int]] = []
    database = Database(directory)
    opened = database.open()
    for note in opened.notes:
        complain(printable(note, 1000))
    try:
        devices = [device for device in opened.devices if wanted in {device.name, client_identifier_of(device.name)}]
        for device in devices:
            if action == "retry":
                changed.append((device.name, len(database.retry_aside(device.number, opened.last_number + 1))))
                continue
            count = database.drop_aside(device.number)
            after = 0
            while rows := database.scan(after, opened.last_number, _DELETED):
                after = rows[-1][0]
                numbers = [number for number, owner, _, _ in rows if owner == device.number]
                count += len(numbers)
                database.commit([Delete(numbers)])
            database.commit([Forget(device.number)])
            changed.append((device.name, count))
    finally:
        database.close()
    return changed


def _find(connection: sqlite3.Connection, wanted: str) -> list[int]:
    return [
        number
        for number, name in connection.execute("SELECT number, name FROM device")
        if wanted in {name, client_identifier_of(name)}
    ]


def _shown(name: str) -> str:
    try:
        client_identifier, username, subject = json.loads(name)
    except (ValueError, TypeError):
        return printable(name, _SHOWN)
    more = ", ".join(part for part in (username and f"user {username}", subject) if part)
    return printable(f"{client_identifier} ({more})" if more else str(client_identifier), _SHOWN)


def _time(stamp: int) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(row: Row, why: str) -> str:
    message = row.message
    topic = printable(message.topic.decode(errors="replace"), _SHOWN)
    flags = " retain" if message.retain else ""
    aside = f"  set aside: {printable(why, _SHOWN)}" if why else ""
    return (
        f"{row.number:>10}  {_time(row.stamp)}  QoS {message.qos}{flags}  {len(message.payload)} bytes  {topic}{aside}"
    )


def _exported(row: Row, why: str) -> str:
    message = row.message
    values: dict[str, Any] = {
        "number": row.number,
        "time": _time(row.stamp),
        "topic": message.topic.decode(errors="replace"),
        "qos": message.qos,
        "retain": message.retain,
        "payload_hex": message.payload.hex(),
        "set_aside": why or None,
    }
    return json.dumps(values)
