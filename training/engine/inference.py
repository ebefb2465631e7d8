"""Answers of a network on a whole split, by torch: what evaluation and the export's parity check compare with."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.batches import eval_batches
from training.data.dataset import Split
from training.engine.distributed import World
from training.models.resnet import ResNet, normalize


@torch.inference_mode()
def predict(
    model: ResNet, split: Split, size: int, batch_size: int, multi_label: bool, world: World | None = None
) -> NDArray[np.float32]:
    """Probabilities [n, C] in the split's order; pictures are squashed to size × size.

    world: its ranks share the work, each takes every so manieth picture, and all get all answers.
    """
    device = next(model.parameters()).device
    model.eval()
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    found = torch.zeros(len(split), model.num_classes, device=device)
    for images, _, indices in eval_batches(split, size, batch_size, rank, ranks):
        logits = logits_of(model, torch.from_numpy(images).to(device))
        rows = torch.from_numpy(indices).to(device)
        found[rows] = torch.sigmoid(logits) if multi_label else torch.softmax(logits, 1)
    return (world.sum(found) if world else found).cpu().numpy()


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
    eps = 1e-7
    clipped = np.clip(probabilities, eps, 1 - eps)
    if targets.ndim == 2:
        exact = ((probabilities > 0.5) == (targets > 0.5)).all(1)
        losses = -(targets * np.log(clipped) + (1 - targets) * np.log(1 - clipped)).sum(1)
        return {"accuracy": float(exact.mean()), "log_loss": float(losses.mean())}
    chosen = clipped[np.arange(len(targets)), targets.astype(np.int64)]
    right = probabilities.argmax(1) == targets
    return {"accuracy": float(right.mean()), "log_loss": float(-np.log(chosen).mean())}
