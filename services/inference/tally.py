"""What is counted and written down of each answered request: metrics, the version's statistics, the access log.

The event loop only notes that a request was answered. A thread counts what was noted, many at a time: each costs a third of what
it would between two requests (measured: the processor's caches hold the code), and no answer waits for it.
"""

import logging
import threading
import time
from collections import deque
from typing import Any, NamedTuple

from prometheus_client import Counter

from services.inference.access import AccessLog
from services.inference.exchange import Exchange
from services.inference.metrics import Metrics, Times
from services.inference.models import Served

log = logging.getLogger("bit.tally")
STAGES = {"queue": "queue", "decode": "compute_input", "infer": "compute_infer"}  # our name → Triton's
SELDOM = ("load", "explain")  # stages that few requests have, and Triton has no name for
TOGETHER_S = 0.05


class Series:
    """The metrics of one version; to look them up by their labels costs more than to count (measured)."""

    def __init__(self, metrics: Metrics, served: Served) -> None:
        labels = (served.tenant, served.version)
        metrics.told(*labels)
        self.ok: Counter = metrics.requests.labels(*labels, "200")
        self.latency: Times = metrics.latency.labels(*labels)
        self.stages: dict[str, Times] = {stage: metrics.stage.labels(*labels, stage) for stage in (*STAGES, *SELDOM)}


class Answered(NamedTuple):
    """took_s: from the request's headers to its answer; at: seconds since the epoch."""

    exchange: Exchange
    status: int
    size_bytes: int
    took_s: float
    at: float


class Tally:
    """access: None where no access log is wanted."""

    def __init__(self, metrics: Metrics, access: AccessLog | None) -> None:
        self.metrics, self.access = metrics, access
        self._noted: deque[Answered] = deque()
        self._counting, self._waiting, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tally", daemon=True)
        self._thread.start()

    def note(self, exchange: Exchange, status: int, size_bytes: int) -> None:
        """An answer of `size_bytes` was sent."""
        self._noted.append(Answered(exchange, status, size_bytes, time.monotonic() - exchange.began, time.time()))
        if not self._waiting.is_set():
            self._waiting.set()

    def count(self) -> None:
        """Counts what was noted so far: also before somebody looks at the figures."""
        with self._counting:
            self._waiting.clear()
            self._count([self._noted.popleft() for _ in range(len(self._noted))])

    def close(self) -> None:
        self._closing.set()
        self._waiting.set()
        self._thread.join(timeout=2)
        if self.access:
            self.access.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._waiting.wait()
            self._closing.wait(TOGETHER_S)
            try:
                self.count()
            except Exception:  # of one bundle; without this thread what is noted would fill the memory
                log.exception("answers were not counted")

    def _count(self, answers: list[Answered]) -> None:
        for answer in answers:
            if (served := answer.exchange.served) is not None:
                self._count_of(served, answer)
            else:
                self.metrics.requests.labels("", "", str(answer.status)).inc()
        if self.access and answers:
            self.access.add([_line(answer) for answer in answers])

    def _count_of(self, served: Served, answer: Answered) -> None:
        series = served.series
        if series is None:
            series = served.series = Series(self.metrics, served)
        served.stats.last = answer.at
        served.stats.add("success" if answer.status == 200 else "fail", answer.took_s)
        for stage, seconds in tuple(answer.exchange.timings.items()):  # at once: what is late may still be noted
            if stage in STAGES:
                served.stats.add(STAGES[stage], seconds)
            series.stages[stage].observe(seconds)
        if answer.status == 200:
            series.ok.inc()
            series.latency.observe(answer.took_s)
        else:
            self.metrics.told(
                served.tenant, served.version
            )  # once more: what is late may be of a version that was dropped
            self.metrics.requests.labels(served.tenant, served.version, str(answer.status)).inc()


def _line(answer: Answered) -> dict[str, Any]:
    """Of the access log."""
    exchange, served = answer.exchange, answer.exchange.served
    trace, parent = exchange.trace()
    return {
        "time": answer.at,
        "request_id": exchange.request_id,
        "trace_id": trace,
        "parent_id": parent,
        "method": exchange.scope["method"],
        "path": exchange.scope["path"],
        "tenant": served.tenant if served else "",
        "version": served.version if served else "",
        "alias": exchange.alias,
        "status": answer.status,
        "bytes": answer.size_bytes,
        "ms": _ms(answer.took_s),
        **{f"{stage}_ms": _ms(seconds) for stage, seconds in tuple(exchange.timings.items())},
    }


def _ms(seconds: float) -> float:
    """To a hundredth; `round` takes ten times as long."""
    return int(seconds * 100_000) / 100
