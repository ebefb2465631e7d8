"""Stage `finetune`: a tenant's shards + upstream weights → the tenant's own network, by the HyperRule, with nothing to tune.

    bit finetune digits

500 steps of batch 512 for fewer than 20,000 examples. With `finetune.scratch: true` the same network is also trained from
scratch by the same rule, so that the gain of transfer is a measured figure.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from training import plots, receipt, tracking
from training.config import Config, FinetuneConfig
from training.data.dataset import Dataset
from training.engine import attempts, distributed, memory, store
from training.engine import recipe as recipes
from training.engine.fit import History, View, fit
from training.engine.profile import Profile
from training.engine.recipe import Recipe
from training.hyperrule import HyperRule
from training.models import npz, zoo
from training.models.resnet import ResNet

STAGE = "finetune"
TRANSFER, SCRATCH = "transfer", "scratch"


def main(
    config: Config, tenant: str, fork: bool = False, profile: int = 0, deliver: Callable[[], None] = lambda: None
) -> None:
    """Fine-tunes the upstream network for one tenant and writes the stage's receipt.

    fork: start from the weights of an interrupted training whose values differ, instead of refusing it; profile: steps whose
    trace is written to trace.json; deliver: called when the receipt is written and the checkpoints are still there, for they go
    only when the result has arrived.
    """
    called = time.monotonic()
    packed, upstream = receipt.read("pack", tenant), receipt.read("pretrain")
    data = Dataset.open(packed.outputs["dataset"].uri)
    arch, weights = str(upstream.details["arch"]), upstream.outputs["weights"]
    rule = rule_for(config.finetune, data)
    recipe = recipe_for(config.finetune, rule, data.multi_label)
    view = View(rule.resize, rule.crop, config.finetune.flips, config.finetune.crops)
    out = receipt.folder(STAGE, tenant)
    out.mkdir(parents=True, exist_ok=True)

    inputs = packed.inputs | {"data": data.fingerprint, "upstream": weights.sha256}
    params = {STAGE: config.finetune.model_dump(), "hyperrule": asdict(rule), "arch": arch}
    decides = config.finetune.decisive() | asdict(rule) | inputs | {"arch": arch}
    outputs: dict[str, receipt.Artifact] = {}
    metrics: dict[str, float] = {}
    histories: dict[str, History] = {}
    with (
        distributed.join(config.finetune.timeout_s) as world,
        attempts.attempt(store.of(tenant), config.finetune, world, decides, fork) as attempt,
        tracking.start(
            *(config.tracking_uri, STAGE, tenant, params, inputs),
            active=world.is_main,
            resume=attempt.record.run_id,
            outbox=attempt.folder,
        ) as run,
    ):
        attempt.bind(run.run_id)
        for start in (TRANSFER, SCRATCH) if config.finetune.scratch else (TRANSFER,):
            torch.manual_seed(config.finetune.seed)
            if start == TRANSFER:
                model = adopted(arch, data.num_classes, receipt.local(weights), weights.sha256)
            else:
                model = zoo.create(arch, data.num_classes)
            fitted = memory.prepare(model, recipe, config.finetune, rule.crop, world)
            began = time.perf_counter()
            histories[start] = fit(
                *(model, fitted, data, view, world),
                name=f"{tenant}-{start}",
                decides=decides,
                record=run.metrics if start == TRANSFER else run.metrics_of(SCRATCH),
                fork=fork,
                attempt=attempt,
                folder=start,
                profile=Profile(out / "trace.json", profile if world.is_main and start == TRANSFER else 0),
            )
            metrics[f"{start}_seconds"] = time.perf_counter() - began
            metrics[f"{start}_loss"] = histories[start]["loss"][-1][1]
            if start == TRANSFER and attempt.first_step_at:
                metrics["first_step_seconds"] = attempt.first_step_at - called
            metrics["memory_peak_gb"] = world.backend.peak_bytes() / 1e9
            if world.is_main:
                npz.save(model, out / f"{start}.npz")
                outputs[start] = receipt.artifact(out / f"{start}.npz")
        if world.is_main:
            run.delivered()
            plots.learning_curves(histories, out / "learning_curves.png")
            run.artifact(out / "learning_curves.png", "plots")
            receipt.Receipt(
                stage=STAGE,
                tenant=tenant,
                config_hash=receipt.hash_of(config.finetune),
                inputs=inputs,
                run_id=run.run_id,
                outputs=outputs,
                metrics=metrics,
                details={
                    "arch": arch,
                    "hyperrule": asdict(rule),
                    "deviations": deviations(config.finetune),
                    "upstream_version": upstream.details["version"],
                },
            ).write(out)
            deliver()


def rule_for(stage: FinetuneConfig, data: Dataset) -> HyperRule:
    """The HyperRule of a dataset, with the deviations that the tenant's parameters state."""
    sizes = data.index["sizes"]
    width, height = sizes["median_width"], sizes["median_height"]
    rule = HyperRule.of(len(data.split("train")), width, height, stage.preset)
    if stage.steps is not None:
        rule = rule.with_steps(stage.steps)
    stated: dict[str, Any] = {
        "resize": stage.resize,
        "crop": stage.crop,
        "batch_size": stage.global_batch,
        "base_lr": stage.lr,
        "weight_decay": stage.weight_decay,
        "mixup_alpha": stage.mixup_alpha,
    }
    return replace(rule, **{name: value for name, value in stated.items() if value is not None})


def deviations(stage: FinetuneConfig) -> dict[str, Any]:
    """What the tenant's parameters set in place of the HyperRule's values."""
    rule_keys = ("resize", "crop", "steps", "global_batch", "lr", "weight_decay", "mixup_alpha")
    stated = {key: getattr(stage, key) for key in rule_keys if getattr(stage, key) is not None}
    return stated | {key: False for key in ("flips", "crops") if not getattr(stage, key)}


def recipe_for(stage: FinetuneConfig, rule: HyperRule, multi_label: bool) -> Recipe:
    return recipes.of(
        stage,
        steps=rule.steps,
        global_batch=rule.batch_size,
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        mixup_alpha=rule.mixup_alpha,
        multi_label=multi_label,
        momentum=rule.momentum,
    )


def adopted(arch: str, num_classes: int, weights: Path, sha256: str) -> ResNet:
    """The upstream network with a head of zeros; read once for all tenants that one process fine-tunes."""
    model = zoo.empty(arch, num_classes)
    model.load_state_dict(_upstream(arch, weights, sha256), strict=False)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    return model


@lru_cache(maxsize=1)
def _upstream(arch: str, weights: Path, sha256: str) -> dict[str, torch.Tensor]:
    body = npz.load(zoo.empty(arch, 1), weights, head=False).state_dict()
    return {name: tensor for name, tensor in body.items() if not name.startswith("head.")}
