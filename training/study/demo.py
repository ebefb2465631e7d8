"""The demo's two datasets with more examples per class than its tenants have: taken from installed packages, no folder needed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.study.source import Sample, Source, Task, png

PATCH, PER_CLASS = 64, 100  # side of a texture patch in pixels of the photograph; patches for each split
TEXTURES = ("brick", "grass", "gravel")


def digits(folder: Path, task: Task) -> Source:
    """scikit-learn's handwritten digits, half of them for the test."""

    def samples() -> Iterator[Sample]:
        images, labels = handwritten()
        tested = set(np.random.default_rng(0).permutation(len(labels))[::2])
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield "test" if number in tested else "train", int(label), png(image)

    return Source(folder, task.numbers, samples())


def textures(folder: Path, task: Task) -> Source:
    """Patches of scikit-image's photographs: the left half of each for training, the right half for the test."""

    def samples() -> Iterator[Sample]:
        for label, name in enumerate(TEXTURES):
            rng = np.random.default_rng((0, label))
            for split, half in halves(name).items():
                for patch in patches(half, PER_CLASS, rng):
                    yield split, label, png(np.ascontiguousarray(patch))

    return Source(folder, list(TEXTURES), samples())


def handwritten() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's digits: pictures [n, 8, 8], labels [n]."""
    from sklearn.datasets import load_digits

    told = load_digits()
    return np.round(told.images * (255 / 16)).astype(np.uint8), told.target


def halves(name: str) -> dict[str, NDArray[np.uint8]]:
    """A photograph of scikit-image: its left half for training, its right half for the test."""
    import skimage.data

    photograph = getattr(skimage.data, name)()
    middle = photograph.shape[1] // 2
    return {"train": photograph[:, :middle], "test": photograph[:, middle:]}


def patches(area: NDArray[np.uint8], count: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Squares from random places of a photograph [h, w]."""
    tops = rng.integers(0, area.shape[0] - PATCH, count)
    lefts = rng.integers(0, area.shape[1] - PATCH, count)
    return (area[top : top + PATCH, left : left + PATCH] for top, left in zip(tops, lefts, strict=True))
