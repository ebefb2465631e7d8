"""Requests → batches → answers: a bounded queue in front of one worker thread per core.

A worker takes what waits for one session, decodes it, runs it and answers; on a CPU nothing is gained by waiting for a fuller
batch. The queue is bounded in time, not in items: what is waiting must be done within `max_queue_ms`.
"""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services import preprocess
from services.inference.errors import BadRequest, DeadlineExceeded, ServiceError, Unavailable
from services.inference.metrics import Metrics
from services.inference.models import Served

FIRST_GUESS_S = 0.02  # cost of a picture before any was measured


@dataclass(eq=False)
class Work:
    """One request's pictures. data: encoded pictures, or pixels [n, S, S, 3]; deadline: on time.monotonic's clock."""

    served: Served
    data: list[bytes] | NDArray[np.uint8]
    outputs: tuple[str, ...]
    deadline: float
    answer: "asyncio.Future[list[NDArray[np.float32]]]"
    queued: float = field(default_factory=time.monotonic)
    timings: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)


class Scheduler:
    """Start it inside a running event loop; `submit` belongs to that loop, the workers are threads."""

    def __init__(self, workers: int, max_batch: int, max_queue_ms: float, metrics: Metrics) -> None:
        self.max_batch, self.max_queue_s, self.metrics = max_batch, max_queue_ms / 1000, metrics
        self.workers = workers
        self._queue: deque[Work] = deque()
        self._ready = threading.Condition()
        self._picture_s = FIRST_GUESS_S  # smoothed cost of one picture on one worker
        self._waiting = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._threads = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def queue_s(self) -> float:
        """How long the work that waits will take."""
        return self._waiting * self._picture_s / self.workers

    async def submit(self, work: Work) -> list[NDArray[np.float32]]:
        """The named outputs for the request's pictures, one row each. Raises a ServiceError."""
        if self._closed:
            raise Unavailable("the service is shutting down; ask another instance")
        if self.queue_s > self.max_queue_s:
            raise Unavailable(f"{self.queue_s * 1000:.0f} ms of work are waiting; try again")
        with self._ready:
            self._queue.append(work)
            self._waiting += len(work)
            self._ready.notify()
        self.metrics.queue.set(self.queue_s)
        return await work.answer

    def close(self) -> None:
        """Ends the workers once the queue is empty."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._take():
            began = time.monotonic()
            alive = [work for work in batch if self._in_time(work, began)]
            ready = [work for work in alive if self._decode(work)]
            if ready:
                self._infer(ready)
            count = sum(map(len, alive))
            if count:
                self._picture_s += 0.1 * ((time.monotonic() - began) / count - self._picture_s)

    def _take(self) -> list[Work]:
        """The next request and those behind it for the same session and outputs; empty when the service ends.

        A worker leaves the others their share: with little waiting, every core gets some of it.
        """
        with self._ready:
            while not self._queue:
                if self._closed:
                    return []
                self._ready.wait()
            first = self._queue.popleft()
            batch, count = [first], len(first)
            limit = min(self.max_batch, 1 + self._waiting // self.workers)
            while self._queue and count + len(self._queue[0]) <= limit:
                following = self._queue[0]
                if following.served.session is not first.served.session or following.outputs != first.outputs:
                    break
                batch.append(self._queue.popleft())
                count += len(following)
            self._waiting -= count
            return batch

    def _in_time(self, work: Work, now: float) -> bool:
        work.timings["queue"] = now - work.queued
        if now > work.deadline:
            self._fail(work, DeadlineExceeded("the deadline passed while the request was waiting"))
            return False
        return not work.answer.cancelled()

    def _decode(self, work: Work) -> bool:
        if isinstance(work.data, np.ndarray):
            return True
        began, size = time.monotonic(), work.served.session.card.resolution
        try:
            work.data = np.stack([preprocess.pixels(data, size) for data in work.data])
        except preprocess.PictureError as error:
            self._fail(work, BadRequest(str(error)))
            return False
        work.timings["decode"] = time.monotonic() - began
        return True

    def _infer(self, batch: list[Work]) -> None:
        began, first = time.monotonic(), batch[0]
        try:
            pixels = np.concatenate([work.data for work in batch]) if len(batch) > 1 else first.data
            results = first.served.session.run(pixels, first.outputs)  # type: ignore[arg-type]
        except Exception as error:  # a batch that fails must fail its requests, not its worker
            for work in batch:
                self._fail(work, error)
            return
        took, start = time.monotonic() - began, 0
        for work in batch:
            work.timings["infer"] = took
            rows = [
                r if name == "head_weight" else r[start : start + len(work)]
                for name, r in zip(first.outputs, results, strict=True)
            ]
            start += len(work)
            self._loop.call_soon_threadsafe(_resolve, work.answer, rows)

    def _fail(self, work: Work, error: Exception) -> None:
        self._loop.call_soon_threadsafe(_reject, work.answer, error)


def _resolve(answer: "asyncio.Future[list[NDArray[np.float32]]]", rows: list[NDArray[np.float32]]) -> None:
    if not answer.done():
        answer.set_result(rows)


def _reject(answer: "asyncio.Future[list[NDArray[np.float32]]]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error if isinstance(error, ServiceError) else RuntimeError("inference failed"))
