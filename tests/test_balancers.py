"""Real load balancers before the gateway: HAProxy and nginx, and two gateways of which one is drained."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.config import load_file
from gateway.errors import EndReason
from tests import mqtt_packets as mqtt
from tests.balancers import GatewayProcess, HAProxy, Nginx, Program, Sensor
from tests.harness import Broker, Device, RunningGateway, eventually
from tests.ports import free_port
from tests.test_versions import Mosquitto
from tests.tools import require_tool

ROOT = Path(__file__).parent.parent
SCALING = ROOT / "docs" / "scaling.md"
HAPROXY_CFG = ROOT / "docs" / "examples" / "haproxy.cfg"


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Return a list for programs that are to be ended after the test."""
    started: list[Program] = []
    yield started
    for program in reversed(started):
        program.stop()


# ---- one gateway, each kind of header

HAPROXY_OPTIONS = [
    "send-proxy",
    "send-proxy-v2",
    "send-proxy-v2 proxy-v2-options crc32c,unique-id",
    "send-proxy-v2-ssl-cn",
]


def haproxy_before(directory: Path, port: int, to_port: int, options: str) -> HAProxy:
    """Start HAProxy that passes one port, by IPv4 and IPv6, on to another."""
    return HAProxy(
        directory,
        f"""
global
    stats socket {directory}/admin.sock
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen mqtt
    bind 127.0.0.1:{port}
    bind [::1]:{port}
    unique-id-format %[uuid()]
    server gateway 127.0.0.1:{to_port} check inter 100ms {options}
""",
        directory / "admin.sock",
    )


@pytest.fixture
def behind(start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]) -> RunningGateway:
    """A gateway for load balancers on loopback."""
    listen = [{"endpoint": "127.0.0.1:0", "proxies": "127.0.0.1"}]
    return start_gateway(upstream=start_broker().port, listen=listen)


def in_and_out(port: int, opening: bytes = b"", **arguments: Any) -> tuple[str, int]:
    """Open a session and end it in order; return the device's own address."""
    with Device(port, **arguments) as device:
        name: tuple[str, int] = device.socket.getsockname()[:2]
        device.send(opening + mqtt.connect() + mqtt.disconnect())
        assert device.read(4) == mqtt.connack()
        device.socket.settimeout(20)
        assert device.read_to_end() == b""
    return name


@pytest.mark.parametrize("options", HAPROXY_OPTIONS)
def test_haproxy_keeps_the_devices_address(
    behind: RunningGateway, tmp_path: Path, programs: list[Program], options: str
) -> None:
    """By IPv4 and IPv6; its health checks are nobody's business."""
    port = free_port()
    haproxy = haproxy_before(tmp_path, port, behind.port, options)
    programs.append(haproxy)
    host, number = in_and_out(port, source="127.0.0.7")
    host6, number6 = in_and_out(port, address="::1")
    record6 = behind.wait_ended(2)
    record = behind.ended[0]
    assert (record.device_address, record6.device_address) == (f"{host}:{number}", f"[{host6}]:{number6}")
    assert host == "127.0.0.7"
    assert record.via.startswith("127.0.0.1:")
    haproxy.wait_until(lambda: _accepted(behind) > 20, "some health checks")
    assert haproxy.status("gateway") == "UP"
    assert behind.service.gateway._numbered == 2
    assert behind.journal.turned_away == []
    assert len(behind.ended) == 2


def _accepted(gateway: RunningGateway) -> int:
    """Count connections to the gateway's port, by the numbers that Twisted gives to transports."""
    return int(gateway.service.ports[0].sessionno)  # type: ignore[attr-defined]  # of tcp.Port


def test_a_device_cannot_forge_its_address_behind_haproxy(
    behind: RunningGateway, tmp_path: Path, programs: list[Program]
) -> None:
    """The header that it sends itself comes second, and is no CONNECT."""
    port = free_port()
    programs.append(haproxy_before(tmp_path, port, behind.port, "send-proxy-v2"))
    with Device(port, source="127.0.0.7") as device:
        device.send(b"PROXY TCP4 10.9.9.9 10.0.0.1 1 1883\r\n" + mqtt.connect())
        device.socket.settimeout(20)
        assert device.read_to_end() == b""
    record = behind.wait_ended()
    assert record.reason is EndReason.NOT_MQTT
    assert record.device_address.startswith("127.0.0.7:")


def test_haproxy_without_the_header_is_told_what_is_missing(
    behind: RunningGateway, tmp_path: Path, programs: list[Program]
) -> None:
    """Nothing is guessed; its plain health checks are let be."""
    port = free_port()
    programs.append(haproxy_before(tmp_path, port, behind.port, ""))
    with Device(port) as device:
        device.send(mqtt.connect())
        device.socket.settimeout(20)
        assert device.read_to_end() == b""
    eventually(lambda: behind.journal.turned_away, "a refusal in the journal")
    assert [reason for reason, _ in behind.journal.turned_away] == [EndReason.NO_PROXY_HEADER]
    assert behind.ended == []


