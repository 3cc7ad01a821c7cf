"""The routes of OpenAI's Responses API: make a response, ask for it again, cancel it, forget it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from turboserve.api.answering import AnswerResponse
from turboserve.api.body import check_media_type, read_as
from turboserve.api.context import ApiContext, Context, Tenant, engine_answer
from turboserve.api.mailbox import Mailbox
from turboserve.api.openapi import SESSION_PARAMETER, Shape, event_stream, failures, json_body, stream_or_whole
from turboserve.api.replies import JSON_TYPE
from turboserve.api.responses.body import ResponsesBody
from turboserve.api.responses.replies import ResponseReplies, ResponseWriter
from turboserve.api.responses.reply_models import (
    DeletedResponse,
    InputItemList,
    InputTokens,
    ResponseObject,
    ResponseStreamEvent,
)
from turboserve.api.responses.request import ParsedResponse, parse_response
from turboserve.api.responses.store import ResponseStore, StoredResponse
from turboserve.api.session_request import SESSION_HEADER
from turboserve.api.validation import validated
from turboserve.errors import (
    BodyTooLargeError,
    ContextLengthError,
    EngineFailureError,
    EngineUnavailableError,
    InvalidRequestError,
    KVFormatError,
    MediaTypeError,
    ModelNotFoundError,
    OverloadedError,
    PreviousResponseError,
    QuotaExceededError,
    RequestCancelledError,
    ResponseNotFoundError,
    UnsupportedParameterError,
)
from turboserve.messages import Failed, Finished, Tokenize

logger = logging.getLogger("turboserve.api")

SHAPES: tuple[Shape, ...] = ((ResponsesBody, "validation"), (ResponseStreamEvent, "serialization"))

OF_A_BODY = (
    MediaTypeError,
    BodyTooLargeError,
    UnsupportedParameterError,
    KVFormatError,
    PreviousResponseError,
    ModelNotFoundError,
)

STREAM_OR_WHOLE = stream_or_whole(
    event_stream(
        ResponseStreamEvent,
        "Events `event: TYPE`, `data: {...}`, each a ResponseStreamEvent; the last one has the response as it ended. "
        "Comment lines bridge silence.",
    )
)

router = APIRouter(redirect_slashes=False)


async def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


Store = Annotated[ResponseStore, Depends(_store)]


class RetrieveQuery(BaseModel):
    """The query of `GET /v1/responses/{id}`; what clients add to it is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    stream: bool = False


class ItemsQuery(BaseModel):
    """The query of `GET /v1/responses/{id}/input_items`; what clients add to it is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, Field(max_length=256)] | None = None


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses=failures(
        *OF_A_BODY,
        ContextLengthError,
        QuotaExceededError,
        RequestCancelledError,
        OverloadedError,
        EngineUnavailableError,
    )
    | {200: STREAM_OR_WHOLE},
    openapi_extra=json_body(ResponsesBody) | {"parameters": [SESSION_PARAMETER]},
)
async def create_response(request: Request, context: Context, tenant: Tenant, store: Store) -> Response:
    """Answer a conversation, whole, as a stream of server-sent events, or in the background."""
    if context.drain.draining:
        context.telemetry.request_refused("draining")
    context.drain.check()
    parsed = await _parsed(request, context, tenant, store)
    stored = _to_store(parsed)
    if parsed.head.is_background:
        run_in_background(stored, parsed, context, store)
        return Response(stored.writer.reply().model_dump_json(), media_type=JSON_TYPE)

    def keep() -> None:
        if parsed.head.is_stored:
            store.put(stored)

    return AnswerResponse([parsed.request], ResponseReplies(stored.writer, keep), context, stream=parsed.stream)


@router.post(
    "/v1/responses/input_tokens",
    responses=failures(*OF_A_BODY, ContextLengthError, OverloadedError, EngineUnavailableError),
    openapi_extra=json_body(ResponsesBody),
)
async def count_input_tokens(request: Request, context: Context, tenant: Tenant, store: Store) -> InputTokens:
    """How many tokens the prompt of this response would have."""
    context.drain.check()
    parsed = await _parsed(request, context, tenant, store)
    return InputTokens(input_tokens=len(await engine_answer(context.engine.ask(Tokenize(parsed.request)))))


@router.get("/v1/responses/{response_id}", responses=failures(ResponseNotFoundError, UnsupportedParameterError))
async def get_response(
    response_id: str, query: Annotated[RetrieveQuery, Query()], tenant: Tenant, store: Store
) -> ResponseObject:
    """One of the caller's stored responses, as it is now."""
    if query.stream:
        raise UnsupportedParameterError("Stored responses are not streamed; ask without stream.", param="stream")
    return store.get(tenant, response_id).writer.reply()


