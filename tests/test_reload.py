"""A gateway that changes to another configuration while it runs: what stays, what is new, what is refused."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import re
import signal
import socket
import stat
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import Mock

import attrs
import pytest
import trustme
from twisted.internet.defer import gatherResults
from twisted.logger import formatEvent, globalLogPublisher

from gateway import gateway as gateway_module
from gateway.cli.main import console
from gateway.config import Config, changed_keys, from_mapping
from gateway.dial.dialler import Dialler
from gateway.errors import ConfigError, EndReason
from gateway.gateway import Generation
from gateway.ops.notify import Notifier
from gateway.ops.reload_port import ReloadPort
from gateway.ops.status_words import verdict
from gateway.pieces import at_once
from gateway.service import GatewayService
from gateway.session.session import State
from gateway.tls.trust import TLSPolicy
from tests import mqtt_packets as mqtt
from tests.harness import (
    PATIENCE,
    Broker,
    BrokerConnection,
    Device,
    RunningGateway,
    ServerTLS,
    eventually,
    open_descriptors,
)
from tests.mosquitto import Mosquitto
from tests.pki import CLIENT, Certified, certify, certify_ca
from tests.ports import free_port
from tests.processes import GatewayProcess
from tests.tools import require_tool
from tests.turn_clock import TurnClock

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]


def established(port: int, **connect: object) -> Device:
    """A device that has its CONNACK."""
    device = Device(port)
    device.send(mqtt.connect(**connect))
    assert device.read(4) == mqtt.connack()
    return device


def can_connect(port: int) -> bool:
    try:
        Device(port).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


def test_sessions_stand_and_new_ones_begin_under_the_new_configuration(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """The upstream, the limits and the timeouts are those of the moment at which a session began."""
    before, after = start_broker(), start_broker()
    gateway = start_gateway(upstream=before.port)
    old = established(gateway.port)
    gateway.change(upstream=[{"host": "localhost", "port": after.port}], limits={"max_packet_size": 256})
    new = established(gateway.port)
    large = mqtt.publish(payload=bytes(1000))
    old.send(large)
    new.send(large)
    assert new.read_to_end() == b""
    assert gateway.wait_ended().reason is EndReason.PACKET_TOO_LARGE
    eventually(lambda: before.received == mqtt.connect() + large, "the old session goes on to its broker")
    assert len(after.connections) == 1
    for device in (old, new):
        device.close()
    gateway.wait_empty()


def test_admission_changes_and_counts_on(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """Sessions that stand count under the new limit too, whatever it is."""
    gateway = start_gateway(upstream=start_broker().port)
    devices = [established(gateway.port) for _ in range(2)]
    gateway.change(admission={"max_sessions_per_address": 2})
    with Device(gateway.port) as third:
        assert third.read_to_end() == b""
    assert gateway.journal.turned_away[0][0] is EndReason.TOO_MANY_FROM_ADDRESS
    gateway.change(admission={"max_sessions": 3})
    devices.append(established(gateway.port))
    with Device(gateway.port) as fourth:
        assert fourth.read_to_end() == b""
    assert gateway.journal.turned_away[1][0] is EndReason.TOO_MANY_SESSIONS
    for device in devices:
        device.close()
    gateway.wait_empty()


def test_a_listener_that_cannot_be_opened_refuses_the_whole_change(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """What was opened beside it is closed again, what is open stays, and sessions begin as before."""
    gateway = start_gateway(upstream=start_broker().port)
    free = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoints = [f"127.0.0.1:{free}", f"127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(ConfigError) as caught:
            gateway.change(listen=[{"endpoint": endpoint} for endpoint in endpoints], limits={"max_packet_size": 256})
    (problem,) = caught.value.problems
    assert problem.startswith("listen[1].endpoint: cannot listen on")
    eventually(lambda: not can_connect(free), "the listener beside it is closed")
    device = established(gateway.port)
    device.send(mqtt.publish(payload=bytes(1000)) + mqtt.disconnect())
    assert device.read_to_end() == b""
    device.close()
    assert gateway.wait_ended().reason is EndReason.DEVICE_DISCONNECT


def test_a_file_that_cannot_be_used_refuses_the_whole_change(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """No listener is opened or closed for a configuration that will not be."""
    gateway = start_gateway(upstream=start_broker().port)
    free = free_port()
    with pytest.raises(ConfigError, match=r"tls\.ca_file"):
        gateway.change(listen=[{"endpoint": f"127.0.0.1:{free}"}], tls={"ca_file": str(tmp_path / "none.pem")})
    assert not can_connect(free)
    established(gateway.port).close()
    gateway.wait_ended()


def test_listeners_come_and_go_and_take_new_names(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """A listener that stays is the same port, whatever its place and its name; one that is gone is closed."""
    gateway = start_gateway(upstream=start_broker().port)
    stays = gateway.service.ports[0]
    added = free_port()
    gateway.change(listen=[{"endpoint": f"127.0.0.1:{added}"}, {"endpoint": "127.0.0.1:0", "name": "old hall"}])
    assert gateway.service.ports[1] is stays
    assert gateway.service.ports[0].getHost().port == added
    devices = [established(gateway.port), established(added)]
    eventually(lambda: len(gateway.journal.started) == 2, "both have started")
    assert {record.listener for record in gateway.journal.started} == {"old hall", ""}
    gateway.change(listen=[{"endpoint": "127.0.0.1:0"}])
    assert gateway.service.ports == [stays]
    eventually(lambda: not can_connect(added), "the listener that is gone is closed")
    devices.append(established(gateway.port))
    for device in devices:
        device.close()
    gateway.wait_ended(3)
    gateway.wait_empty()


def test_a_listener_is_not_moved(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """The same port with another backlog cannot be opened beside itself: the words say what to do."""
    gateway = start_gateway(upstream=start_broker().port, listen=[{"endpoint": f"127.0.0.1:{free_port()}"}])
    with pytest.raises(ConfigError, match=r"listen\[0\]\.endpoint: .*restart the gateway"):
        gateway.change(listen=[{"endpoint": f"tcp:{gateway.port}:interface=127.0.0.1:backlog=7"}])
    established(gateway.port).close()
    gateway.wait_ended()


def test_no_attempt_to_connect_is_refused_while_listeners_come_and_go(
    start_gateway: StartGateway, start_broker: StartBroker
) -> None:
    """To the one that stays, at any moment, and to each other one while it stands in the configuration."""
    gateway = start_gateway(upstream=start_broker().port, pacing={"new_sessions_per_second": 0})
    stays, comes = gateway.port, free_port()
    served: Counter[int] = Counter()
    failures: list[BaseException] = []
    stop = threading.Event()

    def knock() -> None:
        try:
            while not stop.is_set():
                established(stays).close()
                served[stays] += 1
        except (AssertionError, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    for number in range(40):
        gateway.change(listen=[{"endpoint": f"127.0.0.1:{comes}"}, {"endpoint": "127.0.0.1:0", "name": str(number)}])
        established(comes).close()
        gateway.change(listen=[{"endpoint": "127.0.0.1:0"}])
        eventually(lambda: not can_connect(comes), "the other one is closed")
        if number == 20:
            eventually(lambda: served[stays] > 20, "knocks in between")
    stop.set()
    thread.join(20)
    assert failures == []
    assert served[stays] > 20
    gateway.wait_empty()


def test_what_differs_is_named_by_its_key() -> None:
    """Not by its value, which may be nobody's business."""
    base = {"upstream": [{"host": "a"}, {"host": "b"}]}

    def changed(**sections: Any) -> list[str]:
        return changed_keys(from_mapping(base), from_mapping({**base, **sections}))

    assert changed() == []
    assert changed(limits={"max_packet_size": 256}, drain={"wills": "discard"}) == [
        "limits.max_packet_size",
        "drain.wills",
    ]
    assert changed(upstream=[{"host": "a"}, {"host": "b", "port": 1}]) == ["upstream[1].port"]
    assert changed(upstream=[{"host": "a"}]) == ["upstream"]
    base["upstream"][0] |= {"name": "cloud"}
    assert changed(upstream=[{"host": "a", "name": "cloud", "port": 1}, {"host": "b"}]) == ['upstream "cloud".port']
    assert changed(admission={"allow": ["10.0.0.0/8"]}) == ["admission.allow"]


