"""The JSON that leaves: completions, chunks, usage, models, errors.

Pure functions from engine messages to plain dicts; `dump` makes bytes of them. KV memory: `kv_replies.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import orjson

from turboserve.api.kv_replies import Json, kv_json
from turboserve.errors import TurboServeError
from turboserve.messages import Usage


def dump(value: Json) -> bytes:
    return orjson.dumps(value)


def sse(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT = b": keep-alive\n\n"


def sse_error(error: TurboServeError) -> bytes:
    return sse(error.envelope())


@dataclass(frozen=True, slots=True)
class Replies:
    """Builds the replies of one chat completion; `created` is fixed so that all chunks agree."""

    request_id: str
    model_id: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: Usage) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage_json(usage)}

    def role_chunk(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def delta_chunk(self, text: str) -> Json:
        return self._chunk({"content": text}, None)

    def final_chunk(self, reason: str) -> Json:
        return self._chunk({}, reason)

    def usage_chunk(self, usage: Usage) -> Json:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_json(usage)}

    def _head(self, kind: str) -> Json:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model_id}

    def _chunk(self, delta: Json, reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        # OpenAI sends a null usage on every chunk once the caller has asked for it.
        extra: Json = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **extra}


def usage_json(usage: Usage) -> Json:
    """OpenAI's usage, with the conversation, its KV format and memory under the extension key `turboserve`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "turboserve": {"session_id": usage.session_id or None, "kv_format": usage.kv_format, **kv_json(usage.kv)},
    }


def model_json(model_id: str, created: int) -> Json:
    return {"id": model_id, "object": "model", "created": created, "owned_by": "turboserve"}
