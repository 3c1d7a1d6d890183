"""Prometheus metrics, collected at each scrape.

In: `Sight`.  Out: Prometheus text format, or OpenMetrics on request.  Names and units follow
https://prometheus.io/docs/practices/naming/.  No label has a value that devices choose, so the number of
series is bounded by the configuration and `EndReason`.  docs/sight.md lists them; a test checks the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway import __version__
from gateway.errors import EndReason
from gateway.ops.expiry import Certificate
from gateway.ops.ledger import BUCKETS, Survey
from gateway.ops.sight import STEPS, Sight
from gateway.pieces import Pieces
from gateway.store.store import BUCKETS as COMMIT_BUCKETS

_PREFIX = "mqtts_gateway"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Metrics:
    """Everything exposed: metrics of the gateway, the process and Python."""

    def __init__(self, sight: Sight) -> None:
        # Not the global registry: other code in this process may use it.
        self._registry = CollectorRegistry()
        self._sight = sight
        self._gateway = _Gateway(sight)
        self._registry.register(self._gateway)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def exposition(self, accept: str) -> Pieces[tuple[bytes, str]]:
        """Make the metrics and their content type: OpenMetrics if a request's Accept header has it, else text.

        Sessions are counted some at a time, then a family of metrics is collected and encoded per piece.
        """
        self._gateway.survey = yield from self._sight.ledger.survey()
        # Not the header as it came: the library raises for versions that it cannot compare.
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS.partition(";")[0] in accept else "")
        # What ends a text, so what each family would end with.
        end = encode(_Families())
        encoded = []
        for family in self._registry.collect():
            encoded.append(encode(_Families(family)).removesuffix(end))
            yield
        return b"".join((*encoded, end)), content_type


class _Families(Collector):
    """Metrics that are encoded by themselves."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        return self._families


