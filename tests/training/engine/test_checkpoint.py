"""What checkpoints promise: the newest good one, whatever happened to the others."""

import logging
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests import s3
from training.engine.checkpoint import CheckpointError, Checkpoints, within
from training.engine.distributed import World
from training.engine.store import Store

WORLD = World(0, 1, torch.device("cpu"))


class Trained:
    """A small network with an optimizer, whose only weight tells how many steps were done."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)

    def save(self, checkpoints: Checkpoints, *steps: int) -> None:
        for step in steps:
            with torch.no_grad():
                self.model.weight.fill_(step)
            checkpoints.save(step, self.model, self.optimizer, WORLD)
            with torch.no_grad():
                self.model.weight.fill_(-1)  # training goes on while the copy is written
        checkpoints.wait()

    def restored(self, checkpoints: Checkpoints) -> tuple[int, float]:
        step = checkpoints.restore(self.model, self.optimizer, WORLD)
        return step, self.model.weight.item()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3.serving("checkpoints") as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3":
        url = f"{request.getfixturevalue('bucket')}{tmp_path}"
    else:
        url = {"local": str(tmp_path), "memory": f"memory:/{tmp_path}"}[request.param]
    made = Store(url)
    yield made
    made.remove()


def test_the_newest_and_every_nth_are_kept(store: Store) -> None:
    checkpoints = Checkpoints(store, {}, keep=2, keep_every=6)
    Trained().save(checkpoints, 3, 6, 9, 12, 15)
    assert checkpoints.complete() == ["step-00000006", "step-00000012", "step-00000015"]
    assert Trained().restored(checkpoints) == (15, 15.0)


@pytest.mark.parametrize("harm", ["half-uploaded", "damaged", "meta damaged", "state missing"])
def test_a_bad_newest_one_is_skipped(store: Store, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(store, {}, keep=3)
    Trained().save(checkpoints, 3, 6)
    newest = "step-00000006"
    if harm == "half-uploaded":
        store.remove(f"{newest}/meta.json")
    elif harm == "state missing":
        store.remove(f"{newest}/state.pt")
    elif harm == "meta damaged":
        store.write(f"{newest}/meta.json", b'{"step": 6')
    else:
        data = store.read(f"{newest}/state.pt")
        store.write(f"{newest}/state.pt", data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    assert Trained().restored(checkpoints) == (3, 3.0)
    if harm != "half-uploaded":
        assert "the one before it is taken" in caplog.text


def test_another_training_is_refused_with_both_values_unless_forked(store: Store) -> None:
    Trained().save(Checkpoints(store, {"arch": "R50x1", "lr": "0.1"}), 3)
    changed = {"arch": "R50x1", "lr": "0.2"}
    with pytest.raises(CheckpointError, match=r"lr: 0.1 in the checkpoint, 0.2 now(.|\n)*--fork") as refused:
        Trained().restored(Checkpoints(store, changed))
    assert "arch" not in str(refused.value)
    assert Trained().restored(Checkpoints(store, changed, fork=True)) == (0, 3.0)


def test_a_fork_keeps_its_own_checkpoints_and_goes_on_from_them(store: Store) -> None:
    Trained().save(Checkpoints(store, {"lr": "0.1"}, keep=3, keep_every=6), 3, 6, 9)
    fork = Checkpoints(store, {"lr": "0.2"}, fork=True)
    assert Trained().restored(fork) == (0, 9.0)
    Trained().save(fork, 4)
    assert fork.complete() == ["step-00000004"]  # step 3 is of the other training
    Trained().save(fork, 8)
    assert fork.complete() == ["step-00000004", "step-00000008"]
    again = Checkpoints(store, {"lr": "0.2"}, fork=True)  # a container that starts anew repeats its command
    assert Trained().restored(again) == (8, 8.0)


def test_the_only_one_kept_outlives_a_damaged_later_one(store: Store) -> None:
    checkpoints = Checkpoints(store, {}, keep=1)
    Trained().save(checkpoints, 6)
    store.write("step-00000006/state.pt", b"damaged")
    assert Trained().restored(checkpoints)[0] == 0
    Trained().save(checkpoints, 3)
    assert Trained().restored(checkpoints) == (3, 3.0)


def test_a_sharded_network_is_forked_too(tmp_path: Path) -> None:
    Trained().save(Checkpoints(Store(str(tmp_path)), {"lr": "0.1"}), 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        forked = Trained()
        fully_shard(forked.model, mesh=init_device_mesh("cpu", (1,)))
        fork = Checkpoints(Store(str(tmp_path)), {"lr": "0.2"}, fork=True)
        assert fork.restore(forked.model, torch.optim.SGD(forked.model.parameters(), 0.1), WORLD) == 0
        weight = forked.model.weight
        assert isinstance(weight, DTensor)
        assert weight.full_tensor().item() == 3.0
    finally:
        dist.destroy_process_group()


def test_a_full_disk_fails_the_write_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained, checkpoints = Trained(), Checkpoints(Store(str(tmp_path)), {})
    trained.save(checkpoints, 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        trained.save(checkpoints, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-00000006 could not be written" in caplog.text
    assert "the last good one is step-00000003" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))
    assert trained.restored(checkpoints) == (3, 3.0)
    trained.save(checkpoints, 9)  # there is room again
    assert trained.restored(checkpoints) == (9, 9.0)


class Hanging(Store):
    """Takes nothing until it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.works = threading.Event()

    def write(self, name: str, data: bytes | memoryview) -> None:
        self.works.wait(30)
        super().write(name, data)


def test_a_store_that_hangs_holds_no_step_up_but_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, trained = Hanging(str(tmp_path)), Trained()
    checkpoints = Checkpoints(store, {}, patience_s=0.1)
    for step in (3, 6, 9):
        checkpoints.save(step, trained.model, trained.optimizer, WORLD)
    assert "step-00000006 is left out" in caplog.text
    assert "step-00000009 is left out" in caplog.text
    threading.Timer(0.2, store.works.set).start()
    checkpoints.save(12, trained.model, trained.optimizer, WORLD, last=True)
    checkpoints.wait()
    assert checkpoints.complete() == ["step-00000003", "step-00000012"]


def test_who_must_go_waits_for_a_store_that_hangs_only_so_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, checkpoints = Trained(), Checkpoints(Hanging(str(tmp_path)), {})
    checkpoints.save(3, trained.model, trained.optimizer, WORLD)
    began = time.monotonic()
    checkpoints.save(6, trained.model, trained.optimizer, WORLD, last=True, left_s=within(0.2))
    checkpoints.wait(within(0.2))
    assert time.monotonic() - began < 5
    assert "step-00000006 is left out" in caplog.text


def test_a_checkpoint_that_was_never_finished_goes_with_the_next_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("step-00000003/state.pt", b"half")
    Trained().save(Checkpoints(store, {}), 6)
    assert store.folders() == ["step-00000006"]


def test_nothing_is_restored_where_nothing_was_written(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Trained().restored(Checkpoints(store, {}))[0] == 0
    assert caplog.text == ""
