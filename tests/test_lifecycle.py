"""How sessions and the service live and end, on real sockets: truth, order, flow control, and what is left."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import succeed
from twisted.logger import Logger

from benchmarks.blackhole import drop_packets
from gateway import gateway as gateway_module
from gateway.config import from_mapping
from gateway.errors import ConfigError, EndReason
from gateway.gateway import Gateway
from gateway.net.network import ReactorNetwork
from gateway.ops.journal import FULL_RECORDS
from gateway.pieces import Chores
from gateway.relay.upstream import UpstreamProtocol
from gateway.service import GatewayService
from gateway.session.session import Session, State
from tests import mqtt_packets as mqtt
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, connect_version, eventually
from tests.leftovers import Leftovers
from tests.ports import free_port
from tests.turn_clock import TurnClock

CONNACK = {3: mqtt.connack(), 4: mqtt.connack(), 5: mqtt.connack(version=5)}
StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]


def established(gateway: RunningGateway, version: int = 4, **connect: Any) -> Device:
    """A device that has its CONNACK."""
    device = Device(gateway.port)
    device.send(mqtt.connect(version=version, **connect))
    assert device.read(len(CONNACK[version])) == CONNACK[version]
    return device


def unavailable(version: int, told: bytes) -> bool:
    """Whether this is a CONNACK that says that the server is unavailable, and nothing else."""
    if version != 5:
        return told == b"\x20\x02\x00\x03"
    return told[:1] == b"\x20" and told[2:4] == b"\x00\x88" and len(told) == 2 + told[1]


# ---- the truth


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_broker_that_is_not_there(start_gateway: StartGateway, version: int) -> None:
    """Its port is closed: `tcp-refused`, and the device is told that there is no server."""
    gateway = start_gateway(upstream=free_port())
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(mqtt.connect(version=version))
        assert unavailable(version, device.read_to_end())
    assert gateway.wait_ended().reason is EndReason.TCP_REFUSED
    leftovers.check()


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_broker_whose_name_does_not_resolve(
    start_gateway: StartGateway, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dns-failed`, and the device is told that there is no server."""
    monkeypatch.setattr(ReactorNetwork, "resolve", lambda network, host, port: succeed([]))
    gateway = start_gateway(upstream=8883, host="broker.invalid")
    leftovers = Leftovers(gateway)
    with Device(gateway.port) as device:
        device.send(mqtt.connect(version=version))
        assert unavailable(version, device.read_to_end())
    assert gateway.wait_ended().reason is EndReason.DNS_FAILED
    leftovers.check()


def test_the_next_broker_serves_when_the_first_is_not_there(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """In the order of the configuration; the device notices nothing."""
    broker = start_broker()
    upstream = [{"host": "127.0.0.1", "port": port} for port in (free_port(), broker.port)]
    gateway = start_gateway(upstream=upstream)
    device = established(gateway)
    device.send(mqtt.disconnect())
    device.read_to_end()
    device.close()
    assert gateway.wait_ended().upstream_address == f"127.0.0.1:{broker.port}"


def test_a_name_with_an_address_that_does_not_answer_is_reached_by_the_other(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """`localhost` is ::1 as well, where nobody listens."""
    broker = start_broker(address="127.0.0.1")
    gateway = start_gateway(upstream=broker.port, host="localhost")
    established(gateway).close()
    assert gateway.wait_ended().upstream_address == f"127.0.0.1:{broker.port}"


# ---- order at the end


@pytest.mark.parametrize("flood", [10_000, 200_000, 4_000_000])
def test_a_disconnect_gets_through_although_the_device_closes_at_once(
    start_gateway: StartGateway, start_broker: StartBroker, flood: int
) -> None:
    """The broker still gets PUBLISH, DISCONNECT and close_notify, and so publishes no Will.

    The device leaves unread messages behind, which makes its close a reset.
    """

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[4] + mqtt.publish(payload=bytes(flood)))
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    last_words = mqtt.publish("last", qos=1) + mqtt.disconnect()
    for index in range(20):
        device = established(gateway)
        device.socket.recv(1)
        device.send(last_words)
        device.close()
        connection = broker.connection(index)
        assert connection.finished.wait(20)
        assert bytes(connection.received) == mqtt.connect() + last_words
        assert connection.ended_cleanly
        assert gateway.wait_ended(index + 1).reason is EndReason.DEVICE_DISCONNECT
    leftovers.check()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("there", [True, False])
def test_a_refusal_gets_through_although_the_device_has_sent_megabytes(
    start_gateway: StartGateway, start_broker: StartBroker, version: int, there: bool
) -> None:
    """What it pipelined is read and dropped, so that no reset eats its CONNACK; the broker sees none of it."""
    refusal = mqtt.connack(version=version, code=0x87 if version == 5 else 5)

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(refusal)
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port if there else free_port())
    leftovers = Leftovers(gateway)
    for index in range(3):
        with Device(gateway.port) as device:
            device.send(mqtt.connect(version=version) + mqtt.publish(payload=bytes(8_000_000), version=version))
            told = device.read_to_end()
        assert told == refusal if there else unavailable(version, told)
        gateway.wait_ended(index + 1)
    if there:
        assert all(connection.finished.wait(20) for connection in broker.connections)
        assert broker.received == mqtt.connect(version=version) * 3
    leftovers.check()


