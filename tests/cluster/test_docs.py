"""docs/cluster.md against a real control plane and against the zoo: what it tells to type works, what it calculates is right."""

import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
import typer.main

from tests import clusters
from tests.cluster.conftest import ROOT
from tests.cluster.projects import bit
from tests.clusters import Cluster
from training.cli import build
from training.models import archs

PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
H100_FLOPS, SHARE, DOLLARS = 989e12, 0.2, 3
PICTURES = 1e8
ACTIVATIONS_MB = {"R50x1": 40, "R101x1": 60, "R152x2": 171}  # engine.memory.picture_bytes, 224 pixels, bf16


@pytest.fixture
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with clusters.running(tmp_path_factory.mktemp("cluster"), "kwok,training-operator,kueue-crds") as cluster:
        yield cluster


@pytest.mark.heavy
def test_every_command_for_the_cluster_works_on_an_empty_one(empty: Cluster) -> None:
    typed = [command for command in COMMANDS if command.startswith(("kubectl", "helm"))]
    assert len(typed) > 10
    for command in typed:
        done = subprocess.run(
            shlex.split(command),
            cwd=ROOT,
            env=empty.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert "bit-pretrain " in bit(ROOT, empty, "jobs")  # made by kubectl alone
    assert "was not made by `bit submit`" in bit(ROOT, empty, "attach", "bit-pretrain", status=2)


def test_every_other_command_is_run_by_a_test() -> None:
    root = typer.main.get_command(build())
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "cluster").glob("test_*.py"))
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "bit":
            found = root.commands[arguments[0]]  # type: ignore[attr-defined]
            found.make_context(arguments[0], arguments[1:])
            assert f'"{arguments[0]}"' in tests, command
            assert all(f'"{option}"' in tests for option in arguments if option.startswith("--")), command
        elif program == "dvc":
            assert '"repro"' in tests
        else:
            assert program in ("kubectl", "helm"), command


def rows() -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.splitlines() if line.startswith("| R")
    ]
    return {row[0]: row[1:] for row in cells}


def amount(text: str) -> float:
    number, _, unit = text.lstrip("$").partition(" ")
    return float(number) * {"": 1, "M": 1e6, "MB": 1e6, "GB": 1e9, "EFLOP": 1e18}[unit]


@pytest.mark.parametrize("arch", [row for row in archs.ARCHS if row != "R14x0.5"])
def test_sizes_and_costs_follow_from_the_zoo(arch: str) -> None:
    parameters, state, checkpoint, activations, micro, compute, hours, cost = map(amount, rows()[arch])
    counted, macs = archs.num_parameters(arch, 1000), 1e9 * archs.gmac(arch, 224)
    assert parameters == pytest.approx(counted, rel=0.01)
    assert state == pytest.approx(12 * counted, rel=0.03)
    assert checkpoint == pytest.approx(8 * counted, rel=0.03)
    depth, _, width = arch.partition("x")
    narrow = next(name for name in ACTIVATIONS_MB if name.startswith(depth + "x"))
    assert activations == pytest.approx(1e6 * ACTIVATIONS_MB[narrow] * int(width) / int(narrow[-1]), rel=0.02)
    room = 0.6 * (80e9 - state) / activations
    assert micro <= room < 2 * micro
    assert compute == pytest.approx(6 * macs * PICTURES, rel=0.03)
    assert hours == pytest.approx(6 * macs * PICTURES / (SHARE * H100_FLOPS) / 3600, rel=0.03)
    assert cost == pytest.approx(DOLLARS * hours, rel=0.03)
