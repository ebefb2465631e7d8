"""Loading R152x4 with 21,843 classes (4.4 GB): peak memory against the file's size, and seconds.

    python -m benchmarks.weights [--arch R152x4]

Writes a file of random weights to a temporary folder, loads it in a process of its own, and deletes it. The promise: at most 1.3
times the file's size, above what the process held after its imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import machine
from training.models import layouts, npz, zoo
from training.models.archs import ARCHS

CLASSES, LIMIT = 21_843, 1.3
LOAD = """
import json, re, sys, time
from training.models import npz, zoo
# VmHWM, not ru_maxrss: the latter carries the parent's peak over into a new process.
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, began = peak(), time.perf_counter()
model = npz.load(zoo.empty(sys.argv[1], int(sys.argv[2])), sys.argv[3])
print(json.dumps({"peak_bytes": peak() - before, "seconds": time.perf_counter() - began}))
"""


def arrays(arch: str) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for key, parameter in layouts.parameters(zoo.outline(arch, CLASSES)):
        yield key, rng.standard_normal(layouts.shapes(key, parameter)["published"], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="R152x4", choices=list(ARCHS))
    arch = parser.parse_args().arch
    described = machine.describe("numpy", "torch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.npz")
        began = time.perf_counter()
        npz.write(path, arrays(arch))
        size, written = path.stat().st_size, time.perf_counter() - began
        command = [sys.executable, "-c", LOAD, arch, str(CLASSES), str(path)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = told["peak_bytes"] / size
    figures = {"arch": arch, "classes": CLASSES, "file_bytes": size, "write_seconds": round(written, 1), **told}
    print(
        f"{arch}: file {size / 1e9:.2f} GB, peak {told['peak_bytes'] / 1e9:.2f} GB ({ratio:.3f}x), {told['seconds']:.1f} s"
    )
    machine.write(f"weights-{arch}", described, figures | {"ratio": round(ratio, 3)})
    if ratio > LIMIT:
        sys.exit(f"loading takes {ratio:.3f} times the file's size; the promise is {LIMIT}")


if __name__ == "__main__":
    main()
