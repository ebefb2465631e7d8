"""docs/operations.md against the project: commands, files, settings and metrics that it names exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.inference.metrics import Metrics
from services.inference.settings import Settings
from services.inference.tenants import Quota
from tests.test_docs import commands

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/operations.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
LINES = [line for block in BLOCKS for line in block.splitlines()] + INLINE


@pytest.mark.parametrize(
    "title", ["Install", "Upgrade", "Rotate keys", "Roll back a model", "Restore the database", "Alerts"]
)
def test_it_has_the_section(title: str) -> None:
    assert f"\n## {title}\n" in TEXT


def test_every_bit_command_exists() -> None:
    named = [line.split()[1] for line in LINES if line.startswith("bit ")]
    assert named
    assert set(named) <= commands()


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)


def test_the_command_for_keys_does_what_the_runbook_says(tmp_path: Path) -> None:
    [line] = [line for line in LINES if line.startswith("bit-serve-key ")]
    program, *arguments = line.split()
    for count in (1, 2):
        subprocess.run(
            [Path(sys.executable).with_name(program), *arguments], check=True, cwd=tmp_path, capture_output=True
        )
        assert len(json.loads((tmp_path / "tenants.json").read_text())["acme"]["keys"]) == count


def test_every_file_exists() -> None:
    named = [text for text in INLINE if re.fullmatch(r"(charts|docs|k8s|services|training)/[\w./-]+", text)]
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_metric_exists() -> None:
    known = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    known |= {metric.name for metric in Metrics().registry.collect()} | {
        f"{metric.name}_total" for metric in Metrics().registry.collect()
    }
    named = set(re.findall(r"`(bit_[a-z_]+)", TEXT))
    assert named
    assert named <= known


@pytest.mark.parametrize("name", ["memory_mb", "max_pixels"])
def test_settings_that_it_turns_are_settings(name: str) -> None:
    assert f"`{name}`" in TEXT
    assert name in Settings.model_fields


@pytest.mark.parametrize("name", ["concurrent", "requests_per_s", "bytes_per_s"])
def test_quotas_that_it_turns_are_quotas(name: str) -> None:
    assert f"`{name}`" in TEXT
    assert name in Quota.model_fields
