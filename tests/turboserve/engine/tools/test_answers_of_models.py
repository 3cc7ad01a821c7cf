"""How an answer is read and ruled, from its request, its prompt and its model's markup."""

from __future__ import annotations

from tests.turboserve.engine.tools import templates
from tests.turboserve.engine.tools.answers import CALLS, PING, WEATHER, deltas_of, joined

from turboserve.engine.answer_reader import MarkupReader
from turboserve.engine.answers import decoder_of, reader_of, ruled
from turboserve.engine.decoding import Decoding, all_of
from turboserve.engine.readers import PlainReader
from turboserve.engine.template import ChatTemplate, Prompt
from turboserve.engine.token_texts import TokenTexts
from turboserve.engine.tools.thinking import LastCallRule, ThinkingRule
from turboserve.messages import Request, ToolUse

TOOLS = ToolUse((WEATHER, PING))
PROMPT = Prompt([1], "x")


def test_only_answers_with_markup_are_read() -> None:
    plain = ChatTemplate(templates.tokenizer_with()).markup
    thinking = ChatTemplate(templates.tokenizer_with(templates.THINKING, added=["<think>", "</think>"])).markup
    assert isinstance(reader_of(Request("r"), PROMPT, plain), PlainReader)
    assert isinstance(reader_of(Request("r", tools=ToolUse((PING,), "none")), PROMPT, plain), PlainReader)
    assert isinstance(reader_of(Request("r", prompt="x", tools=TOOLS), PROMPT, thinking), PlainReader)
    assert isinstance(reader_of(Request("r", tools=TOOLS), PROMPT, plain), MarkupReader)
    assert isinstance(reader_of(Request("r"), PROMPT, thinking), MarkupReader)


def test_special_markers_are_seen_by_the_reader_and_no_others() -> None:
    tokenizer = templates.tokenizer_with(
        templates.MISTRAL + "[ARGS]", special=["[TOOL_CALLS]", "[ARGS]", "[CONTROL]"], parser="mistral"
    )
    markup = ChatTemplate(tokenizer).markup
    decoding = Decoding(tokenizer, TokenTexts(tokenizer))
    ids = tokenizer.encode(f"So.[CONTROL] {CALLS['mistral']}", add_special_tokens=False)

    def answer(**options: object) -> str:
        request = Request("r", **options)  # type: ignore[arg-type]
        reader = reader_of(request, PROMPT, markup)
        text = all_of(decoder_of(request, reader, decoding, markup), ids)
        if isinstance(reader, MarkupReader):
            read = joined(deltas_of([text], reader))
            return f"{read.text} + {len(read.calls)}"
        return text

    assert answer(tools=TOOLS) == "So. + 1"
    assert answer() == 'So. get_weather{"city": "São Paulo", "days": 3}'
    assert answer(skip_special_tokens=False) == tokenizer.decode(ids)


def test_rules_of_reasoning_and_of_one_call() -> None:
    markup = ChatTemplate(templates.tokenizer_with(templates.THINKING, added=["<think>", "</think>"])).markup
    request = Request("r", thinking_tokens=5)
    reader = reader_of(request, PROMPT, markup)
    assert isinstance(ruled(request, PROMPT, markup, reader, None), ThinkingRule)
    assert ruled(request, Prompt([1], "x", has_thought=True), markup, reader, None) is None
    assert ruled(Request("r"), PROMPT, markup, reader, None) is None
    single = Request("r", tools=ToolUse((PING,), is_parallel=False))
    assert isinstance(ruled(single, PROMPT, markup, reader_of(single, PROMPT, markup), None), LastCallRule)
    must = Request("r", tools=ToolUse((PING,), "required"))
    assert isinstance(ruled(must, PROMPT, markup, reader_of(must, PROMPT, markup), None), LastCallRule)
    plain = ChatTemplate(templates.tokenizer_with()).markup
    assert ruled(request, PROMPT, plain, PlainReader(), None) is None
