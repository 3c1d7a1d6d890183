"""How each upstream fares: whether it is dialled, left alone for a while, or tried again.

In: what became of each dial, the time, random numbers.  Out: `UpstreamHealth`, whose plain attributes the dialler goes
by and people are shown.

The states::

    UNTRIED ──verified──▶ SERVING ◀──verified── BEING_TRIED ◀──begin, from `retry_at` on── LEFT_ALONE
       └──────failed───────┴───────────────────────failed──────────────────────────────────────▲

A broker that failed is left alone for a backed-off, jittered time; then one dial at a time finds out whether it is
back.  Whatever a broker makes of a CONNECT, a refusal, a close or silence, is no failure here: it can be one device's
own matter, and one device must not take the broker away from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum

from attrs import define, evolve, field, frozen

from gateway.config import Failover, Upstream
from gateway.errors import EndReason, UpstreamFailure
from gateway.session.record import Peer

# Doubled more often than this, every delay is at its maximum.
_MOST_DOUBLINGS = 32


class UpstreamState(Enum):
    """Where an upstream stands; the value is the word for people."""

    UNTRIED = "untried"
    SERVING = "serving"
    LEFT_ALONE = "left alone"
    BEING_TRIED = "being tried"


@frozen(slots=True)
class Attempt:
    """One dial: when it began, and whether it is the one that tries a broker that was left alone."""

    began: float
    is_trial: bool


@define(slots=True, eq=False)
class UpstreamHealth:
    """What is known of one configured broker.

    `failures` counts those in a row, `dials` all dials, `failed_dials` the failed ones by reason.  `last_failure` stays
    when the broker serves again; `failed_at`, `retry_at` and `verified_at` are seconds on the injected clock, `None`
    until there was one.  `last_address` is where it was reached last (`host:port`), `last_peer` who was verified there.
    """

    address: str
    verify_name: str
    _failover: Failover
    _uniform: Callable[[], float]
    state: UpstreamState = UpstreamState.UNTRIED
    failures: int = 0
    last_failure: UpstreamFailure | None = None
    failed_at: float | None = None
    retry_at: float | None = None
    last_peer: Peer | None = None
    verified_at: float | None = None
    last_address: str = ""
    dials: int = 0
    failed_dials: Counter[EndReason] = field(factory=Counter)
    _left_alone_for: EndReason | None = None

    @classmethod
    def of(cls, upstream: Upstream, failover: Failover, uniform: Callable[[], float]) -> UpstreamHealth:
        """Begin to keep an account of `upstream`; `uniform` returns random numbers from 0 to 1."""
        return cls(upstream.address, upstream.verify_name, failover, uniform)

    def under(self, failover: Failover, *, judged_alike: bool) -> UpstreamHealth:
        """Return the account of the same broker under another configuration; this one is left as it is.

        What was counted goes on.  What was found out holds only if the broker is still judged in the same way, and left
        alone for the same times: whoever has just mended one of them does not want to wait.
        """
        counted = Counter(self.failed_dials)
        if judged_alike and failover == self._failover:
            # The one dial that tries it belongs to the configuration that ends.
            state = UpstreamState.LEFT_ALONE if self.state is UpstreamState.BEING_TRIED else self.state
            return evolve(self, state=state, failed_dials=counted)
        fresh = UpstreamHealth(self.address, self.verify_name, failover, self._uniform)
        return evolve(fresh, dials=self.dials, failed_dials=counted)

    @property
    def is_open(self) -> bool:
        """Whether every session may dial it."""
        return self.state is UpstreamState.UNTRIED or self.state is UpstreamState.SERVING

    def is_due(self, now: float) -> bool:
        """Whether it has been left alone for long enough: the next dial is the trial."""
        return self.state is UpstreamState.LEFT_ALONE and self.retry_at is not None and now >= self.retry_at

    def standing(self, now: float) -> str:
        """Return, in words, why it is not dialled now."""
        if self.state is UpstreamState.LEFT_ALONE and self.retry_at is not None:
            return f"left alone for {max(0.0, self.retry_at - now):.0f} s more"
        return f"it is {self.state.value}"

    def begin(self, now: float) -> Attempt:
        """Count a dial.  Every attempt ends with one of `verified`, `failed` and `given_up`."""
        self.dials += 1
        is_trial = self.state is UpstreamState.LEFT_ALONE
        if is_trial:
            self.state = UpstreamState.BEING_TRIED
        return Attempt(now, is_trial)

    def verified(self, peer: Peer, now: float) -> bool:
        """It proved who it is.  Returns whether it had been left alone before."""
        was_left_alone = not self.is_open
        self.state = UpstreamState.SERVING
        self.failures = 0
        self.retry_at = None
        self.last_peer = peer
        self.verified_at = now
        return was_left_alone

    def failed(self, attempt: Attempt, failure: UpstreamFailure, now: float) -> bool:
        """Take note of a failed dial.  Returns whether it is news that the broker is left alone, or is so for this.

        It is not left alone if another dial was verified since this one began, since then the broker is well and this
        was one of many; and not for longer if a dial that ended earlier has judged it already.
        """
        self.failed_dials[failure.reason] += 1
        # A copy: an exception that was raised keeps the frames that it came through, and with them a whole session.
        self.last_failure = UpstreamFailure(failure.reason, failure.detail)
        self.failed_at = now
        if self.is_open:
            if self.verified_at is not None and self.verified_at > attempt.began:
                return False
        elif not attempt.is_trial or self.state is not UpstreamState.BEING_TRIED:
            return False
        is_news = not self.failures or self._left_alone_for is not failure.reason
        self.state = UpstreamState.LEFT_ALONE
        self.failures += 1
        self.retry_at = now + self._delay()
        self._left_alone_for = failure.reason
        return is_news

    def given_up(self, attempt: Attempt) -> None:
        """The dial was cancelled and says nothing; if it was the trial, another one may be it."""
        if attempt.is_trial and self.state is UpstreamState.BEING_TRIED:
            self.state = UpstreamState.LEFT_ALONE

    def _delay(self) -> float:
        """Return seconds: doubled with each failure up to the maximum, and then between half of that and all of it.

        The jitter keeps gateways that lost a broker at the same moment from coming back to it at the same moment.
        """
        doublings = min(self.failures - 1, _MOST_DOUBLINGS)
        longest = min(self._failover.retry_max, self._failover.retry_first * 2.0**doublings)
        return longest * (0.5 + 0.5 * self._uniform())


def accounts(
    upstreams: Sequence[Upstream],
    failover: Failover,
    uniform: Callable[[], float],
    before: Sequence[UpstreamHealth] = (),
    *,
    judged_alike: bool = False,
) -> list[UpstreamHealth]:
    """Return an account of each upstream, in their order; those in `before` go on if they are of the same broker."""
    known = {(health.address, health.verify_name): health for health in before}
    found: list[UpstreamHealth] = []
    for upstream in upstreams:
        own = known.get((upstream.address, upstream.verify_name))
        found.append(
            UpstreamHealth.of(upstream, failover, uniform)
            if own is None
            else own.under(failover, judged_alike=judged_alike)
        )
    return found
