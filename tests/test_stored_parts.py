"""The parts of a stored session, each alone: its state, its subscriptions, its requests, what it reads in CONNECT."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import pytest

from gateway.errors import EndReason, PacketError, UpstreamFailure
from gateway.mqtt.message import Message, Subscription, suback, subscribe, unsuback, unsubscribe
from gateway.mqtt.packets import PacketType, ProtocolVersion
from gateway.session.requests import Requests
from gateway.session.saving import Saving
from gateway.session.stored_connect import are_readable, integer_of, is_persistent, limits_of, packet_of, will_of
from gateway.session.stored_state import DeviceState
from gateway.session.subscriptions import MOST, MOST_BYTES, Subscriptions
from gateway.store.database import StoreError
from gateway.stored_devices import StoredConnection

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


def state_with(**values: Any) -> DeviceState:
    """Return a state with a subscription that the broker granted, one that it does not know, and a removal."""
    state = DeviceState(**values)
    state.subscriptions.add([Subscription("a", 1, 5)], told=True)
    state.subscriptions.add([Subscription("b", 2)], told=False)
    state.subscriptions.remove(["c"], told=False)
    return state


STATES = [
    state_with(connect=b"\x10\0", had_password=True, address="10.0.0.1", listener="l", has_session=True),
    state_with(clean_pending=True, limits=b"\x02\x24\0", will=Message(b"t", b"\xff", 1, True), will_delay=2.5),
    state_with(connack_missing=True, will=Message(b"t", b"", 0, properties=b"\1\1", expiry=7)),
    state_with(has_left=True, will=Message(b"t", b"", 2, properties=b"")),
    DeviceState(),
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_comes_back_from_the_disk_as_it_was(state: DeviceState) -> None:
    """Each field of it."""
    again = DeviceState.load(state.dumped())
    for name in DeviceState.__slots__:
        if name not in ("subscriptions", "__weakref__"):
            assert getattr(again, name) == getattr(state, name), name
    assert again.subscriptions.table == state.subscriptions.table
    assert again.subscriptions.untold == state.subscriptions.untold


def test_a_state_of_an_earlier_version_is_read() -> None:
    """It says less."""
    values = json.loads(state_with(has_session=True).dumped())
    del values["connack_missing"], values["has_left"]
    state = DeviceState.load(json.dumps(values))
    assert (state.has_session, state.connack_missing, state.has_left) == (True, False, False)


def test_a_state_that_cannot_be_read_is_an_empty_one() -> None:
    """Whatever is wrong with it."""
    for text in ("", "[]", "{}", "7", '{"connect": "zz"}'):
        assert DeviceState.load(text).dumped() == DeviceState().dumped()


def test_so_many_subscriptions_fit() -> None:
    """Those that the device has, those that it gave up, and those that it asks for, each counted once."""
    subscriptions = Subscriptions()
    subscriptions.add([Subscription(str(number), 0) for number in range(MOST - 2)], told=True)
    subscriptions.remove(["gone"], told=False)
    assert subscriptions.fits(["new", "gone", "0"])
    assert not subscriptions.fits(["new", "newer"])
    assert Subscriptions().fits(["é" * (MOST_BYTES // 2)])
    assert not Subscriptions().fits(["é" * (MOST_BYTES // 2), "x"])


def test_a_broker_that_kept_the_session_is_asked_for_what_changed() -> None:
    """One that did not is asked for everything, in groups of one Subscription Identifier; it has nothing to remove."""
    state = state_with()
    state.subscriptions.add([Subscription("d", 0, 5)], told=True)
    a, b, d = Subscription("a", 1, 5), Subscription("b", 2), Subscription("d", 0, 5)
    assert state.subscriptions.to_ask(session_present=True) == ([[b]], ["c"])
    assert state.subscriptions.to_ask(session_present=False) == ([[a, d], [b]], [])
    state.subscriptions.add([b], told=True)
    state.subscriptions.remove(["c", "a"], told=True)
    assert state.subscriptions.to_ask(session_present=True) == ([], [])
    assert state.subscriptions.to_ask(session_present=False) == ([[b], [d]], [])
    state.subscriptions.remove(["d"], told=False)
    state.subscriptions.clear()
    assert state.subscriptions.to_ask(session_present=True) == ([], [])
    assert state.subscriptions.to_ask(session_present=False) == ([], [])


# ---- CONNECT and CONNACK

# A Will with a delay of 3 s, an expiry of 9 s and a Payload Format Indicator.
WILL_PROPERTIES = b"\x0c\x18\0\0\0\3\1\1\2\0\0\0\x09"


def connect(version: int = 4, flags: int = 0, properties: bytes = b"", will: bytes = b"") -> bytes:
    """Return a CONNECT of device `d`."""
    section = bytes((len(properties),)) + properties if version == 5 else b""
    body = b"\0\4MQTT" + bytes((version, flags)) + b"\0\x3c" + section + b"\0\1d" + will
    return b"\x10" + bytes((len(body),)) + body


def test_a_will_is_read_as_the_message_that_it_becomes() -> None:
    """Its delay and its expiry are no properties of the message."""
    assert will_of(*packet_of(connect(), 100)) == (None, 0.0)
    assert will_of(*packet_of(connect(4, 0x2C, will=b"\0\1t\0\1x"), 100)) == (Message(b"t", b"x", 1, retain=True), 0.0)
    raw = connect(5, 0x14, will=WILL_PROPERTIES + b"\0\1t\0\1x")
    assert will_of(*packet_of(raw, 100)) == (Message(b"t", b"x", 2, properties=b"\1\1", expiry=9), 3.0)
    raw = connect(5, 0x04, will=b"\0\0\1t\0\1x")
    assert will_of(*packet_of(raw, 100)) == (Message(b"t", b"x", 0, properties=b""), 0.0)


@pytest.mark.parametrize(
    ("raw", "persistent"),
    [
        (connect(), True),
        (connect(flags=2), False),
        (connect(5), False),
        (connect(5, 2, b"\x11\0\0\0\0"), False),
        (connect(5, 2, b"\x11\0\0\0\1"), True),
    ],
)
def test_a_session_outlives_its_connection_as_its_connect_says(raw: bytes, persistent: bool) -> None:
    """By Clean Session in 3.1.1, by Session Expiry Interval in 5.0."""
    assert is_persistent(packet_of(raw, 100)[1]) is persistent


def test_a_connect_that_the_gateway_wrote_may_be_longer_than_the_limit() -> None:
    """It has been read before; half a CONNECT is none."""
    assert packet_of(connect(), 1)[0].raw == connect()
    with pytest.raises(PacketError, match="half a CONNECT"):
        packet_of(connect()[:-1], 100)


def test_what_is_stored_of_connect_and_connack_is_looked_at() -> None:
    """Nothing of either is all right."""
    assert are_readable(b"", b"")
    assert are_readable(connect(), b"\2\x24\1")
    assert not are_readable(connect()[:-1], b"")
    assert not are_readable(connect(), b"\2\x24")


def test_a_limit_that_is_not_there_has_its_default() -> None:
    """Also if there are no properties at all."""
    assert integer_of(limits_of(b"\2\x24\0"), 0x24, 2) == 0  # type: ignore[arg-type]
    assert integer_of(limits_of(b""), 0x24, 2) == 2  # type: ignore[arg-type]
    assert integer_of(None, 0x24, 2) == 2  # type: ignore[arg-type]


# ---- requests


class Visitor:
    """A device that is there."""

    def __init__(self, version: ProtocolVersion = V311) -> None:
        self.version = version
        self.requests = 0
        self.gone = False
        self.got: list[bytes] = []
        self.ended: EndReason | None = None
        self.unstored: list[str] = []
        self.device = self

    def send(self, data: bytes) -> None:
        """Get a packet."""
        self.got.append(data)

    def finish(self, reason: EndReason, detail: str) -> None:
        """End."""
        del detail
        self.ended = reason

    def not_stored(self, why: str) -> None:
        """Be told that the disk failed."""
        self.unstored.append(why)


class Desk:
    """Requests, with a disk that takes everything at once."""

    def __init__(self) -> None:
        self.state = DeviceState()
        self.reserved: set[int] = set()
        self.sent: list[bytes] = []
        self.saves = 0
        self.answered: list[Visitor] = []
        self.error: Exception | None = None
        desk: Any = self
        self.requests = Requests(self.state, desk, desk, self.sent.append, desk.answered.append)

    def low_identifier(self) -> int:
        """Give 100, 101 ..."""
        number = 100 + len(self.reserved)
        self.reserved.add(number)
        return number

    def save(self, done: Any = None, failed: Any = None) -> None:
        """Take the state."""
        self.saves += 1
        if self.error is not None:
            failed(self.error)
        elif done is not None:
            done()

    def subscribe(self, visit: Any, *filters: str, qos: int = 1, is_up: bool = True) -> None:
        """The device subscribes, with Packet Identifier 7."""
        wanted = [Subscription(each, qos) for each in filters]
        self.requests.ask(visit, PacketType.SUBSCRIBE, subscribe(visit.version, 7, wanted), is_up=is_up)

    def unsubscribe(self, visit: Any, *filters: str, is_up: bool = True) -> None:
        """The device unsubscribes, with Packet Identifier 7."""
        self.requests.ask(visit, PacketType.UNSUBSCRIBE, unsubscribe(visit.version, 7, filters), is_up=is_up)

    def answer(self, packet: bytes, version: ProtocolVersion = V311, now: Any = None) -> bool:
        """The broker answers."""
        kind = PacketType.SUBACK if packet[0] == 0x90 else PacketType.UNSUBACK
        return self.requests.take_answer(kind, packet, version, now)

    @property
    def table(self) -> dict[str, int]:
        """What is remembered: Topic Filters with their options."""
        return {text: each.options for text, each in self.state.subscriptions.table.items()}


@pytest.mark.parametrize("version", [V311, V5])
def test_with_a_broker_the_device_gets_the_brokers_answer(version: ProtocolVersion) -> None:
    """With its own Packet Identifier; what was refused is not remembered."""
    desk, visit = Desk(), Visitor(version)
    desk.subscribe(visit, "a", "b")
    assert desk.sent.pop() == subscribe(version, 100, [Subscription("a", 1), Subscription("b", 1)])
    assert (visit.requests, visit.got, desk.table) == (1, [], {})
    assert desk.answer(suback(version, 100, [1, 0x80]), version)
    assert visit.got.pop() == suback(version, 7, [1, 0x80])
    assert (visit.requests, desk.table, desk.saves, desk.reserved) == (0, {"a": 1}, 1, set())
    assert desk.answered == [visit]
    desk.unsubscribe(visit, "a")
    assert desk.sent.pop() == unsubscribe(version, 100, ["a"])
    assert desk.answer(unsuback(version, 100, 1), version)
    assert visit.got == [unsuback(version, 7, 1)]
    assert (visit.requests, desk.table, desk.state.subscriptions.untold) == (0, {}, {})
    assert not desk.answer(unsuback(version, 100, 1), version)


@pytest.mark.parametrize("version", [V311, V5])
def test_without_a_broker_the_gateway_answers(version: ProtocolVersion) -> None:
    """And asks the broker later."""
    desk, visit = Desk(), Visitor(version)
    desk.subscribe(visit, "a", "b", qos=2, is_up=False)
    desk.unsubscribe(visit, "b", is_up=False)
    assert visit.got == [suback(version, 7, [2, 2]), unsuback(version, 7, 1)]
    assert (visit.requests, desk.table, desk.sent) == (0, {"a": 2}, [])
    assert list(desk.state.subscriptions.untold) == ["a", "b"]
    desk.requests.restore(version, session_present=True)
    assert desk.sent == [subscribe(version, 100, [Subscription("a", 2)]), unsubscribe(version, 101, ["b"])]
    assert desk.answer(suback(version, 100, [2]), version, visit)
    assert desk.answer(unsuback(version, 101, 1), version, visit)
    assert (visit.ended, len(visit.got), desk.state.subscriptions.untold) == (None, 2, {})


@pytest.mark.parametrize(("code", "kept"), [(0x80, {}), (0, {"a": 1}), (1, {"a": 1})])
def test_a_broker_that_grants_less_than_the_gateway_said(code: int, kept: dict[str, int]) -> None:
    """The device's session ends; what was refused is not asked for again."""
    desk, visit = Desk(), Visitor()
    desk.subscribe(visit, "a", is_up=False)
    desk.requests.restore(V311, session_present=False)
    assert desk.answer(suback(V311, 100, [code]), now=visit)
    assert visit.ended is (None if code == 1 else EndReason.STORED_SESSION_DIFFERS)
    assert desk.table == kept
    # Nobody is there to be told.
    desk.subscribe(visit, "a", is_up=False)
    desk.requests.restore(V311, session_present=False)
    assert desk.answer(suback(V311, 100, [code]))


