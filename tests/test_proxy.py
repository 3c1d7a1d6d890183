"""Brokers behind real proxies: squid, tinyproxy, dante, microsocks."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread

from gateway.cli import check
from gateway.cli.login import make_login
from gateway.cli.report import Report
from gateway.errors import EndReason
from tests import mqtt_packets as packets
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.pki import certify, certify_ca
from tests.ports import free_port
from tests.proxies import PASSWORD, USERNAME, Dante, MicroSocks, Squid, Tinyproxy

StartGateway = Callable[..., RunningGateway]


def echo(connection: BrokerConnection) -> None:
    """Accept CONNECT, and send every PUBLISH back."""
    connection.read_packet()
    connection.send(packets.connack())
    while True:
        connection.send(connection.read_packet())


@pytest.fixture(scope="module")
def broker(server_tls: ServerTLS) -> Iterator[Broker]:
    """A broker that sends back what it gets."""
    running = Broker(tls=server_tls, serve=echo)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def pem(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost with its key, in one file."""
    path = tmp_path_factory.mktemp("proxy") / "proxy.pem"
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="module")
def start_proxy(tmp_path_factory: pytest.TempPathFactory, broker: Broker, pem: Path) -> Iterator[Callable[[str], Any]]:
    """Return a function that starts a proxy by name, once."""
    makers: dict[str, Callable[[Path], Any]] = {
        "squid": lambda _: Squid(broker.port),
        "squid with password": lambda _: Squid(broker.port, authenticate=True),
        "squid over TLS": lambda _: Squid(broker.port, certificate=pem),
        "squid that allows nothing": lambda _: Squid(),
        "tinyproxy": lambda directory: Tinyproxy(directory, broker.port),
        "tinyproxy that allows 443": lambda directory: Tinyproxy(directory, 443),
        "dante": Dante,
        "microsocks": MicroSocks,
    }
    running: dict[str, Any] = {}

    def start(name: str) -> Any:
        if name not in running:
            running[name] = makers[name](tmp_path_factory.mktemp("proxy"))
        return running[name]

    yield start
    for proxy in running.values():
        proxy.stop()


@pytest.fixture
def start(start_gateway: Callable[..., RunningGateway]) -> StartGateway:
    """Return a function that starts a gateway in front of these upstreams."""
    return lambda upstream, **sections: start_gateway(upstream=upstream, **sections)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    """The proxy's password, as an editor leaves it."""
    path = tmp_path / "proxy.password"
    path.write_text(f"{PASSWORD}\n")
    return path


def through(proxy: Any, port: int, ca_file: Path, password_file: Path | None = None) -> list[dict[str, Any]]:
    """Return an `[[upstream]]` table for a broker on localhost behind a proxy."""
    upstream: dict[str, Any] = {"host": "localhost", "port": port, "proxy": proxy.url}
    if proxy.url.startswith("https:"):
        upstream["proxy_ca_file"] = str(ca_file)
    if password_file is not None:
        upstream |= {"proxy_username": USERNAME, "proxy_password_file": str(password_file)}
    return [upstream]


def refused(gateway: RunningGateway, broker: Broker) -> Any:
    """Have a session refused; nothing may reach the broker.  Return its record."""
    already = len(broker.received)
    with Device(gateway.port) as device:
        device.send(packets.connect() + packets.publish())
        assert device.read_to_end() == packets.connack(code=3)
    record = gateway.wait_ended(len(gateway.ended) or 1)
    assert len(broker.received) == already
    return record


@pytest.mark.parametrize("name", ["squid", "squid over TLS", "tinyproxy", "dante"])
def test_a_session_goes_through_a_proxy(
    name: str, start: StartGateway, start_proxy: Callable[[str], Any], broker: Broker, ca_file: Path
) -> None:
    """Messages of every size both ways, an orderly end, and the broker verified end to end."""
    proxy = start_proxy(name)
    gateway = start(through(proxy, broker.port, ca_file))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read(4) == packets.connack()
        for size in (1, 1000, 300_000):
            message = packets.publish(payload=bytes(size))
            device.send(message)
            assert device.read(len(message)) == message
        # With TLS to the proxy, the core would write into the wrong one of two TLS channels.
        is_compiled = gateway.service.engine.core is not None and name != "squid over TLS"
        eventually(lambda: bool(gateway.service._relay._lent) == is_compiled, "the session is lent if it may be")
        device.send(packets.disconnect())
        device.read_to_end()
    record = gateway.wait_ended()
    assert record.reason is EndReason.DEVICE_DISCONNECT
    assert record.peer is not None
    assert record.peer.matched_san == "DNS:localhost"
    assert record.upstream_address.endswith(f":{proxy.port}")
    gateway.wait_empty()