def test_a_farewell_gets_through_while_the_device_sends(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The broker closes on unread data, which resets its connection; a 5.0 device still reads DISCONNECT 0x80."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[5])
        connection.read(1000)

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    device = established(gateway, 5)
    device.send(mqtt.publish(payload=bytes(8_000_000), version=5))
    told = device.read_to_end()
    assert told[0] == 0xE0
    assert told[2] == 0x80
    assert b"upstream-lost" in told
    device.close()
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_LOST
    leftovers.check()


def end_by_close_notify(connection: BrokerConnection) -> None:
    with contextlib.suppress(OSError):
        connection.socket.unwrap()


def end_by_fin(connection: BrokerConnection) -> None:
    connection.socket.shutdown(socket.SHUT_WR)


def end_by_reset(connection: BrokerConnection) -> None:
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.socket.close()


@pytest.mark.parametrize("version", [3, 4, 5])
@pytest.mark.parametrize("end", [end_by_close_notify, end_by_fin, end_by_reset])
def test_a_broker_that_goes(
    start_gateway: StartGateway, start_broker: StartBroker, version: int, end: Callable[[BrokerConnection], None]
) -> None:
    """However it goes, the device gets what came before, in 5.0 a DISCONNECT, and the close."""
    read: list[bool] = []

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[version] + mqtt.publish(version=version))
        eventually(lambda: read, "that the device has read")
        end(connection)

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    device = established(gateway, version)
    assert device.read(len(mqtt.publish(version=version))) == mqtt.publish(version=version)
    read.append(True)
    told = device.read_to_end()
    assert told[:1] + told[2:3] == (b"\xe0\x80" if version == 5 else b"")
    device.close()
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_LOST
    leftovers.check()


@pytest.mark.parametrize("disconnects", [True, False])
def test_a_device_that_half_closes(start_gateway: StartGateway, start_broker: StartBroker, disconnects: bool) -> None:
    """FIN without DISCONNECT is a loss; with it the session has ended already.  The broker gets what came before."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    device = established(gateway)
    last_words = mqtt.publish() + (mqtt.disconnect() if disconnects else b"")
    device.send(last_words)
    device.socket.shutdown(socket.SHUT_WR)
    assert device.read_to_end() == b""
    device.close()
    connection = broker.connection()
    assert connection.finished.wait(20)
    assert bytes(connection.received) == mqtt.connect() + last_words
    assert connection.ended_cleanly
    assert gateway.wait_ended().reason is (EndReason.DEVICE_DISCONNECT if disconnects else EndReason.DEVICE_LOST)
    leftovers.check()


def test_the_last_words_of_a_broker_reach_a_slow_device(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The broker sends much and closes; the device gets all that fits into the buffers on the way, in order."""
    message = mqtt.publish(payload=bytes(range(256)) * 400, version=5)

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[5] + message + mqtt.disconnect(code=0x8E))

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    device = established(gateway, 5)
    assert gateway.wait_ended().reason is EndReason.UPSTREAM_DISCONNECT
    assert device.read_to_end() == message + mqtt.disconnect(code=0x8E)
    device.close()
    leftovers.check()


# ---- Keep Alive


