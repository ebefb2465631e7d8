"""The upstream recipes against the paper's numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training import recipes
from training.config import ConfigError, PretrainConfig
from training.data import area
from training.pretrain import planned, starting_bias
from training.schedules import staircase

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "num_examples", "steps", "decays"),
    [
        ("bit-s", 1_281_167, 28_151, (9_384, 18_767, 25_023)),
        ("bit-m", 14_197_122, 311_948, (103_983, 207_965, 277_287)),
        ("bit-l", 300_000_000, 2_929_688, (732_422, 1_684_571, 2_197_266, 2_709_961)),
    ],
)
def test_recipes_at_their_own_scale_are_the_papers(
    name: recipes.RecipeName, num_examples: int, steps: int, decays: tuple[int, ...]
) -> None:
    plan = recipes.plan(name, num_examples)
    assert (plan.steps, plan.global_batch, plan.lr) == (steps, 4096, pytest.approx(0.48))
    assert plan.supports == (5_000, *decays, steps)
    assert staircase(2_500, plan.lr, plan.supports) == pytest.approx(0.24)
    assert staircase(steps - 1, plan.lr, plan.supports) == pytest.approx(0.48 * 10.0 ** -len(decays))


def test_one_key_scales_a_recipe_down() -> None:
    assert recipes.plan("bit-s", 1_281_167, epochs=9).supports == (500, 938, 1_877, 2_502, 2_815)
    small = recipes.plan("bit-m", 33_000, global_batch=128)
    assert (small.steps, small.lr) == (23_203, pytest.approx(0.015))
    assert recipes.plan("bit-m", 33_000, global_batch=128, lr_scaling="none").lr == 0.03


@given(st.sampled_from(list(recipes.RECIPES)), st.integers(200, 10**8), st.floats(0.5, 90), st.integers(1, 4096))
def test_boundaries_rise_at_every_scale(name: recipes.RecipeName, examples: int, epochs: float, batch: int) -> None:
    supports = recipes.plan(name, examples, epochs=epochs, global_batch=batch).supports
    assert list(supports) == sorted(supports)
    assert supports[0] <= 5_000


def test_a_recipe_gives_what_params_leave_out_and_stated_keys_win() -> None:
    stage = PretrainConfig(recipe="bit-m", epochs=1, global_batch=256)
    recipe, view = planned(stage, 25_600, multi_label=True)
    assert (recipe.steps, recipe.global_batch, recipe.weight_decay) == (100, 256, 1e-4)
    assert (view.crop, view.area, view.flips) == (224, True, True)
    recipe, view = planned(
        PretrainConfig(recipe="bit-m", epochs=1, crop=32, weight_decay=0.0), 40_960, multi_label=False
    )
    assert (recipe.steps, recipe.weight_decay, view.crop) == (10, 0.0, 32)
    stage = PretrainConfig(recipe="bit-m", epochs=1, global_batch=256, warmup_steps=7, decays=(0.5, 0.9))
    assert stage.plan(25_600).supports == (7, 50, 90, 100)
    with pytest.raises(ConfigError, match=r"warmup_steps=60.*of steps=100 give the boundaries \(60, 50, 90, 100\)"):
        stage.model_copy(update={"warmup_steps": 60}).plan(25_600)
    with pytest.raises(ValueError, match="epochs=3 needs a recipe"):
        PretrainConfig(epochs=3)
    with pytest.raises(ValueError, match="give one of them"):
        PretrainConfig(recipe="bit-s", epochs=3, steps=10)


def test_the_head_of_a_sigmoid_loss_starts_at_minus_ten() -> None:
    assert starting_bias(PretrainConfig(recipe="bit-m"), multi_label=True) == -10.0
    assert starting_bias(PretrainConfig(recipe="bit-m"), multi_label=False) == 0.0
    assert starting_bias(PretrainConfig(head_bias=-5.0), multi_label=True) == -5.0
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.full((1, 21_843), -10.0), torch.zeros(1, 21_843))
    assert float(loss) * 21_843 < 1  # and not 21,843 × ln 2


def test_bit_config_shows_the_resulting_steps() -> None:
    command = [
        sys.executable,
        "-m",
        "training",
        "config",
        "--set",
        "pretrain.recipe=bit-m",
        "--set",
        "pretrain.steps=null",
    ]
    command += ["--set", "pretrain.global_batch=4096", "--set", "pretrain.lr=0.03"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"pretrain", "finetune"} < set(yaml.safe_load(done.stdout))
    assert "steps" in done.stdout.split("# pretrain by bit-m")[1]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1_000))
def test_crops_by_area_stay_inside_and_keep_their_bounds(height: int, width: int, seed: int) -> None:
    drawn = area.draw(np.random.default_rng(seed), 2)
    top, left, h, w = drawn.box(1, height, width)
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    assert h >= 1
    assert w >= 1
    if min(height, width) > 100 and max(height, width) < 1.3 * min(height, width):
        assert 0.04 < h * w / (height * width) <= 1
        assert 0.7 < w / h < 1.4


def test_crops_by_area_cover_the_published_range() -> None:
    drawn = area.draw(np.random.default_rng(0), 4_000)
    shares = np.array([np.prod(drawn.box(row, 1_000, 1_000)[2:]) / 1e6 for row in range(4_000)])
    assert 0.05 <= shares.min() < 0.06
    assert shares.max() > 0.95
    assert np.median(shares) == pytest.approx(0.5, abs=0.03)
