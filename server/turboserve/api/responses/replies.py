"""Responses as OpenAI's clients expect them: items in their order, whole or as numbered server-sent events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.responses import Response

from turboserve.api.answering import Answer
from turboserve.api.replies import JSON_TYPE, SSE_COMMENT, SSE_TYPE, completion_usage, dump
from turboserve.api.responses.reply_models import (
    FunctionTool,
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    ReasoningSettings,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
    Status,
    TextSettings,
)
from turboserve.errors import InvalidRequestError, QuotaExceededError, TurboServeError
from turboserve.messages import (
    Delta,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What a response says of its request, from the first event to the last."""

    response_id: str
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: Mapping[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningSettings
    is_background: bool
    is_stored: bool
    temperature: float
    text: TextSettings
    tool_choice: str | dict[str, Any]
    tools: Sequence[FunctionTool]
    top_logprobs: int
    top_p: float
    created_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class _OpenItem:
    """The item that deltas are added to; its text is joined when it is complete."""

    key: object  # a type of delta, or the index of a tool call
    item_id: str
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    call: ToolCallDelta | None = None


class ResponseWriter:
    """Puts one response together from its deltas, each of which it answers with its events."""

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self.output: list[Json] = []  # items that are complete
        self._status: Status = "queued" if head.is_background else "in_progress"
        self._open: _OpenItem | None = None
        self._num_events = 0
        self._usage: Usage | None = None
        self._error: TurboServeError | None = None
        self._completed_at: int | None = None

    @property
    def response_id(self) -> str:
        return self._head.response_id

    @property
    def status(self) -> Status:
        return self._status

    @property
    def has_ended(self) -> bool:
        """Nothing more will come."""
        return self._status not in ("queued", "in_progress")

    def reply(self) -> ResponseObject:
        """The response as it is now; items that are not complete are left out."""
        head = self._head
        return ResponseObject(
            id=head.response_id,
            created_at=head.created_at,
            completed_at=self._completed_at,
            status=self._status,
            background=head.is_background,
            error=_failure(self._error) if self._error else None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if self._status == "incomplete" else None,
            instructions=head.instructions,
            max_output_tokens=head.max_output_tokens,
            metadata=dict(head.metadata),
            model=head.model,
            output=list(self.output),  # type: ignore[arg-type]  # validated from the dicts
            parallel_tool_calls=head.parallel_tool_calls,
            previous_response_id=head.previous_response_id,
            prompt_cache_key=head.prompt_cache_key,
            reasoning=head.reasoning,
            store=head.is_stored,
            temperature=head.temperature,
            text=head.text,
            tool_choice=head.tool_choice,
            tools=list(head.tools),
            top_logprobs=head.top_logprobs,
            top_p=head.top_p,
            usage=response_usage(self._usage) if self._usage else None,
        )

    def begin(self) -> bytes:
        """The first two events."""
        self._status = "in_progress"
        return self._response_event("response.created") + self._response_event("response.in_progress")

    def delta(self, delta: Delta) -> bytes:
        """A piece of the open item, before which another may end and this one begin."""
        self._status = "in_progress"
        if isinstance(delta, TextDelta):
            return self._text(delta)
        if isinstance(delta, ReasoningDelta):
            return self._thoughts(delta.text)
        return self._call(delta)

    def finish(self, finished: Finished) -> bytes:
        """All items are complete, and so is the response unless the token limit ended it."""
        is_cut = finished.reason == "length"
        events = self._closed("incomplete" if is_cut else "completed")
        self._status, self._usage = ("incomplete" if is_cut else "completed"), finished.usage
        self._completed_at = None if is_cut else int(time.time())
        return events + self._response_event(f"response.{self._status}")

    def fail(self, error: TurboServeError) -> bytes:
        """The response ends with an error; what it had said of an item is lost."""
        self._open, self._status, self._error = None, "failed", error
        return self._response_event("response.failed")

    def cancel(self) -> None:
        """Its caller does not want it any more."""
        self._open, self._status = None, "cancelled"

    # Items.

    def _text(self, delta: TextDelta) -> bytes:
        events = b""
        if self._open is None or self._open.key is not TextDelta:
            if not delta.text:  # logprobs of what is no text
                return b""
            events = self._opened(TextDelta, "msg", lambda one: _message(one, "", (), "in_progress") | {"content": []})
            events += self._part("response.content_part.added", _output_text("", ()))
        one = self._current()
        logprobs = [logprob_object(token) for token in delta.logprobs]
        one.pieces.append(delta.text)
        one.logprobs += logprobs
        if not delta.text and not logprobs:
            return events
        return events + self._of_item(
            "response.output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs
        )

    def _thoughts(self, text: str) -> bytes:
        events = b""
        if self._open is None or self._open.key is not ReasoningDelta:
            events = self._opened(ReasoningDelta, "rs", lambda one: self._reasoning(one, None, "in_progress"))
            if self._is_summary:
                part = {"type": "summary_text", "text": ""}
                events += self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
            else:
                events += self._part("response.content_part.added", {"type": "reasoning_text", "text": ""})
        self._current().pieces.append(text)
        if self._is_summary:
            return events + self._of_item("response.reasoning_summary_text.delta", summary_index=0, delta=text)
        return events + self._of_item("response.reasoning_text.delta", content_index=0, delta=text)

    def _call(self, delta: ToolCallDelta) -> bytes:
        events = b""
        if self._open is None or self._open.key != delta.index:
            events = self._opened(delta.index, "fc", lambda one: _function_call(one, delta, "", "in_progress"))
            self._current().call = delta
        self._current().pieces.append(delta.arguments)
        if not delta.arguments:
            return events
        return events + self._of_item("response.function_call_arguments.delta", delta=delta.arguments)

    @property
    def _is_summary(self) -> bool:
        return self._head.reasoning.summary is not None

    def _current(self) -> _OpenItem:
        assert self._open is not None, "no item is open"
        return self._open

    def _opened(self, key: object, prefix: str, empty: Callable[[str], Json]) -> bytes:
        events = self._closed("completed")
        number = len(self.output)
        self._open = _OpenItem(key, f"{prefix}_{self.response_id.partition('_')[2]}_{number}")
        return events + self._event("response.output_item.added", output_index=number, item=empty(self._open.item_id))

    def _closed(self, status: str) -> bytes:
        one = self._open
        if one is None:
            return b""
        text = "".join(one.pieces)
        if one.key is TextDelta:
            events = self._of_item("response.output_text.done", content_index=0, text=text, logprobs=one.logprobs)
            events += self._part("response.content_part.done", _output_text(text, one.logprobs))
            item = _message(one.item_id, text, one.logprobs, status)
        elif one.key is ReasoningDelta:
            item = self._reasoning(one.item_id, text, status)
            if self._is_summary:
                part = {"type": "summary_text", "text": text}
                events = self._of_item("response.reasoning_summary_text.done", summary_index=0, text=text)
                events += self._of_item("response.reasoning_summary_part.done", summary_index=0, part=part)
            else:
                events = self._of_item("response.reasoning_text.done", content_index=0, text=text)
                events += self._part("response.content_part.done", {"type": "reasoning_text", "text": text})
        else:
            assert one.call is not None
            events = self._of_item("response.function_call_arguments.done", name=one.call.name, arguments=text)
            item = _function_call(one.item_id, one.call, text, status)
        events += self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._open = None
        return events

    def _reasoning(self, item_id: str, text: str | None, status: str) -> Json:
        said = [] if text is None else [text]
        return {
            "type": "reasoning",
            "id": item_id,
            "summary": [{"type": "summary_text", "text": one} for one in said if self._is_summary],
            "content": None if self._is_summary else [{"type": "reasoning_text", "text": one} for one in said],
            "encrypted_content": None,
            "status": status,
        }

    # Events.

    def _response_event(self, kind: str) -> bytes:
        return self._event(kind, response=self.reply().model_dump())

    def _part(self, kind: str, part: Json) -> bytes:
        return self._of_item(kind, content_index=0, part=part)

    def _of_item(self, kind: str, **fields: object) -> bytes:
        return self._event(kind, item_id=self._current().item_id, output_index=len(self.output), **fields)

    def _event(self, kind: str, **fields: object) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + dump(event) + b"\n\n"


class ResponseReplies:
    """Writes the reply to a request that is answered at once. `keep` is called once it has ended."""

    media_type: ClassVar[str] = SSE_TYPE
    keep_alive: ClassVar[bytes] = SSE_COMMENT

    def __init__(self, writer: ResponseWriter, keep: Callable[[], None]) -> None:
        self._writer, self._keep = writer, keep

    def whole(self, answers: Sequence[Answer]) -> Response:
        """The response in one piece."""
        (answer,) = answers
        if answer.reasoning:
            self._writer.delta(ReasoningDelta(answer.reasoning))
        if answer.text:
            self._writer.delta(TextDelta(answer.text, tuple(answer.logprobs)))
        for index, call in enumerate(answer.calls):
            self._writer.delta(ToolCallDelta(index, call.call_id, call.name, call.arguments))
        self._writer.finish(answer.ending)
        self._keep()
        return Response(self._writer.reply().model_dump_json(), media_type=JSON_TYPE)

    def begin(self) -> bytes:
        """The response without output."""
        return self._writer.begin()

    def delta(self, choice: int, delta: Delta) -> bytes:
        """Events of newly decoded text, thoughts or calls."""
        return self._writer.delta(delta)

    def finish(self, choice: int, finished: Finished) -> bytes:
        """The open item's last events, and the response."""
        events = self._writer.finish(finished)
        self._keep()
        return events

    def end(self) -> bytes:
        """The response's own event was the last."""
        return b""

    def failure(self, error: TurboServeError) -> bytes:
        """The failed response as the last event."""
        events = self._writer.fail(error)
        self._keep()
        return events


def response_usage(usage: Usage) -> ResponseUsage:
    """OpenAI's usage, with the conversation's memory under the extension key `turboserve`."""
    num_computed = usage.prompt_tokens - usage.cached_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(
            cached_tokens=usage.cached_tokens, cache_write_tokens=num_computed if usage.session_id else 0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        turboserve=completion_usage(usage).turboserve,
    )


def logprob_object(token: TokenLogprob) -> Json:
    """A token with its likeliest others."""
    top = [{"token": one.text, "bytes": list(one.raw), "logprob": one.logprob} for one in token.top]
    return {"token": token.text, "bytes": list(token.raw), "logprob": token.logprob, "top_logprobs": top}


def _output_text(text: str, logprobs: Sequence[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _message(item_id: str, text: str, logprobs: Sequence[Json], status: str) -> Json:
    content = [_output_text(text, logprobs)]
    return {"type": "message", "id": item_id, "role": "assistant", "status": status, "content": content}


def _function_call(item_id: str, call: ToolCallDelta, arguments: str, status: str) -> Json:
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": arguments,
        "status": status,
    }


def _failure(error: TurboServeError) -> ResponseFailure:
    if isinstance(error, QuotaExceededError):
        return ResponseFailure(code="rate_limit_exceeded", message=error.told)
    is_ours = not isinstance(error, InvalidRequestError)
    return ResponseFailure(code="server_error" if is_ours else "invalid_prompt", message=error.told)