@pytest.mark.parametrize("version", [4, 5])
def test_a_silent_device_is_let_go(start_gateway: StartGateway, start_broker: StartBroker, version: int) -> None:
    """After 1.5 times its Keep Alive; the broker hears of no DISCONNECT."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port)
    leftovers = Leftovers(gateway)
    device = established(gateway, version, keep_alive=1)
    told = device.read_to_end()
    assert told[:1] + told[2:3] == (b"\xe0\x8d" if version == 5 else b"")
    device.close()
    record = gateway.wait_ended()
    assert record.reason is EndReason.KEEPALIVE_TIMEOUT
    assert record.duration is not None
    assert record.duration > 1.5
    assert broker.connection().finished.wait(20)
    assert broker.received == mqtt.connect(version=version, keep_alive=1)
    leftovers.check()


def keepalive_of(gateway: RunningGateway, tcp_user: int) -> None:
    """Both sockets of the only session must have the options for this timeout."""
    tcp, idle = socket.IPPROTO_TCP, tcp_user // 2
    wanted = [
        (tcp, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (tcp, socket.TCP_KEEPIDLE, idle),
        (tcp, socket.TCP_KEEPINTVL, (tcp_user - idle) // 3),
        (tcp, socket.TCP_KEEPCNT, 3),
        (tcp, socket.TCP_USER_TIMEOUT, 0),
    ]

    def options() -> list[list[int]]:
        (session,) = gateway.service.gateway.sessions
        sides: list[Any] = [session._device, session._upstream]
        return [[side.transport.getHandle().getsockopt(*option[:2]) for option in wanted] for side in sides]

    assert gateway.call(options) == [[value for _, _, value in wanted]] * 2


def test_both_sockets_are_watched_by_the_kernel(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """TCP keepalive notices a peer that is gone, and small packets leave at once; no timeout counts closed windows.

    A listener's connections inherit that; those that began under another timeout, or came to a socket of systemd's
    before there was a gateway, do not.
    """
    gateway = start_gateway(upstream=start_broker().port, timeouts={"tcp_user": 40})
    device = established(gateway)
    keepalive_of(gateway, 40)
    device.close()
    gateway.wait_empty()
    gateway.change(timeouts={"tcp_user": 30})
    device = established(gateway)
    keepalive_of(gateway, 30)
    device.close()
    gateway.wait_empty()
    with socket.create_server(("127.0.0.1", 0)) as of_systemd:
        of_systemd.setblocking(False)  # as the endpoint does
        factory = gateway.service.gateway.factory(gateway.config.listen[0])
        with Device(of_systemd.getsockname()[1]) as device:
            relay = gateway.service._relay
            port = gateway.call(relay.adoptStreamPort, of_systemd.fileno(), of_systemd.family, factory)
            device.send(mqtt.connect())
            assert device.read(4) == mqtt.connack()
            keepalive_of(gateway, 30)
        gateway.wait_ended(3)
        gateway.call(port.stopListening)


# ---- flow control

MEGABYTE = 1024 * 1024
CHUNK = bytes(64 * 1024)


def peak_memory(*, forget: bool = False) -> int:
    """Return the most bytes that this process has had resident, after `forget` counted anew."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def headed(size: int) -> tuple[bytes, int]:
    """Return the beginning of a PUBLISH of `size` payload bytes, and how many bytes of it are still to come."""
    whole = mqtt.packet(0x30, mqtt.string("t"), length=len(mqtt.string("t")) + size)
    return whole, size


def send_much(send: Callable[[bytes], Any], size: int) -> None:
    beginning, rest = headed(size)
    send(beginning)
    for _ in range(rest // len(CHUNK)):
        send(CHUNK)


def count_much(read: Callable[[], bytes], size: int) -> int:
    """Read a PUBLISH of `size` payload bytes, keeping none of it; return how many bytes came."""
    wanted = len(headed(size)[0]) + size
    got = 0
    while got < wanted and (data := read()):
        got += len(data)
    return wanted - got


def test_a_packet_of_200_megabytes_passes_up_in_bounded_memory(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """At the broker's pace: it begins to read only when the device can send no more."""
    size = 200 * MEGABYTE
    result: list[int] = []
    stalled = threading.Event()

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[4])
        stalled.wait(20)
        result.append(count_much(lambda: connection.socket.recv(65536), size))
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port)
    device = established(gateway)
    before = peak_memory(forget=True)
    sender = threading.Thread(target=send_much, args=(device.send, size), daemon=True)
    sender.start()
    eventually(lambda: stands_still(gateway), "the device stopped by the broker")
    stalled.set()
    sender.join(60)
    assert eventually(lambda: result, "the whole packet at the broker") == [0]
    assert peak_memory() - before < 32 * MEGABYTE
    device.send(mqtt.disconnect())
    device.read_to_end()
    device.close()
    record = gateway.wait_ended()
    assert (record.reason, record.packets_up) == (EndReason.DEVICE_DISCONNECT, 3)
    assert record.bytes_up > size


