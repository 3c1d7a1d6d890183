"""What is logged about sessions: every field, one line that nobody can forge, few lines in a storm, and no secret."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, formatEvent, globalLogPublisher, jsonFileLogObserver

from gateway.errors import EndReason, UpstreamFailure
from gateway.mqtt.packets import describe_disconnect
from gateway.ops.journal import FULL_RECORDS, FULL_RECORDS_OF_STANDING, WINDOW, Journal
from gateway.ops.ledger import Ledger
from gateway.session.record import SessionRecord
from gateway.text import printable
from tests import mqtt_packets as mqtt
from tests.facts import PEER
from tests.harness import Broker, BrokerConnection, Device, RunningGateway, accept_session

ENDINGS = Path(__file__).resolve().parent.parent / "docs" / "endings.md"

RECORD = SessionRecord(
    number=7,
    device_address="192.168.1.9:40123",
    started=100.0,
    listener="hall 3",
    via="10.0.0.5:40112",
    client_identifier="pump-3",
    protocol_version="5.0",
    upstream="broker.example:8883",
    upstream_address="192.0.2.1:8883",
    upstream_certificate="CN=plant-pump-3",
    upstream_username="plant",
    upstream_client_identifier="plant-pump-3",
    peer=PEER,
    connect_seconds=0.001,
    dns_seconds=0.002,
    tcp_seconds=0.003,
    tls_seconds=0.004,
    connack_seconds=0.005,
    duration=3.5,
    bytes_up=1000,
    bytes_down=2000,
    packets_up=10,
    packets_down=20,
    reason=EndReason.DEVICE_LOST,
    detail="closed",
)

# Who, by which way, to whom, how long each step took, how much passed, and why it ended.
FIELDS = {
    "session": 7,
    "device_address": "192.168.1.9:40123",
    "listener": "hall 3",
    "via": "10.0.0.5:40112",
    "client_identifier": "pump-3",
    "protocol_version": "5.0",
    "upstream": "broker.example:8883",
    "upstream_address": "192.0.2.1:8883",
    "upstream_certificate": "CN=plant-pump-3",
    "upstream_username": "plant",
    "upstream_client_identifier": "plant-pump-3",
    "subject": "CN=broker",
    "matched_san": "DNS:broker.example",
    "issuer": "CN=Test CA",
    "not_after": "2030-01-02T00:00:00+00:00",
    "tls_version": "TLSv1.3",
    "cipher": "TLS_AES_256_GCM_SHA384",
    "connect_seconds": 0.001,
    "dns_seconds": 0.002,
    "tcp_seconds": 0.003,
    "tls_seconds": 0.004,
    "connack_seconds": 0.005,
    "duration": 3.5,
    "bytes_up": 1000,
    "bytes_down": 2000,
    "packets_up": 10,
    "packets_down": 20,
    "withheld": 0,
    "offline": False,
    "reason": "device-lost",
    "detail": "closed",
}


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    """Every event that is logged while the test runs."""
    seen: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(seen.append)
    yield seen
    globalLogPublisher.removeObserver(seen.append)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(clock: Clock) -> Journal:
    return Journal(clock.seconds)


def unfinished(reason: EndReason = EndReason.TCP_REFUSED, **fields: Any) -> SessionRecord:
    """A session that never stood."""
    return attrs.evolve(RECORD, peer=None, connack_seconds=None, reason=reason, **fields)


def lines(events: list[dict[str, Any]]) -> list[str]:
    return [formatEvent(event) for event in events]


def test_both_records_carry_every_field(journal: Journal, events: list[dict[str, Any]]) -> None:
    """Under its own name, as a plain value, the broker's facts beside the others."""
    journal.session_started(attrs.evolve(RECORD, reason=None, duration=None, detail=""))
    journal.session_ended(RECORD)
    start, end = events
    assert (start["event"], end["event"]) == ("session-start", "session-end")
    assert {name: end[name] for name in FIELDS} == FIELDS
    at_start = FIELDS | {"reason": None, "duration": None, "detail": ""}
    assert {name: start[name] for name in FIELDS} == at_start


