"""Several labels a picture: sigmoid loss, exact-match accuracy, an export with a sigmoid inside."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import encode
from training.config import PackConfig
from training.data.dataset import Dataset
from training.engine import inference
from training.engine.distributed import World
from training.engine.fit import View, fit
from training.engine.recipe import Recipe
from training.models import zoo
from training.pack import pack


def test_a_network_learns_two_labels_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = ["path,labels,split"]
    for number in range(60):
        red, top = number % 2, number // 2 % 2
        image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        image[(slice(0, 16) if top else slice(16, 32)), :, 0 if red else 2] += 180
        (tmp_path / f"{number}.png").write_bytes(encode(image))
        rows.append(
            f"{number}.png,{'red' if red else 'blue'}|{'top' if top else 'bottom'},{'test' if number >= 40 else 'train'}"
        )
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    pack(tmp_path, tmp_path / "out", PackConfig(), processes=1)
    data = Dataset.open(tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # where its checkpoints go
    recipe = Recipe(
        steps=40,
        global_batch=20,
        micro_batch=None,
        lr=lambda step: 0.01,
        weight_decay=0.0,
        mixup_alpha=0.0,
        multi_label=True,
        precision="fp32",
        seed=0,
        evaluate_every=100,
        checkpoint_every=100,
    )
    torch.manual_seed(0)
    model, world = zoo.create("R14x0.5", 4), World(0, 1, torch.device("cpu"))
    view = View(32, 32, flips=False, crops=False)
    history = fit(model, recipe, data, view, world, name="x", decides={}, record=lambda figures, step: None)
    assert history["test_accuracy"][-1][1] >= 0.9


def test_accuracy_of_several_labels_wants_all_of_them_right() -> None:
    targets = np.array([[1, 0, 1], [0, 1, 0]], np.float32)
    answers = np.array([[0.9, 0.1, 0.8], [0.6, 0.9, 0.1]], np.float32)
    assert inference.score(answers, targets)["accuracy"] == 0.5
    assert inference.score(np.array([[0.2, 0.8]], np.float32), np.array([1]))["log_loss"] == pytest.approx(-np.log(0.8))
