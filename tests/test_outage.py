"""What devices are told and when they are served again while brokers fail and return: real sockets, real TLS.

When exactly a broker is dialled is tested on a virtual clock in `test_failover.py`; how long it all takes is measured
by `python -m benchmarks.outage`.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress
from twisted.logger import globalLogPublisher

from gateway.dial.health import UpstreamState
from gateway.errors import EndReason
from gateway.net.network import ReactorNetwork
from gateway.tls import failures
from tests import mqtt_packets as mqtt
from tests import pki
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.ports import free_port

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]

CONNACK = {3: b"\x20\x02\x00\x00", 4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}
# So short that a test need not wait, and so long that nothing is tried again before the test says so.
SOON, LATE = {"retry_first": 0.05, "retry_max": 0.05}, {"retry_first": 60.0, "retry_max": 60.0}


def connects(gateway: RunningGateway, version: int = 4, name: str = "device") -> Device:
    """Return a device that has sent CONNECT."""
    device = Device(gateway.port)
    device.send(mqtt.connect(name, version=version))
    return device


def established(gateway: RunningGateway, version: int = 4, name: str = "device") -> Device:
    """Return a device that has its CONNACK."""
    device = connects(gateway, version, name)
    assert device.read(len(CONNACK[version])) == CONNACK[version]
    return device


def unavailable(device: Device, version: int) -> bool:
    """Wait for the answer; say whether it is the CONNACK that says that the server is unavailable, and the close."""
    told = device.read_to_end()
    device.close()
    if version != 5:
        return told == b"\x20\x02\x00\x03"
    # The Reason String may make the Remaining Length one byte longer.
    return told[:1] == b"\x20" and told[2 + (told[1] >> 7) :][:2] == b"\x00\x88"


def served_in_the_end(gateway: RunningGateway, version: int = 4) -> Device:
    """Come again and again, as devices do, until there is a CONNACK that accepts."""
    devices: list[Device] = []

    def tries() -> bool:
        device = connects(gateway, version)
        if device.read(len(CONNACK[version])) == CONNACK[version]:
            devices.append(device)
        else:
            device.close()
        return bool(devices)

    eventually(tries, "served again")
    return devices[0]


def state_of(gateway: RunningGateway, index: int = 0) -> UpstreamState:
    return gateway.service.gateway.upstreams[index].state


# ---- one broker


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_broker_that_is_killed_and_comes_back(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """Those that stood are cut off, those that come are told, after one dial for all; then all are served again."""
    broker = start_broker(port=free_port())
    gateway = start_gateway(upstream=broker.port, failover=LATE)
    standing = established(gateway, version)
    broker.stop()
    told = standing.read_to_end()
    # 0x80, with a Reason String: see docs/architecture.md.
    assert (told[:1], told[2:3]) == (b"\xe0", b"\x80") if version == 5 else told == b""
    standing.close()
    for _ in range(5):
        assert unavailable(connects(gateway, version), version)
    gateway.wait_ended(6)
    assert {record.reason for record in gateway.ended[1:]} == {EndReason.TCP_REFUSED}
    (health,) = gateway.service.gateway.upstreams
    assert (health.state, health.dials, health.failed_dials) == (
        UpstreamState.LEFT_ALONE,
        2,
        {EndReason.TCP_REFUSED: 1},
    )
    start_broker(port=broker.port)
    health.retry_at = 0.0
    established(gateway, version).close()
    assert state_of(gateway) is UpstreamState.SERVING


def test_a_broker_that_comes_back_is_found_without_any_device(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """By a TLS connection that carries nothing and ends in order."""
    gone = start_broker(port=free_port())
    gone.stop()
    gateway = start_gateway(upstream=gone.port, failover=SOON)
    assert unavailable(connects(gateway), 4)
    back = start_broker(port=gone.port, serve=lambda connection: connection.read_to_end())
    eventually(lambda: state_of(gateway) is UpstreamState.SERVING, "found")
    connection = back.connection()
    assert connection.finished.wait(10)
    assert connection.ended_cleanly
    assert back.received == b""
    assert len(back.connections) == 1


@pytest.mark.parametrize("version", [4, 5])
def test_a_broker_that_is_blackholed_and_comes_back(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """Nothing is refused, nothing comes: the first device waits for `timeouts.tcp`, the others not at all."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, timeouts={"tcp": 0.3, "tcp_user": 1.0}, failover=LATE)
    standing = established(gateway, version)
    broker.blackhole()
    # Without anything to be acknowledged nobody notices; a device sends something now and then.
    standing.send(mqtt.pingreq())
    assert unavailable(connects(gateway, version), version)
    assert gateway.wait_ended().reason is EndReason.TCP_TIMEOUT
    for _ in range(5):
        assert unavailable(connects(gateway, version), version)
    (health,) = gateway.service.gateway.upstreams
    assert (health.dials, health.failed_dials) == (2, {EndReason.TCP_TIMEOUT: 1})
    told = standing.read_to_end()
    assert (told[:1], told[2:3]) == (b"\xe0", b"\x80") if version == 5 else told == b""
    gateway.wait_ended(7)
    assert {record.number: record.reason for record in gateway.ended}[1] is EndReason.UPSTREAM_LOST
    standing.close()
    broker.come_back()
    health.retry_at = 0.0
    served_in_the_end(gateway, version).close()


