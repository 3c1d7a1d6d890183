"""Real clients of every version on a real broker: paho-mqtt, the mosquitto clients, a bridge; mosquitto over TLS."""

from __future__ import annotations

import itertools
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import trustme
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from gateway.errors import EndReason
from gateway.mqtt.connack import disconnect
from tests import mqtt_packets as mqtt
from tests.harness import RunningGateway, eventually
from tests.mosquitto import Mosquitto
from tests.ports import free_port
from tests.tools import require_tool, stop_paho

VERSIONS = [
    pytest.param(paho.MQTTv31, id="3.1"),
    pytest.param(paho.MQTTv311, id="3.1.1"),
    pytest.param(paho.MQTTv5, id="5.0"),
]
all_versions = pytest.mark.parametrize("version", VERSIONS)
_names = (f"test{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def mosquitto(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker behind TLS, with one user who has a password."""
    require_tool("mosquitto")
    directory = tmp_path_factory.mktemp("mosquitto")
    certificate = ca.issue_cert("localhost")
    chain, key, users = directory / "chain.pem", directory / "key.pem", directory / "users"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    users.write_text("anna:correct\n")
    subprocess.run([require_tool("mosquitto_passwd"), "-U", str(users)], check=True)
    port = free_port()
    broker = Mosquitto(
        directory,
        f"allow_anonymous true\npassword_file {users}\nmax_keepalive 100\n"
        f"listener {port} 127.0.0.1\ncertfile {chain}\nkeyfile {key}\n",
        port,
    )
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def gateway(mosquitto: Mosquitto, reactor: Any, ca_file: Path) -> Iterator[RunningGateway]:
    """The gateway in front of it."""
    gateway = RunningGateway(reactor, mosquitto.ports[0], ca_file=ca_file)
    yield gateway
    gateway.stop()


class Client:
    """A paho client with what it was told and sent."""

    def __init__(
        self,
        version: Any,
        name: str | None = None,
        *,
        will: tuple[str, bytes] | None = None,
        user: tuple[str, str] | None = None,
        clean: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.version = version
        self.name = next(_names) if name is None else name
        persistent = {} if version == paho.MQTTv5 else {"clean_session": clean}
        self._clean = clean
        self.paho = paho.Client(
            paho.CallbackAPIVersion.VERSION2,
            self.name,
            protocol=version,
            reconnect_on_failure=False,
            **persistent,
        )
        if will is not None:
            self.paho.will_set(*will, qos=1)
        if user is not None:
            self.paho.username_pw_set(*user)
        if tls is not None:
            self.paho.tls_set_context(tls)
        self.connack: tuple[Any, Any, Any] | None = None
        self.messages: list[paho.MQTTMessage] = []
        self.disconnected: list[Any] = []
        self.acknowledged: set[int] = set()
        self.paho.on_connect = lambda client, data, flags, code, properties: self._connected(flags, code, properties)
        self.paho.on_message = lambda client, data, message: self.messages.append(message)
        self.paho.on_disconnect = lambda client, data, flags, code, properties: self.disconnected.append(code)
        self.paho.on_subscribe = lambda client, data, identifier, codes, properties: self.acknowledged.add(identifier)

    def _connected(self, *connack: Any) -> None:
        self.connack = connack

    def connect(self, port: int, *, keep_alive: int = 60, expiry: int = 0) -> Client:
        """Connect and wait for CONNACK, whatever it says."""
        more: dict[str, Any] = {}
        if self.version == paho.MQTTv5:
            more = {"clean_start": self._clean, "properties": Properties(PacketTypes.CONNECT)}
            more["properties"].SessionExpiryInterval = expiry
        self.paho.connect("localhost" if self.paho._ssl else "127.0.0.1", port, keep_alive, **more)
        self.paho.loop_start()
        eventually(lambda: self.connack, "CONNACK")
        return self

    @property
    def accepted(self) -> bool:
        assert self.connack is not None
        return not self.connack[1].is_failure

    def subscribe(self, topic: str, qos: int = 2, **options: Any) -> Client:
        """Subscribe and wait for SUBACK."""
        more = {"options": SubscribeOptions(qos, **options)} if self.version == paho.MQTTv5 else {"qos": qos}
        identifier = self.paho.subscribe(topic, **more)[1]
        eventually(lambda: identifier in self.acknowledged, "SUBACK")
        return self

    def publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False, **properties: Any) -> None:
        """Publish and wait until it is acknowledged."""
        written = None
        if properties:
            written = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                setattr(written, name, value)
        self.paho.publish(topic, payload, qos, retain, written).wait_for_publish(20)

    def message(self, count: int = 1) -> paho.MQTTMessage:
        """Wait for the message number `count`."""
        eventually(lambda: len(self.messages) >= count, f"message {count}")
        return self.messages[count - 1]

    def vanish(self) -> None:
        """End the connection without DISCONNECT."""
        self.paho.socket().shutdown(socket.SHUT_RDWR)
        eventually(lambda: self.disconnected, "the end of the connection")
        stop_paho(self.paho)

    def disconnect(self) -> None:
        """End the connection with DISCONNECT."""
        self.paho.disconnect()
        eventually(lambda: self.disconnected, "the end of the connection")
        stop_paho(self.paho)


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Callable[..., Client]]:
    """Return a function that connects clients through the gateway; after the test nothing is left of them there."""
    clients: list[Client] = []

    def start(*arguments: Any, keep_alive: int = 60, expiry: int = 0, **more: Any) -> Client:
        clients.append(Client(*arguments, **more))
        return clients[-1].connect(gateway.port, keep_alive=keep_alive, expiry=expiry)

    yield start
    for each in clients:
        if not each.disconnected:
            each.disconnect()
    gateway.wait_empty()


