"""Puts the HTTP application together around an engine. Knows the engine only by its protocol.

Owns the wiring; no route, no socket and no MLX.
"""

from __future__ import annotations

from fastapi import FastAPI

from turboserve import __version__
from turboserve.api.aliases import PathAliases
from turboserve.api.anthropic import routes as anthropic
from turboserve.api.chat_request import ChatRules
from turboserve.api.context import ApiContext
from turboserve.api.dashboard import AssetRoute
from turboserve.api.drain import Drain
from turboserve.api.exception_replies import EXPECTED, answer_exception
from turboserve.api.frontdoor import Frontdoor
from turboserve.api.metrics import EngineCollector
from turboserve.api.model_names import ServedNames, adapter_names
from turboserve.api.openapi import ApiDescription
from turboserve.api.responses import routes as responses
from turboserve.api.responses.store import ResponseStore
from turboserve.api.routes import router
from turboserve.api.security import check_exposure
from turboserve.api.shapes import SHAPES
from turboserve.api.tracing import tracing_from_environment
from turboserve.api.vllm_metrics import VllmCollector
from turboserve.engine.protocol import Engine
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry


def create_app(engine: Engine, settings: Settings, telemetry: Telemetry, *, router_key: str = "") -> FastAPI:
    """The application; its `state.context.drain` lets the runner shut it down gracefully.

    `router_key`: of a router in front, which alone may then ask and says whose each request is.

    Raises StartupError when the settings would expose the server without a key, or a name could mean two models.
    """
    check_exposure(settings)
    telemetry.use_readings(EngineCollector(engine), VllmCollector(engine, telemetry))
    # Its own documentation loads scripts from other hosts; `routes.py` serves ours.
    app = FastAPI(title="TurboServe", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.context = ApiContext(
        engine=engine,
        drain=Drain(),
        telemetry=telemetry,
        max_body_bytes=settings.max_body_bytes,
        max_import_bytes=settings.max_import_bytes,
        send_timeout_s=settings.send_timeout_s,
        keepalive_interval_s=settings.keepalive_interval_s,
        stream_interval_s=settings.stream_interval_ms / 1000,
        chat_rules=ChatRules.of(settings),
        names=ServedNames(engine.model_id, adapter_names(settings.adapters), settings.any_model_name),
    )
    app.state.responses = ResponseStore(
        settings.max_responses_per_caller, settings.max_response_bytes_per_caller, settings.response_ttl_s
    )
    needs_key = bool(settings.api_key or settings.api_keys)
    shapes = (*SHAPES, *anthropic.SHAPES, *responses.SHAPES)
    app.state.description = ApiDescription(router.routes, needs_key=needs_key, shapes=shapes)
    app.include_router(router)
    app.router.routes.append(AssetRoute(needs_key=needs_key))
    app.add_middleware(
        Frontdoor,
        settings=settings,
        telemetry=telemetry,
        aliases=PathAliases(router.routes),
        router_key=router_key,
        tracing=tracing_from_environment(),
    )
    for kind in EXPECTED:
        app.add_exception_handler(kind, answer_exception)
    return app
