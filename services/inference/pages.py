"""What people and their tools look at: playground, health, metadata, repository, metrics. The inference paths are in app.py."""

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from services.inference import bodies, openapi, protocol
from services.inference.aliases import CHAMPION, Wanted
from services.inference.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    Refused,
    ServiceError,
    Unavailable,
    Unsupported,
)
from services.inference.follower import Follower
from services.inference.metrics import Metrics
from services.inference.models import Cold, Models, Served
from services.inference.registry import RegistryDown
from services.inference.settings import Settings
from services.inference.tally import Tally
from services.inference.tenants import ANYBODY, Tenants

STATIC = Path(__file__).with_name("static")
TYPES = {"playground.css": "text/css", "playground.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GUARDED = {
    "content-security-policy": POLICY,
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
SMALL_BODY = 64 * 1024  # bytes of JSON that these paths may be sent
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository", "model_configuration", "statistics"]


class Pages:
    """The answers of every path that isn't an inference. With keys, a tenant sees itself; the operator sees all."""

    def __init__(
        self,
        models: Models,
        follower: Follower,
        metrics: Metrics,
        tally: Tally,
        tenants: Tenants,
        settings: Settings,
        draining: asyncio.Event,
    ) -> None:
        self.models, self.follower, self.metrics, self.tally = models, follower, metrics, tally
        self.tenants, self.settings, self.draining = tenants, settings, draining

    async def playground(self, request: Request) -> Response:
        return FileResponse(STATIC / "playground.html", media_type="text/html", headers=GUARDED)

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in TYPES:
            raise HTTPException(404, f"no file {name!r}")
        return FileResponse(STATIC / name, media_type=TYPES[name], headers=GUARDED)

    async def description(self, request: Request) -> Response:
        return JSONResponse(openapi.document(version("bit-mlops")))

    async def scrape(self, request: Request) -> Response:
        await asyncio.to_thread(self.tally.count)
        data = await asyncio.to_thread(generate_latest, self.metrics.registry)
        return Response(data, media_type=CONTENT_TYPE_LATEST)

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "bit-serve", "version": version("bit-mlops"), "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Ready once all that the registry wanted at the start was dealt with, and until SIGTERM; later loads don't matter."""
        ready = self.follower.polled and not self.draining.is_set()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def model(self, request: Request) -> Response:
        served, name = await self._served(request)
        told = protocol.metadata(served, name, self._aliases(served), self._versions(served, name))
        told["parameters"]["refused"] = [r for r in self._refusals() if r["tenant"] == served.tenant]
        return JSONResponse(told)

    async def model_ready(self, request: Request) -> Response:
        asker = self._authorize(request)
        try:
            self.models.find(request.path_params["name"], request.path_params.get("version"), asker)
        except Cold:
            raise Unavailable("the model isn't in memory; a request loads it") from None
        return JSONResponse({"ready": True})

    async def config(self, request: Request) -> Response:
        served, name = await self._served(request)
        return JSONResponse(protocol.config(served, name, self.settings.max_pictures))

    async def statistics(self, request: Request) -> Response:
        await asyncio.to_thread(self.tally.count)
        if "name" in request.path_params:
            served, name = await self._served(request)
            return JSONResponse({"model_stats": [protocol.statistics(served, name)]})
        owner = self._owner(request)
        shown = [served for served in self.models.all() if owner in (ANYBODY, served.tenant)]
        return JSONResponse({"model_stats": [protocol.statistics(served, served.tenant) for served in shown]})

    async def tenants_page(self, request: Request) -> Response:
        """Every alias with its version's card where that is in memory, and what was refused."""
        owner = self._owner(request)
        shown = [wanted for wanted in self.models.aliases() if owner in (ANYBODY, wanted.tenant)]
        told = [self._told(wanted) for wanted in shown]
        refused = [one for one in self._refusals() if owner in (ANYBODY, one["tenant"])]
        return JSONResponse({"served": told, "refused": refused})

    async def index(self, request: Request) -> Response:
        """Triton's repository index: READY in memory, UNAVAILABLE where cold or refused, with the reason."""
        owner = self._owner(request)
        asked = await _json(request)
        rows = []
        for wanted in self.models.aliases():
            warm = self.models.get(wanted.tenant, wanted.version) is not None
            state, reason = ("READY", "") if warm else ("UNAVAILABLE", "not in memory")
            rows.append((wanted, state, reason))
        rows += [(wanted, "UNAVAILABLE", reason) for wanted, reason in list(self.follower.refused.items())]
        told = [
            {"name": _address(wanted), "version": wanted.version, "state": state, "reason": reason}
            for wanted, state, reason in rows
            if owner in (ANYBODY, wanted.tenant) and (state == "READY" or not asked.get("ready"))
        ]
        return JSONResponse(told)

    async def load(self, request: Request) -> Response:
        """Takes a model's champion into memory now instead of with its first request."""
        asker = self._authorize(request)
        if (await _json(request)).get("parameters"):
            raise Unsupported("models come from the registry: neither `config` nor files can be given with a load")
        await self._load(request.path_params["name"], None, asker)
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        """Takes a tenant's models out of memory; the next request loads again."""
        self._authorize(request)
        tenant = request.path_params["name"].partition("@")[0]
        if not self.models.aliases(tenant):
            raise NotFound(f"{tenant!r} is not served")
        self.follower.unload(tenant)
        return JSONResponse({})

    async def does_not_apply(self, request: Request) -> Response:
        raise Unsupported("this server has no trace or log settings and no shared memory to set by its API")

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        headers = {key.decode(): value.decode() for key, value in error.headers}
        return JSONResponse({"error": str(error)}, error.status, headers=headers)

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    async def refuse_unforeseen(self, request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "internal error"}, 500)  # the server logs it whole

    def _owner(self, request: Request) -> str:
        return self.tenants.owner(dict(request.scope["headers"]))

    def _authorize(self, request: Request) -> str:
        return self.tenants.authorize(request.path_params["name"].partition("@")[0], dict(request.scope["headers"]))

    async def _served(self, request: Request) -> tuple[Served, str]:
        asker, name = self._authorize(request), request.path_params["name"]
        return await self._load(name, request.path_params.get("version"), asker), name

    async def _load(self, name: str, wanted: str | None, asker: str) -> Served:
        try:
            return self.models.find(name, wanted, asker)[0]
        except NotFound as error:
            raise self.follower.not_found(error, name) from None
        except Cold as cold:
            try:
                async with asyncio.timeout(self.settings.timeout_ms / 1000):
                    return await asyncio.shield(asyncio.wrap_future(self.follower.load(cold)))  # others wait for it too
            except TimeoutError:
                raise DeadlineExceeded(f"{name!r} is still being loaded; try again") from None
            except (Refused, RegistryDown) as error:
                raise Unavailable(f"{name!r} cannot be loaded", 10) from error

    def _aliases(self, served: Served) -> list[str]:
        return [w.alias for w in self.models.aliases(served.tenant) if w.version == served.version]

    def _versions(self, served: Served, name: str) -> list[str]:
        """What can be addressed under the name: the asked one first, those that aliases have, those still in memory."""
        if "@" in name:
            return [served.version]
        pointed = [wanted.version for wanted in self.models.aliases(served.tenant)]
        warm = [one.version for one in self.models.all() if one.tenant == served.tenant]
        return list(dict.fromkeys([served.version, *pointed, *warm]))

    def _told(self, wanted: Wanted) -> dict[str, Any]:
        served = self.models.get(wanted.tenant, wanted.version)
        card = protocol.describe(served, self._aliases(served)) if served else {}
        return {
            "tenant": wanted.tenant,
            "alias": wanted.alias,
            "version": wanted.version,
            "in_memory": served is not None,
            **card,
        }

    def _refusals(self) -> list[dict[str, str]]:
        return [
            {"tenant": wanted.tenant, "alias": wanted.alias, "version": wanted.version, "reason": reason}
            for wanted, reason in list(self.follower.refused.items())
        ]


