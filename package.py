"""Builds a Debian package: `python package.py DIRECTORY [--arch arm64] [--revision 2] [--wheels DIR]`.

In: an environment with the gateway (`pip install -e . hatchling`), a package index, `apt install dpkg-dev gcc
python3-dev`; for another architecture than this machine's, `pip install ziglang`.  Out: a file
`mqtts-gateway_VERSION-REVISION_ARCH.deb`, and beside it a CycloneDX SBOM of it, `….cdx.json`; both the same bytes each
time from the same sources, compiler and versions of dependencies (`--wheels` keeps those).

The package has the gateway with all its dependencies in /usr/lib/mqtts-gateway, for each Python in `PYTHONS`.
"""

# ruff: noqa: T201, S603  a command line tool prints, and runs programs

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from email.message import Message
from email.parser import HeaderParser
from email.utils import format_datetime
from hashlib import md5, sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import frozen
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import wheels
from gateway import MADE, __version__
from gateway.cli.main import command_line
from gateway.cli.places import PACKAGED_PROGRAMS, UNITS
from gateway.cli.service_view import KEY_GROUP

ROOT = Path(__file__).resolve().parent
NAME = "mqtts-gateway"
MAINTAINER = "The mqtts-gateway maintainers <maintainers@mqtts-gateway.example>"
# Debian 12 has 3.11, Ubuntu 24.04 3.12, Debian 13 3.13.
PYTHONS = ("3.11", "3.12", "3.13")
# The newest C library that a wheel may need is that of the oldest of these systems, Debian 12: 2.36.
PLATFORMS = ("manylinux_2_17", "manylinux2014", "manylinux_2_28", "manylinux_2_34")
LIBRARY = f"usr/lib/{NAME}"
CONFIG = "etc/mqtts-gateway/gateway.toml"
# Not needed at run time.
LEFT_OUT = re.compile(
    r"(^|/)(test|tests|newsfragments)/|\.(c|h|pyx|pyi|pxd)$|^gateway/units/|\.dist-info/(RECORD|WHEEL|INSTALLER)$"
)
# Licences of distributions whose metadata have no License-Expression, as SPDX expressions.
LICENSES = {
    **dict.fromkeys(("automat", "cattrs", "constantly", "h11", "hyperlink", "incremental"), "MIT"),
    "google-re2": "BSD-3-Clause AND Apache-2.0",  # with Abseil inside
    "pyopenssl": "Apache-2.0",
}


@frozen
class Architecture:
    """A machine: the names that Debian and wheels have for it."""

    debian: str
    wheel: str


ARCHITECTURES = {
    each.debian: Architecture(each.debian, each.wheel) for each in wheels.MACHINES if each.debian != "armhf"
}
# armhf is left out: cffi, google-re2 and zope.interface have no wheels for it.


def run(*command: str | Path, **environment: str) -> str:
    """Run a program that must succeed; return its output."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


# --- What is in it: the gateway and its dependencies.


def gateway_wheel(architecture: Architecture, work: Path) -> Path:
    """Build the gateway's own wheel, with the compiled core."""
    into = work / "gateway"
    into.mkdir()
    if architecture.debian == run("dpkg", "--print-architecture"):
        # -s: without symbols.  A target is named so that a build without the core fails.
        options = {"CFLAGS": "-s", "MQTTS_GATEWAY_TARGET": f"linux_{architecture.wheel}"}
        run(*pip("wheel"), "--no-deps", "--no-build-isolation", "--wheel-dir", into, ROOT, **options)
        (wheel,) = into.glob("*.whl")
        return wheel
    (machine,) = (each for each in wheels.MACHINES if each.debian == architecture.debian)
    return wheels.build(machine, wheels.headers(work), into, "-s")


def pip(command: str) -> tuple[str, ...]:
    """Return the beginning of a command line of pip."""
    return (sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check")


def download(architecture: Architecture, wheel: Path, work: Path) -> list[Path]:
    """Fetch the wheels of all dependencies: all for the oldest Python, for the others those that differ."""
    requirements = [text for text in requirements_of(wheel) if "extra ==" not in text]
    first, *others = PYTHONS
    fetched = fetch(architecture, first, requirements, work)
    own = [each.name.split("-")[:2] for each in fetched if "-abi3-" not in each.name and "-none-" not in each.name]
    for python in others:
        fetched += fetch(architecture, python, ["--no-deps", *(f"{name}=={version}" for name, version in own)], work)
    names = {canonicalize_name(each.name.split("-")[0]) for each in fetched}
    for requirement in (Requirement(text) for each in fetched for text in requirements_of(each)):
        wanted = any(
            requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""})
            for python in PYTHONS
        )
        if wanted and canonicalize_name(requirement.name) not in names:
            sys.exit(
                f"{requirement} is needed by a later Python than {first}: add it to the requirements in pyproject.toml"
            )
    return fetched


