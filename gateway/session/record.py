"""What is kept about a session: the fields of its records.

In: what the session learns on its way.  Out: plain values for logs, metrics and people; device-supplied text is stored
as it came and escaped by whoever shows it.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from attrs import define, frozen

from gateway.errors import EndReason


@frozen(slots=True)
class Peer:
    """Facts about a verified broker: the names on its certificate and what the handshake agreed on.

    `resumed` says whether the handshake resumed the TLS session of one that was verified in full.
    """

    subject: str
    issuer: str
    matched_san: str
    not_after: datetime
    tls_version: str
    cipher: str
    alpn: str
    resumed: bool = False


@define(slots=True)
class Dial:
    """One broker that is dialled, and how far the dial has come: seconds of each step, `None` until it is done.

    `upstream` is the broker's `host:port`, `address` what that was resolved and connected to.
    """

    upstream: str
    address: str = ""
    dns_seconds: float | None = None
    tcp_seconds: float | None = None
    tls_seconds: float | None = None


@define(slots=True)
class SessionRecord:
    """One session, from the device's connection to its end.

    Times of steps are seconds and `None` until the step is done; `started` is on the injected clock.  `*_up` counts
    from the device to the broker, `*_down` the other way: MQTT bytes and control packets, without TLS.  `via` is the
    address of the load balancer whose PROXY header named the device, if one did.
    """

    number: int
    device_address: str
    started: float
    listener: str = ""
    via: str = ""
    rule: str = ""
    client_identifier: str = ""
    protocol_version: str = ""
    upstream: str = ""
    upstream_address: str = ""
    peer: Peer | None = None
    connect_seconds: float | None = None
    dns_seconds: float | None = None
    tcp_seconds: float | None = None
    tls_seconds: float | None = None
    connack_seconds: float | None = None
    duration: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    reason: EndReason | None = None
    detail: str = ""

    @property
    def established(self) -> bool:
        """Whether the broker accepted the session."""
        return self.connack_seconds is not None


class Traffic(NamedTuple):
    """What has passed: MQTT bytes and control packets, `up` from the device to the broker, without TLS."""

    bytes_up: int = 0
    bytes_down: int = 0
    packets_up: int = 0
    packets_down: int = 0
