"""The one training loop, for upstream and downstream: optimizer steps over a deterministic stream.

What it computes depends on the recipe, the data and the seed alone; not on the number of ranks, the micro-batch or how often
it was interrupted.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from training.config import Precision, Sharding
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
    """Gradients stayed infinite, not a number, or too large for too many steps together."""


logger = logging.getLogger(__name__)


Log = Callable[[dict[str, float], int], None]


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
    SIGTERM the current step is finished, a checkpoint written and Preempted raised. A step whose gradient is not finite
    or too large changes nothing; raises DivergedError after too many of them in a row, RankError when a rank is lost.
    """
    num_micro = recipe.num_micro(world.size)
    model.to(world.device)
    trained = world.shard(model, recipe.sharding)
    parameters = list(trained.parameters())
    whole = trained is model  # the fused update knows no sharded parameters
    optimizer = torch.optim.SGD(
        parameters, recipe.lr(0), momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=whole
    )
    done = checkpoints.restore(trained, optimizer, world)
    wrapped, skipped = world.wrap(trained), 0
    with Progress(title, recipe.steps, done, world.is_main) as progress, stop_on_sigterm() as stop:
        loss_sum, counted, began, waited = torch.zeros((), device=world.device), 0, time.perf_counter(), 0.0
        batches = stream.prefetch(done, recipe.steps, num_micro)
        wrapped.train()
        for step in range(done, recipe.steps):
            lr, lam = recipe.lr(step), draw_lam(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss_before = loss_sum.clone()
            for micro in range(num_micro):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                with world.at(step), world.exchange(wrapped, now=micro == num_micro - 1):
                    loss = loss_of(wrapped, batch, recipe, lam, world.device)
                    # Summed over micro-batches and averaged over ranks by DDP, this is the mean over the global batch.
                    (loss * (world.size / recipe.global_batch)).backward()
                loss_sum += loss.detach()
            steps = step + 1
            with world.at(step):
                norm = grad_norm(parameters)
            # The averaged gradient, and so the answer, is the same on every rank.
            if np.isfinite(norm) and norm <= (recipe.max_grad_norm or np.inf):
                optimizer.step()
                skipped, counted = 0, counted + 1
            else:
                skipped += 1
                loss_sum = loss_before
                _skip(skipped, norm, steps, lr, recipe, checkpoints)
            due = steps % recipe.evaluate_every == 0 or steps == recipe.steps
            if due or steps % progress.log_every == 0:
                elapsed, count = time.perf_counter() - began, counted * recipe.global_batch
                with world.at(step):
                    mean_loss = float(world.sum(loss_sum)) / max(1, count)
                figures = {
                    "loss": mean_loss,
                    "lr": lr,
                    "pictures_per_s": count / elapsed,
                    "data_wait": waited / elapsed,
                }
                if due:
                    world.gather(trained, model)
                    figures |= {f"test_{name}": value for name, value in evaluate().items()}
                    wrapped.train()
                log(figures, steps)
                progress.show(steps, figures)
                loss_sum.zero_()
                counted, began, waited = 0, time.perf_counter(), 0.0
            progress.advance()
            with world.at(step):
                stopping = world.any(stop.is_set)
            if stopping or (steps % recipe.checkpoint_every == 0 and steps < recipe.steps):
                checkpoints.save(steps, trained, optimizer, world)
            if stopping:
                checkpoints.wait()
                raise Preempted(steps)


def grad_norm(parameters: list[torch.nn.Parameter]) -> float:
    """The 2-norm of the whole gradient, over all shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _skip(skipped: int, norm: float, steps: int, lr: float, recipe: Recipe, checkpoints: Checkpoints) -> None:
    """Says that a step was skipped; raises DivergedError when it was one too many."""
    limit = f", max_grad_norm is {recipe.max_grad_norm:g}" if recipe.max_grad_norm else ""
    said = f"the gradient's norm is {norm:g} in step {steps} (lr {lr:g}{limit})"
    if skipped > recipe.max_skipped_steps:
        checkpoints.wait()
        last = (checkpoints.complete() or ["none yet"])[-1]
        raise DivergedError(
            f"{said}, {skipped} such steps in a row; max_skipped_steps is {recipe.max_skipped_steps}. Lower lr; the last "
            f"good checkpoint is {last} in {checkpoints.url}."
        )
    logger.warning("%s: the step is skipped (%d of at most %d in a row)", said, skipped, recipe.max_skipped_steps)


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