def test_a_broker_that_hangs_in_the_handshake(start_gateway: StartGateway) -> None:
    """TCP stands, TLS does not come: `tls-timeout` for the first, and nothing but the answer for the others."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gateway = start_gateway(upstream=silent.getsockname()[1], timeouts={"tls": 0.3}, failover=LATE)
        for _ in range(3):
            assert unavailable(connects(gateway), 4)
    gateway.wait_ended(3)
    assert [record.reason for record in gateway.ended] == [EndReason.TLS_TIMEOUT] * 3
    assert gateway.service.gateway.upstreams[0].dials == 1


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_broker_that_is_slow(start_gateway: StartGateway, start_broker: StartBroker, version: int) -> None:
    """Devices wait for its CONNACK as long as `timeouts.connack`, then they are told; nobody else is kept from it."""
    slowness = [2.5, 0.2]

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        time.sleep(slowness.pop(0))
        connection.send(CONNACK[version])
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, timeouts={"connack": 0.5}, failover=LATE)
    assert unavailable(connects(gateway, version), version)
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_SILENT
    assert state_of(gateway) is UpstreamState.SERVING
    established(gateway, version).close()


@pytest.mark.parametrize("answer", [b"\x20\x02\x00\x05", b""])
def test_what_a_broker_makes_of_one_device_is_that_devices_matter(
    start_gateway: StartGateway, start_broker: StartBroker, answer: bytes
) -> None:
    """It refuses CONNECT, or closes without an answer, as some do; other devices are served all the same."""

    def serve(connection: BrokerConnection) -> None:
        if b"unwanted" in connection.read_packet():
            connection.send(answer)
        else:
            connection.send(CONNACK[4])
            connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, failover=LATE)
    for _ in range(3):
        with connects(gateway, name="unwanted") as device:
            assert device.read_to_end() == (answer or b"\x20\x02\x00\x03")
        established(gateway, name="welcome").close()
    assert state_of(gateway) is UpstreamState.SERVING
    assert not gateway.service.gateway.upstreams[0].failed_dials


def test_a_reload_does_not_forget_that_a_broker_is_away(
    start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path
) -> None:
    """Unless it may have mended that: with other trust the broker is dialled by the next session."""
    gone = start_broker(port=free_port())
    gone.stop()
    gateway = start_gateway(upstream=gone.port, failover=LATE)
    assert unavailable(connects(gateway), 4)
    gateway.change(limits={"max_packet_size": 65536})
    assert unavailable(connects(gateway), 4)
    assert gateway.service.gateway.upstreams[0].dials == 1
    start_broker(port=gone.port)
    gateway.change(tls={"ca_file": str(ca_file), "min_version": "1.3"})
    established(gateway).close()
    assert gateway.service.gateway.upstreams[0].dials == 2


def test_a_reload_ends_a_trial_that_is_under_way(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """It belongs to the configuration that was replaced; a new one begins under the other."""
    gone = start_broker(port=free_port())
    gone.stop()
    gateway = start_gateway(upstream=gone.port, failover=SOON)
    assert unavailable(connects(gateway), 4)
    with socket.create_server(("127.0.0.1", gone.port)) as silent:
        silent.settimeout(20)
        trial, _ = silent.accept()
        trial.settimeout(20)
        assert trial.recv(3)[:1] == b"\x16"
        before = gateway.service.gateway.generation.dialler
        gateway.change(limits={"max_packet_size": 65536})
        assert not before.trials
        with contextlib.suppress(ConnectionResetError):
            while trial.recv(65536):
                pass
        again, _ = silent.accept()
        for connection in (trial, again):
            connection.close()


def test_a_box_with_a_wrong_clock_serves_by_itself_when_it_is_right(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then no check is skipped, and the log says that it is the clock.

    Seen from a clock that is three seconds slow, a certificate made now begins in three seconds.
    """
    monkeypatch.setattr(failures, "MADE", pki.NOW + timedelta(days=365))
    root = pki.certify_ca()
    ca_file = tmp_path / "root.pem"
    ca_file.write_bytes(root.pem)
    begins = (datetime.now(UTC) - pki.NOW + timedelta(seconds=3)) / timedelta(days=1)
    broker = start_broker(tls=pki.certify(root, valid_from=begins).server())
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file, failover=SOON)
    assert unavailable(connects(gateway, 5), 5)
    assert gateway.wait_ended().reason is EndReason.CLOCK_IMPLAUSIBLE
    assert "this machine's clock says " in gateway.ended[0].detail
    assert broker.received == b""
    eventually(lambda: state_of(gateway) is UpstreamState.SERVING, "found by itself")
    established(gateway, 5).close()


