"""The table of routes: each reads its request, asks the engine, and raises when it cannot answer.

Shapes of replies are the return types; `failures` lists what a route may raise beside what any route may. A
caller sees its own sessions only. Nothing is remembered here.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.responses import Response

from turboserve import __version__
from turboserve.api.answering import AnswerResponse
from turboserve.api.anthropic import routes as anthropic
from turboserve.api.body import read_as, read_json_object
from turboserve.api.chat_body import ChatBody
from turboserve.api.chat_request import parse_chat
from turboserve.api.context import Context, Tenant, engine_answer
from turboserve.api.dashboard import page_response, wants_page
from turboserve.api.docs_page import CONTENT_SECURITY_POLICY
from turboserve.api.embedding_routes import embedding_router
from turboserve.api.kv_replies import kv_statistics, session_list, session_object, session_tree
from turboserve.api.kv_reply_models import DeletedSession, KVStatistics, KVTree, SessionList, SessionObject
from turboserve.api.model_routes import models_router
from turboserve.api.ollama.routes import ollama_router
from turboserve.api.openapi import SESSION_PARAMETER, STREAM_OR_WHOLE, failures, json_body
from turboserve.api.parameters import IGNORED_HEADER, ignored_header
from turboserve.api.replies import JSON_TYPE, ChatReplies, system_fingerprint
from turboserve.api.reply_models import ChatCompletion, Health, Readiness, ServerInfo
from turboserve.api.responses import routes as responses
from turboserve.api.route_errors import OF_A_BODY, OF_A_SESSION, OF_THE_ENGINE
from turboserve.api.session_request import (
    SESSION_HEADER,
    EmptyBody,
    ForkBody,
    PageQuery,
    UpdateBody,
    check_session_id,
    existing_session_id,
)
from turboserve.api.session_transfer import transfer_router
from turboserve.api.text_routes import text_router
from turboserve.api.validation import validated
from turboserve.errors import (
    ContextLengthError,
    EngineUnavailableError,
    KVFormatError,
    ModelNotFoundError,
    QuotaExceededError,
    RequestCancelledError,
    SessionBusyError,
    SessionExistsError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from turboserve.messages import DeleteSession, ForkSession, GetSession, GetSessionTree, ListSessions, UpdateSession
from turboserve.telemetry import CONTENT_TYPE

MAX_SESSION_BODY_BYTES = 4096
PAGE_OR_INFO: dict[str, object] = {"content": {"text/html": {"schema": {"type": "string"}}}}

router = APIRouter(redirect_slashes=False)

# --- completions


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=failures(
        UnsupportedParameterError,
        ContextLengthError,
        KVFormatError,
        ModelNotFoundError,
        QuotaExceededError,
        RequestCancelledError,
        *OF_A_BODY,
        *OF_THE_ENGINE,
    )
    | {200: STREAM_OR_WHOLE},
    openapi_extra=json_body(ChatBody) | {"parameters": [SESSION_PARAMETER]},
)
async def chat_completions(request: Request, context: Context, tenant: Tenant) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    if context.drain.draining:
        context.telemetry.request_refused("draining")
    context.drain.check()
    engine = context.engine
    parse = partial(
        parse_chat,
        request_id=request.scope["state"]["request_id"],
        tenant=tenant,
        names=context.names,
        session_headers=request.headers.getlist(SESSION_HEADER),
        defaults=engine.sampling_defaults,
        rules=context.chat_rules,
    )
    requests, delivery, ignored = await read_as(request, context.max_body_bytes, parse)
    fingerprint = system_fingerprint(engine.stats(), requests[0].kv_format, requests[0].adapter)
    name = context.names.name_of(requests[0].adapter)
    replies = ChatReplies(requests[0].request_id, name, delivery, fingerprint, len(requests))
    headers = {IGNORED_HEADER: ignored_header(ignored)} if ignored else None
    return AnswerResponse(requests, replies, context, stream=delivery.stream, extra_headers=headers)


# --- other APIs

# including a router would hide its routes behind one
router.routes.extend((*anthropic.router.routes, *responses.router.routes))

# --- KV memory and sessions


@router.get("/v1/kv/stats", responses=failures())
async def kv_stats(context: Context) -> KVStatistics:
    """KV memory in all and of the largest conversations: the operator's view."""
    return kv_statistics(context.engine.stats())


@router.get("/v1/kv/tree", responses=failures(*OF_A_SESSION))
async def kv_tree(context: Context, tenant: Tenant) -> KVTree:
    """How the caller's newest sessions share their beginnings and pages."""
    return session_tree(await engine_answer(context.engine.session(GetSessionTree(tenant))))


@router.get("/v1/sessions", responses=failures(UnknownParameterError, *OF_A_SESSION))
async def sessions(query: Annotated[PageQuery, Query()], context: Context, tenant: Tenant) -> SessionList:
    """The caller's sessions by last use, newest first."""
    command = ListSessions(tenant, query.limit, query.after)
    return session_list(await engine_answer(context.engine.session(command)))


@router.get("/v1/sessions/{session_id}", responses=failures(*OF_A_SESSION))
async def session(session_id: str, context: Context, tenant: Tenant) -> SessionObject:
    """One of the caller's sessions."""
    command = GetSession(tenant, existing_session_id(session_id))
    return session_object(await engine_answer(context.engine.session(command)))


