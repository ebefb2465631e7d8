"""How a network is trained, as values: what the HyperRule or params.yaml say, ready for the loop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from training.config import Optimisation, Precision, Sharding
from training.errors import UserError

logger = logging.getLogger(__name__)


class BatchError(UserError):
    """A global batch that cannot be shared by so many ranks, or whose pairs cannot stay together."""


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

    @property
    def unit(self) -> int:
        """Neighbours that must stay together: mixup pairs them."""
        return 2 if self.mixup_alpha else 1

    def share(self, world_size: int) -> int:
        """Examples of the rank that has most; the others have a unit less at most. Raises BatchError where some have none."""
        units, rest = divmod(self.global_batch, self.unit)
        if rest:
            raise BatchError(f"global_batch={self.global_batch} is odd; mixup pairs neighbours, so choose an even one.")
        if units < world_size:
            raise BatchError(
                f"global_batch={self.global_batch} does not give each of {world_size} ranks {self.unit} examples; at most "
                f"{units} ranks can share it. Choose fewer ranks or a larger global_batch."
            )
        return -(-units // world_size) * self.unit

    def num_micro(self, world_size: int) -> int:
        """Forward/backward passes per optimizer step, the same on every rank. Raises BatchError where it cannot be split.

        A micro_batch that does not divide the shares is lowered, or where a rank has too few examples raised, with a warning.
        """
        share, unit = self.share(world_size) // self.unit, self.unit
        wanted = min(self.micro_batch or share * unit, share * unit)
        if wanted < unit:
            raise BatchError(f"micro_batch={wanted} is odd; mixup pairs neighbours, so choose an even one.")
        fewest = self.global_batch // unit // world_size
        passes = min(-(-share // (wanted // unit)), fewest)
        if (taken := -(-share // passes) * unit) != wanted and self.micro_batch:
            _warn_once(
                f"micro_batch={self.micro_batch} does not divide a rank's share of {share * unit} examples: "
                f"micro-batches of at most {taken} are taken, {passes} a step."
            )
        return passes

    def largest_micro(self, world_size: int) -> int:
        """Examples of the largest micro-batch."""
        share = self.share(world_size) // self.unit
        return -(-share // self.num_micro(world_size)) * self.unit

    def lam(self, step: int) -> float:
        """λ of an optimizer step, drawn from Beta(α, α) by (seed, step) alone; 1 without mixup. Paper: section 3.3."""
        if self.mixup_alpha == 0:
            return 1.0
        return float(np.random.default_rng((self.seed, step, 0xA1FA)).beta(self.mixup_alpha, self.mixup_alpha))


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


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