def test_a_record_is_an_event_as_a_logger_emits_it(journal: Journal, events: list[dict[str, Any]]) -> None:
    """It is made without `Logger.emit`, and observers are not to notice."""
    Logger(namespace="gateway").warn("{line}", line="x", event="session-end")
    journal.session_ended(attrs.evolve(RECORD, reason=EndReason.UPSTREAM_REFUSED))
    emitted, made = events
    assert emitted.keys() <= made.keys()
    for name in ("log_format", "log_level", "log_namespace", "log_source", "event"):
        assert made[name] == emitted[name], name
    assert isinstance(made["log_logger"], Logger)
    assert 0 <= made["log_time"] - emitted["log_time"] < 60


def test_records_are_json(journal: Journal) -> None:
    """Twisted's JSON observer writes each field as it is, with no object among them."""
    written = StringIO()
    observer = jsonFileLogObserver(written, recordSeparator="")
    globalLogPublisher.addObserver(observer)
    journal.session_ended(RECORD)
    globalLogPublisher.removeObserver(observer)
    parsed = json.loads(written.getvalue())
    assert {name: parsed[name] for name in FIELDS} == FIELDS


def test_a_line_tells_a_person_what_matters(journal: Journal, events: list[dict[str, Any]]) -> None:
    """Who, where to, verified as what, how long, how much, and why it ended."""
    journal.session_started(RECORD)
    journal.session_ended(RECORD)
    journal.session_ended(unfinished())
    start, end, failed = lines(events)
    for part in ("session 7", "192.168.1.9:40123", '"pump-3"', "MQTT 5.0", "DNS:broker.example", "TLSv1.3", "tls 4 ms"):
        assert part in start
    for part in ("session 7", "device-lost", "closed", "10 packets 1000 bytes", "20 packets 2000 bytes", "3.5 s"):
        assert part in end
    identity = 'as CN=plant-pump-3, user name "plant", Client Identifier "plant-pump-3"'
    assert identity in start
    assert identity in failed
    for part in ("tcp-refused", "broker.example:8883", EndReason.TCP_REFUSED.remedy):
        assert part in failed


def test_a_stored_device_without_a_broker_is_not_told_to_be_connected_to_one(
    journal: Journal, events: list[dict[str, Any]]
) -> None:
    """Whatever broker was tried for it before."""
    record = SessionRecord(1, "192.0.2.9:1", 0.0, client_identifier="pump-3", upstream="broker.example:8883")
    record.offline = True
    journal.session_started(record)
    assert "without a broker" in lines(events)[-1]
    assert "broker.example" not in lines(events)[-1]


@pytest.mark.parametrize(
    ("record", "level"),
    [
        (RECORD, LogLevel.info),
        (unfinished(), LogLevel.warn),
        (unfinished(EndReason.GATEWAY_STOPPING), LogLevel.info),
        (unfinished(EndReason.DEVICE_DISABLED), LogLevel.info),
    ],
)
def test_what_needs_attention_is_a_warning(
    journal: Journal, events: list[dict[str, Any]], record: SessionRecord, level: Any
) -> None:
    """A session that could not stand is; one that stood and ended is not."""
    journal.session_ended(record)
    assert events[0]["log_level"] is level


def test_a_disabled_device_that_keeps_coming_is_logged_quietly(
    journal: Journal, clock: Clock, events: list[dict[str, Any]]
) -> None:
    """An operator decided so: no warning, not even of how often, and no remedy."""
    for number in range(FULL_RECORDS + 7):
        journal.session_ended(unfinished(EndReason.DEVICE_DISABLED, number=number))
    clock.advance(WINDOW)
    journal.sweep()
    assert len(events) == FULL_RECORDS + 1
    assert events[-1]["count"] == 7
    assert {event["log_level"] for event in events} == {LogLevel.info}
    assert not any("enable" in line for line in lines(events))