def last_record(gateway: RunningGateway, name: str) -> Any:
    """The record of the session of `name`, when it has ended."""
    return eventually(lambda: [each for each in gateway.ended if each.client_identifier == name], f"end of {name}")[-1]


@all_versions
def test_every_quality_of_service_passes(client: Callable[..., Client], gateway: RunningGateway, version: Any) -> None:
    """Both ways, each with its own handshake, in order."""
    subscriber = client(version).subscribe("qos/#")
    publisher = client(version)
    for qos in (0, 1, 2):
        publisher.publish(f"qos/{qos}", b"21.5", qos)
        message = subscriber.message(qos + 1)
        assert (message.topic, message.payload, message.qos) == (f"qos/{qos}", b"21.5", qos)
    publisher.disconnect()
    record = last_record(gateway, publisher.name)
    assert record.reason is EndReason.DEVICE_DISCONNECT
    assert record.protocol_version == {3: "3.1", 4: "3.1.1", 5: "5.0"}[int(version)]
    assert (record.packets_up, record.packets_down) == (1 + 1 + 1 + 2 + 1, 1 + 1 + 2)


@all_versions
def test_a_retained_message_is_kept_and_cleared(client: Callable[..., Client], version: Any) -> None:
    """Who comes later gets it marked as such."""
    publisher = client(version)
    publisher.publish("retained/door", b"open", retain=True)
    message = client(version).subscribe("retained/door").message()
    assert (message.payload, message.retain) == (b"open", True)
    publisher.publish("retained/door", b"", retain=True)
    later = client(version).subscribe("retained/door")
    publisher.publish("retained/door", b"shut")
    assert (later.message().payload, later.message().retain) == (b"shut", False)


@all_versions
def test_the_will_of_a_device_that_vanishes_is_published(client: Callable[..., Client], version: Any) -> None:
    """A lost device looks lost to the broker."""
    heir = client(version).subscribe("will/#")
    client(version, will=("will/lost", b"gone")).vanish()
    assert (heir.message().topic, heir.message().payload) == ("will/lost", b"gone")


@all_versions
def test_the_will_of_a_device_that_disconnects_is_not(client: Callable[..., Client], version: Any) -> None:
    """Its DISCONNECT reaches the broker: the next message that comes is another's."""
    heir = client(version).subscribe("will/#")
    device = client(version, will=("will/well", b"gone"))
    device.disconnect()
    lost = client(version, will=("will/lost", b"gone"))
    lost.vanish()
    assert heir.message().topic == "will/lost"
    client(version).publish("will/end", b"")
    assert [heir.message(index).topic for index in (1, 2)] == ["will/lost", "will/end"]


def test_a_disconnect_with_will_is_passed_on_as_such(client: Callable[..., Client]) -> None:
    """5.0: reason code 0x04."""
    heir = client(paho.MQTTv5).subscribe("will/#")
    device = client(paho.MQTTv5, will=("will/wanted", b"gone"))
    device.paho.disconnect(paho.ReasonCode(PacketTypes.DISCONNECT, identifier=0x04))
    assert heir.message().topic == "will/wanted"


