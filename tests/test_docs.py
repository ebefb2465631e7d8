"""The README against the project: commands, files and keys that it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from training.cli import build
from training.config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> set[str]:
    """All paths of subcommands: "pack", "demo data", …"""
    root = typer.main.get_command(build())
    found = set()
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        found.add(name)
        found |= {f"{name} {sub}" for sub in getattr(command, "commands", {})}
    return found


def test_every_bit_command_in_the_readme_exists() -> None:
    named = re.findall(r"(?:^|`|&& )bit ([a-z]+)(?: (data|run|seeds))?", README, re.MULTILINE)
    assert named
    for first, second in named:
        assert first in commands(), f"bit {first}"
        assert not second or first != "demo" or f"{first} {second}" in commands()


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_every_key_of_params_is_in_the_table() -> None:
    for section in Config.model_fields:
        assert f"`{section}" in README, section


def test_help_of_every_command_says_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert all(name in done.stdout for name in ("pack", "finetune", "promote", "config"))


def test_a_misspelt_key_ends_with_status_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "training", "config", "--set", "pretrain.stesp=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "did you mean 'steps'" in done.stderr
    assert "Traceback" not in done.stderr
