"""From a parsed JSON object to a `messages.Request`: what we support, what we refuse, and why.

Every refusal names the parameter. Messages never quote the prompt. No file is opened and no
name looked up anywhere: a model is served if its id is the served one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import NamedTuple

from turboserve.api.chat_body import AssistantMessage, ChatBody, Message, TextPart, ToolMessage
from turboserve.api.session_request import chosen_session, normal_kv_format
from turboserve.api.validation import validated
from turboserve.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedParameterError,
)
from turboserve.messages import Request, SamplingParams

# Parameters of OpenAI's (or vLLM's) API that we do not implement, each with the values that
# ask for nothing and so may pass.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "chat_template_kwargs": (None, {}),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
}


class Delivery(NamedTuple):
    """How the answer to a chat completion is to be written."""

    stream: bool  # as server-sent events, else whole
    include_usage: bool  # streams only: a last chunk with the token counts


def check_model(name: str, model_id: str | None) -> None:
    """Raises ModelNotFoundError unless `name` is the served id; None: any name will do."""
    if model_id is not None and name != model_id:
        raise ModelNotFoundError(f"The model {name[:100]!r} is not served here; use {model_id!r}.", param="model")


def parse_chat(
    body: dict[str, object], *, request_id: str, tenant: str, model_id: str | None, session_headers: Iterable[str] = ()
) -> tuple[Request, Delivery]:
    """What to ask of the engine, and how to answer.

    Raises ModelNotFoundError and every kind of InvalidRequestError, naming the parameter.
    """
    chat = validated(ChatBody, _without_unsupported(body))
    if chat.model:
        check_model(chat.model, model_id)
    if chat.stream_options is not None and not chat.stream:
        raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
    request = Request(
        request_id=request_id,
        messages=tuple(plain_message(message, index) for index, message in enumerate(chat.messages)),
        sampling=_sampling(chat),
        max_tokens=_max_tokens(chat),
        stop=_stops(chat),
        tenant=tenant,
        session_id=chosen_session(chat.session_id, session_headers),
        kv_format=normal_kv_format(chat.kv_format),
        cache_key=chat.prompt_cache_key or None,
    )
    include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
    return request, Delivery(bool(chat.stream), include_usage)


def _without_unsupported(body: dict[str, object]) -> dict[str, object]:
    for name, neutral in NEUTRAL_VALUES.items():
        # `0 == False` in Python, but not in JSON.
        if name in body and not any(body[name] == value and type(body[name]) is type(value) for value in neutral):
            raise UnsupportedParameterError(f"{name} is not supported by this server.", param=name)
    return {name: value for name, value in body.items() if name not in NEUTRAL_VALUES}


# The body spells these as the engine does: a new one is added to both and is passed on.
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.name != "logit_bias")


def _sampling(chat: ChatBody) -> SamplingParams:
    given = {name: getattr(chat, name) for name in SAMPLING_FIELDS if getattr(chat, name) is not None}
    logit_bias = tuple((int(token), bias) for token, bias in (chat.logit_bias or {}).items())
    return SamplingParams(**given, logit_bias=logit_bias)


def _max_tokens(chat: ChatBody) -> int | None:
    given = {value for value in (chat.max_tokens, chat.max_completion_tokens) if value is not None}
    if len(given) > 1:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ; give one of them.", param="max_completion_tokens"
        )
    return given.pop() if given else None


def _stops(chat: ChatBody) -> tuple[str, ...]:
    if isinstance(chat.stop, str):
        return (chat.stop,)
    return tuple(chat.stop or ())


def plain_message(message: Message, index: int) -> dict[str, object]:
    """What the chat template sees: text content, `developer` as `system`, tool calls as plain dicts."""
    if message.content is None and not message.tool_calls:
        param = f"messages[{index}].content"
        raise InvalidRequestError(f"{param}: null needs tool_calls beside it.", param=param)
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, object] = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    return plain


def _text(content: str | list[TextPart] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""
