"""Stored devices before a real mosquitto: outages, kill -9, dropped packets, an ACL for each device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import paho.mqtt.client as paho
import pytest

from gateway.errors import EndReason
from gateway.session.stored import Phase
from gateway.store import store as store_module
from tests import mqtt_packets as mqtt
from tests.balancers import GatewayProcess, HAProxy, Program
from tests.harness import PATIENCE, Broker, BrokerConnection, Device, RunningGateway, connect_version, eventually
from tests.mosquitto import Mosquitto
from tests.pki import CLIENT, SERVER, Certified, certify, certify_ca
from tests.ports import free_port
from tests.proxies import Tinyproxy
from tests.stored_world import packets_of, publish
from tests.tools import require_tool, stop_paho

HAPROXY_CFG = Path(__file__).resolve().parent.parent / "docs" / "examples" / "haproxy.cfg"
_TWISTD = "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"
_MOST_WAITING = 60  # messages of a client; what waits longer for its turn shows nothing new
_QUICK = {"retry_first": 0.1, "retry_max": 0.3}


@pytest.fixture(scope="module")
def root() -> Certified:
    """The CA of the broker and of all devices."""
    return certify_ca()


class Plant:
    """A mosquitto that comes and goes, and a subscriber whose session it keeps; it may have MQTT over WebSocket."""

    def __init__(self, directory: Path, root: Certified, more: str = "", *, websocket: bool = False) -> None:
        require_tool("mosquitto")
        self.tls, self.plain = free_port(), free_port()
        self.directory = directory
        self.ca_file = directory / "root.pem"
        self.ca_file.write_bytes(root.pem)
        own = certify(root, names=("DNS:localhost",), purposes=(SERVER,))
        (directory / "own.pem").write_bytes(own.pem)
        (directory / "own-key.pem").write_bytes(own.key_pem)
        self._configuration = (
            # It writes its sessions when it is stopped, and not with each message.
            "persistence true\nautosave_interval 0\n"
            f"persistence_location {directory}/\nmax_queued_messages 0\nmax_inflight_messages 0\n{more}"
            f"listener {self.plain} 127.0.0.1\nlistener {self.tls} 127.0.0.1\ncafile {self.ca_file}\n"
            f"certfile {directory / 'own.pem'}\nkeyfile {directory / 'own-key.pem'}\n"
            + ("protocol websockets\n" if websocket else "")
        )
        self.got: list[str] = []
        self.broker: Mosquitto | None = None
        self.subscriber = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="subscriber", clean_session=False)
        self.subscriber.username_pw_set("watcher")
        self.subscriber.on_message = lambda _client, _data, message: self.got.append(message.payload.decode())
        self.subscriber.on_connect = lambda client, *_: client.subscribe("from/#", 2)
        self.subscriber.reconnect_delay_set(1, 1)
        self.up()
        self.subscriber.connect("127.0.0.1", self.plain)
        self.subscriber.loop_start()
        eventually(self.subscriber.is_connected, "the subscriber is there")

    def up(self) -> None:
        """Start the broker."""
        self.broker = Mosquitto(self.directory, self._configuration, self.plain, self.tls)

    def down(self) -> None:
        """Stop it; it keeps its sessions."""
        if self.broker is not None:
            self.broker.stop()
            self.broker = None

    def toggle(self) -> None:
        """Stop it once its subscriber has everything, or start it."""
        if self.broker is None:
            self.up()
            return
        seen = -1
        while seen != len(self.got):
            seen = len(self.got)
            time.sleep(0.5)
        self.down()

    def stop(self) -> None:
        """Stop everything."""
        self.subscriber.disconnect()
        stop_paho(self.subscriber)
        self.down()


@pytest.fixture
def plant(tmp_path: Path, root: Certified, request: pytest.FixtureRequest) -> Iterator[Plant]:
    """A broker that lets anybody in, with WebSocket if the parameter says so."""
    made = Plant(tmp_path, root, "allow_anonymous true\n", websocket=getattr(request, "param", False))
    yield made
    made.stop()


class Sensor:
    """A client whose session is kept, which sends again what it has no acknowledgement for (paho does).

    paho may send a message that is published before CONNACK, or just after it, ahead of those that it sends again.
    `is_ready` is false until they are sent, so that a device whose messages are published only then keeps their order.
    """

    def __init__(self, name: str, port: int, source: str = "") -> None:
        self.name = name
        self.numbers: Counter[int] = Counter()
        self._acknowledged: set[int] = set()
        self.disconnects = 0
        self._payloads: dict[int, str] = {}
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
        self.client.reconnect_delay_set(1, 1)
        self.client.max_inflight_messages_set(0)  # no limit: those that wait for their turn might be overtaken, too
        self.is_ready = False
        self._lock = threading.Lock()
        self.client.on_pre_connect = self._connecting
        self.client.on_connect = self._connected
        self.client.on_publish = self._published
        self.client.on_disconnect = self._disconnected
        self.client.connect_async("127.0.0.1", port, bind_address=source)
        self.client.loop_start()
        eventually(self.client.is_connected, f"{name} is connected")

    def publish_if_ready(self, qos: int) -> None:
        """Send the next message of this QoS, unless it might overtake others."""
        with self._lock:
            if self.is_ready:
                self.publish(qos)

    def publish(self, qos: int) -> None:
        """Send the next message of this QoS."""
        payload = f"{self.name}:{qos}:{self.numbers[qos]}"
        self.numbers[qos] += 1
        self._payloads[self.client.publish(f"from/{self.name}", payload, qos).mid] = payload

    def _connecting(self, *_: Any) -> None:
        with self._lock:
            self.is_ready = False

    def _connected(self, *_: Any) -> None:
        self.is_ready = not self.waiting

    def _published(self, _client: Any, _data: Any, mid: int, *_: Any) -> None:
        # paho may say so before `publish` has returned the number.
        self._acknowledged.add(mid)
        # The thread that sends messages again reads this acknowledgement only when it has sent them all.
        self.is_ready = True

    def _disconnected(self, *_: Any) -> None:
        self.disconnects += 1

    @property
    def acknowledged(self) -> set[str]:
        """The payloads of what was acknowledged."""
        return {self._payloads[mid] for mid in self._acknowledged.copy() if mid in self._payloads}

    @property
    def waiting(self) -> int:
        """How many messages are not acknowledged."""
        return sum(self.numbers.values()) - len(self._acknowledged)

    @property
    def is_acknowledged(self) -> bool:
        """Whether everything is."""
        return len(self.acknowledged) == sum(self.numbers.values())

    def stop(self) -> None:
        """Go."""
        self.client.disconnect()
        stop_paho(self.client)


def check_arrivals(got: list[str], sensors: list[Sensor], doubled: int = 0) -> int:
    """Everything acknowledged is there, in order; QoS 2 once but for so many.  Returns how many came twice."""
    times = Counter(got)
    for sensor in sensors:
        assert sensor.acknowledged <= times.keys()
        for qos in (1, 2):
            first = [text for text in dict.fromkeys(got) if text.startswith(f"{sensor.name}:{qos}:")]
            numbers = [int(text.rpartition(":")[2]) for text in first]
            assert numbers == sorted(numbers), f"{sensor.name} QoS {qos}"
    assert len(twice := [text for text, count in times.items() if count > 1 and ":2:" in text]) <= doubled, twice
    return sum(count - 1 for count in times.values())


def store(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Make the sections of a configuration with stored devices."""
    rule = {"match_client_id": "*", "bound_to": ["127.0.0.0/8"], "store": True, **more}
    return {"store": {"directory": str(tmp_path / "store"), "after": 2}, "device": [rule], "failover": _QUICK}


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Tinyproxy]:
    """An HTTP proxy."""
    proxy = Tinyproxy(tmp_path)
    yield proxy
    proxy.stop()