def fetch(architecture: Architecture, python: str, requirements: list[str], work: Path) -> list[Path]:
    """Fetch wheels for a version of Python, unless an earlier build has kept them."""
    into = work / python
    if into.exists():
        return sorted(into.glob("*.whl"))
    # Renamed at the end, so that what was interrupted is not taken for complete.
    part = into.with_name(f"{into.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    abi = f"cp{python.replace('.', '')}"
    run(
        *pip("download"),
        *("--dest", part, "--only-binary", ":all:", "--implementation", "cp", "--python-version", python),
        *(word for each in (abi, "abi3", "none") for word in ("--abi", each)),
        *(word for each in PLATFORMS for word in ("--platform", f"{each}_{architecture.wheel}")),
        *requirements,
    )
    part.rename(into)
    return sorted(into.glob("*.whl"))


def requirements_of(wheel: Path) -> list[str]:
    """Return what a wheel requires."""
    with zipfile.ZipFile(wheel) as archive:
        return [str(each) for each in metadata(archive).get_all("Requires-Dist", [])]


def metadata(wheel: zipfile.ZipFile) -> Message:
    """Return a wheel's metadata (PEP 566)."""
    (name,) = (each for each in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
    return HeaderParser().parsestr(wheel.read(name).decode())


def unpack(archives: list[Path], into: Path) -> None:
    """Put wheels side by side into one directory.  Raises `SystemExit` if two have different files of one name."""
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith("/") or LEFT_OUT.search(name):
                    continue
                content = wheel.read(name)
                if name.endswith(".py"):
                    # An interpreter's line would call a Python of somebody's own; nothing here is run by its name.
                    content = re.sub(rb"\A#!.*\n", b"\n", content)
                path = into / name
                if path.exists() and path.read_bytes() != content:
                    sys.exit(f"{archive.name}: its {name} differs from that for another Python")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def needed_glibc(directory: Path) -> str:
    """Return the oldest version of the C library that has what all shared objects need."""
    objects = sorted(directory.rglob("*.so"))
    versions = re.findall(r"\bGLIBC_([0-9.]+)", run("readelf", "--version-info", "--wide", *objects))
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


# --- Documents, made from what is there.


def roff(text: str) -> str:
    """Return text for a manual page (groff(7))."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", escaped, flags=re.MULTILINE)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands of a parser."""
    for action in parser._actions:  # noqa: SLF001  argparse has no public way to look at a parser
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and arguments of a parser itself."""
    for action in parser._actions:  # noqa: SLF001
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction):  # noqa: SLF001
            yield action


def value_of(action: argparse.Action) -> str:
    """Return what stands for an argument's value: empty for a flag without one."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    return "{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()


def described(action: argparse.Action) -> str:
    """Return an option or argument as an item of a manual page."""
    value = f" \\fI{roff(value_of(action))}\\fR" if value_of(action) else ""
    names = ", ".join(f"\\fB{roff(name)}\\fR{value}" for name in action.option_strings) or value.strip()
    text = (action.help or "") % {**vars(action), "prog": NAME}
    return f".TP\n{names}\n{roff(text)}\n"


MANUAL_HEAD = r"""\
.SH NAME
mqtts\-gateway \- verified TLS connections to the broker for plain\-MQTT devices
.SH SYNOPSIS
.B mqtts\-gateway
.I COMMAND
[\fIoptions\fR]
.SH DESCRIPTION
Each session of a plain\-MQTT device gets a TLS connection of its own to the broker, verified before a single MQTT byte
leaves. The service is configured in
.IR /etc/mqtts\-gateway/gateway.toml .
.SH COMMANDS
"""
MANUAL_TAIL = r"""\
.SH EXIT STATUS
0; 1 for a failure, including a wrong command line; 130 if interrupted.
\fBcheck \-\-strict\fR adds 2 for warnings; \fBstatus\fR adds 2 and 3 for problems of the gateway.
.SH FILES
.TP
.I /etc/mqtts\-gateway/gateway.toml
the configuration
.TP
.I /etc/mqtts\-gateway/credentials/
private keys; only root can read them
.TP
.I /var/lib/mqtts\-gateway/
messages of devices whose rule says store = true
.SH SEE ALSO
.BR systemctl (1),
.BR journalctl (1),
the documentation in
.IR /usr/share/doc/mqtts\-gateway/ .
"""


def manual(day: datetime) -> str:
    """Return the manual page of the command, from the command line's own descriptions."""
    parts = [f'.TH MQTTS\\-GATEWAY 1 "{day:%Y-%m-%d}" "{NAME} {__version__}" "User Commands"\n', MANUAL_HEAD]
    for name, parser in commands_of(command_line()).items():
        parts.append(f".SS {roff(f'{NAME} {name}')}\n{roff(parser.description or '')}\n")
        parts += [described(action) for action in actions_of(parser)]
        for inner, each in commands_of(parser).items():
            parts.append(f".PP\n\\fB{roff(f'{NAME} {name} {inner}')}\\fR: {roff(each.description or '')}\n.RS\n")
            parts += [described(action) for action in actions_of(each)]
            parts.append(".RE\n")
    parts.append(MANUAL_TAIL)
    return "".join(parts)


def completion() -> str:
    """Return the completion for bash: commands, their options, and the values that are fixed."""
    words: dict[str, list[str]] = {}
    values: dict[str, str] = {}

    def add(path: str, parser: argparse.ArgumentParser) -> None:
        options = [name for action in actions_of(parser) for name in action.option_strings]
        words[path] = [*commands_of(parser), *options, "--help"]
        for action in actions_of(parser):
            for name in action.option_strings:
                if action.nargs != 0:
                    values[f"{path} {name}"] = " ".join(map(str, action.choices or ()))
        for name, each in commands_of(parser).items():
            add(f"{path} {name}", each)

    add(NAME, command_line())
    lines = [
        "# bash completion for mqtts-gateway",
        "_mqtts_gateway() {",
        "    local word path=mqtts-gateway current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '        case "$path $word" in',
        "        " + " | ".join(f'"{path}"' for path in words if path != NAME) + ') path="$path $word" ;;',
        "        esac",
        "    done",
        "    COMPREPLY=()",
        '    case "$path $previous" in',
        *(
            f'    "{option}") mapfile -t COMPREPLY < <(compgen -W "{choices}" -- "$current"); return ;;'
            for option, choices in values.items()
            if choices
        ),
        # Everything else may be a file: bash's own completion takes over.
        *(f'    "{option}") return ;;' for option, choices in values.items() if not choices),
        "    esac",
        '    case "$path" in',
        *(
            f'    "{path}") mapfile -t COMPREPLY < <(compgen -W "{" ".join(each)}" -- "$current") ;;'
            for path, each in words.items()
        ),
        "    esac",
        "}",
        "complete -o default -F _mqtts_gateway mqtts-gateway",
    ]
    return "\n".join(lines) + "\n"


def license_of(about: Message) -> str:
    """Return a distribution's licence as an SPDX expression.  Raises `SystemExit` if it is not known."""
    name = about["Name"].lower()
    expression = about["License-Expression"] or LICENSES.get(name)
    if not expression:
        sys.exit(f"{name}: no License-Expression in its metadata; look it up and add it to LICENSES here")
    return str(expression)


def copyright_text(archives: list[Path]) -> str:
    """Return the machine-readable copyright file of everything inside (DEP 5)."""
    paragraphs = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/",
        f"Upstream-Name: {NAME}\n",
    ]
    own = (ROOT / "LICENSE").read_text()
    paragraphs.append(stanza("*", copyrights([own]), "MIT", own))
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            about = metadata(wheel)
            texts = {
                Path(name).name: wheel.read(name).decode()
                for name in sorted(wheel.namelist())
                if re.search(r"\.dist-info/(licenses/)?[^/]*(LICENSE|COPYING|NOTICE)[^/]*$", name)
            }
            tops = sorted({name.partition("/")[0] for name in wheel.namelist()} - {""})
        if not texts:
            sys.exit(f"{archive.name}: it has no licence file")
        name, expression = about["Name"], license_of(about)
        # Each distribution has a licence paragraph of its own, for the words differ.
        short = re.sub(r"\s+(OR|AND)\s+", lambda match: f"-{match[1].lower()}-", expression) + f"-{name.lower()}"
        words = [text if "Apache License" not in text or len(text) < 5000 else APACHE for text in texts.values()]
        if name in INSIDE:
            words.append(INSIDE[name])
        files = " ".join(
            f"{LIBRARY}/python/{top}{'/*' if '.' not in top or '.dist-info' in top else ''}" for top in tops
        )
        paragraphs.append(
            stanza(files, copyrights(texts.values()), short, "\n".join([f"SPDX: {expression}", "", *words]))
        )
    return "\n".join(paragraphs)


APACHE = "On Debian systems, the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0.\n"
# What compiled modules include, by the name of the distribution.
INSIDE = {
    "cryptography": (
        "Its compiled module includes OpenSSL, Copyright The OpenSSL Project Authors (Apache License 2.0, in\n"
        "/usr/share/common-licenses/Apache-2.0), and Rust crates under MIT, Apache-2.0 or BSD-3-Clause.\n"
    ),
    "google-re2": (
        "Its compiled module includes Abseil, Copyright The Abseil Authors (Apache License 2.0, in\n"
        "/usr/share/common-licenses/Apache-2.0), and pybind11, Copyright Wenzel Jakob (BSD-3-Clause).\n"
    ),
}


def copyrights(texts: object) -> list[str]:
    """Return the lines of licences that name their holders."""
    found = re.findall(r"^\W*(Copyright\W+(?:\(c\)|©|\d).*)$", "\n".join(texts), re.MULTILINE | re.IGNORECASE)  # type: ignore[call-overload]
    return list(dict.fromkeys(line.strip() for line in found)) or ["the authors named in the licence"]


def stanza(files: str, holders: list[str], license_name: str, text: str) -> str:
    """Return one paragraph of a copyright file."""
    lines = [f" {line.strip()}" if line.strip() else " ." for line in text.strip().splitlines()]
    held = "\n ".join(holders)
    return f"Files: {files}\nCopyright: {held}\nLicense: {license_name}\n" + "\n".join(lines) + "\n"


# --- The bill of materials.


def bill_of_materials(version: str, moment: int, archives: list[Path]) -> str:
    """Return what is inside, as CycloneDX 1.6 in JSON."""
    components = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            about = metadata(wheel)
        reference = f"pkg:pypi/{canonicalize_name(about['Name'])}@{about['Version']}"
        component = components.setdefault(
            reference,
            {
                "type": "library",
                "bom-ref": reference,
                "name": canonicalize_name(about["Name"]),
                "version": about["Version"],
                "purl": reference,
                "licenses": [{"expression": license_of(about)}],
                "properties": [],
            },
        )
        # One for each Python that has a wheel of its own, which CycloneDX's `hashes` has no place for.
        component["properties"].append(
            {"name": f"{NAME}:sha256:{archive.name}", "value": sha256(archive.read_bytes()).hexdigest()}
        )
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(moment, UTC).isoformat(),
            "component": {
                "type": "application",
                "bom-ref": NAME,
                "name": NAME,
                "version": version,
                "licenses": [{"expression": "MIT"}],
            },
        },
        "components": [components[reference] for reference in sorted(components)],
        "dependencies": [
            {"ref": NAME, "dependsOn": sorted(components)},
        ],
    }
    return json.dumps(document, indent=2) + "\n"


