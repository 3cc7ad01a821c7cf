"""Anthropic's official Python client: `python -m tests.clients.anthropic_python.check URL MODEL KEY`."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import anthropic
from anthropic import Anthropic
from pydantic import BaseModel
from tests.clients.steps import (
    LONG_LIST_SCHEMA,
    PERSON_QUESTION,
    WEATHER_ANSWER,
    WEATHER_DESCRIPTION,
    WEATHER_PARAMETERS,
    WEATHER_QUESTION,
    WEATHER_RESULT,
    Step,
    Target,
    all_validated,
    run_steps,
    validated,
)

WEATHER: Any = {"name": "get_weather", "description": WEATHER_DESCRIPTION, "input_schema": WEATHER_PARAMETERS}
GREEDY: dict[str, Any] = {"temperature": 0}  # no parameter of the client's any more


class Person(BaseModel):
    name: str
    age: int


@cache  # kept open: one that is collected with its sockets open is a warning in whichever test runs then
def client_of(target: Target) -> Anthropic:
    return Anthropic(base_url=target.url, api_key=target.key, max_retries=0, timeout=120)


def say(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(target: Target, messages: list[Any], **options: Any) -> Any:
    options = {"max_tokens": 60, "extra_body": GREEDY, **options}
    reply = client_of(target).messages.create(model=target.model, messages=messages, **options)
    return validated(reply) if isinstance(reply, anthropic.types.Message) else reply


def models_are_listed(target: Target) -> None:
    assert target.model in [model.id for model in client_of(target).models.list()]


def several_turns(target: Target) -> None:
    messages: list[Any] = [say("My name is Paula and I live in Lisbon.")]
    first = ask(target, messages)
    messages += [{"role": "assistant", "content": first.content}, say("What is my name?")]
    second = ask(target, messages, system="You are a friendly assistant.")
    assert "Paula" in second.content[0].text, second
    assert ask(target, messages).usage.cache_read_input_tokens > 0


def a_stream_is_the_whole_answer(target: Target) -> None:
    """By raw events, and by the client's own accumulation."""
    messages: list[Any] = [say("Who are you?")]
    whole = ask(target, messages)
    events = all_validated(ask(target, messages, stream=True))
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text != "", text
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    with client_of(target).messages.stream(
        model=target.model, messages=messages, max_tokens=60, extra_body=GREEDY
    ) as stream:
        assert "".join(stream.text_stream) == text
        assert validated(stream.get_final_message()).usage.output_tokens == whole.usage.output_tokens


def tokens_are_counted(target: Target) -> None:
    messages: list[Any] = [say("Who are you?")]
    counted = client_of(target).messages.count_tokens(model=target.model, messages=messages, tools=[WEATHER])
    plain = client_of(target).messages.count_tokens(model=target.model, messages=messages)
    assert counted.input_tokens > plain.input_tokens > 0


def a_tool_round_trip(target: Target) -> None:
    messages: list[Any] = [say(WEATHER_QUESTION)]
    called = ask(target, messages, tools=[WEATHER], tool_choice={"type": "any"})
    assert called.stop_reason == "tool_use", called
    (call,) = called.content
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Lisbon"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": WEATHER_RESULT}
    messages += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    answer = ask(target, messages, tools=[WEATHER])
    assert answer.content[0].text == WEATHER_ANSWER, answer


def a_streamed_tool_call(target: Target) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}}
    events = all_validated(ask(target, [say(WEATHER_QUESTION)], stream=True, **options))
    started = next(event.content_block for event in events if event.type == "content_block_start")
    assert (started.type, started.name, started.input) == ("tool_use", "get_weather", {})
    pieces = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Lisbon"}
    messages: list[Any] = [say(WEATHER_QUESTION)]
    with client_of(target).messages.stream(
        model=target.model, messages=messages, max_tokens=60, extra_body=GREEDY, **options
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "input_json"]
        (call,) = stream.get_final_message().content
    assert snapshots[-1] == {"city": "Lisbon"} and call.type == "tool_use" and call.input == {"city": "Lisbon"}


def json_by_a_schema(target: Target) -> None:
    messages: list[Any] = [say(PERSON_QUESTION)]
    reply = client_of(target).messages.parse(
        model=target.model, messages=messages, max_tokens=100, output_format=Person, extra_body=GREEDY
    )
    assert reply.parsed_output == Person(name="Paula", age=31), reply


def an_answer_that_is_begun(target: Target) -> None:
    whole = ask(target, [say("Who are you?")]).content[0].text
    begun, rest = whole[:8], whole[8:]  # without a last space, which is the next token's first character
    continued = ask(target, [say("Who are you?"), {"role": "assistant", "content": begun}]).content[0].text
    assert continued == rest, continued


def stop_sequences(target: Target) -> None:
    reply = ask(target, [say("Hello!")], stop_sequences=["help"])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "help"), reply
    assert ask(target, [say("Who are you?")], max_tokens=3).stop_reason == "max_tokens"


def cancelling_in_mid_stream(target: Target) -> None:
    form = {"type": "json_schema", "schema": LONG_LIST_SCHEMA}
    stream = ask(target, [say("Count.")], stream=True, max_tokens=8000, output_config={"format": form})
    with target.expect_cancelled():
        for _ in range(4):
            validated(next(stream))
        stream.close()


def errors_are_typed(target: Target) -> None:
    cases: list[tuple[type[anthropic.APIStatusError], dict[str, Any], str]] = [
        (anthropic.BadRequestError, {"extra_body": {"temperature": 9}}, "invalid_request_error"),
        (anthropic.BadRequestError, {"messages": [say("word " * 20_000)]}, "invalid_request_error"),
        (anthropic.NotFoundError, {"model": "no-such-model"}, "not_found_error"),
    ]
    for kind, options, name in cases:
        for stream in (False, True):
            body: Any = {"model": target.model, "messages": [say("Hello!")], "max_tokens": 9, "stream": stream}
            try:
                client_of(target).messages.create(**body | options)
            except kind as exc:
                assert isinstance(exc.body, dict) and exc.body["error"]["type"] == name, exc.body
                assert exc.request_id, "no request id"
            else:
                raise AssertionError(f"no error for {options}")


def a_wrong_key_is_refused(target: Target) -> None:
    try:
        ask(Target(target.url, target.model, "wrong"), [say("Hello!")])
    except anthropic.AuthenticationError as exc:
        assert isinstance(exc.body, dict) and exc.body["error"]["type"] == "authentication_error"
    else:
        raise AssertionError("no error for a wrong key")


STEPS: list[Step] = [
    models_are_listed,
    several_turns,
    a_stream_is_the_whole_answer,
    tokens_are_counted,
    a_tool_round_trip,
    a_streamed_tool_call,
    json_by_a_schema,
    an_answer_that_is_begun,
    stop_sequences,
    cancelling_in_mid_stream,
    errors_are_typed,
    a_wrong_key_is_refused,
]

if __name__ == "__main__":
    run_steps(STEPS)
