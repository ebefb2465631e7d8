"""Worlds of several ranks: one after another, where a rank fails outside of the steps, and what they restore."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.engine.test_loop import environment


def said_by_two(folder: Path, module: str, *arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", f"tests.training.engine.{module}", *arguments],
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shared", ["0", "1"])
def test_a_rank_that_fails_before_the_steps_is_named_and_the_next_world_is_whole(tmp_path: Path, shared: str) -> None:
    text = said_by_two(tmp_path, "worlds", TORCH_DISABLE_SHARE_RDZV_TCP_STORE=shared)
    for number in range(3):
        for rank in range(2):
            assert f"world {number} rank {rank} sum 3" in text
    said = "rank 0 of 2 lost another rank before or after the steps: rank 1 failed with ArithmeticError"
    assert f"silent False: {said}" in text


def test_every_rank_restores_what_rank_0_reads(tmp_path: Path) -> None:
    lines = said_by_two(tmp_path, "restoring", str(tmp_path)).splitlines()
    for sharded in (False, True):
        whole, forked = f"sharded {sharded} fork False [3.5, 1.0]", f"sharded {sharded} fork True [3.5, 1.0]"
        assert (lines.count(whole), lines.count(forked)) == (2, 2), lines
