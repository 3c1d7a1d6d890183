"""`mqtts-gateway install`: install the systemd service that runs the gateway of this environment.

In: the root directory.  Out: unit files with this environment's paths, a commented configuration, directories with the
right modes; what was done, and the next steps.  Existing files of the user are kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import gateway
from gateway.cli.init import filled_in
from gateway.cli.places import (
    UNITS,
    CannotInstallError,
    Change,
    Places,
    carry_out,
    is_debian_package,
    is_ours,
    systemctl,
    systemd_runs,
    unit_text,
    write,
)
from gateway.cli.service_view import HIDDEN, KEY_GROUP
from gateway.config import Upstream, from_flags, template_text
from gateway.disk import read_file
from gateway.errors import ConfigError

_REMEDY = "create the environment in /opt: python3 -m venv /opt/mqtts-gateway, and pip install there"
_REMEDY_PYTHON = (
    "create the environment with a Python outside it, such as the system's: "
    "/usr/bin/python3 -m venv --clear /opt/mqtts-gateway, and pip install there"
)

_START = "run mqtts-gateway setup, then: systemctl enable --now mqtts-gateway"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `install`."""
    parser.add_argument("--dry-run", action="store_true", help="show the changes without making them")
    parser.add_argument("--root", default="/", metavar="DIR", help="install below DIR, to build a package (default: /)")
    parser.add_argument("--upstream", metavar="HOST[:PORT]", help="the broker to write into a new configuration")


def run(arguments: argparse.Namespace) -> int:
    """Install; return 0, or 1 on failure."""
    places = Places(Path(arguments.root).absolute())
    had_config = places.config.exists()
    if not carry_out(lambda: _changes(places, arguments), dry_run=arguments.dry_run):
        return 1
    if arguments.dry_run:
        return 0
    print(_next_steps(places, host_is_set=had_config or arguments.upstream is not None))
    return 0


def _changes(places: Places, arguments: argparse.Namespace) -> Iterator[Change]:
    """Return the changes.  Raises `CannotInstallError` with every reason against them."""
    if is_debian_package():
        raise CannotInstallError([f"the Debian package has installed the service: {_START}"])
    programs = Path(sys.prefix) / "bin"
    problems = list(_obstacles(programs))
    if places.is_this_machine and os.geteuid() != 0 and not arguments.dry_run:
        problems.append("installing a service requires root: run this with sudo")
    problems += [
        f"{unit} already exists and was not written by this program: move it away"
        for unit in (places.units / name for name in UNITS)
        if unit.exists() and not is_ours(unit)
    ]
    upstream = None
    if arguments.upstream is not None:
        try:
            (upstream,) = from_flags(upstream=[arguments.upstream]).upstream
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise CannotInstallError(problems)
    return _plan(places, programs, upstream)


def _plan(places: Places, programs: Path, upstream: Upstream | None) -> Iterator[Change]:
    if not places.is_this_machine:
        yield _directory(places.units, 0o755)
        yield _directory(places.groups.parent, 0o755)
        yield Change(f"write {places.groups}", lambda: write(places.groups, f"g {KEY_GROUP} -\n"))
    else:
        yield Change(f"create the group {KEY_GROUP}, which may read keys of devices, if it does not exist", _make_group)
    yield _directory(places.settings, 0o755)
    yield _directory(places.credentials, 0o700)
    if places.config.exists():
        yield Change(f"keep {places.config}, which already exists")
    else:
        text = template_text() if upstream is None else filled_in(template_text(), upstream)
        yield Change(f"write {places.config}", lambda: write(places.config, text))
    for name in UNITS:
        yield _unit(places.units / name, unit_text(name, programs))
    if not places.is_this_machine:
        return
    yield Change("update twistd's plugin cache, which the service has no permission to write", _list_plugins)
    if systemd_runs():
        yield Change("reload systemd: systemctl daemon-reload", lambda: systemctl("daemon-reload"))
    else:
        yield Change("skip systemctl daemon-reload: systemd is not running")


def _directory(path: Path, mode: int) -> Change:
    def make() -> None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)

    if path.is_dir():
        if stat.S_IMODE(path.stat().st_mode) & ~mode:
            return Change(f"restrict {path}/ to mode {mode:04o}", make)
        return Change(f"keep {path}/")
    return Change(f"create {path}/, mode {mode:04o}", make)


def _make_group() -> None:
    program = shutil.which("groupadd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "groupadd"
    # --force: it is no error that the group exists.
    done = subprocess.run([program, "--system", "--force", KEY_GROUP], capture_output=True, text=True, check=False)  # noqa: S603  constants
    if done.returncode != 0:
        raise CannotInstallError([f"the group {KEY_GROUP} cannot be created: {done.stderr.strip()}"])


def _unit(path: Path, text: str) -> Change:
    if not path.exists():
        return Change(f"write {path}", lambda: write(path, text))
    if read_file(path).decode(errors="replace") == text:
        return Change(f"keep {path}, which is up to date")
    return Change(f"replace {path}", lambda: write(path, text))


def _list_plugins() -> None:
    """Write Twisted's plugin cache (dropin.cache), readable by all."""
    # Imported late: `install` does not need Twisted otherwise.
    from twisted.plugin import IPlugin, getPlugins

    from twisted import plugins

    list(getPlugins(IPlugin, plugins))
    for directory in plugins.__path__:
        cache = Path(directory, "dropin.cache")
        if cache.exists():
            cache.chmod(0o644)


def _obstacles(programs: Path) -> Iterator[str]:
    """Yield why the service's unprivileged user could not run this environment."""
    interpreter = Path(sys.executable).resolve()
    package = Path(gateway.__file__).resolve().parent
    places = {programs.parent: "this environment", interpreter: "its Python", package: "the package"}
    for path, what in places.items():
        hidden = next((top for top in HIDDEN if path.is_relative_to(top)), None)
        if hidden is not None:
            # The usual environment would use this Python again.
            remedy = _REMEDY_PYTHON if path == interpreter else _REMEDY
            yield f"{what} is {path}, which the service cannot see (it has no access to {hidden}): {remedy}"
    if not (programs / "twistd").is_file():
        yield f"{programs}/twistd is missing: pip install mqtts-gateway in this environment"
    for path, what in places.items():
        yield from _closed(path, what)


def _closed(path: Path, what: str) -> Iterator[str]:
    """Yield why others cannot read a file or directory, or that they can change it; at most one line."""
    for each in path.parents:
        if not each.stat().st_mode & stat.S_IXOTH:
            yield f"{what}: others have no access to {each}: chmod o+x {shlex.quote(str(each))}"
            return
    within = (Path(directory, name) for directory, names, files in os.walk(path) for name in (*names, *files))
    for each in chain(path.parents, [path], within):
        mode = each.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            yield f"{what}: {each} is world-writable: chmod o-w {shlex.quote(str(each))}"
            return
        needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        if each not in path.parents and mode & needed != needed:
            yield f"{what}: {each} is not readable by others: chmod -R o+rX {shlex.quote(str(path))}"
            return


def _next_steps(places: Places, *, host_is_set: bool) -> str:
    if not places.is_this_machine:
        return f"staged below {places.root}"
    config = shlex.quote(str(places.config))
    program = shlex.quote(str(Path(sys.prefix) / "bin" / "mqtts-gateway"))
    return "\n".join(
        [
            "next:",
            *([] if host_is_set else [f"  edit {config}: set at least host under [[upstream]]"]),
            f"  {program} check --config {config}",
            "  systemctl enable --now mqtts-gateway",
            "or, if it is already running:",
            "  systemctl restart mqtts-gateway",
        ]
    )
