"""The one training loop, for upstream and downstream: optimizer steps over a deterministic stream.

What it computes depends on the recipe, the data and the seed alone; not on the number of ranks, the micro-batch or how often
it was interrupted.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from training.data.batches import Stream
from training.engine import machine
from training.engine.attempts import Attempt
from training.engine.checkpoint import Checkpoints, name_of, within
from training.engine.distributed import World
from training.engine.loss import grad_norm, loss_of
from training.engine.profile import Profile
from training.engine.progress import Progress
from training.engine.recipe import Recipe
from training.engine.signals import Preempted, grace_s, stop_on_sigterm
from training.errors import UserError
from training.models.resnet import ResNet


class DivergedError(UserError):
    """Gradients stayed infinite, not a number, or too large for too many steps together."""


GO_ON, STOP, OVER = 0, 1, 2  # what a rank wants after a step; the largest wins
Log = Callable[[dict[str, float], int], None]
logger = logging.getLogger(__name__)


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
    attempt: Attempt | None = None,
    profile: Profile | None = None,
) -> None:
    """Trains `model` in place for `recipe.steps` steps, from the newest checkpoint where there is one.

    log is called with figures and the number of steps done; evaluate every `evaluate_every` steps and at the end. On
    SIGTERM the current step is finished, a checkpoint written and Preempted raised; when the attempt's hours are spent likewise
    BudgetError. A step whose gradient is not finite or too large changes nothing, and no checkpoint is written after it, for
    the weights may have gone bad before; raises DivergedError after too many of them in a row, RankError when a rank is lost.
    The last checkpoint, of the end, stays for the caller to clear.
    """
    num_micro, backend = recipe.num_micro(world.size), world.backend
    model.to(world.device)
    trained = world.shard(model, recipe.sharding)
    parameters = list(trained.parameters())
    optimizer = backend.optimizer(
        parameters, recipe.lr(0), recipe.momentum, recipe.weight_decay, whole=trained is model
    )
    step = done = checkpoints.restore(trained, optimizer, world)
    wrapped, skipped, load = world.wrap(trained), checkpoints.skipped, machine.Load(backend)
    with (
        world.at(lambda: step),
        Progress(title, recipe.steps, done, world.is_main) as progress,
        stop_on_sigterm() as stop,
        profile or Profile.none() as profiled,
    ):
        loss_sum, counted, began, waited = torch.zeros((), device=world.device), 0, time.perf_counter(), 0.0
        batches = stream.prefetch(done, recipe.steps, num_micro)
        wrapped.train()
        for step in range(done, recipe.steps):
            lr, lam = recipe.lr(step), recipe.lam(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss_before = loss_sum.clone()
            for micro in range(num_micro):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                with world.exchange(wrapped, now=micro == num_micro - 1):
                    loss = loss_of(wrapped, batch, recipe, lam, backend)
                    # Summed over micro-batches and averaged over ranks by DDP, this is the mean over the global batch.
                    (loss * (world.size / recipe.global_batch)).backward()
                loss_sum += loss.detach()
            steps = step + 1
            norm = grad_norm(parameters)
            # The averaged gradient, and so the answer, is the same on every rank.
            if np.isfinite(norm) and norm <= (recipe.max_grad_norm or np.inf):
                optimizer.step()
                skipped, counted = 0, counted + 1
            else:
                skipped += 1
                loss_sum = loss_before
                _skip(skipped, norm, steps, lr, recipe, checkpoints, world)
            checkpoints.skipped = skipped
            backend.finish_step()
            wish = world.max(OVER if attempt and attempt.is_over else STOP if stop.is_set else GO_ON)
            stops = wish != GO_ON and steps < recipe.steps
            if wish == STOP:
                stop.set()  # also where it was another rank that was asked
            due = steps % recipe.evaluate_every == 0 or steps == recipe.steps
            if due or steps % progress.log_every == 0:
                figures = {}
                if counted:
                    elapsed, count = time.perf_counter() - began, counted * recipe.global_batch
                    figures = {
                        "loss": float(world.sum(loss_sum)) / count,
                        "lr": lr,
                        "pictures_per_s": count / elapsed,
                        "data_wait": waited / elapsed,
                    }
                if due and not stops:  # who must go has no time
                    world.gather(trained, model)
                    figures |= {f"test_{name}": value for name, value in evaluate().items()}
                    wrapped.train()
                progress.show(steps, figures)
                log(figures | load.figures(), steps)
                loss_sum.zero_()
                counted, began, waited = 0, time.perf_counter(), 0.0
            progress.advance()
            profiled.step()
            if attempt:
                attempt.reached(steps, recipe.steps)
            last = stops or steps == recipe.steps
            if last or (steps % recipe.checkpoint_every == 0 and not skipped):
                checkpoints.save(steps, trained, optimizer, world, last, stop.left_s)
            if stops:
                checkpoints.wait(stop.left_s)
                if wish == OVER:
                    assert attempt is not None
                    raise attempt.over(steps)
                raise Preempted(steps, stop.seconds(), checkpoints.written, checkpoints.written == name_of(steps))
    world.gather(trained, model)
    checkpoints.wait(stop.left_s)


def _skip(
    skipped: int, norm: float, steps: int, lr: float, recipe: Recipe, checkpoints: Checkpoints, world: World
) -> None:
    """Says that a step was skipped; raises DivergedError when it was one too many."""
    limit = f", max_grad_norm is {recipe.max_grad_norm:g}" if recipe.max_grad_norm else ""
    said = f"the gradient's norm is {norm:g} in step {steps} (lr {lr:g}{limit})"
    if skipped > recipe.max_skipped_steps:
        checkpoints.wait(within(grace_s()))  # the other ranks wait for this one
        raise DivergedError(
            f"{said}, {skipped} such steps in a row; max_skipped_steps is {recipe.max_skipped_steps}. Lower lr; the last "
            f"good checkpoint is {world.share(checkpoints.written) or 'none yet'} in {checkpoints.url}."
        )
    logger.warning("%s: the step is skipped (%d of at most %d in a row)", said, skipped, recipe.max_skipped_steps)
