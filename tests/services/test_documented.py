"""docs/service.md and `bit-serve --help` against the service: the settings, metrics and paths they name are the real ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

from services.inference import openapi
from services.inference.metrics import Metrics
from services.inference.settings import Settings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "service.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    """First cell, without its backticks → the other cells of the table below a heading."""
    section = DOCUMENT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in lines}


def shown(name: str) -> str:
    value = Settings.model_fields[name].default
    if name == "workers":
        return "cores of the machine"
    if value is None:
        return "none"
    return f"`{json.dumps(value) if isinstance(value, bool | list) else value}`"


def test_the_documented_settings_are_the_real_ones() -> None:
    real = {name: [shown(name), field.description] for name, field in Settings.model_fields.items()}
    assert rows("Settings") == real


def test_the_help_shows_every_setting() -> None:
    command = [sys.executable, "-m", "services.inference.app", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"^  --(\w+)", said, re.MULTILINE))
    assert flags == set(Settings.model_fields)
    assert "BIT_SERVE_POLL_INTERVAL_S" in said
    flat = " ".join(said.split())
    assert all((field.description or "")[:30] in flat for field in Settings.model_fields.values())


def test_the_documented_metrics_are_the_real_ones() -> None:
    families = list(Metrics().registry.collect())
    real = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    told = rows("Metrics")
    assert set(told) == real
    assert all(
        f"({family.type})" in " ".join(told[name]) for family in families for name in real if name == family.name
    )


def test_the_documented_paths_are_the_real_ones() -> None:
    paths = {re.sub(r"\{\w+\}", "X", path) for path in openapi.document("0")["paths"]} | {"/"}
    section = DOCUMENT.split("## Endpoints\n")[1].split("\n## ")[0]
    named = re.findall(r"(?:^| |`)(/(?:v[12]|metrics)[\w/\[\]]*)`", section)
    assert len(named) >= 10
    for path in named:
        assert re.sub(r"\b(MODEL|N)\b", "X", re.sub(r"\[.*?\]", "", path)) in paths, path
