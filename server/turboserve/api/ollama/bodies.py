"""Bodies of Ollama's routes, and what they are as bodies of our own.

Fields and options that we do not know are ignored, as Ollama ignores them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from turboserve.api.chat_body import (
    INT64_MAX,
    INT64_MIN,
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOP_K,
    ConstraintFields,
    FirstError,
    Penalty,
    StopText,
)
from turboserve.api.chat_tools import constraint
from turboserve.api.validation import json_text
from turboserve.errors import UnsupportedParameterError
from turboserve.messages import Constraint

MAX_TOOLS = 512


class OpenBody(BaseModel):
    """No coercion between types; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class OllamaOptions(OpenBody):
    """How the answer is drawn and where it ends."""

    num_predict: Annotated[int | None, Field(ge=-2, le=MAX_TOKENS, description="-1 and -2: no limit.")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_TOP_K)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=INT64_MIN, le=INT64_MAX)] = None
    stop: StopText | Annotated[list[StopText], FirstError(), Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class PastFunction(OpenBody):
    """Name and arguments of a call of an earlier answer."""

    name: Annotated[str, Field(max_length=256)]
    arguments: dict[str, Any] = {}


class PastCall(OpenBody):
    """A call of an earlier answer."""

    id: Annotated[str | None, Field(max_length=256)] = None
    function: PastFunction


class PastMessage(OpenBody):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: Annotated[
        Annotated[list[Any], FirstError()] | None, Field(description="Only empty: answers are made from text.")
    ] = None
    tool_calls: Annotated[Annotated[list[PastCall], FirstError()] | None, Field(max_length=128)] = None
    tool_name: Annotated[str | None, Field(description="Whose result this is.")] = None
    tool_call_id: Annotated[str | None, Field(max_length=256)] = None


class AnswerBody(OpenBody, ConstraintFields):
    """What both kinds of answers are asked with. Constraints are chat completions' as well."""

    model: Annotated[str, Field(max_length=1024)]
    stream: Annotated[bool | None, Field(description="false: one reply; else JSON lines.")] = None
    format: Annotated[
        Literal["", "json"] | dict[str, Any] | None, Field(description="json, or a JSON schema to be fulfilled.")
    ] = None
    options: OllamaOptions | None = None
    think: Annotated[
        bool | Literal["low", "medium", "high"] | None, Field(description="Whether, or how much, to think first.")
    ] = None
    keep_alive: Annotated[float | str | None, Field(description="Ignored: the model stays loaded.")] = None


class OllamaChatBody(AnswerBody):
    """`POST /api/chat`. Without messages nothing is computed: Ollama loads the model then."""

    messages: Annotated[list[PastMessage], FirstError(), Field(max_length=MAX_MESSAGES)] = []
    tools: Annotated[Annotated[list[dict[str, Any]], FirstError()] | None, Field(max_length=MAX_TOOLS)] = None


class GenerateBody(AnswerBody):
    """`POST /api/generate`: one prompt, as a user's message or `raw`. Without a prompt nothing is computed."""

    prompt: str | None = None
    system: str | None = None
    suffix: Annotated[str | None, Field(description="Text behind the answer, for models that fill in the middle.")] = (
        None
    )
    raw: Annotated[bool | None, Field(description="The prompt is continued as it is, without the chat template.")] = (
        None
    )
    images: list[Any] | None = None
    template: str | None = None
    context: list[int] | None = None


class ShowBody(OpenBody):
    """`POST /api/show`; older clients say `name` for `model`."""

    model: Annotated[str | None, Field(max_length=1024)] = None
    name: Annotated[str | None, Field(max_length=1024)] = None


def plain_name(name: str) -> str:
    """Ollama's clients add a tag to names that have none."""
    return name.removesuffix(":latest")


def chat_body(body: OllamaChatBody) -> dict[str, object]:
    """The same as a chat completion's body. Raises UnsupportedParameterError for images."""
    messages = list(_messages(body.messages))
    tools = {"tools": body.tools} if body.tools else {}
    return {"messages": messages, **tools, **_common(body), **_thinking(body)}


def generate_chat_body(body: GenerateBody) -> dict[str, object]:
    """A prompt that is not raw, as a chat completion's body. Raises UnsupportedParameterError."""
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt or ""}]
    return {"messages": messages, **_common(body), **_thinking(body)}


