"""Versions swapped under load: errors, latency and memory.

    make bench-swaps      a thousand swaps (python -m benchmarks.swaps --swaps 200 for fewer)

Two customers never pause while the champion of their tenant moves, each time to an export that was never seen before. Their p99
in windows of 2 s is held against that of the same service without swaps, before and after; resident memory against what it was
after the first hundred swaps. All exports are made beforehand: nothing but the load and the clock runs in this process meanwhile.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks import load, machine
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve

SETTLED = 100  # swaps after which memory must not grow any more
ASK = load.request("/v1/lamps/classify", gray_png(10))


def swap_under_load(service: Service, swaps: int, settled: int, mflop: float = 5) -> dict[str, Any]:
    """Figures: errors, p99 ratio to the quiet service, memory ratio since `settled` swaps, seconds a swap."""
    pid = service.process.pid
    quiet = quiet_p99s_ms(service)
    memory: list[int] = []
    took: list[float] = []
    exports = never_the_same(export(mflop=mflop), swaps)

    def publish() -> None:
        for data in exports:
            took.append(service.wait_until("lamps", service.store.publish("lamps", data)))
            memory.append(resident_kb(pid))

    publisher = threading.Thread(target=publish)
    publisher.start()
    windows: list[load.Result] = []
    while publisher.is_alive():
        windows.append(asyncio.run(load.closed(service.url, ASK, 2, 2, warm_up_s=0)))
    publisher.join()
    quiet += quiet_p99s_ms(service)  # before and after: a machine that slows down meanwhile slows one of them too
    errors = sum(count for window in windows for status, count in window.statuses.items() if status != 200)
    busy = [window.percentile_ms(99) for window in windows]
    return {
        "swaps": len(memory),
        "answers": sum(window.good for window in windows),
        "errors": errors,
        "p99_ratio": round(statistics.median(busy) / statistics.median(quiet), 3),
        "memory_ratio": round(max(memory[settled:]) / memory[settled - 1], 3),
        "memory_mb": round(memory[-1] / 1024),
        "seconds_per_swap": round(statistics.median(took), 3),
    }


def quiet_p99s_ms(service: Service) -> list[float]:
    return [asyncio.run(load.closed(service.url, ASK, 2, 2)).percentile_ms(99) for _ in range(3)]


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
    arguments = parser.parse_args()
    described = machine.describe("onnxruntime")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        store = Folder(Path(temporary))
        store.publish("lamps", export(mflop=5))
        with bit_serve(store, Path(temporary), "--poll_interval_s", "0.05") as service:
            figures = swap_under_load(service, arguments.swaps, min(SETTLED, arguments.swaps // 2))
    print(figures, f"in {time.monotonic() - began:.0f} s")
    machine.write("swaps", described, figures)


if __name__ == "__main__":
    main()
