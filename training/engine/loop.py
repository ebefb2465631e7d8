"""The one training loop, for upstream and downstream: optimizer steps over a deterministic stream.

What it computes depends on the recipe, the data and the seed alone; not on the number of ranks, the micro-batch or how often
it was interrupted.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from training.config import Precision
from training.data.batches import Batch, Stream
from training.engine.checkpoint import Checkpoints
from training.engine.distributed import World
from training.engine.progress import Progress
from training.engine.signals import Preempted, stop_on_sigterm
from training.errors import UserError
from training.models.resnet import ResNet, normalize


class BatchError(UserError):
    """A global batch that cannot be cut into ranks and micro-batches."""


class DivergedError(UserError):
    """The loss is no longer finite."""


Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train; every number of it is the HyperRule's or stands in params.yaml.

    lr: optimizer step → learning rate; global_batch: examples per optimizer step over all ranks; micro_batch: examples per
    forward/backward of one rank (None: the rank's whole share); multi_label: sigmoid instead of softmax cross-entropy.
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

    def num_micro(self, world_size: int) -> int:
        """Forward/backward passes per optimizer step and rank. Raises BatchError where the batch cannot be split."""
        share, rest = divmod(self.global_batch, world_size)
        if rest or share == 0:
            raise BatchError(f"global_batch={self.global_batch} does not divide over {world_size} ranks.")
        micro = min(self.micro_batch or share, share)
        if share % micro:
            raise BatchError(f"micro_batch={micro} does not divide a rank's share of {share} examples.")
        if self.mixup_alpha and micro % 2:
            raise BatchError(f"micro_batch={micro} is odd; mixup pairs neighbours, so choose an even one.")
        return share // micro


def train(
    model: ResNet,
    recipe: Recipe,
    stream: Stream,
    world: World,
    *,
    checkpoints: Checkpoints,
    log: Log,
    evaluate: Callable[[], dict[str, float]],
    title: str,
) -> None:
    """Trains `model` in place for `recipe.steps` steps, from the newest checkpoint where there is one.

    log is called with figures and the number of steps done; evaluate every `evaluate_every` steps and at the end. On
    SIGTERM the current step is finished, a checkpoint written and Preempted raised. Raises DivergedError when the loss
    is no longer finite.
    """
    num_micro = recipe.num_micro(world.size)
    model.to(world.device)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr(0), momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    done = checkpoints.restore(model, optimizer, world)
    wrapped = world.wrap(model)
    with Progress(title, recipe.steps, done, world.is_main) as progress, stop_on_sigterm() as stop:
        loss_sum, logged, began, waited = torch.zeros((), device=world.device), done, time.perf_counter(), 0.0
        batches = stream.prefetch(done, recipe.steps, num_micro)
        model.train()
        for step in range(done, recipe.steps):
            lr, lam = recipe.lr(step), draw_lam(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            for micro in range(num_micro):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                last = micro == num_micro - 1
                with contextlib.nullcontext() if last or world.size == 1 else wrapped.no_sync():  # type: ignore[operator]
                    loss = loss_of(wrapped, batch, recipe, lam, world.device)
                    # Summed over micro-batches and averaged over ranks by DDP, this is the mean over the global batch.
                    (loss * (world.size / recipe.global_batch)).backward()
                loss_sum += loss.detach()
            optimizer.step()
            steps = step + 1
            due = steps % recipe.evaluate_every == 0 or steps == recipe.steps
            if due or steps % progress.log_every == 0:
                elapsed, count = time.perf_counter() - began, (steps - logged) * recipe.global_batch
                mean_loss = float(world.sum(loss_sum)) / count
                if not np.isfinite(mean_loss):
                    kept = checkpoints.complete()
                    raise DivergedError(
                        f"the loss is {mean_loss} after step {steps} (lr {lr:g}). Lower lr; the last good checkpoint is "
                        f"{kept[-1] if kept else 'none yet'}."
                    )
                figures = {
                    "loss": mean_loss,
                    "lr": lr,
                    "pictures_per_s": count / elapsed,
                    "data_wait": waited / elapsed,
                }
                if due:
                    figures |= {f"test_{name}": value for name, value in evaluate().items()}
                    model.train()
                log(figures, steps)
                progress.show(steps, figures)
                loss_sum.zero_()
                logged, began, waited = steps, time.perf_counter(), 0.0
            progress.advance()
            stopping = stop.is_set if world.size == 1 else world.any(stop.is_set)
            if stopping or (steps % recipe.checkpoint_every == 0 and steps < recipe.steps):
                checkpoints.save(steps, model, optimizer, world)
            if stopping:
                raise Preempted(steps)


def draw_lam(recipe: Recipe, step: int) -> float:
    """λ of an optimizer step, drawn from Beta(α, α) by (seed, step) alone; 1 without mixup. Paper: section 3.3."""
    if recipe.mixup_alpha == 0:
        return 1.0
    return float(np.random.default_rng((recipe.seed, step, 0xA1FA)).beta(recipe.mixup_alpha, recipe.mixup_alpha))


def loss_of(model: torch.nn.Module, batch: Batch, recipe: Recipe, lam: float, device: torch.device) -> torch.Tensor:
    """Loss summed over a micro-batch.

    With mixup every example is mixed with its neighbour in the stream (0 with 1, 2 with 3, …). The stream is shuffled, so
    that is as random as a permutation, but it stays the same however the global batch is split.
    """
    images = normalize(torch.from_numpy(batch.images).to(device, non_blocking=True))
    targets = torch.from_numpy(batch.targets).to(device, non_blocking=True)
    if lam != 1.0:
        images = lam * images + (1 - lam) * neighbours(images)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = model(images)
    logits = logits.float()

    def against(wanted: torch.Tensor) -> torch.Tensor:
        if recipe.multi_label:
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return F.cross_entropy(logits, wanted, reduction="sum")

    loss = against(targets)
    return loss if lam == 1.0 else lam * loss + (1 - lam) * against(neighbours(targets))


def neighbours(tensor: torch.Tensor) -> torch.Tensor:
    """Rows 0 and 1, 2 and 3, … exchanged: [N, …] → [N, …], N even."""
    return tensor.view(-1, 2, *tensor.shape[1:]).flip(1).reshape(tensor.shape)
