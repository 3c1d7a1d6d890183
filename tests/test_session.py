"""The session's rules with sides that only remember, on a virtual clock: no reactor, no sockets, no TLS."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType
from typing import Any

import pytest
from twisted.internet.task import Clock

from gateway.config import Limits, Timeouts
from gateway.errors import EndReason, UpstreamFailure
from gateway.mqtt.inspector import TopicRules
from gateway.mqtt.packets import ProtocolVersion
from gateway.mqtt.topics import TopicFilters
from gateway.session.record import Dial, SessionRecord, Traffic
from gateway.session.session import TRANSITIONS, Session, State
from gateway.session.treatment import Treatment
from tests import mqtt_packets as mqtt
from tests.facts import PEER

UNAVAILABLE = {3: b"\x20\x02\x00\x03", 4: b"\x20\x02\x00\x03", 5: b"\x20"}
VERSIONS = (3, 4, 5)
EPOCH = 1000.0


class RememberingSide:
    """A `Side` that does nothing but remember."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.held = False
        self.choked = False
        self.behind = False
        self.closed = False
        self.aborted = False
        self.unread = False
        self.checked: list[float] = []

    def check(self, now: float) -> None:
        self.checked.append(now)

    @property
    def reading(self) -> bool:
        return not (self.held or self.choked)

    @property
    def bytes(self) -> bytes:
        return b"".join(self.written)

    def write(self, data: bytes) -> None:
        assert not self.closed, "nothing is written to a side that is closed"
        self.written.append(data)

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False

    def limit_reads(self, size: int) -> None:
        self.largest_read = size

    def go_on_later(self) -> None:
        self.behind = True

    def write_last(self, data: bytes) -> None:
        self.write(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class RememberingJournal:
    """A `Journal` that only remembers."""

    def __init__(self) -> None:
        self.started: list[SessionRecord] = []
        self.ended: list[SessionRecord] = []

    def session_started(self, record: SessionRecord) -> None:
        self.started.append(record)

    def session_ended(self, record: SessionRecord) -> None:
        self.ended.append(record)


class Attempt:
    """An attempt to reach the upstream."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Bench:
    """A session and all that it touches.  The methods take it a step further each."""

    def __init__(self, *, limits: Limits | None = None, timeouts: Timeouts | None = None) -> None:
        self.clock = Clock()
        self.clock.advance(EPOCH)  # A clock may show anything, and never began at 0.
        self.device = RememberingSide()
        self.upstream = RememberingSide()
        self.journal = RememberingJournal()
        self.attempts: list[Attempt] = []
        self.gone = 0
        self.session = Session(
            SessionRecord(1, "192.0.2.7:40000", self.clock.seconds()),
            self.device,
            self._dial,
            self.journal,
            self._gone,
            self.clock.seconds,
            limits or Limits(),
            timeouts or Timeouts(),
        )

    def _dial(self, session: Session) -> Attempt:
        self.attempts.append(Attempt())
        return self.attempts[-1]

    def _gone(self, session: Session) -> None:
        self.gone += 1

    @property
    def state(self) -> State:
        return self.session.state

    @property
    def reason(self) -> EndReason | None:
        assert len(self.journal.ended) <= 1, "a session ends once"
        return self.journal.ended[0].reason if self.journal.ended else None

    def connect(self, **packet: Any) -> Bench:
        self.session.device_received(mqtt.connect(**packet))
        return self

    def verified(self, **packet: Any) -> Bench:
        """CONNECT has come, and the broker is verified."""
        self.connect(**packet)
        self.session.upstream_verified(self.upstream, PEER)
        return self

    def relaying(self, *, connack: bytes | None = None, **packet: Any) -> Bench:
        """CONNACK has come, too; what was written until then is forgotten."""
        self.verified(**packet)
        self.session.upstream_received(connack or mqtt.connack(version=packet.get("version", 4)))
        assert self.state is State.RELAYING
        self.device.written.clear()
        self.upstream.written.clear()
        return self

    def pass_seconds(self, seconds: float, *, step: float = 1.0) -> None:
        """Let time pass, with a sweep each `step` seconds."""
        end = self.clock.seconds() + seconds
        while self.clock.seconds() < end:
            self.clock.advance(step)
            self.session.sweep(self.clock.seconds())


def fails(bench: Bench, reason: EndReason = EndReason.TCP_REFUSED, detail: str = "nobody there") -> None:
    bench.session.upstream_failed(UpstreamFailure(reason, detail))


def breaks(bench: Bench, reason: EndReason = EndReason.UPSTREAM_LOST, detail: str = "reset") -> None:
    bench.session.upstream_broken(UpstreamFailure(reason, detail))


# ---- WAIT_CONNECT


def test_nothing_happens_before_connect_is_whole() -> None:
    """Neither side is written to, and nobody is dialled, until the last byte of CONNECT."""
    bench = Bench()
    packet = mqtt.connect()
    for index in range(len(packet) - 1):
        bench.session.device_received(packet[index : index + 1])
        assert bench.state is State.WAIT_CONNECT
    assert not bench.attempts
    bench.session.device_received(packet[-1:])
    assert bench.state is State.DIALLING
    assert len(bench.attempts) == 1
    assert bench.device.held
    assert not bench.device.written


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        mqtt.publish(),
        mqtt.pingreq(),
        mqtt.disconnect(),
        b"\x00\x00",
    ],
)
def test_what_is_no_connect_first_is_closed_without_a_word(stranger: bytes) -> None:
    """A device that does not begin with CONNECT gets the close and nothing else; nobody is dialled for it."""
    bench = Bench()
    bench.session.device_received(stranger)
    assert bench.reason is EndReason.NOT_MQTT
    assert bench.device.closed
    assert not bench.device.written
    assert not bench.attempts


@pytest.mark.parametrize(
    "malformed",
    [
        mqtt.connect(length_size=5),
        mqtt.connect(extra=b"x"),
        mqtt.connect(flags=0b0000_0011),
        mqtt.connect(flags=0b0001_1110),
        mqtt.connect(name=b"HTTP"),
        mqtt.connect(b"\xff\xfe"),
        b"\x11" + mqtt.connect()[1:],
    ],
)
def test_a_malformed_connect_is_closed_without_a_word(malformed: bytes) -> None:
    """There is no CONNACK for what cannot be read (MQTT 3.1.1 §4.8)."""
    bench = Bench()
    bench.session.device_received(malformed)
    assert bench.reason is EndReason.MALFORMED_PACKET
    assert bench.device.closed
    assert not bench.device.written
    assert not bench.attempts


@pytest.mark.parametrize(
    ("level", "answer"),
    [(0, b"\x20\x02\x00\x01"), (2, b"\x20\x02\x00\x01"), (6, b"\x20\x03\x00\x84\x00"), (0x85, b"\x20\x03\x00\x84\x00")],
)
def test_an_unknown_level_is_told_so(level: int, answer: bytes) -> None:
    """The device gets CONNACK 0x01 or 0x84, then the close."""
    bench = Bench().connect(level=level)
    assert bench.reason is EndReason.UNSUPPORTED_PROTOCOL_VERSION
    assert bench.device.bytes == answer
    assert bench.device.closed


@pytest.mark.parametrize(("version", "level"), [(3, 0x83), (4, 0x84)])
def test_the_bridge_bit_passes(version: int, level: int) -> None:
    """A mosquitto bridge sets it, and it reaches the broker as it came."""
    bench = Bench().verified(version=version, level=level)
    assert bench.upstream.bytes == mqtt.connect(version=version, level=level)


def test_a_connect_above_its_cap_is_refused_before_its_body_comes() -> None:
    """The fixed header says how long it will be."""
    bench = Bench(limits=Limits(max_connect_size=256))
    bench.session.device_received(b"\x10\xff\xff\xff\x7f")
    assert bench.reason is EndReason.PACKET_TOO_LARGE
    assert bench.device.closed


def test_a_connect_that_trickles_in_has_one_deadline() -> None:
    """The CONNECT timeout counts from the connection; bytes do not push it on."""
    bench = Bench(timeouts=Timeouts(connect_packet=10))
    packet = mqtt.connect()
    for index in range(9):
        bench.session.device_received(packet[index : index + 1])
        bench.pass_seconds(1)
    assert bench.state is State.WAIT_CONNECT
    bench.session.device_received(packet[9:10])
    bench.pass_seconds(1)
    assert bench.reason is EndReason.CONNECT_TIMEOUT
    assert bench.device.closed
    assert not bench.device.written


# ---- DIALLING


def test_a_device_is_held_and_has_no_upstream_while_dialling() -> None:
    """There is nothing that a byte could be written to before the broker is verified."""
    bench = Bench().connect()
    bench.session.device_received(mqtt.publish())
    bench.pass_seconds(3000, step=100)
    assert bench.state is State.DIALLING
    assert bench.device.held
    assert not bench.upstream.written


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "reason", [EndReason.DNS_FAILED, EndReason.TCP_REFUSED, EndReason.TLS_NAME_MISMATCH, EndReason.TLS_TIMEOUT]
)
def test_a_device_is_told_that_there_is_no_upstream(version: int, reason: EndReason) -> None:
    """It gets the CONNACK of its own version: 3 before 5.0, in 5.0 0x88 with the reason in words."""
    bench = Bench().connect(version=version)
    fails(bench, reason)
    assert bench.reason is reason
    if version == 5:
        told = bench.device.bytes
        assert told[0] == 0x20
        assert told[2:4] == b"\x00\x88"
        assert reason.encode() in told
        assert len(told) == 2 + told[1]
    else:
        assert bench.device.bytes == b"\x20\x02\x00\x03"
    assert bench.device.closed
    assert not bench.upstream.written


def test_what_was_pipelined_is_dropped_when_there_is_no_upstream() -> None:
    """It came behind a CONNECT that was refused."""
    bench = Bench()
    bench.session.device_received(mqtt.connect() + mqtt.publish() * 1000)
    fails(bench)
    assert bench.device.bytes == UNAVAILABLE[4]
    bench.session.device_received(mqtt.publish())
    assert not bench.upstream.written


def test_a_device_that_goes_while_dialling_ends_the_attempt() -> None:
    """Nobody needs the upstream any more."""
    bench = Bench().connect()
    bench.session.device_gone("closed")
    assert bench.attempts[0].cancelled
    assert bench.reason is EndReason.DEVICE_LOST
    assert bench.gone == 1


def test_an_upstream_that_comes_too_late_is_cut_off() -> None:
    """Not one byte leaves for a session that has ended."""
    bench = Bench().connect()
    bench.session.device_gone("closed")
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.upstream.aborted
    assert not bench.upstream.written


def test_how_far_a_dial_had_come_is_in_the_record_when_the_device_goes() -> None:
    """The end record says which broker was dialled, and which steps were done."""
    bench = Bench().connect()
    bench.session.dials(Dial("broker.example:8883", "192.0.2.1:8883", 0.1, 0.2))
    bench.session.device_gone("closed by the device")
    record = bench.session.record
    assert (record.upstream, record.upstream_address) == ("broker.example:8883", "192.0.2.1:8883")
    assert (record.dns_seconds, record.tcp_seconds, record.tls_seconds) == (0.1, 0.2, None)


def test_an_attempt_that_fails_at_once_is_kept_nowhere() -> None:
    """`dial` may answer before it returns."""
    bench = Bench()
    bench.session._dial = lambda session: (fails(bench), Attempt())[1]  # type: ignore[func-returns-value]
    bench.connect()
    assert bench.reason is EndReason.TCP_REFUSED
    assert bench.session._dialling is None
    assert bench.device.bytes == UNAVAILABLE[4]


def test_an_attempt_that_succeeds_at_once_is_kept_nowhere() -> None:
    """The same for success."""
    bench = Bench()

    def dial(session: Session) -> Attempt:
        session.upstream_verified(bench.upstream, PEER)
        return Attempt()

    bench.session._dial = dial
    bench.connect()
    assert bench.state is State.WAIT_CONNACK
    assert bench.session._dialling is None


# ---- WAIT_CONNACK


@pytest.mark.parametrize("version", VERSIONS)
def test_connect_leaves_as_it_came(version: int) -> None:
    """The device's own bytes, a padded Remaining Length of old firmware included, are what the broker sees."""
    packet = mqtt.connect(version=version, username="u", password=b"p", length_size=1 if version == 5 else 3)
    bench = Bench()
    bench.session.device_received(packet)
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.upstream.written == [packet]


def test_nothing_else_leaves_before_connack() -> None:
    """What the device pipelined is held, not one byte of it is sent on, and the device is not read."""
    bench = Bench()
    bench.session.device_received(mqtt.connect() + mqtt.publish("first"))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.device_received(mqtt.publish("second"))
    assert bench.upstream.written == [mqtt.connect()]
    assert bench.device.held


def test_what_was_pipelined_follows_connack_in_order() -> None:
    """Also when it is cut in the middle of a packet."""
    stream = mqtt.publish("first") + mqtt.publish("second") + mqtt.publish("third")
    bench = Bench()
    bench.session.device_received(mqtt.connect() + stream[:5])
    bench.session.device_received(stream[5:15])
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.device_received(stream[15:20])
    bench.session.upstream_received(mqtt.connack())
    bench.session.device_received(stream[20:])
    assert bench.upstream.bytes == mqtt.connect() + stream
    assert not bench.device.held


def test_what_follows_connack_in_one_piece_is_relayed_after_it() -> None:
    """A broker with queued messages sends them at once."""
    bench = Bench().verified()
    bench.session.upstream_received(mqtt.connack() + mqtt.publish("queued")[:5])
    bench.session.upstream_received(mqtt.publish("queued")[5:])
    assert bench.device.bytes == mqtt.connack() + mqtt.publish("queued")


def test_connack_is_relayed_whole() -> None:
    """As long as it is not, the device hears nothing and is not read."""
    bench = Bench().verified()
    bench.session.upstream_received(mqtt.connack()[:3])
    assert not bench.device.written
    assert bench.device.held
    bench.session.upstream_received(mqtt.connack()[3:])
    assert bench.device.bytes == mqtt.connack()
    assert bench.journal.started == [bench.session.record]


@pytest.mark.parametrize(("version", "code"), [(3, 5), (4, 4), (5, 0x86), (5, 0x87)])
def test_a_refusal_is_relayed_and_ends_the_session(version: int, code: int) -> None:
    """The device gets the broker's own bytes and nothing after them; what it had pipelined is dropped."""
    refusal = mqtt.connack(version=version, code=code)
    bench = Bench()
    bench.session.device_received(mqtt.connect(version=version) + mqtt.publish())
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(refusal + mqtt.publish())
    assert bench.device.bytes == refusal
    assert bench.device.closed
    assert bench.upstream.closed
    assert bench.upstream.bytes == mqtt.connect(version=version)
    assert bench.reason is EndReason.UPSTREAM_REFUSED
    assert f"0x{code:02X}" in bench.session.record.detail
    assert not bench.journal.started


def test_the_reason_string_of_a_refusal_is_escaped_in_the_detail() -> None:
    """It is a stranger's text; those who show the detail do not escape it again."""
    bench = Bench()
    bench.session.device_received(mqtt.connect(version=5))
    bench.session.upstream_verified(bench.upstream, PEER)
    words = b"no\\way\x1b"
    bench.session.upstream_received(b"\x20\x0d\x00\x87\x0a\x1f" + len(words).to_bytes(2, "big") + words)
    assert bench.reason is EndReason.UPSTREAM_REFUSED
    assert bench.session.record.detail.endswith(r": no\\way\x1b")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "nonsense",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        mqtt.publish(),
        mqtt.pingresp(),
        b"\x20\xff\xff\xff\xff\x01",
        b"\x20\x00",
        b"\x20\x02\x02\x00",
        b"\x30",
    ],
)
def test_a_broker_that_sends_no_connack_is_unavailable(version: int, nonsense: bytes) -> None:
    """None of it reaches the device, which is told that there is no server."""
    if version == 3 and nonsense == b"\x20\x02\x02\x00":
        nonsense = b"\x20\x03\x02\x00\x00"  # 3.1 gives the flags no meaning
    bench = Bench().verified(version=version)
    bench.session.upstream_received(nonsense)
    assert bench.reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    assert bench.device.bytes[: len(UNAVAILABLE[version])] == UNAVAILABLE[version]
    assert nonsense not in bench.device.bytes
    assert bench.device.closed
    assert bench.upstream.closed


