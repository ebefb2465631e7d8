"""The table of architectures. A new one is a row.

Names are the paper's: R<depth>x<width factor>. R14x0.5 is the demo's: the same family with one unit a block at half width.
"""

import difflib
from dataclasses import dataclass

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


def num_parameters(arch: str, num_classes: int) -> int:
    """Number of parameters, head included; computed from the table without allocating the network."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in create(arch, num_classes).parameters())
