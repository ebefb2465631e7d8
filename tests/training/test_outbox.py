"""Figures on their way to MLflow: all, in order, once; whatever happens to the receiver and to this process."""

import resource
from pathlib import Path

import pytest

from training.outbox import Figure, Outbox


class Receiver:
    """Takes figures while it is up. Equal ones count once, as in MLflow."""

    def __init__(self, up: bool = True) -> None:
        self.up, self.got = up, []

    def __call__(self, figures: list[Figure]) -> None:
        if not self.up:
            raise ConnectionError("nobody listens")
        self.got += [figure for figure in figures if figure not in self.got]

    @property
    def steps(self) -> list[int]:
        return [step for _, _, _, step in self.got]


def test_figures_wait_while_the_receiver_is_away_and_come_in_order_once(tmp_path: Path) -> None:
    receiver = Receiver(up=False)
    box = Outbox(tmp_path / "figures.jsonl", receiver)
    for step in range(1, 1_200):
        box.put({"loss": 1.0 / step}, step)
    assert not box.flush(0.05)
    receiver.up = True
    assert box.flush(30)
    assert receiver.steps == list(range(1, 1_200))
    box.close()


def test_what_was_not_delivered_is_delivered_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    box = Outbox(path, Receiver(up=False))
    box.put({"loss": 1.0}, 50)
    box.put({"loss": 0.5}, 100)
    box.close()
    with path.open("a") as file:
        file.write('[["loss", 0.2')  # a kill in the middle of a line
    receiver = Receiver()
    again = Outbox(path, receiver)
    again.put({"loss": 0.5}, 100)  # steps after the checkpoint are computed once more
    again.put({"loss": 0.2, "lr": 0.1}, 150)
    assert again.flush(30)
    assert receiver.steps == [50, 100, 150, 150]
    again.close()
    third = Outbox(path, receiver)
    assert third.flush(30)
    assert receiver.steps == [50, 100, 150, 150]
    third.close()


def test_a_full_disk_loses_no_figure_of_this_process_and_the_next_one_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, receiver = tmp_path / "figures.jsonl", Receiver()
    box = Outbox(path, receiver)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))  # a line and a half
    try:
        for step in range(1, 40):
            box.put({"loss": 0.5}, step)
        assert box.flush(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert receiver.steps == list(range(1, 40))
    assert caplog.text.count("cannot be written") == 1
    box.close()
    next_one = Outbox(path, receiver)
    next_one.put({"loss": 0.5}, 40)
    assert next_one.flush(30)
    assert receiver.steps == list(range(1, 41))
    next_one.close()


def test_a_mark_that_cannot_be_written_ends_no_delivery(tmp_path: Path) -> None:
    (tmp_path / "figures.jsonl.tmp").mkdir()  # where the mark is written first
    receiver = Receiver()
    box = Outbox(tmp_path / "figures.jsonl", receiver)
    for step in range(1, 3):
        box.put({"loss": 0.5}, step)
        assert box.flush(5)
    assert receiver.steps == [1, 2]
    box.close()
