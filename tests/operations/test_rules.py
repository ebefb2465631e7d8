"""Each alert fires on what it is for and is silent on what is usual, by promtool; the runbook has a section for each."""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "charts/inference/files/rules.yaml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}

WHERE = 'job="bit-serve",namespace="shop"'
REQUESTS = f'bit_requests_total{{{WHERE},pod="a",tenant="cats",version="3",status="%s"}}'
LATENCY = f'bit_request_seconds_bucket{{{WHERE},pod="a",tenant="cats",version="3",le="%s"}}'
TRAINING = 'namespace="train",stage="finetune",tenant="cats"'
UP = f'up{{{WHERE},instance="10.0.0.1:8080"}}'
SERVED, BY_TENANT = (
    {"job": "bit-serve", "namespace": "shop"},
    {"job": "bit-serve", "namespace": "shop", "tenant": "cats"},
)
TRAINED = {"namespace": "train", "stage": "finetune", "tenant": "cats"}


class Case(NamedTuple):
    """Series (name → promtool's notation, one value a minute) that must fire after an hour, and others that must not."""

    firing: dict[str, str]
    silent: dict[str, str]
    labels: dict[str, str]
    summary: str


CASES = {
    "BitServeDown": Case(
        {UP: "0x60"},
        {UP: "1x58 0 1"},  # one missed scrape is no alert
        {**SERVED, "instance": "10.0.0.1:8080"},
        "10.0.0.1:8080 has not answered Prometheus for 2 minutes",
    ),
    "BitServeGone": Case({UP: "0x60"}, {UP: "1x60"}, SERVED, "No instance of the service answers"),
    "BitServeErrors": Case(
        {REQUESTS % 200: "0+95x60", REQUESTS % 500: "0+5x60"},
        {REQUESTS % 200: "0+9990x60", REQUESTS % 500: "0+10x60", REQUESTS % 503: "0+500x60"},
        BY_TENANT,
        "5% of cats's requests end with 500",
    ),
    "BitServeOverloaded": Case(
        {REQUESTS % 200: "0+80x60", REQUESTS % 503: "0+15x60", REQUESTS % 504: "0+5x60"},
        {REQUESTS % 200: "0+97x60", REQUESTS % 503: "0+3x60", REQUESTS % 429: "0+50x60"},
        SERVED,
        "20% of the requests are turned away: the queue is full or deadlines pass",
    ),
    "BitServeQueueLong": Case(
        {f'bit_queue_seconds{{{WHERE},pod="a"}}': "1.5x60", f'bit_queue_seconds{{{WHERE},pod="b"}}': "0.5x60"},
        {f'bit_queue_seconds{{{WHERE},pod="a"}}': "0x50 2x3 0x7", f'bit_queue_seconds{{{WHERE},pod="b"}}': "0x60"},
        SERVED,
        "1s of work wait at each instance: scaling does not keep up",
    ),
    "BitServeSlow": Case(
        {LATENCY % 1: "0+10x60", LATENCY % 2.5: "0+100x60", LATENCY % "+Inf": "0+100x60"},
        {LATENCY % 1: "0+995x60", LATENCY % 2.5: "0+1000x60", LATENCY % "+Inf": "0+1000x60"},
        BY_TENANT,
        "1 % of cats's answers take longer than 2.483s",
    ),
    "BitServeQuotaExceeded": Case(
        {REQUESTS % 200: "0+50x60", REQUESTS % 429: "0+50x60"},
        {REQUESTS % 200: "0+90x60", REQUESTS % 429: "0+10x60"},
        BY_TENANT,
        "50% of cats's requests are over its quota",
    ),
    "BitServeVersionRefused": Case(
        {f'bit_refused_version{{{WHERE},pod="a",tenant="cats",version="4"}}': "0x50 1x10"},
        {f'bit_refused_version{{{WHERE},pod="a",tenant="cats",version="4"}}': "1x50 0x10"},
        {**BY_TENANT, "version": "4"},
        "version 4 of cats was promoted but is refused; the version before it answers",
    ),
    "BitServeRegistryDown": Case(
        {f'bit_registry_up{{{WHERE},pod="a"}}': "1x60", f'bit_registry_up{{{WHERE},pod="b"}}': "1x40 0x20"},
        {f'bit_registry_up{{{WHERE},pod="a"}}': "1x56 0x2 1x2"},
        SERVED,
        "MLflow does not answer; what is served stays, promotions wait",
    ),
    "BitServeModelsThrash": Case(
        {
            f'bit_load_seconds_count{{{WHERE},pod="a"}}': "0+4x60",
            f'bit_swaps_total{{{WHERE},pod="a",tenant="cats"}}': "0x60",
        },
        {
            f'bit_load_seconds_count{{{WHERE},pod="a"}}': "0+4x60",
            f'bit_swaps_total{{{WHERE},pod="a",tenant="cats"}}': "0+4x60",
        },
        SERVED,
        "60 models were loaded again within 15 minutes: the memory is too small for the tenants in use",
    ),
    "BitTrainingStalled": Case(
        {f"bit_training_steps_total{{{TRAINING}}}": "0+10x30 300x30"},
        {f"bit_training_steps_total{{{TRAINING}}}": "0+1x60"},
        TRAINED,
        "finetune cats runs, but finished no step for 15 minutes",
    ),
    "BitTrainingWaitsForData": Case(
        {f"bit_training_data_wait_ratio{{{TRAINING}}}": "0.5x60"},
        {f"bit_training_data_wait_ratio{{{TRAINING}}}": "0.1x55 0.9x1 0.1x4"},
        TRAINED,
        "finetune cats spends 50% of its time waiting for pictures",
    ),
    "BitTrainingRestarts": Case(
        {f"bit_training_restarts_total{{{TRAINING}}}": "0x40 4x20"},
        {f"bit_training_restarts_total{{{TRAINING}}}": "1x60"},
        TRAINED,
        "finetune cats began again 4 times",
    ),
}