def test_nginx_keeps_the_devices_address(behind: RunningGateway, tmp_path: Path, programs: list[Program]) -> None:
    """Its stream module speaks version 1."""
    port = free_port()
    programs.append(Nginx(tmp_path, port, behind.port))
    host, number = in_and_out(port, source="127.0.0.7")
    record = behind.wait_ended()
    assert record.device_address == f"{host}:{number}" == f"127.0.0.7:{number}"
    assert record.reason is EndReason.DEVICE_DISCONNECT
    assert behind.journal.turned_away == []


def start_balancer(kind: str, directory: Path, to_port: int) -> tuple[Program, int]:
    """Start one of either kind before a gateway; return it and its port."""
    port = free_port()
    if kind == "nginx":
        return Nginx(directory, port, to_port), port
    return haproxy_before(directory, port, to_port, "send-proxy-v2"), port


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_device_is_told_the_truth_through_a_balancer(
    start_gateway: Callable[..., RunningGateway], tmp_path: Path, programs: list[Program], kind: str
) -> None:
    """CONNACK 3 arrives whole, though the connection ends with it."""
    listen = [{"endpoint": "127.0.0.1:0", "proxies": "127.0.0.1"}]
    gateway = start_gateway(upstream=free_port(), listen=listen)
    balancer, port = start_balancer(kind, tmp_path, gateway.port)
    programs.append(balancer)
    with Device(port) as device:
        device.send(mqtt.connect())
        device.socket.settimeout(20)
        assert device.read_to_end() == mqtt.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.TCP_REFUSED


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
@pytest.mark.parametrize("is_polite", [True, False])
def test_loss_is_passed_on_as_loss_through_a_balancer(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    tmp_path: Path,
    programs: list[Program],
    kind: str,
    is_polite: bool,
) -> None:
    """A device that closes, or vanishes with RST, ends its session at the broker without DISCONNECT."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, listen=[{"endpoint": "127.0.0.1:0", "proxies": "127.0.0.1"}])
    balancer, port = start_balancer(kind, tmp_path, gateway.port)
    programs.append(balancer)
    device = Device(port)
    device.send(mqtt.connect())
    assert device.read(4) == mqtt.connack()
    if is_polite:
        device.close()
    else:
        device.reset()
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST
    connection = broker.connection()
    assert connection.finished.wait(20)
    assert bytes(connection.received) == mqtt.connect()


# ---- two gateways, as docs/scaling.md has them


@pytest.fixture
def mosquitto(ca: trustme.CA, tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker behind TLS."""
    require_tool("mosquitto")
    certificate = ca.issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    port = free_port()
    listener = f"listener {port} 127.0.0.1\ncertfile {chain}\nkeyfile {key}\n"
    broker = Mosquitto(tmp_path, f"allow_anonymous true\n{listener}", port)
    yield broker
    broker.stop()


