"""Where the service's files are, and how they are put there and taken away.

In: a root directory, which is not `/` when a package is staged; what is to be done.  Out: `Change`s that can be told
before they are made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

from attrs import frozen

from gateway.cli.report import complain

UNITS = ("mqtts-gateway.service", "mqtts-gateway.socket", "mqtts-gateway@.service", "mqtts-gateway@.socket")
# Both forms, for systemctl, which takes a pattern that matches nothing for nothing to do.
UNIT_PATTERNS = ("mqtts-gateway.s*", "mqtts-gateway@*.s*")
# Where the units as they come have their programs.
PACKAGED_PROGRAMS = "/opt/mqtts-gateway/bin/"
_MARK = "# mqtts-gateway: "  # how each unit file of ours begins


class CannotInstallError(Exception):
    """Something stands in the way; `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@frozen
class Places:
    """The files and directories of the service below `root`."""

    root: Path

    @property
    def units(self) -> Path:
        """The directory of the administrator's unit files (systemd.unit(5))."""
        return self.root / "etc/systemd/system"

    @property
    def settings(self) -> Path:
        """The directory of the configuration."""
        return self.root / "etc/mqtts-gateway"

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.settings / "gateway.toml"

    @property
    def credentials(self) -> Path:
        """The directory of private keys."""
        return self.settings / "credentials"

    @property
    def is_this_machine(self) -> bool:
        """Whether this is no staging."""
        return self.root == Path("/")


@frozen
class Change:
    """One thing to do, in words and in deed; or one to leave as it is, in words."""

    words: str
    make: Callable[[], object] = lambda: None


def unit_text(name: str, programs: Path) -> str:
    """Return a unit file whose commands are those in the directory `programs`."""
    packaged = resources.files("gateway").joinpath("units", name)
    if not packaged.is_file():
        # Run from a clone: the wheel is built from the files there.
        packaged = resources.files("gateway").joinpath("..", "systemd", name)
    return packaged.read_text(encoding="utf-8").replace(PACKAGED_PROGRAMS, f"{programs}/")


def is_ours(unit: Path) -> bool:
    """Say whether a unit file is one that `install` has put there."""
    return not unit.is_symlink() and unit.read_text(errors="replace").startswith(_MARK)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all; its mode is `mode`, whatever the umask."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def systemd_runs() -> bool:
    """Say whether systemd is this machine's init (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def systemctl(*arguments: str) -> None:
    """Run systemctl.  Raises `CannotInstallError` with what it said."""
    program = shutil.which("systemctl") or "/usr/bin/systemctl"
    # The arguments are constants of these modules.
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise CannotInstallError([f"`systemctl {' '.join(arguments)}` failed: {done.stderr.strip()}"])


def carry_out(plan: Callable[[], Iterable[Change]], *, dry_run: bool) -> bool:
    """Tell each change and, unless it is a `dry_run`, make it; return whether all went well, else say why not."""
    try:
        for change in plan():
            print(change.words, flush=True)
            if not dry_run:
                change.make()
    except CannotInstallError as error:
        for problem in error.problems:
            complain(problem)
        return False
    except OSError as error:
        if error.filename is None:
            raise  # standard output's
        complain(f"{error.filename}: {error.strerror}")
        return False
    if dry_run:
        print("nothing was changed (--dry-run)")
    return True
