"""Records of sessions as log events, a thousand failures of one cause in a few lines.

In: `SessionRecord`s.  Out: events of `twisted.logger` that carry every field of the record under its own name (JSON
observers find them there) and one human line, in which text from strangers is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from attrs import asdict
from twisted.logger import Logger

from gateway.errors import EndReason
from gateway.record import SessionRecord
from gateway.text import printable

# Of each cause, this many sessions that never stood are logged in full per window; the rest are counted.
FULL_RECORDS = 5
WINDOW = 60.0  # seconds

_ORDINARY = frozenset({EndReason.DEVICE_DISCONNECT, EndReason.GATEWAY_STOPPING})


class Journal:
    """Writes a record at the start and one at the end of each session, and one for each connection not let in.

    A session starts when the broker accepts it.  One that fails before has the end record only, and of those (and of
    connections not let in) the first few of each cause in a minute are written; then a line says how many more there
    were.  Sessions that stood are always written.
    """

    def __init__(self, seconds: Callable[[], float], log: Logger | None = None) -> None:
        self._seconds = seconds
        self._log = log or Logger(namespace="gateway")
        self._window_began = seconds()
        self._written: Counter[EndReason] = Counter()
        self._withheld: Counter[EndReason] = Counter()

    def session_started(self, record: SessionRecord) -> None:
        """See `gateway.session.Journal`."""
        self._log.info("{line}", line=_start_line(record), event="session-start", **_fields(record))

    def session_ended(self, record: SessionRecord) -> None:
        """See `gateway.session.Journal`."""
        reason = record.reason
        assert reason is not None  # noqa: S101  an ended session has a reason; narrows the type
        if not record.established and not self._is_due(reason):
            return
        level = self._log.info if record.established or reason in _ORDINARY else self._log.warn
        if reason is EndReason.INTERNAL_ERROR:
            level = self._log.error
        level("{line}", line=_end_line(record), event="session-end", **_fields(record))

    def refused(self, reason: EndReason, device_address: str) -> None:
        """A connection was closed at once."""
        if self._is_due(reason):
            self._log.warn(
                "{device_address} not let in: {reason}. {remedy}",
                event="connection-refused",
                device_address=device_address,
                reason=reason.value,
                remedy=reason.remedy,
            )

    def sweep(self) -> None:
        """Close the window if it is over: say how many records were withheld."""
        now = self._seconds()
        if now - self._window_began < WINDOW:
            return
        for reason, count in sorted(self._withheld.items()):
            self._log.warn(
                "{count} more in the last {window} s: {reason}. {meaning} {remedy}",
                event="records-withheld",
                count=count,
                window=round(now - self._window_began),
                reason=reason.value,
                meaning=reason.meaning,
                remedy=reason.remedy,
            )
        self._window_began = now
        self._written.clear()
        self._withheld.clear()

    def _is_due(self, reason: EndReason) -> bool:
        if self._written[reason] < FULL_RECORDS:
            self._written[reason] += 1
            return True
        self._withheld[reason] += 1
        return False


def _fields(record: SessionRecord) -> dict[str, object]:
    """Return a record's fields flat, the broker's facts beside the others."""
    fields = asdict(record)
    fields["session"] = fields.pop("number")
    peer = fields.pop("peer") or {}
    fields["reason"] = record.reason.value if record.reason is not None else None
    if record.peer is not None:
        peer["not_after"] = record.peer.not_after.isoformat()
    return fields | peer


def _who(record: SessionRecord) -> str:
    name = f'"{printable(record.client_identifier, 80)}"' if record.client_identifier else "no Client Identifier"
    version = f" MQTT {record.protocol_version}" if record.protocol_version else ""
    return f"session {record.number} {record.device_address} {name}{version}"


def _start_line(record: SessionRecord) -> str:
    peer = record.peer
    verified = f", {peer.matched_san}, issuer {peer.issuer}, {peer.tls_version} {peer.cipher}" if peer else ""
    where = f"{record.upstream} ({record.upstream_address})" if record.upstream_address else record.upstream
    return f"{_who(record)} is connected to {where}{verified}; {_steps(record)}"


def _end_line(record: SessionRecord) -> str:
    reason = record.reason
    detail = f" ({printable(record.detail, 400)})" if record.detail else ""
    line = f"{_who(record)} ended: {reason}{detail}"
    if record.established:
        return (
            f"{line}; {record.duration or 0.0:.1f} s, up {record.packets_up} packets {record.bytes_up} bytes, "
            f"down {record.packets_down} packets {record.bytes_down} bytes"
        )
    upstream = f" [{record.upstream}]" if record.upstream else ""
    remedy = f" {reason.remedy}" if reason is not None and reason not in _ORDINARY else ""
    return f"{line}{upstream}.{remedy}"


def _steps(record: SessionRecord) -> str:
    steps = (
        ("connect", record.connect_seconds),
        ("dns", record.dns_seconds),
        ("tcp", record.tcp_seconds),
        ("tls", record.tls_seconds),
        ("connack", record.connack_seconds),
    )
    return ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in steps if seconds is not None)
