"""How long an outage lasts for devices, and what a reconnect storm does to sessions that stand.

In: options (`python -m benchmarks.outage --help`).  Out: a line for each measurement, printed.  The gateway runs as
`twistd` on one core, broker and devices on another, all of it on loopback, with real TLS.  The broker is killed,
blackholed (a socket filter drops its packets; nothing is refused) or slow, and then comes back; devices do what simple
devices do: they come again a second or two after they were told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from benchmarks.blackhole import drop_packets, keep_packets
from benchmarks.load import CannotMeasure, start_on
from benchmarks.relays import BROKER_NAME, Relay, RunningRelay, Setting, descriptor_limit, free_ports, running

_CONNACK = b"\x20\x02\x00\x00"
_CORES = sorted(os.sched_getaffinity(0))
_GATEWAY_CORE, OTHER_CORE = _CORES[0], _CORES[-1]
_SLOW = 3.0  # seconds that a slow broker takes for CONNACK


# ---- the broker


class _Broker:
    """Accepts every CONNECT and acknowledges every PUBLISH; SIGUSR1 blackholes it, SIGUSR2 brings it back."""

    def __init__(self, slow: float) -> None:
        self._slow = slow
        self._sockets: set[socket.socket] = set()

    async def serve(self, port: int, chain: str, key: str) -> None:
        """Serve for ever."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key)
        server = await asyncio.start_server(self._session, "127.0.0.1", port, ssl=context, backlog=4096)
        listeners = [each._sock for each in server.sockets]  # noqa: SLF001  a filter wants the socket itself
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: [drop_packets(each) for each in (*listeners, *self._sockets)])
        loop.add_signal_handler(signal.SIGUSR2, lambda: [keep_packets(each) for each in (*listeners, *self._sockets)])
        async with server:
            await server.serve_forever()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = writer.get_extra_info("socket")._sock  # noqa: SLF001  see above
        self._sockets.add(own)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(2)
                body = await reader.readexactly(head[1])
                if head[0] >> 4 == 1:
                    if self._slow:
                        await asyncio.sleep(self._slow)
                    writer.write(_CONNACK)
                elif head[0] == 0x32:
                    writer.write(b"\x40\x02" + body[3:5])
        self._sockets.discard(own)
        writer.close()


# ---- devices


def _connect_packet(name: str) -> bytes:
    body = b"\0\4MQTT\4\2\0\x3c" + len(name).to_bytes(2, "big") + name.encode()
    return b"\x10" + bytes([len(body)]) + body


class _Device:
    """A simple device: connects, and comes again a second or two after it was told that it cannot, or was cut off."""

    def __init__(self, number: int, port: int) -> None:
        self._name = f"device-{number}"
        self._port = port
        self.served_at: float | None = None
        # When it was told (refused or cut off), and how long it had waited then.
        self.told: list[tuple[float, float]] = []
        self.round_trips: list[float] = []

    async def live(self, period: float = 0.0) -> None:
        """Connect again and again; publish every `period` seconds while connected."""
        while True:
            began = time.monotonic()
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(_connect_packet(self._name))
                if await reader.readexactly(4) == _CONNACK:
                    self.served_at = began = time.monotonic()
                    while period:
                        sent = time.monotonic()
                        writer.write(b"\x32\x06\0\1t\0\1x")
                        await reader.readexactly(4)
                        self.round_trips.append(time.monotonic() - sent)
                        await asyncio.sleep(period)
                    await reader.read()
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                if writer is not None:
                    writer.close()
            self.served_at = None
            now = time.monotonic()
            self.told.append((now, now - began))
            await asyncio.sleep(random.uniform(1, 2))  # noqa: S311  no secret


async def _until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait; return how many seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise CannotMeasure(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.005)
    return time.monotonic() - began


# ---- the bench


