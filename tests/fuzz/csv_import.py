"""`mqtts-gateway device import`: all of a file's devices are there afterwards, or nothing is."""

from __future__ import annotations

import contextlib
import csv
import io
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from gateway.cli import device as device_module
from gateway.cli import device_files
from gateway.cli.main import console
from gateway.config import Config, load_file

SEEDS = (
    b"id\nsensor-1\nsensor-2\n",
    b"id,common_name,max_qos\r\npump-3,pump,1\r\n",
    b'\xef\xbb\xbfid,publish\n"a,b","[""t/#""]"\n',
    b"id,match_network\nx,10.0.0.0/8\n",
    b"id,upstream\nx,nowhere\n",
    b"id,nosuchkey\nx,1\n",
    b"id;max_qos\npump-3;1\n",
    b"id\n../../etc/passwd\n*\n[x]\n",
    b"ID,Max_QoS\npump,1\n",
    b"id,client_id\nx,\xe4\n",
    b"id\nsame\nsame\n",
    b"id\npump*\npump-3\n",
)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check(data: bytes) -> None:
    """Import a file into an empty directory, and load what was written."""
    with TemporaryDirectory() as name:
        top = Path(name)
        (top / "devices").mkdir()
        config, table = top / "gateway.toml", top / "devices.csv"
        config.write_text('[[upstream]]\nhost = "b.example"\n[devices]\ndirectory = "devices"\n')
        table.write_bytes(data)
        before = _files(top)
        out = io.TextIOWrapper(io.BytesIO(), write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as complaints:
            status = console(["device", "import", "--config", str(config), str(table)])
        after = _files(top)
        assert status in {0, 1}, f"status {status}"
        assert set(before) <= set(after)
        assert all(after[path] == content for path, content in before.items()), "a file was changed"
        new = [path for path in after if path not in before]
        assert all(path.startswith("devices/") for path in new), f"files elsewhere: {new}"
        if status:
            assert not new, f"a refused import has written {new}"
            assert complaints.getvalue().strip(), "refused without a word"
            return
        _check_imported(load_file(config, {}), data)


def _check_imported(config: Config, data: bytes) -> None:
    """Each row has a rule that names its device and no other."""
    names = [rule.match_client_id for rule in config.device]
    assert len(set(names)) == len(names)
    assert all(len(each) == 1 for each in names), "a rule that names no device, or more than one"
    with contextlib.suppress(UnicodeDecodeError, csv.Error):
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
        if rows and "id" in rows[0]:
            assert len(rows) == len(names)
            for row in rows:
                (own,) = [pattern for (pattern,) in names if fnmatchcase(row["id"], pattern)]
                for other in (row["id"] + "x", *(row["id"].replace(wild, "zz") for wild in "*?[" if wild in row["id"])):
                    assert not fnmatchcase(other, own), f"the rule for {row['id']!r} is for {other!r}, too"


def writes_as_it_reads() -> None:
    """A file whose last rows are wrong leaves those before."""
    device_module.Writer.all_or_nothing = classmethod(  # type: ignore[method-assign]
        contextlib.contextmanager(lambda cls: iter([cls([])]))
    )


def takes_names_for_patterns() -> None:
    """A `*` in a Client Identifier matches all others."""
    for module in (device_files, device_module):
        module.exact_pattern = lambda client_identifier: client_identifier  # type: ignore[attr-defined]


FAULTS = (writes_as_it_reads, takes_names_for_patterns)
