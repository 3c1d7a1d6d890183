"""Three thousand sessions at once, before a real TLS broker in a process of its own; and what one of them costs."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from gateway.errors import EndReason
from gateway.session.session import State
from tests import mqtt_packets as packets
from tests.harness import PATIENCE, Device, RunningGateway, ServerTLS, eventually, open_descriptors
from tests.tls_broker import DISCONNECT, PUBLISH, answer_to, publish_fields, read_packet

ROOT = Path(__file__).resolve().parent.parent
MANY = 3000
# Seconds for thousands of handshakes on a busy machine: it bounds a hang, it measures nothing.
LONG = 10 * PATIENCE
MESSAGES = 3
# What they must say for the broker to be the right one.
VERIFIED_AS = "DNS:localhost"


class BrokerProcess:
    """The broker of `tests/tls_broker.py`."""

    def __init__(self, directory: Path, tls: ServerTLS) -> None:
        chain, key = directory / "chain.pem", directory / "key.pem"
        chain.write_bytes(tls.chain_pem)
        key.write_bytes(tls.key_pem)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tls_broker", str(chain), str(key)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self.port = int(output.readline())

    def kill(self) -> None:
        """Have it go away as a machine does that loses power, as far as a process can."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def broker(tmp_path: Path, server_tls: ServerTLS) -> Iterator[BrokerProcess]:
    """Return a broker that is gone after the test."""
    broker = BrokerProcess(tmp_path, server_tls)
    yield broker
    broker.kill()


@define
class ManyDevice:
    """A device: its number, its version of MQTT, its connection, and what it was told at the end."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    last: list[tuple[int, bytes]] = field(factory=list)

    @property
    def version(self) -> int:
        """Every other one speaks 5.0."""
        return 4 + self.number % 2

    @property
    def client_identifier(self) -> str:
        """No two have the same."""
        return f"device-{self.number}"

    @classmethod
    async def connect(cls, number: int, port: int) -> ManyDevice:
        """Connect, and have a session."""
        device = cls(number, *await asyncio.open_connection("127.0.0.1", port))
        device.writer.write(packets.connect(device.client_identifier, version=device.version))
        expected = packets.connack(version=device.version)
        assert await device.reader.readexactly(len(expected)) == expected
        return device

    async def converse(self) -> None:
        """Send messages; the answer to each must be this device's own."""
        for message in range(MESSAGES):
            payload = f"{self.number}/{message} ".encode() * 50
            topic = f"t/{self.number}/{message}"
            self.writer.write(packets.publish(topic, payload, version=self.version))
            type_, body = await read_packet(self.reader)
            answer = answer_to(self.client_identifier.encode(), payload)
            assert (type_, publish_fields(body, self.version)) == (PUBLISH, (topic.encode(), answer))

    async def listen(self) -> None:
        """Read until the gateway closes."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                self.last.append(await read_packet(self.reader))
        self.writer.close()


async def together(work: list[Any]) -> list[Any]:
    """Do everything at the same time, but not for ever."""
    return await asyncio.wait_for(asyncio.gather(*work), LONG)


@pytest.mark.slow
def test_three_thousand_sessions_at_once(broker: BrokerProcess, start_gateway: Callable[..., RunningGateway]) -> None:
    """Each is verified, each gets its own answers, each is told when the broker goes away, and nothing stays behind."""
    # All come at the same moment, and the last waits until all the others have had their handshakes.
    timeouts = dict.fromkeys(("connect_packet", "tcp", "tls", "connack"), LONG)
    gateway = start_gateway(upstream=broker.port, pacing={"new_sessions_per_second": 0}, timeouts=timeouts)
    listening = open_descriptors()

    with Device(gateway.port) as device:
        # It leaves a ticket: all the others would otherwise begin before the first of them has one.
        device.send(packets.connect() + packets.disconnect())
        device.read_to_end()
    gateway.wait_empty()
    gateway.journal.started.clear()
    gateway.journal.ended.clear()

    async def work() -> list[ManyDevice]:
        devices: list[ManyDevice] = await together([ManyDevice.connect(number, gateway.port) for number in range(MANY)])
        assert len(gateway.service.gateway.sessions) == MANY
        await together([device.converse() for device in devices])
        listening = [asyncio.ensure_future(device.listen()) for device in devices]
        broker.kill()
        await together(listening)
        return devices

    devices = asyncio.run(work())

    started = gateway.journal.started
    assert {record.client_identifier for record in started} == {device.client_identifier for device in devices}
    assert len(started) == MANY
    assert {record.peer.matched_san for record in started if record.peer is not None} == {VERIFIED_AS}
    resumed = [record for record in started if record.peer is not None and record.peer.resumed]
    assert len(resumed) > MANY / 2

    for device in devices:
        # 3.1.1 has no word for it; 5.0 has DISCONNECT 0x80 with a Reason String.
        assert [type_ for type_, _ in device.last] == ([DISCONNECT] if device.version == 5 else [])
        assert all(body[0] == 0x80 for _, body in device.last)
    eventually(lambda: len(gateway.ended) == MANY, "all have ended")
    assert {record.reason for record in gateway.ended} == {EndReason.UPSTREAM_LOST}
    assert {(record.packets_up, record.packets_down) for record in gateway.ended} == {(1 + MESSAGES, 1 + MESSAGES)}
    gateway.wait_empty()
    eventually(lambda: open_descriptors() == listening, lambda: f"{listening} descriptors, not {open_descriptors()}")


# Objects of the garbage collector that a relaying session may have: sides, transports, TLS, framers, records.
OBJECTS_PER_SESSION = 45
FEW = 50


def test_a_session_that_stands_keeps_no_closure_and_no_timer(
    broker: BrokerProcess, start_gateway: Callable[..., RunningGateway], reactor: Any
) -> None:
    """Memory is what many sessions cost: nothing of their opening stays, and there is one sweep for all deadlines."""
    gateway = start_gateway(upstream=broker.port, pacing={"new_sessions_per_second": 0})

    def counted() -> Counter[type]:
        def look() -> Counter[type]:
            gc.collect()
            return Counter(map(type, gc.get_objects()))

        counts: Counter[type] = gateway.call(look)
        return counts

    def open_few() -> list[Device]:
        devices = [Device(gateway.port) for _ in range(FEW)]
        for number, device in enumerate(devices):
            device.send(packets.connect(f"{number}"))
        for device in devices:
            assert device.read(4) == packets.connack()
        return devices

    # What comes into being with the first sessions, once for all, is not theirs.
    devices = open_few()
    before = counted()
    devices += open_few()
    sessions = gateway.service.gateway.sessions
    eventually(lambda: {session.state for session in list(sessions)} == {State.RELAYING}, "all sessions stand")
    after = counted()
    timers = gateway.call(lambda: [call.func for call in reactor.getDelayedCalls() if call.active()])
    assert len(timers) < FEW, timers
    for device in devices:
        device.close()
    gateway.wait_empty()

    each = {kind: (after[kind] - before[kind]) / FEW for kind in after if kind is not Device}
    for kind in (types.FunctionType, types.CellType, types.CoroutineType):
        assert each.get(kind, 0) < 0.5, (kind, each[kind])
    assert sum(each.values()) <= OBJECTS_PER_SESSION, {
        kind.__qualname__: count for kind, count in each.items() if count
    }