# --- Files of the package.

LAUNCHER = f"""\
#!/usr/bin/python3 -IS
# -I and -S: nothing from the environment, the user's or the system's own packages reaches the gateway.
import sys

sys.path.insert(0, "/{LIBRARY}/python")
from {{module}} import {{function}}

if __name__ == "__main__":
    sys.exit({{function}}())
"""

POSTINST = f"""\
#!/bin/sh
set -e

if [ "$1" = configure ]; then
    # The service itself may write neither.
    py3compile -p {NAME} /{LIBRARY}
    python3 -IS - <<'PYTHON'
import sys
sys.path.insert(0, "/{LIBRARY}/python")
from twisted import plugins
from twisted.plugin import IPlugin, getPlugins
list(getPlugins(IPlugin, plugins))
PYTHON
    chmod 644 /{LIBRARY}/python/twisted/plugins/dropin.cache
    groupadd --system --force {KEY_GROUP}
    install -d -m 700 /etc/mqtts-gateway/credentials
    for unit in /etc/systemd/system/mqtts-gateway.service /etc/systemd/system/mqtts-gateway@.service; do
        if [ -e "$unit" ]; then
            echo "{NAME}: $unit replaces this package's unit; if it is from an earlier installation, run that one's" \\
                "mqtts-gateway uninstall" >&2
        fi
    done
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    if [ -z "$2" ]; then
        echo "{NAME} is installed and not started. Next:"
        echo "  mqtts-gateway setup"
        echo "  systemctl enable --now mqtts-gateway"
    elif [ -d /run/systemd/system ]; then
        # An upgrade. The stop ends the sessions, spread over drain.seconds; only what runs is started again.
        if mqtts-gateway check --files --config /{CONFIG} >/run/{NAME}.check 2>&1; then
            systemctl try-restart 'mqtts-gateway.service' 'mqtts-gateway@*.service' ||
                echo "{NAME}: the service was not restarted: systemctl status mqtts-gateway" >&2
        elif systemctl is-active --quiet 'mqtts-gateway.service' 'mqtts-gateway@*.service'; then
            cat /run/{NAME}.check >&2
            echo "{NAME}: check --files fails, so the service was not restarted and the previous version is still" \\
                "running. Correct what fails, then run: systemctl restart mqtts-gateway" >&2
        fi
        rm -f /run/{NAME}.check
    fi
fi
"""

