"""Pictures per second and core on their way into a step: JPEG to random crops, and small tenants from the uint8 cache.

    python -m benchmarks.input          (1 minute on one core)

jpeg: 500 × 375 JPEGs of 80 kB, squashed to 256 × 256, a random 224 crop, flipped: by ours, the training's own stream out of
packed shards, and by a plain Pillow pipeline (read, decode, bilinear resize, crop, flip, to array). area: the crops by area of
upstream recipes, both ways. cache: a tenant's pictures, kept as 160 × 160 since the first epoch, cropped to 128, against Pillow
from the files. Processor seconds, one thread at work, all in turn in one run; ratios are medians over the rounds. Beside: how
far our crops are from Pillow's (mean over all values, of 255).
"""

import argparse
import hashlib
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks import machine
from training.data import area, augment, crops, shards
from training.data.batches import Stream
from training.data.dataset import Dataset, Split


def photographs(count: int, width: int, height: int) -> list[bytes]:
    """JPEGs with the statistics of photographs: noise over many scales. About 80 kB at 500 × 375."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        image = np.zeros((height, width, 3), np.float32)
        for power in range(1, 8):
            small = rng.normal(0, 12, (height >> power or 1, width >> power or 1, 3)).astype(np.float32)
            image += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) * power**0.5
        pixels = np.clip(image + 127 + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        made.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return made


def packed(folder: Path, data: list[bytes]) -> Split:
    """The pictures as the split `train` of a dataset with one label each."""
    examples = [
        ("train", shards.Example(f"{number:08d}", picture, "jpg", (0,), 500, 375, hashlib.sha256(picture).hexdigest()))
        for number, picture in enumerate(data)
    ]
    shards.write(folder, examples, ["a", "b"], False, 2**28, {})
    return Dataset.open(folder).split("train")


def pillow(split: Split, resize: int, crop: int) -> np.ndarray:
    """What a plain loader does for a batch."""
    rng, rows = np.random.default_rng(0), []
    for encoded in split:
        image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((resize, resize), Image.Resampling.BILINEAR)
        top, left = rng.integers(0, resize - crop, 2, endpoint=True)
        image = image.crop((left, top, left + crop, top + crop))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rows.append(np.asarray(image))
    return np.stack(rows)


def pillow_by_area(split: Split, crop: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn, rows = area.draw(rng, len(split)), []
    for row, encoded in enumerate(split):
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        top, left, height, width = drawn.box(row, image.height, image.width)
        image = image.resize((crop, crop), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rows.append(np.asarray(image))
    return np.stack(rows)


def variants(split: Split) -> dict[str, Callable[[int], object]]:
    """name → what makes a batch of all pictures for a step."""
    view: dict[str, Any] = {"seed": 0, "global_batch": len(split), "flips": True, "crops": True, "threads": 1}
    jpeg = Stream(split, resize=256, crop=224, cache_bytes=0, **view)
    by_area = Stream(split, resize=256, crop=224, by_area=True, **view)
    cached = Stream(split, resize=160, crop=128, **view)
    return {
        "jpeg pillow": lambda step: pillow(split, 256, 224),
        "jpeg ours": jpeg.batch,
        "area pillow": lambda step: pillow_by_area(split, 224),
        "area ours": by_area.batch,
        "cache pillow": lambda step: pillow(split, 160, 128),
        "cache ours": cached.batch,
    }


def difference(split: Split) -> float:
    """Mean absolute difference of our crops to those out of what Pillow decodes and resizes, over all pictures."""
    drawn = augment.draw(np.random.default_rng(0), len(split), 256, 224, flips=False)
    told = []
    for row, encoded in enumerate(split):
        made = crops.of(encoded, 224, lambda h, w, row=row: drawn.box(row, 256, 224, h, w))  # type: ignore[misc]
        whole = Image.open(io.BytesIO(encoded)).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        plain = np.asarray(whole, np.int64)[drawn.top[row] :, drawn.left[row] :][:224, :224]
        told.append(np.abs(made - plain).mean())
    return round(float(np.mean(told)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    described = machine.describe("pillow", "simplejpeg", "opencv-python-headless", "torch")
    took: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        split = packed(Path(folder), photographs(arguments.pictures, 500, 375))
        chosen = variants(split)
        for step in range(arguments.rounds + 1):
            for name, work in chosen.items():
                began = time.process_time()
                work(step)
                if step:
                    took[name].append((time.process_time() - began) / len(split))
        figures: dict[str, Any] = {"jpeg difference to pillow": difference(split)}
    for name, seconds in took.items():
        plain = took[f"{name.split()[0]} pillow"]
        figures[name] = {
            "pictures_per_s": round(1 / statistics.median(seconds), 1),
            "times_pillow": round(statistics.median(a / b for a, b in zip(plain, seconds, strict=True)), 2),
        }
        print(f"{name:>14}: {figures[name]}")
    machine.write("input", described, figures)


if __name__ == "__main__":
    main()
