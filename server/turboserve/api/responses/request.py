"""From a body of the Responses API to a `messages.Request`: items become messages, settings what they ask for.

Every refusal names the parameter. Messages never quote the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from turboserve.api.chat_tools import constraint
from turboserve.api.model_names import ServedNames
from turboserve.api.responses.body import (
    AllowedTools,
    CallItem,
    Item,
    MessageItem,
    OtherPart,
    OutputItem,
    Part,
    ReasoningItem,
    RefusalPart,
    ResponsesBody,
    ToolName,
)
from turboserve.api.responses.replies import ResponseHead
from turboserve.api.responses.reply_models import FunctionTool, ReasoningSettings, TextSettings
from turboserve.api.responses.store import ResponseStore, StoredResponse
from turboserve.api.session_request import chosen_session, normal_kv_format
from turboserve.api.thinking import thinking_kwargs
from turboserve.errors import (
    InvalidRequestError,
    PreviousResponseError,
    ResponseNotFoundError,
    UnsupportedParameterError,
)
from turboserve.messages import Constraint, Request, SamplingParams, ToolUse

LOGPROBS = "message.output_text.logprobs"

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """What to ask of the engine, what the response says of it, and what is kept for those that continue it."""

    request: Request
    head: ResponseHead
    history: tuple[Json, ...]
    items: tuple[Json, ...]
    stream: bool


def parse_response(
    body: ResponsesBody,
    store: ResponseStore,
    *,
    request_id: str,
    tenant: str,
    names: ServedNames,
    sampling_defaults: SamplingParams,
    session_headers: Iterable[str] = (),
) -> ParsedResponse:
    """What to ask of the engine, and how to answer and to store it.

    Raises ModelNotFoundError and every kind of InvalidRequestError, naming the parameter.
    """
    adapter = names.adapter_of(body.model)
    _refuse_unsupported(body)
    previous = _previous(body, store, tenant)
    history = previous.conversation if previous else ()
    items = _items(body, request_id)
    if not items and not history:
        raise InvalidRequestError("Missing required parameter: input.", param="input")
    tools, tool_choice = _tools(body)
    given = {name: getattr(body, name) for name in ("temperature", "top_p") if getattr(body, name) is not None}
    sampling = replace(sampling_defaults, **given)
    reasoning = body.reasoning
    is_stored = body.store is not False
    session = chosen_session(body.session_id, session_headers) or (previous.session_id if previous else None)
    # What continues a response finds its pages by their tokens; of equally long ones, its own are taken.
    inherited = previous.cache_key if previous else request_id if is_stored else None
    request = Request(
        request_id=request_id,
        messages=messages_of(body.instructions, (*history, *items)),
        sampling=sampling,
        max_tokens=body.max_output_tokens,
        num_top_logprobs=_num_top_logprobs(body),
        tools=tools,
        constraint=constraint(body, _text_constraint(body)),
        template_kwargs=thinking_kwargs(None, reasoning.effort if reasoning else None),
        tenant=tenant,
        session_id=session,
        kv_format=normal_kv_format(body.kv_format) or (previous.kv_format if previous else None),
        cache_key=body.prompt_cache_key or inherited,
        adapter=adapter,
    )
    head = ResponseHead(
        response_id=request_id,
        model=names.name_of(adapter),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=ReasoningSettings(
            effort=reasoning.effort if reasoning else None,
            summary=(reasoning.summary or reasoning.generate_summary) if reasoning else None,
        ),
        is_background=bool(body.background),
        is_stored=is_stored,
        temperature=sampling.temperature,
        text=_text_settings(body),
        tool_choice=tool_choice,
        tools=_described(body),
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
    )
    return ParsedResponse(request, head, history, items, bool(body.stream))


def _refuse_unsupported(body: ResponsesBody) -> None:
    for name in ("prompt", "conversation", "moderation"):
        if getattr(body, name) is not None:
            raise UnsupportedParameterError(f"{name} is not supported by this server.", param=name)
    if body.background and body.store is False:
        raise InvalidRequestError(
            "background=true needs store=true: its answer is asked for later.", param="background"
        )
    if body.background and body.stream:
        raise UnsupportedParameterError(
            "stream is not supported with background=true; ask for the response by its id.", param="stream"
        )


def _previous(body: ResponsesBody, store: ResponseStore, tenant: str) -> StoredResponse | None:
    if body.previous_response_id is None:
        return None
    param = "previous_response_id"
    try:
        previous = store.get(tenant, body.previous_response_id)
    except ResponseNotFoundError as error:
        raise PreviousResponseError(error.message, param=param) from None
    if previous.writer.status not in ("completed", "incomplete"):
        raise PreviousResponseError("The previous response has no answer that could be continued.", param=param)
    return previous


# --- items: as they are kept and listed, all with ids


def _items(body: ResponsesBody, request_id: str) -> tuple[Json, ...]:
    if body.input is None:
        return ()
    if isinstance(body.input, str):
        return (_message_item("user", body.input, f"msg_{request_id.partition('_')[2]}_input_0"),)
    made = (_item(item, index, request_id.partition("_")[2]) for index, item in enumerate(body.input))
    return tuple(made)


def _item(item: Item, index: int, suffix: str) -> Json:
    path = f"input[{index}]"

    def named(prefix: str, own: str | None) -> str:
        return own or f"{prefix}_{suffix}_input_{index}"

    match item:
        case MessageItem():
            text = _text(item.content, f"{path}.content", "" if item.role == "assistant" else "\n")
            return _message_item(item.role, text, named("msg", item.id))
        case CallItem():
            call = item.model_dump(include={"call_id", "name", "arguments"})
            return {"type": "function_call", "id": named("fc", item.id), **call, "status": "completed"}
        case OutputItem():
            output = _text(item.output, f"{path}.output", "\n")
            return {
                "type": "function_call_output",
                "id": named("fco", item.id),
                "call_id": item.call_id,
                "output": output,
                "status": "completed",
            }
        case ReasoningItem():
            summary, content = (_text(parts or [], f"{path}", "\n") for parts in (item.summary, item.content))
            return {
                "type": "reasoning",
                "id": named("rs", item.id),
                "summary": [{"type": "summary_text", "text": summary}] if summary else [],
                "content": [{"type": "reasoning_text", "text": content}] if content else None,
                "encrypted_content": None,
                "status": "completed",
            }
    raise UnsupportedParameterError(
        f"{path}.type: items of type {item.type[:64]!r} are not supported by this server.", param=f"{path}.type"
    )


def _message_item(role: str, text: str, item_id: str) -> Json:
    if role == "assistant":
        part: Json = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    else:
        part = {"type": "input_text", "text": text}
    return {"type": "message", "id": item_id, "role": role, "status": "completed", "content": [part]}


def _text(content: str | Sequence[Part], path: str, separator: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, OtherPart):
            param = f"{path}[{index}].type"
            raise UnsupportedParameterError(
                f"{param}: {part.type[:64]!r} is not supported; this server reads text only.", param=param
            )
        texts.append(part.refusal if isinstance(part, RefusalPart) else part.text)
    return separator.join(texts)


# --- messages: what the chat template sees


def messages_of(instructions: str | None, items: Sequence[Json]) -> tuple[Json, ...]:
    """The conversation: what the assistant thought, said and called between two other turns is one message."""
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    names: dict[object, object] = {}
    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                _answer(messages)["content"] = str(_answer(messages)["content"]) + _joined(item["content"])
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                messages.append({"role": role, "content": _joined(item["content"])})
            case "reasoning":
                thought = _joined(item["content"]) or _joined(item["summary"])
                answer = _answer(messages)
                answer["reasoning_content"] = str(answer.get("reasoning_content", "")) + thought
            case "function_call":
                names[item["call_id"]] = item["name"]
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls = _answer(messages).setdefault("tool_calls", [])
                assert isinstance(calls, list)
                calls.append({"id": item["call_id"], "type": "function", "function": function})
            case _:
                result: Json = {"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]}
                if item["call_id"] in names:
                    result["name"] = names[item["call_id"]]
                messages.append(result)
    return tuple(messages)


def _answer(messages: list[Json]) -> Json:
    """The assistant's message that is being put together."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _joined(parts: object) -> str:
    assert parts is None or isinstance(parts, list)
    return "".join(part["text"] for part in parts or ())


