"""Devices with identities of their own, on real sockets: who is let in, as whom, and what of their packets passes."""

from __future__ import annotations

import base64
import contextlib
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.config.passwords import PasswordHash, hash_password
from gateway.errors import EndReason
from gateway.ops.status_words import Level, verdict
from gateway.pieces import at_once
from tests import mqtt_packets as mqtt
from tests.cloud import SERVER_NAME, Cloud
from tests.harness import (
    PATIENCE,
    Broker,
    BrokerConnection,
    Device,
    RunningGateway,
    ServerTLS,
    connect_version,
    eventually,
)
from tests.leftovers import Leftovers
from tests.pki import CLIENT, certify, certify_ca
from tests.ports import free_port
from tests.test_status import ask, value

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]
HUB = "plant.azure-devices.example"
KEY = base64.b64encode(b"the device's key").decode()
PASSWORD = hash_password(b"lan password", bytes(16))


def at(cloud: Cloud, **more: Any) -> list[dict[str, Any]]:
    return [{"host": "127.0.0.1", "server_name": SERVER_NAME, "port": cloud.port, **more}]


def told(gateway: RunningGateway, packet: bytes, source: str = "") -> bytes:
    """Everything that a device is told that sends this and then waits for the end."""
    with Device(gateway.port, source=source) as device:
        device.send(packet)
        return device.read_to_end()


def established(gateway: RunningGateway, *, version: int = 4, source: str = "", **connect: Any) -> Device:
    device = Device(gateway.port, source=source)
    device.send(mqtt.connect(version=version, **connect))
    accepted = mqtt.connack(version=version)
    assert device.read(len(accepted)) == accepted
    return device


def refusal(version: int, code_3: int, code_5: int, answer: bytes) -> bool:
    """Whether this is the CONNACK that refuses, in the version's own terms."""
    if version < 5:
        return answer == bytes((0x20, 2, 0, code_3))
    return answer[:1] == b"\x20" and answer[2:4] == bytes((0, code_5)) and len(answer) == answer[1] + 2


# ---- certificates of the devices' own


def test_each_device_shows_its_own_certificate(start_gateway: StartGateway, tmp_path: Path) -> None:
    """To a broker that wants ALPN, SNI, and the Client Identifier in the certificate; nothing comes before CONNACK."""
    with Cloud(tmp_path, alpn="x-amzn-mqtt-ca", sni=SERVER_NAME, keep_alive=(30, 1200)) as cloud:
        rules = [
            {
                "match_client_id": name,
                "client_cert": str(cloud.device(name)),
                "keep_alive_min": 30,
                "keep_alive_max": 1200,
            }
            for name in ("d1", "d2")
        ]
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, tls={"alpn": "x-amzn-mqtt-ca"}, device=rules)
        leftovers = Leftovers(gateway)
        for name, own, wanted in (("d1", 5, 30), ("d2", 0, 1200)):
            device = Device(gateway.port)
            # PINGREQ right behind CONNECT would end the connection if it were passed on at once.
            device.send(mqtt.connect(name, keep_alive=own) + mqtt.pingreq())
            assert device.read(6) == mqtt.connack() + mqtt.pingresp()
            facts = cloud.wait("connected", client_identifier=name)
            assert (facts["certificate"], facts["keep_alive"]) == (name, wanted)
            device.send(mqtt.disconnect())
            assert device.read_to_end() == b""
            device.close()
        assert [record.rule for record in gateway.journal.started] == ["device[0]", "device[1]"]
        gateway.wait_ended(2)
        leftovers.check()


def test_a_device_with_intermediates_shows_them(start_gateway: StartGateway, tmp_path: Path) -> None:
    """They are the Context's; the certificate and the key are the connection's."""
    with Cloud(tmp_path) as cloud:
        intermediate = certify_ca(cloud.root, subject="Devices' CA")
        certified = certify(intermediate, subject="d1", names=(), purposes=(CLIENT,))
        path = tmp_path / "d1.pem"
        path.write_bytes(certified.pem + intermediate.pem + certified.key_pem)
        rules = [
            {"match_client_id": "d1", "client_cert": str(path)},
            {"match_client_id": "d2", "client_cert": str(cloud.device("d2"))},
        ]
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=rules)
        for name in ("d1", "d2", "d1"):
            established(gateway, client_identifier=name).close()
        eventually(lambda: len(cloud.told("connected")) == 3, "three connections")
        assert [event["certificate"] for event in cloud.told("connected")] == ["d1", "d2", "d1"]


def test_what_is_resumed_is_never_anothers(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Sessions of one device and another in turn, beside the gateway's own: each is itself, resumed or not."""
    with Cloud(tmp_path, bound=False) as cloud:
        rules = [{"match_client_id": name, "client_cert": str(cloud.device(name))} for name in ("d1", "d2")]
        tls = {"client_cert": str(cloud.device("gateway"))}
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=rules, tls=tls)
        names = ["d1", "d2", "other"] * 4
        for index, name in enumerate(names):
            device = established(gateway, client_identifier=name)
            # A round trip, so that tickets have come.
            device.send(mqtt.pingreq())
            assert device.read(2) == mqtt.pingresp()
            device.send(mqtt.disconnect())
            device.read_to_end()
            device.close()
            gateway.wait_ended(index + 1)
        eventually(lambda: len(cloud.told("connected")) == len(names), "all connections")
        for event in cloud.told("connected"):
            expected = {"other": "gateway"}.get(event["client_identifier"], event["client_identifier"])
            assert event["certificate"] == expected
        # Each of the three was resumed, or this would show nothing.
        resumed = {event["client_identifier"] for event in cloud.told("connected") if event["resumed"]}
        assert resumed == {"d1", "d2", "other"}


def test_a_refused_certificate_does_not_take_the_broker_from_the_others(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """It is one device's own matter, whether TLS says so in the handshake or after."""
    with Cloud(tmp_path) as cloud:
        stranger = cloud.device("d1", root=certify_ca(subject="Other CA"))
        rules = [
            {"match_client_id": "d1", "client_cert": str(stranger)},
            {"match_client_id": "d2", "client_cert": str(cloud.device("d2"))},
        ]
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=rules)
        assert told(gateway, mqtt.connect("d1")) == b"\x20\x02\x00\x03"
        assert gateway.wait_ended().reason in {EndReason.TLS_CLIENT_CERTIFICATE_REFUSED, EndReason.UPSTREAM_CLOSED}
        established(gateway, client_identifier="d2").close()
        assert cloud.wait("connected")["certificate"] == "d2"
        assert len(cloud.told("connected")) == 1


