"""The demo's three datasets, as ordinary picture files: made from what the installed packages ship, the same every time.

    bit demo data

data/upstream             94 glyphs, 252 pictures each, and 30 procedural textures, 504 each
tenants/digits/pictures   scikit-learn's handwritten digits: 10 a class to train on, the other 1,697 to test
tenants/textures/pictures brick, grass and gravel from scikit-image's photographs: 10 patches a class to train on, 100 to test,
                          from different halves of each photograph
"""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from training.demo import drawing
from training.study.demo import TEXTURES, halves, handwritten, patches

SEED = 0
PER_CLASS = 252
FEW = 10  # training pictures per class of each tenant
SOURCES = (Path("data/upstream"), Path("tenants/digits/pictures"), Path("tenants/textures/pictures"))


def write(root: Path, per_class: int = PER_CLASS) -> None:
    """Writes all three datasets below `root`, replacing what is there; each appears whole or not at all."""
    upstream, digits, textures = partial_folders = [root / f"{source}.partial" for source in SOURCES]
    for folder in partial_folders:
        shutil.rmtree(folder, ignore_errors=True)
    names = drawing.upstream_classes()
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("forkserver")) as pool:
        job = partial(_write_upstream_class, upstream, per_class)
        for done, _ in enumerate(pool.map(job, names), 1):
            if done % 30 == 0 or done == len(names):
                print(f"upstream: {done} of {len(names)} classes drawn", file=sys.stderr)
    _write_digits(digits)
    _write_textures(textures)
    for source, folder in zip(SOURCES, partial_folders, strict=True):
        shutil.rmtree(root / source, ignore_errors=True)
        folder.rename(root / source)


def is_there(root: Path) -> bool:
    """Whether all three datasets were written to their end: the .dvc file beside each comes last."""
    return all((root / source).is_dir() and (root / f"{source}.dvc").is_file() for source in SOURCES)


def track(root: Path) -> None:
    """Puts the three datasets under DVC: `dvc add` writes the .dvc file beside each."""
    targets = [str(source) for source in SOURCES]
    subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", *targets], cwd=root, check=True)


def _write_upstream_class(folder: Path, per_class: int, name: str) -> None:
    count = 2 * per_class if name in drawing.TEXTURES else per_class  # a texture varies more than a glyph
    _save(folder / name, drawing.upstream_class(name, SEED, count))


def _write_digits(folder: Path) -> None:
    images, labels = handwritten()
    pictures: dict[str, list[NDArray[np.uint8]]] = defaultdict(list)
    for image, label in zip(images, labels, strict=True):
        pictures[str(label)].append(image)
    rng = np.random.default_rng(SEED)
    for label in sorted(pictures):
        of_class = pictures[label]
        chosen = set(rng.choice(len(of_class), FEW, replace=False))  # neighbours in the collection share a writer
        _save(folder / "train" / label, [image for i, image in enumerate(of_class) if i in chosen])
        _save(folder / "test" / label, [image for i, image in enumerate(of_class) if i not in chosen])


def _write_textures(folder: Path) -> None:
    for name in TEXTURES:
        rng = np.random.default_rng((SEED, len(name)))
        for (split, half), count in zip(halves(name).items(), (FEW, 100), strict=True):
            _save(folder / split / name, patches(half, count, rng))


def _save(folder: Path, pictures: Iterable[NDArray[np.uint8]]) -> None:
    """Pictures [h, w] or [h, w, 3] RGB as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        image = picture if picture.ndim == 2 else picture[..., ::-1]
        encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        (folder / f"{number:04d}.png").write_bytes(encoded.tobytes())