def test_a_broker_that_is_lost_has_not_answered() -> None:
    """The gateway answers in its place a device that is still there."""
    desk, visit, left = Desk(), Visitor(), Visitor()
    desk.subscribe(left, "left")
    left.gone = True
    desk.subscribe(visit, "a")
    desk.requests.lost()
    assert (visit.got, left.got) == ([suback(V311, 7, [1])], [])
    assert (desk.table, desk.reserved) == ({"a": 1}, set())
    assert not desk.answer(suback(V311, 101, [1]))


def test_who_left_gets_no_answer() -> None:
    """What it was granted is remembered, unless it was forgotten."""
    desk, visit, other = Desk(), Visitor(), Visitor()
    visit.gone = True
    desk.subscribe(visit, "a")
    assert desk.answer(suback(V311, 100, [1]))
    assert (visit.got, desk.answered, desk.table) == ([], [], {"a": 1})
    for filters in ("b", "c"):
        desk.subscribe(visit if filters == "b" else other, filters)
    leaving: Any = visit
    desk.requests.forget_of(leaving)
    assert not desk.answer(suback(V311, 100, [1]))
    assert desk.answer(suback(V311, 101, [1]))
    desk.subscribe(other, "d")
    desk.requests.forget()
    assert not desk.answer(suback(V311, 100, [1]))
    assert desk.table == {"a": 1, "c": 1}


