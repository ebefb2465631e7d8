"""Draws and the probe of the benchmark: pure functions of their seed, held against an independent solution."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from training import benchmark
from training.config import ConfigError, PackConfig
from training.data.shards import Dataset
from training.pack import pack
from training.study import draws, probe
from training.study.datasets import DATASETS, opened


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes of 30 noisy pictures for training and 6 for the test."""
    root, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for label in range(3):
            folder = root / "pictures" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 80 * (label + 1), (12, 12, 3), np.uint8))
    pack(root / "pictures", root / "packed", PackConfig(), processes=1)
    return Dataset.open(root / "packed")


def test_few_shot_draws_differ_by_seed_and_never_touch_the_test(data: Dataset) -> None:
    first, again, other = draws.few_shot(data, 5, 0), draws.few_shot(data, 5, 0), draws.few_shot(data, 5, 1)
    assert np.bincount(first.split("train").targets()).tolist() == [5, 5, 5]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.split("test").sha256 == other.split("test").sha256
    assert not set(first.split("train").sha256) & set(first.split("test").sha256)
    with pytest.raises(ConfigError, match="to draw 1000 from; fewer shots"):
        draws.few_shot(data, 1000, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_label_noise_flips_that_share_of_the_training_labels(data: Dataset, share: float) -> None:
    noisy = draws.noisy(data, share, 3)
    assert (noisy.split("train").targets() != data.split("train").targets()).mean() == pytest.approx(share, abs=0.01)
    assert np.array_equal(noisy.split("test").targets(), data.split("test").targets())


def test_a_part_of_upstream_keeps_the_test_whole(data: Dataset) -> None:
    part = draws.part(data, 0.2, 0)
    assert (len(part.split("train")), len(part.split("test"))) == (18, 18)
    with pytest.raises(ConfigError, match="draws 1,000 training examples; there are 90"):
        draws.vtab(data, 0)


def test_ridge_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(20, 50)).astype(np.float32), rng.integers(0, 3, 20)
    weights = probe.ridge(x, labels, 3, l2=7.0)
    theirs = Ridge(alpha=7.0).fit(x.astype(np.float64), 2.0 * np.eye(3)[labels] - 1)
    assert np.allclose(weights[:-1], theirs.coef_.T)
    assert np.allclose(weights[-1], theirs.intercept_)


def test_absent_data_says_what_to_get_and_where_to_put_it() -> None:
    assert len([row for row in DATASETS.values() if row.group != "demo"]) == 22
    with pytest.raises(ConfigError, match=r"data/benchmark/pets is not there. Get Oxford-IIIT Pets"):
        opened("pets")
    with pytest.raises(ConfigError, match="Choices: digits, textures"):
        opened("pest")


def test_results_are_kept_and_reported(tmp_path: Path) -> None:
    suite = benchmark.Suite(("digits",), (1, 5), (0.0, 1.0), ())
    for unit in benchmark.units(suite):
        benchmark.append(tmp_path / "results.csv", unit, 0.2 + 0.1 * unit.seed + 0.05 * unit.shots)
    results = benchmark.read(tmp_path / "results.csv")
    assert set(results) == set(benchmark.units(suite))
    benchmark.write_report("demo", suite, results, tmp_path)
    assert "| digits | ridge | 100% | 35.0 ± 10.0 | 55.0 ± 10.0 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "few_shot.png").stat().st_size > 5_000
    assert json.loads(json.dumps([u.seed for u in results])) == [0, 1, 2] * 4
