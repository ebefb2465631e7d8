"""The demo's two datasets with more examples per class than its tenants have: taken from installed packages, no folder needed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.study.source import Sample, Source, Task, png

PATCH, PER_CLASS = 64, 100  # side of a texture patch in pixels of the photograph; patches for each split
TEXTURES = ("brick", "grass", "gravel")


def digits(folder: Path, task: Task) -> Source:
    """scikit-learn's handwritten digits, half of them for the test."""

    def samples() -> Iterator[Sample]:
        from sklearn.datasets import load_digits

        told = load_digits()
        tested = set(np.random.default_rng(0).permutation(len(told.target))[::2])
        for number, (image, label) in enumerate(zip(told.images, told.target, strict=True)):
            yield (
                "test" if number in tested else "train",
                int(label),
                png(np.round(image * (255 / 16)).astype(np.uint8)),
            )

    return Source(folder, task.numbers, samples())


def textures(folder: Path, task: Task) -> Source:
    """Patches of scikit-image's photographs: the left half of each for training, the right half for the test."""

    def samples() -> Iterator[Sample]:
        import skimage.data

        for label, name in enumerate(TEXTURES):
            photograph = getattr(skimage.data, name)()
            rng, middle = np.random.default_rng((0, label)), photograph.shape[1] // 2
            for split, half in (("train", photograph[:, :middle]), ("test", photograph[:, middle:])):
                tops, lefts = (rng.integers(0, side - PATCH, PER_CLASS) for side in half.shape)
                for top, left in zip(tops, lefts, strict=True):
                    yield split, label, png(np.ascontiguousarray(half[top : top + PATCH, left : left + PATCH]))

    return Source(folder, list(TEXTURES), samples())
