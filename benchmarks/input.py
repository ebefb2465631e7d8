"""Pictures per second and core on their way into a step: JPEG to random crops, and small tenants from the uint8 cache.

    python -m benchmarks.input          (1 minute on one core)

jpeg: 500 × 375 JPEGs, squashed to 256 × 256, a random 224 crop, flipped: ours (the training stream, one thread) and a plain
Pillow pipeline (decode, bilinear resize, crop, flip, to array). area: the crops by area of upstream recipes, both ways. cache: a
tenant's pictures, kept as 160 × 160 after the first epoch, cropped to 128, against Pillow from their files. Processor
seconds of one thread, all in turn in one run; ratios are medians over the rounds.
"""

import argparse
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from PIL import Image

from benchmarks import machine
from services import preprocess
from training.data import area, augment


def photographs(count: int, width: int, height: int) -> list[bytes]:
    """JPEGs with the statistics of photographs: noise over many scales. About 50 kB at 500 × 375."""
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


def pillow(data: list[bytes], resize: int, crop: int) -> np.ndarray:
    """What a plain loader does for a batch."""
    rng, rows = np.random.default_rng(0), []
    for encoded in data:
        image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((resize, resize), Image.Resampling.BILINEAR)
        top, left = rng.integers(0, resize - crop, 2, endpoint=True)
        image = image.crop((left, top, left + crop, top + crop))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rows.append(np.asarray(image))
    return np.stack(rows)


def pillow_by_area(data: list[bytes], crop: int) -> np.ndarray:
    drawn = area.draw(np.random.default_rng(0), len(data))
    rows = []
    for row, encoded in enumerate(data):
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        top, left, height, width = drawn.box(row, image.height, image.width)
        box = (left, top, left + width, top + height)
        rows.append(np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR, box=box)))
    return np.stack(rows)


def ours(pictures: np.ndarray, crop: int) -> np.ndarray:
    drawn = augment.draw(np.random.default_rng(0), len(pictures), pictures.shape[1], crop, flips=True)
    return augment.crop_and_flip(pictures, np.arange(len(pictures)), crop, drawn)


def variants(count: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """name → (pictures, what makes a batch of them)."""
    large = photographs(count, 500, 375)
    cached = np.stack([preprocess.pixels(data, 160) for data in large])
    many = np.concatenate([cached] * 16)

    def by_area() -> object:
        drawn = area.draw(np.random.default_rng(0), count)
        return [area.crop(data, drawn, row, 224) for row, data in enumerate(large)]

    return {
        "jpeg pillow": (count, lambda: pillow(large, 256, 224)),
        "jpeg ours": (count, lambda: ours(np.stack([preprocess.pixels(data, 256) for data in large]), 224)),
        "area pillow": (count, lambda: pillow_by_area(large, 224)),
        "area ours": (count, by_area),
        "cache pillow": (count, lambda: pillow(large, 160, 128)),
        "cache ours": (len(many), lambda: ours(many, 128)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    described = machine.describe("pillow", "simplejpeg", "opencv-python-headless")
    took: dict[str, list[float]] = defaultdict(list)
    chosen = variants(arguments.pictures)
    with ThreadPoolExecutor(1) as one:  # a thread of the stream's pool, as in training
        for number in range(arguments.rounds + 1):
            for name, (count, work) in chosen.items():
                began = time.process_time()
                one.submit(work).result()
                if number:
                    took[name].append((time.process_time() - began) / count)
    figures = {}
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
