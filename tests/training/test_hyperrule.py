"""The HyperRule against the paper's table and the authors' published schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.hyperrule import HyperRule


@pytest.mark.parametrize(
    ("num_examples", "steps", "mixup_alpha"),
    [(1, 500, 0.0), (19_999, 500, 0.0), (20_000, 10_000, 0.1), (499_999, 10_000, 0.1), (500_000, 20_000, 0.1)],
)
def test_steps_and_mixup_follow_the_number_of_examples(num_examples: int, steps: int, mixup_alpha: float) -> None:
    rule = HyperRule.of(num_examples, 224, 224)
    assert (rule.steps, rule.mixup_alpha) == (steps, mixup_alpha)


@pytest.mark.parametrize(
    ("width", "height", "resize", "crop"),
    # 95 × 97 is 9,215 pixels, one less than 96 × 96.
    [(32, 32, 160, 128), (95, 97, 160, 128), (97, 95, 160, 128), (96, 96, 448, 384), (9216, 1, 448, 384)],
)
def test_resolution_follows_the_area(width: int, height: int, resize: int, crop: int) -> None:
    rule = HyperRule.of(100, width, height)
    assert (rule.resize, rule.crop) == (resize, crop)


@pytest.mark.parametrize(
    ("preset", "resize", "crop", "weight_decay"),
    [("slides", 448, 384, 1e-4), ("paper", 448, 384, 0.0), ("reference", 512, 480, 0.0)],
)
def test_presets_differ_in_resolution_and_weight_decay_only(
    preset: str, resize: int, crop: int, weight_decay: float
) -> None:
    rule = HyperRule.of(30_000, 500, 375, preset)  # type: ignore[arg-type]
    assert (rule.resize, rule.crop, rule.weight_decay) == (resize, crop, weight_decay)
    assert (rule.batch_size, rule.base_lr, rule.momentum) == (512, 0.003, 0.9)
    assert rule.supports == (500, 3_000, 6_000, 9_000, 10_000)


# Boundaries (warm-up, decay, decay, decay, end) copied from the authors' bit_hyperrule.py.
PUBLISHED = {
    100: (100, 200, 300, 400, 500),
    20_000: (500, 3_000, 6_000, 9_000, 10_000),
    500_000: (500, 6_000, 12_000, 18_000, 20_000),
}


@pytest.mark.parametrize("num_examples", PUBLISHED)
def test_lr_matches_the_published_schedule_at_every_step(num_examples: int) -> None:
    warmup, first, second, third, end = PUBLISHED[num_examples]
    rule = HyperRule.of(num_examples, 32, 32)
    for step in range(end):
        if step < warmup:
            expected = 0.003 * step / warmup
        elif step <= first:
            expected = 0.003
        elif step <= second:
            expected = 0.0003
        elif step <= third:
            expected = 0.00003
        else:
            expected = 0.000003
        assert rule.lr(step) == pytest.approx(expected, rel=1e-12), step
    assert rule.lr(end) == 0.0


@given(st.integers(1, 2_000_000), st.integers(1, 2_000), st.integers(1, 2_000))
def test_lr_is_bounded_and_falls_after_the_warm_up(num_examples: int, width: int, height: int) -> None:
    rule = HyperRule.of(num_examples, width, height)
    after = [rule.lr(step) for step in range(rule.supports[0], rule.steps, 37)]
    assert all(0 < lr <= rule.base_lr for lr in after)
    assert after == sorted(after, reverse=True)


def test_fewer_steps_keep_the_shares_of_the_schedule() -> None:
    assert HyperRule.of(100, 32, 32).with_steps(50).supports == (10, 20, 30, 40, 50)


@pytest.mark.parametrize("arguments", [(0, 32, 32), (10, 0, 32), (10, 32, 32, "papier")])
def test_impossible_arguments_are_refused_by_value(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"=0|papier"):
        HyperRule.of(*arguments)
