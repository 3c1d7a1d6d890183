"""Facts that several tests take for granted: a broker that was verified."""

from __future__ import annotations

from datetime import UTC, datetime

from gateway.session.record import Peer

PEER = Peer(
    subject="CN=broker",
    issuer="CN=Test CA",
    matched_san="DNS:broker.example",
    not_after=datetime(2030, 1, 2, tzinfo=UTC),
    tls_version="TLSv1.3",
    cipher="TLS_AES_256_GCM_SHA384",
    alpn="",
)