PRERM = f"""\
#!/bin/sh
set -e

if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    # The sockets first: a connection would start the service again. The stop ends the sessions gently.
    systemctl stop 'mqtts-gateway*.socket' || true
    systemctl stop 'mqtts-gateway.service' 'mqtts-gateway@*.service' || true
fi
py3clean -p {NAME} /{LIBRARY} || true
rm -f /{LIBRARY}/python/twisted/plugins/dropin.cache
"""

POSTRM = f"""\
#!/bin/sh
set -e

if [ "$1" = remove ] || [ "$1" = purge ]; then
    # Enabled units are links.
    find /etc/systemd/system -mindepth 2 -maxdepth 2 -type l -name 'mqtts-gateway[.@]*' -delete 2>/dev/null || true
fi
if [ "$1" = purge ]; then
    rm -rf /etc/mqtts-gateway /var/lib/mqtts-gateway /var/lib/private/mqtts-gateway
    rm -rf /var/lib/mqtts-gateway-[0-9]* /var/lib/private/mqtts-gateway-[0-9]*
    rm -rf /etc/systemd/system/mqtts-gateway.service.d /etc/systemd/system/mqtts-gateway.socket.d
    rm -rf /etc/systemd/system/mqtts-gateway@*.d
    groupdel {KEY_GROUP} 2>/dev/null || true
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
"""