def test_a_remedy_names_the_device_in_a_command_that_can_be_typed(
    journal: Journal, events: list[dict[str, Any]]
) -> None:
    """Quoted for the shell; one that cannot be typed is in no command."""
    for name in ("pump 3", "x\x1b[2J", "-x", "", "y" * 300):
        journal.session_ended(unfinished(EndReason.DEVICE_UNKNOWN, client_identifier=name))
    first, *others = lines(events)
    assert EndReason.DEVICE_UNKNOWN.remedy.replace("add ID`", "add 'pump 3'`") in first
    assert "--ca-cert" in first
    assert all(line.endswith(EndReason.DEVICE_UNKNOWN.remedy) for line in others)


def test_a_mistake_of_the_gateway_is_an_error(
    journal: Journal, events: list[dict[str, Any]], logged_errors: list[dict[str, Any]]
) -> None:
    """Also when the session stood."""
    journal.session_ended(attrs.evolve(RECORD, reason=EndReason.INTERNAL_ERROR))
    assert events[0]["log_level"] is LogLevel.error
    logged_errors.clear()


def test_a_storm_is_a_handful_of_lines_and_a_summary(
    journal: Journal, clock: Clock, events: list[dict[str, Any]]
) -> None:
    """A thousand failures of one cause; another cause among them is not lost."""
    for number in range(1000):
        journal.session_ended(unfinished(number=number))
    journal.session_ended(unfinished(EndReason.DNS_FAILED))
    assert len(events) == FULL_RECORDS + 1
    assert "dns-failed" in lines(events)[-1]
    clock.advance(WINDOW - 1)
    journal.sweep()
    assert len(events) == FULL_RECORDS + 1
    clock.advance(1)
    journal.sweep()
    (summary,) = events[FULL_RECORDS + 1 :]
    assert (summary["event"], summary["count"], summary["reason"]) == ("records-withheld", 995, "tcp-refused")
    assert (
        f"995 more sessions failed before CONNACK in the last 60 s: tcp-refused. {EndReason.TCP_REFUSED.meaning}"
        in lines(events)[-1]
    )


def test_after_a_window_the_first_failures_are_told_in_full_again(
    journal: Journal, clock: Clock, events: list[dict[str, Any]]
) -> None:
    """And quiet windows say nothing."""
    for _ in range(3):
        journal.session_ended(unfinished())
    clock.advance(WINDOW)
    journal.sweep()
    clock.advance(WINDOW)
    journal.sweep()
    assert len(events) == 3
    for _ in range(FULL_RECORDS):
        journal.session_ended(unfinished())
    assert len(events) == 3 + FULL_RECORDS


def test_a_storm_at_the_door_is_a_handful_of_lines_too(
    journal: Journal, clock: Clock, events: list[dict[str, Any]]
) -> None:
    """With the address and the remedy."""
    for number in range(1000):
        journal.refused(EndReason.NETWORK_NOT_ALLOWED, f"8.8.8.8:{number}")
    assert len(events) == FULL_RECORDS
    assert lines(events)[0].startswith("connection from 8.8.8.8:0 refused: network-not-allowed. ")
    clock.advance(WINDOW)
    journal.sweep()
    assert events[-1]["count"] == 995


def test_what_was_wrong_with_a_connection_is_told(journal: Journal, events: list[dict[str, Any]]) -> None:
    """Where more is known than the reason."""
    journal.refused(EndReason.NO_PROXY_HEADER, "10.0.0.5:40112", "its line does not end with CRLF")
    assert lines(events) == [
        "connection from 10.0.0.5:40112 refused: no-proxy-header (its line does not end with CRLF). "
        + EndReason.NO_PROXY_HEADER.remedy
    ]
    assert events[0]["detail"] == "its line does not end with CRLF"


def test_the_load_balancer_stands_beside_the_device(journal: Journal, events: list[dict[str, Any]]) -> None:
    """So that its own log can be found, too; a device that came by itself has none."""
    journal.session_started(RECORD)
    journal.session_started(attrs.evolve(RECORD, via=""))
    behind, alone = lines(events)
    assert behind.startswith(f"session 7 {RECORD.device_address} via 10.0.0.5:40112 ")
    assert alone.startswith(f'session 7 {RECORD.device_address} "')