def test_a_certificate_that_is_refused_in_the_handshake_is_one_devices_own_matter(
    start_gateway: StartGateway, start_broker: StartBroker, demanding: tuple[ssl.SSLContext, list[dict[str, Any]]]
) -> None:
    """TLS 1.2 says so before the channel stands; the broker is not left alone for it."""
    context, rules = demanding
    gateway = start_gateway(upstream=start_broker(tls=context).port, device=rules)
    for index in range(3):
        assert told(gateway, mqtt.connect("stranger")) == b"\x20\x02\x00\x03"
        assert gateway.wait_ended(index + 1).reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED
    established(gateway, client_identifier="d2").close()


@pytest.fixture
def demanding(server_tls: ServerTLS, tmp_path: Path) -> tuple[ssl.SSLContext, list[dict[str, Any]]]:
    """Return the context of a TLS 1.2 broker that wants a certificate, and rules: `stranger` has a wrong one."""
    root = certify_ca()
    (tmp_path / "root.pem").write_bytes(root.pem)
    context = server_tls.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(tmp_path / "root.pem")
    rules = []
    for name, issuer in (("stranger", certify_ca(subject="Other CA")), ("d2", root)):
        path = certify(issuer, subject=name, names=(), purposes=(CLIENT,)).write(tmp_path / f"{name}.pem")
        rules.append({"match_client_id": name, "client_cert": str(path)})
    return context, rules


def without_alerts(context: ssl.SSLContext) -> Callable[[BrokerConnection], None]:
    """Serve TLS, but close without a word when a handshake fails, as some brokers do."""

    def serve(connection: BrokerConnection) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)

        def step(function: Callable[..., Any], *arguments: Any) -> Any:
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return function(*arguments)
                connection.socket.sendall(outgoing.read())
                data = connection.socket.recv(65536)
                if not data:
                    raise EOFError
                incoming.write(data)

        step(tls.do_handshake)
        step(tls.read, 65536)
        tls.write(mqtt.connack())
        connection.socket.sendall(outgoing.read())
        connection.read_to_end()

    return serve


def test_a_broker_that_closes_on_one_certificate_is_there_for_the_others(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    demanding: tuple[ssl.SSLContext, list[dict[str, Any]]],
) -> None:
    """A TLS 1.2 broker that sends no alert: the connection just ends, behind an approved chain and name."""
    context, rules = demanding
    gateway = start_gateway(upstream=start_broker(tls=None, serve=without_alerts(context)).port, device=rules)
    for index in range(3):
        assert told(gateway, mqtt.connect("stranger")) == b"\x20\x02\x00\x03"
        assert gateway.wait_ended(index + 1).reason is EndReason.TLS_CLOSED
        (health,) = gateway.service.gateway.upstreams
        assert (health.is_open, health.failures) == (True, 0)
    established(gateway, client_identifier="d2").close()


@pytest.mark.parametrize("alerts", [True, False], ids=["with alerts", "without alerts"])
def test_the_gateways_own_trial_finds_a_broker_that_wants_a_certificate(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    demanding: tuple[ssl.SSLContext, list[dict[str, Any]]],
    alerts: bool,
) -> None:
    """It shows none and is refused behind an approved chain and name: the broker is back, and `/readyz` says so."""
    context, rules = demanding
    port = free_port()
    gateway = start_gateway(
        upstream=port,
        device=rules,
        failover={"retry_first": 0.001, "retry_max": 0.001},
        status={"endpoint": "127.0.0.1:0"},
    )
    assert told(gateway, mqtt.connect("d2")) == b"\x20\x02\x00\x03"
    assert ask(gateway, "/readyz").status == 503
    start_broker(tls=context if alerts else None, serve=None if alerts else without_alerts(context), port=port)
    eventually(lambda: ask(gateway, "/readyz").status == 200, "the gateway is ready, without a device")
    established(gateway, client_identifier="d2").close()


def test_without_identities_of_devices_a_refused_certificate_counts_against_the_broker(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    demanding: tuple[ssl.SSLContext, list[dict[str, Any]]],
) -> None:
    """All sessions show the same, so the broker serves none of them: the next one is for all."""
    context, _ = demanding
    gateway = start_gateway(upstream=start_broker(tls=context).port)
    assert told(gateway, mqtt.connect("d2")) == b"\x20\x02\x00\x03"
    gateway.wait_ended()
    (health,) = gateway.service.gateway.upstreams
    assert not health.is_open


def test_a_connection_that_ends_before_the_brokers_name_counts_as_failed(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    demanding: tuple[ssl.SSLContext, list[dict[str, Any]]],
) -> None:
    """Whoever closes without a certificate has not shown that a broker is there."""
    _, rules = demanding
    gateway = start_gateway(upstream=start_broker(tls=None, serve=BrokerConnection.read).port, device=rules)
    assert told(gateway, mqtt.connect("d2")) == b"\x20\x02\x00\x03"
    assert gateway.wait_ended().reason is EndReason.TLS_CLOSED
    (health,) = gateway.service.gateway.upstreams
    assert not health.is_open


@pytest.mark.parametrize("wrong", [{"tls": {"pin": "sha256/" + "A" * 43 + "="}}, {"tls": {"alpn": "mqtt"}}], ids=str)
def test_a_broker_that_the_gateway_refuses_after_its_name_counts_as_failed(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    server_tls: ServerTLS,
    demanding: tuple[ssl.SSLContext, list[dict[str, Any]]],
    wrong: dict[str, Any],
) -> None:
    """Pins and ALPN are judged behind chain and name, and are no identity's own matter."""
    _, rules = demanding
    gateway = start_gateway(upstream=start_broker(tls=server_tls).port, device=rules, **wrong)
    assert told(gateway, mqtt.connect("d2")) == b"\x20\x02\x00\x03"
    gateway.wait_ended()
    (health,) = gateway.service.gateway.upstreams
    assert not health.is_open


@pytest.mark.parametrize(
    ("cloud_rules", "gateway_more", "connect"),
    [
        ({"alpn": "x-amzn-mqtt-ca"}, {}, {}),
        ({"alpn": "x-amzn-mqtt-ca"}, {"tls": {"alpn": "mqtt"}}, {}),
        ({"sni": "elsewhere.example"}, {}, {}),
        ({"keep_alive": (30, 1200)}, {}, {"keep_alive": 1201}),
        ({}, {"device": [{"match_client_id": "d1", "client_id": "d2"}]}, {}),
        ({}, {"device": []}, {}),
    ],
    ids=["no ALPN", "wrong ALPN", "wrong SNI", "Keep Alive", "another's Client Identifier", "no certificate"],
)
def test_a_broker_as_strict_as_the_clouds_ends_what_is_wrong(
    start_gateway: StartGateway,
    tmp_path: Path,
    cloud_rules: dict[str, Any],
    gateway_more: dict[str, Any],
    connect: dict[str, Any],
) -> None:
    """Nothing is let through that the broker did not accept, and the device is told so."""
    with Cloud(tmp_path, **cloud_rules) as cloud:
        certificate = {"client_cert": str(cloud.device("d1"))}
        rules = [{"match_client_id": "d1"}]
        arguments = {"device": rules} | gateway_more
        arguments["device"] = [{**rule, **certificate} for rule in arguments["device"]]
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, **arguments)
        answer = told(gateway, mqtt.connect("d1", **connect))
        assert answer[:3] == b"\x20\x02\x00"
        assert answer[3] in {3, 5}
        assert cloud.told("connected") == []
        gateway.wait_ended()


