"""A clock that makes one turn at a time: Twisted's also calls what its calls have added, in the same `advance`."""

from __future__ import annotations

from twisted.internet.task import Clock


class TurnClock(Clock):
    """Makes one turn of an event loop at a time; time stands still."""

    def turn(self) -> None:
        """Call what is due; what that adds waits for the next turn."""
        for call in [each for each in self.calls if each.getTime() <= self.seconds()]:
            # One before it may have cancelled it.
            if call in self.calls:
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)
