"""Ollama's routes: chats and prompts, and what its clients look up before they ask."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from turboserve.api.answering import AnswerResponse
from turboserve.api.body import read_as
from turboserve.api.completion_body import CompletionBody
from turboserve.api.context import ApiContext, Context, Tenant, engine_answer
from turboserve.api.conversation import conversation_of
from turboserve.api.ollama.bodies import (
    GenerateBody,
    OllamaChatBody,
    ShowBody,
    answer_constraint,
    chat_body,
    generate_chat_body,
    plain_name,
    raw_body,
    refuse_unsupported,
)
from turboserve.api.ollama.models import (
    LoadedTag,
    LoadedTags,
    ModelDetails,
    OllamaChat,
    OllamaError,
    OllamaGeneration,
    OllamaVersion,
    Shown,
    Tag,
    Tags,
)
from turboserve.api.ollama.replies import NDJSON_TYPE, OllamaReplies, timestamp
from turboserve.api.openapi import failures, json_body, line_stream, stream_or_whole
from turboserve.api.route_errors import OF_A_QUESTION, OF_AN_ANSWER
from turboserve.api.sampling_request import common_request
from turboserve.api.validation import validated
from turboserve.messages import FillInMiddle, MiddlePrompt
from turboserve.messages import Request as EngineRequest

# Clients refuse servers that are older than what they need; what this adapter speaks is this version's API.
OLLAMA_VERSION = "0.9.0"
NEVER = "2318-01-01T00:00:00Z"  # when the model is unloaded
LINES = "JSON lines, the last with done=true. An error after the first is the last line instead, an OllamaError."

ollama_router = APIRouter(redirect_slashes=False)


@ollama_router.post(
    "/api/chat",
    response_model=OllamaChat,
    responses=failures(*OF_AN_ANSWER, shape=OllamaError)
    | {200: stream_or_whole(line_stream(OllamaChat, NDJSON_TYPE, LINES))},
    openapi_extra=json_body(OllamaChatBody),
)
async def ollama_chat(request: Request, context: Context, tenant: Tenant) -> Response:
    """Answer a conversation, as JSON lines unless the body says otherwise."""
    context.admit()

    def parse(raw: dict[str, object]) -> tuple[OllamaChatBody, str, EngineRequest | None]:
        body = validated(OllamaChatBody, raw)
        adapter = context.names.adapter_of(plain_name(body.model))
        if not body.messages:
            return body, adapter, None
        asked = conversation_of(chat_body(body), context, request_id=_request_id(request), tenant=tenant)
        return body, adapter, replace(asked, adapter=adapter, constraint=answer_constraint(body))

    body, adapter, asked = await read_as(request, context.max_body_bytes, parse)
    replies = OllamaReplies(context.names.name_of(adapter), is_chat=True)
    if asked is None:
        return replies.loaded()
    return AnswerResponse([asked], replies, context, stream=body.stream is not False)


@ollama_router.post(
    "/api/generate",
    response_model=OllamaGeneration,
    responses=failures(*OF_AN_ANSWER, shape=OllamaError)
    | {200: stream_or_whole(line_stream(OllamaGeneration, NDJSON_TYPE, LINES))},
    openapi_extra=json_body(GenerateBody),
)
async def ollama_generate(request: Request, context: Context, tenant: Tenant) -> Response:
    """Answer one prompt, as JSON lines unless the body says otherwise."""
    context.admit()

    def parse(raw: dict[str, object]) -> tuple[GenerateBody, str, EngineRequest | None]:
        body = validated(GenerateBody, raw)
        adapter = context.names.adapter_of(plain_name(body.model))
        refuse_unsupported(body)
        if not body.prompt or body.raw or body.suffix:
            return body, adapter, None
        asked = conversation_of(generate_chat_body(body), context, request_id=_request_id(request), tenant=tenant)
        return body, adapter, replace(asked, constraint=answer_constraint(body))

    body, adapter, asked = await read_as(request, context.max_body_bytes, parse)
    replies = OllamaReplies(context.names.name_of(adapter), is_chat=False)
    if not body.prompt:
        return replies.loaded()
    if asked is None:
        asked = await _raw_request(body, context, _request_id(request), tenant)
    asked = replace(asked, adapter=adapter)
    return AnswerResponse([asked], replies, context, stream=body.stream is not False)


async def _raw_request(body: GenerateBody, context: ApiContext, request_id: str, tenant: str) -> EngineRequest:
    completion = validated(CompletionBody, raw_body(body))
    defaults = context.engine.sampling_defaults
    asked = common_request(completion, request_id=request_id, tenant=tenant, defaults=defaults)
    asked = replace(asked, constraint=answer_constraint(body))
    if not body.suffix:
        return replace(asked, prompt=body.prompt)
    middle: MiddlePrompt = await engine_answer(context.engine.ask(FillInMiddle(body.prompt or "", body.suffix)))
    return replace(asked, prompt=middle.tokens, stop_token_ids=middle.stop_token_ids)


def _request_id(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


# --- what there is


@ollama_router.get("/api/tags", responses=failures(shape=OllamaError))
async def ollama_tags(context: Context) -> Tags:
    """The served model, alone and with each of its adapters."""
    tags = [
        Tag(
            name=name,
            model=name,
            modified_at=timestamp(context.engine.created),
            size=0,
            digest=_digest(name),
            details=_details(context, adapter),
        )
        for adapter, name in context.names.listed()
    ]
    return Tags(models=tags)


@ollama_router.get("/api/ps", responses=failures(shape=OllamaError))
async def ollama_ps(context: Context) -> LoadedTags:
    """The model in memory; sizes are those of the conversations' caches, as /v1/kv/stats has them."""
    stats = context.engine.stats()
    tags = [
        LoadedTag(
            name=name,
            model=name,
            size=stats.kv.total,
            digest=_digest(name),
            details=_details(context, adapter),
            expires_at=NEVER,
            size_vram=stats.kv.total,
            context_length=stats.max_context_tokens,
        )
        for adapter, name in context.names.listed()
    ]
    return LoadedTags(models=tags)


