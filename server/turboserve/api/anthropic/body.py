"""The bodies of Anthropic's Messages API as pydantic models: every type strict, every number bounded.

Fields that change nothing here (`cache_control`, `citations`, `service_tier`, what newer versions of the API add) are
ignored wherever they stand. Blocks and tools of other kinds than ours are read as such and refused by `request.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from turboserve.api.chat_body import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOP_K,
    ConstraintFields,
    FirstError,
    Name,
    StopText,
)

MAX_TOOLS = 1024
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class LenientModel(BaseModel):
    """Base of these bodies: no coercion between types, immutable, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


# --- content


class TextBlock(LenientModel):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(LenientModel):
    """What the model thought in an earlier answer; its signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(LenientModel):
    """Thoughts that only Anthropic's servers can read; they are left out."""

    type: Literal["redacted_thinking"]
    data: str | None = None


class ToolUseBlock(LenientModel):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


class OtherBlock(LenientModel):
    """An image, a document, or what a server of Anthropic's did: refused by its name."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"enum": list(KINDS)}})]


class OtherResultPart(LenientModel):
    """Anything but text: refused by its name."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"const": "text"}})]


def _kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in KINDS else "<other>"


def _kind_of_result(value: object) -> str:
    return kind if (kind := _kind(value)) == "<text>" else "<other>"


# Tags in brackets, so that no path of a complaint can take one for a field.
ResultPart = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[OtherResultPart, Tag("<other>")], Discriminator(_kind_of_result)
]


class ToolResultBlock(LenientModel):
    """What the tool called in the `tool_use` block of that id gave back."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[ResultPart], FirstError(), Field(max_length=MAX_PARTS)] | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[OtherBlock, Tag("<other>")],
    Discriminator(_kind),
]


class InputMessage(LenientModel):
    """One turn. A last one of the assistant's is the beginning of the answer."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], FirstError(), Field(max_length=MAX_PARTS)]


# --- tools


class Tool(LenientModel):
    """A function that the caller runs. Tools with a `type` of their own are Anthropic's and refused."""

    type: str | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class AutoChoice(LenientModel):
    """The model may call tools; so does `any`, which makes it call one."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(LenientModel):
    """The model calls this tool."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoneChoice(LenientModel):
    """The model calls no tool."""

    type: Literal["none"]


# --- settings


class ThinkingOn(LenientModel):
    """The model thinks first, at most `budget_tokens`."""

    type: Literal["enabled"]
    budget_tokens: NumTokens
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(LenientModel):
    """The model thinks as long as it likes."""

    type: Literal["adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingOff(LenientModel):
    """The model answers at once, where its template can say so."""

    type: Literal["disabled"]


class OutputFormat(LenientModel):
    """What the answer must look like."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(LenientModel):
    """How the answer is to be."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    format: OutputFormat | None = None


class Metadata(LenientModel):
    """Of equally long kept prefixes, the one of this user is taken."""

    user_id: Annotated[str, Field(max_length=1024)] | None = None


class PromptBody(LenientModel, ConstraintFields):
    """What a prompt is made of. `null` means "not given" everywhere. Constraints are chat completions' as well."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    messages: Annotated[list[InputMessage], FirstError(), Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextBlock], FirstError(), Field(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[Tool], FirstError(), Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[AutoChoice | ToolChoice | NoneChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[ThinkingOn | ThinkingAdaptive | ThinkingOff, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: list[Any] | None = None  # refused unless empty
    container: Any = None  # refused unless null


class CountTokensBody(PromptBody):
    """`POST /v1/messages/count_tokens`."""


class MessagesBody(PromptBody):
    """`POST /v1/messages`."""

    max_tokens: NumTokens
    stop_sequences: Annotated[list[StopText], FirstError(), Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None  # there is one tier

    # This server's own; their grammar is in `session_request.py`.
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    kv_format: Annotated[str, Field(max_length=64)] | None = None
