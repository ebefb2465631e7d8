"""Stage `evaluate`: a tenant's network on its test pictures → metrics, confusion matrix, the worst mistakes.

bit evaluate digits
"""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services import preprocess
from training import plots, receipt, tracking
from training.config import Config, ConfigError
from training.data.dataset import Dataset, Split
from training.engine import distributed, inference
from training.models import npz, zoo

STAGE = "evaluate"


def main(config: Config, tenant: str) -> None:
    """Evaluates every network that fine-tuning made (by transfer, from scratch) and writes the stage's receipt."""
    packed, tuned = receipt.read("pack", tenant), receipt.read("finetune", tenant)
    data = Dataset.open(packed.outputs["dataset"].uri)
    wanted = config.evaluate.split
    if wanted not in data.splits:
        raise ConfigError(f"evaluate.split={wanted!r} is not a split of the data. Choices: {', '.join(data.splits)}.")
    split, crop = data.split(wanted), int(tuned.details["hyperrule"]["crop"])
    targets = split.targets()
    out = receipt.folder(STAGE, tenant)
    out.mkdir(parents=True, exist_ok=True)

    inputs = tuned.inputs | {"weights": tuned.outputs["transfer"].sha256}
    params = {STAGE: config.evaluate.model_dump()}
    with (
        distributed.join() as world,
        tracking.start(config.tracking_uri, STAGE, tenant, params, inputs, active=world.is_main) as run,
    ):
        metrics: dict[str, float] = {}
        answers: dict[str, NDArray[np.float32]] = {}
        for start, artifact in tuned.outputs.items():
            model = npz.load(zoo.create(str(tuned.details["arch"]), data.num_classes), receipt.local(artifact)).to(
                world.device
            )
            batch_size = config.evaluate.batch_size
            answers[start] = inference.predict(model, split, crop, batch_size, data.multi_label)
            prefix = "" if start == "transfer" else f"{start}_"
            metrics |= {prefix + name: v for name, v in inference.score(answers[start], targets).items()}
        draw(answers["transfer"], split, data.classes, config.evaluate.worst, out)
        for path in sorted(out.glob("*.png")):
            run.artifact(path, "plots")
        run.metrics(metrics)
        receipt.Receipt(
            stage=STAGE,
            tenant=tenant,
            config_hash=receipt.hash_of(config.evaluate),
            inputs=inputs,
            run_id=run.run_id,
            metrics=metrics,
            details={"split": wanted, "num_examples": len(split)},
        ).write(out)


def draw(answers: NDArray[np.float32], split: Split, classes: list[str], worst: int, out: Path) -> None:
    """confusion.csv (for `dvc plots`), confusion_matrix.png and worst_mistakes.png; the latter by how sure the answer was.

    With several labels a picture there is no one true class: the mistakes are then the pictures with the largest loss.
    """
    targets = split.targets()
    if targets.ndim == 1:
        labels, top = targets.astype(np.int64), answers.argmax(1)
        plots.confusion_matrix(labels, top, classes, out / "confusion_matrix.png")
        with (out / "confusion.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["actual", "predicted"])
            writer.writerows([classes[a], classes[b]] for a, b in zip(labels, top, strict=True))
        wrong = np.flatnonzero(labels != top)
        order = wrong[np.argsort(-answers[wrong, top[wrong]], kind="stable")][:worst]
        captions = [f"{classes[labels[i]]} → {classes[top[i]]} {answers[i, top[i]]:.0%}" for i in order]
    else:
        distance = np.abs(answers - targets).max(1)
        order = np.argsort(-distance, kind="stable")[:worst]
        captions = [f"{', '.join(np.array(classes)[targets[i] > 0.5])[:24]} ({distance[i]:.0%} off)" for i in order]
    images = [preprocess.pixels(split.read(int(i)), 96) for i in order]
    plots.contact_sheet(images, captions, out / "worst_mistakes.png")
