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
from tests.operations.runbook import INLINE, LINES, ROOT, TEXT, WHERE, operating
from tests.test_docs import commands


@pytest.mark.parametrize(
    "title", ["Install", "Upgrade", "Rotate keys", "Roll back a model", "Restore the database", "Alerts"]
)
def test_it_has_the_section(title: str) -> None:
    assert f"\n## {title}\n" in TEXT


def test_every_command_is_run_by_a_test_or_named_as_run_by_nobody() -> None:
    longest = {
        line: max((start for start in WHERE if line.startswith(start)), key=len, default="") for line in operating()
    }
    assert [line for line, start in longest.items() if not start] == []
    assert set(longest.values()) == set(WHERE), "one that the runbook no longer has"
    for start, place in WHERE.items():
        assert place.startswith("nobody: ") or f'"{start}"' in (ROOT / "tests" / place).read_text(), start


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
