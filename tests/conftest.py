"""Fixtures that all tests share: the reactor, gateways, brokers, and the watch over logged errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import HealthCheck, settings
from twisted.internet.process import reapAllProcesses
from twisted.internet.task import LoopingCall
from twisted.logger import LogLevel, globalLogPublisher

from tests.harness import Broker, RunningGateway, ServerTLS, start_reactor

# Machines are noisy, so no example is judged by the clock.
settings.register_profile("gateway", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gateway")


@pytest.fixture(autouse=True)
def logged_errors() -> Iterator[list[dict[str, Any]]]:
    """Fail a test that logged an error or a traceback; one that expects it empties the list."""
    events: list[dict[str, Any]] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("log_level") in {LogLevel.error, LogLevel.critical} or event.get("log_failure") is not None:
            events.append(event)

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)
    assert not [event.get("log_failure") or event.get("log_format") for event in events]


@pytest.fixture(scope="session")
def reactor() -> Any:
    """Return the reactor, running in a thread of its own."""
    # What is loaded by now stays: the collections that tests ask for need not look at it, which makes them quick.
    gc.freeze()
    return start_reactor()


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask for the status far more often than people and programs do."""
    monkeypatch.setattr("gateway.ops.web.site._BURST", 1e6)
    monkeypatch.setattr("gateway.ops.web.site._AT_ONCE", 3600.0)


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """Return the CA that the gateway trusts in most tests."""
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with the CA's certificate."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="session")
def server_tls(ca: trustme.CA) -> ServerTLS:
    """Return a server's TLS for localhost and 127.0.0.1, as it should be."""
    return ServerTLS.from_trustme(ca.issue_cert("localhost", "127.0.0.1"))


@pytest.fixture
def start_broker(server_tls: ServerTLS) -> Iterator[Callable[..., Broker]]:
    """Return a function that starts recording brokers; they are stopped after the test."""
    brokers: list[Broker] = []

    def start(**arguments: Any) -> Broker:
        arguments.setdefault("tls", server_tls)
        brokers.append(Broker(**arguments))
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.stop()


@pytest.fixture
def start_gateway(reactor: Any, ca_file: Path) -> Iterator[Callable[..., RunningGateway]]:
    """Return a function that starts gateways; after the test they must be empty, then they are stopped."""
    gateways: list[RunningGateway] = []

    def start(**arguments: Any) -> RunningGateway:
        arguments.setdefault("ca_file", ca_file)
        gateways.append(RunningGateway(reactor, **arguments))
        return gateways[-1]

    yield start
    for gateway in gateways:
        gateway.stop()


@pytest.fixture
def reaping(reactor: Any) -> Iterator[None]:
    """Have ended programs noticed: the reactor runs in a thread, where it hears of no signals."""
    reaper = LoopingCall(reapAllProcesses)
    reactor.callFromThread(reaper.start, 0.01)
    yield
    reactor.callFromThread(reaper.stop)
