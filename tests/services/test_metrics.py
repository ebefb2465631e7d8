"""Histograms as the service counts them, held against prometheus_client's own."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.inference.metrics import LATENCY_BUCKETS, Latencies, Metrics

SECONDS = st.one_of(st.floats(0, 100), st.sampled_from(LATENCY_BUCKETS))


def told(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if not line.startswith("#") and "_created" not in line)


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\\']), SECONDS)))
def test_a_latency_is_told_as_by_prometheus_own_histogram(observed: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Latencies("took_seconds", "time", ("tenant",), ours)
    model = Histogram("took_seconds", "time", ("tenant",), buckets=LATENCY_BUCKETS, registry=theirs)
    for tenant, seconds in observed:
        mine.labels(tenant).observe(seconds)
        model.labels(tenant).observe(seconds)
    assert told(ours) == told(theirs)


def test_a_version_that_nothing_points_to_leaves_no_series() -> None:
    metrics = Metrics()
    for version in ("1", "2"):
        metrics.latency.labels("lamps", version).observe(0.1)
        metrics.stage.labels("lamps", version, "infer").observe(0.1)
        metrics.told("lamps", version)
    metrics.keep({("lamps", "2")})
    assert [line for line in told(metrics.registry) if 'version="1"' in line] == []
    assert len([line for line in told(metrics.registry) if 'version="2"' in line]) == 2 * (len(LATENCY_BUCKETS) + 3)