def test_of_a_storm_of_standing_sessions_a_hundred_are_recorded_and_the_rest_counted(
    journal: Journal, events: list[dict[str, Any]]
) -> None:
    """A broker that restarts ends all its sessions at once; the log of an edge box is small."""
    for number in range(1000):
        journal.session_ended(attrs.evolve(RECORD, number=number, reason=EndReason.UPSTREAM_LOST))
    assert len(events) == FULL_RECORDS_OF_STANDING
    journal.flush()
    assert events[-1]["count"] == 1000 - FULL_RECORDS_OF_STANDING
    assert "established sessions ended" in events[-1]["what"]


def test_sessions_that_their_devices_end_are_always_recorded(journal: Journal, events: list[dict[str, Any]]) -> None:
    """That is no failure, and a device that connects for each message is counted by its records."""
    for number in range(1000):
        journal.session_ended(attrs.evolve(RECORD, number=number, reason=EndReason.DEVICE_DISCONNECT))
    assert len(events) == 1000


@pytest.mark.parametrize(
    ("reason", "level", "remedy"),
    [
        (EndReason.UPSTREAM_LOST, "info", False),
        (EndReason.MALFORMED_PACKET, "warn", True),
        (EndReason.PACKET_TOO_LARGE, "warn", True),
    ],
)
def test_a_standing_session_that_ends_by_a_fault_warns_and_says_what_to_do(
    journal: Journal, events: list[dict[str, Any]], reason: EndReason, level: str, remedy: bool
) -> None:
    """What is everyday life is told without a remedy."""
    journal.session_ended(attrs.evolve(RECORD, reason=reason))
    assert events[0]["log_level"].name == level
    assert (reason.remedy in lines(events)[0]) is remedy


def test_a_lenient_rule_is_no_remedy_for_a_connect() -> None:
    """It is always read strictly: a remedy that names such a rule says for what."""
    remedies = [reason.remedy for reason in EndReason if "lenient" in reason.remedy]
    assert remedies
    assert all("after" in remedy.partition('conformance = "lenient"')[0] for remedy in remedies)


def test_a_broker_that_was_passed_over_is_told_once_a_minute_or_so(
    journal: Journal, events: list[dict[str, Any]]
) -> None:
    """A preferred broker whose certificate went bad must not go unseen because the next one serves."""
    failure = UpstreamFailure(EndReason.TLS_EXPIRED, "the broker's certificate: expired\n")
    for _ in range(50):
        journal.passed_over("first.example:8883", failure)
    assert len(events) == FULL_RECORDS
    assert lines(events)[0].startswith("upstream first.example:8883 failed: tls-expired (the broker's certificate: ")
    assert "; another broker was used. " in lines(events)[0]
    journal.flush()
    assert events[-1]["count"] == 50 - FULL_RECORDS
    assert "first.example:8883" in events[-1]["what"]


HOSTILE = "a\nsession 8 10.0.0.1 is connected\r\x1b[2J\x1b]0;x\x07\u202egnp.exe\u2028\x85\ud800\x00{line}\\n"


def test_a_broker_that_ends_all_its_sessions_is_one_line(
    journal: Journal, clock: Clock, events: list[dict[str, Any]]
) -> None:
    """Also if devices are back before it is written; not for one session alone, nor while another one stays."""

    def lost() -> list[int]:
        clock.advance(1)
        journal.sweep()
        return [event["count"] for event in events if event.get("event") == "upstream-sessions-lost"]

    def end(*numbers: int, upstream: str = "a:8883", reason: EndReason = EndReason.UPSTREAM_LOST) -> None:
        for number in numbers:
            journal.session_ended(attrs.evolve(RECORD, number=number, upstream=upstream, reason=reason))

    for number, upstream in ((1, "a:8883"), (2, "a:8883"), (3, "a:8883"), (4, "b:8883"), (5, "c:8883"), (6, "c:8883")):
        journal.session_started(attrs.evolve(RECORD, number=number, upstream=upstream))
    end(1, 2)
    end(4, upstream="b:8883")
    end(5, 6, upstream="c:8883", reason=EndReason.DEVICE_LOST)
    assert lost() == []
    end(3)
    journal.session_started(attrs.evolve(RECORD, number=7, upstream="a:8883"))
    assert lost() == [3]
    assert any(line.startswith("upstream a:8883 ") for line in lines(events))
    end(7)
    assert lost() == [3]


