"""Networks that transfer starts from: the project's own, smaller or mislabelled ones trained here, published ones."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training import pretrain, receipt
from training.config import Config, ConfigError
from training.data.dataset import Dataset
from training.engine import memory
from training.engine.distributed import World
from training.engine.fit import fit
from training.models import exchange, npz, zoo
from training.study import draws
from training.study.suites import Suite, Upstream


@dataclass(frozen=True)
class Start:
    """path: the weights, None for fresh filters; sha256: of the weights; pictures: how many they were trained on."""

    path: Path | None
    sha256: str
    pictures: int | None


def ready(upstream: Upstream, suite: Suite, config: Config, work: Path, world: World) -> Start:
    """The weights of an upstream: found where they are, trained or fetched where they are not."""
    if upstream.published:
        return _published(upstream, config, work)
    if upstream.share == 0:
        return Start(None, f"fresh {upstream.arch}", 0)
    if own := _own(upstream, suite, config):
        return own
    return _trained(upstream, suite, config, work, world)


def _own(upstream: Upstream, suite: Suite, config: Config) -> Start | None:
    """What the stage `pretrain` made, where it is just this upstream."""
    if upstream.share < 1 or upstream.noise or suite.upstream_steps or not Path("runs/pretrain/receipt.json").is_file():
        return None
    made = receipt.read("pretrain")
    if made.details["arch"] != upstream.arch or made.config_hash != receipt.hash_of(config.pretrain, config.upstream):
        return None
    weights = made.outputs["weights"]
    return Start(receipt.local(weights), weights.sha256, None if config.upstream.weights else _pictures(1.0))


def _trained(upstream: Upstream, suite: Suite, config: Config, work: Path, world: World) -> Start:
    whole = Dataset.open(receipt.read("pack").outputs["dataset"].uri)
    seed = config.pretrain.seed
    data = draws.upstream(whole, upstream.share, upstream.noise, seed)
    stage = config.pretrain
    if stage.recipe is None:  # as many epochs as the whole has, unless the suite says how many steps
        steps = suite.upstream_steps or max(1, round((stage.steps or 1) * upstream.share))
        warmup = round(stage.warmup_steps * steps / (stage.steps or steps))
        stage = stage.model_copy(update={"steps": steps, "warmup_steps": warmup})
    decides = stage.decisive() | {"arch": upstream.arch, "data": data.fingerprint}
    path = work / f"upstream-{receipt.hash_of(str(decides))}.npz"
    if not path.is_file():
        recipe, view = pretrain.planned(stage, len(data.split("train")), data.multi_label)
        recipe = replace(recipe, evaluate_every=recipe.steps)
        torch.manual_seed(seed)
        model = zoo.create(upstream.arch, data.num_classes)
        torch.nn.init.constant_(model.head.bias, pretrain.starting_bias(stage, data.multi_label))
        recipe = memory.prepare(model, recipe, stage, view.crop, world)
        fit(model, recipe, data, view, world, name=f"benchmark-{path.stem}", decides=decides, record=lambda *_: None)
        npz.save(model, path)
    return Start(path, receipt.artifact(path).sha256, len(data.split("train")))


def _published(upstream: Upstream, config: Config, work: Path) -> Start:
    row = next(row for row in config.benchmark.published if row.name == upstream.published)
    suffix = Path(row.weights).suffix or ".npz"
    path = work / f"published-{receipt.hash_of(row.weights, row.sha256)}-{row.arch}.npz"
    if not path.is_file():
        fetched = path.with_name(f"{path.stem}.fetched{suffix}")
        exchange.fetch(row.weights, fetched, row.sha256)
        exchange.convert(fetched, path, row.arch)
        fetched.unlink()
    found = npz.arch_of(path)
    if found != row.arch:
        raise ConfigError(f"benchmark.published: {row.name!r} is of arch {found}, not {row.arch}.")
    return Start(path, receipt.artifact(path).sha256, row.pictures)


def _pictures(share: float) -> int | None:
    try:
        return round(share * receipt.read("pack").metrics["train_examples"])
    except ConfigError:
        return None
