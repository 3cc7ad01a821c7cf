"""Anthropic's routes: messages, and how many tokens they have."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve.api.answering import AnswerResponse
from turboserve.api.anthropic.body import CountTokensBody, MessagesBody
from turboserve.api.anthropic.replies import MessageReplies
from turboserve.api.anthropic.reply_models import MessageEvent, MessageReply, TokenCount
from turboserve.api.anthropic.request import parse_count, parse_messages
from turboserve.api.body import read_as
from turboserve.api.context import Context, Tenant, engine_answer
from turboserve.api.openapi import (
    SESSION_PARAMETER,
    Shape,
    anthropic_failures,
    event_stream,
    json_body,
    stream_or_whole,
)
from turboserve.api.session_request import SESSION_HEADER
from turboserve.errors import (
    BodyTooLargeError,
    ContextLengthError,
    EngineUnavailableError,
    KVFormatError,
    MediaTypeError,
    ModelNotFoundError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
    UnsupportedParameterError,
)
from turboserve.messages import Tokenize

SHAPES: tuple[Shape, ...] = (
    (MessagesBody, "validation"),
    (CountTokensBody, "validation"),
    (MessageEvent, "serialization"),
)

OF_A_PROMPT = (
    MediaTypeError,
    BodyTooLargeError,
    UnsupportedParameterError,
    ModelNotFoundError,
    ContextLengthError,
    OverloadedError,
    EngineUnavailableError,
)

STREAM_OR_WHOLE = stream_or_whole(
    event_stream(
        MessageEvent,
        "Events `event: TYPE`, `data: {...}`, each a MessageEvent, from message_start to message_stop. An error after "
        "the first byte is the last event instead.",
    )
)

router = APIRouter(redirect_slashes=False)


@router.post(
    "/v1/messages",
    response_model=MessageReply,
    responses=anthropic_failures(*OF_A_PROMPT, KVFormatError, QuotaExceededError, RequestCancelledError)
    | {200: STREAM_OR_WHOLE},
    openapi_extra=json_body(MessagesBody) | {"parameters": [SESSION_PARAMETER]},
)
async def messages(request: Request, context: Context, tenant: Tenant) -> Response:
    """Answer a conversation in Anthropic's shapes, whole or as a stream of server-sent events."""
    if context.drain.draining:
        context.telemetry.request_refused("draining")
    context.drain.check()
    parse = partial(
        parse_messages,
        request_id=request.scope["state"]["request_id"],
        tenant=tenant,
        names=context.names,
        sampling_defaults=context.engine.sampling_defaults,
        session_headers=request.headers.getlist(SESSION_HEADER),
    )
    parsed, delivery = await read_as(request, context.max_body_bytes, parse)
    replies = MessageReplies(
        parsed.request_id,
        context.names.name_of(parsed.adapter),
        hides_thinking=delivery.hides_thinking,
        # The first event of a stream has the prompt's tokens. The engine counts them before it reads the prompt.
        num_prompt_tokens=context.engine.ask(Tokenize(parsed)) if delivery.stream else None,
    )
    return AnswerResponse([parsed], replies, context, stream=delivery.stream)


@router.post(
    "/v1/messages/count_tokens",
    responses=anthropic_failures(*OF_A_PROMPT),
    openapi_extra=json_body(CountTokensBody),
)
async def count_tokens(request: Request, context: Context, tenant: Tenant) -> TokenCount:
    """How many tokens the prompt of these messages and tools has."""
    context.drain.check()
    parse = partial(
        parse_count,
        request_id=request.scope["state"]["request_id"],
        tenant=tenant,
        names=context.names,
    )
    parsed = await read_as(request, context.max_body_bytes, parse)
    return TokenCount(input_tokens=len(await engine_answer(context.engine.ask(Tokenize(parsed)))))
