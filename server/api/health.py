"""Is it alive, is it ready, and how is it doing."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.dependencies import MetricsCaller, ServicesDep
from server.api.description import errors
from server.api.schemas import HealthResponse, ReadyResponse
from server.errors import DrainingError

router = APIRouter(tags=["Health"])


@router.get("/health/live", responses=errors(503))
async def live(services: ServicesDep) -> HealthResponse:
    """The process answers and its engine runs. Restart it when this fails."""
    if not services.engine.is_alive and not services.generator.draining:
        raise HTTPException(503, "the engine has stopped; restart the server, its log says why")
    return HealthResponse(status="live")


@router.get("/health/ready", responses=errors(503))
async def ready(services: ServicesDep) -> ReadyResponse:
    """The server takes requests. While it shuts down it answers 503 and `draining`.

    With `"store": "away"` it goes on with the tasks it has loaded, and changes none.
    """
    if services.generator.draining:
        raise DrainingError("the server is draining: it finishes what runs and takes no new work")
    connected = services.tasks.store_connected
    return ReadyResponse(status="ready", store="connected" if connected else "away")


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: ServicesDep, _: MetricsCaller) -> Response:
    """What Prometheus scrapes."""
    return Response(services.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
