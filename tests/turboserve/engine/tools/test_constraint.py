"""Grammars of calls: what llguidance lets through is what the reader reads, and nothing else is let through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.turboserve.engine.tools import templates
from tests.turboserve.engine.tools.answers import ARGUMENTS, CALLS, PING, TOOLS, WEATHER, function, read

from turboserve.engine.tools.constraint import arguments_schema, tool_constraint
from turboserve.engine.tools.markup import DEFAULT_CALL, Markup, markup_of
from turboserve.errors import InvalidRequestError
from turboserve.messages import Constraint, ToolUse

llguidance = pytest.importorskip("llguidance")
from llguidance.hf import from_tokenizer  # noqa: E402

REQUIRED = ToolUse((WEATHER, PING), "required")
PING_CALL = '{"name": "ping", "arguments": {}}'
WEATHER_CALL = '{"name": "get_weather", "arguments": {"city": "São Paulo", "days": 3}}'


class Model:
    """A tokenizer, its markup, and what a grammar lets it write."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tokenizer = templates.tokenizer_with(*args, **kwargs)
        self.markup = markup_of(self.tokenizer)
        self._vocabulary = from_tokenizer(self.tokenizer._tokenizer)

    def accepts(self, constraint: Constraint | None, text: str) -> bool:
        assert constraint is not None and constraint.kind == "lark"
        grammar = llguidance.LLMatcher.grammar_from_lark(constraint.text)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture(scope="module")
def hermes() -> Model:
    return Model(parser="json_tools")


@pytest.fixture(scope="module")
def bare() -> Model:
    return Model(templates.IGNORANT)


