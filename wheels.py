"""Builds wheels with the compiled core for other machines, and loads each once: `python wheels.py DIRECTORY`.

In: `pip install attrs hatchling ziglang`; `apt install qemu-user`; and for the Pythons of the other machines, which apt
fetches, `dpkg --add-architecture arm64`, the same with `armhf`, and `apt update`.  Out: a wheel for each of x86_64,
aarch64 and armv7l, for glibc 2.17 and later, and exit status 1 if one cannot be built or loaded.
"""

# ruff: noqa: T201, S603, S607  a command line tool prints, and runs programs

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import frozen

ROOT = Path(__file__).parent
CORE = "gateway/relay/_core.abi3.so"
GLIBC = "2.17"
# What the headers take from the machine that they were installed on, and its compiler knows of another one.
SIZES = {
    **{
        name: f"__SIZEOF_{name}__"
        for name in ("INT", "LONG", "LONG_LONG", "SHORT", "SIZE_T", "WCHAR_T", "DOUBLE", "FLOAT", "LONG_DOUBLE")
    },
    "VOID_P": "__SIZEOF_POINTER__",
    "UINTPTR_T": "__SIZEOF_POINTER__",
    "PTHREAD_T": "__SIZEOF_POINTER__",
    "TIME_T": "__SIZEOF_POINTER__",
}


# Debian's, for a Python that loads a module.
PACKAGES = (
    *("libc6", "libexpat1", "libgcc-s1", "zlib1g"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal"),
)


@frozen
class Machine:
    """A kind of machine: what zig, wheels, qemu and Debian call it."""

    zig: str
    wheel: str
    qemu: str
    debian: str


MACHINES = (
    Machine("x86_64-linux-gnu", "x86_64", "qemu-x86_64", "amd64"),
    Machine("aarch64-linux-gnu", "aarch64", "qemu-aarch64", "arm64"),
    Machine("arm-linux-gnueabihf", "armv7l", "qemu-arm", "armhf"),
)


def headers(directory: Path) -> Path:
    """Return a copy of Python's headers that fits any machine."""
    copy = directory / "include"
    shutil.copytree(sysconfig.get_path("include"), copy)
    lines = [Path(sysconfig.get_config_h_filename()).read_text()]
    lines += [f"#undef SIZEOF_{name}\n#define SIZEOF_{name} {value}" for name, value in SIZES.items()]
    (copy / "pyconfig.h").write_text("\n".join(lines) + "\n")
    return copy


def build(machine: Machine, include: Path, into: Path, flags: str = "") -> Path:
    """Build one wheel; `flags` are further ones for the compiler."""
    environment = {
        **os.environ,
        "CC": f"{sys.executable} -m ziglang cc -target {machine.zig}.{GLIBC}",
        "CFLAGS": f"-I{include} {flags}",
        "MQTTS_GATEWAY_TARGET": f"manylinux_{GLIBC.replace('.', '_')}_{machine.wheel}",
    }
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(into), str(ROOT)], env=environment, check=True)
    (wheel,) = into.glob(f"*_{machine.wheel}.whl")
    return wheel


def load(machine: Machine, wheel: Path, directory: Path) -> None:
    """Load the core of a wheel with the machine's own Python, and have it judge a packet.  Raises if that fails."""
    root = directory / machine.debian
    packages = directory / f"{machine.debian}-packages"
    packages.mkdir()
    wanted = [f"{name}:{machine.debian}" for name in PACKAGES]
    subprocess.run(["apt-get", "download", "-q", "-q", *wanted], cwd=packages, check=True)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    zipfile.ZipFile(wheel).extract(CORE, root)
    program = (
        "import importlib.machinery as m, importlib.util as u, platform;"
        f"l = m.ExtensionFileLoader('_core', {str(root / CORE)!r});"
        "c = u.module_from_spec(u.spec_from_loader('_core', l)); l.exec_module(c);"
        "t = bytes(256) + bytes([127]) * 256 + bytes(512);"
        "assert c.walk(t, 1000, 0, b'0' + bytes([4]) + bytes(4) + b'0') == (6, 0, 1);"
        "print('loaded on', platform.machine())"
    )
    python = root / "usr/bin/python3.11"
    home = {"PYTHONHOME": str(root / "usr")}
    subprocess.run([machine.qemu, "-L", str(root), str(python), "-S", "-c", program], env=home, check=True)


def main() -> int:
    """Build and load all of them."""
    into = Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    failed = 0
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        include = headers(directory)
        for machine in MACHINES:
            try:
                wheel = build(machine, include, into)
                print(wheel.name)
                load(machine, wheel, directory)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{machine.wheel}: {error}")
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
