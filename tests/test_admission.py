"""Whom the gateway lets in: the doorkeeper on a virtual clock, and the door itself on real sockets."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.task import Clock

from gateway.config import Admission, Listener, from_mapping
from gateway.errors import EndReason
from gateway.gateway import Gateway
from gateway.net.network import ReactorNetwork
from gateway.rules import admission as admission_module
from gateway.rules.admission import Doorkeeper
from gateway.service import raise_descriptor_limit
from tests import mqtt_packets as mqtt
from tests.harness import Broker, Device, RecordingJournal, RunningGateway, eventually


class Door:
    """A doorkeeper and its clock."""

    def __init__(self, max_sessions: int = 1000, **admission: Any) -> None:
        self.clock = Clock()
        self.keeper = Doorkeeper(Admission(**admission), max_sessions, self.clock.seconds)

    def admit(self, host: str | None = "192.168.1.7") -> EndReason | None:
        return self.keeper.admit(host)

    def admitted(self, attempts: int, host: str | None = "192.168.1.7") -> int:
        return sum(self.admit(host) is None for _ in range(attempts))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.10",
        "::1",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "fd12:3456::1",
        "::ffff:192.168.1.7",
        None,
    ],
)
def test_home_networks_are_let_in_by_default(host: str | None) -> None:
    """Loopback, private, link-local and unique-local ranges, and UNIX sockets, whose file mode decides."""
    assert Door().admit(host) is None


@pytest.mark.parametrize(
    "host",
    [
        "8.8.8.8",
        "172.32.0.1",
        "192.169.0.1",
        "100.64.0.1",
        "2001:db8::1",
        "::ffff:8.8.8.8",
        "fe00::1",
        "no address",
        "",
    ],
)
def test_all_other_networks_are_not(host: str) -> None:
    """Also an IPv4 address that comes in by IPv6, and what is no address at all: the door fails closed."""
    door = Door()
    assert door.admit(host) is EndReason.NETWORK_NOT_ALLOWED
    assert door.keeper.refused == {EndReason.NETWORK_NOT_ALLOWED: 1}


def test_allowed_networks_replace_the_default() -> None:
    """Whoever names networks means those."""
    door = Door(allow=(ip_network("8.8.8.0/24"), ip_network("2001:db8::/32")))
    assert door.admit("8.8.8.8") is None
    assert door.admit("2001:db8::7%eth0") is None
    assert door.admit("127.0.0.1") is EndReason.NETWORK_NOT_ALLOWED


def test_sessions_are_limited_in_all() -> None:
    """Whoever leaves makes room."""
    door = Door(3)
    assert [door.admit(host) for host in ("10.0.0.1", None, "10.0.0.2", "10.0.0.3", None)] == [
        None,
        None,
        None,
        EndReason.TOO_MANY_SESSIONS,
        EndReason.TOO_MANY_SESSIONS,
    ]
    door.keeper.leave(None)
    assert door.admitted(2, "10.0.0.3") == 1


def test_sessions_are_limited_per_address() -> None:
    """One address does not use up another's."""
    door = Door(max_sessions_per_address=2)
    assert [door.admit("10.0.0.1") for _ in range(3)] == [None, None, EndReason.TOO_MANY_FROM_ADDRESS]
    assert door.admit("10.0.0.2") is None
    door.keeper.leave("10.0.0.1")
    assert door.admitted(2, "10.0.0.1") == 1


def test_many_devices_may_stand_behind_one_address_by_default() -> None:
    """There is no limit per address unless one is set."""
    assert Door(5000).admitted(5000) == 5000


def test_new_sessions_are_limited_per_second() -> None:
    """A second's worth at once, then at that rate, and never more than a second's worth saved up."""
    door = Door(new_sessions_per_second=5)
    assert door.admitted(20) == 5
    assert door.admit() is EndReason.RATE_LIMITED
    door.clock.advance(0.4)
    assert door.admitted(20) == 2
    door.clock.advance(3600)
    assert door.admitted(20) == 5


def test_a_rate_below_one_a_second_lets_one_in() -> None:
    """One every ten seconds."""
    door = Door(new_sessions_per_second=0.1)
    assert door.admitted(2) == 1
    door.clock.advance(9.5)
    assert door.admitted(2) == 0
    door.clock.advance(0.6)
    assert door.admitted(2) == 1


