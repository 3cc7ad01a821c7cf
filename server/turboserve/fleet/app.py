"""Puts the router's application together: the same table of routes as for one model, answered by others.

Routes that a later version of `turboserve.api` adds are passed on without any change here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from turboserve import __version__
from turboserve.api.aliases import PathAliases
from turboserve.api.anthropic import routes as anthropic
from turboserve.api.dashboard import AssetRoute
from turboserve.api.drain import Drain
from turboserve.api.exception_replies import EXPECTED, answer_exception
from turboserve.api.frontdoor import Frontdoor
from turboserve.api.held_bytes import IMPORT_PATH
from turboserve.api.openapi import ApiDescription
from turboserve.api.responses import routes as responses
from turboserve.api.routes import router as api_router
from turboserve.api.security import check_exposure
from turboserve.api.shapes import SHAPES
from turboserve.api.tracing import tracing_from_environment
from turboserve.fleet.context import FleetContext
from turboserve.fleet.fleet import Fleet
from turboserve.fleet.forwarding import by_body, by_id, by_query, by_stream
from turboserve.fleet.plan import Catalogue
from turboserve.fleet.routes import own_router
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

# Answered here as they are: they need no engine.
SAME = frozenset({"/", "/health", "/openapi.json", "/docs"})

Endpoint = Callable[[Request], Awaitable[Response]]


class ForwardedRoute(Route):
    """A route of a model's process; the log and the metrics know it by its template."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, {**child_scope, "route": self}


def create_router_app(fleet: Fleet, catalogue: Catalogue, settings: Settings, telemetry: Telemetry) -> FastAPI:
    """The application; its `state.context` holds the fleet and the drain.

    Raises StartupError when the settings would expose the server without a key.
    """
    check_exposure(settings)
    app = FastAPI(title="TurboServe", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.context = FleetContext(
        fleet=fleet,
        catalogue=catalogue,
        drain=Drain(),
        telemetry=telemetry,
        max_body_bytes=settings.max_body_bytes,
        send_timeout_s=settings.send_timeout_s,
        keepalive_interval_s=settings.keepalive_interval_s,
    )
    own = {route.path: route for route in own_router.routes if isinstance(route, APIRoute)}
    described = [own.get(route.path, route) for route in api_router.routes if isinstance(route, APIRoute)]
    needs_key = bool(settings.api_key or settings.api_keys)
    shapes = (*SHAPES, *anthropic.SHAPES, *responses.SHAPES)
    app.state.description = ApiDescription(described, needs_key=needs_key, shapes=shapes)
    app.router.routes.extend(_answered(route, own) for route in described)
    app.router.routes.append(AssetRoute(needs_key=needs_key))
    app.add_middleware(
        Frontdoor,
        settings=settings,
        telemetry=telemetry,
        aliases=PathAliases(described),
        tracing=tracing_from_environment(),
    )
    for kind in EXPECTED:
        app.add_exception_handler(kind, answer_exception)
    return app


def _answered(route: APIRoute, own: dict[str, APIRoute]) -> BaseRoute:
    if route.path in SAME or route.path in own:
        return route
    return ForwardedRoute(route.path, _forwarder(route), methods=sorted(route.methods or ()))


def _forwarder(route: APIRoute) -> Endpoint:
    if route.path == IMPORT_PATH:
        return by_stream
    if route.param_convertors:
        return by_id
    return by_body if "POST" in (route.methods or ()) else by_query
