"""`mqtts-gateway install`: the service of the environment that this is run from.

In: the place.  Out: unit files with this environment's paths, a commented configuration, directories with the right
modes; what was done, and what to do next.  What is there already and is the user's stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import stat
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
    is_ours,
    systemctl,
    systemd_runs,
    unit_text,
    write,
)
from gateway.config import Upstream, from_flags, template_text
from gateway.errors import ConfigError

# What the unit's ProtectHome=, PrivateTmp= and PrivateDevices= hide from the service.
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp", "/dev")  # noqa: S108  named, not used
_REMEDY = "make the environment in /opt: python3 -m venv /opt/mqtts-gateway, and pip install there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `install`."""
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument(
        "--root", default="/", metavar="DIR", help="put everything below DIR, for a package (default: /)"
    )
    parser.add_argument("--upstream", metavar="HOST[:PORT]", help="the broker to fill in, if the configuration is new")


def run(arguments: argparse.Namespace) -> int:
    """Install; return 0, or 1 if that cannot be done."""
    places = Places(Path(arguments.root).absolute())
    had_config = places.config.exists()
    if not carry_out(lambda: _changes(places, arguments), dry_run=arguments.dry_run):
        return 1
    if arguments.dry_run:
        return 0
    print(_next_steps(places, host_is_set=had_config or arguments.upstream is not None))
    return 0


def _changes(places: Places, arguments: argparse.Namespace) -> Iterator[Change]:
    """Return what is to be done.  Raises `CannotInstallError` with everything that stands in the way."""
    programs = Path(sys.prefix) / "bin"
    problems = list(_obstacles(programs))
    if places.is_this_machine and os.geteuid() != 0 and not arguments.dry_run:
        problems.append("only root may install a service: run this with sudo")
    problems += [
        f"{unit} is there already and is not of this program: move it away"
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
    yield _directory(places.settings, 0o755)
    yield _directory(places.credentials, 0o700)
    if places.config.exists():
        yield Change(f"keep {places.config}, which is there already")
    else:
        text = template_text() if upstream is None else filled_in(template_text(), upstream)
        yield Change(f"write {places.config}", lambda: write(places.config, text))
    for name in UNITS:
        yield _unit(places.units / name, unit_text(name, programs))
    if not places.is_this_machine:
        return
    yield Change("list twistd's plugins, which the service has no right to do", _list_plugins)
    if systemd_runs():
        yield Change("tell systemd: systemctl daemon-reload", lambda: systemctl("daemon-reload"))
    else:
        yield Change("leave it to systemd, which does not run now, to find the units when it does")


def _directory(path: Path, mode: int) -> Change:
    def make() -> None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)

    if path.is_dir():
        if stat.S_IMODE(path.stat().st_mode) & ~mode:
            return Change(f"close {path}/: mode {mode:04o}", make)
        return Change(f"keep {path}/")
    return Change(f"make {path}/, mode {mode:04o}", make)


def _unit(path: Path, text: str) -> Change:
    if not path.exists():
        return Change(f"write {path}", lambda: write(path, text))
    if path.read_text(errors="replace") == text:
        return Change(f"keep {path}, which is as it should be")
    return Change(f"replace {path}", lambda: write(path, text))


def _list_plugins() -> None:
    """Write Twisted's lists of plugins (dropin.cache), for all to read."""
    # Not at the top: `install` has no other use for Twisted.
    from twisted.plugin import IPlugin, getPlugins

    from twisted import plugins

    list(getPlugins(IPlugin, plugins))
    for directory in plugins.__path__:
        cache = Path(directory, "dropin.cache")
        if cache.exists():
            cache.chmod(0o644)


def _obstacles(programs: Path) -> Iterator[str]:
    """Yield why the service, which is nobody on this machine, could not run this environment."""
    interpreter = Path(sys.executable).resolve()
    package = Path(gateway.__file__).resolve().parent
    places = {programs.parent: "this environment", interpreter: "its Python", package: "the package"}
    for path, what in places.items():
        hidden = next((top for top in _HIDDEN if path.is_relative_to(top)), None)
        if hidden is not None:
            yield f"{what} is {path}, and the service does not see {hidden}: {_REMEDY}"
    if not (programs / "twistd").is_file():
        yield f"{programs}/twistd is missing: pip install mqtts-gateway in this environment"
    for path, what in places.items():
        yield from _closed(path, what)


def _closed(path: Path, what: str) -> Iterator[str]:
    """Yield what keeps others from reading a file or a whole directory, or lets them change it; one line is enough."""
    for each in path.parents:
        if not each.stat().st_mode & stat.S_IXOTH:
            yield f"{what}: others may not enter {each}: chmod o+x {shlex.quote(str(each))}"
            return
    within = (Path(directory, name) for directory, names, files in os.walk(path) for name in (*names, *files))
    for each in chain(path.parents, [path], within):
        mode = each.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            yield f"{what}: others may write to {each}, and so decide what runs: chmod o-w {shlex.quote(str(each))}"
            return
        needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        if each not in path.parents and mode & needed != needed:
            yield f"{what}: others may not read {each}: chmod -R o+rX {shlex.quote(str(path))}"
            return


def _next_steps(places: Places, *, host_is_set: bool) -> str:
    if not places.is_this_machine:
        return f"staged below {places.root}"
    config = shlex.quote(str(places.config))
    program = shlex.quote(str(Path(sys.prefix) / "bin" / "mqtts-gateway"))
    return "\n".join(
        [
            "next:",
            *([] if host_is_set else [f"  edit {config}: at least host under [[upstream]]"]),
            f"  {program} check --config {config}",
            "  systemctl enable --now mqtts-gateway",
            "or, if it runs already:",
            "  systemctl restart mqtts-gateway",
        ]
    )