def test_the_rate_of_one_address_is_not_anothers() -> None:
    """A device that reconnects in a loop shuts nobody else out, nor a UNIX socket."""
    door = Door(new_sessions_per_second=1)
    assert door.admitted(100, "10.0.0.1") == 1
    assert door.admit("10.0.0.2") is None
    assert door.admitted(10, None) == 10


def test_whoever_is_refused_for_another_reason_keeps_his_rate() -> None:
    """Refusals by number do not use up tokens."""
    door = Door(1, new_sessions_per_second=1)
    door.admit("10.0.0.1")
    assert door.admit("10.0.0.2") is EndReason.TOO_MANY_SESSIONS
    door.keeper.leave("10.0.0.1")
    assert door.admit("10.0.0.2") is None


def test_addresses_that_are_quiet_again_are_forgotten() -> None:
    """Memory is bounded by the addresses that are active, whoever scans the network."""
    door = Door(new_sessions_per_second=2)
    for index in range(1000):
        host = f"10.0.{index // 256}.{index % 256}"
        assert door.admit(host) is None
        door.keeper.leave(host)
    door.clock.advance(0.25)
    door.keeper.sweep()
    assert len(door.keeper._buckets) == 1000
    door.clock.advance(0.25)
    door.keeper.sweep()
    assert not door.keeper._buckets
    assert not door.keeper.by_address
    assert door.keeper.sessions == 0


def test_a_sweep_looks_at_some_addresses_and_the_next_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses there are, a sweep takes little time; all of them have their turn."""
    monkeypatch.setattr(admission_module, "_CHECKED_AT_A_TIME", 10)
    door = Door(new_sessions_per_second=1)
    for number in range(35):
        door.keeper.admit(f"10.0.0.{number}")
    door.clock.advance(10.0)
    for left in (25, 15, 5, 0, 0):
        door.keeper.sweep()
        assert len(door.keeper._buckets) == left


@pytest.mark.parametrize(
    ("host", "proxies", "is_let_in"),
    [
        ("10.0.0.5", ["10.0.0.0/24"], True),
        ("::ffff:10.0.0.5", ["10.0.0.5/32"], True),
        ("fe80::5%eth0", ["10.0.0.0/8", "fe80::/10"], True),
        (None, ["unix"], True),
        ("10.0.1.5", ["10.0.0.0/24"], False),
        ("fd12::5", ["10.0.0.0/24", "unix"], False),
        (None, ["10.0.0.0/24"], False),
        ("no address", ["10.0.0.0/24"], False),
    ],
)
def test_only_load_balancers_that_are_named_are_let_in_as_such(
    host: str | None, proxies: list[str], is_let_in: bool
) -> None:
    """Whatever networks devices may come from: a socket of systemd's may turn out to be of another kind than meant."""
    door = Door(1, allow=(ip_network("8.8.8.8/32"),), max_sessions_per_address=1)
    networks: Any = [proxy if proxy == "unix" else ip_network(proxy) for proxy in proxies]
    reason = None if is_let_in else EndReason.PROXY_NOT_TRUSTED
    assert door.keeper.admit_proxy(host, networks) is reason
    assert door.keeper.sessions == is_let_in
    if is_let_in:
        assert door.keeper.admit_proxy(host, networks) is EndReason.TOO_MANY_SESSIONS
        assert door.keeper.admit_device("192.168.1.7") is EndReason.NETWORK_NOT_ALLOWED
        assert door.keeper.admit_device("8.8.8.8") is None
        door.keeper.leave("8.8.8.8")
    assert (door.keeper.sessions, dict(door.keeper.by_address)) == (0, {})


def test_refusals_are_counted_by_reason() -> None:
    """For the people who ask why devices are not let in."""
    door = Door(max_sessions_per_address=1)
    for host in ("10.0.0.1", "10.0.0.1", "10.0.0.1", "8.8.8.8"):
        door.admit(host)
    assert door.keeper.refused == {EndReason.TOO_MANY_FROM_ADDRESS: 2, EndReason.NETWORK_NOT_ALLOWED: 1}


