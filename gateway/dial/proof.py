"""Proves a client certificate: one TLS connection to a broker, without an MQTT byte.

In: a verified connection.  Out: `accepted`, or the failure with which the broker ended the connection.

With TLS 1.3 the client's handshake is done before the broker has looked at the certificate (RFC 8446 §4.4.2), and the
broker's alert comes afterwards.  So the connection stays for a while.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred

from gateway.errors import EndReason, SessionEnd, UpstreamFailure
from gateway.relay.side import Gauge
from gateway.relay.upstream import UpstreamProtocol
from gateway.session.record import Peer


class Proof:
    """What a connection serves instead of a session: it waits whether the broker ends it."""

    def __init__(self) -> None:
        self.ended: Deferred[None] = Deferred()
        self.gauge = Gauge(lambda _: None)

    def upstream_verified(self, upstream: UpstreamProtocol, peer: Peer) -> None:
        """See `Session.upstream_verified`."""

    def upstream_received(self, data: bytes) -> None:
        """See `Session.upstream_received`: nothing has been asked."""

    def upstream_broken(self, failure: SessionEnd) -> None:
        """See `Session.upstream_broken`."""
        if not self.ended.called:
            self.ended.errback(failure)

    def upstream_gone(self) -> None:
        """See `Session.upstream_gone`."""
        self.upstream_broken(UpstreamFailure(EndReason.UPSTREAM_LOST, "the broker closed the connection"))

    def fail(self, detail: str) -> None:
        """See `Session.fail`."""
        self.upstream_broken(UpstreamFailure(EndReason.INTERNAL_ERROR, detail))
