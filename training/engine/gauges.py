"""A training's figures for Prometheus: on the port BIT_METRICS_PORT, nothing where that is not set. Labels: stage and tenant."""

import os
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

LABELS = ("stage", "tenant")
REGISTRY = CollectorRegistry()
STEPS = Counter("bit_training_steps", "Optimizer steps done.", LABELS, registry=REGISTRY)
STEP_SECONDS = Histogram(
    "bit_training_step_seconds",
    "How long an optimizer step took.",
    LABELS,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    registry=REGISTRY,
)
RESTARTS = Counter("bit_training_restarts", "Continuations from a checkpoint.", LABELS, registry=REGISTRY)
FIGURES = {
    "loss": Gauge("bit_training_loss", "Mean loss since the figure before.", LABELS, registry=REGISTRY),
    "lr": Gauge("bit_training_lr", "Learning rate.", LABELS, registry=REGISTRY),
    "pictures_per_s": Gauge("bit_training_pictures_per_second", "Speed over all ranks.", LABELS, registry=REGISTRY),
    "data_wait": Gauge("bit_training_data_wait_ratio", "Share of time spent on data.", LABELS, registry=REGISTRY),
}


@cache
def serve() -> int | None:
    """Starts the server, once a process; the port that it listens on, None where BIT_METRICS_PORT is not set."""
    wanted = os.environ.get("BIT_METRICS_PORT")
    if not wanted:
        return None
    server, _ = start_http_server(int(wanted), registry=REGISTRY)
    return int(server.server_port)


def labels_of(title: str) -> tuple[str, str]:
    """(stage, tenant) of a training by its name: `upstream`, or `<tenant>-transfer` and `<tenant>-scratch`."""
    return ("pretrain", "") if title == "upstream" else ("finetune", title.rpartition("-")[0] or title)