@pytest.mark.parametrize("version", VERSIONS)
def test_a_silent_broker_is_unavailable_after_a_timeout(version: int) -> None:
    """The device is told so when the timeout has passed, and not before."""
    bench = Bench(timeouts=Timeouts(connack=7)).verified(version=version)
    bench.session.upstream_received(mqtt.connack(version=version)[:1])
    bench.pass_seconds(6)
    assert bench.state is State.WAIT_CONNACK
    bench.pass_seconds(1)
    assert bench.reason is EndReason.UPSTREAM_SILENT
    assert bench.device.bytes[: len(UNAVAILABLE[version])] == UNAVAILABLE[version]
    if version == 5:
        assert bench.device.bytes[2:4] == b"\x00\x88"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broker_that_closes_instead_of_answering_is_unavailable(version: int) -> None:
    """Its reason has a word of its own."""
    bench = Bench().verified(version=version)
    breaks(bench)
    assert bench.reason is EndReason.UPSTREAM_CLOSED
    assert bench.device.bytes[: len(UNAVAILABLE[version])] == UNAVAILABLE[version]


def test_a_broker_that_refuses_the_client_certificate_late_is_named_so() -> None:
    """TLS 1.3 says so only after the handshake."""
    bench = Bench().verified()
    breaks(bench, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED)
    assert bench.reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED
    assert bench.device.bytes == UNAVAILABLE[4]


def test_an_assigned_client_identifier_is_recorded() -> None:
    """The broker's choice is what people look for."""
    connack = mqtt.connack(version=5, properties=mqtt.text(0x12, "auto-77"))
    assert Bench().relaying(version=5, client_identifier="", connack=connack).session.record.client_identifier == (
        "auto-77"
    )


# ---- enhanced authentication (MQTT 5.0 §4.12)

METHOD = mqtt.text(0x15, "SCRAM-SHA-256")


