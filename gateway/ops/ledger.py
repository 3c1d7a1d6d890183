"""Counts of what happened, and the last end of each device.

In: what the gateway reports to its journal, which is passed on, and the open sessions.  Out: counters, durations by
step, a ring of samples for the charts, and the last end of each device.

Nothing here runs per message: the traffic of open sessions is read from them on request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import pairwise

from attrs import define, field, frozen

from gateway.errors import EndReason, UpstreamFailure
from gateway.ops.journal import IN_ORDER, GatewayJournal
from gateway.pieces import Pieces, at_once, slices
from gateway.session.record import Peer, SessionRecord, Traffic
from gateway.session.session import Session, State
from gateway.text import printable, unprintable_escaped

SAMPLE_INTERVAL = 10.0  # seconds
SAMPLES = 90  # number of intervals kept: 15 minutes
LATELY = SAMPLE_INTERVAL * SAMPLES  # seconds
# How long (seconds) the last end of each device is kept: long enough to find it the next morning.
REMEMBERED = 24 * 3600.0
# And how many: about 10 MB if every identifier has the maximum length.
_MAX_ENDS = 10_000
_MAX_TEXT = 256  # characters kept of a Client Identifier or a detail; MQTT allows 65,535 bytes

STEPS = ("connect", "dns", "tcp", "tls", "connack")
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

_NOTHING = Traffic()


class Histogram:
    """Durations (seconds), counted by bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[int]:
        """Return how many durations are at most each bucket's bound; the last value is the total count."""
        sums, so_far = [], 0
        for count in self._counts:
            so_far += count
            sums.append(so_far)
        return sums


@define(slots=True)
class End:
    """How a device's last session ended, or why it was refused; `ended` is on the injected clock (seconds).

    Untrusted text is printable here, and cut.  `client_identifier` is empty if none was read; `key` identifies the
    device.  `times` counts the ends of this device since `since`.  `identity` is as `identity_at_broker` returns it.
    `absent_since` is when its last established session ended, or of its first attempt if none is known; `failing_since`
    is the first of the latest attempts that were not established, one after the other.
    """

    key: str
    client_identifier: str
    device_address: str
    reason: EndReason
    detail: str
    ended: float
    since: float
    times: int = 1
    number: int = 0
    listener: str = ""
    protocol_version: str = ""
    upstream: str = ""
    established: bool = False
    duration: float = 0.0
    traffic: Traffic = _NOTHING
    identity: Mapping[str, str] = field(factory=dict)
    absent_since: float = field(init=False)
    failing_since: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.absent_since = self.failing_since = self.ended

    def follow(self, before: End) -> None:
        """Carry over from the device's end before this one."""
        self.since = before.since
        self.times = before.times + 1
        if not self.established:
            self.absent_since = before.absent_since
            if not before.established:
                self.failing_since = before.failing_since


@frozen(slots=True)
class Sample:
    """The counters at a time of the injected clock (seconds); all but `open` only grow."""

    at: float
    open: int
    traffic: Traffic
    started: int
    failures: int
    ended: Counter[EndReason]


@frozen(slots=True)
class Survey:
    """What the open sessions are doing and what all sessions have relayed; closing sessions are at step ENDED."""

    steps: Counter[State]
    traffic: Traffic


@frozen(slots=True)
class Interval:
    """What happened between two samples: sessions open at the end, packets in both directions, failures."""

    began: float
    ended: float
    open: int
    packets: int
    failures: int


