"""bit-serve: the composition root, and the inference paths as plain ASGI (28 k requests/s where a framework does 12 to 22 k).

POST /v1/<tenant>[@<alias>]/classify      body: one picture
POST /v2/models/<tenant>[@<alias>][/versions/<n>]/infer
"""

import asyncio
import contextlib
import logging
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qs

import orjson
import uvicorn
from pydantic import ValidationError

from services.inference import protocol
from services.inference.errors import BadRequest, MethodNotAllowed, ServiceError, TooLarge
from services.inference.follower import Follower
from services.inference.metrics import Metrics
from services.inference.models import Models, Served
from services.inference.pages import pages
from services.inference.registry import FolderRegistry, MLflowRegistry
from services.inference.scheduler import Scheduler, Work
from services.inference.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger("bit.serve")
JSON = (b"content-type", b"application/json")


class App:
    """The ASGI application. What runs (follower, workers) starts and ends with the ASGI lifespan."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics, self.models = settings, Metrics(), Models()
        registry = (
            FolderRegistry(settings.models)
            if settings.models
            else MLflowRegistry(settings.tracking_uri, settings.cache_dir, settings.write_back)
        )
        self.follower = Follower(registry, self.models, self.metrics, settings.poll_interval_s, settings.max_batch)
        self.pages = pages(self.models, self.follower, self.metrics, version("bit-mlops"))
        self.scheduler: Scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif (route := route_of(scope["path"])) is not None and scope["type"] == "http":
            await self._answer(route, scope, receive, send)
        else:
            await self.pages(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        settings = self.settings
        self.scheduler = Scheduler(settings.workers, settings.max_batch, settings.max_queue_ms, self.metrics)
        self.follower.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(self.follower.stop)
        await asyncio.to_thread(self.scheduler.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, route: "Route", scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex
        served, status = None, 500
        began = time.monotonic()
        self.metrics.in_flight.inc()
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} is not allowed here; use POST")
            served = self.models.find(route.name, route.version)
            body = await read_body(receive, headers, self.settings.max_body_bytes)
            began = time.monotonic()
            answer = self._classify if route.action == "classify" else self._infer
            data, extra = await answer(served, route.name, scope, headers, body, request_id)
            status = 200
        except ServiceError as error:
            status, data, extra = error.status, orjson.dumps({"error": str(error)}), [JSON, *error.headers]
        except Exception:
            log.exception("request %s failed", request_id)
            data, extra = orjson.dumps({"error": f"internal error; request id {request_id}"}), [JSON]
        finally:
            self.metrics.in_flight.dec()
        tenant, number = (served.tenant, served.version) if served else ("", "")
        self.metrics.requests.labels(tenant, number, str(status)).inc()
        if status == 200:
            self.metrics.latency.labels(tenant, number).observe(time.monotonic() - began)
        extra += [(b"content-length", str(len(data)).encode()), (b"x-request-id", request_id.encode("latin-1"))]
        await send({"type": "http.response.start", "status": status, "headers": extra})
        await send({"type": "http.response.body", "body": data})

    async def _classify(
        self, served: Served, name: str, scope: Scope, headers: dict[bytes, bytes], body: bytes, request_id: str
    ) -> tuple[bytes, Headers]:
        if not body:
            raise BadRequest("the body is empty; send the bytes of one picture")
        top = _top(scope["query_string"])
        rows, timings = await self._run(served, [body], ("probabilities",), headers)
        answer = {
            "tenant": served.tenant,
            "version": served.version,
            "alias": served.alias,
            "sha256": served.sha256,
            "request_id": request_id,
            **protocol.classification(served, rows[0][0], top or len(served.session.card.classes)),
        }
        return orjson.dumps(answer), [JSON, timings, *_origin(served)]

    async def _infer(
        self, served: Served, name: str, scope: Scope, headers: dict[bytes, bytes], body: bytes, request_id: str
    ) -> tuple[bytes, Headers]:
        length = headers.get(b"inference-header-content-length")
        if length is not None and not length.isdigit():
            raise BadRequest("Inference-Header-Content-Length must be a number")
        request = protocol.parse(body, int(length) if length else None, served.session.card.resolution)
        rows, timings = await self._run(served, request.pixels, request.outputs, headers)
        data, json_length = protocol.render(served, name, request, rows)
        if json_length is None:
            return data, [JSON, timings, *_origin(served)]
        binary = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", str(json_length).encode()),
        ]
        return data, [*binary, timings, *_origin(served)]

    async def _run(self, served: Served, data: Any, outputs: tuple[str, ...], headers: dict[bytes, bytes]) -> Any:
        """Rows of the outputs, and where the time went as a Server-Timing header."""
        deadline = time.monotonic() + _timeout_s(headers, self.settings.timeout_ms)
        work = Work(served, data, outputs, deadline, asyncio.get_running_loop().create_future())
        rows = await self.scheduler.submit(work)
        for stage, seconds in work.timings.items():
            self.metrics.stage.labels(stage).observe(seconds)
        told = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in work.timings.items())
        return rows, (b"server-timing", told.encode())


class Route:
    """What an inference path asks for: action ("classify" or "infer"), name (tenant[@alias]) and perhaps a version."""

    __slots__ = ("action", "name", "version")

    def __init__(self, action: str, name: str, version: str | None = None) -> None:
        self.action, self.name, self.version = action, name, version


def route_of(path: str) -> Route | None:
    """None for every path that isn't an inference."""
    match path.split("/")[1:]:
        case ["v1", name, "classify"]:
            return Route("classify", name)
        case ["v2", "models", name, "infer"]:
            return Route("infer", name)
        case ["v2", "models", name, "versions", number, "infer"]:
            return Route("infer", name, number)
    return None


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """The whole body; refused from its announced length on, before it is read. Raises TooLarge, BadRequest."""
    announced = headers.get(b"content-length", b"0")
    too_large = TooLarge(f"the body is larger than {limit:,} bytes")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away before its request was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _origin(served: Served) -> Headers:
    told = {"x-model-version": served.version, "x-model-alias": served.alias, "x-model-sha256": served.sha256}
    return [(key.encode(), value.encode()) for key, value in told.items()]


def _top(query: bytes) -> int | None:
    if not query or not (values := parse_qs(query.decode("latin-1")).get("top")):
        return None
    if not values[0].isdigit() or int(values[0]) < 1:
        raise BadRequest(f"top={values[0]!r} must be a whole number from 1")
    return int(values[0])


def _timeout_s(headers: dict[bytes, bytes], default_ms: float) -> float:
    """Seconds that the request may take: header X-Timeout-Ms, at most the service's own limit."""
    given = headers.get(b"x-timeout-ms")
    if given is None:
        return default_ms / 1000
    with contextlib.suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return min(float(given), default_ms) / 1000
    raise BadRequest("X-Timeout-Ms must be a positive number of milliseconds")


def main() -> None:
    """Reads settings from flags and BIT_SERVE_… variables, then serves until SIGTERM or Ctrl-C."""
    try:
        settings = Settings(_cli_parse_args=True)
    except ValidationError as error:
        for problem in error.errors():
            print(f"bit-serve: {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}", file=sys.stderr)
        sys.exit(2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.setswitchinterval(0.0005)  # the event loop gets the interpreter back sooner from the workers (measured)
    uvicorn.run(
        App(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=30,
        server_header=False,
    )


if __name__ == "__main__":
    main()