class _Gateway(Collector):
    """Reads the ledger at each scrape."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        self.survey: Survey

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        yield InfoMetricFamily(f"{_PREFIX}_build", "The gateway's version.", {"version": __version__})
        yield InfoMetricFamily(
            f"{_PREFIX}_engine", "What relays messages: compiled or python.", {"name": self._sight.sources.engine.name}
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}_ready",
            "1 if the gateway is ready for new devices, as /readyz says.",
            float(not self._sight.unready()),
        )
        yield from self._sessions()
        yield from self._traffic()
        yield from self._store()
        yield from self._upstreams()
        yield self._certificates()
        yield from self._device_rules()
        yield from self._renewals()
        ledger = self._sight.ledger
        reloads = CounterMetricFamily(f"{_PREFIX}_reloads", "Attempts to load a new configuration.", labels=["result"])
        reloads.add_metric(["done"], ledger.reloads)
        reloads.add_metric(["refused"], ledger.refused_reloads)
        yield reloads
        yield GaugeMetricFamily(
            f"{_PREFIX}_reload_wanting",
            "1 while a configuration or file on disk is not in effect: a reload was refused or takes too long.",
            bool(self._sight.sources.refused_reloads()),
        )
        lost, _ = self._sight.sources.log()
        yield CounterMetricFamily(
            f"{_PREFIX}_log_lines_lost", "Lines of the log that were lost: its output was blocked or failed.", lost
        )

    def _sessions(self) -> Iterator[Metric]:
        ledger = self._sight.ledger
        steps = self.survey.steps
        open_ones = GaugeMetricFamily(f"{_PREFIX}_sessions", "Open sessions by step.", labels=["step"])
        for step, word in STEPS.items():
            open_ones.add_metric([word], steps[step])
        yield open_ones
        yield GaugeMetricFamily(
            f"{_PREFIX}_sessions_limit", "Maximum number of sessions.", self._sight.sources.max_sessions()
        )
        yield CounterMetricFamily(f"{_PREFIX}_sessions_started", "Sessions that the broker accepted.", ledger.started)
        ended = CounterMetricFamily(f"{_PREFIX}_sessions_ended", "Sessions that ended.", labels=["reason"])
        refused = CounterMetricFamily(
            f"{_PREFIX}_connections_refused", "Connections of devices that were refused.", labels=["reason"]
        )
        for reason in EndReason:
            # All reasons from the start, so that the first one counts as an increase.
            ended.add_metric([reason.value], ledger.ended[reason])
            refused.add_metric([reason.value], ledger.refusals[reason])
        yield ended
        yield refused
        durations = HistogramMetricFamily(
            f"{_PREFIX}_session_step_seconds", "Duration of each step of a new session.", labels=["step"]
        )
        bounds = [f"{bound:g}" for bound in BUCKETS] + ["+Inf"]
        for name, histogram in ledger.durations.items():
            buckets = list(zip(bounds, histogram.cumulative(), strict=True))
            durations.add_metric([name], buckets, histogram.total)
        yield durations

    def _traffic(self) -> Iterator[Metric]:
        traffic = self.survey.traffic
        relayed = CounterMetricFamily(
            f"{_PREFIX}_relayed_bytes", "MQTT bytes relayed, without TLS.", labels=["direction"]
        )
        relayed.add_metric(["up"], traffic.bytes_up)
        relayed.add_metric(["down"], traffic.bytes_down)
        yield relayed
        packets = CounterMetricFamily(
            f"{_PREFIX}_relayed_packets", "MQTT control packets relayed.", labels=["direction"]
        )
        packets.add_metric(["up"], traffic.packets_up)
        packets.add_metric(["down"], traffic.packets_down)
        yield packets

    def _store(self) -> Iterator[Metric]:
        devices = self._sight.sources.store()
        if devices is None:
            return
        store, counts = devices.store, devices.store.counts
        oldest = 0.0 if store.oldest is None else max(0.0, self._sight.sources.now().timestamp() - store.oldest)
        for name, words, value in (
            ("messages", "Messages on disk that wait for a broker.", float(store.messages)),
            ("bytes", "Bytes of those messages.", float(store.bytes)),
            ("limit_bytes", "The limit of those bytes.", float(store.config.max_size)),
            ("oldest_seconds", "How long the oldest of them has waited.", oldest),
            ("failing", "1 while the disk does not take what is written.", float(store.failure is not None)),
            ("unreadable", "Devices whose stored messages cannot be read.", float(len(store.unreadable))),
            ("damaged_files", "Damaged files that were moved aside.", float(len(store.damaged_files))),
            ("set_aside", "Messages that the broker refused and that are kept.", float(sum(store.aside.values()))),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_store_{name}", words, value=value)
        yield CounterMetricFamily(f"{_PREFIX}_store_stored", "Messages written to disk.", value=counts.stored)
        yield CounterMetricFamily(f"{_PREFIX}_store_delivered", "Stored messages delivered.", value=counts.drained)
        dropped = CounterMetricFamily(
            f"{_PREFIX}_store_dropped", "Messages removed without delivery.", labels=["reason"]
        )
        for reason, count in counts.dropped.items():
            dropped.add_metric([reason], count)
        yield dropped
        sums = list(accumulate(counts.commit_buckets))
        bounds = [f"{bound:g}" for bound in COMMIT_BUCKETS] + ["+Inf"]
        yield HistogramMetricFamily(
            f"{_PREFIX}_store_commit_seconds",
            "How long each transaction took.",
            buckets=list(zip(bounds, sums, strict=True)),
            sum_value=counts.commit_seconds,
        )

    def _upstreams(self) -> Iterator[Metric]:
        who = ["upstream", "name"]
        up = GaugeMetricFamily(
            f"{_PREFIX}_upstream_up", "1 if sessions are connected to this broker, 0 while backing off.", labels=who
        )
        dials = CounterMetricFamily(
            f"{_PREFIX}_upstream_dials", "Attempts to connect to and verify a broker.", labels=who
        )
        failed = CounterMetricFamily(
            f"{_PREFIX}_upstream_failed_dials",
            "Failed attempts to connect to and verify a broker.",
            labels=[*who, "reason"],
        )
        for upstream in self._sight.sources.upstreams():
            # One address may be configured twice, with different names.
            labels = [upstream.address, upstream.verify_name]
            up.add_metric(labels, float(upstream.is_open))
            dials.add_metric(labels, upstream.dials)
            for reason, count in upstream.failed_dials.items():
                failed.add_metric([*labels, reason.value], count)
        passed_over = CounterMetricFamily(
            f"{_PREFIX}_upstream_passed_over",
            "Sessions that failed over from this broker to another one.",
            labels=["upstream", "reason"],
        )
        for (address, reason), count in self._sight.ledger.passes.items():
            passed_over.add_metric([address, reason.value], count)
        yield from (up, dials, failed, passed_over)

    def _device_rules(self) -> Iterator[Metric]:
        """Yield what is known of devices' rules; numbers alone, since there may be thousands."""
        sources = self._sight.sources
        certificates = sources.device_certificates()
        family = GaugeMetricFamily(
            f"{_PREFIX}_device_certificates", "Certificates that rules give to devices.", labels=["state"]
        )
        for state, count in certificates.counts(sources.now()).items():
            family.add_metric([state.value], count)
        yield family
        yield GaugeMetricFamily(
            f"{_PREFIX}_device_certificate_first_not_after_timestamp_seconds",
            "Expiry of the device certificate that expires first.",
            certificates.first_end,
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}_device_rules_refused", "Rules that cannot be used.", len(sources.refused_rules())
        )

    def _renewals(self) -> Iterator[Metric]:
        renewals = self._sight.sources.renewals()
        counts = (0, 0, 0) if renewals is None else (renewals.done, renewals.failed, len(renewals.failing))
        attempts = CounterMetricFamily(
            f"{_PREFIX}_certificate_renewals", "Renewals of client certificates.", labels=["result"]
        )
        attempts.add_metric(["done"], counts[0])
        attempts.add_metric(["failed"], counts[1])
        yield attempts
        yield GaugeMetricFamily(
            f"{_PREFIX}_certificate_renewals_failing", "Certificates whose last renewal failed.", counts[2]
        )

    def _certificates(self) -> Metric:
        family = GaugeMetricFamily(
            f"{_PREFIX}_certificate_not_after_timestamp_seconds",
            "Expiry of a certificate: the gateway's own, a CA's, the status page's, or the last one a broker sent.",
            labels=["role", "subject", "upstream"],
        )
        first: dict[tuple[str, str, str], Certificate] = {}
        for each in self._sight.certificates():
            # Of several with the same name (such as a CA's old and new one), the first to expire.
            key = (each.role.value, each.subject, each.upstream)
            if key not in first or each.not_after < first[key].not_after:
                first[key] = each
        for labels, each in first.items():
            family.add_metric(list(labels), each.not_after.timestamp())
        return family
