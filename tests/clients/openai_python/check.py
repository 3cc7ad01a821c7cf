"""OpenAI's official Python client: `python -m tests.clients.openai_python.check URL MODEL KEY`."""

from __future__ import annotations

import asyncio
import json
import time
from functools import cache
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel
from tests.clients.steps import (
    LONG_LIST_SCHEMA,
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
    all_validated,
    run_steps,
    validated,
)

WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": WEATHER_DESCRIPTION, "parameters": WEATHER_PARAMETERS},
}
RESPONSES_WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": WEATHER_DESCRIPTION,
    "parameters": WEATHER_PARAMETERS,
    "strict": True,
}


class Person(BaseModel):
    name: str
    age: int


@cache  # kept open: one that is collected with its sockets open is a warning in whichever test runs then
def client_of(target: Target) -> OpenAI:
    return OpenAI(base_url=f"{target.url}/v1", api_key=target.key, max_retries=0, timeout=120)


def say(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(target: Target, messages: list[Any], **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 60, **options}
    reply = client_of(target).chat.completions.create(model=target.model, messages=messages, **options)
    return validated(reply) if isinstance(reply, ChatCompletion) else reply


def models_are_listed(target: Target) -> None:
    models = client_of(target).models
    assert target.model in [validated(model).id for model in models.list()]
    assert models.retrieve(target.model).id == target.model


def several_turns(target: Target) -> None:
    messages: list[Any] = [say("My name is Paula and I live in Lisbon.")]
    first = ask(target, messages)
    messages += [first.choices[0].message, say("What is my name?")]
    second = ask(target, messages)
    assert "Paula" in second.choices[0].message.content, second
    assert second.usage.prompt_tokens_details.cached_tokens > 0, second.usage


def a_stream_is_the_whole_answer(target: Target) -> None:
    messages = [say("Who are you?")]
    whole = ask(target, messages)
    chunks = all_validated(ask(target, messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != "", text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def the_async_client_streams_as_well(target: Target) -> None:
    async def run() -> str:
        async with AsyncOpenAI(base_url=f"{target.url}/v1", api_key=target.key, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=target.model, messages=[{"role": "user", "content": "Hello!"}], temperature=0, stream=True
            )
            return "".join([validated(chunk).choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == ask(target, [say("Hello!")]).choices[0].message.content


def a_tool_round_trip(target: Target) -> None:
    messages: list[Any] = [say(WEATHER_QUESTION)]
    called = ask(target, messages, tools=[WEATHER], tool_choice="required").choices[0]
    assert called.finish_reason == "tool_calls", called
    (call,) = called.message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Lisbon"})
    messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER_RESULT}]
    answer = ask(target, messages, tools=[WEATHER])
    assert answer.choices[0].message.content == WEATHER_ANSWER, answer


def a_streamed_tool_call(target: Target) -> None:
    """By the chunks, and by the client's own accumulation, which parses the arguments after each of them."""
    options: dict[str, Any] = {"tools": [WEATHER], "temperature": 0, "tool_choice": "required"}
    chunks = all_validated(ask(target, [say(WEATHER_QUESTION)], stream=True, **options))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == "get_weather"
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas)) == {"city": "Lisbon"}
    options["tools"] = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    messages: list[Any] = [say(WEATHER_QUESTION)]
    with client_of(target).chat.completions.stream(model=target.model, messages=messages, **options) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Lisbon"}


def a_named_tool_and_the_older_functions(target: Target) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    named = ask(target, [say("Hello!")], tools=[WEATHER], tool_choice=choice).choices[0].message
    assert set(json.loads(named.tool_calls[0].function.arguments)) == {"city"}
    functions = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
    older = ask(target, [say(WEATHER_QUESTION)], **functions).choices[0]
    assert older.finish_reason == "function_call"
    assert json.loads(older.message.function_call.arguments) == {"city": "Lisbon"}


def json_by_a_schema(target: Target) -> None:
    schema = {"name": "person", "schema": PERSON_SCHEMA, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    for temperature in (0, 1):
        reply = ask(target, [say(PERSON_QUESTION)], response_format=form, temperature=temperature, max_tokens=400)
        if reply.choices[0].finish_reason == "stop":
            Person.model_validate_json(reply.choices[0].message.content, strict=True)
        else:
            assert temperature == 1, reply  # a model that draws at random may write without end
    messages: list[Any] = [say(PERSON_QUESTION)]
    parsed = client_of(target).chat.completions.parse(
        model=target.model, messages=messages, response_format=Person, temperature=0
    )
    assert parsed.choices[0].message.parsed == Person(name="Paula", age=31), parsed
    anything = ask(target, [say(PERSON_QUESTION)], response_format={"type": "json_object"})
    assert isinstance(json.loads(anything.choices[0].message.content), dict)


def logprobs_whole_and_streamed(target: Target) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    whole = ask(target, [say("Hello!")], **options).choices[0]
    tokens = whole.logprobs.content
    assert "".join(token.token for token in tokens) == whole.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0, token
    chunks = all_validated(ask(target, [say("Hello!")], stream=True, **options))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def three_answers(target: Target) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 7, "max_tokens": 30}
    question = [say("Tell me a short story about a cat named Misty.")]
    whole = ask(target, question, **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    texts = ["", "", ""]
    ended = []
    for chunk in all_validated(ask(target, question, stream=True, **options)):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ended += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ended) == [0, 1, 2]


def completions_of_text(target: Target) -> None:
    options: dict[str, Any] = {"model": target.model, "prompt": ["Once upon", "The river"], "temperature": 0}
    completions = client_of(target).completions
    whole = validated(completions.create(max_tokens=8, **options))
    texts = ["", ""]
    for chunk in completions.create(max_tokens=8, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is None:  # as OpenAI streams it, though the client's type has no null there
                choice.finish_reason = "stop"
        validated(chunk)
    assert texts == [choice.text for choice in whole.choices] and all(texts)


def embeddings(target: Target) -> None:
    create = client_of(target).embeddings.create
    both = validated(create(model=target.model, input=["a river", "a garden"]))  # the client asks for base64
    as_floats = create(model=target.model, input="a river", encoding_format="float").data[0].embedding
    assert len(both.data) == 2 and both.usage.prompt_tokens > 0
    assert abs(sum(x * x for x in as_floats) - 1) < 1e-3
    assert max(abs(a - b) for a, b in zip(both.data[0].embedding, as_floats, strict=True)) < 1e-2
    assert len(create(model=target.model, input="a river", dimensions=64).data[0].embedding) == 64


def responses(target: Target) -> None:
    api = client_of(target).responses
    first = validated(api.create(model=target.model, input="My name is Paula.", temperature=0))
    second = api.create(
        model=target.model, input="What is my name?", previous_response_id=first.id, temperature=0, stream=True
    )
    events = all_validated(second)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    whole = events[-1].response
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and "Paula" in whole.output_text, whole.output_text
    assert validated(api.retrieve(whole.id)).output_text == whole.output_text
    api.delete(whole.id)
    try:
        api.retrieve(whole.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response was found")


def a_tool_round_trip_in_responses(target: Target) -> None:
    api = client_of(target).responses
    options: dict[str, Any] = {"model": target.model, "tools": [RESPONSES_WEATHER], "temperature": 0}
    first = validated(api.create(input=WEATHER_QUESTION, tool_choice="required", **options))
    call = next(item for item in first.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Lisbon"})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER_RESULT}
    events = all_validated(api.create(input=[result], previous_response_id=first.id, stream=True, **options))
    assert events[-1].response.output_text == WEATHER_ANSWER, events[-1].response
    streamed = all_validated(api.create(input=WEATHER_QUESTION, tool_choice="required", stream=True, **options))
    arguments = "".join(e.delta for e in streamed if e.type == "response.function_call_arguments.delta")
    assert json.loads(arguments) == {"city": "Lisbon"}


def a_schema_in_responses(target: Target) -> None:
    reply = client_of(target).responses.parse(
        model=target.model, input=PERSON_QUESTION, text_format=Person, temperature=0
    )
    assert reply.output_parsed == Person(name="Paula", age=31), reply


def a_background_response_is_cancelled(target: Target) -> None:
    api = client_of(target).responses
    form: Any = {"format": {"type": "json_schema", "name": "numbers", "schema": LONG_LIST_SCHEMA}}
    with target.expect_cancelled():
        begun = validated(api.create(model=target.model, input="Count.", background=True, text=form))
        assert begun.status in ("queued", "in_progress"), begun.status
        while validated(api.retrieve(begun.id)).status == "queued":
            time.sleep(0.05)
        assert validated(api.cancel(begun.id)).status == "cancelled"


def cancelling_in_mid_stream(target: Target) -> None:
    options: dict[str, Any] = {"max_tokens": 8000, "extra_body": NEVER_ENDING}
    stream = ask(target, [say("Tell me a long story.")], stream=True, **options)
    with target.expect_cancelled():
        for _ in range(4):
            validated(next(stream))
        stream.close()


def errors_are_typed(target: Target) -> None:
    cases: list[tuple[type[openai.APIStatusError], dict[str, Any], str | None, str | None]] = [
        (openai.BadRequestError, {"temperature": 9}, "temperature", "invalid_request"),
        (openai.BadRequestError, {"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "invalid_request"),
        (openai.BadRequestError, {"messages": [say("word " * 20_000)]}, "messages", "context_length_exceeded"),
        (openai.BadRequestError, {"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        (openai.NotFoundError, {"model": "no-such-model"}, "model", "model_not_found"),
    ]
    for kind, options, param, code in cases:
        for stream in (False, True):
            body: Any = {"model": target.model, "messages": [say("Hello!")], "stream": stream, **options}
            try:
                client_of(target).chat.completions.create(**body)
            except kind as exc:
                assert (exc.param, exc.code) == (param, code), (exc.param, exc.code, exc)
                assert exc.request_id, "no request id"
                if code == "context_length_exceeded":  # LiteLLM and agents know the error by these words alone
                    assert "maximum context length is" in exc.message and "prompt is too long" in exc.message, exc
            else:
                raise AssertionError(f"no error for {options}")


def a_wrong_key_is_refused(target: Target) -> None:
    try:
        ask(Target(target.url, target.model, "wrong"), [say("Hello!")])
    except openai.AuthenticationError as exc:
        assert exc.code == "invalid_api_key", exc
    else:
        raise AssertionError("no error for a wrong key")


STEPS: list[Step] = [
    models_are_listed,
    several_turns,
    a_stream_is_the_whole_answer,
    the_async_client_streams_as_well,
    a_tool_round_trip,
    a_streamed_tool_call,
    a_named_tool_and_the_older_functions,
    json_by_a_schema,
    logprobs_whole_and_streamed,
    three_answers,
    completions_of_text,
    embeddings,
    responses,
    a_tool_round_trip_in_responses,
    a_schema_in_responses,
    a_background_response_is_cancelled,
    cancelling_in_mid_stream,
    errors_are_typed,
    a_wrong_key_is_refused,
]

if __name__ == "__main__":
    run_steps(STEPS)
