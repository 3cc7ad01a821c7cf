"""What one chat template expects of conversations with calls, found out by rendering one of ours in several forms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from turboserve.errors import EngineUnavailableError, RequestCancelledError

Render = Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], str]
"""Messages and functions to the prompt's text; raises whatever the template raises."""

_LONG_ID, _SHORT_ID = "call_0123456789abcdef01234567", "a1b2c3d4e"
_FUNCTION, _KEY, _VALUE, _RESULT = "probefunction", "probekey", "probevalue", "proberesult"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How history must be given to one template.

    wants_strings      arguments as JSON text, not as objects
    takes_null         content None beside calls, which transformers leaves out of the message; else ""
    wants_short_ids    ids of nine letters and digits, which Mistral's templates insist on
    describes          the prompt names the functions; where a template ignores them, we describe them
    shows_calls        the prompt names earlier calls; likewise
    shows_results      the prompt has the content of `tool` messages; likewise
    takes_system       a system message may stand first
    """

    wants_strings: bool = False
    takes_null: bool = False
    wants_short_ids: bool = False
    describes: bool = False
    shows_calls: bool = False
    shows_results: bool = False
    takes_system: bool = True


def dialect_of(render: Render) -> Dialect:
    """The first form of history that the template renders rightly; where none is, calls are not shown by it.

    Raises EngineUnavailableError or RequestCancelledError where rendering was not the template's business.
    """
    takes_system = "probesystem" in _try(render, [_text("system", "probesystem"), _text("user", "x")])
    tool = {
        "type": "function",
        "function": {
            "name": _FUNCTION,
            "description": "",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": ""}}},
        },
    }
    describes = _FUNCTION in _try(render, [_text("user", "x")], [tool])
    forms = itertools.product((False, True), (False, True), (True, False))
    for wants_short_ids, wants_strings, takes_null in forms:
        shown = _try(render, _probe(wants_strings, takes_null, wants_short_ids))
        if takes_null and "None" in shown:  # of the content, if the other form does not have it
            other = _try(render, _probe(wants_strings, False, wants_short_ids))
            if other.count("None") < shown.count("None"):
                continue
        if _FUNCTION in shown and _VALUE in shown and not _is_garbled(shown):
            shows_results = _RESULT in shown
            return Dialect(wants_strings, takes_null, wants_short_ids, describes, True, shows_results, takes_system)
    shows_results = _RESULT in _try(render, _probe(False, False, False))
    return Dialect(describes=describes, shows_results=shows_results, takes_system=takes_system)


def _probe(wants_strings: bool, takes_null: bool, wants_short_ids: bool) -> list[dict[str, Any]]:
    arguments: object = {_KEY: _VALUE}
    call_id = _SHORT_ID if wants_short_ids else _LONG_ID
    function = {"name": _FUNCTION, "arguments": json.dumps(arguments) if wants_strings else arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        _text("user", "x"),
        {"role": "assistant", "content": None if takes_null else "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "name": _FUNCTION, "content": _RESULT},
    ]


def _is_garbled(shown: str) -> bool:
    """Python's notation of a dict, or JSON inside a JSON string."""
    return f"'{_KEY}'" in shown or f'\\"{_KEY}' in shown


def _text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _try(render: Render, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
    try:
        return render(messages, tools)
    except (EngineUnavailableError, RequestCancelledError):  # says nothing about the template
        raise
    except Exception:  # templates are programs: anything can come out of one
        return ""
