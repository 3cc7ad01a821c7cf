"""The shapes of what leaves the server as JSON, as pydantic models; `/openapi.json` declares them.

Built in `replies.py`; those about KV memory are in `kv_reply_models.py`. Chunks of a stream are built as plain
dicts, because there is one per token; a test holds them to `ChatCompletionChunk`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from turboserve.api.anthropic_errors import ErrorType
from turboserve.api.kv_reply_models import KVFormatName, KVKinds, NumTokens, Ratio, RawBytes, Reply, UnixSeconds
from turboserve.messages import FinishReason

# --- errors


class ErrorDetail(Reply):
    """What went wrong: `code` is for programs, `message` for people."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="A path such as messages[2].content.")]
    code: str | None


class ErrorEnvelope(Reply):
    """Every error, whatever its status."""

    error: ErrorDetail


class AnthropicErrorDetail(Reply):
    """What went wrong, in the words of Anthropic's API."""

    type: ErrorType
    message: str


class AnthropicError(Reply):
    """Every error of the routes that speak Anthropic's API; also an event of a stream."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: Annotated[str | None, Field(description="As the log has it.")] = None


# --- status


class ServerInfo(Reply):
    """Who answers here, and on which routes."""

    name: Literal["turboserve"] = "turboserve"
    version: str
    routes: list[str]


class Health(Reply):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Reply):
    """A request sent now would be worked on."""

    status: Literal["ready"] = "ready"
    model: str


# --- completions

Fingerprint = Annotated[
    str | None, Field(description="Of the model, its KV format and kernels, and this version: what a seed depends on.")
]


class PromptTokens(Reply):
    """What of the prompt was not computed again."""

    cached_tokens: Annotated[int, Field(description="Prompt tokens found in a kept cache.")]
    audio_tokens: Literal[0] = 0


class AnswerTokens(Reply):
    """What the completion's tokens were."""

    reasoning_tokens: Annotated[int, Field(description="Before the answer itself, shown or not.")]
    accepted_prediction_tokens: Annotated[int, Field(description="Of them, those that had been guessed ahead.")] = 0
    rejected_prediction_tokens: Annotated[int, Field(description="Wrong guesses, in none of them.")] = 0
    audio_tokens: Literal[0] = 0


class ConversationMemory(Reply):
    """The conversation's KV memory at the end of a request."""

    session_id: Annotated[str | None, Field(description="Under which it can be looked up; null: it was not kept.")]
    kv_format: KVFormatName
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio


class CompletionUsage(Reply):
    """OpenAI's usage, with the conversation's memory under the extension key `turboserve`.

    Of several answers to one prompt, the prompt is counted once and the memory is the first answer's.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: AnswerTokens
    turboserve: ConversationMemory


AnswerEnding = FinishReason | Literal["function_call"]


class TopLogprob(Reply):
    """A token that was likely in a place."""

    token: str
    logprob: Annotated[float, Field(description="Natural logarithm; -9999 for what was out of reach.")]
    bytes: Annotated[list[int], Field(description="In UTF-8; a piece of a character is no text by itself.")]


class DrawnLogprob(TopLogprob):
    """The token that was drawn, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(Reply):
    """Where `logprobs` was asked for: the tokens of the text."""

    content: list[DrawnLogprob]
    refusal: None = None


class CalledFunction(Reply):
    """Name and arguments of a call, these as JSON text."""

    name: str
    arguments: str


class AnswerCall(Reply):
    """A function that the caller is to carry out."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Reply):
    """The assistant's answer: text, calls or both; `function_call` where the body says `functions`."""

    model_config = ConfigDict(json_schema_extra={"required": ["role", "content", "refusal"]})

    role: Literal["assistant"] = "assistant"
    content: Annotated[str | None, Field(description="null where there are calls and no text.")]
    refusal: None = None
    reasoning_content: Annotated[str, Field(description="What the model thought first.")] = ""
    reasoning: Annotated[str, Field(description="The same.")] = ""
    tool_calls: list[AnswerCall] = Field(default_factory=list)
    function_call: CalledFunction | None = None


class Choice(Reply):
    """One answer; `finish_reason` is `length` where max_tokens or the context ended it."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: AnswerEnding


class ChatCompletion(Reply):
    """All answers in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: UnixSeconds
    model: str
    system_fingerprint: Fingerprint
    choices: list[Choice]
    usage: CompletionUsage


class FunctionPiece(Reply):
    """The name comes first, with no arguments; then these, piece by piece."""

    model_config = ConfigDict(json_schema_extra={"required": ["arguments"]})

    name: str = ""
    arguments: str


class CallPiece(Reply):
    """A piece of the `index`-th call; the first of each has `id`, `type` and the name."""

    model_config = ConfigDict(json_schema_extra={"required": ["index", "function"]})

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionPiece


class Delta(Reply):
    """The first chunk has the role, the last one nothing."""

    model_config = ConfigDict(json_schema_extra={"required": []})

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[CallPiece] = Field(default_factory=list)
    function_call: FunctionPiece | None = None


class ChunkChoice(Reply):
    """The newest piece of one answer; `finish_reason` is null in all but its last."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: AnswerEnding | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream. `usage` is there once `stream_options.include_usage` is set, null in all but the last."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["id", "object", "created", "model", "system_fingerprint", "choices"]}
    )

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: UnixSeconds
    model: str
    system_fingerprint: Fingerprint
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
