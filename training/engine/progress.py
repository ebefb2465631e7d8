"""What is seen while training runs: a bar on a terminal, plain lines elsewhere, JSON lines with BIT_LOG_JSON=1.

The same figures go to Prometheus (gauges.py).
"""

import json
import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from training.engine import gauges

LINE_EVERY_S = 10.0


class Progress:
    """Progress over `total` steps, of which `done` were done before. Silent when not `visible` (ranks above 0)."""

    log_every = 50  # steps between figures: rare enough that reading them off the device costs nothing

    def __init__(self, title: str, total: int, done: int, visible: bool) -> None:
        self.title, self.total, self.done, self.visible = title, total, done, visible
        self.began, self.from_step, self.last_line = time.monotonic(), done, -LINE_EVERY_S
        self.labels, self.last_step = gauges.labels_of(title), time.monotonic()
        self.bar: Bar | None = None
        if visible:
            gauges.serve()
            gauges.RESTARTS.labels(*self.labels).inc(1 if done else 0)
        if visible and sys.stderr.isatty() and not os.environ.get("BIT_LOG_JSON"):
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=done, figures="")
        if visible and done:
            _say(f"{title}: resumed after step {done}")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        gauges.STEPS.labels(*self.labels).inc()
        gauges.STEP_SECONDS.labels(*self.labels).observe(now - self.last_step)
        self.last_step = now
        if self.bar:
            self.bar.update(self.task, completed=self.done)

    def show(self, steps: int, figures: dict[str, float]) -> None:
        """The latest figures, with the steps they stand for."""
        for name, gauge in gauges.FIGURES.items():
            if name in figures:
                gauge.labels(*self.labels).set(figures[name])
        if os.environ.get("BIT_LOG_JSON"):
            if self.visible:
                _say(json.dumps({"training": self.title, "step": steps, "steps": self.total, **figures}))
            return
        text = " · ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in figures.items())
        if self.bar:
            self.bar.update(self.task, figures=text)
        elif self.visible and (time.monotonic() - self.last_line >= LINE_EVERY_S or steps == self.total):
            self.last_line = time.monotonic()
            left_s = (self.total - steps) * (time.monotonic() - self.began) / max(1, steps - self.from_step)
            _say(f"{self.title} {steps}/{self.total} · {text} · {left_s:.0f} s left")


def _say(line: str) -> None:
    with suppress(OSError):  # a log on a full disk costs the line, not the training
        print(line, file=sys.stderr)
