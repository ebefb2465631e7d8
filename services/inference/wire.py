"""One connection: HTTP/1.1 by uvicorn and httptools, with a limit of size or time for all that a client can do or leave undone.

uvicorn itself limits the pause between two requests only. Here also: the header (size, number, time), the body (time), the answer
(time until the client has read it). A connection is never closed over bytes that nobody read: the system would reset it, and the
client would lose the answer that says why. What still comes is read and dropped for as long as a header may take.
"""

import asyncio
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, service_unavailable
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

LARGEST_HEADER = 64 * 1024  # bytes of a request's line, headers or trailers
MOST_HEADERS = 100
MOST_PIPELINED = 64  # requests on one connection that wait for the answers before them


@dataclass(frozen=True)
class Limits:
    """Seconds: until a header is complete, for a whole body, until an answer was read."""

    header_s: float
    body_s: float
    answer_s: float


class Exchanged:
    """One request's way through the application: its body within a time limit, its answer in one write.

    uvicorn writes head and body apart: two calls into the kernel here, and two awakenings of the client.
    """

    def __init__(self, connection: "Connection", cycle: RequestResponseCycle, app: Any) -> None:
        self.connection, self.cycle, self.app = connection, cycle, app
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
            self.deadline = time.monotonic() + self.connection.limits.body_s
        async with asyncio.timeout(self.deadline - time.monotonic()):
            return await cycle.receive()

    async def send(self, message: Any) -> None:
        """Returns once the client has read the answer, all but what the system's buffers hold."""
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
                    self.connection.hang_up()
                cycle.on_response()
                if cycle.flow.write_paused:
                    await cycle.flow.drain()
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
        if cycle.more_body and not self._little_left():
            cycle.keep_alive = False
        lines += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        return b"".join(lines)

    def _little_left(self) -> bool:
        """Whether the body of a request that was refused at its headers is worth reading for the sake of the connection."""
        announced = next((value for name, value in self.cycle.scope["headers"] if name == b"content-length"), b"")
        return announced.isdigit() and len(announced) < 6 and int(announced) <= HIGH_WATER_LIMIT


class Connection(HttpToolsProtocol):
    limits: Limits
    deadline: asyncio.TimerHandle | None = None  # of what the client must do next
    reading: asyncio.TimerHandle | None = None  # until it must have read what was answered
    in_header = in_trailer = upgrading = False
    leaving = False  # what comes is dropped
    header_bytes = 0  # that came since the header, or trailer, began
    refusal = 400, "the request is not HTTP/1.1 as it can be read here"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_came()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.leaving:
            return
        self._unset_keepalive_if_required()
        in_header = self.in_header or self.in_trailer
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if in_header and (self.in_header or self.in_trailer):
            self.header_bytes += len(data)
            if self.header_bytes > LARGEST_HEADER:
                self._header_too_large()
                self.send_400_response("")
        idle = self.cycle is None or self.cycle.response_complete
        if self.deadline is None and (self.in_header or idle) and not self.leaving:  # most headers come whole
            self._expect_header()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # ignored (RFC 9110, section 7.8): what follows is the body
            head, self.upgrading = self._without_upgrade(), False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(head)
            self._feed(data[upgrade.args[0] :])

    def _without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_header, self.header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self.in_header = False
        self._header_came()
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if len(self.headers) > MOST_HEADERS or size > LARGEST_HEADER:
            self._header_too_large()
            raise ValueError
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError
            self.upgrading = True
            return
        super().on_headers_complete()
        self.headers = []  # trailers come here: not among the headers that the application sees

    def on_chunk_header(self) -> None:
        self.in_trailer, self.header_bytes = True, 0  # until a byte of the chunk comes: the last one has none

    def on_body(self, body: bytes) -> None:
        cycle, self.in_trailer = self.cycle, False
        if cycle.body or cycle.response_complete:
            super().on_body(body)
            return
        cycle.body = body  # type: ignore[assignment]  # as it is: uvicorn copies each body twice
        if len(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self.in_trailer = False
        if not self.upgrading:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.leaving:
            self.hang_up()
        else:
            super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuses what cannot be parsed, in the API's own form. Requests that came before it are answered instead."""
        cycle, (status, told) = self.cycle, self.refusal
        broken = cycle is not None and cycle.more_body and not cycle.response_started and not self.pipeline
        self.leaving = True
        self.pipeline.clear()
        if cycle is not None and not cycle.response_complete and not broken:
            return
        if broken:
            cycle.disconnected = True
            cycle.message_event.set()
        body = orjson.dumps({"error": told})
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.hang_up()

    def hang_up(self) -> None:
        """Ends the connection after what was written."""
        if self.transport.is_closing():
            return
        if self.leaving or self.cycle.more_body:
            self.leaving = True
            self.flow.resume_reading()
            self.transport.write_eof()
            self._header_came()
            self._expect_header()
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._was_read()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        own = _crowded if app is service_unavailable else app
        super()._start_asgi_task(cycle, Exchanged(self, cycle, own))

    def _header_too_large(self) -> None:
        self.refusal = 431, f"a request's header holds at most {LARGEST_HEADER:,} bytes and {MOST_HEADERS} lines"

    def _close(self) -> None:
        """Of a client that does not read, the system would keep the connection for ever."""
        if not self.transport.is_closing():
            self.transport.close()
            if self.transport.get_write_buffer_size():
                self._must_read()

    def _expect_header(self) -> None:
        self.deadline = self.loop.call_later(self.limits.header_s, self._give_up)

    def _header_came(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _must_read(self) -> None:
        if self.reading is None:
            self.reading = self.loop.call_later(self.limits.answer_s, self.transport.abort)

    def _was_read(self) -> None:
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None

    def _give_up(self) -> None:
        self.deadline = None
        self.transport.abort()


async def _crowded(scope: Any, receive: Any, send: Any) -> None:
    body = orjson.dumps({"error": "all connections of this instance are taken; try again"})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def protocol(given: Limits) -> type[Connection]:
    class Limited(Connection):
        limits = given

    return Limited