@pytest.mark.slow
def test_a_device_notices_nothing_of_an_outage(reactor: Any, plant: Plant, tmp_path: Path) -> None:
    """It publishes on; the subscriber gets everything in order."""
    go_through_an_outage(reactor, plant, tmp_path, [{"host": "localhost", "port": plant.tls}])


@pytest.mark.slow
@pytest.mark.parametrize("plant", [True], ids=["websocket"], indirect=True)
def test_nor_over_websocket_through_a_proxy(reactor: Any, plant: Plant, proxy: Tinyproxy, tmp_path: Path) -> None:
    """Stored devices have the ways out that others have."""
    way = {"host": "localhost", "port": plant.tls, "transport": "websocket", "path": "/mqtt", "proxy": proxy.url}
    go_through_an_outage(reactor, plant, tmp_path, [way])
    assert f"CONNECT localhost:{plant.tls}" in proxy.log


def go_through_an_outage(reactor: Any, plant: Plant, tmp_path: Path, upstream: list[dict[str, Any]]) -> None:
    """Have a device publish before, during and after an outage."""
    gateway = RunningGateway(reactor, upstream, ca_file=plant.ca_file, **store(tmp_path, store_qos0="confirm"))
    sensor = Sensor("one", gateway.port)
    try:
        for phase in ("before", "outage", "after"):
            if phase == "outage":
                # What a restart of mosquitto does to its own subscriber's QoS 2 is not the gateway's.
                eventually(lambda: len(set(plant.got)) == 120, "what came before has arrived")
                plant.toggle()
            for _ in range(40):
                for qos in (0, 1, 2):
                    sensor.publish(qos)
            eventually(lambda: sensor.is_acknowledged, f"everything is acknowledged, {phase}")
            if phase == "outage":
                plant.up()
        eventually(lambda: len(set(plant.got)) == 360, "everything arrives")
        check_arrivals(plant.got, [sensor])
        assert sensor.disconnects == 0
        stored = gateway.service.gateway.stored
        assert stored is not None
        eventually(lambda: [each.phase for each in stored.sessions.values()] == [Phase.LIVE], "it is live again")
    finally:
        sensor.stop()
        gateway.stop()


