"""Scripts of the scripted engine with reasoning, tool calls, logprobs and endings of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.turboserve.api.scripted_sessions import KV

from turboserve.errors import EngineFailureError
from turboserve.messages import (
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

Script = Iterator[Event | None]

THINKING_USAGE = Usage(
    prompt_tokens=20, completion_tokens=9, cached_tokens=5, kv=KV, kv_format="4/3", session_id="c1", reasoning_tokens=4
)


def think_and_call() -> Script:
    """Thoughts, text, two calls, the second without arguments of its own."""
    for word in ("Let me ", "look."):
        yield ReasoningDelta(word)
    yield None
    yield TextDelta("I look.")
    yield ToolCallDelta(0, "call_a", "weather", "")
    yield ToolCallDelta(0, arguments='{"city": ')
    yield None
    yield ToolCallDelta(0, arguments='"Örebro"}')
    yield None
    yield ToolCallDelta(1, "call_b", "now", "{}")
    yield Finished("tool_calls", THINKING_USAGE)


def cut_call() -> Script:
    """A call that the token limit cuts off."""
    yield ToolCallDelta(0, "call_a", "weather", '{"city": "Örebro", "days": [1, 2')
    yield Finished("length", THINKING_USAGE)


def cut_text() -> Script:
    yield TextDelta("It was a dark and")
    yield Finished("length", THINKING_USAGE)


def stopped() -> Script:
    """Ended by a stop string of the request's."""
    yield TextDelta("one two")
    yield Finished("stop", THINKING_USAGE, stopped_by="three")


def silent() -> Script:
    """An answer without a word."""
    yield Finished("stop", replace(THINKING_USAGE, completion_tokens=0, reasoning_tokens=0))


def think_only() -> Script:
    """Thoughts that use up all tokens."""
    yield ReasoningDelta("Hm, ")
    yield None
    yield ReasoningDelta("well")
    yield Finished("length", THINKING_USAGE)


def fail_thinking() -> Script:
    yield ReasoningDelta("Hm")
    yield None
    yield Failed(EngineFailureError("The engine failed."))


def with_logprobs() -> Script:
    """Two tokens, the second of them held back until the end."""
    other = TokenLogprob("No", b"No", -2.0)
    yield TextDelta("Yes", (TokenLogprob("Yes", b"Yes", -0.5, top=(other,)),))
    yield None
    yield TextDelta("", (TokenLogprob("!", b"!", -0.25),))
    yield Finished("stop", THINKING_USAGE)


ANSWERS: tuple[Callable[[], Script], ...] = (
    think_and_call,
    cut_call,
    cut_text,
    stopped,
    silent,
    think_only,
    fail_thinking,
    with_logprobs,
)
