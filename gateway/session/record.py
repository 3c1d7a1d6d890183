"""The fields of session records.

In: facts about the session as they become known.  Out: plain values for logs, metrics and people. Device-supplied text
is stored unescaped; code that shows it must escape it.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from attrs import define, frozen

from gateway.errors import EndReason


# Hashed for each session, by what caches its texts.
@frozen(slots=True, cache_hash=True)
class Peer:
    """Facts about a verified broker: the names on its certificate and the negotiated TLS parameters.

    `resumed` tells whether the handshake resumed an earlier TLS session that was fully verified.
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
    """A connection attempt to one broker: the duration of each step in seconds, `None` until it is done.

    `upstream` is the broker's `host:port`, `address` the resolved address.
    """

    upstream: str
    address: str = ""
    dns_seconds: float | None = None
    tcp_seconds: float | None = None
    tls_seconds: float | None = None


@define(slots=True)
class SessionRecord:
    """One session, from the device's connection to its end.

    Durations of steps are in seconds, `None` until the step is done; `started` is on the injected clock.  `*_up` counts
    from the device to the broker, `*_down` the other way: MQTT bytes and control packets, without TLS.  `withheld`
    counts messages that the rule kept from the device.  `offline`: the gateway itself accepted a stored device,
    because no broker had.  `via` is the address of the load balancer that sent the PROXY header, if any.

    Who the device is at the broker: `upstream_certificate` is the subject of the client certificate that the broker is
    offered; `upstream_username` and `upstream_client_identifier` are set if the rule replaces the device's own.  A
    device's own user name is in no record: some brokers take it for a secret.
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
    upstream_certificate: str = ""
    upstream_username: str = ""
    upstream_client_identifier: str = ""
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
    withheld: int = 0
    offline: bool = False
    reason: EndReason | None = None
    detail: str = ""

    @property
    def established(self) -> bool:
        """Whether the broker accepted the session."""
        return self.connack_seconds is not None


class Traffic(NamedTuple):
    """Relayed MQTT bytes and control packets, without TLS; `up` is from the device to the broker."""

    bytes_up: int = 0
    bytes_down: int = 0
    packets_up: int = 0
    packets_down: int = 0