class Ledger:
    """A `GatewayJournal` that counts and passes on.

    Counts are by reason where there is one: `ended` for sessions, `refusals` for refused connections.
    `failures` are all ends that are not in order, and all refusals.  `passes` counts failovers from a broker
    (`host:port`) by reason; `peers` has the last verified peer of each.  `served` is when a session was last
    established (seconds on the injected clock).  The code that reloads counts `reloads` and `refused_reloads`.
    `spread` does the pieces of a sample, by default all at once.
    """

    def __init__(
        self,
        journal: GatewayJournal,
        seconds: Callable[[], float],
        spread: Callable[[Pieces[None]], None] = at_once,
    ) -> None:
        self._journal = journal
        self._seconds = seconds
        self._ends: OrderedDict[str, End] = OrderedDict()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES + 1)
        self._traffic = _NOTHING
        self._open: Collection[Session] = ()
        self._spread = spread
        self._sampling = False
        # Of each survey under way: the records of the sessions that have ended since it began, by identity.
        self._ended_meanwhile: list[set[int]] = []
        self.began = self.swept = seconds()
        self.started = 0
        self.served: float | None = None
        self.failures = 0
        self.ended: Counter[EndReason] = Counter()
        self.refusals: Counter[EndReason] = Counter()
        self.durations = {step: Histogram() for step in STEPS}
        self.passes: Counter[tuple[str, EndReason]] = Counter()
        self.peers: dict[str, Peer] = {}
        self.reloads = 0
        self.refused_reloads = 0

    def watch(self, sessions: Collection[Session]) -> None:
        """Take the gateway's collection of sessions, which changes as they come and go."""
        self._open = sessions
        self.sample()

    # ---- what the gateway tells

    def session_started(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        self._journal.session_started(record)
        self.started += 1
        self.served = self._seconds()
        if record.peer is not None:
            self.peers[record.upstream] = record.peer
        self._observe(record)

    def session_ended(self, record: SessionRecord) -> None:
        """See `gateway.session.session.Journal`."""
        self._journal.session_ended(record)
        reason = record.reason
        assert reason is not None  # noqa: S101  an ended session has a reason; narrows the type
        self.ended[reason] += 1
        if not record.established:
            self._observe(record)
        passed = _of(record)
        self._traffic = _sum((self._traffic, passed))
        for meanwhile in self._ended_meanwhile:
            meanwhile.add(id(record))
        self._remember(
            End(
                key=device_key(record.client_identifier, record.device_address),
                client_identifier=printable(record.client_identifier, _MAX_TEXT),
                device_address=record.device_address,
                reason=reason,
                detail=unprintable_escaped(record.detail, _MAX_TEXT),
                ended=self._seconds(),
                since=self._seconds(),
                number=record.number,
                listener=record.listener,
                protocol_version=record.protocol_version,
                upstream=record.upstream,
                established=record.established,
                duration=record.duration or 0.0,
                traffic=passed,
                identity=identity_at_broker(record),
            )
        )

    def refused(self, reason: EndReason, device_address: str, detail: str = "") -> None:
        """See `gateway.ops.journal.GatewayJournal`."""
        self._journal.refused(reason, device_address, detail)
        self.refusals[reason] += 1
        now = self._seconds()
        self._remember(
            End(
                device_key("", device_address),
                "",
                device_address,
                reason,
                unprintable_escaped(detail, _MAX_TEXT),
                now,
                now,
            )
        )

    def passed_over(self, upstream: str, failure: UpstreamFailure) -> None:
        """A session got its broker, but `upstream` failed before."""
        self._journal.passed_over(upstream, failure)
        self.passes[upstream, failure.reason] += 1

    def left_alone(self, upstream: str, failure: UpstreamFailure, seconds: float) -> None:
        """See `gateway.ops.journal.GatewayJournal`."""
        self._journal.left_alone(upstream, failure, seconds)

    def serves_again(self, upstream: str) -> None:
        """See `gateway.ops.journal.GatewayJournal`."""
        self._journal.serves_again(upstream)

    def sweep(self) -> None:
        """About a second has passed."""
        self._journal.sweep()
        self.swept = now = self._seconds()
        while self._ends:
            key, oldest = next(iter(self._ends.items()))
            if now - oldest.ended < REMEMBERED:
                break
            del self._ends[key]
        if self._sampling:
            return
        if not self._samples or now - self._samples[-1].at >= SAMPLE_INTERVAL:
            self.sample()

    def flush(self) -> None:
        """The gateway is stopping."""
        self._journal.flush()

    # ---- queries

    def survey(self, see: Callable[[Session, State], None] | None = None) -> Pieces[Survey]:
        """Look at the sessions that are open when this begins, some at a time; `see` gets each and its step.

        Each is counted as it is when it is reached.  The traffic includes all that was relayed before the survey began,
        and nothing twice, so that of two surveys, one after the other, the second never has less.
        """
        sessions, ended, meanwhile = list(self._open), self._traffic, set[int]()
        steps: Counter[State] = Counter()
        passed = [ended]
        self._ended_meanwhile.append(meanwhile)
        try:
            for some in slices(sessions):
                for session in some:
                    state = session.shown_state
                    steps[state] += 1
                    if state is not State.ENDED:
                        passed.append(session.traffic)
                    elif id(session.record) in meanwhile:
                        passed.append(_of(session.record))
                    if see is not None:
                        see(session, state)
                passed = [_sum(passed)]
                yield
        finally:
            # By identity: others may be equal.
            self._ended_meanwhile = [each for each in self._ended_meanwhile if each is not meanwhile]
        return Survey(steps, passed[0])

    def ends(self) -> Iterator[End]:
        """Yield the last end of each device, latest first."""
        return reversed(self._ends.values())

    def last_end(self, client_identifier: str) -> End | None:
        """Return how the last session of a device ended, if it is still kept."""
        return self._ends.get(device_key(client_identifier, "")) if client_identifier else None

    def ended_lately(self) -> Counter[EndReason]:
        """Return how many sessions ended and connections were refused, by reason, since the oldest sample."""
        now = self.ended + self.refusals
        return now - self._samples[0].ended if self._samples else now

    def intervals(self) -> Iterator[Interval]:
        """Yield what happened between the samples, oldest first."""
        for before, after in pairwise(self._samples):
            packets = after.traffic.packets_up + after.traffic.packets_down
            packets -= before.traffic.packets_up + before.traffic.packets_down
            yield Interval(before.at, after.at, after.open, packets, after.failures - before.failures)

    def _observe(self, record: SessionRecord) -> None:
        for step in STEPS:
            seconds = getattr(record, f"{step}_seconds")
            if seconds is not None:
                self.durations[step].observe(seconds)

    def _remember(self, end: End) -> None:
        """Keep the last end of each device, however many ends the others have."""
        if end.reason not in IN_ORDER:
            self.failures += 1
        before = self._ends.pop(end.key, None)
        if before is not None:
            end.follow(before)
        self._ends[end.key] = end
        if len(self._ends) > _MAX_ENDS:
            self._ends.popitem(last=False)

    def sample(self) -> None:
        """Take a sample for the charts."""
        self._spread(self._sampled())

    def _sampled(self) -> Pieces[None]:
        self._sampling = True
        try:
            at, started, failures, ended = self._seconds(), self.started, self.failures, self.ended + self.refusals
            survey = yield from self.survey()
            established = survey.steps[State.RELAYING] + survey.steps[State.STORED]
            self._samples.append(Sample(at, established, survey.traffic, started, failures, ended))
        finally:
            self._sampling = False


def identity_at_broker(record: SessionRecord) -> dict[str, str]:
    """Return the record's fields that say who the device is at the broker, printable; those that are not empty."""
    names = ("upstream_certificate", "upstream_username", "upstream_client_identifier")
    return {name: printable(value, _MAX_TEXT) for name in names if (value := getattr(record, name))}


def device_key(client_identifier: str, device_address: str) -> str:
    """Return the key of a device: its whole Client Identifier, however long; without one, its address."""
    if not client_identifier:
        # Without the port, which changes with each connection.
        return f"at {device_address.rpartition(':')[0]}"
    if len(client_identifier) <= _MAX_TEXT:
        return f"id {client_identifier}"
    return sha256(client_identifier.encode("utf-8", "surrogatepass")).hexdigest()


def _of(record: SessionRecord) -> Traffic:
    return Traffic(record.bytes_up, record.bytes_down, record.packets_up, record.packets_down)


def _sum(parts: Iterable[Traffic]) -> Traffic:
    bytes_up = bytes_down = packets_up = packets_down = 0
    for part in parts:
        bytes_up += part.bytes_up
        bytes_down += part.bytes_down
        packets_up += part.packets_up
        packets_down += part.packets_down
    return Traffic(bytes_up, bytes_down, packets_up, packets_down)
