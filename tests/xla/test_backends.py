"""The same loop on every kind of device that is here: the processor, a GPU where there is one, XLA in `make test-xla`.

The eager processor is what the others are held against.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from training.data.batches import Batch
from training.engine import backends
from training.engine.checkpoint import Checkpoints
from training.engine.distributed import World
from training.engine.loop import train
from training.engine.recipe import Recipe
from training.engine.store import Store
from training.models import zoo
from training.models.resnet import ResNet

KINDS = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["xla"] if find_spec("torch_xla") else [])]
STEPS = 30
RECIPE = Recipe(
    steps=STEPS,
    global_batch=8,
    micro_batch=4,
    lr=lambda step: 3e-4 * min(1.0, step / 6),
    weight_decay=1e-4,
    mixup_alpha=0.2,
    multi_label=False,
    precision="fp32",
    seed=5,
    evaluate_every=1,
    checkpoint_every=10,
)


class Colours:
    """A stream of pictures whose colour is their class: what the loop needs of one, without a dataset."""

    def prefetch(self, start: int, stop: int, num_micro: int) -> Iterator[Batch]:
        size = RECIPE.global_batch // num_micro
        for step in range(start, stop):
            for micro in range(num_micro):
                rng = np.random.default_rng((step, micro))
                targets = rng.integers(0, 3, size)
                images = rng.integers(0, 160, (size, 32, 32, 3), dtype=np.uint8)
                images[np.arange(size), :, :, targets] += 90
                yield Batch(images, targets, np.arange(size), 32)


def device_of(kind: str) -> torch.device:
    if kind == "xla":
        import torch_xla

        return torch_xla.device()
    return torch.device(kind)


def trained(
    kind: str, name: str, recipe: Recipe = RECIPE, counts: list[int] | None = None
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss after every step, and the weights; counts: filled with the graphs compiled so far, step by step."""
    torch.manual_seed(0)
    model: ResNet = zoo.create("R14x0.5", 3)
    world = World(0, 1, device_of(kind))
    losses: list[float] = []

    def log(figures: dict[str, float], step: int) -> None:
        if "loss" in figures:  # not where the step was skipped
            losses.append(figures["loss"])
        if counts is not None:
            counts.append(world.backend.compilations())

    checkpoints = Checkpoints(Store(f"memory://{name}"), {})
    train(
        model,
        recipe,
        Colours(),  # type: ignore[arg-type]
        world,
        checkpoints=checkpoints,
        log=log,
        evaluate=dict,
        title="x",
    )
    return losses, {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}


for kind in KINDS:
    device_of(kind)  # before the first backward pass: autograd learns of devices only once


@pytest.fixture(scope="module")
def eager() -> tuple[list[float], dict[str, np.ndarray]]:
    return trained("cpu", "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_are_those_of_the_eager_processor(kind: str, eager: tuple) -> None:
    losses, weights = trained(kind, f"same-{kind}")
    np.testing.assert_allclose(losses, eager[0], rtol=1e-3)
    for key, wanted in eager[1].items():
        scale = max(1.0, float(np.abs(wanted).max()))
        assert float(np.abs(weights[key] - wanted).max()) <= 1e-3 * scale, key


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_after_step_3(kind: str) -> None:
    counts: list[int] = []
    trained(kind, f"compiled-{kind}", replace(RECIPE, checkpoint_every=1_000), counts)
    assert len(counts) == STEPS
    assert counts[2:] == [counts[2]] * (STEPS - 2), counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_kind_continues_on_another(kind: str, eager: tuple) -> None:
    trained(kind, f"moved-{kind}", replace(RECIPE, steps=20))
    store = Store(f"memory://moved-{kind}")
    store.remove("step-00000020")  # the last one; go on from step 10, on the processor
    losses, _ = trained("cpu", f"moved-{kind}")
    np.testing.assert_allclose(losses, eager[0][10:], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_gradients_are_skipped(kind: str) -> None:
    _, before = trained("cpu", f"start-{kind}", replace(RECIPE, steps=1, lr=lambda step: 0.0))
    recipe = replace(RECIPE, steps=3, max_grad_norm=1e-9, max_skipped_steps=3)
    losses, weights = trained(kind, f"skipped-{kind}", recipe)
    assert losses == []
    assert all(np.allclose(before[key], weights[key]) for key in before)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_told(kind: str) -> None:
    backend = backends.of(device_of(kind))
    assert backend.peak_bytes() > 0
    assert backend.free_bytes() > 0
