"""The server: uvicorn with the connections of wire.py; SIGTERM first stops being ready, then stops."""

import asyncio
import gc
import math
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from services.inference import wire
from services.inference.settings import Settings

OWN_FILES = 512  # descriptors kept for what isn't a connection


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
    sys.setswitchinterval(0.0001)  # the event loop gets the interpreter back sooner from the workers (measured)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=wire.protocol(wire.Limits(settings.header_timeout_s, settings.body_timeout_s, settings.answer_timeout_s)),
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
