"""Answers as models of each parser write them, and reading them in pieces."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from turboserve.engine.answer_reader import MarkupReader
from turboserve.engine.tools.markup import Markup
from turboserve.messages import Delta, ReasoningDelta, TextDelta, ToolCallDelta, ToolUse


def function(name: str, required: Sequence[str] = (), **properties: object) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


WEATHER = function("get_weather", ["city"], city={"type": "string"}, days={"type": "integer"})
PING = function("ping")
TOOLS = ToolUse((WEATHER, PING))
ARGUMENTS: dict[str, Any] = {"city": "São Paulo", "days": 3}

HERMES = '{"name": "get_weather", "arguments": {"city": "São Paulo", "days": 3}}'
# One call of get_weather with ARGUMENTS, markers included, as the model of each parser was taught.
CALLS = {
    "function_gemma": "<start_function_call>call:get_weather{city:<escape>São Paulo<escape>,days:3}<end_function_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>São Paulo<|"|>,days:3}<tool_call|>',
    "glm47": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>São Paulo</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
    "json_tools": f"<tool_call>\n{HERMES}\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "São Paulo", "days": 3}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>São Paulo<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "laguna": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>São Paulo</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
    "longcat": "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
    "<longcat_arg_value>São Paulo</longcat_arg_value>\n<longcat_arg_key>days</longcat_arg_key>\n"
    "<longcat_arg_value>3</longcat_arg_value>\n</longcat_tool_call>",
    "minicpm5": '<function name="get_weather"><param name="city">São Paulo</param>'
    '<param name="days">3</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">São Paulo</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "São Paulo", "days": 3}',
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="get_weather">\n'
    '<atem:parameter name="city">São Paulo</atem:parameter>\n<atem:parameter name="days">3</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>",
    "pythonic": '<|tool_call_start|>[get_weather(city="São Paulo", days=3)]<|tool_call_end|>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nSão Paulo\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
}


def markup_for(parser: str, **changes: Any) -> Markup:
    """As a model of this parser has it, special tokens aside."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return Markup(
        call_start=module.tool_call_start,
        call_end=module.tool_call_end,
        parser=module.parse_tool_call,
        parser_name=parser,
        has_own_calls=True,
        **changes,
    )


@dataclass
class Answer:
    """What a client has in the end."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name and arguments

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def joined(deltas: Iterable[Delta]) -> Answer:
    """Joins deltas as clients do, and checks the promises that hold for each of them."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.index == len(calls):
                assert delta.call_id and delta.name, "a call begins with its id and its name"
                calls.append((delta.call_id, delta.name, []))
            else:
                assert delta.index == len(calls) - 1 and not delta.call_id and not delta.name, "calls do not overlap"
            calls[-1][2].append(delta.arguments)
        else:
            assert delta.text or (isinstance(delta, TextDelta) and delta.logprobs)
            (reasoning if isinstance(delta, ReasoningDelta) else text).append(delta.text)
    assert len({call_id for call_id, _, _ in calls}) == len(calls)
    return Answer("".join(text), "".join(reasoning), [(name, "".join(pieces)) for _, name, pieces in calls])


def deltas_of(pieces: Iterable[str], reader: MarkupReader) -> list[Delta]:
    deltas = [delta for piece in pieces for delta in reader.add(piece)]
    return deltas + reader.finish()


def cut(text: str, rng: random.Random, longest: int = 9) -> list[str]:
    pieces = []
    while text:
        num = rng.randint(1, longest)
        pieces.append(text[:num])
        text = text[num:]
    return pieces


def read(text: str, markup: Markup | None = None, tools: ToolUse | None = TOOLS, **options: Any) -> Answer:
    """The answer, whose joined deltas are the same whether the text arrives at once, by character, or cut anyhow."""

    def reader() -> MarkupReader:
        return MarkupReader(markup or Markup(), tools, **options)

    whole = joined(deltas_of([text], reader()))
    for pieces in (list(text), cut(text, random.Random()), cut(text, random.Random(), 40)):
        assert joined(deltas_of(pieces, reader())) == whole, pieces
    return whole
