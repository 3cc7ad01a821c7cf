"""Chat completions that succeed: shapes, streaming, usage, parameters reaching the engine, the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.turboserve.api.conftest import Ask, Service, error_of
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S

KV_EXTENSION = {
    "session_id": "c1",
    "kv_format": "4/3",
    "tokens": 100,
    "kv_bytes": {"compressed": 300, "exact": 40, "slack": 20, "uncompressed": 40, "total": 400},
    "raw_equivalent_bytes": 1600,
    "ratio": 4.0,
}


@pytest.fixture
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=WAIT_S) as client:
        yield client


def events_of(reply: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: ")]


def test_whole_answer_is_an_openai_completion(ask: Ask) -> None:
    reply = ask(model=MODEL_ID)
    assert reply.status_code == 200
    completion = ChatCompletion.model_validate(reply.json(), strict=True)
    assert completion.choices[0].message.content == "Hello, world"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.id == reply.headers["x-request-id"] and completion.id.startswith("chatcmpl-")
    assert completion.usage is not None and completion.usage.total_tokens == 15
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 8
    assert reply.json()["usage"]["turboserve"] == KV_EXTENSION


def test_stream_has_role_text_reason_usage_done(ask: Ask) -> None:
    reply = ask(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done = events_of(reply)
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(event), strict=True) for event in events]
    assert {chunk.id for chunk in chunks} == {reply.headers["x-request-id"]}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello, world"
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert json.loads(events[-1])["usage"]["turboserve"] == KV_EXTENSION
    assert all(json.loads(event)["usage"] is None for event in events[:-1])


def test_stream_without_include_usage_has_none(ask: Ask) -> None:
    *events, _ = events_of(ask(stream=True))
    assert all("usage" not in json.loads(event) for event in events)


def test_silence_is_bridged_by_comments(ask: Ask) -> None:
    reply = ask("slow_start", stream=True)
    assert reply.text.count(": keep-alive") >= 2
    assert events_of(reply)[-1] == "[DONE]"


def test_openai_client_whole_and_streaming(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == [MODEL_ID]
    assert openai_client.models.retrieve(MODEL_ID).owned_by == "turboserve"
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    whole = openai_client.chat.completions.create(model=MODEL_ID, messages=messages)
    assert whole.choices[0].message.content == "Hello, world"
    stream = openai_client.chat.completions.create(
        model=MODEL_ID, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world"
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 12


def test_openai_client_replays_its_own_answer(openai_client: openai.OpenAI, service: Service) -> None:
    first = openai_client.chat.completions.create(model=MODEL_ID, messages=[{"role": "user", "content": "hi"}])
    replayed = first.choices[0].message.model_dump()
    openai_client.chat.completions.create(
        model=MODEL_ID,
        messages=[{"role": "user", "content": "hi"}, replayed, {"role": "user", "content": "again"}],  # type: ignore[list-item]
    )
    assert service.engine.received[-1].messages[1] == {"role": "assistant", "content": "Hello, world"}


def test_openai_client_sees_typed_errors(openai_client: openai.OpenAI) -> None:
    def create(model: str, content: str, stream: bool = False) -> object:
        reply = openai_client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], stream=stream
        )
        return list(reply) if stream else reply

    with pytest.raises(openai.NotFoundError) as missing:
        create("gpt-none", "hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        create(MODEL_ID, "fail_first")
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIError) as midway:
        create(MODEL_ID, "fail_midway", stream=True)
    assert midway.value.code == "engine_failure"


def test_parameters_reach_the_engine(ask: Ask, service: Service) -> None:
    reply = ask(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        max_completion_tokens=7,
        max_tokens=7,
        stop=["a", "b"],
        seed=-(2**63),
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "70": 1.5},
        n=1,
        user="someone",
        metadata={"k": "v"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        logprobs=False,
    )
    assert reply.status_code == 200
    got = service.engine.received[-1]
    assert (got.sampling.temperature, got.sampling.top_p, got.sampling.top_k, got.sampling.min_p) == (0, 0.5, 40, 0.05)
    assert (got.sampling.presence_penalty, got.sampling.frequency_penalty) == (-2, 2)
    assert got.sampling.repetition_penalty == 1.1 and got.sampling.seed == -(2**63)
    assert got.sampling.logit_bias == ((5, -100.0), (70, 1.5))
    assert (got.max_tokens, got.stop, got.tenant) == (7, ("a", "b"), "")


def test_nulls_mean_not_given(ask: Ask, service: Service) -> None:
    names = ("model", "temperature", "top_p", "top_k", "stop", "seed", "max_tokens", "n", "stream", "stream_options")
    assert ask(**dict.fromkeys(names)).status_code == 200
    got = service.engine.received[-1]
    assert got.sampling.temperature == 1.0 and got.max_tokens is None and got.stop == ()


def test_history_becomes_plain_dicts(client: httpx.Client, service: Service) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "user", "content": "so?"},
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert service.engine.received[-1].messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "user", "content": "so?"},
    )


def test_control_characters_pass_and_are_escaped(ask: Ask, service: Service) -> None:
    text = "nul \x00 escape \x1b[31m bell \x07 emoji 🙂"
    assert ask(text).status_code == 200
    assert service.engine.received[-1].messages[-1]["content"] == text


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [("fail_first", 400, "context_length_exceeded"), ("fail_full", 503, "server_overloaded")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_byte_has_its_status(
    ask: Ask, script: str, status: int, code: str, stream: bool
) -> None:
    reply = ask(script, stream=stream)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)
    assert reply.headers.get("retry-after") == ("7" if status == 503 else None)


def test_failure_midway_is_the_last_event(ask: Ask) -> None:
    reply = ask("fail_midway", stream=True)
    assert reply.status_code == 200
    *_, last = events_of(reply)
    assert json.loads(last)["error"]["code"] == "engine_failure"
    assert ask("fail_midway").status_code == 500


def test_failure_after_a_silent_start_is_an_event(ask: Ask) -> None:
    reply = ask("slow_failure", stream=True)
    assert reply.status_code == 200 and ": keep-alive" in reply.text
    assert json.loads(events_of(reply)[-1])["error"]["code"] == "engine_failure"


def test_concurrent_answers_do_not_mix(ask: Ask, service: Service) -> None:
    def num_disconnects() -> float:
        page = service.telemetry.exposition().decode()
        lines = [line for line in page.splitlines() if line.startswith("turboserve_http_disconnects_total{")]
        return sum(float(line.split()[-1]) for line in lines)

    before = num_disconnects()
    texts = ["echo " + f"word-{caller} " * 30 for caller in range(16)]

    def answer(index: int) -> str:
        if index % 2:
            return str(ask(texts[index]).json()["choices"][0]["message"]["content"])
        chunks = [json.loads(event) for event in events_of(ask(texts[index], stream=True))[:-1]]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(answer, range(16))) == texts
    # An answer that was read to its end is no disconnect.
    assert num_disconnects() == before


def test_full_and_dead_engines_answer_503(ask: Ask, service: Service) -> None:
    engine = service.engine
    try:
        engine.full = True
        reply = ask()
        assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (
            503,
            "server_overloaded",
            "3",
        )
        engine.dead = True
        assert error_of(ask(stream=True))["code"] == "engine_unavailable"
    finally:
        engine.full = engine.dead = False
