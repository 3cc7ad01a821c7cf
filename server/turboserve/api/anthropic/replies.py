"""Answers as Anthropic's clients expect them: a message of blocks, whole or as named server-sent events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import ClassVar

from pydantic_core import from_json
from starlette.responses import Response

from turboserve.api.answering import Answer
from turboserve.api.anthropic.reply_models import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    MessageReply,
    MessageUsage,
    StopReason,
    ThinkingTokens,
)
from turboserve.api.anthropic_errors import anthropic_envelope
from turboserve.api.replies import JSON_TYPE, SSE_TYPE, completion_usage, dump
from turboserve.errors import TurboServeError
from turboserve.messages import Delta, Finished, FinishReason, ReasoningDelta, TextDelta, Usage

STOP_REASONS: dict[FinishReason, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def event(name: str, **fields: object) -> bytes:
    """One server-sent event, whose name is also its `type`."""
    return b"event: " + name.encode() + b"\ndata: " + dump({"type": name, **fields}) + b"\n\n"


class MessageReplies:
    """Writes one answer. Owns which block of the stream is open."""

    media_type: ClassVar[str] = SSE_TYPE
    keep_alive: ClassVar[bytes] = event("ping")

    def __init__(
        self,
        request_id: str,
        model_id: str,
        *,
        hides_thinking: bool = False,
        num_prompt_tokens: Future[tuple[int, ...]] | None = None,
    ) -> None:
        """`num_prompt_tokens`: the prompt's tokens, whose number the first event has where it is known by then."""
        self._request_id, self._model_id, self._hides_thinking = request_id, model_id, hides_thinking
        self._prompt = num_prompt_tokens
        self._num_blocks = 0
        self._open: object = None  # what the open block is: a type of delta, or the index of a tool call

    def whole(self, answers: Sequence[Answer]) -> Response:
        """The message in one piece."""
        (answer,) = answers
        blocks: list[AnswerBlock] = []
        if answer.reasoning:
            shown = "" if self._hides_thinking else answer.reasoning
            blocks.append(AnswerThinking(thinking=shown, signature=self._request_id))
        if answer.text:
            blocks.append(AnswerText(text=answer.text))
        for call in answer.calls:
            blocks.append(AnswerToolUse(id=call.call_id, name=call.name, input=call_input(call.arguments)))
        message = self._message(blocks, message_usage(answer.ending.usage), answer.ending)
        return Response(message.model_dump_json(), media_type=JSON_TYPE)

    def begin(self) -> bytes:
        """The message without its content."""
        usage = MessageUsage(
            input_tokens=self._num_prompt_tokens(),
            cache_read_input_tokens=0,
            output_tokens=0,
            output_tokens_details=ThinkingTokens(thinking_tokens=0),
        )
        return event("message_start", message=self._message([], usage, None).model_dump())

    def delta(self, choice: int, delta: Delta) -> bytes:
        """A piece of the open block, before which another may end and this one begin."""
        if isinstance(delta, TextDelta):
            if not delta.text:  # logprobs alone
                return b""
            head = self._opened(TextDelta, {"type": "text", "text": "", "citations": None})
            return head + self._piece("text_delta", text=delta.text)
        if isinstance(delta, ReasoningDelta):
            head = self._opened(ReasoningDelta, {"type": "thinking", "thinking": "", "signature": ""})
            return head if self._hides_thinking else head + self._piece("thinking_delta", thinking=delta.text)
        block = {"type": "tool_use", "id": delta.call_id, "name": delta.name, "input": {}}
        head = self._opened(delta.index, block)
        return head + (self._piece("input_json_delta", partial_json=delta.arguments) if delta.arguments else b"")

    def finish(self, choice: int, finished: Finished) -> bytes:
        """Why it ended, and the usage."""
        reason, sequence = ending(finished)
        usage = message_usage(finished.usage).model_dump()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return self._closed() + event("message_delta", delta=delta, usage=usage)

    def end(self) -> bytes:
        """The last event."""
        return event("message_stop")

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last event."""
        return b"event: error\ndata: " + dump(anthropic_envelope(error, self._request_id)) + b"\n\n"

    def _message(self, blocks: list[AnswerBlock], usage: MessageUsage, finished: Finished | None) -> MessageReply:
        reason, sequence = ending(finished) if finished else (None, None)
        return MessageReply(
            id=self._request_id,
            model=self._model_id,
            content=blocks,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=usage,
        )

    def _num_prompt_tokens(self) -> int:
        is_known = self._prompt is not None and self._prompt.done() and self._prompt.exception() is None
        return len(self._prompt.result()) if self._prompt is not None and is_known else 0

    def _opened(self, what: object, block: Mapping[str, object]) -> bytes:
        """The events that make a block of this kind the open one; none if it is."""
        if self._open == what:
            return b""
        events = self._closed() + event("content_block_start", index=self._num_blocks, content_block=block)
        is_first = self._num_blocks == 0
        self._open, self._num_blocks = what, self._num_blocks + 1
        return events + (self.keep_alive if is_first else b"")

    def _closed(self) -> bytes:
        if self._open is None:
            return b""
        # Without a signature some clients throw thoughts away and cannot send them back.
        is_thinking = self._open is ReasoningDelta
        signature = self._piece("signature_delta", signature=self._request_id) if is_thinking else b""
        self._open = None
        return signature + event("content_block_stop", index=self._num_blocks - 1)

    def _piece(self, kind: str, **fields: str) -> bytes:
        return event("content_block_delta", index=self._num_blocks - 1, delta={"type": kind, **fields})


def ending(finished: Finished) -> tuple[StopReason, str | None]:
    """Stop reason and stop sequence."""
    if finished.reason == "stop" and isinstance(finished.stopped_by, str):
        return "stop_sequence", finished.stopped_by
    return STOP_REASONS[finished.reason], None


def call_input(arguments: str) -> dict[str, object]:
    """A call's arguments as an object; of arguments that the token limit cut off, what is complete of them."""
    try:
        value = from_json(arguments, allow_partial=True) if arguments else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def message_usage(usage: Usage) -> MessageUsage:
    """Anthropic counts what was found in the cache apart from the rest of the prompt."""
    return MessageUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=ThinkingTokens(thinking_tokens=usage.reasoning_tokens),
        turboserve=completion_usage(usage).turboserve,
    )
