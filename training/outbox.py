"""Figures on their way to MLflow: kept on disk until they are delivered, in order, once, while training goes on.

A line of the file is one `put`; beside it `.sent` says how many bytes of it were delivered. A batch that was delivered when the
process died before it could note so is sent again with the same times: MLflow keeps equal figures once.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BATCH = 500  # figures a request
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
Figure = list[Any]  # name, value, time in ms, step
log = logging.getLogger(__name__)


class Outbox:
    """deliver: called from one thread with a list of figures; raises where they did not arrive."""

    def __init__(self, path: Path, deliver: Callable[[list[Figure]], object]) -> None:
        self.path, self.deliver = path, deliver
        self._mark = path.with_name(f"{path.name}.sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._sent = int(self._mark.read_text()) if self._mark.is_file() else 0
        self._size = path.stat().st_size
        self._changed, self._closed = threading.Condition(), False
        self.reached = self._steps()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after `step`; those that an earlier attempt put already are left out, so that a curve never goes back."""
        now = int(time.time() * 1000)
        fresh = [[name, value, now, step] for name, value in figures.items() if step > self.reached.get(name, -1)]
        if not fresh:
            return
        self.reached |= {str(figure[0]): step for figure in fresh}
        line = json.dumps(fresh) + "\n"
        with self._changed:
            self._file.write(line)
            self._file.flush()
            self._size += len(line.encode())
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all is delivered; False where that did not come about in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._sent >= self._size, timeout_s)

    def close(self) -> None:
        """Ends the thread; what is not delivered stays on disk for the next attempt."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._file.close()

    def _steps(self) -> dict[str, int]:
        """The last step of every figure in the file. A line that was cut by a kill is cut off."""
        reached: dict[str, int] = {}
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                reached |= {name: step for name, _, _, step in json.loads(line)}
        if whole < self._size:
            self._file.truncate(whole)
            self._size = whole
        return reached

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._sent < self._size)
                if self._closed:
                    return
            batch, end = self._next()
            try:
                self.deliver(batch)
            except Exception as error:
                wait = RETRY_S[min(failures, len(RETRY_S) - 1)]
                if failures == 0:
                    log.warning("MLflow does not take figures (%s); they wait in %s", error, self.path)
                failures += 1
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, wait):
                        return
                continue
            if failures:
                log.warning("MLflow takes figures again")
            failures = 0
            temporary = self._mark.with_suffix(".tmp")
            temporary.write_text(str(end))
            temporary.rename(self._mark)
            with self._changed:
                self._sent = end
                self._changed.notify_all()

    def _next(self) -> tuple[list[Figure], int]:
        """The next figures to deliver, and the place in the file behind them."""
        batch: list[Figure] = []
        with self.path.open("rb") as file:
            file.seek(self._sent)
            end = self._sent
            for line in file:
                if not line.endswith(b"\n") or (batch and len(batch) + len(json.loads(line)) > BATCH):
                    break
                batch += json.loads(line)
                end += len(line)
        return batch, end
