"""SIGTERM, the cluster's word that a pod must go: noted here, obeyed by the loop between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 143  # 128 + SIGTERM, what schedulers expect of a process that obeyed it


class Preempted(SystemExit):
    """Training stopped on request after a checkpoint; the process ends with 143."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by SIGTERM after step {self.step}; a checkpoint was written, start again to go on from there"


class StopFlag:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, signum: int, frame: FrameType | None) -> None:
        self.is_set = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """A flag that SIGTERM sets while the context lasts; the handler from before comes back at its end."""
    flag = StopFlag()
    before = signal.signal(signal.SIGTERM, flag.set)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
