"""Session records as log events; repeated failures of one cause are summarised.

In: `SessionRecord`s.  Out: events of `twisted.logger` that carry every field of the record under its own name (JSON
observers find them there) and one line of text, in which untrusted text is escaped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any, Protocol

from attrs import asdict, fields
from twisted.logger import Logger, LogLevel

from gateway.dial.dialler import DialJournal
from gateway.errors import EndReason, UpstreamFailure
from gateway.mqtt.packets import disconnect_detail
from gateway.ops.remedies import remedy_for
from gateway.ops.status_words import identity_words
from gateway.session.record import Peer, SessionRecord
from gateway.session.session import Journal as SessionJournal
from gateway.text import printable, unprintable_escaped

# Per window, this many records of each cause are written in full; the rest are counted.  Established sessions get more:
# a broker that restarts ends all its sessions at once, and a hundred lines show which.
FULL_RECORDS = 5
FULL_RECORDS_OF_STANDING = 100
WINDOW = 60.0  # seconds

# Ends that are not failures and need no attention: what a device or the operator decided.
IN_ORDER = frozenset(
    {
        EndReason.DEVICE_DISCONNECT,
        EndReason.GATEWAY_STOPPING,
        EndReason.CONFIGURATION_CHANGED,
        EndReason.DEVICE_DISABLED,
    }
)
# Ends of established sessions that are normal: devices run out of battery, brokers are updated.
_USUAL = IN_ORDER | {
    EndReason.DEVICE_LOST,
    EndReason.KEEPALIVE_TIMEOUT,
    EndReason.UPSTREAM_DISCONNECT,
    EndReason.UPSTREAM_LOST,
}

# The details of a DISCONNECT from a broker that goes away.  All other codes are about that one client: what it did
# wrong, that it may no longer do something, that another one has its name.
_LEAVING = tuple(map(disconnect_detail, (0x00, 0x80, 0x83, 0x88, 0x89, 0x8B, 0x98, 0x9C, 0x9D)))
# If all sessions at one broker end within so many seconds, a line says so.
_TOGETHER = 10.0

_MAX_TEXT = 256  # characters of a Client Identifier or a detail in an event; MQTT allows 65,535 bytes

# The fields of a record that its events carry under the same name.
_NAMES = tuple(field.name for field in fields(SessionRecord) if field.name not in {"number", "peer"})
_values = attrgetter(*_NAMES)
# Those that may be long.
_TEXTS = ("client_identifier", "detail", "upstream_username", "upstream_client_identifier")


class GatewayJournal(SessionJournal, DialJournal, Protocol):
    """Receives what the gateway does."""

    def refused(self, reason: EndReason, device_address: str, detail: str = "") -> None:
        """A connection was closed before it became a session."""

    def sweep(self) -> None:
        """About a second has passed."""

    def flush(self) -> None:
        """The gateway is stopping: write what is still pending."""


class Journal:
    """Writes a record at the start and one at the end of each session, and one for each refused connection.

    A session starts when the broker accepts it; one that fails earlier has only the end record.  If many sessions end
    for one cause, the first records of each minute are written, more of them for established sessions; then one line
    counts the rest.

    `sessions` says which sessions without a failure are recorded: "all", each with both its records; "limited", as if
    starts and orderly ends were failures; "failures", none.
    """

    def __init__(
        self, seconds: Callable[[], float], log: Logger | None = None, sessions: Callable[[], str] = lambda: "all"
    ) -> None:
        self._seconds = seconds
        self._sessions = sessions
        self._log = log or Logger(namespace="gateway")
        self._window_began = seconds()
        # By kind of record and reason.
        self._written: Counter[tuple[str, EndReason | None]] = Counter()
        self._withheld: Counter[tuple[str, EndReason | None]] = Counter()
        self._told_left_alone: set[str] = set()
        # By broker: how many sessions are established, how many of them it has ended lately, and of which it ended all.
        self._established: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._left_since = seconds()
        self._all_left: dict[str, int] = {}

    def session_started(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        if record.upstream and not record.offline:
            self._established[record.upstream] += 1
        if self._is_wanted("sessions started", None):
            self._write(LogLevel.info, _start_line(record), "session-start", record)

    def session_ended(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        reason = record.reason
        assert reason is not None  # noqa: S101  an ended session has a reason; narrows the type
        if record.established:
            self._count_end(record)
            what = "established sessions ended"
            due = (
                self._is_wanted(what, reason)
                if reason is EndReason.DEVICE_DISCONNECT
                else self._is_due(what, reason, FULL_RECORDS_OF_STANDING)
            )
            quiet = reason in _USUAL
        else:
            due = self._is_due("sessions failed before CONNACK", reason)
            quiet = reason in IN_ORDER
        if not due:
            return
        level = LogLevel.info if quiet else LogLevel.warn
        if reason is EndReason.INTERNAL_ERROR:
            level = LogLevel.error
        self._write(level, _end_line(record), "session-end", record)

    def refused(self, reason: EndReason, device_address: str, detail: str = "") -> None:
        """A connection was closed before it became a session."""
        if self._is_due("connections refused", reason):
            self._log.warn(
                "connection from {device_address} refused: {reason}{shown}. {remedy}",
                event="connection-refused",
                device_address=device_address,
                reason=reason.value,
                detail=_cut(detail),
                shown=f" ({unprintable_escaped(detail, 400)})" if detail else "",
                remedy=reason.remedy,
            )

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """A session got its broker, but `upstream` (`host:port`) failed before."""
        reason = failure.reason
        if self._is_due(f"failovers from {upstream}", reason):
            self._log.warn(
                "upstream {upstream} failed: {reason}{shown}; another broker was used. {remedy}",
                event="upstream-passed-over",
                upstream=upstream,
                reason=reason.value,
                detail=_cut(failure.detail),
                shown=f" ({unprintable_escaped(failure.detail, 400)})" if failure.detail else "",
                remedy=reason.remedy,
            )

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """`upstream` (`host:port`) failed, and is not dialled again for `seconds`."""
        reason = failure.reason
        if self._is_due(f"back-offs from {upstream}", reason):
            self._told_left_alone.add(upstream)
            self._log.warn(
                "upstream {upstream} failed: {reason}{shown}; backing off, next attempt in {shown_seconds} s. {remedy}",
                event="upstream-left-alone",
                upstream=upstream,
                seconds=seconds,
                shown_seconds=f"{seconds:.1f}",
                reason=reason.value,
                detail=_cut(failure.detail),
                shown=f" ({unprintable_escaped(failure.detail, 400)})" if failure.detail else "",
                remedy=reason.remedy,
            )

    def serves_again(self, upstream: str) -> None:
        """`upstream` (`host:port`) was verified again after a back-off."""
        # For a broker that comes and goes every second, log both changes or neither.
        if upstream in self._told_left_alone:
            self._told_left_alone.remove(upstream)
            self._log.info("upstream {upstream} is available again", event="upstream-serves-again", upstream=upstream)

    def sweep(self) -> None:
        """Say which brokers have ended all their sessions; close the window if it is over."""
        for upstream, count in self._all_left.items():
            if self._is_due(f"times that all sessions of {upstream} ended", EndReason.UPSTREAM_LOST):
                self._log.warn(
                    "upstream {upstream} ended all its {count} sessions within {window:.0f} s: "
                    "the broker may have gone away or restarted. See its log.",
                    event="upstream-sessions-lost",
                    upstream=upstream,
                    count=count,
                    window=_TOGETHER,
                )
        self._all_left.clear()
        if self._seconds() - self._left_since >= _TOGETHER:
            self._left.clear()
            self._left_since = self._seconds()
        if self._seconds() - self._window_began >= WINDOW:
            self.flush()

    def flush(self) -> None:
        """Close the window: log how many records were not written."""
        now = self._seconds()
        for (what, reason), count in sorted(self._withheld.items(), key=str):
            if reason is None or reason in IN_ORDER:
                self._log.info(
                    "{count} more {what} in the last {window} s{shown}",
                    event="records-withheld",
                    count=count,
                    what=what,
                    window=round(now - self._window_began),
                    reason=reason.value if reason is not None else None,
                    shown=f": {reason}" if reason is not None else "",
                )
                continue
            self._log.warn(
                "{count} more {what} in the last {window} s: {reason}. {meaning} {remedy}",
                event="records-withheld",
                count=count,
                what=what,
                window=round(now - self._window_began),
                reason=reason.value,
                meaning=reason.meaning,
                remedy=reason.remedy,
            )
        self._window_began = now
        self._written.clear()
        self._withheld.clear()

    def _count_end(self, record: SessionRecord) -> None:
        """Count the end of an established session, and whether its broker has none left."""
        upstream = record.upstream
        if record.offline or not upstream:
            return
        self._established[upstream] -= 1
        has_left = _has_broker_left(record)
        if has_left:
            self._left[upstream] += 1
        if self._established[upstream] > 0:
            return
        del self._established[upstream]
        # One session alone may have been taken over, or its network may have failed.
        if has_left and self._left[upstream] > 1:
            self._all_left[upstream] = self._left.pop(upstream)

    def _write(self, level: Any, line: str, event: str, record: SessionRecord) -> None:
        """Emit at `level`, a `LogLevel`, as `Logger.emit` would, without copying all fields three times."""
        log = self._log
        fields = _fields(record)
        fields |= {"line": line, "event": event, "log_format": "{line}", "log_level": level, "log_time": time.time()}
        fields |= {"log_namespace": log.namespace, "log_source": log.source, "log_logger": log}
        log.observer(fields)

    def _is_wanted(self, what: str, reason: EndReason | None) -> bool:
        """Return whether to record a start or an orderly end."""
        wanted = self._sessions()
        return wanted == "all" or (wanted == "limited" and self._is_due(what, reason, FULL_RECORDS_OF_STANDING))

    def _is_due(self, what: str, reason: EndReason | None, full: int = FULL_RECORDS) -> bool:
        if self._written[what, reason] < full:
            self._written[what, reason] += 1
            return True
        self._withheld[what, reason] += 1
        return False


def _has_broker_left(record: SessionRecord) -> bool:
    """Whether a session may have ended because its broker went away."""
    if record.reason is EndReason.UPSTREAM_DISCONNECT:
        return record.detail.startswith(_LEAVING)
    return record.reason is EndReason.UPSTREAM_LOST


def _fields(record: SessionRecord) -> dict[str, object]:
    """Return a record's fields and those of its broker as one mapping."""
    # Built by hand: attrs' `asdict` takes ten times as long, twice per session.
    fields: dict[str, object] = dict(zip(_NAMES, _values(record), strict=True))
    fields["session"] = record.number
    for name in _TEXTS:
        if len(text := getattr(record, name)) > _MAX_TEXT:
            fields[name] = _cut(text)
    fields["reason"] = record.reason.value if record.reason is not None else None
    if record.peer is not None:
        fields |= _peer_fields(record.peer)
    return fields


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


