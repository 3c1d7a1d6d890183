"""Runs the compiled core under sanitizers: `python -m tests.core fuzz|tests [--seconds N]`.

In: clang, with its runtime libraries, and gcc for its warnings.  Out: exit status 0 if nothing was found.  `fuzz` runs
libFuzzer on what reads bytes from peers; `tests` runs the core's tests in a copy of the tree, whose core
AddressSanitizer and UBSan watch.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from gateway.mqtt.checking import CheckingFramer
from gateway.mqtt.framer import Framer, Sender
from gateway.mqtt.packets import ProtocolVersion
from tests import mqtt_packets as mqtt

_ROOT = Path(__file__).parent.parent.parent
_FOUND = _ROOT / "fuzz-found"
_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
_SANITIZE = "-fsanitize=address,undefined"
_COMMON = ("clang", "-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *_WARNINGS)


def _include() -> str:
    return f"-I{sysconfig.get_path('include')}"


def _fuzz(seconds: int, directory: Path) -> int:
    ways = list(product((Framer, CheckingFramer), Sender, ProtocolVersion))
    rows = [make(sender, version, 1000).tables for make, sender, version in ways]
    lines = ["{" + ",".join(map(str, row)) + "}" for row in rows]
    header = f"enum {{ TABLES = {len(rows)} }};\nstatic const uint8_t tables[TABLES][1024] = {{{','.join(lines)}}};\n"
    (directory / "tables.h").write_text(header)
    program = directory / "fuzz"
    # The parts that call Python are never reached, so Python is not linked.
    flags = [
        f"{_SANITIZE},fuzzer",
        "-Wno-unused-function",
        "-fPIE",
        "-no-pie",
        "-Wl,--unresolved-symbols=ignore-all",
        f"-I{directory}",
    ]
    source = _ROOT / "tests" / "core" / "fuzz.c"
    subprocess.run([*_COMMON, *flags, _include(), str(source), "-o", str(program)], check=True)
    corpus = directory / "corpus"
    corpus.mkdir()
    for index, (_, _, version) in enumerate(ways):
        for qos in (0, 1):
            packet = mqtt.publish("a/é", version=version, qos=qos)
            (corpus / f"{index}-{qos}").write_bytes(bytes((index, qos)) + packet * 3 + mqtt.acknowledgement(0x40))
    with_properties = mqtt.publish("", version=5, properties=b"\x23\0\1" + mqtt.user_property())
    (corpus / "properties").write_bytes(bytes((ways.index((CheckingFramer, Sender.DEVICE, 5)), 1)) + with_properties)
    limits = [f"-max_total_time={seconds}", "-max_len=600", "-print_final_stats=1"]
    found = subprocess.run([str(program), *limits, str(corpus)], cwd=directory, check=False)
    for kept in directory.glob("*-*"):
        _FOUND.mkdir(exist_ok=True)
        print(f"kept: {shutil.copy(kept, _FOUND / f'core-{kept.name}')}")
    return found.returncode


def _tests(directory: Path) -> int:
    for name in ("gateway", "tests", "benchmarks"):
        shutil.copytree(_ROOT / name, directory / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(_ROOT / "pyproject.toml", directory)
    output = directory / "gateway" / "relay" / "_core.abi3.so"
    flags = [_SANITIZE, "-shared-libasan", "-fPIC", "-shared"]
    source = _ROOT / "gateway" / "relay" / "_core.c"
    subprocess.run(["gcc", "-std=c11", "-O2", *_WARNINGS, _include(), "-fsyntax-only", str(source)], check=True)
    subprocess.run([*_COMMON, *flags, _include(), str(source), "-o", str(output)], check=True)
    runtime = subprocess.run(
        ["clang", f"-print-file-name=libclang_rt.asan-{platform.machine()}.so"],
        check=True,
        capture_output=True,
        text=True,
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        # Python keeps what it has allocated until the end, and its own allocator would hide an overrun.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_core.py"]
    return subprocess.run(command, cwd=directory, env=environment, check=False).returncode


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.core", description=__doc__)
    parser.add_argument("what", choices=["fuzz", "tests"])
    parser.add_argument("--seconds", type=int, default=60)
    chosen = parser.parse_args()
    with TemporaryDirectory() as directory:
        return _fuzz(chosen.seconds, Path(directory)) if chosen.what == "fuzz" else _tests(Path(directory))


if __name__ == "__main__":
    sys.exit(main())
