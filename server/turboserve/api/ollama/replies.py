"""Answers as Ollama writes them: JSON lines, the last of which says how it ended and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar

import orjson
from starlette.responses import Response

from turboserve.api.answering import Answer, ToolCall
from turboserve.api.replies import JSON_TYPE
from turboserve.errors import TurboServeError
from turboserve.messages import Delta, Finished, ReasoningDelta, TextDelta, ToolCallDelta

NDJSON_TYPE = "application/x-ndjson"

Json = dict[str, object]


def timestamp(unix_s: float | None = None) -> str:
    """RFC 3339, now or at that time."""
    moment = datetime.now(UTC) if unix_s is None else datetime.fromtimestamp(unix_s, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class OllamaReplies:
    """Writes one answer; `is_chat` as a message, else as a response. `began_s` is `time.perf_counter`'s."""

    model_id: str
    is_chat: bool
    began_s: float = field(default_factory=time.perf_counter)
    _first_s: float | None = None
    _calls: list[ToolCall] = field(default_factory=list)  # a line holds whole calls, so pieces are kept until the next

    media_type: ClassVar[str] = NDJSON_TYPE
    # Clients parse every line, empty ones too, but JSON may have space before it.
    keep_alive: ClassVar[bytes] = b" "

    def whole(self, answers: Sequence[Answer]) -> Response:
        """The answer as one line."""
        (answer,) = answers
        self._first_s = answer.first_s
        calls = [call_object(index, call) for index, call in enumerate(answer.calls)]
        line = self._line(answer.text, answer.reasoning, calls) | self._ending(answer.ending)
        return Response(orjson.dumps(line), media_type=JSON_TYPE)

    def begin(self) -> bytes:
        """Nothing: lines begin with the answer."""
        return b""

    def delta(self, choice: int, delta: Delta) -> bytes:
        """A piece of the answer, or the call that is complete now that another one begins."""
        if self._first_s is None:
            self._first_s = time.perf_counter()
        if isinstance(delta, TextDelta):
            return self._written(self._line(delta.text)) if delta.text else b""
        if isinstance(delta, ReasoningDelta):
            return self._written(self._line("", delta.text))
        return self._add_call(delta)

    def _add_call(self, delta: ToolCallDelta) -> bytes:
        if delta.index < len(self._calls):
            self._calls[delta.index].arguments += delta.arguments
            return b""
        complete = self._last_call()
        self._calls.append(ToolCall(delta.call_id, delta.name, delta.arguments))
        return complete

    def _last_call(self) -> bytes:
        if not self._calls:
            return b""
        return self._written(self._line("", "", [call_object(len(self._calls) - 1, self._calls[-1])]))

    def finish(self, choice: int, finished: Finished) -> bytes:
        """The last call, and the last line."""
        return self._last_call() + self._written(self._line("") | self._ending(finished))

    def end(self) -> bytes:
        """Nothing: the last line says that it is."""
        return b""

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last line."""
        return self._written({"error": error.told})

    def loaded(self) -> Response:
        """The reply to a request without a prompt."""
        return Response(orjson.dumps(self._line("") | {"done": True, "done_reason": "load"}), media_type=JSON_TYPE)

    @staticmethod
    def _written(line: Json) -> bytes:
        return orjson.dumps(line) + b"\n"

    def _line(self, text: str, thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        head: Json = {"model": self.model_id, "created_at": timestamp()}
        thought: Json = {"thinking": thinking} if thinking else {}
        if not self.is_chat:
            return {**head, "response": text, **thought, "done": False}
        called: Json = {"tool_calls": list(calls)} if calls else {}
        return {**head, "message": {"role": "assistant", "content": text, **thought, **called}, "done": False}

    def _ending(self, finished: Finished) -> Json:
        now_s = time.perf_counter()
        first_s = now_s if self._first_s is None else self._first_s
        return {
            "done": True,
            "done_reason": "length" if finished.reason == "length" else "stop",
            "total_duration": _nanoseconds(now_s - self.began_s),
            "load_duration": 0,
            "prompt_eval_count": finished.usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first_s - self.began_s),
            "eval_count": finished.usage.completion_tokens,
            "eval_duration": _nanoseconds(now_s - first_s),
        }


def call_object(index: int, call: ToolCall) -> Json:
    """A call with its arguments as an object; what the model wrote that is none comes out empty."""
    try:
        arguments = orjson.loads(call.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = {}
    function = {"index": index, "name": call.name, "arguments": arguments if isinstance(arguments, dict) else {}}
    return {"id": call.call_id, "function": function}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