# --- tools


def _described(body: ResponsesBody) -> list[FunctionTool]:
    tools = []
    for index, tool in enumerate(body.tools or ()):
        if tool.type != "function":
            param = f"tools[{index}].type"
            raise UnsupportedParameterError(
                f"{param}: tools of type {tool.type[:64]!r} are not supported; this server knows functions only.",
                param=param,
            )
        if tool.name is None:
            param = f"tools[{index}].name"
            raise InvalidRequestError(f"Missing required parameter: {param}.", param=param)
        described = tool.model_dump(include={"name", "description", "parameters", "strict"})
        tools.append(FunctionTool(**described))
    return tools


def _tools(body: ResponsesBody) -> tuple[ToolUse | None, str | dict[str, object]]:
    """What the engine is told, and what the response says of the choice."""
    described, choice = _described(body), body.tool_choice
    echoed = choice.model_dump(exclude_none=True) if choice is not None and not isinstance(choice, str) else choice
    name, must_call, allowed = None, choice == "required", {tool.name for tool in described}
    if isinstance(choice, AllowedTools):
        if not choice.tools:
            raise InvalidRequestError("tool_choice.tools: must not be empty.", param="tool_choice.tools")
        must_call = choice.mode == "required"
        allowed = {_function_name(one, f"tool_choice.tools[{i}]", allowed) for i, one in enumerate(choice.tools)}
    elif isinstance(choice, ToolName):
        must_call, name = True, _function_name(choice, "tool_choice", allowed)
    if not described:
        if must_call:
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return None, echoed or "auto"
    functions = tuple(_function(tool) for tool in described if tool.name in allowed)
    use = ToolUse(
        functions,
        "none" if choice == "none" else "required" if must_call else "auto",
        name,
        is_parallel=body.parallel_tool_calls is not False,
    )
    return (use if functions else None), echoed or "auto"


def _function_name(choice: ToolName, path: str, known: set[str]) -> str:
    if choice.type != "function":
        raise UnsupportedParameterError(
            f"{path}.type: tools of type {choice.type[:64]!r} are not supported.", param=f"{path}.type"
        )
    if choice.name is None or choice.name not in known:
        raise InvalidRequestError(f"{path}.name: no tool has this name.", param=f"{path}.name")
    return choice.name


def _function(tool: FunctionTool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


# --- text


def _text_constraint(body: ResponsesBody) -> Constraint | None:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Constraint("json_object", param="text.format")
    if wanted.schema_ is None:
        raise InvalidRequestError("Missing required parameter: text.format.schema.", param="text.format.schema")
    return Constraint("json_schema", json.dumps(wanted.schema_), "text.format.schema")


def _text_settings(body: ResponsesBody) -> TextSettings:
    wanted = body.text.format if body.text else None
    described = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
    if described["type"] == "json_schema":
        described.setdefault("name", "answer")  # clients cannot read a format without one
    return TextSettings(format=described, verbosity=body.text.verbosity if body.text else None)


def _num_top_logprobs(body: ResponsesBody) -> int | None:
    if LOGPROBS in (body.include or ()) or body.top_logprobs:
        return body.top_logprobs or 0
    return None
