"""`bit benchmark`: transfer measured by the paper's protocols → a tidy CSV, a plot, a Markdown table.

    bit benchmark --suite demo

Few-shot transfer from several sizes of upstream, by ridge regression on features and by fine-tuning; each figure is the median ±
standard deviation over the seeds, which draw both the examples and the order. Runs that results.csv holds are not repeated.
"""

import csv
import hashlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from training import finetune, plots, pretrain, receipt, tracking
from training.config import Config, ConfigError
from training.data.shards import Dataset
from training.engine import distributed
from training.engine.fit import View, fit
from training.models import npz, zoo
from training.models.resnet import ResNet
from training.study import draws, probe
from training.study.datasets import DATASETS, opened

OUT = Path("runs/benchmark")


@dataclass(frozen=True)
class Suite:
    """What is measured. shares: parts of the upstream data, 0 for fresh filters; tuned: shares that are also fine-tuned."""

    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    shares: tuple[float, ...]
    tuned: tuple[float, ...]
    seeds: int = 3
    steps: int | None = None  # of fine-tuning; None is the HyperRule's


SUITES = {
    "demo": Suite(("digits", "textures"), (1, 5, 10, 25), (0.0, 0.1, 1.0), (1.0,), steps=100),
    "few-shot": Suite(("cifar10", "cifar100", "pets", "flowers"), (1, 5, 10, 25, 100), (1.0,), (1.0,)),
}


@dataclass(frozen=True)
class Unit:
    """One run: a method on a draw of a dataset, from an upstream that saw `share` of its data."""

    dataset: str
    method: str
    share: float
    shots: int
    seed: int


def units(suite: Suite) -> Iterator[Unit]:
    for share in suite.shares:
        for dataset in suite.datasets:
            for shots in suite.shots:
                for seed in range(suite.seeds):
                    yield Unit(dataset, "ridge", share, shots, seed)
                    if share in suite.tuned:
                        yield Unit(dataset, "finetune", share, shots, seed)


def main(config: Config, name: str, out: Path = OUT) -> None:
    """Runs what is left of a suite, then writes its plot and table. Raises ConfigError for an unknown suite or absent data."""
    if name not in SUITES:
        raise ConfigError(f"suite={name!r} is not known. Choices: {', '.join(SUITES)}.")
    suite = SUITES[name]
    data = {dataset: opened(dataset) for dataset in suite.datasets}
    path = out / name / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read(path)
    left = [unit for unit in units(suite) if unit not in done]
    networks: dict[float, Path | None] = {}
    with tracking.start(config.tracking_uri, "benchmark", None, {"suite": name}, {}) as parent:
        for unit in left:
            if unit.share not in networks:
                networks[unit.share] = upstream(config, unit.share, out)
            tags = {"mlflow.parentRunId": parent.run_id}
            with tracking.start(config.tracking_uri, "benchmark", None, asdict(unit), tags) as run:
                accuracy = measure(config, suite, unit, data[unit.dataset], networks[unit.share])
                run.metrics({"accuracy": accuracy})
            append(path, unit, accuracy)
            print(f"{unit}: {accuracy:.1%}", file=sys.stderr)
        write_report(name, suite, read(path), path.parent)
        for file in (path, path.with_name("table.md"), path.with_name("few_shot.png")):
            parent.artifact(file)


def upstream(config: Config, share: float, out: Path) -> Path | None:
    """Weights of the network that saw `share` of the upstream pictures, for as many epochs; None for fresh filters."""
    if share == 0:
        return None
    trained = receipt.read("pretrain")
    if share == 1:
        return receipt.local(trained.outputs["weights"])
    path = out / f"upstream-{share:g}-{trained.outputs['weights'].sha256[:12]}.npz"
    if not path.is_file():
        whole = Dataset.open(receipt.read("pack").outputs["dataset"].uri)
        data = draws.part(whole, share, config.pretrain.seed)
        recipe, view = pretrain.planned(config.pretrain, len(data.split("train")), data.multi_label)
        if config.pretrain.recipe is None:
            steps = max(1, round(recipe.steps * share))
            stage = config.pretrain.model_copy(
                update={"steps": steps, "warmup_steps": round(config.pretrain.warmup_steps * share)}
            )
            recipe, view = pretrain.planned(stage, len(data.split("train")), data.multi_label)
        torch.manual_seed(config.pretrain.seed)
        model = zoo.create(config.upstream.arch, data.num_classes)
        train(model, recipe, data, view, f"benchmark-upstream-{share:g}")
        npz.save(model, path)
    return path


