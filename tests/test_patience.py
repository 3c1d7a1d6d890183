"""Timeouts after a pause of the process: what arrived is read first, and the time that was lost does not count."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from gateway.config import Pacing
from gateway.dial.pacing import Pacer
from gateway.dial.steps import within
from gateway.drain import Spread
from gateway.errors import EndReason, SessionEnd
from gateway.net import patience as patience_module
from gateway.net.patience import PatientClock
from gateway.rules.turns import Turns, Visitor
from tests import mqtt_packets as mqtt
from tests.harness import PATIENCE, Broker, BrokerConnection, Device, RunningGateway, eventually
from tests.proxy_headers import v2
from tests.test_lifecycle import stopped
from tests.turn_clock import TurnClock


class Paused:
    """A clock whose process was stopped: everything due is called at once, in order, before anything is read."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.patience = PatientClock(self.clock)
        self.swept = 0.0
        self.clock.callLater(1.0, self._sweep)

    def _sweep(self) -> None:
        now = self.clock.seconds()
        if now - self.swept > 2:
            self.patience.give_back(now - self.swept - 1)
        self.swept = now
        self.clock.callLater(1.0, self._sweep)

    def run(self, seconds: float) -> None:
        """Let the process run."""
        self.clock.pump([0.125] * round(seconds * 8))


@pytest.fixture
def paused() -> Paused:
    """Return a clock."""
    return Paused()


def test_what_is_due_at_the_same_time_comes_before_a_timeout() -> None:
    """Reading comes first, and so does a sweep that gives time back."""
    clock, order = Clock(), []
    patience = PatientClock(clock)
    patience.callLater(1.0, order.append, "timeout")
    clock.callLater(1.0, order.append, "read")
    clock.advance(1.0)
    assert order == ["read", "timeout"]
    assert not patience.getDelayedCalls()


@pytest.mark.parametrize("after", [0.25, 0.875, 2.0], ids=["at first", "before the sweep", "later"])
def test_a_timeout_does_not_count_a_pause(paused: Paused, after: float) -> None:
    """Wherever in it the pause begins."""
    fired: list[float] = []
    paused.run(2.0)
    paused.patience.callLater(4.0, lambda: fired.append(paused.clock.seconds()))
    paused.run(after)
    paused.clock.advance(100.0)
    assert not fired
    paused.run(4.0 - after - 1.25)
    assert not fired, "a second is the precision"
    paused.run(2.25)
    assert fired
    assert paused.patience.seconds() < paused.clock.seconds() - 98


def test_a_pause_gives_no_more_than_the_whole_time(paused: Paused) -> None:
    """However much is given back."""
    fired: list[int] = []
    wait = paused.patience.callLater(4.0, fired.append, 1)
    paused.run(2.0)
    paused.patience.give_back(1000.0)
    assert wait.getTime() == paused.clock.seconds() + 4.0
    paused.run(3.75)
    assert not fired
    paused.run(0.5)
    assert fired


def test_a_timeout_that_is_late_by_itself_gets_its_time_again() -> None:
    """Nobody has noticed the pause yet; but only once, or a busy process would keep no timeouts."""
    clock, fired = Clock(), []
    PatientClock(clock).callLater(4.0, fired.append, 1)
    clock.advance(100.0)
    clock.advance(3.5)
    assert not fired
    clock.advance(100.0)
    assert fired


def test_a_timeout_that_was_put_off_does_not_hold_up_others() -> None:
    """Those of the same length that began later are due before it now, and keep their order."""
    clock, fired = Clock(), list[tuple[str, float]]()
    patience = PatientClock(clock)

    def begin(name: str) -> None:
        patience.callLater(4.0, lambda: fired.append((name, clock.seconds())))

    begin("put off")
    begin("put off, too")
    clock.advance(3.0)
    begin("in time")
    clock.advance(2.5)  # a pause of 1.5 s, which nobody has noticed yet
    begin("later")
    clock.pump([0.25] * 40)
    assert fired == [("in time", 7.0), ("put off", 9.5), ("put off, too", 9.5), ("later", 9.5)]
    assert not patience.getDelayedCalls()
    assert not clock.getDelayedCalls()


