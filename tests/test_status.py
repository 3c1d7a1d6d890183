"""What the gateway shows of itself: metrics, health, the status document; to whom, and what it costs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent, globalLogPublisher

from gateway import pieces as pieces_module
from gateway.config import from_mapping
from gateway.errors import ConfigError, EndReason
from gateway.ops import metrics as metrics_module
from gateway.ops import sight as sight_module
from gateway.ops.metrics import Metrics
from gateway.ops.status_words import SCHEMA, Level, Verdict, device_identity, device_state, device_words, verdict
from gateway.ops.web import page as page_module
from gateway.ops.web import site as site_module
from gateway.ops.web.guard import LOGGED, WINDOW, Access, Guard
from gateway.ops.web.site import StatusSite
from gateway.ops.web.tls import server_side
from gateway.pieces import at_once
from gateway.session.session import Session
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Broker, BrokerConnection, Device, RunningGateway, eventually
from tests.leftovers import Leftovers
from tests.pki import certify
from tests.ports import free_port
from tests.test_floors import ROOT
from tests.turn_clock import TurnClock

StartGateway = Callable[..., RunningGateway]
StartBroker = Callable[..., Broker]
DOCUMENT = (ROOT / "docs" / "sight.md").read_text()
# All that MQTT can carry and a browser, a terminal or a parser could be led astray by.
HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202egnp\u2028\x85 pump-3"


class Answer:
    """What came for a request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("whatever.example", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


def status_port(gateway: RunningGateway) -> int:
    """The port of the status endpoint."""
    port: int = gateway.service.status_port.port.getHost().port
    return port


def ask(gateway: RunningGateway, path: str = "/status", method: str = "GET", **headers: str) -> Answer:
    """Send a request to the status endpoint."""
    with closing(http.client.HTTPConnection("127.0.0.1", status_port(gateway), timeout=20)) as connection:
        connection.request(method, path, headers=headers)
        return Answer(connection.getresponse())


def raw(port: int, data: bytes) -> bytes:
    """Send bytes; return all that comes until the end."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def connected(gateway: RunningGateway, name: str, **packet: Any) -> Device:
    """A device that the broker has accepted."""
    device = Device(gateway.port)
    device.send(mqtt.connect(name, **packet))
    assert device.read(4) == mqtt.connack()
    return device


@pytest.fixture
def start(start_gateway: StartGateway) -> StartGateway:
    """Return a function that starts gateways with a status endpoint."""

    def starter(**arguments: Any) -> RunningGateway:
        arguments.setdefault("status", {"endpoint": "127.0.0.1:0"})
        return start_gateway(**arguments)

    return starter


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    """Devices that are closed after the test."""
    opened: list[Device] = []
    yield opened
    for device in opened:
        device.close()


# ---- the password

PASSWORD = "correct horse"
LATE = {"retry_first": 60, "retry_max": 60}


def cheap_hash(password: str) -> str:
    """The hash of a password, at a hundredth of the usual cost."""
    salt = b"0123456789abcdef"
    parts = (salt, hashlib.scrypt(password.encode(), salt=salt, n=128, r=8, p=1, dklen=32))
    return "$".join(["scrypt$128$8$1", *(base64.b64encode(part).decode() for part in parts)])


HASH = cheap_hash(PASSWORD)


def basic(password: str, user: str = "anyone") -> str:
    """An Authorization header (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def guarded(start: StartGateway, start_broker: StartBroker) -> RunningGateway:
    """A gateway whose status needs a password."""
    return start(upstream=start_broker().port, status={"endpoint": "127.0.0.1:0", "password": HASH})


def test_without_the_password_nothing_is_shown(guarded: RunningGateway, devices: list[Device]) -> None:
    """Of no kind of answer, to no kind of header; and nothing secret is logged."""
    logged: list[str] = []
    observer = lambda event: logged.append(f"{event!r} {formatEvent(event)}")  # noqa: E731
    globalLogPublisher.addObserver(observer)
    devices.append(connected(guarded, "device-17"))
    wrong = [
        {},
        {"Authorization": basic(PASSWORD).replace("Basic", "Bearer")},
        {"Authorization": "Basic"},
        {"Authorization": "Basic \xff"},
        {"Authorization": "Basic " + base64.b64encode(PASSWORD.encode()).decode()},
        {"Authorization": f"{basic(PASSWORD)}, {basic(PASSWORD)}"},
        {"Authorization": basic("")},
        {"Authorization": basic(PASSWORD[:-1])},
        {"Authorization": basic(PASSWORD.upper())},
        {"Authorization": basic(HASH)},
    ]
    for headers in wrong:
        answer = ask(guarded, "/status", **headers)
        assert (answer.status, answer.text) == (401, "The password is missing or wrong.\n")
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="mqtts-gateway", charset="UTF-8"'
    for path in ("/", "/metrics", "/status?q=device-17"):
        assert (ask(guarded, path).status, ask(guarded, path, "HEAD").status) == (401, 401)
    for user in ("anyone", ""):
        assert ask(guarded, "/status", Authorization=basic(PASSWORD, user)).json["sessions"]["open"] == 1
    assert "device-17" in ask(guarded, "/", Authorization=basic(PASSWORD).replace("Basic", "bASIC")).text
    globalLogPublisher.removeObserver(observer)
    for secret in (PASSWORD, HASH, HASH.rpartition("$")[2], basic(PASSWORD).split()[1]):
        assert not [line for line in logged if secret in line]
    assert HASH not in repr(guarded.service.gateway.config)


def test_health_checks_need_no_password_and_name_no_broker(start: StartGateway) -> None:
    """A supervisor has none."""
    gateway = start(upstream=1, status={"endpoint": "127.0.0.1:0", "password": HASH}, failover=LATE)
    assert [ask(gateway, path).status for path in ("/healthz", "/readyz")] == [200, 200]
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        device.read_to_end()
    answer = ask(gateway, "/readyz")
    assert (answer.status, answer.text) == (503, "no broker is available\n")


def test_a_reload_changes_the_password(guarded: RunningGateway) -> None:
    """The old one is worth nothing from then on, even if it was in use; without one, nobody is asked."""
    port, config = status_port(guarded), guarded.service.gateway.config

    def change(password: str) -> None:
        status = evolve(config.status, password=password)
        guarded.call(lambda: guarded.service.change(evolve(config, status=status)))

    assert ask(guarded, Authorization=basic(PASSWORD)).status == 200
    change(cheap_hash("another"))
    assert ask(guarded, Authorization=basic(PASSWORD)).status == 401
    assert ask(guarded, Authorization=basic("another")).status == 200
    change("")
    assert ask(guarded).status == 200
    assert status_port(guarded) == port


HERE = "192.0.2.7:40001"


class Checks:
    """Threads whose work a test does, one piece at a time."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], bool], Deferred[bool]]] = []

    def __call__(self, work: Callable[[], bool]) -> Deferred[bool]:
        result: Deferred[bool] = Deferred()
        self.work.append((work, result))
        return result

    def do(self) -> None:
        work, result = self.work.pop(0)
        result.callback(work())


def test_guesses_are_few_and_do_not_keep_out_who_is_in() -> None:
    """One check at a time, ten at once, then one a second, whoever asks; what was right is not checked again."""
    clock, checks, told = Clock(), Checks(), list[Access]()
    guard = Guard(clock.seconds, checks)
    guard.require(HASH)
    guard.judge(basic(PASSWORD), HERE, told.append)
    checks.do()
    assert told == [Access.GRANTED]
    told.clear()
    for index in range(20):
        guard.judge(basic(f"guess {index}"), HERE, told.append)
        assert len(checks.work) == 1
    guard.judge(basic(PASSWORD), HERE, told.append)
    assert told == [Access.BUSY] * 11 + [Access.GRANTED]
    told.clear()
    while checks.work:
        checks.do()
        assert len(checks.work) <= 1
    assert told == [Access.DENIED] * 9
    told.clear()
    clock.advance(1)
    for _ in range(2):
        guard.judge(basic("guess"), HERE, told.append)
    assert (len(checks.work), told) == (1, [Access.BUSY])


def test_wrong_passwords_are_logged_with_the_address_and_counted() -> None:
    """A few in full, then their number; never the password."""
    logged = list[dict[str, Any]]()
    globalLogPublisher.addObserver(logged.append)
    clock, checks = Clock(), Checks()
    guard = Guard(clock.seconds, checks)
    guard.require(HASH)
    for _ in range(LOGGED + 3):
        guard.judge(basic("hunter2"), HERE, lambda _: None)
        checks.do()
    guard.judge(basic(PASSWORD), HERE, lambda _: None)
    checks.do()
    for _ in range(2):
        clock.advance(WINDOW)
        guard.sweep()
    globalLogPublisher.removeObserver(logged.append)
    logged = [event for event in logged if str(event.get("event", "")).startswith("status-password")]
    *told, counted = (formatEvent(event) for event in logged)
    assert len(told) == LOGGED
    assert all(HERE in line for line in told)
    assert counted.startswith("3 more wrong passwords")
    assert "hunter2" not in str(logged)


def test_a_password_that_was_replaced_while_it_was_checked_is_wrong(logged_errors: list[dict[str, Any]]) -> None:
    """And a check that fails is no reason to let anyone in."""
    checks, told = Checks(), list[Access]()
    guard = Guard(Clock().seconds, checks)
    guard.require(HASH)
    guard.judge(basic(PASSWORD), HERE, told.append)
    guard.require(cheap_hash("another"))
    checks.do()
    guard.judge(basic("another"), HERE, told.append)
    checks.work.pop()[1].errback(MemoryError())
    assert told == [Access.DENIED, Access.BUSY]
    (event,) = logged_errors
    assert "cannot be checked" in formatEvent(event)
    logged_errors.clear()


def test_who_leaves_while_the_password_is_checked_gets_nothing_made(guarded: RunningGateway) -> None:
    """Nor is anything written to a connection that is gone."""
    checks = Checks()
    guard = Guard(Clock().seconds, checks)
    guard.require(HASH)
    site = StatusSite(guarded.service.sight, Clock(), guard)
    connection, wire = on_the_wire(site)
    connection.dataReceived(f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: {basic(PASSWORD)}\r\n\r\n".encode())
    connection.connectionLost()
    checks.do()
    assert not wire.value()
    assert not site._making._requests


# ---- TLS


def ask_safely(gateway: RunningGateway, trusted: Path, path: str = "/status", **headers: str) -> Answer:
    """Send a request over TLS, trusting a certificate."""
    context = ssl.create_default_context(cafile=str(trusted))
    port = status_port(gateway)
    with closing(http.client.HTTPSConnection("localhost", port, timeout=20, context=context)) as connection:
        connection.request("GET", path, headers=headers)
        return Answer(connection.getresponse())


@pytest.fixture
def safe(start: StartGateway, start_broker: StartBroker, tmp_path: Path) -> RunningGateway:
    """A gateway whose status needs TLS, with the file status.pem, and a password."""
    file = certify(subject="status", valid_for=20).write(tmp_path / "status.pem")
    return start(
        upstream=start_broker().port,
        status={"endpoint": "127.0.0.1:0", "password": HASH, "server_cert": str(file)},
    )


def test_it_is_served_with_tls(safe: RunningGateway, devices: list[Device], tmp_path: Path) -> None:
    """Whole pages, to those who have the password; what is no TLS gets no HTTP, and leaves nothing behind."""
    trusted = tmp_path / "status.pem"
    devices.extend(connected(safe, f"{index}-{'x' * 200}") for index in range(40))
    assert ask_safely(safe, trusted).status == 401
    page = ask_safely(safe, trusted, "/", Authorization=basic(PASSWORD))
    assert (page.status, page.body[-8:]) == (200, b"</html>\n")
    assert len(page.body) > 2**15  # more than two records
    assert ask_safely(safe, trusted, "/healthz").text == "alive\n"
    answer = raw(status_port(safe), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"HTTP" not in answer
    site = safe.service.status_port._open.site
    eventually(lambda: not site.protocols, "all connections are closed")


def test_its_certificate_is_warned_of_like_the_others(safe: RunningGateway, tmp_path: Path) -> None:
    """In the document, the headline and the metrics; also the one that takes its place."""
    trusted = tmp_path / "status.pem"
    document = ask_safely(safe, trusted, Authorization=basic(PASSWORD)).json
    (page,) = (each for each in document["certificates"] if each["role"] == "page")
    assert (page["subject"], page["state"]) == ("CN=status", "ends soon")
    assert any(
        "of the status page" in reason and "status.server_cert" in reason for reason in verdict(document).reasons
    )
    text = ask_safely(safe, trusted, "/metrics", Authorization=basic(PASSWORD)).text
    assert value(text, "certificate_not_after_timestamp_seconds", role="page", subject="CN=status", upstream="") > 0
    assert "page" in {each.role for each in safe.service._certificates()}
    config = safe.service.gateway.config
    safe.call(lambda: safe.service.change(evolve(config, status=evolve(config.status, server_cert=None))))
    assert "page" not in {each.role for each in safe.service._certificates()}


@pytest.mark.parametrize("name", ["safe", "guarded"])
def test_the_images_health_check_works_with_and_without_tls(name: str, request: pytest.FixtureRequest) -> None:
    """As the Containerfile has it; it fails where nothing answers."""
    gateway: RunningGateway = request.getfixturevalue(name)
    (line,) = (line for line in (ROOT / "Containerfile").read_text().splitlines() if line.startswith("HEALTHCHECK"))
    _, *arguments = json.loads(line.partition(" CMD ")[2])

    def check(port: int) -> int:
        environment = {"MQTTS_GATEWAY_STATUS": f"127.0.0.1:{port}"}
        return subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL).returncode

    assert check(status_port(gateway)) == 0
    assert check(1) != 0


def test_who_sends_a_handshake_byte_by_byte_is_cut_off(safe: RunningGateway) -> None:
    """As with a request: each read costs the relay a turn."""
    site = StatusSite(safe.service.sight, Clock(), Guard(Clock().seconds, maybeDeferred))
    site.tls = server_side(safe.service.gateway.config.status)
    connection, wire = on_the_wire(site)
    connection.dataReceived(b"\x16\x03\x01\x40\x00")  # a record of 16 KiB
    fed = 0
    while not wire.aborted and fed < 2**14 - 1:
        fed += 1
        connection.dataReceived(b"\x01")
    assert fed <= 128
    assert not wire.value()


def test_a_new_certificate_is_taken_without_opening_the_endpoint_again(safe: RunningGateway, tmp_path: Path) -> None:
    """One that cannot be used is refused, and the one before stays; without one there is no TLS any more."""
    port, config, other = status_port(safe), safe.service.gateway.config, tmp_path / "other.pem"

    def change(**changed: Any) -> None:
        status = evolve(config.status, **changed)
        safe.call(lambda: safe.service.change(evolve(config, status=status)))

    certify(subject="status").write(other)
    change(server_cert=other)
    assert ask_safely(safe, other, "/healthz").status == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        ask_safely(safe, tmp_path / "status.pem", "/healthz")
    with pytest.raises(ConfigError, match=r"^status\.server_cert: .*none\.pem cannot be read"):
        change(server_cert=tmp_path / "none.pem")
    assert ask_safely(safe, other, "/healthz").status == 200
    assert other in safe.service.gateway.generation.prepared.files
    change(server_cert=None)
    assert ask(safe, "/healthz").status == 200
    assert status_port(safe) == port


# ---- metrics


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def value(text: str, name: str, /, **labels: str) -> float:
    """One sample's value."""
    return samples(text)[f"mqtts_gateway_{name}", frozenset(labels.items())]


def test_metrics_count_what_happened(start: StartGateway, start_broker: StartBroker, devices: list[Device]) -> None:
    """Sessions by step, ends and refusals by reason, what passed, how long it took."""
    broker = start_broker()
    gateway = start(upstream=broker.port, admission={"max_sessions": 2})
    devices.append(connected(gateway, "a"))
    devices.append(Device(gateway.port))
    eventually(lambda: len(gateway.service.gateway.sessions) == 2, "two sessions")
    with Device(gateway.port) as refused:
        assert refused.read_to_end() == b""
    devices[0].send(mqtt.publish(payload=b"x" * 100))
    eventually(lambda: broker.connection().received.endswith(b"x" * 100), "the packet")
    devices[1].send(b"\x00\x00")
    gateway.wait_ended()
    text = ask(gateway, "/metrics").text
    assert value(text, "sessions", step="relaying") == 1
    assert value(text, "sessions", step="wait-connect") == 0
    assert value(text, "sessions_limit") == 2
    assert value(text, "sessions_started_total") == 1
    assert value(text, "sessions_ended_total", reason="not-mqtt") == 1
    assert value(text, "sessions_ended_total", reason="tls-expired") == 0
    assert value(text, "connections_refused_total", reason="too-many-sessions") == 1
    assert value(text, "relayed_bytes_total", direction="up") == len(broker.received)
    assert value(text, "relayed_packets_total", direction="up") == 2
    assert value(text, "relayed_packets_total", direction="down") == 1
    assert value(text, "session_step_seconds_count", step="connack") == 1
    assert value(text, "upstream_up", upstream=f"localhost:{broker.port}", name="localhost") == 1
    assert value(text, "upstream_dials_total", upstream=f"localhost:{broker.port}", name="localhost") == 1
    assert value(text, "ready") == 1
    process = samples(text)
    assert process["process_resident_memory_bytes", frozenset()] > 1e6
    assert ("process_cpu_seconds_total", frozenset()) in process


def test_metrics_say_that_an_upstream_is_left_alone(start: StartGateway, start_broker: StartBroker) -> None:
    """And that another one served in its place."""
    broker = start_broker()
    upstreams = [{"host": "localhost", "port": 1}, {"host": "localhost", "port": broker.port}]
    gateway = start(upstream=upstreams, failover={"retry_first": 30})
    connected(gateway, "a").close()
    text = ask(gateway, "/metrics").text
    first = "localhost:1"
    assert value(text, "upstream_up", upstream=first, name="localhost") == 0
    assert value(text, "upstream_failed_dials_total", upstream=first, name="localhost", reason="tcp-refused") == 1
    assert value(text, "upstream_passed_over_total", upstream=first, reason="tcp-refused") == 1
    assert value(text, "ready") == 1


def test_metrics_have_the_ends_of_certificates(start: StartGateway, start_broker: StartBroker, tmp_path: Path) -> None:
    """The gateway's own, the CA's, and the broker's once it was seen; of two with one name, the first to end."""
    root = certify(subject="root", ca=True, names=(), purposes=())
    old = certify(subject="root", ca=True, names=(), purposes=(), valid_for=3)
    leaf = certify(root, subject="broker")
    own = certify(root, subject="gateway")
    (tmp_path / "ca.pem").write_bytes(root.pem + old.pem)
    broker = start_broker(tls=leaf.server())
    gateway = start(
        upstream=broker.port, ca_file=tmp_path / "ca.pem", tls={"client_cert": str(own.write(tmp_path / "own.pem"))}
    )
    upstream = f"localhost:{broker.port}"

    def end(role: str, subject: str, upstream: str = "") -> float:
        labels = {"role": role, "subject": subject, "upstream": upstream}
        return value(ask(gateway, "/metrics").text, "certificate_not_after_timestamp_seconds", **labels)

    assert end("own", "CN=gateway") == own.certificate.not_valid_after_utc.timestamp()
    assert end("ca", "CN=root") == old.certificate.not_valid_after_utc.timestamp()
    with pytest.raises(KeyError):
        end("broker", "CN=broker", upstream)
    connected(gateway, "a").close()
    assert end("broker", "CN=broker", upstream) == leaf.certificate.not_valid_after_utc.timestamp()


def test_metrics_are_openmetrics_for_those_who_ask(start: StartGateway) -> None:
    """Prometheus does; both formats parse, and both hold the same families."""
    gateway = start(upstream=1)
    plain = ask(gateway, "/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    modern = ask(gateway, "/metrics", Accept="application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in openmetrics(modern.text)}
    of_one_format = {"mqtts_gateway_build_info", "mqtts_gateway_engine_info"}
    assert {family.name for family in parse(plain.text)} - of_one_format <= names | {"python_info"}


def test_no_label_is_a_devices(start: StartGateway, start_broker: StartBroker, devices: list[Device]) -> None:
    """A thousand devices make no more series than one: nothing of what they call themselves is in the metrics."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, "device-16").close()
    gateway.wait_ended()
    before = samples(ask(gateway, "/metrics").text)
    devices += [connected(gateway, f"device-{number}") for number in range(17, 22)]
    text = ask(gateway, "/metrics").text
    assert samples(text).keys() == before.keys()
    assert "device-17" not in text


def test_names_and_units_are_those_of_prometheus(start: StartGateway) -> None:
    """One prefix, base units, _total for what only grows; each family has a help, and docs/sight.md names it."""
    families = [each for each in parse(ask(start(upstream=1), "/metrics").text) if each.name.startswith("mqtts")]
    documented = dict(re.findall(r"^\| `(mqtts_gateway_\w+)` \| (\w+) \|", DOCUMENT, re.MULTILINE))
    assert {f"{each.name}_total" if each.type == "counter" else each.name: each.type for each in families} == documented
    for each in families:
        assert each.documentation.endswith(".")
        assert not re.search(r"_(ms|milliseconds|kilobytes|minutes)\b", each.name)
        if each.type == "histogram":
            assert each.name.endswith("_seconds")


# ---- health


def test_readiness_follows_the_upstreams(start: StartGateway) -> None:
    """503 with the reason while all are left alone; alive all the while."""
    gateway = start(upstream=1, failover={"retry_first": 30})
    assert (ask(gateway, "/readyz").status, ask(gateway, "/readyz").text) == (200, "ready\n")
    with Device(gateway.port) as device:
        device.send(mqtt.connect())
        device.read_to_end()
    answer = ask(gateway, "/readyz")
    assert (answer.status, answer.text) == (
        503,
        "no broker is available: localhost:1 is backing off (tcp-refused)\n",
    )
    assert ask(gateway, "/healthz").status == 200
    gateway.wait_empty()


def test_while_it_stops_it_is_not_ready_and_still_answers(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """A load balancer is told before the sessions have gone, and whoever looks sees them go."""
    gateway = start(upstream=start_broker().port, timeouts={"close": 3})
    devices.append(connected(gateway, "a"))
    port = status_port(gateway)
    gone: list[Any] = []
    # The device does not close its side, so that the end takes as long as it may.
    gateway.call(lambda: [gateway.service.stopService().addCallback(gone.append), None][1])
    answer = ask(gateway, "/readyz")
    assert (answer.status, answer.text) == (503, "the gateway is stopping\n")
    assert not gone
    devices[0].close()
    eventually(lambda: gone, "the end")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 20)


def test_a_gateway_whose_sweep_has_stopped_is_not_alive(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are not kept then: whoever watches the process should start it anew."""
    gateway = start(upstream=1)
    ledger = gateway.service.ledger
    monkeypatch.setattr(ledger, "sweep", lambda: None)
    ledger.swept -= 60
    answer = ask(gateway, "/healthz")
    assert (answer.status, answer.text) == (503, "the event loop is stuck: timeouts are not enforced\n")


# ---- the document


def test_the_document_says_where_each_device_stands(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """Step, address, listener, since when, upstream, what passed; the broker's silence is a step of its own."""

    def serve(connection: BrokerConnection) -> None:
        if b"patient" in connection.read_packet():
            connection.read_to_end()
        connection.send(mqtt.connack())
        connection.read_to_end()

    broker = start_broker(serve=serve)
    gateway = start(upstream=broker.port, listen=[{"endpoint": "127.0.0.1:0", "name": "hall 3"}])
    devices += [connected(gateway, "device-17"), Device(gateway.port), Device(gateway.port)]
    devices[0].send(mqtt.publish(payload=b"12345"))
    devices[1].send(mqtt.connect("patient"))
    broker.connection(1)
    eventually(lambda: len(gateway.service.gateway.sessions) == 3, "three sessions")
    eventually(lambda: b"12345" in broker.received, "the packet")
    document = ask(gateway).json
    assert document["schema"] == SCHEMA
    assert document["ready"]
    assert document["sessions"]["open"] == 3
    assert document["listeners"] == [{"name": "hall 3", "address": f"127.0.0.1:{gateway.port}"}]
    by_name = {each["client_identifier"]: each for each in document["devices"]["items"]}
    assert {name: each["step"] for name, each in by_name.items()} == {
        "": "wait-connect",
        "patient": "wait-connack",
        "device-17": "relaying",
    }
    device = by_name["device-17"]
    assert device["device_address"] == f"127.0.0.1:{devices[0].socket.getsockname()[1]}"
    assert (device["listener"], device["upstream"]) == ("hall 3", f"localhost:{broker.port}")
    assert device["traffic"]["packets_up"] == 2
    assert device["traffic"]["bytes_up"] == len(mqtt.connect("device-17")) + len(mqtt.publish(payload=b"12345"))
    assert device["end"] is None
    assert datetime.now(UTC) - datetime.fromisoformat(device["since"]) < timedelta(minutes=1)
    (upstream,) = document["upstreams"]
    assert (upstream["state"], upstream["open"], upstream["last_failure"]) == ("serving", True, None)


def test_a_device_is_shown_as_the_broker_knows_it(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], tmp_path: Path
) -> None:
    """The certificate that is offered, and what the rule replaces; not its own user name, which may be a token."""
    own = certify(subject="gateway").write(tmp_path / "own.pem")
    lines = list[dict[str, Any]]()
    globalLogPublisher.addObserver(lines.append)
    gateway = start(
        upstream=start_broker().port,
        tls={"client_cert": str(own)},
        device=[{"match_client_id": "d1", "client_id": "plant-{client_id}", "username": "plant"}],
    )
    devices += [connected(gateway, name, username=b"tok3n") for name in ("d1", "d2")]
    answer = ask(gateway)
    globalLogPublisher.removeObserver(lines.append)
    shown = {each["client_identifier"]: device_identity(each) for each in answer.json["devices"]["items"]}
    assert shown == {"d1": 'CN=gateway, user name "plant", Client Identifier "plant-d1"', "d2": "CN=gateway"}
    started = [event for event in lines if event.get("event") == "session-start"]
    assert [event["upstream_certificate"] for event in started] == ["CN=gateway"] * 2
    assert "tok3n" not in answer.text + str(lines)
    devices.pop(0).close()
    gateway.wait_ended()
    (gone,) = ask(gateway, "/status?q=d1").json["devices"]["items"]
    assert device_identity(gone) == shown["d1"]


def test_the_document_is_described(start: StartGateway) -> None:
    """docs/sight.md names every field of the whole, and no other."""
    section = re.search(r"^## The document\n(.*?)^## ", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert section is not None
    cells = re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
    described = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(described) == sorted(ask(start(upstream=1)).json)


# Fields that count by reason, state, step or the like.
BY_WORD = {
    "absent_reasons",
    "unserved_reasons",
    "failed_dials",
    "by_step",
    "ended",
    "refused",
    "dropped",
    "count",
    "counts",
}


def fields_in(value: Any, above: str) -> Iterator[str]:
    """Yield the names of all fields within a part of the document."""
    if isinstance(value, list):
        for each in value:
            yield from fields_in(each, above)
    elif isinstance(value, dict) and above not in BY_WORD and (above != "sessions" or "offline" not in value):
        for name, each in value.items():
            yield name
            yield from fields_in(each, name)


def test_the_parts_of_the_document_are_described(
    start: StartGateway, start_broker: StartBroker, tmp_path: Path, logged_errors: list[Any]
) -> None:
    """docs/sight.md names every field of each part, and no other; values are in quotes there."""
    section = re.search(r"^## The document\n(.*?)^## ", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section[1], re.MULTILINE)
    expires = certify(subject="soon", valid_for=5).write(tmp_path / "soon.pem")
    rules = [
        {"match_client_id": "broken", "client_cert": str(tmp_path / "none.pem"), "client_key": str(expires)},
        {"match_client_id": "soon", "client_cert": str(expires), "client_key": str(expires)},
        {"match_client_id": "kept", "store": True, "bound_to": "127.0.0.1", "upstream": "gone"},
    ]
    upstream = [
        {"host": "localhost", "port": start_broker().port},
        {"host": "localhost", "port": 1, "name": "gone", "default": False, "ciphers": "AES128-SHA"},
    ]
    gateway = start(upstream=upstream, device=rules, store={"directory": str(tmp_path / "store"), "after": 2})
    with Device(gateway.port) as well, Device(gateway.port) as broken, Device(gateway.port) as kept:
        well.send(mqtt.connect("well"))
        assert well.read(4) == mqtt.connack()
        broken.send(mqtt.connect("broken"))
        broken.read_to_end()
        kept.send(mqtt.connect("kept"))
        assert kept.read(4) == mqtt.connack()
        kept.send(mqtt.publish(qos=1))
        assert kept.read(4) == b"\x40\x02\x00\x01"
        eventually(lambda: ask(gateway).json["store"]["backlogs"], "a message on disk")
        gateway.service.renewals.failing["tls"] = "no CA"
        for _ in range(2):
            gateway.call(gateway.service.ledger.sample)
        document = ask(gateway).json
    logged_errors.clear()  # of the rule that cannot be used
    for names, words in rows:
        described = set(re.findall(r"`(\w+)`", words))
        found = {name for top in re.findall(r"`(\w+)`", names) for name in fields_in(document[top], top)}
        assert described == found, names


def test_the_document_says_why_a_device_is_silent(start: StartGateway, start_broker: StartBroker) -> None:
    """Word, meaning, particulars, remedy; found by a part of its name."""
    leaf = certify(certify(subject="another", ca=True, names=(), purposes=()))
    gateway = start(upstream=start_broker(tls=leaf.server()).port, failover={"retry_first": 30})
    for name in ("device-17", "device-18"):
        with Device(gateway.port) as device:
            device.send(mqtt.connect(name))
            device.read_to_end()
    gateway.wait_empty()
    document = ask(gateway, "/status?q=VICE-17").json
    assert document["devices"]["counts"]["silent"] == 1
    (device,) = document["devices"]["items"]
    assert (device["client_identifier"], device["step"]) == ("device-17", "ended")
    end = device["end"]
    assert end["reason"] == "tls-untrusted-chain"
    assert (end["meaning"], end["remedy"]) == (
        EndReason.TLS_UNTRUSTED_CHAIN.meaning,
        EndReason.TLS_UNTRUSTED_CHAIN.remedy,
    )
    assert end["detail"]
    assert not document["ready"]
    assert document["upstreams"][0]["last_failure"]["reason"] == "tls-untrusted-chain"
    (lately,) = document["lately"]
    assert (lately["reason"], lately["count"], lately["devices"]) == ("tls-untrusted-chain", 2, 2)
    assert document["absent"] == 2


def test_a_device_that_went_hours_ago_is_still_found(start: StartGateway, start_broker: StartBroker) -> None:
    """Who looks in the morning learns why it went in the night; it is none of those that went lately."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, "device-17").close()
    gateway.wait_ended()
    (end,) = gateway.service.ledger.ends()
    end.ended -= 7 * 3600
    document = ask(gateway, "/status?q=device-17").json
    (device,) = document["devices"]["items"]
    assert (device["end"]["reason"], device["seconds"] // 3600) == ("device-lost", 7)
    assert document["absent"] == 0
    assert document["lately"][0]["devices"] == 0
    assert document["devices"]["remembered_seconds"] < 3600


def test_a_device_that_came_back_is_here_and_its_last_end_is_told(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """Two devices that fight for one Client Identifier are seen by how often it has ended."""
    gateway = start(upstream=start_broker().port)
    for _ in range(3):
        connected(gateway, "device-17").close()
        eventually(lambda: not gateway.service.gateway.sessions, "it is gone")
    devices.append(connected(gateway, "device-17"))
    (device,) = ask(gateway).json["devices"]["items"]
    assert (device["step"], device["end"]["reason"], device["end"]["times"]) == ("relaying", "device-lost", 3)


def test_the_headline_names_the_reason_of_the_devices_that_it_counts(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """One device that failed often and is back does not give the reason why others are away."""

    def serve(connection: BrokerConnection) -> None:
        is_refused = b"refused" in connection.read_packet()
        connection.send(mqtt.connack(code=5) if is_refused else mqtt.connack())
        connection.read_to_end()

    gateway = start(upstream=start_broker(serve=serve).port)
    for _ in range(4):
        with Device(gateway.port) as device:
            device.send(mqtt.connect("flapping") + b"\x00\x00")
            device.read_to_end()
    for name in ("gone", "lost"):
        connected(gateway, name).close()
    with Device(gateway.port) as device:
        device.send(mqtt.connect("refused"))
        device.read_to_end()
    gateway.wait_ended(7)
    devices.append(connected(gateway, "flapping"))
    document = ask(gateway).json
    assert document["lately"][0]["reason"] == "malformed-packet"
    assert (document["lately"][0]["count"], document["lately"][0]["devices"]) == (4, 1)
    assert "Devices (last end)" in ask(gateway, "/").text
    assert document["absent_reasons"] == {"device-lost": 2, "upstream-refused": 1}
    assert document["unserved_reasons"] == {"upstream-refused": 1}
    failed, unserved = verdict(document).reasons
    assert (failed[0], failed.endswith("device-lost.")) == ("3", True)
    assert (unserved[0], unserved.endswith("upstream-refused.")) == ("1", True)


def test_after_an_outage_the_gateway_works_although_devices_have_not_come_back(
    start: StartGateway, start_broker: StartBroker
) -> None:
    """One device that was served shows it, and so does a broker that was verified; a new refusal of all does not."""

    def serve(connection: BrokerConnection) -> None:
        if b"pump-1" in connection.read_packet():
            connection.send(mqtt.connack())
        else:
            connection.send(mqtt.connack(code=5))
        connection.read_to_end()

    port = free_port()
    gateway = start(upstream=port, failover={"retry_first": 0.001, "retry_max": 0.001})
    ended = iter(range(1, 9))

    def refused(name: str) -> Verdict:
        with Device(gateway.port) as device:
            device.send(mqtt.connect(name))
            device.read_to_end()
        gateway.wait_ended(next(ended))
        return verdict(ask(gateway).json)

    assert [refused(name).level for name in ("pump-2", "pump-3")] == [Level.DOWN, Level.DOWN]
    start_broker(serve=serve, port=port)
    connected(gateway, "pump-1").close()
    gateway.wait_ended(next(ended))
    document = ask(gateway).json
    assert (document["ready"], document["unserved"], document["recovered"], document["failing"]) == (True, 2, 2, 0)
    judged = verdict(document)
    assert (judged.level, judged.line[:17]) == (Level.ATTENTION, "The gateway works")
    assert judged.reasons[0].startswith("3 devices failed")
    assert verdict({**document, "recovered": 0}).line == "Some devices cannot connect"
    # Refused since before the last session was established: others are served.
    assert refused("pump-2").level is Level.ATTENTION
    # The first of its attempts that fails after that session: none is served as far as is known.
    assert refused("pump-4").level is Level.DOWN


def test_a_broker_that_was_verified_since_can_serve_those_that_could_not_reach_it(
    start: StartGateway, start_broker: StartBroker
) -> None:
    """No session is needed; one that a broker refuses may be refused again."""
    gateway = start(upstream=(port := free_port()), failover={"retry_first": 0.001, "retry_max": 0.001})
    for name in ("pump-2", "pump-3"):
        with Device(gateway.port) as device:
            device.send(mqtt.connect(name))
            device.read_to_end()
    gateway.wait_ended(2)
    assert verdict(ask(gateway).json).level is Level.DOWN

    asked = threading.Event()

    def hangs_up(connection: BrokerConnection) -> None:
        connection.read_packet()
        asked.wait(PATIENCE)

    broker = start_broker(serve=hangs_up, port=port)
    with Device(gateway.port) as device:
        device.send(mqtt.connect("pump-1"))
        eventually(lambda: b"pump-1" in broker.received, "the broker has CONNECT")
        judged = verdict(ask(gateway).json)
        asked.set()
        device.read_to_end()
    assert (judged.level, judged.line[:17]) == (Level.ATTENTION, "The gateway works")
    gateway.wait_ended(3)


@pytest.mark.parametrize(("count", "words"), [(0, "stopping: no session is open"), (1, "closing 1 session over ")])
def test_the_line_of_a_stop_counts_in_words_that_fit(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], count: int, words: str
) -> None:
    """None, one or more sessions."""
    lines = list[dict[str, Any]]()
    gateway = start(upstream=start_broker().port, drain={"seconds": 0})
    devices += [connected(gateway, f"d{index}") for index in range(count)]
    globalLogPublisher.addObserver(lines.append)
    try:
        gateway.stop()
    finally:
        globalLogPublisher.removeObserver(lines.append)
    assert any(words in str(formatEvent(line)) for line in lines)


def test_a_disabled_device_is_no_failure(start: StartGateway, start_broker: StartBroker, devices: list[Device]) -> None:
    """An operator decided so: the headline stays good, and no count of failures grows; its row says how to undo it."""
    gateway = start(upstream=start_broker().port, device=[{"match_client_id": "off 1", "enabled": False}])
    devices.append(connected(gateway, "on"))
    with Device(gateway.port) as device:
        device.send(mqtt.connect("off 1"))
        device.read_to_end()
    gateway.wait_ended()
    document = ask(gateway).json
    assert (verdict(document).level, verdict(document).reasons) == (Level.WELL, [])
    assert (document["absent"], document["lately"], gateway.service.ledger.failures) == (0, [], 0)
    assert document["sessions"]["ended"]["device-disabled"] == 1
    off = next(each for each in document["devices"]["items"] if each["client_identifier"] == "off 1")
    assert device_state(off) == "disabled"
    assert any("`mqtts-gateway device enable 'off 1'`" in line for line in device_words(off))


def test_a_remedy_is_shown_until_the_device_is_back(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """How its last session ended is still shown."""
    gateway = start(upstream=start_broker().port)
    connected(gateway, "d").close()
    gateway.wait_ended()
    (gone,) = ask(gateway).json["devices"]["items"]
    devices.append(connected(gateway, "d"))
    (back,) = ask(gateway).json["devices"]["items"]
    for device, is_shown in ((gone, True), (back, False)):
        words = " ".join(device_words(device))
        assert (EndReason.DEVICE_LOST.remedy in words) is is_shown
    assert "device-lost" in words


def test_devices_come_in_pages(start: StartGateway, start_broker: StartBroker, devices: list[Device]) -> None:
    """The silent ones first; whatever a query asks for is bounded."""
    gateway = start(upstream=start_broker().port)
    devices += [connected(gateway, f"device-{number}") for number in range(5)]
    connected(gateway, "gone").close()
    gateway.wait_ended()
    found = [
        [each["client_identifier"] for each in ask(gateway, f"/status?limit=4&page={page}").json["devices"]["items"]]
        for page in (1, 2, 3)
    ]
    assert found == [["gone", "device-4", "device-3", "device-2"], ["device-1", "device-0"], []]
    only = ask(gateway, "/status?show=silent").json["devices"]
    assert ([each["client_identifier"] for each in only["items"]], only["counts"]["connected"]) == (["gone"], 5)
    odd = ask(gateway, "/status?limit=99999999999&page=-1&show=everything&q=").json["devices"]
    assert (odd["page"], odd["show"], len(odd["items"])) == (1, "all", 6)
    assert ask(gateway, "/status?limit=0").json["devices"]["items"] == []
    assert ask(gateway, "/status?q=127.0.0.1").json["devices"]["matching"] == 6


def test_devices_that_are_connected_but_silent(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """Pings do not count, whoever relays them; the longest silence comes first, with the time of the last data."""
    broker = start_broker()
    gateway = start(upstream=broker.port)
    devices += [connected(gateway, name, keep_alive=0) for name in ("talking", "quiet", "mute")]
    sessions = {each.record.client_identifier: each for each in gateway.service.gateway.sessions}
    before = gateway.call(lambda: {name: each.last_data for name, each in sessions.items()})
    for device in devices[:2]:
        device.send(mqtt.publish())
    connected(gateway, "gone").close()
    gateway.wait_ended()
    eventually(lambda: all(sessions[name].last_data > before[name] for name in ("talking", "quiet")), "data")

    def age() -> None:
        sessions["quiet"].give_back(-400, inf)
        sessions["mute"].give_back(-500, inf)

    gateway.call(age)
    devices[1].send(mqtt.pingreq())
    eventually(lambda: mqtt.pingreq() in broker.received, "the ping")
    gateway.call(lambda: sessions["quiet"].sweep(gateway.service.sight.sources.seconds()))
    found = ask(gateway, "/status?show=quiet&sort=data").json["devices"]
    assert [each["client_identifier"] for each in found["items"]] == ["mute", "quiet"]
    assert (found["matching"], found["counts"]["quiet"], found["counts"]["connected"]) == (2, 2, 3)
    ages = [each["data_seconds_ago"] for each in found["items"]]
    assert (ages[0] // 100, ages[1] // 100) == (5, 4)
    assert found["items"][1]["heard_seconds_ago"] < 300
    assert "nothing but pings" in device_words(found["items"][1])[0]
    everyone = ask(gateway, "/status?sort=data").json["devices"]["items"]
    assert [each["client_identifier"] for each in everyone] == ["mute", "quiet", "talking", "gone"]
    assert everyone[3]["last_data"] is None


def test_devices_are_sorted_by_name(start: StartGateway, start_broker: StartBroker, devices: list[Device]) -> None:
    """Whatever their state, on all pages; the one that is searched for still comes first."""
    gateway = start(upstream=start_broker().port)
    devices += [connected(gateway, name) for name in ("b", "D", "c2")]
    for name in ("C", "a"):
        connected(gateway, name).close()
    gateway.wait_ended(2)

    def names(query: str) -> list[str]:
        return [each["client_identifier"] for each in ask(gateway, f"/status?{query}").json["devices"]["items"]]

    assert names("sort=name") == ["a", "b", "C", "c2", "D"]
    assert names("sort=name&limit=2&page=2") == ["C", "c2"]
    assert names("sort=name&q=c2")[0] == "c2"
    assert names("sort=nonsense")[-1] in {"b", "D", "c2"}


def test_the_device_that_is_named_in_full_comes_first(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """Whoever looks for device-1 does not want to go through all that begin so, even if those are in trouble."""
    gateway = start(upstream=start_broker().port)
    devices.append(connected(gateway, "Device-1"))
    for number in range(10, 15):
        connected(gateway, f"device-{number}").close()
    gateway.wait_ended(5)
    found = ask(gateway, "/status?q=device-1").json["devices"]
    assert (found["matching"], found["items"][0]["client_identifier"]) == (6, "Device-1")


def test_what_is_hostile_is_harmless_in_json(
    start: StartGateway, start_broker: StartBroker, devices: list[Device]
) -> None:
    """Nothing but ASCII leaves, nothing in it is long, and the device is found by what is shown of it."""
    gateway = start(upstream=start_broker().port)
    devices += [connected(gateway, f"{HOSTILE} here"), connected(gateway, "y" * 65_000)]
    connected(gateway, HOSTILE).close()
    connected(gateway, "x" * 65_000).close()
    gateway.wait_ended(2)
    answer = ask(gateway)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body.isascii()
    assert len(answer.body) < 10_000
    names = [each["client_identifier"] for each in answer.json["devices"]["items"]]
    assert all(name.isprintable() and len(name) < 300 for name in names)
    shown = r"\x1b[2J\u202egnp\u2028\x85 pump-3"
    assert any(name.endswith(shown) for name in names)
    assert ask(gateway, r"/status?q=\u202egnp").json["devices"]["matching"] == 2


def test_history_is_drawn_from_samples(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], reactor: Any
) -> None:
    """What happened since the last one is the next interval's."""
    broker = start_broker()
    gateway = start(upstream=broker.port)
    devices.append(connected(gateway, "a"))
    devices[0].send(mqtt.publish() * 9)
    eventually(lambda: broker.received.count(mqtt.publish()) == 9, "the packets")
    gateway.call(gateway.service.ledger.sample)
    history = ask(gateway).json["history"]
    assert [(each["sessions"], each["packets"], each["failures"]) for each in history] == [(1, 11, 0)]


# ---- who may ask, and what it costs


def test_what_it_may_not_be_asked(start: StartGateway) -> None:
    """Nothing can be changed, and there is nothing else there."""
    gateway = start(upstream=1)
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X" * 100):
        answer = ask(gateway, "/", method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert ask(gateway, "/../etc/passwd").status == 404
    assert ask(gateway, "/status/").status == 404
    assert ask(gateway, "/?q=" + "x" * 3000).status == 414
    assert ask(gateway, "/?" + "&".join(f"a{number}=1" for number in range(200))).status == 400
    head = ask(gateway, "/status", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) > 100


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/healthz", "/nothing"])
def test_every_answer_is_guarded(start: StartGateway, path: str) -> None:
    """Not kept, not framed, not sniffed, and no script but the page's own."""
    headers = ask(start(upstream=1), path).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "Server" not in headers or "Twisted" not in headers["Server"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:9883", 200),
        ("LOCALHOST.", 200),
        ("status.localhost:1", 200),
        ("127.0.0.1:80", 200),
        ("127.9.9.9", 200),
        ("[::1]:9883", 200),
        ("evil.example", 421),
        ("evil.example:9883", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.1.7", 421),
        ("[fe80::1]", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(start: StartGateway, host: str, status: int) -> None:
    """DNS rebinding: a web page of somebody else's must not read this one."""
    gateway = start(upstream=1)
    assert ask(gateway, Host=host).status == status


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/healthz", "localhost", 200),
        ("HTTPS://127.0.0.1:9883/status?show=all", "evil.example", 200),
        ("http://localhost", "localhost", 200),
        ("http://localhost?show=all", "localhost", 200),
        ("http://localhost/nothing", "localhost", 404),
        ("http://evil.example/status", "localhost", 421),
        ("http://localhost:x@evil.example/status", "localhost", 421),
        ("http:///status", "localhost", 421),
        ("/%73tatus", "localhost", 200),
        ("/http://localhost/status", "localhost", 404),
    ],
)
def test_a_request_may_name_the_host_in_its_target(start: StartGateway, target: str, host: str, status: int) -> None:
    """As to a proxy; it counts instead of the Host header (RFC 9112 §3.2.2)."""
    assert ask(start(upstream=1), target, Host=host).status == status


def test_two_hosts_are_none_of_them(start: StartGateway) -> None:
    """And who sends none is no browser."""
    port = status_port(start(upstream=1))
    assert (
        b" 400 "
        in raw(port, b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").split(b"\r\n")[0]
    )
    assert b" 200 " in raw(port, b"GET /healthz HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


def test_a_public_endpoint_answers_to_any_name(start: StartGateway) -> None:
    """Which names it has, only its owner knows."""
    gateway = start(upstream=1, status={"endpoint": "127.0.0.1:0", "public": True})
    assert ask(gateway, Host="gateway.example").status == 200


def test_a_unix_socket_answers_to_any_name(start: StartGateway, tmp_path: Path) -> None:
    """No name leads there; its mode says who may ask."""
    path = tmp_path / "status.sock"
    start(upstream=1, status={"endpoint": f"unix:{path}:mode=600"})
    assert path.stat().st_mode & 0o777 == 0o600
    with closing(UnixConnection(path)) as connection:
        connection.request("GET", "/status")
        assert Answer(connection.getresponse()).json["schema"] == SCHEMA


def test_an_answer_ends_the_connection(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client would like, and though more requests stand behind."""
    monkeypatch.setattr(site_module, "_LIFETIME", 3600)
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
    answer = raw(status_port(start(upstream=1)), request * 5)
    assert answer.count(b"HTTP/1.1 200 OK") == 1


def test_what_is_sent_along_is_not_kept(start: StartGateway) -> None:
    """A body is neither held in memory nor written to a file, and the answer is the same; then it ends."""
    gateway = start(upstream=1)
    for length in (b"Content-Length: 200000", b"Content-Length: 99999999999999"):
        answer = raw(
            status_port(gateway), b"POST / HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n\r\n" + b"x" * 200_000
        )
        assert answer.startswith(b"HTTP/1.1 405 ") or answer == b""
    assert ask(gateway).status == 200


def test_garbage_is_answered_in_short(start: StartGateway, devices: list[Device]) -> None:
    """Neither a long header nor MQTT nor TLS makes a line in the log, or does any harm."""
    gateway = start(upstream=1)
    for garbage in (
        mqtt.connect(),
        b"\x16\x03\x01\x00\xa5\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ):
        raw(status_port(gateway), garbage)
    assert ask(gateway, "/healthz").status == 200


def test_who_says_nothing_is_cut_off(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who says it slowly."""
    monkeypatch.setattr(site_module, "_LIFETIME", 0.5)
    gateway = start(upstream=1)
    leftovers = Leftovers(gateway)
    slow = [socket.create_connection(("127.0.0.1", status_port(gateway)), 20) for _ in range(3)]
    for connection in slow:
        connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nX: ")
    for connection in slow:
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()
    assert ask(gateway, "/healthz").status == 200
    leftovers.check()


def test_who_says_nothing_makes_room_for_a_health_check(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few open connections would have the gateway restarted. Those that have asked come last."""
    monkeypatch.setattr(site_module, "_MOST_CONNECTIONS", 3)
    gateway = start(upstream=1)
    site = gateway.service.status_port._open.site
    with contextlib.ExitStack() as stack:

        def connection() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", status_port(gateway)), 20))

        asking, *silent = [connection() for _ in range(3)]
        asking.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asking.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: len(site.protocols) == 3, "all of them")
        for each in silent:
            assert ask(gateway, "/healthz").status == 200
            connection()
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""
        connection()
        eventually(lambda: len(site.protocols) == 3, "no more")
        for waiting in (connection(), connection()):
            waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert waiting.recv(12) == b"HTTP/1.1 200"
        assert ask(gateway, "/healthz").status == 200


def test_who_asks_too_often_gets_the_same_answer_or_has_to_wait(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay's time is not spent on those who look; health is answered all the same."""
    monkeypatch.setattr(site_module, "_AT_ONCE", 1e-9)
    monkeypatch.setattr(site_module, "_SHARE", 0.0)
    gateway = start(upstream=1)
    first = ask(gateway)
    assert first.status == 200
    again = ask(gateway)
    assert (again.status, again.json["time"]) == (200, first.json["time"])
    for path in ("/", "/metrics", "/status?q=a"):
        assert ask(gateway, path).status == 429
    assert ask(gateway, "/").headers["Retry-After"] == "5"
    assert [ask(gateway, path).status for path in ("/healthz", "/readyz")] == [200, 200]
    monkeypatch.setattr(site_module, "_REPEATABLE_FOR", -1.0)
    assert ask(gateway).status == 429


def test_the_time_that_answers_take_comes_back_as_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that took long is not made again before; few are kept to be repeated."""
    monkeypatch.setattr(site_module, "_AT_ONCE", 0.02)
    spent = iter([0.0, 0.05, *[1.0] * 100])
    monkeypatch.setattr(site_module.time, "thread_time", lambda: next(spent))
    clock = Clock()
    budget = site_module._Budget(clock.seconds)
    making = site_module._Making(clock, budget)
    made: list[object] = []

    def make(key: object) -> Any:
        made.append(key)
        return (200, "", repr(key).encode())
        yield

    def answer(key: object) -> Any:
        answers: list[Any] = []
        making.ask(key, partial(make, key), answers.append)
        (status, *rest) = answers.pop()
        return None if status == 429 else (status, *rest)

    assert answer("a") == (200, "", b"'a'")
    assert [answer("b"), answer("a")] == [None, (200, "", b"'a'")]
    clock.advance(5.9)
    assert (answer("b"), made) == (None, ["a"])
    clock.advance(0.2)
    assert answer("b") == (200, "", b"'b'")
    clock.advance(1000)
    for key in range(20):
        answer(key)
    assert len(budget._kept) <= 8


class Kitchen:
    """A place where answers are made, each in as many pieces as its name has letters; and what happened there."""

    def __init__(self) -> None:
        self.clock = TurnClock()
        self.making = site_module._Making(self.clock, site_module._Budget(self.clock.seconds))
        self.pieces: list[str] = []
        self.closed: list[str] = []
        self.answers: list[tuple[str, bytes]] = []

    def make(self, key: str) -> Any:
        """Make an answer."""
        try:
            for piece in key:
                self.pieces.append(piece)
                yield
        except GeneratorExit:
            self.closed.append(key)
            raise
        return (200, "", key.encode())

    def ask(self, who: str, key: str) -> Any:
        """Ask for one."""

        def done(answer: Any) -> None:
            self.answers.append((who, answer[2]))

        self.making.ask(key, partial(self.make, key), done)
        return done

    def turns(self, count: int) -> None:
        """Let so many turns pass."""
        for _ in range(count):
            self.clock.turn()


def test_answers_are_made_a_piece_per_turn_and_shared() -> None:
    """One at a time, however many are wanted; who asks for what is being made gets the same."""
    kitchen = Kitchen()
    for who, key in (("a", "xyz"), ("b", "pq"), ("c", "xyz")):
        kitchen.ask(who, key)
    seen = [len(kitchen.pieces)]
    while kitchen.clock.getDelayedCalls():
        kitchen.turns(1)
        seen.append(len(kitchen.pieces))
    assert seen == [1, 2, 3, 3, 4, 5, 5]
    assert kitchen.answers == [("a", b"xyz"), ("c", b"xyz"), ("b", b"pq")]


def test_what_nobody_waits_for_is_not_made() -> None:
    """The others go on; nothing is left at the end."""
    kitchen = Kitchen()
    first, second, third = kitchen.ask("a", "xyz"), kitchen.ask("b", "xyz"), kitchen.ask("c", "pq")
    kitchen.making.forget(first)
    kitchen.turns(1)
    assert not kitchen.closed
    kitchen.making.forget(second)
    assert kitchen.closed == ["xyz"]
    kitchen.turns(3)
    assert kitchen.answers == [("c", b"pq")]
    kitchen.making.forget(third)
    kitchen.making.forget(kitchen.ask("d", "xyz"))
    assert not kitchen.clock.getDelayedCalls()
    kitchen.ask("e", "xyz")
    kitchen.making.end()
    assert not kitchen.clock.getDelayedCalls()


def test_a_document_looks_at_a_few_devices_in_each_turn(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the metrics and the page; a session that ends meanwhile is shown all the same, a last time."""
    monkeypatch.setattr(pieces_module, "AT_A_TIME", 2)
    gateway = start(upstream=start_broker().port)
    devices.extend(connected(gateway, f"d{number}") for number in range(5))
    seen: list[Session] = []
    state = Session.shown_state.fget
    assert state is not None
    monkeypatch.setattr(Session, "shown_state", property(lambda session: (seen.append(session), state(session))[1]))

    def made(pieces: Any) -> tuple[list[int], Any]:
        """Make it, in the gateway's thread; how many sessions were looked at in each turn, and the result."""
        counts = []
        while True:
            seen.clear()
            try:
                next(pieces)
            except StopIteration as stop:
                return counts, stop.value
            counts.append(len(seen))
            if len(counts) == 2:
                seen[0].stop(EndReason.TAKEN_OVER)

    counts, document = gateway.call(made, gateway.service.sight.document())
    assert counts[:4] == [2, 2, 1, 0]
    assert sorted(each["client_identifier"] for each in document["devices"]["items"]) == [f"d{n}" for n in range(5)]
    assert {each["step"] for each in document["devices"]["items"]} == {"relaying"}
    assert document["sessions"]["by_step"]["relaying"] == 5
    counts, _ = gateway.call(made, Metrics(gateway.service.sight).exposition(""))
    assert max(counts) == 2


def test_what_a_document_was_made_of_is_freed_a_few_at_a_time(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To free all of it in the last turn would take that turn as long as to look at it."""
    monkeypatch.setattr(sight_module, "AT_A_TIME", 2)
    gateway = start(upstream=start_broker().port)
    devices.extend(connected(gateway, f"d{number}") for number in range(5))
    kept: list[Any] = []

    class Census(sight_module._Census):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(sight_module, "_Census", Census)

    def held() -> list[tuple[int, int]]:
        return [(kept[0].matching, len(kept[0]._here)) for _ in gateway.service.sight.document()]

    sizes = gateway.call(held)
    assert sizes[-6:] == [(3, 5), (1, 5), (0, 5), (0, 3), (0, 1), (0, 0)]


def test_metrics_are_encoded_one_family_per_turn(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put together, they are what the library makes of all at once."""
    gateway = start(upstream=1)
    encoded: list[int] = []
    choose = metrics_module.choose_encoder

    def chosen(accept: str) -> Any:
        encode, content_type = choose(accept)

        def counting(registry: Any) -> bytes:
            encoded.append(len(list(registry.collect())))
            result: bytes = encode(registry)
            return result

        return counting, content_type

    monkeypatch.setattr(metrics_module, "choose_encoder", chosen)
    for accept, read in (("", parse), ("application/openmetrics-text", openmetrics)):
        encoded.clear()
        body, _ = gateway.call(at_once, Metrics(gateway.service.sight).exposition(accept))
        assert len(encoded) > 20
        assert max(encoded) == 1
        families = [family.name for family in read(body.decode())]
        assert len(families) == len(set(families)) == len(encoded) - 1


def test_no_element_of_the_page_grows_with_the_number_of_rows(
    start: StartGateway, start_broker: StartBroker, devices: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element copies what is in it, and there are ten around the rows."""
    gateway = start(upstream=start_broker().port)
    devices.append(connected(gateway, "<!--rows-->"))
    document = gateway.call(at_once, gateway.service.sight.document())
    lengths: list[int] = []
    make = page_module.element

    def element(*children: Any, **attributes: Any) -> Any:
        made = make(*children, **attributes)
        lengths.append(len(made))
        return made

    monkeypatch.setattr(page_module, "element", element)
    at_once(page_module.page(document))
    longest = max(lengths)
    document["devices"]["items"] *= 100
    page = at_once(page_module.page(document))
    assert max(lengths) == longest
    assert page.count(b"&lt;!--rows--&gt;</b>") == 100
    assert b"<!--rows-->" not in page


def test_who_leaves_before_the_answer_cancels_it(start: StartGateway) -> None:
    """And who sends more meanwhile gets one answer."""
    clock = Clock()
    site = StatusSite(start(upstream=1).service.sight, clock, Guard(clock.seconds, maybeDeferred))
    request = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection, wire = on_the_wire(site)
    connection.dataReceived(request)
    assert not wire.value()
    connection.dataReceived(b"more")
    clock.pump([0] * 20)
    assert wire.value().count(b"HTTP/1.1 200 OK") == 1
    connection.connectionLost()
    connection, wire = on_the_wire(site)
    connection.dataReceived(request)
    connection.connectionLost()
    assert not clock.getDelayedCalls()
    assert not wire.value()


@pytest.mark.parametrize("header", ["Accept", "Host", "X-Other", "Content-Length", "Transfer-Encoding", "Connection"])
@pytest.mark.parametrize(
    "value",
    [b"application/openmetrics-text; version=x", b"\xff", b"\xc3\xa4", b"\x80" * 200, b"", b"a;q=\xff", b"1_0", b"-1"],
)
def test_no_header_escapes_the_handler(start: StartGateway, header: str, value: bytes) -> None:
    """There is an answer, and no line in the log, which the fixture sees to."""
    host = b"" if header == "Host" else b"Host: localhost\r\n"
    request = b"GET /metrics HTTP/1.1\r\n" + host + header.encode() + b": " + value + b"\r\n\r\n"
    answer = raw(status_port(start(upstream=1)), request)
    assert answer[:12] in {b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 421", b"HTTP/1.1 501"}
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "line",
    [
        b"GET /\xff HTTP/1.1",
        b"\xff / HTTP/1.1",
        b"GET / HTTP/9.9",
        b"GET / HTTP/0.9",
        b"GET /",
        b"GET  / HTTP/1.1",
        b"/",
    ],
)
def test_no_request_line_escapes_the_handler(start: StartGateway, line: bytes) -> None:
    """The same for what stands first."""
    answer = raw(status_port(start(upstream=1)), line + b"\r\nHost: localhost\r\n\r\n")
    assert answer[:12] in {b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405"}


class Wire(StringTransport):
    """A transport that knows a half close and an abort."""

    aborted = False

    def loseWriteConnection(self) -> None:  # noqa: N802  the interface's name
        """Nothing more is written."""

    def abortConnection(self) -> None:
        self.aborted = True


def on_the_wire(site: Any) -> tuple[Any, Wire]:
    """A connection to the site, without sockets."""
    connection, wire = site.buildProtocol(None), Wire()
    connection.makeConnection(wire)
    return connection, wire


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ",
    ],
    ids=["body", "head"],
)
def test_who_sends_byte_by_byte_is_cut_off(start: StartGateway, head: bytes) -> None:
    """A request comes in a few reads; each read costs the relay a turn, and a body is not parsed at all."""
    gateway = start(upstream=1)
    site = StatusSite(gateway.service.sight, Clock(), Guard(Clock().seconds, maybeDeferred))
    connection, wire = on_the_wire(site)
    connection.dataReceived(head)
    fed = 0
    while not wire.aborted:
        fed += 1
        connection.dataReceived(b"1")
    assert fed == (9 if head.endswith(b"\r\n\r\n") else 64)
    assert wire.value().count(b"HTTP/1.1 200 OK") == (1 if head.endswith(b"\r\n\r\n") else 0)
    connection.connectionLost()
    assert not site.protocols


def test_connections_that_come_too_fast_wait_in_the_kernel(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is paused, and taken up again as the rate allows; nobody is turned away for it."""
    monkeypatch.setattr(site_module, "_BURST", 3.0)
    monkeypatch.setattr(site_module, "_RATE", 100.0)
    gateway = start(upstream=1)
    site = gateway.service.status_port._open.site
    paused: list[bool] = []
    monkeypatch.setattr(site.port, "stopReading", lambda stop=site.port.stopReading: (paused.append(True), stop()))
    assert [ask(gateway, "/healthz").status for _ in range(12)] == [200] * 12
    assert paused
    Leftovers(gateway).check()


def test_a_paused_port_can_be_closed(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer takes it up again."""
    monkeypatch.setattr(site_module, "_BURST", 1.0)
    monkeypatch.setattr(site_module, "_RATE", 0.001)
    gateway = start(upstream=1)
    leftovers = Leftovers(gateway)
    assert ask(gateway, "/healthz").status == 200
    site = gateway.service.status_port._open.site
    assert site._resume is not None
    gateway.call(gateway.service.change, changed(gateway))
    assert site._resume is None
    leftovers.check()


def test_a_mistake_in_an_answer_stays_there(
    start: StartGateway,
    start_broker: StartBroker,
    devices: list[Device],
    monkeypatch: pytest.MonkeyPatch,
    logged_errors: list[dict[str, Any]],
) -> None:
    """500 in words, a traceback in the log, and the sessions do not notice."""
    gateway = start(upstream=start_broker().port)
    devices.append(connected(gateway, "a"))
    monkeypatch.setattr(gateway.service.sight, "document", lambda query: 1 / 0)
    answer = ask(gateway)
    assert (answer.status, "Internal error" in answer.text) == (500, True)
    assert "Traceback" not in answer.text
    assert len(gateway.service.gateway.sessions) == 1
    assert len(logged_errors) == 1
    logged_errors.clear()


# ---- the endpoint


def test_without_an_endpoint_nothing_is_loaded() -> None:
    """twisted.web and prometheus_client cost memory; who does not look does not pay."""
    script = (
        "import sys; from twisted.internet import reactor; from gateway.config import from_mapping; "
        "from gateway.service import GatewayService; "
        "GatewayService(from_mapping({'upstream': [{'host': 'a'}], 'listen': [{'endpoint': '127.0.0.1:0'}]}), reactor)"
        ".startService(); print(sorted({'twisted.web', 'prometheus_client'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_status_endpoint_that_is_taken_does_not_keep_devices_away(
    start: StartGateway,
    start_broker: StartBroker,
    devices: list[Device],
    logged_errors: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in the log with the remedy; it is opened as soon as it is free."""
    monkeypatch.setattr("gateway.ops.web.port.RETRY_INTERVAL", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = start(upstream=start_broker().port, status={"endpoint": f"127.0.0.1:{port}"})
        devices.append(connected(gateway, "a"))
        assert gateway.service.status_port.port is None
    eventually(lambda: gateway.service.status_port.port, "the endpoint opens")
    assert ask(gateway, "/readyz").status == 200
    assert "status.endpoint: cannot listen" in logged_errors[0]["problems"]
    assert "ss -ltnp" in logged_errors[0]["problems"]
    logged_errors.clear()


def changed(gateway: RunningGateway, **status: Any) -> Any:
    """The gateway's configuration with another `[status]`."""
    upstream = gateway.config.upstream[0]
    return from_mapping(
        {
            "listen": [{"endpoint": "127.0.0.1:0"}],
            "upstream": [{"host": upstream.host, "port": upstream.port}],
            "status": status,
        }
    )


def test_a_new_configuration_moves_the_endpoint(start: StartGateway, tmp_path: Path) -> None:
    """Elsewhere, away, and back; unchanged it stays open, whatever else changes."""
    gateway = start(upstream=1)
    first = gateway.service.status_port.port
    gateway.call(gateway.service.change, changed(gateway, endpoint="127.0.0.1:0", public=True))
    assert gateway.service.status_port.port is first
    assert ask(gateway, Host="gateway.example").status == 200
    path = tmp_path / "status.sock"
    gateway.call(gateway.service.change, changed(gateway, endpoint=f"unix:{path}"))
    assert path.exists()
    gateway.call(gateway.service.change, changed(gateway))
    assert gateway.service.status_port.port is None
    eventually(lambda: not path.exists(), "the socket is gone")
    gateway.call(gateway.service.change, changed(gateway, endpoint="127.0.0.1:0"))
    assert ask(gateway, Host="gateway.example").status == 421


def test_an_endpoint_that_cannot_be_had_refuses_a_new_configuration(start: StartGateway, tmp_path: Path) -> None:
    """All stays as it was; and nothing stays open of one that is refused for something else."""
    gateway = start(upstream=1)
    before = gateway.service.status_port.port
    with pytest.raises(ConfigError, match=r"status\.endpoint: cannot listen on unix:/nonexistent/s"):
        gateway.call(gateway.service.change, changed(gateway, endpoint="unix:/nonexistent/s"))
    path = tmp_path / "status.sock"
    bad = from_mapping(
        {
            "listen": [{"endpoint": "unix:/nonexistent/mqtt"}],
            "upstream": [{"host": "a"}],
            "status": {"endpoint": f"unix:{path}"},
        }
    )
    with pytest.raises(ConfigError, match="listen"):
        gateway.call(gateway.service.change, bad)
    eventually(lambda: not path.exists(), "the socket is gone")
    assert gateway.service.status_port.port is before
    assert ask(gateway, "/healthz").status == 200


@pytest.mark.parametrize("is_reload", [True, False])
def test_a_file_that_keeps_a_reload_waiting_is_to_be_seen(
    start: StartGateway, logged_errors: list[dict[str, Any]], tmp_path: Path, is_reload: bool
) -> None:
    """As if its file system did not answer: told once, shown until it ends; what was requested meanwhile is done."""
    gateway = start(upstream=1)
    service = gateway.service
    os.mkfifo(fifo := tmp_path / "hanging\n.toml")
    reads: list[Path] = []

    def read(path: Path = fifo) -> Any:
        reads.append(path)
        path.read_bytes()
        return gateway.config

    answers: list[Any] = []

    def request() -> None:
        service.reload().addCallback(answers.append)

    if is_reload:
        service.reread = read
        gateway.call(request)
    else:
        service._looked = lambda _: [] if reads else (read(), [])[1]
    eventually(lambda: reads, "the file is being read")
    for _ in range(59):
        gateway.call(service._file_work.sweep)
    service.reread = lambda: (reads.append(fifo), gateway.config)[1]
    for _ in range(3):
        gateway.call(service._file_work.sweep)
        gateway.call(request)
    what = "A reload" if is_reload else "A check for changed files"
    document = ask(gateway).json
    (reason,) = document["reloads"]["wanting"]
    assert verdict(document).reasons[0] == reason.replace("a", "A", 1)
    assert reason.startswith(f"{what.replace('A', 'a', 1)} has not ended after 60 s, so no change")
    assert f"it is at {tmp_path}/hanging\\n.toml. If it stays there" in reason
    assert reason in gateway.call(lambda: service.status)
    assert value(ask(gateway, "/metrics").text, "reload_wanting") == 1
    assert [event["event"] for event in logged_errors] == ["files-hang"]
    logged_errors.clear()
    with fifo.open("wb"):
        pass
    expected = 4 if is_reload else 3
    eventually(lambda: len(answers) == expected, "all requests are answered")
    assert len(reads) == 2
    assert ask(gateway).json["reloads"]["wanting"] == []
    assert value(ask(gateway, "/metrics").text, "reload_wanting") == 0


def test_a_reload_that_was_refused_is_to_be_seen(start: StartGateway, logged_errors: list[dict[str, Any]]) -> None:
    """Until a better one comes: whoever changed the file and went home finds it here."""
    gateway = start(upstream=1)
    service = gateway.service

    def missing() -> Any:
        raise ConfigError(["tls.ca_file: ca.pem cannot be read"])

    service.reread = missing
    gateway.call(service.reload)
    document = ask(gateway).json
    assert (document["reloads"]["done"], document["reloads"]["refused"]) == (0, 1)
    assert "tls.ca_file: ca.pem cannot be read" in ask(gateway, "/").text
    assert verdict(document).reasons[0] == (
        "Reload refused, previous configuration still active: tls.ca_file: ca.pem cannot be read"
    )
    assert value(ask(gateway, "/metrics").text, "reloads_total", result="refused") == 1
    service.reread = lambda: gateway.config
    gateway.call(service.reload)
    document = ask(gateway).json
    assert document["reloads"] == {"done": 1, "refused": 1, "wanting": []}
    logged_errors.clear()


def test_nothing_stays_behind(start: StartGateway, start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection, no timer, after many who looked."""
    monkeypatch.setattr(site_module, "_LIFETIME", 3600)
    gateway = start(upstream=start_broker().port)
    ask(gateway)
    leftovers = Leftovers(gateway)
    for path in ("/", "/status", "/metrics", "/healthz", "/readyz", "/nothing"):
        ask(gateway, path)
    leftovers.check()


# ---- certificates


def test_the_brokers_certificate_is_warned_of_after_it_was_seen(
    start: StartGateway,
    start_broker: StartBroker,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the log, on the page and in the document, by a sweep of the running gateway."""
    monkeypatch.setattr("gateway.ops.expiry._LOOK_AGAIN", 0.0)
    root = certify(subject="root", ca=True, names=(), purposes=(), valid_for=400)
    leaf = certify(root, subject="broker", valid_for=10)
    (tmp_path / "ca.pem").write_bytes(root.pem)
    gateway = start(upstream=start_broker(tls=leaf.server()).port, ca_file=tmp_path / "ca.pem")
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    connected(gateway, "a").close()
    eventually(lambda: [each for each in events if each.get("event") == "certificate-ends"], "the warning")
    globalLogPublisher.removeObserver(events.append)
    (warning,) = (each for each in events if each.get("event") == "certificate-ends")
    assert (warning["role"], warning["subject"]) == ("broker", "CN=broker")
    certificates = {each["role"]: each for each in ask(gateway).json["certificates"]}
    assert (certificates["broker"]["state"], certificates["ca"]["state"]) == ("ends soon", "valid")
    page = ask(gateway, "/").text
    assert "something needs attention" in page
    assert f"{warning['days_left']} days left" in page
