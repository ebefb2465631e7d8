"""How a network is trained, as values: what the HyperRule or params.yaml say, ready for the loop."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.config import Optimisation, Precision, Sharding
from training.errors import UserError


class BatchError(UserError):
    """A global batch that cannot be cut into ranks and micro-batches."""


@dataclass(frozen=True)
class Recipe:
    """How to train; every number of it is the HyperRule's or stands in params.yaml.

    lr: optimizer step → learning rate; global_batch: examples per optimizer step over all ranks; micro_batch: examples per
    forward/backward of one rank (None: the rank's whole share); multi_label: sigmoid instead of softmax cross-entropy;
    max_grad_norm, max_skipped_steps: a step whose gradient is larger or not finite is skipped, so many in a row at most.
    """

    steps: int
    global_batch: int
    micro_batch: int | None
    lr: Callable[[int], float]
    weight_decay: float
    mixup_alpha: float
    multi_label: bool
    precision: Precision
    seed: int
    evaluate_every: int
    checkpoint_every: int
    momentum: float = 0.9
    sharding: Sharding = "none"
    max_grad_norm: float | None = None
    max_skipped_steps: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    on_device: bool = False  # crops and flips

    def num_micro(self, world_size: int) -> int:
        """Forward/backward passes per optimizer step and rank. Raises BatchError where the batch cannot be split."""
        share, rest = divmod(self.global_batch, world_size)
        if rest or share == 0:
            fitting = [size for size in range(1, self.global_batch + 1) if self.global_batch % size == 0]
            near = sorted(sorted(fitting, key=lambda size: abs(size - world_size))[:5])
            raise BatchError(
                f"global_batch={self.global_batch} does not divide over {world_size} ranks. Numbers of ranks near it that fit: "
                f"{', '.join(map(str, near))}; a job that may grow and shrink needs a global_batch that all its sizes divide."
            )
        micro = min(self.micro_batch or share, share)
        if share % micro:
            raise BatchError(f"micro_batch={micro} does not divide a rank's share of {share} examples.")
        if self.mixup_alpha and micro % 2:
            raise BatchError(f"micro_batch={micro} is odd; mixup pairs neighbours, so choose an even one.")
        return share // micro

    def lam(self, step: int) -> float:
        """λ of an optimizer step, drawn from Beta(α, α) by (seed, step) alone; 1 without mixup. Paper: section 3.3."""
        if self.mixup_alpha == 0:
            return 1.0
        return float(np.random.default_rng((self.seed, step, 0xA1FA)).beta(self.mixup_alpha, self.mixup_alpha))


def of(
    stage: Optimisation,
    *,
    steps: int,
    global_batch: int,
    lr: Callable[[int], float],
    weight_decay: float,
    mixup_alpha: float,
    multi_label: bool,
    momentum: float = 0.9,
) -> Recipe:
    """The recipe of a stage: its schedule's values, and what both kinds of training share."""
    return Recipe(
        steps=steps,
        global_batch=global_batch,
        micro_batch=None if stage.micro_batch == "auto" else stage.micro_batch,
        lr=lr,
        weight_decay=weight_decay,
        mixup_alpha=mixup_alpha,
        multi_label=multi_label,
        precision=stage.precision,
        seed=stage.seed,
        evaluate_every=stage.evaluate_every,
        checkpoint_every=stage.checkpoint_every,
        momentum=momentum,
        sharding=stage.sharding,
        max_grad_norm=stage.max_grad_norm,
        max_skipped_steps=stage.max_skipped_steps,
        keep_checkpoints=stage.keep_checkpoints,
        keep_every=stage.keep_every,
        on_device=stage.augment_on == "device",
    )
