"""Turns at slow work: fair between addresses, bounded, with a deadline, and none for who has left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock

from gateway.errors import EndReason, Refusal
from gateway.fair import FairQueue
from gateway.rules import turns as turns_module
from gateway.rules.turns import ANYONE, Turns, Visitor

# ---- the queue


def test_addresses_are_served_in_turn() -> None:
    """Each in the order in which its own came."""
    queue: FairQueue[str] = FairQueue()
    for waiter in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(waiter[0], waiter)
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert not queue
    with pytest.raises(KeyError):
        queue.pop()


def test_the_longest_line_makes_room() -> None:
    """With its last waiter, for one whose own line is shorter by two at least."""
    queue: FairQueue[str] = FairQueue()
    for waiter in ("a1", "a2", "a3", "b1", "b2"):
        queue.push(waiter[0], waiter)
    assert queue.shed("a") is None
    assert queue.shed("b") is None
    assert queue.shed("c") == "a3"
    assert queue.shed("c") in {"a2", "b2"}
    assert FairQueue[str]().shed("a") is None


@given(st.lists(st.tuples(st.sampled_from("+-x"), st.sampled_from("abc"), st.integers(0, 5)), max_size=60))
def test_nobody_is_lost_or_served_twice(steps: list[tuple[str, str, int]]) -> None:
    """Whatever order they come, give up and are served in."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    there: set[tuple[str, int]] = set()
    for step, address, number in steps:
        waiter = (address, number)
        if step == "+" and waiter not in there:
            queue.push(address, waiter)
            there.add(waiter)
        elif step == "-":
            queue.discard(address, waiter)
            there.discard(waiter)
        elif there:
            there.remove(queue.pop())
        assert len(queue) == len(there)


# ---- the turns


class Work:
    """Turns at something, and who has one."""

    def __init__(self, width: int = 1) -> None:
        self.clock = Clock()
        self.turns = Turns(width, self.clock, "work")
        self.served: list[str] = []
        self.refused: dict[str, Refusal] = {}

    def come(self, name: str, visitor: Visitor | None = None) -> Deferred[None]:
        """Ask for a turn; the address is the first letter of the name."""
        waiting: Deferred[None] = ensureDeferred(self.turns.take(visitor or Visitor(name[0])))
        waiting.addCallbacks(lambda _: self.served.append(name), lambda failure: self._refuse(name, failure.value))
        return waiting

    def _refuse(self, name: str, why: Any) -> None:
        self.refused[name] = why

    def work(self) -> None:
        """Give turns back until nobody waits."""
        for _ in range(1000):
            self.turns.give()
            self.clock.advance(0)


def test_one_address_does_not_hold_up_the_others() -> None:
    """A thousand wrong passwords from one: the right device waits for one of them, not for all."""
    work = Work()
    for number in range(200):
        work.come(f"a{number}")
    work.come("b")
    work.work()
    assert work.served.index("b") == 2
    assert len(work.served) == 201


def test_the_queue_is_bounded_and_has_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes too many is refused; one of another address takes the place of the last of them."""
    monkeypatch.setattr(turns_module, "_ROOM", 3)
    work = Work()
    for name in ("a0", "a1", "a2", "a3", "a4", "b1"):
        work.come(name)
    assert work.turns.waiting == 3
    assert set(work.refused) == {"a4", "a3"}
    assert {refusal.reason for refusal in work.refused.values()} == {EndReason.TOO_MANY_NEW_SESSIONS}
    work.work()
    assert work.served == ["a0", "a1", "b1", "a2"]


def test_nobody_waits_longer_than_they_may() -> None:
    """And who was refused is not given a turn afterwards."""
    work = Work()
    work.come("a0")
    work.come("a1", Visitor("a", lambda: 5.0))
    work.come("a2", Visitor("a", lambda: -1.0))
    work.clock.advance(0)
    assert set(work.refused) == {"a2"}
    work.clock.advance(5)
    assert work.refused["a1"].reason is EndReason.TOO_MANY_NEW_SESSIONS
    assert not work.turns.waiting
    assert not work.clock.getDelayedCalls()
    work.come("a3")
    work.turns.give()
    assert work.served == ["a0", "a3"]


def test_who_has_left_gets_no_turn() -> None:
    """The next one does."""
    work = Work()
    work.come("a0")
    work.come("a1", Visitor("a", has_left=lambda: True))
    work.come("a2")
    work.turns.give()
    assert work.refused["a1"].reason is EndReason.DEVICE_LOST
    work.clock.advance(0)
    assert work.served == ["a0", "a2"]


def test_who_gives_up_leaves_the_queue() -> None:
    """And the turns are as many as before."""
    work = Work(width=2)
    for number in range(4):
        waiting = work.come(f"a{number}", ANYONE)
    waiting.cancel()
    assert work.turns.waiting == 1
    work.work()
    assert work.served == ["a0", "a1", "a2"]


def test_those_who_need_no_time_are_served_one_in_a_turn_of_the_event_loop() -> None:
    """Else a thousand who are refused at once would hold up all others."""
    clock, later = Clock(), deque[Callable[[], None]]()
    # A `Clock` calls in one `advance` what the reactor calls in a later turn.
    clock.callLater = lambda _, call: later.append(call)  # type: ignore[assignment, misc]
    turns = Turns(1, clock, "work")
    served: list[int] = []

    async def visit(number: int) -> None:
        await turns.take(ANYONE)
        served.append(number)
        turns.give()

    ensureDeferred(turns.take(ANYONE))
    for number in range(50):
        ensureDeferred(visit(number))
    turns.give()
    for turn in range(49):
        assert len(served) == turn + 1
        later.popleft()()
    assert served == list(range(50))
    # Nothing is left over, and the turn is free again.
    assert not later
    ensureDeferred(visit(50))
    assert served[-1] == 50
