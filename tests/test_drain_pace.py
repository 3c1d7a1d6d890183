"""How fast backlogs leave: all of them together, and each as its rule says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from gateway.session.drain_pace import TICK, DrainPace


class Paced:
    """A pace of 1,000 messages a second, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.sent: list[str] = []
        self.pace = DrainPace(1000, lambda: self.now, self._later)

    def _later(self) -> None:
        self.asked += 1

    def backlog(self, name: str, size: int) -> Callable[[], None]:
        """Return what sends as many of `size` messages as it may."""
        left = [size]

        def pump() -> None:
            while left[0] and self.pace.may_send(pump):
                left[0] -= 1
                self.sent.append(name)

        return pump

    def tick(self, seconds: float = TICK) -> int:
        """Let time pass; return how many were sent."""
        self.now += seconds
        before = len(self.sent)
        self.pace.go_on()
        return len(self.sent) - before


def test_the_rate_holds_for_all_together() -> None:
    """However many there are."""
    paced = Paced()
    for number in range(50):
        paced.backlog(f"d{number}", 1000)()
    assert paced.asked
    for _ in range(100):
        paced.tick()
    assert 1000 <= len(paced.sent) <= 1030


def test_backlogs_take_turns() -> None:
    """One that is large does not keep others waiting."""
    paced = Paced()
    large, small = paced.backlog("large", 1000), paced.backlog("small", 3)
    large()
    small()
    paced.tick()
    paced.tick()
    assert paced.sent.count("small") == 3


def test_nobody_overtakes_those_that_wait() -> None:
    """An acknowledgement makes room in a window, but not in the queue."""
    paced = Paced()
    paced.backlog("first", 100)()
    sent = len(paced.sent)
    paced.now += TICK
    paced.backlog("second", 100)()
    assert len(paced.sent) == sent


def test_a_machine_that_is_late_drains_more_slowly() -> None:
    """What it has missed is not sent in one piece, which would hold up everybody else."""
    paced = Paced()
    paced.backlog("d", 10_000)()
    assert paced.tick(10.0) <= 1000 * TICK * 2


def test_an_error_in_one_backlog_does_not_stop_the_others() -> None:
    """They are called again after the next tick."""
    paced = Paced()
    paced.backlog("first", 100)()

    def fail() -> None:
        raise ZeroDivisionError

    paced.pace.may_send(fail)
    paced.backlog("last", 1)()
    while "last" not in paced.sent:
        paced.asked = 0
        with contextlib.suppress(ZeroDivisionError):
            paced.tick()
        assert paced.asked or not paced.pace._waiting


def test_without_a_limit_nobody_waits() -> None:
    """Also those that waited before it was lifted."""
    paced = Paced()
    paced.backlog("d", 10_000)()
    paced.pace.rate = 0
    paced.tick()
    assert len(paced.sent) == 10_000


def test_a_rate_below_a_tick_sends_one_at_a_time() -> None:
    """One at once, and one each second."""
    paced = Paced()
    paced.pace = DrainPace(1, lambda: paced.now, lambda: None)
    paced.backlog("d", 10)()
    assert len(paced.sent) == 1
    assert paced.tick(0.5) == 0
    assert paced.tick(0.5) == 1


def test_after_a_rest_a_message_leaves_at_once() -> None:
    """It need not wait for the next tick: the time that passed counts."""
    paced = Paced()
    paced.backlog("before", 20)()
    assert len(paced.sent) == 20
    paced.now += 1
    paced.asked = 0
    paced.backlog("after", 20)()
    assert len(paced.sent) == 40
    assert not paced.asked


def test_a_clock_that_goes_back_takes_nothing() -> None:
    """Nor does it give."""
    paced = Paced()
    paced.now -= 100
    paced.backlog("d", 30)()
    assert len(paced.sent) == 20


def test_nobody_overtakes_after_a_turn() -> None:
    """A turn ends with those that had it."""
    paced = Paced()
    paced.backlog("first", 100)()
    paced.tick()
    sent = len(paced.sent)
    paced.now += TICK
    paced.backlog("second", 100)()
    assert len(paced.sent) == sent


def test_when_nobody_waits_no_turn_is_asked_for() -> None:
    """Otherwise the event loop would wake up for nothing a hundred times a second."""
    paced = Paced()
    paced.backlog("d", 25)()
    paced.asked = 0
    assert paced.tick() == 5
    assert not paced.asked


def test_without_a_rate_there_is_no_limit() -> None:
    """As where nothing is said of one."""
    pace = DrainPace()
    assert all(pace.may_send(lambda: None) for _ in range(10))
