"""One connection: HTTP/1.1 by httptools (Node's parser), with a limit of size or time for all that a client can do or not do.

uvicorn listens, counts these connections and ends them; its own kind limits the pause between two requests only, and takes twice
the instructions for a request. A connection is never closed over bytes that nobody read: the system would reset it, and the
client would lose the answer that says why. What still comes is read and dropped for as long as a header may take.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httptools
import orjson
import uvicorn
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from services.inference import http1
from services.inference.asgi import MOST_AHEAD, Request, crowded
from services.inference.deadline import Deadline
from services.inference.errors import Headers

MOST_PIPELINED = 64  # requests on one connection that wait for the answers before them


@dataclass(frozen=True)
class Limits:
    """Seconds: until a header is complete, for a whole body, until an answer was read."""

    header_s: float
    body_s: float
    answer_s: float


class Connection(asyncio.Protocol):
    """What httptools finds in the bytes that come, as requests, one running at a time.

    request: the one that was parsed last. due: when the client must have sent what comes next; idle: it need not, but then
    the connection ends in peace; leaving: what comes is dropped. unread: when it must have read what was answered.
    """

    limits: Limits
    headers: Headers

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.config, self.state, self.loop = config, server_state, _loop or asyncio.get_running_loop()
        self.parser, self.body_s = self._parser(), self.limits.body_s
        self.running: Request | None = None
        self.request: Request | None = None
        self.pipeline: deque[Request] = deque()
        self.url, self.headers, self.header_bytes = b"", [], 0  # bytes that came since the header, or trailer, began
        self.in_header = self.in_trailer = self.expects_continue = self.upgrading = self.leaving = False
        self.full, self.writable, self.stopped = False, asyncio.Event(), False
        self.writable.set()
        self.due, self.idle = Deadline(self.loop, self._missed), False
        self.refusal = http1.UNREADABLE

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport, self.unread = transport, Deadline(self.loop, transport.abort)
        self.state.connections.add(self)  # type: ignore[arg-type]
        self.common = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "server": get_local_addr(transport),
            "client": get_remote_addr(transport),
            "scheme": "http",
            "root_path": "",
        }
        self.due.set(self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.state.connections.discard(self)
        self.writable.set()
        for request in filter(None, (self.running, self.request, *self.pipeline)):
            request.gone = True
            request.wake()
        self.unread.end()
        self.due.end()  # and these refer back here: the memory of a connection does not wait for the garbage's collection
        del self.parser
        self.running = self.request = None
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self.leaving:
            return
        self._woken()
        in_header = self.in_header or self.in_trailer
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse()
        if in_header and (self.in_header or self.in_trailer) and not self.leaving:
            self.header_bytes += len(data)
            if self.header_bytes > http1.LARGEST_HEADER:
                self.refusal = http1.TOO_LARGE
                self._refuse()
        waited_for = self.in_header or self.request is None or self.request.answered
        if waited_for and self.due.at == math.inf and not self.leaving and not self.stopped:  # most headers come whole
            self.due.set(self.limits.header_s)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # ignored (RFC 9110, section 7.8): what follows is the body
            head, self.upgrading = http1.without_upgrade(self.parser, self.url, self.headers), False
            self.parser = self._parser()
            self.parser.feed_data(head)
            self._feed(data[upgrade.args[0] :])

    def _parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # else a request before such data got no answer
        return parser

    def on_message_begin(self) -> None:
        self.url, self.headers, self.header_bytes = b"", [], 0
        self.in_header, self.expects_continue = True, False
        self._woken()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"expect":
            self.expects_continue = value.lower() == b"100-continue"
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.in_header = False
        self.due.clear()
        headers, parser = self.headers, self.parser
        if http1.is_too_large(self.url, headers):
            self.refusal = http1.TOO_LARGE
            raise ValueError
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise ValueError
            self.upgrading = True
            return
        scope = self.common | http1.scope(parser, self.url, headers)
        self.headers = []  # trailers come here: not among the headers that the application sees
        before = self.request
        newer = scope["http_version"] != "1.0"
        self.request = request = Request(
            self, scope, newer and parser.should_keep_alive(), newer and self.expects_continue
        )
        if before is None or before.answered:
            self._start(request)
        else:
            self._pause_reading()
            self.pipeline.append(request)

    def on_chunk_header(self) -> None:
        self.in_trailer, self.header_bytes = True, 0  # until a byte of the chunk comes: the last one has none

    def on_body(self, body: bytes) -> None:
        request, self.in_trailer = self.request, False
        assert request is not None
        if request.answered:
            return
        request.body = request.body + body if request.body else body
        if len(request.body) > MOST_AHEAD:
            self._pause_reading()
        request.wake()

    def on_message_complete(self) -> None:
        self.in_trailer, request = False, self.request
        if not self.upgrading and request is not None:
            request.more_body = False
            request.wake()
            if request.answered:
                self._rest()

    def answer(self, request: Request, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Writes it, and goes on with the next request. Raises ValueError for what is no answer."""
        if self.transport.is_closing() or request.gone:
            return
        if request.answered:
            raise RuntimeError("a request is answered once")
        if http1.CLOSE in headers or (request.more_body and not request.worth_reading()):
            request.keep_alive = False
        head_only, close = request.scope["method"] == "HEAD", not request.keep_alive
        written = http1.rendered(status, [*self.state.default_headers, *headers], body, head_only, close)
        request.answered, request.body = True, b""
        request.wake()
        self.transport.write(written)
        if self.leaving or close:
            self._hang_up()
            return
        self.read_on()
        if self.pipeline:
            self._start(self.pipeline.popleft())
        elif not self.in_header:
            self._rest()
        elif self.due.at == math.inf:
            self.due.set(self.limits.header_s)

    def _rest(self) -> None:
        """Nothing is asked, nothing must come."""
        self.idle = True
        self.due.set(self.config.timeout_keep_alive)

    def _woken(self) -> None:
        if self.idle:
            self.idle = False
            self.due.clear()

    def shutdown(self) -> None:
        """The service ends: after the answer to what runs, so does the connection."""
        if self.request is None or self.request.answered:
            self.transport.close()
        else:
            self.request.keep_alive = False

    def pause_writing(self) -> None:
        self.full = True
        self.writable.clear()
        self.unread.set(self.limits.answer_s)

    def resume_writing(self) -> None:
        self.full = False
        self.writable.set()
        self.unread.clear()

    def read_on(self) -> None:
        if self.stopped and not self.transport.is_closing():
            self.stopped = False
            self.transport.resume_reading()

    def _pause_reading(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.transport.pause_reading()

    def _start(self, request: Request) -> None:
        self.running, most = request, self.config.limit_concurrency
        app = crowded if most is not None and len(self.state.connections) >= most else self.config.loaded_app
        task = self.loop.create_task(request.run(app))
        self.state.tasks.add(task)
        task.add_done_callback(self.state.tasks.discard)

    def _refuse(self) -> None:
        """Refuses what cannot be parsed, in the API's own form. Requests that came before it are answered instead."""
        request, (status, told) = self.request, self.refusal
        broken = request is not None and request.more_body and not request.answered and not self.pipeline
        self.leaving = True
        self.pipeline.clear()
        if request is not None and not request.answered and not broken:
            return
        if request is not None and broken:
            request.gone = True
            request.wake()
        body = orjson.dumps({"error": told})
        self.transport.write(http1.rendered(status, [http1.JSON], body, head_only=False, close=True))
        self._hang_up()

    def _hang_up(self) -> None:
        """Ends the connection after what was written."""
        if self.transport.is_closing():
            return
        if self.leaving or (self.request is not None and self.request.more_body):
            self.leaving = True
            self.read_on()
            self.transport.write_eof()
            unread = self.transport.get_write_buffer_size()
            self.due.set(max(self.limits.header_s, self.limits.answer_s) if unread else self.limits.header_s)
        else:
            self._close()

    def _close(self) -> None:
        """Of a client that does not read, the system would keep the connection for ever."""
        if not self.transport.is_closing():
            self.transport.close()
            if self.transport.get_write_buffer_size() and self.unread.at == math.inf:
                self.unread.set(self.limits.answer_s)

    def _missed(self) -> None:
        if self.idle:
            self._close()
        else:
            self.transport.abort()


def protocol(given: Limits) -> type[Connection]:
    class Limited(Connection):
        limits = given

    return Limited
