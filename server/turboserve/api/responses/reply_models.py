"""The shapes of what the routes of the Responses API answer; `/openapi.json` declares them.

Items and events are built as plain dicts, because there is an event per token; a test holds them to these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from turboserve.api.kv_reply_models import Reply, UnixSeconds
from turboserve.api.reply_models import ConversationMemory

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

# --- items


class TopTokenLogprob(Reply):
    """A likely token in this place."""

    token: str
    bytes: list[int]
    logprob: float


class OutputLogprob(Reply):
    """A token of the answer."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopTokenLogprob]


class OutputText(Reply):
    """Text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[OutputLogprob]


class InputText(Reply):
    """Text that was sent."""

    type: Literal["input_text"]
    text: str


class ReasoningText(Reply):
    """Thoughts."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Reply):
    """Thoughts, where a summary was asked for."""

    type: Literal["summary_text"]
    text: str


class OutputMessage(Reply):
    """What the assistant says."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class InputMessage(Reply):
    """What was said to it."""

    type: Literal["message"]
    id: str
    role: Literal["user", "system", "developer"]
    status: ItemStatus
    content: list[InputText]


class FunctionCallItem(Reply):
    """A call for the caller to run; `arguments` is a JSON object as text."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class FunctionOutputItem(Reply):
    """What a call gave back."""

    type: Literal["function_call_output"]
    id: str
    call_id: str
    output: str
    status: ItemStatus


class ReasoningObject(Reply):
    """What the model thought: as content, or as summary where one was asked for."""

    type: Literal["reasoning"]
    id: str
    summary: list[SummaryText]
    content: list[ReasoningText] | None
    encrypted_content: None
    status: ItemStatus


AnswerItem = Annotated[OutputMessage | FunctionCallItem | ReasoningObject, Field(discriminator="type")]
ListedItem = OutputMessage | InputMessage | FunctionCallItem | FunctionOutputItem | ReasoningObject

# --- responses


class InputDetails(Reply):
    """Of the prompt's tokens."""

    cached_tokens: Annotated[int, Field(description="Found in a kept cache.")]
    cache_write_tokens: Annotated[int, Field(description="Computed and kept.")]


class OutputDetails(Reply):
    """Of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    turboserve: ConversationMemory


class IncompleteDetails(Reply):
    """Why the answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(Reply):
    """Why there is no answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class ReasoningSettings(Reply):
    """As they were asked for."""

    effort: str | None
    summary: Literal["auto", "concise", "detailed"] | None


class TextSettings(Reply):
    """As they were asked for."""

    format: dict[str, Any]
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(Reply):
    """As it was described."""

    type: Literal["function"] = "function"
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ResponseObject(Reply):
    """One response."""

    id: str
    object: Literal["response"] = "response"
    created_at: UnixSeconds
    completed_at: UnixSeconds | None
    status: Status
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[AnswerItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningSettings
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None


class DeletedResponse(Reply):
    """It is forgotten."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(Reply):
    """How many tokens a prompt would have."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputItemList(Reply):
    """Items of one response's own input."""

    object: Literal["list"] = "list"
    data: list[ListedItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


# --- events of a stream


class ResponseEvent(Reply):
    """The response begins or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseObject


class ItemEvent(Reply):
    """An item begins, empty, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: AnswerItem


class PartEvent(Reply):
    """The part of an item begins, empty, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class SummaryPartEvent(Reply):
    """The same of thoughts where a summary was asked for."""

    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    part: SummaryText


class TextDeltaEvent(Reply):
    """Newly decoded text."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[OutputLogprob]


class TextDoneEvent(Reply):
    """All of a part's text."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[OutputLogprob]


class ReasoningDeltaEvent(Reply):
    """Newly decoded thoughts."""

    type: Literal["response.reasoning_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str


class ReasoningDoneEvent(Reply):
    """All thoughts."""

    type: Literal["response.reasoning_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str


class SummaryDeltaEvent(Reply):
    """Newly decoded thoughts where a summary was asked for."""

    type: Literal["response.reasoning_summary_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    delta: str


class SummaryDoneEvent(Reply):
    """All of them."""

    type: Literal["response.reasoning_summary_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    text: str


class ArgumentsDeltaEvent(Reply):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDoneEvent(Reply):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


class ResponseStreamEvent(
    RootModel[
        Annotated[
            ResponseEvent
            | ItemEvent
            | PartEvent
            | SummaryPartEvent
            | TextDeltaEvent
            | TextDoneEvent
            | ReasoningDeltaEvent
            | ReasoningDoneEvent
            | SummaryDeltaEvent
            | SummaryDoneEvent
            | ArgumentsDeltaEvent
            | ArgumentsDoneEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a stream."""
