"""uvicorn, hardened: connections that never ask are closed, and SIGTERM first stops being ready, then stops."""

import asyncio
import math
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.inference.settings import Settings

OWN_FILES = 512  # descriptors kept for what isn't a connection


def protocol(header_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with a time limit for each request's headers, the first as well as the next on the connection.

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
    sys.setswitchinterval(0.0005)  # the event loop gets the interpreter back sooner from the workers (measured)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol(settings.header_timeout_s),
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
