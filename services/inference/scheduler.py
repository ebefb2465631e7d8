"""Requests → batches → answers: bounded queues, one per tenant, in front of one worker thread per core.

A worker takes the next requests of the tenant that received least work lately (fair share by decayed usage, as in Kay and Lauder,
1988), decodes, runs and answers them: a tenant within its share goes ahead of one beyond it, so that the excess waits, not the
others. Work is measured in seconds of this machine, learnt per version: a large network or large pictures pay what they cost.
On a CPU nothing is gained by waiting for a fuller batch, little by more than two pictures (more leave the caches), and a long one
makes everybody else wait: it ends at `max_batch_ms`.
"""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services import preprocess
from services.inference.errors import BadRequest, DeadlineExceeded, ServiceError, TooLarge, Unavailable
from services.inference.metrics import Metrics
from services.inference.models import Served
from services.inference.priority import Idle, give_way
from services.preprocess import Pixels

NICENESS = 5  # a worker gives way to the event loop, which has little to do but must do it at once
HALF_LIFE_S = 2.0  # shorter averages are so noisy that a tenant within its share at times waits behind one beyond it
FIRST_GUESS_S = 0.02  # cost of a picture before any was measured


@dataclass(eq=False)
class Work:
    """One request's pictures. data: encoded pictures, or pixels [n, S, S, 3]; deadline: on time.monotonic's clock.

    timings: where the seconds of each stage are noted.
    """

    served: Served
    data: list[bytes] | NDArray[np.uint8]
    outputs: tuple[str, ...]
    deadline: float
    answer: "asyncio.Future[list[NDArray[np.float32]]]"
    weight: float = 1.0
    queued: float = field(default_factory=time.monotonic)
    cost_s: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pictures = len(self.data)


class Lane:
    """One tenant's waiting requests, in order of arrival."""

    __slots__ = ("queue", "waiting_s")

    def __init__(self) -> None:
        self.queue: deque[Work] = deque()
        self.waiting_s = 0.0


class Usage:
    """Work that each tenant received lately, divided by its weight; half of it is forgotten every HALF_LIFE_S."""

    def __init__(self) -> None:
        self._received: dict[str, tuple[float, float]] = {}  # tenant → (seconds of work, when that was)

    def of(self, tenant: str, now: float) -> float:
        received_s, at = self._received.get(tenant, (0.0, now))
        return received_s * 0.5 ** ((now - at) / HALF_LIFE_S)

    def add(self, tenant: str, cost_s: float, now: float) -> None:
        """cost_s: below zero where less was received than was reckoned before."""
        self._received[tenant] = (max(0.0, self.of(tenant, now) + cost_s), now)


