"""What the service counts, for Prometheus. Labels are bounded: tenants and versions come from the registry, never a caller."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Times:
    """What one histogram counted, by bucket; the last is for all beyond."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts, self.total_s = [0] * (len(LATENCY_BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """For one thread."""
        self.counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.total_s += seconds


class Latencies(Collector):
    """A metric of histograms, one for each value of its labels, in which tally.py counts four figures a request.

    prometheus_client's own walk through the buckets and take a lock for each: eight times as many instructions (measured).
    """

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self.name, self.documentation, self.names = name, documentation, labels
        self._times: dict[tuple[str, ...], Times] = {}
        registry.register(self)

    def labels(self, *values: str) -> Times:
        return self._times.setdefault(values, Times())

    def remove_by_labels(self, labels: dict[str, str]) -> None:
        wanted = {(self.names.index(name), value) for name, value in labels.items()}
        for values in list(self._times):
            if wanted <= set(enumerate(values)):
                del self._times[values]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.names)
        bounds = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
        for values, times in self._times.copy().items():
            upto: list[float] = [float(count) for count in accumulate(times.counts)]
            family.add_metric(values, list(zip(bounds, upto, strict=True)), times.total_s)
        yield family


class Metrics:
    """All metrics of one service process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bit_requests_total", "Answered requests", ("tenant", "version", "status"), registry=self.registry
        )
        self.latency = Latencies(
            "bit_request_seconds",
            "Time from a request's headers to its answer, its body's way included",
            ("tenant", "version"),
            self.registry,
        )
        self.stage = Latencies(
            "bit_stage_seconds",
            "Time of each stage of a request: load, queue, decode, infer, explain",
            ("tenant", "version", "stage"),
            self.registry,
        )
        self.queue = Gauge(
            "bit_queue_seconds", "Work that waits, in seconds of this machine's time", registry=self.registry
        )
        self.in_flight = Gauge(
            "bit_in_flight_requests", "Requests accepted and not yet answered", registry=self.registry
        )
        self.busy = Counter(
            "bit_busy_seconds_total", "Time that workers spent decoding and inferring", registry=self.registry
        )
        self.workers = Gauge("bit_workers", "Threads that decode and infer", registry=self.registry)
        self.loaded = Gauge(
            "bit_model_bytes", "Memory of each loaded version", ("tenant", "version"), registry=self.registry
        )
        self.loads = Histogram(
            "bit_load_seconds",
            "Time to fetch, verify and warm up a version",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=self.registry,
        )
        self.swaps = Counter("bit_swaps_total", "Versions put into service", ("tenant",), registry=self.registry)
        self.refused = Gauge(
            "bit_refused_version",
            "1 while the wanted version is refused",
            ("tenant", "version"),
            registry=self.registry,
        )
        self.registry_up = Gauge("bit_registry_up", "1 while the registry answers", registry=self.registry)

        self._told: set[tuple[str, str]] = set()

    def told(self, tenant: str, version: str) -> None:
        """The version has series from now on."""
        self._told.add((tenant, version))

    def keep(self, known: set[tuple[str, str]]) -> None:
        """Drops the series of all but these versions: a thousand promotions must not leave a thousand series."""
        for tenant, version in self._told - known:
            for metric in (self.requests, self.latency, self.stage):
                metric.remove_by_labels({"tenant": tenant, "version": version})
            self._told.discard((tenant, version))
