"""Calls of functions end to end: the embedded model's answers at temperature 1, and questions about its prompts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jsonschema
import pytest
from tests.turboserve.engine.fakes import Sink
from tests.turboserve.engine.tools.answers import PING, WEATHER, Answer, joined
from transformers import PreTrainedTokenizerBase

from turboserve.engine.engine import TurboEngine
from turboserve.engine.loading import build_parts
from turboserve.errors import ContextLengthError, InvalidRequestError
from turboserve.messages import (
    Constraint,
    Detokenize,
    Failed,
    Finished,
    RenderTemplate,
    Request,
    SamplingParams,
    TextQuestion,
    Tokenize,
    ToolUse,
)
from turboserve.settings import Settings

TIMEOUT_S = 120.0  # generous: only a hang reaches it
USER = ({"role": "user", "content": "How is the weather in Paris today?"},)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TurboEngine]:
    settings = Settings(kv_format="f16", kv_budget="256MiB", cache_dir=tmp_path_factory.mktemp("cache"))
    engine = TurboEngine(settings, build_parts, model_id="tiny")
    engine.start()
    engine.wait_until_ready(TIMEOUT_S)
    yield engine
    engine.stop()


def submit(engine: TurboEngine, messages: Any = USER, **options: Any) -> Sink:
    sink, seed = Sink(), secrets.randbits(31)
    print(f"seed={seed}")  # pytest shows it when the test fails
    options = {"sampling": SamplingParams(temperature=1.0, seed=seed), "max_tokens": 200, **options}
    engine.submit(Request(secrets.token_hex(4), messages, **options), sink)
    return sink


def answer_of(sink: Sink) -> Answer:
    assert sink.ended.wait(TIMEOUT_S) and isinstance(sink.events[-1], Finished), sink.events[-1]
    return joined(event for event in sink.events if not isinstance(event, Finished | Failed))


def ask(engine: TurboEngine, question: TextQuestion) -> Any:
    future: Future[Any] = engine.ask(question)
    return future.result(TIMEOUT_S)


def test_required_calls_are_valid_calls_and_nothing_else(engine: TurboEngine) -> None:
    anything = [submit(engine, tools=ToolUse((WEATHER, PING), "required", is_parallel=False)) for _ in range(4)]
    named = [submit(engine, tools=ToolUse((WEATHER, PING), "required", "get_weather", False)) for _ in range(2)]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, PING)}
    num_whole = 0
    for sink in (*anything, *named):
        answer = answer_of(sink)
        assert answer.text == "" and len(answer.calls) == 1
        if sink.finished.reason == "length":  # a model that draws at random may write a long name of a city
            continue
        num_whole += 1
        assert sink.finished.reason == "tool_calls"
        (name, arguments) = answer.parsed[0]
        jsonschema.validate(arguments, schemas[name], cls=jsonschema.Draft202012Validator)
    assert num_whole, "none came to its end"
    assert all(name == "get_weather" for sink in named for name, _ in answer_of(sink).calls)


def test_the_demonstration_model_calls_functions_of_its_own_accord(engine: TurboEngine) -> None:
    sink = submit(engine, tools=ToolUse((WEATHER, PING)), sampling=SamplingParams(temperature=0.0))
    answer = answer_of(sink)
    print(answer)
    assert sink.finished.reason == ("tool_calls" if answer.calls else "stop")


def test_a_forced_text_is_a_call_only_where_calls_may_come(engine: TurboEngine) -> None:
    """The same tokens: a call for who offered functions, text for others."""
    call = '{"name": "ping", "arguments": {}}'
    forced = Constraint("choice", json.dumps([call]))
    offered = submit(engine, tools=ToolUse((PING,)), constraint=forced)
    assert answer_of(offered).calls == [("ping", "{}")] and offered.finished.reason == "tool_calls"
    for tools in (None, ToolUse((PING,), "none")):
        plain = submit(engine, tools=tools, constraint=forced)
        assert answer_of(plain) == Answer(call) and plain.finished.reason == "stop"


def test_one_call_ends_the_answer(engine: TurboEngine) -> None:
    call = '{"name": "ping", "arguments": {}}'
    forced = Constraint("choice", json.dumps([f"{call}\n{call}\n and more of this and that"]))
    several = submit(engine, tools=ToolUse((PING,)), constraint=forced)
    single = submit(engine, tools=ToolUse((PING,), is_parallel=False), constraint=forced)
    assert len(answer_of(several).calls) == 2 and len(answer_of(single).calls) == 1
    assert single.finished.reason == "tool_calls"
    assert single.finished.usage.completion_tokens < several.finished.usage.completion_tokens


def test_prompts_as_questions_tell_them(engine: TurboEngine) -> None:
    request = Request("r", USER, tools=ToolUse((PING,)))
    text = ask(engine, RenderTemplate(request))
    tokens = ask(engine, Tokenize(request))
    assert text.endswith("<|im_start|>assistant\n") and '"ping"' in text and ask(engine, Detokenize(tokens)) == text
    assert ask(engine, Tokenize(Request("r", prompt=text))) == tokens
    assert ask(engine, Tokenize(Request("r", prompt=tokens))) == tokens
    assert ask(engine, RenderTemplate(Request("r", prompt=tokens))) == text


def test_arguments_in_history_that_are_nested_too_deeply_are_text(engine: TurboEngine) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}
    history = (*USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "x"})
    assert '{"a":{"a":' in ask(engine, RenderTemplate(Request("r", history)))
    answer_of(submit(engine, history, max_tokens=1))


@pytest.mark.parametrize("text", ["<|im_end|>", "hello world ", "a"])
def test_a_prompt_far_beyond_the_context_is_told_by_its_beginning(
    engine: TurboEngine, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody waits while a prompt is tokenised."""
    lengths, encode = [], PreTrainedTokenizerBase.encode

    def noted(self: Any, sequence: str, *arguments: Any, **options: Any) -> Any:
        lengths.append(len(sequence))
        return encode(self, sequence, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", noted)
    sink = submit(engine, ({"role": "user", "content": text * 1_000_000},), max_tokens=1)
    assert sink.ended.wait(TIMEOUT_S) and isinstance(sink.error, ContextLengthError)
    assert sum(lengths) < 300_000  # 16 characters for each token of the context


@pytest.mark.parametrize("prompt", ["", (), (1, -1), (1, 10**7)])
def test_bare_prompts_that_are_none(engine: TurboEngine, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask(engine, Tokenize(Request("r", prompt=prompt)))
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError) as caught:
        ask(engine, Detokenize((1, 10**7)))
    assert caught.value.param == "tokens"


def test_a_prefilled_answer_goes_on(engine: TurboEngine) -> None:
    greedy = SamplingParams(temperature=0.0)
    fox = ({"role": "user", "content": "Tell me a story about a fox."},)
    whole = answer_of(submit(engine, fox, sampling=greedy, max_tokens=12)).text
    tokens = ask(engine, Tokenize(Request("r", prompt=whole)))
    beginning = ask(engine, Detokenize(tokens[:4]))
    messages = (*fox, {"role": "assistant", "content": beginning})
    rest = submit(engine, messages, continue_final_message=True, sampling=greedy, max_tokens=12 - 4)
    assert beginning + answer_of(rest).text == whole


def test_a_bare_prompt_is_continued_as_it_is(engine: TurboEngine) -> None:
    greedy = SamplingParams(temperature=0.0)
    text = ask(engine, RenderTemplate(Request("r", USER)))
    bare = submit(engine, (), prompt=text, sampling=greedy, max_tokens=12)
    assert answer_of(bare) == answer_of(submit(engine, sampling=greedy, max_tokens=12))