class Scheduler:
    """Start it inside a running event loop; `submit` belongs to that loop, the workers are threads."""

    def __init__(
        self,
        workers: int,
        max_batch: int,
        max_batch_ms: float,
        max_queue_ms: float,
        max_pixels: int,
        max_decode_ms: float,
        metrics: Metrics,
    ) -> None:
        self.max_batch, self.max_batch_s = max_batch, max_batch_ms / 1000
        self.max_queue_s, self.max_pixels, self.max_decode_s = max_queue_ms / 1000, max_pixels, max_decode_ms / 1000
        self.metrics, self.workers = metrics, workers
        self._lanes: dict[str, Lane] = {}  # tenants that have work waiting
        self.usage = Usage()
        metrics.queue.set_function(
            lambda: self.queue_s
        )  # asked at each scrape: set at arrivals, it would never fall to 0
        metrics.workers.set(workers)
        self._lock = threading.Lock()
        self._idle = Idle(self._lock)
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._threads = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def queue_s(self) -> float:
        """How long the work that waits will take."""
        return sum(lane.waiting_s for lane in list(self._lanes.values())) / self.workers

    def check(self, served: Served, pictures: int = 1) -> float:
        """What a request will cost, if it may wait; cheap enough to ask before its body is read. Raises Unavailable.

        Each of n waiting tenants has an nth of the queue, so that nobody can fill it for all; when it is full, only those who
        stay within that may wait, so that many tenants together cannot make it longer than twice its length.
        """
        if self._closed:
            raise Unavailable("the service is shutting down; ask another instance")
        lane = self._lanes.get(served.tenant)
        waiting_s = lane.waiting_s / self.workers if lane else 0.0
        tenants = max(1, len(self._lanes) + (lane is None))  # a worker may have emptied the lane by now
        cost_s = self.cost_s(served, pictures)
        if waiting_s + cost_s / self.workers <= self.max_queue_s / tenants:
            return cost_s
        if waiting_s > 0:  # a request alone may be larger than its share: else it would never be answered
            raise Unavailable(f"{waiting_s * 1000:.0f} ms of your work are waiting; try again", after_s=waiting_s)
        if (queue_s := self.queue_s) > self.max_queue_s:
            raise Unavailable(f"{queue_s * 1000:.0f} ms of work are waiting; try again", after_s=queue_s)
        return cost_s

    def charge(self, tenant: str, cost_s: float) -> None:
        """Counts work that was done for a tenant outside the workers; cost_s is divided by its weight already."""
        with self._lock:
            self.usage.add(tenant, cost_s, time.monotonic())

    def cost_s(self, served: Served, pictures: int) -> float:
        """Seconds of a worker that they will take, as far as is known."""
        return pictures * (served.session.picture_s or FIRST_GUESS_S)

    def submit(self, work: Work) -> "asyncio.Future[list[NDArray[np.float32]]]":
        """Its answer: the named outputs for the request's pictures, one row each, or a ServiceError. Raises Unavailable."""
        tenant = work.served.tenant
        work.cost_s = self.check(work.served, work.pictures)
        with self._lock:
            lane = self._lanes.get(tenant)
            if lane is None:
                lane = self._lanes[tenant] = Lane()
            lane.queue.append(work)
            lane.waiting_s += work.cost_s
            self._idle.wake()
        return work.answer

    def close(self) -> None:
        """Ends the workers once the queues are empty."""
        with self._lock:
            self._closed = True
            self._idle.wake_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        give_way(NICENESS)
        while batch := self._take():
            began = time.monotonic()
            alive = [work for work in batch if self._in_time(work, began)]
            if alive:
                self._compute(alive)
            busy_s, first = time.monotonic() - began, batch[0]
            self.metrics.busy.inc(busy_s)
            reckoned_s = sum(work.cost_s for work in batch)  # by a guess, which pictures of other sizes make wrong
            self.charge(first.served.tenant, (busy_s - reckoned_s) / first.weight)
            del batch, alive, first  # or an idle worker would keep a replaced version in memory

    def _learn(self, answered: list[Work]) -> None:
        """What a picture of this version costs, by those that were answered: what cannot be decoded costs next to nothing."""
        served, count = answered[0].served, sum(work.pictures for work in answered)
        served.stats.executions += 1
        served.stats.pictures += count
        took_s = sum(work.timings.get("decode", 0.0) for work in answered) + answered[0].timings["infer"]
        known = served.session.picture_s or took_s / count
        served.session.picture_s = known + (1 - 0.9**count) * (took_s / count - known)

    def _take(self) -> list[Work]:
        """The next request of the tenant that received least, and those behind it for the same session and outputs.

        A worker leaves the others their share: with little waiting, every core gets some of it. Empty when the service ends.
        """
        with self._lock:
            while not self._lanes:
                if self._closed:
                    return []
                self._idle.wait()
            now = time.monotonic()
            tenant = min(self._lanes, key=lambda name: self.usage.of(name, now))
            lane = self._lanes[tenant]
            queue = lane.queue
            first = queue.popleft()
            batch, count, cost_s = [first], first.pictures, first.cost_s
            limit = min(self.max_batch, 1 + len(queue) // self.workers)
            while queue and count + queue[0].pictures <= limit and cost_s + queue[0].cost_s <= self.max_batch_s:
                following = queue[0]
                if following.served.session is not first.served.session or following.outputs != first.outputs:
                    break
                batch.append(queue.popleft())
                count += following.pictures
                cost_s += following.cost_s
            self.usage.add(tenant, cost_s / first.weight, now)
            lane.waiting_s -= cost_s
            if not queue:
                del self._lanes[tenant]
            return batch

    def _in_time(self, work: Work, now: float) -> bool:
        work.timings["queue"] = now - work.queued
        if now > work.deadline:
            self._fail(work, DeadlineExceeded("the deadline passed while the request was waiting"))
            return False
        return not work.answer.cancelled()

    def _compute(self, batch: list[Work]) -> None:
        try:
            ready, pixels = self._decode(batch)
            if ready:
                self._infer(ready, pixels)
        except Exception as error:  # what fails must fail its requests, not its worker
            for work in batch:
                self._fail(work, error)

    def _decode(self, batch: list[Work]) -> tuple[list[Work], Pixels]:
        """Those whose pictures could be decoded, and the pixels of all of them in one array."""
        if len(batch) == 1 and isinstance(batch[0].data, np.ndarray):
            return batch, batch[0].data
        size = batch[0].served.session.card.resolution
        pixels = np.empty((sum(work.pictures for work in batch), size, size, 3), np.uint8)
        ready, count = [], 0
        for work in batch:
            if self._decode_into(pixels[count : count + work.pictures], work):
                ready.append(work)
                count += work.pictures
        return ready, pixels[:count]

    def _decode_into(self, pixels: Pixels, work: Work) -> bool:
        if isinstance(work.data, np.ndarray):
            pixels[:] = work.data
            return True
        began, number = time.monotonic(), 0
        try:
            for number, data in enumerate(work.data):
                if number and time.monotonic() > began + self.max_decode_s:  # one alone is bounded by its pixels
                    raise TooLarge(f"{number} of {work.pictures} pictures took the time of all to decode; send fewer")
                preprocess.pixels(data, pixels.shape[1], self.max_pixels, pixels[number])
        except preprocess.PictureError as error:
            which = f"picture {number}: " if work.pictures > 1 else ""
            self._fail(work, BadRequest(which + str(error)))
            return False
        except Exception as error:  # TooLarge, or what nobody foresaw (memory, say): not the others' fault
            self._fail(work, error)
            return False
        work.timings["decode"] = time.monotonic() - began
        return True

    def _infer(self, batch: list[Work], pixels: Pixels) -> None:
        began, first = time.monotonic(), batch[0]
        results = first.served.session.run(pixels, first.outputs)
        took, start = time.monotonic() - began, 0
        answered = []
        for work in batch:
            work.timings["infer"] = took
            rows = [
                r if name == "head_weight" else r[start : start + work.pictures]
                for name, r in zip(first.outputs, results, strict=True)
            ]
            start += work.pictures
            answered.append((work.answer, rows))
        self._learn(batch)
        self._loop.call_soon_threadsafe(_resolve, answered)  # once a batch: each call wakes the loop

    def _fail(self, work: Work, error: Exception) -> None:
        self._loop.call_soon_threadsafe(_reject, work.answer, error)


def _resolve(answered: list[tuple["asyncio.Future[list[NDArray[np.float32]]]", list[NDArray[np.float32]]]]) -> None:
    for answer, rows in answered:
        if not answer.done():
            answer.set_result(rows)


def _reject(answer: "asyncio.Future[list[NDArray[np.float32]]]", error: Exception) -> None:
    if not answer.done():
        failed = error
        if not isinstance(error, ServiceError):
            failed = RuntimeError("inference failed")
            failed.__cause__ = error  # the log's traceback shows it
        answer.set_exception(failed)
