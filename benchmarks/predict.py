"""Speed of `bit predict`: its rate beside the in-process limit of the same run.

    python -m benchmarks.predict          (1 minute on 2 cores)

The limit: as many threads, each decoding a picture's bytes and asking the export, batch by batch, with neither files nor a
result. Both take turns over the same JPEGs of about 40 kB; the ratio is the median over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np

from services import preprocess
from tests.services.exports import export
from training import predict, replay
from training.data.pictures import Pictures, find

RESULTS = Path(__file__).with_name("results")
DIFFERENT = 64


def jpegs(folder: Path, count: int) -> Pictures:
    """Files of smoothed noise, about as large as photographs of 500 × 375."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(DIFFERENT):
        image = cv2.GaussianBlur(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8), (0, 0), 1.2)
        encoded.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(encoded[number % DIFFERENT])
    return find(str(folder))


def limit(data: bytes, pictures: list[bytes], workers: int) -> float:
    """Pictures per second, from when the export is loaded to the last answer."""
    session = replay.load(data, "the export")
    side, size = session.card.resolution, predict.BATCH

    def ask(start: int) -> None:
        batch = [preprocess.pixels(picture, side) for picture in pictures[start : start + size]]
        session.run(np.stack(batch))

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(ask, range(0, len(pictures), size)))
    return len(pictures) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mflop", type=float, default=500)
    given = parser.parse_args()
    workers, data = len(os.sched_getaffinity(0)), export(mflop=given.mflop)
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "pictures")
        folder.mkdir()
        pictures = jpegs(folder, given.pictures)
        held = [pictures.read(i) for i in range(len(pictures))]
        for number in range(given.rounds + 1):
            began = time.perf_counter()
            predict.main("bench", predict.Export(data, "1"), str(folder), f"{place}/{number}.parquet", 5, workers)
            rate = len(held) / (time.perf_counter() - began)
            if number:  # the first round warms up
                most = limit(data, held, workers)
                rates.append(rate)
                ratios.append(rate / most)
                print(f"bit predict {rate:,.0f} pictures/s · limit {most:,.0f} · ratio {ratios[-1]:.3f}", flush=True)
    told = {
        "benchmark": "predict",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": workers,
            "python": platform.python_version(),
        },
        "pictures": given.pictures,
        "mflop": given.mflop,
        "pictures_per_second": round(statistics.median(rates), 1),
        "ratio_to_limit": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{told['when'][:10]}-predict.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(f"median ratio {told['ratio_to_limit']} (goal: 0.95); written to {path}")


if __name__ == "__main__":
    main()