def test_a_call_can_be_cancelled_at_any_time() -> None:
    """Also when it is due already."""
    clock = Clock()
    patience = PatientClock(clock)
    first, second = patience.callLater(1.0, pytest.fail), patience.callLater(1.0, pytest.fail)
    clock.callLater(1.0, second.cancel)
    first.cancel()
    clock.advance(1.0)
    assert not first.active()
    assert not second.active()
    assert not patience.getDelayedCalls()


def test_a_few_timeouts_are_called_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause, thousands get their whole time again, and end at the same moment."""
    monkeypatch.setattr(patience_module, "_CALLED_AT_A_TIME", 2)
    clock, called = TurnClock(), list[int]()
    patience = PatientClock(clock)
    for number in range(5):
        patience.callLater(4.0, called.append, number)
    clock.rightNow += 4.0
    seen = []
    while clock.calls:
        clock.turn()
        seen.append(len(called))
    assert seen == [0, 2, 4, 5]
    assert called == list(range(5))
    assert not patience.getDelayedCalls()


def test_timeouts_of_one_length_share_a_timer(paused: Paused) -> None:
    """Whatever is cancelled meanwhile; each fires at its own time, in order, and none is left."""
    others = len(paused.clock.getDelayedCalls())
    fired: list[tuple[int, float]] = []

    def begin(number: int) -> Any:
        return paused.patience.callLater(4.0, lambda: fired.append((number, paused.clock.seconds())))

    waits = []
    for number in range(8):
        waits.append(begin(number))
        paused.run(0.25)
    assert len(paused.clock.getDelayedCalls()) == others + 1
    for number in (0, 1, 4, 7):
        waits[number].cancel()
        waits[number].cancel()
    again = begin(8)
    paused.run(6.0)
    assert fired == [(2, 4.5), (3, 4.75), (5, 5.25), (6, 5.5), (8, 6.0)]
    assert not again.active()
    assert not paused.patience.getDelayedCalls()
    assert len(paused.clock.getDelayedCalls()) == others


def test_a_step_of_a_dial_is_not_over_for_a_pause(paused: Paused) -> None:
    """What it waited for arrives in the pause, and is read after it."""
    answer: Deferred[str] = Deferred()
    result = Deferred.fromCoroutine(within(2.0, answer, paused.patience))
    paused.run(0.5)
    paused.clock.callLater(50.0, answer.callback, "read")
    paused.clock.advance(50.0)
    assert result.result == "read"


def test_nobody_loses_a_turn_by_a_pause(paused: Paused) -> None:
    """Neither at pacing nor at slow work."""
    refused: list[Any] = []
    pacer = Pacer(Pacing(new_sessions_per_second=1, queue_seconds=10), paused.patience)
    waiting = [turn for _ in range(6) if (turn := pacer.turn(Visitor("10.0.0.1", lambda: 8.0))) is not None]
    turns = Turns(1, paused.patience, "work")
    waiting += [Deferred.fromCoroutine(turns.take(Visitor("10.0.0.1", lambda: 8.0))) for _ in range(2)][1:]
    for each in waiting:
        each.addErrback(lambda failure: refused.append(failure.trap(SessionEnd)))
    assert (pacer.waiting, turns.waiting) == (5, 1)
    paused.clock.advance(600.0)
    assert not refused
    paused.run(6.0)
    assert pacer.waiting == 0
    turns.give()
    assert not refused
    assert turns.waiting == 0


def test_a_drain_goes_on_where_it_was() -> None:
    """A pause does not end everybody at once."""
    spread = Spread(range(10), 0.0, 10.0)
    assert list(spread.due(2.0)) == [0, 1, 2]
    spread.give_back(5.0)
    assert list(spread.due(7.0)) == []
    assert list(spread.due(8.0)) == [3]


def test_a_drain_without_time_survives_a_pause() -> None:
    """What is left of it is due."""
    spread = Spread(range(3), 0.0, 0.0)
    spread.give_back(5.0)
    assert list(spread.due(1.0)) == [0, 1, 2]


def jumping(reactor: Any) -> Callable[[float], None]:
    """Return a function that lets seconds pass on the reactor's clock, which never goes back."""
    seconds, passed = reactor.seconds, [0.0]
    reactor.seconds = lambda: seconds() + passed[0]
    return lambda more: passed.__setitem__(0, passed[0] + more)


