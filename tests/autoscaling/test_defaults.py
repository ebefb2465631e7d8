"""The chart's defaults, the simulation that chose them, and the figures that are committed: one and the same."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from benchmarks.autoscaling import ALTERNATIVES, DEFAULT, bursty, simulate

ROOT = Path(__file__).parents[2]
RESULT = json.loads(sorted(ROOT.glob("benchmarks/results/autoscaling-*.json"))[-1].read_text())


def test_the_simulated_defaults_are_the_charts() -> None:
    values = yaml.safe_load((ROOT / "charts/inference/values.yaml").read_text())
    scaling = values["autoscaling"]
    assert scaling["keda"]["inFlight"] == DEFAULT.in_flight
    assert scaling["keda"]["queueMilliseconds"] == DEFAULT.queue_ms
    assert scaling["minReplicas"] == DEFAULT.min_replicas
    assert scaling["maxReplicas"] == DEFAULT.max_replicas
    assert scaling["up"] == {"windowSeconds": 0, "percent": 100, "pods": 4, "periodSeconds": 15}
    assert (scaling["down"]["pods"], scaling["down"]["periodSeconds"]) == (1, 60)
    assert scaling["down"]["windowSeconds"] == DEFAULT.down_window_s
    assert values["metrics"]["interval"] == f"{DEFAULT.scrape_s:.0f}s"
    template = (ROOT / "charts/inference/templates/scaledobject.yaml").read_text()
    assert template.count(f"[{DEFAULT.average_s:.0f}s]") == 2


def test_the_committed_figures_are_those_of_the_defaults() -> None:
    assert RESULT["default"] == asdict(DEFAULT)
    assert {name.partition(": ")[2] for name in RESULT["figures"]} == set(ALTERNATIVES)
    assert simulate(bursty(8), DEFAULT).figures() == RESULT["figures"]["bursty: default"]