@pytest.mark.parametrize(
    ("codes", "is_told"),
    [
        ((0x8B, 0x8B), True),
        ((0x00, 0x98), True),
        ((0x80, 0x9D), True),
        ((0x82, 0x94), False),
        ((0x8B, 0x82, 0x81), False),
        ((0x8B, 0x8B, 0x82), False),
        ((0x8E, 0x8E), False),
        ((0x87, 0x97), False),
        ((0xA0, 0xA0), False),
    ],
)
def test_a_broker_that_blames_its_clients_has_not_gone_away(
    journal: Journal, clock: Clock, events: list[dict[str, Any]], codes: tuple[int, ...], is_told: bool
) -> None:
    """Its sessions end one after the other, each by its own fault."""
    for number in range(len(codes)):
        journal.session_started(attrs.evolve(RECORD, number=number))
    for number, code in enumerate(codes):
        detail = f"0x{code:02X}, {describe_disconnect(code)} (a DISCONNECT of MQTT 5.0, which 3.x does not have)"
        reason = EndReason.UPSTREAM_DISCONNECT
        journal.session_ended(attrs.evolve(RECORD, number=number, reason=reason, detail=detail))
    clock.advance(1)
    journal.sweep()
    assert any(event.get("event") == "upstream-sessions-lost" for event in events) is is_told


def test_a_hostile_client_identifier_cannot_forge_a_line(journal: Journal, events: list[dict[str, Any]]) -> None:
    """No new line, no escape sequence, no reversed text, no format: each is shown as what it is."""
    for record in (RECORD, unfinished()):
        hostile = attrs.evolve(record, client_identifier=HOSTILE, detail=HOSTILE)
        journal.session_started(hostile)
        journal.session_ended(hostile)
    assert len(events) == 4
    for line in lines(events):
        assert line.isprintable()
        assert r"a\nsession 8" in line
        assert r"\x1b[2J" in line
        assert r"\u202egnp" in line
        assert r"{line}\\n" in line
    assert events[0]["client_identifier"] == HOSTILE


def test_a_detail_is_not_escaped_twice() -> None:
    """A peer's text in it is escaped already; whatever is not is escaped here. So in the log and for the page."""
    events: list[dict[str, Any]] = []
    clock = Clock()
    ledger = Ledger(Journal(clock.seconds, Logger(observer=events.append)), clock.seconds)
    once = printable("a\\b") + " \x1b"
    failure = UpstreamFailure(EndReason.TLS_NAME_MISMATCH, once)
    ledger.session_ended(unfinished(EndReason.TLS_NAME_MISMATCH, detail=once))
    ledger.refused(EndReason.NO_PROXY_HEADER, "10.0.0.1:5", once)
    ledger.passed_over("a:1", failure)
    ledger.left_alone("a:1", failure, 2.0)
    assert len(events) == 4
    for line in lines(events):
        assert r"(a\\b \x1b)" in line
    assert {end.detail for end in ledger.ends()} == {r"a\\b \x1b"}


def test_a_long_client_identifier_does_not_flood_the_log(journal: Journal, events: list[dict[str, Any]]) -> None:
    """MQTT allows 65,535 bytes of it."""
    journal.session_ended(attrs.evolve(RECORD, client_identifier="x" * 65535, detail="y" * 65535))
    assert len(lines(events)[0]) < 1000


SECRETS = ("hunter2-password", "payload-of-the-will", "payload-up", "payload-down", "saslsecret")


def shown(events: list[dict[str, Any]]) -> str:
    """All that an observer can get out of events: lines, fields, tracebacks."""
    return "\n".join(formatEvent(event) + repr(event) + str(event.get("log_failure", "")) for event in events)