def hermes_call(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def test_calls_and_nothing_else(hermes: Model) -> None:
    constraint = tool_constraint(REQUIRED, hermes.markup)
    assert constraint is not None and constraint.param == "tools"
    one, two = hermes_call(WEATHER_CALL), hermes_call(PING_CALL)
    assert hermes.accepts(constraint, one) and hermes.accepts(constraint, f"{one}\n{two}\n{one}")
    assert read(f"{one}\n{two}", hermes.markup).parsed == [
        ("get_weather", {"city": "São Paulo", "days": 3}),
        ("ping", {}),
    ]
    for wrong in (
        "",
        "Hello",
        f"Hello {one}",
        one + " ",
        one[:-1],
        one.replace("3", '"3"'),
        one.replace('"city"', '"town"'),
        one.replace("get_weather", "get"),
        two.replace("{}", '{"a": 1}'),
        WEATHER_CALL,
    ):
        assert not hermes.accepts(constraint, wrong), wrong


def test_one_function_and_one_call(hermes: Model) -> None:
    named = tool_constraint(ToolUse((WEATHER, PING), "required", "ping"), hermes.markup)
    assert hermes.accepts(named, hermes_call(PING_CALL)) and not hermes.accepts(named, hermes_call(WEATHER_CALL))
    single = tool_constraint(ToolUse((WEATHER, PING), "required", is_parallel=False), hermes.markup)
    assert hermes.accepts(single, hermes_call(PING_CALL))
    assert not hermes.accepts(single, hermes_call(PING_CALL) + "\n" + hermes_call(PING_CALL))


@pytest.mark.parametrize("use", [ToolUse((PING,), "required", "pong"), ToolUse((), "required")])
def test_a_function_that_is_not_there_cannot_be_required(use: ToolUse) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tool_constraint(use, Markup())
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_every_model_can_be_made_to_call(parser: str) -> None:
    """In its own syntax or as bare JSON: what the grammar lets through, the reader of that model reads."""
    model = Model(
        templates.MISTRAL + "[ARGS]" * (parser == "mistral"), special=["[TOOL_CALLS]", "[ARGS]"], parser=parser
    )
    constraint = tool_constraint(REQUIRED, model.markup)
    options = [CALLS[parser], WEATHER_CALL, f"{model.markup.call_start}\n{WEATHER_CALL}\n{model.markup.call_end}"]
    accepted = [text for text in dict.fromkeys(options) if model.accepts(constraint, text)]
    assert len(accepted) == 1
    assert read(accepted[0], model.markup).parsed == [("get_weather", ARGUMENTS)]
    if parser in ("json_tools", "kimi_k2", "mistral"):
        assert accepted == [CALLS[parser]]


def test_mistrals_list() -> None:
    model = Model(templates.MISTRAL, special=["[TOOL_CALLS]", "[ARGS]"], parser="mistral")
    text = f"[TOOL_CALLS][{WEATHER_CALL}, {PING_CALL}]"
    assert model.accepts(tool_constraint(REQUIRED, model.markup), text)
    assert [name for name, _ in read(text, model.markup).calls] == ["get_weather", "ping"]


def test_models_without_markers_write_bare_calls(bare: Model) -> None:
    assert (bare.markup.call_start, bare.markup.call_end) == DEFAULT_CALL and not bare.markup.has_own_calls
    constraint = tool_constraint(REQUIRED, bare.markup)
    assert bare.accepts(constraint, f"{WEATHER_CALL}\n{PING_CALL}") and not bare.accepts(constraint, "x")


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (None, {}, {"a": 1}),
        ({}, {}, {"a": 1}),
        ({"type": "object", "properties": {}}, {}, {"a": 1}),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": 1, "b": 1}),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"a": 1, "b": 1}, []),
        ({"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, {"a": 1}, {"a": "1"}),
        ({"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}]}, {"a": 1}, {"a": 2}),
    ],
)
def test_arguments_are_those_of_the_schema(hermes: Model, parameters: Any, right: object, wrong: object) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    constraint = tool_constraint(ToolUse((tool,), "required"), hermes.markup)
    assert hermes.accepts(constraint, hermes_call(f'{{"name": "f", "arguments": {json.dumps(right)}}}'))
    assert not hermes.accepts(constraint, hermes_call(f'{{"name": "f", "arguments": {json.dumps(wrong)}}}'))


def test_a_schema_cannot_loosen_how_it_is_enforced() -> None:
    schema = arguments_schema({"parameters": {"properties": {}, "x-guidance": {"lenient": True}}})
    assert schema["x-guidance"]["lenient"] is False


def test_names_are_literal(hermes: Model) -> None:
    name = 'a"b\\c\n/é%json {}'
    constraint = tool_constraint(ToolUse((function(name),), "required"), hermes.markup)
    call = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    assert hermes.accepts(constraint, hermes_call(call))


# --- calls that need not come


def strict(choice: Any = "auto") -> ToolUse:
    return ToolUse(({"type": "function", "function": {**WEATHER["function"], "strict": True}}, PING), choice)


def test_nothing_is_ruled_without_need(hermes: Model, bare: Model) -> None:
    assert tool_constraint(TOOLS, hermes.markup) is None
    assert tool_constraint(strict(), bare.markup) is None, "a call without markers is told from text too late"
    assert tool_constraint(strict("none"), hermes.markup) is None


def test_strict_arguments_once_a_call_begins(hermes: Model) -> None:
    constraint = tool_constraint(strict(), hermes.markup)
    call = hermes_call(WEATHER_CALL)
    for right in ("", "Hi <tool> {", call, f"Let me see.\n\n{call}", f"{call}\nand {call}bye"):
        assert hermes.accepts(constraint, right), right
    for wrong in (f"x {call.replace('3', 'three')}", call.replace("get_weather", "get"), "<tool_call>\n"):
        assert not hermes.accepts(constraint, wrong), wrong


def test_an_answer_of_json_or_calls(hermes: Model) -> None:
    schema = Constraint(
        "json_schema", '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    )
    constraint = tool_constraint(TOOLS, hermes.markup, schema)
    assert constraint is not None and constraint.param == "response_format"
    assert hermes.accepts(constraint, '{"n": 1}') and hermes.accepts(constraint, hermes_call(WEATHER_CALL))
    assert not hermes.accepts(constraint, "x") and not hermes.accepts(constraint, '{"n": "1"}')
    any_object = tool_constraint(TOOLS, hermes.markup, Constraint("json_object"))
    assert hermes.accepts(any_object, '{"a": [1]}') and hermes.accepts(any_object, hermes_call(PING_CALL))


@pytest.mark.parametrize(
    "answer", [Constraint("regex", "a+"), Constraint("json_schema", "{"), Constraint("json_schema", "5")]
)
def test_other_answers_stand_alone(answer: Constraint) -> None:
    assert tool_constraint(TOOLS, Markup(), answer) == answer
    assert tool_constraint(ToolUse((PING,), "none"), Markup(), answer) == answer
    required = tool_constraint(REQUIRED, Markup(), answer)
    assert required is not None and required.kind == "lark"
