"""How busy this machine is while it trains, for MLflow beside the figures of training: `system/…`."""

import os
import time

from training.engine.backends import Backend


class Load:
    """How busy this process keeps its machine, from its making on."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._wall, self._used = time.monotonic(), time.process_time()

    def figures(self) -> dict[str, float]:
        """system/cpu: share of all processors that was used since the last call; memory in GB, peaks since the process began."""
        wall, used = self._wall, self._used
        self._wall, self._used = time.monotonic(), time.process_time()
        return {
            "system/cpu": (self._used - used) / max(1e-9, self._wall - wall) / len(os.sched_getaffinity(0)),
            "system/memory_peak_gb": Backend.peak_bytes(self.backend) / 1e9,
            "system/memory_free_gb": Backend.free_bytes(self.backend) / 1e9,
            **{f"system/device_{name}": value for name, value in self.backend.busy().items()},
        }
