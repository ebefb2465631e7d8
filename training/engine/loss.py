"""What one micro-batch costs: its loss, with mixup, and the size of a gradient."""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from training.data.augment import Draw
from training.data.batches import Batch
from training.engine.backends import Backend
from training.engine.recipe import Recipe
from training.models.resnet import normalize


def loss_of(model: torch.nn.Module, batch: Batch, recipe: Recipe, lam: float, backend: Backend) -> torch.Tensor:
    """Loss summed over a micro-batch.

    With mixup every example is mixed with its neighbour in the stream (0 with 1, 2 with 3, …). The stream is shuffled, so
    that is as random as a permutation, but it stays the same however the global batch is split.
    """
    device = backend.device
    pixels = torch.from_numpy(batch.images).to(device, non_blocking=True)
    if batch.drawn is not None:
        pixels = crop_and_flip(pixels, batch.drawn, batch.crop)
    images = normalize(pixels)
    targets = torch.from_numpy(batch.targets).to(device, non_blocking=True)
    weight = backend.scalar(lam)
    if lam != 1.0:
        images = weight * images + (1 - weight) * neighbours(images)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = model(images)
    logits = logits.float()

    def against(wanted: torch.Tensor) -> torch.Tensor:
        if recipe.multi_label:
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return F.cross_entropy(logits, wanted, reduction="sum")

    loss = against(targets)
    return loss if lam == 1.0 else weight * loss + (1 - weight) * against(neighbours(targets))


def neighbours(tensor: torch.Tensor) -> torch.Tensor:
    """Rows 0 and 1, 2 and 3, … exchanged: [N, …] → [N, …], N even."""
    return tensor.view(-1, 2, *tensor.shape[1:]).flip(1).reshape(tensor.shape)


def grad_norm(parameters: list[torch.nn.Parameter]) -> float:
    """The 2-norm of the whole gradient, over all shards."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=None)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def crop_and_flip(pictures: torch.Tensor, drawn: Draw, crop: int) -> torch.Tensor:
    """uint8 [n, R, R, 3] → [n, crop, crop, 3] on the device: one gather, the bytes that data/augment.py makes."""
    device, ahead = pictures.device, torch.arange(crop)
    rows = torch.from_numpy(drawn.top)[:, None] + ahead
    columns = torch.from_numpy(drawn.left)[:, None] + torch.where(
        torch.from_numpy(drawn.flip)[:, None], crop - 1 - ahead, ahead
    )
    each = torch.arange(len(pictures), device=device)[:, None, None]
    return pictures[each, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
