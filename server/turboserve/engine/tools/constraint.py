"""A grammar of calls, for answers that must be some: in the model's own syntax where that is JSON between markers,
else as the bare objects that `answer_reader` reads from every model.

Arguments are written as `json.dumps` writes them, as models have seen them in training; whitespace left to choice is
where small models lose their way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from turboserve.engine.tools.markup import Markup
from turboserve.messages import Constraint, ToolUse

_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# What may add to a schema's own properties; beside none of these, others than those are a model's invention.
_COMBINING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties"})


class _Syntax(NamedTuple):
    """Around calls, each text a Lark expression: open call (between call)* close, in front of which is free text."""

    open: str
    close: str
    between: str
    call: Callable[[str, str], str]  # a function's name and its arguments' rule


def tool_constraint(use: ToolUse, markup: Markup) -> Constraint | None:
    """What the answer must look like for this use of functions; None: anything.

    required  calls alone, their arguments valid
    auto      with a function that is `strict`, and markers of the model's own around JSON: any text, and in it calls
              whose arguments are valid. Without such markers a call is not told from text before it is whole, and
              `strict` stays a promise of the model's.
    Whether llguidance can enforce the functions' schemas is found out when it compiles the grammar.
    """
    functions = [tool["function"] for tool in use.functions]
    if use.choice == "required":
        chosen = [f for f in functions if isinstance(f, Mapping) and use.name in (None, f["name"])]
        return Constraint("lark", _required(chosen, use, _syntax(markup)), param="tools")
    is_strict = any(isinstance(f, Mapping) and f.get("strict") is True for f in functions)
    if use.choice != "auto" or not is_strict or not _writes_json(markup):
        return None
    known = [f for f in functions if isinstance(f, Mapping)]
    return Constraint("lark", _lazy(known, use, _syntax(markup), markup), param="tools")


def _required(functions: list[Mapping[str, Any]], use: ToolUse, syntax: _Syntax) -> str:
    more = f"({syntax.between} call)*" if use.is_parallel else ""
    return "\n".join([f"start: {syntax.open} call {more} {syntax.close}", *_calls(functions, syntax)])


def _lazy(functions: list[Mapping[str, Any]], use: ToolUse, syntax: _Syntax, markup: Markup) -> str:
    """Text without a start marker, then, once there is one, a call as it must be."""
    text = rf"TEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(markup.call_start)}(?s:.*)/"
    more = "*" if use.is_parallel else "?"
    block = f"block: {syntax.open} call {syntax.close}"
    return "\n".join([f"start: TEXT? (block TEXT?){more}", block, text, *_calls(functions, syntax)])


def _calls(functions: list[Mapping[str, Any]], syntax: _Syntax) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, function in enumerate(functions):
        rules.append(f"call_{index}: {syntax.call(str(function['name']), f'arguments_{index}')}")
        rules.append(f"arguments_{index}: %json {json.dumps(arguments_schema(function))}")
    return rules


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments: an object, with no other properties than those it names.

    A schema that says what else may come, or combines others, is left as it is. What `strict` asks for is then the
    same: OpenAI requires such schemas to name all their properties as required.
    """
    schema = function.get("parameters")
    if not isinstance(schema, Mapping) or not schema:
        schema = _NO_ARGUMENTS
    whole = {"type": "object", **schema, "x-guidance": _JSON_OPTIONS}
    if "additionalProperties" not in whole and not _COMBINING & whole.keys() and "properties" in whole:
        whole["additionalProperties"] = False
    return whole


def _writes_json(markup: Markup) -> bool:
    """Whether the model's own markers hold {"name": ..., "arguments": ...}, as far as its parser reads that."""
    return markup.has_own_calls and markup.parser_name in ("json_tools", "longcat", "mistral", "kimi_k2")


def _syntax(markup: Markup) -> _Syntax:
    start, end = _marker(markup.call_start, markup), _marker(markup.call_end, markup)
    if not _writes_json(markup):
        return _Syntax("", "", r'"\n"', _json_call)
    if markup.parser_name == "kimi_k2":
        return _kimi(start, end, markup)
    if markup.parser_name != "mistral":
        return _Syntax(rf'{start} "\n"', rf'"\n" {end}', rf'"\n" {end} "\n" {start} "\n"', _json_call)
    if "[ARGS]" not in markup.template:
        return _Syntax(f'{start} "["', '"]"', '", "', _json_call)
    arguments = _marker("[ARGS]", markup)
    return _Syntax(start, "", start, lambda name, rule: f"{_literal(name)} {arguments} {rule}")


def _kimi(start: str, end: str, markup: Markup) -> _Syntax:
    begin, middle, close = (_marker(f"<|tool_call_{part}|>", markup) for part in ("begin", "argument_begin", "end"))

    def call(name: str, rule: str) -> str:
        return f"{begin} {_literal(f'functions.{name}:')} /[0-9]{{1,3}}/ {middle} {rule} {close}"

    return _Syntax(start, end, "", call)


def _json_call(name: str, rule: str) -> str:
    before = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
    return f'{_literal(before)} {rule} "}}"'


def _marker(text: str, markup: Markup) -> str:
    """An added token by its id, since llguidance takes no text for one; another text in whichever tokens."""
    if not text:
        return ""
    token = markup.ids_of_added.get(text)
    return f"<[{token}]>" if token is not None else _literal(text)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
