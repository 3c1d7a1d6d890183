"""Certificate expiry: which certificates matter, how long they are valid, and a daily warning before they expire.

In: the certificates of the gateway, of the CAs it trusts, of brokers and of the status page; the time of day.  Out:
`Certificate`s for the status page and the metrics, warnings in the log.  The platform's roots are left out: the
platform renews them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain, islice, takewhile

from attrs import frozen
from cryptography import x509
from twisted.logger import Logger

from gateway.pieces import Pause, in_order, no_pause
from gateway.session.record import Peer
from gateway.text import printable
from gateway.tls.trust import ClientIdentity, TLSPolicy

SOON = timedelta(days=30)
_TELL_AGAIN = 24 * 3600.0  # seconds
_LOOK_AGAIN = 60.0  # seconds
MOST_DEVICES = 20  # devices' certificates that are named; the others are counted


class Role(StrEnum):
    """Whose certificate it is; the value is the label in metrics."""

    OWN = "own"
    CA = "ca"
    BROKER = "broker"
    DEVICE = "device"
    PAGE = "page"


_WHOSE = {
    Role.OWN: "the gateway's own certificate",
    Role.CA: "the CA certificate",
    Role.BROKER: "the certificate of the broker",
    Role.DEVICE: "the client certificate of rule",
    Role.PAGE: "the certificate of the status page",
}
_REMEDIES = {
    Role.OWN: "Renew it and install the new one as tls.client_cert. Brokers refuse the gateway once it has expired.",
    Role.CA: "Add its successor to tls.ca_file. The gateway refuses brokers under this CA once it has expired.",
    Role.BROKER: "Renew it on the broker. No session can be opened once it has expired.",
    Role.DEVICE: "Renew it and install the new one as client_cert of its rule. Brokers refuse it once it has expired.",
    Role.PAGE: "Renew it and install the new one as status.server_cert. Browsers warn of it once it has expired.",
}


class Validity(StrEnum):
    """A certificate's validity at a moment; the value is the word for people."""

    NOT_YET = "not yet valid"
    VALID = "valid"
    SOON = "ends soon"
    OVER = "expired"


@frozen
class Certificate:
    """The public facts of a certificate; `upstream` (`host:port`) is set for a broker's only, `rule` for a device's."""

    role: Role
    subject: str
    issuer: str
    not_after: datetime
    not_before: datetime | None = None
    upstream: str = ""
    rule: str = ""

    @property
    def whose(self) -> str:
        """Whose certificate it is, in words."""
        return f"{_WHOSE[self.role]} {self.upstream}{self.rule}".rstrip()

    @property
    def remedy(self) -> str:
        """What to do before it expires."""
        return _REMEDIES[self.role]

    def days_left(self, now: datetime) -> int:
        """Return whole days until it expires; negative afterwards."""
        return (self.not_after - now).days

    def validity(self, now: datetime) -> Validity:
        """Return whether it is valid at `now`."""
        if now > self.not_after:
            return Validity.OVER
        if self.not_before is not None and now < self.not_before:
            return Validity.NOT_YET
        return Validity.SOON if self.not_after - now <= SOON else Validity.VALID


def configured(policy: TLSPolicy) -> Iterator[Certificate]:
    """Yield the gateway's own certificates and the configured roots."""
    for certificate in policy.client.chain if policy.client is not None else ():
        yield _shown(Role.OWN, certificate)
    for certificate in policy.roots:
        yield _shown(Role.CA, certificate)


def of_page(chain: Iterable[x509.Certificate]) -> Iterator[Certificate]:
    """Yield the status page's own certificates."""
    for certificate in chain:
        yield _shown(Role.PAGE, certificate)