@ollama_router.post(
    "/api/show", responses=failures(*OF_A_QUESTION, shape=OllamaError), openapi_extra=json_body(ShowBody)
)
async def ollama_show(request: Request, context: Context) -> Shown:
    """The served model, by its name."""
    body = await read_as(request, context.max_body_bytes, partial(validated, ShowBody))
    adapter = context.names.adapter_of(plain_name(body.model or body.name or ""))
    stats, defaults = context.engine.stats(), context.engine.sampling_defaults
    return Shown(
        modelfile="",
        parameters=f"temperature {defaults.temperature:g}\ntop_p {defaults.top_p:g}\ntop_k {defaults.top_k}",
        template="",
        license="",
        details=_details(context, adapter),
        model_info={
            "general.architecture": "turboserve",
            "general.basename": context.names.name_of(adapter),
            "turboserve.context_length": stats.max_context_tokens,
            "turboserve.kv_format": stats.kv_format,
        },
        capabilities=["completion", "tools"],
        modified_at=timestamp(context.engine.created),
    )


@ollama_router.get("/api/version", responses=failures(shape=OllamaError))
async def ollama_version() -> OllamaVersion:
    """The version of Ollama whose API this is."""
    return OllamaVersion(version=OLLAMA_VERSION)


def _details(context: ApiContext, adapter: str) -> ModelDetails:
    parent = context.engine.model_id if adapter else ""
    return ModelDetails(parent_model=parent, quantization_level=context.engine.stats().model_dtype)


def _digest(name: str) -> str:
    """Clients want one; ours tells names apart."""
    return hashlib.sha256(name.encode()).hexdigest()
