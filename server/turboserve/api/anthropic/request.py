"""From a body of Anthropic's to a `messages.Request`: turns become messages, blocks become fields of them.

Every refusal names the parameter. Messages never quote the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from turboserve.api.anthropic.body import (
    Block,
    CountTokensBody,
    InputMessage,
    MessagesBody,
    NoneChoice,
    OtherResultPart,
    PromptBody,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ThinkingOff,
    ThinkingOn,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from turboserve.api.chat_tools import constraint, second_constraint
from turboserve.api.model_names import ServedNames
from turboserve.api.session_request import chosen_session, normal_kv_format
from turboserve.api.thinking import thinking_kwargs
from turboserve.api.validation import validated
from turboserve.errors import InvalidRequestError, UnsupportedParameterError
from turboserve.messages import Constraint, Request, SamplingParams, ToolUse

# A blank line between blocks that different parts of a client wrote; an answer's own blocks continue each other.
PARAGRAPH = "\n\n"

Message = dict[str, object]


class Delivery(NamedTuple):
    """How the answer is to be written."""

    stream: bool
    hides_thinking: bool


def parse_messages(
    body: Mapping[str, object],
    *,
    request_id: str,
    tenant: str,
    names: ServedNames,
    sampling_defaults: SamplingParams,
    session_headers: Iterable[str] = (),
) -> tuple[Request, Delivery]:
    """What to ask of the engine, and how to answer.

    Raises ModelNotFoundError and every kind of InvalidRequestError, naming the parameter.
    """
    wanted = validated(MessagesBody, body)
    given = {name: getattr(wanted, name) for name in ("temperature", "top_p", "top_k")}
    user = wanted.metadata.user_id if wanted.metadata else None
    request = replace(
        _prompt(wanted, request_id, tenant, names),
        sampling=replace(sampling_defaults, **{name: value for name, value in given.items() if value is not None}),
        max_tokens=wanted.max_tokens,
        stop=tuple(wanted.stop_sequences or ()),
        session_id=chosen_session(wanted.session_id, session_headers),
        kv_format=normal_kv_format(wanted.kv_format),
        cache_key=user or None,
    )
    display = None if wanted.thinking is None or isinstance(wanted.thinking, ThinkingOff) else wanted.thinking.display
    return request, Delivery(bool(wanted.stream), display == "omitted")


def parse_count(body: Mapping[str, object], *, request_id: str, tenant: str, names: ServedNames) -> Request:
    """The request whose prompt is to be counted. Raises as `parse_messages`."""
    return _prompt(validated(CountTokensBody, body), request_id, tenant, names)


def _prompt(body: PromptBody, request_id: str, tenant: str, names: ServedNames) -> Request:
    adapter = names.adapter_of(body.model)
    for name in ("mcp_servers", "container"):
        if getattr(body, name):
            raise UnsupportedParameterError(f"{name} is not supported: this server runs no tools itself.", param=name)
    messages = plain_messages(body)
    is_prefill = messages[-1]["role"] == "assistant"
    if is_prefill and "tool_calls" in messages[-1]:
        raise InvalidRequestError(
            "messages: tool_use blocks need tool_result blocks in a next message.", param="messages"
        )
    return Request(
        request_id=request_id,
        messages=messages,
        tools=_tools(body),
        constraint=constraint(body, _output_constraint(body)),
        add_generation_prompt=not is_prefill,
        continue_final_message=is_prefill,
        template_kwargs=_template_kwargs(body),
        thinking_tokens=body.thinking.budget_tokens if isinstance(body.thinking, ThinkingOn) else None,
        tenant=tenant,
        adapter=adapter,
    )


# --- messages


def plain_messages(body: PromptBody) -> tuple[Message, ...]:
    """What the chat template sees: text content, tool calls and results in OpenAI's shape, turns that alternate."""
    messages: list[Message] = []
    if isinstance(body.system, str):
        messages.append({"role": "system", "content": body.system})
    elif body.system:
        messages.append({"role": "system", "content": PARAGRAPH.join(block.text for block in body.system)})
    names: dict[str, str] = {}  # of the tools called so far, by the calls' ids
    for index, turn in enumerate(body.messages):
        for message in _of_turn(turn, index, names):
            _append(messages, message)
    return tuple(messages)


def _of_turn(turn: InputMessage, index: int, names: dict[str, str]) -> list[Message]:
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    path = f"messages[{index}].content"
    if turn.role == "assistant":
        return [_answer(turn.content, path, names)]
    messages: list[Message] = []
    for position, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            _append(messages, {"role": turn.role, "content": block.text})
        elif isinstance(block, ToolResultBlock) and turn.role == "user":
            messages.append(_tool_message(block, f"{path}[{position}]", names))
        else:
            raise _refusal(block, f"{path}[{position}]", turn.role)
    return messages or [{"role": turn.role, "content": ""}]


