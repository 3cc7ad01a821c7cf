"""What the router answers by itself: models, readiness, statistics and metrics of all, and lists of sessions."""

from __future__ import annotations

from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import ConfigDict
from starlette.responses import Response

from turboserve.api.context import Tenant
from turboserve.api.kv_reply_models import KVStatistics
from turboserve.api.model_names import ServedNames, adapted
from turboserve.api.openapi import failures
from turboserve.api.route_errors import OF_A_SESSION
from turboserve.api.session_request import MAX_PAGE, PageQuery
from turboserve.errors import (
    EngineUnavailableError,
    ModelNotFoundError,
    ModelUnavailableError,
    SessionNotFoundError,
    UnknownParameterError,
)
from turboserve.fleet.asking import ask, ask_all
from turboserve.fleet.context import RouterContext
from turboserve.fleet.forwarding import named_model
from turboserve.fleet.metrics import exposition
from turboserve.fleet.model import Model
from turboserve.fleet.reply_models import (
    FleetModelList,
    FleetModelObject,
    FleetReadiness,
    FleetSessionList,
    FleetStatistics,
    ModelStatistics,
    ModelStatus,
)
from turboserve.telemetry import CONTENT_TYPE

MAX_PAGES = 100  # of one model's sessions in a merged list: 10,000, ten times what a caller may have by default

own_router = APIRouter(redirect_slashes=False)


@own_router.get("/v1/models", responses=failures())
async def models(context: RouterContext) -> FleetModelList:
    """All configured models, loaded or not, each alone and with each of its adapters."""
    data = [
        _model_object(model, adapter)
        for model in context.fleet
        for adapter in ("", *dict.fromkeys(model.plan.adapters.values()))
    ]
    return FleetModelList(data=data)


@own_router.get("/v1/models/{model_id:path}", responses=failures(ModelNotFoundError))
async def model(model_id: str, context: RouterContext) -> FleetModelObject:
    """One of them, by its name or an alias."""
    plan = context.catalogue.find(model_id)
    names = ServedNames(plan.name, plan.adapters, takes_any_name=True)  # aliases are among them
    return _model_object(context.fleet[plan.name], names.adapter_of(model_id))


@own_router.api_route("/ready", methods=["GET", "HEAD"], responses=failures(EngineUnavailableError))
async def ready(context: RouterContext) -> FleetReadiness:
    """Answers when requests are taken; which models are loaded is said, and does not matter."""
    context.drain.check()
    return FleetReadiness(models={model.name: _status(model) for model in context.fleet})


@own_router.get("/v1/kv/stats", responses=failures(ModelNotFoundError, ModelUnavailableError))
async def kv_stats(
    request: Request, context: RouterContext, model: str | None = None
) -> FleetStatistics | KVStatistics:
    """KV memory of every model; with `model`, of a loaded one in the shape that a server of one model has."""
    if name := named_model(request):
        wanted = context.fleet[context.catalogue.find(name).name]
        reply = await ask(wanted, "/v1/kv/stats")
        if reply is None:
            raise ModelUnavailableError(f"The model {wanted.name!r} is not loaded.", param="model")
        return KVStatistics.model_validate_json(reply.content)
    replies = {model.name: reply for model, reply in await ask_all(context.fleet.loaded, "/v1/kv/stats")}
    return FleetStatistics(
        memory_bytes=sum(model.need_bytes for model in context.fleet if model.holds_memory),
        memory_budget_bytes=context.fleet.budget_bytes,
        data=[
            ModelStatistics(model=model.name, status=_status(model), statistics=_statistics(replies.get(model.name)))
            for model in context.fleet
        ],
    )


@own_router.get("/metrics", responses=failures(), response_class=PlainTextResponse)
async def metrics(context: RouterContext) -> Response:
    """The series of all loaded models and the router's own, in Prometheus' text format."""
    replies = await ask_all(context.fleet.loaded, "/metrics")
    page = exposition(context.telemetry, context.fleet, [(model.name, reply.text) for model, reply in replies])
    return Response(page, headers={"Content-Type": CONTENT_TYPE})


class SessionQuery(PageQuery):
    """A page, and whose sessions: of one model, or of all that are loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = None


@own_router.get("/v1/sessions", responses=failures(UnknownParameterError, ModelNotFoundError, *OF_A_SESSION))
async def sessions(
    query: Annotated[SessionQuery, Query()], request: Request, context: RouterContext, tenant: Tenant
) -> FleetSessionList:
    """The caller's sessions by last use, newest first."""
    chosen = context.fleet.loaded
    if name := named_model(request):
        plan = context.catalogue.find(name)
        chosen = [context.fleet[plan.name]]
        if plan.settings.kv_store_dir is not None:  # an unloaded model has sessions there, and nowhere else
            async with context.fleet.use(plan):
                pass
    found: list[dict[str, Any]] = []
    for one in chosen:
        own = await _all_sessions(one, tenant)
        for session in own:
            context.owners.remember(tenant, session["id"], one.name)
        found += own
    found.sort(key=lambda session: -float(session["last_used_at"]))
    return _page(found, query)


async def _all_sessions(model: Model, tenant: str) -> list[dict[str, Any]]:
    """Of one model; merging pages needs them all."""
    found: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": MAX_PAGE}
    for _ in range(MAX_PAGES):
        reply = await ask(model, "/v1/sessions", tenant=tenant, params=params)
        if reply is None:
            break
        page = reply.json()
        found += page["data"]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    return found


def _page(found: list[dict[str, Any]], query: SessionQuery) -> FleetSessionList:
    """Raises SessionNotFoundError for a cursor that is none of them."""
    begin = 0
    if query.after is not None:
        ids = [session["id"] for session in found]
        if query.after not in ids:
            raise SessionNotFoundError(query.after, param="after")
        begin = ids.index(query.after) + 1
    data = found[begin : begin + query.limit]
    return FleetSessionList.model_validate(
        {
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": begin + query.limit < len(found),
        }
    )


def _status(model: Model) -> ModelStatus:
    return "unloaded" if model.state == "stopping" else model.state


def _model_object(model: Model, adapter: str) -> FleetModelObject:
    facts = model.facts
    return FleetModelObject(
        id=adapted(model.name, adapter),
        root=adapter or model.name,
        parent=model.name if adapter else None,
        created=facts.created,
        max_model_len=facts.max_model_len,
        context_length=facts.max_model_len,
        kv_format=facts.kv_format,
        status=_status(model),
        aliases=list(model.plan.aliases),
        pinned=model.plan.is_pinned,
        memory_bytes=model.need_bytes,
        error=model.error or None,
    )


def _statistics(reply: httpx.Response | None) -> KVStatistics | None:
    return KVStatistics.model_validate_json(reply.content) if reply is not None else None
