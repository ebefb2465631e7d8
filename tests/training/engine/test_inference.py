"""Answers to a split: measured batch by batch over the ranks, they are what the whole matrix of answers tells."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.data import shards
from training.data.dataset import Dataset, Split
from training.engine import inference
from training.engine.distributed import World
from training.models import zoo
from training.models.resnet import ResNet


class Alone(World):
    """One of several ranks whose sums are added up by the test."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def several(tmp_path: Path) -> Split:
    """13 pictures of 40 classes, with up to three labels each."""
    rng = np.random.default_rng(1)
    examples = []
    for number in range(13):
        data = cv2.imencode(".png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))[1].tobytes()
        labels = tuple(sorted(set(rng.integers(0, 40, 3).tolist())))
        examples.append(("test", shards.Example(f"{number}", data, "png", labels, 32, 32, "")))
    shards.write(tmp_path, examples, [str(number) for number in range(40)], True, 10_000, {})
    return Dataset.open(tmp_path).split("test")


def network(classes: int) -> ResNet:
    torch.manual_seed(0)
    model = zoo.create("R14x0.5", classes)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_figures_without_the_matrix_are_those_of_the_matrix(
    dataset: Dataset, several: Split, multi_label: bool, ranks: int
) -> None:
    split = several if multi_label else dataset.split("test")
    model = network(split.dataset.num_classes)
    expected = inference.score(inference.predict(model, split, 32, 5, multi_label), split.targets())
    told = [
        inference.measure(model, split, 32, 4, multi_label, Alone(rank, ranks, torch.device("cpu")), "fp32")
        for rank in range(ranks)
    ]
    for name, value in expected.items():
        assert sum(each[name] for each in told) == pytest.approx(value, rel=1e-4)


def test_scores_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    answers = rng.uniform(0, 1, (50, 7)).astype(np.float32)
    answers[0] = [0, 1, 0, 0, 0, 0, 0]
    labels = rng.integers(0, 7, 50)
    several = (rng.uniform(0, 1, (50, 7)) < 0.3).astype(np.float32)
    clipped = np.clip(answers.astype(np.float64), 1e-7, 1 - 1e-7)
    one = inference.score(answers, labels)
    assert one["accuracy"] == (answers.argmax(1) == labels).mean()
    assert one["log_loss"] == pytest.approx(-np.log(clipped[range(50), labels]).mean(), rel=1e-3)
    losses = -(several * np.log(clipped) + (1 - several) * np.log(1 - clipped)).sum(1)
    assert inference.score(answers, several)["log_loss"] == pytest.approx(losses.mean(), rel=1e-2)


def watched(model: ResNet, watch: Callable[[torch.Tensor], None]) -> ResNet:
    model.register_forward_hook(lambda module, inputs, output: watch(output))
    return model


def test_an_evaluation_in_training_runs_in_the_precision_of_training(dataset: Dataset) -> None:
    seen: list[torch.dtype] = []
    model = watched(network(3), lambda logits: seen.append(logits.dtype))
    world, split = World(0, 1, torch.device("cpu")), dataset.split("test")
    rough = inference.measure(model, split, 32, 9, False, world, "bf16")
    exact = inference.measure(model, split, 32, 9, False, world, "fp32")
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert rough["log_loss"] == pytest.approx(exact["log_loss"], rel=0.05)