def test_more_than_is_remembered_is_refused() -> None:
    """What the broker has not answered counts, too: it is remembered if the broker is lost."""
    desk, visit = Desk(), Visitor()
    desk.subscribe(visit, *(str(number) for number in range(MOST - 1)))
    desk.unsubscribe(visit, "one")
    with pytest.raises(PacketError) as raised:
        desk.unsubscribe(visit, "more")
    assert (raised.value.reason, raised.value.reason_code) == (EndReason.RULE_REFUSED, 0x97)
    assert visit.requests == 2


def test_a_disk_that_fails_is_told_to_the_device() -> None:
    """It would wait for its answer."""
    desk, visit = Desk(), Visitor()
    desk.error = ZeroDivisionError("disk")
    desk.subscribe(visit, "a", is_up=False)
    assert (visit.unstored, visit.got) == (["disk"], [])


def test_of_a_new_device_nothing_is_known() -> None:
    """It has no session, no Will, and has not left."""
    state = DeviceState()
    known = [state.connect, state.had_password, state.address, state.listener, state.has_session, state.clean_pending]
    known += [state.connack_missing, state.limits, state.will, state.will_delay, state.has_left]
    assert not any(known)


def test_subscriptions_that_cannot_be_read_leave_the_rest() -> None:
    """The session is not forgotten for them."""
    values = json.loads(state_with(has_session=True).dumped())
    values["subscriptions"] = []
    state = DeviceState.load(json.dumps(values))
    assert state.has_session
    assert state.subscriptions.table == {}


