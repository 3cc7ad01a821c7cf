"""The routes: each reads its request, asks the engine, and raises when it cannot answer."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve import __version__
from turboserve.api.answers import json_response
from turboserve.api.body import read_json_object
from turboserve.api.chat_request import check_model, parse_chat
from turboserve.api.completion import CompletionResponse, Desk
from turboserve.api.kv_replies import kv_stats_json
from turboserve.api.replies import model_json
from turboserve.api.session_request import SESSION_HEADER
from turboserve.api.session_routes import SESSION_ROUTES, add_session_routes
from turboserve.errors import EngineUnavailableError
from turboserve.telemetry import CONTENT_TYPE

ROUTES = (
    "POST /v1/chat/completions",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /v1/kv/stats",
    *SESSION_ROUTES,
    "GET /health",
    "GET /ready",
    "GET /metrics",
)


def build_router(desk: Desk, max_body_bytes: int) -> APIRouter:
    """All routes, answering for one engine."""
    router = APIRouter(redirect_slashes=False)
    _add_status_routes(router, desk)
    _add_model_routes(router, desk)
    add_session_routes(router, desk.engine)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        if desk.drain.draining:
            desk.telemetry.request_refused("draining")
        desk.drain.check()
        body = await read_json_object(request, max_body_bytes)
        state = request.scope["state"]
        parsed = parse_chat(
            body,
            request_id=state["request_id"],
            tenant=state["tenant"],
            model_id=desk.engine.model_id,
            session_headers=request.headers.getlist(SESSION_HEADER),
        )
        return CompletionResponse(*parsed, desk)

    return router


def _add_status_routes(router: APIRouter, desk: Desk) -> None:
    @router.get("/")
    async def root() -> Response:
        return json_response({"name": "turboserve", "version": __version__, "routes": ROUTES})

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        desk.drain.check()
        reason = desk.engine.unready_reason()
        if reason is not None:
            raise EngineUnavailableError(reason)
        return json_response({"status": "ready", "model": desk.engine.model_id})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})

    @router.get("/v1/kv/stats")
    async def kv_stats() -> Response:
        return json_response(kv_stats_json(desk.engine.stats()))


def _add_model_routes(router: APIRouter, desk: Desk) -> None:
    @router.get("/v1/models")
    async def models() -> Response:
        served = model_json(desk.engine.model_id, desk.engine.created)
        return json_response({"object": "list", "data": [served]})

    # `:path`, because hub names contain a slash.
    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        check_model(model_id, desk.engine.model_id)
        return json_response(model_json(desk.engine.model_id, desk.engine.created))
