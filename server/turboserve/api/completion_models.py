"""The shapes of replies to `/v1/completions`, OpenAI's first design. Chunks are built as plain dicts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from turboserve.api.kv_reply_models import Reply, UnixSeconds
from turboserve.api.reply_models import CompletionUsage

TextFinishReason = Literal["stop", "length"]
StoppedBy = Annotated[str | int | None, Field(description="The stop string or stop token id that ended it.")]


class TextLogprobs(Reply):
    """Of each token: its text, log-probability, the likeliest ones' with its own, and where its text begins.

    A token that is a piece of a character is shown as `bytes:\\\\xe2\\\\x82`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: Annotated[list[int], Field(description="In characters of the answer.")]


class TextChoice(Reply):
    """One answer."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: TextFinishReason
    stop_reason: StoppedBy


class Completion(Reply):
    """Answers in one piece."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: UnixSeconds
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage


class TextChunkChoice(Reply):
    """The newest piece of one answer; `finish_reason` is null in all but its last."""

    model_config = ConfigDict(json_schema_extra={"required": ["index", "text", "logprobs", "finish_reason"]})

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: TextFinishReason | None
    stop_reason: StoppedBy = None


class CompletionChunk(Reply):
    """One event of a stream. `usage` is there once `stream_options.include_usage` is set, null in all but the last."""

    model_config = ConfigDict(json_schema_extra={"required": ["id", "object", "created", "model", "choices"]})

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: UnixSeconds
    model: str
    choices: list[TextChunkChoice]
    usage: CompletionUsage | None = None
