"""Speed of `bit predict`: its rate beside the in-process limit of the same run.

    python -m benchmarks.predict          (1 minute on 2 cores)

The limit: as many threads, each decoding a picture's bytes and asking the export, batch by batch, with neither files nor a
result; both load the export first. Each measurement stands between two of the limit, over the same JPEGs of about 40 kB; the
ratio is the median over the rounds. The same ratio by processor time tells what the command costs, whatever else runs meanwhile.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from benchmarks import machine
from services import preprocess
from tests.services.exports import export
from training import predict, replay
from training.data.pictures import Pictures, find

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


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processors."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def limit(data: bytes, pictures: list[bytes], workers: int) -> None:
    session = replay.load(data, "the export")
    side, size = session.card.resolution, predict.BATCH

    def ask(start: int) -> None:
        batch = [preprocess.pixels(picture, side) for picture in pictures[start : start + size]]
        session.run(np.stack(batch))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(ask, range(0, len(pictures), size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mflop", type=float, default=500)
    given = parser.parse_args()
    described = machine.describe("onnxruntime", "simplejpeg", "pyarrow")
    workers, data = len(os.sched_getaffinity(0)), export(mflop=given.mflop)
    ratios, cpu_ratios, rates = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "pictures")
        folder.mkdir()
        pictures = jpegs(folder, given.pictures)
        held = [pictures.read(i) for i in range(len(pictures))]

        def bit_predict(out: str) -> None:
            predict.main("bench", predict.Export(data, "1"), str(folder), out, 5, workers)

        bit_predict(f"{place}/warm.parquet")
        before = timed(lambda: limit(data, held, workers))
        for number in range(given.rounds):
            out = f"{place}/{number}.parquet"
            took_s, cpu_s = timed(lambda out=out: bit_predict(out))  # type: ignore[misc]
            after = timed(lambda: limit(data, held, workers))
            rates.append(len(held) / took_s)
            ratios.append((before[0] + after[0]) / 2 / took_s)
            cpu_ratios.append((before[1] + after[1]) / 2 / cpu_s)
            print(
                f"{rates[-1]:,.0f} pictures/s · ratio {ratios[-1]:.3f} · by processor time {cpu_ratios[-1]:.3f}",
                flush=True,
            )
            before = after
    figures = {
        "pictures": given.pictures,
        "mflop": given.mflop,
        "pictures_per_second": round(statistics.median(rates), 1),
        "ratio_to_limit": round(statistics.median(ratios), 3),
        "ratio_by_processor_time": round(statistics.median(cpu_ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    machine.write("predict", described, figures)
    print(f"median ratio {figures['ratio_to_limit']} (goal: 0.95)")


if __name__ == "__main__":
    main()
