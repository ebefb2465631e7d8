"""Versions swapped under load: errors, latency and memory.

    make bench-swaps      a thousand swaps, four a second (python -m benchmarks.swaps --swaps 200 for fewer)

Two customers never pause while the champion of their tenant moves, each time to an export that was never seen before. By default
a service looks for news every two seconds; this one does so every 50 ms, so that it can be given more of them. The customers' p99
in windows of 2 s is held against that of the same service without swaps, before and after; resident memory against what it was
after the first hundred swaps. An answer that is an error ends the run. All exports are made beforehand.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx

from benchmarks import machine, wrk
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve

SETTLED = 100  # swaps after which memory must not grow any more
MFLOP = 5
ASK = wrk.Request("/v1/lamps/classify", gray_png(10), {})


def swap_under_load(service: Service, swaps: int, settled: int, per_s: float) -> dict[str, Any]:
    """Figures: p99 ratio to the quiet service, memory ratio since `settled` swaps, seconds a swap."""
    pid = service.process.pid
    quiet = quiet_p99s_ms(service)
    memory: list[int] = []
    took: list[float] = []
    over = threading.Event()
    exports = never_the_same(export(mflop=MFLOP), swaps)

    def publish() -> None:
        due = time.monotonic()
        for data in exports:
            if over.wait(max(0.0, due - time.monotonic())):
                return
            due += 1 / per_s
            took.append(service.wait_until("lamps", service.store.publish("lamps", data)))
            memory.append(resident_kb(pid))

    windows: list[dict[str, float]] = []
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publish)
        try:
            while not published.done():
                windows.append(wrk.load(service.url, ASK, 2, 2))  # raises where an answer was not a good one
        finally:
            over.set()
        published.result()
    quiet += quiet_p99s_ms(service)  # before and after: a machine that slows down meanwhile slows one of them too
    busy = [window["p99_ms"] for window in windows]
    return {
        "swaps": len(memory),
        "per_s": per_s,
        "answers": round(sum(window["requests"] for window in windows)),
        "p99_ms": round(statistics.median(busy), 2),
        "p99_ratio": round(statistics.median(busy) / statistics.median(quiet), 3),
        "memory_ratio": round(max(memory[settled:]) / memory[settled - 1], 3),
        "memory_mb": round(memory[-1] / 1024),
        "seconds_per_swap": round(statistics.median(took), 3),
    }


def quiet_p99s_ms(service: Service) -> list[float]:
    return [wrk.load(service.url, ASK, 2, 2)["p99_ms"] for _ in range(3)]


def never_the_same(data: bytes, count: int) -> list[bytes]:
    """The export again and again, each with other metadata and so with another hash."""
    proto = onnx.load_from_string(data)
    made = []
    for number in range(count):
        [entry] = [entry for entry in proto.metadata_props if entry.key == "lineage"]
        entry.value = json.dumps({"arch": "test", "number": number})
        made.append(proto.SerializeToString())
    return made


def resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1_000)
    parser.add_argument("--per_s", type=float, default=4, help="swaps a second, at most about 18")
    arguments = parser.parse_args()
    described = machine.describe("onnxruntime")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        store = Folder(Path(temporary))
        store.publish("lamps", export(mflop=MFLOP))
        with bit_serve(store, Path(temporary), "--poll_interval_s", "0.05") as service:
            figures = swap_under_load(service, arguments.swaps, min(SETTLED, arguments.swaps // 2), arguments.per_s)
    print(figures, f"in {time.monotonic() - began:.0f} s")
    machine.write("swaps", described, figures)


if __name__ == "__main__":
    main()