def test_a_packet_of_200_megabytes_passes_down_in_bounded_memory(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """At the device's pace: it begins to read only when the broker can send no more."""
    size = 200 * MEGABYTE

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[4])
        send_much(connection.send, size)
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    device = established(gateway)
    before = peak_memory(forget=True)
    eventually(lambda: stands_still(gateway), "the broker stopped by the device")
    assert count_much(lambda: device.socket.recv(65536), size) == 0
    assert peak_memory() - before < 32 * MEGABYTE
    device.close()
    assert gateway.wait_ended().bytes_down > size


def stands_still(gateway: RunningGateway) -> bool:
    """Whether one side of the only session is not read because the other is full."""

    def choked() -> bool:
        (session,) = gateway.service.gateway.sessions
        sides: list[Any] = [session._device, session._upstream]
        return any(side._choked for side in sides)

    return bool(gateway.call(choked))


def test_a_packet_above_the_limit_is_not_relayed_down(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Nothing of it; the record names the limit's remedy."""

    def serve(connection: BrokerConnection) -> None:
        connection.read_packet()
        connection.send(CONNACK[5] + mqtt.publish(payload=bytes(2000), version=5))
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port, limits={"max_packet_size": 1000})
    device = Device(gateway.port)
    device.send(mqtt.connect(version=5))
    connack = mqtt.connack(version=5, properties=mqtt.number(0x27, 1000, size=4))
    assert device.read(len(connack)) == connack
    told = device.read_to_end()
    assert told[:1] + told[2:3] == b"\xe0\x80"
    device.close()
    assert gateway.wait_ended().reason is EndReason.PACKET_TOO_LARGE


# ---- mistakes of the gateway


