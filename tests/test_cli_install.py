"""`mqtts-gateway install` and `uninstall` in a staging directory: what they do, what they leave, what they refuse.

On a machine with systemd, and as root, they are tried in tests/test_service.py; from the wheel in tests/test_wheel.py.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import gateway
from gateway.cli import install
from gateway.cli.main import console
from gateway.cli.places import UNITS
from gateway.config import load_file, template_text

UNIT = "etc/systemd/system/mqtts-gateway.service"
CONFIG = "etc/mqtts-gateway/gateway.toml"
PROGRAMS = Path(sys.prefix) / "bin"


def files(root: Path) -> dict[str, str]:
    """Return what is below a directory: each file and link with its content, each directory."""
    return {
        str(path.relative_to(root)): "" if path.is_dir() else path.read_text()
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    }


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment be where it is: tests run from a home directory or from /tmp."""
    monkeypatch.setattr(install, "_obstacles", lambda _: iter(()))


@pytest.mark.usefixtures("anywhere")
def test_it_puts_everything_below_the_root(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Units with this environment's paths, the commented configuration, modes whatever the umask is."""
    before = os.umask(0o077)
    try:
        assert console(["install", "--root", str(tmp_path), "--upstream", "broker.example.com:8884"]) == 0
    finally:
        os.umask(before)
    assert {name for name in files(tmp_path) if "/system/" in name} == {f"etc/systemd/system/{unit}" for unit in UNITS}
    for unit in UNITS:
        assert stat.S_IMODE((tmp_path / "etc/systemd/system" / unit).stat().st_mode) == 0o644
    assert f"ExecStart={PROGRAMS}/twistd " in (tmp_path / UNIT).read_text()
    assert f"ExecReload={PROGRAMS}/mqtts-gateway reload" in (tmp_path / UNIT).read_text()
    assert "/opt/" not in (tmp_path / UNIT).read_text()
    (upstream,) = load_file(tmp_path / CONFIG).upstream
    assert (upstream.host, upstream.port) == ("broker.example.com", 8884)
    modes = {"etc/mqtts-gateway": 0o755, "etc/mqtts-gateway/credentials": 0o700, CONFIG: 0o644}
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in modes} == modes
    assert f"staged below {tmp_path}" in capfd.readouterr().out


@pytest.mark.usefixtures("anywhere")
def test_a_dry_run_tells_all_of_it_and_does_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Line by line what the real run says; not even a directory is made."""
    root = tmp_path / "root"
    assert console(["install", "--root", str(root), "--dry-run"]) == 0
    told = capfd.readouterr().out.splitlines()
    assert not root.exists()
    assert told[-1] == "nothing changed (--dry-run)"
    assert console(["install", "--root", str(root)]) == 0
    assert capfd.readouterr().out.splitlines()[:-1] == told[:-1]


@pytest.mark.usefixtures("anywhere")
def test_again_it_keeps_what_is_the_users(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An edited configuration stays, an older unit is replaced, a directory of keys that stands open is closed."""
    assert console(["install", "--root", str(tmp_path)]) == 0
    first = files(tmp_path)
    assert first[CONFIG] == template_text()
    (tmp_path / CONFIG).write_text("mine")
    (tmp_path / UNIT).write_text("# mqtts-gateway: an older one")
    (tmp_path / "etc/mqtts-gateway/credentials").chmod(0o755)
    capfd.readouterr()
    assert console(["install", "--root", str(tmp_path)]) == 0
    assert files(tmp_path) == first | {CONFIG: "mine"}
    assert stat.S_IMODE((tmp_path / "etc/mqtts-gateway/credentials").stat().st_mode) == 0o700
    out = capfd.readouterr().out
    assert f"keep {tmp_path / CONFIG}, which already exists" in out
    assert f"replace {tmp_path / UNIT}" in out
    assert f"restrict {tmp_path}/etc/mqtts-gateway/credentials/ to mode 0700" in out


@pytest.mark.usefixtures("anywhere")
def test_a_unit_of_somebody_else_is_not_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing at all is done then; `uninstall` leaves it, too."""
    unit = tmp_path / UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert console(["install", "--root", str(tmp_path)]) == 1
    assert f"{unit} already exists and was not written by this program: move it away" in capfd.readouterr().err
    assert not (tmp_path / CONFIG).exists()
    assert console(["uninstall", "--root", str(tmp_path)]) == 0
    assert unit.exists()


def test_an_environment_that_the_service_cannot_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a home directory or in /tmp, be it the environment, its Python or the package; the remedy is named."""
    monkeypatch.setattr(install, "HIDDEN", (str(Path(sys.prefix).parent),))
    assert console(["install", "--root", str(tmp_path / "root")]) == 1
    err = capfd.readouterr().err
    assert f"this environment is {sys.prefix}, which the service cannot see" in err
    assert "python3 -m venv /opt/mqtts-gateway" in err
    monkeypatch.setattr(install, "HIDDEN", (str(Path(gateway.__file__).parent),))
    assert console(["install", "--root", str(tmp_path / "root")]) == 1
    assert f"the package is {Path(gateway.__file__).parent}" in capfd.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Return a directory that others may enter, which pytest's own are not."""
    with TemporaryDirectory() as name:
        directory = Path(name).resolve()
        directory.chmod(0o755)
        yield directory