@all_versions
def test_a_payload_of_ten_megabytes_passes(client: Callable[..., Client], version: Any) -> None:
    """Both ways, byte for byte."""
    payload = bytes(range(256)) * 40 * 1024
    subscriber = client(version).subscribe("large", qos=1)
    client(version).publish("large", payload, qos=1)
    assert subscriber.message().payload == payload


@all_versions
def test_a_session_that_persists_is_found_again(client: Callable[..., Client], version: Any) -> None:
    """Session Present is the broker's, and so is what it kept meanwhile."""
    name = f"persistent{int(version)}"
    first = client(version, name, clean=False, expiry=600)
    assert first.connack is not None
    assert not first.connack[0].session_present
    first.subscribe("persistent/#", qos=1)
    first.disconnect()
    client(version).publish("persistent/x", b"kept", qos=1)
    second = client(version, name, clean=False)
    assert second.connack is not None
    # MQTT 3.1 has no such flag.
    assert second.connack[0].session_present == (version != paho.MQTTv31)
    assert second.message().payload == b"kept"


@all_versions
def test_a_refusal_is_the_brokers_own(
    gateway: RunningGateway, mosquitto: Mosquitto, ca: trustme.CA, version: Any
) -> None:
    """A wrong password has the same answer through the gateway as straight from the broker."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    refused = []
    for port, tls in ((mosquitto.ports[0], context), (gateway.port, None)):
        client = Client(version, user=("anna", "wrong"), tls=tls).connect(port)
        assert not client.accepted
        assert client.connack is not None
        refused.append(client.connack[1].value)
        stop_paho(client.paho)
    assert refused[0] == refused[1]
    record = last_record(gateway, client.name)
    assert record.reason is EndReason.UPSTREAM_REFUSED
    assert ("0x87" if version == paho.MQTTv5 else "0x05") in record.detail
    assert "wrong" not in repr(record)


@all_versions
def test_credentials_pass(client: Callable[..., Client], version: Any) -> None:
    """The right password does."""
    assert client(version, user=("anna", "correct")).accepted


def test_pings_go_to_the_broker_and_their_answers_come_back(
    client: Callable[..., Client], mosquitto: Mosquitto
) -> None:
    """The gateway answers none itself: paho, which gives up without PINGRESP, stays, and the broker has seen them.

    The Keep Alive leaves a machine that stands still for a while a second or two before anybody gives up.
    """
    devices = [client(version, keep_alive=5) for version in (paho.MQTTv31, paho.MQTTv311, paho.MQTTv5)]
    for device in devices:
        eventually(
            lambda name=device.name: mosquitto.log.read_text().count(f"Sending PINGRESP to {name}") >= 2,
            f"two PINGRESPs logged for {device.name}",
        )
    for device in devices:
        assert not device.disconnected
        device.publish("alive", b"")


@all_versions
def test_a_tighter_rule_reaches_subscriptions_that_the_broker_kept(
    mosquitto: Mosquitto, reactor: Any, ca_file: Path, version: Any
) -> None:
    """What the rule no longer permits is withheld, queued or live, and acknowledged: it does not come again."""
    open_to_all = RunningGateway(reactor, mosquitto.ports[0], ca_file=ca_file)
    rule = {"match_client_id": "kept*", "subscribe": ["may/#"]}
    ruled = RunningGateway(reactor, mosquitto.ports[0], ca_file=ca_file, device=[rule])
    name = f"kept{version}"
    try:
        device = Client(version, name, clean=False).connect(open_to_all.port, expiry=1000)
        device.subscribe("may/#").subscribe("secret/#").disconnect()
        other = Client(version).connect(open_to_all.port)
        for qos in (1, 2):
            other.publish("secret/queued", b"no", qos)
        other.publish("may/queued", b"yes", 2)
        device = Client(version, name, clean=False).connect(ruled.port, expiry=1000)
        assert device.message().topic == "may/queued"
        for qos in (0, 1, 2):
            other.publish("secret/live", b"no", qos)
        other.publish("may/live", b"yes", 2)
        assert device.message(2).topic == "may/live"
        device.disconnect()
        assert last_record(ruled, name).withheld == 5
        device = Client(version, name, clean=False).connect(open_to_all.port, expiry=1000)
        other.publish("secret/after", b"yes", 1)
        assert device.message().topic == "secret/after"
        device.disconnect()
        Client(version, name).connect(open_to_all.port).disconnect()
        other.disconnect()
    finally:
        open_to_all.stop()
        ruled.stop()


@all_versions
def test_a_wildcard_under_a_prefix_does_not_reach_its_parent(
    mosquitto: Mosquitto, reactor: Any, ca_file: Path, client: Callable[..., Client], version: Any
) -> None:
    """`p/q/#` matches p/q, too (MQTT 5.0 §4.7.1.2)."""
    ruled = RunningGateway(reactor, mosquitto.ports[0], ca_file=ca_file, device=[{"subscribe_prefix": "p/q/"}])
    try:
        device = Client(version).connect(ruled.port).subscribe("#")
        other = client(version)
        for topic in ("p/q", "p/q/", "p/q/r"):
            other.publish(topic, b"", 2)
        assert device.message().topic == "r"
        device.disconnect()
        assert [message.topic for message in device.messages] == ["r"]
    finally:
        ruled.stop()


# ---- what only 5.0 has


def test_the_properties_of_a_message_pass(client: Callable[..., Client]) -> None:
    """Application properties, each as it was sent."""
    subscriber = client(paho.MQTTv5).subscribe("properties")
    sent = {
        "UserProperty": [("site", "hall 3"), ("site", "höhle"), ("", "")],
        "ResponseTopic": "answers/7",
        "CorrelationData": b"\x00\x01\xff",
        "ContentType": "text/plain",
        "PayloadFormatIndicator": 1,
    }
    client(paho.MQTTv5).publish("properties", b"21.5", MessageExpiryInterval=600, **sent)
    got = subscriber.message().properties
    assert {name: getattr(got, name) for name in sent} == sent
    assert 590 < got.MessageExpiryInterval <= 600


def test_a_topic_alias_passes(client: Callable[..., Client]) -> None:
    """The second PUBLISH has no topic, only its alias: the connection behind the gateway is the device's own."""
    subscriber = client(paho.MQTTv5).subscribe("alias/#")
    device = client(paho.MQTTv5)
    device.publish("alias/long/name", b"first", TopicAlias=3)
    device.publish("", b"second", TopicAlias=3)
    assert [subscriber.message(index).payload for index in (1, 2)] == [b"first", b"second"]
    assert subscriber.message(2).topic == "alias/long/name"


