from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.session.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_as_much_as_two_seconds_allow_may_come_at_once():
    """Then it is too fast, for packets as for bytes."""
    clock = Clock()
    pace = Pace(10, 0, clock)
    assert not pace.overdrawn(20, 10_000)
    assert pace.overdrawn(21, 1)
    pace = Pace(0, 1000, clock)
    assert not pace.overdrawn(500, 2000)
    assert pace.overdrawn(500, 1)


def test_time_makes_up_for_it():
    """A pause is as long as what came was too much."""
    clock = Clock()
    pace = Pace(0, 1000, clock)
    assert pace.overdrawn(1, 5000)
    assert not pace.recovered(clock.now + 2.9)
    assert pace.recovered(clock.now + 3.1)


def test_a_long_silence_saves_nothing_up():
    """The buckets hold two seconds' worth."""
    clock = Clock()
    pace = Pace(1, 0, clock)
    clock.now += 3600
    assert not pace.overdrawn(2, 0)
    assert pace.overdrawn(3, 0)


def test_a_clock_that_goes_back_takes_nothing():
    """Nor does it give."""
    clock = Clock()
    pace = Pace(1, 0, clock)
    clock.now -= 50
    assert not pace.overdrawn(2, 0)
    assert pace.overdrawn(3, 0)


@given(
    rate=st.floats(0.5, 1000),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 20)), max_size=50),
)
def test_no_more_comes_than_the_rate_and_one_burst(rate, steps):
    """However it is spread, if whoever reads obeys."""
    clock = Clock()
    pace = Pace(rate, 0, clock)
    began, total, largest, paused = clock.now, 0, 0, False
    for passed, packets in steps:
        clock.now += passed
        if paused and not pace.recovered(clock.now):
            continue
        total, largest = total + packets, max(largest, packets)
        paused = pace.overdrawn(total, 1)
    assert total <= (clock.now - began) * rate + max(1, 2 * rate) + largest + 1e-6


def test_packets_are_counted_once():
    """`overdrawn` is told of all so far, and counts those that are new."""
    pace = Pace(10, 0, Clock())
    for total in range(1, 21):
        assert not pace.overdrawn(total, 0)
    assert pace.overdrawn(21, 0)


def test_the_bucket_fills_while_packets_come():
    """Time makes up for them without a pause, too."""
    clock = Clock()
    pace = Pace(1, 0, clock)
    for total in range(1, 100):
        assert not pace.overdrawn(total, 0)
        clock.now += 1


def test_packets_are_made_up_for_as_bytes_are():
    """A pause for packets ends."""
    clock = Clock()
    pace = Pace(2, 0, clock)
    assert pace.overdrawn(10, 0)
    assert not pace.recovered(clock.now + 2.9)
    assert pace.recovered(clock.now + 3.1)


def test_a_low_rate_has_room_for_one():
    """One packet in ten seconds is read at once, and two are too many."""
    assert not Pace(0.1, 0, Clock()).overdrawn(1, 0)
    assert Pace(0.1, 0, Clock()).overdrawn(2, 0)


def test_nothing_is_paused_at_first():
    assert not Pace(1, 1, Clock()).paused
