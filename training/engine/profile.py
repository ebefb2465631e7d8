"""`--profile N`: torch's profiler over N steps, after two that warm up; the trace is for chrome://tracing or Perfetto."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2
log = logging.getLogger(__name__)


class Profile:
    """Writes `path` after `steps` profiled steps. Entered around the loop; `step` is called after each step."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self._profiler: profile | None = None
        self._left = steps + WARM_UP

    @classmethod
    def none(cls) -> "Profile":
        """One that does nothing."""
        return cls(Path(), 0)

    def __enter__(self) -> Self:
        if self.steps:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=WARM_UP, active=self.steps, repeat=1),
                on_trace_ready=lambda made: made.export_chrome_trace(str(self.path)),
                record_shapes=True,
            )
            self._profiler.start()
        return self

    def step(self) -> None:
        if self._profiler:
            self._profiler.step()
            self._left -= 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._profiler:
            self._profiler.stop()
            if self._left > 0 and kind is None:
                log.warning(
                    "--profile %d takes %d steps, %d of them to warm up, and %d were left to do: there is no whole trace",
                    *(self.steps, self.steps + WARM_UP, WARM_UP, self.steps + WARM_UP - self._left),
                )
