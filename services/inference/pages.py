"""What people and their tools look at: playground, health, metadata, metrics. Starlette; the inference paths are in app.py."""

from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from services.inference import protocol
from services.inference.errors import ServiceError
from services.inference.follower import Follower
from services.inference.metrics import Metrics
from services.inference.models import Models

STATIC = Path(__file__).with_name("static")
TYPES = {"playground.css": "text/css", "playground.js": "text/javascript"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"


def pages(models: Models, follower: Follower, metrics: Metrics, version: str) -> Starlette:
    """The application behind every path that isn't an inference."""

    async def playground(request: Request) -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
        return FileResponse(STATIC / "playground.html", media_type="text/html", headers=headers)

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in TYPES:
            raise HTTPException(404, f"no file {name!r}")
        return FileResponse(STATIC / name, media_type=TYPES[name], headers={"cache-control": "no-cache"})

    async def server(request: Request) -> Response:
        return JSONResponse({"name": "bit-serve", "version": version, "extensions": ["binary_tensor_data"]})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        """Ready once all that the registry wanted at the start was dealt with; later loads don't take it back."""
        return JSONResponse({"ready": follower.polled}, 200 if follower.polled else 503)

    async def model(request: Request) -> Response:
        name, wanted = request.path_params["name"], request.path_params.get("version")
        served = models.find(name, wanted)
        told = protocol.metadata(served, name)
        told["parameters"]["refused"] = refused(served.tenant)
        return JSONResponse(told)

    async def model_ready(request: Request) -> Response:
        models.find(request.path_params["name"], request.path_params.get("version"))
        return JSONResponse({"ready": True})

    async def tenants(request: Request) -> Response:
        served = [protocol.describe(one) for one in models.all()]
        refusals = [
            {"tenant": item.tenant, "alias": item.alias, "version": item.version, "reason": reason}
            for item, reason in follower.refused.items()
        ]
        return JSONResponse({"served": served, "refused": refusals})

    def refused(tenant: str) -> list[dict[str, str]]:
        found = [(item, reason) for item, reason in follower.refused.items() if item.tenant == tenant]
        return [{"alias": item.alias, "version": item.version, "reason": reason} for item, reason in found]

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return JSONResponse({"error": str(error)}, error.status)

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    return Starlette(
        routes=[
            Route("/", playground),
            Route("/static/{name}", static),
            Route("/v1/tenants", tenants),
            Route("/v2", server),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/v2/models/{name}", model),
            Route("/v2/models/{name}/ready", model_ready),
            Route("/v2/models/{name}/versions/{version}", model),
            Route("/v2/models/{name}/versions/{version}/ready", model_ready),
            Route("/metrics", scrape),
        ],
        exception_handlers={ServiceError: refuse, HTTPException: refuse_http},
    )
