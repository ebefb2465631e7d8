"""Tiny pictures and datasets that several rooms' tests share. Everything is drawn, nothing is downloaded."""

import signal
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from training.config import PackConfig
from training.data.dataset import Dataset
from training.pack import pack

# A shell that runs the tests in the background has Ctrl-C ignored, which every command that they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def draw_folder(root: Path, classes: int = 3, train: int = 12, test: int = 6, side: int = 24) -> Path:
    """<split>/<class>/<n>.png: every class has its own colour, every picture its own noise."""
    rng = np.random.default_rng(7)
    for split, count in (("train", train), ("test", test)):
        for number in range(classes):
            folder = root / split / f"class-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            for picture in range(count):
                colour = np.array([60 * number, 255 - 60 * number, 128])
                image = np.clip(colour + rng.normal(0, 25, (side, side, 3)), 0, 255).astype(np.uint8)
                (folder / f"{picture}.png").write_bytes(encode(image))
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes by colour, 12 train and 6 test pictures each, 24 × 24 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    out = tmp_path_factory.mktemp("packed")
    pack(draw_folder(root), out, PackConfig(shard_bytes=20_000), processes=1)
    return Dataset.open(out)


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Encodes a picture of a given size: picture(width, height, ".jpg")."""

    def make(width: int = 40, height: int = 30, suffix: str = ".png") -> bytes:
        rng = np.random.default_rng(width * 1000 + height)
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        return encode(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width], suffix)

    return make
