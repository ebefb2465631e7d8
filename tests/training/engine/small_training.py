"""A training of a few steps as its own process, for tests that kill it or run it on several ranks.

    python -m tests.training.engine.small_training DATASET WEIGHTS STEPS NAME [micro_batch] [sharding]

Writes the weights to WEIGHTS; prints one line per recorded step. FUSED=1: by the fused operations; TROUBLE=step:rank:what
makes that rank end in that step: what is a signal's name, or `raise`. SLOW_WHILE=file: steps are slow while the file is there;
HEAD=1: only the head is trained; FORK=1: with --fork; HANGS=step: from that step's checkpoint on, nothing is written any more.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from training.config import PretrainConfig, Sharding
from training.data.dataset import Dataset
from training.engine import attempts, distributed, memory, store
from training.engine.checkpoint import name_of
from training.engine.fit import View, fit
from training.engine.recipe import Recipe
from training.models import npz, zoo


def lr(step: int) -> float:
    """Gentle: large steps from a fresh network amplify rounding."""
    if trouble := os.environ.get("TROUBLE"):
        when, rank, what = trouble.split(":")
        if (step, os.environ.get("RANK", "0")) == (int(when), rank):
            if what == "raise":
                raise ArithmeticError("out of paint")
            os.kill(os.getpid(), signal.Signals[what])
    if Path(os.environ.get("SLOW_WHILE", "")).is_file():
        time.sleep(0.4)
    return float(os.environ.get("LR", 3e-4)) * min(1.0, step / 6)


def recipe(steps: int, micro_batch: int | None = None, mixup_alpha: float = 0.2, sharding: Sharding = "none") -> Recipe:
    return Recipe(
        steps=steps,
        global_batch=16,
        micro_batch=micro_batch,
        lr=lr,
        weight_decay=1e-4,
        mixup_alpha=mixup_alpha,
        multi_label=False,
        precision="fp32",
        seed=5,
        evaluate_every=1000,
        checkpoint_every=3,
        sharding=sharding,
    )


def hang(store_class: type[store.Store], first: str) -> None:
    """A store that takes connections and never answers, from the checkpoint of step `first` on."""
    write, hung = store_class.write, threading.Event()

    def hanging(self: store.Store, name: str, data: bytes | memoryview) -> None:
        if hung.is_set() or (name.startswith("step-") and name >= name_of(int(first))):
            hung.set()
            time.sleep(3_600)
        write(self, name, data)

    store_class.write = hanging  # type: ignore[method-assign]


def main(dataset: str, weights: str, steps: str, name: str, micro_batch: str = "", sharding: Sharding = "none") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Dataset.open(dataset)
    model = zoo.create("R14x0.5", data.num_classes)
    if "HEAD" in os.environ:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key.startswith("head."))
    if first := os.environ.get("HANGS"):
        hang(store.Store, first)
    stage = PretrainConfig(fused="FUSED" in os.environ)
    decides = {"data": data.fingerprint, "lr": os.environ.get("LR", "3e-4")}
    fork = "FORK" in os.environ
    with (
        distributed.join(int(os.environ.get("TIMEOUT_S", 60))) as world,
        attempts.attempt(store.of(name), stage, world, decides, fork) as attempt,
    ):
        print(f"ranks {world.size}", flush=True)
        wanted = recipe(int(steps), int(micro_batch) if micro_batch else None, sharding=sharding)
        memory.prepare(model, wanted, stage, 32, world)
        fit(
            model,
            wanted,
            data,
            View(resize=40, crop=32, flips=True, crops=True),
            world,
            name=name,
            attempt=attempt,
            decides=decides,
            fork=fork,
            record=lambda figures, step: print(f"recorded {step}", flush=True),
        )
        if world.is_main:
            npz.save(model, Path(weights))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type] sharding is one of its choices
