"""Brokers that are reached over WebSocket: real ones, one that is scripted, and through a proxy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import trustme
from wsproto.events import BytesMessage, CloseConnection, Ping, RejectConnection, Request, TextMessage

from gateway.errors import EndReason
from tests import mqtt_packets as packets
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.mosquitto import open_mosquitto
from tests.ports import free_port
from tests.proxies import Tinyproxy
from tests.tools import stop_paho
from tests.websockets import WebSocketBroker, WebSocketConnection, WebSocketNginx

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]


@pytest.fixture(scope="module")
def certificate(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    directory = tmp_path_factory.mktemp("certificate")
    issued = ca.issue_cert("localhost")
    chain, key = directory / "chain.pem", directory / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return chain, key


@pytest.fixture(scope="module")
def amqtt(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebSocketBroker]:
    """Amqtt with a WebSocket listener over TLS."""
    broker = WebSocketBroker(tmp_path_factory.mktemp("amqtt"), *certificate)
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def nginx(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebSocketNginx]:
    """Nginx in front of an amqtt without TLS."""
    behind = WebSocketBroker(tmp_path_factory.mktemp("amqtt"))
    proxy = WebSocketNginx(tmp_path_factory.mktemp("nginx"), behind.port, *certificate)
    yield proxy
    proxy.stop()
    behind.stop()


def over_websocket(port: int, **keys: Any) -> list[dict[str, Any]]:
    """Return an `[[upstream]]` table for a broker on localhost."""
    return [{"host": "localhost", "port": port, "transport": "websocket", **keys}]


def exchange(gateway: RunningGateway, name: str, large: int = 200_000) -> None:
    """Have a client of paho's subscribe, publish with QoS 1 and get its message back, small and large."""
    received: list[bytes] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv311)
    client.on_message = lambda _client, _data, message: received.append(message.payload)
    answers: list[Any] = []
    client.on_connect = lambda _client, _data, _flags, code, _properties: answers.append(code)
    subscribed: list[Any] = []
    client.on_subscribe = lambda *_: subscribed.append(True)
    client.connect("127.0.0.1", gateway.port)
    client.loop_start()
    try:
        # If this session fails, paho connects again, but does not subscribe again.
        eventually(lambda: answers, "an answer to CONNECT")
        assert not answers[0].is_failure, gateway.ended
        client.subscribe(f"{name}/#", 1)
        eventually(lambda: subscribed, lambda: f"subscribed; sessions that have ended: {gateway.ended}")
        sent = [b"small", bytes(large), b"last"]
        for payload in sent:
            client.publish(f"{name}/x", payload, qos=1).wait_for_publish(20)
        eventually(
            lambda: len(received) == len(sent), lambda: f"all messages; sessions that have ended: {gateway.ended}"
        )
        assert received == sent
    finally:
        client.disconnect()
        stop_paho(client)


def test_messages_pass_through_amqtt(start_gateway: StartGateway, amqtt: WebSocketBroker) -> None:
    """A real client to a real broker."""
    gateway = start_gateway(upstream=over_websocket(amqtt.port, path="/"))
    exchange(gateway, "amqtt")
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT
    gateway.wait_empty()


