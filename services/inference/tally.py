"""What is counted and written down of each answered request: metrics, the version's statistics, the access log."""

import time

from prometheus_client import Counter, Histogram

from services.inference.access import AccessLog
from services.inference.exchange import Exchange
from services.inference.metrics import Metrics
from services.inference.models import Served

STAGES = {"queue": "queue", "decode": "compute_input", "infer": "compute_infer"}  # our name → Triton's


class Series:
    """The metrics of one version; to look them up by their labels costs more than to count (measured)."""

    def __init__(self, metrics: Metrics, served: Served) -> None:
        labels = (served.tenant, served.version)
        self.ok: Counter = metrics.requests.labels(*labels, "200")
        self.latency: Histogram = metrics.latency.labels(*labels)
        self.stages: dict[str, Histogram] = {stage: metrics.stage.labels(*labels, stage) for stage in STAGES}


class Tally:
    """access: None where no access log is wanted. Belongs to the event loop."""

    def __init__(self, metrics: Metrics, access: AccessLog | None) -> None:
        self.metrics, self.access = metrics, access

    def count(self, exchange: Exchange, status: int, size_bytes: int) -> None:
        """An answer of `size_bytes` is about to be sent."""
        took, served = time.monotonic() - exchange.began, exchange.served
        tenant, number = (served.tenant, served.version) if served else ("", "")
        if served is None:
            self.metrics.requests.labels("", "", str(status)).inc()
        else:
            self._count(exchange, served, status, took)
        if self.access:
            self.access.add(
                time=time.time(),
                request_id=exchange.request_id,
                trace_id=exchange.trace_id(),
                method=exchange.scope["method"],
                path=exchange.scope["path"],
                tenant=tenant,
                version=number,
                alias=exchange.alias,
                status=status,
                bytes=size_bytes,
                ms=round(took * 1000, 2),
                **{f"{stage}_ms": round(seconds * 1000, 2) for stage, seconds in exchange.timings.items()},
            )

    def _count(self, exchange: Exchange, served: Served, status: int, took: float) -> None:
        series = served.series
        if series is None:
            series = served.series = Series(self.metrics, served)
        served.stats.last = time.time()
        served.stats.add("success" if status == 200 else "fail", took)
        for stage, seconds in exchange.timings.items():
            served.stats.add(STAGES[stage], seconds)
            series.stages[stage].observe(seconds)
        if status == 200:
            series.ok.inc()
            series.latency.observe(took)
        else:
            self.metrics.requests.labels(served.tenant, served.version, str(status)).inc()
