"""How new sessions are paced: turns on a virtual clock."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from gateway.config import Pacing
from gateway.dial.pacing import Pacer
from gateway.errors import EndReason, SessionEnd
from gateway.rules.turns import ANYONE, Visitor


class Storm:
    """Sessions that want their turn, and when each got it."""

    def __init__(self, rate: float = 100.0, queue_seconds: float = 10.0) -> None:
        self.clock = Clock()
        self.pacer = Pacer(Pacing(new_sessions_per_second=rate, queue_seconds=queue_seconds), self.clock)
        self.turns: list[tuple[Any, float]] = []
        self.refused: list[SessionEnd] = []

    def come(self, name: Any, visitor: Visitor = ANYONE) -> Deferred[None] | None:
        """Ask for a turn."""
        try:
            turn = self.pacer.turn(visitor)
        except SessionEnd as refusal:
            self.refused.append(refusal)
            return None
        if turn is None:
            self.turns.append((name, self.clock.seconds()))
        else:
            turn.addCallbacks(
                lambda _: self.turns.append((name, self.clock.seconds())), lambda failure: self._failed(failure.value)
            )
        return turn

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, SessionEnd):
            self.refused.append(error)
        else:
            assert isinstance(error, CancelledError)

    def pass_time(self, seconds: float, step: float = 0.001) -> None:
        """Let time pass, in steps such as a reactor makes."""
        self.clock.pump([step] * round(seconds / step))


def test_a_pace_that_is_too_slow_for_the_queue_is_named() -> None:
    """Then nobody waits, so that is not why there is no room."""
    storm = Storm(rate=0.05, queue_seconds=10)
    assert storm.come(0) is storm.come(1) is None
    (refusal,) = storm.refused
    assert refusal.detail == "at 0.05 new sessions per second, the next turn comes later than pacing.queue_seconds"


def test_a_few_devices_have_their_turn_at_once() -> None:
    """Those of a tenth of a second may come at one moment."""
    storm = Storm(rate=100)
    for number in range(10):
        assert storm.come(number) is None
    assert storm.come(10) is not None
    assert not storm.refused


def test_a_storm_gets_its_turns_in_order_and_at_the_rate() -> None:
    """In no second more than the rate, and in each about as many."""
    storm = Storm(rate=100)
    for number in range(500):
        storm.come(number)
    storm.pass_time(6)
    assert [number for number, _ in storm.turns] == list(range(500))
    assert all(abs(at - max(0, number - 9) / 100) < 0.01 for number, at in storm.turns)
    assert storm.pacer.waiting == 0
    assert not storm.clock.getDelayedCalls()


def test_one_timer_serves_all_who_wait() -> None:
    """A thousand sessions that wait are no thousand timers."""
    storm = Storm()
    for number in range(1000):
        storm.come(number)
    assert len(storm.clock.getDelayedCalls()) == 1


def test_who_comes_late_does_not_overtake() -> None:
    """Even if there happens to be a turn to give at that moment."""
    storm = Storm(rate=10)
    storm.come("first")
    storm.come("second")
    # Nothing has run since, and there would be turns enough.
    storm.clock.rightNow += 5
    storm.come("third")
    storm.pass_time(1)
    assert [name for name, _ in storm.turns] == ["first", "second", "third"]


def test_the_queue_is_as_long_as_one_may_wait() -> None:
    """Those for whom there is no room are told; later there is room again."""
    storm = Storm(rate=100, queue_seconds=2)
    for number in range(300):
        storm.come(number)
    assert storm.pacer.waiting == 200
    assert len(storm.refused) == storm.pacer.refused == 90
    assert {refusal.reason for refusal in storm.refused} == {EndReason.TOO_MANY_NEW_SESSIONS}
    storm.pass_time(1)
    storm.come("later")
    assert len(storm.refused) == 90


def test_one_address_does_not_take_the_turns_of_others() -> None:
    """A thousand connections from one host: each of the others has every second turn with it, or more."""
    storm = Storm(rate=100)
    for number in range(1100):
        storm.come(("host", number), Visitor("10.0.0.66"))
    for number in range(25):
        storm.come(("device", number), Visitor(f"10.0.0.{number}"))
    assert storm.pacer.waiting == 1000
    storm.pass_time(0.5)
    assert [name for name, _ in storm.turns[11:36]] == [("device", number) for number in range(25)]
    storm.pass_time(15)
    # Those of the host that made room, or waited for too long because of the others, are told.
    assert len(storm.turns) + len(storm.refused) == 1125
    assert {refusal.reason for refusal in storm.refused} == {EndReason.TOO_MANY_NEW_SESSIONS}
    assert len(storm.refused) == storm.pacer.refused


def test_nobody_waits_for_longer_than_the_queue_is() -> None:
    """Also one whose turns go to newcomers from other addresses; time that it waited elsewhere counts."""
    storm = Storm(rate=10, queue_seconds=2)
    for number in range(12):
        storm.come(("host", number), Visitor("host"))
    storm.come(("host", "elsewhere"), Visitor("host", lambda: 0.5))
    for number in range(32):
        storm.come(("other", number), Visitor(f"other-{number}"))
        storm.pass_time(0.1, 0.01)
        if number == 16:
            assert len(storm.refused) == 1, "elsewhere"
    hosts = [name for name, _ in storm.turns if name[0] == "host"]
    assert ("host", "elsewhere") not in hosts
    assert len(hosts) + len(storm.refused) == 13
    storm.pass_time(5, 0.01)
    assert len(storm.turns) + len(storm.refused) == 13 + 32
    assert not storm.clock.getDelayedCalls()


def test_without_a_queue_there_is_only_now() -> None:
    """`queue_seconds = 0` tells everybody at once."""
    storm = Storm(rate=10, queue_seconds=0)
    storm.come("first")
    storm.come("second")
    assert len(storm.refused) == 1
    assert not storm.clock.getDelayedCalls()


def test_a_rate_of_zero_is_no_pacing() -> None:
    """Everybody has their turn at once."""
    storm = Storm(rate=0)
    for number in range(5000):
        storm.come(number)
    assert len(storm.turns) == 5000


@pytest.mark.parametrize("rate", [0.5, 3.0, 7.3])
def test_a_slow_rate_is_kept(rate: float) -> None:
    """One at a time, also where a second is no whole number of turns."""
    storm = Storm(rate=rate, queue_seconds=3600)
    for number in range(20):
        storm.come(number)
    storm.pass_time(20 / rate, 0.01)
    times = [at for _, at in storm.turns]
    assert len(times) == 20
    # Each is late by as much as the reactor is, which is not made up for.
    assert all(0 <= at - number / rate <= 0.011 * number + 1e-6 for number, at in enumerate(times))


def test_who_gives_up_is_forgotten() -> None:
    """Nobody else waits longer for them, and no timer is left when all have gone."""
    storm = Storm(rate=10, queue_seconds=100)
    turns = [storm.come(number) for number in range(100)]
    for turn in turns[2:99]:
        assert turn is not None
        turn.cancel()
    assert storm.pacer.waiting == 2
    storm.pass_time(0.3)
    assert [number for number, _ in storm.turns] == [0, 1, 99]
    last = [storm.come(number) for number in (100, 101)]
    for turn in last:
        if turn is not None:
            turn.cancel()
    assert not storm.clock.getDelayedCalls()


def test_time_that_the_reactor_lost_is_not_made_up_in_one_go() -> None:
    """After a second in which nothing ran, a tenth of a second's sessions begin, not a whole second's."""
    storm = Storm(rate=100)
    for number in range(500):
        storm.come(number)
    storm.clock.advance(1.0)
    assert len(storm.turns) == 20


def test_a_turn_that_was_not_used_goes_to_the_next() -> None:
    """A device that has left while it waited costs the others nothing; still no more than a burst in one go."""
    storm = Storm(rate=100, queue_seconds=100)
    for number in range(60):
        turn = storm.come(number)
        if turn is not None:
            turn.addCallback(lambda _: storm.pacer.give_back())
    storm.clock.rightNow += 0.1
    storm.pacer._next()
    assert len(storm.turns) == 20
    storm.pass_time(0.002)
    assert len(storm.turns) == 60


def test_giving_back_does_not_save_up() -> None:
    """More than a burst is never due."""
    storm = Storm(rate=10)
    for _ in range(100):
        storm.pacer.give_back()
    storm.come("first")
    assert storm.come("second") is not None
