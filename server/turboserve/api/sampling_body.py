"""What bodies of several routes say of how an answer is drawn, where it ends, how it is sent and which cache it has.

Parts that are the same whatever the prompt is; `chat_body.py` and `completion_body.py` have the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Annotated, Any

import orjson
from pydantic import Field

from turboserve.api.chat_body import (
    INT64_MAX,
    INT64_MIN,
    MAX_BIASES,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOP_K,
    NumTokens,
    OpenModel,
    Penalty,
    StopText,
    StreamOptions,
    TokenId,
)
from turboserve.api.session_request import chosen_session, normal_kv_format
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint, Request, SamplingParams

MAX_CHOICES = 128
MAX_STOP_IDS = 256
MAX_GRAMMAR_CHARS = 100_000
MAX_OPTIONS = 4096
INT32_MAX = (1 << 31) - 1

PromptTokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class SamplingBody(OpenModel):
    """`null` means "not given" everywhere, as clients in many languages send it."""

    model: Annotated[str, Field(max_length=1024)] | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K, description="0 and -1 are off.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    seed: Annotated[
        int | None, Field(ge=INT64_MIN, le=INT64_MAX, description="Further choices of `n` count on from it.")
    ] = None

    max_tokens: NumTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[PromptTokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    guided_json: dict[str, Any] | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Annotated[list[GrammarText], Field(min_length=1, max_length=MAX_OPTIONS)] | None = None
    guided_grammar: Annotated[GrammarText | None, Field(description="In Lark's form.")] = None

    # The conversation's cache. Their grammar is in `session_request.py`.
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    kv_format: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None

    # Accepted and ignored: they change nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None


# The body spells these as the engine does: a new one is added to both and is passed on.
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.name != "logit_bias")


def request_of(
    body: SamplingBody,
    *,
    request_id: str,
    tenant: str,
    defaults: SamplingParams,
    session_headers: Iterable[str] = (),
) -> Request:
    """All that the common part of a body says, without a prompt. Raises InvalidRequestError, naming the parameter."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
    if body.min_tokens and body.max_tokens is not None and body.min_tokens > body.max_tokens:
        raise InvalidRequestError("min_tokens is more than max_tokens.", param="min_tokens")
    return Request(
        request_id=request_id,
        sampling=_sampling(body, defaults),
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        constraint=_constraint(body),
        tenant=tenant,
        session_id=chosen_session(body.session_id, session_headers),
        kv_format=normal_kv_format(body.kv_format),
        cache_key=body.prompt_cache_key or None,
    )


def choices_of(request: Request, n: int, first: int = 0) -> list[Request]:
    """`n` requests for the same prompt, the answers from the `first` on: with ids and seeds of their own."""
    return [
        replace(request, request_id=_choice_id(request, first + i), sampling=_reseeded(request.sampling, i))
        for i in range(n)
    ]


def _choice_id(request: Request, choice: int) -> str:
    return f"{request.request_id}-{choice}" if choice else request.request_id


def _reseeded(sampling: SamplingParams, i: int) -> SamplingParams:
    if sampling.seed is None or not i:
        return sampling
    return replace(sampling, seed=(sampling.seed + i - INT64_MIN) % (1 << 64) + INT64_MIN)


def _sampling(body: SamplingBody, defaults: SamplingParams) -> SamplingParams:
    given = {name: getattr(body, name) for name in SAMPLING_FIELDS if getattr(body, name) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    logit_bias = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    return replace(defaults, **given, logit_bias=logit_bias)


def _constraint(body: SamplingBody) -> Constraint | None:
    given = []
    if body.guided_json is not None:
        schema = body.guided_json
        text = schema if isinstance(schema, str) else orjson.dumps(schema).decode()
        given.append(Constraint("json_schema", text, "guided_json"))
    if body.guided_regex is not None:
        given.append(Constraint("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice is not None:
        given.append(Constraint("choice", orjson.dumps(body.guided_choice).decode(), "guided_choice"))
    if body.guided_grammar is not None:
        given.append(Constraint("lark", body.guided_grammar, "guided_grammar"))
    if len(given) > 1:
        raise InvalidRequestError(f"{given[0].param} and {given[1].param} exclude each other.", param=given[1].param)
    return given[0] if given else None
