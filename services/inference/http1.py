"""HTTP/1.1 as text: what a request's head says, and an answer as it goes over the wire. Pure functions."""

from collections.abc import Sequence
from http import HTTPStatus
from itertools import chain
from typing import Any
from urllib.parse import unquote

import httptools

from services.inference.errors import Headers

JSON = (b"content-type", b"application/json")
CLOSE = (b"connection", b"close")  # what the client still sends is not worth reading
LARGEST_HEADER = 64 * 1024  # bytes of a request's line, headers or trailers
MOST_HEADERS = 100
UNREADABLE = 400, "the request is not HTTP/1.1 as it can be read here"
TOO_LARGE = 431, f"a request's header holds at most {LARGEST_HEADER:,} bytes and {MOST_HEADERS} lines"
STATUS = {status.value: b"HTTP/1.1 %d %s" % (status, status.phrase.encode()) for status in HTTPStatus}


def is_too_large(url: bytes, headers: Headers) -> bool:
    return len(headers) > MOST_HEADERS or len(url) + sum(map(len, chain.from_iterable(headers))) > LARGEST_HEADER


def scope(parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> dict[str, Any]:
    """What the application is told of a request. Raises ValueError, httptools.HttpParserInvalidURLError for no target."""
    raw_path, query = split_target(url)
    path = raw_path.decode("ascii")
    return {
        "http_version": parser.get_http_version(),
        "method": parser.get_method().decode("ascii"),
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
    }


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target, which may be a whole URL (RFC 9112, section 3.2.2)."""
    if url.startswith(b"/") and url.find(b"#") < 0:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path or b"/", parsed.query or b""


def without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> bytes:
    """A request's head as it would be without its offer to upgrade."""
    lines = [b"%s %s HTTP/%s" % (parser.get_method(), url, parser.get_http_version().encode())]
    for name, value in headers:
        if name == b"connection":
            value = b"close" if b"close" in value.lower() else b"keep-alive"
        if name not in (b"upgrade", b"http2-settings"):
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def rendered(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, head_only: bool, close: bool) -> bytes:
    """An answer as it goes over the wire. Raises ValueError for what would be more or less than one answer there."""
    told, length = dict(headers), str(len(body)).encode()  # b"%d" takes five times as long
    lines = [STATUS[status], *[name + b": " + value for name, value in headers]]
    if b"content-length" not in told:
        lines.append(b"content-length: " + length)
    elif told[b"content-length"] != length and not head_only:
        raise ValueError(f"an answer of {len(body)} bytes says that it has {told[b'content-length']!r}")
    if close and b"connection" not in told:
        lines.append(b"connection: close")
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise ValueError(f"a header's value ends its line: {headers!r}")
    return b"".join((head, b"\r\n\r\n", b"" if head_only else body))
