"""Messages of a body as the chat template sees them: plain dicts with plain text, in one spelling.

Everything that clients add beside what a template can know (`cache_control`, ids, annotations) is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable

from turboserve.api.chat_body import (
    AssistantMessage,
    FunctionMessage,
    Message,
    RefusalPart,
    TextPart,
    ToolCall,
    ToolMessage,
)
from turboserve.api.validation import json_text
from turboserve.errors import InvalidRequestError


def plain_messages(messages: Iterable[Message]) -> tuple[dict[str, object], ...]:
    """What the chat template sees. Raises InvalidRequestError, naming the message's place.

    `developer` becomes `system`; calls and results of OpenAI's first design become tool calls and results; the
    arguments of a call are JSON text, "{}" for none; reasoning is `reasoning_content`.
    """
    plain: list[dict[str, object]] = []
    latest_calls: dict[str, str] = {}
    for index, message in enumerate(messages):
        if isinstance(message, FunctionMessage):
            call_id = latest_calls.get(message.name, f"call_{index}")
            text = _text(message.content)
            plain.append({"role": "tool", "content": text, "name": message.name, "tool_call_id": call_id})
            continue
        plain.append(plain_message(message, index))
        if isinstance(message, AssistantMessage) and message.function_call is not None:
            latest_calls[message.function_call.name] = f"call_{index}"
    return tuple(plain)


def plain_message(message: Message, index: int) -> dict[str, object]:
    """One message by itself, the `index`-th of its conversation."""
    plain: dict[str, object] = {"role": message.role, "content": _text(message.content)}
    if message.role == "developer":
        plain["role"] = "system"
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        plain |= _of_an_answer(message, index)
    return plain


def _of_an_answer(message: AssistantMessage, index: int) -> dict[str, object]:
    """What only assistants' messages have."""
    more: dict[str, object] = {}
    if message.content is None and message.refusal:
        more["content"] = message.refusal
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(id=f"call_{index}", function=message.function_call))
    if calls:
        more["tool_calls"] = [_plain_call(call, index, place) for place, call in enumerate(calls)]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        more["reasoning_content"] = reasoning
    if message.content is None and not more:
        param = f"messages[{index}].content"
        raise InvalidRequestError(f"{param}: null needs tool_calls beside it.", param=param)
    return more


def _plain_call(call: ToolCall, index: int, place: int) -> dict[str, object]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json_text(arguments, f"messages[{index}].tool_calls[{place}].function.arguments")
    function = {"name": call.function.name, "arguments": arguments if arguments.strip() else "{}"}
    return {"id": call.id or f"call_{index}_{place}", "type": "function", "function": function}


def _text(content: str | list[TextPart | RefusalPart] | None) -> str:
    """Parts are joined by newlines, as vLLM and llama.cpp do for templates that take text alone.

    Templates that take parts write them one behind the other; but who sends parts means blocks, whose first and last
    words would grow together.
    """
    if isinstance(content, list):
        return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)
    return content or ""
