"""Answers of a network on a whole split, by torch: what evaluation and the export's parity check compare with."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from training.config import Precision
from training.data.batches import eval_batches
from training.data.dataset import Split
from training.engine import backends
from training.engine.distributed import World
from training.models.resnet import ResNet, normalize

ROWS = 4_096  # answers that are judged at once: intermediate results are as large as the answers
EPS = 1e-7  # no answer counts as surer: log_loss stays finite


@torch.inference_mode()
def predict(model: ResNet, split: Split, size: int, batch_size: int, multi_label: bool) -> NDArray[np.float32]:
    """Probabilities [n, C] in the split's order, in the host's memory; pictures are squashed to size × size."""
    found = np.empty((len(split), model.num_classes), np.float32)
    for answers, _, indices in _answers(model, split, size, batch_size, multi_label):
        found[indices] = answers.cpu().numpy()
    return found


@torch.inference_mode()
def measure(
    model: ResNet, split: Split, size: int, batch_size: int, multi_label: bool, world: World, precision: Precision
) -> dict[str, float]:
    """What `score` says of the answers to a split, without keeping them: each rank takes every so manieth picture.

    precision: of the network, as in training.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for answers, targets, _ in _answers(model, split, size, batch_size, multi_label, world, precision):
        right, losses = _judged(answers, torch.from_numpy(targets).to(answers.device))
        sums += torch.stack([right.sum(dtype=torch.float64), losses.sum(dtype=torch.float64)])
    accuracy, log_loss = (world.sum(sums) / len(split)).tolist()
    return {"accuracy": accuracy, "log_loss": log_loss}


def _answers(
    model: ResNet,
    split: Split,
    size: int,
    batch_size: int,
    multi_label: bool,
    world: World | None = None,
    precision: Precision = "fp32",
) -> Iterator[tuple[torch.Tensor, NDArray[Any], NDArray[np.int64]]]:
    """(probabilities [n, C] on the device, targets, indices) of this rank's batches."""
    device = next(model.parameters()).device
    backend = backends.of(device)
    model.eval()
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    for images, targets, indices in eval_batches(split, size, batch_size, rank, ranks):
        count = len(images)
        if device.type == "xla":  # another shape would be another graph to compile
            images = np.pad(images, ((0, batch_size - count), (0, 0), (0, 0), (0, 0)))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = logits_of(model, torch.from_numpy(images).to(device))
        backend.finish_step()
        logits = logits[:count].float()
        yield torch.sigmoid(logits) if multi_label else torch.softmax(logits, 1), targets, indices
        backend.finish_step()


def logits_of(model: ResNet, pixels_nhwc: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] → logits [n, C]; in halves where the whole does not fit into the device's memory."""
    try:
        return model(normalize(pixels_nhwc))
    except torch.OutOfMemoryError:
        if len(pixels_nhwc) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([logits_of(model, half) for half in pixels_nhwc.tensor_split(2)])


def score(probabilities: NDArray[np.float32], targets: NDArray[Any]) -> dict[str, float]:
    """accuracy (several labels a picture: the share of exactly right label sets) and log_loss over [n, C] answers."""
    parts = zip(torch.from_numpy(probabilities).split(ROWS), torch.from_numpy(targets).split(ROWS), strict=True)
    right, losses = (torch.cat(figures).double() for figures in zip(*(_judged(*part) for part in parts), strict=True))
    return {"accuracy": float(right.mean()), "log_loss": float(losses.mean())}


def _judged(probabilities: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers [n, C] and targets [n] or [n, C] → whether each is right, and its loss, both [n]."""
    clipped = probabilities.clamp(EPS, 1 - EPS)
    if targets.ndim == 2:
        right = ((probabilities > 0.5) == (targets > 0.5)).all(1)
        return right, F.binary_cross_entropy(clipped, targets, reduction="none").sum(1)
    chosen = clipped.gather(1, targets[:, None])[:, 0]
    return probabilities.argmax(1) == targets, -chosen.log()
