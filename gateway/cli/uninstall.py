"""`mqtts-gateway uninstall`: remove the service and keep the configuration.

In: the root directory.  Out: no unit of the gateway left; what was done, and which files remain.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from gateway.cli.places import (
    UNIT_PATTERNS,
    UNITS,
    CannotInstallError,
    Change,
    Places,
    carry_out,
    is_debian_package,
    is_ours,
    systemctl,
    systemd_runs,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `uninstall`."""
    parser.add_argument("--dry-run", action="store_true", help="show the changes without making them")
    parser.add_argument("--root", default="/", metavar="DIR", help="remove below DIR (default: /)")


def run(arguments: argparse.Namespace) -> int:
    """Uninstall; return 0, or 1 on failure."""
    places = Places(Path(arguments.root).absolute())
    if not carry_out(lambda: _changes(places, dry_run=arguments.dry_run), dry_run=arguments.dry_run):
        return 1
    if arguments.dry_run:
        return 0
    left = [path for path in (places.settings, *sorted(places.units.glob("mqtts-gateway*.d"))) if path.exists()]
    if left:
        print("your configuration was kept; to remove it:")
        print(f"  rm -r {' '.join(shlex.quote(str(path)) for path in left)}")
    return 0


def _changes(places: Places, *, dry_run: bool) -> Iterator[Change]:
    if is_debian_package():
        raise CannotInstallError(["the service belongs to the Debian package: apt remove mqtts-gateway"])
    if places.is_this_machine and os.geteuid() != 0 and not dry_run:
        raise CannotInstallError(["removing a service requires root: run this with sudo"])
    return _plan(places, tells_systemd=places.is_this_machine and systemd_runs())


def _plan(places: Places, *, tells_systemd: bool) -> Iterator[Change]:
    units = [unit for unit in (places.units / name for name in UNITS) if unit.exists()]
    if not units:
        yield Change(f"nothing to remove: no unit of the gateway in {places.units}")
        return
    if tells_systemd:
        patterns = " ".join(UNIT_PATTERNS)
        yield Change(f"stop running units: systemctl stop {patterns}", lambda: systemctl("stop", *UNIT_PATTERNS))
    for link in sorted(places.units.glob("*.*/mqtts-gateway[.@]*")):
        # In multi-user.target.wants and the like; other files are the user's.
        if link.is_symlink():
            yield Change(f"disable {link.name}: remove {link}", link.unlink)
    for unit in units:
        if is_ours(unit):
            yield Change(f"remove {unit}", unit.unlink)
        else:
            yield Change(f"keep {unit}, which this program did not write")
    if tells_systemd:
        yield Change("reload systemd: systemctl daemon-reload", lambda: systemctl("daemon-reload"))
