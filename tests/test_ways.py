"""Every way to a broker: 100 devices, mosquitto and outages behind real proxies, and the matrices of refusals again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gateway.errors import EndReason
from tests.balancers import Program
from tests.fleet import Fleet, refused
from tests.harness import RunningGateway, ServerTLS, eventually
from tests.leftovers import Leftovers
from tests.mosquitto import Mosquitto, open_mosquitto
from tests.ports import free_port
from tests.proxies import Dante, Squid, Tinyproxy
from tests.websockets import WebSocketNginx


@frozen
class Site:
    """What the programs of a test need; `port` is the port of the proxy, `broker` that of the broker."""

    directory: Path
    chain: Path
    key: Path
    port: int
    broker: int


@frozen
class Way:
    """A kind of proxy between the gateway and mosquitto.

    `start` starts the proxy; `upstream` returns the keys of the upstream.  `proxy_down` and `broker_down` are the
    reasons of sessions that begin while one of the two is down.
    """

    start: Callable[[Site], Program]
    upstream: Callable[[Site], dict[str, Any]]
    proxy_down: EndReason
    broker_down: EndReason
    websocket: bool = False


def through(scheme: str) -> Callable[[Site], dict[str, Any]]:
    """Return a function that returns the keys of an upstream behind a proxy of this kind."""
    return lambda site: {"host": "localhost", "port": site.broker, "proxy": f"{scheme}://localhost:{site.port}"}


WAYS = {
    "squid": Way(
        lambda site: Squid(site.broker, port=site.port),
        through("http"),
        EndReason.PROXY_UNREACHABLE,
        EndReason.TCP_UNREACHABLE,
    ),
    "tinyproxy": Way(
        lambda site: Tinyproxy(site.directory, site.broker, port=site.port),
        through("http"),
        EndReason.PROXY_UNREACHABLE,
        EndReason.TCP_UNREACHABLE,
    ),
    "dante": Way(
        lambda site: Dante(site.directory, port=site.port),
        through("socks5"),
        EndReason.PROXY_UNREACHABLE,
        EndReason.TCP_REFUSED,
    ),
    "nginx": Way(
        lambda site: WebSocketNginx(site.directory, site.broker, site.chain, site.key, port=site.port),
        lambda site: {"host": "localhost", "port": site.port, "transport": "websocket", "path": "/broker"},
        EndReason.TCP_REFUSED,
        EndReason.WEBSOCKET_REFUSED,
        websocket=True,
    ),
}


@pytest.fixture
def site(tmp_path: Path, server_tls: ServerTLS) -> Site:
    """Return what a proxy, and a broker on localhost, need."""
    site = Site(tmp_path, tmp_path / "chain.pem", tmp_path / "key.pem", free_port(), free_port())
    site.chain.write_bytes(server_tls.chain_pem)
    site.key.write_bytes(server_tls.key_pem)
    return site


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_hundred_devices_through_reload_and_outages(
    way: Way, start_gateway: Callable[..., RunningGateway], site: Site
) -> None:
    """A reload ends no session; an outage of the proxy or the broker ends all, for its own reason; all come back."""
    plain = free_port()

    def start_broker() -> Mosquitto:
        certificate = None if way.websocket else (site.chain, site.key)
        return open_mosquitto(site.directory, plain, site.broker, certificate, websocket=way.websocket)

    start: dict[str, Callable[[], Any]] = {"broker": start_broker, "proxy": lambda: way.start(site)}
    running: dict[str, Any] = {}
    with ExitStack() as stack:
        for part in start:
            running[part] = start[part]()
            stack.callback(lambda part=part: running[part].stop())
        gateway = start_gateway(upstream=[way.upstream(site)], failover={"retry_first": 0.1, "retry_max": 0.1})
        leftovers = Leftovers(gateway)
        fleet = Fleet(gateway)
        fleet.connect()
        gateway.change(limits={"max_packet_size": 100_000})
        fleet.publish()
        assert not gateway.ended

        for part, reason in {"proxy": way.proxy_down, "broker": way.broker_down}.items():
            running[part].stop()
            fleet.lose(EndReason.UPSTREAM_LOST)
            # What is ending may still accept a connection, and while the gateway backs off, the reason is the last one.
            eventually(lambda reason=reason: refused(gateway) is reason, lambda: f"so far {gateway.ended[-1]}")
            running[part] = start[part]()
            fleet.connect()
            fleet.publish()
        fleet.disconnect()
        leftovers.check()


def matrices_hold(but: str = "", **environment: str) -> None:
    """Run the certificate matrix and the abuse matrix again, but for tests whose names contain one of `but`."""
    names = "(test_a_broker_is or test_abuse)" + (f" and not ({but})" if but else "")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    command += ["-k", names, "tests/test_verification.py", "tests/test_abuse.py"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, env=inherited | environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_the_certificate_matrix_and_the_abuse_matrix_hold_through_a_proxy(tmp_path: Path) -> None:
    """The same tests, with every gateway of theirs behind a proxy: refused brokers get no byte, whatever is wrong."""
    proxy = Tinyproxy(tmp_path)
    try:
        matrices_hold(TEST_THROUGH_PROXY=proxy.url)
    finally:
        proxy.stop()
    assert proxy.log.count("CONNECT localhost:") > 100


@pytest.mark.slow
def test_the_certificate_matrix_and_the_abuse_matrix_hold_over_websocket(tmp_path: Path) -> None:
    """The same tests over WebSocket: refused brokers get no byte, not even of HTTP."""
    opened = tmp_path / "opened"
    opened.touch()
    # These never reach a broker.
    but = "is_no_connect or connect_that or thousand or all_come_back"
    matrices_hold(but, TEST_OVER_WEBSOCKET=str(opened))
    assert len(opened.read_text().splitlines()) > 50
