"""What a power failure must not undo: the entries of a directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway.cli import places
from gateway.disk import sync_directory


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
    root = Path(__file__).resolve().parent.parent / "gateway"
    assert [path.name for path in root.rglob("*.py") if "O_DIRECTORY" in path.read_text()] == ["disk.py"]
