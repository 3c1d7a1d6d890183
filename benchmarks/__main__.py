"""One command, one table: `python -m benchmarks`.

In: options.  Out: the table, printed and saved with all counts in `benchmarks/results`.  The exit status is 1 if
something that was asked for could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trustme
from cryptography.hazmat.backends.openssl import backend

from benchmarks.load import CannotMeasure, Load, compile_load
from benchmarks.measurements import DIRECT, Counts, Measurement, Scale, measure, measurements, refuse_strangers
from benchmarks.relays import (
    BROKER_NAME,
    ROOT,
    Relay,
    RunningRelay,
    Setting,
    descriptor_limit,
    find_gateway,
    find_peer,
    free_ports,
    running,
)
from benchmarks.shield import kernel_threads, shielded
from benchmarks.table import Round, render

RESULTS = ROOT / "benchmarks" / "results"
GATEWAY = "gateway"
PEERS = ("nginx", "haproxy", "stunnel")
QUICK = Scale(seconds=0.3, warmup=0.1, paced_sessions=100, paced_rate=1000, many=200)
# Takes part only when it is asked for: a relay under strace is slow, and nothing else of it can be compared.
ON_DEMAND = "syscalls"


def main() -> int:
    """Measure; return the exit status."""
    options = _parse()
    # What was started is stopped, however the measuring ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options)
    except CannotMeasure as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse() -> argparse.Namespace:
    groups = list(dict.fromkeys(measurement.group for measurement in measurements(Scale())))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures the gateway beside other relays."
    )
    parser.add_argument("--rounds", type=int, help="how often everything is measured (5; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="length of each measurement (3; 0.3 with --quick)")
    parser.add_argument("--only", metavar="GROUP,…", help=f"of {', '.join(groups)}; all but {ON_DEMAND} if not given")
    parser.add_argument("--relays", metavar="NAME,…", help=f"of {GATEWAY}, {', '.join(PEERS)}, {DIRECT} (no relay)")
    parser.add_argument(
        "--gateway",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="measure this gateway, too: another checkout, or the twistd beside which one is installed; repeatable",
    )
    parser.add_argument("--shield", action="store_true", help="keep the kernel's threads off the relay's core")
    parser.add_argument("--quick", action="store_true", help="short and small: shows that it works, measures little")
    parser.add_argument("--save", metavar="NAME", help="write the results to benchmarks/results/NAME.md and .json")
    options = parser.parse_args()
    options.scale = QUICK if options.quick else Scale()
    if options.seconds:
        options.scale = Scale(**vars(options.scale) | {"seconds": options.seconds})
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.only = options.only.split(",") if options.only else [group for group in groups if group != ON_DEMAND]
    for unknown in set(options.only) - set(groups):
        parser.error(f"--only: {unknown} is none of {', '.join(groups)}")
    for pair in options.gateway:
        if not all(pair.partition("=")):
            parser.error(f"--gateway: {pair} is not NAME=PATH")
    options.gateways = {GATEWAY: str(ROOT)} | dict(pair.split("=", 1) for pair in options.gateway)
    known = [*options.gateways, *PEERS, DIRECT]
    options.relays = options.relays.split(",") if options.relays else known
    for unknown in set(options.relays) - set(known):
        parser.error(f"--relays: {unknown} is none of {', '.join(known)}")
    options.save = RESULTS / (options.save or f"run-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}")
    return options


@dataclass
class Certificates:
    """The broker's certificates: the one that is right, and others that no relay may accept."""

    ca_file: Path
    chain: dict[str, Path] = field(default_factory=dict)
    key: dict[str, Path] = field(default_factory=dict)
    strangers = ("a certificate of another CA", "a certificate for another name")

    def __init__(self, directory: Path) -> None:
        ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca_file))
        self.chain, self.key = {}, {}
        other_ca, other_name = self.strangers
        self._write(directory, "right", ca.issue_cert(BROKER_NAME))
        self._write(directory, other_ca, trustme.CA().issue_cert(BROKER_NAME))
        self._write(directory, other_name, ca.issue_cert(f"not-{BROKER_NAME}"))

    def _write(self, directory: Path, name: str, certificate: trustme.LeafCert) -> None:
        self.chain[name], self.key[name] = directory / f"{name}.pem", directory / f"{name}.key"
        self.chain[name].write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(self.key[name]))


class Bench:
    """Runs measurements, each with a relay that was started for it."""

    def __init__(self, directory: Path) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise CannotMeasure("two cores are needed, one for the relay and one for the load")
        descriptor_limit()
        self._directory = directory
        self._load = Load(compile_load(directory), cores[0])
        self.relay_core = cores[-1]
        self._certificates = Certificates(directory)
        self._started = 0

    def verify(self, relay: Relay) -> None:
        """Raise `CannotMeasure` if the relay accepts a broker that it must not accept."""
        for stranger in Certificates.strangers:
            chain, key = self._certificates.chain[stranger], self._certificates.key[stranger]
            with self._running(relay) as (started, ports):
                try:
                    refuse_strangers(self._load, started, chain, key, **ports)
                except CannotMeasure as error:
                    raise CannotMeasure(f"{relay.name}: {error}\n{started.log()}") from None

    def measure(self, relay: Relay | None, measurement: Measurement) -> Counts:
        """Measure with a relay, or with none; what fails is returned as `failed`, with the reason."""
        try:
            if relay is None:
                port = free_ports(1)[0]
                return measure(measurement, self._load, None, device_port=port, broker_port=port)
            certificate = {"cert": self._certificates.chain["right"], "key": self._certificates.key["right"]}
            with self._running(relay) as (started, ports):
                try:
                    return measure(measurement, self._load, started, **ports, **certificate)
                except CannotMeasure as error:
                    raise CannotMeasure(f"{error}\n{started.log()}") from None
        except CannotMeasure as error:
            return {"failed": str(error)}

    @contextlib.contextmanager
    def _running(self, relay: Relay) -> Iterator[tuple[RunningRelay, dict[str, int]]]:
        self._started += 1
        directory = self._directory / f"{self._started}-{relay.name}"
        directory.mkdir()
        device_port, broker_port = free_ports(2)
        setting = Setting(directory, device_port, broker_port, self._certificates.ca_file)
        with running(relay, setting, self.relay_core) as started:
            yield started, {"device_port": device_port, "broker_port": broker_port}


