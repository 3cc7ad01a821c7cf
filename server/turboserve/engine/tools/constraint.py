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
from turboserve.errors import InvalidRequestError
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


def tool_constraint(use: ToolUse, markup: Markup, answer: Constraint | None = None) -> Constraint | None:
    """What the answer must look like for this use of functions; None: anything. `answer`: what its text must be.

    required  calls alone, their arguments valid
    auto      with an `answer` of JSON: either that or calls. With a function that is `strict`, and markers of the
              model's own around JSON: any text, and in it calls whose arguments are valid. Without such markers a call
              is not told from text before it is whole, and `strict` stays a promise of the model's.
    Whether llguidance can enforce the functions' schemas is found out when it compiles the grammar. Raises
    InvalidRequestError when the function that must be called is unknown.
    """
    functions = [function for tool in use.functions if isinstance(function := tool.get("function"), Mapping)]
    syntax = _syntax(markup)
    if use.choice == "required":
        chosen = [function for function in functions if use.name in (None, function["name"])]
        if not chosen:
            name = f"{use.name!r} is not among the functions" if use.name is not None else "there are no functions"
            raise InvalidRequestError(f"A call is required, but {name}.", param="tool_choice")
        return Constraint("lark", _grammar("calls", chosen, use, syntax), param="tools")
    if use.choice == "none" or not functions:
        return answer
    if answer is not None:
        schema = _answer_schema(answer)
        if schema is None:
            return answer
        whole = _grammar("answer | calls", functions, use, syntax)
        return Constraint("lark", f"{whole}\nanswer: %json {json.dumps(schema)}", param=answer.param)
    if any(function.get("strict") is True for function in functions) and _writes_json(markup):
        return Constraint("lark", _among_text(functions, use, syntax, markup), param="tools")
    return None


def _grammar(start: str, functions: list[Mapping[str, Any]], use: ToolUse, syntax: _Syntax) -> str:
    more = f"({syntax.between} call)*" if use.is_parallel else ""
    rules = [f"start: {start}", f"calls: {syntax.open} call {more} {syntax.close}"]
    return "\n".join([*rules, *_calls(functions, syntax)])


def _answer_schema(answer: Constraint) -> dict[str, Any] | None:
    """Of an answer that is a JSON object; None: of any other, which stands alone."""
    if answer.kind == "json_object":
        return {"type": "object", "x-guidance": _JSON_OPTIONS}
    try:
        schema = json.loads(answer.text) if answer.kind == "json_schema" else None
    except (ValueError, RecursionError):  # for the grammar's compiler to complain of
        return None
    return {**schema, "x-guidance": _JSON_OPTIONS} if isinstance(schema, dict) else None


def _among_text(functions: list[Mapping[str, Any]], use: ToolUse, syntax: _Syntax, markup: Markup) -> str:
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
