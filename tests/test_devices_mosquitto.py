"""Five hundred devices with a certificate each, before mosquitto, which takes each for who its certificate says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import EndReason
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Device, RunningGateway, eventually
from tests.mosquitto import Mosquitto
from tests.pki import CLIENT, SERVER, Certified, certify, certify_ca
from tests.ports import free_port
from tests.tools import require_tool

DEVICES = 500
NOT_AUTHORIZED = 0x87
NAMES = [f"device-{number:03}" for number in range(DEVICES)]


@pytest.fixture(scope="module")
def root() -> Certified:
    """The CA of the broker and of all devices."""
    return certify_ca()


@pytest.fixture(scope="module")
def rules(root: Certified, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a rule and a certificate for each device."""
    directory = tmp_path_factory.mktemp("devices")
    for name in NAMES:
        certify(root, subject=name, names=(), purposes=(CLIENT,)).write(directory / f"{name}.pem")
        (directory / f"{name}.toml").write_text(f'client_cert = "{name}.pem"\n')
    return directory


@pytest.fixture(scope="module")
def broker(root: Certified, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A mosquitto that lets a device publish and subscribe under its own certificate's name only."""
    require_tool("mosquitto")
    directory = tmp_path_factory.mktemp("mosquitto")
    root_file = directory / "root.pem"
    root_file.write_bytes(root.pem)
    own = certify(root, names=("DNS:localhost",), purposes=(SERVER,))
    (directory / "own.pem").write_bytes(own.pem)
    (directory / "own-key.pem").write_bytes(own.key_pem)
    # %u is the user name, which is the certificate's: whoever were under another's identity could write elsewhere.
    (directory / "acl").write_text("user watcher\ntopic read #\npattern write from/%u/#\npattern read to/%u/#\n")
    (directory / "passwords").write_text("")
    port = free_port()
    mosquitto = Mosquitto(
        directory,
        f"acl_file {directory / 'acl'}\nallow_anonymous false\n"
        f"listener {port} 127.0.0.1\ncafile {root_file}\ncertfile {directory / 'own.pem'}\n"
        f"keyfile {directory / 'own-key.pem'}\nrequire_certificate true\nuse_identity_as_username true\n",
        port,
    )
    yield mosquitto
    mosquitto.stop()


class Sensor:
    """A device of MQTT 5.0, which is told by PUBACK what it may write."""

    def __init__(self, gateway: RunningGateway, name: str) -> None:
        self.name = name
        self.device = Device(gateway.port)
        self.device.socket.settimeout(2 * PATIENCE)
        self.device.send(mqtt.connect(name, version=5))
        connack = self._packet()
        assert connack[0] == 0x20
        assert connack[3] == 0

    def _packet(self) -> bytes:
        head = self.device.read(2)
        assert len(head) == 2, f"{self.name} was disconnected"
        return head + self.device.read(head[1])

    def publish(self, topic: str) -> None:
        self.device.send(mqtt.publish(topic, self.name.encode(), version=5, qos=1))

    def puback(self) -> int:
        """The reason code of the next PUBACK; it is left out when it is 0."""
        packet = self._packet()
        assert packet[0] == 0x40
        return packet[4] if len(packet) > 4 else 0

    def disconnect(self) -> None:
        self.device.send(mqtt.disconnect())
        self.device.read_to_end()
        self.device.close()


def watcher(root: Certified, broker: Mosquitto, directory: Path) -> Any:
    """A TLS client that reads everything: the only one whose certificate is no device's."""
    import ssl

    certified = certify(root, subject="watcher", names=(), purposes=(CLIENT,)).write(directory / "watcher.pem")
    context = ssl.create_default_context(cadata=root.pem.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.load_cert_chain(certified)
    raw = socket.create_connection(("127.0.0.1", broker.ports[0]), PATIENCE)
    connection = context.wrap_socket(raw, server_hostname="localhost")
    connection.sendall(mqtt.connect("watcher") + mqtt.subscribe("#"))
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("resumption", [True, False], ids=["resumed", "full"])
def test_five_hundred_devices_are_each_themselves(
    reactor: Any, root: Certified, broker: Mosquitto, rules: Path, tmp_path: Path, *, resumption: bool
) -> None:
    """All at once, and again after a reload: what each publishes arrives under its own name, and nothing else does."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(root.pem)
    upstream = [{"host": "127.0.0.1", "server_name": "localhost", "port": broker.ports[0]}]
    gateway = RunningGateway(
        reactor,
        upstream,
        ca_file=ca_file,
        tls={"resumption": resumption},
        devices={"directory": str(rules), "unknown": "refuse"},
        pacing={"new_sessions_per_second": 0},
    )
    heard = bytearray()
    watching = watcher(root, broker, tmp_path)

    def listen() -> None:
        watching.settimeout(0.5)
        while not stopped.is_set():
            try:
                heard.extend(watching.recv(65536))
            except TimeoutError:
                continue

    stopped = threading.Event()
    listener = threading.Thread(target=listen)
    listener.start()
    try:
        eventually(lambda: mqtt.suback(0) in heard, "the watcher's SUBACK")
        for turn in ("first", "again", "reloaded"):
            if turn == "reloaded":
                gateway.change(limits={"max_packet_size": 100_000})
            with ThreadPoolExecutor(25) as pool:
                sensors = list(pool.map(lambda name: Sensor(gateway, name), NAMES))
            assert len(gateway.service.gateway.sessions) == DEVICES
            for index, sensor in enumerate(sensors):
                # The second goes where only another may write: whoever were under its identity would be let to.
                sensor.publish(f"from/{sensor.name}/{turn}")
                sensor.publish(f"from/{NAMES[index - 1]}/{turn}")
            for sensor in sensors:
                assert (sensor.puback(), sensor.puback()) == (0, NOT_AUTHORIZED)
            for name in NAMES:
                message = mqtt.publish(f"from/{name}/{turn}", name.encode())
                eventually(lambda message=message: message in heard, f"{name} {turn}")
            for sensor in sensors:
                sensor.disconnect()
            gateway.wait_empty()
        # Each device once in each turn, and nothing else.
        expected = sum(
            len(mqtt.publish(f"from/{n}/{t}", n.encode())) for n in NAMES for t in ("first", "again", "reloaded")
        )
        assert len(heard) == len(mqtt.connack()) + len(mqtt.suback(0)) + expected
        assert {record.reason for record in gateway.ended} == {EndReason.DEVICE_DISCONNECT}
        assert len({record.rule for record in gateway.ended}) == DEVICES
    finally:
        stopped.set()
        listener.join()
        watching.close()
        gateway.stop()


def test_an_unknown_device_and_a_spoofed_name_do_not_get_there(
    reactor: Any, root: Certified, broker: Mosquitto, rules: Path, tmp_path: Path
) -> None:
    """Without a rule there is no identity to lend."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(root.pem)
    upstream = [{"host": "127.0.0.1", "server_name": "localhost", "port": broker.ports[0]}]
    devices = {"directory": str(rules), "unknown": "refuse"}
    gateway = RunningGateway(reactor, upstream, ca_file=ca_file, devices=devices)
    try:
        for name in ("device-500", "watcher", "DEVICE-001", "device-001 ", "*", ""):
            with Device(gateway.port) as device:
                device.send(mqtt.connect(name))
                assert device.read_to_end() == b"\x20\x02\x00\x05"
        gateway.wait_ended(6)
        assert {record.reason for record in gateway.ended} == {EndReason.DEVICE_UNKNOWN}
    finally:
        gateway.stop()