def test_authentication_passes_both_ways_before_connack_and_afterwards() -> None:
    """AUTH goes to and fro; CONNACK ends that, and later AUTH packets are ordinary ones."""
    bench = Bench().verified(version=5, properties=METHOD)
    assert not bench.device.held
    for _ in range(2):
        bench.session.upstream_received(mqtt.auth())
        bench.session.device_received(mqtt.auth())
    assert bench.device.bytes == mqtt.auth() * 2
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD) + mqtt.auth() * 2
    bench.session.upstream_received(mqtt.connack(version=5, properties=METHOD))
    bench.session.device_received(mqtt.auth(code=0x19))
    bench.session.upstream_received(mqtt.auth(code=0x00))
    assert bench.upstream.bytes.endswith(mqtt.auth(code=0x19))
    assert bench.device.bytes.endswith(mqtt.auth(code=0x00))
    assert bench.state is State.RELAYING
    assert bench.session.record.packets_up == 3


def test_an_auth_packet_is_relayed_whole() -> None:
    """A device that is cut off in the middle of one has sent none."""
    bench = Bench().verified(version=5, properties=METHOD)
    bench.session.device_received(mqtt.auth()[:5])
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD)
    bench.session.device_received(mqtt.auth()[5:])
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD) + mqtt.auth()


def test_an_auth_packet_that_was_pipelined_is_relayed_with_the_connect() -> None:
    """It waited behind CONNECT while the broker was dialled."""
    bench = Bench()
    bench.session.device_received(mqtt.connect(version=5, properties=METHOD) + mqtt.auth())
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD) + mqtt.auth()


@pytest.mark.parametrize(
    ("packet", "code"),
    [(mqtt.publish(version=5), 0x82), (mqtt.pingreq(), 0x82), (mqtt.connect(version=5), 0x82), (b"\xf1\x00", 0x81)],
)
def test_other_packets_during_authentication_are_refused(packet: bytes, code: int) -> None:
    """Only AUTH and DISCONNECT may come before CONNACK [MQTT-3.1.2-30]; the broker sees nothing of the others."""
    bench = Bench().verified(version=5, properties=METHOD)
    bench.session.device_received(mqtt.auth() + packet)
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD) + mqtt.auth()
    assert bench.reason in {EndReason.PROTOCOL_ERROR, EndReason.MALFORMED_PACKET}
    assert bench.device.bytes == bytes([0x20, 0x03, 0x00, code, 0x00])
    assert bench.device.closed
    assert bench.upstream.closed


@pytest.mark.parametrize("packet", [b"\xe0\x01\x89", b"\xe0\x02\x89\0"])
def test_a_disconnect_in_place_of_connack_is_told_with_its_code(packet: bytes) -> None:
    """The standard does not allow it, but the code is why the broker does not serve the device."""
    bench = Bench().verified(version=5)
    bench.session.upstream_received(packet)
    assert bench.reason is EndReason.UPSTREAM_DISCONNECT
    assert bench.session.record.detail == "0x89, server busy (in place of CONNACK)"
    assert bench.device.bytes[2:4] == b"\x00\x88"
    assert bench.device.closed


def test_a_disconnect_during_authentication_is_relayed() -> None:
    """The device may change its mind."""
    bench = Bench().verified(version=5, properties=METHOD)
    bench.session.device_received(mqtt.disconnect())
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=METHOD) + mqtt.disconnect()
    assert bench.reason is EndReason.DEVICE_DISCONNECT
    assert not bench.device.written
    assert bench.upstream.closed


def test_an_auth_packet_from_the_broker_that_was_not_asked_for_is_refused() -> None:
    """Without an Authentication Method in CONNECT there is none [MQTT-4.12.0-6]."""
    bench = Bench().verified(version=5)
    bench.session.upstream_received(mqtt.auth())
    assert bench.reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    assert bench.device.bytes[2:4] == b"\x00\x88"


# ---- RELAYING


@pytest.mark.parametrize("version", VERSIONS)
def test_bytes_pass_both_ways_as_they_came(version: int) -> None:
    """Cut anywhere, also in the middle of a fixed header."""
    bench = Bench().relaying(version=version)
    up = mqtt.publish("up", b"x" * 300, version=version, qos=1) + mqtt.pingreq() + mqtt.subscribe(version=version)
    down = mqtt.publish("down", b"y" * 300, version=version) + mqtt.pingresp() + mqtt.suback(version=version)
    for index in range(0, 400, 7):
        bench.session.device_received(up[index : index + 7])
        bench.session.upstream_received(down[index : index + 7])
    assert bench.upstream.bytes == up
    assert bench.device.bytes == down


FAULTS_5 = [
    (b"\x36\x0a", 0x81, EndReason.MALFORMED_PACKET),
    (b"\x00\x00", 0x81, EndReason.MALFORMED_PACKET),
    (b"\xc0\x01", 0x81, EndReason.MALFORMED_PACKET),
    (b"\x30\xff\xff\xff\xff\x01", 0x81, EndReason.MALFORMED_PACKET),
    (mqtt.connect(version=5), 0x82, EndReason.PROTOCOL_ERROR),
    (mqtt.connack(version=5), 0x82, EndReason.PROTOCOL_ERROR),
    (mqtt.pingresp(), 0x82, EndReason.PROTOCOL_ERROR),
    (b"\x30\xff\xff\xff\x7f", 0x95, EndReason.PACKET_TOO_LARGE),
]


@pytest.mark.parametrize(("fault", "code", "reason"), FAULTS_5)
def test_a_device_that_breaks_the_rules_is_told_which(fault: bytes, code: int, reason: EndReason) -> None:
    """5.0: DISCONNECT 0x81, 0x82 or 0x95 with a Reason String; what preceded the fault is relayed, the fault is not."""
    bench = Bench(limits=Limits(max_packet_size=1000)).relaying(version=5)
    bench.session.device_received(mqtt.publish(version=5) + fault + mqtt.publish("never", version=5))
    assert bench.upstream.bytes == mqtt.publish(version=5)
    assert bench.upstream.closed
    assert bench.device.bytes[0] == 0xE0
    assert bench.device.bytes[2] == code
    assert reason.encode() in bench.device.bytes
    assert bench.device.closed
    assert bench.reason is reason


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(("fault", "code", "reason"), FAULTS_5)
def test_before_5_a_device_that_breaks_the_rules_is_closed(
    version: int, fault: bytes, code: int, reason: EndReason
) -> None:
    """There is no packet that would say so; the broker hears of no DISCONNECT, and so publishes the Will."""
    bench = Bench(limits=Limits(max_packet_size=1000)).relaying(version=version)
    bench.session.device_received(fault)
    assert not bench.device.written
    assert not bench.upstream.written
    assert bench.device.closed
    assert bench.upstream.closed
    assert bench.reason is reason


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "fault",
    [b"\x00\x00", mqtt.connect(), mqtt.connack(), mqtt.subscribe(), mqtt.pingreq(), b"\x33\xff\xff\xff\xff\x01"],
)
def test_a_broker_that_breaks_the_rules_is_left(version: int, fault: bytes) -> None:
    """Nothing of it reaches the device, CONNACK a second time included; a 5.0 device is told 0x80."""
    bench = Bench().relaying(version=version)
    bench.session.upstream_received(mqtt.publish(version=version) + fault)
    assert bench.reason is EndReason.UPSTREAM_PROTOCOL_ERROR
    told = bench.device.bytes.removeprefix(mqtt.publish(version=version))
    assert told[:1] + told[2:3] == (b"\xe0\x80" if version == 5 else b"")
    assert bench.device.closed
    assert bench.upstream.closed


@pytest.mark.parametrize("version", VERSIONS)
def test_the_devices_disconnect_is_relayed_and_ends_the_session(version: int) -> None:
    """In order: DISCONNECT, then close_notify; nothing after it is relayed."""
    packet = mqtt.disconnect(code=0x04) if version == 5 else mqtt.disconnect()
    bench = Bench().relaying(version=version)
    bench.session.device_received(mqtt.publish(version=version) + packet + mqtt.publish(version=version))
    assert bench.upstream.bytes == mqtt.publish(version=version) + packet
    assert bench.upstream.closed
    assert not bench.device.written
    assert bench.device.closed
    assert bench.reason is EndReason.DEVICE_DISCONNECT


def test_a_device_that_vanishes_sends_no_disconnect() -> None:
    """The broker gets no DISCONNECT either, so it publishes the Will."""
    bench = Bench().relaying(version=5)
    bench.session.device_received(mqtt.publish(version=5)[:-1])
    bench.session.device_gone("Connection to the other side was lost in a non-clean fashion.")
    assert bench.upstream.bytes == mqtt.publish(version=5)[:-1]
    assert bench.upstream.closed
    assert bench.reason is EndReason.DEVICE_LOST
    assert "non-clean" in bench.session.record.detail


def test_the_brokers_disconnect_is_relayed_and_ends_the_session() -> None:
    """The device gets the broker's own code and nothing of the gateway's."""
    bench = Bench().relaying(version=5)
    bench.session.upstream_received(mqtt.disconnect(code=0x8E) + mqtt.publish(version=5))
    assert bench.device.bytes == mqtt.disconnect(code=0x8E)
    assert bench.device.closed
    assert bench.upstream.closed
    assert bench.reason is EndReason.UPSTREAM_DISCONNECT
    assert "0x8E" in bench.session.record.detail


def test_a_disconnect_that_3_x_does_not_have_is_told_by_its_code() -> None:
    """Some brokers send one of 5.0 to 3.1.1 clients when another takes over; the port speaks MQTT all the same."""
    bench = Bench().relaying()
    bench.session.upstream_received(mqtt.publish() + mqtt.disconnect(code=0x8E))
    assert bench.device.bytes == mqtt.publish()
    assert bench.reason is EndReason.UPSTREAM_DISCONNECT
    assert bench.session.record.detail.startswith("0x8E, session taken over")
    bench = Bench().relaying()
    bench.session.upstream_received(b"\xe0\x00")
    assert bench.reason is EndReason.UPSTREAM_PROTOCOL_ERROR