@lru_cache(maxsize=32)
def _peer_fields(peer: Peer) -> dict[str, object]:
    """Return the fields of a broker, which many sessions share."""
    return asdict(peer) | {"not_after": peer.not_after.isoformat()}


@lru_cache(maxsize=32)
def _shown_peer(peer: Peer) -> str:
    resumed = " resumed" if peer.resumed else ""
    names = f"broker {peer.subject} verified as {peer.matched_san}, issuer {peer.issuer}"
    return f", {names}, {peer.tls_version} {peer.cipher}{resumed}"


def _who(record: SessionRecord) -> str:
    name = f'"{printable(record.client_identifier, 80)}"' if record.client_identifier else "no Client Identifier"
    version = f" MQTT {record.protocol_version}" if record.protocol_version else ""
    via = f" via {record.via}" if record.via else ""
    # The operator chose it, but a file name may contain anything.
    rule = f" by rule {printable(record.rule, 80)}" if record.rule else ""
    return f"session {record.number} {record.device_address}{via} {name}{version}{rule}"


def _start_line(record: SessionRecord) -> str:
    if record.offline:
        return f"{_who(record)} is served without a broker, its messages are stored; {_steps(record)}"
    verified = _shown_peer(record.peer) if record.peer is not None else ""
    where = f"{record.upstream} ({record.upstream_address})" if record.upstream_address else record.upstream
    return f"{_who(record)} is connected to {where}{_identity(record)}{verified}; {_steps(record)}"


