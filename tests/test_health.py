"""How an upstream's health is kept: states, backoff, and what one dial among many says."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.config import Failover, Upstream
from gateway.dial.health import UpstreamHealth, UpstreamState, accounts
from gateway.errors import EndReason, UpstreamFailure
from gateway.session.record import Peer

PEER = Peer("CN=broker", "CN=ca", "DNS:broker.example", datetime(2030, 1, 1, tzinfo=UTC), "TLSv1.3", "AES", "")
REFUSED = UpstreamFailure(EndReason.TCP_REFUSED, "nobody listens")
EXPIRED = UpstreamFailure(EndReason.TLS_EXPIRED, "the broker's certificate: expired")


def health_of(*, jitter: float | Iterator[float] = 1.0, **failover: Any) -> UpstreamHealth:
    """Return a new account; `jitter` is what is drawn from 0 to 1, where 1 takes nothing off."""
    draw = (lambda: jitter) if isinstance(jitter, float) else jitter.__next__
    return UpstreamHealth.of(Upstream("broker.example"), Failover(**failover), draw)


def failed_at(health: UpstreamHealth, now: float, failure: UpstreamFailure = REFUSED) -> bool:
    """Let one dial fail in no time."""
    return health.failed(health.begin(now), failure, now)


def verified_at(health: UpstreamHealth, now: float) -> bool:
    """Let one dial succeed in no time."""
    health.begin(now)
    return health.verified(PEER, now)


def test_an_upstream_that_was_never_dialled_is_open_to_all() -> None:
    """Nothing is known of it, and that is said."""
    health = health_of()
    assert health.is_open
    assert health.state is UpstreamState.UNTRIED
    assert (health.address, health.verify_name) == ("broker.example:8883", "broker.example")
    assert (health.dials, health.last_failure, health.retry_at, health.verified_at) == (0, None, None, None)


def test_an_upstream_that_was_verified_serves() -> None:
    """With who it was, and when."""
    health = health_of()
    assert not verified_at(health, 7.0)
    assert health.is_open
    assert (health.state, health.last_peer, health.verified_at) == (UpstreamState.SERVING, PEER, 7.0)


@pytest.mark.parametrize("served_before", [False, True])
def test_an_upstream_that_failed_is_left_alone(served_before: bool) -> None:
    """Nobody dials it until its time has come, and why is kept."""
    health = health_of(retry_first=2.0)
    if served_before:
        verified_at(health, 5.0)
    assert failed_at(health, 10.0)
    assert not health.is_open
    assert health.state is UpstreamState.LEFT_ALONE
    assert (health.failed_at, health.retry_at, health.failures) == (10.0, 12.0, 1)
    assert health.last_failure is not None
    assert (health.last_failure.reason, health.last_failure.detail) == (REFUSED.reason, REFUSED.detail)
    assert not health.is_due(11.9)
    assert health.is_due(12.0)
    assert health.standing() == "backing off"


def test_a_broker_behind_a_proxy_is_due_when_both_are() -> None:
    """Its own back-off and its proxy's must be over, and what is said is of the one that decides."""
    proxy, own = health_of(retry_first=4.0), health_of(retry_first=8.0)
    own.via = proxy
    assert own.is_open
    failed_at(proxy, 0.0)
    assert (own.is_open, own.decisive) == (False, proxy)
    assert [own.is_due(now) for now in (3.9, 4.0)] == [False, True]
    assert own.standing() == "backing off"
    failed_at(own, 0.0)
    assert [own.is_due(now) for now in (4.0, 7.9, 8.0)] == [False, False, True]
    trial = proxy.begin(8.0)
    assert not own.is_due(8.0)
    assert proxy.works(8.0)
    proxy.given_up(trial)
    assert (own.is_open, own.decisive) == (False, own)
    assert own.is_due(8.0)
    assert own.standing() == "backing off"


def test_a_failure_that_is_kept_keeps_nothing_else() -> None:
    """An exception holds on to every frame that it came through, and so to the session that met it."""
    health = health_of()
    with pytest.raises(UpstreamFailure) as raised:
        raise UpstreamFailure(EndReason.TCP_REFUSED)
    assert raised.value.__traceback__ is not None
    failed_at(health, 0.0, raised.value)
    assert health.last_failure is not None
    assert health.last_failure.__traceback__ is None


def test_the_time_doubles_up_to_a_maximum() -> None:
    """However often it has failed; success begins anew."""
    health = health_of(retry_first=1.0, retry_max=30.0)
    delays = []
    for _ in range(8):
        now = health.retry_at or 0.0
        failed_at(health, now)
        assert health.retry_at is not None
        delays.append(health.retry_at - now)
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    health.failures = 10_000
    failed_at(health, 1000.0)
    assert health.retry_at == 1030.0
    assert verified_at(health, 1030.0)
    failed_at(health, 1031.0)
    assert (health.failures, health.retry_at) == (1, 1032.0)


