"""What is over is freed at once, and its memory does not wait for Python's garbage collector.

The collector runs seldom, and it never looks again at what a large reload found alive.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import pytest
import trustme

import gateway as package
from gateway import service
from gateway.errors import ConfigError
from tests import mqtt_packets as mqtt
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, ServerTLS, eventually
from tests.ports import free_port

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]

OURS = str(Path(package.__file__).parent)
# How often each thing happens.  The last time may still be referenced by something that is about to end.
TIMES = 4
# Small things that only the collector can free: pyOpenSSL's verify callback references itself, and a frame of Twisted's
# resolver the failure of a look-up.
SMALL = {"OpenSSL.SSL._VerifyHelper", "gateway.net.network._LookUp", "gateway.net.network._Receiver"}
TRIED_AGAIN_AT_ONCE = {"retry_first": 0.001, "retry_max": 0.001}


def left_to_the_collector(gateway: RunningGateway, happen: Callable[[], object]) -> Counter[str]:
    """Let something happen a few times; return what of the gateway's only the collector could free."""
    happen()
    gateway.call(gc.collect)
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(TIMES):
            happen()
        # In the thread of the event loop, between two turns: no frame of it is alive.
        gateway.call(gc.collect)
        found = Counter(name for name in map(ours, gc.garbage) if name)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return found


def ours(thing: object) -> str:
    """Name a thing if it is the gateway's: an object of its classes or of OpenSSL's, or a frame of its code."""
    if isinstance(thing, FrameType):
        code = thing.f_code
        return f"frame of {code.co_qualname}" if code.co_filename.startswith(OURS) else ""
    module = type(thing).__module__
    name = f"{module}.{type(thing).__qualname__}"
    return name if module.partition(".")[0] in ("gateway", "OpenSSL", "ctypes") and name not in SMALL else ""


def come_and_go(gateway: RunningGateway) -> None:
    """A device that connects, publishes and leaves."""
    with Device(gateway.port) as device:
        device.send(mqtt.connect() + mqtt.publish())
        assert device.read(2) == b"\x20\x02"
    gateway.wait_empty()


def refuse(connection: BrokerConnection) -> None:
    connection.read_packet()
    connection.send(mqtt.connack(code=5))
    connection.read_to_end()


def say_nothing(connection: BrokerConnection) -> None:
    connection.read_to_end()


@pytest.mark.parametrize("serve", [None, refuse, BrokerConnection.read_packet], ids=["served", "refused", "closed"])
def test_a_session(
    start_gateway: StartGateway, start_broker: StartBroker, serve: Callable[[BrokerConnection], None] | None
) -> None:
    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    assert not left_to_the_collector(gateway, lambda: come_and_go(gateway))