def test_a_connection_without_connect_has_no_will() -> None:
    """A health check of a load balancer: nothing went to the broker, and nothing is said of one."""
    bench = Bench()
    bench.session.device_gone("closed")
    assert (bench.reason, bench.session.record.detail) == (EndReason.DEVICE_LOST, "closed, before CONNECT")
    assert "has published" not in EndReason.DEVICE_LOST.remedy


def test_the_broker_sends_a_device_nowhere_else() -> None:
    """Neither with CONNACK nor later: there the device would be without the gateway."""
    reference = mqtt.text(0x1C, "elsewhere.example:1883")
    for code in (0, 0x9C, 0x9D):
        bench = Bench().verified(version=5)
        bench.session.upstream_received(mqtt.connack(version=5, code=code, properties=reference))
        assert bench.device.bytes == mqtt.connack(version=5, code=code)
    bench = Bench().relaying(version=5)
    bench.session.upstream_received(mqtt.disconnect(code=0x9D, properties=reference))
    assert bench.device.bytes == mqtt.disconnect(code=0x9D, properties=b"")
    assert bench.reason is EndReason.UPSTREAM_DISCONNECT


def test_a_lost_upstream_is_told_in_5() -> None:
    """DISCONNECT 0x80 with a Reason String: 0x88 is no reason code of DISCONNECT (MQTT 5.0 §3.14.2.1)."""
    bench = Bench().relaying(version=5)
    breaks(bench)
    told = bench.device.bytes
    assert told[0] == 0xE0
    assert told[1] == len(told) - 2
    assert told[2] == 0x80
    assert b"upstream-lost" in told
    assert bench.device.closed
    assert bench.reason is EndReason.UPSTREAM_LOST


@pytest.mark.parametrize("version", [3, 4])
def test_a_lost_upstream_is_a_close_before_5(version: int) -> None:
    """There is no packet for it."""
    bench = Bench().relaying(version=version)
    breaks(bench)
    assert not bench.device.written
    assert bench.device.closed


@pytest.mark.parametrize("cut", range(1, 11))
def test_no_disconnect_is_put_into_the_middle_of_a_packet(cut: int) -> None:
    """It would be taken for the rest of the broker's PUBLISH, which is half relayed: the device is just closed."""
    packet = mqtt.publish(version=5)
    assert cut < len(packet)
    bench = Bench().relaying(version=5)
    bench.session.upstream_received(packet[:cut])
    breaks(bench)
    assert packet.startswith(bench.device.bytes)
    assert bench.device.closed


@pytest.mark.parametrize(("limit", "with_words"), [(1000, True), (20, False)])
def test_the_reason_string_is_left_out_where_the_device_has_no_room(limit: int, with_words: bool) -> None:
    """It must not make the packet larger than the device's Maximum Packet Size [MQTT-3.14.2-3]."""
    limited = mqtt.number(0x27, limit, size=4)
    bench = Bench().relaying(version=5, properties=limited)
    breaks(bench)
    assert (b"upstream-lost" in bench.device.bytes) == with_words
    if not with_words:
        assert bench.device.bytes == b"\xe0\x01\x80"
    refused = Bench().connect(version=5, properties=limited)
    fails(refused)
    assert (b"tcp-refused" in refused.device.bytes) == with_words
    if not with_words:
        assert refused.device.bytes == b"\x20\x03\x00\x88\x00"


@pytest.mark.parametrize(("version", "told"), [(3, b""), (4, b""), (5, b"\x8b")])
def test_a_gateway_that_stops_says_so(version: int, told: bytes) -> None:
    """5.0: DISCONNECT 0x8B, server shutting down."""
    bench = Bench().relaying(version=version)
    bench.session.stop(EndReason.GATEWAY_STOPPING)
    assert bench.device.bytes[2:3] == told
    assert bench.device.closed
    assert bench.upstream.closed
    assert not bench.upstream.written


@pytest.mark.parametrize("version", VERSIONS)
def test_a_gateway_that_stops_before_connack_refuses(version: int) -> None:
    """Whoever waits for CONNACK gets one."""
    bench = Bench().connect(version=version)
    bench.session.stop(EndReason.GATEWAY_STOPPING)
    assert bench.device.bytes[: len(UNAVAILABLE[version])] == UNAVAILABLE[version]
    assert bench.attempts[0].cancelled


# ---- Keep Alive


def test_a_device_may_be_silent_for_one_and_a_half_keep_alive() -> None:
    """And no longer (MQTT 3.1.1 §3.1.2.10); a second's grace is the sweep's."""
    bench = Bench().relaying(keep_alive=20)
    bench.pass_seconds(30)
    assert bench.state is State.RELAYING
    bench.pass_seconds(1)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT
    assert not bench.upstream.written
    assert bench.upstream.closed


def test_in_5_the_silent_device_is_told_why() -> None:
    """DISCONNECT 0x8D."""
    bench = Bench().relaying(version=5, keep_alive=2)
    bench.pass_seconds(5)
    assert bench.device.bytes[0] == 0xE0
    assert bench.device.bytes[2] == 0x8D
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_every_packet_counts_for_keep_alive() -> None:
    """Also a PINGREQ, and also a large PUBLISH that is still coming."""
    bench = Bench().relaying(keep_alive=10)
    bench.session.device_received(mqtt.publish(payload=b"x" * 1000)[:20])
    for _ in range(20):
        bench.pass_seconds(14)
        bench.session.device_received(b"x" * 10)
    assert bench.state is State.RELAYING


def test_what_the_broker_sends_does_not_count_for_keep_alive() -> None:
    """It is the device that must give signs of life."""
    bench = Bench().relaying(keep_alive=10)
    for _ in range(16):
        bench.session.upstream_received(mqtt.publish())
        bench.pass_seconds(1)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_keep_alive_zero_means_none() -> None:
    """MQTT 3.1.1 §3.1.2.10."""
    bench = Bench().relaying(keep_alive=0)
    bench.pass_seconds(100_000, step=1000)
    assert bench.state is State.RELAYING


@pytest.mark.parametrize(("server", "seconds"), [(100, 150), (4, 6)])
def test_the_brokers_server_keep_alive_replaces_the_devices(server: int, seconds: int) -> None:
    """Whether it is longer or shorter [MQTT-3.1.2-21]."""
    connack = mqtt.connack(version=5, properties=mqtt.number(0x13, server, size=2))
    bench = Bench().relaying(version=5, keep_alive=20, connack=connack)
    bench.pass_seconds(seconds)
    assert bench.state is State.RELAYING
    bench.pass_seconds(1)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_a_server_keep_alive_of_zero_turns_it_off() -> None:
    """MQTT 5.0 §3.2.2.3.14 with §3.1.2.10."""
    connack = mqtt.connack(version=5, properties=mqtt.number(0x13, 0, size=2))
    bench = Bench().relaying(version=5, keep_alive=20, connack=connack)
    bench.pass_seconds(10_000, step=100)
    assert bench.state is State.RELAYING


def test_a_device_that_is_not_read_is_not_silent() -> None:
    """While the broker does not keep up, the gateway is deaf; Keep Alive counts from when it reads again."""
    bench = Bench().relaying(keep_alive=10)
    bench.device.choked = True
    bench.pass_seconds(1000, step=10)
    assert bench.state is State.RELAYING
    bench.device.choked = False
    bench.pass_seconds(15)
    assert bench.state is State.RELAYING
    bench.pass_seconds(1)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_keep_alive_counts_from_connack() -> None:
    """A device has nothing to say while it waits."""
    bench = Bench(timeouts=Timeouts(connack=100)).verified(keep_alive=10)
    bench.pass_seconds(90)
    bench.session.upstream_received(mqtt.connack())
    bench.pass_seconds(15)
    assert bench.state is State.RELAYING


# ---- ENDED


def test_both_sides_are_cut_off_when_the_close_takes_too_long() -> None:
    """A peer that does not read, or does not close, holds nothing for ever."""
    bench = Bench(timeouts=Timeouts(close=5)).relaying()
    breaks(bench)
    bench.pass_seconds(4)
    assert not bench.device.aborted
    bench.pass_seconds(1)
    assert bench.device.aborted
    assert bench.upstream.aborted


def test_a_session_is_gone_when_both_sides_are() -> None:
    """Once, in whichever order."""
    first, second = Bench().relaying(), Bench().relaying()
    first.session.device_gone("closed")
    assert not first.gone
    first.session.upstream_gone()
    assert first.gone == 1
    breaks(second)
    second.session.upstream_gone()
    assert not second.gone
    second.session.device_gone("closed")
    assert second.gone == 1
    second.session.upstream_gone()
    second.session.device_gone("closed")
    assert second.gone == 1


