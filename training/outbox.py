"""Figures on their way to MLflow: kept on disk until they are delivered, in order, once, while training goes on.

A line of the file is one `put`; beside it `.sent` says how many bytes of it were delivered. A batch that was delivered when the
process died before it could note so is sent again with the same times: MLflow keeps equal figures once.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

BATCH = 500  # figures a request
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
Figure = list[Any]  # name, value, time in ms, step
log = logging.getLogger(__name__)


class Outbox:
    """deliver: called from one thread with a list of figures; raises where they did not arrive.

    Figures are in memory too until they are delivered: a full disk costs only what the next process would find on it.
    """

    def __init__(self, path: Path, deliver: Callable[[list[Figure]], object]) -> None:
        self.path, self.deliver = path, deliver
        self._mark = path.with_name(f"{path.name}.sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._size = self._sent = 0  # bytes that were put, and that were delivered
        self._unwritten = b""  # the last of them, where the disk is full
        self._waiting: deque[tuple[list[Figure], int]] = deque()  # the figures of a line, the place behind it
        self._changed, self._closed = threading.Condition(), False
        self.reached = self._read()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, figures: Mapping[str, float], step: int) -> None:
        """Figures after `step`; those that an earlier attempt put already are left out, so that a curve never goes back."""
        now = int(time.time() * 1000)
        fresh = [[name, value, now, step] for name, value in figures.items() if step > self.reached.get(name, -1)]
        if not fresh:
            return
        self.reached |= {str(figure[0]): step for figure in fresh}
        line = json.dumps(fresh).encode() + b"\n"
        with self._changed:
            self._size += len(line)
            self._waiting.append((fresh, self._size))
            self._write(line)
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

    def _read(self) -> dict[str, int]:
        """Takes up what an earlier process left; the last step of every figure. A line that was cut by a kill is cut off."""
        sent = int(self._mark.read_text() or 0) if self._mark.is_file() else 0
        reached: dict[str, int] = {}
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._size += len(line)
                figures = json.loads(line)
                reached |= {name: step for name, _, _, step in figures}
                if self._size > sent:
                    self._waiting.append((figures, self._size))
        self._file.truncate(self._size)
        self._sent = min(sent, self._size)
        return reached

    def _write(self, line: bytes) -> None:
        """Appends to the file; what a full disk does not take is tried again with the next line."""
        was_full = bool(self._unwritten)
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not was_full:
                log.warning("%s cannot be written (%s); figures wait in memory", self.path, error)

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
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
            with self._changed:
                while self._waiting and self._waiting[0][1] <= end:
                    self._waiting.popleft()
                on_disk = self._size - len(self._unwritten)
            self._note(min(end, on_disk))
            with self._changed:
                self._sent = end
                self._changed.notify_all()

    def _next(self) -> tuple[list[Figure], int]:
        """The next figures to deliver, and the place behind them."""
        batch: list[Figure] = []
        end = self._sent
        for figures, place in self._waiting:
            if batch and len(batch) + len(figures) > BATCH:
                break
            batch, end = batch + figures, place
        return batch, end

    def _note(self, sent: int) -> None:
        """Remembers what was delivered. Where the disk is full the next process delivers it again, which changes nothing."""
        temporary = self._mark.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(str(sent))
            temporary.rename(self._mark)
