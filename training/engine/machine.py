"""How busy this machine is while it trains, for MLflow beside the figures of training: `system/…`."""

import os
import time

from training.engine.backends import Backend

_last = [time.monotonic(), time.process_time()]  # wall and processor seconds at the last call


def figures(backend: Backend) -> dict[str, float]:
    """system/cpu: share of all processors that this process used since the last call; memory in GB, peaks since its start."""
    now, used = time.monotonic(), time.process_time()
    wall, busy = max(1e-9, now - _last[0]), used - _last[1]
    _last[:] = now, used
    return {
        "system/cpu": busy / wall / len(os.sched_getaffinity(0)),
        "system/memory_peak_gb": Backend.peak_bytes(backend) / 1e9,
        "system/memory_free_gb": Backend.free_bytes(backend) / 1e9,
        **{f"system/device_{name}": value for name, value in backend.busy().items()},
    }
