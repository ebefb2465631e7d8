"""The Grafana dashboard as rows of one table each; Grafana's JSON is made from them, never edited by hand.

    python -m charts.dashboard > charts/inference/files/dashboard.json

A panel is (title, unit, [(query, legend), …]). Queries are drawn over $__rate_interval and filtered by the dashboard's variables.
"""

import json
import sys
from typing import Any

Panel = tuple[str, str, list[tuple[str, str]]]
SERVICE = '{namespace=~"$namespace",job=~"$job",tenant=~"$tenant"}'
PROCESS = '{namespace=~"$namespace",job=~"$job"}'
TRAINING = '{namespace=~"$namespace",tenant=~"$tenant"}'
WIDTH, HEIGHT, PER_ROW = 8, 8, 3  # of Grafana's 24 columns


def _service(metric: str, labels: str = "", more: str = "") -> str:
    return f"sum by ({labels}) (rate({metric}{SERVICE[:-1]}{more}}}[$__rate_interval]))"


def _latency(quantile: float) -> str:
    return f"histogram_quantile({quantile}, {_service('bit_request_seconds_bucket', 'tenant, version, le')})"


def _stage(name: str) -> str:
    chosen = f',stage="{name}"'
    return f"{_service('bit_stage_seconds_sum', 'tenant', chosen)} / {_service('bit_stage_seconds_count', 'tenant', chosen)}"


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Service: traffic",
        [
            (
                "Requests by tenant and version",
                "reqps",
                [(_service("bit_requests_total", "tenant, version"), "{{tenant}} {{version}}")],
            ),
            (
                "Answers by status",
                "reqps",
                [(f"sum by (status) (rate(bit_requests_total{PROCESS}[$__rate_interval]))", "{{status}}")],
            ),
            (
                "Errors: share of answers that are 5xx",
                "percentunit",
                [
                    (
                        f'(sum by (tenant) (rate(bit_requests_total{PROCESS[:-1]},status=~"5.."}}[$__rate_interval]))'
                        f" or 0 * sum by (tenant) (rate(bit_requests_total{PROCESS}[$__rate_interval])))"
                        f" / sum by (tenant) (rate(bit_requests_total{PROCESS}[$__rate_interval]))",
                        "{{tenant}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Service: latency",
        [
            (f"p{round(quantile * 100)} by tenant and version", "s", [(_latency(quantile), "{{tenant}} {{version}}")])
            for quantile in (0.5, 0.95, 0.99)
        ]
        + [
            (
                "Where the time goes: mean of each stage",
                "s",
                [(_stage(name), f"{{{{tenant}}}} {name}") for name in ("queue", "decode", "infer")],
            ),
        ],
    ),
    (
        "Service: load and scaling",
        [
            (
                "Queue: work that waits",
                "s",
                [
                    (f"max(bit_queue_seconds{PROCESS})", "longest"),
                    (f"avg(bit_queue_seconds{PROCESS})", "mean of the instances"),
                ],
            ),
            (
                "Saturation: share of the workers' time in use",
                "percentunit",
                [
                    (
                        f"sum by (pod) (rate(bit_busy_seconds_total{PROCESS}[$__rate_interval]))"
                        f" / sum by (pod) (bit_workers{PROCESS})",
                        "{{pod}}",
                    )
                ],
            ),
            (
                "Requests in flight",
                "short",
                [
                    (f"sum(bit_in_flight_requests{PROCESS})", "all"),
                    (f"max(bit_in_flight_requests{PROCESS})", "most at one instance"),
                ],
            ),
            ("Instances that answer", "short", [(f"sum(up{PROCESS})", "up"), (f"count(up{PROCESS})", "wanted")]),
        ],
    ),
    (
        "Service: models",
        [
            (
                "Memory of the models, most of any instance",
                "bytes",
                [(f"max by (tenant, version) (bit_model_bytes{SERVICE})", "{{tenant}} {{version}}")],
            ),
            ("Models in memory", "short", [(f"count by (pod) (bit_model_bytes{PROCESS})", "{{pod}}")]),
            (
                "Swaps within an hour",
                "short",
                [(f"sum by (tenant) (increase(bit_swaps_total{SERVICE}[1h]))", "{{tenant}}")],
            ),
            (
                "Refused versions",
                "short",
                [(f"max by (tenant, version) (bit_refused_version{SERVICE}) == 1", "{{tenant}} {{version}}")],
            ),
            (
                "Mean time to load a version",
                "s",
                [
                    (
                        f"sum(rate(bit_load_seconds_sum{PROCESS}[1h])) / sum(rate(bit_load_seconds_count{PROCESS}[1h]))",
                        "load",
                    )
                ],
            ),
            ("Registry answers", "short", [(f"min by (pod) (bit_registry_up{PROCESS})", "{{pod}}")]),
        ],
    ),
    (
        "Training",
        [
            (
                "Steps per second",
                "short",
                [
                    (
                        f"sum by (stage, tenant) (rate(bit_training_steps_total{TRAINING}[$__rate_interval]))",
                        "{{stage}} {{tenant}}",
                    )
                ],
            ),
            ("Loss", "short", [(f"bit_training_loss{TRAINING}", "{{stage}} {{tenant}}")]),
            ("Learning rate", "short", [(f"bit_training_lr{TRAINING}", "{{stage}} {{tenant}}")]),
            (
                "Time waiting for data",
                "percentunit",
                [(f"bit_training_data_wait_ratio{TRAINING}", "{{stage}} {{tenant}}")],
            ),
            (
                "Pictures per second",
                "short",
                [(f"bit_training_pictures_per_second{TRAINING}", "{{stage}} {{tenant}}")],
            ),
            (
                "Seconds per step, p95",
                "s",
                [
                    (
                        "histogram_quantile(0.95, sum by (stage, tenant, le)"
                        f" (rate(bit_training_step_seconds_bucket{TRAINING}[$__rate_interval])))",
                        "{{stage}} {{tenant}}",
                    )
                ],
            ),
            ("Restarts", "short", [(f"bit_training_restarts_total{TRAINING}", "{{stage}} {{tenant}}")]),
        ],
    ),
]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it (schema version 39)."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, (title, content) in enumerate(ROWS):
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append(
            {"id": 100 * (row + 1), "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += 1
        for number, (name, unit, queries) in enumerate(content):
            x = number % PER_ROW
            panels.append(
                {
                    "id": 100 * (row + 1) + number + 1,
                    "type": "timeseries",
                    "title": name,
                    "datasource": {"type": "prometheus", "uid": "$datasource"},
                    "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x * WIDTH, "y": y + number // PER_ROW * HEIGHT},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                    "targets": [
                        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
                        for index, (query, legend) in enumerate(queries)
                    ],
                }
            )
        y += -(-len(content) // PER_ROW) * HEIGHT
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}, "refresh": 1}
    return {
        "uid": "bit",
        "title": "Big Transfer",
        "tags": ["bit"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                source,
                _variable(
                    "namespace", 'label_values({__name__=~"bit_registry_up|bit_training_steps_total"}, namespace)'
                ),
                _variable("job", 'label_values(bit_registry_up{namespace=~"$namespace"}, job)'),
                _variable("tenant", 'label_values({__name__=~"bit_requests_total|bit_training_steps_total"}, tenant)'),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
