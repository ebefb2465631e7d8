"""What a figure was measured on, and where it is written: benchmarks/results/<name>-<date>.json."""

import json
import os
import platform
import timeit
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def describe(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, Python, and the versions of the packages named.

    python_call_ns: of a function that does nothing. Python's own build, with profile-guided optimisation or without (as pyenv
    makes it unless told otherwise), moves whatever is measured of a server by a third.
    """
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "python_call_ns": round(min(timeit.repeat("f()", "def f(): pass", number=100_000, repeat=5)) * 1e4, 1),
        **{name: version(name) for name in packages},
    }


def write(name: str, machine: dict[str, Any], figures: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    print(f"written to {path.relative_to(RESULTS.parents[1])}")
    return path


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