def test_the_end_absorbs_every_late_input() -> None:
    """Nothing that still comes, from whomever, is sent on, answered, or raises."""
    bench = Bench().relaying(version=5)
    bench.session.device_received(mqtt.disconnect())
    bench.device.written.clear()
    bench.upstream.written.clear()
    session = bench.session
    session.device_received(mqtt.publish(version=5))
    session.upstream_received(mqtt.publish(version=5))
    breaks(bench)
    fails(bench)
    late = RememberingSide()
    session.upstream_verified(late, PEER)
    session.stop(EndReason.GATEWAY_STOPPING)
    session.sweep(bench.clock.seconds())
    session.device_gone("closed")
    session.device_received(b"\x00")
    session.upstream_gone()
    session.upstream_received(b"\x00")
    assert late.aborted
    assert not bench.device.written
    assert not bench.upstream.written
    assert bench.reason is EndReason.DEVICE_DISCONNECT


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mistake_of_the_gateway_cuts_both_sides_off(version: int) -> None:
    """Nothing more is sent: whether a packet is half relayed is not known for sure any more."""
    bench = Bench().relaying(version=version)
    bench.session.fail("ZeroDivisionError")
    assert not bench.device.written
    assert bench.reason is EndReason.INTERNAL_ERROR
    assert bench.device.aborted
    assert bench.upstream.aborted


def test_a_side_that_fails_while_it_is_written_to_ends_the_session_once() -> None:
    """The channel may break under `write`, and say so before `write` returns."""
    bench = Bench().relaying(version=5)
    bench.upstream.write = lambda data: breaks(bench)  # type: ignore[method-assign]
    bench.session.device_received(mqtt.publish(version=5) + mqtt.disconnect())
    assert bench.reason is EndReason.UPSTREAM_LOST
    assert bench.device.bytes[2] == 0x80


def test_a_side_that_fails_while_connect_is_written_ends_the_session_once() -> None:
    """The same before CONNACK, also with an AUTH waiting behind CONNECT."""
    bench = Bench()
    bench.upstream.write = lambda data: breaks(bench)  # type: ignore[method-assign]
    bench.session.device_received(mqtt.connect(version=5, properties=METHOD) + mqtt.auth())
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.reason is EndReason.UPSTREAM_CLOSED
    assert bench.device.bytes[2:4] == b"\x00\x88"


def test_no_state_is_left_but_by_the_table() -> None:
    """The end is reachable from everywhere and left for nowhere; anything else is a mistake that is found."""
    assert all(State.ENDED in TRANSITIONS[state] for state in State if state is not State.ENDED)
    assert not TRANSITIONS[State.ENDED]
    bench = Bench()
    with pytest.raises(AssertionError, match="WAIT_CONNECT to RELAYING"):
        bench.session._enter(State.RELAYING)


# ---- the record


def test_the_record_counts_bytes_and_packets_and_times() -> None:
    """Everything that was relayed, CONNECT and CONNACK included, and how long each step took."""
    bench = Bench()
    bench.clock.advance(2)
    bench.connect(client_identifier="pump-3")
    bench.clock.advance(3)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.clock.advance(4)
    bench.session.upstream_received(mqtt.connack())
    for _ in range(5):
        bench.session.device_received(mqtt.publish())
    bench.session.upstream_received(mqtt.publish() * 2)
    bench.clock.advance(10)
    bench.session.device_received(mqtt.disconnect())
    (record,) = bench.journal.ended
    assert (record.client_identifier, record.protocol_version, record.peer) == ("pump-3", "3.1.1", PEER)
    assert (record.connect_seconds, record.connack_seconds, record.duration) == (2, 4, 19)
    assert record.packets_up == 7
    assert record.packets_down == 3
    assert (
        record.bytes_up
        == len(mqtt.connect("pump-3") + mqtt.publish() * 5 + mqtt.disconnect())
        == len(bench.upstream.bytes)
    )
    assert record.bytes_down == len(bench.device.bytes)


def test_a_session_forgets_its_password() -> None:
    """CONNECT's bytes are not kept once they are sent, nor when they never will be."""
    sent, unsent = Bench(), Bench()
    sent.verified(username="u", password=b"hunter2")
    assert sent.session._connect_packet is None
    unsent.connect(username="u", password=b"hunter2")
    fails(unsent)
    assert unsent.session._connect_packet is None
    assert "hunter2" not in repr(unsent.session._connect) + repr(unsent.session.record)


# ---- what can be seen of it


def test_traffic_is_what_the_record_will_say() -> None:
    """Counted while it passes, CONNECT and CONNACK included, and not once more when the session has ended."""
    bench = Bench().connect()
    assert bench.session.traffic == Traffic()
    bench.session.upstream_verified(bench.upstream, PEER)
    up, down = len(mqtt.connect()), len(mqtt.connack())
    assert bench.session.traffic == Traffic(up, 0, 1, 0)
    bench.session.upstream_received(mqtt.connack())
    bench.session.device_received(mqtt.publish() * 3)
    bench.session.upstream_received(mqtt.publish())
    up, down = up + 3 * len(mqtt.publish()), down + len(mqtt.publish())
    standing = bench.session.traffic
    assert standing == Traffic(up, down, 4, 2)
    bench.session.device_gone("closed")
    record = bench.journal.ended[0]
    assert bench.session.traffic == standing
    assert standing == (record.bytes_up, record.bytes_down, record.packets_up, record.packets_down)


def test_it_tells_when_the_device_was_last_heard_and_whether_it_is_held_back() -> None:
    """A device that is silent, and one that is not read because the broker does not keep up."""
    bench = Bench().verified()
    assert bench.session.last_heard is None
    assert not bench.session.held_back
    bench.session.upstream_received(mqtt.connack())
    bench.pass_seconds(5)
    assert bench.session.last_heard == EPOCH
    bench.session.device_received(mqtt.publish())
    assert bench.session.last_heard == EPOCH + 5
    bench.pass_seconds(7)
    assert bench.session.last_heard == EPOCH + 6
    assert not bench.session.held_back
    bench.device.choked = True
    assert bench.session.held_back
    bench.session.device_gone("closed")
    assert not bench.session.held_back


def test_it_tells_when_the_device_last_sent_more_than_a_ping() -> None:
    """A PINGREQ does not count, a body without its header does; nobody is blamed while nothing is read of it."""
    bench = Bench().verified()
    assert bench.session.last_data is None
    bench.session.upstream_received(mqtt.connack())
    bench.session.device_received(mqtt.pingreq())
    bench.pass_seconds(5)
    assert (bench.session.last_data, bench.session.last_heard) == (EPOCH, EPOCH + 1)
    whole = mqtt.publish()
    bench.session.device_received(whole[:2])
    bench.pass_seconds(5)
    assert bench.session.last_data == EPOCH
    bench.session.device_received(whole[2:] + mqtt.pingreq())
    bench.pass_seconds(5)
    assert bench.session.last_data == EPOCH + 11
    bench.device.choked = True
    bench.pass_seconds(5)
    assert bench.session.last_data == EPOCH + 20
    bench.session.device_gone("closed")
    assert bench.session.last_data is None


def test_what_the_gateway_sends_itself_is_not_the_devices_data() -> None:
    """Its own PINGREQ, between those of the device."""
    bench = pinging()
    for _ in range(5):
        bench.session.device_received(mqtt.pingreq())
        bench.pass_seconds(10)
        bench.session.upstream_received(mqtt.pingresp())
    assert bench.upstream.bytes.count(mqtt.pingreq()) == 10
    assert bench.session.last_data == EPOCH
    bench.session.device_received(mqtt.publish())
    bench.pass_seconds(1)
    assert bench.session.last_data == EPOCH + 51


# ---- messages withheld


def withholding(**rest: Any) -> Bench:
    """Return a bench whose device may subscribe to `a` alone."""
    topics = TopicRules(subscribe=TopicFilters(("a",)))
    bench = Bench().connect()
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1, topics, **rest))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    bench.upstream.written.clear()
    bench.device.written.clear()
    return bench


def test_what_a_rule_withholds_is_acknowledged_between_the_devices_packets() -> None:
    """Never within one: its bytes would be taken for that packet's."""
    bench = withholding()
    bench.session.upstream_received(mqtt.publish("b", qos=1))
    assert (bench.device.bytes, bench.upstream.bytes) == (b"", mqtt.acknowledgement(0x40))
    bench.upstream.written.clear()
    long = mqtt.publish("t", bytes(9000))
    bench.session.device_received(long[:5000])
    bench.session.upstream_received(mqtt.publish("b", qos=1))
    assert bench.upstream.bytes == long[:5000]
    bench.session.device_received(long[5000:])
    assert bench.upstream.bytes == long + mqtt.acknowledgement(0x40)
    bench.session.device_received(mqtt.disconnect())
    assert bench.journal.ended[0].withheld == 2


def test_a_broker_that_does_not_read_is_acknowledged_later() -> None:
    """When it reads again, at the next sweep at the latest; nothing is kept twice."""
    bench = withholding()
    bench.device.choked = True
    for _ in range(1000):
        bench.session.upstream_received(mqtt.publish("b", qos=1))
    bench.pass_seconds(10)
    assert bench.upstream.bytes == b""
    bench.device.choked = False
    bench.pass_seconds(1)
    assert bench.upstream.bytes == mqtt.acknowledgement(0x40)


# ---- the gateway's own PINGREQ


def pinging() -> Bench:
    """Return a bench whose rule has the broker pinged every ten seconds, while the device has no Keep Alive."""
    bench = Bench().connect(keep_alive=0)
    sent = mqtt.connect(keep_alive=20)
    bench.session.treat(Treatment(connect=sent, version=ProtocolVersion.MQTT_3_1_1, ping_interval=10.0))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    bench.upstream.written.clear()
    return bench