def documented(name: str) -> str:
    """Return the block of docs/scaling.md that is marked so."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)^```", SCALING.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/scaling.md has no block <!-- {name} -->"
    return found[1]


def replaced(text: str, replacements: dict[str, str]) -> str:
    """Replace each key, which must be there, by its value."""
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    return text


class Site:
    """HAProxy and two gateways, from the documents, with the addresses of this machine."""

    def __init__(self, directory: Path, programs: list[Program], broker_port: int, ca_file: Path) -> None:
        self._directory = directory
        self._programs = programs
        self._broker_port = broker_port
        self._ca_file = ca_file
        self.port = free_port()
        self._ports = {"a": free_port(), "b": free_port()}
        self.gateways = {name: self.start(name) for name in self._ports}
        admin = directory / "admin.sock"
        configuration = replaced(
            HAPROXY_CFG.read_text(),
            {
                "bind 10.0.0.5:1883": f"bind 127.0.0.1:{self.port}",
                "server a 10.0.0.11:1883": f"server a 127.0.0.1:{self._ports['a']}",
                "server b 10.0.0.12:1883": f"server b 127.0.0.1:{self._ports['b']}",
                "/run/haproxy/admin.sock": str(admin),
                "log /dev/log local0": "log stdout format raw local0",
                "maxconn 20000": "maxconn 500",
                "check inter 2s": "check inter 200ms",
            },
        )
        if os.geteuid() != 0:
            configuration = re.sub(r"^ +(user|group) haproxy\n", "", configuration, flags=re.MULTILINE)
        self.haproxy = HAProxy(directory, configuration, admin)
        programs.append(self.haproxy)
        self.wait_status(a="UP", b="UP")

    def start(self, name: str) -> GatewayProcess:
        """Start a gateway, or start it again."""
        configuration = replaced(
            documented("gateway.toml"),
            {
                '"10.0.0.11:1883"': f'"127.0.0.1:{self._ports[name]}"',
                '"10.0.0.5"': '"127.0.0.1"',
                'host = "broker.example.com"': f'host = "localhost"\nport = {self._broker_port}',
                '"ca.pem"': f'"{self._ca_file}"',
            },
        )
        gateway = GatewayProcess(self._directory, name, configuration + "\n[drain]\nseconds = 8\n")
        self._programs.append(gateway)
        return gateway

    def wait_status(self, **wanted: str) -> None:
        """Wait until HAProxy thinks so of each."""
        for name, status in wanted.items():
            eventually(lambda name=name, status=status: self.haproxy.status(name) == status, f"{name} {status}")

    def sensors(self, name: str, sensors: list[Sensor]) -> list[Sensor]:
        """Return those whose session stood on a gateway."""
        known = self.gateways[name].sessions()
        return [sensor for sensor in sensors if sensor.identifier in known]

    def wait_on(self, name: str, sensors: list[Sensor]) -> None:
        """Wait until the sessions of all have stood on a gateway: its log may come a little later than CONNACK."""
        eventually(lambda: self.sensors(name, sensors) == sensors, f"all on {name}: {sensors}")


@pytest.fixture
def site(mosquitto: Mosquitto, ca_file: Path, tmp_path: Path, programs: list[Program]) -> Site:
    """Everything runs, and HAProxy has found both gateways well."""
    return Site(tmp_path, programs, mosquitto.ports[0], ca_file)


@pytest.fixture
def start_sensors(site: Site) -> Iterator[Callable[[str, int], list[Sensor]]]:
    """Return a function that starts sensors and waits until each has got messages through."""
    started: list[Sensor] = []

    def start(name: str, count: int) -> list[Sensor]:
        sensors = []
        for number in range(count):
            sensors.append(Sensor(f"{name}-{number}", site.port, f"127.0.1.{len(started) + 1}"))
            started.append(sensors[-1])
            # One after the other, so that each is counted when the next is dealt out.
            sensors[-1].wait_for_more(1)
        # The gateways' logs may come a little later than CONNACK.
        eventually(
            lambda: all(any(site.sensors(each, [sensor]) for each in site.gateways) for sensor in sensors),
            "all in a log",
        )
        return sensors

    yield start
    for sensor in started:
        sensor.stop()
    assert [sensor.faults for sensor in started] == [[]] * len(started)


def test_the_documented_haproxy_configuration_is_valid() -> None:
    """Word for word, as HAProxy itself checks it."""
    check = subprocess.run(
        [require_tool("haproxy"), "-c", "-f", str(HAPROXY_CFG)], capture_output=True, text=True, check=False
    )
    assert (check.returncode, "WARNING" in check.stdout + check.stderr) == (0, False), check.stderr


def test_the_documented_gateway_configuration_is_valid(tmp_path: Path) -> None:
    """Word for word, as the gateway itself checks it."""
    path = tmp_path / "gateway.toml"
    path.write_text(documented("gateway.toml"))
    assert [str(network) for network in load_file(path).listen[0].proxies] == ["10.0.0.5/32"]


@pytest.mark.slow
def test_draining_one_gateway_disturbs_no_session_of_the_other(
    site: Site, start_sensors: Callable[[str, int], list[Sensor]]
) -> None:
    """SIGTERM to one: its devices come back on the other, whose own go on; then it is back and gets new ones."""
    sensors = start_sensors("first", 8)
    on_a, on_b = site.sensors("a", sensors), site.sensors("b", sensors)
    assert (len(on_a), len(on_b)) == (4, 4)
    for name in ("a", "b"):
        for sensor in site.sensors(name, sensors):
            assert f"{sensor.source}:" in site.gateways[name].sessions()[sensor.identifier]
    before = [sensor.acknowledged for sensor in on_b]

    site.gateways["a"].terminate()
    site.wait_status(a="DOWN")
    # It ends its sessions one after the other, and what HAProxy thinks of it ends none.
    on_b[0].wait_for_more()
    assert [sensor for sensor in on_a if not sensor.lost]
    for sensor in on_a:
        eventually(lambda sensor=sensor: sensor.connected == 2, f"{sensor.identifier} is back")
        sensor.wait_for_more()
        assert sensor.lost == 1
    # Twisted ends a process that was told to stop by that same signal, once all is done.
    assert site.gateways["a"].wait_ended() in {0, -signal.SIGTERM}
    site.wait_on("b", sensors)
    new = start_sensors("second", 2)
    site.wait_on("b", new)

    for sensor, count in zip(on_b, before, strict=True):
        sensor.wait_for_more()
        assert sensor.acknowledged > count + 5
        assert (sensor.connected, sensor.lost) == (1, 0)

    site.gateways["a"] = site.start("a")
    site.wait_status(a="UP")
    newest = start_sensors("third", 4)
    site.wait_on("a", newest)
    for sensor in on_b:
        sensor.wait_for_more()
        assert (sensor.connected, sensor.lost) == (1, 0)
    # The health checks of all that time, five a second, are nobody's business.
    for gateway in site.gateways.values():
        assert "refused" not in gateway.log
        assert "no Client Identifier" not in gateway.log


@pytest.mark.slow
def test_a_gateway_that_haproxy_drains_keeps_its_sessions(
    site: Site, start_sensors: Callable[[str, int], list[Sensor]]
) -> None:
    """Nobody is disturbed at all; new sessions go to the other one until it is ready again."""
    sensors = start_sensors("first", 4)
    assert site.haproxy.ask("set server mqtt/a state drain").strip() == ""
    site.wait_status(a="DRAIN")
    new = start_sensors("second", 4)
    site.wait_on("b", new)
    site.haproxy.ask("set server mqtt/a state ready")
    site.wait_status(a="UP")
    newest = start_sensors("third", 4)
    site.wait_on("a", newest)
    for sensor in sensors + new + newest:
        sensor.wait_for_more()
        assert (sensor.connected, sensor.lost) == (1, 0)


@pytest.mark.slow
def test_a_gateway_that_dies_takes_only_its_own_sessions(
    site: Site, start_sensors: Callable[[str, int], list[Sensor]]
) -> None:
    """Killed, not stopped: its devices are on the other as soon as they are back."""
    sensors = start_sensors("first", 4)
    on_a, on_b = site.sensors("a", sensors), site.sensors("b", sensors)
    assert (len(on_a), len(on_b)) == (2, 2)
    site.gateways["a"].stop()
    for sensor in on_a:
        eventually(lambda sensor=sensor: sensor.connected == 2, f"{sensor.identifier} is back")
        # Once: HAProxy sent nobody to the one that refuses, whatever its health checks said yet.
        assert sensor.lost == 1
    site.wait_on("b", sensors)
    for sensor in on_b:
        sensor.wait_for_more()
        assert (sensor.connected, sensor.lost) == (1, 0)


# ---- several gateways on one machine


def shared_port(port: int = 0) -> socket.socket:
    """Open a port of loopback as `ReusePort=yes` in a socket unit does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    return listener