def _run(options: argparse.Namespace) -> int:
    chosen = [measurement for measurement in measurements(options.scale) if measurement.group in options.only]
    relays, left_out = _find(options)
    about = _about(options, relays, left_out)
    rounds: list[Round] = []
    report = ""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="benchmarks-"))
        Path(directory).chmod(0o755)  # nginx's worker is not root
        bench = Bench(Path(directory))
        if options.shield:
            about["shielded from"] = stack.enter_context(shielded(bench.relay_core, kernel_threads()))
        for relay in filter(None, relays.values()):
            _progress(f"{relay.name} {relay.version}: does it verify the broker?")
            bench.verify(relay)
        for number in range(options.rounds):
            rounds.append({})
            for measurement in chosen:
                results = rounds[-1][measurement.name] = {}
                for name in _turned(list(relays), number):
                    if relays[name] is not None or measurement.with_direct:
                        _progress(f"round {number + 1} of {options.rounds}: {measurement.name}, {name}")
                        results[name] = bench.measure(relays[name], measurement)
            # Saved as it grows: an hour of measuring must not be lost to its last minute.
            bases = (GATEWAY,) if options.gateway else ()
            report = _report(about, rounds, render(chosen, list(relays), rounds, bases))
            _save(options.save, report, {"about": about, "rounds": rounds})
    _progress("")
    print(report)
    print(f"\nsaved as {_shown(options.save)}.md and .json", file=sys.stderr)
    return 1 if _failures(rounds) else 0


def _find(options: argparse.Namespace) -> tuple[dict[str, Relay | None], list[str]]:
    relays: dict[str, Relay | None] = {}
    left_out = []
    for name in options.relays:
        if name == DIRECT:
            relays[name] = None
        elif name in options.gateways:
            relays[name] = find_gateway(name, Path(options.gateways[name]).expanduser().absolute())
        else:
            try:
                relays[name] = find_peer(name)
            except CannotMeasure as error:
                left_out.append(str(error))
    return relays, left_out


def _turned(names: list[str], number: int) -> list[str]:
    """Each round begins with another relay, so that none is always the first after a pause."""
    start = number % len(names)
    return names[start:] + names[:start]


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _about(options: argparse.Namespace, relays: dict[str, Relay | None], left_out: Sequence[str]) -> dict[str, Any]:
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        "python": f"Python {platform.python_version()}, Twisted {importlib.metadata.version('twisted')}, "
        f"{backend.openssl_version_text()}",
        "relays": {name: relay.version for name, relay in relays.items() if relay is not None},
        "left out": left_out,
        "seconds": options.scale.seconds,
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "load average before": round(os.getloadavg()[0], 2),
    }


def _report(about: dict[str, Any], rounds: Sequence[Round], table: str) -> str:
    relays = ", ".join(f"{name} {version}" for name, version in about["relays"].items())
    ciphers = {counts["cipher"] for _, _, counts in _all(rounds) if "cipher" in counts} - {"none"}
    lines = [
        f"{about['when']}; {about['machine']}; {about['python']}.",
        f"Congestion control: {about['congestion control']}. Load average before: {about['load average before']}.",
        f"Relays: {relays}. TLS: {', '.join(sorted(ciphers))}.",
        f"Rounds: {len(rounds)}, of {about['seconds']:g} s for each measurement. Median (least..greatest).",
        *(f"Left out: {reason}" for reason in about["left out"]),
        *_shielded(about),
        "",
        table,
    ]
    failures = _failures(rounds)
    if failures:
        lines += ["", "Failed:", *failures]
    return "\n".join(lines)


def _shielded(about: dict[str, Any]) -> list[str]:
    if "shielded from" not in about:
        return []
    return [f"Kept off the relay's core: {about['shielded from']} threads of the kernel."]


def _all(rounds: Sequence[Round]) -> Iterator[tuple[str, str, Counts]]:
    for results in rounds:
        for measurement, relays in results.items():
            for name, counts in relays.items():
                yield measurement, name, counts


def _failures(rounds: Sequence[Round]) -> list[str]:
    return [
        f"{measurement}, {name}: {counts['failed']}" for measurement, name, counts in _all(rounds) if "failed" in counts
    ]


def _save(path: Path, report: str, everything: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"{path.name}.md").write_text(report + "\n")
    path.with_name(f"{path.name}.json").write_text(json.dumps(everything, indent=1) + "\n")


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
