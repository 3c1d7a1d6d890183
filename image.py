"""Builds a container image: `python image.py DIRECTORY [--arch arm64] [--wheels DIR]`.

In: what package.py needs, Debian 12's Python (3.11), `apt install mmdebstrap podman`, and Debian's archive; no registry
of images.  Out: the image in `mqtts-gateway_VERSION_ARCH.image.tar`, for `podman load` or `docker load`.

The image has the Debian package of the gateway (package.py), Python and the libraries that it needs, and the roots of
Debian's ca-certificates; no shell, no package manager, nothing that is setuid.  No program of it runs while it is
built, so an image for another architecture needs no emulator.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import package
from gateway import MADE, __version__
from package import ARCHITECTURES, LIBRARY, NAME, ROOT, run, write

SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("base-files", "ca-certificates", "libgcc-s1", "libpython3-stdlib", "libstdc++6", "python3-minimal")
USER = 65532
# All else that the packages bring is left out.
KEPT = (
    *("bin", "lib", "lib64", "etc/os-release", "etc/debian_version", "var/lib/dpkg/status.d"),
    *("usr/bin/python3", f"usr/bin/python{PYTHON}", f"usr/bin/{NAME}", "usr/lib", "usr/share/common-licenses"),
)
LEFT_OUT = re.compile(
    r"^bin/"
    r"|^lib/systemd/|^usr/lib/(binfmt.d|dpkg|mime|python3|ssl|systemd|tmpfiles.d)/"
    r"|^(usr/)?lib/[^/]+/(audit|engines-3|gconv|krb5|ossl-modules|perl|perl-base|security)/"
    # What Debian's packages depend on for their installation, and what has nothing left in the image.
    r"|^var/lib/dpkg/status.d/(coreutils|debconf|dpkg|libdebconfclient0|mawk|media-types|openssl|perl-base|tar)$"
    rf"|^usr/lib/python{PYTHON}/(__pycache__|ensurepip|idlelib|lib2to3|pydoc_data|test|tkinter|turtledemo)"
    rf"|^{LIBRARY}/python/.*\.cpython-(?!{PYTHON.replace('.', '')}-)[^/]*\.so$"
)
# Scanners read which packages an image has from here, as in other images without a package manager.
LIST_PACKAGES = """\
mkdir -p "$1/var/lib/dpkg/status.d"
for package in "$1"/var/cache/apt/archives/*.deb; do
    dpkg-deb --field "$package" >"$1/var/lib/dpkg/status.d/$(dpkg-deb --field "$package" Package)"
done
"""
ACCOUNTS = {
    "etc/passwd": f"root:x:0:0:root:/:/nonexistent\n{NAME}:x:{USER}:{USER}:{NAME}:/:/nonexistent\n",
    "etc/group": f"root:x:0:\n{NAME}:x:{USER}:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


def unpack(architecture: str, deb: Path, moment: int, into: Path) -> None:
    """Put Debian's packages and the gateway's into a directory."""
    hook = into.with_name("list-packages")
    write(hook, f"#!/bin/sh\nset -eu\n{LIST_PACKAGES}", 0o755)
    options = ("--quiet", "--variant=extract", f"--architectures={architecture}", f"--include={','.join(PACKAGES)}")
    run("mmdebstrap", *options, f"--extract-hook={hook}", SUITE, into, SOURCE_DATE_EPOCH=str(moment))
    run("dpkg-deb", "--extract", deb, into)
    write(into / f"var/lib/dpkg/status.d/{NAME}", run("dpkg-deb", "--field", deb) + "\n")
    certificates = sorted((into / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    write(into / "etc/ssl/certs/ca-certificates.crt", b"".join(each.read_bytes() for each in certificates))


def keep(name: str) -> bool:
    """Return whether a file belongs into the image."""
    kept = any(name == each or name.startswith(f"{each}/") for each in (*KEPT, "etc/ssl/certs"))
    return bool((kept and not LEFT_OUT.search(name)) or re.fullmatch(r"usr/share/doc/[^/]+/copyright", name))


def select(unpacked: Path, root: Path) -> None:
    """Copy what belongs into the image, and write what no package has."""
    for path in sorted(unpacked.rglob("*")):
        name = str(path.relative_to(unpacked))
        if (path.is_symlink() or path.is_file()) and keep(name):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, root / name, follow_symlinks=False)
    for name, text in ACCOUNTS.items():
        write(root / name, text)
    (root / "etc" / NAME).mkdir()
    (root / "tmp").mkdir(mode=0o1777)
    # It could not write them later: the image is mounted read-only.
    compiled = [root / f"usr/lib/python{PYTHON}", root / LIBRARY / "python"]
    run(
        *(sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"),
        *("-s", root, "-p", "/", *compiled),
    )


def build(architecture: str, into: Path, kept: Path | None) -> Path:
    """Build an image; return its archive.  `kept` is as for `package.build`."""
    moment = int(os.environ.get("SOURCE_DATE_EPOCH") or MADE.timestamp())
    image = into / f"{NAME}_{__version__}_{architecture}.image.tar"
    # podman wants paths that are short.
    with TemporaryDirectory() as temporary, TemporaryDirectory(dir="/tmp") as short:
        work = Path(temporary)
        deb = package.build(ARCHITECTURES[architecture], "1", work, kept)
        unpack(architecture, deb, moment, work / "unpacked")
        context = work / "context"
        (context / "root").mkdir(parents=True)
        (context / "state").mkdir()
        select(work / "unpacked", context / "root")
        podman = ("podman", "--root", work / "storage", "--runroot", short, "--storage-driver", "vfs")
        name = f"localhost/{NAME}:{__version__}"
        options = ("--quiet", "--format", "docker", "--isolation", "chroot", "--layers=false", "--arch", architecture)
        options += ("--timestamp", str(moment), "--file", str(ROOT / "Containerfile"))
        run(*podman, "build", *options, "--tag", name, context)
        # Not in OCI's format, which has no health check.
        image.unlink(missing_ok=True)
        run(*podman, "save", "--quiet", "--format", "docker-archive", "--output", image, name)
    return image


def main() -> int:
    """Build what the command line says."""
    parser = argparse.ArgumentParser(description="Build a container image of the gateway.")
    parser.add_argument("directory", type=Path, help="where to put the image")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="default: this machine's")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="as for package.py")
    arguments = parser.parse_args()
    if ".".join(map(str, sys.version_info[:2])) != PYTHON:
        parser.error(f"the image has Python {PYTHON}, which must also run this program, for its compiled modules")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    kept = arguments.wheels.resolve() if arguments.wheels else None
    architecture = arguments.arch or run("dpkg", "--print-architecture")
    print(build(architecture, arguments.directory.resolve(), kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