def test_no_secret_reaches_a_log(
    start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker], events: list[dict[str, Any]]
) -> None:
    """Passwords, Wills, payloads and authentication data are in no event of a run with all kinds of ends."""

    def serve(connection: BrokerConnection) -> None:
        packet = connection.read_packet()
        if b"refused" in packet:
            connection.send(mqtt.connack(version=5, code=0x86))
        elif b"garbage" in packet:
            connection.send(b"payload-down")
        else:
            connection.send(mqtt.connack(version=5) + mqtt.publish(payload=b"payload-down", version=5))
            if b"disconnected" in packet:
                connection.send(mqtt.disconnect(code=0x8E))
            connection.read_to_end()

    gateway = start_gateway(upstream=start_broker(serve=serve).port)
    credentials: dict[str, Any] = {
        "version": 5,
        "username": "user",
        "password": b"hunter2-password",
        "will_topic": "will",
        "will_payload": b"payload-of-the-will",
        "properties": mqtt.text(0x15, "SASL") + b"\x16" + mqtt.binary(b"saslsecret"),
    }
    endings: dict[str, bytes] = {
        "well": mqtt.publish(payload=b"payload-up", version=5) + mqtt.disconnect(),
        "malformed": mqtt.publish(payload=b"payload-up", version=5) + b"\x00payload-up",
        "lost": mqtt.publish(payload=b"payload-up", version=5)[:-1],
        "refused": b"",
        "garbage": b"",
        "disconnected": b"",
    }
    for name, ending in endings.items():
        with Device(gateway.port) as device:
            device.send(mqtt.connect(name, **credentials))
            if ending:
                assert device.read(5) == mqtt.connack(version=5)
                device.send(ending)
            if name == "lost":
                device.close()
            else:
                device.read_to_end()
    for broken in (
        mqtt.connect(**credentials, extra=b"hunter2-password"),
        mqtt.connect(**credentials, flags=0xFF),
        mqtt.connect(**credentials, name=b"hunter"),
        mqtt.connect(**credentials, level=9),
    ):
        with Device(gateway.port) as device:
            device.send(broken)
            device.read_to_end()
    gateway.wait_ended(len(endings) + 4)
    gateway.wait_empty()
    assert len({record.reason for record in gateway.ended}) >= 7
    everything = shown(events) + repr(gateway.ended)
    assert "malformed-packet" in everything
    for secret in SECRETS:
        assert secret not in everything