def test_what_arrives_while_the_process_is_stopped_is_in_time(
    reactor: Any, start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """A handshake, a CONNACK, a PROXY header, a CONNECT; and DISCONNECT during a drain."""
    jump = jumping(reactor)
    answer, proceed = threading.Event(), threading.Event()

    def serve(connection: BrokerConnection) -> None:
        if b"connack" in connection.read_packet():
            answer.wait(PATIENCE)
        connection.send(mqtt.connack())
        connection.read_to_end()

    broker = start_broker(serve=serve)
    front = socket.create_server(("127.0.0.1", 0))
    near: list[socket.socket] = []

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def hold_back() -> None:
        device_side, _ = front.accept()
        far = socket.create_connection(("127.0.0.1", broker.port))
        near.append(device_side)
        proceed.wait(PATIENCE)
        with device_side, far:
            threading.Thread(target=relay, args=(far, device_side), daemon=True).start()
            relay(device_side, far)

    threading.Thread(target=hold_back, daemon=True).start()
    upstream = [{"name": "near", "host": "localhost", "port": broker.port}]
    upstream.append({"name": "slow", "host": "localhost", "port": front.getsockname()[1], "default": False})
    timeouts = {"tls": 30, "connack": 30, "connect_packet": 30}
    gateway = start_gateway(
        upstream=upstream,
        listen=[{"endpoint": "127.0.0.1:0"}, {"endpoint": "127.0.0.1:0", "proxies": "127.0.0.1"}],
        device=[{"match_client_id": "handshake", "upstream": "slow"}],
        timeouts=timeouts,
    )
    drained = start_gateway(upstream=broker.port, drain={"seconds": 60})
    leaving = []
    for number in range(3):
        leaving.append(Device(drained.port))
        leaving[-1].send(mqtt.connect(f"leaves-{number}"))
        assert leaving[-1].read(4) == mqtt.connack()
    balanced = gateway.service.ports[1].getHost().port
    devices = [Device(gateway.port), Device(gateway.port), Device(gateway.port), Device(balanced)]
    shakes_hands, waits, connects, proxied = devices
    waits.send(mqtt.connect("connack"))
    eventually(lambda: b"connack" in broker.received, "its CONNECT is at the broker")
    shakes_hands.send(mqtt.connect("handshake"))
    eventually(lambda: near, "it is connected")
    stopping: list[Any] = []
    gateway.reactor.callFromThread(lambda: stopping.append(drained.service.stopService()))

    def meanwhile() -> None:
        jump(300)
        proceed.set()
        answer.set()
        connects.send(mqtt.connect("connects"))
        proxied.send(v2() + mqtt.connect("proxied"))
        for device in leaving:
            device.send(mqtt.disconnect())

    stopped(gateway, 0.3, meanwhile)
    for device in devices:
        assert device.read(4) == mqtt.connack(), gateway.wait_ended()
    drained.wait_ended(3)
    assert [record.reason for record in drained.ended].count(EndReason.DEVICE_DISCONNECT) >= 2
    front.close()
    for device in (*devices, *leaving):
        device.close()
    gateway.wait_empty()
