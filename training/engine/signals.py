"""SIGTERM, the cluster's word that a pod must go: obeyed by the loop between two steps, outside the loop at once.

The loop ends its step and writes a checkpoint (with what runs already when it comes), for which it waits `grace_s` at most; the
message says how long it took.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 143  # 128 + SIGTERM, what schedulers expect of a process that obeyed it


class Stopped(SystemExit):
    """Training stopped on request; the process ends with 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)

    def __str__(self) -> str:
        return "stopped by SIGTERM before or after the steps of training; start again to go on from the last checkpoint"


class Preempted(Stopped):
    """Stopped between two steps. `written` is the newest checkpoint, `whole`: it is of this step."""

    def __init__(self, step: int, seconds: float, written: str | None, whole: bool) -> None:
        super().__init__()
        self.step, self.seconds, self.written, self.whole = step, seconds, written, whole

    def __str__(self) -> str:
        said = f"stopped by SIGTERM after step {self.step}, {self.seconds:.1f} s after it came; "
        if self.whole:
            return f"{said}{self.written} was written, start again to go on from there"
        if self.written:
            return f"{said}its checkpoint could not be written, the last good one is {self.written}"
        return f"{said}no checkpoint could be written: the next start begins anew"


class StopFlag:
    """Whether, and when, the process was asked to stop."""

    def __init__(self) -> None:
        self.is_set, self._at = False, 0.0

    def set(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        if not self.is_set:
            self.is_set, self._at = True, time.monotonic()

    def seconds(self) -> float:
        """Since it was asked; 0 where it wasn't."""
        return time.monotonic() - self._at if self.is_set else 0.0

    def left_s(self) -> float:
        """Seconds of the grace that are left; without end as long as nobody asked."""
        return grace_s() - self.seconds() if self.is_set else math.inf


def grace_s() -> float:
    """How long a process that was asked to stop waits for its store.

    torchrun kills its ranks TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds after it passed SIGTERM on, 30 where that is not set; the last
    words to the store and to MLflow take 10 s each where those hang too.
    """
    default = 30 if "TORCHELASTIC_RUN_ID" in os.environ else 110
    limit_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", default))
    return max(limit_s - 25, limit_s / 2)


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """A flag that SIGTERM sets while the context lasts; the handler from before comes back at its end."""
    flag = StopFlag()
    before = signal.signal(signal.SIGTERM, flag.set)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped while the context lasts; the handler from before comes back at its end."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