@pytest.mark.parametrize("demanded", ["", SERVER_NAME])
def test_an_address_has_no_name_to_send_to_a_broker_that_demands_one(
    start_gateway: StartGateway, tmp_path: Path, demanded: str
) -> None:
    """SNI carries names alone (RFC 6066 §3): with an address and no `server_name`, such a broker ends the handshake."""
    with Cloud(tmp_path, sni=demanded) as cloud:
        rule = {"match_client_id": "d1", "client_cert": str(cloud.device("d1"))}
        upstream = [{"host": "127.0.0.1", "port": cloud.port}]
        gateway = start_gateway(upstream=upstream, ca_file=cloud.ca_file, device=[rule])
        answer = told(gateway, mqtt.connect("d1") + mqtt.disconnect())
        assert answer == bytes((0x20, 2, 0, 3 if demanded else 0))
        if demanded:
            assert cloud.told("connected") == []
        else:
            cloud.wait("connected")


@pytest.mark.parametrize("is_ruled", [False, True])
def test_qos_2_ends_the_session_before_such_a_broker_or_at_it(
    start_gateway: StartGateway, tmp_path: Path, *, is_ruled: bool
) -> None:
    """With a rule the broker never sees it."""
    with Cloud(tmp_path) as cloud:
        rule = {"match_client_id": "d1", "client_cert": str(cloud.device("d1"))} | ({"max_qos": 1} if is_ruled else {})
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=[rule])
        device = established(gateway, client_identifier="d1")
        device.send(mqtt.publish(qos=2))
        assert device.read_to_end() == b""
        device.close()
        assert gateway.wait_ended().reason is (EndReason.RULE_REFUSED if is_ruled else EndReason.UPSTREAM_LOST)
        if not is_ruled:
            cloud.wait("ended", why="QoS 2")
        assert bool(cloud.told("ended")) is not is_ruled


def test_a_rule_with_broken_files_is_refused_and_the_others_are_served(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, logged_errors: list[Any]
) -> None:
    """Each with its rule, its key and the problem; repaired, it is served without a word from anybody."""
    garbage, other = tmp_path / "garbage.pem", tmp_path / "other.pem"
    garbage.write_text("garbage")
    ca = certify_ca()
    other.write_bytes(certify(ca, subject="x").key_pem)
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(certify(ca, subject="y").pem)
    rules = [
        {"match_client_id": "a", "client_cert": str(tmp_path / "none.pem")},
        {"match_client_id": "b", "client_cert": str(certificate), "client_key": str(other)},
        {"match_client_id": "c", "sas_key_file": str(garbage), "sas_resource": "r", "username": "u"},
        {"match_client_id": "d", "jwt_key_file": str(garbage), "jwt_audience": "r"},
    ]
    gateway = start_gateway(upstream=start_broker().port, device=rules)
    with established(gateway, client_identifier="e"):
        for index, (name, key) in enumerate(
            (("a", "client_cert"), ("b", "client_key"), ("c", "sas_key_file"), ("d", "jwt_key_file"))
        ):
            assert told(gateway, mqtt.connect(name)) == mqtt.connack(code=3)
            ended = gateway.wait_ended(index + 1)
            assert ended.reason is EndReason.DEVICE_RULE_BROKEN
            assert f": {key}: {tmp_path}" in ended.detail
        document = gateway.call(lambda: at_once(gateway.service.sight.document()))
        assert document["refused_rules"]["count"] == 4
        assert document["unserved"] == 4
        judged = verdict(document)
        assert judged.level is Level.ATTENTION
        assert len([line for line in judged.reasons if line.startswith("Rule device[")]) == 4
        assert len(logged_errors) == 4
        garbage.write_text(KEY)
        eventually(lambda: gateway.service.ledger.reloads, "the repaired file is taken")
        established(gateway, client_identifier="c").close()
        logged_errors.clear()


# ---- tokens and passwords


def test_a_sas_token_is_accepted_by_who_computes_it_independently(start_gateway: StartGateway, tmp_path: Path) -> None:
    """User name and Client Identifier from templates; the device sends neither user name nor password."""
    key = tmp_path / "d1.key"
    key.write_text(KEY + "\n")
    rule = {
        "match_client_id": "d1",
        "username": f"{HUB}/{{client_id}}/?api-version=2021-04-12",
        "sas_key_file": str(key),
        "sas_resource": f"{HUB}/devices/{{client_id}}",
        "upgrade_3_1": True,
    }
    with Cloud(tmp_path / "cloud", client_ca="", hub=HUB, keys={"d1": KEY}) as cloud:
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=[rule])
        for version in (3, 4, 5):
            device = established(gateway, version=version, client_identifier="d1")
            device.send(mqtt.disconnect())
            device.read_to_end()
            device.close()
        eventually(lambda: len(cloud.told("connected")) == 3, "three sessions")
        assert [event["level"] for event in cloud.told("connected")] == [4, 4, 5]


def test_an_expired_token_is_refused_by_the_broker(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device gets the broker's own answer."""
    key = tmp_path / "d1.key"
    key.write_text(KEY)
    rule = {
        "username": f"{HUB}/d1/?api-version=2021-04-12",
        "sas_key_file": str(key),
        "sas_resource": f"{HUB}/devices/d1",
    }
    with Cloud(tmp_path / "cloud", client_ca="", hub=HUB, keys={"d1": KEY}) as cloud:
        gateway = start_gateway(upstream=at(cloud), ca_file=cloud.ca_file, device=[rule])
        credentials = gateway.service.gateway.generation.reception.credentials
        monkeypatch.setattr(credentials, "_now", lambda: time.time() - 7200)
        assert told(gateway, mqtt.connect("d1")) == b"\x20\x02\x00\x05"
        cloud.wait("ended", why="expired SAS token")
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_REFUSED


@pytest.mark.parametrize("version", [4, 5])
def test_a_session_ends_in_good_order_before_its_token_does(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, version: int
) -> None:
    """DISCONNECT to the broker, which publishes no Will; a device of 5.0 is told why."""
    key = tmp_path / "d1.key"
    key.write_text(KEY)
    rule = {"username": "u", "sas_key_file": str(key), "sas_resource": "r", "token_lifetime": 5}
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[rule])
    device = established(gateway, version=version, will_topic="gone")
    rest = device.read_to_end()
    device.close()
    record = gateway.wait_ended()
    assert record.reason is EndReason.TOKEN_EXPIRING
    assert record.duration is not None
    assert 2.9 < record.duration < 5
    assert rest == b"" if version == 4 else rest[:1] == b"\xe0" and rest[2] == 0xA0
    connection = broker.connection()
    assert connection.finished.wait(20)
    assert bytes(connection.received).endswith(mqtt.disconnect())
    assert connection.ended_cleanly


