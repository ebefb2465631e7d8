"""A load generator for the service's tests and benchmarks: keep-alive connections, few microseconds a request.

closed(): every connection asks again as soon as it is answered: finds capacity. arriving(): requests come at random at a given
rate, whatever the service does, as customers do: finds out what overload does.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import numpy as np


@dataclass
class Result:
    """seconds: latencies of the good answers; statuses: all answers by status, 0 for a connection that broke; late: good
    answers that came when no more requests were sent: they say nothing of the rate.
    """

    took_s: float = 0.0
    late: int = 0
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def good(self) -> int:
        return len(self.seconds)

    @property
    def rate(self) -> float:
        """Good answers per second while requests were sent."""
        return (self.good - self.late) / self.took_s

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent)) * 1000 if self.seconds else float("nan")


def request(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.buffer, self.needed = b"", -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """(status, headers). Raises ConnectionError where the connection breaks first."""
        if self.transport.is_closing():
            raise ConnectionError("closed")
        self.answer = asyncio.get_running_loop().create_future()
        self.buffer, self.needed = b"", -1
        self.transport.write(data)
        return await self.answer

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.needed < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:") + 15
            self.needed = end + 4 + int(head[at : head.find(b"\r\n", at) if b"\r\n" in head[at:] else None])
            self.head = head
        if len(self.buffer) >= self.needed and self.answer is not None and not self.answer.done():
            if b"connection: close" in self.head:
                self.transport.close()
            self.answer.set_result((int(self.head[9:12]), self.head))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("the connection broke"))


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    _, connection = await asyncio.get_running_loop().create_connection(Connection, parts.hostname, parts.port)
    return connection


async def closed(url: str, data: bytes, connections: int, seconds: float, warm_up_s: float = 0.5) -> Result:
    """Every connection asks again as soon as it is answered; a refused one asks again at once."""
    result, began = Result(), time.perf_counter() + warm_up_s
    end = began + seconds

    async def client() -> None:
        connection = await connect(url)
        while (asked := time.perf_counter()) < end:
            try:
                status, _ = await connection.ask(data)
            except ConnectionError:
                status, connection = 0, await connect(url)
            now = time.perf_counter()
            if began <= now <= end:
                result.statuses[status] += 1
                if status == 200:
                    result.seconds.append(now - asked)
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    result.took_s = seconds
    return result


async def arriving(
    url: str,
    data: bytes,
    rate: float,
    seconds: float,
    *,
    deadline_s: float,
    tries: int = 1,
    back_off: bool = False,
    seed: int = 0,
) -> Result:
    """Requests come at random, `rate` per second on average; a refused one is tried again, `tries` times in all: after the time
    that Retry-After names (back_off), or 10 ms later (a storm). An answer after the deadline is not a good one.
    """
    result, idle, random_source = Result(), [await connect(url) for _ in range(64)], random.Random(seed)

    async def customer(asked: float) -> None:
        for attempt in itertools.count(1):
            connection = idle.pop() if idle else await connect(url)
            try:
                status, head = await connection.ask(data)
                if not connection.transport.is_closing():
                    idle.append(connection)
            except ConnectionError:
                status, head = 0, b""
            now = time.perf_counter()
            result.statuses[status] += 1
            if status == 200 and now - asked <= deadline_s:
                result.seconds.append(now - asked)
                result.late += now > began + seconds
            if status == 200 or now - asked > deadline_s or (attempt == tries):
                return
            if back_off:
                at = head.find(b"retry-after:") + 12
                named = float(head[at : head.find(b"\r\n", at)]) if at >= 12 else 1.0
                await asyncio.sleep(named * random_source.uniform(0.5, 1.5))
            else:
                await asyncio.sleep(0.01)

    began = time.perf_counter()
    customers, due = set(), began
    while due < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(customer(time.perf_counter()))
        customers.add(task)
        task.add_done_callback(customers.discard)
        due += random_source.expovariate(rate)
    result.took_s = time.perf_counter() - began
    await asyncio.gather(*customers)
    for connection in idle:
        connection.transport.close()
    return result