@pytest.mark.parametrize("name", ["squid with password", "microsocks"])
def test_a_proxy_gets_its_user_and_password(
    name: str,
    start: StartGateway,
    start_proxy: Callable[[str], Any],
    broker: Broker,
    ca_file: Path,
    password_file: Path,
) -> None:
    """From a file; without them, or with wrong ones, it is `proxy-authentication`, and no secret is told."""
    proxy = start_proxy(name)
    gateway = start(through(proxy, broker.port, ca_file, password_file))
    with Device(gateway.port) as device:
        device.send(packets.connect())
        assert device.read(4) == packets.connack()
    without = start(through(proxy, broker.port, ca_file))
    assert refused(without, broker).reason is EndReason.PROXY_AUTHENTICATION
    password_file.write_text("wrong secret")
    wrong = start(through(proxy, broker.port, ca_file, password_file))
    record = refused(wrong, broker)
    assert record.reason is EndReason.PROXY_AUTHENTICATION
    assert "secret" not in record.detail


@pytest.mark.parametrize("name", ["squid that allows nothing", "tinyproxy that allows 443"])
def test_a_port_that_the_proxy_does_not_allow(
    name: str, start: StartGateway, start_proxy: Callable[[str], Any], broker: Broker, ca_file: Path
) -> None:
    """`proxy-refused`, with the proxy's words."""
    gateway = start(through(start_proxy(name), broker.port, ca_file))
    record = refused(gateway, broker)
    assert record.reason is EndReason.PROXY_REFUSED
    assert "403" in record.detail