def test_devices_that_come_and_go_are_named() -> None:
    """And whether one was disabled or enabled: that is what a person did."""

    def ruled(*names: str, off: str = "") -> Config:
        rules = [{"match_client_id": name, "name": name, "enabled": name != off} for name in names]
        return from_mapping({"upstream": [{"host": "a"}], "device": rules})

    before = ruled("pump-1", "pump-2", "pump-3")
    assert changed_keys(before, ruled("pump-1", "pump-2", "pump-4")) == [
        'device "pump-3" removed',
        'device "pump-4" added',
    ]
    off = ruled("pump-1", "pump-2", "pump-3", off="pump-2")
    assert changed_keys(before, off) == ['device "pump-2" disabled']
    assert changed_keys(off, before) == ['device "pump-2" enabled']
    assert changed_keys(off, ruled("pump-1", "pump-2")) == ['device "pump-3" removed', 'device "pump-2" enabled']
    assert changed_keys(before, ruled("pump-2", "pump-1", "pump-3")) == ["device"]
    many = changed_keys(before, ruled(*(f"new-{number}" for number in range(40))))
    assert len(many) == 14
    assert many[-1] == "device: 30 more added"
    first = changed_keys(ruled(), ruled("pump-1"))
    assert first == ['device "pump-1" added']


RULE: dict[str, Any] = {
    "password_file": "/p",
    "client_cert": "/c",
    "client_key": "/k",
    "client_key_password_file": "/w",
    "clean_start": False,
    "publish": ["a/#"],
    "subscribe": ["a/#"],
    "max_packet_size": 1000,
}


@pytest.mark.parametrize("key", RULE)
def test_a_key_that_comes_or_goes_is_a_difference(key: str) -> None:
    """Whatever the type of its value, a key that is missing is another value."""

    def ruled(keys: dict[str, Any]) -> Config:
        return from_mapping({"upstream": [{"host": "a"}], "device": [{"match_client_id": "d", **keys}]})

    needed = {"client_cert": "/c"} if key.startswith("client_key") else {}
    less, more = ruled(needed), ruled({**needed, key: RULE[key]})
    assert changed_keys(less, more) == changed_keys(more, less) == [f"device[0].{key}"]


