"""bit-serve: the composition root, and the inference paths as plain ASGI (28 k requests/s where a framework does 12 to 22 k).

POST /v1/<tenant>[@<alias>]/classify      body: one picture, or a multipart form of several
POST /v1/<tenant>[@<alias>]/features      the same, answered with embeddings
POST /v2/models/<tenant>[@<alias>][/versions/<n>]/infer

A request is judged at its headers (key, size, quota, queue) before its body is read: reading 40 kB only to refuse halves what is
left for the others under a storm of retries.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from services.inference import bodies, connections, explain, protocol
from services.inference.access import AccessLog
from services.inference.cache import Cache
from services.inference.errors import (
    BadRequest,
    Headers,
    MethodNotAllowed,
    NotFound,
    Refused,
    ServiceError,
    Unavailable,
)
from services.inference.exchange import Exchange, Route, Scope, asked_top, route_of
from services.inference.follower import Follower
from services.inference.http1 import CLOSE, JSON
from services.inference.metrics import Metrics
from services.inference.models import Cold, Models, Served
from services.inference.pages import Pages, pages
from services.inference.registry import FolderRegistry, Registry, RegistryDown
from services.inference.scheduler import Scheduler, Work
from services.inference.settings import MiB, Settings
from services.inference.tally import Tally
from services.inference.tenants import Gate, Tenants

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Rows = list[NDArray[np.float32]]
Answers = list[dict[str, Any]]
Reply = tuple[bytes, Headers]

log = logging.getLogger("bit.serve")
BINARY = (b"content-type", b"application/octet-stream")
LONG_BODY, LONG_ANSWER = 256 * 1024, 4 * 1024  # bytes above which parsing leaves the event loop, and compressing pays


class App:
    """The ASGI application. What runs (follower, workers) starts and ends with the ASGI lifespan."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics, self.in_flight = settings, Metrics(), 0
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.tally = Tally(self.metrics, AccessLog() if settings.access_log else None)
        self.models = Models(settings.memory_mb * MiB, settings.pinned)
        self.tenants, self.room = Tenants(settings.tenants), bodies.Room(settings.max_bodies_mb * MiB)
        registry: Registry
        if settings.models:
            registry = FolderRegistry(settings.models)
        else:
            from services.inference.mlflow_registry import MLflowRegistry  # its client is a quarter of the import

            cache = Cache(settings.cache_dir, settings.cache_mb * MiB)
            registry = MLflowRegistry(settings.tracking_uri, cache, settings.write_back)
        given = (settings.poll_interval_s, settings.max_batch, frozenset(settings.only))
        self.follower = Follower(registry, self.models, self.metrics, *given)
        self.draining = asyncio.Event()
        parts = (self.models, self.follower, self.metrics, self.tally, self.tenants)
        self.pages = pages(Pages(*parts, settings, self.draining))
        self.scheduler: Scheduler
        self.explainers = explain.explainers(settings.workers)  # whose threads start with the first explanation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif (route := route_of(scope["path"])) is not None:
            await self._answer(route, scope, receive, send)
        else:
            await self.pages(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        given = self.settings
        queue = (given.workers, given.max_batch, given.max_batch_ms, given.max_queue_ms)
        self.scheduler = Scheduler(*queue, given.max_pixels, given.max_decode_ms, self.metrics)
        self.follower.start()
        watch = asyncio.create_task(self.tenants.follow(given.poll_interval_s))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watch.cancel()
        await asyncio.to_thread(self.follower.stop)
        await asyncio.to_thread(self.scheduler.close)
        self.explainers.shutdown()
        await asyncio.to_thread(self.tally.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(*route, scope, dict(scope["headers"]))
        self.in_flight += 1
        status = 500
        try:
            data, extra = await self._serve(exchange, receive)
            status = 200
        except ServiceError as error:
            status, data, extra = error.status, orjson.dumps({"error": str(error)}), [JSON, *error.headers]
            extra += exchange.origin() if exchange.served else []
        except Exception:  # what nobody foresaw: logged whole, answered without a word of it
            log.exception("request %s failed", exchange.request_id)
            data, extra = orjson.dumps({"error": f"internal error; request id {exchange.request_id}"}), [JSON]
        finally:
            self.in_flight -= 1
        if len(data) > LONG_ANSWER and (coding := bodies.accepted(exchange.headers.get(b"accept-encoding", b""))):
            long = len(data) > LONG_BODY  # seconds for tens of megabytes, in which nobody else would be answered
            data = await asyncio.to_thread(bodies.compress, data, coding) if long else bodies.compress(data, coding)
            extra.append((b"content-encoding", coding))
        if self.draining.is_set():
            extra.append(CLOSE)
        extra += [(b"content-length", str(len(data)).encode()), (b"x-request-id", exchange.request_id.encode())]
        self.tally.note(exchange, status, len(data))
        held = len(data) if len(data) > LONG_BODY else 0  # until it was read: slow readers hold memory too
        self.room.taken_bytes += held
        try:
            await send({"type": "http.response.start", "status": status, "headers": extra})
            await send({"type": "http.response.body", "body": data})
        finally:
            self.room.give_back(held)

    async def _serve(self, exchange: Exchange, receive: Receive) -> Reply:
        """The answer's body and headers. Everything before the body is read is cheap."""
        headers, limit = exchange.headers, self.settings.max_body_bytes
        if exchange.scope["method"] != "POST":
            raise MethodNotAllowed(f"{exchange.scope['method']} is not allowed here; use POST", "POST")
        exchange.asker = self.tenants.authorize(exchange.tenant, headers)
        size = bodies.announced(headers, limit)
        exchange.deadline = exchange.began + exchange.timeout_s(self.settings.timeout_ms)
        cold = self._find(exchange)
        if cold is None:
            self.scheduler.check(exchange.version)
        gate = self.tenants.admit(exchange.tenant, size)
        exchange.quota = gate.enter()
        if not size:
            receive = bodies.Counted(receive, partial(self.tenants.charge, exchange.tenant))
        answer = self._admitted(exchange, gate, cold, receive)
        if b"x-timeout-ms" in headers:  # only then: a clock of its own costs, and the service's limit drops what waits
            return await exchange.in_time(answer, "the answer was not there")
        return await answer

    async def _admitted(self, exchange: Exchange, gate: Gate, cold: Cold | None, receive: Receive) -> Reply:
        """Its place in the quota and room for its body are taken until the work ends, also where nobody waits for it any more."""
        try:
            if cold is not None:  # also who waits for a version counts as running
                exchange.served, exchange.alias = await self._load(exchange, cold), cold.wanted.alias
            body = await bodies.read(receive, exchange.headers, self.settings.max_body_bytes, self.room)
            try:
                return await self._reply(exchange, body)
            finally:
                self.room.give_back(len(body))
        finally:
            gate.leave()

    async def _reply(self, exchange: Exchange, body: bytes) -> Reply:
        if exchange.action == "infer":
            return await self._infer(exchange, body)
        parts = (body, exchange.headers, self.settings.max_pictures)
        if len(body) > LONG_BODY and bodies.is_form(exchange.headers):  # seconds, made by somebody who means it
            pictures, names = await asyncio.to_thread(bodies.pictures, *parts)
        else:
            pictures, names = bodies.pictures(*parts)
        answer = self._classify if exchange.action == "classify" else self._features
        return await answer(exchange, pictures, names)

    def _find(self, exchange: Exchange) -> Cold | None:
        """Notes the version asked for; what must be loaded where it isn't in memory. Raises NotFound."""
        try:
            exchange.served, exchange.alias = self.models.find(exchange.name, exchange.wanted, exchange.asker)
        except NotFound as error:
            raise self.follower.not_found(error, exchange.name) from None
        except Cold as cold:
            return cold
        return None

    async def _load(self, exchange: Exchange, cold: Cold) -> Served:
        """Raises Unavailable, DeadlineExceeded."""
        loading, began = self.follower.load(cold), time.monotonic()
        if self.settings.cold == "refuse":
            raise Unavailable(f"{exchange.name!r} is being loaded; try again", after_s=2)
        try:
            served = await exchange.in_time(asyncio.wrap_future(loading), f"{exchange.name!r} was still loading")
        except (Refused, RegistryDown) as error:
            raise Unavailable(f"version {cold.wanted.version} of {exchange.tenant!r} cannot be loaded", 10) from error
        exchange.timings["load"] = time.monotonic() - began
        return served

    async def _classify(self, exchange: Exchange, pictures: list[bytes], names: list[str] | None) -> Reply:
        served, query = exchange.version, exchange.query()
        top, how = asked_top(query, len(served.session.card.classes)), query.get("explain", "0")
        if how not in ("0", "1", "overlay"):
            raise BadRequest(f"explain={how!r} must be 0, 1 (numbers) or overlay (a picture)")
        outputs = ("probabilities",) if how == "0" else ("probabilities", "feature_map", "head_weight")
        rows = await self._run(exchange, pictures, outputs)
        answers = [protocol.classification(served, row, top) for row in rows[0]]
        if how != "0":
            await self._explain(exchange, answers, pictures, rows, how)
        return self._told(exchange, answers, names), [JSON, *exchange.origin()]

    async def _explain(self, exchange: Exchange, answers: Answers, pictures: list[bytes], rows: Rows, how: str) -> None:
        """Beside the workers and after them, but at the tenant's expense."""

        def charged() -> None:
            began, limits = time.thread_time(), (self.settings.max_pixels, exchange.deadline)
            classes = exchange.version.session.card.classes
            try:
                explain.explain(answers, classes, pictures, rows, how == "overlay", *limits)
            finally:
                self.scheduler.charge(exchange.tenant, (time.thread_time() - began) / exchange.quota.weight)

        began = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(self.explainers, charged)
        exchange.timings["explain"] = time.monotonic() - began

    async def _features(self, exchange: Exchange, pictures: list[bytes], names: list[str] | None) -> Reply:
        [rows] = await self._run(exchange, pictures, ("features",))
        if exchange.headers.get(b"accept") == BINARY[1]:
            shape = (b"x-shape", ",".join(map(str, rows.shape)).encode())
            return np.ascontiguousarray(rows).tobytes(), [BINARY, shape, *exchange.origin()]
        answers = [{"features": row} for row in rows]
        if rows.nbytes > LONG_BODY:
            return await asyncio.to_thread(self._told, exchange, answers, names), [JSON, *exchange.origin()]
        return self._told(exchange, answers, names), [JSON, *exchange.origin()]

    def _told(self, exchange: Exchange, answers: Answers, names: list[str] | None) -> bytes:
        """One answer for a plain body; a list of them for a form, whatever the number of its files."""
        served = exchange.version
        who = {
            "tenant": served.tenant,
            "version": served.version,
            "alias": exchange.alias,
            "sha256": served.sha256,
            "request_id": exchange.request_id,
        }
        if names is None:
            return orjson.dumps(who | answers[0], option=orjson.OPT_SERIALIZE_NUMPY)
        told = who | {"answers": [{"name": n, **a} for n, a in zip(names, answers, strict=True)]}
        return orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)

    async def _infer(self, exchange: Exchange, body: bytes) -> Reply:
        length, served, given = exchange.json_length(), exchange.version, self.settings
        parts = (body, length, served.session.card.resolution, given.max_pictures, given.max_json_bytes)
        if (len(body) if length is None else length) > LONG_BODY:  # long JSON would hold up everybody else
            request = await asyncio.to_thread(protocol.parse, *parts)
        else:
            request = protocol.parse(*parts)
        rows = await self._run(exchange, request.data, request.outputs)
        data, json_length = protocol.render(served, exchange.name, request, rows)
        if json_length is None:
            return data, [JSON, *exchange.origin()]
        head = (b"inference-header-content-length", b"%d" % json_length)
        return data, [BINARY, head, *exchange.origin()]

    def _run(self, exchange: Exchange, data: Any, outputs: tuple[str, ...]) -> "asyncio.Future[Rows]":
        """Rows of the outputs; where the time went is noted in `exchange.timings`. Raises Unavailable."""
        answer: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        given = (exchange.version, data, outputs, exchange.deadline, answer, exchange.quota.weight)
        return self.scheduler.submit(Work(*given, timings=exchange.timings))


def main() -> None:
    """Reads settings from flags and BIT_SERVE_… variables, then serves until SIGTERM or Ctrl-C."""
    try:
        settings = Settings(_cli_parse_args=True)
        app = App(settings)
    except ValidationError as error:
        for problem in error.errors():
            print(f"bit-serve: {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError) as error:
        sys.exit(f"bit-serve: {error}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    connections.run(app, settings, app.draining.set)


if __name__ == "__main__":
    main()
