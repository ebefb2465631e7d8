"""The queues in front of the workers: what is charged is what it took, and how long the queue may become."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from services.inference.engine import Session
from services.inference.errors import BadRequest, DeadlineExceeded, Unavailable
from services.inference.metrics import Metrics
from services.inference.models import Served
from services.inference.scheduler import FIRST_GUESS_S, Scheduler, Work
from tests.services.exports import export, gray_png

LARGE = gray_png(250, 2000)


@asynccontextmanager
async def scheduler(max_queue_ms: float = 2000, workers: int = 1) -> AsyncIterator[Scheduler]:
    made = Scheduler(workers, 8, 5, max_queue_ms, 50_000_000, 2000, Metrics())
    try:
        yield made
    finally:
        await asyncio.to_thread(made.close)


def served(tenant: str, session: Session) -> Served:
    return Served(tenant, "1", "0" * 64, session, 0.0, 0)


async def ask(scheduler: Scheduler, version: Served, *pictures: bytes, weight: float = 1, in_s: float = 60) -> list:
    answer: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
    work = Work(version, list(pictures), ("probabilities",), time.monotonic() + in_s, answer, weight)
    return await scheduler.submit(work)


def test_what_a_tenant_is_charged_is_what_its_work_took() -> None:
    """Small pictures and garbage teach the scheduler a low price, at which the large ones that follow would be a bargain."""

    async def run() -> None:
        session = Session(export())
        async with scheduler() as one:
            honest, sly = served("honest", session), served("sly", session)
            await ask(one, honest, LARGE)
            price_s = one.cost_s(honest, 1)
            for _ in range(30):
                with pytest.raises(BadRequest):
                    await ask(one, sly, b"garbage")
            assert one.cost_s(sly, 1) == price_s, "nothing is learnt from what was not answered"
            for _ in range(30):
                await ask(one, sly, gray_png(1))
            before_s, began = one.usage.of("sly", time.monotonic()), time.monotonic()
            for _ in range(10):
                await ask(one, sly, LARGE)
            took_s = time.monotonic() - began
            charged_s = one.usage.of("sly", time.monotonic()) - before_s
            assert charged_s > 0.4 * took_s
            with pytest.raises(DeadlineExceeded):
                await ask(one, served("late", session), *[LARGE] * 64, in_s=-1)
            await asyncio.sleep(0.05)
            assert one.usage.of("late", time.monotonic()) < FIRST_GUESS_S, "what was not done costs nothing"

    asyncio.run(run())


def test_many_tenants_together_cannot_make_the_queue_long() -> None:
    async def run() -> None:
        session = Session(export(mflop=1000))
        async with scheduler(max_queue_ms=100) as one:
            versions = [served(f"t{n}", session) for n in range(200)]
            asked = [asyncio.create_task(ask(one, version, gray_png(1), gray_png(1))) for version in versions]
            await asyncio.sleep(0)
            assert one.queue_s <= 0.3
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, Unavailable)]
            assert 150 < len(refused) < 200
            assert "ms of work are waiting" in str(refused[0])
            [rows] = await ask(one, versions[0], *[gray_png(1)] * 64)  # alone it may be larger than the queue
            assert len(rows) == 64

    asyncio.run(run())


def test_a_broken_picture_between_others_leaves_them_their_own_answers() -> None:
    """Requests of one batch share an array; what cannot be decoded must not shift its neighbours' answers."""

    async def run() -> None:
        session = Session(export(mflop=1))
        pictures = [gray_png(level) for level in (0, 80, 160, 240)]
        async with scheduler() as one:
            version = served("tenant", session)
            alone = [(await ask(one, version, picture))[0][0] for picture in pictures]
            busy = asyncio.create_task(ask(one, version, LARGE))  # the others wait behind it, and go together
            await asyncio.sleep(0.005)
            asked = [pictures[0], b"garbage", *pictures[1:], b"\xff\xd8\xff garbage"]
            before = version.stats.executions
            got = await asyncio.gather(*(ask(one, version, data) for data in asked), return_exceptions=True)
            await busy
            assert version.stats.executions - before <= 3, "they did not share a batch, so nothing was proven"
        assert [isinstance(answer, BadRequest) for answer in got] == [False, True, False, False, False, True]
        together = [answer[0][0] for answer in got if not isinstance(answer, BaseException)]
        np.testing.assert_allclose(together, alone, atol=1e-6)
        assert np.ptp(alone, axis=0).max() > 1e-3, "pictures that are answered alike would prove nothing"

    asyncio.run(run())


def test_with_little_to_do_the_same_worker_does_it() -> None:
    """Its core still holds network and pictures; half a millisecond of one connection's latency was the other's cold core."""
    names = []

    class Watched(Session):
        def run(self, pixels: np.ndarray, outputs: tuple[str, ...] = ("probabilities",)) -> list[np.ndarray]:
            names.append(threading.current_thread().name)
            return super().run(pixels, outputs)

    async def run() -> None:
        async with scheduler(workers=3) as three:
            version = served("tenant", Watched(export()))
            for _ in range(10):
                await ask(three, version, gray_png(1))
                await asyncio.sleep(0.02)  # the worker is idle again

    asyncio.run(run())
    assert len(set(names)) == 1


def test_many_requests_wake_every_worker() -> None:
    names = set()

    class Slow(Session):
        def run(self, pixels: np.ndarray, outputs: tuple[str, ...] = ("probabilities",)) -> list[np.ndarray]:
            names.add(threading.current_thread().name)
            time.sleep(0.05)
            return super().run(pixels, outputs)

    async def run() -> None:
        async with scheduler(workers=3) as three:
            version = served("tenant", Slow(export()))
            await asyncio.gather(*(ask(three, version, gray_png(1)) for _ in range(9)))

    asyncio.run(run())
    assert len(names) == 3
