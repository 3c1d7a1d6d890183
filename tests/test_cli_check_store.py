"""`mqtts-gateway check`: the directory where messages are stored."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import store_check
from gateway.cli.main import console
from gateway.cli.report import Status, Step
from gateway.cli.service_view import UNIT, ServiceView
from gateway.cli.store_check import store_step
from gateway.config import Config, DeviceRule, StoreConfig, Upstream
from gateway.store.database import SCHEMA_VERSION

BROKER = Upstream("b.example")
RULE = DeviceRule("d", match_client_id=("d",), bound_to=("127.0.0.1",), store=True)


def look(directory: Path | None, view: ServiceView | None = None, *, with_lock: bool = True, **more: Any) -> Step:
    """Check a store in this directory."""
    config = Config(upstream=(BROKER,), device=(RULE,), store=StoreConfig(directory, **more))
    step = store_step(config, view, with_lock=with_lock, environment={})
    assert step is not None
    return step


def test_a_store_that_nobody_wants_is_not_looked_at(tmp_path: Path) -> None:
    """There is nothing to say about it."""
    assert store_step(Config(upstream=(BROKER,), store=StoreConfig(tmp_path)), None, with_lock=True) is None


def test_a_store_that_is_to_be_made_passes_and_is_not_made(tmp_path: Path) -> None:
    """With what an fsync takes, and how much room there is."""
    step = look(tmp_path / "a" / "store", max_size=1 << 20)
    assert step.status is Status.PASS
    assert step.facts["free_bytes"] > 0
    assert step.facts["fsync_seconds"] >= 0
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_fails() -> None:
    """Not even root can write there."""
    assert look(Path("/proc/store")).status is Status.FAIL


def test_a_store_without_a_directory_fails() -> None:
    """Unless the service has one of its own."""
    assert look(None).status is Status.FAIL


def test_a_disk_that_is_too_small_is_a_warning(tmp_path: Path) -> None:
    """The store would fill it."""
    step = look(tmp_path, max_size=1 << 44)
    assert step.status is Status.WARN
    assert "max_size" in step.message


def test_a_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices wait for it."""
    monkeypatch.setattr(store_check, "_fsync_seconds", lambda _: 0.2)
    assert look(tmp_path, max_size=1 << 20).status is Status.WARN


def test_the_lock_of_another_gateway_is_a_warning(tmp_path: Path) -> None:
    """Before a reload it is the running gateway's own."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert look(tmp_path, max_size=1 << 20).status is Status.WARN
        assert look(tmp_path, max_size=1 << 20, with_lock=False).status is Status.PASS
    assert look(tmp_path, max_size=1 << 20).status is Status.PASS


def test_a_store_of_a_newer_version_fails(tmp_path: Path) -> None:
    """The gateway would not start."""
    connection = sqlite3.connect(tmp_path / "store.db")
    connection.execute("CREATE TABLE t (a)")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    assert look(tmp_path, max_size=1 << 20).status is Status.PASS
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    assert look(tmp_path, max_size=1 << 20).status is Status.FAIL


def test_the_service_writes_only_below_its_state_directory(tmp_path: Path) -> None:
    """Root, who checks, could write anywhere."""
    step = look(tmp_path, ServiceView(UNIT))
    assert step.status is Status.WARN
    assert "ReadWritePaths" in step.remedy


def test_the_report_has_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also before a reload."""
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[[upstream]]\nhost = "b.example"\n[store]\ndirectory = "{tmp_path}"\nmax_size = 1048576\n'
        '[[device]]\nmatch_client_id = "d"\nbound_to = "127.0.0.1"\nstore = true\n'
    )
    console(["check", "--files", "--json", "--config", str(path)])
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["status"] for step in steps if step["step"] == "store"] == ["PASS"]