RTUPDATE = f"""\
#!/bin/sh
# The system's default Python has changed.
set -e
if [ "$1" = rtupdate ]; then
    py3clean -p {NAME} /{LIBRARY}
    py3compile -p {NAME} /{LIBRARY}
fi
"""

OVERRIDES = f"""\
# The wheels of cryptography come with the OpenSSL that they are tested with, the same one on each system.
{NAME}: embedded-library *
# Modules from wheels are the bytes that their makers have tested.
{NAME}: unstripped-binary-or-object *
# The default of deb-systemd-invoke is to start what is disabled, and it knows no patterns for instances.
{NAME}: maintainer-script-calls-systemctl *
"""


def write(path: Path, text: str | bytes, mode: int = 0o644) -> None:
    """Write a file with its directories; what ends with .gz is compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content, 9, mtime=0) if path.suffix == ".gz" else content)
    path.chmod(mode)


def write_documents(root: Path, version: str, day: datetime, archives: list[Path]) -> None:
    """Write what is below /usr/share."""
    share = root / "usr/share"
    doc = share / "doc" / NAME
    write(doc / "copyright", copyright_text(archives))
    entry = "  * CHANGELOG.md, in this directory as changelog.gz, says what has changed."
    write(
        doc / "changelog.Debian.gz",
        f"{NAME} ({version}) stable; urgency=medium\n\n{entry}\n\n -- {MAINTAINER}  {format_datetime(day)}\n",
    )
    write(doc / "changelog.gz", (ROOT / "CHANGELOG.md").read_text())
    for page in sorted((ROOT / "docs").glob("*.md")):
        write(doc / "docs" / page.name, page.read_text())
    write(doc / "README.md", (ROOT / "README.md").read_text())
    write(share / f"man/man1/{NAME}.1.gz", manual(day))
    write(share / f"bash-completion/completions/{NAME}", completion())
    write(share / f"python3/runtime.d/{NAME}.rtupdate", RTUPDATE, 0o755)
    write(share / f"lintian/overrides/{NAME}", OVERRIDES)


def write_programs(root: Path) -> None:
    """Write the commands and the units."""
    programs = root / LIBRARY / "bin"
    write(programs / NAME, LAUNCHER.format(module="gateway.cli.main", function="console"), 0o755)
    write(programs / "twistd", LAUNCHER.format(module="twisted.scripts.twistd", function="run"), 0o755)
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin" / NAME).symlink_to(f"../lib/{NAME}/bin/{NAME}")
    for name in UNITS:
        # Without the first line, by which `mqtts-gateway uninstall` knows files that it may remove.
        text = (ROOT / "systemd" / name).read_text().partition("\n")[2]
        write(root / "usr/lib/systemd/system" / name, text.replace(PACKAGED_PROGRAMS, f"/{LIBRARY}/bin/"))


def write_control(root: Path, architecture: Architecture, version: str) -> None:
    """Write what dpkg reads (deb-control(5))."""
    control = root / "DEBIAN"
    libraries = f"libc6 (>= {needed_glibc(root)}), libgcc-s1, libstdc++6"
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()) // 1024
    oldest, newest = PYTHONS[0], PYTHONS[-1]
    beyond = f"3.{int(newest.partition('.')[2]) + 1}"
    write(
        control / "control",
        f"Package: {NAME}\nVersion: {version}\nArchitecture: {architecture.debian}\nMaintainer: {MAINTAINER}\n"
        f"Installed-Size: {size}\nSection: net\nPriority: optional\n"
        f"Depends: python3 (>= {oldest}), python3 (<< {beyond}), {libraries}, passwd\n"
        "Recommends: ca-certificates, systemd (>= 252)\n"
        "Description: verified TLS connections to the broker for plain-MQTT devices\n"
        " Old sensors and controllers speak plain MQTT, brokers accept only MQTT over\n"
        " TLS. This gateway connects them: each device session gets its own TLS\n"
        " connection to the broker, verified before a single MQTT byte leaves.\n",
    )
    write(control / "conffiles", f"/{CONFIG}\n")
    for name, script in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        write(control / name, script, 0o755)
    sums = [
        f"{md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(root)}\n"
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink() and control not in path.parents and path != root / CONFIG
    ]
    write(control / "md5sums", "".join(sums))


def build(architecture: Architecture, revision: str, into: Path, kept: Path | None) -> Path:
    """Build a package; return it.  `kept` is the directory for the wheels of dependencies, temporary by default."""
    moment = int(os.environ.get("SOURCE_DATE_EPOCH") or MADE.timestamp())
    day = datetime.fromtimestamp(moment, UTC)
    version = f"{__version__}-{revision}"
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        root = work / "root"
        root.mkdir()
        own = gateway_wheel(architecture, work)
        fetched = download(architecture, own, (kept or work) / architecture.debian)
        unpack([*fetched, own], root / LIBRARY / "python")
        archives = {path.name.partition("-")[0]: path for path in fetched}
        write(root / CONFIG, (ROOT / "gateway/config/template.toml").read_text())
        write_programs(root)
        write_documents(root, version, day, list(archives.values()))
        write_control(root, architecture, version)
        for path in [root, *root.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        package = into / f"{NAME}_{version}_{architecture.debian}.deb"
        # Level 1 takes a fifth of the time of the default, for an eighth more bytes.
        options = ("--root-owner-group", "-Zxz", "-z1", "--build")
        run("dpkg-deb", *options, root, package, SOURCE_DATE_EPOCH=str(moment))
        write(package.with_suffix(".cdx.json"), bill_of_materials(version, moment, fetched))
    return package


def main() -> int:
    """Build what the command line says."""
    parser = argparse.ArgumentParser(description="Build a Debian package of the gateway and all its dependencies.")
    parser.add_argument("directory", type=Path, help="where to put the package")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="default: this machine's")
    parser.add_argument(
        "--revision", default="1", metavar="N", help="the package's revision of this version (default: 1)"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="keep the wheels of dependencies in DIR, and use those that are there",
    )
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    name = arguments.arch or run("dpkg", "--print-architecture")
    if name not in ARCHITECTURES:
        parser.error(f"no package for {name}: cffi and zope.interface have no wheels for it")
    kept = arguments.wheels.resolve() if arguments.wheels else None
    print(build(ARCHITECTURES[name], arguments.revision, arguments.directory.resolve(), kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