class DeviceCertificates:
    """The certificates that rules give to devices, in the order in which they expire: there may be thousands.

    `pause` is called between two of them.
    """

    def __init__(self, identities: Sequence[tuple[str, ClientIdentity]] = (), pause: Pause = no_pause) -> None:
        """Take the names of rules, each with its certificate."""
        self._identities = identities
        ends: list[tuple[float, int]] = []
        self._named: list[tuple[str, x509.Certificate]] = []
        self._not_yet: list[tuple[float, int]] = []
        for number, (rule, identity) in enumerate(identities):
            certificate = identity.chain[0]
            self._named.append((rule, certificate))
            ends.append((certificate.not_valid_after_utc.timestamp(), number))
            self._not_yet.append((certificate.not_valid_before_utc.timestamp(), number))
            pause()
        self._ends = in_order(ends, pause)
        self._not_yet = in_order(self._not_yet, pause)[::-1]

    def are_of(self, identities: Sequence[tuple[str, ClientIdentity]], pause: Pause = no_pause) -> bool:
        """Whether they were made of the same certificates."""
        if len(identities) != len(self._identities):
            return False
        for (name, identity), (known_name, known) in zip(identities, self._identities, strict=True):
            if name != known_name or identity is not known:
                return False
            pause()
        return True

    @property
    def parts(self) -> Iterable[object]:
        """All that it is made of, to be freed bit by bit."""
        return chain(self._identities, self._named, self._ends, self._not_yet)

    def counts(self, now: datetime) -> dict[Validity, int]:
        """Return how many there are in each state."""
        moment = now.timestamp()
        over = bisect_left(self._ends, (moment, 0))
        soon = bisect_left(self._ends, (moment + SOON.total_seconds(), 0)) - over
        not_yet = sum(1 for _ in takewhile(lambda start: start[0] > moment, self._not_yet))
        valid = max(0, len(self._ends) - over - soon - not_yet)
        return {Validity.VALID: valid, Validity.SOON: soon, Validity.OVER: over, Validity.NOT_YET: not_yet}

    @property
    def first_end(self) -> float | None:
        """When the first one expires, in seconds since the epoch; None if there is none."""
        return self._ends[0][0] if self._ends else None

    def due(self, now: datetime, limit: int = MOST_DEVICES) -> list[Certificate]:
        """Return up to `limit` that have expired, expire soon or are not valid yet; the first to expire first."""
        moment = now.timestamp()
        last = moment + SOON.total_seconds()
        numbers = [number for end, number in takewhile(lambda end: end[0] <= last, islice(self._ends, limit))]
        not_yet = takewhile(lambda start: start[0] > moment, islice(self._not_yet, limit))
        numbers = list(dict.fromkeys([*numbers, *(number for _, number in not_yet)]))[:limit]
        return [_shown(Role.DEVICE, certificate, rule) for rule, certificate in map(self._named.__getitem__, numbers)]


def shown_by(upstream: str, peer: Peer) -> Certificate:
    """Return the certificate of a broker, as of its last verification."""
    return Certificate(Role.BROKER, peer.subject, peer.issuer, peer.not_after, upstream=upstream)


class ExpiryWatch:
    """Warns daily about each certificate that expires within 30 days or has expired.

    `now` gives the time of day, which validity is judged by; `seconds` measures the day between two warnings, since the
    time of day may be set.
    """

    def __init__(self, now: Callable[[], datetime], seconds: Callable[[], float], log: Logger | None = None) -> None:
        self._now = now
        self._seconds = seconds
        self._log = log or Logger(namespace="gateway")
        self._looked = float("-inf")
        self._told: dict[Certificate, float] = {}

    def sweep(self, certificates: Callable[[], Iterable[Certificate]]) -> None:
        """Warn about certificates that are due for a warning; called about once a second."""
        seconds = self._seconds()
        if seconds - self._looked < _LOOK_AGAIN:
            return
        self._looked = seconds
        now = self._now()
        told: dict[Certificate, float] = {}
        for certificate in certificates():
            validity = certificate.validity(now)
            if validity is Validity.VALID or certificate in told:
                continue
            before = self._told.get(certificate)
            if before is None or seconds - before >= _TELL_AGAIN:
                self._tell(certificate, validity, now)
                before = seconds
            told[certificate] = before
        self._told = told  # Forgets replaced certificates.

    def _tell(self, certificate: Certificate, validity: Validity, now: datetime) -> None:
        days = certificate.days_left(now)
        left = f"in {days} {'day' if days == 1 else 'days'}" if days else "within a day"
        words = {
            Validity.SOON: f"expires {left}, on {certificate.not_after:%Y-%m-%d %H:%M} UTC",
            Validity.OVER: f"expired on {certificate.not_after:%Y-%m-%d %H:%M} UTC",
            Validity.NOT_YET: f"is not valid before {certificate.not_before or now:%Y-%m-%d %H:%M} UTC",
        }[validity]
        remedy = "Check this machine's clock first." if validity is Validity.NOT_YET else certificate.remedy
        self._log.warn(
            "{whose} ({subject}) {words}. {remedy}",
            event="certificate-ends",
            whose=certificate.whose,
            words=words,
            remedy=remedy,
            role=certificate.role.value,
            subject=certificate.subject,
            issuer=certificate.issuer,
            not_after=certificate.not_after.isoformat(),
            days_left=days,
        )


def _shown(role: Role, certificate: x509.Certificate, rule: str = "") -> Certificate:
    return Certificate(
        role,
        printable(certificate.subject.rfc4514_string()) or "an empty subject",
        printable(certificate.issuer.rfc4514_string()) or "an empty issuer",
        certificate.not_valid_after_utc,
        certificate.not_valid_before_utc,
        rule=printable(rule),
    )