def test_a_python_that_the_service_cannot_see_is_not_advised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python3 -m venv` would use the one under /root once more."""
    monkeypatch.setattr(install, "HIDDEN", (str(Path(sys.executable).resolve().parent),))
    assert console(["install", "--root", str(tmp_path)]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "its Python is" in line]
    assert "/usr/bin/python3 -m venv" in line


@pytest.mark.parametrize(
    ("where", "mode", "words"),
    [
        (".", 0o750, "others have no access to {0}: chmod o+x {0}"),
        (".", 0o757, "{0} is world-writable: chmod o-w {0}"),
        ("a b", 0o750, "{0} is not readable by others: chmod -R o+rX '{1}'"),
        ("a b", 0o757, "{0} is world-writable: chmod o-w '{0}'"),
        ("a b/c", 0o754, "{0} is not readable by others: chmod -R o+rX '{1}'"),
        ("a b/c/d.py", 0o640, "{0} is not readable by others: chmod -R o+rX '{1}'"),
        ("a b/c/d.py", 0o646, "{0} is world-writable: chmod o-w '{0}'"),
    ],
)
def test_what_others_cannot_read_or_can_change_is_found(
    open_directory: Path, where: str, mode: int, words: str
) -> None:
    """Above the environment, in it and deep in it; the command that mends it is named."""
    top = open_directory / "a b"
    (top / "c").mkdir(parents=True)
    (top / "c" / "d.py").touch()
    (top / "c" / "link").symlink_to("/nonexistent")
    for path in (top, top / "c", top / "c" / "d.py"):
        path.chmod(0o755)
    assert list(install._closed(top, "it")) == []
    (open_directory / where).chmod(mode)
    assert list(install._closed(top, "it")) == [f"it: {words.format(open_directory / where, top)}"]


@pytest.mark.usefixtures("anywhere")
def test_only_root_installs_on_the_machine_itself(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both commands say so; what would be done is told to everybody."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("install", "uninstall"):
        assert console([command]) == 1
        assert "run this with sudo" in capfd.readouterr().err
        assert console([command, "--dry-run"]) == 0
        assert "nothing changed" in capfd.readouterr().out


@pytest.mark.usefixtures("anywhere")
def test_a_broker_that_makes_no_sense_stops_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before anything is written."""
    assert console(["install", "--root", str(tmp_path / "root"), "--upstream", "b:70000"]) == 1
    assert "--upstream: port: 70000 is not a port" in capfd.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.mark.usefixtures("anywhere")
def test_a_file_that_cannot_be_written_ends_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file and the cause, status 1, nothing unfinished left."""
    (tmp_path / UNIT).mkdir(parents=True)
    assert console(["install", "--root", str(tmp_path)]) == 1
    assert "it is a directory" in capfd.readouterr().err
    assert not list(tmp_path.rglob(".*.new"))


@pytest.mark.usefixtures("anywhere")
def test_uninstall_takes_away_what_install_has_put(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Units and the links that enable them go; the configuration and the user's drop-ins stay, and are named."""
    assert console(["install", "--root", str(tmp_path)]) == 0
    units = tmp_path / "etc/systemd/system"
    for name, unit in (("mqtts-gateway.service", UNITS[0]), ("mqtts-gateway@3.service", UNITS[2])):
        (units / "multi-user.target.wants").mkdir(exist_ok=True)
        (units / "multi-user.target.wants" / name).symlink_to(f"/etc/systemd/system/{unit}")
    (units / "multi-user.target.wants" / "other.service").symlink_to("/etc/systemd/system/other.service")
    (units / "mqtts-gateway.service.d").mkdir()
    (units / "mqtts-gateway.service.d" / "override.conf").write_text("[Service]\n")
    before = files(tmp_path)
    assert console(["uninstall", "--root", str(tmp_path), "--dry-run"]) == 0
    assert files(tmp_path) == before
    capfd.readouterr()
    assert console(["uninstall", "--root", str(tmp_path)]) == 0
    assert {name for name in before if name not in files(tmp_path)} == {f"etc/systemd/system/{unit}" for unit in UNITS}
    assert [link.name for link in (units / "multi-user.target.wants").iterdir()] == ["other.service"]
    out = capfd.readouterr().out
    assert f"rm -r {tmp_path}/etc/mqtts-gateway {units}/mqtts-gateway.service.d" in out


@pytest.mark.parametrize(("command", "words"), [("install", "systemctl enable --now"), ("uninstall", "apt remove")])
def test_the_debian_package_leaves_its_service_to_dpkg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    """Units in /etc would hide those of the package; nothing is written or removed."""
    monkeypatch.setattr("gateway.cli.places.DEBIAN_PACKAGE", Path(gateway.__file__).parent.parent)
    assert console([command, "--root", str(tmp_path / "root")]) == 1
    assert words in capfd.readouterr().err
    assert not (tmp_path / "root").exists()