def promtool(tmp_path: Path, *tests: dict[str, Any]) -> str:
    """What promtool has against the tests; empty where nothing."""
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(tests)}))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def expectation(alert: str, series: dict[str, str], fires: bool) -> dict[str, Any]:
    case, rule = CASES[alert], ALERTS[alert]
    expected = {
        "exp_labels": case.labels | rule["labels"],
        "exp_annotations": {"summary": case.summary, "runbook_url": rule["annotations"]["runbook_url"]},
    }
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "1h", "alertname": alert, "exp_alerts": [expected] if fires else []}],
    }


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(ALERTS)


@pytest.mark.parametrize("alert", CASES)
def test_it_fires_on_what_it_is_for_and_not_on_what_is_usual(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    assert promtool(tmp_path, expectation(alert, case.firing, True), expectation(alert, case.silent, False)) == ""


def test_promtool_notices_an_alert_that_does_not_fire(tmp_path: Path) -> None:
    """The yardstick itself: swapped expectations are found wrong."""
    case = CASES["BitServeErrors"]
    assert "FAILED" in promtool(tmp_path, expectation("BitServeErrors", case.silent, True))
    assert "FAILED" in promtool(tmp_path, expectation("BitServeErrors", case.firing, False))


def test_recorded_figures_are_what_they_are_called(tmp_path: Path) -> None:
    busy, workers = f'bit_busy_seconds_total{{{WHERE},pod="a"}}', f'bit_workers{{{WHERE},pod="a"}}'
    test = {
        "interval": "1m",
        "input_series": [{"series": busy, "values": "0+60x60"}, {"series": workers, "values": "2x60"}],
        "promql_expr_test": [
            {
                "expr": "bit:saturation:ratio5m",
                "eval_time": "1h",
                "exp_samples": [{"labels": f"bit:saturation:ratio5m{{{WHERE}}}", "value": 0.5}],
            }
        ],
    }
    assert promtool(tmp_path, test) == ""


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_its_section(alert: str) -> None:
    path, _, anchor = ALERTS[alert]["annotations"]["runbook_url"].partition("#")
    sections = re.split(r"^#+ ", (ROOT / path).read_text(), flags=re.MULTILINE)
    [section] = [text for text in sections if text.split("\n", 1)[0].lower() == anchor]
    assert anchor == alert.lower()
    assert len(section.split()) > 25, "a section says what to look at and what to do"
