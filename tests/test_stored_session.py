"""A stored device's session: what it is told and what the broker gets, in each phase, without sockets."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.config import StoreConfig
from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.mqtt.connect import Connect
from gateway.mqtt.packets import ProtocolVersion
from gateway.pieces import at_once
from gateway.session.drain_pace import DrainPace
from gateway.session.stored import Phase, StoredSession
from gateway.session.stored_state import DeviceState
from gateway.session.treatment import Treatment
from gateway.session.visit import World
from gateway.store.database import StoreError
from tests import mqtt_packets
from tests.stored_world import _PEER, EPOCH, open_memory_store, packet, packets_of, parsed, publish, read_publish

PUBACK, PUBREC, PUBREL, PUBCOMP = 0x40, 0x50, 0x62, 0x70
SUBACK_QOS_1 = b"\x90\3\0\1\1"


class Upstream:
    """The broker's end: what the gateway sent on one connection."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.version = 4
        self.closed = self.aborted = self.held = self.unread = self.behind = False

    def write(self, data: bytes) -> None:
        """See `gateway.session.session.Connection`."""
        self.sent += packets_of(data)

    write_last = write

    def hold(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.held = True

    def release(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.held = False

    def go_on_later(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.behind = True

    def close(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.closed = True

    def abort(self) -> None:
        """See `gateway.session.session.Connection`."""
        self.aborted = True

    @property
    def payloads(self) -> list[bytes]:
        """The payloads of PUBLISHes."""
        return [read_publish(self.version, raw)[1] for raw in self.sent if raw[0] >> 4 == 3]

    def take(self) -> list[bytes]:
        """Return what was sent since this was asked last."""
        sent, self.sent = self.sent, []
        return sent


class Device:
    """The device's end."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.connack = b""
        self.ended: tuple[EndReason, str] | None = None
        self.answer: bytes | None = None
        self.code: int | None = None
        self.held = True
        self.offline: bool | None = None
        self.unread = False
        self.behind = False
        self.stored: StoredSession | None = None

    def admit(self, connack: bytes, *, offline: bool) -> bytes:
        """See `gateway.session.visit.Device`."""
        self.connack, self.offline = connack, offline
        return b""

    def send(self, data: bytes) -> None:
        """See `gateway.session.visit.Device`."""
        self.got += packets_of(data)

    def hold(self) -> None:
        """See `gateway.session.visit.Device`."""
        self.held = True

    def release(self) -> None:
        """See `gateway.session.visit.Device`."""
        self.held = False

    def go_on_later(self) -> None:
        """See `gateway.session.visit.Device`."""
        self.behind = True

    def finish(self, reason: EndReason, detail: str = "", *, answer: Any = None, code: Any = None) -> None:
        """See `gateway.session.visit.Device`."""
        if self.ended is None:
            self.ended, self.answer, self.code = (reason, detail), answer, code
            assert self.stored is not None
            self.stored.detached(self)

    def count_up(self) -> None:
        """See `gateway.session.visit.Device`."""

    def dials(self, dial: Any) -> None:
        """See `gateway.session.visit.Device`."""

    def verified(self, peer: Any) -> None:
        """See `gateway.session.visit.Device`."""

    def take(self) -> list[bytes]:
        """Return what it got since this was asked last."""
        got, self.got = self.got, []
        return got


class Bench:
    """A stored session, a clock, a disk that commits when told to, a broker that is there when told so."""

    def __init__(self, directory: Path, name: str, **values: Any) -> None:
        self.now = 1000.0
        self.directory, self.name = directory, name
        self._keeps = sqlite3.connect(name, uri=True)
        self.config = StoreConfig(**values)
        self.is_plausible = True
        self.available = True
        self.dials = self.cancelled = 0
        self.over_called = False
        self.treatment: Callable[[bytes, Connect], Treatment] = lambda raw, connect: Treatment(
            connect=raw, version=connect.version
        )
        self.start()

    def start(self) -> None:
        """Start the gateway, after a crash if it ran before."""
        self.store, self.disk = open_memory_store(
            self.directory, self.name, self.config, lambda: self.now, lambda: EPOCH + self.now
        )
        self.world = World(
            seconds=lambda: self.now,
            now=lambda: EPOCH + self.now,
            is_plausible=lambda: self.is_plausible,
            uniform=lambda: 1.0,
            max_packet_size=1 << 20,
            max_connect_size=1 << 16,
            check_bodies=True,
            connack=10.0,
        )
        self.open()

    def pace_drains(self, pace: DrainPace) -> None:
        """Share a pace with others."""
        self.world = attrs.evolve(self.world, drain_pace=pace)
        self.open()

    def open(self) -> None:
        """Make the stored session."""
        self.over_called = False
        self.stored = StoredSession(
            "dev", self.store, self.store.backlog("dev"), self, self.world, after=self.config.after
        )

    # gateway.session.stored.Link

    def dial(self, stored: StoredSession) -> None:
        """Count."""
        del stored
        self.dials += 1

    def cancel(self, stored: StoredSession) -> None:
        """Count."""
        self.cancelled += 1

    def may_dial(self, stored: StoredSession) -> bool:
        """As the test wants."""
        del stored
        return self.available

    def over(self, stored: StoredSession) -> None:
        """Take note."""
        del stored
        self.over_called = True

    # what happens

    def connect(
        self,
        version: int = 4,
        *,
        clean: bool = False,
        confirm: bool = False,
        will: Any = None,
        receive_maximum: int = 0,
        **more: Any,
    ) -> Device:
        """A device comes."""
        if self.stored.is_over:
            self.open()
        device = Device()
        device.stored = self.stored
        _, connect = parsed(raw_connect(version, clean=clean))
        found, connect = parsed(written(attrs.evolve(connect, will=will, **more), receive_maximum))
        self.stored.attach(device, found, self.treatment(found.raw, connect), ("10.0.0.1", ""), confirm=confirm)
        self.disk.commit()
        return device

    def offline(self, **more: Any) -> Device:
        """A device comes while there is no broker, and is served."""
        self.available = False
        device = self.connect(**more)
        self.disk.commit()
        assert device.connack
        return device

    def verified(self) -> Upstream:
        """A broker is found and verified."""
        self.available = True
        if not self.stored._is_dialling:
            self.stored._retry_at = 0.0
            self.stored._dial()
        presented = self.stored.presented()
        assert presented is not None
        raw, connect = presented
        upstream = Upstream()
        self.stored.upstream_verified(upstream, _PEER, self.treatment(raw.raw, connect))
        return upstream

    def online(self, *, session_present: bool = False, version: int = 4) -> Upstream:
        """A broker is found, and accepts."""
        upstream = self.verified()
        upstream.version = version
        connack = packet(0x20, bytes((session_present, 0)) + (b"\0" if version == 5 else b""))
        self.stored.upstream_received(connack)
        self.settle()
        return upstream

    def settle(self) -> None:
        """Let the disk do its work."""
        while self.disk.queue:
            self.disk.commit()

    def recovered(self) -> None:
        """The store finds that the disk takes writes again."""
        self.store._probed = -100.0
        at_once(self.store.sweep())
        self.settle()
        assert self.store.failure is None
        self.sweep()
        self.settle()

    def up(self, payload: bytes, qos: int = 1, identifier: int = 1, *, version: int = 4, dup: bool = False) -> None:
        """The device publishes."""
        self.stored.device_received(publish(version, b"t", payload, qos, identifier, dup=dup))

    def ack(self, first: int, identifier: int, *code: int) -> None:
        """The broker acknowledges."""
        self.stored.upstream_received(packet(first, identifier.to_bytes(2, "big") + bytes(code)))

    def lose(self) -> None:
        """The broker's connection breaks."""
        self.stored.upstream_broken(SessionEnd(EndReason.UPSTREAM_LOST, "test"))

    def sweep(self, seconds: float = 1.0) -> None:
        """Time passes."""
        self.now += seconds
        self.stored.sweep(self.now)


def raw_connect(version: int, *, clean: bool) -> bytes:
    """Write a CONNECT of the device, whose session is kept unless it is `clean`."""
    properties = (b"\0" if clean else b"\x05\x11\0\0\x0e\x10") if version == 5 else b""
    flags = 2 if clean else 0
    return packet(0x10, b"\0\4MQTT" + bytes((version, flags)) + b"\0\x3c" + properties + b"\0\3dev")


def written(connect: Connect, receive_maximum: int = 0) -> bytes:
    """Write a CONNECT again, with the Session Expiry Interval of `raw_connect`."""
    will = connect.will
    properties = b"" if connect.clean_start else b"\x11\0\0\x0e\x10"
    if receive_maximum:
        properties += b"\x21" + receive_maximum.to_bytes(2, "big")
    return mqtt_packets.connect(
        connect.client_identifier,
        version=connect.version,
        clean_start=connect.clean_start,
        keep_alive=connect.keep_alive,
        will_topic=None if will is None else will.topic,
        will_payload=b"" if will is None else will.payload,
        will_qos=0 if will is None else will.qos,
        will_retain=will is not None and will.retain,
        username=connect.username,
        password=connect.password,
        properties=properties,
    )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench with an empty store."""
    made = Bench(tmp_path, f"file:{tmp_path.name}?mode=memory&cache=shared", after=5.0)
    yield made
    made._keeps.close()


def acknowledgements(packets: list[bytes], first: int) -> list[int]:
    """Return the Packet Identifiers of acknowledgements."""
    return [int.from_bytes(raw[2:4], "big") for raw in packets if raw[0] == first]


# ---- CONNACK


def test_without_a_broker_the_device_is_accepted_at_once(bench: Bench) -> None:
    """After its state is durable."""
    bench.available = False
    device = Device()
    device.stored = bench.stored
    found, connect = parsed(raw_connect(4, clean=False))
    treatment = Treatment(connect=found.raw, version=connect.version)
    bench.stored.attach(device, found, treatment, ("10.0.0.1", ""), confirm=False)
    assert not device.connack
    bench.disk.commit()
    assert device.connack == b"\x20\2\0\0"
    assert device.offline
    assert not device.held


def test_a_broker_that_does_not_answer_is_waited_for_no_longer_than_after(bench: Bench) -> None:
    """The sweep comes every second, so it may be a second less."""
    device = bench.connect()
    bench.verified()
    bench.sweep(3.9)
    assert not device.connack
    bench.sweep(0.2)
    assert device.connack
    assert bench.now - 1000.0 <= 5.0


def test_the_brokers_connack_reaches_a_device_that_waits(bench: Bench) -> None:
    """With its limits, but without Topic Aliases and other servers."""
    device = bench.connect(5)
    bench.verified()
    properties = b"\x22\0\x0a" + b"\x21\0\x05" + b"\x24\1" + b"\x1c\0\1x"
    bench.stored.upstream_received(packet(0x20, b"\0\0" + bytes((len(properties),)) + properties))
    assert b"\x21\0\x05" in device.connack
    assert b"\x24\1" in device.connack
    assert b"\x22" not in device.connack[4:]
    assert b"\x1c" not in device.connack


def test_offline_the_device_gets_the_limits_of_the_last_connack(bench: Bench) -> None:
    """Also after a restart."""
    bench.connect(5)
    bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\0\3\x21\0\x05"))
    bench.settle()
    bench.start()
    device = bench.offline(version=5)
    assert b"\x21\0\x05" in device.connack


def test_the_packet_size_of_a_rule_is_told_to_both_sides(bench: Bench) -> None:
    """To the device also offline, and the broker's own if that is smaller."""
    size = b"\x27" + (3000).to_bytes(4, "big")
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, max_packet_size=3000)
    assert size in bench.offline(version=5).connack
    upstream = bench.verified()
    assert size in upstream.sent[0]
    bench.stored.upstream_received(packet(0x20, b"\0\0\5\x27" + (2000).to_bytes(4, "big")))
    bench.settle()
    bench.start()
    assert b"\x27" + (2000).to_bytes(4, "big") in bench.offline(version=5).connack


def test_session_present_is_true_offline_once_there_is_a_session(bench: Bench) -> None:
    """And false for a clean start."""
    bench.offline()
    bench.stored.device_received(b"\xe0\0")
    bench.settle()
    bench.open()
    assert bench.offline().connack[2] == 1
    assert bench.offline(clean=True).connack[2] == 0


def test_a_session_that_only_the_broker_knew_ends_the_devices(bench: Bench) -> None:
    """It was told that there is none."""
    device = bench.offline()
    upstream = bench.online(session_present=True)
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORED_SESSION_DIFFERS
    assert upstream.closed


@pytest.mark.parametrize(("version", "code"), [(4, 3), (5, 0x88), (5, 0x97), (5, 0x9F)])
def test_a_broker_that_is_busy_is_an_outage(bench: Bench, version: int, code: int) -> None:
    """The device is served."""
    device = bench.connect(version)
    bench.verified()
    bench.stored.upstream_received(packet(0x20, bytes((0, code)) + (b"\0" if version == 5 else b"")))
    assert device.connack
    assert device.ended is None


@pytest.mark.parametrize(("version", "code"), [(4, 5), (5, 0x86), (5, 0x85)])
def test_a_broker_that_refuses_the_devices_own_credentials_is_none(bench: Bench, version: int, code: int) -> None:
    """The device gets the broker's answer; its backlog waits."""
    device = bench.connect(version, username="u", password=b"wrong")
    bench.verified()
    answer = packet(0x20, bytes((0, code)) + (b"\0" if version == 5 else b""))
    bench.stored.upstream_received(answer)
    assert device.ended is not None
    assert device.answer == answer
    assert not device.connack


def test_credentials_of_the_rule_that_are_refused_are_an_outage(bench: Bench) -> None:
    """The device cannot help it."""

    def treatment(raw: bytes, connect: Connect) -> Treatment:
        del raw
        raised = attrs.evolve(connect, username="r", password=b"rule's")
        return Treatment(connect=written(raised), version=connect.version)

    bench.treatment = treatment
    device = bench.connect()
    bench.verified()
    bench.stored.upstream_received(b"\x20\2\0\5")
    assert device.connack
    assert device.ended is None


def test_no_credentials_reach_the_disk(bench: Bench) -> None:
    """Neither password nor its hash."""
    bench.connect(username="user", password=b"secret-password")
    bench.up(b"x")
    bench.settle()
    (state,) = bench.store.states.values()
    assert b"secret-password".hex() not in state
    assert "secret-password" not in state
    assert DeviceState.load(state).had_password


def test_only_the_first_connect_carries_clean_start(bench: Bench) -> None:
    """A later one would wipe the broker's queue; also if the gateway crashes in between."""
    bench.offline(version=5, clean=True)
    first = bench.verified()
    assert parsed(first.sent[0])[1].clean_start
    bench.lose()
    second = bench.verified()
    assert parsed(second.sent[0])[1].clean_start
    bench.stored.upstream_received(b"\x20\3\0\0\0")
    bench.settle()
    bench.lose()
    assert not parsed(bench.verified().sent[0])[1].clean_start


# ---- upwards


def test_offline_a_message_is_acknowledged_after_its_commit(bench: Bench) -> None:
    """Not before."""
    device = bench.offline()
    bench.up(b"x", identifier=7)
    assert device.got == []
    bench.disk.commit()
    assert device.got == [packet(PUBACK, b"\0\7")]


def test_live_the_device_gets_the_brokers_own_acknowledgement(bench: Bench) -> None:
    """With the broker's reason code, and nothing is written."""
    device = bench.connect(5)
    upstream = bench.online(version=5)
    assert bench.stored.phase is Phase.LIVE
    upstream.take()
    bench.up(b"x", identifier=7, version=5)
    ((_, payload, qos, identifier, _),) = [read_publish(5, raw) for raw in upstream.sent]
    assert (payload, qos) == (b"x", 1)
    assert device.got == []
    bench.ack(PUBACK, identifier, 0x10)
    assert device.got == [packet(PUBACK, b"\0\7\x10")]
    assert bench.store.counts.stored == 0


def test_a_slow_acknowledgement_is_replaced_by_the_disks_on_the_same_connection(bench: Bench) -> None:
    """The late one deletes the row; nothing is sent twice."""
    device = bench.connect()
    upstream = bench.online()
    for number in (1, 2, 3):
        bench.up(b"m%d" % number, identifier=number)
    bench.sweep(3.5)
    assert bench.stored.phase is Phase.LIVE
    bench.sweep(1.0)
    assert device.got == []
    bench.settle()
    assert acknowledgements(device.take(), PUBACK) == [1, 2, 3]
    assert bench.stored.phase is Phase.DRAINING
    bench.up(b"m4", identifier=4)
    bench.settle()
    for identifier in (1, 2, 3):
        bench.ack(PUBACK, identifier)
        bench.settle()
    assert upstream.payloads == [b"m1", b"m2", b"m3", b"m4"]
    bench.ack(PUBACK, 4)
    assert bench.stored.phase is Phase.LIVE
    assert bench.store.messages == 0
    assert acknowledgements(device.take(), PUBACK) == [4]
    assert not upstream.aborted


def test_an_answer_that_overtakes_the_commit_is_not_lost(bench: Bench) -> None:
    """The row is deleted as soon as it is there."""
    device = bench.connect()
    bench.online()
    bench.up(b"x", identifier=1)
    bench.sweep(4.5)
    bench.ack(PUBACK, 1)
    bench.settle()
    assert acknowledgements(device.got, PUBACK) == [1]
    assert bench.store.messages == 0
    assert bench.stored.phase is Phase.LIVE


def test_copies_survive_the_loss_of_their_connection(bench: Bench) -> None:
    """They go to disk, and leave again with DUP and the same Packet Identifier in the same session."""
    device = bench.connect()
    bench.online()
    bench.up(b"a", identifier=1)
    bench.up(b"b", identifier=2)
    bench.lose()
    bench.settle()
    assert acknowledgements(device.take(), PUBACK) == [1, 2]
    upstream = bench.online(session_present=True)
    again = [read_publish(4, raw) for raw in upstream.sent if raw[0] >> 4 == 3]
    assert [(payload, identifier, dup) for _, payload, _, identifier, dup in again] == [
        (b"a", 1, True),
        (b"b", 2, True),
    ]


def test_in_a_new_session_nothing_is_a_duplicate(bench: Bench) -> None:
    """DUP says that the receiver may have it."""
    bench.connect()
    bench.online()
    bench.up(b"a", identifier=1)
    bench.lose()
    bench.settle()
    upstream = bench.online(session_present=False)
    assert [read_publish(4, raw)[4] for raw in upstream.sent if raw[0] >> 4 == 3] == [False]


def test_no_more_than_the_window_is_in_flight(bench: Bench) -> None:
    """Twenty, or the broker's Receive Maximum if that is less."""
    bench.offline(version=5)
    for number in range(1, 51):
        bench.up(b"%d" % number, identifier=number, version=5)
    bench.settle()
    upstream = bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\0\3\x21\0\x04"))
    bench.settle()
    assert len([raw for raw in upstream.sent if raw[0] >> 4 == 3]) == 4


def test_qos_2_is_released_only_when_that_is_durable(bench: Bench) -> None:
    """After a crash in between, PUBREL and not PUBLISH follows PUBREC."""
    device = bench.offline()
    bench.up(b"x", qos=2, identifier=9)
    assert device.got == []
    bench.settle()
    assert acknowledgements(device.take(), PUBREC) == [9]
    upstream = bench.online()
    (raw,) = [raw for raw in upstream.take() if raw[0] >> 4 == 3]
    identifier = read_publish(4, raw)[3]
    bench.ack(PUBREC, identifier)
    assert acknowledgements(upstream.take(), PUBREL) == []
    bench.settle()
    assert acknowledgements(upstream.take(), PUBREL) == [identifier]
    bench.start()
    bench.stored.state = DeviceState.load(bench.store.states["dev"])
    bench.stored.sweep(bench.now)
    again = bench.online(session_present=True)
    assert acknowledgements(again.sent, PUBREL) == [identifier]
    assert again.payloads == []
    bench.ack(PUBCOMP, identifier)
    assert bench.store.messages == 0


def test_no_pubrel_leaves_whose_mark_failed_after_its_connection_broke(bench: Bench) -> None:
    """It is not durable: after a crash the message would be published a second time."""
    bench.offline()
    bench.up(b"a", qos=2, identifier=5)
    bench.settle()
    first = bench.online()
    identifier = read_publish(4, first.sent[-1])[3]
    bench.ack(PUBREC, identifier)
    bench.lose()
    bench.disk.failing = True
    bench.settle()
    bench.disk.failing = False
    again = bench.online(session_present=True)
    bench.recovered()
    assert PUBREL not in [raw[0] for raw in again.sent]
    assert again.payloads == [b"a"]
    bench.ack(PUBREC, identifier)
    bench.settle()
    assert again.sent[-1] == packet(PUBREL, identifier.to_bytes(2, "big"))


def test_qos_2_is_published_anew_in_a_new_session(bench: Bench) -> None:
    """What the broker had of it is gone."""
    bench.offline()
    bench.up(b"x", qos=2)
    bench.settle()
    upstream = bench.online()
    bench.ack(PUBREC, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    bench.lose()
    again = bench.online(session_present=False)
    assert again.payloads == [b"x"]
    assert not bench.store.released


@pytest.mark.parametrize("restarts", [False, True])
def test_qos_2_is_published_again_if_a_connack_was_lost(bench: Bench, *, restarts: bool) -> None:
    """The broker may have lost its session, and made the one that is present for the CONNECT without a CONNACK."""
    bench.offline()
    bench.up(b"x", qos=2)
    bench.settle()
    upstream = bench.online()
    identifier = read_publish(4, upstream.sent[-1])[3]
    bench.ack(PUBREC, identifier)
    bench.settle()
    bench.lose()
    unanswered = bench.verified()
    assert unanswered.sent == []  # that there is one has to survive a crash
    bench.settle()
    assert unanswered.sent[0][0] >> 4 == 1
    if restarts:
        bench.start()
        bench.stored.sweep(bench.now)
    else:
        bench.lose()
    again = bench.online(session_present=True)
    assert acknowledgements(again.sent, PUBREL) == []
    assert [read_publish(4, raw)[2:] for raw in again.sent if raw[0] >> 4 == 3] == [(2, identifier, True)]
    bench.ack(PUBREC, identifier)
    bench.settle()
    bench.lose()
    answered = bench.online(session_present=True)
    bench.settle()
    assert acknowledgements(answered.sent, PUBREL) == [identifier]


def test_a_qos_2_message_that_is_sent_again_is_stored_once(bench: Bench) -> None:
    """Its Packet Identifier is known until PUBREL, also after a restart."""
    bench.offline()
    bench.up(b"x", qos=2, identifier=9)
    bench.settle()
    bench.start()
    device = bench.offline()
    bench.up(b"x", qos=2, identifier=9, dup=True)
    assert acknowledgements(device.take(), PUBREC) == [9]
    assert bench.store.messages == 1
    bench.stored.device_received(packet(PUBREL, b"\0\x09"))
    assert device.got == []
    bench.settle()
    assert acknowledgements(device.take(), PUBCOMP) == [9]
    bench.up(b"y", qos=2, identifier=9)
    bench.settle()
    assert bench.store.messages == 2


@pytest.mark.parametrize("meanwhile", ["PUBREL again", "Clean Start"])
def test_a_failed_release_does_not_keep_an_identifier_that_was_released_since(bench: Bench, meanwhile: str) -> None:
    """The device's next message with that identifier would be taken for one that is stored, and be lost."""
    backlog = bench.stored.backlog
    bench.offline()
    bench.up(b"a", qos=2, identifier=5)
    bench.settle()
    outcomes: list[bool] = []
    bench.store.release(backlog, 5, lambda error: outcomes.append(error is None))
    if meanwhile == "Clean Start":
        bench.store.save(backlog, "{}", forget_received=True)
    else:
        bench.store.release(backlog, 5, lambda error: outcomes.append(error is None))
    bench.disk.failing = True
    bench.disk.commit(1)
    assert outcomes == [False]
    bench.disk.failing = False
    bench.settle()
    assert outcomes[1:] == [True] * (meanwhile == "PUBREL again")
    assert bench.store.received["dev"] == set()


def test_a_message_with_an_identifier_that_is_released_twice_is_stored_once(bench: Bench) -> None:
    """The second PUBREL becomes durable when the identifier is in use again."""
    device = bench.offline()
    bench.up(b"a", qos=2, identifier=5)
    bench.settle()
    for _ in range(2):
        bench.stored.device_received(packet(PUBREL, b"\0\5"))
    bench.disk.commit(1)
    assert acknowledgements(device.take(), PUBCOMP) == [5]
    bench.up(b"b", qos=2, identifier=5)
    bench.settle()
    bench.up(b"b", qos=2, identifier=5, dup=True)
    bench.settle()
    assert bench.store.messages == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_device_that_returns_before_its_qos_2_message_is_stored_is_told(bench: Bench, fails: bool) -> None:
    """It sends the message again, and would wait for PUBREC forever: the commit answered the session before."""
    bench.connect()
    bench.online()
    bench.up(b"a", qos=2, identifier=5)
    device = Device()
    device.stored = bench.stored
    found, connect = parsed(raw_connect(4, clean=False))
    bench.stored.attach(device, found, bench.treatment(found.raw, connect), ("10.0.0.1", ""), confirm=False)
    bench.stored.upstream_verified(Upstream(), _PEER, bench.treatment(found.raw, connect))
    bench.stored.upstream_received(b"\x20\2\1\0")
    assert device.connack
    bench.up(b"a", qos=2, identifier=5, dup=True)
    assert device.got == []
    bench.disk.failing = fails
    bench.settle()
    assert acknowledgements(device.got, PUBREC) == [5] * (not fails)
    assert (device.ended is not None) == fails
    assert bench.store.messages == (not fails)


def test_qos_0_from_disk_is_deleted_once_a_pingresp_confirms_it(bench: Bench) -> None:
    """A dead connection would swallow a backlog."""
    bench.offline()
    for number in range(30):
        bench.up(b"%d" % number, qos=0)
    bench.settle()
    upstream = bench.online()
    assert len(upstream.payloads) == 20
    assert bench.store.messages == 30
    assert upstream.sent[-1] == b"\xc0\0"
    bench.stored.upstream_received(b"\xd0\0")
    bench.settle()
    bench.stored.upstream_received(b"\xd0\0")
    bench.settle()
    assert bench.store.messages == 0
    assert upstream.payloads == [b"%d" % number for number in range(30)]


def test_confirmed_qos_0_is_sent_with_qos_1(bench: Bench) -> None:
    """And kept until the broker has it; the device hears nothing of it."""
    device = bench.connect(confirm=True)
    upstream = bench.online()
    bench.up(b"x", qos=0)
    assert read_publish(4, upstream.sent[-1])[2] == 1
    bench.lose()
    bench.settle()
    assert bench.store.messages == 1
    assert device.got == []


def test_messages_that_come_in_one_piece_are_stored_some_at_a_time(bench: Bench) -> None:
    """In order; the device is not read until all of them are."""
    device = bench.offline()
    pieces = [publish(4, b"t", b"%d" % number, 1, number, dup=False) for number in range(1, 101)]
    bench.stored.device_received(b"".join(pieces))
    turns = 1
    while device.behind:
        bench.settle()
        assert len(device.got) <= 40 * turns
        device.behind = False
        bench.stored.device_received(b"")
        turns += 1
    bench.settle()
    assert turns >= 3
    assert [raw[2:4] for raw in device.got] == [number.to_bytes(2, "big") for number in range(1, 101)]


def test_what_the_broker_sends_in_one_piece_is_passed_on_some_at_a_time(bench: Bench) -> None:
    device = bench.connect()
    upstream = bench.online()
    payloads = [b"%d" % number for number in range(100)]
    bench.stored.upstream_received(b"".join(publish(4, b"t", payload, 0, 0, dup=False) for payload in payloads))
    while upstream.behind:
        assert len(device.got) < 100
        upstream.behind = False
        bench.stored.upstream_received(b"")
    assert [read_publish(4, raw)[1] for raw in device.got] == payloads


def test_a_message_that_expired_is_deleted_and_counted(bench: Bench) -> None:
    """The time that it waited is taken off the others'."""
    bench.offline(version=5)
    for expiry in (10, 100):
        body = b"\0\1t\0" + bytes((expiry,)) + b"\5\2" + expiry.to_bytes(4, "big") + b"%d" % expiry
        bench.stored.device_received(packet(0x32, body))
    bench.settle()
    bench.now += 30
    upstream = bench.online(version=5)
    (sent,) = [raw for raw in upstream.sent if raw[0] >> 4 == 3]
    assert b"\2\0\0\0\x46" in sent
    assert bench.store.counts.dropped["expired"] == 1


def test_nothing_expires_by_a_clock_that_is_not_believed(bench: Bench) -> None:
    """It may be wrong by years."""
    bench.offline(version=5)
    bench.stored.device_received(packet(0x32, b"\0\1t\0\1\5\2\0\0\0\x0aabc"))
    bench.settle()
    bench.now += 1e6
    bench.is_plausible = False
    upstream = bench.online(version=5)
    assert len([raw for raw in upstream.sent if raw[0] >> 4 == 3]) == 1


def test_a_message_that_the_broker_refuses_is_set_aside(bench: Bench) -> None:
    """Those behind it pass."""
    bench.offline(version=5)
    bench.up(b"bad", identifier=1, version=5)
    bench.up(b"good", identifier=2, version=5)
    bench.settle()
    bench.online(version=5)
    bench.ack(PUBACK, 1, 0x87)
    bench.ack(PUBACK, 2)
    bench.settle()
    assert bench.store.messages == 0
    assert bench.store.aside["dev"] == 1


def test_a_quota_is_tried_three_times(bench: Bench) -> None:
    """It may pass."""
    bench.offline(version=5)
    bench.up(b"x", version=5)
    bench.settle()
    upstream = bench.online(version=5)
    for _ in range(3):
        sent = [raw for raw in upstream.take() if raw[0] >> 4 == 3]
        assert len(sent) == 1
        bench.ack(PUBACK, read_publish(5, sent[0])[3], 0x97)
        bench.settle()
    assert upstream.take() == []
    assert bench.store.aside["dev"] == 1


def test_a_topic_alias_is_a_fault(bench: Bench) -> None:
    """None is granted."""
    device = bench.offline(version=5)
    bench.stored.device_received(packet(0x32, b"\0\1t\0\1\3\x23\0\1x"))
    assert device.ended is not None
    assert device.ended[0] is EndReason.PROTOCOL_ERROR


# ---- a store that takes nothing


def test_without_broker_and_store_the_device_is_told(bench: Bench) -> None:
    """Nothing is acknowledged."""
    device = bench.offline()
    bench.disk.failing = True
    bench.up(b"x")
    bench.settle()
    assert device.got == []
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORE_UNAVAILABLE
    again = bench.connect()
    bench.settle()
    assert again.answer == b"\x20\2\0\3"


def test_with_a_broker_a_failing_store_leaves_the_device_live(bench: Bench) -> None:
    """However long the broker takes."""
    device = bench.connect()
    bench.online()
    bench.disk.failing = True
    bench.up(b"a", qos=2, identifier=1)
    bench.settle()
    assert device.ended is not None  # QoS 2 needs the disk
    device = bench.connect()
    upstream = bench.online(session_present=True)
    upstream.take()
    bench.up(b"b", identifier=2)
    bench.sweep(20)
    assert device.ended is None
    assert upstream.payloads == [b"b"]
    bench.ack(PUBACK, read_publish(4, upstream.sent[0])[3])
    assert acknowledgements(device.take(), PUBACK) == [2]


def test_what_was_sent_and_cannot_be_stored_is_not_sent_again(bench: Bench) -> None:
    """It waits for the broker's PUBACK (MQTT 5.0 §4.4)."""
    device = bench.connect()
    upstream = bench.online()
    upstream.take()
    bench.up(b"a", identifier=7)
    bench.disk.failing = True
    bench.sweep(6)
    bench.settle()
    assert upstream.payloads == [b"a"]
    assert device.ended is None
    bench.ack(PUBACK, read_publish(4, upstream.sent[0])[3])
    assert acknowledgements(device.take(), PUBACK) == [7]


def test_qos_2_stays_qos_2_while_nothing_can_be_stored(bench: Bench) -> None:
    """Neither behind a copy that waits for its PUBACK nor behind messages that go past the disk."""
    device = bench.connect()
    upstream = bench.online()
    bench.up(b"a", identifier=7)
    bench.disk.failing = True
    bench.sweep(6)
    bench.settle()
    bench.up(b"b", qos=2, identifier=8)
    assert upstream.payloads == [b"a"]
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORE_UNAVAILABLE


def test_a_release_that_cannot_be_stored_ends_the_session(bench: Bench) -> None:
    """The device does not repeat PUBREL on the same connection; when it does, it gets PUBCOMP."""
    device = bench.offline()
    bench.up(b"x", qos=2, identifier=3)
    bench.settle()
    bench.disk.failing = True
    bench.stored.device_received(packet(PUBREL, b"\0\3"))
    bench.settle()
    assert device.ended is not None
    assert acknowledgements(device.take(), PUBCOMP) == []
    assert bench.store.received["dev"] == {3}


def test_no_pubrel_overtakes_one_that_the_disk_did_not_take(bench: Bench) -> None:
    """Brokers may publish on PUBREL; both leave once the disk takes writes again."""
    bench.connect()
    upstream = bench.online()
    bench.up(b"a", qos=2, identifier=1)
    bench.up(b"b", qos=2, identifier=2)
    bench.settle()
    numbers = [read_publish(4, raw)[3] for raw in upstream.take() if raw[0] >> 4 == 3]
    bench.ack(PUBREC, numbers[0])
    bench.disk.failing = True
    bench.settle()
    bench.disk.failing = False
    bench.ack(PUBREC, numbers[1])
    bench.settle()
    assert acknowledgements(upstream.sent, PUBREL) == []
    bench.recovered()
    assert acknowledgements(upstream.sent, PUBREL) == numbers


def test_a_device_that_came_while_the_disk_failed_is_served_when_it_works(bench: Bench) -> None:
    """Its state is written once more."""
    bench.disk.failing = True
    device = bench.connect()
    bench.settle()
    bench.disk.failing = False
    bench.recovered()
    bench.stored.upstream_failed(SessionEnd(EndReason.TCP_REFUSED, "test"))
    bench.settle()
    assert device.connack


# ---- subscriptions and what comes down


def test_offline_a_subscription_is_answered_and_asked_for_later(bench: Bench) -> None:
    """Once; what the broker grants reaches nobody, since it was granted already."""
    device = bench.offline()
    bench.stored.device_received(packet(0x82, b"\0\5\0\3a/b\1"))
    assert device.got == []
    bench.settle()
    assert device.take() == [packet(0x90, b"\0\5\1")]
    upstream = bench.online()
    (asked,) = [raw for raw in upstream.sent if raw[0] == 0x82]
    bench.stored.upstream_received(packet(0x90, asked[2:4] + b"\1"))
    assert device.got == []
    bench.lose()
    assert [raw for raw in bench.online(session_present=True).sent if raw[0] == 0x82] == []


def test_a_broker_that_grants_less_ends_the_session(bench: Bench) -> None:
    """The device was told something else."""
    device = bench.offline()
    bench.stored.device_received(packet(0x82, b"\0\5\0\3a/b\1"))
    bench.settle()
    upstream = bench.online()
    (asked,) = [raw for raw in upstream.sent if raw[0] == 0x82]
    bench.stored.upstream_received(packet(0x90, asked[2:4] + b"\x80"))
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORED_SESSION_DIFFERS


def test_subscriptions_are_restored_in_a_new_session(bench: Bench) -> None:
    """Also after a restart of the gateway."""
    bench.connect()
    upstream = bench.online()
    bench.stored.device_received(packet(0x82, b"\0\5\0\3a/b\1"))
    (asked,) = [raw for raw in upstream.sent if raw[0] == 0x82]
    bench.stored.upstream_received(packet(0x90, asked[2:4] + b"\1"))
    bench.settle()
    bench.start()
    bench.connect()
    again = bench.online(session_present=False)
    assert [raw[4:] for raw in again.sent if raw[0] == 0x82] == [b"\0\3a/b\1"]


def test_more_subscriptions_than_are_remembered_end_the_session(bench: Bench) -> None:
    """Memory is bounded."""
    device = bench.offline()
    for number in range(102):
        bench.stored.device_received(packet(0x82, b"\0\5\0\3%03d\1" % number))
        bench.settle()
    assert device.ended is not None
    assert len(bench.stored.state.subscriptions.table) <= 100


def test_acknowledgements_owed_to_a_lost_connection_are_swallowed(bench: Bench) -> None:
    """The next one's broker has not asked for them."""
    device = bench.connect()
    bench.online()
    bench.stored.upstream_received(publish(4, b"c", b"1", 1, 7))
    assert device.take() == [publish(4, b"c", b"1", 1, 7)]
    bench.lose()
    upstream = bench.online(session_present=True)
    upstream.take()
    bench.stored.upstream_received(publish(4, b"c", b"1", 1, 7, dup=True))
    assert device.got == []  # that identifier is not free yet
    bench.stored.device_received(packet(PUBACK, b"\0\7"))
    assert upstream.take() == []
    assert device.take() == [publish(4, b"c", b"1", 1, 7, dup=True)]
    bench.stored.device_received(packet(PUBACK, b"\0\7"))
    assert upstream.take() == [packet(PUBACK, b"\0\7")]


def test_a_half_done_delivery_that_the_broker_forgot_is_completed(bench: Bench) -> None:
    """With a PUBREL of the gateway's."""
    device = bench.connect()
    bench.online()
    bench.stored.upstream_received(publish(4, b"c", b"1", 2, 7))
    bench.stored.device_received(packet(PUBREC, b"\0\7"))
    bench.lose()
    device.take()
    upstream = bench.online(session_present=False)
    assert device.take() == [packet(PUBREL, b"\0\7")]
    upstream.take()
    bench.stored.device_received(packet(PUBCOMP, b"\0\7"))
    assert upstream.take() == []


def test_pingreq_is_answered_by_the_gateway(bench: Bench) -> None:
    """The broker's Keep Alive is the gateway's to keep."""
    device = bench.connect()
    upstream = bench.online()
    upstream.take()
    bench.stored.device_received(b"\xc0\0")
    assert device.take() == [b"\xd0\0"]
    assert upstream.take() == []
    bench.sweep(31)
    assert upstream.take() == [b"\xc0\0"]


def test_a_broker_without_pingresp_is_given_up(bench: Bench) -> None:
    """Half a minute later."""
    bench.connect()
    upstream = bench.online()
    bench.sweep(31)
    bench.stored.device_received(b"\xc0\0")
    bench.sweep(29)
    assert not upstream.aborted
    # The answer has arrived and has not been read: this process may have been busy.
    upstream.unread = True
    bench.sweep(2)
    assert not upstream.aborted
    upstream.unread = False
    bench.sweep(1)
    assert upstream.aborted


def test_a_silent_device_is_ended_by_its_keep_alive(bench: Bench) -> None:
    """Offline, too."""
    device = bench.offline()
    bench.sweep(89)
    assert device.ended is None
    bench.sweep(3)
    assert device.ended is not None
    assert device.ended[0] is EndReason.KEEPALIVE_TIMEOUT


def test_what_has_arrived_is_read_before_a_side_is_judged_silent(bench: Bench) -> None:
    """This process may have been busy, not they."""
    device = bench.offline()
    device.unread = True
    bench.sweep(92)
    assert device.ended is None
    device.unread = False
    bench.sweep(3)
    assert device.ended is not None


# ---- leaving


WILL = parsed(packet(0x10, b"\0\4MQTT\4\x26\0\x3c\0\3dev\0\1s\0\4gone"))[1].will


def test_a_disconnect_waits_until_everything_is_delivered(bench: Bench) -> None:
    """Then it reaches the broker, and nothing is left."""
    bench.connect()
    upstream = bench.online()
    bench.up(b"x", identifier=3)
    bench.stored.device_received(b"\xe0\0")
    assert upstream.sent[-1] != b"\xe0\0"
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert upstream.sent[-1] == b"\xe0\0"
    assert upstream.closed
    assert bench.over_called


def test_a_backlog_is_delivered_for_a_device_that_left(bench: Bench) -> None:
    """Without its Will, one message at a time from the broker, and nothing that comes down is acknowledged."""
    bench.offline(version=5, will=WILL)
    bench.up(b"x", version=5)
    bench.settle()
    bench.stored.device_received(b"\xe0\0")
    bench.settle()
    upstream = bench.online(version=5, session_present=True)
    _, connect = parsed(upstream.sent[0])
    assert connect.will is None
    assert connect.client_identifier == "dev"
    assert connect.properties is not None
    assert connect.properties.values[0x21] == 1
    upstream.sent.pop(0)
    bench.stored.upstream_received(publish(5, b"c", b"1", 1, 7))
    assert acknowledgements(upstream.sent, PUBACK) == []
    bench.ack(PUBACK, read_publish(5, upstream.sent[0])[3])
    bench.settle()
    assert upstream.closed
    assert bench.over_called


def test_a_device_that_vanishes_offline_leaves_its_will_as_the_last_message(bench: Bench) -> None:
    """The broker knows of none."""
    device = bench.offline(will=WILL)
    bench.up(b"x")
    bench.settle()
    device.finish(EndReason.DEVICE_LOST)
    bench.sweep()
    bench.settle()
    upstream = bench.online()
    assert upstream.payloads == [b"x", b"gone"]


def test_a_device_that_disconnects_offline_has_no_will(bench: Bench) -> None:
    """As MQTT says."""
    bench.offline(will=WILL)
    bench.up(b"x")
    bench.settle()
    bench.stored.device_received(b"\xe0\0")
    bench.sweep()
    bench.settle()
    assert bench.online().payloads == [b"x"]


def test_a_will_survives_the_gateway(bench: Bench) -> None:
    """A device that does not come back within one and a half times its Keep Alive has vanished."""
    bench.offline(will=WILL)
    bench.settle()
    bench.start()
    bench.sweep(89)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(2)
    bench.settle()
    assert bench.store.messages == 1


def test_what_the_will_overwrote_is_said_again(bench: Bench) -> None:
    """The broker published the Will of a device that lives."""
    bench.connect(will=attrs.evolve(WILL, retain=True))
    upstream = bench.online()
    bench.stored.device_received(packet(0x33, b"\0\1s\0\1here"))
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.lose()
    bench.settle()
    again = bench.online(session_present=True)
    bench.settle()
    assert again.payloads == [b"here"]
    assert again.sent[-1][0] & 1


def test_a_will_that_the_broker_may_not_have_published_is_sent(bench: Bench) -> None:
    """The device vanished while a message was on its way, then the broker's connection broke."""
    device = bench.connect(will=WILL)
    bench.online()
    bench.up(b"x")
    bench.settle()
    device.finish(EndReason.DEVICE_LOST)
    bench.lose()
    bench.sweep()
    bench.settle()
    assert bench.online(session_present=True).payloads == [b"x", b"gone"]


def test_dropped_messages_take_the_will_of_a_device_that_is_away_with_them(bench: Bench) -> None:
    """Also over a restart."""
    delayed = b"\x18\0\0\0\x3c"
    found = parsed(
        mqtt_packets.connect("dev", version=5, will_topic="s", will_payload=b"gone", will_properties=delayed)
    )
    device = bench.offline(version=5, will=found[1].will)
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    assert not bench.over_called
    bench.stored.dropped()
    bench.settle()
    assert bench.over_called
    bench.start()
    bench.sweep(200)
    bench.settle()
    assert bench.store.messages == 0


def test_a_dial_for_messages_that_have_been_dropped_is_cancelled(bench: Bench) -> None:
    bench.offline()
    bench.up(b"x")
    bench.settle()
    bench.stored.device_received(b"\xe0\0")
    bench.settle()
    bench.available = True
    cancelled = bench.cancelled
    bench.stored._retry_at = 0.0
    bench.stored._dial()
    bench.store.drop(bench.store.backlog("dev"), lambda count, error: bench.stored.dropped())
    bench.settle()
    assert bench.over_called
    assert bench.cancelled == cancelled + 1


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_that_its_rule_no_longer_lets_through_is_told_once(bench: Bench, version: int) -> None:
    """In a CONNACK if it waits for one, which a device that was accepted does not."""
    code = 0x87 if version == 5 else 5
    waiting = bench.connect(version)
    bench.stored.upstream_refused(EndReason.RULE_REFUSED, "test", (5, 0x87))
    assert waiting.ended == (EndReason.RULE_REFUSED, "test")
    assert waiting.answer is not None
    assert waiting.answer[3] == code
    accepted = bench.offline(version=version)
    bench.stored.upstream_refused(EndReason.RULE_REFUSED, "test", (5, 0x87))
    assert accepted.ended == (EndReason.RULE_REFUSED, "test")
    assert accepted.answer is None


def test_a_device_of_3_1_is_refused_in_its_version(bench: Bench) -> None:
    """Not as the broker puts it, which was sent a CONNECT of 3.1.1; here with a padded length."""
    device = Device()
    device.stored = bench.stored
    found, _ = parsed(mqtt_packets.connect("dev", version=3))
    upgraded = Treatment(mqtt_packets.connect("dev"), ProtocolVersion.MQTT_3_1_1)
    bench.treatment = lambda raw, connect: upgraded
    bench.stored.attach(device, found, upgraded, ("10.0.0.1", ""), confirm=False)
    bench.disk.commit()
    bench.verified()
    bench.stored.upstream_received(b"\x20\x82\0\0\5")
    assert device.answer == b"\x20\2\0\5"


def test_a_predecessor_that_is_half_open_is_ended(bench: Bench) -> None:
    """Without a broker nobody else does it."""
    first = bench.offline()
    second = bench.offline()
    assert first.ended is not None
    assert first.ended[0] is EndReason.TAKEN_OVER
    assert second.ended is None
    assert not bench.over_called, "the predecessor has not left: there is a device"


def test_a_stop_writes_and_acknowledges_what_is_in_memory(bench: Bench) -> None:
    """Then the sessions end."""
    device = bench.connect()
    bench.online()
    bench.up(b"x", identifier=3)
    settled: list[bool] = []
    bench.stored.settle(lambda: settled.append(True))
    assert not settled
    bench.settle()
    assert settled
    assert acknowledgements(device.take(), PUBACK) == [3]


def test_nothing_leaves_before_the_scan_has_ended(bench: Bench) -> None:
    """The order is not known."""
    bench.stored.backlog.loading = True
    device = bench.connect()
    assert bench.dials == 0
    assert device.connack
    bench.stored.backlog.loading = False
    bench.sweep()
    assert bench.dials == 1


def test_another_client_that_took_over_at_the_broker_ends_the_session(bench: Bench) -> None:
    """To come back at once would throw it out."""
    device = bench.connect(5)
    bench.online(version=5)
    bench.stored.upstream_received(b"\xe0\1\x8e")
    assert device.ended is not None
    assert device.ended[0] is EndReason.UPSTREAM_DISCONNECT


def test_a_device_gives_way_to_another_with_its_client_identifier(bench: Bench) -> None:
    """The broker would end one of their connections."""
    device = bench.connect()
    upstream = bench.online()
    bench.up(b"x")
    bench.stored.give_way()
    bench.settle()
    assert device.ended is not None
    assert device.ended[0] is EndReason.TAKEN_OVER
    assert upstream.aborted


def test_a_backlog_gives_way_to_a_device_with_its_client_identifier(bench: Bench) -> None:
    """Whether it is connected to the broker or about to be; its messages stay."""
    with_backlog(bench, b"x")
    bench.stored.detached(bench.stored.visit.device)  # type: ignore[union-attr]
    upstream = bench.online()
    bench.stored.give_way()
    assert upstream.aborted
    assert bench.stored.phase is Phase.OFFLINE
    assert bench.store.messages == 1
    bench.sweep(2)
    bench.stored.give_way()
    late = Upstream()
    bench.stored.upstream_verified(late, _PEER, bench.treatment(b"", parsed(raw_connect(4, clean=False))[1]))
    assert late.aborted
    assert not late.sent


# ---- a device that asks for more than is answered


def subscribes(count: int, filters: int = 1) -> bytes:
    """Write SUBSCRIBEs to the same Topic Filter."""
    return b"".join(packet(0x82, number.to_bytes(2, "big") + b"\0\1c\1" * filters) for number in range(1, count + 1))


def go_on(bench: Bench, device: Device) -> None:
    """Let later turns come, and the disk do its work, until both are done."""
    while device.behind or bench.disk.queue:
        if device.behind:
            device.behind = False
            bench.stored.device_received(b"")
        bench.disk.commit()


def test_a_device_is_not_read_while_its_subscribes_are_not_answered(bench: Bench) -> None:
    """Else its requests would use up the Packet Identifiers, and the search for a free one would not end."""
    device, upstream = bench.connect(), bench.online()
    upstream.take()
    bench.stored.device_received(subscribes(500) + packet(0xC0, b""))
    asked = [raw for raw in upstream.take() if raw[0] == 0x82]
    assert 0 < len(asked) < 100
    assert device.held
    answered = 0
    while asked:
        for raw in asked:
            bench.stored.upstream_received(packet(0x90, raw[2:4] + b"\1"))
            answered += 1
        go_on(bench, device)
        asked = [raw for raw in upstream.take() if raw[0] == 0x82]
    assert answered == 500
    assert not device.held
    assert packet(0xD0, b"") in device.take(), "what it sent behind them is answered, too"


def test_offline_few_subscribes_wait_for_the_disk(bench: Bench) -> None:
    """Each of them writes down all that is known of the device."""
    device = bench.offline()
    bench.stored.device_received(subscribes(500))
    assert len(bench.disk.queue) == 1
    assert device.held
    go_on(bench, device)
    assert bench.disk.committed < 100
    assert acknowledgements(device.take(), 0x90) == list(range(1, 501))
    assert not device.held


def test_a_broker_that_answers_no_subscribe_is_given_up(bench: Bench) -> None:
    device, upstream = bench.connect(), bench.online()
    bench.stored.device_received(subscribes(100))
    for _ in range(100):
        bench.sweep()
        while any(raw[0] == 0xC0 for raw in upstream.take()):
            bench.stored.upstream_received(packet(0xD0, b""))
    assert upstream.aborted
    go_on(bench, device)
    assert len(acknowledgements(device.take(), 0x90)) == 100
    assert not device.held


def test_topic_filters_to_unsubscribe_from_are_bounded(bench: Bench) -> None:
    device = bench.offline()
    for number in range(200):
        if device.ended is None:
            bench.stored.device_received(packet(0xA2, b"\0\1\0\3" + b"%03d" % number))
            bench.settle()
    assert device.ended is not None
    assert device.ended[0] is EndReason.RULE_REFUSED
    assert len(bench.stored.state.subscriptions.untold) <= 100


def test_a_disk_that_does_not_take_a_subscription_ends_the_session(bench: Bench) -> None:
    """Otherwise the device would wait for a SUBACK that never comes."""
    device = bench.offline()
    bench.disk.failing = True
    bench.stored.device_received(subscribes(1))
    bench.settle()
    assert not acknowledgements(device.take(), 0x90)
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORE_UNAVAILABLE


def test_a_device_that_reads_no_answers_is_not_read(bench: Bench) -> None:
    device = bench.offline()
    bench.stored.device_full(True)
    assert device.held
    bench.stored.device_full(False)
    assert not device.held


def test_a_device_is_not_read_while_many_pubrels_wait_for_the_disk(bench: Bench) -> None:
    device = bench.offline()
    bench.stored.device_received(packet(PUBREL, b"\0\1") * 1000)
    while device.behind:
        device.behind = False
        bench.stored.device_received(b"")
    assert device.held
    bench.settle()
    assert acknowledgements(device.take(), PUBCOMP) == [1] * 1000
    assert not device.held


def test_a_pubrec_that_is_repeated_reaches_the_broker_once(bench: Bench) -> None:
    """A broker that does not read would make them wait in memory."""
    bench.connect()
    upstream = bench.online()
    bench.stored.upstream_received(publish(4, b"t", b"x", 2, 7))
    bench.stored.device_received(packet(PUBREC, b"\0\7") * 100)
    assert acknowledgements(upstream.take(), PUBREC) == [7]


def test_a_state_that_waits_for_an_earlier_one_is_written_at_the_stop(bench: Bench) -> None:
    """What the device said last must not be lost: here, that there is no Will."""
    bench.offline(will=WILL)
    bench.stored.device_received(subscribes(1))
    bench.stored.device_received(packet(0xE0, b""))
    bench.stored.stop(discard_will=False)
    bench.disk.close()
    bench.start()
    assert DeviceState.load(bench.store.states["dev"]).will is None


def test_a_state_is_written_although_an_error_followed_the_one_before(bench: Bench) -> None:
    """Later changes would wait for it forever."""
    bench.offline()

    def fail() -> None:
        raise ZeroDivisionError

    bench.stored._saving.save(fail)
    bench.stored._saving.save()
    with pytest.raises(ZeroDivisionError):
        bench.settle()
    bench.stored.state.will_delay = 7.0
    bench.stored._saving.save()
    bench.settle()
    assert DeviceState.load(bench.store.states["dev"]).will_delay == 7.0


def test_a_password_is_kept_in_memory_until_the_broker_refuses_it(bench: Bench) -> None:
    bench.offline(username="u", password=b"secret")
    bench.up(b"1")
    bench.settle()
    bench.stored.device_received(packet(0xE0, b""))
    upstream = bench.verified()
    assert b"secret" in upstream.sent[0]
    bench.stored.upstream_received(b"\x20\2\0\5")
    presented = bench.stored.presented()
    assert presented is not None
    assert presented[1].password is None


def test_bodies_of_the_brokers_packets_are_checked(bench: Bench) -> None:
    """As for any other device: a PUBLISH with Packet Identifier 0 does not reach it."""
    device, upstream = bench.connect(), bench.online()
    bench.stored.upstream_received(publish(4, b"t", b"x", 1, 0))
    assert device.take() == []
    assert upstream.aborted


def test_bodies_of_the_devices_packets_are_checked(bench: Bench) -> None:
    """An acknowledgement passes as it is, so its properties must be right."""
    device, upstream = bench.connect(version=5), bench.online(version=5)
    bench.stored.upstream_received(publish(5, b"t", b"x", 1, 7))
    upstream.take()
    bench.stored.device_received(packet(PUBACK, b"\0\7\0\2\xff\xff"))
    assert acknowledgements(upstream.take(), PUBACK) == []
    assert device.ended is not None
    assert device.ended[0] is EndReason.MALFORMED_PACKET


# ---- a broker that hangs up on a message


def hang_up(bench: Bench, *, others: bool = True) -> list[bytes]:
    """Connect, let the broker close the connection; return the payloads that it got.  A minute passes."""
    bench.stored.device_received(b"\xc0\0")
    bench.sweep(61)
    upstream = bench.online()
    bench.settle()
    if others:
        bench.store.counts.confirmed += 1
    got = upstream.payloads
    bench.stored.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "test", is_orderly=True))
    bench.settle()
    return got


def with_backlog(bench: Bench, *payloads: bytes) -> Device:
    """Serve a device without a broker, and store these."""
    device = bench.offline()
    for number, payload in enumerate(payloads, 1):
        bench.up(payload, identifier=number)
    bench.settle()
    return device


def test_a_message_on_which_the_broker_hangs_up_is_set_aside(bench: Bench) -> None:
    """After three times alone; the others are delivered."""
    with_backlog(bench, b"bad", b"good")
    assert hang_up(bench) == [b"bad", b"good"]
    for _ in range(3):
        assert hang_up(bench) == [b"bad"]
    assert sum(bench.store.aside.values()) == 1
    bench.sweep(61)
    upstream = bench.online()
    assert upstream.payloads == [b"good"]
    bench.ack(PUBACK, read_publish(4, upstream.sent[-1])[3])
    bench.settle()
    assert not bench.store.messages


def test_a_broker_that_hangs_up_on_everybody_costs_no_message(bench: Bench) -> None:
    """It has confirmed nothing of other devices in between, so it is no message's fault."""
    with_backlog(bench, b"x")
    for _ in range(6):
        assert hang_up(bench, others=False) == [b"x"]
    assert not bench.store.aside


def test_a_connection_that_breaks_costs_no_message(bench: Bench) -> None:
    """That is the network."""
    with_backlog(bench, b"x")
    for _ in range(6):
        bench.sweep(61)
        bench.online()
        bench.store.counts.confirmed += 1
        bench.stored.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "test"))
        bench.settle()
    assert not bench.store.aside


