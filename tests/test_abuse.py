"""Whoever abuses the gateway reaches nobody with it, and leaves nothing behind: on real sockets, both ways."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import EndReason
from tests import mqtt_packets as mqtt
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, eventually
from tests.leftovers import Leftovers

CONNACK = {4: mqtt.connack(), 5: mqtt.connack(version=5)}

HTTP = b"GET / HTTP/1.1\r\nHost: gateway\r\nUser-Agent: x\r\n\r\n"
CLIENT_HELLO = b"\x16\x03\x01\x00\xf1\x01\x00\x00\xed\x03\x03" + bytes(237)
NOISE = [random.Random(seed).randbytes(5000) for seed in range(5)]  # noqa: S311  not for secrets


@pytest.fixture
def broker(start_broker: Callable[..., Broker]) -> Broker:
    """A broker that accepts every session and records every byte."""
    return start_broker()


def hang_up(device: Device) -> bytes:
    """Read what the gateway still says, until it closes; then close."""
    device.socket.settimeout(20)
    answer = device.read_to_end()
    device.close()
    return answer


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (HTTP, EndReason.NOT_MQTT),
        (CLIENT_HELLO, EndReason.NOT_MQTT),
        *((noise, EndReason.NOT_MQTT) for noise in NOISE),
        (b"\x00" * 5000, EndReason.NOT_MQTT),
        (b"\xf0\x00", EndReason.NOT_MQTT),
        (b"\x11" + mqtt.connect()[1:], EndReason.MALFORMED_PACKET),
        (mqtt.publish() * 1000, EndReason.NOT_MQTT),
        (mqtt.connack(), EndReason.NOT_MQTT),
        (b"\x10\xff\xff\xff\xff\x01", EndReason.MALFORMED_PACKET),
        (b"\x10\xff\xff\xff\x7f" + bytes(1000), EndReason.PACKET_TOO_LARGE),
        (mqtt.connect(will_topic="t", will_payload=bytes(65_535)), EndReason.PACKET_TOO_LARGE),
        (mqtt.connect(extra=b"\x00"), EndReason.MALFORMED_PACKET),
    ],
)
def test_what_is_no_connect_reaches_no_broker(
    start_gateway: Callable[..., RunningGateway], broker: Broker, opening: bytes, reason: EndReason
) -> None:
    """It is closed without an answer, and nobody is dialled for it."""
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(opening)
        assert hang_up(device) == b""
    assert gateway.wait_ended().reason is reason
    assert broker.accepted == 0
    leftovers.check()


@pytest.mark.parametrize("opening", [b"", b"\x10", b"\x10\xff\xff", mqtt.connect()[:-1]])
def test_a_connect_that_never_ends_is_cut_off(
    start_gateway: Callable[..., RunningGateway], broker: Broker, opening: bytes
) -> None:
    """However much of it came."""
    gateway = start_gateway(upstream=broker.port, timeouts={"connect_packet": 0.5})
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(opening)
        assert hang_up(device) == b""
    assert gateway.wait_ended().reason is EndReason.CONNECT_TIMEOUT
    assert broker.accepted == 0
    leftovers.check()


def test_a_connect_that_trickles_in_is_cut_off(start_gateway: Callable[..., RunningGateway], broker: Broker) -> None:
    """A byte now and then does not buy time."""
    gateway = start_gateway(upstream=broker.port, timeouts={"connect_packet": 1})
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.socket.settimeout(0.05)
        for byte in mqtt.connect("x" * 1000):
            with contextlib.suppress(OSError):
                device.send(bytes([byte]))
            try:
                assert device.socket.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionResetError:
                pass
            break
        else:
            pytest.fail("the whole CONNECT was taken")
    assert gateway.wait_ended().reason is EndReason.CONNECT_TIMEOUT
    assert broker.accepted == 0
    leftovers.check()


def test_a_thousand_connections_that_say_nothing_end_by_themselves(
    start_gateway: Callable[..., RunningGateway], broker: Broker
) -> None:
    """They hold nothing for longer than the CONNECT timeout, and an honest device gets through among them."""
    gateway = start_gateway(upstream=broker.port, timeouts={"connect_packet": 2})
    leftovers = Leftovers(gateway)
    silent = [Device(gateway.port) for _ in range(1000)]
    with Device(gateway.port) as honest:
        honest.send(mqtt.connect() + mqtt.disconnect())
        assert honest.read(4) == mqtt.connack()
        hang_up(honest)
    for device in silent:
        assert hang_up(device) == b""
    gateway.wait_ended(1001)
    assert [record.reason for record in gateway.ended].count(EndReason.CONNECT_TIMEOUT) == 1000
    assert broker.accepted == 1
    leftovers.check()


def test_devices_that_all_come_back_at_once_find_the_door_open(
    start_gateway: Callable[..., RunningGateway], broker: Broker
) -> None:
    """The kernel keeps them until the gateway has time; whom it has no room for would wait a second to try again."""
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    all_there = threading.Event()
    gateway.reactor.callFromThread(all_there.wait, 20)
    devices = [Device(gateway.port) for _ in range(300)]
    assert not all_there.is_set()
    all_there.set()
    for device in devices:
        device.close()
    gateway.wait_ended(300)
    leftovers.check()


def relaying(gateway: RunningGateway, version: int = 4, largest: int | None = None, **connect: Any) -> Device:
    """A device that has its CONNACK, which says in 5.0 how large a packet may be if that is limited."""
    device = Device(gateway.port)
    device.send(mqtt.connect(version=version, **connect))
    connack = CONNACK[version]
    if version == 5 and largest is not None:
        connack = mqtt.connack(version=5, properties=mqtt.number(0x27, largest, size=4))
    assert device.read(len(connack)) == connack
    return device


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("abuse", "code"),
    [
        (mqtt.connect(version=5), 0x82),
        (mqtt.connack(), 0x82),
        (HTTP, 0x81),
        (CLIENT_HELLO, 0x82),
        (b"\x00\x00", 0x81),
        (b"\x37\x7f" + bytes(127), 0x81),
        (b"\xc8\x00", 0x81),
        (b"\x80\x02\x00\x01", 0x81),
        (b"\x30\xff\xff\xff\xff\x7f", 0x81),
        (b"\x30\xff\xff\xff\x7f" + bytes(1000), 0x95),
    ],
)
def test_what_breaks_the_rules_after_connack_reaches_no_broker(
    start_gateway: Callable[..., RunningGateway], broker: Broker, version: int, abuse: bytes, code: int
) -> None:
    """What came before it does; a 5.0 device is told the reason code."""
    gateway = start_gateway(upstream=broker.port, limits={"max_packet_size": 100_000})
    leftovers = Leftovers(gateway)
    device = relaying(gateway, version, largest=100_000)
    device.send(mqtt.publish(version=version) + abuse)
    answer = hang_up(device)
    if version == 5:
        assert answer[0] == 0xE0
        assert answer[2] == code
        assert len(answer) == 2 + answer[1]
    else:
        assert answer == b""
    connection = broker.connection()
    connection.finished.wait(20)
    announced = mqtt.number(0x27, 100_000, size=4) if version == 5 else b""
    sent = mqtt.connect(version=version, properties=announced)
    assert bytes(connection.received) == sent + mqtt.publish(version=version)
    assert connection.ended_cleanly
    leftovers.check()


def test_a_claim_that_is_not_kept_costs_nothing(start_gateway: Callable[..., RunningGateway], broker: Broker) -> None:
    """A PUBLISH of 256 MB that never comes: its header is passed on, no memory is set aside for the rest."""
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    device = relaying(gateway)
    device.send(b"\x30\xff\xff\xff\x7f\x00\x01t" + bytes(100))
    connection = broker.connection()
    eventually(lambda: len(connection.received) == len(mqtt.connect()) + 108, "the beginning at the broker")
    device.close()
    connection.finished.wait(20)
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST
    leftovers.check()


@pytest.mark.parametrize("cut", [1, 2, 5, 300])
def test_a_reset_in_the_middle_of_a_packet_is_a_loss(
    start_gateway: Callable[..., RunningGateway], broker: Broker, cut: int
) -> None:
    """The broker hears of no DISCONNECT, so that it publishes the Will."""
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    device = relaying(gateway)
    device.send(mqtt.publish(payload=bytes(1000))[:cut])
    passed = cut if cut >= 8 else 0  # The fixed header and the topic are judged before anything passes.
    connection = broker.connection()
    eventually(lambda: len(connection.received) == len(mqtt.connect()) + passed, "what precedes the reset")
    device.reset()
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST
    connection.finished.wait(20)
    assert bytes(connection.received) == mqtt.connect() + mqtt.publish(payload=bytes(1000))[:passed]
    leftovers.check()


@pytest.mark.parametrize("when", ["connected", "dialling", "held"])
def test_a_reset_before_connack_leaves_nothing(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker], when: str
) -> None:
    """In the middle of CONNECT, while a silent upstream is dialled, and while the broker takes its time."""
    if when == "dialling":
        silent = socket.create_server(("127.0.0.1", 0))
        port = silent.getsockname()[1]
    else:
        port = start_broker(serve=lambda connection: connection.read_to_end()).port
    gateway = start_gateway(upstream=port, timeouts={"tls": 0.5, "connack": 0.5, "close": 0.5})
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(mqtt.connect()[:5] if when == "connected" else mqtt.connect() + mqtt.publish())
        eventually(lambda: len(gateway.service.gateway.sessions) == 1, "the session")
        time.sleep(0.1)
        device.reset()
    gateway.wait_ended()
    leftovers.check()
    if when == "dialling":
        silent.close()


def reset(connection: BrokerConnection) -> None:
    """End a broker's connection with RST."""
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.socket.close()


