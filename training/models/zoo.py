"""The table of architectures. A new one is a row.

Names are the paper's: R<depth>x<width factor>. R14x0.5 is the demo's: the same family with one unit a block at half width.
"""

import difflib
from dataclasses import dataclass

import torch
from torch import nn

from training.errors import UserError
from training.models.resnet import ResNet


class ArchError(UserError):
    """An architecture that the table lacks."""


@dataclass(frozen=True)
class Arch:
    """units: units per block; factor: width of every layer relative to the stem's 64 channels."""

    units: tuple[int, int, int, int]
    factor: float


ARCHS = {
    "R14x0.5": Arch((1, 1, 1, 1), 0.5),
    "R50x1": Arch((3, 4, 6, 3), 1),
    "R50x3": Arch((3, 4, 6, 3), 3),
    "R101x1": Arch((3, 4, 23, 3), 1),
    "R101x3": Arch((3, 4, 23, 3), 3),
    "R152x2": Arch((3, 8, 36, 3), 2),
    "R152x4": Arch((3, 8, 36, 3), 4),
}


def create(arch: str, num_classes: int) -> ResNet:
    """A network with fresh filters and a zero head. Raises ArchError for an arch that the table lacks."""
    if arch not in ARCHS:
        near = difflib.get_close_matches(arch, ARCHS, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArchError(f"arch={arch!r} is not in the zoo.{hint} Choices: {', '.join(ARCHS)}.")
    if num_classes < 1:
        raise ArchError(f"num_classes={num_classes}: a head needs at least one class.")
    row = ARCHS[arch]
    return ResNet(row.units, int(64 * row.factor), num_classes)


def outline(arch: str, num_classes: int) -> ResNet:
    """The network without memory behind its parameters: for counting, checking and tracing shapes."""
    with torch.device("meta"):
        return create(arch, num_classes)


def empty(arch: str, num_classes: int) -> ResNet:
    """The network with memory but no values, to be filled from a file: skips minutes of drawing for the largest."""
    model = outline(arch, num_classes)
    return model.to_empty(device="cpu")


def num_parameters(arch: str, num_classes: int) -> int:
    """Number of parameters, head included; computed from the table without allocating the network."""
    return sum(parameter.numel() for parameter in outline(arch, num_classes).parameters())


def gmac(arch: str, side: int, num_classes: int = 1000) -> float:
    """Multiply-accumulates of one picture of side × side pixels, in 10⁹: every convolution and the head."""
    model, total = outline(arch, num_classes), 0

    def count(layer: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        places = output.shape[2] * output.shape[3] if isinstance(layer, nn.Conv2d) else 1
        total += layer.weight.numel() * places

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return total / 1e9
