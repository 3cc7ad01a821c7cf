"""The JSON that leaves: completions, chunks, usage, models, KV statistics, errors.

Pure functions from engine messages to plain dicts; `dump` makes bytes of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import orjson

from turboserve.engine.protocol import ConversationStats, EngineStats, KVBytes, Usage
from turboserve.errors import TurboServeError

Json = dict[str, object]


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
    """OpenAI's usage, with the conversation's KV memory under the extension key `turboserve`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "turboserve": {"kv_format": usage.kv_format, **kv_json(usage.kv)},
    }


def kv_json(kv: KVBytes) -> Json:
    """Where one cache's bytes are, what they would be uncompressed, and the true ratio."""
    return {
        "tokens": kv.tokens,
        "kv_bytes": {
            "compressed": kv.compressed,
            "exact": kv.exact,
            "slack": kv.slack,
            "uncompressed": kv.uncompressed,
            "total": kv.total,
        },
        "raw_equivalent_bytes": kv.raw_equivalent,
        "ratio": round(kv.ratio, 4),
    }


def model_json(model_id: str, created: int) -> Json:
    return {"id": model_id, "object": "model", "created": created, "owned_by": "turboserve"}


def kv_stats_json(stats: EngineStats) -> Json:
    """`GET /v1/kv/stats`."""
    return {
        "object": "kv.stats",
        "model": stats.model_id,
        "kv_format": stats.kv_format,
        "kv_backend": stats.kv_backend,
        "model_dtype": stats.model_dtype,
        "kv_budget_bytes": stats.kv_budget_bytes,
        "max_context_tokens": stats.max_context_tokens,
        "bytes_per_token": {"compressed": stats.kv_token_bytes, "raw": stats.kv_token_raw_bytes},
        "layers": {"compressed": stats.layers_compressed, "uncompressed": stats.layers_uncompressed},
        "requests": {"running": stats.num_running, "waiting": stats.num_waiting},
        **kv_json(stats.kv),
        "conversations": [conversation_json(conversation) for conversation in stats.conversations],
        "details": dict(stats.details),
    }


def conversation_json(conversation: ConversationStats) -> Json:
    return {
        "id": conversation.conversation_id,
        "tier": conversation.tier,
        "hits": conversation.hits,
        "idle_s": round(conversation.idle_s, 3),
        **kv_json(conversation.kv),
    }
