"""Stage `pretrain`: shards → the upstream network that every tenant starts from, registered as `bit-upstream`.

    bit pretrain --set pretrain.steps=3000        (torchrun --nproc-per-node 4 -m training pretrain on several devices)

With `upstream.weights` set, published weights are adopted instead of training. On the demo data (124 classes, R14x0.5, 2,000
steps) this takes 1.5 to 3 minutes on 2 cores.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from training import plots, receipt, recipes, tracking
from training.config import Config, PretrainConfig
from training.data.dataset import Dataset
from training.engine import attempts, distributed, memory, recipe, store
from training.engine.fit import View, fit
from training.engine.profile import Profile
from training.engine.recipe import Recipe
from training.models import archs, exchange, npz, zoo
from training.schedules import staircase

STAGE = "pretrain"


def main(config: Config, fork: bool = False, profile: int = 0, deliver: Callable[[], None] = lambda: None) -> None:
    """Trains or adopts the upstream network, registers it and writes the stage's receipt.

    fork: start from the weights of an interrupted training whose values differ, instead of refusing it; profile: steps whose
    trace is written to trace.json; deliver: called when the receipt is written and the checkpoints are still there, for they go
    only when the result has arrived.
    """
    out = receipt.folder(STAGE)
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "weights.npz"
    if config.upstream.weights:
        _adopt(config, weights)
        deliver()
    else:
        _train(config, weights, fork, profile, deliver)


def _train(config: Config, weights: Path, fork: bool, profile: int, deliver: Callable[[], None]) -> None:
    """The network trained on the packed upstream pictures."""
    packed = receipt.read("pack")
    data = Dataset.open(packed.outputs["dataset"].uri)
    stage = config.pretrain
    plan, view = planned(stage, len(data.split("train")), data.multi_label)
    torch.manual_seed(stage.seed)
    model = zoo.create(config.upstream.arch, data.num_classes)
    torch.nn.init.constant_(model.head.bias, starting_bias(stage, data.multi_label))
    inputs = packed.inputs | {"data": data.fingerprint}
    params = config.model_dump(include={STAGE, "upstream"})
    decides = stage.decisive() | {"arch": config.upstream.arch, "data": data.fingerprint}
    with (
        distributed.join(stage.timeout_s) as world,
        attempts.attempt(store.of("upstream"), stage, world, decides, fork) as attempt,
        tracking.start(
            *(config.tracking_uri, STAGE, None, params, inputs),
            active=world.is_main,
            resume=attempt.record.run_id,
            outbox=attempt.folder,
        ) as run,
    ):
        attempt.bind(run.run_id)
        plan = memory.prepare(model, plan, stage, view.crop, world)
        history = fit(
            *(model, plan, data, view, world),
            name="upstream",
            decides=decides,
            record=run.metrics,
            fork=fork,
            attempt=attempt,
            profile=Profile(weights.with_name("trace.json"), profile if world.is_main else 0),
        )
        if world.is_main:
            npz.save(model, weights)
            run.delivered()
            plots.learning_curves({"upstream": history}, weights.with_name("learning_curves.png"))
            run.artifact(weights.with_name("learning_curves.png"), "plots")
            metrics = {name: values[-1][1] for name, values in history.items() if name.startswith(("test_", "loss"))}
            metrics["memory_peak_gb"] = world.backend.peak_bytes() / 1e9
            _register(config, weights, run, inputs, metrics)
            deliver()


def planned(stage: PretrainConfig, num_examples: int, multi_label: bool) -> tuple[Recipe, View]:
    """How `num_examples` pictures are trained on and seen: the recipe's values, and those that params.yaml states."""
    plan = stage.plan(num_examples)

    def own(key: str) -> bool:
        return stage.recipe is None or stage.stated(key)

    made = recipe.of(
        stage,
        steps=plan.steps,
        global_batch=plan.global_batch,
        lr=lambda step: staircase(step, plan.lr, plan.supports),
        weight_decay=stage.weight_decay if own("weight_decay") else recipes.WEIGHT_DECAY,
        mixup_alpha=stage.mixup_alpha,
        multi_label=multi_label,
    )
    crop = stage.crop if own("crop") else recipes.CROP
    by_area = stage.recipe is not None and stage.crops
    return made, View(max(stage.resize, crop), crop, stage.flips, stage.crops, by_area)


def starting_bias(stage: PretrainConfig, multi_label: bool) -> float:
    """The head's bias at step 0: with a sigmoid per class, nearly all answers begin (and are) negative."""
    if stage.head_bias is not None:
        return stage.head_bias
    return recipes.HEAD_BIAS if stage.recipe and multi_label else 0.0


def _register(
    config: Config, weights: Path, run: tracking.Run, inputs: dict[str, str], metrics: dict[str, float]
) -> None:
    """The weights as a new version of `bit-upstream`, and the receipt."""
    artifact = receipt.artifact(weights)
    run.artifact(weights, "weights")
    tags = {"sha256": artifact.sha256, "arch": config.upstream.arch, "stage": STAGE}
    version = run.register(tracking.UPSTREAM_MODEL, "weights", tags)
    receipt.Receipt(
        stage=STAGE,
        tenant=None,
        config_hash=receipt.hash_of(config.pretrain, config.upstream),
        inputs=inputs,
        run_id=run.run_id,
        outputs={"weights": artifact},
        metrics=metrics,
        details={"arch": config.upstream.arch, "version": version, "model": tracking.UPSTREAM_MODEL},
    ).write(weights.parent)


def _adopt(config: Config, weights: Path) -> None:
    """Published weights, checked key by key and value by value, instead of a training of our own."""
    source = config.upstream.weights
    assert source is not None
    fetched = weights.with_name(f"published{Path(source).suffix or '.npz'}")
    digest = exchange.fetch(source, fetched, config.upstream.sha256)
    if config.upstream.sha256 is None:
        print(f"upstream.weights has sha256 {digest}; pin it as upstream.sha256 in params.yaml")
    try:
        exchange.convert(fetched, weights, config.upstream.arch, "published")
    finally:
        fetched.unlink()
    params = {"upstream": config.upstream.model_dump()}
    inputs = {"weights": digest, "dvc.md5": "published"}
    count = archs.num_parameters(config.upstream.arch, npz.num_classes(weights))
    with tracking.start(config.tracking_uri, STAGE, None, params, inputs) as run:
        _register(config, weights, run, inputs, {"parameters": float(count)})