def measure(config: Config, suite: Suite, unit: Unit, base: Dataset, weights: Path | None) -> float:
    """Test accuracy of one unit."""
    data, row = draws.few_shot(base, unit.shots, unit.seed), DATASETS[unit.dataset]
    torch.manual_seed(unit.seed)
    model = zoo.create(config.upstream.arch, data.num_classes)
    if weights:
        npz.load(model, weights, head=False)
    stage = config.finetune.model_copy(update={"seed": unit.seed, "steps": suite.steps or config.finetune.steps})
    rule = finetune.rule_for(stage, data)
    if unit.method == "ridge":
        return probe.accuracy(model, data, rule.crop)
    recipe = finetune.recipe_for(stage, rule, data.multi_label)
    view = View(rule.resize, rule.crop, row.flips, row.crops)
    return train(model, recipe, data, view, f"benchmark-{unit.dataset}")


def train(model: ResNet, recipe: finetune.Recipe, data: Dataset, view: View, name: str) -> float:
    """Its checkpoints lie under a name of their own: an interrupted unit is never taken for another."""
    start = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
    decides = {"data": data.fingerprint, "start": start, "seed": recipe.seed, "steps": recipe.steps, "view": view}
    own = f"{name}-{receipt.hash_of(*map(str, decides.values()))}"
    with distributed.join() as world:
        history = fit(model, recipe, data, view, world, name=own, decides=decides, record=lambda *_: None)
    return history["test_accuracy"][-1][1]


def read(path: Path) -> dict[Unit, float]:
    """results.csv: what was measured so far."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            Unit(r["dataset"], r["method"], float(r["share"]), int(r["shots"]), int(r["seed"])): float(r["accuracy"])
            for r in csv.DictReader(file)
        }


def append(path: Path, unit: Unit, accuracy: float) -> None:
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow([*(field.name for field in fields(Unit)), "accuracy"])
        writer.writerow([*asdict(unit).values(), f"{accuracy:.6f}"])


def write_report(name: str, suite: Suite, results: dict[Unit, float], folder: Path) -> None:
    """table.md and few_shot.png from the results."""
    grouped: dict[tuple[str, str, float, int], list[float]] = defaultdict(list)
    for unit, accuracy in results.items():
        grouped[unit.dataset, unit.method, unit.share, unit.shots].append(accuracy)
    rows = sorted({key[:3] for key in grouped})
    head = " | ".join(f"{shots} per class" for shots in suite.shots)
    lines = [f"| dataset | method | upstream | {head} |", "| --- " * (3 + len(suite.shots)) + "|"]
    series: dict[str, dict[str, list[tuple[int, float, float]]]] = defaultdict(dict)
    for dataset, method, share in rows:
        label = "fresh filters" if share == 0 else f"{share:.0%}"
        cells = []
        for shots in suite.shots:
            values = grouped[dataset, method, share, shots]
            middle, spread = statistics.median(values), statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{100 * middle:.1f} ± {100 * spread:.1f}")
            series[dataset].setdefault(f"{method}, {label}", []).append((shots, middle, spread))
        lines.append(f"| {dataset} | {method} | {label} | {' | '.join(cells)} |")
    told = f"Median ± standard deviation of {suite.seeds} seeds, test accuracy in percent; suite `{name}`."
    (folder / "table.md").write_text("\n".join([*lines, "", told]) + "\n")
    plots.few_shot(series, folder / "few_shot.png")
