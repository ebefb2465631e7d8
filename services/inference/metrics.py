"""What the service counts, for Prometheus. Labels are bounded: tenants and versions come from the registry, never a caller."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """All metrics of one service process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bit_requests_total", "Answered requests", ("tenant", "version", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "bit_request_seconds",
            "Time from a request's headers to its answer, its body's way included",
            ("tenant", "version"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.stage = Histogram(
            "bit_stage_seconds",
            "Time of each stage of a request: queue, decode, infer",
            ("tenant", "version", "stage"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
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

    def forget(self, tenant: str, version: str) -> None:
        """Drops the series of a version that left memory: a thousand promotions must not leave a thousand series."""
        for metric in (self.requests, self.latency, self.stage, self.loaded):
            metric.remove_by_labels({"tenant": tenant, "version": version})