def test_a_broker_that_is_not_read_is_not_blamed_for_its_silence() -> None:
    """Its answers wait behind what the device does not take; it is pinged on, and judged when it is read again."""
    bench = pinging()
    bench.upstream.choked = True
    bench.pass_seconds(60)
    assert bench.state is State.RELAYING
    assert bench.upstream.bytes == mqtt.pingreq() * 6
    bench.upstream.choked = False
    # What waited comes by and by, the answers last.
    bench.pass_seconds(8)
    bench.session.upstream_received(mqtt.publish())
    bench.pass_seconds(8)
    assert bench.state is State.RELAYING
    bench.pass_seconds(20)
    assert bench.reason is EndReason.UPSTREAM_LOST


def test_a_broker_that_is_read_and_silent_is_lost() -> None:
    """After two PINGREQs without an answer, when the third would be due."""
    bench = pinging()
    bench.pass_seconds(29)
    assert bench.state is State.RELAYING
    bench.pass_seconds(2)
    assert bench.reason is EndReason.UPSTREAM_LOST


# ---- while packets have to wait


def treated(connect: bytes = b"", **treatment: Any) -> Bench:
    """Return a bench that relays, with this treatment; the device has a Keep Alive of ten seconds."""
    version = treatment.pop("version", 4)
    bench = Bench().connect(keep_alive=10, version=version)
    sent = connect or mqtt.connect(keep_alive=10, version=version)
    bench.session.treat(Treatment(sent, ProtocolVersion(version), keep_alive=10, **treatment))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack(version=version))
    assert bench.state is State.RELAYING
    bench.device.written.clear()
    bench.upstream.written.clear()
    return bench


def test_a_paced_device_does_not_make_the_broker_wait_for_its_pings() -> None:
    """The device's own wait behind its messages; the gateway's answers do not reach it."""
    bench = treated(packets_per_second=1.0)
    bench.session.device_received(mqtt.publish() * 60)
    while bench.device.behind:
        bench.device.behind = False
        bench.session.device_received(b"")
    bench.upstream.written.clear()
    pings = 0
    for _ in range(55):
        bench.pass_seconds(1)
        if len(bench.upstream.written) > pings:
            pings += 1
            bench.session.upstream_received(mqtt.pingresp())
    assert bench.state is State.RELAYING
    assert bench.upstream.bytes == mqtt.pingreq() * (len(bench.upstream.bytes) // 2)
    assert 5 <= len(bench.upstream.written) <= 11
    assert bench.device.bytes == b""
    # What waited has passed; the device is served as ever, and its own pings are its own.
    bench.pass_seconds(10)
    assert bench.device.reading
    bench.session.device_received(mqtt.pingreq())
    bench.session.upstream_received(mqtt.pingresp())
    assert bench.device.bytes == mqtt.pingresp()


def test_a_packet_that_waits_until_it_is_whole_does_not_make_the_broker_wait() -> None:
    """It comes slowly; nothing of it has been passed on, so a PINGREQ fits in before it."""
    bench = treated(topics=TopicRules(max_qos=1))
    sent = mqtt.publish("t", bytes(60), qos=1)
    pings = 0
    for index in range(len(sent)):
        bench.session.device_received(sent[index : index + 1])
        bench.pass_seconds(1)
        if bench.upstream.bytes.count(mqtt.pingreq()) > pings:
            pings += 1
            bench.session.upstream_received(mqtt.pingresp())
    assert bench.state is State.RELAYING
    assert pings >= 6
    assert bench.upstream.bytes == mqtt.pingreq() * pings + sent
    assert bench.device.bytes == b""


def test_no_ping_goes_into_the_middle_of_a_packet() -> None:
    """A paced device's large message is passed on a little, which the broker hears as well."""
    bench = treated(bytes_per_second=100.0)
    start = mqtt.publish("t", bytes(100_000))[:9000]
    bench.session.device_received(start)
    assert bench.device.held
    bench.pass_seconds(6)
    assert bench.upstream.bytes == start
    assert not bench.device.held
    bench.session.device_received(b"x" * 100)
    assert bench.device.held
    assert bench.upstream.bytes == start + b"x" * 100


def test_a_silent_device_is_not_pinged_for() -> None:
    """The broker's Keep Alive is the device's business unless its packets wait here."""
    bench = treated(topics=TopicRules(max_qos=1), packets_per_second=10.0)
    bench.session.device_received(mqtt.publish())
    bench.upstream.written.clear()
    bench.pass_seconds(14)
    assert not bench.upstream.written
    bench.pass_seconds(3)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_the_servers_keep_alive_counts_when_packets_wait() -> None:
    """Not the one in CONNECT, which the broker has overruled; the gateway's regular pings end."""
    bench = Bench().connect(keep_alive=60, version=5)
    sent = mqtt.connect(keep_alive=20, version=5)
    treatment = Treatment(
        sent, ProtocolVersion.MQTT_5_0, keep_alive=20, ping_interval=10.0, topics=TopicRules(max_qos=1)
    )
    bench.session.treat(treatment)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack(version=5, properties=mqtt.number(0x13, 30, size=2)))
    bench.upstream.written.clear()
    bench.session.device_received(mqtt.publish(version=5)[:5])
    bench.pass_seconds(14)
    assert not bench.upstream.written
    bench.pass_seconds(4)
    assert bench.upstream.bytes == mqtt.pingreq()


# ---- what CONNECT and CONNACK say of sizes, sessions and names


@pytest.mark.parametrize(
    ("of_device", "limit", "of_rule", "sent"),
    [
        (None, 5000, None, 5000),
        (9000, 5000, None, 5000),
        (400, 5000, None, 400),
        (400, None, None, 400),
        (None, 5000, 3000, 3000),
        (None, None, 3000, 3000),
        (9000, 5000, 7000, 7000),
        (400, 5000, 3000, 400),
    ],
)
def test_the_broker_is_told_what_the_gateway_takes(
    of_device: int | None, limit: int | None, of_rule: int | None, sent: int
) -> None:
    """The smaller of the device's and its own, which a rule's overrides; all else of CONNECT stays."""
    properties = mqtt.user_property() + (b"" if of_device is None else mqtt.number(0x27, of_device, size=4))
    own = mqtt.connect(version=5, properties=properties, username="u")
    bench = Bench(limits=Limits() if limit is None else Limits(max_packet_size=limit))
    bench.session.device_received(own)
    if of_rule is not None:
        bench.session.treat(Treatment(own, ProtocolVersion.MQTT_5_0, max_packet_size=of_rule))
    bench.session.upstream_verified(bench.upstream, PEER)
    announced = mqtt.user_property() + mqtt.number(0x27, sent, size=4)
    assert bench.upstream.bytes == mqtt.connect(version=5, properties=announced, username="u")
    if sent == of_device:
        assert bench.upstream.bytes == own


@pytest.mark.parametrize("version", [3, 4])
def test_before_5_there_is_no_packet_size_to_tell(version: int) -> None:
    """CONNECT passes as it came."""
    bench = Bench(limits=Limits(max_packet_size=5000)).verified(version=version)
    assert bench.upstream.bytes == mqtt.connect(version=version)


@pytest.mark.parametrize(
    ("of_broker", "limit", "of_rule", "told"),
    [
        (None, 5000, None, 5000),
        (9000, 5000, None, 5000),
        (1000, 5000, None, 1000 - 10),
        (1000, None, None, 1000 - 10),
        (None, None, None, None),
        (11, None, None, 1),
        (5, None, None, 1),
        (None, 5000, 3000, 3000),
        (None, None, 3000, 3000),
        (9000, 5000, 7000, 7000),
        (1000, 5000, 3000, 1000 - 10),
    ],
)
def test_the_device_is_told_what_may_pass(
    of_broker: int | None, limit: int | None, of_rule: int | None, told: int | None
) -> None:
    """The smaller of the gateway's, which a rule's overrides, and the broker's, less what the prefixes add."""
    bench = Bench(limits=Limits() if limit is None else Limits(max_packet_size=limit)).connect(version=5)
    topics = TopicRules(publish_prefix="hall/", subscribe_prefix="in/")
    bench.session.treat(
        Treatment(mqtt.connect(version=5), ProtocolVersion.MQTT_5_0, topics=topics, max_packet_size=of_rule)
    )
    bench.session.upstream_verified(bench.upstream, PEER)

    def connack(size: int | None) -> bytes:
        return mqtt.connack(version=5, properties=b"" if size is None else mqtt.number(0x27, size, size=4))

    bench.session.upstream_received(connack(of_broker))
    assert bench.device.bytes == connack(told)
    # A packet that the prefixes make too large for the broker does not reach it.
    if of_broker == 1000:
        bench.upstream.written.clear()
        bench.session.device_received(mqtt.publish("t", bytes(982), version=5))
        assert bench.upstream.bytes == mqtt.publish("hall/t", bytes(982), version=5)
        bench.session.device_received(mqtt.publish("t", bytes(989), version=5))
        assert bench.upstream.bytes == mqtt.publish("hall/t", bytes(982), version=5)
        assert bench.reason is EndReason.PACKET_TOO_LARGE


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_that_asked_for_a_clean_start_is_told_of_no_session(version: int) -> None:
    """MQTT-3.2.2-4: it would have to close. The rule had the broker keep one."""
    for asked, told in ((True, 0), (False, 1)):
        bench = Bench().connect(version=version, clean_start=asked)
        sent = mqtt.connect(version=version, clean_start=False)
        bench.session.treat(Treatment(sent, ProtocolVersion(version)))
        bench.session.upstream_verified(bench.upstream, PEER)
        bench.session.upstream_received(mqtt.connack(version=version, flags=1))
        assert bench.device.bytes == mqtt.connack(version=version, flags=told)
        assert bench.state is State.RELAYING