@pytest.mark.parametrize("version", [4, 5])
def test_a_broker_that_resets_in_the_middle_of_a_packet(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker], version: int
) -> None:
    """The device gets what came and then the close: no DISCONNECT is put into the half packet."""
    half = mqtt.publish(payload=bytes(1000), version=version)[:500]
    go: list[bool] = []

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[version] + half)
        eventually(lambda: go, "that the device has read")
        reset(connection)

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    device = relaying(gateway, version)
    assert device.read(len(half)) == half
    go.append(True)
    assert hang_up(device) == b""
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_LOST
    leftovers.check()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", EndReason.UPSTREAM_PROTOCOL_ERROR),
        (NOISE[0], EndReason.UPSTREAM_PROTOCOL_ERROR),
        (mqtt.publish("early"), EndReason.UPSTREAM_PROTOCOL_ERROR),
        (mqtt.pingresp(), EndReason.UPSTREAM_PROTOCOL_ERROR),
        (b"\x20\xff\xff\xff\x7f", EndReason.PACKET_TOO_LARGE),
        (b"\x20\x02", EndReason.UPSTREAM_CLOSED),
        (b"", EndReason.UPSTREAM_CLOSED),
    ],
)
def test_a_broker_that_does_not_answer_with_connack(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    version: int,
    answer: bytes,
    reason: EndReason,
) -> None:
    """Nothing of what it sends reaches the device, which is told that the server is unavailable."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(answer)

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(mqtt.connect(version=version))
        told = hang_up(device)
    if version == 5:
        assert told[0] == 0x20
        assert told[2:4] == b"\x00\x88"
        assert len(told) == 2 + told[1]
    else:
        assert told == b"\x20\x02\x00\x03"
    assert gateway.wait_ended().reason is reason
    leftovers.check()


def test_a_broker_that_sends_half_a_connack_and_hangs(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """It is silent, as far as the device is concerned."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(b"\x20\x02\x00")
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port, timeouts={"connack": 0.5})
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        assert hang_up(device) == b"\x20\x02\x00\x03"
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_SILENT
    leftovers.check()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("garbage", [mqtt.connack(), HTTP, mqtt.subscribe(), b"\x30\xff\xff\xff\xff\x01"])
