"""Completions, models and errors as they leave: JSON bodies, server-sent events, error responses.

Pure functions from the engine's messages; shapes are declared in `reply_models.py`, KV memory is in
`kv_replies.py`. Here alone status, envelope and headers of an error meet.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import orjson
from starlette.responses import Response

from turboserve import __version__
from turboserve.api.answering import Answer
from turboserve.api.chat_request import Delivery
from turboserve.api.kv_replies import kv_figures
from turboserve.api.model_names import adapted
from turboserve.api.reply_models import (
    AnswerTokens,
    CompletionUsage,
    ConversationMemory,
    PromptTokens,
)
from turboserve.errors import TurboServeError
from turboserve.messages import (
    Delta,
    EngineStats,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

MIN_LOGPROB = -9999.0  # what OpenAI says for a token out of reach; JSON has no infinity
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT = b": keep-alive\n\n"

Json = dict[str, object]


def dump(value: Mapping[str, object]) -> bytes:
    """JSON in UTF-8."""
    return orjson.dumps(value)


def error_response(error: TurboServeError, headers: Mapping[str, str] | None = None) -> Response:
    """The envelope OpenAI clients expect, with `error_headers`."""
    return Response(dump(error.envelope()), error.status, {**(headers or {}), **error_headers(error)}, JSON_TYPE)


def error_headers(error: TurboServeError) -> dict[str, str]:
    """Retry-After on 429 and 503, and the challenge on 401."""
    if error.wait_s is not None:
        return {"Retry-After": str(error.wait_s)}
    return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}


def sse(value: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


class TextEvents:
    """Server-sent events that differ by one text alone, of which there is one per token: the rest is written once."""

    __slots__ = ("_after", "_before")

    def __init__(self, like: Callable[[str], Mapping[str, object]]) -> None:
        """like: the event's value for a text, which stands in it once and as it is."""
        mark = secrets.token_hex(16)  # no name of a model or an id can be it
        self._before, self._after = sse(like(mark)).split(orjson.dumps(mark))

    def of(self, text: str) -> bytes:
        """The same as `sse(like(text))`."""
        return b"".join((self._before, orjson.dumps(text), self._after))


def sse_error(error: TurboServeError) -> bytes:
    """The last event of a stream that failed after its first byte."""
    return sse(error.envelope())


