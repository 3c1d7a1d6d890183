"""What the store does in an outage: how fast it writes, what waits costs, how fast it drains, what others notice.

In: options (`python -m benchmarks.store --help`).  Out: a line for each figure, printed.  The gateway runs as `twistd`
on one core; broker and devices run on another, with real TLS.  Everything is on loopback, except for `blackhole`: there
the broker is in a network namespace of its own, and packets in both directions go to an Ethernet address that nobody
has, so they are dropped and nothing is refused.  `blackhole` must be run as root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from benchmarks.load import CannotMeasure, start_on
from benchmarks.relays import BROKER_NAME, Relay, RunningRelay, Setting, free_ports, running
from gateway.mqtt.message import Message
from gateway.store.database import Append, Database
from gateway.store.row import Row

_CORES = sorted(os.sched_getaffinity(0))
_GATEWAY_CORE, _OTHER_CORE = _CORES[0], _CORES[-1]
_TICKS = os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).resolve().parent.parent
_SIZE = 200  # bytes of payload
_PATIENCE = 120.0  # seconds
# Addresses of the two ends of the link that `blackhole` cuts, and an Ethernet address that nobody has.
_NEAR, _FAR, _NOBODY = "10.231.0.1", "10.231.0.2", "02:00:00:00:00:99"
_NAMESPACE, _NEAR_LINK, _FAR_LINK = "mqtts-gw-bench", "mqttsgw0", "mqttsgw1"


# ---- packets: 3.1.1, in the sizes that are sent here


def _connect_packet(name: str) -> bytes:
    body = b"\0\4MQTT\4\0\0\x3c" + len(name).to_bytes(2, "big") + name.encode()
    return b"\x10" + bytes([len(body)]) + body


def _publish(identifier: int, payload: bytes, qos: int = 1) -> bytes:
    body = b"\0\1t" + (identifier.to_bytes(2, "big") if qos else b"") + payload
    length = bytes([len(body)]) if len(body) < 128 else bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
    return bytes([0x30 | qos << 1]) + length + body


def _payload(device: int, number: int) -> bytes:
    return struct.pack("!HI", device, number).ljust(_SIZE, b".")


# ---- the broker


class _Session(asyncio.Protocol):
    """One connection: everything is accepted, and PUBLISH acknowledged after `delay` seconds."""

    def __init__(self, delay: float, counts: Counter[str], seen: Counter[bytes]) -> None:
        self._delay = delay
        self._counts = counts
        self._seen = seen
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember it."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  narrows the type
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer whole packets."""
        buffer = self._buffer + data
        at, answers = 0, []
        while len(buffer) - at >= 2:
            length, start = buffer[at + 1], at + 2
            if length & 0x80:
                if len(buffer) - at < 3:
                    break
                length, start = length & 0x7F | buffer[at + 2] << 7, at + 3
            if len(buffer) < start + length:
                break
            answers.append(self._answer(buffer[at], buffer[start : start + length]))
            at = start + length
        self._buffer = buffer[at:]
        answer = b"".join(answers)
        if answer and self._delay and answer[0] == 0x40:
            asyncio.get_running_loop().call_later(self._delay, self._transport.write, answer)
        elif answer:
            self._transport.write(answer)

    def _answer(self, first: int, body: bytes) -> bytes:
        if first >> 4 == 1:
            self._counts["connections"] += 1
            return b"\x20\2\0\0"
        if first == 0xC0:
            return b"\xd0\0"
        if first >> 4 != 3:
            return b""
        qos = first >> 1 & 3
        size = 2 + int.from_bytes(body[:2], "big")
        key = body[size + 2 * (qos > 0) :][:6]
        self._counts["messages"] += 1
        self._seen[key] += 1
        self._counts["twice"] += self._seen[key] > 1
        return b"\x40\2" + body[size : size + 2] if qos else b""