@pytest.mark.parametrize("of_broker", [None, "broker-7"])
def test_a_device_without_a_name_is_told_the_one_it_got(of_broker: str | None) -> None:
    """MQTT-3.2.2-16: by the rule, unless the broker assigned one itself."""
    bench = Bench().connect(client_identifier="", version=5)
    sent = mqtt.connect("hall-3", version=5)
    bench.session.treat(Treatment(sent, ProtocolVersion.MQTT_5_0, assigned="hall-3"))
    bench.session.upstream_verified(bench.upstream, PEER)
    properties = b"" if of_broker is None else mqtt.text(0x12, of_broker)
    bench.session.upstream_received(mqtt.connack(version=5, properties=properties))
    name = of_broker or "hall-3"
    assert bench.device.bytes == mqtt.connack(version=5, properties=mqtt.text(0x12, name))
    assert bench.session.record.client_identifier == name


def test_a_lenient_rule_takes_a_connack_of_three_bytes() -> None:
    """It passes as it came; without the rule it ends the session."""
    odd = b"\x21\x03\x00\x00\x00"
    bench = Bench().connect()
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1, lenient=True))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(odd)
    assert bench.state is State.RELAYING
    assert bench.device.bytes == odd
    bench = Bench().verified()
    bench.session.upstream_received(odd)
    assert bench.reason is EndReason.UPSTREAM_PROTOCOL_ERROR


def test_a_device_of_3_1_sets_bits_that_it_does_not_use() -> None:
    """CONNECT and CONNACK with any flags: they pass as they came."""
    sent = b"\x14" + mqtt.connect(version=3)[1:]
    bench = Bench()
    bench.session.device_received(sent)
    bench.session.upstream_verified(bench.upstream, PEER)
    assert bench.upstream.bytes == sent
    bench.session.upstream_received(b"\x21\x02\x00\x00")
    assert bench.state is State.RELAYING


def _texts(*roots: object) -> int:
    """Return how many bytes of text and data can be reached."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | FunctionType):
            continue
        seen[id(each)] = each
        waiting += gc.get_referents(each)
    return sum(len(each) for each in seen.values() if isinstance(each, str | bytes | bytearray))


def test_nothing_of_a_large_connect_is_kept() -> None:
    """A session may last for months: User Properties, Will and credentials are the broker's."""
    small = Bench().relaying(version=5)
    large = Bench().relaying(
        version=5,
        properties=mqtt.user_property("k" * 500, "v" * 500) * 20,
        username="u" * 10_000,
        password=b"p" * 10_000,
        will_topic="t" * 10_000,
        will_payload=bytes(10_000),
    )
    assert _texts(large.session) < _texts(small.session) + 1000
    # What a rule makes of CONNECT has credentials, too.
    ruled = Bench().connect()
    ruled.session.treat(Treatment(mqtt.connect(username="u" * 10_000), ProtocolVersion.MQTT_3_1_1))
    ruled.session.upstream_verified(ruled.upstream, PEER)
    ruled.upstream.written.clear()
    assert _texts(ruled.session) < _texts(small.session) + 1000


def test_readers_are_let_go_when_their_work_is_done() -> None:
    """A session may last for months, and ended ones stay until both peers have closed."""
    bench = Bench().relaying()
    assert bench.session._upstream_reader is None
    for ended in (Bench().verified(), Bench().connect()):
        ended.session.device_gone("closed")
        assert ended.session._upstream_reader is None
        assert ended.session._connect_packet is None


def test_without_a_rule_the_brokers_packet_size_is_the_devices() -> None:
    bench = Bench(limits=Limits(max_packet_size=5000)).verified(version=5)
    connack = mqtt.connack(version=5, properties=mqtt.number(0x27, 1000, size=4))
    bench.session.upstream_received(connack)
    assert bench.device.bytes == connack


def test_bodies_are_checked_unless_the_configuration_says_otherwise() -> None:
    for checked in (True, False):
        bench = Bench(limits=Limits(check_bodies=checked)).relaying()
        bench.session.device_received(mqtt.publish("a/+/b"))
        assert (bench.state is State.RELAYING) is not checked
        assert (bench.upstream.bytes == mqtt.publish("a/+/b")) is not checked


def test_a_disconnect_without_a_code_is_a_normal_one() -> None:
    """MQTT 5.0 §3.14.2.1."""
    bench = Bench().relaying(version=5)
    bench.session.upstream_received(mqtt.disconnect())
    assert "0x00" in bench.journal.ended[0].detail


def test_a_reason_string_that_just_fits_is_sent() -> None:
    """MQTT 5.0 §3.2.2.3.9."""
    full = Bench().connect(version=5)
    fails(full)
    for size, fits in ((len(full.device.bytes), True), (len(full.device.bytes) - 1, False)):
        bench = Bench().connect(version=5, properties=mqtt.number(0x27, size, size=4))
        fails(bench)
        assert (bench.device.bytes == full.device.bytes) is fits


def test_a_disconnect_on_the_devices_behalf_is_counted() -> None:
    bench = Bench().relaying()
    before = bench.session.traffic.bytes_up
    bench.session.stop(EndReason.TOKEN_EXPIRING, discard_will=True)
    assert bench.upstream.bytes == mqtt.disconnect()
    assert bench.journal.ended[0].bytes_up == before + len(mqtt.disconnect())


def test_a_sweep_says_whether_the_kernel_was_asked() -> None:
    """That takes most of its time, so who sweeps many sessions must know."""
    bench = Bench(timeouts=Timeouts(tcp_user=60)).relaying(keep_alive=0)
    asked = 0
    for _ in range(60):
        bench.clock.advance(1)
        before = len(bench.device.checked)
        assert bench.session.sweep(bench.clock.seconds()) is (len(bench.device.checked) > before)
        asked += len(bench.device.checked) - before
    assert 10 <= asked <= 15


def test_the_keep_alive_at_the_broker_is_the_rules() -> None:
    """Not that of the device, which may be far longer: who withholds must keep the broker patient."""
    bench = Bench().connect(keep_alive=1000)
    treatment = Treatment(
        mqtt.connect(keep_alive=10), ProtocolVersion.MQTT_3_1_1, keep_alive=10, packets_per_second=1.0
    )
    bench.session.treat(treatment)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    bench.session.device_received(mqtt.publish() * 60)
    bench.upstream.written.clear()
    bench.pass_seconds(10)
    assert mqtt.pingreq() in bench.upstream.written


def test_the_record_has_the_times_of_its_steps() -> None:
    bench = Bench()
    bench.clock.advance(2)
    bench.connect()
    bench.clock.advance(3)
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.clock.advance(4)
    bench.session.upstream_received(mqtt.connack())
    bench.clock.advance(5)
    bench.session.device_gone("closed")
    (record,) = bench.journal.ended
    assert (record.connect_seconds, record.connack_seconds, record.duration) == (2, 4, 14)


def test_a_refusal_of_the_broker_promises_nothing() -> None:
    """No packet size, no Client Identifier: there will be no session."""
    bench = Bench(limits=Limits(max_packet_size=1000)).verified(version=5)
    refusal = mqtt.connack(version=5, code=0x87, properties=mqtt.user_property("why", "not authorized"))
    bench.session.upstream_received(refusal)
    assert bench.device.bytes == refusal


def test_dialling_has_no_deadline_of_its_own() -> None:
    """Each of its steps has one."""
    bench = Bench(timeouts=Timeouts(connect_packet=5)).connect()
    bench.pass_seconds(1000)
    assert bench.state is State.DIALLING


def test_only_who_left_before_connect_may_be_a_port_scan() -> None:
    scan, device = Bench(), Bench().relaying()
    for bench in (scan, device):
        bench.session.device_gone("closed")
    assert scan.journal.ended[0].detail == "closed, before CONNECT"
    assert device.journal.ended[0].detail == "closed"


def test_what_a_rule_has_set_is_forgotten_when_it_is_judged_again() -> None:
    """The next rule may be another one, or none."""
    bench = Bench().connect()
    assigned: list[str] = []
    record = bench.session.record
    record.rule = record.upstream_certificate = record.upstream_username = record.upstream_client_identifier = "before"
    bench.session.when_assigned(assigned.append)
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1, lives=5.0))
    assert record.rule == "before"
    bench.session.treat(None)
    assert {record.rule, record.upstream_certificate, record.upstream_username} == {""}
    assert record.upstream_client_identifier == ""
    assert bench.session._assigned is None
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(mqtt.connack())
    bench.pass_seconds(10)
    assert bench.state is State.RELAYING


def test_a_device_with_a_pace_is_not_left_to_the_core() -> None:
    """The core counts no packets against a rate."""
    paced = treated(packets_per_second=100.0)
    paced.session._from_device, paced.session._from_broker = Bench().relaying().session.framers
    paced.session._from_device.packets = 1
    assert paced.session.lend() is None
    waiting = Bench().verified()
    assert waiting.session.lend() is None
    for message, receive in ((mqtt.publish(), "device_received"), (mqtt.suback(), "upstream_received")):
        bench = Bench().relaying()
        assert bench.session.lend() is None, "a session without a message is not worth it"
        getattr(bench.session, receive)(message)
        assert bench.session.lend() is not None


