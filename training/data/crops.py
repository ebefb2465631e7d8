"""A drawn part of an encoded picture, as a training sees it: only what the part needs is decoded and resized.

The filter is training's own: Pillow's bilinear one, which averages where it shrinks. Serving and evaluation keep theirs
(services/preprocess.py), which the golden answers inside exports were made with.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from services import preprocess

Box = tuple[float, float, float, float]  # top, left, height, width
BoxOf = Callable[[int, int], Box]  # of a picture's height and width


def of(data: bytes, size: int, box_of: BoxOf) -> NDArray[np.uint8]:
    """The part that `box_of(height, width)` names, in pixels of the whole picture, as uint8 [size, size, 3].

    Edges lie on whole pixels of what is decoded: a JPEG at 1/2, 1/4 or 1/8 where the part stays at least as large as `size`,
    its colours by the fast way where the resizing averages them anyhow (.3 of 255 on photographs).
    """
    height, width = preprocess.upright_size(data)
    top, left, high, wide = box_of(height, width)
    shrink = next((by for by in (8, 4, 2) if min(high, wide) >= by * size), 1)
    image = preprocess.decode(data, shrink=shrink, fast=min(high, wide) > size)
    rows, columns = _span(top, high, height, image.shape[0]), _span(left, wide, width, image.shape[1])
    return resize(image[rows, columns], size)


def whole(height: int, width: int) -> Box:
    """The box of all of a picture."""
    return 0, 0, height, width


def resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] → [size, size, 3] as Pillow's bilinear filter does, three times as fast."""
    if image.shape[:2] == (size, size):
        return image
    pixels_nchw = torch.from_numpy(image)[None].permute(
        0, 3, 1, 2
    )  # in this order torch sees channels_last, and keeps it
    made = torch.nn.functional.interpolate(pixels_nchw, (size, size), mode="bilinear", antialias=True)
    return made[0].permute(1, 2, 0).numpy()


def _span(start: float, length: float, whole: int, decoded: int) -> slice:
    """The pixels of a side, `decoded` of them, that stand for [start, start + length) of `whole`; at least one."""
    first = min(round(start * decoded / whole), decoded - 1)
    return slice(first, max(first + 1, min(decoded, round((start + length) * decoded / whole))))