# ---- saving


class Shelf:
    """A store that writes when told to."""

    def __init__(self) -> None:
        self.writes: list[Any] = []
        self.forgotten: list[bool] = []
        self.told: list[str] = []
        self.state = DeviceState()
        shelf: Any = self
        self.saving = Saving(shelf, shelf, self.state)

    def save(self, backlog: Any, text: str, done: Any, *, forget_received: bool) -> None:
        """See `Store.save`."""
        del backlog, text
        self.writes.append(done)
        self.forgotten.append(forget_received)

    def change(self, name: str, **how: bool) -> None:
        """Have a change written."""
        self.saving.save(lambda: self.told.append(name), lambda error: self.told.append(f"{name}: {error}"), **how)


def test_changes_during_a_write_are_written_together_after_it() -> None:
    """Each is told when the write that has it is done."""
    shelf = Shelf()
    for name in ("a", "b", "c"):
        shelf.change(name)
    assert len(shelf.writes) == 1
    shelf.writes.pop()(None)
    assert shelf.told == ["a"]
    assert len(shelf.writes) == 1
    shelf.writes.pop()(StoreError("full"))
    assert shelf.told == ["a", "b: full", "c: full"]
    assert shelf.writes == []
    shelf.saving.save()
    shelf.writes.pop()(None)
    shelf.saving.save()
    shelf.writes.pop()(StoreError("full"))
    assert (shelf.writes, shelf.forgotten) == ([], [False] * 4)


