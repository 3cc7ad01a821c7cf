"""Calls in any syntax but streamed JSON: the whole text between the markers, through the model's own parser of mlx-lm.

Parsers are foreign code over a model's text: whatever they raise or return that is no call is a ValueError here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from turboserve.engine.tools.markup import Markup

MAX_PARSED_CHARS = 256 * 1024

# Patterns of some parsers read the whole text again from each of these on, when what it opens is never closed. The
# product of their number and the text's length is bounded, so that no text takes much more than a second.
_STARTS = {
    "function_gemma": ("call:", 200_000_000),
    "gemma4": ("call:", 5_000_000),
    "kimi_k3": ("<|open|>", 10_000_000),
    "pythonic": ("=", 500_000_000),
}

# Between a name and its arguments Mistral's models may put the call's id, which the parser takes for the name.
_MISTRAL_ID = re.compile(r"\[CALL_ID\]\s*[\w-]*\s*(?=\[ARGS\])")


class Call(NamedTuple):
    """A whole call. `arguments` is one JSON object; `call_id` is "" unless the model names its calls."""

    name: str
    arguments: str
    call_id: str = ""


def parse_calls(body: str, markup: Markup, functions: Sequence[Mapping[str, Any]]) -> list[Call]:
    """The calls between a start and an end marker, at least one. Raises ValueError when it holds anything else."""
    start, most = _STARTS.get(markup.parser_name, (body, len(body)))
    if len(body) > MAX_PARSED_CHARS or (body and body.count(start) * len(body) > most):
        raise ValueError("A call of this length is not read.")
    if markup.parser_name == "mistral":
        body = _MISTRAL_ID.sub("", body)
    try:
        parsed = (
            json.loads(body) if markup.parser is None else markup.parser(body, [_plain(tool) for tool in functions])
        )
        found = [_call(item) for item in (parsed if isinstance(parsed, list) else [parsed])]
    except Exception as exc:
        raise ValueError(f"This is no call: {exc}") from exc
    known = {str(tool["function"]["name"]) for tool in functions}
    # What it cannot read, the parser of GLM's models calls a function with one argument `raw`.
    if not found or any(call.arguments.startswith('{"raw": ') and call.name not in known for call in found):
        raise ValueError("This is no call.")
    return found


def _call(item: Any) -> Call:
    name, arguments = item["name"], item.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError("A call has a name and an object of arguments.")
    call_id = item.get("id")
    return Call(
        name.strip(),
        json.dumps(arguments, ensure_ascii=False, allow_nan=False),
        call_id if isinstance(call_id, str) else "",
    )


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that parsers take for granted."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    plain = {key: schema if isinstance(schema, dict) else {} for key, schema in properties.items()}
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": plain}}}
