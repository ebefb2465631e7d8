"""One training from dataset to trained network: the stream, the loop, the evaluation and the checkpoints put together."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from training.data.batches import Stream
from training.data.shards import Dataset
from training.engine import inference
from training.engine.checkpoint import Checkpoints
from training.engine.distributed import World
from training.engine.loop import Log, Recipe, train
from training.models.resnet import ResNet

History = dict[str, list[tuple[int, float]]]  # figure → (optimizer steps done, value)


@dataclass(frozen=True)
class View:
    """How pictures are seen: squashed to resize × resize, cropped to crop × crop; evaluation squashes to crop × crop."""

    resize: int
    crop: int
    flips: bool
    crops: bool
    area: bool = False  # crops by area out of the whole picture, as upstream recipes draw them


def fit(
    model: ResNet, recipe: Recipe, data: Dataset, view: View, world: World, *, name: str, fingerprint: str, record: Log
) -> History:
    """Trains `model` in place on the split `train`, evaluating on `test`; returns every recorded figure.

    name: of this training, for progress and for the folder of its checkpoints; fingerprint: hash of all that decides the
    result; record: where figures go as they come. An interrupted training with the same name and fingerprint is continued.
    """
    test = data.split("test")
    targets = test.targets()
    history: History = defaultdict(list)

    def evaluate() -> dict[str, float]:
        answers = inference.predict(model, test, view.crop, recipe.micro_batch or recipe.global_batch, data.multi_label)
        return inference.score(answers, targets)

    def log(figures: dict[str, float], step: int) -> None:
        record(figures, step)
        for figure, value in figures.items():
            history[figure].append((step, value))

    stream = Stream(
        data.split("train"),
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        resize=view.resize,
        crop=view.crop,
        flips=view.flips,
        crops=view.crops,
        by_area=view.area,
        rank=world.rank,
        world_size=world.size,
    )
    checkpoints = Checkpoints(Path(".checkpoints", name, fingerprint), fingerprint)
    train(model, recipe, stream, world, checkpoints=checkpoints, log=log, evaluate=evaluate, title=name)
    world.barrier()
    if world.is_main:
        checkpoints.clear()
    return history