def raw_body(body: GenerateBody) -> dict[str, object]:
    """A raw prompt, or one with a suffix, as a completion's body. Raises UnsupportedParameterError."""
    if body.format not in (None, ""):
        raise UnsupportedParameterError("format is not supported with raw or suffix.", param="format")
    suffix = {"suffix": body.suffix} if body.suffix else {}
    return {"prompt": body.prompt or "", **suffix, **_common(body)}


def refuse_unsupported(body: GenerateBody) -> None:
    """Raises UnsupportedParameterError for what would change the answer and cannot be had."""
    if body.images:
        raise UnsupportedParameterError("images are not supported: answers are made from text.", param="images")
    if body.template:
        raise UnsupportedParameterError("template: the served model's own is used; see raw.", param="template")
    if body.context:
        raise UnsupportedParameterError(
            "context is not supported: send the conversation to /api/chat.", param="context"
        )


def _messages(messages: list[PastMessage]) -> Iterator[dict[str, object]]:
    """With ids for calls and results: in Ollama's API the order tells which result is whose."""
    open_calls: list[tuple[str, str]] = []  # (name, id) of calls that have no result yet
    for index, message in enumerate(messages):
        if message.images:
            param = f"messages[{index}].images"
            raise UnsupportedParameterError(f"{param} are not supported: answers are made from text.", param=param)
        plain: dict[str, object] = {"role": message.role, "content": message.content}
        if message.role == "assistant":
            calls = [(call, call.id or f"call_{index}_{place}") for place, call in enumerate(message.tool_calls or ())]
            open_calls = [(call.function.name, identity) for call, identity in calls]
            if calls:
                plain["tool_calls"] = [_call(call, identity) for call, identity in calls]
            if message.thinking:
                plain["reasoning_content"] = message.thinking
        elif message.role == "tool":
            plain["tool_call_id"] = message.tool_call_id or _take_call(open_calls, message.tool_name) or f"call_{index}"
            if message.tool_name:
                plain["name"] = message.tool_name
        yield plain


def _call(call: PastCall, identity: str) -> dict[str, object]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return {"id": identity, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _take_call(open_calls: list[tuple[str, str]], name: str | None) -> str | None:
    """The id of the oldest call of that name without a result, or of any name when none is said."""
    place = next((i for i, (called, _) in enumerate(open_calls) if name in (None, called)), None)
    return None if place is None else open_calls.pop(place)[1]


def _common(body: AnswerBody) -> Mapping[str, object]:
    """Options under our names; what is not given is left out."""
    given = body.options.model_dump(exclude_none=True) if body.options is not None else {}
    num_predict = given.pop("num_predict", -1)
    if num_predict > 0:
        given["max_tokens"] = num_predict
    if given.get("top_k", 0) < 0:
        given["top_k"] = 0
    if "repeat_penalty" in given:
        given["repetition_penalty"] = given.pop("repeat_penalty")
    return given


def answer_constraint(body: AnswerBody) -> Constraint | None:
    """What `format` or a constraint of chat completions' asks for. Raises InvalidRequestError where both do."""
    own = None
    if body.format == "json":
        own = Constraint("json_object", param="format")
    elif isinstance(body.format, dict):
        own = Constraint("json_schema", json_text(body.format, "format"), "format")
    return constraint(body, own)


def _thinking(body: AnswerBody) -> Mapping[str, object]:
    if isinstance(body.think, str):
        return {"reasoning_effort": body.think}
    return {} if body.think is None else {"enable_thinking": body.think}
