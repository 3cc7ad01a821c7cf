"""LangChain's OpenAI models: `python -m tests.clients.langchain.check URL MODEL KEY`."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from tests.clients.steps import (
    NEVER_ENDING,
    PERSON_QUESTION,
    WEATHER_ANSWER,
    WEATHER_QUESTION,
    WEATHER_RESULT,
    Step,
    Target,
    run_steps,
)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool  # type: ignore[untyped-decorator]  # the types of LangChain are not installed with ours
def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return WEATHER_RESULT


def chat(target: Target, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 100, "max_retries": 0, "timeout": 120, **options}
    return ChatOpenAI(base_url=f"{target.url}/v1", api_key=target.key, model=target.model, **options)


def joined(chunks: Any) -> Any:
    """The sum of a stream's chunks, each validated first."""
    whole = None
    for chunk in chunks:
        AIMessageChunk.model_validate(chunk.model_dump())
        whole = chunk if whole is None else whole + chunk
    assert whole is not None, "an empty stream"
    return whole


def several_turns(target: Target) -> None:
    messages: list[Any] = [HumanMessage("My name is Paula and I live in Lisbon.")]
    messages += [chat(target).invoke(messages), HumanMessage("What is my name?")]
    assert "Paula" in chat(target).invoke(messages).content


def a_stream_is_the_whole_answer(target: Target) -> None:
    whole = chat(target).invoke("Who are you?")
    streamed = joined(chat(target, stream_usage=True).stream("Who are you?"))
    assert streamed.content == whole.content != ""
    assert streamed.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert streamed.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"] == "stop"


def a_tool_round_trip(target: Target) -> None:
    messages: list[Any] = [HumanMessage(WEATHER_QUESTION)]
    called = chat(target).bind_tools([get_weather], tool_choice="required").invoke(messages)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Lisbon"}) and not called.invalid_tool_calls
    messages += [called, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    answer = chat(target).bind_tools([get_weather]).invoke(messages)
    assert answer.content == WEATHER_ANSWER, answer


def a_streamed_tool_call(target: Target) -> None:
    bound = chat(target).bind_tools([get_weather], tool_choice="get_weather", strict=True)
    streamed = joined(bound.stream(WEATHER_QUESTION))
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("get_weather", {"city": "Lisbon"})]


def json_by_a_schema(target: Target) -> None:
    by_schema = chat(target).with_structured_output(Person, method="json_schema")
    assert by_schema.invoke(PERSON_QUESTION) == Person(name="Paula", age=31)
    by_call = chat(target).with_structured_output(Person, method="function_calling")
    assert isinstance(by_call.invoke(PERSON_QUESTION), Person)  # so small a model may get the name wrong
    assert isinstance(chat(target).with_structured_output(None, method="json_mode").invoke(PERSON_QUESTION), dict)


def logprobs_whole_and_streamed(target: Target) -> None:
    model = chat(target, max_tokens=8).bind(logprobs=True, top_logprobs=2)
    whole = model.invoke("Hello!")
    tokens = whole.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == whole.content
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    streamed = joined(model.stream("Hello!")).response_metadata["logprobs"]["content"]
    assert [token["token"] for token in streamed] == [token["token"] for token in tokens]


def three_answers(target: Target) -> None:
    model = chat(target, n=3, temperature=1, seed=7, max_tokens=30)
    (choices,) = model.generate([[HumanMessage("Tell me a short story about a cat named Misty.")]]).generations
    assert len(choices) == 3 and len({choice.text for choice in choices}) > 1


def embeddings(target: Target) -> None:
    """With its default settings it sends token ids of OpenAI's own vocabulary, which no other model understands."""
    model = OpenAIEmbeddings(
        base_url=f"{target.url}/v1", api_key=target.key, model=target.model, check_embedding_ctx_length=False
    )
    first, second = model.embed_documents(["a river", "a garden"])
    assert len(first) == len(second) > 0
    assert max(abs(a - b) for a, b in zip(first, model.embed_query("a river"), strict=True)) < 1e-2


def responses(target: Target) -> None:
    model = chat(target, use_responses_api=True)
    first = model.invoke("My name is Paula.")
    second = model.invoke("What is my name?", previous_response_id=first.response_metadata["id"])
    assert "Paula" in second.text, second
    assert joined(model.stream("Who are you?")).text == model.invoke("Who are you?").text != ""
    (call,) = model.bind_tools([get_weather], tool_choice="required").invoke(WEATHER_QUESTION).tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Lisbon"})


def cancelling_in_mid_stream(target: Target) -> None:
    stream = chat(target, max_tokens=8000, extra_body=NEVER_ENDING).stream("Tell me a long story.")
    with target.expect_cancelled():
        for _ in range(4):
            next(stream)
        stream.close()


def errors_are_typed(target: Target) -> None:
    cases: list[tuple[type[openai.APIStatusError], dict[str, Any], str]] = [
        (openai.BadRequestError, {"temperature": 9}, "Hello!"),
        (openai.BadRequestError, {}, "word " * 20_000),
        (openai.NotFoundError, {"model": "no-such-model"}, "Hello!"),
        (openai.AuthenticationError, {"api_key": "wrong"}, "Hello!"),
    ]
    for kind, options, text in cases:
        options = {"model": target.model, "api_key": target.key, "base_url": f"{target.url}/v1", **options}
        model = ChatOpenAI(max_retries=0, **options)
        for call in (model.invoke, lambda text, model=model: list(model.stream(text))):
            try:
                call(text)
            except kind:
                continue
            raise AssertionError(f"no {kind.__name__} for {options}")


STEPS: list[Step] = [
    several_turns,
    a_stream_is_the_whole_answer,
    a_tool_round_trip,
    a_streamed_tool_call,
    json_by_a_schema,
    logprobs_whole_and_streamed,
    three_answers,
    embeddings,
    responses,
    cancelling_in_mid_stream,
    errors_are_typed,
]

if __name__ == "__main__":
    run_steps(STEPS)
