"""Parts of encoded pictures: what Pillow makes of the same part, from as few pixels as that takes."""

import io
from functools import partial

import numpy as np
import pytest
from PIL import Image

from training.data import augment, crops


def photograph(width: int, height: int, longer: float = 1.0) -> Image.Image:
    """Waves of several lengths, the shortest of which a filter that skips pixels would turn into patterns."""
    y, x = np.mgrid[:height, :width] / longer
    waves = [127 + 60 * np.sin(x / a) + 60 * np.sin(y / b) for a, b in ((0.7, 9.0), (40.0, 0.9), (3.0, 70.0))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 300), (100, 90), (224, 224)])
def test_a_part_is_resized_as_pillow_does(width: int, height: int) -> None:
    image = photograph(width, height)
    part = image.crop((3, 2, width - 3, height - 7))
    expected = np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR), np.int64)
    made = crops.of(encoded(image), 224, lambda h, w: (2, 3, h - 9, w - 6))
    assert (made.dtype, made.shape) == (np.uint8, (224, 224, 3))
    assert np.abs(made - expected).max() <= 1


@pytest.mark.parametrize(("side", "tolerance"), [(64, 2.0), (250, 2.0), (900, 3.0)])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(side: int, tolerance: float) -> None:
    image = photograph(2000, 1500, longer=12)  # a JPEG keeps no short waves of colour
    data = encoded(image, "jpeg")
    expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=(200, 96, 1600, 1296)), np.int64)
    assert np.abs(crops.of(data, side, lambda h, w: (96, 200, h - 300, w - 600)) - expected).mean() < tolerance


def test_the_crop_of_a_squashed_picture_is_the_same_part_of_the_whole() -> None:
    image = photograph(512, 384)
    drawn = augment.Draw(np.array([0, 32]), np.array([32, 8]), np.array([False, False]))
    squashed = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR), np.int64)
    for row, (top, left) in enumerate([(0, 32), (32, 8)]):
        made = crops.of(encoded(image), 224, partial(drawn.box, row, 256, 224))
        expected = squashed[top : top + 224, left : left + 224]
        assert np.abs(made - expected)[2:-2, 2:-2].max() <= 1  # at the edges the squashed picture sees what lies beyond


def test_the_smallest_part_is_one_pixel() -> None:
    data = encoded(photograph(20, 10))
    assert crops.of(data, 8, lambda h, w: (9.9, 19.9, 0.01, 0.01)).shape == (8, 8, 3)
