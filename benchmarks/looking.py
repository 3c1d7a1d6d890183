"""What looking at the status endpoint costs the relay.

In: options (`python -m benchmarks.looking --help`).  Out: round trips of established sessions while nobody looks, and
while others ask for pages, send hostile requests, or connect and leave as fast as they can.  The gateway has one core;
broker, devices and lookers share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import CannotMeasure
from benchmarks.outage import OTHER_CORE, Bench, Fleet
from benchmarks.relays import descriptor_limit, free_ports

_HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def _pages(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_HEAD + b"\r\n")
    await reader.read()
    writer.close()


async def _chunks(port: int) -> None:
    """Send a body of one-byte chunks, as much as is taken."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            writer.write(b"1\r\nx\r\n" * 2000)
            await writer.drain()
    writer.close()


async def _bytes(port: int) -> None:
    """Send headers byte by byte, each in a segment of its own."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    own: socket.socket = writer.get_extra_info("socket")
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    writer.write(_HEAD)
    with contextlib.suppress(OSError):
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0)
    writer.close()


async def _headers(port: int) -> None:
    """Send a header that is not ASCII."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_HEAD + b"Accept: \xff\r\n\r\n")
    await reader.read()
    writer.close()


async def _connects(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


_KINDS: dict[str, tuple[int, Callable[[int], Awaitable[None]]]] = {
    "pages": (4, _pages),
    "chunks": (30, _chunks),
    "bytes": (30, _bytes),
    "headers": (4, _headers),
    "connects": (4, _connects),
}


async def _look(kind: str, port: int) -> None:
    count, once = _KINDS[kind]

    async def forever() -> None:
        while True:
            with contextlib.suppress(OSError):
                await once(port)

    await asyncio.gather(*(forever() for _ in range(count)))


async def _measure(bench: Bench, kind: str, sessions: int, idle: int, seconds: float) -> str:
    (port,) = free_ports(1)
    with bench.gateway(f'[status]\nendpoint = "127.0.0.1:{port}"\n[pacing]\nnew_sessions_per_second = 0\n') as gateway:
        fleet, resting = Fleet(sessions, bench.port, 0.02), Fleet(idle, bench.port)
        await fleet.all_served(60)
        await resting.all_served(120)
        await asyncio.sleep(2)
        for device in fleet.devices:
            device.round_trips.clear()
        lookers: subprocess.Popen[bytes] | None = None
        if kind != "nobody":
            # The load's core is theirs, too; what devices wait for is to be the relay.
            command = [sys.executable, "-m", "benchmarks.looking", "--look", kind, str(port)]
            lookers = subprocess.Popen(command, preexec_fn=lambda: os.nice(19))
        clock = _cpu_clock(gateway.pids[0])
        before = time.clock_gettime(clock)
        await asyncio.sleep(seconds)
        share = (time.clock_gettime(clock) - before) / seconds
        if lookers is not None:
            lookers.kill()
            lookers.wait()
        trips = sorted(trip for device in fleet.devices for trip in device.round_trips)
        await fleet.dismiss()
        await resting.dismiss()
    p50, p99 = trips[len(trips) // 2], trips[len(trips) * 99 // 100]
    return (
        f"p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms, longest {trips[-1] * 1e3:.1f} ms ({len(trips)} round trips); "
        f"the gateway used {share:.1%} of its core"
    )


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, as clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


async def _run(options: argparse.Namespace) -> None:
    descriptor_limit()
    with TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        bench.start_broker()
        try:
            for kind in options.only.split(","):
                print(f"{kind}: {await _measure(bench, kind, 20, options.idle, options.seconds)}", flush=True)
        finally:
            bench.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.looking", description="What looking costs the relay.")
    parser.add_argument("--only", default=",".join(["nobody", *_KINDS, "nobody"]), help="which, with commas between")
    parser.add_argument("--idle", type=int, default=500, help="sessions that only rest")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each is measured")
    parser.add_argument("--look", nargs=2, metavar=("KIND", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {OTHER_CORE})
    try:
        asyncio.run(_look(options.look[0], int(options.look[1])) if options.look else _run(options))
    except CannotMeasure as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