def test_a_backlog_outlives_gateway_and_device(reactor: Any, plant: Plant, tmp_path: Path) -> None:
    """The device is gone, the gateway starts anew, the broker comes back."""
    plant.down()
    sections = store(tmp_path)
    first = RunningGateway(reactor, plant.tls, ca_file=plant.ca_file, **sections)
    sensor = Sensor("one", first.port)
    for _ in range(50):
        sensor.publish(1)
        sensor.publish(2)
    eventually(lambda: sensor.is_acknowledged, "everything is acknowledged")
    sensor.stop()
    first.stop()
    second = RunningGateway(reactor, plant.tls, ca_file=plant.ca_file, **sections)
    plant.up()
    eventually(lambda: len(set(plant.got)) == 100, "everything arrives")
    check_arrivals(plant.got, [sensor])
    second.stop()


def test_no_more_devices_are_stored_than_can_be_remembered(
    reactor: Any, root: Certified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are known are served; what they send right behind CONNECT counts."""
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(root.pem)
    gateway = RunningGateway(reactor, free_port(), ca_file=ca_file, **store(tmp_path))
    packet = publish(4, b"t", b"1", 1, 1)
    try:
        for name, answer in (("one", b"\x20\2\0\0\x40\2\0\1"), ("two", b"\x20\2\0\3")):
            with Device(gateway.port) as device:
                device.send(mqtt.connect(name) + packet)
                assert device.read(len(answer)) == answer
            monkeypatch.setattr(store_module, "MOST_REMEMBERED", 0)
        first, second = eventually(lambda: gateway.ended if len(gateway.ended) == 2 else None, "both have ended")
        assert first.bytes_up == len(packet)
        assert second.reason is EndReason.STORE_UNAVAILABLE
    finally:
        gateway.stop()


def left_behind(port: int, password: str | None = None) -> None:
    """A device stores a message while there is no broker, and leaves."""
    device = Device(port)
    username = None if password is None else "watcher"
    device.send(mqtt.connect("one", username=username, password=None if password is None else password.encode()))
    assert device.read(4) == b"\x20\2\0\0"
    device.send(publish(4, b"from/one", b"one:1:1", 1, 1))
    assert device.read(4) == b"\x40\2\0\1"
    device.send(b"\xe0\0")
    device.close()


@pytest.mark.slow
def test_a_backlog_leaves_with_the_password_that_its_device_had(reactor: Any, plant: Plant, tmp_path: Path) -> None:
    """As long as the gateway runs: the password is in memory only."""
    plant.down()
    gateway = RunningGateway(reactor, plant.tls, ca_file=plant.ca_file, **store(tmp_path))
    try:
        left_behind(gateway.port, "secret")
        plant.up()
        eventually(lambda: plant.got, "the message arrives")
        assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "store").glob("store.db*"))
    finally:
        gateway.stop()


@pytest.mark.slow
def test_a_backlog_does_not_leave_under_a_name_that_now_belongs_to_another_rule(
    reactor: Any, plant: Plant, tmp_path: Path
) -> None:
    """The gateway comes back to the broker again and again, each time by the rules of that moment."""
    plant.down()
    sections = store(tmp_path)
    gateway = RunningGateway(reactor, plant.tls, ca_file=plant.ca_file, **sections)
    try:
        left_behind(gateway.port)
        owner = {"match_client_id": "pump", "client_id": "one", "bound_to": ["192.0.2.1"]}
        gateway.change(device=[owner, *sections["device"]])
        plant.up()
        stored = gateway.service.gateway.stored
        assert stored is not None
        (session,) = stored.sessions.values()
        reserved = EndReason.CLIENT_ID_RESERVED
        eventually(lambda: session.trouble is not None and session.trouble.reason is reserved, "its name is reserved")
        assert plant.got == []
        gateway.change(device=sections["device"])
        eventually(lambda: plant.got, "the message arrives once the name is its own again")
    finally:
        gateway.stop()


def wait_for_all(count: Callable[[], int], wanted: int) -> None:
    """Wait until there are as many as wanted, for as long as they become more."""
    seen, since = -1, time.monotonic()
    while seen < wanted:
        now = count()
        if now > seen:
            seen, since = now, time.monotonic()
        assert time.monotonic() - since < 2 * PATIENCE, f"{seen} of {wanted}, and no more come"
        time.sleep(0.2)


_FEW_KILLS = 5


def at_rest(got: list[str]) -> None:
    """Wait until nothing has come for a second."""
    since, count = time.monotonic(), len(got)
    while time.monotonic() - since < 1:
        time.sleep(0.05)
        if len(got) != count:
            since, count = time.monotonic(), len(got)


def run_killed(plant: Plant, tmp_path: Path, kills: int, count: int) -> tuple[int, int]:
    """Kill a gateway at random while devices publish through outages.  Returns messages, and those that came twice."""
    port = free_port()
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[[listen]]\nendpoint = "127.0.0.1:{port}"\n[[upstream]]\nhost = "localhost"\nport = {plant.tls}\n'
        f'[tls]\nca_file = "{plant.ca_file}"\n[drain]\nseconds = 0\n[devices]\nconnects_per_minute = 0\n'
        f'[store]\ndirectory = "{tmp_path / "store"}"\nafter = 2\n[failover]\nretry_first = 0.1\nretry_max = 0.3\n'
        '[[device]]\nmatch_client_id = "*"\nbound_to = "127.0.0.0/8"\nstore = true\n'
    )
    words = [sys.executable, "-c", _TWISTD, "-n", "--pidfile=", "mqtts-gateway", "--config", str(path)]
    output = (tmp_path / "output").open("ab")
    random = Random(7)  # noqa: S311  reproducible

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)

    process = start()
    sensors = [Sensor(f"d{number}", port) for number in range(count)]
    try:
        for kill in range(kills):
            for _ in range(10):
                for sensor in random.sample(sensors, max(1, count // 2)):
                    if sensor.waiting < _MOST_WAITING:
                        sensor.publish_if_ready(random.choice((1, 2)))
                time.sleep(random.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kill % 3 == 1:
                # What a restart of mosquitto does to its own subscriber's QoS 2 is not the gateway's.
                at_rest(plant.got)
                plant.toggle()
            process = start()
            wanted, since = random.randrange(count), time.monotonic()
            while sum(sensor.client.is_connected() for sensor in sensors) < wanted:
                assert time.monotonic() - since < 2 * PATIENCE, f"not {wanted} devices are connected"
                time.sleep(0.05)
        if plant.broker is None:
            plant.up()
        sent = sum(sum(sensor.numbers.values()) for sensor in sensors)
        wait_for_all(lambda: sum(len(sensor.acknowledged) for sensor in sensors) + len(set(plant.got)), 2 * sent)
        time.sleep(1)  # so that what would come twice has come
        # A kill can cost both PUBCOMP and the next CONNACK; then a message comes twice (docs/store-and-forward.md, 3).
        # How often depends on the machine: 13 to 42 of some 4,000 were seen, the most on a busy one. If all that was
        # on its way came twice after each kill, it would be a quarter. The simulation holds the promise itself.
        return sent, check_arrivals(plant.got, sensors, sent // 20 if kills > _FEW_KILLS else 0)
    finally:
        for sensor in sensors:
            sensor.stop()
        process.terminate()
        process.wait()
        output.close()


@pytest.mark.slow
def test_a_gateway_that_is_killed_loses_nothing(plant: Plant, tmp_path: Path) -> None:
    """SIGKILL, at random."""
    run_killed(plant, tmp_path, _FEW_KILLS, 6)


@pytest.mark.slow
def test_a_gateway_that_is_killed_many_times_loses_nothing(plant: Plant, tmp_path: Path) -> None:
    """With fifty devices; STORE_KILLS says how often, 200 for the record."""
    kills = int(os.environ.get("STORE_KILLS", "12"))
    sent, twice = run_killed(plant, tmp_path, kills, 50)
    print(f"{sent} messages, {twice} of them twice")  # noqa: T201  what it is run for


@pytest.mark.slow
def test_two_gateways_behind_haproxy_keep_a_store_each(plant: Plant, tmp_path: Path) -> None:
    """With `balance source` each device stays with its gateway through an outage, and nothing is lost or twice."""
    ports = {name: free_port() for name in ("a", "b")}
    own_port = free_port()
    programs: list[Program] = []
    sensors: list[Sensor] = []
    try:
        gateways = {}
        for name, port in ports.items():
            configuration = (
                f'[[listen]]\nendpoint = "127.0.0.1:{port}"\nproxies = "127.0.0.1"\n[[upstream]]\nhost = "localhost"\n'
                f'port = {plant.tls}\n[tls]\nca_file = "{plant.ca_file}"\n[store]\ndirectory = "{tmp_path / name}"\n'
                "after = 2\n[failover]\nretry_first = 0.1\nretry_max = 0.3\n[[device]]\n"
                'match_client_id = "*"\nbound_to = "127.0.0.0/8"\nstore = true\n'
            )
            gateways[name] = GatewayProcess(tmp_path, name, configuration)
            programs.append(gateways[name])
        text = HAPROXY_CFG.read_text()
        for old, new in {
            "balance leastconn": "balance source",
            "bind 10.0.0.5:1883": f"bind 127.0.0.1:{own_port}",
            "server a 10.0.0.11:1883": f"server a 127.0.0.1:{ports['a']}",
            "server b 10.0.0.12:1883": f"server b 127.0.0.1:{ports['b']}",
            "/run/haproxy/admin.sock": str(tmp_path / "admin.sock"),
            "log /dev/log local0": "log stdout format raw local0",
            "maxconn 20000": "maxconn 500",
            "    user haproxy\n    group haproxy\n": "",
        }.items():
            assert old in text
            text = text.replace(old, new)
        programs.append(HAProxy(tmp_path, text, tmp_path / "admin.sock"))
        sensors += [Sensor(f"d{number}", own_port, f"127.0.3.{number + 1}") for number in range(6)]

        def publish_all() -> None:
            for sensor in sensors:
                sensor.publish(1)
                sensor.publish(2)
            eventually(lambda: all(sensor.is_acknowledged for sensor in sensors), "everything is acknowledged")

        publish_all()
        eventually(lambda: len(plant.got) == 12, "everything has arrived")
        # What a restart of mosquitto does to its own subscriber's QoS 2 is not the gateways'.
        at_rest(plant.got)
        plant.down()
        for _ in range(5):
            publish_all()
        # One that is thrown out in the outage, by another with its name, finds its gateway again.
        with Device(own_port, source="127.0.3.1") as device:
            device.send(mqtt.connect("d0", clean_start=False))
            eventually(lambda: sensors[0].disconnects, "it is thrown out")
            eventually(sensors[0].client.is_connected, "it has connected again")
        plant.up()
        eventually(lambda: len(set(plant.got)) == 72, lambda: f"all arrive; so far {len(set(plant.got))}")
        check_arrivals(plant.got, sensors)
        assert [sensor.disconnects for sensor in sensors] == [1, 0, 0, 0, 0, 0]
        served = [{number for number in range(6) if f'"d{number}"' in gateway.log} for gateway in gateways.values()]
        assert served[0] | served[1] == set(range(6))
        assert not served[0] & served[1]
        assert all(served), "both have some"
    finally:
        for sensor in sensors:
            sensor.stop()
        for program in reversed(programs):
            program.stop()


def acknowledges(connection: BrokerConnection) -> None:
    """Serve as a broker that acknowledges QoS 1."""
    version = connect_version(connection.read_packet())
    assert version == 4
    connection.send(b"\x20\x02\x00\x00")
    while True:
        raw = connection.read_packet()
        if raw[0] >> 4 == 3:
            size = int.from_bytes(raw[2:4], "big")
            connection.send(b"\x40\x02" + raw[4 + size : 6 + size])
        elif raw[0] == 0xC0:
            connection.send(b"\xd0\0")


@pytest.mark.parametrize("qos", [1, 0])
def test_packets_that_are_dropped_silently_cost_no_message(
    qos: int, reactor: Any, root: Certified, tmp_path: Path
) -> None:
    """TCP notices nothing yet; the device gets its acknowledgements all the same, if there are any for its QoS."""
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(root.pem)
    broker = Broker(tls=certify(root, names=("DNS:localhost",), purposes=(SERVER,)).server(), serve=acknowledges)
    gateway = RunningGateway(reactor, broker.port, ca_file=ca_file, **store(tmp_path, store_qos0="confirm"))
    try:
        with Device(gateway.port) as device:
            device.send(mqtt.connect("one"))
            assert device.read(4) == b"\x20\2\0\0"
            device.send(mqtt.publish(payload=b"before", qos=1, packet_identifier=1))
            assert device.read(4) == b"\x40\2\0\1"
            broker.blackhole()
            for number in range(2, 12):
                device.send(mqtt.publish(payload=b"during %d" % number, qos=qos, packet_identifier=number))
            stored = gateway.service.gateway.stored
            assert stored is not None
            eventually(lambda: stored.store.messages == 10, "all are stored")
            if qos:
                answers = packets_of(device.read(40))
                assert [raw[3] for raw in answers] == list(range(2, 12))
            broker.come_back()
            eventually(lambda: stored.store.messages == 0, "everything is delivered")
            for number in range(2, 12):
                assert b"during %d" % number in broker.received
        assert len(broker.connections) == 1
    finally:
        gateway.stop()
        broker.stop()


def keeps_quiet(connection: BrokerConnection) -> None:
    """Serve as a broker that accepts and acknowledges nothing until the test lets it."""
    connection.read_packet()
    connection.send(b"\x20\x02\x00\x00")
    connection.read_to_end()


def connect_as(port: int, username: str) -> Device:
    """A device whose user name is not the only one for its Client Identifier comes."""
    device = Device(port)
    device.send(mqtt.connect("one", username=username))
    assert device.read(4) == b"\x20\2\0\0"
    return device


@pytest.mark.slow
def test_two_identities_with_one_client_identifier_take_turns(
    reactor: Any, root: Certified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connected at the same time, they would end each other's connections again and again."""
    monkeypatch.setattr("gateway.reception._SOON", 0.1)
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(root.pem)
    broker = Broker(tls=certify(root, names=("DNS:localhost",), purposes=(SERVER,)).server(), serve=keeps_quiet)
    gateway = RunningGateway(reactor, broker.port, ca_file=ca_file, **store(tmp_path))
    try:
        alice = connect_as(gateway.port, "alice")
        alice.send(publish(4, b"from/one", b"of alice", 1, 1) + b"\xe0\0")
        eventually(lambda: b"of alice" in broker.received, "her message is under way")
        stored = gateway.service.gateway.stored
        assert stored is not None
        bob = connect_as(gateway.port, "bob")
        assert broker.connection(0).finished.wait(PATIENCE)
        eventually(lambda: len(broker.connections) == 2, "his connection")
        of_alice = next(each for name, each in stored.sessions.items() if "alice" in name)
        eventually(
            lambda: of_alice.trouble is not None and "backlog" in of_alice.trouble.detail, "her backlog has to wait"
        )
        assert len(broker.connections) == 2
        assert of_alice.backlog
        carol = connect_as(gateway.port, "carol")
        eventually(lambda: EndReason.TAKEN_OVER in {each.reason for each in gateway.ended}, "one name, one device")
        carol.send(b"\xe0\0")
        eventually(lambda: broker.received.count(b"of alice") == 2, "it is sent again once she may connect")
        for device in (alice, bob, carol):
            device.close()
    finally:
        gateway.stop()
        broker.stop()


def identities_survive(reactor: Any, root: Certified, tmp_path: Path, count: int) -> None:
    """Half of the devices are gone before the outage ends; each message arrives under its own device's name."""
    (tmp_path / "acl").write_text("user watcher\ntopic read #\npattern write from/%u/#\n")
    rules = tmp_path / "devices"
    rules.mkdir()
    names = [f"device-{number:03}" for number in range(count)]
    for name in names:
        certify(root, subject=name, names=(), purposes=(CLIENT,)).write(rules / f"{name}.pem")
        (rules / f"{name}.toml").write_text(f'client_cert = "{name}.pem"\nstore = true\nbound_to = "127.0.0.0/8"\n')
    plant = Plant(tmp_path, root, f"acl_file {tmp_path / 'acl'}\nallow_anonymous true\n")
    plant._configuration += "require_certificate true\nuse_identity_as_username true\n"
    plant.down()
    gateway = RunningGateway(
        reactor,
        plant.tls,
        ca_file=plant.ca_file,
        devices={"directory": str(rules)},
        store={"directory": str(tmp_path / "store"), "after": 2},
        failover=_QUICK,
        pacing={"new_sessions_per_second": 0},
    )
    standing = []
    try:
        for number, name in enumerate(names):
            device = Device(gateway.port)
            device.send(mqtt.connect(name))
            assert device.read(4)[:2] == b"\x20\2"
            for each in range(4):
                topic = f"from/{name}/x"
                device.send(mqtt.publish(topic, payload=f"{name}:{each}".encode(), qos=1, packet_identifier=each + 1))
            assert [raw[3] for raw in packets_of(device.read(16))] == [1, 2, 3, 4]
            if number % 2:
                device.close()
            else:
                standing.append(device)
        plant.up()
        eventually(lambda: len(set(plant.got)) == 4 * count, lambda: f"all arrive; so far {len(set(plant.got))}")
        for name in names:
            assert [text for text in plant.got if text.startswith(name)] == [f"{name}:{each}" for each in range(4)]
    finally:
        for device in standing:
            device.close()
        gateway.stop()
        plant.stop()


@pytest.mark.slow
def test_backlogs_arrive_under_their_devices_identities(reactor: Any, root: Certified, tmp_path: Path) -> None:
    """The broker's ACL knows each by its certificate."""
    identities_survive(reactor, root, tmp_path, 24)


@pytest.mark.slow
def test_backlogs_of_500_devices_arrive_under_their_identities(reactor: Any, root: Certified, tmp_path: Path) -> None:
    """As many as a plant has."""
    identities_survive(reactor, root, tmp_path, 500)
