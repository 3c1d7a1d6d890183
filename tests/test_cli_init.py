"""`mqtts-gateway init`: a configuration that works, and nothing written over."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from gateway.cli.main import console
from gateway.config import load_file, template_text


def test_it_writes_the_template_and_says_what_to_do_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file is the commented template, for everybody to read whatever the umask; the next commands name it."""
    path = tmp_path / "a file.toml"
    before = os.umask(0o077)
    try:
        assert console(["init", str(path)]) == 0
    finally:
        os.umask(before)
    assert path.read_text() == template_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    out = capfd.readouterr().out
    assert f"edit '{path}': set at least host" in out
    assert f"mqtts-gateway check --config '{path}'" in out
    assert f"twistd --nodaemon --pidfile= mqtts-gateway --config '{path}'" in out


def test_without_a_name_it_writes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is mqtts-gateway.toml in the current directory."""
    monkeypatch.chdir(tmp_path)
    assert console(["init"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mqtts-gateway.toml"]


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [("b.example", "b.example", 8883), ("b.example:1234", "b.example", 1234), ("[fe80::1%eth0]", "fe80::1%eth0", 8883)],
)
def test_it_fills_in_the_broker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], given: str, host: str, port: int
) -> None:
    """The file is ready to use then."""
    path = tmp_path / "c.toml"
    assert console(["init", str(path), "--upstream", given]) == 0
    (upstream,) = load_file(path).upstream
    assert (upstream.host, upstream.port) == (host, port)
    assert "edit" not in capfd.readouterr().out
    changed = set(path.read_text().splitlines()) - set(template_text().splitlines())
    assert changed <= {f'host = "{host}"', f"port = {port}"}


def test_it_writes_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but the configuration."""
    assert console(["init", "-"]) == 0
    assert capfd.readouterr() == (template_text(), "")


def test_it_writes_over_nothing_unless_forced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is there stays; --force replaces its content and leaves mode and links alone."""
    path, link = tmp_path / "c.toml", tmp_path / "link.toml"
    path.write_text("mine")
    path.chmod(0o640)
    link.symlink_to(path)
    assert console(["init", str(link)]) == 1
    assert path.read_text() == "mine"
    assert capfd.readouterr().err == f"mqtts-gateway: {link} already exists; use --force to overwrite it\n"
    assert console(["init", str(link), "--force"]) == 0
    assert path.read_text() == template_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/dev/full", "--force"], "/dev/full cannot be written: No space left on device"),
        (["a\0b"], "cannot be written: "),
        (["-", "--upstream", "b:70000"], "--upstream: port: 70000 is not a port"),
    ],
)
def test_what_cannot_be_done_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """On stderr, with status 1, and nothing is written."""
    assert console(["init", *arguments]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "forced"])
def test_a_missing_directory_is_made_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """The line ends with the command that makes it, and after that command `init` goes well."""
    path = tmp_path / "not yet" / "there" / "c.toml"
    assert console(["init", str(path), *options]) == 1
    before, _, command = capfd.readouterr().err.partition("; create the directory first: ")
    assert before == f"mqtts-gateway: {path} cannot be written: No such file or directory"
    subprocess.run(shlex.split(command), check=True)
    assert console(["init", str(path), *options]) == 0


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "forced"])
def test_a_directory_is_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]) -> None:
    """Above all, --force is not recommended: it would not help."""
    assert console(["init", str(tmp_path), *options]) == 1
    assert capfd.readouterr() == ("", f"mqtts-gateway: {tmp_path} is a directory: name a file in it\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_could_not_be_written_whole_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the next attempt would find it there already."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    assert console(["init", str(tmp_path / "c.toml")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in capfd.readouterr().err
