"""The health of each upstream: in use, backing off after a failure, or being tried again.

In: the result of each connection attempt, the time, random numbers.  Out: `UpstreamHealth`, whose attributes the
dialler uses and the status page shows.

The states::

    UNTRIED ──verified──▶ SERVING ◀──verified── BEING_TRIED ◀──begin, from `retry_at` on── LEFT_ALONE
       └──────failed───────┴───────────────────────failed──────────────────────────────────────▲

After a failure the gateway backs off, with jitter; then one attempt at a time checks whether the broker is back.  What
a broker does with a CONNECT (a refusal, a close, silence) does not count as a failure: it may concern one device only,
and one device must not cut off the broker for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum

from attrs import define, evolve, field, frozen

from gateway.config import Failover, Upstream
from gateway.errors import EndReason, UpstreamFailure
from gateway.session.record import Peer

# After this many doublings, every delay is at its maximum.
_MOST_DOUBLINGS = 32


class UpstreamState(Enum):
    """The state of an upstream; the value is shown to people and in the status document."""

    UNTRIED = "untried"
    SERVING = "serving"
    LEFT_ALONE = "left alone"
    BEING_TRIED = "being tried"


@frozen(slots=True)
class Attempt:
    """One connection attempt: when it began, and whether it is the trial after backing off."""

    began: float
    is_trial: bool


@define(slots=True, eq=False)
class UpstreamHealth:
    """What is known of one configured broker.

    `failures` counts consecutive failures, `dials` all attempts, `failed_dials` the failed ones by reason.
    `last_failure` is kept when the broker serves again.  `failed_at`, `retry_at`, `verified_at` and `reached_at` are
    seconds on the injected clock, or `None`; `reached_at` is when the broker last proved its name, whether or not the
    handshake succeeded, or when a proxy last opened a tunnel.  `last_address` is the address last connected to
    (`host:port`), `last_peer` the broker verified there.  `via` is the health of the proxy in front of it, shared by
    all brokers behind that proxy.
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
    reached_at: float | None = None
    last_address: str = ""
    dials: int = 0
    failed_dials: Counter[EndReason] = field(factory=Counter)
    via: UpstreamHealth | None = None
    _left_alone_for: EndReason | None = None

    @classmethod
    def of(
        cls,
        upstream: Upstream,
        failover: Failover,
        uniform: Callable[[], float],
        via: UpstreamHealth | None = None,
    ) -> UpstreamHealth:
        """Make the health of `upstream`, untried; `uniform` returns random numbers from 0 to 1."""
        return cls(_shown(upstream, via), upstream.verify_name, failover, uniform, via=via)

    def under(self, failover: Failover, *, judged_alike: bool) -> UpstreamHealth:
        """Return the health of the same broker under another configuration; `self` is not changed.

        Counters carry over.  The state carries over only if verification (`judged_alike`) and `failover` are unchanged:
        after a repair, the broker is tried at once.
        """
        counted = Counter(self.failed_dials)
        if judged_alike and failover == self._failover:
            # The trial in progress belongs to the old configuration.
            state = UpstreamState.LEFT_ALONE if self.state is UpstreamState.BEING_TRIED else self.state
            return evolve(self, state=state, failed_dials=counted)
        fresh = UpstreamHealth(self.address, self.verify_name, failover, self._uniform)
        return evolve(fresh, dials=self.dials, failed_dials=counted)

    @property
    def is_open(self) -> bool:
        """Whether every session may try it."""
        return self._is_well and (self.via is None or self.via.is_open)

    def is_due(self, now: float) -> bool:
        """Whether the back-off delay, its own and its proxy's, is over: the next attempt is the trial."""
        if self.via is not None and not self.via.is_open:
            return self.via.is_due(now) and (self._is_well or self._may_be_tried(now))
        return self._may_be_tried(now)

    @property
    def decisive(self) -> UpstreamHealth:
        """The health that decides about attempts: its own, or its proxy's while that is backing off."""
        return self if self.via is None or self.via.is_open else self.via

    @property
    def _is_well(self) -> bool:
        return self.state is UpstreamState.UNTRIED or self.state is UpstreamState.SERVING

    def _may_be_tried(self, now: float) -> bool:
        return self.state is UpstreamState.LEFT_ALONE and self.retry_at is not None and now >= self.retry_at

    def standing(self) -> str:
        """Return, in words, why it is not tried now; no countdown, since the words are kept."""
        if self.decisive is not self:
            return self.decisive.standing()
        if self.state is UpstreamState.LEFT_ALONE:
            return "backing off"
        return f"it is {self.state.value}"

    def begin(self, now: float) -> Attempt:
        """Count an attempt.  Each ends with one of `verified`, `refused_identity`, `failed` and `given_up`."""
        self.dials += 1
        is_trial = self.state is UpstreamState.LEFT_ALONE
        if is_trial:
            self.state = UpstreamState.BEING_TRIED
        return Attempt(now, is_trial)

    def verified(self, peer: Peer, now: float) -> bool:
        """Record that the broker was verified.  Returns whether the gateway had been backing off."""
        self.last_peer = peer
        self.verified_at = now
        return self.works(now)

    def refused_identity(self, failure: UpstreamFailure, now: float) -> bool:
        """Record that the broker proved its name and then refused one client identity.

        That is no failure of the broker, and shows that it is there.  Returns whether the gateway had been backing off.
        """
        self.failed_dials[failure.reason] += 1
        return self.works(now)

    def works(self, now: float) -> bool:
        """Record that it is there: a proxy opened a tunnel, say.  Returns whether the gateway had been backing off."""
        was_backing_off = not self._is_well
        self.state = UpstreamState.SERVING
        self.failures = 0
        self.retry_at = None
        self.reached_at = now
        return was_backing_off

    def failed(self, attempt: Attempt, failure: UpstreamFailure, now: float) -> bool:
        """Record a failed attempt.  Returns whether backing off, or the reason for it, is news.

        There is no effect if another attempt reached the broker since this one began, because then the broker works.
        The delay is not extended if an attempt that ended earlier has already caused it.
        """
        self.failed_dials[failure.reason] += 1
        # A copy: a raised exception references its frames, and with them a whole session.
        self.last_failure = UpstreamFailure(failure.reason, failure.detail)
        self.failed_at = now
        if self._is_well:
            if self.reached_at is not None and self.reached_at > attempt.began:
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
        """Record an attempt without a result; if it was the trial, another attempt may be."""
        if attempt.is_trial and self.state is UpstreamState.BEING_TRIED:
            self.state = UpstreamState.LEFT_ALONE

    def _delay(self) -> float:
        """Return seconds: doubled with each failure up to the maximum, then random between half of that and all of it.

        The jitter keeps gateways that lost a broker at the same moment from retrying at the same moment.
        """
        doublings = min(self.failures - 1, _MOST_DOUBLINGS)
        longest = min(self._failover.retry_max, self._failover.retry_first * 2.0**doublings)
        return longest * (0.5 + 0.5 * self._uniform())


def accounts(
    upstreams: Sequence[Upstream],
    failover: Failover,
    uniform: Callable[[], float],
    before: Sequence[UpstreamHealth] = (),
    vias: Sequence[UpstreamHealth | None] = (),
    *,
    judged_alike: bool = False,
) -> list[UpstreamHealth]:
    """Return the health of each upstream, in order; those in `before` carry over if they are of the same broker.

    `vias` has the health of each upstream's proxy, `None` for none; it is empty if no upstream has one.
    """
    known = {(health.address, health.verify_name): health for health in before}
    found: list[UpstreamHealth] = []
    for upstream, via in zip(upstreams, vias or [None] * len(upstreams), strict=True):
        own = known.get((_shown(upstream, via), upstream.verify_name))
        found.append(
            UpstreamHealth.of(upstream, failover, uniform, via)
            if own is None
            else evolve(own.under(failover, judged_alike=judged_alike), via=via)
        )
    return found


def _shown(upstream: Upstream, via: UpstreamHealth | None) -> str:
    return upstream.address if via is None else f"{upstream.address} via {via.address}"