def test_chance_takes_off_up_to_half() -> None:
    """So that gateways that lost a broker together do not come back to it together, and none comes too soon."""
    health = health_of(jitter=iter((0.0, 0.5, 1.0)), retry_first=4.0, retry_max=4.0)
    delays = []
    for now in (0.0, 100.0, 200.0):
        failed_at(health, now)
        assert health.retry_at is not None
        delays.append(health.retry_at - now)
    assert delays == [2.0, 3.0, 4.0]


def test_one_dial_at_a_time_tries_again() -> None:
    """From its beginning to its end the upstream is closed to all others."""
    health = health_of()
    failed_at(health, 0.0)
    trial = health.begin(5.0)
    assert trial.is_trial
    assert health.state is UpstreamState.BEING_TRIED
    assert not health.is_open
    assert not health.is_due(1000.0)
    assert health.standing() == "it is being tried"
    assert not health.failed(trial, REFUSED, 6.0)
    assert (health.failures, health.retry_at) == (2, 8.0)


def test_a_trial_that_succeeds_opens_the_upstream() -> None:
    """And says that it had been left alone."""
    health = health_of()
    failed_at(health, 0.0)
    health.begin(5.0)
    assert health.verified(PEER, 5.5)
    assert health.is_open
    assert (health.state, health.failures, health.retry_at) == (UpstreamState.SERVING, 0, None)


def test_a_broker_that_refuses_an_identity_is_there() -> None:
    """It proved its name; that counts as the end of a trial, and not as a verification."""
    health = health_of()
    early = health.begin(0.0)
    failed_at(health, 0.0)
    health.begin(5.0)
    refused = UpstreamFailure(EndReason.TLS_CLIENT_CERTIFICATE_REFUSED)
    assert health.refused_identity(refused, 5.5)
    assert (health.state, health.failures, health.retry_at) == (UpstreamState.SERVING, 0, None)
    assert (health.verified_at, health.last_peer) == (None, None)
    assert health.failed_dials == {EndReason.TCP_REFUSED: 1, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED: 1}
    # Another identity's refusal is no news, and a dial that began before fails without effect.
    assert not health.refused_identity(refused, 6.0)
    assert not health.failed(early, REFUSED, 7.0)
    assert health.is_open


def test_a_trial_that_is_given_up_says_nothing_and_keeps_nobodys_place() -> None:
    """The next dial may be the trial at once."""
    health = health_of()
    failed_at(health, 0.0)
    health.given_up(health.begin(5.0))
    assert health.state is UpstreamState.LEFT_ALONE
    assert health.is_due(5.0)
    assert health.failures == 1


def test_a_dial_that_is_given_up_changes_nothing_else() -> None:
    """One that was no trial does not end the trial of another."""
    health = health_of()
    before = health.begin(0.0)
    failed_at(health, 0.0)
    trial = health.begin(5.0)
    health.given_up(before)
    assert health.state is UpstreamState.BEING_TRIED
    health.verified(PEER, 6.0)
    health.given_up(trial)
    assert health.state is UpstreamState.SERVING


def test_one_failure_among_successes_closes_nothing() -> None:
    """A broker in a storm drops some; another dial was verified since this one began, so it is well."""
    health = health_of()
    unlucky = health.begin(0.0)
    verified_at(health, 3.0)
    assert not health.failed(unlucky, REFUSED, 10.0)
    assert health.state is UpstreamState.SERVING
    assert health.failed_dials == {EndReason.TCP_REFUSED: 1}
    assert health.last_failure is not None


def test_a_dial_that_began_after_the_last_success_decides() -> None:
    """What was verified before it proves nothing about now."""
    health = health_of()
    verified_at(health, 3.0)
    assert failed_at(health, 3.0)
    assert health.state is UpstreamState.LEFT_ALONE


def test_a_thousand_dials_that_fail_of_one_cause_are_one_failure() -> None:
    """They began before it was left alone: the time that it is left alone for is that of the first."""
    health = health_of()
    attempts = [health.begin(at / 100) for at in range(1000)]
    assert [health.failed(attempt, REFUSED, 10.0 + attempt.began) for attempt in attempts].count(True) == 1
    assert (health.failures, health.retry_at) == (1, 11.0)
    assert health.failed_dials == {EndReason.TCP_REFUSED: 1000}
    assert health.dials == 1000


