"""One request between a connection and an ASGI application: its body in pieces, its answer as a whole."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from services.inference.http1 import CLOSE, JSON

log = logging.getLogger("bit.asgi")
MOST_AHEAD = 64 * 1024  # bytes of a body that are read before the application takes them


class Connection(Protocol):
    """What a request needs of its connection. full: the client must read first, `writable` says when it did."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    body_s: float
    full: bool
    writable: asyncio.Event

    def read_on(self) -> None: ...

    def answer(self, request: "Request", status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None: ...


class Request:
    """One request's way through an ASGI application, which reads its body by `receive` and answers by `send`."""

    __slots__ = (
        "answered",
        "body",
        "connection",
        "deadline",
        "expects_continue",
        "gone",
        "head",
        "keep_alive",
        "more_body",
        "news",
        "parts",
        "scope",
        "waiting",
    )

    def __init__(self, connection: Connection, scope: dict[str, Any], keep_alive: bool, expects: bool) -> None:
        self.connection, self.scope, self.keep_alive, self.expects_continue = connection, scope, keep_alive, expects
        self.body, self.more_body, self.deadline = b"", True, 0.0
        self.news = self.answered = self.gone = False  # news: something to receive; gone: the client
        self.waiting: asyncio.Future[None] | None = None
        self.head: dict[str, Any] = {}
        self.parts: list[bytes] = []

    async def run(self, app: Any) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except (Exception, asyncio.CancelledError):  # cancelled: the grace of a service that ends is over
            log.exception("%s %s failed", self.scope["method"], self.scope["path"])
        if not self.answered:
            self.connection.answer(self, 500, [JSON], b'{"error":"internal error"}')

    async def receive(self) -> dict[str, Any]:
        """The next piece of the body. Raises TimeoutError once a body has taken too long."""
        if self.gone or self.answered:
            return {"type": "http.disconnect"}
        if self.expects_continue and not self.connection.transport.is_closing():
            self.connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.expects_continue = False
        self.connection.read_on()
        if not self.news:
            await self._wait()
        self.news = False
        if self.gone or self.answered:
            return {"type": "http.disconnect"}
        body, self.body = self.body, b""
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def _wait(self) -> None:
        loop = self.connection.loop
        self.deadline = self.deadline or loop.time() + self.connection.body_s
        self.waiting = loop.create_future()
        async with asyncio.timeout_at(self.deadline if self.more_body else None):
            await self.waiting

    def wake(self) -> None:
        self.news = True
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)

    async def send(self, message: Any) -> None:
        """Returns once the client has read the answer, all but what the system's buffers hold."""
        if message["type"] == "http.response.start":
            self.head = message
            return
        self.parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        connection = self.connection
        if connection.full:
            await connection.writable.wait()
        parts, self.parts = self.parts, []  # a connection keeps its last request for as long as it stays
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        connection.answer(self, self.head["status"], self.head.get("headers", ()), body)
        if connection.full:
            await connection.writable.wait()

    def worth_reading(self) -> bool:
        """Whether what is left of a body that was refused at its headers is little enough to keep the connection.

        Who waits for a word that did not come may send the body or leave it out: then what follows cannot be told apart.
        """
        if self.expects_continue:
            return False
        announced = dict(self.scope["headers"]).get(b"content-length", b"")
        return announced.isdigit() and len(announced) < 6 and int(announced) <= MOST_AHEAD


async def crowded(scope: Any, receive: Any, send: Any) -> None:
    """The application for one connection too many."""
    body = orjson.dumps({"error": "all connections of this instance are taken; try again"})
    await send({"type": "http.response.start", "status": 503, "headers": [JSON, CLOSE, (b"retry-after", b"1")]})
    await send({"type": "http.response.body", "body": body})