def test_an_inspected_device_is_read_in_small_pieces() -> None:
    """Its packets take longer to pass, and others have their turn in between."""
    inspected = treated(topics=TopicRules(max_qos=1))
    assert inspected.device.largest_read <= 2048
    assert not hasattr(inspected.upstream, "largest_read")
    assert treated().device.largest_read == 65_536
    # So is a broker whose messages are read.
    assert treated(topics=TopicRules(subscribe_prefix="p/")).upstream.largest_read <= 4096


# ---- what has not been read yet


def test_a_device_whose_bytes_wait_is_not_silent() -> None:
    """This process was busy: it reads before it judges."""
    bench = Bench().relaying(keep_alive=10)
    bench.pass_seconds(14)
    bench.device.unread = True
    bench.pass_seconds(10)
    assert bench.state is State.RELAYING
    bench.device.unread = False
    bench.pass_seconds(5)
    assert bench.state is State.RELAYING
    bench.pass_seconds(12)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT


def test_a_broker_whose_bytes_wait_is_not_silent() -> None:
    """Neither before CONNACK nor when it has been pinged."""
    bench = Bench().verified()
    bench.upstream.unread = True
    bench.pass_seconds(30)
    assert bench.state is State.WAIT_CONNACK
    bench.upstream.unread = False
    bench.pass_seconds(2)
    assert bench.reason is EndReason.UPSTREAM_SILENT
    bench = pinging()
    bench.upstream.unread = True
    bench.pass_seconds(60)
    assert bench.state is State.RELAYING
    bench.upstream.unread = False
    bench.pass_seconds(12)
    assert bench.reason is EndReason.UPSTREAM_LOST


def test_a_connect_that_waits_is_read_before_the_device_is_judged() -> None:
    """It came in time."""
    bench = Bench(timeouts=Timeouts(connect_packet=5))
    bench.device.unread = True
    bench.pass_seconds(8)
    assert bench.state is State.WAIT_CONNECT
    bench.device.unread = False
    bench.pass_seconds(2)
    assert bench.reason is EndReason.CONNECT_TIMEOUT


def test_time_that_was_lost_is_given_back() -> None:
    """To every deadline, and no more than that."""
    bench = Bench().relaying(keep_alive=10)
    bench.pass_seconds(10)
    bench.session.give_back(8, bench.clock.seconds())
    bench.pass_seconds(12)
    assert bench.state is State.RELAYING
    bench.session.give_back(1000, bench.clock.seconds())
    bench.pass_seconds(17)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT
    bench = Bench(timeouts=Timeouts(connect_packet=5))
    bench.session.give_back(1000, bench.clock.seconds())
    bench.pass_seconds(4)
    bench.session.give_back(3, bench.clock.seconds())
    bench.pass_seconds(3)
    assert bench.state is State.WAIT_CONNECT
    bench.pass_seconds(2)
    assert bench.reason is EndReason.CONNECT_TIMEOUT


def test_what_the_core_has_relayed_is_counted() -> None:
    """As what passes here, and the device has been heard."""
    bench = Bench().relaying(keep_alive=10)
    before = Traffic(*bench.session.traffic)
    bench.session.settled(500, 300, 5, 3, heard=True)
    bench.pass_seconds(14)
    assert bench.state is State.RELAYING
    after = bench.session.traffic
    assert (after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down) == (500, 300)
    assert (after.packets_up - before.packets_up, after.packets_down - before.packets_down) == (5, 3)


class RememberingLoan:
    """A `Loan` of a session whose device sends one PINGREQ each time that somebody asks, if it sends anything."""

    def __init__(self, session: Session, *, heard: bool = True) -> None:
        self.session = session
        self.heard = heard
        self.recalled = 0
        session.lent(self)

    def settle(self) -> None:
        self.session.settled(2 * self.heard, 0, int(self.heard), 0, self.heard)

    def recall(self) -> None:
        self.recalled += 1
        self.session.lent(None)


def test_whoever_asks_hears_of_what_the_core_has_relayed() -> None:
    """Traffic, the time that the device was heard, and the sweep that finds silent ones."""
    bench = Bench().relaying(keep_alive=10)
    before = bench.session.traffic
    loan = RememberingLoan(bench.session)
    bench.clock.advance(5)
    assert bench.session.last_heard == bench.clock.seconds()
    assert bench.session.traffic.packets_up == before.packets_up + 2
    bench.pass_seconds(60)
    assert bench.state is State.RELAYING
    loan.heard = False
    bench.pass_seconds(17)
    assert bench.reason is EndReason.KEEPALIVE_TIMEOUT
    assert loan.recalled == 1


@pytest.mark.parametrize("reason", [EndReason.GATEWAY_STOPPING, EndReason.TOKEN_EXPIRING])
def test_a_loan_is_taken_back_before_anything_is_sent(reason: EndReason) -> None:
    bench = Bench().relaying()
    loan = RememberingLoan(bench.session)
    wrote = bench.upstream.write

    def write(data: bytes) -> None:
        assert loan.recalled == 1
        wrote(data)

    bench.upstream.write = write  # type: ignore[method-assign]
    bench.session.stop(reason, discard_will=True)
    assert bench.upstream.bytes == mqtt.disconnect()
    assert loan.recalled == 1


@pytest.mark.parametrize(("flag", "code"), [(1, 0), (0, 5)])
def test_a_device_of_3_1_gets_a_connack_of_3_1(flag: int, code: int) -> None:
    """Its first byte was reserved then, and the broker was sent a CONNECT of 3.1.1."""
    bench = Bench().connect(version=3)
    bench.session.treat(Treatment(mqtt.connect(), ProtocolVersion.MQTT_3_1_1))
    bench.session.upstream_verified(bench.upstream, PEER)
    bench.session.upstream_received(bytes((0x20, 2, flag, code)))
    assert bench.device.bytes == bytes((0x20, 2, 0, code))
    assert (bench.state is State.RELAYING) is (code == 0)


def test_both_peers_are_watched_now_and_then() -> None:
    """Whether they acknowledge, some times per timeout; not at each sweep."""
    bench = Bench(timeouts=Timeouts(tcp_user=60)).relaying(keep_alive=0)
    bench.pass_seconds(60)
    assert 10 <= len(bench.device.checked) <= 15
    assert bench.device.checked == bench.upstream.checked


# ---- in short turns


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_peer_that_crowds_a_piece_with_costly_packets_is_read_on_when_they_have_passed(direction: str) -> None:
    """In order, a part in each turn, while nothing is read of that side; and the core does not relay meanwhile."""
    bench = Bench().relaying()
    side, other, receive, packet = {
        "up": (bench.device, bench.upstream, bench.session.device_received, mqtt.subscribe()),
        "down": (bench.upstream, bench.device, bench.session.upstream_received, mqtt.suback()),
    }[direction]
    assert None not in [framer.lend() for framer in bench.session.framers]
    sent = b"".join(packet[:-1] + bytes([number % 3]) for number in range(1000))
    receive(sent)
    turns = 0
    while side.behind:
        assert len(other.bytes) < len(sent)
        assert None in [framer.lend() for framer in bench.session.framers]
        side.behind = False
        turns += 1
        receive(b"")
    assert other.bytes == sent
    assert turns >= 4
    assert None not in [framer.lend() for framer in bench.session.framers]
    assert bench.state is State.RELAYING


@pytest.mark.parametrize("version", [4, 5])
def test_a_disconnect_behind_a_crowd_ends_the_session_when_the_crowd_has_passed(version: int) -> None:
    bench = Bench().relaying(version=version)
    sent = mqtt.subscribe(version=version) * 1000 + mqtt.disconnect()
    bench.session.device_received(sent)
    while bench.device.behind:
        assert bench.state is State.RELAYING
        bench.device.behind = False
        bench.session.device_received(b"")
    assert bench.reason is EndReason.DEVICE_DISCONNECT
    assert bench.upstream.bytes == sent


def test_a_disconnect_that_only_5_knows_is_read_behind_a_crowd() -> None:
    bench = Bench().relaying()
    bench.session.upstream_received(mqtt.suback() * 1000 + mqtt.disconnect(code=0x8B))
    while bench.upstream.behind:
        bench.upstream.behind = False
        bench.session.upstream_received(b"")
    assert bench.reason is EndReason.UPSTREAM_DISCONNECT


def test_a_peer_that_sends_much_of_what_is_cheap_is_read_as_before() -> None:
    """Plain messages, however many, and large ones."""
    bench = Bench().relaying()
    for receive in (bench.session.device_received, bench.session.upstream_received):
        receive(mqtt.publish() * 500)
        receive(mqtt.publish(payload=bytes(60_000)))
    assert not bench.device.behind
    assert not bench.upstream.behind
    assert bench.session.lend() is not None
    assert bench.device.largest_read == 65_536
    assert not hasattr(bench.upstream, "largest_read")


def test_little_is_read_at_a_time_until_connack() -> None:
    """What comes behind CONNECT is relayed in one turn, also where a rule reads each packet."""
    bench = Bench()
    assert bench.device.largest_read == 1024
    bench.connect().session.upstream_verified(bench.upstream, PEER)
    assert bench.device.largest_read == 1024
    bench.session.upstream_received(mqtt.connack())
    assert bench.device.largest_read == 65_536
