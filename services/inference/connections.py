"""uvicorn, hardened: idle connections are closed, bodies have their time, and SIGTERM first stops being ready, then stops."""

import asyncio
import gc
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, MutableMapping
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from services.inference.settings import Settings

OWN_FILES = 512  # descriptors kept for what isn't a connection


class Exchanged:
    """One request's way through the application: its body within a time limit, its answer in one write.

    uvicorn writes head and body apart: two calls into the kernel here, and two awakenings of the client.
    """

    def __init__(self, cycle: RequestResponseCycle, app: Any, body_timeout_s: float) -> None:
        self.cycle, self.app, self.body_timeout_s = cycle, app, body_timeout_s
        self.deadline: float | None = None
        self.head: MutableMapping[str, Any] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, self.receive, self.send)

    async def receive(self) -> Any:
        """Raises TimeoutError."""
        cycle = self.cycle
        if cycle.response_complete or not cycle.more_body:  # nothing to wait for, or the client's going
            return await cycle.receive()
        if self.deadline is None:
            self.deadline = time.monotonic() + self.body_timeout_s
        async with asyncio.timeout(self.deadline - time.monotonic()):
            return await cycle.receive()

    async def send(self, message: Any) -> None:
        cycle, head = self.cycle, self.head
        if message["type"] == "http.response.start":
            self.head = message
            return
        if head is not None:
            self.head = None
            whole = self._whole(head, message)
            if whole is not None and not cycle.flow.write_paused and not cycle.disconnected:
                cycle.response_started = cycle.response_complete = True
                cycle.transport.write(whole)
                cycle.message_event.set()
                if not cycle.keep_alive:
                    cycle.transport.close()
                cycle.on_response()
                return
            await cycle.send(head)  # type: ignore[arg-type]
        await cycle.send(message)

    def _whole(self, head: MutableMapping[str, Any], message: Any) -> bytes | None:
        """Head and body of an answer that is one piece of known length; None where it must go uvicorn's way."""
        cycle, body = self.cycle, message.get("body", b"")
        if message.get("more_body") or cycle.scope["method"] == "HEAD" or cycle.waiting_for_100_continue:
            return None
        lines, length = [STATUS_LINE[head["status"]]], None
        for name, value in (*cycle.default_headers, *head["headers"]):
            if b"\n" in value or b"\r" in value or name == b"transfer-encoding":
                return None
            if name == b"content-length":
                length = value
            elif name == b"connection":
                cycle.keep_alive = cycle.keep_alive and value != b"close"
                continue
            lines += (name, b": ", value, b"\r\n")
        if length != b"%d" % len(body):
            return None
        lines += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        return b"".join(lines)


def protocol(header_timeout_s: float, body_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with time limits for each request's body and headers, the first as well as the next on the connection.

    uvicorn itself limits the pause between two requests, not the first header: half-open connections would stay for ever.
    """

    class Protocol(HttpToolsProtocol):
        deadline: asyncio.TimerHandle | None = None
        in_header = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_header()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_header and self.deadline is None:  # most headers come whole and need no timer
                self._expect_header()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.in_header = True

        def on_headers_complete(self) -> None:
            self.in_header = False
            self._header_came()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._header_came()
            super().connection_lost(exc)

        def on_body(self, body: bytes) -> None:
            cycle = self.cycle
            if cycle.body or cycle.response_complete or self.parser.should_upgrade():
                super().on_body(body)
                return
            cycle.body = body  # type: ignore[assignment]  # as it is: uvicorn copies each body twice
            if len(body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            super()._start_asgi_task(cycle, Exchanged(cycle, app, body_timeout_s))

        def _expect_header(self) -> None:
            self.deadline = self.loop.call_later(header_timeout_s, self._give_up)

        def _header_came(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _give_up(self) -> None:
            self.deadline = None
            if not self.transport.is_closing():
                self.transport.abort()

    return Protocol


class Server(uvicorn.Server):
    """A server whose first SIGTERM (or Ctrl-C) drains: not ready, still answering, for `drain_s`; then it ends what runs."""

    def __init__(self, config: uvicorn.Config, drain_s: float, draining: Callable[[], None]) -> None:
        super().__init__(config)
        self.drain_s, self.draining, self.drains = drain_s, draining, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first, self.drains = not self.drains, True
        self.draining()
        if first and self.drain_s and sig == signal.SIGTERM:
            loop = asyncio.get_running_loop()  # a signal handler interrupts the loop: it may only leave it a message
            loop.call_soon_threadsafe(loop.call_later, self.drain_s, super().handle_exit, sig, frame)
        else:
            super().handle_exit(sig, frame)


def run(app: object, settings: Settings, draining: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises the limit of open files, so that idle connections cannot use it up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = hard - OWN_FILES if hard != resource.RLIM_INFINITY else None
    gc.freeze()  # what was imported stays: to look through it again for garbage stops every thread for 30 ms and more (measured)
    sys.setswitchinterval(0.0005)  # the event loop gets the interpreter back sooner from the workers (measured)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol(settings.header_timeout_s, settings.body_timeout_s),
        ws="none",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=settings.grace_s,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        limit_concurrency=connections,
        proxy_headers=False,
    )
    Server(config, settings.drain_s, draining).run()
