"""How a network fits a device: fused operations, activations kept or computed twice, and the largest micro-batch.

None of it changes what is computed, beyond rounding: the global batch stays what it is.
"""

from dataclasses import replace

import torch

from training.config import Optimisation
from training.engine.distributed import World
from training.engine.recipe import Recipe
from training.models import fused
from training.models.resnet import ResNet

SHARE = 0.6  # of the free memory, for activations; the rest is workspace, gradients in flight and the data


def prepare(model: ResNet, recipe: Recipe, stage: Optimisation, crop: int, world: World) -> Recipe:
    """Sets `model` up as the stage's keys say; the recipe comes back with the micro-batch found where it is `auto`."""
    model.recompute = stage.activation_checkpointing
    if stage.fused is True or (stage.fused == "auto" and world.device.type == "cpu" and fused.compiler()):
        fused.fuse(model, world.device)
    if stage.micro_batch != "auto":
        return recipe
    model.to(world.device)
    return replace(recipe, micro_batch=find(model, recipe, crop, world))


def find(model: ResNet, recipe: Recipe, crop: int, world: World, free: float | None = None) -> int:
    """The largest micro-batch that memory allows on every rank: a divisor of a rank's share, even where mixup pairs pictures.

    free: bytes; default: what the device has.
    Estimated from what one pair of pictures keeps for backward; on a GPU tried too, and halved as long as it does not fit.
    """
    share = recipe.share(world.size)
    sizes = [size for size in range(share, 0, -1) if share % size == 0 and size % recipe.unit == 0]
    bf16 = recipe.precision == "bf16"
    if free is None:
        world.backend.give_back()
        free = world.backend.free_bytes()
    room = SHARE * free / picture_bytes(model, crop, bf16)
    for size in sizes[:-1]:
        too_large = size > room or (world.device.type == "cuda" and not _fits(model, size, crop, bf16))
        if not world.any(too_large):
            return size
    return sizes[-1]


def picture_bytes(model: ResNet, crop: int, bf16: bool) -> float:
    """Bytes that one picture's forward pass keeps for backward; weights, which it keeps too, are not counted."""
    device = next(model.parameters()).device
    kept: dict[int, int] = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
    count = 2
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 4 and len(tensor) == count:
            storage = tensor.untyped_storage()
            kept.setdefault(storage.data_ptr(), storage.nbytes())
            held.append(tensor)  # a freed address could come again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _forward(model, count, crop, bf16, device)
    return max(1.0, sum(kept.values()) / count)


def _forward(model: ResNet, count: int, crop: int, bf16: bool, device: torch.device) -> torch.Tensor:
    images = torch.zeros(count, 3, crop, crop, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits: torch.Tensor = model(images)
    return logits.float().sum()


def _fits(model: ResNet, size: int, crop: int, bf16: bool) -> bool:
    try:
        _forward(model, size, crop, bf16, next(model.parameters()).device).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
