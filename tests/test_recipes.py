"""docs/recipes.md: its configurations load, and a device of MQTT 3.1 publishes under the recipe's rule."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from gateway.config import load_file
from tests.harness import Broker, RunningGateway, eventually
from tests.pages import files_of
from tests.tools import stop_paho

FILES = files_of("recipes.md")


@pytest.mark.parametrize("name", FILES)
def test_its_configurations_load(name: str, tmp_path: Path) -> None:
    """Each is complete as it stands, for one broker."""
    (tmp_path / "devices").mkdir()
    path = tmp_path / name
    path.write_text(FILES[name])
    assert len(load_file(path).upstream) == 1


def test_a_controller_of_mqtt_3_1_reaches_a_broker_of_3_1_1(
    start_broker: Callable[..., Broker], start_gateway: Callable[..., RunningGateway]
) -> None:
    """Its library is a real one; the broker sees 3.1.1 and the controller's own name."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=tomllib.loads(FILES["plc.toml"])["device"])
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="press-1", protocol=paho.MQTTv31)
    accepted: list[bool] = []
    client.on_connect = lambda *_: accepted.append(True)
    client.connect_async("127.0.0.1", gateway.port)
    client.loop_start()
    try:
        eventually(lambda: accepted, "the controller is accepted")
        client.publish("plant/press-1/force", "21.5")
        eventually(lambda: b"plant/press-1/force" in broker.connection().received, "its message is at the broker")
    finally:
        client.disconnect()
        stop_paho(client)
    assert b"\x00\x04MQTT\x04" in broker.connection().received
    assert b"press-1" in broker.connection().received