def test_after_two_messages_in_a_row_the_device_is_at_fault(bench: Bench) -> None:
    """Nothing more is sent until it comes anew, or a person asks for it."""
    with_backlog(bench, b"1", b"2", b"3")
    for _ in range(7):
        hang_up(bench)
    assert sum(bench.store.aside.values()) == 2
    dials = bench.dials
    bench.sweep(120)
    assert bench.dials == dials
    assert bench.stored.trouble is not None
    bench.stored.resume()
    bench.sweep(61)
    assert bench.dials == dials + 1


@pytest.mark.parametrize(
    ("told", "forbidden"),
    [
        (b"\x24\1", publish(5, b"t", b"no", 2, 2)),
        (b"\x25\0", packet(0x33, b"\0\1t\0\2\0no")),
        (b"\x27\0\0\0\x20", publish(5, b"t", b"no" * 20, 1, 2)),
    ],
    ids=["Maximum QoS", "Retain Available", "Maximum Packet Size"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_stricter_connack_forbids_is_set_aside(bench: Bench, told: bytes, forbidden: bytes, when: str) -> None:
    """The device was told otherwise, and a broker would hang up on it again and again (MQTT 5.0 §3.2.2.3)."""
    device = bench.offline(version=5)
    connack = packet(0x20, b"\0\0" + bytes((len(told),)) + told)
    messages = [publish(5, b"t", b"a", 1, 1), forbidden, publish(5, b"t", b"b", 1, 3)]

    def device_publishes() -> None:
        for raw in messages:
            bench.stored.device_received(raw)
            bench.settle()

    if when == "before":
        device_publishes()
    upstream = bench.verified()
    bench.stored.upstream_received(connack)
    bench.settle()
    if when == "after":
        device_publishes()
    for _ in range(4):
        for raw in upstream.take():
            if raw[0] >> 4 == 3:
                assert read_publish(5, raw)[1] in {b"a", b"b"}
                bench.ack(PUBACK, read_publish(5, raw)[3])
        bench.settle()
    assert (bench.store.messages, bench.store.counts.set_aside, bench.store.counts.drained) == (
        0,
        1,
        2 - (when == "after"),
    )
    assert device.ended is None
    assert sorted(acknowledgements(device.got, PUBACK) + acknowledgements(device.got, PUBREC)) == [1, 2, 3]


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_stricter_connack_forbids_is_not_sent_while_the_disk_fails(bench: Bench, waits: bool) -> None:
    """Neither behind a copy that is in flight nor behind messages that wait to go past the disk."""
    device = bench.offline(version=5)
    if waits:
        bench.up(b"in flight", version=5, identifier=9)
        bench.settle()
    upstream = bench.verified()
    upstream.version = 5
    bench.stored.upstream_received(packet(0x20, b"\0\0\5\x25\0\x21\0\1"))
    bench.settle()
    bench.disk.failing = True
    if not waits:
        # The store notices that it fails.
        bench.stored._saving.save()
        bench.settle()
    bench.up(b"a", version=5, identifier=1)
    bench.settle()
    assert upstream.payloads == [b"in flight" if waits else b"a"]
    bench.stored.device_received(packet(0x33, b"\0\1t\0\2\0no"))
    bench.settle()
    for _ in range(3):
        for raw in [raw for raw in upstream.sent if raw[0] >> 4 == 3]:
            bench.ack(PUBACK, read_publish(5, raw)[3])
        bench.settle()
    assert upstream.payloads == [*([b"in flight"] * waits), b"a"]
    assert device.ended is not None
    assert device.ended[0] is EndReason.STORE_UNAVAILABLE


@pytest.mark.parametrize(
    ("told", "raw", "code"),
    [(b"\x24\1", publish(5, b"t", b"no", 2, 2), 0x9B), (b"\x25\0", packet(0x33, b"\0\1t\0\2\0no"), 0x9A)],
)
def test_a_device_that_exceeds_what_it_was_told_is_disconnected(
    bench: Bench, told: bytes, raw: bytes, code: int
) -> None:
    """What can never be delivered is not acknowledged."""
    device = bench.connect(5)
    bench.verified()
    bench.stored.upstream_received(packet(0x20, b"\0\0" + bytes((len(told),)) + told))
    bench.settle()
    bench.stored.device_received(raw)
    bench.settle()
    assert device.ended is not None
    assert device.ended[0] is EndReason.PROTOCOL_ERROR
    assert device.code == code
    assert bench.store.messages == 0


def test_the_will_of_a_device_that_the_broker_refused_is_not_published(bench: Bench) -> None:
    """Whoever it was, the broker did not let it in."""
    device = bench.connect(will=WILL)
    bench.verified()
    bench.stored.upstream_received(b"\x20\2\0\5")
    bench.settle()
    assert device.ended is not None
    bench.sweep(120)
    bench.settle()
    assert bench.store.messages == 0
    bench.start()
    bench.sweep(120)
    bench.settle()
    assert bench.store.messages == 0


def test_a_token_that_expires_renews_only_the_upstream(bench: Bench) -> None:
    """The device notices nothing, and its next messages are stored or leave with the new token."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    device = bench.connect()
    first = bench.online()
    bench.sweep(18)
    bench.up(b"a", identifier=1)
    bench.sweep()
    assert not first.closed
    bench.sweep()
    assert first.closed
    assert first.sent[-1] == b"\xe0\0"
    bench.settle()
    assert acknowledgements(device.take(), PUBACK) == [1]
    again = bench.online(session_present=True)
    assert again.payloads == [b"a"]
    assert device.ended is None


def test_the_devices_receive_maximum_holds_over_two_connections(bench: Bench) -> None:
    """Messages of the old connection count until the device has acknowledged them (MQTT 5.0 §4.9)."""
    device = bench.connect(5, receive_maximum=2)
    bench.online(version=5)
    for number in (1, 2, 3):
        bench.stored.upstream_received(publish(5, b"c", b"old", 1, number))
    assert len(device.take()) == 2
    bench.lose()
    bench.online(version=5, session_present=True)
    for number in (11, 12):
        bench.stored.upstream_received(publish(5, b"c", b"new", 1, number))
    assert device.take() == []
    bench.stored.device_received(packet(PUBACK, b"\0\1"))
    assert [read_publish(5, raw)[3] for raw in device.take()] == [11]
    bench.stored.device_received(packet(PUBACK, b"\0\2") + packet(PUBACK, b"\0\x0b"))
    assert [read_publish(5, raw)[3] for raw in device.take()] == [12]


def test_disconnect_with_will_is_a_loss(bench: Bench) -> None:
    """Offline its Will becomes the last message (MQTT 5.0 §3.14.2.1)."""
    bench.offline(version=5, will=WILL)
    bench.up(b"x", version=5)
    bench.settle()
    bench.stored.device_received(b"\xe0\1\4")
    bench.sweep()
    bench.settle()
    assert bench.online(version=5).payloads == [b"x", b"gone"]


def test_disconnect_with_will_reaches_the_broker_behind_the_backlog(bench: Bench) -> None:
    """Then the broker publishes the Will, and the gateway does not."""
    bench.connect(5, will=WILL)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    bench.stored.device_received(b"\xe0\1\4")
    assert upstream.sent[-1] != b"\xe0\1\4"
    bench.ack(PUBACK, read_publish(5, upstream.sent[-1])[3])
    bench.settle()
    assert upstream.sent[-1] == b"\xe0\1\4"
    bench.sweep(120)
    bench.settle()
    assert bench.store.messages == 0


@pytest.mark.parametrize("clean", [False, True])
def test_disconnect_with_will_reaches_the_broker_if_the_device_returns_first(bench: Bench, clean: bool) -> None:
    """A plain DISCONNECT would make the broker discard the Will that the device has asked for."""
    bench.connect(5, will=WILL)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    bench.stored.device_received(b"\xe0\1\4")
    bench.settle()
    bench.connect(5, clean=clean)
    bench.ack(PUBACK, 1)
    assert upstream.closed
    assert upstream.sent[-1] == b"\xe0\1\4"


@pytest.mark.parametrize("farewell", [b"\xe0\0", b"\xe0\1\4", b""])
def test_a_token_that_expires_keeps_the_will_of_a_device_that_left(bench: Bench, farewell: bytes) -> None:
    """The broker publishes it if there is no DISCONNECT."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    device = bench.connect(5, will=WILL)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    if farewell:
        bench.stored.device_received(farewell)
    else:
        device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.sweep(21)
    assert upstream.closed
    assert (upstream.sent[-1] == b"\xe0\0") == (farewell == b"\xe0\0")


@pytest.mark.parametrize(
    ("delay", "clean", "published"), [(0.0, False, True), (60.0, False, False), (60.0, True, True)]
)
def test_a_predecessors_will_is_published_as_a_broker_would(
    bench: Bench, delay: float, clean: bool, published: bool
) -> None:
    """Offline nobody else does it; within its delay only if its session ends (MQTT 5.0 §3.1.4, §3.1.2.5)."""
    bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = delay
    bench.up(b"x", version=5)
    second = bench.offline(version=5, clean=clean)
    bench.up(b"y", version=5)
    bench.settle()
    assert second.ended is None
    assert bench.online(version=5).payloads == [b"x", *([b"gone"] * published), b"y"]


@pytest.mark.parametrize(
    ("delay", "seconds", "clean", "published"),
    [
        (0.0, 0.5, False, True),
        (60.0, 0.5, True, True),
        (60.0, 0.5, False, False),
        (60.0, 60.5, False, True),
        (0.0, 0.5, True, True),
    ],
)
@pytest.mark.parametrize("drains", [False, True])
def test_the_will_of_a_device_that_returns_before_the_sweep_is_published(
    bench: Bench, delay: float, seconds: float, clean: bool, published: bool, drains: bool
) -> None:
    """Its delay is over, or the session ends (MQTT 5.0 §3.1.2.5, §3.1.3.2.2); a broker that drains knows of none."""
    first = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = delay
    bench.up(b"x", version=5)
    bench.settle()
    first.finish(EndReason.DEVICE_LOST)
    if drains:
        bench.online(version=5)
    bench.now += seconds
    if drains:
        bench.connect(5, clean=clean)
        bench.lose()
        bench.settle()
    else:
        bench.offline(version=5, clean=clean)
    bench.settle()
    assert bench.online(version=5).payloads == [b"x", *([b"gone"] * published)]


def test_a_will_that_is_delayed_outlives_the_backlog(bench: Bench) -> None:
    """The broker to which the backlog was delivered knows of no Will (MQTT 5.0 §3.1.3.2.2)."""
    device = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    bench.up(b"x", version=5)
    bench.settle()
    device.finish(EndReason.DEVICE_LOST)
    upstream = bench.online(version=5)
    bench.ack(PUBACK, read_publish(5, upstream.sent[-1])[3])
    bench.settle()
    assert upstream.closed
    bench.sweep(59)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(2)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"]


@pytest.mark.parametrize("ends", ["is lost", "expires"])
def test_a_will_is_delayed_also_if_the_brokers_connection_ends_meanwhile(bench: Bench, ends: str) -> None:
    """The next connection of the session makes the broker forget the Will (MQTT 5.0 §3.1.3.2.2)."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    device = bench.connect(5, will=WILL)
    bench.stored.state.will_delay = 60.0
    bench.online(version=5)
    bench.up(b"x", version=5)
    device.finish(EndReason.DEVICE_LOST)
    if ends == "expires":
        bench.sweep(21)
    else:
        bench.lose()
        bench.now += 21
    upstream = bench.online(version=5)
    assert upstream.payloads == [b"x"]
    bench.ack(PUBACK, read_publish(5, upstream.sent[-1])[3])
    bench.settle()
    bench.sweep(35)
    bench.settle()
    assert bench.store.messages == 0
    bench.sweep(30)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"]


def test_a_will_that_the_broker_publishes_at_an_expired_token_is_not_sent_again(bench: Bench) -> None:
    """Without a delay, the end of the connection is enough for the broker."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, lives=20.0)
    device = bench.connect(5, will=WILL)
    bench.online(version=5)
    bench.up(b"x", version=5)
    device.finish(EndReason.DEVICE_LOST)
    bench.sweep(21)
    bench.online(version=5)
    bench.lose()
    bench.sweep(60)
    assert bench.online(version=5).payloads == [b"x"]


def test_a_message_behind_those_that_ended_the_session_does_not_reach_the_broker(bench: Bench) -> None:
    """It came once the disk was known to fail; the device sends it again, behind the others."""
    device = bench.connect()
    upstream = bench.online()
    bench.up(b"ends it", 2, 1)
    bench.up(b"first", 1, 2)
    bench.store.failure = StoreError("no space")
    bench.up(b"second", 1, 3)
    bench.up(b"nobody's", 0)
    bench.disk.failing = True
    bench.disk.commit()
    assert device.ended is not None
    assert upstream.payloads == [b"nobody's"]


@pytest.mark.parametrize("key", ["connect", "limits"])
def test_a_state_that_is_damaged_does_not_keep_its_device_out(bench: Bench, key: str) -> None:
    """It comes with another CONNECT; its messages wait until then."""
    bench.offline(version=5)
    bench.up(b"x", version=5)
    bench.settle()
    values = json.loads(bench.store.states["dev"])
    values[key] = "10ff"
    bench.store.states["dev"] = json.dumps(values)
    bench.open()
    assert bench.stored.presented() is None
    bench.offline(version=5)
    assert bench.online(version=5).payloads == [b"x"]


def payloads_in_the_end(bench: Bench) -> list[bytes]:
    """Let any delay pass; return what the broker then gets."""
    for _ in range(2):
        bench.sweep(200)
        bench.settle()
    return [] if bench.stored.is_over else bench.online(version=5).payloads


@pytest.mark.parametrize("how", ["left", "restarted", "half open"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_will_that_is_due_is_published_also_if_the_next_connect_is_not_accepted(
    bench: Bench, how: str, refused: bool
) -> None:
    """No session was resumed (MQTT 5.0 §3.1.3.2.2)."""
    first = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    bench.settle()
    if how == "left":
        first.finish(EndReason.DEVICE_LOST)
        bench.settle()
        bench.sweep(10)
    elif how == "restarted":
        bench.start()
    bench.available = True
    second = bench.connect(5)
    assert not second.connack
    if refused:
        bench.verified()
        bench.stored.upstream_received(packet(0x20, b"\0\x87\0"))
        assert second.ended is not None
    else:
        second.finish(EndReason.DEVICE_LOST)
    bench.settle()
    assert payloads_in_the_end(bench) == [b"gone"]


def test_a_will_is_published_once_if_the_gateway_stops_in_order(bench: Bench) -> None:
    """By the gateway, after its restart; without a DISCONNECT the broker would, too."""
    device = bench.connect(5, will=WILL)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    device.finish(EndReason.DEVICE_LOST)
    bench.stored.settle(lambda: None)
    bench.settle()
    bench.stored.stop(discard_will=False)
    bench.settle()
    assert upstream.sent[-1] == b"\xe0\0"
    bench.start()
    bench.sweep(1)
    bench.settle()
    assert bench.online(version=5).payloads.count(b"gone") == 1


@pytest.mark.parametrize("clean", [False, True])
def test_a_device_that_left_before_a_restart_has_vanished(bench: Bench, clean: bool) -> None:
    """Clean Start ends its session within the Will Delay, and so publishes the Will (MQTT 5.0 §3.1.3.2.2)."""
    device = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 60.0
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.start()
    bench.sweep(50)
    bench.offline(version=5, clean=clean)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"] * clean


def test_the_will_of_a_device_that_left_before_a_restart_waits_for_its_delay_only(bench: Bench) -> None:
    """Not for its Keep Alive as well."""
    device = bench.offline(version=5, will=WILL)
    bench.stored.state.will_delay = 10.0
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    bench.start()
    bench.sweep(11)
    bench.settle()
    assert bench.online(version=5).payloads == [b"gone"]


@pytest.mark.parametrize("clean", [False, True])
def test_a_device_that_returns_after_a_restart_has_not_vanished(bench: Bench, clean: bool) -> None:
    """The gateway was away, and not the device."""
    bench.offline(version=5, will=WILL)
    bench.settle()
    bench.start()
    bench.offline(version=5, clean=clean)
    bench.settle()
    assert bench.online(version=5).payloads == []


def waiting_behind(bench: Bench, version: int) -> tuple[Device, Upstream]:
    """Let a device come with Clean Start while messages of the one before it are in flight."""
    bench.offline(version=version)
    for number in range(1, 31):
        bench.up(b"%d" % number, identifier=number, version=version)
    bench.settle()
    bench.stored.device_received(b"\xe0\0")
    upstream = bench.online(version=version)
    assert len(upstream.payloads) == 20
    device = bench.connect(version, clean=True)
    bench.settle()
    assert not upstream.closed
    assert not device.connack
    return device, upstream


@pytest.mark.parametrize("version", [4, 5])
def test_clean_start_waits_for_what_its_predecessor_has_in_flight(bench: Bench, version: int) -> None:
    """It ends the session that the broker knows those messages by (MQTT 5.0 §3.1.2.4)."""
    device, upstream = waiting_behind(bench, version)
    bench.stored.upstream_received(publish(version, b"c", b"for the old session", 1, 7))
    in_flight = [read_publish(version, raw)[3] for raw in upstream.sent if raw[0] >> 4 == 3]
    for identifier in in_flight[:-1]:
        bench.ack(PUBACK, identifier)
    bench.settle()
    bench.sweep()
    assert not upstream.closed
    assert len(upstream.payloads) == 20
    bench.ack(PUBACK, in_flight[-1])
    assert upstream.closed
    assert acknowledgements(upstream.sent, PUBACK) == []
    again = bench.online(version=version)
    assert parsed(again.sent[0])[1].clean_start
    assert again.payloads == [b"%d" % number for number in range(21, 31)]
    assert device.connack
    assert device.got == []


def test_clean_start_waits_no_longer_than_after(bench: Bench) -> None:
    """A broker that acknowledges nothing keeps no device waiting."""
    device, upstream = waiting_behind(bench, 5)
    bench.available = False
    for _ in range(5):
        assert not device.connack
        bench.sweep()
    bench.settle()
    assert upstream.closed
    assert device.connack


def finish_in_flight(bench: Bench, upstream: Upstream, version: int) -> None:
    """Let the broker acknowledge what `waiting_behind` has sent."""
    for raw in [raw for raw in upstream.sent if raw[0] >> 4 == 3]:
        bench.ack(PUBACK, read_publish(version, raw)[3])
    bench.settle()


@pytest.mark.parametrize("returns", ["", "clean", "persistent"])
def test_a_device_that_leaves_while_it_waits_for_its_predecessor_repeats_nothing(bench: Bench, returns: str) -> None:
    """Its predecessor's messages are still waited for, also if it returns; the backlog goes on."""
    device, upstream = waiting_behind(bench, 5)
    device.finish(EndReason.DEVICE_LOST)
    bench.settle()
    if returns:
        bench.connect(5, clean=returns == "clean")
        bench.settle()
    assert not upstream.closed
    finish_in_flight(bench, upstream, 5)
    assert upstream.closed
    assert upstream.sent[-1] == b"\xe0\0"
    again = bench.online(version=5)
    assert parsed(again.sent[0])[1].clean_start
    assert again.payloads == [b"%d" % number for number in range(21, 31)]


def test_a_pause_of_the_process_is_no_reason_to_give_up_a_predecessors_messages(bench: Bench) -> None:
    """What the broker has acknowledged meanwhile has not been read yet."""
    _, upstream = waiting_behind(bench, 5)
    bench.now += 60
    bench.stored.give_back(60, bench.now)
    bench.sweep(0)
    assert not upstream.closed
    finish_in_flight(bench, upstream, 5)
    assert upstream.closed
    assert bench.online(version=5).payloads == [b"%d" % number for number in range(21, 31)]


@pytest.mark.parametrize("farewell", [b"\xe0\0", b"\xe0\1\4", b""])
@pytest.mark.parametrize("discard", [False, True])
def test_a_stop_while_a_device_waits_leaves_the_broker_as_its_predecessor_did(
    bench: Bench, farewell: bytes, discard: bool
) -> None:
    """Its Will is published if it asked for that, or vanished, unless Wills are to be discarded."""
    first = bench.connect(5, will=WILL)
    upstream = bench.online(version=5)
    bench.up(b"x", version=5)
    bench.sweep(6)
    bench.settle()
    if farewell:
        bench.stored.device_received(farewell)
    else:
        first.finish(EndReason.DEVICE_LOST)
    device = bench.connect(5, clean=True)
    bench.settle()
    bench.stored.settle(lambda: None)
    device.finish(EndReason.GATEWAY_STOPPING)
    bench.settle()
    assert not upstream.closed
    bench.stored.stop(discard_will=discard)
    assert upstream.closed
    last = upstream.sent[-1] if upstream.sent[-1][0] == 0xE0 else b""
    assert last == (b"\xe0\0" if discard else farewell)


def test_what_waited_for_the_broker_leaves_at_a_pace(bench: Bench) -> None:
    """All backlogs share it; what the device sends after that is not slowed down by it."""
    turns: list[bool] = []
    pace = DrainPace(100.0, lambda: bench.now, lambda: turns.append(True))
    bench.pace_drains(pace)
    bench.offline()
    for number in range(1, 11):
        bench.up(b"%d" % number, identifier=number)
    bench.settle()
    upstream = bench.online()
    assert len(upstream.payloads) == 2
    assert turns
    bench.now += 0.03
    pace.go_on()
    assert len(upstream.payloads) == 4
    bench.now += 0.02
    pace.go_on()
    assert len(upstream.payloads) == 6
    for identifier in range(11, 15):
        bench.up(b"%d" % identifier, qos=2, identifier=identifier)
    bench.settle()
    for _ in range(2):
        bench.now += 0.02
        pace.go_on()
    assert len(upstream.payloads) == 14  # nothing of the last four waited for its turn
    assert not pace._waiting


def test_a_backlog_leaves_no_faster_than_its_rule_lets_the_device_send(bench: Bench) -> None:
    """A broker may have limits for each client, and close the connection of one that exceeds them."""
    bench.treatment = lambda raw, connect: Treatment(connect=raw, version=connect.version, packets_per_second=2.0)
    bench.offline()
    for number in range(1, 16):
        bench.up(b"%d" % number, identifier=number)
        bench.sweep()
    bench.settle()
    upstream = bench.online()
    burst = len(upstream.payloads)
    assert burst == 5
    bench.sweep()
    bench.settle()
    assert len(upstream.payloads) <= burst + 2
    for _ in range(6):
        bench.sweep()
        bench.settle()
    assert len(upstream.payloads) == 15


def test_a_device_that_never_rests_is_live_again(bench: Bench) -> None:
    """Each of its messages is sent before the one before is acknowledged; nothing of that need be written."""
    device = bench.offline()
    bench.up(b"1", identifier=1)
    bench.settle()
    upstream = bench.online()
    for number in range(2, 5):
        bench.up(b"%d" % number, identifier=number)
        bench.settle()
        before = read_publish(4, [raw for raw in upstream.sent if raw[0] >> 4 == 3][number - 2])[3]
        bench.ack(PUBACK, before)
    assert bench.stored.phase is Phase.LIVE
    assert bench.store.counts.stored == 1
    assert upstream.payloads == [b"1", b"2", b"3", b"4"]
    assert acknowledgements(device.take(), PUBACK) == [1, 2, 3]


def test_rows_in_flight_come_before_copies_if_the_connection_breaks(bench: Bench) -> None:
    """In the order in which the device sent them, with DUP on what may have been received."""
    bench.offline()
    bench.up(b"1", identifier=1)
    bench.settle()
    bench.online()
    bench.up(b"2", identifier=2)
    bench.lose()
    bench.settle()
    again = bench.online(session_present=True)
    assert again.payloads == [b"1", b"2"]
    assert all(raw[0] & 8 for raw in again.sent if raw[0] >> 4 == 3)


def test_what_could_not_be_stored_of_a_session_that_ended_overtakes_nothing(bench: Bench) -> None:
    """The device sends all of it again, in its order; the broker must not get the last messages first."""
    device = bench.offline()
    bench.up(b"1", identifier=1)
    bench.up(b"2", identifier=2)
    bench.disk.failing = True
    bench.disk.commit(1)
    assert device.ended is not None
    upstream = bench.online()
    bench.settle()
    assert upstream.payloads == []
    assert device.got == []


@pytest.mark.parametrize("qos", [1, 2])
def test_a_message_after_a_long_rest_has_its_time(bench: Bench, qos: int) -> None:
    """The broker acknowledged nothing meanwhile because there was nothing."""
    bench.connect(keep_alive=600)
    upstream = bench.online()
    for _ in range(100):
        bench.sweep()
    bench.up(b"x", qos)
    bench.settle()
    for _ in range(3):
        bench.sweep()
    assert upstream.payloads == [b"x"]
    assert not upstream.aborted


def test_a_broker_that_acknowledges_steadily_is_not_stuck(bench: Bench) -> None:
    """Although something is in flight all the time."""
    bench.connect(keep_alive=600)
    upstream = bench.online()
    for number in range(1, 30):
        bench.up(b"x", identifier=number)
        if number > 1:
            bench.ack(PUBACK, read_publish(4, upstream.sent[-2])[3])
        bench.sweep(3)
    assert not upstream.aborted
    assert bench.stored.phase is Phase.LIVE