# ---- the gateway's door


@pytest.fixture
def gateway() -> Gateway:
    """A gateway in memory that carries two sessions of an address, and three in all."""
    config = from_mapping(
        {"upstream": [{"host": "192.0.2.1"}], "admission": {"max_sessions_per_address": 2, "allow": ["10.0.0.0/8"]}}
    )
    clock = Clock()
    return Gateway(config, clock, ReactorNetwork(clock), RecordingJournal(clock.seconds), 3)


@pytest.mark.parametrize("host", ["::ffff:10.0.0.1", "10.0.0.1"])
def test_one_device_is_one_address_however_it_comes_in(gateway: Gateway, host: str) -> None:
    """By IPv4 or by IPv6 that carries it: both count for the same address."""
    admit = gateway.factory(Listener("1883")).buildProtocol
    admit(IPv4Address("TCP", "10.0.0.1", 1))
    admit(IPv6Address("TCP", "::ffff:10.0.0.1", 2))
    assert admit(IPv6Address("TCP", host, 3)) is None
    assert gateway.doorkeeper.refused == {EndReason.TOO_MANY_FROM_ADDRESS: 1}


@pytest.mark.parametrize("address", [None, UNIXAddress(None), UNIXAddress("/run/gateway.sock")])
def test_a_unix_socket_has_no_network(gateway: Gateway, address: Any) -> None:
    """Nor a limit per address."""
    admit = gateway.factory(Listener("1883")).buildProtocol
    assert [admit(address) is not None for _ in range(4)] == [True, True, True, False]
    assert gateway.doorkeeper.refused == {EndReason.TOO_MANY_SESSIONS: 1}


def test_the_default_limit_is_what_the_descriptors_carry() -> None:
    """Two for each session, and some for all else; the soft limit is raised to the hard one."""
    sessions = raise_descriptor_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    assert 0 < hard - 2 * sessions <= 66


@pytest.mark.parametrize(("wanted", "expected"), [(5, 5), (9_000_000, None)])
def test_a_configured_limit_leaves_the_descriptor_limit_raised_and_keeps_below_it(
    start_gateway: Callable[..., RunningGateway], wanted: int, expected: int | None
) -> None:
    """Fewer sessions than the descriptors carry need descriptors all the same; more cannot be had."""
    carried = raise_descriptor_limit()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    gateway = start_gateway(upstream=1, admission={"max_sessions": wanted})
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert gateway.service.gateway.doorkeeper._max_sessions == (expected or carried)


# ---- on real sockets


def refused(gateway: RunningGateway, port: int, count: int = 1) -> EndReason:
    """Connect, find the connection closed at once, and return the reason that was journalled."""
    with Device(port) as device:
        device.socket.settimeout(20)
        assert device.read_to_end() == b""
    eventually(lambda: len(gateway.journal.turned_away) == count, "a refusal in the journal")
    reason: EndReason = gateway.journal.turned_away[-1][0]
    return reason


