"""Networks by the name of their row in the table (models/archs.py)."""

import difflib

import torch

from training.errors import UserError
from training.models.archs import ARCHS
from training.models.resnet import ResNet


class ArchError(UserError):
    """An architecture that the table lacks."""


def create(arch: str, num_classes: int) -> ResNet:
    """A network with fresh filters and a zero head. Raises ArchError for an arch that the table lacks."""
    if arch not in ARCHS:
        near = difflib.get_close_matches(arch, ARCHS, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArchError(f"arch={arch!r} is not in the zoo.{hint} Choices: {', '.join(ARCHS)}.")
    if num_classes < 1:
        raise ArchError(f"num_classes={num_classes}: a head needs at least one class.")
    row = ARCHS[arch]
    return ResNet(row.units, row.width, num_classes)


def outline(arch: str, num_classes: int) -> ResNet:
    """The network without memory behind its parameters: for counting, checking and tracing shapes."""
    with torch.device("meta"):
        return create(arch, num_classes)


def empty(arch: str, num_classes: int) -> ResNet:
    """The network with memory but no values, to be filled from a file: skips minutes of drawing for the largest."""
    model = outline(arch, num_classes)
    return model.to_empty(device="cpu")
