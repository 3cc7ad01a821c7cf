"""The chat completion body as pydantic models: every type strict, every number bounded.

Only what this server acts on or knowingly ignores is declared here; `chat_request.py` deals with
parameters it does not support and turns pydantic's complaints into our errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints

MAX_MESSAGES = 4096  # a long agent run has hundreds; more is abuse and costs quadratic template time
MAX_PARTS = 1024
MAX_TOOL_CALLS = 128
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_TOKENS = 1_000_000
MAX_TOP_K = 1_000_000
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

Name = Annotated[str, Field(max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StrictModel(BaseModel):
    """Base of all bodies: no coercion between types, no unknown field, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(StrictModel):
    """A piece of text content; pieces are joined by newlines."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(max_length=MAX_PARTS)]


class FunctionCall(StrictModel):
    """Name and arguments of a tool call, `arguments` being JSON as text."""

    name: Name
    arguments: str


class ToolCall(StrictModel):
    """A tool call of an earlier answer; the chat template gets it as it is."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # streamed calls carry it and clients replay it


class SystemMessage(StrictModel):
    """`system`, or `developer`, which newer clients say for the same thing."""

    role: Literal["system", "developer"]
    content: str | Parts
    name: Name | None = None


class UserMessage(StrictModel):
    """What a user said."""

    role: Literal["user"]
    content: str | Parts
    name: Name | None = None


class AssistantMessage(StrictModel):
    """What we, or OpenAI, answered earlier; clients replay it with fields that have no bearing here."""

    role: Literal["assistant"]
    content: str | Parts | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ToolMessage(StrictModel):
    """A tool's result, in answer to the call with that id."""

    role: Literal["tool"]
    content: str | Parts
    tool_call_id: Name
    name: Name | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class StreamOptions(StrictModel):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI pads its chunks against traffic analysis; we never do


class ChatBody(StrictModel):
    """`POST /v1/chat/completions`. `null` means "not given" everywhere, as clients in many languages send it."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None

    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # The conversation's cache: this server's own, and OpenAI's hint. Their grammar is in `session_request.py`.
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    kv_format: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None

    # Accepted and ignored: they change nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
