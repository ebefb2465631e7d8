"""One training in this process, through whatever befalls it between two steps."""

import json
import logging
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.engine.small_training import recipe
from training.cli.runs import runs
from training.config import PretrainConfig
from training.data.dataset import Dataset
from training.engine import attempts, store
from training.engine.attempts import BudgetError
from training.engine.checkpoint import CheckpointError
from training.engine.distributed import World
from training.engine.fit import History, View, fit
from training.engine.loop import DivergedError
from training.engine.profile import Profile
from training.engine.signals import Preempted
from training.models import zoo
from training.outbox import Figure, Outbox

WORLD = World(0, 1, torch.device("cpu"))
NAME = "small"


class Training:
    """A training of a few steps in the store NAME; `history` is all that it told, attempt by attempt."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.told = data, []

    def go(
        self,
        steps: int,
        lr: Callable[[int], float] = lambda step: 1e-4,
        fork: bool = False,
        wanted: dict[str, float] | None = None,
        stage: PretrainConfig | None = None,
        profile: Profile | None = None,
        box: Outbox | None = None,
        values: str = "",
    ) -> History:
        torch.manual_seed(0)
        decides = {"values": values}

        def record(figures: dict[str, float], step: int) -> None:
            self.told.append((step, figures))
            if box:
                box.put(figures, step)

        with attempts.attempt(store.of(NAME), stage or PretrainConfig(), WORLD, decides, fork) as attempt:
            return fit(
                zoo.create("R14x0.5", self.data.num_classes),
                replace(recipe(steps), global_batch=4, lr=lr, **(wanted or {})),
                self.data,
                View(resize=40, crop=32, flips=True, crops=True),
                WORLD,
                name=NAME,
                decides=decides,
                record=record,
                fork=fork,
                attempt=attempt,
                profile=profile,
            )

    def stopped(self, after: int, steps: int = 20, **options: object) -> Preempted:
        """SIGTERM comes in step `after`."""

        def lr(step: int) -> float:
            if step == after - 1:
                signal.raise_signal(signal.SIGTERM)
            return 1e-4

        with pytest.raises(Preempted) as stopped:
            self.go(steps, lr, **options)  # type: ignore[arg-type]
        return stopped.value

    @property
    def checkpoints(self) -> list[str]:
        return store.of(NAME).folders()


@pytest.fixture
def training(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that more of them get into each other's way
    yield Training(dataset)
    torch.set_num_threads(threads)


def test_weights_that_went_bad_replace_no_good_checkpoint(training: Training) -> None:
    with pytest.raises(DivergedError, match=r"in step 11 .* last good checkpoint is step-00000006 in"):
        training.go(20, lambda step: float("nan") if step == 7 else 1e-4, wanted={"max_skipped_steps": 2})
    assert training.checkpoints == ["step-00000003", "step-00000006"]


def test_skipped_steps_in_a_row_are_counted_over_attempts(training: Training) -> None:
    harsh = {"max_grad_norm": 1e-9, "max_skipped_steps": 4}
    training.stopped(3, wanted=harsh)
    with pytest.raises(DivergedError, match=r"in step 5 .* 5 such steps in a row"):
        training.go(20, wanted=harsh)


def test_steps_that_were_all_skipped_have_no_loss(training: Training) -> None:
    training.go(4, wanted={"max_grad_norm": 1e-9, "max_skipped_steps": 4})
    [(step, figures)] = training.told
    assert step == 4
    assert "test_accuracy" in figures
    assert not {"loss", "pictures_per_s"} & set(figures)


def test_augmenting_on_the_device_trains_the_same(training: Training) -> None:
    host = training.go(4)["loss"]
    device = training.go(4, wanted={"on_device": True})["loss"]
    assert [step for step, _ in host] == [step for step, _ in device] == [4]
    assert device[0][1] == pytest.approx(host[0][1], rel=1e-5)


def test_a_training_that_must_go_does_not_evaluate_first(training: Training) -> None:
    stopped = training.stopped(5, wanted={"evaluate_every": 5})
    assert (stopped.step, stopped.written) == (5, "step-00000005")
    assert not [name for _, figures in training.told for name in figures if name.startswith("test_")]


def test_spent_hours_end_the_training_with_a_checkpoint(training: Training) -> None:
    with pytest.raises(BudgetError, match="max_hours=1e-09 are spent after step 1"):
        training.go(20, stage=PretrainConfig(max_hours=1e-9))
    assert training.checkpoints == ["step-00000001"]


def test_a_full_disk_costs_checkpoints_and_figures_on_disk_and_not_the_training(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delivered: list[Figure] = []
    box = Outbox(tmp_path / "figures.jsonl", delivered.extend)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        training.go(12, wanted={"evaluate_every": 2}, box=box)
        assert box.flush(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        box.close()
    assert [step for name, _, _, step in delivered if name == "loss"] == [2, 4, 6, 8, 10, 12]
    assert "figures wait in memory" in caplog.text
    assert "step-00000012 could not be written" in caplog.text


def test_figures_that_another_machine_kept_are_told_again_from_the_checkpoint(
    training: Training, tmp_path: Path
) -> None:
    def away(figures: list[Figure]) -> None:
        raise ConnectionError("nobody listens")

    box = Outbox(tmp_path / "lost.jsonl", away)
    training.stopped(7, 9, wanted={"evaluate_every": 3}, box=box)
    box.close()
    delivered: list[Figure] = []
    box = Outbox(tmp_path / "new.jsonl", delivered.extend)
    training.go(9, wanted={"evaluate_every": 3}, box=box)
    assert box.flush(30)
    box.close()
    assert [step for name, _, _, step in delivered if name == "loss"] == [3, 6, 9]


def test_a_fork_starts_anew_once_and_goes_on_when_its_command_is_repeated(training: Training) -> None:
    training.stopped(8, values="a")
    with pytest.raises(CheckpointError, match="values: a in the checkpoint, b now"):
        training.go(20, values="b")
    assert training.stopped(4, values="b", fork=True).step == 4
    assert training.checkpoints == ["step-00000003", "step-00000004"]
    record = attempts.read(store.of(NAME))
    assert record is not None
    assert record.attempts == 1
    assert training.stopped(6, values="b", fork=True).step == 6  # from step 4: step 4 itself is not done again
    record = attempts.read(store.of(NAME))
    assert record is not None
    assert record.attempts == 2
    training.go(8, values="b", fork=True)
    assert not training.checkpoints


def test_a_profile_is_written_or_says_why_not(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "made" / "trace.json"
    with caplog.at_level(logging.WARNING):
        training.go(5, profile=Profile(trace, 2))
    assert caplog.text == ""
    assert json.loads(trace.read_text())["traceEvents"]
    training.go(2, profile=Profile(tmp_path / "none.json", 5))
    assert "--profile 5 takes 7 steps, 2 of them to warm up, and 2 were left" in caplog.text


def test_bit_runs_lists_what_was_stopped_and_what_died(
    training: Training, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runs()
    assert "No training yet" in capsys.readouterr().out
    training.stopped(4)
    gone = attempts.Record(state="running", failures=1, attempts=2, host="far", step=3, steps=9)
    store.of("gone").write(attempts.FILE, json.dumps(gone.__dict__).encode())
    runs()
    said = capsys.readouterr().out
    assert NAME in said
    assert "stopped" in said
    assert "4/20" in said
    assert "running on far" in said
