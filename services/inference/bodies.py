"""A request's body: read within limits of size and time, decompressed, taken apart. Nothing here knows of models."""

import asyncio
import itertools
import threading
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from services.inference.errors import BadRequest, RequestTimeout, TooLarge, Unavailable, UnsupportedMedia
from services.inference.http1 import CLOSE

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
PIECE, MOST_MEMBERS = 64 * 1024, 10_000  # bytes decompressed at once, parts of one gzip body
MOST_FIELDS = 64  # of a form, beside its files
WINDOW = {b"gzip": 31, b"deflate": 15}  # zlib's wbits for each content coding


def announced(headers: dict[bytes, bytes], limit: int) -> int:
    """The body's length as the headers tell it, 0 where they don't. Raises TooLarge, UnsupportedMedia before it is read."""
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"identity", *WINDOW):
        raise UnsupportedMedia(
            f"content coding {coding.decode('latin-1')!r} is not read; send gzip, deflate or none", CLOSE
        )
    length = headers.get(b"content-length", b"0")
    size = int(length) if length.isdigit() else 0
    if size > limit:
        raise _too_large(limit)
    return size


class Counted:
    """Receives a body whose length no header told: `charge` gets the bytes as they come, also of one that is refused."""

    def __init__(self, receive: Receive, charge: Callable[[int], None]) -> None:
        self.receive, self.charge = receive, charge

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.charge(len(message.get("body", b"")))
        return message


class Room:
    """Memory for the bodies of all requests that are read or answered at once: many slow clients cannot fill the machine's."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.taken_bytes = limit_bytes, 0

    def take(self, size_bytes: int) -> None:
        """Raises Unavailable where there isn't so much left."""
        if self.taken_bytes + size_bytes > self.limit_bytes:
            raise Unavailable(f"the bodies of other requests fill {self.limit_bytes:,} bytes; try again", 1.0, CLOSE)
        self.taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes


async def read(receive: Receive, headers: dict[bytes, bytes], limit: int, room: Room) -> bytes:
    """The whole body, decompressed, for which the caller gives its room back; wire.py limits its time.

    Raises TooLarge, RequestTimeout, Unavailable, BadRequest.
    """
    body = await _read(receive, limit, room)
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in WINDOW or not body:
        return body
    try:
        data = await asyncio.to_thread(decompress, body, WINDOW[coding], limit)
    finally:
        room.give_back(len(body))
    room.take(len(data))
    return data


async def _read(receive: Receive, limit: int, room: Room) -> bytes:
    parts, size, more = [], 0, True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client went away before its request was complete")
            part, more = message.get("body", b""), bool(message.get("more_body"))
            if size + len(part) > limit:
                raise _too_large(limit)
            room.take(len(part))
            size += len(part)
            parts.append(part)
    except BaseException as error:
        room.give_back(size)
        if isinstance(error, TimeoutError):
            raise RequestTimeout("the body did not come in time", CLOSE) from None
        raise
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decompress(body: bytes, wbits: int, limit: int) -> bytes:
    """zlib or gzip data, all members of it, never more than `limit` bytes: a bomb is refused before it is unpacked."""
    parts: list[bytes] = []
    at = size = members = 0
    try:
        while at < len(body) and (wbits == WINDOW[b"gzip"] or not members):
            engine, members = zlib.decompressobj(wbits), members + 1
            while not engine.eof:
                piece = body[at : at + PIECE]
                if not piece or members > MOST_MEMBERS:
                    raise BadRequest(
                        "the compressed body is cut off" if not piece else "the body has too many gzip members"
                    )
                parts.append(engine.decompress(piece, limit + 1 - size))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
                at += len(piece) - len(engine.unused_data) - len(engine.unconsumed_tail)
    except zlib.error as error:
        if wbits == WINDOW[b"deflate"]:
            return decompress(body, -15, limit)  # "deflate" without zlib's frame, as some clients send it
        raise BadRequest(f"the body cannot be decompressed: {error}") from None
    return b"".join(parts)


def accepted(header: bytes) -> bytes | None:
    """The first content coding that the client accepts, None where it accepts none (RFC 9110, section 12.5.3)."""
    told = {}
    for part in header.lower().split(b","):
        coding, _, weight = part.partition(b";")
        told[coding.strip()] = weight.replace(b" ", b"").rstrip(b".0") != b"q="  # q=0: refused
    return next((coding for coding in WINDOW if told.get(coding)), None)


def compress(data: bytes, coding: bytes) -> bytes:
    engine = zlib.compressobj(1, zlib.DEFLATED, WINDOW[coding])
    return engine.compress(data) + engine.flush()


def is_form(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"").split(b";")[0].strip().lower() == b"multipart/form-data"


def pictures(body: bytes, headers: dict[bytes, bytes], limit: int) -> tuple[list[bytes], list[str] | None]:
    """The body's pictures, and the names of a multipart form's files; None for a plain body of one picture.

    Raises BadRequest for an empty body, a broken form, or more pictures than `limit`.
    """
    if not is_form(headers):
        if not body:
            raise BadRequest("the body is empty; send the bytes of one picture")
        return [body], None
    found: list[bytes] = []
    names: list[str] = []
    fields = itertools.count(1)

    def skip(field: Field) -> None:
        if next(fields) > MOST_FIELDS:
            raise BadRequest(
                f"the form has more than {MOST_FIELDS} fields; send each picture as a part with a filename"
            )

    def take(file: File) -> None:
        if len(found) == limit:
            raise BadRequest(f"at most {limit} pictures are answered at once")
        file.file_object.seek(0)
        found.append(file.file_object.read())
        names.append((file.file_name or b"").decode("utf-8", "replace"))
        file.close()

    _, given = parse_options_header(headers[b"content-type"])
    ended = threading.Event()
    kept = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # nothing goes to the disk
    try:
        parser = FormParser("multipart/form-data", skip, take, ended.set, given.get(b"boundary"), config=kept)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the form cannot be read: {error}") from None
    if not ended.is_set():  # the picture that is cut off would go missing without a word
        raise BadRequest("the form is cut off: its last boundary is missing")
    if not found:
        raise BadRequest("the form has no file; send each picture as a part with a filename")
    return found, names


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit:,} bytes", CLOSE)
