"""LiteLLM as a library: `python -m tests.clients.litellm.check URL MODEL KEY`."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices when it is imported

import litellm
from litellm.types.utils import ModelResponseStream
from tests.clients.steps import (
    NEVER_ENDING,
    PERSON_QUESTION,
    PERSON_SCHEMA,
    WEATHER_ANSWER,
    WEATHER_DESCRIPTION,
    WEATHER_PARAMETERS,
    WEATHER_QUESTION,
    WEATHER_RESULT,
    Step,
    Target,
    run_steps,
)

litellm.suppress_debug_info = True  # it would print advice between the steps

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": WEATHER_DESCRIPTION, "parameters": WEATHER_PARAMETERS},
}


def say(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def access(target: Target, provider: str = "openai") -> dict[str, Any]:
    base = target.url if provider == "anthropic" else f"{target.url}/v1"
    return {"model": f"{provider}/{target.model}", "api_base": base, "api_key": target.key, "timeout": 120}


def ask(target: Target, messages: list[Any], provider: str = "openai", **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 100, "num_retries": 0, **access(target, provider), **options}
    return litellm.completion(messages=messages, **options)


def all_chunks(stream: Any) -> list[Any]:
    chunks = list(stream)
    for chunk in chunks:
        ModelResponseStream.model_validate(chunk.model_dump())
    return chunks


def several_turns(target: Target) -> None:
    for provider in ("openai", "anthropic"):
        messages: list[Any] = [say("My name is Paula and I live in Lisbon.")]
        messages += [ask(target, messages, provider).choices[0].message, say("What is my name?")]
        assert "Paula" in ask(target, messages, provider).choices[0].message.content, provider


def a_stream_is_the_whole_answer(target: Target) -> None:
    whole = ask(target, [say("Who are you?")])
    for provider in ("openai", "anthropic"):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = all_chunks(ask(target, [say("Who are you?")], provider, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content != "", (provider, text)
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens, provider


def a_tool_round_trip(target: Target) -> None:
    for provider in ("openai", "anthropic"):
        messages: list[Any] = [say(WEATHER_QUESTION)]
        called = ask(target, messages, provider, tools=[WEATHER], tool_choice="required").choices[0]
        assert called.finish_reason == "tool_calls", called
        (call,) = called.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Lisbon"})
        messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER_RESULT}]
        answer = ask(target, messages, provider, tools=[WEATHER])
        assert answer.choices[0].message.content == WEATHER_ANSWER, answer


def a_streamed_tool_call(target: Target) -> None:
    chunks = all_chunks(ask(target, [say(WEATHER_QUESTION)], tools=[WEATHER], tool_choice="required", stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole is not None
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Lisbon"})


def json_by_a_schema(target: Target) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON_SCHEMA, "strict": True}}
    reply = ask(target, [say(PERSON_QUESTION)], response_format=form)
    assert json.loads(reply.choices[0].message.content) == {"name": "Paula", "age": 31}, reply


def logprobs(target: Target) -> None:
    reply = ask(target, [say("Hello!")], logprobs=True, top_logprobs=2, max_tokens=8).choices[0]
    tokens = reply.logprobs.content
    assert "".join(token.token for token in tokens) == reply.message.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def three_answers(target: Target) -> None:
    question = [say("Tell me a short story about a cat named Misty.")]
    reply = ask(target, question, n=3, temperature=1, seed=7, max_tokens=30)
    assert len(reply.choices) == 3 and len({choice.message.content for choice in reply.choices}) > 1


def text_completions(target: Target) -> None:
    options = {**access(target), "model": f"text-completion-openai/{target.model}", "max_tokens": 8, "temperature": 0}
    whole = litellm.text_completion(prompt="Once upon", **options).choices[0].text
    streamed = litellm.text_completion(prompt="Once upon", stream=True, **options)
    assert "".join(chunk.choices[0].text or "" for chunk in streamed if chunk.choices) == whole != ""


def embeddings(target: Target) -> None:
    reply = litellm.embedding(input=["a river", "a garden"], **access(target))
    assert [len(item["embedding"]) > 0 for item in reply.data] == [True, True]


def responses(target: Target) -> None:
    options: dict[str, Any] = {**access(target), "temperature": 0}
    first = litellm.responses(input="My name is Paula.", **options)
    second = litellm.responses(input="What is my name?", previous_response_id=first.id, stream=True, **options)
    events = list(second)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert "Paula" in text and events[-1].type == "response.completed", (text, events[-1].type)


def cancelling_in_mid_stream(target: Target) -> None:
    stream = ask(target, [say("Tell me a long story.")], stream=True, max_tokens=8000, extra_body=NEVER_ENDING)
    with target.expect_cancelled():
        for _ in range(4):
            next(stream)
        stream.completion_stream.close()


def errors_are_typed(target: Target) -> None:
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (litellm.BadRequestError, {"temperature": 9}, "Hello!"),
        (litellm.ContextWindowExceededError, {}, "word " * 20_000),
        (litellm.NotFoundError, {"model": "openai/no-such-model"}, "Hello!"),
        (litellm.AuthenticationError, {"api_key": "wrong"}, "Hello!"),
        (litellm.NotFoundError, {"model": "anthropic/no-such-model", "api_base": target.url}, "Hello!"),
    ]
    for kind, options, text in cases:
        try:
            ask(target, [say(text)], **options)
        except kind as exc:
            assert type(exc) is kind, exc
        else:
            raise AssertionError(f"no error for {options}")


STEPS: list[Step] = [
    several_turns,
    a_stream_is_the_whole_answer,
    a_tool_round_trip,
    a_streamed_tool_call,
    json_by_a_schema,
    logprobs,
    three_answers,
    text_completions,
    embeddings,
    responses,
    cancelling_in_mid_stream,
    errors_are_typed,
]

if __name__ == "__main__":
    run_steps(STEPS)