def test_a_mistake_in_one_session_ends_no_other(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    logged_errors: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The traceback is logged, both sides are cut off, the other session goes on."""
    gateway = start_gateway(upstream=start_broker().port, relay={"engine": "python"})
    relay_up = Session._relay_up

    def mistaken(session: Session, data: bytes) -> None:
        if b"mistake" in data:
            raise ZeroDivisionError
        relay_up(session, data)

    monkeypatch.setattr(Session, "_relay_up", mistaken)
    well, unwell = established(gateway, client_identifier="well"), established(gateway)
    unwell.send(mqtt.publish("mistake"))
    assert unwell.read_to_end() == b""
    assert gateway.wait_ended().reason is EndReason.INTERNAL_ERROR
    assert any(event["log_failure"].check(ZeroDivisionError) for event in logged_errors if "log_failure" in event)
    logged_errors.clear()
    well.send(mqtt.publish() + mqtt.disconnect())
    assert well.read_to_end() == b""
    well.close()
    unwell.close()
    assert gateway.wait_ended(2).reason is EndReason.DEVICE_DISCONNECT
    gateway.wait_empty()


def test_a_mistake_in_one_sweep_leaves_the_deadlines_of_the_others(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    logged_errors: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sweep goes on: a silent device is still let go, and the session with the mistake is ended."""
    gateway = start_gateway(upstream=start_broker().port)
    unwell = established(gateway, client_identifier="unwell", keep_alive=0)
    sweep = Session.sweep

    def mistaken(session: Session, now: float) -> bool:
        if session.record.client_identifier == "unwell" and session.record.reason is None:
            raise ZeroDivisionError
        return sweep(session, now)

    monkeypatch.setattr(Session, "sweep", mistaken)
    silent = established(gateway, client_identifier="silent", keep_alive=1)
    assert unwell.read_to_end() == b""
    assert silent.read_to_end() == b""
    unwell.close()
    silent.close()
    gateway.wait_ended(2)
    reasons = {record.client_identifier: record.reason for record in gateway.ended}
    assert reasons == {"unwell": EndReason.INTERNAL_ERROR, "silent": EndReason.KEEPALIVE_TIMEOUT}
    assert logged_errors[0]["log_failure"].check(ZeroDivisionError)
    logged_errors.clear()
    gateway.wait_empty()


# ---- many sessions


def test_two_hundred_sessions_leave_nothing(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Whether they end well, are lost, reset, or refused."""

    def serve(connection: BrokerConnection) -> None:
        packet = connection.read_packet()
        version = connect_version(packet)
        refused = b"refused" in packet
        connection.send(mqtt.connack(version=version, code=5) if refused else CONNACK[version])
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    leftovers = Leftovers(gateway)
    for index in range(200):
        device = Device(gateway.port)
        kind = index % 4
        device.send(mqtt.connect("refused" if kind == 3 else f"device-{index}"))
        device.read(4)
        if kind == 0:
            device.send(mqtt.publish() + mqtt.disconnect())
            device.read_to_end()
        if kind == 1:
            device.reset()
        else:
            device.close()
    gateway.wait_ended(200)
    assert {record.reason for record in gateway.ended} == {
        EndReason.DEVICE_DISCONNECT,
        EndReason.DEVICE_LOST,
        EndReason.UPSTREAM_REFUSED,
    }
    leftovers.check()


# ---- the service


def test_listeners_stand_in_the_order_of_the_configuration(start_gateway: StartGateway) -> None:
    """Whoever asks for the second finds the second."""
    gateway = start_gateway(upstream=1, listen=[{"endpoint": "127.0.0.1:0"}, {"endpoint": "127.0.0.2:0"}])
    assert [port.getHost().host for port in gateway.service.ports] == ["127.0.0.1", "127.0.0.2"]


def test_a_port_that_is_taken_is_an_error_that_names_it(reactor: Any, start_gateway: StartGateway) -> None:
    """The service does not run deaf, and leaves none of its other listeners open."""
    gateway = start_gateway(upstream=1)
    free = free_port()
    config = from_mapping(
        {
            "listen": [{"endpoint": f"127.0.0.1:{free}"}, {"endpoint": f"127.0.0.1:{gateway.port}"}],
            "upstream": [{"host": "localhost"}],
        }
    )
    service = gateway.call(GatewayService, config, reactor)
    with pytest.raises(ConfigError) as caught:
        gateway.call(service.startService)
    (problem,) = caught.value.problems
    assert problem.startswith(f"listen[1].endpoint: cannot listen on 127.0.0.1:{gateway.port}")
    eventually(lambda: can_listen(free), "the first listener closed again")


def can_listen(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_service_that_stops_takes_leave(start_gateway: StartGateway, start_broker: StartBroker, version: int) -> None:
    """Its ports close, 5.0 devices get DISCONNECT 0x8B, those that wait get CONNACK; the broker gets close_notify."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port)
    device = established(gateway, version)
    silent = socket.create_connection(("127.0.0.1", gateway.port))
    eventually(lambda: len(gateway.service.gateway.sessions) == 2, "both sessions")
    told: list[bytes] = []
    reader = threading.Thread(target=lambda: (told.append(device.read_to_end()), device.close()))
    reader.start()
    port = gateway.port
    silent.close()
    gateway.stop()
    reader.join(20)
    assert told[0][:1] + told[0][2:3] == (b"\xe0\x8b" if version == 5 else b"")
    assert EndReason.GATEWAY_STOPPING in {record.reason for record in gateway.ended}
    assert broker.connection().finished.wait(20)
    assert broker.connection().ended_cleanly
    assert broker.received == mqtt.connect(version=version)
    assert can_listen(port)


def test_a_service_that_stops_does_not_wait_for_ever(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """A device that does not close is cut off."""
    gateway = start_gateway(upstream=start_broker().port, timeouts={"close": 0.5})
    device = established(gateway)
    gateway.stop()
    assert device.read_to_end() == b""
    device.close()


def test_a_service_can_be_started_again(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Stopped and started, it lets devices in and keeps their deadlines as before."""
    gateway = start_gateway(upstream=start_broker().port)
    established(gateway).close()
    gateway.wait_ended()
    gateway.wait_empty()
    gateway.stop()
    gateway.call(gateway.service.startService)
    gateway.port = gateway.service.ports[0].getHost().port
    device = established(gateway, keep_alive=1)
    assert device.read_to_end() == b""
    device.close()
    assert gateway.wait_ended(2).reason is EndReason.KEEPALIVE_TIMEOUT


def test_tls_below_the_minimum_never_carries_a_session(start_gateway: StartGateway, ca: Any) -> None:
    """The far end sees the ClientHello's alert and no MQTT (what else can be wrong has a matrix of its own)."""
    certificate = ca.issue_cert("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    broker = Broker(tls=context)
    gateway = start_gateway(upstream=broker.port, tls={"min_version": "1.3"})
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        assert device.read_to_end() == b"\x20\x02\x00\x03"
    assert gateway.wait_ended().reason is EndReason.TLS_VERSION
    assert broker.received == b""
    broker.stop()


def test_a_gateway_that_stops_tells_what_it_had_kept_for_later(start_gateway: Callable[..., RunningGateway]) -> None:
    """A restart in the middle of a storm must not erase its size."""
    events: list[dict[str, Any]] = []
    gateway = start_gateway(upstream=free_port())
    gateway.journal._log = Logger(namespace="gateway", observer=events.append)
    for _ in range(FULL_RECORDS + 2):
        with Device(gateway.port) as device:
            device.send(mqtt.connect())
            device.read_to_end()
    gateway.wait_ended(FULL_RECORDS + 2)
    gateway.stop()
    assert [event["count"] for event in events if event["event"] == "records-withheld"] == [2]


def test_what_the_broker_sends_comes_straight_to_its_protocol(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """Nothing that only a connection's beginning needs stands between the transport and the protocol for its life."""
    gateway = start_gateway(upstream=start_broker().port)
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        assert device.read(4) == mqtt.connack()
        (session,) = gateway.service.gateway.sessions
        upstream = session._upstream
        assert type(upstream) is UpstreamProtocol
        assert upstream.transport.protocol is upstream


def test_a_sweep_that_takes_long_reaches_everybody(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one does not begin before its end: it would begin with the same sessions, and leave out the same."""
    swept: set[int] = set()
    sweep = Session.sweep

    def remembered(session: Session, now: float) -> bool:
        swept.add(session.record.number)
        return sweep(session, now)

    monkeypatch.setattr(Session, "sweep", remembered)
    monkeypatch.setattr(gateway_module, "_SWEPT_AT_A_TIME", 1)
    gateway = start_gateway(upstream=start_broker().port)
    chores = gateway.service.gateway._chores
    call_later = chores._call_later

    def later(delay: float, function: Any, *rest: Any) -> Any:
        # So that a second is not enough for all of them.
        return call_later(0.3 if getattr(function, "__name__", "") == "_go_on" else delay, function, *rest)

    monkeypatch.setattr(chores, "_call_later", later)
    devices = [established(gateway, client_identifier=f"sensor-{number}") for number in range(7)]
    eventually(lambda: len(swept) == len(devices), "each session is swept")
    for device in devices:
        device.close()
    gateway.wait_ended(len(devices))


def test_many_sessions_are_swept_a_few_at_a_time(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages have their turn in between, and none of the sessions is forgotten."""
    left: list[int] = []
    sweep = Gateway._sweep_some

    def counted(gateway: Gateway) -> None:
        left.append(sum(len(sessions) for sessions, _ in gateway._round))
        sweep(gateway)

    monkeypatch.setattr(gateway_module, "_SWEPT_AT_A_TIME", 2)
    monkeypatch.setattr(Gateway, "_sweep_some", counted)
    gateway = start_gateway(upstream=start_broker().port)
    devices = [Device(gateway.port) for _ in range(5)]
    for number, device in enumerate(devices):
        device.send(mqtt.connect(f"sensor-{number}", keep_alive=1))
        assert device.read(4) == mqtt.connack()
    gateway.wait_ended(5)
    assert {record.reason for record in gateway.ended} == {EndReason.KEEPALIVE_TIMEOUT}
    assert any(left[index : index + 3] == [5, 3, 1] for index in range(len(left)))
    for device in devices:
        device.close()
    gateway.wait_empty()


class Swept:
    """Stands for a session; notes what the sweep does with it."""

    def __init__(self, told: list[list[str]], name: str, asks: str = "") -> None:
        """`asks` names those that ask the kernel about their peers."""
        self.told, self.name, self.state, self.asks = told, name, State.RELAYING, asks

    def give_back(self, seconds: float, now: float) -> None:
        """See `Session`."""
        del now
        self.told[-1].append(f"{self.name} +{seconds:g}")

    def sweep(self, now: float) -> bool:
        """See `Session`."""
        del now
        self.told[-1].append(f"{self.name} swept")
        return self.name in self.asks


def test_lost_time_is_given_back_a_few_sessions_at_a_time(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To each before it is judged; also if the process is stopped again before the round has reached everybody."""
    running = start_gateway(upstream=1)
    gateway = running.service.gateway
    told: list[list[str]] = [[]]

    def swept() -> None:
        clock = TurnClock()
        with monkeypatch.context() as patch:
            patch.setattr(gateway_module, "_SWEPT_AT_A_TIME", 2)
            patch.setattr(gateway, "_chores", Chores(clock.callLater))
            patch.setattr(gateway, "sessions", {Swept(told, name) for name in "abcd"})
            gateway._sweep_all(60.0)
            clock.turn()
            told.append([])
            gateway._sweep_all(5.0)
            while clock.calls:
                clock.turn()
                told.append([])

    running.call(swept)
    assert not any(told[3:])
    del told[3:]
    first, second, third = ({each[0] for each in turn} for turn in told)
    assert [[each[1:] for each in turn] for turn in told] == [[owed, " swept"] * 2 for owed in (" +60", " +65", " +5")]
    assert (len(first), second, third) == (2, set("abcd") - first, first)


def test_few_sessions_end_in_a_turn_of_the_sweep(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """To end one costs much more than to look at it; those whose connections are closing count, too."""
    running = start_gateway(upstream=1)
    gateway = running.service.gateway
    told: list[list[str]] = [[]]
    monkeypatch.setattr(gateway_module, "_ENDED_AT_A_TIME", 2)

    class Ending(Swept):
        def sweep(self, now: float) -> bool:
            self.state = State.ENDED
            return super().sweep(now)

    def swept() -> None:
        sessions = [(Ending if name.isupper() else Swept)(told, name) for name in "abCDEfGh"]
        with monkeypatch.context() as patch:
            patch.setattr(gateway, "_round", [(sessions, 0.0)])
            told.extend([] for _ in gateway._sweep_sessions())

    running.call(swept)
    assert [[each[0] for each in turn] for turn in told] == [list("abCD"), list("EfG"), ["h"], []]


def test_few_sessions_ask_the_kernel_in_a_turn_of_the_sweep(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes much longer than the rest, and after a pause of the process all of them ask."""
    running = start_gateway(upstream=1)
    gateway = running.service.gateway
    told: list[list[str]] = [[]]
    monkeypatch.setattr(gateway_module, "_CHECKED_AT_A_TIME", 2)

    def swept() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(gateway, "_round", [([Swept(told, name, "bdef") for name in "abcdefgh"], 0.0)])
            told.extend([] for _ in gateway._sweep_sessions())

    running.call(swept)
    assert [[each[0] for each in turn] for turn in told] == [list("abcd"), list("ef"), list("gh"), []]


def greet(connection: BrokerConnection) -> None:
    """Accept the session, and leave the rest to the caller."""
    connection.read_packet()
    connection.send(mqtt.connack())


def flood(connection: BrokerConnection) -> None:
    """Accept the session, and send more than anyone's buffers hold."""
    greet(connection)
    connection.send(mqtt.publish("t", bytes(100_000)) * 200)
    connection.read_to_end()


def probed(handle: Any, times: int) -> bool:
    """Whether the kernel has probed a closed window so often (tcpi_backoff)."""
    info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    return bool(info[4] >= times)


def test_a_device_that_does_not_read_for_long_is_alive(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Longer than the timeout: its kernel answers the probes of its closed window, so all is there when it reads on."""
    gateway = start_gateway(upstream=start_broker(serve=flood).port, timeouts={"tcp_user": 0.5})
    device = Device(gateway.port)
    device.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
    device.send(mqtt.connect(keep_alive=0))
    assert device.read(4) == mqtt.connack()
    (session,) = gateway.service.gateway.sessions
    side: Any = session._device
    # The fourth probe comes after three seconds.
    eventually(lambda: probed(side.transport.getHandle(), 4), "a window closed for longer than the timeout")
    assert session.state is State.RELAYING
    whole = mqtt.publish("t", bytes(100_000))
    for _ in range(200):
        assert device.read(len(whole)) == whole
    device.close()
    assert gateway.wait_ended().reason is EndReason.DEVICE_LOST


def test_a_broker_that_does_not_read_for_long_is_alive(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The same the other way."""
    reads_on = threading.Event()

    def serve(connection: BrokerConnection) -> None:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        greet(connection)
        reads_on.wait(20)
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, timeouts={"tcp_user": 0.5})
    device = established(gateway, keep_alive=0)
    (session,) = gateway.service.gateway.sessions
    side: Any = session._upstream
    sending = threading.Thread(target=device.send, args=[mqtt.publish("t", bytes(100_000)) * 200])
    sending.start()
    eventually(lambda: probed(side.transport.getHandle(), 4), "a window closed for longer than the timeout")
    assert session.state is State.RELAYING
    reads_on.set()
    sending.join(20)
    device.send(mqtt.disconnect())
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT
    device.close()


def test_what_is_not_acknowledged_ends_the_session(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The device's kernel drops what comes, and its window is open: it is dead."""
    go_on = threading.Event()

    def serve(connection: BrokerConnection) -> None:
        greet(connection)
        go_on.wait(20)
        connection.send(mqtt.publish())
        connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port, timeouts={"tcp_user": 1.0})
    device = established(gateway, keep_alive=0)
    drop_packets(device.socket)
    go_on.set()
    record = gateway.wait_ended()
    assert (record.reason, record.detail) == (EndReason.DEVICE_LOST, "Connection timed out")
    device.close()


def stopped(gateway: RunningGateway, seconds: float, meanwhile: Callable[[], object]) -> None:
    """Let the gateway do nothing for so long, as if its process had been stopped, while something happens."""
    stands_still = threading.Event()

    def stand_still() -> None:
        stands_still.set()
        time.sleep(seconds)

    waiting = threading.Thread(target=gateway.call, args=[stand_still])
    waiting.start()
    assert stands_still.wait(20)
    meanwhile()
    waiting.join(20)


def test_devices_that_pinged_while_the_process_was_stopped_are_not_silent(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """What they sent is read before they are judged, and what came late gives the time back."""
    gateway = start_gateway(upstream=start_broker().port)
    devices = [established(gateway, client_identifier=f"sensor-{number}", keep_alive=1) for number in range(3)]
    stopped(gateway, 3.0, lambda: [device.send(mqtt.pingreq()) for device in devices[:2]])
    # The third has its time from now on, and is silent.
    gateway.wait_ended()
    assert [record.client_identifier for record in gateway.ended][:1] == ["sensor-2"]
    for device in devices[:2]:
        device.send(mqtt.disconnect())
    gateway.wait_ended(3)
    reasons = {record.client_identifier: record.reason for record in gateway.ended}
    assert reasons == {
        "sensor-0": EndReason.DEVICE_DISCONNECT,
        "sensor-1": EndReason.DEVICE_DISCONNECT,
        "sensor-2": EndReason.KEEPALIVE_TIMEOUT,
    }
    for device in devices:
        device.close()


def test_an_error_in_a_sweep_does_not_end_sweeping(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    monkeypatch: pytest.MonkeyPatch,
    logged_errors: list[dict[str, Any]],
) -> None:
    """Whatever fails in it, also the end of a session that has failed: the others' timeouts are kept."""
    failed = []

    def fail(*_: object) -> None:
        failed.append(1)
        raise RuntimeError("on purpose")

    gateway = start_gateway(upstream=start_broker().port)
    broken = established(gateway, client_identifier="broken", keep_alive=0)
    (session,) = gateway.service.gateway.sessions
    monkeypatch.setattr(gateway.service.gateway.doorkeeper, "sweep", fail)
    sweep, end = Session.sweep, Session.fail
    monkeypatch.setattr(Session, "sweep", lambda self, now: fail() if self is session else sweep(self, now))
    monkeypatch.setattr(Session, "fail", lambda self, detail: fail() if self is session else end(self, detail))
    silent = established(gateway, client_identifier="silent", keep_alive=1)
    assert gateway.wait_ended().reason is EndReason.KEEPALIVE_TIMEOUT
    assert failed
    monkeypatch.undo()
    for device in (broken, silent):
        device.close()
    gateway.wait_ended(2)
    assert logged_errors
    logged_errors.clear()
