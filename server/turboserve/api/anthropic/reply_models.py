"""The shapes of what the routes of Anthropic's Messages API answer; `/openapi.json` declares them.

Events of a stream are built as plain dicts, because there is one per token; a test holds them to `MessageEvent`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from turboserve.api.kv_reply_models import Reply
from turboserve.api.reply_models import AnthropicError, ConversationMemory

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerText(Reply):
    """Text of the answer."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class AnswerThinking(Reply):
    """What the model thought before it answered; empty where the caller wants it omitted."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: Annotated[str, Field(description="Clients want one; it proves nothing.")]


class AnswerToolUse(Reply):
    """A tool call for the caller to run."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = Annotated[AnswerText | AnswerThinking | AnswerToolUse, Field(discriminator="type")]


class ThinkingTokens(Reply):
    """Of the output."""

    thinking_tokens: int


class MessageUsage(Reply):
    """Token counts; the prompt has input_tokens + cache_read_input_tokens."""

    input_tokens: Annotated[int, Field(description="Prompt tokens computed for this request.")]
    cache_read_input_tokens: Annotated[int, Field(description="Prompt tokens found in a kept cache.")]
    cache_creation_input_tokens: Annotated[int, Field(description="0: keeping a prompt costs nothing extra.")] = 0
    output_tokens: int
    output_tokens_details: ThinkingTokens
    service_tier: Literal["standard"] = "standard"
    turboserve: ConversationMemory | None = None


class MessageReply(Reply):
    """The answer, in Anthropic's shape."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Reply):
    """How many tokens the prompt would have."""

    input_tokens: int


# --- events of a stream


class MessageStart(Reply):
    """The first event: a message without content. Its input_tokens are the whole prompt's, 0 where not yet known."""

    type: Literal["message_start"]
    message: MessageReply


class Ping(Reply):
    """Says nothing; bridges silence."""

    type: Literal["ping"]


class BlockStart(Reply):
    """A block begins, empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class TextPiece(Reply):
    """Newly decoded text."""

    type: Literal["text_delta"]
    text: str


class ThinkingPiece(Reply):
    """Newly decoded thoughts."""

    type: Literal["thinking_delta"]
    thinking: str


class SignaturePiece(Reply):
    """Ends every thinking block."""

    type: Literal["signature_delta"]
    signature: str


class InputPiece(Reply):
    """A piece of a call's input; all pieces of a block, joined, are one JSON object."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Reply):
    """A piece of the block that began last."""

    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[TextPiece | ThinkingPiece | SignaturePiece | InputPiece, Field(discriminator="type")]


class BlockStop(Reply):
    """The block is complete."""

    type: Literal["content_block_stop"]
    index: int


class Ending(Reply):
    """Why the answer ends."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Reply):
    """The answer is complete; the final token counts."""

    type: Literal["message_delta"]
    delta: Ending
    usage: MessageUsage


class MessageStop(Reply):
    """The last event."""

    type: Literal["message_stop"]


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicError,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a stream."""
