"""Routes on bare text: completions, tokens and templates; and cancelling what runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve.api.answering import AnswerResponse
from turboserve.api.body import read_as, read_json_object
from turboserve.api.chat_body import MAX_CHOICES, ChatBody
from turboserve.api.completion_body import CompletionBody, texts_or_ids
from turboserve.api.completion_models import Completion, CompletionChunk
from turboserve.api.completion_replies import CompletionReplies
from turboserve.api.context import ApiContext, Context, Tenant, engine_answer
from turboserve.api.conversation import conversation_of
from turboserve.api.kv_reply_models import Reply
from turboserve.api.openapi import SESSION_PARAMETER, event_stream, failures, json_body, stream_or_whole
from turboserve.api.parameters import IGNORED_HEADER, ignored_header, not_declared
from turboserve.api.route_errors import OF_A_QUESTION, OF_AN_ANSWER
from turboserve.api.sampling_request import checked_choices, choices_of, common_request
from turboserve.api.session_request import SESSION_HEADER, EmptyBody
from turboserve.api.text_bodies import DetokenizeBody, TokenizeBody
from turboserve.api.validation import validated
from turboserve.errors import InvalidRequestError, RequestNotFoundError, UnsupportedParameterError
from turboserve.messages import Detokenize, FillInMiddle, MiddlePrompt, RenderTemplate, Tokenize
from turboserve.messages import Request as EngineRequest

MAX_CANCEL_BODY_BYTES = 4096

text_router = APIRouter(redirect_slashes=False)

# --- completions

COMPLETION_STREAM = stream_or_whole(
    event_stream(
        CompletionChunk,
        "Events `data: {...}`, each a CompletionChunk, then `data: [DONE]`. An error after the first byte is the last "
        "event instead, an ErrorEnvelope. Comment lines bridge silence.",
        ends_with_done=True,
    )
)


@text_router.post(
    "/v1/completions",
    response_model=Completion,
    responses=failures(*OF_AN_ANSWER) | {200: COMPLETION_STREAM},
    openapi_extra=json_body(CompletionBody) | {"parameters": [SESSION_PARAMETER]},
)
async def completions(request: Request, context: Context, tenant: Tenant) -> Response:
    """Continue bare prompts, whole or as a stream of server-sent events."""
    context.admit()
    body, ignored = await read_as(request, context.max_body_bytes, partial(_parsed, context=context))
    adapter = context.names.adapter_of(body.model)
    asked = common_request(
        body,
        request_id=request.scope["state"]["request_id"],
        tenant=tenant,
        defaults=context.engine.sampling_defaults,
        session_headers=request.headers.getlist(SESSION_HEADER),
    )
    asked = replace(asked, num_top_logprobs=body.logprobs, adapter=adapter)
    n = body.n or 1
    prompts = _prompts(body, n)
    checked_choices(asked, n, MAX_CHOICES, len(prompts))  # of many prompts some wait
    requests: list[EngineRequest] = []
    for i, prompt in enumerate(prompts):
        requests += choices_of(await _with_prompt(asked, prompt, body.suffix, context), n, first=i * n)
    replies = CompletionReplies(
        asked.request_id,
        context.names.name_of(adapter),
        n,
        [text for text in await _echoes(body, prompts, context) for _ in range(n)],
        has_logprobs=body.logprobs is not None,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    headers = {IGNORED_HEADER: ignored_header(ignored)} if ignored else None
    return AnswerResponse(requests, replies, context, stream=bool(body.stream), extra_headers=headers)


def _parsed(raw: dict[str, object], context: ApiContext) -> tuple[CompletionBody, list[str]]:
    body = validated(CompletionBody, raw, is_strict=context.chat_rules.is_strict)
    return body, not_declared(CompletionBody.model_fields, raw)


Prompt = str | tuple[int, ...]


def _prompts(body: CompletionBody, n: int) -> Sequence[Prompt]:
    """All prompts of a body. Raises InvalidRequestError for what cannot be asked together."""
    prompts = texts_or_ids(body.prompt)
    if body.best_of not in (None, n):
        raise UnsupportedParameterError("best_of: only the value of n is supported.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameterError(
            "echo with logprobs needs log-probabilities of the prompt's tokens, which this server does not compute; "
            "leave one of them out.",
            param="echo",
        )
    if body.suffix and body.echo:
        raise InvalidRequestError("echo and suffix exclude each other.", param="echo")
    if body.suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequestError("suffix needs a prompt of text.", param="suffix")
    return prompts


async def _with_prompt(asked: EngineRequest, prompt: Prompt, suffix: str | None, context: ApiContext) -> EngineRequest:
    if not suffix:
        return replace(asked, prompt=prompt)
    assert isinstance(prompt, str), "checked by `_prompts`"
    middle: MiddlePrompt = await engine_answer(context.engine.ask(FillInMiddle(prompt, suffix)))
    return replace(asked, prompt=middle.tokens, stop_token_ids=(*asked.stop_token_ids, *middle.stop_token_ids))


async def _echoes(body: CompletionBody, prompts: Sequence[Prompt], context: ApiContext) -> list[str]:
    """The text that goes before the answers to each prompt."""
    if not body.echo:
        return [""] * len(prompts)
    return [
        prompt if isinstance(prompt, str) else await engine_answer(context.engine.ask(Detokenize(prompt)))
        for prompt in prompts
    ]


# --- tokens and templates


class Tokens(Reply):
    """The token ids of a prompt, and how many the model takes."""

    tokens: list[int]
    count: int
    max_model_len: int


class PlainText(Reply):
    """Text under vLLM's name and under llama.cpp's."""

    prompt: str
    content: str


class RenderedPrompt(Reply):
    """The text of a conversation's prompt."""

    prompt: str


