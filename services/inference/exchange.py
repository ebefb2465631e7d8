"""One inference request on its way through the service: what its path and headers ask for, and what became of it."""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qs

from services.inference.errors import BadRequest, DeadlineExceeded, Headers
from services.inference.models import Served
from services.inference.tenants import ANYBODY, Quota

Scope = MutableMapping[str, Any]
Answer = TypeVar("Answer")
Route = tuple[str, str, str | None]  # action, name, version

NO_QUOTA = Quota()
MOST_DIGITS = 9  # of a number in a request: Python refuses to read one of 5,000
LATE: set[asyncio.Future[Any]] = set()  # the loop itself would forget them
TRACEPARENT = re.compile(  # W3C Trace Context, section 3.2: version 00 ends there, later ones may say more
    "(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)
DRAWN = random.Random()  # noqa: S311 (a request's id is no secret; the system's source of randomness costs a call into the kernel)


def route_of(path: str) -> Route | None:
    """None for every path that isn't an inference."""
    match path.split("/")[1:]:
        case ["v1", name, "classify" | "features" as action]:
            return action, name, None
        case ["v2", "models", name, "infer"]:
            return "infer", name, None
        case ["v2", "models", name, "versions", number, "infer"]:
            return "infer", name, number
    return None


def asked_top(query: dict[str, str], classes: int) -> int:
    """How many of the classes `?top=` asks for. Raises BadRequest."""
    top = query.get("top")
    if top is None:
        return classes
    if not top.isascii() or not top.isdigit() or len(top) > MOST_DIGITS or int(top) < 1:
        raise BadRequest(f"top={top[:20]!r} must be a whole number from 1")
    return int(top)


@dataclass(slots=True)
class Exchange:
    """action: "classify", "features" or "infer"; name: tenant[@alias]; wanted: the version in the path."""

    action: str
    name: str
    wanted: str | None
    scope: Scope
    headers: dict[bytes, bytes]
    began: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    served: Served | None = None
    alias: str = ""
    asker: str = ANYBODY  # whose key the request carries
    quota: Quota = NO_QUOTA
    timings: dict[str, float] = field(default_factory=dict)
    tenant: str = ""
    request_id: str = ""

    def __post_init__(self) -> None:
        self.tenant = self.name.partition("@")[0]
        given = self.headers.get(b"x-request-id")
        said = given.decode("latin-1")[:128] if given else ""
        drawn = not said or not said.isascii() or not said.isprintable()
        self.request_id = DRAWN.getrandbits(128).to_bytes(16).hex() if drawn else said

    @property
    def version(self) -> Served:
        """Who answers. Known once it was found."""
        assert self.served is not None
        return self.served

    def query(self) -> dict[str, str]:
        query = self.scope["query_string"]
        return {key: values[-1] for key, values in parse_qs(query.decode("latin-1")).items()} if query else {}

    def json_length(self) -> int | None:
        """Bytes of JSON before binary tensors, None where the whole body is JSON. Raises BadRequest."""
        given = self.headers.get(b"inference-header-content-length")
        if given is None:
            return None
        if not given.isdigit() or len(given) > MOST_DIGITS:
            raise BadRequest("Inference-Header-Content-Length must be a number of bytes")
        return int(given)

    def timeout_s(self, default_ms: float) -> float:
        """Seconds that the request may take: header X-Timeout-Ms, at most the service's own limit. Raises BadRequest."""
        given = self.headers.get(b"x-timeout-ms")
        if given is None:
            return default_ms / 1000
        with contextlib.suppress(ValueError):
            if 0 < float(given) < float("inf"):
                return min(float(given), default_ms) / 1000
        raise BadRequest("X-Timeout-Ms must be a positive number of milliseconds")

    async def in_time(self, answer: Awaitable[Answer], otherwise: str) -> Answer:
        """The answer, if it comes before the deadline. Raises DeadlineExceeded, which says what was otherwise.

        What is late goes on: a worker that has begun cannot be stopped, and holds the memory that it works on.
        """
        task = asyncio.ensure_future(answer)
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                return await asyncio.shield(task)
        except TimeoutError:
            LATE.add(task)
            task.add_done_callback(_ended)
            self.timings = dict(self.timings)  # what is told now; a worker goes on in the other one
            raise DeadlineExceeded(f"{otherwise} when the deadline passed") from None

    def trace(self) -> tuple[str | None, str | None]:
        """The ids of the trace that the request belongs to and of the span that asked; None for a header that is none."""
        given = self.headers.get(b"traceparent")
        found = TRACEPARENT.fullmatch(given.decode("latin-1")) if given else None
        return (found[1], found[2]) if found else (None, None)

    def origin(self) -> Headers:
        """Headers that tell who answered, and where the time went."""
        alias = (b"x-model-alias", self.alias.encode())
        if not self.timings:
            return [*self.version.headers, alias]
        stages, ms = self.timings.keys(), [seconds * 1000 for seconds in self.timings.values()]
        told = ";dur=%.2f, ".join(stages) + ";dur=%.2f"  # formatted at once: one by one they take twice as long
        return [*self.version.headers, alias, (b"server-timing", (told % tuple(ms)).encode())]


def _ended(late: asyncio.Future[Any]) -> None:
    LATE.discard(late)
    if not late.cancelled():
        late.exception()  # nobody waits for it: not to be logged as one that was forgotten
