"""The paths of the service's files, and the changes that install or remove them.

In: a root directory, other than `/` when staging a package.  Out: `Change`s that can be printed before they are made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

from attrs import frozen

import gateway
from gateway.cli.report import complain
from gateway.disk import read_file, sync_directory

UNITS = ("mqtts-gateway.service", "mqtts-gateway.socket", "mqtts-gateway@.service", "mqtts-gateway@.socket")
# Both forms for systemctl, which ignores a pattern that matches nothing.
UNIT_PATTERNS = ("mqtts-gateway.s*", "mqtts-gateway@*.s*")
# The path of the programs in the units as shipped.
PACKAGED_PROGRAMS = "/opt/mqtts-gateway/bin/"
# Where the Debian package has the gateway (package.py); its service is dpkg's to install and remove.
DEBIAN_PACKAGE = Path("/usr/lib/mqtts-gateway")
_MARK = "# mqtts-gateway: "  # how each unit file of ours begins


class CannotInstallError(Exception):
    """The service cannot be installed or removed; `problems` has one line for each reason."""

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
    def groups(self) -> Path:
        """The file from which a package has its group made (sysusers.d(5))."""
        return self.root / "usr/lib/sysusers.d/mqtts-gateway.conf"

    @property
    def is_this_machine(self) -> bool:
        """Whether this is the running system, not a staging directory."""
        return self.root == Path("/")


@frozen
class Change:
    """One change: its description, and the function that makes it; or something that is kept."""

    words: str
    make: Callable[[], object] = lambda: None


def unit_text(name: str, programs: Path) -> str:
    """Return a unit file that runs the programs in the directory `programs`."""
    packaged = resources.files("gateway").joinpath("units", name)
    if not packaged.is_file():
        # Run from a clone: the wheel is built from the files there.
        packaged = resources.files("gateway").joinpath("..", "systemd", name)
    return packaged.read_text(encoding="utf-8").replace(PACKAGED_PROGRAMS, f"{programs}/")


def is_ours(unit: Path) -> bool:
    """Return whether `install` wrote a unit file."""
    return not unit.is_symlink() and read_file(unit).decode(errors="replace").startswith(_MARK)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file atomically with mode `mode`, whatever the umask; then it is there after a power failure, too."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(path.parent)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def is_debian_package() -> bool:
    """Return whether this gateway came with the Debian package."""
    return Path(gateway.__file__).is_relative_to(DEBIAN_PACKAGE)


def systemd_runs() -> bool:
    """Return whether systemd is this machine's init (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def systemctl(*arguments: str) -> None:
    """Run systemctl.  Raises `CannotInstallError` with its error output."""
    program = shutil.which("systemctl") or "/usr/bin/systemctl"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)  # noqa: S603  constants
    if done.returncode != 0:
        raise CannotInstallError([f"`systemctl {' '.join(arguments)}` failed: {done.stderr.strip()}"])


def carry_out(plan: Callable[[], Iterable[Change]], *, dry_run: bool) -> bool:
    """Print each change and, unless `dry_run`, make it; return whether all succeeded, after printing why not."""
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
            raise  # of standard output
        complain(f"{error.filename}: {error.strerror}")
        return False
    if dry_run:
        print("nothing changed (--dry-run)")
    return True