def _identity(record: SessionRecord) -> str:
    names = (record.upstream_certificate, record.upstream_username, record.upstream_client_identifier)
    words = identity_words(*(printable(name, 80) for name in names)) if any(names) else ""
    return f" as {words}" if words else ""


def _packets(count: int) -> str:
    return f"{count} packet{'' if count == 1 else 's'}"


def _end_line(record: SessionRecord) -> str:
    reason = record.reason
    detail = f" ({unprintable_escaped(record.detail, 400)})" if record.detail else ""
    line = f"{_who(record)} ended: {reason}{detail}"
    if record.established:
        line += (
            f"; {record.duration or 0.0:.1f} s, up {_packets(record.packets_up)} {record.bytes_up} bytes, "
            f"down {_packets(record.packets_down)} {record.bytes_down} bytes"
        )
        if record.withheld:
            line += f", {record.withheld} messages withheld by rule"
    elif record.upstream:
        line += f" [{record.upstream}{_identity(record)}]"
    usual = _USUAL if record.established else IN_ORDER
    if reason is None or reason in usual:
        return line
    return f"{line}. {remedy_for(reason, printable(record.client_identifier))}"


def _steps(record: SessionRecord) -> str:
    steps = (
        ("connect", record.connect_seconds),
        ("dns", record.dns_seconds),
        ("tcp", record.tcp_seconds),
        ("tls", record.tls_seconds),
        ("connack", record.connack_seconds),
    )
    return ", ".join([f"{name} {seconds * 1000:.0f} ms" for name, seconds in steps if seconds is not None])
