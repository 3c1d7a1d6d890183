"""What is measured, and what is made of the counts.

In: a running relay and the load generator.  Out: counts, and the figures that stand in the table.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import CannotMeasure, Load
from benchmarks.relays import RunningRelay

Counts = dict[str, Any]

# The relay that stands for none: devices talk to the broker itself, without TLS.
DIRECT = "direct"
# Against whom CPU and memory are shown as ratios.
NGINX = ("nginx",)
BOTH = ("nginx", "stunnel")
_STRACE_BEGINS = 1.0  # seconds


@dataclass(frozen=True)
class Figure:
    """One row of the table: what is made of the counts of a relay and of those without a relay.

    `of` raises `LookupError` or `ZeroDivisionError` where there is no such figure.
    """

    label: str
    unit: str
    of: Callable[[Counts, Counts], float]
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Work for the load generator, and the figures that come of it."""

    name: str
    group: str
    title: str
    mode: str
    arguments: dict[str, object] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    with_direct: bool = True


def measure(measurement: Measurement, load: Load, relay: RunningRelay | None, **arguments: object) -> Counts:
    """Do the work once, with `relay` in between or with none, and return the counts.  Raises `CannotMeasure`."""
    pids = relay.pids if relay is not None else []
    everything = measurement.arguments | arguments
    if relay is not None and measurement.group == "memory":
        return _measure_memory(load, relay, everything)
    if relay is not None and measurement.group == "syscalls":
        return _count_system_calls(measurement, load, relay, everything)
    return load.run(measurement.mode, pids, **everything)


def _measure_memory(load: Load, relay: RunningRelay, arguments: dict[str, object]) -> Counts:
    # What is made at the first session, once for all, is not counted as that of each.
    load.run("idle", [], established=lambda: None, **arguments | {"sessions": 10})
    time.sleep(0.5)
    before = relay.memory()
    after: list[dict[str, float]] = []

    def look() -> None:
        time.sleep(0.5)
        after.append(relay.memory())

    load.run("idle", [], established=look, **arguments)
    return {"sessions": arguments["sessions"], "idle": before, "full": after[0]}


def _count_system_calls(
    measurement: Measurement, load: Load, relay: RunningRelay, arguments: dict[str, object]
) -> Counts:
    strace = shutil.which("strace")
    if strace is None:
        raise CannotMeasure("strace is not installed: apt install strace")
    command = [strace, "-f", "-c", "-U", "calls,name"]
    for pid in relay.pids:
        command += ["-p", str(pid)]
    tracers: list[subprocess.Popen[str]] = []
    report: list[str] = []

    def begin() -> None:
        tracers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        time.sleep(_STRACE_BEGINS)

    def end() -> None:
        tracers[0].send_signal(signal.SIGINT)
        report.append(tracers[0].communicate()[1])

    counts = load.run(measurement.mode, relay.pids, established=begin, finished=end, **arguments | {"warmup": 0})
    calls = {name: int(count) for count, name in re.findall(r"^ *(\d+) +(\w+)$", report[0], re.MULTILINE)}
    calls.pop("total", None)
    return counts | {"calls": calls}


# ---- figures


def _cpu(scale: float, unit: str, what: str, against: tuple[str, ...] = NGINX) -> Figure:
    return Figure(f"CPU per {what}", unit, lambda own, _: own["relay_cpu"] / own["units"] * scale, against)


def _rate(unit: str, scale: float = 1.0) -> Figure:
    return Figure("throughput", unit, lambda own, _: own["units"] / own["elapsed"] / scale)


def _latency(label: str, key: str, unit: str = "ms", scale: float = 1e3) -> Figure:
    return Figure(label, unit, lambda own, _: own[key] * scale)


def _added(label: str, key: str) -> Figure:
    def added(own: Counts, direct: Counts) -> float:
        if own is direct:
            raise LookupError
        return float(own[key] - direct[key]) * 1e6

    return Figure(f"added {label}", "µs", added, NGINX)


_BUSY = (
    Figure("relay's core busy", "%", lambda own, _: 100 * own["relay_cpu"] / own["elapsed"]),
    Figure("load's core busy", "%", lambda own, _: 100 * own["load_cpu"] / own["elapsed"]),
)


def _megabytes(own: Counts) -> float:
    return float(own["bytes"]) / 1e6


_BULK = (
    Figure("CPU per MB", "µs", lambda own, _: own["relay_cpu"] / _megabytes(own) * 1e6, NGINX),
    Figure("throughput", "MB/s", lambda own, _: _megabytes(own) / own["elapsed"]),
    *_BUSY,
)


def _memory(own: Counts) -> float:
    return float(own["full"]["pss"] - own["idle"]["pss"]) / float(own["sessions"])


@dataclass(frozen=True)
class Scale:
    """How much work: for figures to keep, or for a look."""

    seconds: float = 3.0
    warmup: float = 0.5
    paced_sessions: int = 2000
    paced_rate: int = 5000
    setup_rate: int = 100
    many: int = 3000