def test_a_broker_that_sends_garbage_after_connack(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker], version: int, garbage: bytes
) -> None:
    """CONNACK a second time included: the device gets what preceded it, and in 5.0 a DISCONNECT."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[version] + mqtt.publish(version=version) + garbage)
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    device = relaying(gateway, version)
    assert device.read(len(mqtt.publish(version=version))) == mqtt.publish(version=version)
    told = hang_up(device)
    assert told[:1] + told[2:3] == (b"\xe0\x80" if version == 5 else b"")
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    leftovers.check()


def flood(send: Callable[[bytes], Any], packet: bytes, sent: list[int]) -> None:
    """Send until the far end takes no more for a while, or the connection ends; `sent` counts packets."""
    with contextlib.suppress(OSError):
        while True:
            send(packet)
            sent[0] += 1


# What the kernel's buffers on a loopback may swallow, far below what is offered, and far above what the gateway holds.
SWALLOWED = 64 * 1024 * 1024
# What the gateway may hold for one session in each direction: a producer's threshold and one read, twice over.
HELD = 512 * 1024
PACKET = mqtt.publish(payload=bytes(65_536))


def held_by(gateway: RunningGateway) -> int:
    """How many bytes wait in the gateway's transports."""

    def count() -> int:
        waiting = 0
        for session in gateway.service.gateway.sessions:
            for side in (session._device, session._upstream):
                transport = getattr(side, "transport", None)
                if transport is not None:
                    waiting += len(transport.dataBuffer) + transport._tempDataLen
        return waiting

    total: int = gateway.call(count)
    return total


