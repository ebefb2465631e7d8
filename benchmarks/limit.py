"""The most that this machine can do with an export, without any HTTP: one thread per core decodes a picture and runs the network.

python -m benchmarks.limit EXPORT PICTURE SECONDS     → {"rate": pictures per second, "p50_ms": of one thread alone,
                                                        "cpu_s": processor time of a picture with all threads}
"""

import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

from services import preprocess
from services.inference.engine import Session


def main() -> None:
    data, picture, seconds = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes(), float(sys.argv[3])
    session = Session(data)
    size = session.card.resolution

    def answer() -> None:
        session.run(preprocess.pixels(picture, size)[None])

    for _ in range(10):
        answer()
    took = []
    end = time.perf_counter() + seconds / 3
    while (began := time.perf_counter()) < end:
        answer()
        took.append(time.perf_counter() - began)
    counts = [0] * (os.cpu_count() or 1)
    began, used_s = time.perf_counter(), time.process_time()
    end = began + seconds

    def work(number: int) -> None:
        while time.perf_counter() < end:
            answer()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate, used_s = sum(counts) / (time.perf_counter() - began), time.process_time() - used_s
    print(json.dumps({"rate": rate, "p50_ms": statistics.median(took) * 1000, "cpu_s": used_s / sum(counts)}))


if __name__ == "__main__":
    main()
