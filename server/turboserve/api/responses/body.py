"""The body of OpenAI's Responses API as pydantic models: every type strict, every number bounded.

Fields that change nothing here are ignored wherever they stand. Items, parts and tools of other kinds than ours are
read as such and refused by `request.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from turboserve.api.chat_body import MAX_MESSAGES, MAX_PARTS, MAX_TOKENS, ConstraintFields, FirstError, Name, at_most

MAX_TOOLS = 1024
MAX_TOP_LOGPROBS = 20


class LenientModel(BaseModel):
    """Base of these bodies: no coercion between types, immutable, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


# --- input


class TextPart(LenientModel):
    """Text of a message, of an earlier answer's, or of a call's output."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(LenientModel):
    """What a model of OpenAI's said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


TEXT_KINDS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class OtherPart(LenientModel):
    """An image, a file or audio: refused by its name."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"enum": [*TEXT_KINDS, "refusal"]}})]


def _kind_of_part(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind in TEXT_KINDS:
        return "<text>"
    return "<refusal>" if kind == "refusal" else "<other>"


# Tags in brackets, so that no path of a complaint can take one for a field.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[OtherPart, Tag("<other>")],
    Discriminator(_kind_of_part),
]
Parts = Annotated[list[Part], FirstError(), Field(max_length=MAX_PARTS)]


class MessageItem(LenientModel):
    """A turn; what the assistant said comes back from earlier answers."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: Name | None = None


class CallItem(LenientModel):
    """A tool call of an earlier answer; `arguments` is a JSON object as text."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: Name | None = None


class OutputItem(LenientModel):
    """What the function called under that id gave back."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Parts
    id: Name | None = None


class ReasoningItem(LenientModel):
    """What the model thought in an earlier answer."""

    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None
    id: Name | None = None


ITEM_KINDS = ("message", "function_call", "function_call_output", "reasoning")


class OtherItem(LenientModel):
    """What a tool of OpenAI's own did, or a reference: refused by its name."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"enum": list(ITEM_KINDS)}})]


def _kind_of_item(value: object) -> str:
    if isinstance(value, dict) and "type" not in value:
        return "<message>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ITEM_KINDS else "<other>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(_kind_of_item),
]


# --- tools


class Tool(LenientModel):
    """A function that the caller runs; any other `type` is refused."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolName(LenientModel):
    """A function, as choices name one."""

    type: str
    name: Name | None = None


class AllowedTools(LenientModel):
    """The model may, or must, call one of these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], FirstError(), Field(max_length=MAX_TOOLS)]


# --- settings


class TextFormat(LenientModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(LenientModel):
    """How the answer's text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # no template knows it


class Reasoning(LenientModel):
    """How hard to think; with a summary, thoughts are delivered as one."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponsesBody(LenientModel, ConstraintFields):
    """`POST /v1/responses`. `null` means "not given" everywhere. Of constraints there are chat completions' as well."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    input: str | Annotated[list[Item], FirstError(), Field(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None

    tools: Annotated[list[Tool], FirstError(), Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | AllowedTools | ToolName | None = None
    parallel_tool_calls: bool | None = None

    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: Annotated[list[Name], FirstError(), Field(max_length=64)] | None = None

    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], at_most(16), Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # too long a prompt is refused either way

    # Refused unless null: a template of OpenAI's, a conversation that OpenAI keeps, a judge of OpenAI's.
    prompt: Any = None
    conversation: Any = None
    moderation: Any = None

    # The conversation's cache: this server's own, and OpenAI's hint. Their grammar is in `session_request.py`.
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    kv_format: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