def pages(own: Pages) -> Starlette:
    """The application behind every path that isn't an inference."""
    unsupported = [
        Route(path, own.does_not_apply, methods=["GET", "POST"])
        for path in ("/v2/trace/setting", "/v2/models/{name}/trace/setting", "/v2/logging")
    ] + [
        Route(f"/v2/{kind}sharedmemory{rest}", own.does_not_apply, methods=["GET", "POST"])
        for kind in ("system", "cuda")
        for rest in (
            "/status",
            "/unregister",
            *(f"/region/{{region}}/{what}" for what in ("status", "register", "unregister")),
        )
    ]
    model = "/v2/models/{name}"
    of_version = "/v2/models/{name}/versions/{version}"
    return Starlette(
        routes=[
            Route("/", own.playground),
            Route("/static/{name}", own.static),
            Route("/openapi.json", own.description),
            Route("/metrics", own.scrape),
            Route("/v1/tenants", own.tenants_page),
            Route("/v2", own.server),
            Route("/v2/health/live", own.live),
            Route("/v2/health/ready", own.ready),
            Route("/v2/models/stats", own.statistics),
            *(Route(base, own.model) for base in (model, of_version)),
            *(Route(f"{base}/ready", own.model_ready) for base in (model, of_version)),
            *(Route(f"{base}/config", own.config) for base in (model, of_version)),
            *(Route(f"{base}/stats", own.statistics) for base in (model, of_version)),
            Route("/v2/repository/index", own.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", own.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", own.unload, methods=["POST"]),
            *unsupported,
        ],
        exception_handlers={ServiceError: own.refuse, HTTPException: own.refuse_http, Exception: own.refuse_unforeseen},
    )


async def _json(request: Request) -> dict[str, Any]:
    """The request's small JSON object; an empty body is an empty one."""
    body = await bodies.read(request.receive, dict(request.scope["headers"]), SMALL_BODY, bodies.Room(2 * SMALL_BODY))
    try:
        told = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise BadRequest("the body must be a JSON object")
    return told


def _address(wanted: Wanted) -> str:
    return wanted.tenant if wanted.alias == CHAMPION else f"{wanted.tenant}@{wanted.alias}"