def test_whoever_is_not_let_in_is_closed_at_once_and_counted(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """Before a byte is read or a broker is dialled."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, admission={"allow": ["10.0.0.0/8"]})
    assert refused(gateway, gateway.port) is EndReason.NETWORK_NOT_ALLOWED
    assert refused(gateway, gateway.port, 2) is EndReason.NETWORK_NOT_ALLOWED
    assert gateway.service.gateway.doorkeeper.refused == {EndReason.NETWORK_NOT_ALLOWED: 2}
    assert broker.accepted == 0
    gateway.wait_empty()


def test_one_that_leaves_makes_room_for_another(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """The limit counts those that are there."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, admission={"max_sessions": 2})
    with Device(gateway.port) as first, Device(gateway.port) as second:
        for device in (first, second):
            device.send(mqtt.connect())
            assert device.read(4) == mqtt.connack()
        assert refused(gateway, gateway.port) is EndReason.TOO_MANY_SESSIONS
        first.close()
        gateway.wait_ended()
        eventually(lambda: len(gateway.service.gateway.sessions) == 1, "one session left")
        with Device(gateway.port) as third:
            third.send(mqtt.connect())
            assert third.read(4) == mqtt.connack()
    gateway.wait_ended(3)
    gateway.wait_empty()


def test_connections_without_connect_of_one_address_make_room_for_others(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """One host that opens connections and says nothing shuts nobody out; it gets no room itself, nor do strangers."""
    gateway = start_gateway(
        upstream=start_broker().port, admission={"max_sessions": 8, "allow": ["127.0.0.1/32", "127.0.0.66/32"]}
    )

    def connection(source: str) -> socket.socket:
        return stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 20, (source, 0)))

    with ExitStack() as stack:
        idle = [connection("127.0.0.66") for _ in range(8)]
        eventually(lambda: len(gateway.service.gateway.sessions) == 8, "all of them")
        assert connection("127.0.0.99").recv(1) == b""
        assert connection("127.0.0.66").recv(1) == b""
        for count in (1, 2, 3):
            device = stack.enter_context(Device(gateway.port))
            device.send(mqtt.connect(f"device-{count}"))
            assert device.read(4) == mqtt.connack()
            with suppress(ConnectionResetError):
                assert idle.pop().recv(1) == b""
        eventually(lambda: len(gateway.service.gateway.sessions) == 8, "no more and no less than the limit")
        assert {record.reason for record in gateway.journal.ended} == {EndReason.TOO_MANY_SESSIONS}
        # Those that have said who they are stay, however many their address has.
        for waiting in idle:
            waiting.sendall(mqtt.connect(f"device-{waiting.fileno()}"))
            assert waiting.recv(4, socket.MSG_WAITALL) == mqtt.connack()
        assert refused(gateway, gateway.port, 3) is EndReason.TOO_MANY_SESSIONS


def test_connections_that_were_refused_and_stay_open_make_room_for_others(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """The gateway waits for their devices to close them, but not while others are kept out."""
    gateway = start_gateway(
        upstream=start_broker().port,
        admission={"max_sessions": 4},
        timeouts={"close": 60.0},
        device=[{"match_client_id": "no", "enabled": False}],
    )
    with ExitStack() as stack:
        for _ in range(4):
            source = ("127.0.0.66", 0)
            refused_one = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 20, source))
            refused_one.sendall(mqtt.connect("no"))
        eventually(lambda: len(gateway.journal.ended) == 4, "their end")
        assert len(gateway.service.gateway.sessions) == 4

        def is_served() -> bool:
            device = stack.enter_context(Device(gateway.port))
            with suppress(OSError):
                device.send(mqtt.connect())
                return device.socket.recv(4) == mqtt.connack()
            return False

        eventually(is_served, "room")


def test_a_device_may_come_in_by_ipv6_and_by_a_unix_socket(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    """Each listener is a door of the same house."""
    path = tmp_path / "gateway.sock"
    gateway = start_gateway(
        upstream=start_broker().port,
        listen=[{"endpoint": "127.0.0.1:0"}, {"endpoint": "[::1]:0"}, {"endpoint": f"unix:{path}", "name": "local"}],
    )
    by_ipv6 = Device(gateway.service.ports[1].getHost().port, address="::1")
    by_path = Device.__new__(Device)
    by_path.socket = socket.socket(socket.AF_UNIX)
    by_path.socket.settimeout(20)
    by_path.socket.connect(str(path))
    with by_ipv6, by_path:
        for device in (by_ipv6, by_path):
            device.send(mqtt.connect() + mqtt.disconnect())
            assert device.read(4) == mqtt.connack()
            assert device.read_to_end() == b""
    gateway.wait_ended(2)
    assert sorted((record.device_address.rpartition(":")[0], record.listener) for record in gateway.ended) == [
        ("", "local"),
        ("[::1]", ""),
    ]
    gateway.wait_empty()


def test_an_ipv4_device_on_an_ipv6_listener_is_known_by_its_ipv4_address(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """So that the networks allowed hold for it."""
    gateway = start_gateway(
        upstream=start_broker().port,
        listen=[{"endpoint": "[::]:0"}],
        admission={"allow": ["127.0.0.1/32"], "max_sessions_per_address": 1},
    )
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        assert device.read(4) == mqtt.connack()
        assert refused(gateway, gateway.port) is EndReason.TOO_MANY_FROM_ADDRESS
    gateway.wait_ended()
    gateway.wait_empty()
