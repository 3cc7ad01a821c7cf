"""Messages and functions in the form that one model's template expects. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from turboserve.engine.tools.dialect import Dialect
from turboserve.messages import ToolUse

Message = Mapping[str, Any]

_DESCRIPTION = """\
You may call the functions below, where they help. To call one, answer with nothing but a JSON object such as
{"name": <function name>, "arguments": <object of arguments>}
"""


def described_functions(use: ToolUse | None) -> list[dict[str, Any]]:
    """What the template is told of: with choice `none` nothing, since a model calls what it knows of.

    `strict` is between caller and server, and no model has learned it.
    """
    if use is None or use.choice == "none":
        return []
    described = []
    for tool in use.functions:
        function = tool.get("function")
        assert isinstance(function, Mapping)
        described.append({**tool, "function": {key: item for key, item in function.items() if key != "strict"}})
    return described


def shaped_messages(
    messages: Sequence[Message], functions: Sequence[Message], dialect: Dialect, template: str
) -> list[dict[str, Any]]:
    """Copies as the template expects them; what it would ignore of calls stands in their content.

    Arguments that are no JSON object are left as they are: a model wrote them, and is told so by the result.
    """
    names: dict[str, str] = {}
    shaped = [_shaped(message, dialect, template, names) for message in messages]
    if functions and not dialect.describes:
        text = _DESCRIPTION + "\n".join(_json(tool["function"]) for tool in functions)
        shaped = _told(shaped, text, dialect)
    return shaped


def _shaped(message: Message, dialect: Dialect, template: str, names: dict[str, str]) -> dict[str, Any]:
    shaped = {key: value for key, value in message.items() if value is not None or key == "content"}
    if shaped.get("role") == "developer" and "developer" not in template:
        shaped["role"] = "system"
    calls = shaped.pop("tool_calls", None)
    if shaped.get("content") is None and not (calls and dialect.takes_null and dialect.shows_calls):
        shaped["content"] = ""
    reasoning = shaped.get("reasoning_content") or shaped.get("reasoning")
    if reasoning:
        shaped["reasoning_content"] = shaped["reasoning"] = reasoning
    if calls:
        names.update({str(call.get("id")): str(call["function"]["name"]) for call in calls})
        shaped.update(_with_calls(shaped, calls, dialect))
    if shaped.get("role") == "tool":
        return _result(shaped, dialect, names)
    return shaped


def _with_calls(message: Message, calls: Sequence[Message], dialect: Dialect) -> dict[str, Any]:
    if dialect.shows_calls:
        return {"tool_calls": [_call(call, dialect) for call in calls]}
    lines = [
        _json({"name": call["function"]["name"], "arguments": _as_object(call["function"].get("arguments"))})
        for call in calls
    ]
    return {"content": "\n".join(([str(message["content"])] if message["content"] else []) + lines)}


def _call(call: Message, dialect: Dialect) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    arguments = _as_text(arguments) if dialect.wants_strings else _as_object(arguments)
    shaped = {"type": "function", **call, "function": {**function, "arguments": arguments}}
    if dialect.wants_short_ids and "id" in call:
        shaped["id"] = _short_id(str(call["id"]))
    return shaped


def _result(message: dict[str, Any], dialect: Dialect, names: Mapping[str, str]) -> dict[str, Any]:
    call_id = str(message.get("tool_call_id", ""))
    name = message.get("name") or names.get(call_id)
    if not dialect.shows_results:
        return {"role": "user", "content": f"Result of {name or 'the call'}:\n{message['content']}"}
    shaped = {**message, "name": name} if name else message
    if dialect.wants_short_ids and call_id:
        shaped = {**shaped, "tool_call_id": _short_id(call_id)}
    return shaped


def _told(messages: list[dict[str, Any]], text: str, dialect: Dialect) -> list[dict[str, Any]]:
    """With `text` in the system message, or before the first message where the template knows no such role."""
    if dialect.takes_system and (not messages or messages[0].get("role") != "system"):
        return [{"role": "system", "content": text}, *messages]
    first = messages[0] if messages else {"role": "user", "content": ""}
    return [{**first, "content": "\n\n".join(filter(None, (str(first["content"]), text)))}, *messages[1:]]


def _as_object(arguments: object) -> object:
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = orjson.loads(arguments or "{}")
        orjson.dumps(parsed)  # what is nested too deeply to be written again stays text
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: object) -> str:
    return (arguments or "{}") if isinstance(arguments, str) else _json(arguments or {})


def _short_id(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
