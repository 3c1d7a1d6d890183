"""A box of its own for a test: systemd as PID 1, in namespaces, on a copy of this machine's files that is thrown away.

systemd itself puts the units' restrictions on the gateway, so a test sees what a plant sees.  The copy is an overlay in
memory: what is installed or changed in the box never reaches this machine.  The network is the box's own, with loopback
only; sockets of this process get into it by `Box.network`.  It takes root, and a kernel with cgroup v2, overlayfs and
namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.harness import PATIENCE, eventually
from tests.tools import require_tool

ROOT = Path(__file__).resolve().parent.parent
# Where the documents install the gateway.
ENVIRONMENT = Path("/opt/mqtts-gateway")
_SYSTEMD = Path("/lib/systemd/systemd")
_CLONE_NEWNET = 0x40000000  # setns(2)
_NAMESPACES = ("mount", "pid", "uts", "ipc", "net", "cgroup")

# Runs as PID 1 of the box, in namespaces of its own; its last act is to become systemd.
_BOOT = """\
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$BOX"
cd "$BOX"
mkdir upper work merged
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work merged
cd merged
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx

# The environment as `pip install` of the wheel makes it, from this tree; its packages are those of the tests.
site=.$ENVIRONMENT/lib/$PYTHON/site-packages
rm -rf ".$ENVIRONMENT"
mkdir -p "$site" "$BOX/site" "$BOX/site-work" ".$ENVIRONMENT/bin"
mount -t overlay overlay -o "lowerdir=$SITE,upperdir=$BOX/site,workdir=$BOX/site-work" "$site"
rm -rf "$site"/*mqtts_gateway*.pth "$site/gateway" "$site"/twisted/plugins/mqtts_gateway* "$site/a1_coverage.pth"
cp -r "$TREE/gateway" "$site/"
cp -r "$TREE/systemd" "$site/gateway/units"
cp "$TREE"/twisted/plugins/*.py "$site/twisted/plugins/"
python=$BASE_PREFIX
case "$BASE_PREFIX/" in
/usr/*) ;;
*)
    # ProtectHome and PrivateTmp hide the places where interpreters of one's own are kept.
    python=/opt/python
    mkdir -p .$python
    mount --bind "$BASE_PREFIX" .$python
    echo $python/lib >etc/ld.so.conf.d/python.conf
    ldconfig -r .
    ;;
esac
ln -s "$python/bin/$PYTHON" ".$ENVIRONMENT/bin/python"
ln -s python ".$ENVIRONMENT/bin/python3"
printf 'home = %s/bin\\ninclude-system-site-packages = false\\nversion = %s\\n' "$python" "$VERSION" \\
    >".$ENVIRONMENT/pyvenv.cfg"
for program in twistd mqtts-gateway; do
    { echo "#!$ENVIRONMENT/bin/python"; tail -n +2 "$PROGRAMS/$program"; } >".$ENVIRONMENT/bin/$program"
    chmod 755 ".$ENVIRONMENT/bin/$program"
done

# Of this machine's units only the targets and the journal are started.
rm -rf etc/systemd/system/* etc/mqtts-gateway var/lib/private var/lib/systemd var/log/journal
rm -rf lib/systemd/system/*.target.wants
mkdir -p var/lib/systemd etc/systemd/system/sysinit.target.wants
ln -s /lib/systemd/system/systemd-journald.service etc/systemd/system/sysinit.target.wants/
: >etc/fstab
printf '127.0.0.1 localhost\\n' >etc/hosts
rm -f etc/resolv.conf
printf 'nameserver 127.0.0.1\\noptions timeout:1\\n' >etc/resolv.conf
printf 'hosts: files dns\\npasswd: files\\ngroup: files\\n' >etc/nsswitch.conf
ip link set lo up

mkdir outside
pivot_root . outside
umount -l /outside
rmdir /outside
# As systemd has it on a machine: it makes the mounts of credentials in a namespace from which they spread.
mount --make-rshared /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=box TERM=dumb \\
    "$SYSTEMD" --system --unit=multi-user.target --log-target=journal --show-status=no
"""


def require_box() -> None:
    """Skip on a user's machine that cannot have a box; in CI (`CI=true`) fail."""
    missing = ""
    if os.geteuid() != 0:
        missing = "a box with a systemd of its own takes root"
    elif not _SYSTEMD.exists():
        missing = "systemd is not installed: apt install systemd"
    elif _cgroups() is None:
        missing = "this machine has no cgroup v2 that can be written"
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"{missing} (in CI everything is there, so that nothing is skipped)")
    if missing:
        pytest.skip(missing)
    for program in ("unshare", "nsenter", "ip", "pivot_root", "ldconfig"):
        require_tool(program)


def _cgroups() -> Path | None:
    """Return where cgroup v2 is mounted, be it beside v1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(where)
    return None


class Box:
    """A running system.  Use it as a context manager."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="box-"))
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = cgroups / self._directory.name
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._cursor = ""

    def __enter__(self) -> Self:
        self._cgroup.mkdir()
        environment = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "BOX": str(self._directory),
            "TREE": str(ROOT),
            "ENVIRONMENT": str(ENVIRONMENT),
            "SITE": site.getsitepackages()[0],
            "PROGRAMS": str(Path(sys.executable).parent),
            "PYTHON": f"python{sys.version_info.major}.{sys.version_info.minor}",
            "VERSION": sys.version.partition(" ")[0],
            "BASE_PREFIX": str(Path(sys.base_prefix).resolve()),
            "SYSTEMD": str(_SYSTEMD),
        }
        # The shell puts itself into the cgroup first, so that the box's cgroup namespace begins there.
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs"; exec unshare --fork --kill-child "$@"'
        flags = [f"--{name}" for name in _NAMESPACES]
        with (self._directory / "console").open("wb") as console:
            self._process = subprocess.Popen(
                ["sh", "-c", enter, "sh", *flags, "sh", "-c", _BOOT],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        try:
            self._pid = eventually(self._first_process, "the box's PID 1")
            eventually(lambda: self._state() in {"running", "degraded"}, f"the box is up; {self.console}")
        except AssertionError as error:
            console_text = self.console
            self.__exit__()
            raise AssertionError(f"{error}: {console_text}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # PID 1 of the box goes with it, and with that one everything in the box.
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(PATIENCE)
        eventually(self._without_cgroups, "the box's processes are gone")
        shutil.rmtree(self._directory)

    @property
    def console(self) -> str:
        """What was said before the journal began."""
        return (self._directory / "console").read_text(errors="replace")

    def run(self, *command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in the box as root; return how it ended."""
        inside = ["nsenter", f"--target={self._pid}", *(f"--{name}" for name in _NAMESPACES), "--", *map(str, command)]
        return subprocess.run(
            inside,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            cwd="/",
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def do(self, *command: str | Path, stdin: str = "") -> str:
        """Run a command that must go well; return what it printed."""
        done = self.run(*command, stdin=stdin)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Write a file in the box, and the directories that it needs."""
        self.do(
            "sh",
            "-c",
            'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"',
            "sh",
            path,
            f"{mode:o}",
            stdin=text,
        )

    def read(self, path: str | Path) -> str:
        """Read a file in the box."""
        return self.do("cat", path)

    def log(self, unit: str) -> str:
        """Return what the journal has of a unit since `begin_log`, and what systemd says about it."""
        since = [f"--after-cursor={self._cursor}"] if self._cursor else []
        return self.do("journalctl", "--no-pager", "--quiet", "--output=cat", f"--unit={unit}", *since)

    def begin_log(self) -> None:
        """Let `log` show only what is written from now on."""
        said = self.do("journalctl", "--no-pager", "--quiet", "--lines=1", "--output=cat", "--show-cursor")
        self._cursor = said.rpartition("-- cursor: ")[2].strip()

    def property(self, unit: str, name: str) -> str:
        """Return a property of a unit, as systemd has it now."""
        return self.do("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def wait_active(self, unit: str, state: str = "active") -> None:
        """Wait until a unit is in a state."""
        try:
            eventually(lambda: self.property(unit, "ActiveState") == state, f"{unit} is {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(unit)}") from None

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Make this thread's new sockets belong to the box's network; threads that it starts meanwhile, too."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self._pid}/ns/net") as boxes:  # noqa: PTH123
            if setns(boxes.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                setns(own.fileno(), _CLONE_NEWNET)

    def _first_process(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, "the box did not come up"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _state(self) -> str:
        assert self._process is not None
        assert self._process.poll() is None, "the box has ended"
        if Path(f"/proc/{self._pid}/comm").read_text().strip() != "systemd":
            return ""
        return self.run("systemctl", "is-system-running").stdout.strip()

    def _without_cgroups(self) -> bool:
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)  # noqa: PTH106  os.walk has strings
        return not self._cgroup.exists()
