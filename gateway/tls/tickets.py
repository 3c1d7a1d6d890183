"""TLS session tickets (RFC 8446 §4.6.1): a verified session leaves one so that the next can skip the full handshake.

In: tickets of channels that are VERIFIED, with what their full handshake verified.  Out: at most one ticket per broker,
as long as everything that was verified still holds.

OpenSSL calls no verify callback when a session is resumed: the broker shows no certificate, it proves that it knows a
secret of a verified session.  So a ticket is worth as much as that verification:

* It belongs to one `Tickets`: one upstream (host and port), one identity, one policy.  The policy is roots, CRLs, pins,
  versions, ALPN, strictness and the client certificate.  A reload makes new policies, and the old tickets end with the
  old ones.  pyOpenSSL ties OpenSSL's session to the policy's Context.
* It is offered until the first of these: a certificate of the verified chain expires, a CRL is due to be replaced, an
  hour has passed since the last *full* handshake.  A ticket from a resumed session inherits that limit.
* The channel checks the identity and the pins again in each session (`gateway/tls/channel.py`).
* If a handshake fails in which a ticket was offered, none is offered for an hour.

TLS 1.3 only: a resumed TLS 1.2 session has no key exchange of its own, so its secrecy would depend on a key that the
broker may keep for years.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from attrs import field, frozen
from cryptography import x509
from OpenSSL import SSL

from gateway.tls.broker_identity import Identity
from gateway.tls.trust import TLSPolicy

# Seconds that a full handshake is valid for resumption; RFC 8446 §4.6.1 would allow seven days.
MAX_AGE = 3600.0
# Seconds without resumption after a handshake with a ticket failed.
SUSPENDED_FOR = 3600.0


@frozen(slots=True)
class Verified:
    """What a full handshake verified about a broker; times are seconds since the epoch.

    `der` is the certificate as received, so that those of resumed sessions are compared without parsing.  `pins` are
    those of the verified chain, the broker's own first, if the policy has any.  `group` is the key exchange group that
    the broker chose.
    """

    certificate: x509.Certificate
    der: bytes
    matched: str
    pins: tuple[bytes, ...]
    group: str
    since: float
    until: float


@frozen(slots=True)
class Ticket:
    """OpenSSL's session, which holds secrets, and what the full handshake at its beginning showed.

    `secret` is the one by which TLS 1.3 resumes the session.
    """

    session: SSL.Session
    secret: bytes = field(repr=False)
    verified: Verified


class Tickets:
    """The ticket of one broker.

    The latest one replaces the one before, and may be offered by several sessions: RFC 8446 §C.4 advises against that
    since it lets an onlooker tell that they are of one client, which the gateway's address tells anyway.
    """

    __slots__ = ("_now", "_resumes_from", "_ticket", "identity", "policy")

    def __init__(self, policy: TLSPolicy, identity: Identity, now: Callable[[], float] = time.time) -> None:
        """Take the policy and identity that the tickets belong to, and a clock in seconds since the epoch."""
        self.policy = policy
        self.identity = identity
        self._now = now
        self._ticket: Ticket | None = None
        self._resumes_from = float("-inf")

    def now(self) -> float:
        """Return the time of day, in seconds since the epoch."""
        return self._now()

    def holds(self, verified: Verified) -> bool:
        """Whether what was verified still holds.  Setting the clock back makes it void, too."""
        return verified.since <= self._now() < verified.until

    def offer(self) -> Ticket | None:
        """Return the ticket to resume with, if there is a valid one."""
        if self._ticket is not None and not self.holds(self._ticket.verified):
            self._ticket = None
        return None if self._is_suspended(self._now()) else self._ticket

    def keep(self, ticket: Ticket) -> None:
        """Keep a ticket of a channel that is VERIFIED, replacing the previous one."""
        self._ticket = ticket

    def suspend(self) -> bool:
        """Offer no tickets for `SUSPENDED_FOR` seconds; return whether that is news."""
        now = self._now()
        is_news = not self._is_suspended(now)
        self._resumes_from = now + SUSPENDED_FOR
        return is_news

    def _is_suspended(self, now: float) -> bool:
        # If the clock is set back meanwhile, the suspension is over, too.
        return 0 < self._resumes_from - now <= SUSPENDED_FOR


def good_until(policy: TLSPolicy, chain: Sequence[x509.Certificate], since: float) -> float:
    """Return until when a verification at `since` holds; both are seconds since the epoch."""
    expiries = (certificate.not_valid_after_utc.timestamp() for certificate in chain)
    return min(since + MAX_AGE, policy.crls_until, *expiries)