def test_what_the_broker_decides_reaches_the_device(client: Callable[..., Client], gateway: RunningGateway) -> None:
    """An assigned Client Identifier and a Server Keep Alive; the record knows the session by the former."""
    device = client(paho.MQTTv5, "", keep_alive=1000)
    assert device.connack is not None
    properties = device.connack[2]
    assert properties.ServerKeepAlive == 100
    name = properties.AssignedClientIdentifier
    (session,) = gateway.service.gateway.sessions
    assert session.record.client_identifier == name
    assert session._keep_alive_limit == 150


def test_subscription_options_pass(client: Callable[..., Client]) -> None:
    """No Local: one's own messages do not come back."""
    device = client(paho.MQTTv5).subscribe("local", noLocal=True)
    device.publish("local", b"own")
    client(paho.MQTTv5).publish("local", b"another's")
    assert device.message().payload == b"another's"


def test_a_takeover_is_told_to_the_first_device(client: Callable[..., Client], gateway: RunningGateway) -> None:
    """By the broker's DISCONNECT 0x8E, or, where mosquitto just closes, by the gateway's 0x80."""
    first = client(paho.MQTTv5, "twin")
    second = client(paho.MQTTv5, "twin")
    eventually(lambda: first.disconnected, "the takeover")
    reason = last_record(gateway, "twin").reason
    codes = {EndReason.UPSTREAM_DISCONNECT: 0x8E, EndReason.UPSTREAM_LOST: 0x80}
    assert first.disconnected[0].value == codes[reason]
    assert not second.disconnected


# ---- other clients