# ---- files that change


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What is logged about reloads."""
    lines: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("event") in {"reloaded", "reload-refused"}:
            lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


@pytest.fixture(scope="module")
def root() -> Certified:
    """The CA of brokers and gateways here."""
    return certify_ca()


@pytest.fixture
def strict_mosquitto(root: Certified, tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker that demands client certificates, and calls its clients what is in them."""
    chain, key, ca = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "clients.pem"
    server = certify(root)
    chain.write_bytes(server.pem)
    key.write_bytes(server.key_pem)
    ca.write_bytes(root.pem)
    require_tool("mosquitto")
    port = free_port()
    broker = Mosquitto(
        tmp_path,
        f"listener {port} 127.0.0.1\ncertfile {chain}\nkeyfile {key}\ncafile {ca}\n"
        "require_certificate true\nuse_identity_as_username true\n",
        port,
    )
    yield broker
    broker.stop()


def test_a_renewed_client_certificate_is_shown_by_the_next_session(
    start_gateway: StartGateway,
    strict_mosquitto: Mosquitto,
    root: Certified,
    tmp_path: Path,
    told: list[str],
    logged_errors: list[Any],
) -> None:
    """With no signal.  A certificate whose key has not come yet is refused; the old pair serves until it has."""
    names = itertools.count()

    def user() -> str:
        """Open a session, and return what its broker calls the gateway."""
        name = f"renewed-{next(names)}"
        device = established(gateway.port, client_identifier=name)
        device.close()
        log = strict_mosquitto.log
        found = eventually(lambda: re.search(rf" as {name} \(.*u'(\w+)'\)", log.read_text()), "the broker's record")
        return found[1]

    certificate, key = tmp_path / "own.pem", tmp_path / "own-key.pem"
    first, second = (certify(root, subject=subject, purposes=[CLIENT]) for subject in ("first", "second"))
    certificate.write_bytes(first.pem)
    key.write_bytes(first.key_pem)
    gateway = start_gateway(
        upstream=strict_mosquitto.ports[0],
        ca_file=tmp_path / "clients.pem",
        tls={"client_cert": str(certificate), "client_key": str(key)},
    )
    standing = established(gateway.port)
    assert user() == "first"

    certificate.write_bytes(second.pem)
    eventually(lambda: told, "the half of it is seen")
    (refused,) = told
    assert refused.startswith(
        "reload refused, previous configuration still active: "
        f"tls.client_key: {key} is not the key of the first certificate in {certificate}; "
    )
    assert gateway.service.status.startswith("reload refused")
    assert ": tls.client_key: " in gateway.service.status
    logged_errors.clear()
    assert user() == "first"

    new = key.with_suffix(".new")
    new.write_bytes(second.key_pem)
    new.replace(key)
    eventually(lambda: len(told) == 2, "the other half is seen")
    assert told[1] == f"reloaded: {certificate}, {key}"
    assert gateway.service.status.startswith("1 session; ")
    assert user() == "second"
    standing.send(mqtt.packet(0xC0))
    assert standing.read(2) == b"\xd0\x00"
    standing.close()
    gateway.wait_empty()


def test_a_renewed_ca_is_what_the_next_session_trusts(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, told: list[str]
) -> None:
    """With no signal, and nothing that was verified under the old one counts any more; who stands goes on."""
    old, new = trustme.CA(), trustme.CA()
    brokers = [start_broker(tls=ServerTLS.from_trustme(ca.issue_cert("localhost"))) for ca in (old, new)]
    ca_file = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(ca_file))
    gateway = start_gateway(
        upstream=[{"host": "localhost", "port": broker.port} for broker in brokers], ca_file=ca_file
    )
    standing = [established(gateway.port) for _ in range(3)]
    assert (brokers[0].accepted, len(brokers[0].connections)) == (3, 3)
    new.cert_pem.write_to_path(str(ca_file))
    eventually(lambda: told, "the change is seen")
    assert told == [f"reloaded: {ca_file}"]
    standing.append(established(gateway.port))
    eventually(lambda: len(gateway.journal.started) == 4, "its record")
    assert gateway.journal.started[-1].upstream == f"localhost:{brokers[1].port}"
    assert len(brokers[0].connections) == 3, "the first broker is not trusted any more"
    for device in standing:
        device.send(mqtt.publish(payload=b"still here"))
    eventually(lambda: brokers[0].received.count(b"still here") == 3, "those who stood go on")
    for device in standing:
        device.close()
    gateway.wait_empty()