@pytest.mark.parametrize("source", ["file", "command"])
@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_password_comes_from_elsewhere(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, reaping: None, source: str, version: int
) -> None:
    """The CONNECT has it, and all else as the device sent it."""
    if source == "file":
        path = tmp_path / "password"
        path.write_bytes(b"s\xffcret\n")
        rule: dict[str, Any] = {"password_file": str(path)}
        password = b"s\xffcret"
    else:
        script = "import os; print(os.environ['CLIENT_ID'], os.environ['ADDRESS'], os.environ.get('USERNAME'))"
        rule = {"password_command": [sys.executable, "-c", script]}
        password = b"d1 127.0.0.1 None"
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[rule])
    # This user name is fit for no environment.
    sent = {"version": version, "username": "a b", "will_topic": "gone"}
    established(gateway, client_identifier="d1", password=b"own", **sent).close()
    gateway.wait_ended()
    assert broker.received == mqtt.connect("d1", password=password, **sent)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "rule",
    [
        {"password_file": "/nowhere/password"},
        {"password_credential": "broker"},
        {"password_command": ["/bin/false"]},
        {"password_command": ["/bin/sleep", "60"], "password_timeout": 0.2},
    ],
)
def test_a_password_that_cannot_be_had(
    start_gateway: StartGateway, start_broker: StartBroker, reaping: None, rule: dict[str, Any], version: int
) -> None:
    """The device is told that there is no server, and the broker hears nothing."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[rule])
    assert refusal(version, 3, 0x88, told(gateway, mqtt.connect(version=version, username="u")))
    assert gateway.wait_ended().reason is EndReason.CREDENTIALS_UNAVAILABLE
    assert broker.accepted == 0
    gateway.wait_empty()


def test_a_device_that_leaves_while_a_program_runs(
    start_gateway: StartGateway, start_broker: StartBroker, reaping: None
) -> None:
    """Nothing of its session is left, and nobody is dialled."""
    broker = start_broker()
    rule = {"password_command": ["/bin/sleep", "60"], "password_timeout": 50}
    gateway = start_gateway(upstream=broker.port, device=[rule])
    leftovers = Leftovers(gateway)
    device = Device(gateway.port)
    device.send(mqtt.connect(username="u"))
    eventually(lambda: gateway.service.gateway.sessions, "a session")
    gateway.call(lambda: [session.stop(EndReason.GATEWAY_STOPPING) for session in gateway.service.gateway.sessions])
    device.read_to_end()
    device.close()
    gateway.wait_ended()
    leftovers.check()
    assert broker.accepted == 0


def test_a_password_without_a_user_name_cannot_be_said_before_5_0(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """MQTT 3.1.1 §3.1.2.9; in 5.0 it can."""
    (tmp_path / "password").write_text("x")
    gateway = start_gateway(upstream=start_broker().port, device=[{"password_file": str(tmp_path / "password")}])
    assert told(gateway, mqtt.connect()) == b"\x20\x02\x00\x03"
    assert gateway.wait_ended().reason is EndReason.CONNECT_NOT_REWRITABLE
    established(gateway, version=5).close()


# ---- who is let in


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("password", [b"wrong", b"", None])
def test_a_wrong_lan_password(
    start_gateway: StartGateway, start_broker: StartBroker, version: int, password: bytes | None
) -> None:
    """Bad user name or password, in the version's own words; the broker hears nothing."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"match_username": "plant", "lan_password": PASSWORD}])
    answer = told(gateway, mqtt.connect(version=version, username="plant", password=password))
    assert refusal(version, 4, 0x86, answer)
    record = gateway.wait_ended()
    assert record.reason is EndReason.DEVICE_PASSWORD_WRONG
    assert (record.rule, broker.accepted) == ("device[0]", 0)


