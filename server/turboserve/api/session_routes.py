"""The session routes: list, look up, fork, pin, limit in time, delete. A caller sees its own sessions only.

Everything is asked of the engine and answered from its futures; nothing is remembered here.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve.api.answers import json_response
from turboserve.api.body import read_json_object
from turboserve.api.kv_replies import session_deleted_json, session_json, session_page_json
from turboserve.api.session_request import (
    EmptyBody,
    ForkBody,
    UpdateBody,
    check_session_id,
    existing_session_id,
    page_of,
    parse_body,
)
from turboserve.engine.protocol import Engine
from turboserve.errors import OverloadedError
from turboserve.messages import DeleteSession, ForkSession, GetSession, ListSessions, UpdateSession

SESSION_ROUTES = (
    "GET /v1/sessions",
    "GET /v1/sessions/{session_id}",
    "POST /v1/sessions/{session_id}",
    "POST /v1/sessions/{session_id}/fork",
    "POST /v1/sessions/{session_id}/pin",
    "POST /v1/sessions/{session_id}/unpin",
    "DELETE /v1/sessions/{session_id}",
)
# The engine answers between two steps; a step of a large model on a slow machine takes seconds, not this long.
ENGINE_TIMEOUT_S = 60.0
MAX_BODY_BYTES = 4096

T = TypeVar("T")


async def engine_answer(future: Future[T]) -> T:
    """What the engine answered. Raises what it raised, or OverloadedError when it does not get to it.

    The future is never cancelled: it belongs to the engine thread.
    """
    waiting = asyncio.wrap_future(future)
    done, _ = await asyncio.wait({waiting}, timeout=ENGINE_TIMEOUT_S)
    if not done:
        raise OverloadedError("The engine is busy and did not answer in time; try again.")
    return waiting.result()


def tenant_of(request: Request) -> str:
    """The caller as the front door established it."""
    return str(request.scope["state"]["tenant"])


def add_session_routes(router: APIRouter, engine: Engine) -> None:
    """Adds all of SESSION_ROUTES."""
    _add_reading(router, engine)
    _add_changing(router, engine)

    @router.delete("/v1/sessions/{session_id}")
    async def delete(request: Request, session_id: str) -> Response:
        session_id = existing_session_id(session_id)
        await engine_answer(engine.session(DeleteSession(tenant_of(request), session_id)))
        return json_response(session_deleted_json(session_id))


def _add_reading(router: APIRouter, engine: Engine) -> None:
    @router.get("/v1/sessions")
    async def page(request: Request) -> Response:
        limit, after = page_of(request.query_params)
        found = await engine_answer(engine.session(ListSessions(tenant_of(request), limit, after)))
        return json_response(session_page_json(found))

    @router.get("/v1/sessions/{session_id}")
    async def one(request: Request, session_id: str) -> Response:
        info = await engine_answer(engine.session(GetSession(tenant_of(request), existing_session_id(session_id))))
        return json_response(session_json(info))


def _add_changing(router: APIRouter, engine: Engine) -> None:
    async def change(request: Request, session_id: str, is_pinned: bool | None, ttl_s: float | None) -> Response:
        command = UpdateSession(tenant_of(request), existing_session_id(session_id), is_pinned, ttl_s)
        return json_response(session_json(await engine_answer(engine.session(command))))

    @router.post("/v1/sessions/{session_id}")
    async def update(request: Request, session_id: str) -> Response:
        wanted = parse_body(UpdateBody, await _body(request))
        return await change(request, session_id, wanted.pinned, wanted.ttl_s)

    @router.post("/v1/sessions/{session_id}/pin")
    async def pin(request: Request, session_id: str) -> Response:
        parse_body(EmptyBody, await _body(request))
        return await change(request, session_id, True, None)

    @router.post("/v1/sessions/{session_id}/unpin")
    async def unpin(request: Request, session_id: str) -> Response:
        parse_body(EmptyBody, await _body(request))
        return await change(request, session_id, False, None)

    @router.post("/v1/sessions/{session_id}/fork")
    async def fork(request: Request, session_id: str) -> Response:
        wanted = parse_body(ForkBody, await _body(request))
        new_id = None if wanted.id is None else check_session_id(wanted.id, "id")
        command = ForkSession(tenant_of(request), existing_session_id(session_id), new_id)
        return json_response(session_json(await engine_answer(engine.session(command))))


async def _body(request: Request) -> dict[str, object]:
    """The JSON object sent, {} for an empty body; the media type is asked for even then (CSRF)."""
    return await read_json_object(request, MAX_BODY_BYTES, may_be_empty=True)