def test_a_device_that_no_rule_admits(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    gateway = start_gateway(upstream=start_broker().port, devices={"unknown": "refuse"})
    assert not left_to_the_collector(gateway, lambda: come_and_go(gateway))


@pytest.mark.usefixtures("reaping")
def test_a_password_that_cannot_be_had(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    rule = {"match_client_id": "*", "username": "u", "password_command": ["/bin/false"]}
    gateway = start_gateway(upstream=start_broker().port, device=[rule])
    assert not left_to_the_collector(gateway, lambda: come_and_go(gateway))


def test_what_is_no_mqtt(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    gateway = start_gateway(upstream=start_broker().port)

    def happen() -> None:
        with Device(gateway.port) as device:
            device.send(b"GET / HTTP/1.1\r\n\r\n")
            device.read_to_end()
        gateway.wait_empty()

    assert not left_to_the_collector(gateway, happen)


def closed(connection: BrokerConnection) -> None:
    """End without a byte of TLS."""


@pytest.mark.parametrize(
    ("host", "broker"),
    [
        ("localhost", None),
        ("nowhere.invalid", None),
        ("localhost", {"tls": ServerTLS.from_trustme(trustme.CA().issue_cert("localhost"))}),
        ("localhost", {"tls": None, "serve": closed}),
        ("localhost", {"tls": None, "serve": say_nothing}),
    ],
    ids=["unreachable", "no-such-name", "unknown-ca", "closed", "silent"],
)
def test_a_broker_that_fails(
    start_gateway: StartGateway, start_broker: StartBroker, host: str, broker: dict[str, object] | None
) -> None:
    port = free_port() if broker is None else start_broker(**broker).port
    gateway = start_gateway(upstream=port, host=host, timeouts={"tls": 0.1}, failover=TRIED_AGAIN_AT_ONCE)
    assert not left_to_the_collector(gateway, lambda: come_and_go(gateway))


@pytest.mark.parametrize("reloads", [False, True])
def test_a_session_that_ends_or_is_judged_again_while_its_broker_is_dialled(
    start_gateway: StartGateway, start_broker: StartBroker, reloads: bool
) -> None:
    broker = start_broker(tls=None, serve=say_nothing)
    gateway = start_gateway(upstream=broker.port, timeouts={"tls": 0.3}, failover=TRIED_AGAIN_AT_ONCE)
    sizes = iter(range(1000, 2000))

    def happen() -> None:
        dialled = broker.accepted
        with Device(gateway.port) as device:
            device.send(mqtt.connect())
            eventually(lambda: broker.accepted > dialled, "the broker is dialled")
            if reloads:
                gateway.change(limits={"max_packet_size": next(sizes)})
                eventually(lambda: broker.accepted > dialled + 1, "the broker is dialled again")
        gateway.wait_empty()

    assert not left_to_the_collector(gateway, happen)


def test_a_reload(
    start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path, tmp_path: Path, logged_errors: list[Any]
) -> None:
    """Of everything; and one that is refused."""
    own = tmp_path / "ca.pem"
    own.write_bytes(ca_file.read_bytes())
    gateway = start_gateway(upstream=start_broker().port, ca_file=own)
    numbers = iter(range(1000, 2000))
    refused = attrs.evolve(gateway.config, tls=attrs.evolve(gateway.config.tls, ca_file=(Path("/nowhere"),)))
    gateway.service.reread = lambda: refused

    def happen() -> None:
        number = next(numbers)
        with Device(gateway.port) as device:
            device.send(mqtt.connect())
            assert device.read(2) == b"\x20\x02"
            os.utime(own, (number, number))
            gateway.change(limits={"max_packet_size": number}, tls={"ca_file": str(own)})
        assert gateway.call(gateway.service.reload)
        gateway.wait_empty()

    assert not left_to_the_collector(gateway, happen)
    assert {event["event"] for event in logged_errors} == {"reload-refused"}
    logged_errors.clear()


def test_what_a_large_reload_finds_is_freed_before_it_is_left_alone(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_MOST_LOOKED_AT", 0)
    gateway = start_gateway(upstream=start_broker().port)
    gc.disable()
    try:
        itself = ConfigError([])
        itself.__cause__ = itself
        garbage = weakref.ref(itself)
        del itself
        assert garbage() is not None
        gc.unfreeze()
        gateway.change(limits={"max_packet_size": 1000})
        assert gc.get_freeze_count() > 0
        assert garbage() is None
    finally:
        gc.unfreeze()
        gc.enable()


def test_the_collector_looks_at_few_objects_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stay: thousands of sessions may begin in a moment."""
    looked_at: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            young = range(min(info["generation"], 1) + 1)
            looked_at.append(sum(len(gc.get_objects(generation=each)) for each in young))

    before = gc.get_threshold()
    monkeypatch.setattr(gc, "freeze", lambda: None)
    gc.collect()
    try:
        service.spare_the_collector()
        gc.callbacks.append(note)
        kept = [[number] for number in range(100_000)]
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    assert len(looked_at) >= 10
    assert max(looked_at) < 5_000
    assert len(kept) == 100_000