def test_who_guesses_a_lan_password_is_slowed_down(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """And the device that knows it is let in meanwhile, from its own address."""
    gateway = start_gateway(
        upstream=start_broker().port, devices={"connects_per_minute": 3}, device=[{"lan_password": PASSWORD}]
    )
    for _ in range(5):
        answer = told(gateway, mqtt.connect("d1", username="u", password=b"guess"), source="127.0.0.66")
        assert answer[0] == 0x20
    gateway.wait_ended(5)
    reasons = [record.reason for record in gateway.ended]
    assert reasons == [EndReason.DEVICE_PASSWORD_WRONG] * 3 + [EndReason.CLIENT_ID_PACED] * 2
    established(gateway, client_identifier="d1", username="u", password=b"lan password").close()


@pytest.mark.parametrize("version", [3, 4, 5])
def test_the_right_lan_password_stays_on_the_lan(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """The user name goes on; the password was for the gateway."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"match_username": "plant", "lan_password": PASSWORD}])
    established(gateway, version=version, username="plant", password=b"lan password").close()
    gateway.wait_ended()
    assert broker.received == mqtt.connect(version=version, username="plant")


@pytest.mark.parametrize("version", [3, 4, 5])
def test_unknown_devices_are_refused_where_that_is_set(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """Not authorized, in the version's own words."""
    broker = start_broker()
    rules = {"device": [{"match_client_id": "known-*"}], "devices": {"unknown": "refuse"}}
    gateway = start_gateway(upstream=broker.port, **rules)
    assert refusal(version, 5, 0x87, told(gateway, mqtt.connect("unknown", version=version)))
    assert gateway.wait_ended().reason is EndReason.DEVICE_UNKNOWN
    assert broker.accepted == 0
    established(gateway, version=version, client_identifier="known-1").close()


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_device_that_is_disabled_is_ended_and_refused(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """The reload ends its session and no other; it is told why, and served again as soon as it is enabled."""
    rule = {"match_client_id": "d1", "match_network": "127.0.0.1"}
    gateway = start_gateway(upstream=start_broker().port, device=[rule, {"match_client_id": "d*"}])
    with (
        established(gateway, version=version, client_identifier="d1") as device,
        established(gateway, client_identifier="d2") as other,
        established(gateway, client_identifier="d3", source="127.0.0.3") as elsewhere,
    ):
        gateway.change(device=[{**rule, "match_client_id": ["d1", "d3"], "enabled": False}, {"match_client_id": "d*"}])
        told_last = device.read_to_end()
        assert told_last[:1] + told_last[2:3] == (b"\xe0\x98" if version == 5 else b"")
        assert gateway.wait_ended().reason is EndReason.DEVICE_DISABLED
        assert refusal(version, 5, 0x8A, told(gateway, mqtt.connect("d1", version=version)))
        assert gateway.wait_ended(2).reason is EndReason.DEVICE_DISABLED
        for standing in (other, elsewhere):
            standing.send(mqtt.disconnect())
            assert standing.read_to_end() == b""
        assert gateway.wait_ended(4).reason is EndReason.DEVICE_DISCONNECT
    gateway.change(device=[rule])
    established(gateway, version=version, client_identifier="d1").close()


def test_a_session_whose_rule_was_removed_is_ended_by_a_new_one_that_is_disabled(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """As `device remove` says."""
    rule = {"match_client_id": "d1"}
    gateway = start_gateway(upstream=start_broker().port, device=[rule], devices={"unknown": "refuse"})
    with established(gateway, client_identifier="d1") as device:
        gateway.change(device=[], devices={"unknown": "refuse"})
        gateway.change(device=[{**rule, "enabled": False}], devices={"unknown": "refuse"})
        assert device.read_to_end() == b""
        assert gateway.wait_ended().reason is EndReason.DEVICE_DISABLED


def test_a_rule_for_user_names_that_is_disabled_ends_the_sessions_under_it(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """User names are not kept; the rule that a session began under is."""
    rules = [{"name": "plant", "match_username": "plant"}, {"name": "rest", "match_pattern": ".*"}]
    gateway = start_gateway(upstream=start_broker().port, device=rules)
    with (
        established(gateway, client_identifier="d1", username="plant") as device,
        established(gateway, client_identifier="d2") as other,
    ):
        gateway.change(device=[{**rules[0], "enabled": False}, rules[1]])
        assert device.read_to_end() == b""
        assert gateway.wait_ended().detail == "rule plant"
        gateway.change(device=[{**rules[0], "enabled": False}, {**rules[1], "enabled": False}])
        assert other.read_to_end() == b""


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_spoofer_is_refused_and_told_of(
    start_gateway: StartGateway, start_broker: StartBroker, version: int, logged: list[str]
) -> None:
    """Another address with a name that is bound; the log has both."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"match_client_id": "sensor-1", "bound_to": "127.0.0.1"}])
    device = established(gateway, version=version)
    assert refusal(version, 5, 0x87, told(gateway, mqtt.connect(version=version), source="127.0.0.2"))
    record = gateway.wait_ended()
    assert (record.reason, record.client_identifier) == (EndReason.SPOOFED, "sensor-1")
    assert record.device_address.startswith("127.0.0.2:")
    line = eventually(lambda: [line for line in logged if "spoofed" in line], "the log")[0]
    assert "127.0.0.2" in line
    assert '"sensor-1"' in line
    assert len(broker.connections) == 1
    device.close()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What people read in the log."""
    from twisted.logger import formatEvent, globalLogPublisher

    lines: list[str] = []

    def observe(event: Any) -> None:
        lines.append(formatEvent(event) + str({key: value for key, value in event.items() if key != "log_logger"}))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_second_session_from_another_address_is_refused(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """The one that stands is not disturbed; when it is gone, the other may come; from the same address, always."""
    gateway = start_gateway(upstream=start_broker().port)
    first = established(gateway, version=version)
    assert refusal(version, 2, 0x85, told(gateway, mqtt.connect(version=version), source="127.0.0.2"))
    assert gateway.wait_ended().reason is EndReason.CLIENT_ID_IN_USE
    again = established(gateway, version=version)
    first.send(mqtt.disconnect())
    assert first.read_to_end() == b""
    first.close()
    again.close()
    gateway.wait_ended(3)
    established(gateway, version=version, source="127.0.0.2").close()
    gateway.wait_ended(4)
    gateway.wait_empty()
    assert not gateway.service.gateway.presence.holders


@pytest.mark.parametrize("version", [4, 5])
def test_a_second_session_takes_over_where_that_is_set(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """A device of 5.0 is told so."""
    gateway = start_gateway(upstream=start_broker().port, devices={"same_client_id": "take-over"})
    first = established(gateway, version=version)
    second = established(gateway, version=version, source="127.0.0.2")
    rest = first.read_to_end()
    assert rest == b"" if version == 4 else rest[2] == 0x8E
    assert gateway.wait_ended().reason is EndReason.TAKEN_OVER
    for device in (first, second):
        device.close()


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_stranger_does_not_get_a_devices_name_at_the_broker(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """Neither while the device is there nor while it is away, when its messages wait for it."""
    broker = start_broker()
    rule = {"match_client_id": "pump-3", "client_id": "plant7-{client_id}", "bound_to": "127.0.0.1"}
    gateway = start_gateway(upstream=broker.port, device=[rule])
    stranger = mqtt.connect("plant7-pump-3", version=version, clean_start=False)
    assert refusal(version, 2, 0x85, told(gateway, stranger, source="127.0.0.2"))
    pump = established(gateway, version=version, client_identifier="pump-3")
    assert refusal(version, 2, 0x85, told(gateway, stranger, source="127.0.0.2"))
    gateway.wait_ended(2)
    assert [record.reason for record in gateway.ended] == [EndReason.CLIENT_ID_RESERVED] * 2
    pump.close()
    gateway.wait_ended(3)
    assert broker.accepted == 1


def test_sessions_are_counted_by_the_name_at_the_broker(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Two devices that a rule makes one throw each other out there, whatever they are called here."""
    rule = {"client_id": "hall-{username}"}
    gateway = start_gateway(upstream=start_broker().port, device=[rule])
    first = established(gateway, client_identifier="a", username="u")
    assert refusal(4, 2, 0x85, told(gateway, mqtt.connect("b", username="u"), source="127.0.0.2"))
    assert gateway.wait_ended().reason is EndReason.CLIENT_ID_IN_USE
    second = established(gateway, client_identifier="a", username="v", source="127.0.0.2")
    for device in (first, second):
        device.close()
    gateway.wait_ended(3)


def test_a_name_that_the_broker_assigned_is_its_devices(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """As one that the device brought: nobody else takes it while the session stands."""
    assigned = mqtt.connack(version=5, properties=mqtt.text(0x12, "auto-1"))

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(assigned)
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    with Device(gateway.port) as device:
        device.send(mqtt.connect("", version=5))
        assert device.read(len(assigned)) == assigned
        assert refusal(5, 2, 0x85, told(gateway, mqtt.connect("auto-1", version=5), source="127.0.0.2"))
        assert gateway.wait_ended().reason is EndReason.CLIENT_ID_IN_USE
    gateway.wait_ended(2)
    gateway.wait_empty()
    assert not gateway.service.gateway.presence.holders


def test_wrong_passwords_from_one_address_leave_the_others_alone(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """They are few, whatever names they come with, and the right device is let in meanwhile."""
    rule = {"match_client_id": "*", "lan_password": PASSWORD}
    gateway = start_gateway(upstream=start_broker().port, device=[rule], devices={"connects_per_minute": 3})
    guesses = [
        told(gateway, mqtt.connect(f"d{number}", username="u", password=b"guess"), source="127.0.0.2")
        for number in range(6)
    ]
    assert [answer[3] for answer in guesses] == [4] * 3 + [3] * 3
    gateway.wait_ended(6)
    assert [record.reason for record in gateway.ended[3:]] == [EndReason.CLIENT_ID_PACED] * 3
    established(gateway, client_identifier="d1", username="u", password=b"lan password").close()
    gateway.wait_ended(7)


def test_two_passwords_are_checked_at_a_time(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check takes a processor for a while, so the others wait for their turn."""
    begun: list[bytes] = []
    go_on = threading.Event()

    def verify(_: PasswordHash, given: bytes) -> bool:
        begun.append(given)
        return go_on.wait(PATIENCE)

    monkeypatch.setattr(PasswordHash, "verify", verify)
    gateway = start_gateway(upstream=start_broker().port, device=[{"lan_password": PASSWORD}])
    devices = [Device(gateway.port) for _ in range(5)]
    for number, device in enumerate(devices):
        device.send(mqtt.connect(f"d{number}", username="u", password=b"x"))
    turns = gateway.service.gateway._turns
    eventually(lambda: len(begun) + turns.waiting == len(devices), "all have come")
    assert len(begun) == 2
    go_on.set()
    for device in devices:
        assert device.read(4) == mqtt.connack()
        device.close()
    gateway.wait_ended(len(devices))


def test_a_device_that_left_while_it_waited_for_a_program_starts_none(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, reaping: None
) -> None:
    """Eight run at a time; the ninth device has gone when it would be its turn."""
    gate = tmp_path / "gate"
    ran = tmp_path / "ran"
    ran.mkdir()
    script = (
        "import os, time\n"
        f"open('{ran}/' + os.environ['CLIENT_ID'], 'w').close()\n"
        f"while not os.path.exists('{gate}'): time.sleep(0.02)\n"
        "print('password')"
    )
    rule = {"password_command": [sys.executable, "-c", script], "password_timeout": 60.0}
    gateway = start_gateway(upstream=start_broker().port, device=[rule])
    devices = [Device(gateway.port) for _ in range(9)]
    for number, device in enumerate(devices[:8]):
        device.send(mqtt.connect(f"d{number}", username="u"))
    eventually(lambda: len(list(ran.iterdir())) == 8, "eight programs")
    devices[8].send(mqtt.connect("d8", username="u"))
    turns = gateway.service.gateway._helpers.programs._turns
    eventually(lambda: turns.waiting == 1, "the ninth waits")
    devices[8].close()
    gate.touch()
    for device in devices[:8]:
        assert device.read(4) == mqtt.connack()
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST
    assert not (ran / "d8").exists()
    for device in devices[:8]:
        device.close()
    gateway.wait_ended(9)


def test_devices_without_a_name_are_nobodys(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The broker gives each one of its own."""
    gateway = start_gateway(upstream=start_broker().port)
    devices = [established(gateway, client_identifier="", source=source) for source in ("", "127.0.0.2")]
    for device in devices:
        device.close()
    gateway.wait_ended(2)


def test_two_devices_of_one_name_cannot_throw_each_other_out_for_ever(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """Each comes back as soon as it is thrown out; after some rounds one of them stands."""
    gateway = start_gateway(
        upstream=start_broker().port, devices={"same_client_id": "take-over", "connects_per_minute": 20}
    )
    stop = threading.Event()

    def insist(source: str) -> None:
        while not stop.is_set():
            with Device(gateway.port, source=source) as device:
                device.send(mqtt.connect())
                device.socket.settimeout(0.2)
                while not stop.is_set():
                    try:
                        if not device.socket.recv(100):
                            break
                    except TimeoutError:
                        continue
                    except OSError:
                        break

    threads = [threading.Thread(target=insist, args=(source,)) for source in ("127.0.0.1", "127.0.0.2")]
    for thread in threads:
        thread.start()
    try:
        eventually(
            lambda: sum(record.reason is EndReason.CLIENT_ID_PACED for record in gateway.ended) > 10,
            "refused newcomers",
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(record.reason is EndReason.TAKEN_OVER for record in gateway.ended) <= 3


@pytest.mark.parametrize("name", ["a/b", "a+b", "a#", "a b", "$(id)", "../x", "ä", "x" * 129, ""])
def test_a_name_that_no_template_takes(start_gateway: StartGateway, start_broker: StartBroker, name: str) -> None:
    """What could mean something where it comes to stand is refused, not escaped."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"username": "hub/{client_id}/x"}])
    assert told(gateway, mqtt.connect(name)) == b"\x20\x02\x00\x02"
    assert gateway.wait_ended().reason is EndReason.DEVICE_NAME_UNUSABLE
    assert broker.accepted == 0


# ---- where to


def test_a_rule_names_its_upstreams(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """In its own order; others go to those that serve everybody."""
    general, special, spare = (start_broker() for _ in range(3))
    upstream = [
        {"host": "localhost", "port": special.port, "name": "special", "default": False},
        {"host": "localhost", "port": general.port},
        {"host": "localhost", "port": spare.port, "name": "spare", "default": False},
    ]
    rule = {"match_client_id": "a", "upstream": ["spare", "special"]}
    gateway = start_gateway(upstream=upstream, device=[rule])
    established(gateway, client_identifier="a").close()
    established(gateway, client_identifier="b").close()
    gateway.wait_ended(2)
    spare.stop()
    established(gateway, client_identifier="a").close()
    gateway.wait_ended(3)
    assert [len(broker.connections) for broker in (general, special, spare)] == [1, 1, 1]


# ---- what passes


def serve_and_echo(connection: BrokerConnection) -> None:
    """Accept, answer PINGREQ, and send every PUBLISH back."""
    connection.send(mqtt.connack(version=connect_version(connection.read_packet())))
    while True:
        packet = connection.read_packet()
        if packet[0] >> 4 == 3:
            connection.send(packet)
        elif packet == mqtt.pingreq():
            connection.send(mqtt.pingresp())


@pytest.mark.parametrize("version", [3, 4, 5])
def test_topics_have_their_prefix_at_the_broker_only(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """The Will's, too."""
    broker = start_broker(serve=serve_and_echo)
    rule = {"publish_prefix": "plant/{client_id}/", "subscribe_prefix": "plant/{client_id}/"}
    gateway = start_gateway(upstream=broker.port, device=[rule])
    device = established(gateway, version=version, client_identifier="d1", will_topic="gone")
    message = mqtt.publish("a/b", version=version)
    device.send(message + mqtt.subscribe("c/#", version=version))
    assert device.read(len(message)) == message
    device.send(mqtt.disconnect())
    device.read_to_end()
    device.close()
    assert broker.connection().finished.wait(20)
    assert broker.received == (
        mqtt.connect("d1", version=version, will_topic="plant/d1/gone")
        + mqtt.publish("plant/d1/a/b", version=version)
        + mqtt.subscribe("plant/d1/c/#", version=version)
        + mqtt.disconnect()
    )


@pytest.mark.parametrize(
    ("rule", "bad", "code"),
    [
        ({"publish": "a/{client_id}"}, lambda version: mqtt.publish("a/other", version=version), 0x87),
        ({"subscribe": "a/{client_id}/#"}, lambda version: mqtt.subscribe("a/#", version=version), 0x87),
        ({"max_qos": 1}, lambda version: mqtt.publish(qos=2, version=version), 0x9B),
        ({"retain": "refuse"}, lambda version: mqtt.publish(retain=True, version=version), 0x9A),
    ],
)
@pytest.mark.parametrize("version", [3, 4, 5])
def test_what_a_rule_forbids_ends_the_session(
    start_gateway: StartGateway, start_broker: StartBroker, rule: dict[str, Any], bad: Any, code: int, version: int
) -> None:
    """The broker gets nothing of it and no DISCONNECT; a device of 5.0 is told the reason code."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[rule])
    device = established(gateway, version=version)
    device.send(mqtt.pingreq() + bad(version) + mqtt.disconnect())
    rest = device.read_to_end()
    device.close()
    assert rest == b"" if version < 5 else rest[:1] == b"\xe0" and rest[2] == code
    assert gateway.wait_ended().reason is EndReason.RULE_REFUSED
    assert broker.connection().finished.wait(20)
    assert broker.received == mqtt.connect(version=version) + mqtt.pingreq()


@pytest.mark.parametrize(
    ("rule", "will", "code"),
    [
        ({"publish": "a"}, {"will_topic": "b"}, 0x87),
        ({"max_qos": 0}, {"will_topic": "b", "will_qos": 1}, 0x9B),
        ({"retain": "refuse"}, {"will_topic": "b", "will_retain": True}, 0x9A),
    ],
)
@pytest.mark.parametrize("version", [4, 5])
def test_a_will_is_held_to_the_same_rules(
    start_gateway: StartGateway, start_broker: StartBroker, rule: Any, will: Any, code: int, version: int
) -> None:
    """It would be a way around them."""
    gateway = start_gateway(upstream=start_broker().port, device=[rule])
    assert refusal(version, 5, code, told(gateway, mqtt.connect(version=version, **will)))
    assert gateway.wait_ended().reason is EndReason.RULE_REFUSED


def test_a_will_asks_for_answers_only_where_its_device_may_publish(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """Whoever answers would publish there for it."""
    gateway = start_gateway(upstream=start_broker().port, device=[{"publish": ["b", "a/#"]}])
    will: dict[str, Any] = {"version": 5, "will_topic": "b"}
    established(gateway, **will, will_properties=mqtt.text(0x08, "a/1")).close()
    gateway.wait_ended()
    assert refusal(5, 5, 0x87, told(gateway, mqtt.connect(**will, will_properties=mqtt.text(0x08, "c"))))
    assert gateway.wait_ended(2).reason is EndReason.RULE_REFUSED


def test_retain_is_stripped_of_messages_and_wills(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Everything else passes."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"retain": "strip"}])
    device = established(gateway, will_topic="gone", will_retain=True)
    device.send(mqtt.publish(retain=True, qos=1) + mqtt.disconnect())
    device.read_to_end()
    device.close()
    assert broker.connection().finished.wait(20)
    assert broker.received == mqtt.connect(will_topic="gone") + mqtt.publish(qos=1) + mqtt.disconnect()


def test_an_upgraded_device_hears_what_3_1_knows(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Session Present is reserved there; what it sends is what 3.1.1 allows."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(mqtt.connack(flags=1))
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, device=[{"upgrade_3_1": True}])
    device = established(gateway, version=3, clean_start=False)
    device.send(b"\x8a" + mqtt.subscribe(version=3)[1:] + mqtt.disconnect())
    device.read_to_end()
    device.close()
    assert broker.connection().finished.wait(20)
    assert broker.received == mqtt.connect(version=4, clean_start=False) + mqtt.subscribe() + mqtt.disconnect()


@pytest.mark.parametrize("keep_alive", [0, 600])
def test_a_lowered_keep_alive_is_kept_by_the_gateway(
    start_gateway: StartGateway, start_broker: StartBroker, keep_alive: int
) -> None:
    """It sends the PINGREQs that the device would not, and the device hears nothing of the answers to them."""
    broker = start_broker(serve=serve_and_echo)
    gateway = start_gateway(upstream=broker.port, device=[{"keep_alive_max": 2}])
    device = established(gateway, keep_alive=keep_alive)
    eventually(lambda: broker.received.count(mqtt.pingreq()) >= 3, "PINGREQs of the gateway")
    assert broker.received.startswith(mqtt.connect(keep_alive=2))
    device.send(mqtt.publish())
    assert device.read(len(mqtt.publish())) == mqtt.publish()
    device.send(mqtt.disconnect())
    assert device.read_to_end() == b""
    device.close()
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT


def test_a_broker_that_answers_no_ping_is_lost(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The device, which has no Keep Alive, would never find out."""
    gateway = start_gateway(upstream=start_broker().port, device=[{"keep_alive_max": 2}])
    device = established(gateway, keep_alive=0)
    assert device.read_to_end() == b""
    device.close()
    record = gateway.wait_ended()
    assert record.reason is EndReason.UPSTREAM_LOST
    assert record.detail.startswith("2 unanswered PINGREQs")


def test_a_device_that_is_too_fast_is_read_more_slowly(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Nothing is lost, and its Keep Alive does not run out meanwhile."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"bytes_per_second": 100_000}])
    device = established(gateway, keep_alive=1)
    began = time.monotonic()
    message = mqtt.publish(payload=bytes(10_000))
    device.send(message * 60 + mqtt.disconnect())
    device.read_to_end()
    device.close()
    assert broker.connection().finished.wait(20)
    # Two seconds' worth come at once, and what was read already counts.
    assert time.monotonic() - began > 2
    assert broker.received == mqtt.connect(keep_alive=1) + message * 60 + mqtt.disconnect()
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT


def test_no_secret_of_a_device_is_told(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, logged: list[str]
) -> None:
    """Not in the log, whatever happens to the session, nor in the gateway's own objects where they are shown."""
    secret = "hunter2-of-the-broker"
    (tmp_path / "password").write_text(secret)
    rules = [
        {
            "match_client_id": "a",
            "password_file": str(tmp_path / "password"),
            "publish": "x",
            "username": "{client_id}",
        },
        {"match_client_id": "b", "lan_password": PASSWORD},
    ]
    gateway = start_gateway(upstream=start_broker().port, device=rules)
    device = established(gateway, client_identifier="a", username="plant", password=b"hunter2-of-the-lan")
    device.send(mqtt.publish("y"))
    device.read_to_end()
    device.close()
    told(gateway, mqtt.connect("b", username="plant", password=b"hunter2-of-the-lan"))
    gateway.wait_ended(2)
    assert logged
    assert not [line for line in logged if "hunter2" in line or "c3RpY" in line]


def test_rules_change_with_a_reload_and_sessions_keep_theirs(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """A standing session goes on under its rule; who stands is known across the reload."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, device=[{"publish": "a"}])
    device = established(gateway)
    gateway.change(device=[{"publish": "b"}])
    assert told(gateway, mqtt.connect(), source="127.0.0.2") == b"\x20\x02\x00\x02"
    device.send(mqtt.publish("a"))
    eventually(lambda: broker.received.endswith(mqtt.publish("a")), "the message")
    device.send(mqtt.publish("b"))
    assert device.read_to_end() == b""
    device.close()
    other = established(gateway, client_identifier="other")
    other.send(mqtt.publish("b"))
    eventually(lambda: broker.received.endswith(mqtt.publish("b")), "the message under the new rule")
    other.close()


@pytest.mark.parametrize(
    ("rules", "connect", "reason"),
    [
        ({"device": [{"bound_to": "127.0.0.1"}]}, {}, EndReason.SPOOFED),
        ({}, {}, EndReason.CLIENT_ID_IN_USE),
        ({"device": [{"match_client_id": "sensor-1", "bound_to": "127.0.0.1"}]}, {}, EndReason.SPOOFED),
        (
            {"device": [{"match_network": "127.0.0.1"}], "devices": {"unknown": "refuse"}},
            {},
            EndReason.DEVICE_UNKNOWN,
        ),
        (
            {"device": [{"match_network": "127.0.0.1"}, {"lan_password": PASSWORD}]},
            {"username": "u", "password": b"guess"},
            EndReason.CLIENT_ID_IN_USE,
        ),
        (
            {
                "device": [{"match_network": "127.0.0.1"}, {"lan_password": PASSWORD}],
                "devices": {"same_client_id": "take-over"},
            },
            {"username": "u", "password": b"guess"},
            EndReason.DEVICE_PASSWORD_WRONG,
        ),
    ],
)
def test_every_attempt_at_anothers_name_is_refused_and_seen(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    logged: list[str],
    rules: dict[str, Any],
    connect: dict[str, Any],
    reason: EndReason,
) -> None:
    """In the log, the metrics, the status and its page; the device whose name it is goes on."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, status={"endpoint": "127.0.0.1:0"}, **rules)
    device = established(gateway)
    assert told(gateway, mqtt.connect(**connect), source="127.0.0.2")[:1] == b"\x20"
    assert gateway.wait_ended().reason is reason
    eventually(lambda: [line for line in logged if reason in line and "127.0.0.2" in line], "the log")
    assert value(ask(gateway, "/metrics").text, "sessions_ended_total", reason=reason.value) == 1
    (lately,) = ask(gateway, "/status").json["lately"]
    assert (lately["reason"], lately["count"]) == (reason.value, 1)
    assert f">{reason.value}</span>" in ask(gateway, "/").text
    device.send(mqtt.publish())
    eventually(lambda: broker.received == mqtt.connect() + mqtt.publish(), "the device goes on")
    device.close()


def test_the_end_of_a_devices_certificate_is_told_before(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, logged: list[str]
) -> None:
    """Brokers would refuse the device from then on."""
    path = certify(certify_ca(), subject="d1", names=(), purposes=(CLIENT,), valid_for=10).write(tmp_path / "d1.pem")
    start_gateway(upstream=start_broker().port, device=[{"match_client_id": "d1", "client_cert": str(path)}])
    eventually(lambda: [line for line in logged if "(CN=d1) expires in" in line], "a warning")


def test_the_log_says_which_rule_a_session_goes_by(
    start_gateway: StartGateway, start_broker: StartBroker, logged: list[str]
) -> None:
    """At its start, its end and its refusal, in the line for people."""
    rules = [{"name": "boilers", "match_client_id": "a"}, {"name": "bound", "bound_to": "10.0.0.1"}]
    gateway = start_gateway(upstream=start_broker().port, device=rules)
    established(gateway, client_identifier="a").close()
    told(gateway, mqtt.connect("b"))
    gateway.wait_ended(2)
    eventually(lambda: len([line for line in logged if '"a" MQTT 3.1.1 by rule boilers' in line]) == 2, "two lines")
    eventually(
        lambda: [line for line in logged if "ended: spoofed (rule bound: bound to 10.0.0.1" in line], "a refusal"
    )


def test_a_broker_that_refuses_all_is_no_gateway_that_is_well(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """It answers and it is verified, and yet no device is served; one that is served makes it a warning."""
    codes = [5, 5, 5, 0]

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(mqtt.connack(code=codes.pop(0)))
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    judge = lambda: verdict(gateway.call(lambda: at_once(gateway.service.sight.document())))  # noqa: E731
    assert judge().level is Level.UNTRIED
    assert "not connected to a broker yet" in judge().line
    for index in range(3):
        told(gateway, mqtt.connect(f"d{index}"))
        gateway.wait_ended(index + 1)
    assert judge().level is Level.DOWN
    assert judge().line.startswith("No device is connected")
    with established(gateway, client_identifier="served"):
        eventually(lambda: judge().level is Level.ATTENTION, "some are not served")