@pytest.mark.parametrize("version", ["mqttv31", "mqttv311", "mqttv5"])
@pytest.mark.parametrize("qos", ["0", "2"])
def test_the_mosquitto_clients_pass(gateway: RunningGateway, mosquitto: Mosquitto, version: str, qos: str) -> None:
    """One publishes, the other receives."""
    publish, subscribe = require_tool("mosquitto_pub"), require_tool("mosquitto_sub")
    common = ["-h", "127.0.0.1", "-p", str(gateway.port), "-V", version, "-q", qos]
    name = next(_names)
    topic = f"tools/{version}/{qos}"
    with subprocess.Popen(
        [subscribe, *common, "-t", topic, "-C", "1", "-i", name], stdout=subprocess.PIPE, text=True
    ) as subscriber:
        eventually(lambda: f"Sending SUBACK to {name}" in mosquitto.log.read_text(), "the subscription")
        subprocess.run([publish, *common, "-t", topic, "-m", "21.5"], check=True, timeout=20)
        output, _ = subscriber.communicate(timeout=20)
    assert output == "21.5\n"
    record = last_record(gateway, name)
    assert record.reason is EndReason.DEVICE_DISCONNECT
    assert "mqttv" + record.protocol_version.replace(".", "").removesuffix("0") == version


@pytest.mark.parametrize(("version", "level"), [("mqttv31", 0x83), ("mqttv311", 0x84)])
def test_a_mosquitto_bridge_passes(
    gateway: RunningGateway, client: Callable[..., Client], tmp_path: Path, version: str, level: int
) -> None:
    """It sets the bridge bit in its protocol level, and messages go both ways."""
    port = free_port()
    name = f"bridge-{version}"
    bridge = Mosquitto(
        tmp_path,
        f"listener {port} 127.0.0.1\nallow_anonymous true\nconnection {name}\naddress 127.0.0.1:{gateway.port}\n"
        f"bridge_protocol_version {version}\ntry_private true\nremote_clientid {name}\n"
        "notifications false\ntopic bridged/# both 1\n",
        port,
    )
    try:
        inside = Client(paho.MQTTv311).connect(port).subscribe("bridged/#", qos=1)
        eventually(lambda: "Received SUBACK" in bridge.log.read_text(), "the bridge's subscription")
        outside = client(paho.MQTTv311).subscribe("bridged/#", qos=1)
        outside.publish("bridged/in", b"to the bridge")
        assert inside.message().payload == b"to the bridge"
        inside.publish("bridged/out", b"from the bridge")
        assert outside.message(2).payload == b"from the bridge"
        (session,) = [each for each in gateway.service.gateway.sessions if each.record.client_identifier == name]
        assert session._connect is not None
        assert session._connect.bridge
        assert session._connect.version | 0x80 == level
        inside.disconnect()
    finally:
        bridge.stop()
    last_record(gateway, name)


# ---- why a lost upstream is 0x80


def told(packet: bytes) -> tuple[list[Any], list[BaseException]]:
    """Let a paho client of 5.0 read `packet` after its CONNACK: what it reports, and what its thread dies of."""
    deaths: list[BaseException] = []
    listener = socket.create_server(("127.0.0.1", 0))
    client = Client(paho.MQTTv5)
    before, threading.excepthook = threading.excepthook, lambda arguments: deaths.append(arguments.exc_value)  # type: ignore[arg-type]
    try:
        client.paho.connect("127.0.0.1", listener.getsockname()[1])
        server, _ = listener.accept()
        client.paho.loop_start()
        server.recv(65536)
        server.sendall(mqtt.connack(version=5) + packet)
        eventually(lambda: client.disconnected or deaths, "a reaction")
        server.close()
        stop_paho(client.paho)
    finally:
        threading.excepthook = before
        listener.close()
        if sock := client.paho.socket():
            sock.close()
    return client.disconnected, deaths


def test_clients_understand_the_disconnect_of_a_lost_upstream() -> None:
    """0x80 is a reason code of DISCONNECT; paho reports it."""
    reported, deaths = told(disconnect(0x80, "upstream-lost"))
    assert [code.value for code in reported] == [0x80]
    assert not deaths


def test_clients_fail_on_a_disconnect_that_the_standard_does_not_have() -> None:
    """0x88, server unavailable, is for CONNACK only (MQTT 5.0 §3.14.2.1).

    To paho 2.2 it is a protocol error; the thread of older ones dies of it.
    """
    reported, deaths = told(disconnect(0x88, "upstream-lost"))
    assert [code.value for code in reported] == [0x82] or deaths
