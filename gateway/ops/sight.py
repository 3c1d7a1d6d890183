"""The gateway's status as one document; the page, the metrics and the terminal output are made from it.

In: the ledger, and queries to the gateway.  Out: plain JSON values, described in docs/sight.md.  Untrusted text is made
printable, and cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from heapq import merge, nlargest
from itertools import chain, islice
from math import inf
from typing import Any

from attrs import frozen

from gateway import __version__
from gateway.dial.health import UpstreamHealth
from gateway.errors import EndReason
from gateway.ops.expiry import MOST_DEVICES, Certificate, DeviceCertificates, Validity, shown_by
from gateway.ops.journal import IN_ORDER
from gateway.ops.ledger import LATELY, REMEMBERED, End, Ledger, device_key, identity_at_broker
from gateway.ops.remedies import remedy_for
from gateway.ops.renewal import Renewals, whose
from gateway.ops.status_words import SCHEMA, SILENT_FOR_LONG, shown_state
from gateway.pieces import AT_A_TIME, Pieces, slices
from gateway.relay.core import Choice
from gateway.session.record import Traffic
from gateway.session.session import Session, State
from gateway.session.stored import Phase
from gateway.store.backlog import Backlog, client_identifier_of
from gateway.stored_devices import StoredDevices
from gateway.text import printable, unprintable_escaped

PER_PAGE = 50
MOST_PER_PAGE = 1000
_MAX_TEXT = 256  # characters shown of a Client Identifier or a detail
_MAX_WORDS = 1000  # characters shown of why a reload was refused
# Devices that are described in one turn of the event loop.
_SHOWN_AT_A_TIME = 50
_MAX_QUERY = 256  # characters used of a search
SHOWN = ("all", "connected", "quiet", "connecting", "silent")
SORTS = ("state", "name", "data")

# The steps of a session as metrics and documents name them.
STEPS = {
    State.WAIT_CONNECT: "wait-connect",
    State.DIALLING: "dialling",
    State.WAIT_CONNACK: "wait-connack",
    State.RELAYING: "relaying",
    State.STORED: "stored",
}
_ESTABLISHED = frozenset({State.RELAYING, State.STORED})
# What any stranger can bring about.
_OF_DEVICES = frozenset(
    {
        EndReason.DEVICE_LOST,
        EndReason.CONNECT_TIMEOUT,
        EndReason.NOT_MQTT,
        EndReason.MALFORMED_PACKET,
        EndReason.PROTOCOL_ERROR,
        EndReason.PACKET_TOO_LARGE,
        EndReason.UNSUPPORTED_PROTOCOL_VERSION,
        EndReason.NETWORK_NOT_ALLOWED,
        EndReason.CLIENT_ID_RESERVED,
        EndReason.CONNECT_NOT_REWRITABLE,
        EndReason.TOO_MANY_FROM_ADDRESS,
        EndReason.RATE_LIMITED,
        EndReason.PROXY_NOT_TRUSTED,
        EndReason.NO_PROXY_HEADER,
        EndReason.DEVICE_UNKNOWN,
        EndReason.DEVICE_PASSWORD_WRONG,
        EndReason.DEVICE_NAME_UNUSABLE,
        EndReason.SPOOFED,
        EndReason.CLIENT_ID_IN_USE,
        EndReason.CLIENT_ID_PACED,
        EndReason.TAKEN_OVER,
        EndReason.RULE_REFUSED,
    }
)
# Failures on the way to a broker, which a broker that was verified since has overcome.
_OF_THE_WAY = frozenset(
    reason for reason in EndReason if reason.startswith(("dns-", "tcp-", "proxy-", "tls-", "websocket-"))
) - {EndReason.PROXY_NOT_TRUSTED, EndReason.TLS_CLIENT_CERTIFICATE_REFUSED}
_NO_IDENTITY = {"upstream_certificate": "", "upstream_username": "", "upstream_client_identifier": ""}
_ALIVE_WITHIN = 10.0  # seconds; the sweep comes every second


@frozen(kw_only=True)
class Sources:
    """Queries to the gateway.

    `listeners` are (name, address); `host` is the name of this machine; `refused_rules` are (rule, problem);
    `refused_reloads` says why the current configuration files are not in use; `weak_ciphers` are (key, cipher with its
    weakness).  `log` gives how many lines of the log
    were lost, and whether lines are being lost now.
    """

    host: str
    upstreams: Callable[[], Sequence[UpstreamHealth]]
    certificates: Callable[[], Iterable[Certificate]]
    listeners: Callable[[], Sequence[tuple[str, str]]]
    is_stopping: Callable[[], bool]
    device_certificates: Callable[[], DeviceCertificates]
    refused_rules: Callable[[], Sequence[tuple[str, str]]]
    refused_reloads: Callable[[], Sequence[str]]
    max_sessions: Callable[[], int]
    engine: Choice
    seconds: Callable[[], float]
    now: Callable[[], datetime]
    store: Callable[[], StoredDevices | None] = lambda: None
    stores_all: Callable[[], bool] = lambda: False
    log: Callable[[], tuple[int, bool]] = lambda: (0, False)
    renewals: Callable[[], Renewals | None] = lambda: None
    weak_ciphers: Callable[[], Sequence[tuple[str, str]]] = lambda: ()


@frozen(kw_only=True)
class Query:
    """Which devices to show: those with `text` in the identifier, address, listener or upstream, from `page` on.

    White space around `text` counts only if it belongs to the identifier of a device, which is then shown first.

    `show` is one of `SHOWN`, `sort` one of `SORTS`: by state, the latest first in each; by Client Identifier; by the
    last data, the longest silence first.  Pages count from 1.
    """

    text: str = ""
    show: str = "all"
    sort: str = "state"
    page: int = 1
    limit: int = PER_PAGE

    @classmethod
    def of(cls, arguments: Mapping[str, str]) -> Query:
        """Parse the arguments of a request; invalid ones are ignored."""
        show, sort = arguments.get("show", ""), arguments.get("sort", "")
        return cls(
            text=arguments.get("q", "")[:_MAX_QUERY],
            show=show if show in SHOWN else "all",
            sort=sort if sort in SORTS else "state",
            page=_whole(arguments.get("page", ""), 1, 1_000_000, 1),
            limit=_whole(arguments.get("limit", ""), 0, MOST_PER_PAGE, PER_PAGE),
        )


class Sight:
    """Reads the gateway's status; keeps no state but the ledger."""

    def __init__(self, ledger: Ledger, sources: Sources) -> None:
        self.ledger = ledger
        self.sources = sources

    def is_alive(self) -> bool:
        """Return whether the event loop runs: its sweep enforces all timeouts."""
        return self.sources.seconds() - self.ledger.swept < _ALIVE_WITHIN

    def unready(self) -> str:
        """Return why the gateway is not ready for new devices; empty if it is.

        Without a broker it is, if it serves every device itself (`store`) and can write.
        """
        if self.sources.is_stopping():
            return "the gateway is stopping"
        if not self.sources.listeners():
            return "no listener is open"
        upstreams = self.sources.upstreams()
        if upstreams and not any(upstream.is_open for upstream in upstreams) and not self._stores_all():
            return "no broker is available: " + ", ".join(
                f"{each.address} is {shown_state(each.state.value)}"
                + (f" ({each.last_failure.reason})" if each.last_failure is not None else "")
                for each in upstreams
            )
        return ""

    def _stores_all(self) -> bool:
        devices = self.sources.store()
        return devices is not None and devices.store.failure is None and self.sources.stores_all()

    def certificates(self) -> Iterator[Certificate]:
        """Yield all certificates but the devices': own, CAs', the status page's and brokers'."""
        yield from self.sources.certificates()
        for upstream in self.sources.upstreams():
            peer = upstream.last_peer or self.ledger.peers.get(upstream.address)
            if peer is not None:
                yield shown_by(upstream.address, peer)

    def document(self, query: Query | None = None) -> Pieces[dict[str, Any]]:
        """Make the whole document, with the devices that `query` selects.

        Each device is shown as it was when its turn came, a few turns of the event loop before the end at most; all
        else is as of the end.
        """
        query = query or Query()
        ledger, sources = self.ledger, self.sources
        census = _Census(ledger, query, sources.seconds(), self._reachable_at())
        survey = yield from ledger.survey(census.see)
        for some in slices(list(ledger.ends())):
            census.add(some, sources.seconds())
            yield
        chosen = yield from census.chosen()
        stored = yield from self._stored()
        seconds, now = sources.seconds(), sources.now()

        def at(moment: float) -> str:
            return (now - timedelta(seconds=seconds - moment)).isoformat(timespec="seconds")

        items: list[dict[str, Any]] = []
        for several in slices(chosen, _SHOWN_AT_A_TIME):
            items += [census.shown(each, seconds, at) for each in several]
            yield
        steps = survey.steps
        unready = self.unready()
        latest, devices = self._lately(census, at), self._devices(query, census, items, seconds)
        absent, unserved, not_connected = census.absent, census.unserved, census.not_connected
        recovered, failing = census.recovered, census.failing
        yield from census.free()
        return {
            "schema": SCHEMA,
            "version": __version__,
            "host": self.sources.host,
            "time": now.isoformat(timespec="seconds"),
            "started": at(ledger.began),
            "uptime_seconds": round(seconds - ledger.began),
            "alive": self.is_alive(),
            "ready": not unready,
            "unready": unready,
            "listeners": [{"name": name, "address": address} for name, address in self.sources.listeners()],
            "engine": {"name": self.sources.engine.name, "words": self.sources.engine.words},
            "upstreams": [self._upstream(each, seconds, at) for each in self.sources.upstreams()],
            "certificates": [_certificate(each, now) for each in self.certificates()],
            "device_certificates": self._device_certificates(now),
            "refused_rules": self._refused_rules(),
            "renewals": self._renewals(),
            "weak_ciphers": [{"key": key, "cipher": cipher} for key, cipher in self.sources.weak_ciphers()],
            "sessions": {
                "open": sum(steps[step] for step in STEPS),
                "limit": self.sources.max_sessions(),
                "by_step": {word: steps[step] for step, word in STEPS.items()},
                "started": ledger.started,
                "ended": {reason.value: count for reason, count in ledger.ended.items()},
                "refused": {reason.value: count for reason, count in ledger.refusals.items()},
            },
            "traffic": survey.traffic._asdict(),
            "store": self._store(now, *stored),
            "reloads": {
                "done": ledger.reloads,
                "refused": ledger.refused_reloads,
                "wanting": [unprintable_escaped(words, _MAX_WORDS) for words in self.sources.refused_reloads()],
            },
            "log": dict(zip(("lines_lost", "losing"), self.sources.log(), strict=True)),
            "lately": latest,
            "history": [
                {
                    "ended": at(interval.ended),
                    "seconds": round(interval.ended - interval.began, 1),
                    "sessions": interval.open,
                    "packets": interval.packets,
                    "failures": interval.failures,
                }
                for interval in ledger.intervals()
            ],
            "not_connected": not_connected,
            "absent": absent.total(),
            "absent_reasons": _by_reason(absent),
            "unserved": unserved.total(),
            "unserved_reasons": _by_reason(unserved),
            "recovered": recovered,
            "failing": failing,
            "devices": devices,
        }

    def _reachable_at(self) -> float:
        """Return when it was last seen that brokers can be reached; 0 while the gateway is backing off from one."""
        upstreams = self.sources.upstreams()
        if not all(each.is_open for each in upstreams):
            return 0.0
        return max(each.verified_at or 0.0 for each in upstreams) if upstreams else 0.0

    def _device_certificates(self, now: datetime) -> dict[str, Any]:
        certificates = self.sources.device_certificates()
        return {
            "count": {state.value: count for state, count in certificates.counts(now).items()},
            "due": [_certificate(each, now) for each in certificates.due(now)],
        }

    def _refused_rules(self) -> dict[str, Any]:
        refused = self.sources.refused_rules()
        return {
            "count": len(refused),
            "first": [
                {"rule": printable(rule, _MAX_TEXT), "problem": unprintable_escaped(problem, _MAX_WORDS)}
                for rule, problem in refused[:MOST_DEVICES]
            ],
        }

    def _renewals(self) -> dict[str, Any]:
        renewals = self.sources.renewals()
        failing = {} if renewals is None else renewals.failing
        return {
            "done": 0 if renewals is None else renewals.done,
            "failed": 0 if renewals is None else renewals.failed,
            "failing": len(failing),
            "first": [
                {"whose": whose(name), "problem": problem} for name, problem in islice(failing.items(), MOST_DEVICES)
            ],
        }

    def _upstream(self, upstream: UpstreamHealth, seconds: float, at: Callable[[float], str]) -> dict[str, Any]:
        deciding = upstream.decisive
        failure = deciding.last_failure
        return {
            "address": upstream.address,
            "verify_name": upstream.verify_name,
            "proxy": upstream.via.address if upstream.via is not None else None,
            "state": deciding.state.value,
            "open": upstream.is_open,
            "last_address": upstream.last_address,
            "verified": at(upstream.verified_at) if upstream.verified_at is not None else None,
            "retry_in_seconds": max(0, round(deciding.retry_at - seconds)) if deciding.retry_at is not None else None,
            "failures_in_a_row": upstream.failures,
            "dials": upstream.dials,
            "failed_dials": {reason.value: count for reason, count in upstream.failed_dials.items()},
            "last_failure": None
            if failure is None or deciding.failed_at is None
            else _reason(failure.reason, unprintable_escaped(failure.detail, _MAX_TEXT))
            | {"time": at(deciding.failed_at), "seconds_ago": round(seconds - deciding.failed_at)},
        }

    def _stored(self) -> Pieces[tuple[Counter[str], list[Backlog]]]:
        """Count the stored devices by their phase; find the largest backlogs."""
        phases: Counter[str] = Counter()
        largest: list[Backlog] = []
        devices = self.sources.store()
        if devices is not None:
            for some in slices(list(devices.sessions.values())):
                phases.update(stored.phase.value for stored in some)
                yield
            for several in slices(list(devices.store)):
                waiting = (backlog for backlog in several if len(backlog))
                largest = nlargest(PER_PAGE, chain(largest, waiting), key=lambda each: each.bytes)
                yield
        return phases, largest

    def _store(self, now: datetime, phases: Counter[str], waiting: list[Backlog]) -> dict[str, Any] | None:
        devices = self.sources.store()
        if devices is None:
            return None
        store, counts = devices.store, devices.store.counts
        moment, seconds = now.timestamp(), self.sources.seconds()
        forecast, since = devices.forecast, devices.outage_since
        return {
            "outage_seconds": None if since is None else round(seconds - since),
            "full_in_seconds": _rounded(forecast.until_full(store.config.max_size)),
            "delivered_in_seconds": _rounded(forecast.until_empty()),
            "messages": store.messages,
            "bytes": store.bytes,
            "limit_bytes": store.config.max_size,
            "files_bytes": store.used,
            "oldest_seconds": None if store.oldest is None else max(0, round(moment - store.oldest)),
            "loading": store.loading,
            "failure": None if store.failure is None else unprintable_escaped(str(store.failure), _MAX_TEXT),
            "unreadable": {
                "devices": len(store.unreadable),
                "failure": unprintable_escaped(str(next(iter(store.unreadable.values()), "")), _MAX_TEXT),
            },
            "damaged_files": len(store.damaged_files),
            "newest_damaged_file": store.damaged_files[-1] if store.damaged_files else None,
            "stored": counts.stored,
            "delivered": counts.drained,
            "set_aside": sum(store.aside.values()),
            "dropped": dict(counts.dropped),
            "sessions": {phase.value: phases[phase.value] for phase in Phase},
            "backlogs": [
                {
                    "identity": printable(backlog.name, _MAX_TEXT),
                    "client_identifier": printable(client_identifier_of(backlog.name), _MAX_TEXT),
                    "messages": len(backlog),
                    "bytes": backlog.bytes,
                    "oldest_seconds": max(0, round(moment - (backlog.oldest or moment))),
                    "phase": Phase.OFFLINE.value if stored is None else stored.phase.value,
                    "connected": stored is not None and stored.has_device,
                    "trouble": ""
                    if stored is None or stored.trouble is None
                    else unprintable_escaped(str(stored.trouble), _MAX_TEXT),
                }
                for backlog in waiting
                for stored in (devices.sessions.get(backlog.name),)
            ],
        }

    def _lately(self, census: _Census, at: Callable[[float], str]) -> list[dict[str, Any]]:
        """Return the failures of the last 15 minutes, most frequent first."""
        latest = census.latest
        return [
            _reason(reason, latest[reason].detail if reason in latest else "")
            | {
                "count": count,
                "devices": census.devices[reason],
                "latest": at(latest[reason].ended) if reason in latest else None,
            }
            for reason, count in self.ledger.ended_lately().most_common()
            if reason not in IN_ORDER
        ]

    def _devices(self, query: Query, census: _Census, items: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Describe a page of devices: first those that failed, then those connecting, then the others."""
        return {
            "query": query.text,
            "show": query.show,
            "sort": query.sort,
            "page": query.page,
            "pages": max(1, -(-census.matching // query.limit)) if query.limit else 1,
            "matching": census.matching,
            "counts": census.counts,
            "remembered_seconds": round(min(REMEMBERED, seconds - self.ledger.began)),
            "items": items,
        }


@frozen(slots=True, eq=False)
class _Seen:
    """A session, and its step when its turn came: it may have ended since."""

    session: Session
    step: str
    last_data: float | None


_GROUPS = ("failed", "connecting", "connected", "left", "sorted")


class _Census:
    """All devices, connected or not, sorted into groups: who is here, who matches, who failed."""

    def __init__(self, ledger: Ledger, query: Query, seconds: float, reachable_at: float) -> None:
        self._ledger = ledger
        self._reachable_at = reachable_at
        self._served = -inf if ledger.served is None else ledger.served
        self._query = query
        self._silent_since = seconds - SILENT_FOR_LONG
        self._wanted = query.text.strip().casefold()
        # A name is also found in the form in which it is shown; of those that have ended, only that is kept.
        self._shown = printable(query.text.strip()).casefold()
        self._exact = {query.text, printable(query.text)}
        self._here: set[str] = set()
        # By name; apart, those whose whole identifier was searched for (0), and those where only the case differs (1).
        self._groups: dict[tuple[int, str], list[_Seen | End]] = {
            (rank, name): [] for rank in range(3) for name in _GROUPS
        }
        self.counts = dict.fromkeys(SHOWN, 0)
        # Whatever the query asks for: all that are remembered and not here; those of them that failed lately.
        self.not_connected = 0
        self.absent: Counter[EndReason] = Counter()
        self.unserved: Counter[EndReason] = Counter()
        # Of those not served: how many could be served now, and how many began to fail when no session worked any more.
        self.recovered = 0
        self.failing = 0
        self.latest: dict[EndReason, End] = {}
        self.devices: Counter[EndReason] = Counter()

    def see(self, session: Session, state: State) -> None:
        """Take an open session."""
        if state is State.ENDED:
            return
        # The last end of a connected device is shown with its current session.
        identifier = session.record.client_identifier
        if identifier:
            self._here.add(device_key(identifier, ""))
        self._sort(
            _Seen(session, STEPS[state], session.last_data), "connected" if state in _ESTABLISHED else "connecting"
        )

    def add(self, ends: Iterable[End], seconds: float) -> None:
        """Take ends, latest first."""
        for end in ends:
            is_late = seconds - end.ended < LATELY
            if is_late:
                self.latest.setdefault(end.reason, end)
                self.devices[end.reason] += 1
            if end.key in self._here:
                continue
            self.not_connected += 1
            self.absent[end.reason] += is_late and end.reason not in IN_ORDER
            if is_late and _is_unserved(end):
                self._count_unserved(end)
            self._sort(end, "left" if end.reason in IN_ORDER else "failed")

    def _count_unserved(self, end: End) -> None:
        self.unserved[end.reason] += 1
        if end.reason in _OF_THE_WAY and end.ended < self._reachable_at:
            self.recovered += 1
        elif self._served < end.failing_since:
            self.failing += 1

    def _sort(self, each: _Seen | End, group: str) -> None:
        of = each if isinstance(each, End) else each.session
        if self._wanted and not (_matches(of, self._wanted) or _matches(of, self._shown)):
            return
        names = ["all", "silent" if isinstance(each, End) else group]
        if not isinstance(each, End) and each.last_data is not None and each.last_data <= self._silent_since:
            names.append("quiet")
        for name in names:
            self.counts[name] += 1
        if self._query.show in names:
            self._groups[self._rank(_shown(of)), group if self._query.sort == "state" else "sorted"].append(each)

    def _rank(self, shown: str) -> int:
        if not self._query.text:
            return 2
        if shown in self._exact:
            return 0
        return 1 if shown.casefold() in {self._wanted, self._shown} else 2

    @property
    def matching(self) -> int:
        """How many devices the query selects, on all pages."""
        return sum(map(len, self._groups.values()))

    def chosen(self) -> Pieces[list[_Seen | End]]:
        """Choose those of the query's page, sorted within each group."""
        limit = self._query.limit
        first = (self._query.page - 1) * limit
        found: list[_Seen | End] = []
        for group in self._groups.values():
            if first >= len(group):
                first -= len(group)
                continue
            last = first + limit - len(found)
            found += (yield from _first(group, last, self._query.sort))[first:last]
            first = 0
        return found

    def free(self) -> Pieces[None]:
        """Forget all devices, some at a time: to free all in one go takes as long as to look at them."""
        for group in self._groups.values():
            while group:
                del group[-AT_A_TIME:]
                yield
        while self._here:
            for _ in range(min(AT_A_TIME, len(self._here))):
                self._here.pop()
            yield

    def shown(self, each: _Seen | End, seconds: float, at: Callable[[float], str]) -> dict[str, Any]:
        """Describe a device."""
        if isinstance(each, End):
            return _ended(each, seconds, at)
        before = self._ledger.last_end(each.session.record.client_identifier)
        return _open(each, before, seconds, at)


def _first(group: list[_Seen | End], count: int, sort: str) -> Pieces[list[_Seen | End]]:
    """Sort the first `count` of a group; a part at a time, since nothing interrupts a sort."""
    if not count or (sort == "state" and isinstance(group[0], End)):
        return group[:count]  # they came in order
    key = _KEYS[sort]
    parts = []
    for some in slices(group):
        parts.append(sorted(some, key=key))
        yield
    ordered = islice(merge(*parts, key=key), count)
    found: list[_Seen | End] = []
    while some := list(islice(ordered, AT_A_TIME)):
        found += some
        yield
    return found


def _latest_first(each: _Seen | End) -> float:
    return -(each.ended if isinstance(each, End) else each.session.record.started)


def _by_name(each: _Seen | End) -> str:
    # Cut, since a device may have chosen 65,535 bytes.
    return _identifier(each if isinstance(each, End) else each.session)[:_MAX_TEXT].casefold()


def _longest_silence_first(each: _Seen | End) -> float:
    return inf if isinstance(each, End) or each.last_data is None else each.last_data


_KEYS: dict[str, Callable[[_Seen | End], Any]] = {
    "state": _latest_first,
    "name": _by_name,
    "data": _longest_silence_first,
}


def _identifier(each: Session | End) -> str:
    return each.client_identifier if isinstance(each, End) else each.record.client_identifier


def _shown(each: Session | End) -> str:
    return each.client_identifier if isinstance(each, End) else printable(each.record.client_identifier, _MAX_TEXT)


def _matches(each: Session | End, wanted: str) -> bool:
    record = each if isinstance(each, End) else each.record
    identifier = record.client_identifier
    return (
        wanted in identifier.casefold()
        or wanted in record.device_address
        or wanted in record.listener.casefold()
        or wanted in record.upstream
        or wanted in _shown(each).casefold()
        or (isinstance(each, End) and wanted in each.reason.value)
    )


def _open(seen: _Seen, before: End | None, seconds: float, at: Callable[[float], str]) -> dict[str, Any]:
    session = seen.session
    record, heard, data = session.record, session.last_heard, seen.last_data
    return {
        "client_identifier": printable(record.client_identifier, _MAX_TEXT),
        "device_address": record.device_address,
        "listener": record.listener,
        "session": record.number,
        "protocol_version": record.protocol_version,
        "step": seen.step,
        "since": at(record.started),
        "seconds": round(seconds - record.started),
        "upstream": record.upstream,
        "upstream_address": record.upstream_address,
        **_NO_IDENTITY,
        **identity_at_broker(record),
        "traffic": session.traffic._asdict(),
        "heard_seconds_ago": max(0, round(seconds - heard)) if heard is not None else None,
        "last_data": at(data) if data is not None else None,
        "data_seconds_ago": max(0, round(seconds - data)) if data is not None else None,
        "held_back": session.held_back,
        "end": None if before is None else _end(before, seconds, at),
    }


def _ended(end: End, seconds: float, at: Callable[[float], str]) -> dict[str, Any]:
    return {
        "client_identifier": end.client_identifier,
        "device_address": end.device_address,
        "listener": end.listener,
        "session": end.number or None,
        "protocol_version": end.protocol_version,
        "step": "ended" if end.number else "refused",
        "since": at(end.ended),
        "seconds": round(seconds - end.ended),
        "upstream": end.upstream,
        "upstream_address": "",
        **_NO_IDENTITY,
        **end.identity,
        "traffic": end.traffic._asdict() if end.number else Traffic()._asdict(),
        "heard_seconds_ago": None,
        "last_data": None,
        "data_seconds_ago": None,
        "held_back": False,
        "end": _end(end, seconds, at),
    }


def _rounded(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds)


def _is_unserved(end: End) -> bool:
    """Whether a device was not served for a reason that lies beyond it: the broker, the way to it, or its rule."""
    return not end.established and end.reason not in IN_ORDER and end.reason not in _OF_DEVICES


def _end(end: End, seconds: float, at: Callable[[float], str]) -> dict[str, Any]:
    return _reason(end.reason, end.detail) | {
        "remedy": remedy_for(end.reason, end.client_identifier),
        "time": at(end.ended),
        "seconds_ago": max(0, round(seconds - end.ended)),
        "times": end.times,
        "times_seconds": round(seconds - end.since),
        "absent_since": at(end.absent_since),
        "absent_seconds": max(0, round(seconds - end.absent_since)),
        "established": end.established,
        "duration": round(end.duration, 1),
        "in_order": end.reason in IN_ORDER,
    }


def _by_reason(counts: Counter[EndReason]) -> dict[str, int]:
    """Return the counts above zero, highest first."""
    return {reason.value: count for reason, count in counts.most_common() if count}


def _reason(reason: EndReason, detail: str) -> dict[str, Any]:
    return {"reason": reason.value, "meaning": reason.meaning, "detail": detail, "remedy": reason.remedy}


def _certificate(certificate: Certificate, now: datetime) -> dict[str, Any]:
    validity = certificate.validity(now)
    return {
        "role": certificate.role.value,
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "upstream": certificate.upstream,
        "rule": certificate.rule,
        "not_after": certificate.not_after.isoformat(),
        "days_left": certificate.days_left(now),
        "state": validity.value,
        "remedy": "" if validity is Validity.VALID else certificate.remedy,
    }


def _whole(text: str, low: int, high: int, default: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return default
    return min(max(int(text), low), high)