def test_a_bad_file_leaves_the_old_one_in_force(
    start_gateway: StartGateway, start_broker: StartBroker, ca: trustme.CA, tmp_path: Path, logged_errors: list[Any]
) -> None:
    """Half a file is refused with its name, by itself and when told to; what is right again is taken again."""
    ca_file = tmp_path / "ca.pem"
    whole = ca.cert_pem.bytes()
    ca_file.write_bytes(whole)
    gateway = start_gateway(upstream=start_broker().port, ca_file=ca_file)
    generation = gateway.service.gateway.generation
    ca_file.write_bytes(whole[: len(whole) // 2])
    eventually(lambda: "tls.ca_file" in gateway.service.status, "the bad file is seen")
    gateway.call(gateway.service.reload)
    assert gateway.service.status.startswith("reload refused")
    assert f": tls.ca_file: {ca_file} " in gateway.service.status
    assert len(logged_errors) == 2
    logged_errors.clear()
    assert gateway.service.gateway.generation is generation
    established(gateway.port).close()
    ca_file.write_bytes(whole)
    eventually(lambda: "refused" not in gateway.service.status, "the good file is seen")
    established(gateway.port).close()
    gateway.wait_ended(2)


def test_without_descriptors_no_rule_is_taken_for_broken(
    start_gateway: StartGateway, tmp_path: Path, logged_errors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole reload is refused, and a changed file is read again until that works."""
    key = tmp_path / "key"
    key.write_text("a2V5")
    rule = {"name": "pump", "match_client_id": "p", "sas_key_file": str(key), "sas_resource": "r"}
    gateway = start_gateway(upstream=1, device=[rule])
    generation = gateway.service.gateway.generation
    real = os.open

    def open_(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path == key:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", open_)
    key.write_text("bmV3")
    words = f": {key} cannot be read: Too many open files; raise the unit's LimitNOFILE"
    eventually(lambda: words in gateway.service.status, "the changed file is not read")
    gateway.call(gateway.service.reload)
    assert gateway.service.gateway.generation is generation
    monkeypatch.setattr(os, "open", real)
    eventually(lambda: gateway.service.gateway.generation is not generation, "the changed file is read")
    assert not gateway.service.gateway.generation.prepared.refused
    assert {event["event"] for event in logged_errors} == {"reload-refused"}
    logged_errors.clear()


def test_a_refused_configuration_stays_refused_when_a_file_is_renewed(
    start_gateway: StartGateway, ca: trustme.CA, tmp_path: Path, logged_errors: list[Any]
) -> None:
    """Only reading it again can tell that it is right; a file that was refused is told beside it."""
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    gateway = start_gateway(upstream=1, ca_file=ca_file)

    def read() -> Any:
        return from_mapping({"upstream": []})

    good, gateway.service.reread = gateway.service.reread, read
    gateway.call(gateway.service.reload)
    (refused,) = [part for part in gateway.service.status.split("; ") if "refused" in part]
    assert ": upstream: " in refused
    ca_file.write_text("no certificate")
    eventually(lambda: "tls.ca_file" in gateway.service.status, "the bad file is seen")
    assert refused in gateway.service.status
    ca.cert_pem.write_to_path(str(ca_file))
    eventually(lambda: "tls.ca_file" not in gateway.service.status, "the good file is seen")
    assert refused in gateway.service.status
    gateway.service.reread = good
    gateway.call(gateway.service.reload)
    assert "refused" not in gateway.service.status
    logged_errors.clear()


def test_a_mistake_in_a_reload_is_a_refusal(
    start_gateway: StartGateway, start_broker: StartBroker, logged_errors: list[Any]
) -> None:
    """Whatever is raised, the gateway goes on, and does not seem to reload for ever."""
    gateway = start_gateway(upstream=start_broker().port)

    def read() -> Any:
        raise ZeroDivisionError

    gateway.service.reread = read
    gateway.call(gateway.service.reload)
    assert "internal error" in gateway.service.status
    assert logged_errors[0]["log_failure"].check(ZeroDivisionError)
    logged_errors.clear()
    established(gateway.port).close()
    gateway.wait_ended()


# ---- often


def test_an_old_configuration_goes_with_its_last_session(
    start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path, tmp_path: Path
) -> None:
    """At once, without the collector, which comes once in thousands of sessions: each holds up to a megabyte of roots.

    However the sessions ended: by either side, refused, given up on the way, or for want of a broker.
    """

    def serve(connection: BrokerConnection) -> None:
        packet = connection.read_packet()
        if b"silent" in packet:
            connection.read_to_end()
        connection.send(mqtt.connack(code=5 if b"refused" in packet else 0))
        if b"dropped" not in packet:
            connection.read_to_end()

    broker = start_broker(serve=serve)
    wrong = start_broker(tls=ServerTLS.from_trustme(trustme.CA().issue_cert("localhost")))
    upstream = [{"host": "localhost", "port": port} for port in (wrong.port, broker.port)]
    (tmp_path / "ca.pem").write_bytes(ca_file.read_bytes())
    gateway = start_gateway(
        upstream=upstream, ca_file=tmp_path / "ca.pem", limits={"max_packet_size": 1000}, timeouts={"connack": 1}
    )
    first = gateway.service.gateway.generation
    old = [weakref.ref(each) for each in (first, first.prepared.policy, first.prepared.policy.context)]
    del first
    gc.collect()
    gc.disable()
    try:
        with established(gateway.port) as orderly:
            orderly.send(mqtt.disconnect())
            assert orderly.read_to_end() == b""
        established(gateway.port).reset()
        with established(gateway.port) as excessive:
            excessive.send(mqtt.publish(payload=bytes(2000)))
            assert excessive.read_to_end() == b""
        for name, told in (("refused", mqtt.connack(code=5)), ("dropped", mqtt.connack())):
            with Device(gateway.port) as device:
                device.send(mqtt.connect(name))
                assert device.read_to_end() == told
        with Device(gateway.port) as silent:
            silent.send(mqtt.connect("silent"))
            eventually(lambda: b"silent" in broker.received, "CONNECT is at the broker")
        gateway.wait_ended(6)
        broker.stop()
        with Device(gateway.port) as late:
            late.send(mqtt.connect("late"))
            assert late.read_to_end() == mqtt.connack(code=3)
        gateway.wait_ended(7)
        gateway.wait_empty()
        assert None not in [each() for each in old]
        os.utime(tmp_path / "ca.pem", (0, 0))
        gateway.change(limits={"max_packet_size": 1001})
        if sys.version_info >= (3, 12):
            # Twisted throws a failure into a coroutine from a frame that holds it.  There, the frames of a coroutine
            # that ends in that keep the ones that called them, so those of a dial that failed wait for the collector.
            gc.collect()
        eventually(lambda: not [each() for each in old if each() is not None], "the old configuration is gone")
    finally:
        gc.enable()


def test_two_hundred_reloads_leave_nothing(
    start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path, tmp_path: Path
) -> None:
    """Of all that was made for them only what stands is left: the first, which sessions began under, and the last."""
    (tmp_path / "ca.pem").write_bytes(ca_file.read_bytes())
    gateway = start_gateway(upstream=start_broker().port, ca_file=tmp_path / "ca.pem")
    standing = [established(gateway.port) for _ in range(5)]
    eventually(lambda: len(gateway.journal.started) == 5, "five sessions stand")
    counted = (Generation, Dialler, TLSPolicy)

    def count() -> Counter[str]:
        gc.collect()
        found = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in counted)
        found["descriptors"] = open_descriptors()
        found["delayed calls"] = len(gateway.call(gateway.reactor.getDelayedCalls))
        return found

    before, threads = count(), threading.active_count()
    for number in range(200):
        # Another file each time, so that everything is made anew.
        os.utime(tmp_path / "ca.pem", (number, number))
        gateway.change(limits={"max_packet_size": 1000 + number})
        if number % 20 == 0:
            established(gateway.port).close()
    gateway.wait_ended(10)
    eventually(lambda: len(gateway.service.gateway.sessions) == 5, "only those who stand are left")
    expected = before + Counter({kind.__name__: 1 for kind in counted})
    eventually(lambda: count() == expected, lambda: f"no more than {expected}, but {count()}")
    # Reloads are prepared in the reactor's pool, which makes its threads as they are needed.
    assert threading.active_count() <= threads + gateway.call(lambda: gateway.reactor.getThreadPool().max)
    assert {record.reason for record in gateway.ended} == {EndReason.DEVICE_LOST}
    for device in standing:
        device.close()
    gateway.wait_empty()


@pytest.mark.slow
def test_two_hundred_reloads_under_load_lose_no_session(
    tmp_path: Path, strict_mosquitto: Mosquitto, root: Certified
) -> None:
    """A real process, told by signals; its descriptors, threads and memory after them are those of before."""
    own, ca, config = tmp_path / "own.pem", tmp_path / "ca.pem", tmp_path / "gateway.toml"
    certify(root, subject="own", purposes=[CLIENT]).write(own)
    others = [certify_ca(subject=f"Other {number}").pem for number in range(50)]

    def write(number: int) -> None:
        # More or fewer roots, other limits and another listener each time.
        ca.write_bytes(root.pem + b"".join(others[: 25 + number % 2 * 25]))
        more = f'[[listen]]\nendpoint = "unix:{tmp_path}/{number % 2}.sock"\n'
        config.write_text(
            f'[[listen]]\nendpoint = "127.0.0.1:0"\n{more}[[upstream]]\nhost = "127.0.0.1"\n'
            f'server_name = "localhost"\nport = {strict_mosquitto.ports[0]}\n'
            f'[tls]\nca_file = "{ca}"\nclient_cert = "{own}"\n'
            f"[limits]\nmax_packet_size = {1000 + number}\n[drain]\nseconds = 0\n[devices]\nconnects_per_minute = 0\n"
        )

    write(0)
    with GatewayProcess(tmp_path, "--config", str(config)) as gateway:
        port, proc = gateway.ports[0], Path(f"/proc/{gateway.process.pid}")
        devices = [established(port, client_identifier=f"standing-{number}") for number in range(20)]
        load = Load(port, devices)

        def count(kind: str) -> int:
            return len(list((proc / kind).iterdir()))

        before = count("fd")

        def after_reloads(first: int, last: int) -> int:
            """Reload so often under load; return the resident bytes when all else is as before."""
            load.start()
            for number in range(first, last):
                turns = load.turns
                write(number)
                gateway.signal(signal.SIGHUP)
                load.until(lambda: gateway.text.count("limits.max_packet_size") >= number, "the reload")  # noqa: B023
                load.until(lambda: load.turns > turns, "the load goes on")  # noqa: B023
            load.stop()
            eventually(lambda: gateway.text.count("ended: device-disconnect") == load.turns, "who came has gone")
            eventually(lambda: count("fd") == before, f"descriptors: {before}")
            # The reactor's own, one for a reload, one for a look, one for what a reload leaves behind.
            assert count("task") <= 4
            return int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        growth = -after_reloads(1, 101) + after_reloads(101, 201)
        # Each reload that leaked its roots would add some 100 kB; the allocator and the log take less than one MB.
        assert growth < 4_000_000
        ends = set(re.findall(r" ended: ([a-z-]+)", gateway.text))
        assert ends <= {"device-disconnect", "configuration-changed"}
        for device in devices:
            device.send(mqtt.packet(0xC0))
            assert device.read(2) == b"\xd0\x00"
            device.close()


class Load:
    """Devices that publish in turns, each waiting for its PUBACK, and one that comes and goes in each turn.

    That one may come while a reload takes effect, and its broker has not accepted it yet: then it is refused, and comes
    again.
    """

    def __init__(self, port: int, devices: list[Device]) -> None:
        self.turns = 0
        self._port = port
        self._devices = devices
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        assert self._failure is None

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something, unless the load has failed meanwhile."""
        eventually(lambda: condition() or self._failure, what)
        assert self._failure is None

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                for device in self._devices:
                    device.send(mqtt.publish(qos=1, payload=bytes(500)))
                for device in self._devices:
                    assert device.read(4)[:2] == b"\x40\x02"
                self._come_and_go()
                self.turns += 1
        except (AssertionError, OSError) as error:
            self._failure = error

    def _come_and_go(self) -> None:
        while True:
            with Device(self._port) as short:
                short.send(mqtt.connect("short"))
                answer = short.read(4)
                if answer == mqtt.connack():
                    short.send(mqtt.disconnect())
                    assert short.read_to_end() == b""
                    return
                assert answer == mqtt.connack(code=3)


# ---- what the broker has not accepted is judged by the new configuration


def refused_by_the_new_ca(device: Device) -> bool:
    """Whether a device is told that no broker is available."""
    return device.read_to_end() == mqtt.connack(code=3)


def test_a_connection_from_before_is_judged_by_the_new_configuration(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, ca_file: Path
) -> None:
    """Its CONNECT comes after the CA was replaced, or its network is not allowed any more."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file)
    other = certify_ca().write(tmp_path / "other.pem")
    with Device(gateway.port) as device, Device(gateway.port) as stranger:
        eventually(lambda: len(gateway.service.gateway.sessions) == 2, "both are accepted")
        gateway.change(tls={"ca_file": str(other)})
        device.send(mqtt.connect("a"))
        assert refused_by_the_new_ca(device)
        assert gateway.wait_ended().reason is EndReason.TLS_UNTRUSTED_CHAIN
        gateway.change(tls={"ca_file": str(ca_file)}, admission={"allow": ["10.0.0.0/8"]})
        stranger.send(mqtt.connect("b"))
        assert stranger.read_to_end() == mqtt.connack(code=5)
        assert gateway.wait_ended(2).reason is EndReason.NETWORK_NOT_ALLOWED
    assert broker.received == b""


def test_a_session_that_waits_for_its_turn_is_judged_by_the_new_configuration(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, ca_file: Path
) -> None:
    """It neither goes to a broker of the removed CA nor resumes a session with it."""
    broker = start_broker()
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file, pacing={"new_sessions_per_second": 1})
    other = certify_ca().write(tmp_path / "other.pem")
    with established(gateway.port), Device(gateway.port) as device:
        device.send(mqtt.connect("waits"))
        pacer = gateway.service.gateway.generation.dialler.pacer
        eventually(lambda: pacer.waiting == 1, "it waits")
        gateway.change(tls={"ca_file": str(other)})
        assert refused_by_the_new_ca(device)
        assert gateway.wait_ended().reason is EndReason.TLS_UNTRUSTED_CHAIN
    assert b"waits" not in broker.received


def test_a_handshake_from_before_is_worth_nothing(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, ca_file: Path
) -> None:
    """The broker is verified under the CA that has just been removed: not a byte of CONNECT is sent."""
    broker, proceed = start_broker(), threading.Event()
    front = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def serve() -> None:
        near, _ = front.accept()
        far = socket.create_connection(("127.0.0.1", broker.port))
        proceed.wait(20)
        with near, far:
            threading.Thread(target=relay, args=(far, near), daemon=True).start()
            relay(near, far)

    threading.Thread(target=serve, daemon=True).start()
    gateway = start_gateway(upstream=front.getsockname()[1], ca_file=ca_file)
    other = certify_ca().write(tmp_path / "other.pem")
    with front, Device(gateway.port) as device:
        device.send(mqtt.connect("shakes-hands"))
        states = lambda: [each.state for each in gateway.service.gateway.sessions]  # noqa: E731
        eventually(lambda: states() == [State.DIALLING], "it is dialled")
        gateway.change(tls={"ca_file": str(other)}, upstream=[{"host": "localhost", "port": broker.port}])
        proceed.set()
        assert refused_by_the_new_ca(device)
        assert gateway.wait_ended().reason is EndReason.TLS_UNTRUSTED_CHAIN
    assert broker.received == b""


def test_a_session_without_connack_is_ended_and_others_go_on(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path, ca_file: Path
) -> None:
    """Its CONNECT is at a broker that is not trusted any more.  Another reload leaves it alone."""
    answer = threading.Event()

    def serve(connection: BrokerConnection) -> None:
        if b"slow" in connection.read_packet():
            answer.wait(20)
        connection.send(mqtt.connack())
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file)
    other = certify_ca().write(tmp_path / "other.pem")
    with established(gateway.port) as standing, Device(gateway.port) as device:
        device.send(mqtt.connect("slow"))
        eventually(lambda: b"slow" in broker.received, "CONNECT is at the broker")
        gateway.change(drain={"seconds": 1})
        assert not gateway.ended
        gateway.change(tls={"ca_file": str(other)})
        assert refused_by_the_new_ca(device)
        assert gateway.wait_ended().reason is EndReason.CONFIGURATION_CHANGED
        answer.set()
        standing.send(mqtt.publish())
        eventually(lambda: mqtt.publish() in broker.received, "the established session goes on")


def test_a_session_that_is_judged_again_goes_by_the_new_rule(
    start_gateway: StartGateway, start_broker: StartBroker, ca_file: Path
) -> None:
    """It had a name and a rule under the old one, and has neither under the new one; it is counted once."""
    broker = start_broker()
    rule = {"name": "old", "match_client_id": "d", "client_id": "renamed"}
    gateway = start_gateway(upstream=broker.port, ca_file=ca_file, pacing={"new_sessions_per_second": 1}, device=[rule])
    with established(gateway.port), Device(gateway.port) as device:
        device.send(mqtt.connect("d"))
        eventually(lambda: gateway.service.gateway.generation.dialler.pacer.waiting == 1, "it waits")
        gateway.change(device=[{"name": "new", "match_client_id": "other"}])
        assert device.read(4) == mqtt.connack()
        eventually(lambda: len(gateway.journal.started) == 2, "it is established")
        assert gateway.journal.started[1].rule == ""
    assert b"renamed" not in broker.received
    gateway.wait_empty()


# ---- the answer to a request


def test_a_request_is_answered_with_what_came_of_it(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    logged_errors: list[Any],
) -> None:
    """`systemctl reload` fails if the gateway refuses, and the refusal is seen wherever one may look."""
    gateway = start_gateway(upstream=start_broker().port)
    path = tmp_path / "reload.sock"
    port = ReloadPort(gateway.reactor, path, gateway.service.reload, gateway.service.sight.sources.refused_rules)
    assert console(["reload", "--socket", str(path)]) == 1
    assert "cannot reach the gateway" in capfd.readouterr().err
    gateway.call(port.open)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert console(["reload", "--socket", str(path)]) == 0
        assert capfd.readouterr().err == ""
        good = gateway.service.reread
        gateway.service.reread = lambda: from_mapping({"upstream": []})
        assert console(["reload", "--socket", str(path)]) == 1
        assert "upstream: missing" in capfd.readouterr().err
        gateway.service.reread = lambda: from_mapping({"upstream": [{"host": 'a\\"b'}]})
        assert console(["reload", "--socket", str(path)]) == 1
        assert r'"a\\\"b" is not a DNS name' in capfd.readouterr().err, "what was quoted is not escaped again"
        logged_errors.clear()
        document = gateway.call(lambda: at_once(gateway.service.sight.document()))
        assert document["reloads"]["refused"] == 2
        assert any(r'"a\\\"b"' in words for words in document["reloads"]["wanting"])
        assert any("Reload refused" in reason for reason in verdict(document).reasons)
        gateway.service.reread = good
        assert console(["reload", "--socket", str(path)]) == 0
        document = gateway.call(lambda: at_once(gateway.service.sight.document()))
        assert not any("Reload refused" in reason for reason in verdict(document).reasons)
    finally:
        gateway.call(port.close)


@pytest.mark.parametrize("count", [1, 12])
def test_a_reload_warns_of_rules_that_cannot_be_used(
    start_gateway: StartGateway,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    logged_errors: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """Rule, cause and remedy, ten of them; it succeeds, since the others are served.  The journal has the log's."""
    gateway = start_gateway(upstream=1)
    rules = [
        {"name": f"pump-{number}", "match_client_id": f"p{number}", "client_cert": str(tmp_path / "none.pem")}
        for number in range(count)
    ]
    config = from_mapping({"listen": [{"endpoint": "127.0.0.1:0"}], "upstream": [{"host": "b"}], "device": rules})
    gateway.service.reread = lambda: config
    path = tmp_path / "reload.sock"
    port = ReloadPort(gateway.reactor, path, gateway.service.reload, gateway.service.sight.sources.refused_rules)
    gateway.call(port.open)
    try:
        assert console(["reload", "--socket", str(path)]) == 0
        *warnings, remedy = capfd.readouterr().err.splitlines()
        shown = min(count, 10)
        for number, line in enumerate(warnings[:shown]):
            assert line.startswith(f'mqtts-gateway: warning: rule "pump-{number}": client_cert: {tmp_path}/none.pem')
        more = ["mqtts-gateway: warning: … and 2 more, see the status page or the log"] if count > shown else []
        assert warnings[shown:] == more
        assert "are refused. Correct what each line names" in remedy
        told = os.fstat(sys.stderr.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{told.st_dev}:{told.st_ino}")
        assert console(["reload", "--socket", str(path)]) == 0
        gateway.service.reread = lambda: from_mapping({"upstream": []})
        assert console(["reload", "--socket", str(path)]) == 1
        assert capfd.readouterr().err == ""
    finally:
        gateway.call(port.close)
    assert len([event for event in logged_errors if event["event"] == "reload-refused"]) == 1
    logged_errors.clear()


def test_requests_that_wait_are_answered_together(start_gateway: StartGateway, start_broker: StartBroker) -> None:
    """One that runs already may have read the configuration before it was changed, so it does not count."""
    gateway = start_gateway(upstream=start_broker().port)
    reads = []

    def read() -> Any:
        reads.append(1)
        return gateway.service.gateway.config

    gateway.service.reread = read
    answers = gateway.call(lambda: gatherResults([gateway.service.reload() for _ in range(5)]))
    assert answers == [()] * 5
    assert len(reads) == 2


def test_unix_sockets_are_not_for_everybody(
    start_gateway: StartGateway, start_broker: StartBroker, tmp_path: Path
) -> None:
    """Neither a listener's nor the status', unless the configuration says so, which is logged."""
    told: list[str] = []
    observe = lambda event: told.append(formatEvent(event))  # noqa: E731
    globalLogPublisher.addObserver(observe)
    try:
        gateway = start_gateway(
            upstream=start_broker().port,
            listen=[{"endpoint": "127.0.0.1:0"}, {"endpoint": f"unix:{tmp_path}/devices"}],
            status={"endpoint": f"unix:{tmp_path}/status"},
        )
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("devices", "status")]
        assert modes == [0o660, 0o660]
        assert not [line for line in told if "every user" in line]
        gateway.change(status={"endpoint": f"unix:{tmp_path}/wide:mode=666"})
        assert [line for line in told if "every user" in line and "wide" in line]
    finally:
        globalLogPublisher.removeObserver(observe)


# ---- a stop in between, and internal errors


class Told(Notifier):
    """Records the states that systemd is told."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[str] = []

    def ready(self, status: str) -> None:
        self.states.append("READY")

    def reloading(self) -> None:
        self.states.append("RELOADING")

    def stopping(self, status: str, seconds: float) -> None:
        self.states.append("STOPPING")


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_reload_that_a_stop_overtakes_has_no_effect(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    is_refused: bool,
    told: list[str],
    logged_errors: list[Any],
) -> None:
    """Whoever asked for it is told so; systemd is not told READY=1 after STOPPING=1, and no listener is opened."""
    config, reactor = (running := start_gateway(upstream=start_broker().port)).config, running.reactor
    notifier, began, proceed = Told(), threading.Event(), threading.Event()
    service = running.call(GatewayService, config, reactor, None, notifier)
    added, answers = free_port(), Queue[Any]()

    def read() -> Any:
        began.set()
        proceed.wait(PATIENCE)
        if is_refused:
            raise ConfigError(["no good"])
        return from_mapping({"listen": [{"endpoint": f"127.0.0.1:{added}"}], "upstream": [{"host": "localhost"}]})

    running.call(service.startService)
    eventually(lambda: notifier.states == ["READY"], "it is ready")
    service.reread = read
    reactor.callFromThread(lambda: service.reload().addBoth(answers.put))
    assert began.wait(PATIENCE)
    running.call(service.stopService)
    proceed.set()
    problem = "no good" if is_refused else "the gateway is stopping"
    assert answers.get(timeout=PATIENCE) == [problem]
    assert told == [f"reload refused, previous configuration still active: {problem}"]
    assert notifier.states == ["READY", "RELOADING", "STOPPING"]
    assert service.ledger.reloads == 0
    assert not can_connect(added)
    with pytest.raises(ConfigError, match="stopping"):
        running.call(service.change, config)
    logged_errors.clear()


def test_an_internal_error_before_a_change_leaves_everything_as_it_was(
    start_gateway: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened for the new configuration is closed, and listeners and rules are those of the old one."""
    gateway = start_gateway(upstream=start_broker().port)
    before, devices, status = gateway.service.gateway.config, free_port(), free_port()

    def fail(*_: object) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("gateway.gateway.Dialler", fail)
        with pytest.raises(ZeroDivisionError):
            gateway.change(listen=[{"endpoint": f"127.0.0.1:{devices}"}], status={"endpoint": f"127.0.0.1:{status}"})
    assert gateway.service.gateway.config is before
    eventually(lambda: not can_connect(devices) and not can_connect(status), "nothing new is open")
    established(gateway.port).close()


def test_an_internal_error_after_a_change_is_no_refusal(
    start_gateway: StartGateway,
    start_broker: StartBroker,
    monkeypatch: pytest.MonkeyPatch,
    logged_errors: list[Any],
) -> None:
    """The new configuration is active, completely, and nobody is told otherwise."""
    gateway = start_gateway(upstream=start_broker().port)
    service, added = gateway.service, free_port()

    def fail(*_: object) -> Any:
        raise ZeroDivisionError

    config = from_mapping({**gateway._mapping, "listen": [{"endpoint": f"127.0.0.1:{added}"}]})
    service.reread = lambda: config
    monkeypatch.setattr(Dialler, "stop", fail)
    assert not gateway.call(service.reload)
    assert logged_errors[0]["log_failure"].check(ZeroDivisionError)
    logged_errors.clear()
    assert service.gateway.config is config
    assert service.status.startswith("0 sessions")
    established(added).close()
    eventually(lambda: not service.gateway.sessions, "the session has gone")
    monkeypatch.undo()


def test_waiting_sessions_are_judged_a_few_at_a_time(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To end thousands in one turn would hold up all others; who is accepted before its turn is ended all the same."""
    running = start_gateway(upstream=1)
    gateway = running.service.gateway
    clock, ended = TurnClock(), list[str]()
    monkeypatch.setattr(gateway_module, "_JUDGED_AT_A_TIME", 2)

    def waiting(name: str, state: State) -> Mock:
        return Mock(state=state, stop=lambda reason, **_: ended.append(f"{name} {reason.value}"))

    def reload() -> None:
        sessions = [waiting(name, State.WAIT_CONNACK) for name in "abcd"]
        others = [waiting(name, state) for name, state in (("x", State.RELAYING), ("y", State.WAIT_CONNECT))]
        config = attrs.evolve(gateway.config, limits=attrs.evolve(gateway.config.limits, max_packet_size=70_000))
        generation = gateway.made(gateway.prepare(config))
        with monkeypatch.context() as patch:
            patch.setattr(gateway, "_clock", clock)
            patch.setattr(gateway, "_not_accepted", dict.fromkeys([*sessions, *others]))
            gateway.adopt(generation)
        assert len(ended) == 2
        sessions[2].state = State.RELAYING
        sessions[3].state = State.ENDED
        clock.turn()

    running.call(reload)
    assert ended == [f"{name} configuration-changed" for name in "abc"]
