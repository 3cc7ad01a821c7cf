"""Answers to deltas: calls of every parser, calls without markers, reasoning, and what is none of them."""

from __future__ import annotations

import json
import pkgutil
import random
import re
import time
from itertools import pairwise
from typing import Any

import mlx_lm.tool_parsers
import pytest
from tests.turboserve.engine.tools.answers import (
    ARGUMENTS,
    CALLS,
    HERMES,
    PING,
    TOOLS,
    WEATHER,
    Answer,
    cut,
    deltas_of,
    joined,
    markup_for,
    read,
)

from turboserve.engine.answer_reader import MarkupReader
from turboserve.engine.tools.markup import Markup
from turboserve.messages import ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta, ToolUse

WANTED = ("get_weather", ARGUMENTS)
THINKING = Markup(think_start="<think>", think_end="</think>")


def test_every_shipped_parser_has_a_call_here() -> None:
    assert {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)} == CALLS.keys()


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_a_call_of_each_parser_is_read_however_it_is_cut(parser: str) -> None:
    answer = read("I shall look.\n\n" + CALLS[parser], markup_for(parser))
    assert answer.text == "I shall look." and answer.parsed == [WANTED]


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_several_calls_of_each_parser(parser: str) -> None:
    answer = read(CALLS[parser] + "\n" + CALLS[parser], markup_for(parser))
    assert answer.text == "" and answer.parsed == [WANTED, WANTED]


@pytest.mark.parametrize("parser", sorted(CALLS.keys() - {"mistral"}))
def test_text_follows_a_call_of_each_parser(parser: str) -> None:
    answer = read(CALLS[parser] + "\nThat was it.", markup_for(parser))
    assert answer.text == "That was it." and answer.parsed == [WANTED]


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_what_is_no_call_between_markers_is_text(parser: str) -> None:
    markup = markup_for(parser)
    text = f"So: {markup.call_start} \x01 ({markup.call_end} and on."
    answer = read(text, markup)
    assert answer == Answer(text if markup.call_end else text.rstrip())


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_an_unterminated_call_is_never_whole(parser: str) -> None:
    """A call that ran out of tokens must not be executed: it is text, or its arguments are no JSON."""
    markup, call = markup_for(parser), CALLS[parser]
    for num in range(len(markup.call_start), call.rindex("3")):
        answer = read(call[:num], markup)
        if answer.calls:
            with pytest.raises(json.JSONDecodeError):
                json.loads(answer.calls[0][1])
        else:
            assert answer.text == call[:num]


def test_arguments_grow_and_are_a_prefix_of_the_whole() -> None:
    """Every piece adds to what a client can show; nothing is taken back."""
    reader, arguments, sizes = MarkupReader(markup_for("json_tools"), TOOLS), "", []
    for char in CALLS["json_tools"]:
        for delta in reader.add(char):
            assert isinstance(delta, ToolCallDelta)
            arguments += delta.arguments
        sizes.append(len(arguments))
    assert arguments == '{"city": "São Paulo", "days": 3}'
    assert max(b - a for a, b in pairwise(sizes)) <= 2, "each character went out at once, a number with the next one"