@dataclass(slots=True)
class ChatReplies:
    """Writes the reply to a chat completion; `created` is fixed so that all chunks agree.

    A chunk is a plain dict, and one of text alone a text between bytes, because there is one per token.
    """

    request_id: str
    model_id: str
    delivery: Delivery
    fingerprint: str | None = None
    num_choices: int = 1
    created: int = field(default_factory=lambda: int(time.time()))
    _head: Json = field(init=False)
    _tail: Json = field(init=False)
    _usages: dict[int, Usage] = field(init=False, default_factory=dict)
    _texts: dict[int, TextEvents] = field(init=False, default_factory=dict)

    media_type: ClassVar[str] = SSE_TYPE
    keep_alive: ClassVar[bytes] = SSE_COMMENT

    def __post_init__(self) -> None:
        self._head = {
            "id": self.request_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model_id,
            "system_fingerprint": self.fingerprint,
        }
        # OpenAI sends a null usage on every chunk once the caller has asked for it.
        self._tail = {"usage": None} if self.delivery.include_usage else {}

    def whole(self, answers: Sequence[Answer]) -> Response:
        """All answers in one piece."""
        usage = summed_usage([answer.ending.usage for answer in answers])
        body: Json = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": completion_usage(usage).model_dump(),
        }
        return Response(dump(body), media_type=JSON_TYPE)

    def _choice(self, index: int, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning and self.delivery.shows_reasoning:
            message |= reasoning_fields(answer.reasoning)
        if answer.calls:
            message["content"] = answer.text or None
            if self.delivery.is_legacy:
                call = answer.calls[0]
                message["function_call"] = {"name": call.name, "arguments": call.arguments}
            else:
                message["tool_calls"] = [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in answer.calls
                ]
        logprobs = logprobs_object(answer.logprobs) if self.delivery.shows_logprobs else None
        reason = self._reason(answer.ending.reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def begin(self) -> bytes:
        """The first chunk of each answer has the role."""
        return b"".join(
            sse(self._chunk(index, {"role": "assistant", "content": ""})) for index in range(self.num_choices)
        )

    def delta(self, choice: int, delta: Delta) -> bytes:
        """Newly decoded text, reasoning, or a piece of a call."""
        if isinstance(delta, TextDelta):
            if delta.logprobs:
                return sse(self._chunk(choice, {"content": delta.text}, logprobs_object(delta.logprobs)))
            if (texts := self._texts.get(choice)) is None:
                texts = self._texts[choice] = TextEvents(lambda text: self._chunk(choice, {"content": text}))
            return texts.of(delta.text)
        if isinstance(delta, ReasoningDelta):
            return sse(self._chunk(choice, reasoning_fields(delta.text))) if self.delivery.shows_reasoning else b""
        return self._call_chunks(choice, delta)

    def _call_chunks(self, choice: int, delta: ToolCallDelta) -> bytes:
        """A call begins with its name and no arguments, as OpenAI's streams do; these follow in chunks of their own."""
        if self.delivery.is_legacy:
            if delta.index > 0:
                return b""  # the caller can take one call only, and has asked for no more
            pieces = [{"name": delta.name, "arguments": ""}] if delta.call_id else []
            pieces += [{"arguments": delta.arguments}] if delta.arguments else []
            return b"".join(sse(self._chunk(choice, {"function_call": piece})) for piece in pieces)
        calls: list[Json] = []
        if delta.call_id:
            function = {"name": delta.name, "arguments": ""}
            calls.append({"index": delta.index, "id": delta.call_id, "type": "function", "function": function})
        if delta.arguments:
            calls.append({"index": delta.index, "function": {"arguments": delta.arguments}})
        return b"".join(sse(self._chunk(choice, {"tool_calls": [call]})) for call in calls)

    def finish(self, choice: int, finished: Finished) -> bytes:
        """The finish reason; the token counts wait for those of all answers."""
        self._usages[choice] = finished.usage
        return sse(self._chunk(choice, {}, reason=self._reason(finished.reason)))

    def end(self) -> bytes:
        """The usage if asked for, without choices as OpenAI sends it, and the mark behind all chunks."""
        if not self.delivery.include_usage:
            return SSE_DONE
        usage = summed_usage([self._usages[index] for index in sorted(self._usages)])
        return sse({**self._head, "choices": [], "usage": completion_usage(usage).model_dump()}) + SSE_DONE

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last event."""
        return sse_error(error)

    def _reason(self, reason: FinishReason) -> str:
        return "function_call" if reason == "tool_calls" and self.delivery.is_legacy else reason

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice], **self._tail}


def reasoning_fields(text: str) -> Json:
    """Both names that clients look for: DeepSeek's and OpenRouter's."""
    return {"reasoning_content": text, "reasoning": text}


def logprobs_object(tokens: Sequence[TokenLogprob]) -> Json:
    """OpenAI's logprobs of these tokens, each with its likeliest others."""
    return {
        "content": [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> Json:
    return {"token": token.text, "logprob": max(token.logprob, MIN_LOGPROB), "bytes": list(token.raw)}


def system_fingerprint(stats: EngineStats, kv_format: str | None, adapter: str = "") -> str:
    """Changes with what would change the answers to one seed.

    Model, adapter, KV format, kernels, dtype, what trials of these chose when the model was loaded, and version.
    """
    name = adapted(stats.model_id, adapter)
    parts = (name, kv_format or stats.kv_format, stats.kv_backend, stats.model_dtype, *stats.choices, __version__)
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def summed_usage(usages: Sequence[Usage]) -> Usage:
    """The usage of a reply with these answers to one prompt, which is counted once; memory is the first one's."""
    return replace(
        usages[0],
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        draft_tokens=sum(usage.draft_tokens for usage in usages),
        accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
    )


def completion_usage(usage: Usage) -> CompletionUsage:
    """OpenAI's usage, with the conversation, its KV format and memory under the extension key `turboserve`."""
    memory = ConversationMemory(session_id=usage.session_id or None, kv_format=usage.kv_format, **kv_figures(usage.kv))
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokens(cached_tokens=usage.cached_tokens),
        completion_tokens_details=AnswerTokens(
            reasoning_tokens=usage.reasoning_tokens,
            accepted_prediction_tokens=usage.accepted_draft_tokens,
            rejected_prediction_tokens=usage.draft_tokens - usage.accepted_draft_tokens,
        ),
        turboserve=memory,
    )