def _answer(blocks: Sequence[Block], path: str, names: dict[str, str]) -> Message:
    text, reasoning, calls = "", "", []
    for position, block in enumerate(blocks):
        match block:
            case TextBlock():
                text += block.text
            case ThinkingBlock():
                reasoning += block.thinking
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                names[block.id] = block.name
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _refusal(block, f"{path}[{position}]", "assistant")
    message: Message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_message(block: ToolResultBlock, path: str, names: Mapping[str, str]) -> Message:
    parts = block.content or ""
    if not isinstance(parts, str):
        for position, part in enumerate(parts):
            if not isinstance(part, TextBlock):
                raise _refusal(part, f"{path}.content[{position}]", "user")
        parts = PARAGRAPH.join(part.text for part in parts if isinstance(part, TextBlock))
    # No template has a field for failures; the model reads of them.
    text = f"Error: {parts}" if block.is_error else parts
    message: Message = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
    if block.tool_use_id in names:
        message["name"] = names[block.tool_use_id]
    return message


def _append(messages: list[Message], message: Message) -> None:
    """Turns of one role in a row are one turn, as in Anthropic's API; many templates insist on alternation."""
    last = messages[-1] if messages else {}
    if message["role"] == "tool" or last.get("role") != message["role"]:
        messages.append(message)
        return
    is_answer = message["role"] == "assistant"
    texts = [str(m["content"]) for m in (last, message) if m["content"]]
    merged = {**last, **message, "content": ("" if is_answer else PARAGRAPH).join(texts)}
    if "tool_calls" in last and "tool_calls" in message:
        merged["tool_calls"] = [*_calls(last), *_calls(message)]
    messages[-1] = merged


def _calls(message: Message) -> list[object]:
    calls = message["tool_calls"]
    assert isinstance(calls, list)
    return calls


def _refusal(block: Block | OtherResultPart, path: str, role: str) -> InvalidRequestError:
    kind = block.type[:64]
    if kind in ("image", "document", "search_result"):
        return InvalidRequestError(f"{path}: {kind} blocks are not supported; this server reads text only.", param=path)
    return InvalidRequestError(f"{path}: blocks of type {kind!r} are not supported in {role} messages.", param=path)


# --- tools, thinking, output


def _tools(body: PromptBody) -> ToolUse | None:
    choice = body.tool_choice
    functions = []
    for index, tool in enumerate(body.tools or ()):
        path = f"tools[{index}]"
        if tool.type not in (None, "custom"):
            raise UnsupportedParameterError(
                f"{path}.type: {tool.type[:64]!r} is a tool of Anthropic's own, which this server does not have; "
                "describe a tool of yours by name and input_schema.",
                param=f"{path}.type",
            )
        if tool.input_schema is None:
            param = f"{path}.input_schema"
            raise InvalidRequestError(f"Missing required parameter: {param}.", param=param)
        function: dict[str, object] = {"name": tool.name, "parameters": tool.input_schema}
        function |= {"description": tool.description} if tool.description is not None else {}
        function |= {"strict": tool.strict} if tool.strict is not None else {}
        functions.append({"type": "function", "function": function})
    wants_call = choice is not None and choice.type in ("any", "tool")
    if not functions:
        if wants_call:
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return None
    if isinstance(choice, NoneChoice):
        return ToolUse(tuple(functions), "none")
    name = choice.name if isinstance(choice, ToolChoice) else None
    if name is not None and name not in {tool.name for tool in body.tools or ()}:
        raise InvalidRequestError("tool_choice.name: no tool has this name.", param="tool_choice.name")
    is_parallel = not (choice and choice.disable_parallel_tool_use)
    return ToolUse(tuple(functions), "required" if wants_call else "auto", name, is_parallel)


def _output_constraint(body: PromptBody) -> Constraint | None:
    """What `output_config.format` or its older name asks for. Raises InvalidRequestError where both are given."""
    named = (
        ("output_config.format.schema", body.output_config.format if body.output_config else None),
        ("output_format.schema", body.output_format),
    )
    given = [Constraint("json_schema", json.dumps(one.schema_), param) for param, one in named if one is not None]
    if len(given) > 1:
        raise second_constraint(given[0].param, given[1].param)
    return given[0] if given else None


def _template_kwargs(body: PromptBody) -> dict[str, object]:
    thinks = None if body.thinking is None else not isinstance(body.thinking, ThinkingOff)
    return thinking_kwargs(thinks, body.output_config.effort if body.output_config else None)