@pytest.mark.parametrize(
    "text",
    [
        HERMES,
        HERMES.replace('"arguments"', '"parameters"'),
        f"[{HERMES}]",
        f"```json\n{HERMES}\n```",
        f"```\n{HERMES}```\n",
        f"<tools>\n{HERMES}\n</tools>",
        f"<function_call>{HERMES}</function_call>",
        f"<|python_tag|>{HERMES}",
        f"{HERMES}}}",
        '{"arguments": {"city": "São Paulo", "days": 3}, "name": "get_weather"}',
        '{"type": "function", "name": "get_weather", "arguments": {"city": "São Paulo", "days": 3}}',
        json.dumps({"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}),
        json.dumps({"name": "get_weather", "arguments": ARGUMENTS}, indent=4),
    ],
)
def test_calls_without_markers(text: str) -> None:
    assert read(text) == Answer(calls=[("get_weather", read(text).calls[0][1])])
    answer = read("Sure:\n" + text + "\n\nDone.")
    assert answer.text == "Sure:Done." and answer.parsed == [WANTED]


@pytest.mark.parametrize("between", ["\n", ", ", "; ", ""])
def test_several_calls_without_markers(between: str) -> None:
    ping = '{"name": "ping", "arguments": {}}'
    assert read(HERMES + between + ping).parsed == [WANTED, ("ping", {})]
    assert read(f"```json\n{HERMES}{between}{ping}\n```").parsed == [WANTED, ("ping", {})]


@pytest.mark.parametrize(
    "text",
    [
        '{"city": "Paris"}',
        '{"name": "Bob", "arguments": {"a": 1}}',
        '{"name": "get_weather"}',  # it needs a city
        '{"name": "get_weather", "description": "", "parameters": {"type": "object"}}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": "get_weather", "arguments": "Paris"}',
        '{"name": 5, "arguments": {}}',
        "{'name': 'get_weather', 'arguments': {}}",
        'Write {"name": "get_weather", "arguments": {}} for this.',
        "[1] a paper\n[2] another",
        "[]",
        "{",
        "```json\n{}\n```\n",
        "```python\nprint({1: [2]})\n```",
        "```\n\n```",
        "a <tools> b",
        "<function_call",
        "a < b, b <tool, <tool_cal",
        " \n \n leading and trailing \n\n ",
        '{"name": "get_weather", "argum',
        "\n" * 300 + " " * 300 + "x" + "\n" * 300,
        "\n" + " " * 64 + "{" + "\n" + " " * 65 + "[ 1",
    ],
)
def test_what_is_no_call_stays_as_it_was(text: str) -> None:
    assert read(text) == Answer(text)


def test_a_call_that_needs_no_arguments_may_have_none() -> None:
    assert read('{"name": "ping"}').parsed == [("ping", {})]
    assert read('<tool_call>{"name": "ping", "arguments": null}</tool_call>').parsed == [("ping", {})]


def test_unknown_functions_are_called_by_markers_alone() -> None:
    call = '{"name": "unheard_of", "arguments": {}}'
    assert read(call) == Answer(call)
    assert read(f"<tool_call>{call}</tool_call>").parsed == [("unheard_of", {})]


def test_without_functions_everything_is_text() -> None:
    text = f"x\n<tool_call>{HERMES}</tool_call>\n{HERMES}  "
    assert read(text, tools=None) == Answer(text)
    assert read(text, tools=ToolUse((WEATHER,), "none")) == Answer(text)


def test_raw_line_breaks_in_strings_become_json() -> None:
    answer = read('<tool_call>{"name": "ping", "arguments": {"a": "x\ny\t\x01\\n\\u00e9"}}</tool_call>')
    assert answer.parsed == [("ping", {"a": "x\ny\t\x01\né"})]


@pytest.mark.parametrize("value", ["01", "1.", "tru", "+1", "NaN", '"\\x"', "'a'", "[1,]", '{"a" 1}', "-"])
def test_arguments_that_are_no_json_are_not_completed(value: str) -> None:
    answer = read(f'<tool_call>{{"name": "ping", "arguments": {{"a": {value}}}}}</tool_call> x')
    (name, arguments), text = answer.calls[0], answer.text
    assert name == "ping" and arguments + text.removesuffix("}</tool_call> x") == f'{{"a": {value}}}', "nothing is lost"
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_a_missing_end_marker_ends_no_call() -> None:
    assert read(f"<tool_call>\n{HERMES}\n<tool_call>\n{HERMES}").parsed == [WANTED, WANTED]


def test_markers_inside_arguments_are_text() -> None:
    arguments = {"city": "</tool_call><tool_call> <think>"}
    call = json.dumps({"name": "get_weather", "arguments": arguments})
    assert read(f"<tool_call>{call}</tool_call>", THINKING).parsed == [("get_weather", arguments)]


def test_mistrals_list_and_ids_of_calls() -> None:
    markup = markup_for("mistral")
    assert read(f'[TOOL_CALLS] [{HERMES}, {{"name": "ping", "arguments": {{}}}}]', markup).parsed == [
        WANTED,
        ("ping", {}),
    ]
    named = CALLS["mistral"].replace("[ARGS]", "[CALL_ID]a1b2c3d4e[ARGS]")
    assert read(named, markup).parsed == [WANTED]


def test_ids_are_fresh_unless_the_model_names_its_calls() -> None:
    first = deltas_of([HERMES], MarkupReader(Markup(), TOOLS))[0]
    assert isinstance(first, ToolCallDelta) and re.fullmatch(r"call_[0-9a-f]{24}", first.call_id)
    kimi = deltas_of([CALLS["kimi_k2"]], MarkupReader(markup_for("kimi_k2"), TOOLS))[0]
    assert isinstance(kimi, ToolCallDelta) and kimi.call_id == "functions.get_weather:0"  # which its template needs


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_one_call_alone(parser: str) -> None:
    single = ToolUse((WEATHER, PING), is_parallel=False)
    reader = MarkupReader(markup_for(parser), single)
    deltas = deltas_of(cut(CALLS[parser] + CALLS[parser] + " and on", random.Random()), reader)
    assert joined(deltas).parsed == [WANTED] and reader.is_over and reader.has_tool_calls
    assert not any(isinstance(delta, TextDelta) for delta in deltas)


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_calls_that_must_be_made_end_with_the_first_repeat(parser: str) -> None:
    """Under `auto` the model ends its answer itself."""
    for choice in ("required", "auto"):
        reader = MarkupReader(markup_for(parser), ToolUse((WEATHER, PING), choice))
        deltas = deltas_of(cut(CALLS[parser] * 3, random.Random()), reader)
        assert joined(deltas).parsed == [WANTED] * (2 if choice == "required" else 3)
        assert reader.is_over == (choice == "required")


def test_different_calls_go_on_for_as_long_as_is_sensible() -> None:
    reader = MarkupReader(Markup(), ToolUse((WEATHER, PING), "required"))
    calls = [HERMES.replace("São Paulo", f"City {i}") for i in range(40)]
    assert len(set(calls)) == 40
    assert len(joined(deltas_of(calls, reader)).parsed) == 32 and reader.is_over


# --- reasoning


def test_reasoning_is_told_apart() -> None:
    assert read("<think>\nHm.\n\n</think>\n\nYes.", THINKING) == Answer("Yes.", "Hm.")
    assert read("\n<think>Hm</think>Yes", THINKING, tools=None) == Answer("Yes", "Hm")
    assert read("Hm.\n</think>\nYes", THINKING, is_thinking=True) == Answer("Yes", "Hm.")
    assert read("<think>\nHm</think>Yes", THINKING, is_thinking=True) == Answer("Yes", "Hm")
    assert read("<think></think>Yes", THINKING) == Answer("Yes")
    assert read("<think>never ends </thin", THINKING) == Answer("", "never ends </thin")
    assert read("The tag <think> opens.", THINKING) == Answer("The tag <think> opens.")


def test_reasoning_before_and_between_calls() -> None:
    text = f"<think>a</think>\n{CALLS['json_tools']}\n<think>b</think>\n{HERMES}"
    answer = read(text, THINKING)
    assert (answer.text, answer.reasoning) == ("", "ab") and answer.parsed == [WANTED, WANTED]


def test_a_call_within_reasoning_is_reasoning() -> None:
    assert read(f"<think>I could\n{HERMES}</think>No.", THINKING) == Answer("No.", f"I could\n{HERMES}")


def test_reasoning_tokens_are_counted() -> None:
    reader = MarkupReader(THINKING)
    for token in ["<think>", "a", "", "b", "</think>", "c", "d"]:
        reader.add(token)
    reader.add("e", num_tokens=0)
    assert reader.num_reasoning_tokens == 5


# --- special tokens and logprobs


def test_markers_that_are_special_tokens_never_reach_users() -> None:
    special = {1: "[TOOL_CALLS]", 2: "[ARGS]", 3: "[/THINK]", 4: "[THINK]"}
    markup = markup_for("mistral", visible_ids=special, think_start="[THINK]", think_end="[/THINK]")

    def answer(text: str, **options: bool) -> Answer:
        pieces = re.split(r"(\[[A-Z/_]+\])", text)  # each special token's text comes whole
        return joined(deltas_of(filter(None, pieces), MarkupReader(markup, TOOLS, **options)))

    read = answer("[THINK]a[ARGS]b[/THINK]So[ARGS]. " + CALLS["mistral"])
    assert (read.text, read.reasoning) == ("So.", "ab") and read.parsed == [WANTED]
    assert answer("x[TOOL_CALLS]nothing[ARGS]").text == "xnothing"
    assert answer("x [ARGS] y", shows_special=True).text == "x [ARGS] y"


def test_logprobs_go_with_text_and_not_with_calls() -> None:
    def one(token: int) -> tuple[TokenLogprob, ...]:
        return (TokenLogprob("", b"", -1.0, token),)

    reader = MarkupReader(THINKING, TOOLS)
    tokens = ["<think>", "a", "</think>", "\n", "Yes", " ", "sir", "\n", "<tool_call>", HERMES, "</tool_call>"]
    deltas = [delta for i, token in enumerate(tokens) for delta in reader.add(token, one(i))] + reader.finish()
    texts = [delta for delta in deltas if isinstance(delta, TextDelta)]
    assert [(d.text, [each.token_id for each in d.logprobs]) for d in texts] == [("Yes", [3, 4]), (" sir", [5, 6])]
    assert [d.text for d in deltas if isinstance(d, ReasoningDelta)] == ["a"]


def test_logprobs_of_text_that_never_comes_are_still_told() -> None:
    reader = MarkupReader(Markup(), TOOLS)
    logprob = TokenLogprob("", b"", -1.0, 7)
    assert reader.add(" ", (logprob,)) == []
    assert reader.finish() == [TextDelta(" ", (logprob,))]


# --- long and strange answers


def adversarial() -> dict[str, str]:
    num = 60_000
    call = '<tool_call>{"name": "ping", "arguments": {"x": '
    return {
        "deep": call + "[" * num + "]" * num + "}}</tool_call>",
        "deep and open": call + '{"a":' * (num // 5),
        "blanks": "\n" * num,
        "blanks in a fence": "```json\n" + " " * num,
        "brackets": "[" * num,
        "lines of brackets": "[\n" * (num // 2),
        "no call": "<tool_call>" + "x" * num,
        "long name": '{"name": "' + "x" * num,
        "long number": call + "1" * num,
        "backslashes": call + '"' + "\\" * num,
        "fences": "```\n" * (num // 4),
        "starts": "<tool_call>" * (num // 11),
        "thinking": "<think>" * (num // 7),
        "separators": CALLS["json_tools"] + ",;" * (num // 2),
        "megabyte": call + '"' + "abc\\n déf " * (num // 5) + '"}}</tool_call>',
    }


@pytest.mark.parametrize("kind", sorted(adversarial()))
def test_reading_takes_time_in_proportion(kind: str) -> None:
    """Four times the text takes about four times as long, and nothing is so deep that it fails.

    Of the processor's time, for what else the machine does says nothing of it.
    """

    def seconds(text: str) -> float:
        begun = time.thread_time()
        deltas_of((text[i : i + 4] for i in range(0, len(text), 4)), MarkupReader(THINKING, TOOLS))
        return time.thread_time() - begun

    text = adversarial()[kind]
    whole = min(seconds(text) for _ in range(2))
    part = min(seconds(text[: len(text) // 4]) for _ in range(2))
    assert whole < 10 * part + 0.1


@pytest.mark.parametrize("parser", sorted(CALLS))
def test_no_text_keeps_a_parser_for_long(parser: str) -> None:
    """Openings that nothing closes: without a bound on them, gemma4's pattern takes two minutes for this length."""
    markup = markup_for(parser)
    for opening in ("call:f{", 'call:f{<|"|>', "<|open|>call ", "[f(", "f<arg_key>", "<function=f>", "[ARGS]"):
        body = opening * (100_000 // len(opening))
        begun = time.thread_time()
        deltas_of([f"{markup.call_start}{body}{markup.call_end}"], MarkupReader(markup, TOOLS))
        assert time.thread_time() - begun < 10.0


def test_a_megabyte_of_arguments_arrives_whole() -> None:
    arguments = {"text": 'abc\n dé"f\\ ' * 100_000, "deep": [[[{}]]] * 10}
    call = json.dumps({"name": "ping", "arguments": arguments}, ensure_ascii=False)
    assert joined(deltas_of(cut(call, random.Random(), 50), MarkupReader(Markup(), TOOLS))).parsed == [
        ("ping", arguments)
    ]


@pytest.mark.parametrize("place", range(20))
def test_random_json_is_read_as_json_reads_it(place: int, seed: int) -> None:
    rng = random.Random(seed + place)

    def value(depth: int) -> Any:
        kind = rng.randrange(7 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 6:
            return {text(): value(depth - 1) for _ in range(rng.randrange(4))}
        return [None, True, rng.uniform(-1e9, 1e9), rng.randrange(-100, 10**12), text()][kind]

    def text() -> str:
        return "".join(rng.choice('ab "\\\n\t{}[]<>/é😀:,') for _ in range(rng.randrange(12)))

    arguments = {text(): value(4) for _ in range(5)}
    written = json.dumps(arguments, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
    answer = read(f'<tool_call>{{"name": "ping", "arguments": {written}}}</tool_call>')
    assert answer.calls == [("ping", written)] and answer.parsed == [("ping", arguments)], seed
