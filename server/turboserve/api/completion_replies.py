"""Completions of bare prompts as they leave, whole or as a stream. Pure functions from the engine's messages."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from starlette.responses import Response

from turboserve.api.answering import Answer
from turboserve.api.completion_models import Completion, TextChoice, TextFinishReason, TextLogprobs
from turboserve.api.replies import (
    JSON_TYPE,
    SSE_COMMENT,
    SSE_DONE,
    SSE_TYPE,
    TextEvents,
    completion_usage,
    sse,
    sse_error,
)
from turboserve.errors import TurboServeError
from turboserve.messages import Delta, Finished, FinishReason, ReasoningDelta, TextDelta, TokenLogprob, Usage

LEAST_LOGPROB = -9999.0  # what OpenAI sends for less; JSON knows no infinity

Json = dict[str, object]


@dataclass(slots=True)
class CompletionReplies:
    """Writes the reply to one body: `n` answers to each of its prompts.

    `echoes` has the text to put before each answer, "" for none; `has_logprobs` says whether they were asked for.
    """

    request_id: str
    model_id: str
    n: int
    echoes: Sequence[str]
    has_logprobs: bool = False
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _usages: dict[int, Usage] = field(default_factory=dict)
    _offsets: list[LogprobWriter] = field(default_factory=list)
    _texts: dict[int, TextEvents] = field(default_factory=dict)

    media_type: ClassVar[str] = SSE_TYPE
    keep_alive: ClassVar[bytes] = SSE_COMMENT

    def __post_init__(self) -> None:
        self._offsets = [LogprobWriter(len(echo)) for echo in self.echoes]

    def whole(self, answers: Sequence[Answer]) -> Response:
        """All answers in one piece."""
        body = Completion(
            id=self.request_id,
            created=self.created,
            model=self.model_id,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=completion_usage(summed_usage([answer.ending.usage for answer in answers], self.n)),
        )
        return Response(body.model_dump_json(), media_type=JSON_TYPE)

    def _choice(self, index: int, answer: Answer) -> TextChoice:
        return TextChoice(
            index=index,
            text=self.echoes[index] + answer.reasoning + answer.text,
            logprobs=self._offsets[index].write(answer.logprobs) if self.has_logprobs else None,
            finish_reason=text_finish_reason(answer.ending.reason),
            stop_reason=answer.ending.stopped_by,
        )

    def begin(self) -> bytes:
        """The prompts' texts, where they are to be repeated."""
        return b"".join(sse(self._chunk(index, echo)) for index, echo in enumerate(self.echoes) if echo)

    def delta(self, choice: int, delta: Delta) -> bytes:
        """Newly decoded text. To a bare prompt there is no reasoning apart and no tool: all is text."""
        if not isinstance(delta, (TextDelta, ReasoningDelta)):
            return b""
        if self.has_logprobs and isinstance(delta, TextDelta):
            return sse(self._chunk(choice, delta.text, self._offsets[choice].write(delta.logprobs).model_dump()))
        if (texts := self._texts.get(choice)) is None:
            texts = self._texts[choice] = TextEvents(lambda text: self._chunk(choice, text))
        return texts.of(delta.text)

    def finish(self, choice: int, finished: Finished) -> bytes:
        """One answer's finish reason."""
        self._usages[choice] = finished.usage
        reason = text_finish_reason(finished.reason)
        return sse(self._chunk(choice, "", reason=reason, more={"stop_reason": finished.stopped_by}))

    def end(self) -> bytes:
        """The usage of all answers if asked for, and the mark behind all chunks."""
        if not self.include_usage:
            return SSE_DONE
        usages = [usage for _, usage in sorted(self._usages.items())]
        usage = completion_usage(summed_usage(usages, self.n)).model_dump()
        return sse({**self._head(), "choices": [], "usage": usage}) + SSE_DONE

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last event."""
        return sse_error(error)

    def _head(self) -> Json:
        return {"id": self.request_id, "object": "text_completion", "created": self.created, "model": self.model_id}

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: Json | None = None,
        reason: TextFinishReason | None = None,
        more: Json | None = None,
    ) -> Json:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **(more or {})}
        usage: Json = {"usage": None} if self.include_usage else {}
        return {**self._head(), "choices": [choice], **usage}


def text_finish_reason(reason: FinishReason) -> TextFinishReason:
    """OpenAI's first design knows no tool calls."""
    return "length" if reason == "length" else "stop"


def summed_usage(usages: Sequence[Usage], n: int) -> Usage:
    """Of all answers, `n` to each prompt: prompts count once. Memory and session are those of the first answer."""
    prompts = usages[::n]
    return replace(
        usages[0],
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        draft_tokens=sum(usage.draft_tokens for usage in usages),
        accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
    )


class LogprobWriter:
    """Writes one answer's logprobs in their order, counting characters on from `offset`."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, logprobs: Iterable[TokenLogprob]) -> TextLogprobs:
        """The next tokens'."""
        tokens: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for token in logprobs:
            text = token_text(token)
            tokens.append(text)
            values.append(_finite(token.logprob))
            tops.append({token_text(one): _finite(one.logprob) for one in token.top} | {text: values[-1]})
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.raw))
        return TextLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)


def token_text(token: TokenLogprob) -> str:
    """The token's text, or its bytes spelled out where they are no text by themselves."""
    try:
        token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
    return token.text


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
