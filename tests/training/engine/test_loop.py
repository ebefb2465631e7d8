"""What the loop promises: the same weights however the work was cut or interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.engine.small_training import recipe
from training.data.batches import cut
from training.data.dataset import Dataset
from training.engine.loss import neighbours

STEPS = 20
MODULE = "tests.training.engine.small_training"
ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, dataset: Dataset, *extra: str, ranks: int = 1, name: str = "straight") -> dict[str, np.ndarray]:
    """A whole training in its own process(es); its weights."""
    arguments = [dataset.url, str(folder / f"{name}.npz"), str(STEPS), name, *extra]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", MODULE, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> dict[str, np.ndarray]:
    return run(tmp_path_factory.mktemp("straight"), dataset)


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    scale = max(float(np.abs(array).max()) for array in a.values())
    return max(float(np.abs(a[key] - b[key]).max()) for key in a) / scale


def test_the_same_training_twice_is_bit_equal(straight: dict, tmp_path: Path, dataset: Dataset) -> None:
    again = run(tmp_path, dataset)
    assert all(np.array_equal(straight[key], again[key]) for key in straight)


def test_a_training_killed_in_the_middle_ends_bit_equal(straight: dict, tmp_path: Path, dataset: Dataset) -> None:
    command = [sys.executable, "-m", MODULE, dataset.url, str(tmp_path / "x.npz"), str(STEPS), "killed"]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / ".checkpoints" / "killed"
    end = time.monotonic() + 240
    while not list(checkpoints.glob("step-*/meta.json")) and time.monotonic() < end and child.poll() is None:
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(checkpoints.glob("step-*")), "no checkpoint was there to resume from"
    resumed = run(tmp_path, dataset, name="killed")
    assert all(np.array_equal(straight[key], resumed[key]) for key in straight)
    assert not checkpoints.exists()


def test_sigterm_checkpoints_and_exits_143(straight: dict, tmp_path: Path, dataset: Dataset) -> None:
    command = [sys.executable, "-m", MODULE, dataset.url, str(tmp_path / "x.npz"), "100000", "stopped"]
    with (tmp_path / "said").open("wb") as said:
        child = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=said)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ranks 1\n"
    child.stdout.readline()  # the first figures: it is in the middle of its steps
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == 143
    child.stdout.close()
    newest = max((tmp_path / ".checkpoints" / "stopped").glob("step-*/meta.json")).parent
    assert int(newest.name.removeprefix("step-")) >= 50
    assert f"{newest.name} was written, start again to go on from there" in (tmp_path / "said").read_text()


def test_sigterm_is_obeyed_within_its_grace_also_where_the_store_hangs(tmp_path: Path, dataset: Dataset) -> None:
    command = [sys.executable, "-m", MODULE, dataset.url, str(tmp_path / "x.npz"), "100000", "hung"]
    environ = environment() | {"HANGS": "12", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    with (tmp_path / "said").open("wb") as said:
        child = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=said)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.readline()  # the first figures, after checkpoints were left out
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 143
    assert time.monotonic() - began < 20  # half of the 5 s, 10 s for the record, the way out
    child.stdout.close()
    told = (tmp_path / "said").read_text()
    assert "is slow: checkpoint step-00000015 is left out" in told
    assert "its checkpoint could not be written, the last good one is step-00000009" in told


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "sharding"),
    [(1, "4", "none"), (2, "", "none"), (3, "2", "none"), (4, "2", "none"), (2, "4", "full"), (3, "", "full")],
)
def test_ranks_and_micro_batches_change_no_weight(
    straight: dict, tmp_path: Path, dataset: Dataset, ranks: int, micro_batch: str, sharding: str
) -> None:
    other = run(tmp_path, dataset, micro_batch, sharding, ranks=ranks)
    assert largest_difference(straight, other) < 1e-5


def test_mixup_exchanges_neighbours_only() -> None:
    assert neighbours(torch.tensor([1, 2, 3, 4])).tolist() == [2, 1, 4, 3]
    assert neighbours(torch.arange(8.0).view(4, 2))[0].tolist() == [2.0, 3.0]


def test_lam_follows_from_seed_and_step() -> None:
    drawn = [recipe(10).lam(step) for step in range(200)]
    assert drawn == [recipe(10).lam(step) for step in range(200)]
    assert all(0 <= lam <= 1 for lam in drawn)
    assert len(set(drawn)) > 150
    assert recipe(10, mixup_alpha=0.0).lam(3) == 1.0


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "said"),
    [(9, None, "each of 9 ranks 2 examples; at most 8 ranks"), (1, 1, "micro_batch=1 is odd")],
)
def test_a_batch_that_cannot_be_split_is_refused(world_size: int, micro_batch: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(1, micro_batch).num_micro(world_size)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "passes", "largest"),
    [(1, 4, 4, 4), (3, None, 1, 6), (3, 6, 1, 6), (1, 5, 4, 4), (1, 100, 1, 16), (3, 2, 2, 4), (8, 2, 1, 2)],
)
def test_only_the_micro_batch_adapts_to_the_number_of_ranks(
    world_size: int, micro_batch: int | None, passes: int, largest: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = recipe(1, micro_batch)
    assert (wanted.num_micro(world_size), wanted.largest_micro(world_size)) == (passes, largest)
    sizes = []
    for rank in range(world_size):
        start, stop = cut(16, rank, world_size, wanted.unit)
        parts = [cut(stop - start, micro, passes, wanted.unit) for micro in range(passes)]
        sizes += [last - first for first, last in parts]
    assert (min(sizes) > 0, max(sizes), sum(sizes)) == (True, largest, 16)
    warned = f"micro_batch={micro_batch} does not divide" in caplog.text
    assert warned == (micro_batch in (2, 5) and largest != micro_batch)
