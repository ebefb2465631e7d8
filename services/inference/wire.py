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
from itertools import chain
from typing import Any
from urllib.parse import unquote

import httptools
import orjson
import uvicorn
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from services.inference.asgi import JSON, MOST_AHEAD, STATUS, Request, rendered
from services.inference.deadline import Deadline
from services.inference.errors import Headers

LARGEST_HEADER = 64 * 1024  # bytes of a request's line, headers or trailers
MOST_HEADERS = 100
MOST_PIPELINED = 64  # requests on one connection that wait for the answers before them
CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class Limits:
    """Seconds: until a header is complete, for a whole body, until an answer was read."""

    header_s: float
    body_s: float
    answer_s: float


class Connection(asyncio.Protocol):
    """What httptools finds in the bytes that come, as requests, one running at a time.

    request: the one that was parsed last. idle: the client need not send anything, but then the connection ends in peace.
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
        self.request: Request | None = None
        self.pipeline: deque[Request] = deque()
        self.url, self.headers = b"", []
        self.header_bytes = 0  # that came since the header, or trailer, began
        self.in_header = self.in_trailer = self.expects_continue = self.upgrading = False
        self.leaving = False  # what comes is dropped
        self.full, self.writable, self.stopped = False, asyncio.Event(), False
        self.writable.set()
        self.due, self.idle = Deadline(self.loop, self._missed), False
        self.reading: asyncio.TimerHandle | None = None  # until it must have read what was answered
        self.refusal = 400, "the request is not HTTP/1.1 as it can be read here"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
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
        self.due.end()
        self.resume_writing()
        for request in (self.request, *self.pipeline):
            if request is not None:
                request.gone = True
                request.wake()

    def data_received(self, data: bytes) -> None:
        if self.leaving:
            return
        if self.idle:
            self.idle = False
            self.due.clear()
        in_header = self.in_header or self.in_trailer
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse()
        if in_header and (self.in_header or self.in_trailer):
            self.header_bytes += len(data)
            if self.header_bytes > LARGEST_HEADER:
                self._header_too_large()
                self._refuse()
        nothing_runs = self.request is None or self.request.answered
        if self.due.at == math.inf and (self.in_header or nothing_runs) and not self.leaving:  # most headers come whole
            self.due.set(self.limits.header_s)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # ignored (RFC 9110, section 7.8): what follows is the body
            head, self.upgrading = self._without_upgrade(), False
            self.parser = self._parser()
            self.parser.feed_data(head)
            self._feed(data[upgrade.args[0] :])

    def _parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # else a request before such data got no answer
        return parser

    def _without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        self.url, self.headers, self.header_bytes = b"", [], 0
        self.in_header, self.expects_continue = True, False

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
        size = len(self.url) + sum(map(len, chain.from_iterable(headers)))
        if len(headers) > MOST_HEADERS or size > LARGEST_HEADER:
            self._header_too_large()
            raise ValueError
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        if parser.should_upgrade():
            if method == "CONNECT":
                raise ValueError
            self.upgrading = True
            return
        raw_path, query = _split(self.url)
        path = raw_path.decode("ascii")
        scope = {
            **self.common,
            "http_version": version,
            "method": method,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
        }
        self.headers = []  # trailers come here: not among the headers that the application sees
        before = self.request
        request = Request(self, scope, version != "1.0" and parser.should_keep_alive(), self.expects_continue)
        self.request = request
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
        self.in_trailer = False
        if not self.upgrading and self.request is not None:
            self.request.more_body = False
            self.request.wake()

    def answer(self, request: Request, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Writes it, and goes on with the next request. Raises ValueError for what is no answer."""
        if self.transport.is_closing():
            return
        if CLOSE in headers or (request.more_body and not request.worth_reading()):
            request.keep_alive = False
        head_only, close = request.scope["method"] == "HEAD", not request.keep_alive
        written = rendered(status, [*self.state.default_headers, *headers], body, head_only, close)
        request.answered = True
        request.wake()
        self.transport.write(written)
        if self.leaving or close:
            self._hang_up()
            return
        self.read_on()
        if self.pipeline:
            self._start(self.pipeline.popleft())
        else:
            self.idle = True
            self.due.set(self.config.timeout_keep_alive)

    def ended(self, request: Request) -> None:
        """The application is through with it."""
        if request.task is not None:
            self.state.tasks.discard(request.task)

    def shutdown(self) -> None:
        """The service ends: after the answer to what runs, so does the connection."""
        if self.request is None or self.request.answered:
            self.transport.close()
        else:
            self.request.keep_alive = False

    def pause_writing(self) -> None:
        self.full = True
        self.writable.clear()
        self._must_read()

    def resume_writing(self) -> None:
        self.full = False
        self.writable.set()
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None

    def read_on(self) -> None:
        if self.stopped:
            self.stopped = False
            self.transport.resume_reading()

    def _pause_reading(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.transport.pause_reading()

    def _start(self, request: Request) -> None:
        most = self.config.limit_concurrency
        app = _crowded if most is not None and len(self.state.connections) >= most else self.config.loaded_app
        request.task = self.loop.create_task(request.run(app))
        self.state.tasks.add(request.task)

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
        head = b"\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS[status] + head + body)
        self._hang_up()

    def _hang_up(self) -> None:
        """Ends the connection after what was written."""
        if self.transport.is_closing():
            return
        if self.leaving or (self.request is not None and self.request.more_body):
            self.leaving = True
            self.read_on()
            self.transport.write_eof()
            self.due.set(self.limits.header_s)
        else:
            self._close()

    def _close(self) -> None:
        """Of a client that does not read, the system would keep the connection for ever."""
        if not self.transport.is_closing():
            self.transport.close()
            if self.transport.get_write_buffer_size():
                self._must_read()

    def _header_too_large(self) -> None:
        self.refusal = 431, f"a request's header holds at most {LARGEST_HEADER:,} bytes and {MOST_HEADERS} lines"

    def _must_read(self) -> None:
        if self.reading is None:
            self.reading = self.loop.call_later(self.limits.answer_s, self.transport.abort)

    def _missed(self) -> None:
        if self.idle:
            self._close()
        else:
            self.transport.abort()


def _split(url: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target, which may be a whole URL (RFC 9112, section 3.2.2)."""
    if url.startswith(b"/"):
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path or b"/", parsed.query or b""


async def _crowded(scope: Any, receive: Any, send: Any) -> None:
    body = orjson.dumps({"error": "all connections of this instance are taken; try again"})
    await send({"type": "http.response.start", "status": 503, "headers": [JSON, CLOSE, (b"retry-after", b"1")]})
    await send({"type": "http.response.body", "body": body})


def protocol(given: Limits) -> type[Connection]:
    class Limited(Connection):
        limits = given

    return Limited
