"""A session whose device is stored for: its part of the work, with sides that only remember."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config import Timeouts
from gateway.errors import EndReason
from gateway.session.record import Dial
from gateway.session.session import Session, State
from tests import mqtt_packets as mqtt
from tests.facts import PEER
from tests.test_session import EPOCH, Bench


class RememberingStore:
    """A `Store` that does nothing but remember."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.left: list[Session] = []
        self.settled: list[Any] = []

    def device_received(self, data: bytes) -> None:
        self.received.append(data)

    def detached(self, device: Session) -> None:
        self.left.append(device)

    def settle(self, done: Any) -> None:
        self.settled.append(done)


def stored(*, admitted: bool = True, **packet: Any) -> tuple[Bench, RememberingStore]:
    """Return a session with a device that is stored for; it has its CONNACK if it was admitted."""
    bench, store = Bench().connect(**packet), RememberingStore()
    bench.session.become_stored(store)
    if admitted:
        bench.session.admit(mqtt.connack(), offline=True)
    return bench, store


def test_what_a_stored_device_sends_waits_until_it_is_accepted() -> None:
    """Then it goes to whoever stores for it, what came before first; the record says whether there was a broker."""
    bench = Bench().connect()
    store = RememberingStore()
    bench.session.become_stored(store)
    bench.session.device_received(mqtt.publish())
    assert not store.received
    assert bench.session.admit(mqtt.connack(), offline=True) == mqtt.publish()
    bench.session.device_received(mqtt.pingreq())
    assert store.received == [mqtt.pingreq()]
    assert bench.device.bytes == mqtt.connack()
    assert [record.offline for record in bench.journal.started] == [True]


def test_a_stored_device_is_watched_now_and_then() -> None:
    """As others; its broker is watched by whoever stores for it."""
    bench = Bench(timeouts=Timeouts(tcp_user=60)).connect()
    bench.session.become_stored(RememberingStore())
    bench.session.admit(mqtt.connack(), offline=False)
    bench.pass_seconds(60)
    assert 10 <= len(bench.device.checked) <= 15


def test_a_device_that_waits_for_its_connack_is_shown_as_dialling() -> None:
    """Nobody has heard it beyond CONNECT, whatever it sent."""
    bench, _ = stored(admitted=False)
    bench.session.device_received(mqtt.publish())
    assert (bench.session.shown_state, bench.session.last_heard) == (State.DIALLING, None)
    bench.clock.advance(3)
    bench.session.admit(mqtt.connack(), offline=True)
    assert (bench.session.shown_state, bench.session.last_heard) == (State.STORED, EPOCH + 3)
    bench.clock.advance(2)
    bench.session.device_received(mqtt.pingreq())
    assert bench.session.last_heard == EPOCH + 5
    bench.session.device_gone("closed")
    (record,) = bench.journal.ended
    assert (record.connect_seconds, record.connack_seconds, record.duration) == (0, 3, 5)


def test_what_passes_between_a_device_and_the_store_is_counted() -> None:
    """With what came behind CONNECT; a packet is counted by whoever reads it."""
    bench, _ = stored(admitted=False)
    before = bench.session.traffic
    bench.session.device_received(mqtt.publish())
    bench.session.admit(mqtt.connack(), offline=True)
    bench.session.device_received(mqtt.pingreq())
    bench.session.count_up()
    bench.session.send(mqtt.pingresp())
    after = bench.session.traffic
    assert after.bytes_up - before.bytes_up == len(mqtt.publish() + mqtt.pingreq())
    assert after.bytes_down - before.bytes_down == len(mqtt.connack() + mqtt.pingresp())
    assert (after.packets_up - before.packets_up, after.packets_down - before.packets_down) == (1, 2)


def test_the_record_of_a_stored_device_has_its_broker() -> None:
    """Once that is verified: who it is, and how long it took."""
    bench, _ = stored(admitted=False)
    dial = Dial(bench.session.record.upstream)
    dial.address, dial.tls_seconds = "192.0.2.1:8883", 0.25
    bench.session.dials(dial)
    bench.session.verified(PEER)
    record = bench.session.record
    assert (record.peer, record.upstream_address, record.tls_seconds) == (PEER, "192.0.2.1:8883", 0.25)


def test_who_stores_decides_whether_the_device_is_read() -> None:
    bench, _ = stored()
    bench.session.release()
    assert not bench.device.held
    bench.session.hold()
    assert bench.device.held
    bench.session.go_on_later()
    assert bench.device.behind
    for unread in (True, False):
        bench.device.unread = unread
        assert bench.session.unread is unread


def test_a_stored_device_that_only_pings_has_sent_no_data() -> None:
    bench, _ = stored()
    bench.session.release()
    began = bench.session._last_data
    for _ in range(3):
        bench.pass_seconds(5)
        bench.session.device_received(mqtt.pingreq())
        bench.session.count_up()
        bench.pass_seconds(1)
        assert bench.session._last_data == began
    bench.session.device_received(mqtt.publish())
    bench.session.count_up()
    bench.pass_seconds(1)
    assert bench.session._last_data == bench.clock.seconds()


def test_a_stop_waits_until_the_messages_of_a_device_are_on_disk() -> None:
    """And acknowledged; then the session ends."""
    bench, store = stored()
    bench.session.stop(EndReason.GATEWAY_STOPPING)
    assert bench.reason is None
    (done,) = store.settled
    done()
    assert bench.reason is EndReason.GATEWAY_STOPPING
    assert store.left == [bench.session]


@pytest.mark.parametrize("reason", [EndReason.GATEWAY_STOPPING, EndReason.TAKEN_OVER])
def test_a_disk_that_does_not_take_messages_holds_up_a_stop_for_a_bounded_time(reason: EndReason) -> None:
    """As long as a connection has to close. Only a stop waits at all."""
    bench = Bench(timeouts=Timeouts(close=5)).connect(keep_alive=0)
    bench.session.become_stored(RememberingStore())
    bench.session.admit(mqtt.connack(), offline=True)
    bench.session.stop(reason)
    assert (bench.reason is None) is (reason is EndReason.GATEWAY_STOPPING)
    bench.pass_seconds(4)
    assert (bench.reason is None) is (reason is EndReason.GATEWAY_STOPPING)
    bench.pass_seconds(2)
    assert bench.reason is reason
    assert ("not written to disk" in bench.journal.ended[0].detail) is (reason is EndReason.GATEWAY_STOPPING)


def test_nothing_of_connect_is_kept_for_a_stored_device() -> None:
    """Who stores has what is needed of it, with the credentials, and lets go of those."""
    bench, _ = stored(username="u", password=b"p")
    assert bench.session._connect_packet is None