def test_no_secret_reaches_a_traceback(
    start_gateway: Callable[..., RunningGateway],
    start_broker: Callable[..., Broker],
    events: list[dict[str, Any]],
    logged_errors: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the gateway makes a mistake while it holds them."""
    gateway = start_gateway(upstream=start_broker(serve=accept_session).port, relay={"engine": "python"})

    def mistake(session: Any, *_: object) -> None:
        raise ZeroDivisionError

    with Device(gateway.port) as device:
        device.send(mqtt.connect(username="u", password=b"hunter2-password"))
        assert device.read(4) == mqtt.connack()
        monkeypatch.setattr("gateway.session.session.Session._relay_up", mistake)
        device.send(mqtt.publish(payload=b"payload-up"))
        assert device.read_to_end() == b""
    assert gateway.wait_ended().reason is EndReason.INTERNAL_ERROR
    gateway.wait_empty()
    everything = shown(events)
    assert "ZeroDivisionError" in everything
    for secret in SECRETS:
        assert secret not in everything
    logged_errors.clear()


def lose(journal: Journal) -> None:
    """Three sessions, which the broker ends."""
    records = [attrs.evolve(RECORD, reason=EndReason.UPSTREAM_LOST, upstream="broker-1.example:8883")] * 3
    for record in records:
        journal.session_started(record)
    for record in records:
        journal.session_ended(record)
    journal.sweep()


def test_the_lines_that_the_document_shows(journal: Journal, clock: Clock, events: list[dict[str, Any]]) -> None:
    """docs/endings.md has each kind of line as it is written."""
    failure = UpstreamFailure(EndReason.TLS_EXPIRED, "the broker's certificate: expired (OpenSSL error 10)")
    kinds = {
        "established": lambda: journal.session_ended(attrs.evolve(RECORD, via="")),
        "failed": lambda: journal.session_ended(
            unfinished(
                EndReason.TLS_EXPIRED,
                via="",
                detail=failure.detail,
                upstream_address="",
                upstream_username="",
                upstream_client_identifier="",
            )
        ),
        "refused": lambda: journal.refused(EndReason.NETWORK_NOT_ALLOWED, "203.0.113.9:51200"),
        "failover": lambda: journal.passed_over("broker-1.example:8883", failure),
        "lost": lambda: lose(journal),
        "back-off": lambda: journal.left_alone("broker-1.example:8883", failure, 12.5),
    }
    expected = {}
    for kind, write in kinds.items():
        write()
        expected[kind] = lines(events)[-1]
    for _ in range(FULL_RECORDS + 12):
        journal.refused(EndReason.RATE_LIMITED, "192.168.1.9:40124")
    clock.advance(WINDOW)
    journal.sweep()
    expected["withheld"] = lines(events)[-1]
    shown = dict(re.findall(r"<!-- line: ([^>]+) -->\n```\n(.*)\n```", ENDINGS.read_text()))
    assert shown == expected


def test_a_broker_that_is_left_alone_is_told_of_with_the_remedy(journal: Journal, events: list[dict[str, Any]]) -> None:
    """And when it serves again; what a stranger wrote is escaped."""
    journal.left_alone("first.example:8883", UpstreamFailure(EndReason.TLS_EXPIRED, "certificate\n\x1b[2J"), 0.75)
    journal.serves_again("first.example:8883")
    left, again = lines(events)
    assert left.startswith("upstream first.example:8883 failed: tls-expired")
    assert "; backing off, next attempt in 0.8 s. " in left
    assert r"(certificate\n\x1b[2J)" in left
    assert left.endswith(EndReason.TLS_EXPIRED.remedy)
    assert again == "upstream first.example:8883 is available again"


def test_a_broker_that_comes_and_goes_does_not_fill_the_disk(journal: Journal, events: list[dict[str, Any]]) -> None:
    """Some lines a minute in both directions, and then how many more there were."""
    for _ in range(1000):
        journal.left_alone("first.example:8883", UpstreamFailure(EndReason.TCP_REFUSED), 0.5)
        journal.serves_again("first.example:8883")
    assert len(events) == 2 * FULL_RECORDS
    journal.flush()
    assert events[-1]["count"] == 1000 - FULL_RECORDS
    assert "back-offs from first.example:8883" in events[-1]["what"]


def test_starts_and_orderly_ends_can_be_limited_or_switched_off(clock: Clock, events: list[dict[str, Any]]) -> None:
    """A fleet that connects, publishes and leaves; failures are told as before, and a reload may change it."""
    wanted = "limited"
    journal = Journal(clock.seconds, sessions=lambda: wanted)

    def fleet() -> None:
        for number in range(300):
            journal.session_started(attrs.evolve(RECORD, number=number))
            journal.session_ended(attrs.evolve(RECORD, number=number, reason=EndReason.DEVICE_DISCONNECT))
        journal.session_ended(RECORD)

    fleet()
    assert len(events) == 2 * FULL_RECORDS_OF_STANDING + 1
    journal.flush()
    counted = [(event["what"], event["count"], event["reason"]) for event in events[-2:]]
    assert counted == [("established sessions ended", 200, "device-disconnect"), ("sessions started", 200, None)]
    assert {event["log_level"].name for event in events[-2:]} == {"info"}
    assert "200 more sessions started in the last 0 s" in lines(events)
    events.clear()
    wanted = "failures"
    fleet()
    journal.flush()
    assert [event["reason"] for event in events] == ["device-lost"]
    events.clear()
    wanted = "all"
    fleet()
    assert len(events) == 601


@pytest.mark.parametrize(("count", "shown"), [(0, "0 packets"), (1, "1 packet "), (2, "2 packets")])
def test_one_packet_is_no_packets(journal: Journal, events: list[dict[str, Any]], count: int, shown: str) -> None:
    """A number and its noun agree in the line of an end."""
    journal.session_ended(attrs.evolve(RECORD, packets_up=count, packets_down=count))
    (line,) = lines(events)
    assert f"up {shown}" in line
    assert f"down {shown}" in line
