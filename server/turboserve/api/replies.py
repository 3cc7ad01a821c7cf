"""Completions, models and errors as they leave: JSON bodies, server-sent events, error responses.

Pure functions from the engine's messages; shapes are declared in `reply_models.py`, KV memory is in
`kv_replies.py`. Here alone status, envelope and headers of an error meet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import orjson
from starlette.responses import Response

from turboserve.api.answering import Answer
from turboserve.api.kv_replies import kv_figures
from turboserve.api.reply_models import (
    AnswerMessage,
    CachedTokens,
    ChatCompletion,
    Choice,
    CompletionUsage,
    ConversationMemory,
)
from turboserve.errors import TurboServeError
from turboserve.messages import Delta, Finished, FinishReason, TextDelta, Usage

DEFAULT_RETRY_AFTER_S = 5  # OpenAI's client waits what we say, up to two minutes; short enough to feel alive
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT = b": keep-alive\n\n"

Json = dict[str, object]


def dump(value: Mapping[str, object]) -> bytes:
    """JSON in UTF-8."""
    return orjson.dumps(value)


def error_response(error: TurboServeError, headers: Mapping[str, str] | None = None) -> Response:
    """The envelope OpenAI clients expect, with Retry-After on 429 and 503 and the challenge on 401."""
    extra = dict(headers or {})
    if error.status in (429, 503):
        extra["Retry-After"] = str(error.retry_after_s or DEFAULT_RETRY_AFTER_S)
    if error.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return Response(dump(error.envelope()), error.status, extra, JSON_TYPE)


def sse(value: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def sse_error(error: TurboServeError) -> bytes:
    """The last event of a stream that failed after its first byte."""
    return sse(error.envelope())


@dataclass(frozen=True, slots=True)
class ChatReplies:
    """Writes the reply to a chat completion; `created` is fixed so that all chunks agree."""

    request_id: str
    model_id: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    media_type: ClassVar[str] = SSE_TYPE
    keep_alive: ClassVar[bytes] = SSE_COMMENT

    def whole(self, answers: Sequence[Answer]) -> Response:
        """The answer in one piece."""
        (answer,) = answers
        choice = Choice(message=AnswerMessage(content=answer.text), finish_reason=answer.ending.reason)
        body = ChatCompletion(
            id=self.request_id,
            created=self.created,
            model=self.model_id,
            choices=[choice],
            usage=completion_usage(answer.ending.usage),
        )
        return Response(body.model_dump_json(), media_type=JSON_TYPE)

    def begin(self) -> bytes:
        """The first chunk has the role."""
        return sse(self.role_chunk())

    def delta(self, choice: int, delta: Delta) -> bytes:
        """Newly decoded text."""
        return sse(self.delta_chunk(delta.text)) if isinstance(delta, TextDelta) else b""

    def finish(self, choice: int, finished: Finished) -> bytes:
        """Finish reason, and usage if asked for."""
        usage = sse(self.usage_chunk(finished.usage)) if self.include_usage else b""
        return sse(self.final_chunk(finished.reason)) + usage

    def end(self) -> bytes:
        """The mark behind all chunks."""
        return SSE_DONE

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last event."""
        return sse_error(error)

    def role_chunk(self) -> Json:
        """The first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def delta_chunk(self, text: str) -> Json:
        """Newly decoded text."""
        return self._chunk({"content": text}, None)

    def final_chunk(self, reason: FinishReason) -> Json:
        """Says why the answer ends; only the usage may follow."""
        return self._chunk({}, reason)

    def usage_chunk(self, usage: Usage) -> Json:
        """OpenAI sends it without choices, after the final chunk."""
        return {**self._head(), "choices": [], "usage": completion_usage(usage).model_dump()}

    def _head(self) -> Json:
        return {
            "id": self.request_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model_id,
        }

    def _chunk(self, delta: Json, reason: FinishReason | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        # OpenAI sends a null usage on every chunk once the caller has asked for it.
        extra: Json = {"usage": None} if self.include_usage else {}
        return {**self._head(), "choices": [choice], **extra}


def completion_usage(usage: Usage) -> CompletionUsage:
    """OpenAI's usage, with the conversation, its KV format and memory under the extension key `turboserve`."""
    memory = ConversationMemory(session_id=usage.session_id or None, kv_format=usage.kv_format, **kv_figures(usage.kv))
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=usage.cached_tokens),
        turboserve=memory,
    )