TOKENIZE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": [{"$ref": f"#/components/schemas/{m.__name__}"} for m in (TokenizeBody, ChatBody)]}
            }
        },
    }
}


@text_router.post("/tokenize", responses=failures(*OF_A_QUESTION), openapi_extra=TOKENIZE_BODY)
async def tokenize(request: Request, context: Context, tenant: Tenant) -> Tokens:
    """The token ids of a bare prompt, or of the prompt that a conversation becomes."""

    def parse(body: dict[str, object]) -> EngineRequest:
        return _conversation(request, body, context, tenant) if "messages" in body else _bare_prompt(body, context)

    asked = await read_as(request, context.max_body_bytes, parse)
    tokens: tuple[int, ...] = await engine_answer(context.engine.ask(Tokenize(asked)))
    limit = context.engine.stats().max_context_tokens
    return Tokens(tokens=list(tokens), count=len(tokens), max_model_len=limit)


@text_router.post("/detokenize", responses=failures(*OF_A_QUESTION), openapi_extra=json_body(DetokenizeBody))
async def detokenize(request: Request, context: Context) -> PlainText:
    """The text of token ids, control tokens included."""
    body = await read_as(request, context.max_body_bytes, partial(validated, DetokenizeBody))
    context.names.adapter_of(body.model)
    text: str = await engine_answer(context.engine.ask(Detokenize(tuple(body.tokens))))
    return PlainText(prompt=text, content=text)


@text_router.post("/apply-template", responses=failures(*OF_A_QUESTION), openapi_extra=json_body(ChatBody))
async def apply_template(request: Request, context: Context, tenant: Tenant) -> RenderedPrompt:
    """The text of the prompt that a chat completion with this body would have."""
    parse = partial(_conversation, request, context=context, tenant=tenant)
    asked = await read_as(request, context.max_body_bytes, parse)
    return RenderedPrompt(prompt=await engine_answer(context.engine.ask(RenderTemplate(asked))))


def _conversation(request: Request, body: dict[str, object], context: ApiContext, tenant: str) -> EngineRequest:
    return conversation_of(body, context, request_id=request.scope["state"]["request_id"], tenant=tenant)


def _bare_prompt(body: dict[str, object], context: ApiContext) -> EngineRequest:
    asked = validated(TokenizeBody, body)
    context.names.adapter_of(asked.model)
    for name in ("return_token_strs", "with_pieces"):
        if getattr(asked, name):
            raise UnsupportedParameterError(f"{name} is not supported: ask /detokenize for texts.", param=name)
    for name in ("add_special_tokens", "add_special", "parse_special"):
        if getattr(asked, name) is False:
            raise UnsupportedParameterError(f"{name}: only true is supported, as prompts are read.", param=name)
    text = asked.content if asked.prompt is None else asked.prompt
    if text is None:
        raise InvalidRequestError("Missing required parameter: prompt, content or messages.", param="prompt")
    return EngineRequest("tokenize", prompt=text)


# --- requests under way


class CancelledRequest(Reply):
    """The request was told to end; its reply is the error `request_cancelled`, or ends with it."""

    id: str
    cancelled: bool


@text_router.post(
    "/v1/requests/{request_id}/cancel",
    responses=failures(RequestNotFoundError, *OF_A_QUESTION),
    openapi_extra=json_body(EmptyBody, may_be_empty=True),
)
async def cancel_request(request: Request, request_id: str, context: Context, tenant: Tenant) -> CancelledRequest:
    """End a request of the caller's that is under way, with all its choices."""
    validated(EmptyBody, await read_json_object(request, MAX_CANCEL_BODY_BYTES, may_be_empty=True))
    ids = context.running.ids(request_id, tenant)
    if not ids:
        raise RequestNotFoundError(
            "There is no such request of yours under way; its id is in the header x-request-id.", param="request_id"
        )
    for known in ids:
        context.engine.cancel(known)
    return CancelledRequest(id=request_id, cancelled=True)