async def _serve(address: str, port: int, directory: Path, delay: float) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
    counts: Counter[str] = Counter()
    seen: Counter[bytes] = Counter()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Session(delay, counts, seen), address, port, ssl=context, backlog=4096
    )
    async with server:
        while True:
            path = directory / "counts.new"
            path.write_text(json.dumps({"messages": 0, "twice": 0, "connections": 0, "up": 1} | counts))
            path.replace(directory / "counts")
            await asyncio.sleep(0.1)


# ---- the bench


class Bench:
    """A gateway with a store, and a broker that comes and goes."""

    def __init__(self, directory: Path, *, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        self.directory = directory
        self.address = address
        self._inside = inside
        self.port, self.broker_port = free_ports(2)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        certificate = ca.issue_cert(BROKER_NAME)
        certificate.cert_chain_pems[0].write_to_path(str(directory / "chain.pem"))
        certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
        self._broker: subprocess.Popen[bytes] | None = None

    def start_broker(self, delay: float = 0.0) -> None:
        """Start the broker, and wait until it listens."""
        (self.directory / "counts").unlink(missing_ok=True)
        words = ["--broker", self.address, str(self.broker_port), str(self.directory), str(delay)]
        command = [*self._inside, sys.executable, "-m", "benchmarks.store", *words]
        self._broker = subprocess.Popen(command, cwd=_ROOT, preexec_fn=lambda: start_on(_OTHER_CORE))
        deadline = time.monotonic() + _PATIENCE
        while not (self.directory / "counts").exists():
            if time.monotonic() > deadline:
                raise CannotMeasure("the broker does not start")
            time.sleep(0.02)

    def counts(self) -> dict[str, int]:
        """Return what the broker has counted: connections, messages, and messages that it had already got."""
        found: dict[str, int] = json.loads((self.directory / "counts").read_text())
        return found

    def stop_broker(self) -> None:
        """Kill it."""
        if self._broker is not None:
            self._broker.kill()
            self._broker.wait()
            self._broker = None

    @contextlib.contextmanager
    def gateway(self, sections: str = "", environment: dict[str, str] | None = None) -> Iterator[RunningRelay]:
        """Run a gateway with further sections of configuration."""

        def command(setting: Setting) -> list[str]:
            path = setting.directory / "gateway.toml"
            path.write_text(
                f'[[upstream]]\nhost = "{self.address}"\nport = {self.broker_port}\nserver_name = "{BROKER_NAME}"\n'
                f'[[listen]]\nendpoint = "127.0.0.1:{self.port}"\n[tls]\nca_file = "{setting.ca_file}"\n'
                f'[devices]\nconnects_per_minute = 0\n[log]\nsessions = "failures"\n{sections}'
            )
            twistd = str(Path(sys.executable).with_name("twistd"))
            return [twistd, "--nodaemon", "--pidfile=", "mqtts-gateway", "--config", str(path)]

        setting = Setting(self.directory, self.port, self.broker_port, self.directory / "ca.pem")
        relay = Relay("gateway", "this", command, environment=environment or {})
        with running(relay, setting, _GATEWAY_CORE) as gateway:
            yield gateway

    def stored(self) -> str:
        """Return the sections that store for devices named `stored-…`."""
        return (
            f'[store]\ndirectory = "{self.directory / "store"}"\nmax_size = 2147483648\n'
            f"max_size_per_device = 2147483648\n[failover]\nretry_first = 0.2\nretry_max = 1\n"
            '[[device]]\nmatch_client_id = "stored-*"\nbound_to = "127.0.0.0/8"\nstore = true\n'
        )


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    with TemporaryDirectory(prefix="store-") as directory:
        bench = Bench(Path(directory))
        try:
            yield bench
        finally:
            bench.stop_broker()


def _cpu(gateway: RunningRelay) -> float:
    """Return the seconds that the gateway has computed, its threads included."""
    ticks = 0
    for pid in gateway.pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _tell(line: str) -> None:
    print(f"{line}  [load {os.getloadavg()[0]:.1f}]", flush=True)


def _p(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1e3 if values else 0.0


# ---- devices


class Device:
    """A device that keeps `window` messages on their way, or sends one every `period` seconds."""

    def __init__(self, number: int, port: int, *, name: str = "stored") -> None:
        self.number = number
        self._name = f"{name}-{number}"
        self._port = port
        self.sent = self.acknowledged = self.lost = 0
        self.waits: list[float] = []
        self._sent_at: dict[int, float] = {}
        self.stopping = False

    async def connect(self) -> None:
        """Connect, and wait for CONNACK."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(_connect_packet(self._name))
        answer = await asyncio.wait_for(self._reader.readexactly(4), _PATIENCE)
        if answer[3]:
            raise CannotMeasure(f"CONNACK {answer[3]}")

    def send(self, qos: int = 1) -> None:
        """Send the next message."""
        self.sent += 1
        identifier = (self.sent - 1) % 60_000 + 1
        self._writer.write(_publish(identifier, _payload(self.number, self.sent), qos))
        if qos:
            self._sent_at[identifier] = time.monotonic()

    async def read(self) -> None:
        """Take acknowledgements until the connection ends."""
        rest = b""
        with contextlib.suppress(OSError):
            while data := await self._reader.read(65536):
                rest += data
                now = time.monotonic()
                whole = len(rest) // 4 * 4
                for at in range(0, whole, 4):
                    if rest[at] == 0x40:
                        self.waits.append(now - self._sent_at.pop(int.from_bytes(rest[at + 2 : at + 4], "big")))
                        self.acknowledged += 1
                rest = rest[whole:]
                self.on_progress()
        self.lost += not self.stopping

    def on_progress(self) -> None:
        """Nothing more to do."""

    async def publish_every(self, period: float, qos: int = 1) -> None:
        """Publish until it is stopped."""
        await asyncio.sleep(random.uniform(0, period))  # noqa: S311  no secret
        while not self.stopping:
            self.send(qos)
            await asyncio.sleep(period)

    def leave(self) -> None:
        """Send DISCONNECT and close."""
        self.stopping = True
        self._writer.write(b"\xe0\0")
        self._writer.close()


class EagerDevice(Device):
    """It keeps forty messages on their way."""

    def on_progress(self) -> None:
        """Send as many as were acknowledged."""
        while not self.stopping and len(self._sent_at) < 40:
            self.send()


async def _until(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise CannotMeasure(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


# ---- measurements


async def _write(options: argparse.Namespace) -> None:
    """How many messages a second the store takes, and what each costs; then the same on a slow disk."""
    for delayed in (False, True):
        with _bench() as bench:
            environment = _slow_disk(bench.directory) if delayed else {}
            with bench.gateway(bench.stored(), environment) as gateway:
                devices = [EagerDevice(number, bench.port) for number in range(50)]
                for device in devices:
                    await device.connect()
                readers = [asyncio.ensure_future(device.read()) for device in devices]
                if delayed:
                    (bench.directory / "control").write_text("d")
                for device in devices:
                    device.on_progress()
                await asyncio.sleep(2)
                before, cpu = sum(device.acknowledged for device in devices), _cpu(gateway)
                began = time.monotonic()
                await asyncio.sleep(options.seconds)
                passed = time.monotonic() - began
                count = sum(device.acknowledged for device in devices) - before
                used = _cpu(gateway) - cpu
                waits = [wait for device in devices for wait in device.waits]
                for device in devices:
                    device.stopping = True
                words = "each fsync 30 ms longer" if delayed else "the disk as it is"
                _tell(
                    f"write, {words}: {count / passed:,.0f} messages of {_SIZE} bytes a second, "
                    f"{used / max(1, count) * 1e6:.0f} us CPU each; acknowledged after {_p(waits, 0.5):.0f} ms "
                    f"(p50), {_p(waits, 0.99):.0f} ms (p99)"
                )
                for device in devices:
                    device.leave()
                await asyncio.gather(*readers)


def _slow_disk(directory: Path) -> dict[str, str]:
    """Compile what delays each fsync by 30 ms; return the environment that preloads it."""
    shim = directory / "disk.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(_ROOT / "tests" / "faulty_disk.c"), "-ldl"], check=True
    )
    (directory / "control").write_text(" ")
    return {
        "LD_PRELOAD": str(shim),
        "FAULTY_DIRECTORY": str(directory / "store"),
        "FAULTY_CONTROL": str(directory / "control"),
    }


async def _live(port: int, seconds: float, names: Sequence[str] = ("live", "stored-live")) -> dict[str, list[float]]:
    """Return the round trips of sessions with and without store, each with 10 devices that send every 50 ms."""
    found = {}
    everybody: list[Device] = []
    tasks = []
    for at, name in enumerate(names):
        devices = [Device(60_000 + 100 * at + number, port, name=name) for number in range(10)]
        everybody += devices
        for device in devices:
            await device.connect()
            tasks += [asyncio.ensure_future(device.read()), asyncio.ensure_future(device.publish_every(0.05))]
        found[name] = devices
    await asyncio.sleep(2)
    for device in everybody:
        device.waits.clear()
    await asyncio.sleep(seconds)
    waits = {name: [wait for device in devices for wait in device.waits] for name, devices in found.items()}
    if any(device.lost for device in everybody):
        raise CannotMeasure("a live session was lost")
    for device in everybody:
        device.leave()
    await asyncio.gather(*tasks)
    return waits


async def _backlog(options: argparse.Namespace) -> None:
    """A large backlog: the start, memory, the drain, and what live sessions notice."""
    owners = 100
    with _bench() as bench:
        began = time.monotonic()
        with bench.gateway(bench.stored()) as gateway:
            listening_empty, computed_empty = time.monotonic() - began, _cpu(gateway)
            empty = gateway.memory()["rss"]
            devices = [Device(number, bench.port) for number in range(owners)]
            for device in devices:
                await device.connect()
                device.send()
                reading = asyncio.ensure_future(device.read())
                await _until(lambda device=device: device.acknowledged == 1, "PUBACK")
                device.leave()
                await reading
            bench.start_broker()
            await _until(lambda: bench.counts()["messages"] >= owners, "the first messages are delivered")
            quiet = await _live(bench.port, options.seconds)
            bench.stop_broker()
        _fill(bench.directory / "store", options.messages)
        began = time.monotonic()
        with bench.gateway(bench.stored()) as gateway:
            listening, computed = time.monotonic() - began, _cpu(gateway)
            await asyncio.sleep(options.scan)
            full = gateway.memory()["rss"]
            _tell(
                f"backlog of {options.messages:,}: the port is open {listening:.2f} s after the start of the process "
                f"({computed:.2f} s CPU; with an empty store {listening_empty:.2f} s, {computed_empty:.2f} s CPU); "
                f"{(full - empty) * 1024 / options.messages:.0f} bytes of memory for each message"
            )
            bench.start_broker()
            await _until(lambda: bench.counts()["messages"] > 0, "the drain has begun")
            await asyncio.sleep(3)
            before, cpu, since = bench.counts()["messages"], _cpu(gateway), time.monotonic()
            await asyncio.sleep(options.seconds)
            count, passed = bench.counts()["messages"] - before, time.monotonic() - since
            if not count:
                raise CannotMeasure(f"a backlog of {options.messages:,} is too small: it was delivered at once")
            _tell(
                f"drain: {count / passed:,.0f} messages a second, {(_cpu(gateway) - cpu) / count * 1e6:.0f} us CPU each"
            )
            draining = await _live(bench.port, options.seconds)
            for name, waits in quiet.items():
                during = draining[name]
                _tell(
                    f"round trips of {name}: {_p(waits, 0.5):.1f} ms (p50), {_p(waits, 0.99):.1f} ms (p99); "
                    f"during the drain {_p(during, 0.5):.1f} ms, {_p(during, 0.99):.1f} ms"
                )
            _tell(f"messages that came twice: {bench.counts()['twice']}")


def _fill(directory: Path, count: int) -> None:
    """Put messages into the store of a gateway that does not run, for all devices that it knows."""
    database = Database(directory)
    opened = database.open()
    numbers = [device.number for device in opened.devices if "live" not in device.name]
    stamp, last = int(time.time()), opened.last_number
    for first in range(0, count, 10_000):
        rows = (
            Row(
                last + 1 + number,
                numbers[number % len(numbers)],
                stamp,
                Message(b"t", _payload(50_000, number), 1, False, None, None),
            )
            for number in range(first, min(count, first + 10_000))
        )
        database.commit([Append(row, 0) for row in rows])
    database.close()


async def _slow(options: argparse.Namespace) -> None:
    """A healthy broker that acknowledges each PUBLISH after 8 s, which is longer than `store.after`."""
    with _bench() as bench:
        bench.start_broker(8.0)
        with bench.gateway(bench.stored()):
            devices = await _publish_for(bench, options.outage, 20)
            await _until(lambda: bench.counts()["messages"] >= sum(device.sent for device in devices), "all arrive")
            await asyncio.sleep(10)
            _tell_of("broker that acknowledges after 8 s", bench, devices)


async def _publish_for(
    bench: Bench, seconds: float, count: int, *, during: Callable[[], None] | None = None
) -> list[Device]:
    """Let devices publish QoS 1 every half second, `count` of them; `during` is called after 5 s."""
    devices = [Device(number, bench.port) for number in range(count)]
    for device in devices:
        await device.connect()
    readers = [asyncio.ensure_future(device.read()) for device in devices]
    senders = [asyncio.ensure_future(device.publish_every(0.5)) for device in devices]
    await asyncio.sleep(5)
    if during is not None:
        during()
    await asyncio.sleep(seconds)
    for sender in senders:
        sender.cancel()
    await _until(lambda: all(device.acknowledged == device.sent for device in devices), "all are acknowledged")
    del readers
    return devices


def _tell_of(what: str, bench: Bench, devices: Sequence[Device]) -> None:
    waits = [wait for device in devices for wait in device.waits]
    counts = bench.counts()
    sent = sum(device.sent for device in devices)
    _tell(
        f"{what}: {sent:,} QoS 1 messages sent, {sum(device.acknowledged for device in devices):,} acknowledged, the "
        f"last after {max(waits):.1f} s; {counts['messages'] - counts['twice']:,} arrived, {counts['twice']} of them "
        f"twice; {sum(device.lost for device in devices)} devices disconnected; {counts['connections']} connections to "
        f"the broker for {len(devices)} devices"
    )


async def _blackhole(options: argparse.Namespace) -> None:
    """Packets to and from the broker are dropped, longer than TCP waits; then the link works again."""
    with _link() as (inside, set_link), TemporaryDirectory(prefix="store-") as directory:
        bench = Bench(Path(directory), address=_FAR, inside=inside)
        try:
            bench.start_broker()
            with bench.gateway(bench.stored()):
                devices = await _publish_for(bench, options.outage, 20, during=lambda: set_link(False))
                set_link(True)
                began = time.monotonic()
                await _until(
                    lambda: bench.counts()["messages"] - bench.counts()["twice"] >= sum(each.sent for each in devices),
                    "all arrive",
                )
                took = time.monotonic() - began
                _tell_of(f"blackhole of {options.outage:.0f} s, all delivered {took:.1f} s after it", bench, devices)
        finally:
            bench.stop_broker()


@contextlib.contextmanager
def _link() -> Iterator[tuple[list[str], Callable[[bool], None]]]:
    """Make a namespace behind a link; yield the words that run a command in it, and what cuts and mends the link."""
    inside = ["ip", "netns", "exec", _NAMESPACE]

    def run(*words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    run("ip", "netns", "add", _NAMESPACE)
    try:
        run("ip", "link", "add", _NEAR_LINK, "type", "veth", "peer", "name", _FAR_LINK, "netns", _NAMESPACE)
        run("ip", "addr", "add", f"{_NEAR}/24", "dev", _NEAR_LINK)
        run("ip", "link", "set", _NEAR_LINK, "up")
        run(*inside, "ip", "addr", "add", f"{_FAR}/24", "dev", _FAR_LINK)
        run(*inside, "ip", "link", "set", _FAR_LINK, "up")
        near = json.loads(run("ip", "-j", "link", "show", _NEAR_LINK))[0]["address"]
        far = json.loads(run(*inside, "ip", "-j", "link", "show", _FAR_LINK))[0]["address"]

        def set_link(works: bool) -> None:
            to_far, to_near = (far, near) if works else (_NOBODY, _NOBODY)
            run("ip", "neigh", "replace", _FAR, "lladdr", to_far, "dev", _NEAR_LINK, "nud", "permanent")
            run(*inside, "ip", "neigh", "replace", _NEAR, "lladdr", to_near, "dev", _FAR_LINK, "nud", "permanent")

        set_link(True)
        yield inside, set_link
    finally:
        run("ip", "netns", "del", _NAMESPACE)


async def _unstored(options: argparse.Namespace) -> None:
    """What sessions without `store` cost, with and without a store for others: five rounds each, in turn."""
    costs: dict[bool, list[float]] = {False: [], True: []}
    for each in range(10):
        has_store = bool(each % 2)
        with _bench() as bench:
            bench.start_broker()
            with bench.gateway(bench.stored() if has_store else "") as gateway:
                devices = [EagerDevice(number, bench.port, name="plain") for number in range(20)]
                for device in devices:
                    await device.connect()
                readers = [asyncio.ensure_future(device.read()) for device in devices]
                for device in devices:
                    device.on_progress()
                await asyncio.sleep(1)
                before, cpu = sum(device.acknowledged for device in devices), _cpu(gateway)
                await asyncio.sleep(options.seconds / 2)
                count = sum(device.acknowledged for device in devices) - before
                costs[has_store].append((_cpu(gateway) - cpu) / count * 1e6)
                for device in devices:
                    device.leave()
                await asyncio.gather(*readers)
    without, with_store = costs[False], costs[True]
    _tell(
        f"QoS 1 messages of sessions without `store`: {statistics.median(without):.1f} us CPU each in a gateway "
        f"without a store, {statistics.median(with_store):.1f} us with one (medians of {len(without)} rounds, "
        f"{min(without):.1f} to {max(without):.1f} and {min(with_store):.1f} to {max(with_store):.1f})"
    )


_ALL = {"write": _write, "backlog": _backlog, "slow": _slow, "blackhole": _blackhole, "unstored": _unstored}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(_ALL), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=1_000_000, help="in the backlog (default: %(default)s)")
    parser.add_argument("--scan", type=float, default=30.0, help="seconds until it is found (default: %(default)s)")
    parser.add_argument("--outage", type=float, default=75.0, help="seconds of each outage (default: %(default)s)")
    parser.add_argument("--broker", nargs=4, metavar=("ADDRESS", "PORT", "DIRECTORY", "DELAY"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.broker:
        address, port, directory, delay = options.broker
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(address, int(port), Path(directory), float(delay)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.sched_setaffinity(0, {_OTHER_CORE})
    try:
        for name in options.only.split(","):
            asyncio.run(_ALL[name](options))
    except CannotMeasure as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
