"""One training from dataset to trained network: the stream, the loop, the evaluation and the checkpoints put together."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.data.batches import Stream
from training.data.dataset import Dataset
from training.engine import inference, store
from training.engine.attempts import Attempt, BudgetError
from training.engine.checkpoint import Checkpoints, within
from training.engine.distributed import World
from training.engine.loop import Log, train
from training.engine.profile import Profile
from training.engine.recipe import Recipe
from training.engine.signals import Preempted, grace_s
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
    model: ResNet,
    recipe: Recipe,
    data: Dataset,
    view: View,
    world: World,
    *,
    name: str,
    decides: Mapping[str, Any],
    record: Log,
    fork: bool = False,
    attempt: Attempt | None = None,
    folder: str = "",
    profile: Profile | None = None,
) -> History:
    """Trains `model` in place on the split `train`, evaluating on `test`; returns every recorded figure.

    name: of this training, for progress; decides: name → value of all that decides the result; record: where figures go as
    they come. An interrupted training is continued; where one of the values differs that is refused (CheckpointError), or with
    `fork` a new one starts from its weights. Checkpoints lie with the attempt, in `folder` of it, until the attempt has ended
    well; without one they lie under `name` and are removed at once.
    """
    test = data.split("test")
    history: History = defaultdict(list)

    def evaluate() -> dict[str, float]:
        size = recipe.largest_micro(world.size) * world.backend.evaluated
        return inference.measure(model, test, view.crop, size, data.multi_label, world, recipe.precision)

    def log(figures: dict[str, float], step: int) -> None:
        record(figures, step)
        for figure, value in figures.items():
            history[figure].append((step, value))

    def resumed() -> None:
        """Figures that another machine kept and could not deliver any more; those that arrived are left out on the way."""
        for figure, points in history.items():
            for step, value in points:
                record({figure: value}, step)

    stream = Stream(
        data.split("train"),
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        resize=view.resize,
        crop=view.crop,
        flips=view.flips,
        crops=view.crops,
        by_area=view.area,
        on_device=recipe.on_device,
        rank=world.rank,
        world_size=world.size,
        unit=recipe.unit,
        pinned=world.device.type == "cuda",
    )
    checkpoints = Checkpoints(
        (attempt.store.child(folder) if folder else attempt.store) if attempt else store.of(name),
        {key: str(value) for key, value in decides.items()},
        keep=recipe.keep_checkpoints,
        keep_every=recipe.keep_every,
        fork=fork,
        history=history,
        resumed=resumed if attempt else lambda: None,
    )
    try:
        train(
            model,
            recipe,
            stream,
            world,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate,
            title=name,
            attempt=attempt,
            profile=profile,
        )
    except BaseException as error:
        if not isinstance(error, Preempted | BudgetError):  # which have waited
            checkpoints.wait(within(grace_s()))
        raise
    world.barrier()
    if world.is_main and not attempt:
        checkpoints.clear()
    return history
