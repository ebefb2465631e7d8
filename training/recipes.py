"""Upstream training as published, by name: from a recipe and the number of pictures to every hyper-parameter.

Source: BiT, section 4.1. bit-s and bit-m train 90 epochs, bit-l 40; SGD with momentum 0.9, lr 0.03 × batch / 256, batch 4,096,
5,000 warm-up steps, weight decay 1e-4, crops by area to 224 pixels. Pure arithmetic: no framework is imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["bit-s", "bit-m", "bit-l"]
LrScaling = Literal["linear", "none"]
BATCH, LR, WARMUP_STEPS, WEIGHT_DECAY, CROP, HEAD_BIAS = 4_096, 0.03, 5_000, 1e-4, 224, -10.0


@dataclass(frozen=True)
class Upstream:
    """epochs in all, epochs after which lr falls by 10, pictures of the dataset that the recipe was published with."""

    epochs: int
    decays: tuple[int, ...]
    num_examples: int


RECIPES: dict[RecipeName, Upstream] = {
    "bit-s": Upstream(90, (30, 60, 80), 1_281_167),
    "bit-m": Upstream(90, (30, 60, 80), 14_197_122),
    "bit-l": Upstream(40, (10, 23, 30, 37), 300_000_000),
}


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, counted in optimizer steps. supports: end of the warm-up, decays, end of training."""

    steps: int
    global_batch: int
    lr: float
    supports: tuple[int, ...]


def plan(
    name: RecipeName,
    num_examples: int,
    *,
    epochs: float | None = None,
    global_batch: int | None = None,
    lr: float | None = None,
    lr_scaling: LrScaling = "linear",
    warmup_steps: int | None = None,
    decays: Sequence[float] | None = None,
) -> Plan:
    """The recipe on `num_examples` pictures; `epochs` and `global_batch` scale it down.

    Decays keep their shares of the epochs. The warm-up keeps its share of the published number of steps, and is never longer
    than the published 5,000: at the recipe's own scale it is exactly that. warmup_steps, decays (shares of all steps): in place
    of the recipe's.
    """
    recipe = RECIPES[name]
    chosen, batch = epochs or recipe.epochs, global_batch or BATCH
    steps = max(1, round(chosen * num_examples / batch))
    published = recipe.epochs * recipe.num_examples / BATCH
    warmup = min(WARMUP_STEPS, round(WARMUP_STEPS * steps / published)) if warmup_steps is None else warmup_steps
    shares = [decay / recipe.epochs for decay in recipe.decays] if decays is None else decays
    falls = (round(share * steps) for share in shares)
    base = LR if lr is None else lr
    return Plan(steps, batch, base * batch / 256 if lr_scaling == "linear" else base, (warmup, *falls, steps))
