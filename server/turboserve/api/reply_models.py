"""The shapes of what leaves the server as JSON, as pydantic models; `/openapi.json` declares them.

Built in `replies.py`; those about KV memory are in `kv_reply_models.py`. Chunks of a stream are built as plain
dicts, because there is one per token; a test holds them to `ChatCompletionChunk`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from turboserve.api.kv_reply_models import KVFormatName, KVKinds, NumTokens, Ratio, RawBytes, Reply, UnixSeconds
from turboserve.messages import FinishReason

# --- errors


class ErrorDetail(Reply):
    """What went wrong: `code` is for programs, `message` for people."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="A path such as messages[2].content.")]
    code: str | None


class ErrorEnvelope(Reply):
    """Every error, whatever its status."""

    error: ErrorDetail


# --- status


class ServerInfo(Reply):
    """Who answers here, and on which routes."""

    name: Literal["turboserve"] = "turboserve"
    version: str
    routes: list[str]


class Health(Reply):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Reply):
    """A request sent now would be worked on."""

    status: Literal["ready"] = "ready"
    model: str


# --- completions


class CachedTokens(Reply):
    """What of the prompt was not computed again."""

    cached_tokens: Annotated[int, Field(description="Prompt tokens found in a kept cache.")]


class ConversationMemory(Reply):
    """The conversation's KV memory at the end of a request."""

    session_id: Annotated[str | None, Field(description="Under which it can be looked up; null: it was not kept.")]
    kv_format: KVFormatName
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio


class CompletionUsage(Reply):
    """OpenAI's usage, with the conversation's memory under the extension key `turboserve`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    turboserve: ConversationMemory


class AnswerMessage(Reply):
    """The assistant's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Reply):
    """The one answer; `finish_reason` is `length` where max_tokens or the context ended it."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(Reply):
    """An answer in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: UnixSeconds
    model: str
    choices: list[Choice]
    usage: CompletionUsage


class Delta(Reply):
    """The first chunk has the role, the last one nothing."""

    model_config = ConfigDict(json_schema_extra={"required": []})

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(Reply):
    """The newest piece of the one answer; `finish_reason` is null in all but the last."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream. `usage` is there once `stream_options.include_usage` is set, null in all but the last."""

    model_config = ConfigDict(json_schema_extra={"required": ["id", "object", "created", "model", "choices"]})

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: UnixSeconds
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