def test_messages_pass_through_mosquitto(
    start_gateway: StartGateway, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its own listener for WebSocket, over TLS."""
    port = free_port()
    broker = open_mosquitto(tmp_path, free_port(), port, certificate, websocket=True)
    try:
        gateway = start_gateway(upstream=over_websocket(port))
        # mosquitto 2.0.11 sends 4 kB of a message every 100 ms.
        exchange(gateway, "mosquitto", large=10_000)
        gateway.wait_empty()
    finally:
        broker.stop()


def test_messages_pass_through_nginx(start_gateway: StartGateway, nginx: WebSocketNginx) -> None:
    """Nginx puts frames together anew."""
    gateway = start_gateway(upstream=over_websocket(nginx.port, path="/broker"))
    exchange(gateway, "nginx")
    gateway.wait_empty()


def test_messages_pass_through_a_proxy_and_a_websocket(
    start_gateway: StartGateway, amqtt: WebSocketBroker, tmp_path: Path
) -> None:
    """Both on one connection."""
    proxy = Tinyproxy(tmp_path, amqtt.port)
    try:
        gateway = start_gateway(upstream=over_websocket(amqtt.port, path="/", proxy=proxy.url))
        exchange(gateway, "both")
        assert gateway.wait_ended().upstream_address.endswith(f":{proxy.port}")
    finally:
        proxy.stop()


def test_a_hundred_devices(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Each has a WebSocket of its own, across a reload; when the broker goes, all are told and leave nothing."""
    broker = start_broker(serve=lambda connection: serve_echo(WebSocketConnection(connection)))
    gateway = start_gateway(upstream=over_websocket(broker.port))
    devices = [Device(gateway.port) for _ in range(100)]
    for index, device in enumerate(devices):
        device.send(packets.connect(client_identifier=f"device-{index}"))
    for device in devices:
        assert device.read(4) == packets.connack()
    gateway.change(limits={"max_packet_size": 100_000})
    for device in devices:
        message = packets.publish()
        device.send(message)
        assert device.read(len(message)) == message
    broker.stop()
    for device in devices:
        device.read_to_end()
        device.close()
    gateway.wait_empty()


def serve_echo(websocket: WebSocketConnection) -> None:
    """Accept CONNECT, and send back what comes."""
    websocket.read_packet()
    websocket.send(packets.connack())
    while (data := websocket.read()) and websocket.closed is None:
        websocket.send(data)


def test_a_path_without_a_websocket_is_refused(start_gateway: StartGateway, nginx: WebSocketNginx) -> None:
    """`websocket-refused` with the status; the device is told, and the broker backs off."""
    gateway = start_gateway(upstream=over_websocket(nginx.port, path="/elsewhere"))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    record = gateway.wait_ended()
    assert record.reason is EndReason.WEBSOCKET_REFUSED
    assert "404" in record.detail
    (health,) = gateway.service.gateway.upstreams
    assert not health.is_open


def test_no_mqtt_byte_leaves_before_the_websocket_is_open(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """A verified server that refuses the WebSocket has seen HTTP, and nothing of the device."""

    def refuse(connection: BrokerConnection) -> None:
        WebSocketConnection(connection, lambda _: RejectConnection(status_code=401))

    broker = start_broker(serve=refuse)
    gateway = start_gateway(upstream=over_websocket(broker.port))
    with Device(gateway.port) as device:
        device.send(packets.connect(client_identifier="device-17") + packets.publish())
        assert device.read_to_end() == packets.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.WEBSOCKET_REFUSED
    assert broker.received.startswith(b"GET /mqtt HTTP/1.1\r\n")
    assert broker.received.endswith(b"\r\n\r\n")
    assert b"device-17" not in broker.received
    gateway.wait_empty()


def test_not_even_http_leaves_before_verification(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """The request may be secret."""
    broker = start_broker(tls=ServerTLS.from_trustme(trustme.CA().issue_cert("localhost")))
    gateway = start_gateway(upstream=over_websocket(broker.port))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.TLS_UNTRUSTED_CHAIN
    assert broker.received == b""


@pytest.mark.parametrize("source", ["file", "command"])
@pytest.mark.usefixtures("reaping")
def test_secret_fields_and_queries(
    source: str, start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """From a file or a program; the request has them, and no record does."""
    requests: list[Request] = []

    def serve(connection: BrokerConnection) -> None:
        websocket = WebSocketConnection(connection)
        requests.append(websocket.request)
        serve_echo(websocket)

    broker = start_broker(serve=serve)
    lines = tmp_path / "request"
    lines.write_text("x-token: hunter2\n?X-Amz-Signature=hunter3\n")
    given = {"request_file": str(lines)} if source == "file" else {"request_command": ["/bin/cat", str(lines)]}
    gateway = start_gateway(upstream=over_websocket(broker.port, path="/mqtt?a=b", **given))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read(4) == packets.connack()
        device.send(packets.disconnect())
        device.read_to_end()
    (request,) = requests
    assert request.target == "/mqtt?a=b&X-Amz-Signature=hunter3"
    assert (b"x-token", b"hunter2") in request.extra_headers
    assert "hunter" not in repr(gateway.wait_ended())


@pytest.mark.usefixtures("reaping")
def test_a_program_that_fails(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """`credentials-unavailable`; the broker is not even dialled."""
    broker = start_broker()
    gateway = start_gateway(upstream=over_websocket(broker.port, request_command=["/bin/false"]))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read_to_end() == packets.connack(code=3)
    assert gateway.wait_ended().reason is EndReason.CREDENTIALS_UNAVAILABLE
    assert broker.accepted == 0


@pytest.mark.usefixtures("reaping")
def test_no_turn_at_the_program(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is told, and the broker, which has nothing to do with it, counts as available."""
    monkeypatch.setattr("gateway.rules.secrets._PROGRAMS", 0)
    monkeypatch.setattr("gateway.rules.turns._ROOM", 0)
    broker = start_broker()
    gateway = start_gateway(upstream=over_websocket(broker.port, request_command=["/bin/true"]))
    for number in (1, 2):
        with Device(gateway.port) as device:
            device.send(packets.connect())
            assert device.read_to_end() == packets.connack(code=3)
        assert gateway.wait_ended(number).reason is EndReason.TOO_MANY_NEW_SESSIONS


class Scripted:
    """A broker's end of one session, which a test goes on with by hand."""

    def __init__(self, start_gateway: StartGateway, start_broker: StartBroker) -> None:
        self.websockets: list[WebSocketConnection] = []

        def serve(connection: BrokerConnection) -> None:
            websocket = WebSocketConnection(connection)
            websocket.read_packet()
            websocket.send(packets.connack())
            self.websockets.append(websocket)
            while websocket.read():
                pass

        self.broker = start_broker(serve=serve)
        # This broker leaves a close_notify without an answer.
        self.gateway = start_gateway(upstream=over_websocket(self.broker.port), timeouts={"close": 0.5})
        self.device = Device(self.gateway.port)
        self.device.send(packets.connect(keep_alive=0))
        assert self.device.read(4) == packets.connack()
        self.websocket = eventually(lambda: self.websockets, "the session stands")[0]


@pytest.fixture
def scripted(start_gateway: StartGateway, start_broker: StartBroker) -> Iterator[Scripted]:
    """A session that has been accepted."""
    made = Scripted(start_gateway, start_broker)
    yield made
    made.device.close()


def test_packets_are_not_aligned_to_frames(scripted: Scripted) -> None:
    """MQTT 5.0 §6.0 [MQTT-6.0.0-2]: one packet in many frames, many packets in one."""
    wire = packets.publish(payload=b"a" * 100) + packets.publish(payload=b"b")
    for index in range(0, len(wire), 7):
        scripted.websocket.send_event(BytesMessage(wire[index : index + 7], message_finished=index % 2 == 0))
    assert scripted.device.read(len(wire)) == wire
    scripted.websocket.send_event(BytesMessage(wire))
    assert scripted.device.read(len(wire)) == wire


def test_a_websocket_is_never_lent_to_the_compiled_core(scripted: Scripted) -> None:
    """The core would write packets without frames, and take frames for packets."""
    for _ in range(3):
        scripted.device.send(packets.publish())
        eventually(lambda: packets.publish() in scripted.websocket.mqtt, "the message at the broker")
        scripted.websocket.send(packets.publish())
        assert scripted.device.read(len(packets.publish())) == packets.publish()
    assert not scripted.gateway.service._relay._lent


def test_a_ping_is_answered(scripted: Scripted) -> None:
    """With its payload; the device sees nothing of it."""
    scripted.websocket.send_event(Ping(b"are you there"))
    eventually(lambda: scripted.websocket.ponged, "a Pong")
    assert scripted.websocket.ponged == [b"are you there"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (TextMessage("text"), EndReason.UPSTREAM_PROTOCOL_ERROR),
        (CloseConnection(1001, "away"), EndReason.UPSTREAM_LOST),
    ],
)
def test_a_text_frame_or_a_close_ends_the_session(event: Any, reason: EndReason, scripted: Scripted) -> None:
    """[MQTT-6.0.0-1]; the device is told by the end of its connection."""
    scripted.websocket.send_event(event)
    assert scripted.device.read_to_end() == b""
    assert scripted.gateway.wait_ended().reason is reason
    scripted.gateway.wait_empty()


def test_a_disconnect_is_followed_by_a_close(scripted: Scripted) -> None:
    """The broker gets DISCONNECT, then Close 1000, then close_notify."""
    scripted.device.send(packets.disconnect())
    scripted.device.read_to_end()
    assert scripted.broker.connection().finished.wait(20)
    assert bytes(scripted.websocket.mqtt).endswith(packets.disconnect())
    assert scripted.websocket.closed == 1000


def test_a_device_that_vanishes_leaves_no_disconnect(scripted: Scripted) -> None:
    """So the broker publishes the Will."""
    scripted.device.reset()
    assert scripted.broker.connection().finished.wait(20)
    assert packets.disconnect() not in bytes(scripted.websocket.mqtt)
    assert scripted.gateway.wait_ended().reason is EndReason.DEVICE_LOST


def test_an_idle_websocket_is_kept_open(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the gateway's Pings, because middleboxes drop what is silent for a minute; Pongs go no further."""
    monkeypatch.setattr("gateway.relay.websocket.PING_INTERVAL", 0.05)
    with Device(scripted.gateway.port) as device:
        device.send(packets.connect(client_identifier="idle", keep_alive=0))
        assert device.read(4) == packets.connack()
        second = scripted.broker.connection(1)
        before = len(second.received)
        eventually(lambda: len(second.received) >= before + 3 * 6, "three Pings of six bytes")
        assert second.received[before : before + 2] == b"\x89\x80"


def test_check_has_a_step_for_the_websocket(nginx: WebSocketNginx, ca_file: Path, tmp_path: Path) -> None:
    """PASS where it opens, FAIL with the reason where it does not."""

    def check(path: str) -> subprocess.CompletedProcess[str]:
        configuration = tmp_path / "gateway.toml"
        configuration.write_text(
            f'listen = [{{ endpoint = "127.0.0.1:0" }}]\n[[upstream]]\nhost = "localhost"\nport = {nginx.port}\n'
            f'transport = "websocket"\npath = "{path}"\n[tls]\nca_file = "{ca_file}"\n'
        )
        command = [sys.executable, "-m", "gateway.cli.main", "check", "--config", str(configuration)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = check("/broker")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "subprotocol mqtt" in good.stdout
    bad = check("/")
    assert bad.returncode == 1
    assert "websocket-refused" in bad.stdout
