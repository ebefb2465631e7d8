"""The table of architectures, and what each costs by arithmetic alone. A new one is a row. No framework is imported here.

Names are the paper's: R<depth>x<width factor>. R14x0.5 is the demo's: the same family with one unit a block at half width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Words that the command line shares with the readers of weight files, which need torch.
Layout = Literal["published", "big_vision"]
HeadChoice = Literal["keep", "drop", "replace"]


@dataclass(frozen=True)
class Arch:
    """units: units per block; factor: width of every layer relative to the stem's 64 channels."""

    units: tuple[int, int, int, int]
    factor: float

    @property
    def width(self) -> int:
        """Channels of the stem."""
        return int(64 * self.factor)

    @property
    def num_features(self) -> int:
        """Channels of the last feature map, which the head sees."""
        return 32 * self.width


ARCHS = {
    "R14x0.5": Arch((1, 1, 1, 1), 0.5),
    "R50x1": Arch((3, 4, 6, 3), 1),
    "R50x3": Arch((3, 4, 6, 3), 3),
    "R101x1": Arch((3, 4, 23, 3), 1),
    "R101x3": Arch((3, 4, 23, 3), 3),
    "R152x2": Arch((3, 8, 36, 3), 2),
    "R152x4": Arch((3, 8, 36, 3), 4),
}


def convolutions(arch: str) -> Iterator[tuple[int, int]]:
    """(weights, level) of every convolution; level: 0 the stem's map, 1 to 4 the maps that the blocks put out."""
    row = ARCHS[arch]
    yield 7 * 7 * 3 * row.width, 0
    channels = row.width
    for block, count in enumerate(row.units, 1):
        out = row.width * 2 ** (block + 1)
        middle = out // 4
        for unit in range(count):
            before = max(1, block - 1) if unit == 0 else block  # block 1 has no stride
            yield channels * middle, before
            yield 9 * middle * middle, block
            yield middle * out, block
            if unit == 0:
                yield channels * out, block
            channels = out


def num_parameters(arch: str, num_classes: int) -> int:
    """Number of parameters, head included; with 0 classes those of the body."""
    row = ARCHS[arch]
    norms, channels = 2 * row.num_features, row.width
    for block, count in enumerate(row.units, 1):
        out = row.width * 2 ** (block + 1)
        norms += (
            2 * (channels + (count - 1) * out) + count * out
        )  # gamma and beta of norm1; of norm2 and norm3 together
        channels = out
    return sum(weights for weights, _ in convolutions(arch)) + norms + (row.num_features + 1) * num_classes


def gmac(arch: str, side: int, num_classes: int = 1000) -> float:
    """Multiply-accumulates of one picture of side × side pixels, in 10⁹: every convolution and the head."""
    stem = (side - 1) // 2 + 1
    sides = [stem, (stem - 1) // 2 + 1]  # each halves, rounded up
    for _ in range(3):
        sides.append((sides[-1] - 1) // 2 + 1)
    total = sum(weights * sides[level] ** 2 for weights, level in convolutions(arch))
    return (total + ARCHS[arch].num_features * num_classes) / 1e9