def test_a_straggler_does_not_end_the_trial() -> None:
    """A dial that began before the upstream was left alone fails while the trial is under way."""
    health = health_of()
    straggler = health.begin(0.0)
    failed_at(health, 1.0)
    trial = health.begin(2.0)
    assert not health.failed(straggler, REFUSED, 3.0)
    assert health.state is UpstreamState.BEING_TRIED
    health.failed(trial, REFUSED, 4.0)
    assert (health.failures, health.retry_at) == (2, 6.0)


def test_a_straggler_that_succeeds_opens_the_upstream() -> None:
    """The trial that then fails had begun earlier: it was one of many."""
    health = health_of()
    straggler = health.begin(0.0)
    failed_at(health, 1.0)
    trial = health.begin(2.0)
    assert not straggler.is_trial
    assert health.verified(PEER, 3.0)
    assert not health.failed(trial, REFUSED, 12.0)
    assert health.state is UpstreamState.SERVING


def test_what_is_news_is_told_once() -> None:
    """A broker that is away for a week is one line in the log; another reason is another line, and so is a return."""
    health = health_of()
    told = [failed_at(health, at * 100.0, failure) for at, failure in enumerate((REFUSED, REFUSED, EXPIRED, EXPIRED))]
    assert told == [True, False, True, False]
    assert verified_at(health, 500.0)
    assert not verified_at(health, 501.0)
    assert failed_at(health, 600.0, EXPIRED)


def under(before: UpstreamHealth, *, judged_alike: bool = True, **failover: Any) -> UpstreamHealth:
    """Return the account that a reload makes of `before`."""
    upstream = Upstream("broker.example")
    (health,) = accounts([upstream], Failover(**failover), lambda: 1.0, [before], judged_alike=judged_alike)
    return health


def test_a_reload_that_changes_nothing_here_keeps_what_is_known() -> None:
    """A broker that is left alone stays so, and the counts go on; the old account is no longer written to."""
    before = health_of()
    verified_at(before, 1.0)
    failed_at(before, 2.0)
    health = under(before)
    assert (health.state, health.retry_at, health.failures) == (UpstreamState.LEFT_ALONE, 3.0, 1)
    assert (health.dials, health.failed_dials, health.last_peer) == (2, {EndReason.TCP_REFUSED: 1}, PEER)
    failed_at(health, 3.0)
    assert (before.dials, before.failed_dials) == (2, {EndReason.TCP_REFUSED: 1})


def test_a_reload_during_a_trial_lets_another_one_begin() -> None:
    """The one that is under way ends with the configuration that it belongs to."""
    before = health_of()
    failed_at(before, 0.0)
    before.begin(5.0)
    assert under(before).is_due(5.0)


@pytest.mark.parametrize("changed", [{"judged_alike": False}, {"retry_max": 5.0}])
def test_a_reload_that_may_have_mended_it_begins_anew(changed: dict[str, Any]) -> None:
    """With another CA, say, the broker is dialled at once; only what was counted goes on."""
    before = health_of()
    failed_at(before, 0.0, EXPIRED)
    health = under(before, **changed)
    assert (health.state, health.last_failure, health.failures) == (UpstreamState.UNTRIED, None, 0)
    assert (health.dials, health.failed_dials) == (1, {EndReason.TLS_EXPIRED: 1})


def test_an_account_is_of_one_address_and_one_name() -> None:
    """The same address under another name is another broker."""
    before = health_of()
    failed_at(before, 0.0)
    upstreams = [Upstream("broker.example", server_name="other.example"), Upstream("broker.example")]
    found = accounts(upstreams, Failover(), lambda: 1.0, [before], judged_alike=True)
    assert [health.dials for health in found] == [0, 1]
    assert [health.verify_name for health in found] == ["other.example", "broker.example"]


def test_an_account_is_of_one_way_to_the_broker() -> None:
    """A broker that cannot be reached directly may well be reached through a proxy, and the other way round."""
    upstream, proxy = Upstream("broker.example"), UpstreamHealth.of(Upstream("proxy.example"), Failover(), lambda: 1.0)

    def after(before: UpstreamHealth, via: UpstreamHealth | None) -> UpstreamHealth:
        (health,) = accounts([upstream], Failover(), lambda: 1.0, [before], [via], judged_alike=True)
        return health

    direct = health_of()
    failed_at(direct, 0.0)
    through = after(direct, proxy)
    assert (through.dials, through.via) == (0, proxy)
    assert through.address == "broker.example:8883 via proxy.example:8883"
    failed_at(through, 0.0)
    assert after(through, proxy).dials == 1
    assert after(through, None).dials == 0
    assert after(direct, None).dials == 1
