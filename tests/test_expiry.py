"""Certificates that run out: said daily, by the time of day, and once for each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, formatEvent

from gateway.config import TLS
from gateway.ops.expiry import Certificate, ExpiryWatch, Role, Validity, configured, shown_by
from gateway.tls.channel import make_policy
from tests.facts import PEER
from tests.pki import certify

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = 24 * 3600


def certificate(days: float, **fields: Any) -> Certificate:
    """One that ends in so many days."""
    return attrs.evolve(
        Certificate(Role.OWN, "CN=gateway", "CN=ca", NOW + timedelta(days=days)),
        **fields,
    )


class Watch:
    """A watch whose time of day and clock are the test's."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.now = NOW
        self.events: list[dict[str, Any]] = []
        self.watch = ExpiryWatch(lambda: self.now, self.clock.seconds, Logger(observer=self.events.append))
        self.certificates: list[Certificate] = []

    def pass_time(self, seconds: float) -> list[str]:
        """Let time pass, swept each minute; return what was said."""
        self.events.clear()
        end = self.clock.seconds() + seconds
        while self.clock.seconds() < end:
            step = min(60, end - self.clock.seconds())
            self.clock.advance(step)
            self.now += timedelta(seconds=step)
            self.watch.sweep(lambda: self.certificates)
        assert all(event["log_level"] is LogLevel.warn for event in self.events)
        return [formatEvent(event) for event in self.events]


@pytest.mark.parametrize(
    ("days", "validity", "left"),
    [
        (31, Validity.VALID, 31),
        (30.01, Validity.VALID, 30),
        (30, Validity.SOON, 30),
        (0.5, Validity.SOON, 0),
        (-0.5, Validity.OVER, -1),
    ],
)
def test_thirty_days_before_its_end_it_is_soon(days: float, validity: Validity, left: int) -> None:
    """To the second."""
    assert certificate(days).validity(NOW) is validity
    assert certificate(days).days_left(NOW) == left


def test_it_is_said_once_a_day_from_thirty_days_before_on() -> None:
    """Weeks before, nothing; then each day one line, also when it is over."""
    watch = Watch()
    watch.certificates = [certificate(32), certificate(900)]
    assert watch.pass_time(1.9 * DAY) == []
    said = watch.pass_time(33 * DAY)
    assert len(said) == 33
    assert said[0].startswith("the gateway's own certificate (CN=gateway) ")
    assert "in 30 days, on 2026-04-02 12:00 UTC" in said[0]
    assert "expired on 2026-04-02 12:00 UTC" in said[-1]


def test_each_certificate_is_named_with_what_to_do() -> None:
    """Own, CA's, broker's: three lines, three remedies; the same one twice is one."""
    watch = Watch()
    peer = attrs.evolve(PEER, not_after=NOW + timedelta(days=3))
    watch.certificates = [
        certificate(3),
        certificate(3),
        certificate(3, role=Role.CA, subject="CN=ca"),
        shown_by("broker.example:8883", peer),
    ]
    own, ca, broker = watch.pass_time(60)
    assert "tls.client_cert" in own
    assert ca.startswith("the CA certificate (CN=ca) expires in 2 days")
    assert "tls.ca_file" in ca
    assert broker.startswith("the certificate of the broker broker.example:8883 (CN=broker) expires in 2 days")
    fields = watch.events[2]
    assert (fields["event"], fields["role"], fields["days_left"]) == ("certificate-ends", "broker", 2)


@pytest.mark.parametrize(("days", "words"), [(2.5, "in 2 days"), (1.5, "in 1 day,"), (0.5, "within a day,")])
def test_the_last_days_are_told_in_good_english(days: float, words: str) -> None:
    """It is read at three in the morning."""
    watch = Watch()
    watch.certificates = [certificate(days)]
    (line,) = watch.pass_time(60)
    assert f"expires {words}" in line


def test_one_that_was_replaced_is_heard_of_no_more() -> None:
    """And if the new one is bad, too, that is said at once."""
    watch = Watch()
    watch.certificates = [certificate(3)]
    assert len(watch.pass_time(60)) == 1
    watch.certificates = [certificate(400)]
    assert watch.pass_time(2 * DAY) == []
    watch.certificates = [certificate(4)]
    assert len(watch.pass_time(60)) == 1


def test_a_clock_that_jumps_does_not_flood_the_log() -> None:
    """The day between two lines is measured, not read off the time of day."""
    watch = Watch()
    watch.certificates = [certificate(3)]
    assert len(watch.pass_time(60)) == 1
    for _ in range(10):
        watch.now += timedelta(days=400)
        assert watch.pass_time(60) == []


def test_one_that_is_not_valid_yet_points_at_the_clock() -> None:
    """A box without a clock battery believes that it is 1970."""
    watch = Watch()
    watch.certificates = [certificate(400, not_before=NOW + timedelta(days=300))]
    (line,) = watch.pass_time(60)
    assert "is not valid before 2026-12-26 12:00 UTC. Check this machine's clock first." in line


@pytest.fixture
def files(tmp_path: Path) -> tuple[TLS, datetime, datetime]:
    """A configuration with a CA and a client certificate with an intermediate."""
    root = certify(subject="root", ca=True, names=(), purposes=())
    middle = certify(root, subject="middle", ca=True, names=(), purposes=(), valid_for=20)
    client = certify(middle, subject="client", valid_for=10)
    (tmp_path / "ca.pem").write_bytes(root.pem)
    tls = TLS(ca_file=(tmp_path / "ca.pem",), client_cert=client.write(tmp_path / "client.pem"))
    return tls, client.certificate.not_valid_after_utc, root.certificate.not_valid_after_utc


def test_all_that_is_configured_is_watched(files: tuple[TLS, datetime, datetime]) -> None:
    """The gateway's own with its intermediate, and each CA; a platform's roots are not the gateway's."""
    tls, client_end, root_end = files
    found = [(each.role, each.subject, each.not_after) for each in configured(make_policy(tls))]
    assert [(role, subject) for role, subject, _ in found] == [
        (Role.OWN, "CN=client"),
        (Role.OWN, "CN=middle"),
        (Role.CA, "CN=root"),
    ]
    assert (found[0][2], found[2][2]) == (client_end, root_end)
    assert list(configured(make_policy(TLS()))) == []
