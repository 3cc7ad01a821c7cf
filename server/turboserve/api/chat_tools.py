"""What the answer must be: calls of functions, or text of a certain form, from the body to `ToolUse` and `Constraint`.

Whether a schema or a grammar can be enforced is the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import orjson

from turboserve.api.chat_body import (
    AllowedToolsChoice,
    ChatBody,
    ConstraintFields,
    Function,
    FunctionName,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
)
from turboserve.api.validation import json_text
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint, ConstraintKind, ToolUse

NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}}


def tool_use(chat: ChatBody) -> ToolUse | None:
    """The functions that the body offers and what it asks about them. Raises InvalidRequestError, naming the place."""
    if chat.functions or chat.function_call is not None:
        return _legacy_tool_use(chat)
    functions = [tool.function for tool in chat.tools or ()]
    _check_functions(functions, "tools[{}].function")
    is_parallel = chat.parallel_tool_calls is not False
    choice = chat.tool_choice
    if not functions:
        if choice not in (None, "auto", "none"):
            raise InvalidRequestError("tool_choice asks for a call, but there are no tools.", param="tool_choice")
        return None
    if isinstance(choice, NamedTool):
        _check_offered(choice.function.name, functions, "tool_choice.function.name")
        return ToolUse(_plain(functions), "required", choice.function.name, is_parallel)
    if isinstance(choice, AllowedToolsChoice):
        allowed = [tool.function.name for tool in choice.allowed_tools.tools]
        for place, name in enumerate(allowed):
            _check_offered(name, functions, f"tool_choice.allowed_tools.tools[{place}].function.name")
        functions = [function for function in functions if function.name in allowed]
        return ToolUse(_plain(functions), choice.allowed_tools.mode, None, is_parallel)
    return ToolUse(_plain(functions), "required" if choice == "any" else choice or "auto", None, is_parallel)


def _legacy_tool_use(chat: ChatBody) -> ToolUse | None:
    """`functions` and `function_call`: one answer holds one call at most."""
    if chat.tools or chat.tool_choice not in (None, "auto", "none"):
        raise InvalidRequestError("functions and tools exclude each other.", param="functions")
    functions, choice = chat.functions or [], chat.function_call
    _check_functions(functions, "functions[{}]")
    if isinstance(choice, FunctionName):
        _check_offered(choice.name, functions, "function_call.name")
        return ToolUse(_plain(functions), "required", choice.name, is_parallel=False)
    return ToolUse(_plain(functions), choice or "auto", is_parallel=False) if functions else None


def _check_functions(functions: Sequence[Function], place: str) -> None:
    seen = set()
    for index, function in enumerate(functions):
        if function.name in seen:
            param = place.format(index) + ".name"
            raise InvalidRequestError(f"{param}: an earlier function has the same name.", param=param)
        seen.add(function.name)
        param = place.format(index) + ".parameters"
        json_text(function.parameters, param)
        if (function.parameters or {}).get("type", "object") != "object":
            raise InvalidRequestError(f'{param}: expected a JSON schema of "type": "object".', param=param)


def _check_offered(name: str, functions: Sequence[Function], param: str) -> None:
    if all(function.name != name for function in functions):
        raise InvalidRequestError(f"{param}: no function of this name is offered.", param=param)


def _plain(functions: Sequence[Function]) -> tuple[Mapping[str, object], ...]:
    """As tool objects with what templates are written for, in the order they are written for."""
    plain = []
    for function in functions:
        described: dict[str, object] = {"name": function.name}
        if function.description is not None:
            described["description"] = function.description
        described["parameters"] = function.parameters or NO_PARAMETERS
        if function.strict is not None:
            described["strict"] = function.strict
        plain.append({"type": "function", "function": described})
    return tuple(plain)


class _Given(NamedTuple):
    """A constraint as a field of the body spells it; `value` None: not given."""

    param: str
    kind: ConstraintKind
    value: object


def constraint(body: ConstraintFields, own: Constraint | None = None) -> Constraint | None:
    """The one constraint on the answer's text, None for any text. `own` is what a field of the route's own asks for.

    Raises InvalidRequestError where there are two, naming the second.
    """
    outputs = body.structured_outputs
    if outputs is not None and not outputs.model_fields_set:
        raise InvalidRequestError(
            "structured_outputs: expected one of json, json_object, regex, choice and grammar.",
            param="structured_outputs",
        )
    fields = [
        _response_format(body.response_format),
        _Given("json_schema", "json_schema", body.json_schema),
        _Given("guided_json", "json_schema", body.guided_json),
        _Given("guided_regex", "regex", body.guided_regex),
        _Given("guided_choice", "choice", body.guided_choice),
        _Given("guided_grammar", "lark", body.guided_grammar),
    ]
    if outputs is not None:
        fields += [
            _Given("structured_outputs.json", "json_schema", outputs.json_),
            _Given("structured_outputs.json_object", "json_object", "{}" if outputs.json_object else None),
            _Given("structured_outputs.regex", "regex", outputs.regex),
            _Given("structured_outputs.choice", "choice", outputs.choice),
            _Given("structured_outputs.grammar", "lark", outputs.grammar),
        ]
    given = [field for field in fields if field.value is not None]
    params = [*([own.param] if own is not None else ()), *(field.param for field in given)]
    if len(params) > 1:
        raise second_constraint(*params[:2])
    return _constraint(given[0]) if given else own


def second_constraint(first: str, second: str) -> InvalidRequestError:
    """The error for two constraints, by the names of their fields."""
    return InvalidRequestError(f"{second}: {first} constrains the answer already.", param=second)


def _response_format(wanted: ResponseFormat | None) -> _Given:
    param = "response_format"
    if isinstance(wanted, JsonSchemaFormat):
        return _Given(f"{param}.json_schema.schema", "json_schema", wanted.json_schema.schema_ or {})
    if isinstance(wanted, JsonObjectFormat):
        if wanted.schema_ is not None:
            return _Given(f"{param}.schema", "json_schema", wanted.schema_)
        return _Given(param, "json_object", "{}")
    return _Given(param, "json_object", None)


def _constraint(given: _Given) -> Constraint:
    if given.kind == "json_object":
        return Constraint("json_object", "", given.param)
    if given.kind == "json_schema" and isinstance(given.value, str):
        return Constraint("json_schema", _schema_text(given.value, given.param), given.param)
    text = given.value if isinstance(given.value, str) else json_text(given.value, given.param)
    return Constraint(given.kind, text, given.param)


def _schema_text(text: str, param: str) -> str:
    """A schema that was sent as text, which has to be an object's."""
    try:
        is_object = isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        is_object = False
    if not is_object:
        raise InvalidRequestError(f"{param}: expected a JSON schema, as an object or as its text.", param=param)
    return text
