"""What a training shows, and what Prometheus reads from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SHOW = """
import urllib.request
from training.engine import gauges
from training.engine.progress import Progress
with Progress("cats-transfer", 10, 4, True) as progress:
    progress.advance()
    progress.show(5, {"loss": 0.5, "lr": 0.1, "pictures_per_s": 7.0, "data_wait": 0.25})
PORT
"""


def shown(read: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    command = [sys.executable, "-c", SHOW.replace("PORT", read)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)


def test_json_lines_hold_the_figures() -> None:
    last = json.loads(shown(BIT_LOG_JSON="1").stderr.splitlines()[-1])
    assert last == {
        "training": "cats-transfer",
        "step": 5,
        "steps": 10,
        "loss": 0.5,
        "lr": 0.1,
        "pictures_per_s": 7.0,
        "data_wait": 0.25,
    }


def test_prometheus_reads_the_figures_by_stage_and_tenant() -> None:
    # Port 0: any free one.
    text = shown(
        'print(urllib.request.urlopen(f"http://127.0.0.1:{gauges.serve()}/metrics").read().decode())',
        BIT_METRICS_PORT="0",
    ).stdout
    labels = '{stage="finetune",tenant="cats"}'
    for line in (
        f"bit_training_steps_total{labels} 1.0",
        f"bit_training_step_seconds_count{labels} 1.0",
        f"bit_training_restarts_total{labels} 1.0",
        f"bit_training_loss{labels} 0.5",
        f"bit_training_lr{labels} 0.1",
        f"bit_training_pictures_per_second{labels} 7.0",
        f"bit_training_data_wait_ratio{labels} 0.25",
    ):
        assert line in text
