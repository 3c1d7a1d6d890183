"""What is read: regular files alone.  What a power failure must not undo: the entries of a directory."""

from __future__ import annotations

import ast
import errno
import os
import socket
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest

from gateway.cli import places
from gateway.disk import MEBIBYTE, all_read, read_file, sync_directory
from gateway.errors import NotNow

GATEWAY = Path(__file__).resolve().parent.parent / "gateway"


def descriptors() -> int:
    """Return how many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_directory_itself_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no descriptor is left, whether or not that works."""
    synced: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    before = descriptors()
    sync_directory(tmp_path)
    assert [(each.st_ino, stat.S_ISDIR(each.st_mode)) for each in synced] == [(tmp_path.stat().st_ino, True)]

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(tmp_path)
    assert descriptors() == before


@pytest.mark.parametrize(("number", "is_lack"), [(errno.EMFILE, True), (errno.ENFILE, True), (errno.EACCES, False)])
def test_a_lack_of_descriptors_is_told_of_all_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_lack: bool
) -> None:
    """Even if the reader went on without the file; the next block begins anew."""

    def read_all() -> None:
        with all_read(), pytest.raises(OSError, match=os.strerror(number)):
            read_file(file)

    file = tmp_path / "file"
    file.touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", Mock(side_effect=OSError(number, os.strerror(number))))
        if is_lack:
            with pytest.raises(NotNow, match=f"{file} cannot be read: {os.strerror(number)}"):
                read_all()
        else:
            read_all()
    with all_read():
        assert read_file(file) == b""


def test_a_file_is_not_taken_for_a_directory(tmp_path: Path) -> None:
    """Its fsync says nothing about its name."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError):
        sync_directory(file)


def test_what_install_writes_is_there_after_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is synced when the file has its name."""
    synced: list[tuple[Path, str]] = []
    file = tmp_path / "a.service"
    monkeypatch.setattr(places, "sync_directory", lambda directory: synced.append((directory, file.read_text())))
    places.write(file, "new")
    assert synced == [(tmp_path, "new")]


def test_there_is_one_way_to_sync_a_directory() -> None:
    assert [path.name for path in GATEWAY.rglob("*.py") if "O_DIRECTORY" in path.read_text()] == ["disk.py"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("device", "a character device"),
        ("directory", "a directory"),
        ("link", "a FIFO"),
    ],
)
def test_only_regular_files_are_read(tmp_path: Path, kind: str, words: str) -> None:
    """Nothing else is even opened: it could block for ever, have no end, or act."""
    path = tmp_path / kind
    match kind:
        case "fifo" | "link":
            path = tmp_path / "fifo"
            os.mkfifo(path)
            if kind == "link":
                path = tmp_path / "link"
                path.symlink_to("fifo")
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "device":
            path = Path("/dev/zero")
        case "directory":
            path.mkdir()
    before = descriptors()
    with pytest.raises(OSError, match=f"it is {words}, not a regular file: replace it, or correct the path") as caught:
        read_file(path)
    assert caught.value.filename == str(path)
    assert descriptors() == before


def test_a_fifo_that_takes_the_place_of_a_file_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put there between the look at the file and its opening."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    regular = GATEWAY.joinpath("disk.py").stat()
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda _: regular)
        with pytest.raises(OSError, match="it is a FIFO"):
            read_file(path)
    assert descriptors() == before


def test_a_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    """A sparse file of any size is one byte too long."""
    path = tmp_path / "file"
    for size in (0, 1, 2 * MEBIBYTE):
        path.write_bytes(bytes(size))
        assert read_file(path, 2 * MEBIBYTE) == bytes(size)
    os.truncate(path, 3 << 30)
    with pytest.raises(OSError, match="it is larger than 2 MiB: replace it, or correct the path"):
        read_file(path, 2 * MEBIBYTE)


def test_a_file_that_comes_in_pieces_is_read_whole() -> None:
    """The kernel gives a file in /proc by the page or by the line."""
    assert read_file(Path("/proc/self/maps")).endswith(b"\n")
    assert len(read_file(Path("/proc/self/maps"))) > 8192


def test_a_user_may_give_a_pipe() -> None:
    """`--password-file <(pass show broker)`: it is read to its end, and no further than the limit."""
    ours, theirs = os.pipe()
    os.write(theirs, b"one ")
    os.write(theirs, b"two")
    os.close(theirs)
    assert read_file(Path(f"/dev/fd/{ours}"), from_pipe=True) == b"one two"
    os.close(ours)
    with pytest.raises(OSError, match="it is larger than 1 MiB"):
        read_file(Path("/dev/zero"), from_pipe=True)


READS_OTHERWISE = {
    "cli/places.py": "a unit file of the package",
    "config/load.py": "the template of the package",
    "ops/web/page.py": "style and script of the package",
    "store/database.py": "a database of any size in a directory of the gateway's own",
}


def reads(tree: ast.AST) -> bool:
    """Whether a module reads a file without `read_file`, as far as its words tell."""
    for call in ast.walk(tree):
        match call:
            case ast.Call(func=ast.Attribute(attr="read_bytes" | "read_text")):
                return True
            case (
                ast.Call(func=ast.Name("open"))
                | ast.Call(func=ast.Attribute(attr="open"), args=[ast.Constant("r" | "rb" | "r+b" | "rt"), *_])
            ):
                return True
            case ast.Attribute(attr="O_RDONLY"):
                return True
    return False


def test_there_is_one_way_to_read_a_file() -> None:
    """A path that somebody configured leads anywhere."""
    found = [str(path.relative_to(GATEWAY)) for path in GATEWAY.rglob("*.py") if reads(ast.parse(path.read_text()))]
    assert sorted(found) == sorted({"disk.py", *READS_OTHERWISE})
