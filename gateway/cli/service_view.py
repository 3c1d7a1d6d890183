"""What the installed service can read, as seen by root.

In: the unit's files, a configuration.  Out: `ServiceView`, which says why the service could not read a file.

Root can read every file; the service runs as a user that exists only while it runs.  So a check by root that opens the
files itself would pass what the service cannot use.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from gateway.cli.places import systemd_runs
from gateway.disk import read_file

UNIT = "mqtts-gateway.service"
KEY_GROUP = "mqtts-gateway-keys"  # `install` makes it, and the service is in it
_ROOT = Path("/")
# Where systemd reads units and their drop-ins, the most important last (systemd.unit(5)).
_UNIT_DIRECTORIES = ("usr/lib/systemd/system", "run/systemd/system", "etc/systemd/system")
# What ProtectHome=, PrivateTmp= and PrivateDevices= hide.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp", "/dev")  # noqa: S108  named, not used
# The directories that systemd makes for the service, and gives to its user.
OWN = ("/var/lib/mqtts-gateway", "/var/lib/private/mqtts-gateway")
_RUNTIME = "/run/mqtts-gateway"
_OVERFLOW_GROUP = 65534  # how a group looks that has no number in this user namespace (user_namespaces(7))
_LISTS = frozenset({"SupplementaryGroups", "LoadCredential", "ExecStart"})


@frozen
class ServiceView:
    """The rights of the service: its user and groups (`None` and none for a dynamic user), and its credentials.

    `credentials` are the directories that systemd reads for it.
    """

    unit: str
    user: int | None = None
    groups: frozenset[int] = frozenset()
    credentials: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Path) -> ServiceView | None:
        """Return the view of the unit that runs this configuration; `None` if there is none, or if it runs as root."""
        settings = _settings(_ROOT, UNIT)
        if settings is None or not any(str(config) in command.split() for command in settings.get("ExecStart", ())):
            return None
        credentials = tuple(
            Path(value.partition(":")[2]) for value in settings.get("LoadCredential", ()) if ":/" in value
        )
        user: int | None = None
        groups = {_group(name) for value in settings.get("SupplementaryGroups", ()) for name in value.split()}
        if _last(settings, "DynamicUser") not in {"yes", "true", "on", "1"}:
            name = _last(settings, "User")
            if name in {"", "root", "0"}:
                return None
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                return None  # systemd will say so
            user = entry.pw_uid
            groups |= {entry.pw_gid, *os.getgrouplist(name, entry.pw_gid)}
        groups.add(_group(_last(settings, "Group")))
        if not _sees_all_groups():
            # In a user namespace, such as the unit's own, all other groups look like this one.
            groups.add(_OVERFLOW_GROUP)
        return cls(UNIT, user, frozenset(group for group in groups if group is not None), credentials)

    @property
    def is_active(self) -> bool:
        """Whether the unit runs, as far as systemd can be asked: only then can it be reloaded."""
        if not systemd_runs():
            return True
        program = shutil.which("systemctl") or "/usr/bin/systemctl"
        try:
            return subprocess.run([program, "is-active", "--quiet", self.unit], check=False).returncode == 0  # noqa: S603  constants
        except OSError:
            return True

    @property
    def key_group(self) -> int | None:
        """The group to give a private key to, so that the service can read it; `None` if the service has none."""
        named = _group(KEY_GROUP)
        return named if named in self.groups else min(self.groups - {_OVERFLOW_GROUP}, default=None)

    def credential_file(self, name: str) -> Path | None:
        """Return the file that systemd reads for a credential of one of its directories; `None` if it is none."""
        for directory in self.credentials:
            prefix = f"{directory.name}_"
            if name.startswith(prefix):
                return directory / name.removeprefix(prefix)
        return None

    def obstacle(self, path: Path) -> str:
        """Return what keeps the service from reading a file or a directory; "" if it can."""
        if any(path.is_relative_to(directory) for directory in self.credentials):
            return "it is a symbolic link, and systemd passes only files" if path.is_symlink() else ""
        try:
            path = path.resolve(strict=True)
        except OSError:
            return ""  # missing for everyone, which is reported as such
        if any(path.is_relative_to(directory) for directory in (*OWN, _RUNTIME)):
            return ""
        hidden = next((top for top in HIDDEN if path.is_relative_to(top)), None)
        if hidden is not None:
            return f"its unit hides {hidden}"
        for directory in reversed(path.parents):
            if not self._may(directory, stat.S_IXUSR):
                return f"{_mode(directory)}, so it cannot enter {directory}"
        if not self._may(path, stat.S_IRUSR) or (path.is_dir() and not self._may(path, stat.S_IXUSR)):
            return _mode(path)
        return ""

    def unwritable(self, path: Path) -> str:
        """Return what keeps the service from replacing a file; "" if it can."""
        with contextlib.suppress(OSError):
            path = path.resolve(strict=True)
        if any(path.is_relative_to(directory) for directory in OWN):
            return ""
        return f"its unit makes {path.parent} read-only"

    def _may(self, path: Path, right: int) -> bool:
        """Judge as the kernel does: the first of owner, group and others that fits decides."""
        status = path.stat()
        if self.user is not None and status.st_uid == self.user:
            return bool(status.st_mode & right)
        if status.st_gid in self.groups:
            return bool(status.st_mode & right >> 3)
        return bool(status.st_mode & right >> 6)


def _sees_all_groups() -> bool:
    try:
        return read_file(Path("/proc/self/gid_map")).split() == [b"0", b"0", b"4294967295"]
    except OSError:
        return False


def _mode(path: Path) -> str:
    status = path.stat()
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    return f"mode {stat.S_IMODE(status.st_mode):04o}, {user}:{group}"


def _settings(root: Path, unit: str) -> dict[str, list[str]] | None:
    """Return the settings of a unit and its drop-ins; `None` if there is no such unit."""
    files = list(_unit_files(root, unit))
    if not files:
        return None
    settings: dict[str, list[str]] = {}
    for file in files:
        try:
            lines = read_file(file).decode(errors="replace").replace("\\\n", " ").splitlines()
        except OSError:
            continue
        for line in lines:
            key, equals, value = line.strip().partition("=")
            if not equals or key.startswith(("#", ";", "[")):
                continue
            if not value or key not in _LISTS:
                settings[key] = []  # an empty value empties a list (systemd.syntax(7))
            if value:
                settings.setdefault(key, []).append(value)
    return settings


def _unit_files(root: Path, unit: str) -> Iterator[Path]:
    found = [root / directory / unit for directory in _UNIT_DIRECTORIES if (root / directory / unit).is_file()]
    if not found:
        return
    yield found[-1]
    drop_ins = {
        drop_in.name: drop_in
        for directory in _UNIT_DIRECTORIES
        for drop_in in sorted((root / directory / f"{unit}.d").glob("*.conf"))
    }
    for name in sorted(drop_ins):
        yield drop_ins[name]


def _last(settings: dict[str, list[str]], key: str) -> str:
    values = settings.get(key, [])
    return values[-1] if values else ""


def _group(name: str) -> int | None:
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        return None
