"""Finding the model that a request means, for all routes that a model's process answers.

A body names it as `model` (Ollama's also as `name`). What a path names by an id, a session, a response or a running
request, belongs to one model: the one in the query's `model` or in the header X-TurboServe-Model; else the one that
the router saw it with; else loaded models are asked one after another, the most recently used first.
"""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qsl, urlencode

import httpx
from starlette.requests import Request
from starlette.responses import Response

from turboserve.api.body import beside_the_loop, check_media_type, parse_object, read_body
from turboserve.api.frontdoor import ID_PREFIXES
from turboserve.api.security import header
from turboserve.api.session_request import SESSION_HEADER
from turboserve.errors import RequestNotFoundError, ResponseNotFoundError, SessionNotFoundError, TurboServeError
from turboserve.fleet.context import FleetContext, fleet_context
from turboserve.fleet.model import Model
from turboserve.fleet.plan import ModelPlan
from turboserve.fleet.relay import RelayResponse
from turboserve.fleet.streams import StreamShape
from turboserve.fleet.upstream import MODEL_HEADER, Question, lost, passed_back, passed_on

OLLAMA = "/api/"
EXPORT = "/export"  # of a session: too large to be held here


async def by_body(request: Request) -> Response:
    """A route whose body names the model."""
    context = await fleet_context(request)
    context.drain.check()
    check_media_type(request)
    raw = await read_body(request, context.max_body_bytes)
    body = await beside_the_loop(len(raw), lambda: parse_object(raw))
    question = _question(request, raw)
    plan = context.catalogue.find(_named_in(body, question, context))
    _remember(body, request, question, plan, context)
    return RelayResponse(context, plan, question, _wanted_stream(body, question))


async def by_query(request: Request) -> Response:
    """A route without a body that any model can answer: the named one, else the most recently used."""
    context = await fleet_context(request)
    context.drain.check()
    question = _question(request, b"")
    name = named_model(request)
    if not name and context.fleet.loaded:
        plan = context.fleet.loaded[0].plan
    else:
        plan = context.catalogue.find(name) if name else next(iter(context.catalogue))
    return RelayResponse(context, plan, question, None)


async def by_id(request: Request) -> Response:
    """A route whose path names something that one model has."""
    context = await fleet_context(request)
    context.drain.check()
    question = _question(request, await read_body(request, context.max_body_bytes))
    wanted_id = str(next(iter(request.path_params.values())))
    if name := named_model(request):
        plan = context.catalogue.find(name)
        if _is_worth_loading(context.fleet[plan.name], question):
            return RelayResponse(context, plan, question, None)
    elif owner := context.owners.find(question.tenant, wanted_id):
        plan = context.fleet[owner].plan
        if _is_worth_loading(context.fleet[owner], question):
            return RelayResponse(context, plan, question, None)
    return await _first_that_knows(context, question, wanted_id)


async def by_stream(request: Request) -> Response:
    """An import, passed on as it comes: to the model that the query or the header names, else as `by_query`."""
    context = await fleet_context(request)
    context.drain.check()
    name = named_model(request)
    loaded = next(iter(context.fleet.loaded), None)
    default = loaded.plan if loaded is not None else next(iter(context.catalogue))
    plan = context.catalogue.find(name) if name else default
    question = _question(request, b"")
    async with context.fleet.use(plan) as process:
        try:
            reply = await process.http.send(question.to(process, request.stream()))
        except httpx.TransportError as exc:
            raise lost(plan) from exc
    if reply.is_success:
        context.owners.remember(question.tenant, str(reply.json()["id"]), plan.name)
    return _whole(reply)


def named_model(request: Request) -> str:
    """The model in the query or in the header; "" when neither names one."""
    return request.query_params.get("model") or header(request.scope["headers"], MODEL_HEADER).decode("latin-1")


def _question(request: Request, body: bytes) -> Question:
    state = request.scope["state"]
    query = urlencode([(key, value) for key, value in parse_qsl(request.url.query, True) if key != "model"])
    headers = passed_on(request.scope["headers"])
    path = request.scope["path"]
    return Question(request.method, path, query, headers, body, state["tenant"], state["request_id"])


def _named_in(body: dict[str, object], question: Question, context: FleetContext) -> object:
    if question.path.startswith(OLLAMA):
        name = body.get("model") or body.get("name")
        return name.removesuffix(":latest") if isinstance(name, str) else name
    return body.get("model") or context.owners.find(question.tenant, body.get("previous_response_id"))


def _remember(
    body: dict[str, object], request: Request, question: Question, plan: ModelPlan, context: FleetContext
) -> None:
    """A request that makes an answer, and the session that it names, are known to be this model's."""
    if question.path not in ID_PREFIXES:
        return
    context.owners.remember(question.tenant, question.request_id, plan.name)
    for session_id in (body.get("session_id"), request.headers.get(SESSION_HEADER)):
        if isinstance(session_id, str) and len(session_id) <= 128:
            context.owners.remember(question.tenant, session_id, plan.name)


def _wanted_stream(body: dict[str, object], question: Question) -> StreamShape | None:
    default = question.path.startswith(OLLAMA)
    return StreamShape(question.path, question.request_id) if body.get("stream", default) is True else None


def _is_worth_loading(model: Model, question: Question) -> bool:
    """An unloaded model has sessions in its disk store alone, and nothing else that a path could name."""
    return model.state == "loaded" or (
        question.path.startswith("/v1/sessions/") and model.plan.settings.kv_store_dir is not None
    )


async def _first_that_knows(context: FleetContext, question: Question, wanted_id: str) -> Response:
    """Small replies, passed on in one piece. Raises what a single model would when none of them knows the id."""
    is_file = question.path.endswith(EXPORT)
    asked = replace(question, path=question.path.removesuffix(EXPORT)) if is_file else question
    for model in context.fleet.loaded:
        async with context.fleet.use(model.plan) as process:
            try:
                reply = await process.http.send(asked.to(process))
            except httpx.TransportError:
                continue
        if reply.status_code != 404:
            context.owners.remember(question.tenant, wanted_id, model.name)
            return RelayResponse(context, model.plan, question, None) if is_file else _whole(reply)
    raise _not_found(question.path, wanted_id)


def _whole(reply: httpx.Response) -> Response:
    response = Response(reply.content, reply.status_code)
    response.raw_headers = passed_back(reply.headers.raw)
    return response


def _not_found(path: str, wanted_id: str) -> TurboServeError:
    if path.startswith("/v1/responses/"):
        return ResponseNotFoundError(wanted_id)
    if path.startswith("/v1/requests/"):
        return RequestNotFoundError(
            "There is no such request of yours under way; its id is in the header x-request-id.", param="request_id"
        )
    return SessionNotFoundError(wanted_id)
