"""Puts the HTTP application together around an engine. Knows the engine only by its protocol.

Owns the wiring and the one error handler; no route, no socket and no MLX.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from turboserve import __version__
from turboserve.api.answers import error_response
from turboserve.api.completion import Desk
from turboserve.api.drain import Drain
from turboserve.api.frontdoor import Frontdoor
from turboserve.api.metrics import EngineCollector
from turboserve.api.routes import build_router
from turboserve.api.security import check_exposure
from turboserve.engine.protocol import Engine
from turboserve.errors import InvalidRequestError, MethodNotAllowedError, RouteNotFoundError, TurboServeError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry


def create_app(engine: Engine, settings: Settings, telemetry: Telemetry) -> FastAPI:
    """The application; its `state.drain` lets the runner shut it down gracefully.

    Raises StartupError when the settings would expose the server without a key.
    """
    check_exposure(settings)
    telemetry.use_readings(EngineCollector(engine))
    drain = Drain()
    desk = Desk(engine, drain, telemetry, settings.send_timeout_s, settings.keepalive_interval_s)
    # No generated documentation: its pages load scripts from other hosts. See docs/api.md.
    app = FastAPI(title="TurboServe", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.drain = drain
    app.state.telemetry = telemetry
    app.include_router(build_router(desk, settings.max_body_bytes))
    app.add_middleware(Frontdoor, settings=settings, telemetry=telemetry)
    app.add_exception_handler(TurboServeError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    return app


async def answer_error(request: Request, exc: Exception) -> Response:
    """Every error a route raises, and the router's own 404 and 405, in OpenAI's envelope."""
    if isinstance(exc, TurboServeError):
        return error_response(exc)
    assert isinstance(exc, HTTPException), "registered for these two kinds only"
    return error_response(translate(exc, request.method), dict(exc.headers or {}))


async def answer_nobody(request: Request, exc: Exception) -> Response:
    """The client left while it was sending: the log and the metrics read this."""
    return Response(status_code=499)


def translate(exc: HTTPException, method: str) -> TurboServeError:
    """The framework's complaint as one of ours."""
    if exc.status_code == 404:
        return RouteNotFoundError("There is no such route; GET / lists them.")
    if exc.status_code == 405:
        return MethodNotAllowedError(f"{method[:16]!a} is not allowed on this route.")
    return InvalidRequestError("The request could not be understood.")