@pytest.mark.parametrize(("name", "reason"), [("squid", EndReason.TCP_UNREACHABLE), ("dante", EndReason.TCP_REFUSED)])
def test_a_broker_that_is_down_behind_a_proxy_is_the_brokers_failure(
    name: str, reason: EndReason, start: StartGateway, start_proxy: Callable[[str], Any], server_tls: ServerTLS,
    broker: Broker, ca_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    """The proxy answered, so the proxy is well; the broker backs off, and is used again when it is back."""
    port = free_port()
    proxy = Squid(port) if name == "squid" else start_proxy(name)
    try:
        gateway = start(through(proxy, port, ca_file), failover={"retry_first": 0.1, "retry_max": 0.1})
        assert refused(gateway, broker).reason is reason
        (health,) = gateway.service.gateway.upstreams
        assert health.via is not None
        assert health.via.is_open
        assert not health.is_open
        back = Broker(tls=server_tls, port=port)
        try:
            eventually(lambda: health.is_open, "the broker is used again")
        finally:
            back.stop()
    finally:
        if name == "squid":
            proxy.stop()


def test_a_proxy_that_is_down_is_the_proxys_failure(
    start: StartGateway, broker: Broker, ca_file: Path, tmp_path: Path
) -> None:
    """All brokers behind it are given up at once, one that is reached directly serves, and it is found again."""
    port = free_port()
    dead = {"host": "localhost", "port": broker.port, "proxy": f"http://localhost:{port}"}
    alone = start([dead], failover={"retry_first": 0.1, "retry_max": 0.1})
    record = refused(alone, broker)
    assert record.reason is EndReason.PROXY_UNREACHABLE
    assert f"localhost:{port}" in record.detail
    (health,) = alone.service.gateway.upstreams
    assert health.decisive is health.via
    assert (health.failures, health.via.failures >= 1) == (0, True)
    # A configuration with a second broker, without the proxy.
    both = start([dead, {"host": "localhost", "port": broker.port}])
    with Device(both.port) as device:
        device.send(packets.connect())
        assert device.read(4) == packets.connack()
    proxy = Tinyproxy(tmp_path, broker.port, port=port)
    try:
        eventually(lambda: health.is_open, "the proxy is used again")
    finally:
        proxy.stop()


def test_a_proxy_that_hangs_ends_in_time(start: StartGateway, broker: Broker) -> None:
    """It accepts and is silent: `tcp-timeout`, since most such proxies wait for the broker."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://localhost:{silent.getsockname()[1]}"
        upstream = [{"host": "localhost", "port": broker.port, "proxy": proxy}]
        record = refused(start(upstream, timeouts={"tcp": 0.2}), broker)
    assert record.reason is EndReason.TCP_TIMEOUT
    assert proxy in record.detail


@pytest.mark.parametrize(
    ("scheme", "answer", "remedy"),
    [
        ("http", b"\x05\xff", "use socks5://"),
        ("http", b"\x15\x03", "use https://"),
        ("socks5", b"H", "use http://"),
        ("https", b"H", "use http://"),
        ("https", b"\x05", "use socks5://"),
        ("https", b"S", "TLS with the proxy"),
    ],
)
def test_a_wrong_scheme_is_named_at_once(
    start: StartGateway, broker: Broker, scheme: str, answer: bytes, remedy: str
) -> None:
    """By the first bytes, after which the proxy waits: no timeout is near. Nothing is tried with another scheme."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        seen: list[bytes] = []

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                seen.append(connection.recv(1))
                connection.sendall(answer)
                while connection.recv(65536):
                    pass

        threading.Thread(target=serve, daemon=True).start()
        proxy = f"{scheme}://localhost:{listening.getsockname()[1]}"
        upstream = [{"host": "localhost", "port": broker.port, "proxy": proxy}]
        record = refused(start(upstream, timeouts={"tcp": 600, "tls": 600}), broker)
    assert record.reason is EndReason.PROXY_UNREACHABLE
    assert remedy in record.detail
    assert seen == [{"http": b"C", "socks5": b"\x05", "https": b"\x16"}[scheme]]


@pytest.mark.parametrize("scheme", ["socks5", "https"])
def test_a_proxy_that_does_not_even_greet_waits_for_no_broker(start: StartGateway, broker: Broker, scheme: str) -> None:
    """As an HTTP proxy that is spoken to in another protocol: it is the proxy's failure, and may be the scheme."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = [
            {
                "host": "localhost",
                "port": broker.port,
                "proxy": f"{scheme}://localhost:{silent.getsockname()[1]}",
            }
        ]
        record = refused(start(upstream, timeouts={"tcp": 0.2}), broker)
    assert record.reason is EndReason.PROXY_UNREACHABLE
    assert "check the scheme" in record.detail


def test_a_proxy_that_intercepts_tls_is_named(
    start: StartGateway, broker: Broker, ca_file: Path, tmp_path: Path
) -> None:
    """It ends TLS and shows a certificate of a CA of its own; not one byte of MQTT reaches it."""
    own = trustme.CA(organization_name="Inspection of the company")
    pem = tmp_path / "inspection.pem"
    pem.write_bytes(own.private_key_pem.bytes() + own.cert_pem.bytes())
    proxy = Squid(broker.port, intercept=pem)
    try:
        record = refused(start(through(proxy, broker.port, ca_file)), broker)
    finally:
        proxy.stop()
    assert record.reason is EndReason.PROXY_INTERCEPTS_TLS
    assert proxy.url in record.detail


@pytest.mark.parametrize("known", [True, False], ids=["known issuer", "unknown issuer"])
def test_only_an_unknown_issuer_looks_like_interception(
    start: StartGateway,
    start_proxy: Callable[[str], Any],
    start_broker: Callable[..., Broker],
    reactor: Any,
    tmp_path: Path,
    known: bool,
) -> None:
    """A chain of the broker's own CA that breaks a rule is the broker's fault; sessions and `check` say the same."""
    root, stranger = certify_ca(), certify_ca(subject="stranger")
    issuer = certify_ca(root, ca=False) if known else stranger
    broker = start_broker(tls=certify(issuer).server())
    pem = tmp_path / "root.pem"
    pem.write_bytes(root.pem)
    proxy = start_proxy("dante")
    reason = EndReason.TLS_UNTRUSTED_CHAIN if known else EndReason.PROXY_INTERCEPTS_TLS
    assert refused(start(through(proxy, broker.port, pem), ca_file=pem), broker).reason is reason
    tables = {"[[listen]]": {"endpoint": "127.0.0.1:0"}, "[[upstream]]": through(proxy, broker.port, pem)[0]}
    tables["[tls]"] = {"ca_file": str(pem)}
    lines = [line for name, keys in tables.items() for line in (name, *(f"{key} = {keys[key]!r}" for key in keys))]
    (tmp_path / "gateway.toml").write_text("\n".join(lines))
    report = Report(lambda _: None)
    given = {flag.name: [] for flag in check.FLAGS} | {"config": [str(tmp_path / "gateway.toml")]}
    coroutine = check.examine(reactor, given, make_login(None, None, None), report)
    blockingCallFromThread(reactor, Deferred.fromCoroutine, coroutine)
    (step,) = (step for step in report.steps if step.name == "chain")
    assert step.facts["reason"] is reason


def test_tls_with_the_proxy_itself_is_verified(
    start: StartGateway, start_proxy: Callable[[str], Any], broker: Broker, tmp_path: Path
) -> None:
    """Credentials for the proxy must not go to somebody else."""
    proxy = start_proxy("squid over TLS")
    stranger = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    record = refused(start(through(proxy, broker.port, stranger)), broker)
    assert record.reason is EndReason.PROXY_UNREACHABLE
    assert "tls-untrusted-chain" in record.detail


def test_the_environment_names_the_proxy(
    start: StartGateway, start_proxy: Callable[[str], Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `proxy = "environment"`, and with nothing else."""
    proxy = start_proxy("tinyproxy")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    upstream = {"host": "localhost", "port": broker.port, "proxy": "environment"}

    def address(table: dict[str, Any]) -> str:
        gateway = start([table])
        with Device(gateway.port) as device:
            device.send(packets.connect())
            assert device.read(4) == packets.connack()
            device.send(packets.disconnect())
        return str(gateway.wait_ended().upstream_address)

    monkeypatch.delenv("NO_PROXY", raising=False)
    assert address(upstream).endswith(f":{proxy.port}")
    assert address({"host": "localhost", "port": broker.port}).endswith(f":{broker.port}")
    assert address(upstream | {"no_proxy": ["localhost"]}).endswith(f":{broker.port}")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert address(upstream).endswith(f":{broker.port}")


def test_a_hundred_devices_through_a_proxy_and_its_restart(
    start: StartGateway, server_tls: ServerTLS, ca_file: Path, tmp_path: Path
) -> None:
    """All are served, a reload leaves them alone, the proxy's end ends them, and all come back behind the next one."""
    broker = Broker(tls=server_tls)
    proxy = Tinyproxy(tmp_path, broker.port)
    gateway = start(through(proxy, broker.port, ca_file), failover={"retry_first": 0.1, "retry_max": 0.1})

    def all_connected() -> list[Device]:
        devices = [Device(gateway.port) for _ in range(100)]
        for index, device in enumerate(devices):
            device.send(packets.connect(client_identifier=f"device-{index}"))
        for device in devices:
            assert device.read(4) == packets.connack()
        return devices

    try:
        devices = all_connected()
        gateway.change(limits={"max_packet_size": 100_000})
        assert len(gateway.service.gateway.sessions) == 100
        proxy.stop()
        for device in devices:
            device.read_to_end()
            device.close()
        gateway.wait_ended(100)
        assert {record.reason for record in gateway.ended} == {EndReason.UPSTREAM_LOST}
        proxy = Tinyproxy(tmp_path, broker.port)
        gateway.change(upstream=through(proxy, broker.port, ca_file))
        for device in all_connected():
            device.close()
        gateway.wait_empty()
    finally:
        proxy.stop()
        broker.stop()


def test_check_walks_through_the_proxy(
    start_proxy: Callable[[str], Any], broker: Broker, ca_file: Path, tmp_path: Path
) -> None:
    """A step of its own, between `tcp` and `client-hello`, and an openssl command with the proxy in it."""

    def check(proxy: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gateway.cli.main", "check", "--upstream", f"localhost:{broker.port}"]
        command += ["--ca-file", str(ca_file), "--proxy", proxy.url, "--listen", "127.0.0.1:0"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    good = check(start_proxy("squid"))
    assert good.returncode == 0, good.stdout + good.stderr
    assert "opened a tunnel to localhost" in good.stdout
    assert f"-proxy localhost:{start_proxy('squid').port}" in good.stdout
    bad = check(start_proxy("squid that allows nothing"))
    assert bad.returncode == 1
    assert "proxy-refused" in bad.stdout
