"""Draws: pure functions of their seed that never touch the test; the probes, held against an independent solution."""

import cv2
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from training.config import ConfigError, PackConfig
from training.data.dataset import Dataset
from training.pack import pack
from training.study import draws, probe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes of 30 noisy pictures for training, 4 for validation and 6 for the test."""
    root, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for split, count in (("train", 30), ("validation", 4), ("test", 6)):
        for label in range(3):
            folder = root / "pictures" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 80 * (label + 1), (12, 12, 3), np.uint8))
    pack(root / "pictures", root / "packed", PackConfig(), processes=1)
    return Dataset.open(root / "packed")


def test_few_shot_draws_differ_by_seed_and_never_touch_the_test(data: Dataset) -> None:
    first, again, other = (draws.of("few-shot", data, 5, seed) for seed in (0, 0, 1))
    assert np.bincount(first.split("train").targets()).tolist() == [5, 5, 5]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.split("test").sha256 == data.split("test").sha256
    assert not set(first.split("train").sha256) & set(first.split("test").sha256)
    assert draws.most_shots(data) == 34
    with pytest.raises(ConfigError, match="has 34 examples to draw 1000 from; fewer shots"):
        draws.few_shot(data, 1000, 0)


def test_whole_transfers_train_on_all_but_the_test(data: Dataset) -> None:
    whole = draws.of("full", data, 0, 0)
    assert (len(whole.split("train")), len(whole.split("test"))) == (102, 18)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_label_noise_makes_that_share_of_upstreams_labels_wrong(data: Dataset, share: float) -> None:
    noisy = draws.upstream(data, 1.0, share, 3)
    assert (noisy.split("train").targets() != data.split("train").targets()).mean() == pytest.approx(share, abs=0.01)
    assert np.array_equal(noisy.split("test").targets(), data.split("test").targets())
    part = draws.upstream(data, 0.5, share, 3)
    true = dict(zip(data.split("train").sha256, data.split("train").targets(), strict=True))
    wrong = [
        true[sha] != label for sha, label in zip(part.split("train").sha256, part.split("train").targets(), strict=True)
    ]
    assert (len(wrong), sum(wrong)) == (45, round(45 * share))


def test_a_part_of_upstream_keeps_the_test_whole(data: Dataset) -> None:
    part, same = draws.upstream(data, 0.2, 0.0, 0), draws.upstream(data, 1.0, 0.0, 0)
    assert (len(part.split("train")), len(part.split("test"))) == (18, 18)
    assert same is data


def test_vtab_needs_a_thousand_examples(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="draws 1,000 training examples; there are 102"):
        draws.vtab(data, 0)


@pytest.mark.parametrize("count", [20, 80])  # fewer examples than features, and more
def test_ridge_is_scikit_learns(count: int) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(count, 50)).astype(np.float32), rng.integers(0, 3, count)
    weights = probe.ridge(x, labels, 3, l2=7.0)
    theirs = Ridge(alpha=7.0).fit(x.astype(np.float64), 2.0 * np.eye(3)[labels] - 1)
    assert np.allclose(weights[:-1], theirs.coef_.T)
    assert np.allclose(weights[-1], theirs.intercept_)


def test_both_probes_learn_what_is_linear() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    x = (np.eye(3)[labels] * 3 + rng.normal(0, 0.3, (60, 3))).astype(np.float32)
    for method in ("ridge", "linear"):
        given = probe.answers(method, x[:40], labels[:40], x[40:], 3, 1.0)  # type: ignore[arg-type]
        assert np.array_equal(given, labels[40:]), method
