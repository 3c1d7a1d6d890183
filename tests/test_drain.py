"""How sessions end when the gateway is stopped: spread over a time, told, with or without their Wills."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import paho.mqtt.client as paho
import pytest
import trustme
from attrs import define, field

from gateway import gateway as gateway_module
from gateway.config import from_mapping
from gateway.drain import Spread
from gateway.errors import EndReason
from gateway.gateway import Gateway
from gateway.session.session import State
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Broker, BrokerConnection, Device, RunningGateway, eventually
from tests.mosquitto import Mosquitto
from tests.ports import free_port
from tests.processes import GatewayProcess
from tests.test_versions import Client
from tests.tools import require_tool
from tests.turn_clock import TurnClock

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]

# ---- a few in each turn


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Gateway, TurnClock]]:
    """Return a function that makes a gateway of sessions in these states; two may end in a turn."""
    monkeypatch.setattr(gateway_module, "_ENDED_AT_A_TIME", 2)

    def make(*states: State) -> tuple[Gateway, TurnClock]:
        clock = TurnClock()
        gateway = Gateway(from_mapping({"upstream": [{"host": "localhost"}]}), clock, Mock(), Mock(), 1000)

        def session(state: State) -> Mock:
            made = Mock(state=state)

            def stop(*_: object, **__: object) -> None:
                gateway.sessions.remove(made)
                gateway._check_all_gone()

            made.stop = stop
            return made

        gateway.sessions |= {session(state) for state in states}
        return gateway, clock

    return make


@pytest.mark.parametrize("state", [State.RELAYING, State.DIALLING], ids=["established", "not established"])
def test_few_sessions_end_in_a_turn_of_a_stop(crowd: Callable[..., tuple[Gateway, TurnClock]], state: State) -> None:
    """To end thousands in one turn would hold up everything else; the stop waits for the last of them."""
    gateway, clock = crowd(*[state] * 5)
    gone = gateway.stop()
    left = [len(gateway.sessions)]
    while not gone.called:
        clock.turn()
        left.append(len(gateway.sessions))
    assert left == [3, 1, 0]
    assert not clock.calls


def test_sessions_that_drain_wait_for_their_time_after_the_others_have_ended(
    crowd: Callable[..., tuple[Gateway, TurnClock]],
) -> None:
    """Only the first of them is due at once."""
    gateway, clock = crowd(*[State.RELAYING] * 3, *[State.WAIT_CONNACK] * 3)
    gateway.stop(60.0)
    assert len(gateway.sessions) == 4
    for _ in range(3):
        clock.turn()
    assert [session.state for session in gateway.sessions] == [State.RELAYING] * 2


def test_a_stop_at_once_ends_all_in_one_turn(crowd: Callable[..., tuple[Gateway, TurnClock]]) -> None:
    """Also during a drain: the process exits in the next turn."""
    gateway, clock = crowd(*[State.RELAYING] * 7, *[State.DIALLING] * 4)
    gone = gateway.stop(60.0)
    assert gateway.sessions
    gateway.stop_at_once()
    assert gone.called
    assert not gateway.sessions
    assert not clock.calls


# ---- the spread itself


def due_times(spread: Spread[int], until: int) -> dict[int, list[int]]:
    """Ask each second from 0; return what was due when, where anything was."""
    asked = {now: list(spread.due(now)) for now in range(until + 1)}
    return {now: things for now, things in asked.items() if things}


def test_a_spread_is_even_and_in_order() -> None:
    """The first at once, the last before the end, as many in each part of the time."""
    assert due_times(Spread(range(5), 0, 10), 12) == {0: [0], 2: [1], 4: [2], 6: [3], 8: [4]}
    assert due_times(Spread(range(40), 0, 4), 5) == {
        0: [0],
        1: list(range(1, 11)),
        2: list(range(11, 21)),
        3: list(range(21, 31)),
        4: list(range(31, 40)),
    }
    assert due_times(Spread([7], 0, 3600), 1) == {0: [7]}


def test_a_spread_over_no_time_is_due_at_once() -> None:
    """And one of nothing is over."""
    assert due_times(Spread(range(3), 0, 0), 1) == {0: [0, 1, 2]}
    assert due_times(Spread([], 0, 10), 11) == {}


def test_a_spread_can_be_hastened_but_not_slowed_down() -> None:
    """What is left is spread over the shorter time."""
    spread = Spread(range(10), 0, 10)
    assert list(spread.due(1)) == [0, 1]
    spread.hasten(1, 100)
    assert list(spread.due(2)) == [2]
    spread.hasten(2, 2)
    assert list(spread.due(2)) == [3]
    assert list(spread.due(3)) == [4, 5, 6]
    spread.hasten(3, 0)
    assert list(spread.due(3)) == [7, 8, 9]


# ---- what devices and brokers are told


def established(port: int, version: int = 5) -> Device:
    """A device that has its CONNACK."""
    device = Device(port)
    device.send(mqtt.connect(version=version))
    connack = mqtt.connack(version=version)
    assert device.read(len(connack)) == connack
    return device


@pytest.mark.parametrize("version", [3, 4, 5])
def test_who_waits_for_connack_is_told_at_once(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """A long drain is for sessions that stand; a device that is on its way may as well go elsewhere now."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, drain={"seconds": 3600})
    with Device(gateway.port) as device, Device(gateway.port) as silent:
        device.send(mqtt.connect(version=version))
        eventually(lambda: len(gateway.service.gateway.sessions) == 2 and broker.received, "both sessions, and CONNECT")
        gateway.call(lambda: [gateway.service.stopService(), None][1])
        told = device.read_to_end()
        assert told == mqtt.connack(version=version, code=3) if version != 5 else told[3] == 0x88
        assert silent.read_to_end() == b""
    gateway.wait_ended(2)
    assert {record.reason for record in gateway.ended} == {EndReason.GATEWAY_STOPPING}
    gateway.wait_empty()