def test_a_state_that_forgets_identifiers_does_not_wait() -> None:
    """The device may use them again at once.  What comes then waits until both are written."""
    shelf = Shelf()
    shelf.change("a")
    shelf.change("b", forget_received=True)
    shelf.change("c")
    assert shelf.forgotten == [False, True]
    shelf.writes.pop(0)(None)
    assert len(shelf.writes) == 1
    shelf.writes.pop(0)(None)
    assert (shelf.told, shelf.forgotten) == (["a", "b"], [False, True, False])


def test_when_the_gateway_stops_nothing_waits() -> None:
    """There may be no later turn."""
    shelf = Shelf()
    shelf.change("a")
    shelf.change("b")
    shelf.saving.stop()
    shelf.change("c")
    assert len(shelf.writes) == 3
    for done in list(shelf.writes):
        done(None)
    assert shelf.told == ["a", "b", "c"]
    assert len(shelf.writes) == 3


def test_an_error_of_who_is_told_does_not_end_the_writing() -> None:
    """What waited is written."""
    shelf = Shelf()
    shelf.saving.save(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    shelf.change("b")
    with pytest.raises(ZeroDivisionError):
        shelf.writes.pop()(None)
    shelf.writes.pop()(None)
    assert shelf.told == ["b"]


@pytest.mark.parametrize(
    ("reason", "later"),
    [(EndReason.OUT_OF_RESOURCES, 5.0), (EndReason.TOO_MANY_NEW_SESSIONS, 5.0), (EndReason.TCP_REFUSED, 0.0)],
)
def test_what_does_not_count_against_the_broker_is_tried_again_later(reason: EndReason, later: float) -> None:
    """No broker backs off then, so at once would be again and again."""
    devices: Any = Mock(uniform=lambda: 0.5)
    stored: Any = Mock()
    failure = UpstreamFailure(reason)
    StoredConnection(devices, stored).upstream_failed(failure)
    stored.upstream_failed.assert_called_once_with(failure, later=later)