def test_a_device_that_never_reads_stops_its_broker(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """Its broker's messages are not heaped up; when it goes, nothing is left."""
    sent = [0]

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(mqtt.connack())
        connection.socket.settimeout(1)
        flood(connection.send, PACKET, sent)
        connection.socket.settimeout(20)
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port, timeouts={"close": 0.5})
    leftovers = Leftovers(gateway)
    device = relaying(gateway)
    settle(sent)
    assert 0 < held_by(gateway) < HELD
    assert sent[0] * len(PACKET) < SWALLOWED
    device.reset()
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST
    leftovers.check()


def settle(sent: list[int]) -> None:
    """Wait until a flood has come to a standstill."""
    last = -1
    while sent[0] != last or not last:
        last = sent[0]
        time.sleep(0.3)


def test_a_broker_that_never_reads_stops_its_device(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """The device's messages are not heaped up, nor is the device, which nobody reads, taken for silent."""
    done: list[bool] = []

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(mqtt.connack())
        eventually(lambda: done, "that the device has had enough")

    gateway = start_gateway(upstream=start_broker(serve=serve).port, timeouts={"close": 0.5})
    leftovers = Leftovers(gateway)
    device = relaying(gateway, keep_alive=1)
    sent = [0]
    device.socket.settimeout(3.5)
    flood(device.send, PACKET, sent)
    assert sent[0] * len(PACKET) < SWALLOWED
    assert 0 < held_by(gateway) < HELD
    assert not gateway.ended
    done.append(True)
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_LOST
    device.close()
    leftovers.check()


def test_a_device_that_goes_on_after_its_end_is_cut_off(
    start_gateway: Callable[..., RunningGateway], broker: Broker
) -> None:
    """What it sends behind its DISCONNECT is dropped, and when it will not close, the gateway does."""
    gateway = start_gateway(upstream=broker.port, timeouts={"close": 0.5})
    leftovers = Leftovers(gateway)
    device = relaying(gateway)
    device.socket.settimeout(20)
    with contextlib.suppress(OSError):
        device.send(mqtt.disconnect())
        for _ in range(1000):
            device.send(bytes(1000))
            time.sleep(0.01)
        pytest.fail("the device was never cut off")
    device.close()
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT
    connection = broker.connection()
    connection.finished.wait(20)
    assert bytes(connection.received) == mqtt.connect() + mqtt.disconnect()
    leftovers.check()
