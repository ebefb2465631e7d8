"""What several attempts at one training share: budgets, the MLflow run, how it stands."""

import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from training.config import PretrainConfig
from training.engine import attempts, signals
from training.engine.attempts import Attempt, BudgetError, attempt
from training.engine.distributed import World
from training.engine.signals import Preempted
from training.engine.store import Store

WORLD = World(0, 1, torch.device("cpu"))
DECIDES = {"lr": "0.1"}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    made = Store(str(tmp_path / "training") if request.param == "local" else f"memory:/{tmp_path}")
    yield made
    made.remove()


def end(
    store: Store,
    error: BaseException,
    act: Callable[[Attempt], object] = id,
    decides: dict[str, str] = DECIDES,
    fork: bool = False,
    **limits: float,
) -> None:
    """An attempt that does `act` and then ends by `error`."""

    def work() -> None:
        with attempt(store, PretrainConfig(**limits), WORLD, decides, fork) as running:
            act(running)
            raise error

    with pytest.raises(type(error)):
        work()


def begun(seen: list[str | None], run_id: str) -> Callable[[Attempt], None]:
    """Notes the MLflow run that an attempt finds, and binds another one."""

    def act(running: Attempt) -> None:
        seen.append(running.record.run_id)
        running.bind(run_id)

    return act


def test_failures_are_counted_over_attempts_and_a_restart_is_refused_when_they_are_spent(store: Store) -> None:
    for _ in range(3):
        end(store, RuntimeError("a bug"), max_failures=2)
    with pytest.raises(BudgetError, match=r"failed 3 times, max_failures is 2") as refused:
        attempt(store, PretrainConfig(max_failures=2), WORLD, DECIDES).__enter__()
    assert store.url in str(refused.value)
    with attempt(store, PretrainConfig(max_failures=3), WORLD, DECIDES) as fourth:
        assert (fourth.record.failures, fourth.record.attempts) == (3, 4)


def test_an_attempt_that_was_killed_counts_as_a_failure_and_one_that_was_stopped_does_not(store: Store) -> None:
    end(store, Preempted(3, 0.1, "step-00000003", True))
    with attempt(store, PretrainConfig(), WORLD, DECIDES) as second:
        assert second.record.failures == 0
        killed = attempts.read(store)  # as it stands while the second one runs
    assert killed is not None
    assert (killed.state, killed.pid) == ("running", os.getpid())
    store.write(attempts.FILE, b'{"state": "running", "attempts": 2}')
    with attempt(store, PretrainConfig(), WORLD, DECIDES) as third:
        assert third.record.failures == 1


def test_sigterm_before_the_steps_stops_the_attempt_and_counts_as_no_failure(store: Store) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, attempt(store, PretrainConfig(), WORLD, DECIDES):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    record = attempts.read(store)
    assert record is not None
    assert record.state == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_hours_are_counted_over_attempts(store: Store) -> None:
    store.write(attempts.FILE, b'{"state": "stopped", "attempts": 4, "seconds": 7199}')
    with attempt(store, PretrainConfig(max_hours=3), WORLD, DECIDES) as fifth:
        assert not fifth.is_over
    store.write(attempts.FILE, b'{"state": "stopped", "attempts": 4, "seconds": 7200}')
    seen: list[bool] = []
    end(store, BudgetError("spent"), lambda fifth: seen.append(fifth.is_over), max_hours=2)
    assert seen == [True]
    record = attempts.read(store)
    assert record is not None
    assert record.state == "stopped"


def test_the_mlflow_run_is_kept_until_the_good_end_and_a_fork_gets_its_own(store: Store) -> None:
    end(store, KeyboardInterrupt(), lambda first: first.bind("abc"))
    seen: list[str | None] = []
    end(store, KeyboardInterrupt(), lambda second: seen.append(second.record.run_id))
    assert seen == ["abc"]
    seen = []
    for lr in ("0.2", "0.2", "0.3"):  # a container that starts anew repeats its command
        end(store, KeyboardInterrupt(), begun(seen, lr), {"lr": lr}, fork=True)
    assert seen == [None, "0.2", None]
    with attempt(store, PretrainConfig(), WORLD, DECIDES):
        pass
    assert attempts.read(store) is None
    assert not store.folders()


def test_a_record_that_cannot_be_written_costs_the_record_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with attempt(Store(str(tmp_path / "full")), PretrainConfig(), WORLD, DECIDES) as running:
            running.bind("abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "run.json" in caplog.text


class Hanging(Store):
    """Takes nothing until it is told to; remembers what it took."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.works, self.steps = threading.Event(), []

    def write(self, name: str, data: bytes | memoryview) -> None:
        self.works.wait(30)
        self.steps.append(json.loads(bytes(data))["step"])
        super().write(name, data)


def test_a_store_that_hangs_holds_no_step_up_and_gets_the_newest_record(tmp_path: Path) -> None:
    store = Hanging(str(tmp_path / "far"))
    store.works.set()
    with attempt(store, PretrainConfig(), WORLD, DECIDES) as running:
        store.works.clear()
        running.note_every_s = 0.0
        for step in range(1, 1001):
            running.reached(step, 1000)
        store.works.set()
        running.settle()
        assert len(store.steps) <= 3
        assert store.steps[-1] == 1000
    assert not (tmp_path / "far").exists()


def test_a_preempted_training_claims_no_checkpoint_that_was_not_written() -> None:
    assert "step-00000003 was written" in str(Preempted(3, 0.1, "step-00000003", True))
    assert "could not be written, the last good one is step-00000002" in str(Preempted(3, 0.1, "step-00000002", False))
    assert "begins anew" in str(Preempted(3, 0.1, None, False))


@pytest.mark.parametrize(
    ("environ", "expected_s"),
    [
        ({}, 85),  # whoever stops it is not known
        ({"TORCHELASTIC_RUN_ID": "x"}, 15),  # torchrun's own 30 s
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}, 85),
    ],
)
def test_the_grace_leaves_time_for_last_words(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected_s: float
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert signals.grace_s() == expected_s
