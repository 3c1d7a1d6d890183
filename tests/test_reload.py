"""A gateway that changes to another configuration while it runs: what stays, what is new, what is refused."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.errors import ConfigError, EndReason
from tests import mqtt_packets as mqtt
from tests.harness import Broker, Device, RunningGateway, eventually

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]


def established(port: int, **connect: object) -> Device:
    """A device that has its CONNACK."""
    device = Device(port)
    device.send(mqtt.connect(**connect))
    assert device.read(4) == mqtt.connack()
    return device


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def can_connect(port: int) -> bool:
    try:
        Device(port).close()
    except ConnectionRefusedError:
        return False
    return True


def test_sessions_stand_and_new_ones_begin_under_the_new_configuration(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """The upstream, the limits and the timeouts are those of the moment at which a session began."""
    before, after = start_broker(), start_broker()
    gateway = start_gateway(upstream=before.port)
    old = established(gateway.port)
    gateway.change(upstream=[{"host": "localhost", "port": after.port}], limits={"max_packet_size": 256})
    new = established(gateway.port)
    large = mqtt.publish(payload=bytes(1000))
    old.send(large)
    new.send(large)
    assert new.read_to_end() == b""
    assert gateway.wait_ended().reason is EndReason.PACKET_TOO_LARGE
    eventually(lambda: before.received == mqtt.connect() + large, "the old session goes on to its broker")
    assert len(after.connections) == 1
    for device in (old, new):
        device.close()
    gateway.wait_empty()


def test_admission_changes_and_counts_on(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Sessions that stand count under the new limit too, whatever it is."""
    gateway = start_gateway(upstream=start_broker().port)
    devices = [established(gateway.port) for _ in range(2)]
    gateway.change(admission={"max_sessions_per_address": 2})
    with Device(gateway.port) as third:
        assert third.read_to_end() == b""
    assert gateway.journal.turned_away[0][0] is EndReason.TOO_MANY_FROM_ADDRESS
    gateway.change(admission={"max_sessions": 3})
    devices.append(established(gateway.port))
    with Device(gateway.port) as fourth:
        assert fourth.read_to_end() == b""
    assert gateway.journal.turned_away[1][0] is EndReason.TOO_MANY_SESSIONS
    for device in devices:
        device.close()
    gateway.wait_empty()


def test_a_listener_that_cannot_be_opened_refuses_the_whole_change(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """What was opened beside it is closed again, what is open stays, and sessions begin as before."""
    gateway = start_gateway(upstream=start_broker().port)
    free = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoints = [f"127.0.0.1:{free}", f"127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(ConfigError) as caught:
            gateway.change(listen=[{"endpoint": endpoint} for endpoint in endpoints], limits={"max_packet_size": 256})
    (problem,) = caught.value.problems
    assert problem.startswith("listen[1].endpoint: cannot listen on")
    eventually(lambda: not can_connect(free), "the listener beside it is closed")
    device = established(gateway.port)
    device.send(mqtt.publish(payload=bytes(1000)) + mqtt.disconnect())
    assert device.read_to_end() == b""
    device.close()
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT


def test_a_file_that_cannot_be_used_refuses_the_whole_change(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """No listener is opened or closed for a configuration that will not be."""
    gateway = start_gateway(upstream=start_broker().port)
    free = free_port()
    with pytest.raises(ConfigError, match=r"tls\.ca_file"):
        gateway.change(listen=[{"endpoint": f"127.0.0.1:{free}"}], tls={"ca_file": str(tmp_path / "none.pem")})
    assert not can_connect(free)
    established(gateway.port).close()
    gateway.wait_ended()


def test_listeners_come_and_go_and_take_new_names(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """A listener that stays is the same port, whatever its place and its name; one that is gone is closed."""
    gateway = start_gateway(upstream=start_broker().port)
    stays = gateway.service.ports[0]
    added = free_port()
    gateway.change(listen=[{"endpoint": f"127.0.0.1:{added}"}, {"endpoint": "127.0.0.1:0", "name": "old hall"}])
    assert gateway.service.ports[1] is stays
    assert gateway.service.ports[0].getHost().port == added
    devices = [established(gateway.port), established(added)]
    eventually(lambda: len(gateway.journal.started) == 2, "both have started")
    assert {record.listener for record in gateway.journal.started} == {"old hall", ""}
    gateway.change(listen=[{"endpoint": "127.0.0.1:0"}])
    assert gateway.service.ports == [stays]
    eventually(lambda: not can_connect(added), "the listener that is gone is closed")
    devices.append(established(gateway.port))
    for device in devices:
        device.close()
    gateway.wait_ended(3)
    gateway.wait_empty()