# ---- several


def test_failover_and_return(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """New sessions go to the next broker while the preferred one is away, and back; those that stand stay."""
    first, second = start_broker(port=free_port()), start_broker()
    upstream = [{"host": "127.0.0.1", "port": broker.port} for broker in (first, second)]
    gateway = start_gateway(upstream=upstream, failover=SOON)
    before = established(gateway, 5)
    first.stop()
    assert before.read_to_end()[:1] == b"\xe0"
    before.close()
    during = established(gateway)
    assert len(second.connections) == 1
    again = start_broker(port=first.port)
    eventually(lambda: state_of(gateway) is UpstreamState.SERVING, "the preferred broker is found")
    after = established(gateway)
    assert len(second.connections) == 1
    eventually(lambda: again.received.startswith(b"\x10"), "CONNECT at the preferred broker")
    during.send(mqtt.pingreq())
    eventually(lambda: second.received.endswith(mqtt.pingreq()), "the session at the other broker goes on")
    for device in (during, after):
        device.close()


def test_a_preferred_broker_that_is_blackholed_costs_one_session_its_timeout(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """The others go to the next broker without a dial to the first."""
    first, second = start_broker(), start_broker()
    first.blackhole()
    upstream = [{"host": "127.0.0.1", "port": broker.port} for broker in (first, second)]
    gateway = start_gateway(upstream=upstream, timeouts={"tcp": 0.3}, failover=LATE)
    for _ in range(5):
        established(gateway).close()
    assert [health.dials for health in gateway.service.gateway.upstreams] == [1, 5]
    assert gateway.service.gateway.upstreams[0].failed_dials == {EndReason.TCP_TIMEOUT: 1}


def test_a_broker_with_a_bad_certificate_is_told_of_as_long_as_it_is_passed_over(
    start_gateway: StartGateway, start_broker: StartBroker, ca: Any
) -> None:
    """Failover does not hide it: each session that goes elsewhere says why; with the right one it is back."""
    wrong = start_broker(port=free_port(), tls=ServerTLS.from_trustme(ca.issue_cert("elsewhere.example")))
    second = start_broker()
    upstream = [{"host": "127.0.0.1", "port": broker.port} for broker in (wrong, second)]
    gateway = start_gateway(upstream=upstream, failover=LATE)
    told: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(told.append)
    try:
        for _ in range(3):
            established(gateway).close()
    finally:
        globalLogPublisher.removeObserver(told.append)
    passed = [event for event in told if event.get("event") == "upstream-passed-over"]
    assert [event["reason"] for event in passed] == [EndReason.TLS_NAME_MISMATCH] * 3
    assert wrong.received == b""
    assert wrong.accepted == 1
    wrong.stop()
    right = start_broker(port=wrong.port)
    gateway.service.gateway.upstreams[0].retry_at = 0.0
    eventually(lambda: state_of(gateway) is UpstreamState.SERVING, "the preferred broker is found")
    established(gateway).close()
    eventually(lambda: right.received, "CONNECT at the preferred broker")


def test_a_broker_that_moves_is_found(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is asked for anew by each dial, so no restart is needed when DNS changes."""
    old = start_broker(address="127.0.0.1")
    new = start_broker(address="127.0.0.2", port=old.port)
    answers = ["127.0.0.1"]
    resolve = ReactorNetwork.resolve

    def resolved(network: ReactorNetwork, host: str, port: int) -> Deferred[list[IAddress]]:
        return resolve(network, answers[0], port) if host == "localhost" else succeed([])

    monkeypatch.setattr(ReactorNetwork, "resolve", resolved)
    gateway = start_gateway(upstream=old.port, host="localhost")
    established(gateway).close()
    answers[0] = "127.0.0.2"
    established(gateway).close()
    assert [len(broker.connections) for broker in (old, new)] == [1, 1]


# ---- at a pace


@pytest.mark.parametrize("version", [3, 4, 5])
def test_more_devices_than_the_queue_holds(
    start_gateway: StartGateway, start_broker: StartBroker, version: int
) -> None:
    """Those beyond it are told at once, in their version, and by name in the record; the others are served in turn."""
    broker = start_broker()
    pacing = {"new_sessions_per_second": 5.0, "queue_seconds": 0.6}
    gateway = start_gateway(upstream=broker.port, pacing=pacing)
    devices = [connects(gateway, version, f"device-{number}") for number in range(8)]
    answers = [device.read(1) + device.read_to_end() if number >= 4 else b"" for number, device in enumerate(devices)]
    # One at once, three in the queue.
    for told in answers[4:]:
        assert told == b"\x20\x02\x00\x03" or (version == 5 and told[2:4] == b"\x00\x88" and b"too-many-new" in told)
    for device in devices[:4]:
        assert device.read(len(CONNACK[version])) == CONNACK[version]
    gateway.wait_ended(4)
    assert {record.reason for record in gateway.ended} == {EndReason.TOO_MANY_NEW_SESSIONS}
    order = [broker.connection(index) for index in range(4)]
    assert [f"device-{number}".encode() in order[number].received for number in range(4)] == [True] * 4
    for device in devices:
        device.close()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_device_that_leaves_the_queue_never_reaches_the_broker(
    start_gateway: StartGateway, start_broker: StartBroker, how: str
) -> None:
    """The broker gets no CONNECT for it, and the one behind it has its turn."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, pacing={"new_sessions_per_second": 2.0})
    first = established(gateway, name="first")
    left = connects(gateway, name="left")
    behind = connects(gateway, name="behind")
    eventually(lambda: gateway.service.gateway.generation.dialler.pacer.waiting == 2, "two wait")
    getattr(left, how)()
    assert behind.read(4) == CONNACK[4]
    assert gateway.ended[0].client_identifier == "left"
    assert gateway.ended[0].reason is EndReason.DEVICE_LOST
    assert b"left" not in broker.received
    assert len(broker.connections) == 2
    for device in (first, behind):
        device.close()


def test_what_a_device_sent_before_it_left_the_queue_still_counts(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """CONNECT, PUBLISH, DISCONNECT and the close in one go: some do so, and what they published must arrive."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, pacing={"new_sessions_per_second": 2.0})
    first = established(gateway, name="first")
    published = mqtt.publish("t", b"in-a-hurry") + mqtt.disconnect()
    hasty = Device(gateway.port)
    hasty.send(mqtt.connect("hasty") + published)
    hasty.close()
    hastier = connects(gateway, name="hastier")
    eventually(lambda: gateway.service.gateway.generation.dialler.pacer.waiting == 2, "two wait")
    # Not read by the gateway yet, unlike that of the other.
    hastier.send(published)
    hastier.close()
    for index in (1, 2):
        connection = broker.connection(index)
        eventually(lambda connection=connection: published in connection.received, "what it published")
    first.close()


@pytest.mark.parametrize("waiting", [1, 30])
def test_a_gateway_that_stops_tells_those_that_wait_for_their_turn(
    start_gateway: StartGateway, start_broker: StartBroker, waiting: int
) -> None:
    """With CONNACK; nothing is left of them."""
    broker = start_broker()
    gateway = start_gateway(
        upstream=broker.port, pacing={"new_sessions_per_second": 0.05, "queue_seconds": 1000.0}, timeouts={"close": 0.5}
    )
    first = established(gateway)
    devices = [connects(gateway) for _ in range(waiting)]
    pacer = gateway.service.gateway.generation.dialler.pacer
    eventually(lambda: pacer.waiting == waiting, "they wait")
    gateway.stop()
    for device in devices:
        assert unavailable(device, 4)
    assert pacer.waiting == 0
    first.close()