def test_stopping_twice_is_stopping_once(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Whoever asks is told of the end, in the order of asking, and a shorter time counts."""
    gateway = start_gateway(upstream=start_broker().port)
    devices = [established(gateway.port) for _ in range(3)]
    ended: list[str] = []

    def stop(name: str, seconds: float) -> None:
        gateway.service.gateway.stop(seconds).addCallback(lambda _: ended.append(name))

    gateway.call(stop, "slow", 3600)
    gateway.call(stop, "slower", 7200)
    assert ended == []
    assert sum(session.state.name == "RELAYING" for session in list(gateway.service.gateway.sessions)) == 2
    gateway.call(stop, "quick", 0)
    for device in devices:
        assert device.read_to_end()[:3:2] == b"\xe0\x8b"
        device.close()
    eventually(lambda: len(ended) == 3, "all who asked are told")
    assert ended == ["slow", "slower", "quick"]
    gateway.call(stop, "late", 0)
    assert ended[-1] == "late"


@pytest.fixture(scope="module")
def mosquitto(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker with TLS for the gateway and without it for whoever watches the Wills."""
    require_tool("mosquitto")
    directory = tmp_path_factory.mktemp("mosquitto")
    chain, key = directory / "chain.pem", directory / "key.pem"
    certificate = ca.issue_cert("localhost")
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    secure, plain = free_port(), free_port()
    broker = Mosquitto(
        directory,
        f"allow_anonymous true\nlistener {plain} 127.0.0.1\n"
        f"listener {secure} 127.0.0.1\ncertfile {chain}\nkeyfile {key}\n",
        secure,
        plain,
    )
    yield broker
    broker.stop()


@pytest.mark.parametrize("wills", ["publish", "discard"])
def test_the_wills_are_published_or_not(reactor: Any, ca_file: Path, mosquitto: Mosquitto, wills: str) -> None:
    """A subscriber sees those of all versions, or none; that of a device amid a packet is published anyway."""
    gateway = RunningGateway(reactor, mosquitto.ports[0], ca_file=ca_file, drain={"seconds": 0, "wills": wills})
    subscriber = Client(paho.MQTTv311)
    subscriber.connect(mosquitto.ports[1])
    subscriber.subscribe("wills/#")
    devices = []
    for version in (3, 4, 5):
        device = Device(gateway.port)
        device.send(mqtt.connect(f"will-{wills}-{version}", version=version, will_topic=f"wills/{wills}/{version}"))
        device.read(4 if version != 5 else 2)
        devices.append(device)
    eventually(lambda: len(gateway.journal.started) == 3, "three sessions stand")
    half = Device(gateway.port)
    connect = mqtt.connect(f"will-{wills}-half", will_topic=f"wills/{wills}/half")
    half.send(connect)
    assert half.read(4) == mqtt.connack()
    half.send(mqtt.publish(payload=bytes(100))[:50])
    eventually(
        lambda: (
            len(connect) + 50 in gateway.call(lambda: [s.traffic.bytes_up for s in gateway.service.gateway.sessions])
        ),
        "half a packet has passed",
    )
    devices.append(half)
    reading = [device.socket for device in devices]
    stopping: list[Any] = []
    gateway.call(lambda: stopping.append(gateway.service.stopService()))
    for raw in reading:
        while raw.recv(1000):
            pass
        raw.close()
    gateway.wait_empty()
    # The broker works one thing after the other, so what it was to publish it has published before this.
    marker = Client(paho.MQTTv311)
    marker.connect(mosquitto.ports[1])
    eventually(lambda: f"wills/{wills}/half" in [message.topic for message in subscriber.messages], "the certain Will")
    marker.paho.publish(f"wills/{wills}/marker", b"", qos=1)
    eventually(lambda: subscriber.messages[-1:] and subscriber.messages[-1].topic.endswith("marker"), "the marker")
    published = {message.topic.rpartition("/")[2] for message in subscriber.messages} - {"marker"}
    assert published == ({"3", "4", "5", "half"} if wills == "publish" else {"half"})
    for client in (subscriber, marker):
        client.disconnect()
    gateway.stop()


def test_nothing_is_said_amid_a_packet(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """A DISCONNECT there would be taken for a part of the device's PUBLISH."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, drain={"seconds": 0, "wills": "discard"})
    half = mqtt.publish(payload=bytes(100))[:50]
    with established(gateway.port, 4) as amid, established(gateway.port, 4) as between:
        amid.send(half)
        eventually(lambda: half in broker.received, "half a packet has passed")
        gateway.call(lambda: [gateway.service.stopService(), None][1])
        assert amid.read_to_end() == between.read_to_end() == b""
    gateway.wait_empty()
    assert all(connection.finished.wait(20) for connection in broker.connections)
    assert sorted(bytes(connection.received) for connection in broker.connections) == sorted(
        [mqtt.connect() + half, mqtt.connect() + mqtt.disconnect()]
    )


# ---- a thousand


@define
class Told:
    """What a device heard after its CONNACK, and when its connection ended."""

    version: int
    data: bytearray = field(factory=bytearray)
    ended: float = 0.0


def test_a_thousand_sessions_end_within_the_time(tmp_path: Path, ca_file: Path, mosquitto: Mosquitto) -> None:
    """Neither all at once nor late, each told in its version; the gateway and the broker are other processes."""
    count, seconds = 1000, 6.0
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:0"\n[[upstream]]\nhost = "localhost"\nport = {mosquitto.ports[0]}\n'
        f'[tls]\nca_file = "{ca_file}"\n[timeouts]\nconnack = 60\ntls = 60\n'
        f"[pacing]\nnew_sessions_per_second = 0\n[drain]\nseconds = {seconds}\n"
    )
    with GatewayProcess(tmp_path, "--config", str(config)) as gateway, selectors.DefaultSelector() as selector:
        for number in range(count):
            version = (3, 4, 5)[number % 3]
            device = socket.create_connection(("127.0.0.1", gateway.ports[0]), PATIENCE)
            device.sendall(mqtt.connect(f"drain-{number}", version=version, keep_alive=0))
            selector.register(device, selectors.EVENT_READ, Told(version))
        waiting = count
        while waiting:
            ready = selector.select(PATIENCE)
            assert ready, f"{waiting} devices have no CONNACK: {gateway.text[-2000:]}"
            for key, _ in ready:
                connack = key.fileobj.recv(100)
                assert connack[0] == 0x20
                assert connack[3] == 0
                waiting -= 1

        began = time.monotonic()
        gateway.signal(signal.SIGTERM)
        told: list[Told] = []
        while len(told) < count:
            ready = selector.select(PATIENCE)
            assert ready, f"{count - len(told)} sessions go on"
            for key, _ in ready:
                data = key.fileobj.recv(1000)
                if data:
                    key.data.data += data
                    continue
                key.data.ended = time.monotonic() - began
                told.append(key.data)
                selector.unregister(key.fileobj)
                key.fileobj.close()
        assert gateway.wait() in {0, -signal.SIGTERM}
    assert all(each.data[:1] + each.data[2:3] == b"\xe0\x8b" for each in told if each.version == 5)
    assert all(not each.data for each in told if each.version != 5)
    ended = sorted(each.ended for each in told)
    in_the_first_tenth = sum(each < seconds / 10 for each in ended)
    assert in_the_first_tenth < count / 2
    assert ended[count // 2] > seconds / 4
    assert ended[-1] < seconds + 5  # what timeouts.close gives the last one
    assert "Traceback" not in gateway.text