def test_the_documented_socket_is_the_units() -> None:
    """The gateway asks for it by the name that the unit gives it, and several may open its port."""
    unit = (ROOT / "systemd" / "mqtts-gateway@.socket").read_text().splitlines()
    assert {"FileDescriptorName=mqtt", "ReusePort=yes"} <= set(unit)
    assert 'endpoint = "systemd:domain=INET:name=mqtt"' in documented("reuseport.toml")


def test_several_gateways_share_a_port(
    mosquitto: Mosquitto, ca_file: Path, tmp_path: Path, programs: list[Program]
) -> None:
    """The kernel deals connections out; when one gateway and its socket go, the other's sessions notice nothing."""
    configuration = replaced(
        documented("reuseport.toml"),
        {'host = "broker.example.com"': f'host = "localhost"\nport = {mosquitto.ports[0]}', '"ca.pem"': f'"{ca_file}"'},
    )
    configuration += "[drain]\nseconds = 2\n"
    first = shared_port()
    port = first.getsockname()[1]
    gateways = []
    sockets = [first, shared_port(port)]
    for number, listener in enumerate(sockets):
        gateways.append(GatewayProcess(tmp_path, f"gateway-{number}", configuration, listener))
        programs.append(gateways[-1])
    sensors = [Sensor(f"shared-{number}", port) for number in range(24)]
    try:
        for sensor in sensors:
            sensor.wait_for_more(1)
        eventually(lambda: sum(len(gateway.sessions()) for gateway in gateways) == 24, "24 sessions")
        there, stay = (
            [sensor for sensor in sensors if sensor.identifier in gateway.sessions()] for gateway in gateways
        )
        # All on one: once in eight million runs.
        assert there
        assert stay
        # `systemctl stop` of the socket unit, then of the service.
        sockets[0].close()
        gateways[0].terminate()
        for sensor in there:
            eventually(lambda sensor=sensor: sensor.connected == 2, f"{sensor.identifier} is back")
        eventually(lambda: len(gateways[1].sessions()) == 24, "all on the other")
        assert gateways[0].wait_ended() in {0, -signal.SIGTERM}
        for sensor in stay:
            sensor.wait_for_more()
            assert (sensor.connected, sensor.lost) == (1, 0)
    finally:
        for sensor in sensors:
            sensor.stop()
        sockets[1].close()