@router.delete("/v1/responses/{response_id}", responses=failures(ResponseNotFoundError))
async def delete_response(response_id: str, tenant: Tenant, store: Store) -> DeletedResponse:
    """Forget a stored response; one that runs is cancelled. Those that continue it keep what they know of it."""
    store.delete(tenant, response_id)
    return DeletedResponse(id=response_id)


@router.post("/v1/responses/{response_id}/cancel", responses=failures(ResponseNotFoundError, MediaTypeError))
async def cancel_response(request: Request, response_id: str, tenant: Tenant, store: Store) -> ResponseObject:
    """End a response that runs in the background; one that has ended stays as it is."""
    check_media_type(request)
    stored = store.get(tenant, response_id)
    if not stored.is_background:
        raise InvalidRequestError("Only responses with background=true can be cancelled.", param="response_id")
    if stored.task is not None:
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
    return stored.writer.reply()


@router.get("/v1/responses/{response_id}/input_items", responses=failures(ResponseNotFoundError))
async def input_items(
    response_id: str, query: Annotated[ItemsQuery, Query()], tenant: Tenant, store: Store
) -> InputItemList:
    """Items of the response's own input, newest first unless the query says otherwise."""
    items = list(store.get(tenant, response_id).items)
    if query.order == "desc":
        items.reverse()
    ids = [str(item["id"]) for item in items]
    if query.after is not None:
        if query.after not in ids:
            raise InvalidRequestError("after: the input has no such item.", param="after")
        start = ids.index(query.after) + 1
        items, ids = items[start:], ids[start:]
    shown = ids[: query.limit]
    return InputItemList(
        data=items[: query.limit],  # type: ignore[arg-type]  # validated from the dicts
        first_id=shown[0] if shown else None,
        last_id=shown[-1] if shown else None,
        has_more=len(ids) > query.limit,
    )


async def _parsed(request: Request, context: ApiContext, tenant: str, store: ResponseStore) -> ParsedResponse:
    return parse_response(
        await read_as(request, context.max_body_bytes, partial(validated, ResponsesBody)),
        store,
        request_id=request.scope["state"]["request_id"],
        tenant=tenant,
        names=context.names,
        sampling_defaults=context.engine.sampling_defaults,
        session_headers=request.headers.getlist(SESSION_HEADER),
    )


def _to_store(parsed: ParsedResponse) -> StoredResponse:
    return StoredResponse(
        tenant=parsed.request.tenant,
        writer=ResponseWriter(parsed.head),
        history=parsed.history,
        items=parsed.items,
        session_id=parsed.request.session_id,
        kv_format=parsed.request.kv_format,
        cache_key=parsed.request.cache_key,
        is_background=parsed.head.is_background,
    )


# --- in the background


def run_in_background(
    stored: StoredResponse, parsed: ParsedResponse, context: ApiContext, store: ResponseStore
) -> None:
    """Submit the request, keep its response, and go on without its caller. Raises as `ApiContext.submitted`."""
    with ExitStack() as stack:
        mailbox = stack.enter_context(context.submitted(parsed.request))
        store.put(stored)
        submission = stack.pop_all()

    def ended(task: asyncio.Task[None]) -> None:
        # A callback, because a task that is cancelled before its first step runs nothing of its own.
        with submission:
            stored.task = None
            if task.cancelled():
                stored.writer.cancel()
            elif (bug := task.exception()) is not None:
                logger.error("unexpected failure in the background", exc_info=bug)
                stored.writer.fail(EngineFailureError("Internal error; the server's log has details."))
            if store.holds(stored):  # its bytes are known now; one that was deleted meanwhile stays so
                store.put(stored)

    stored.task = asyncio.create_task(_collect(stored.writer, mailbox))
    stored.task.add_done_callback(ended)


async def _collect(writer: ResponseWriter, mailbox: Mailbox) -> None:
    while not writer.has_ended:
        event = await mailbox.next()
        assert event is not None, "without a time limit there is no silence"
        if isinstance(event, Failed) and isinstance(event.error, RequestCancelledError):
            writer.cancel()
        elif isinstance(event, Failed):
            logger.warning("failed in the background: %s", event.error.code)
            writer.fail(event.error)
        elif isinstance(event, Finished):
            writer.finish(event)
        else:
            writer.delta(event)