# before the route that would take `import` for a session's id
router.routes.extend(transfer_router.routes)


@router.post(
    "/v1/sessions/{session_id}",
    responses=failures(QuotaExceededError, *OF_A_BODY, *OF_A_SESSION),
    openapi_extra=json_body(UpdateBody, may_be_empty=True),
)
async def update_session(request: Request, session_id: str, context: Context, tenant: Tenant) -> SessionObject:
    """Pin or unpin a session, or limit it in time."""
    wanted = validated(UpdateBody, await _session_body(request))
    command = UpdateSession(tenant, existing_session_id(session_id), wanted.pinned, wanted.ttl_s)
    return session_object(await engine_answer(context.engine.session(command)))


@router.post(
    "/v1/sessions/{session_id}/fork",
    responses=failures(QuotaExceededError, SessionBusyError, SessionExistsError, *OF_A_BODY, *OF_A_SESSION),
    openapi_extra=json_body(ForkBody, may_be_empty=True),
)
async def fork_session(request: Request, session_id: str, context: Context, tenant: Tenant) -> SessionObject:
    """A new session that shares all pages of this one; without an id, the server chooses one."""
    wanted = validated(ForkBody, await _session_body(request))
    new_id = None if wanted.id is None else check_session_id(wanted.id, "id")
    command = ForkSession(tenant, existing_session_id(session_id), new_id)
    return session_object(await engine_answer(context.engine.session(command)))


@router.post(
    "/v1/sessions/{session_id}/pin",
    responses=failures(QuotaExceededError, *OF_A_BODY, *OF_A_SESSION),
    openapi_extra=json_body(EmptyBody, may_be_empty=True),
)
async def pin_session(request: Request, session_id: str, context: Context, tenant: Tenant) -> SessionObject:
    """Keep a session from being dropped or shrunk for others."""
    validated(EmptyBody, await _session_body(request))
    command = UpdateSession(tenant, existing_session_id(session_id), is_pinned=True)
    return session_object(await engine_answer(context.engine.session(command)))


@router.post(
    "/v1/sessions/{session_id}/unpin",
    responses=failures(*OF_A_BODY, *OF_A_SESSION),
    openapi_extra=json_body(EmptyBody, may_be_empty=True),
)
async def unpin_session(request: Request, session_id: str, context: Context, tenant: Tenant) -> SessionObject:
    """Let a session give way to others again."""
    validated(EmptyBody, await _session_body(request))
    command = UpdateSession(tenant, existing_session_id(session_id), is_pinned=False)
    return session_object(await engine_answer(context.engine.session(command)))


@router.delete("/v1/sessions/{session_id}", responses=failures(SessionBusyError, *OF_A_SESSION))
async def delete_session(session_id: str, context: Context, tenant: Tenant) -> DeletedSession:
    """Give a session's memory and file back."""
    command = DeleteSession(tenant, existing_session_id(session_id))
    await engine_answer(context.engine.session(command))
    return DeletedSession(id=session_id)


async def _session_body(request: Request) -> dict[str, object]:
    """The JSON object sent, {} for an empty body; the media type is asked for even then (CSRF)."""
    return await read_json_object(request, MAX_SESSION_BODY_BYTES, may_be_empty=True)


# --- the server itself


@router.get("/", response_model=ServerInfo, responses=failures() | {200: PAGE_OR_INFO})
async def root(request: Request, reply: Response) -> object:
    """Name, version and routes; for a browser, whose `Accept` names HTML, the dashboard."""
    if wants_page(request.scope["headers"]):
        return page_response(request)
    reply.headers["Vary"] = "Accept"
    return ServerInfo(version=__version__, routes=ROUTES)


@router.api_route("/health", methods=["GET", "HEAD"], responses=failures())
async def health() -> Health:
    """Answers while the process lives; needs no key."""
    return Health()


@router.api_route("/ready", methods=["GET", "HEAD"], responses=failures(EngineUnavailableError))
async def ready(context: Context) -> Readiness:
    """Answers when a request sent now would be worked on, else says why not."""
    context.drain.check()
    reason = context.engine.unready_reason()
    if reason is not None:
        raise EngineUnavailableError.not_ready(reason)
    return Readiness(model=context.engine.model_id)


@router.get("/metrics", responses=failures(), response_class=PlainTextResponse)
async def metrics(context: Context) -> Response:
    """Totals and request counters in Prometheus' text format."""
    return Response(context.telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/openapi.json", responses=failures(), response_model=dict[str, object])
async def openapi_json(request: Request) -> Response:
    """This description of the routes, as OpenAPI 3.1."""
    return Response(request.app.state.description.json, media_type=JSON_TYPE)


@router.get("/docs", responses=failures(), response_class=HTMLResponse)
async def docs(request: Request) -> Response:
    """The same description as a page without scripts."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return HTMLResponse(request.app.state.description.page, headers=headers)


for further in (text_router, models_router, embedding_router, ollama_router):
    router.routes.extend(further.routes)

ROUTES = [
    f"{method} {route.path_format}"
    for route in router.routes
    if isinstance(route, APIRoute) and route.path != "/"
    for method in sorted((route.methods or set()) - {"HEAD"})
]