def measurements(scale: Scale) -> list[Measurement]:
    """Return everything that can be measured."""
    timed = {"seconds": scale.seconds, "warmup": scale.warmup}
    ways = {"up": "device → broker", "down": "broker → device"}
    found = [
        Measurement(
            "roundtrip",
            "roundtrip",
            "round trips: 100 sessions, one QoS 1 PUBLISH of 64 bytes in flight each",
            "roundtrip",
            timed | {"sessions": 100, "payload": 64},
            (
                _cpu(1e6, "µs", "round trip", BOTH),
                _rate("1/s"),
                _latency("p50", "p50"),
                _latency("p99", "p99"),
                *_BUSY,
            ),
        )
    ]
    found += [
        Measurement(
            f"pipelined-{way}",
            "pipelined",
            f"pipelined: 8 sessions, QoS 0, 64 bytes, {arrow}",
            way,
            timed | {"sessions": 8, "payload": 64},
            (_cpu(1e6, "µs", "packet"), _rate("million packets/s", 1e6), *_BUSY),
        )
        for way, arrow in ways.items()
    ]
    found += [
        Measurement(
            f"bulk-{size}-{way}",
            "bulk",
            f"bulk: 8 sessions, QoS 0, {size.replace('k', ' kB').replace('M', ' MB')}, {arrow}",
            way,
            timed | {"sessions": 8, "payload": payload},
            _BULK,
        )
        for size, payload in (("16k", 16 * 1024), ("1M", 1024 * 1024))
        for way, arrow in ways.items()
    ]
    found += [
        Measurement(
            "paced",
            "paced",
            f"paced: {scale.paced_sessions} sessions, {scale.paced_rate} QoS 1 messages/s of 64 bytes in all",
            "paced",
            # Until nearly all sessions have sent something: the first message costs the gateway more.
            timed
            | {"sessions": scale.paced_sessions, "rate": scale.paced_rate, "payload": 64, "warmup": 4 * scale.warmup},
            (
                Figure("CPU", "% of a core", lambda own, _: 100 * own["relay_cpu"] / own["elapsed"], NGINX),
                *(
                    _latency(f"{label}, PUBLISH to PUBACK", key, "µs", 1e6)
                    for label, key in (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"))
                ),
                _added("p50", "p50"),
                _added("p99", "p99"),
                _added("p99.9", "p999"),
            ),
        ),
        Measurement(
            "setup",
            "setup",
            "session set-up: 50 at a time, connect, CONNECT, CONNACK, DISCONNECT, close",
            "setup",
            timed | {"sessions": 50},
            (
                _cpu(1e3, "ms", "session", BOTH),
                _rate("sessions/s"),
                _latency("p99 to CONNACK", "p99"),
                Figure("TLS sessions resumed", "%", lambda own, _: 100 * own["resumed"] / own["handshakes"]),
                *_BUSY,
            ),
        ),
        Measurement(
            "setup-paced",
            "setup",
            f"session set-up: {scale.setup_rate} sessions/s in all, otherwise the same",
            "setup",
            timed | {"sessions": 20, "rate": scale.setup_rate},
            (_cpu(1e3, "ms", "session", BOTH), _rate("sessions/s"), _latency("p99 to CONNACK", "p99")),
            with_direct=False,
        ),
        Measurement(
            "storm",
            "storm",
            f"reconnect storm: {scale.many} sessions are reset and come back at once",
            "storm",
            {"sessions": scale.many},
            (
                Figure("until all have CONNACK", "s", lambda own, _: own["max"], BOTH),
                Figure("until half have", "s", lambda own, _: own["p50"]),
                Figure("failures", "", lambda own, _: own["failures"]),
                _cpu(1e3, "ms", "session", BOTH),
            ),
        ),
        Measurement(
            "memory",
            "memory",
            f"memory: {scale.many} idle sessions",
            "idle",
            {"sessions": scale.many},
            (
                Figure("per idle session (PSS)", "KiB", lambda own, _: _memory(own), NGINX),
                Figure("without a session (PSS)", "MiB", lambda own, _: own["idle"]["pss"] / 1024),
                Figure("without a session (RSS)", "MiB", lambda own, _: own["idle"]["rss"] / 1024),
            ),
            with_direct=False,
        ),
        Measurement(
            "syscalls",
            "syscalls",
            "system calls per round trip, as above, under strace",
            "roundtrip",
            timed | {"sessions": 100, "payload": 64},
            (Figure("all", "calls", lambda own, _: sum(own["calls"].values()) / own["units"], NGINX),),
            with_direct=False,
        ),
    ]
    return found


def system_call_figures(rounds: list[dict[str, Counts]]) -> tuple[Figure, ...]:
    """Return a figure for each system call that any relay makes, most frequent first."""
    most: dict[str, float] = {}
    for results in rounds:
        for counts in results.values():
            for name, calls in counts.get("calls", {}).items():
                most[name] = max(most.get(name, 0), calls / counts["units"])
    names = sorted((name for name in most if most[name] >= 0.01), key=lambda name: -most[name])

    def figure(name: str) -> Figure:
        return Figure(name, "calls", lambda own, _: own["calls"].get(name, 0) / own["units"])

    return tuple(figure(name) for name in names)


def refuse_strangers(load: Load, relay: RunningRelay, certificate: Path, key: Path, **ports: int) -> None:
    """Raise `CannotMeasure` if a session comes about with a broker whose certificate must not be accepted."""
    counts = load.run("setup", relay.pids, sessions=1, warmup=0, seconds=0.5, cert=certificate, key=key, **ports)
    if counts["units"]:
        raise CannotMeasure(f"it accepts a broker with {certificate.stem}")
    if not counts["attempts"]:
        raise CannotMeasure("it does not connect to the broker")
