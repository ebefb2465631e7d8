"""Random crops by area, as upstream training draws them: a part of the picture, then resized. numpy in, numpy out.

Source: BiT, section 3.1 (the crop of Szegedy et al., 2015): 5 to 100 % of the area, aspect ratio 3/4 to 4/3 by its logarithm.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARES, RATIOS = (0.05, 1.0), (3 / 4, 4 / 3)
TRIES = 10  # draws until one fits into the picture; then the largest centred part of an allowed ratio


@dataclass(frozen=True)
class AreaDraw:
    """Drawn for each picture of a batch, [n, TRIES]: share of the area, log ratio, place of top and left in [0, 1)."""

    share: NDArray[np.float64]
    log_ratio: NDArray[np.float64]
    top: NDArray[np.float64]
    left: NDArray[np.float64]

    def box(self, row: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels, inside a picture of height × width."""
        for t in range(TRIES):
            area, ratio = self.share[row, t] * height * width, float(np.exp(self.log_ratio[row, t]))
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                return int(self.top[row, t] * (height - h + 1)), int(self.left[row, t] * (width - w + 1)), h, w
        h, w = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def draw(rng: np.random.Generator, count: int) -> AreaDraw:
    """Draws for `count` pictures; which box they mean depends on each picture's size alone."""
    size = (count, TRIES)
    share, log_ratio = rng.uniform(*SHARES, size), rng.uniform(np.log(RATIOS[0]), np.log(RATIOS[1]), size)
    return AreaDraw(share, log_ratio, rng.random(size), rng.random(size))