class Bench:
    """A gateway before a broker that can be hurt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port, self.broker_port = free_ports(2)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        certificate = ca.issue_cert(BROKER_NAME)
        certificate.cert_chain_pems[0].write_to_path(str(directory / "chain.pem"))
        certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
        self._broker: subprocess.Popen[bytes] | None = None

    def start_broker(self, slow: float = 0.0) -> None:
        """Start the broker, and wait until it listens."""
        chain, key = self._directory / "chain.pem", self._directory / "key.pem"
        command = [sys.executable, "-m", "benchmarks.outage", "--broker", str(self.broker_port), chain, key, str(slow)]
        self._broker = subprocess.Popen(command, preexec_fn=lambda: start_on(OTHER_CORE))
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.broker_port)) == 0:
                    return
            if time.monotonic() > deadline:
                raise CannotMeasure("the broker does not start")
            time.sleep(0.01)

    def hurt(self, how: signal.Signals) -> None:
        """Send the broker a signal."""
        assert self._broker is not None  # noqa: S101  it was started; narrows the type
        self._broker.send_signal(how)
        if how is signal.SIGKILL:
            self._broker.wait()

    def stop(self) -> None:
        """Stop the broker."""
        if self._broker is not None:
            self._broker.kill()
            self._broker.wait()

    @contextlib.contextmanager
    def gateway(self, sections: str) -> Iterator[RunningRelay]:
        """Run a gateway with further sections of configuration."""

        def command(setting: Setting) -> list[str]:
            path = setting.directory / "gateway.toml"
            path.write_text(
                f'[[upstream]]\nhost = "127.0.0.1"\nport = {self.broker_port}\nserver_name = "{BROKER_NAME}"\n'
                f'[[listen]]\nendpoint = "127.0.0.1:{self.port}"\n[tls]\nca_file = "{setting.ca_file}"\n{sections}'
            )
            twistd = str(Path(sys.executable).with_name("twistd"))
            return [twistd, "--nodaemon", "--pidfile=", "mqtts-gateway", "--config", str(path)]

        setting = Setting(self._directory, self.port, self.broker_port, self._directory / "ca.pem")
        with running(Relay("gateway", "this", command), setting, _GATEWAY_CORE) as gateway:
            yield gateway


class Fleet:
    """Devices that run until they are dismissed."""

    def __init__(self, count: int, port: int, period: float = 0.0) -> None:
        self.devices = [_Device(number, port) for number in range(count)]
        self._tasks = [asyncio.create_task(device.live(period)) for device in self.devices]

    @property
    def served(self) -> int:
        """How many are connected to the broker."""
        return sum(device.served_at is not None for device in self.devices)

    @property
    def told(self) -> list[tuple[float, float]]:
        """When they were told, and how long each had waited."""
        return [each for device in self.devices for each in device.told]

    async def all_served(self, seconds: float) -> float:
        """Wait until all are connected; return how many seconds that took."""
        return await _until(lambda: self.served == len(self.devices), seconds, f"{len(self.devices)} devices served")

    async def dismiss(self) -> None:
        """End them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _storm(bench: Bench, storm: int, pacing: str) -> str:
    with bench.gateway(pacing):
        standing = Fleet(20, bench.port, 0.02)
        await standing.all_served(30)
        await asyncio.sleep(2)
        for device in standing.devices:
            device.round_trips.clear()
        fleet = Fleet(storm, bench.port)
        seconds = await fleet.all_served(300)
        trips = sorted(trip for device in standing.devices for trip in device.round_trips)
        refused = len(fleet.told)
        await fleet.dismiss()
        await standing.dismiss()
    p50, p99 = trips[len(trips) // 2], trips[len(trips) * 99 // 100]
    return (
        f"{len(trips)} round trips of 20 standing sessions: p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.0f} ms, longest "
        f"{trips[-1] * 1e3:.0f} ms; {refused} times told to come again; all served after {seconds:.1f} s"
    )


async def _outage(bench: Bench, how: str, seconds: float) -> str:
    """Hurt the broker for a while; return who was told when, and when all were served again."""
    with bench.gateway(""):
        fleet = Fleet(100, bench.port, 1.0)
        await fleet.all_served(60)
        newcomers: Fleet | None = None
        began = time.monotonic()
        bench.hurt(signal.SIGKILL if how == "killed" else signal.SIGUSR1)
        if how == "blackholed":
            # Those that stand learn of it late; devices that come meanwhile are told earlier.
            newcomers = Fleet(100, bench.port)
        await asyncio.sleep(seconds)
        standing = [at - began for device in fleet.devices for at, _ in device.told[:1]]
        waited = [
            waited for device in (newcomers or fleet).devices for _, waited in device.told[0 if newcomers else 1 :]
        ]
        back = time.monotonic()
        if how == "killed":
            bench.start_broker()
        else:
            bench.hurt(signal.SIGUSR2)
        again = await fleet.all_served(120)
        if newcomers is not None:
            await newcomers.dismiss()
        await fleet.dismiss()
    if not standing or not waited:
        raise CannotMeasure(f"{how} for {seconds:g} s: too short for anybody to come")
    told = f"all told within {max(standing):.1f} s" if len(standing) == len(fleet.devices) else "not told yet"
    return (
        f"{how} for {back - began:.0f} s: 100 sessions that stood {told}; those that came then waited "
        f"{statistics.median(waited):.3f} s (median of {len(waited)}), {max(waited):.1f} s at most, to be told; back: "
        f"all served within {again:.1f} s"
    )


async def _slow(bench: Bench) -> str:
    bench.stop()
    bench.start_broker(slow=_SLOW)
    with bench.gateway(""):
        fleet = Fleet(100, bench.port)
        seconds = await fleet.all_served(60)
        told = len(fleet.told)
        await fleet.dismiss()
    bench.stop()
    bench.start_broker()
    return f"slow, CONNACK after {_SLOW:.0f} s: 100 devices served within {seconds:.1f} s, {told} told to come again"


async def _run(options: argparse.Namespace) -> None:
    descriptor_limit()
    with TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        bench.start_broker()
        try:
            if "storm" in options.only:
                for pacing in options.pacing:
                    words = f"storm of {options.storm}, pacing {pacing:g}/s"
                    section = f"[pacing]\nnew_sessions_per_second = {pacing}\n"
                    print(f"{words}: {await _storm(bench, options.storm, section)}", flush=True)
            if "killed" in options.only:
                print(await _outage(bench, "killed", options.seconds), flush=True)
            if "blackholed" in options.only:
                print(await _outage(bench, "blackholed", max(options.seconds, 75.0)), flush=True)
            if "slow" in options.only:
                print(await _slow(bench), flush=True)
        finally:
            bench.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description="How long an outage lasts.")
    parser.add_argument("--only", default="storm,killed,blackholed,slow", help="which, with commas between")
    parser.add_argument("--storm", type=int, default=3000, help="devices of the storm")
    parser.add_argument("--pacing", default="0,100", help="new sessions per second in the storms, with commas between")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the outage lasts")
    parser.add_argument("--broker", nargs=4, metavar=("PORT", "CHAIN", "KEY", "SLOW"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.broker:
        port, chain, key, slow = options.broker
        asyncio.run(_Broker(float(slow)).serve(int(port), chain, key))
        return 0
    options.pacing = [float(each) for each in options.pacing.split(",")]
    os.sched_setaffinity(0, {OTHER_CORE})
    try:
        asyncio.run(_run(options))
    except CannotMeasure as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
