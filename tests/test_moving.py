"""docs/moving.md: its configurations load, and a bridge and what replaces it do the same at a real broker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import trustme
from paho.mqtt.enums import CallbackAPIVersion

from gateway.config import load_file
from tests.harness import eventually
from tests.mosquitto import Mosquitto
from tests.pages import files_of
from tests.ports import free_port
from tests.tools import stop_paho

FILES = files_of("moving.md")


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".toml")])
def test_its_configurations_load(name: str, tmp_path: Path) -> None:
    """Each is complete as it stands."""
    path = tmp_path / name
    path.write_text(FILES[name])
    assert load_file(path).upstream[0].host == "broker.plant.example"


@contextmanager
def client(port: int, name: str, topic: str) -> Iterator[tuple[mqtt.Client, list[tuple[str, bytes]]]]:
    """Connect, subscribe; give the client and the list of what it receives."""
    received: list[tuple[str, bytes]] = []
    subscribed: list[bool] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name)
    client.on_message = lambda _client, _data, message: received.append((message.topic, bytes(message.payload)))
    client.on_subscribe = lambda *_: subscribed.append(True)
    client.on_connect = lambda client, *_: client.subscribe(topic, 1)
    client.connect_async("127.0.0.1", port)
    client.loop_start()
    try:
        eventually(lambda: subscribed, f"{name} has subscribed")
        yield client, received
    finally:
        client.disconnect()
        stop_paho(client)


Run = Callable[[str, Path, Mosquitto, int], ExitStack]


def bridge(text: str, directory: Path, remote: Mosquitto, local: int) -> ExitStack:
    """Run mosquitto with the page's bridge, until it is connected: messages before that would be lost."""
    broker = Mosquitto(directory, f"listener {local} 127.0.0.1\nallow_anonymous true\n{text}", local)
    stack = ExitStack()
    stack.callback(broker.stop)
    with stack:
        eventually(lambda: "Sending SUBACK to plant7" in remote.log.read_text(), "the bridge's subscription")
        return stack.pop_all()


def gateway(text: str, directory: Path, _remote: Mosquitto, local: int) -> ExitStack:
    """Run the gateway with the page's replacement."""
    config = directory / "gateway.toml"
    config.write_text(text.replace("0.0.0.0:1883", f"127.0.0.1:{local}"))
    process = subprocess.Popen([Path(sys.executable).parent / "mqtts-gateway", "run", "--config", config])
    stack = ExitStack()
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)
    return stack


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [("bridge.conf", bridge), ("bridge.toml", gateway)])
def test_the_bridge_and_its_replacement_do_the_same(name: str, run: Run, tmp_path: Path) -> None:
    """A sensor's message arrives below the plant's name, and a command for the plant reaches the device."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "broker.pem")
    secure, plain, local = free_port(), free_port(), free_port()
    listeners = (
        f"per_listener_settings false\nallow_anonymous true\nlistener {plain} 127.0.0.1\nlistener {secure} 127.0.0.1\n"
        f"certfile {tmp_path}/broker.pem\nkeyfile {tmp_path}/broker.pem\n"
    )
    text = FILES[name].replace("broker.plant.example", "localhost").replace("8883", str(secure))
    text = text.replace("/etc/mosquitto/certs", str(tmp_path)).replace('"ca.pem"', f'"{tmp_path}/ca.pem"')
    with ExitStack() as stack:
        remote = Mosquitto(tmp_path, listeners, secure, plain)
        stack.callback(remote.stop)
        (tmp_path / "local").mkdir()
        stack.enter_context(run(text, tmp_path / "local", remote, local))
        operator, at_operator = stack.enter_context(client(plain, "operator", "plant7/sensors/#"))
        device, at_device = stack.enter_context(client(local, "pump-1", "commands/pump-1"))
        device.publish("sensors/pump-1", b"21.5", qos=1)
        operator.publish("plant7/commands/pump-1", b"stop", qos=1)
        eventually(lambda: at_operator and at_device, "both messages")
    assert (at_operator, at_device) == ([("plant7/sensors/pump-1", b"21.5")], [("commands/pump-1", b"stop")])
