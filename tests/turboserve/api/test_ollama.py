"""Ollama's routes: bodies as ours, JSON lines, calls, errors in its shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import orjson
import pytest
from tests.turboserve.api import scripted
from tests.turboserve.api.conftest import Service, connect_client, running
from tests.turboserve.api.scripted import MODEL_ID, USAGE, Script

from turboserve.api.ollama.bodies import GenerateBody, OllamaChatBody, chat_body, generate_chat_body
from turboserve.messages import FillInMiddle, Finished, ReasoningDelta, TextDelta, ToolCallDelta

HI = [{"role": "user", "content": "hi"}]


def lines(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"] == "application/x-ndjson", reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


def test_a_chat_streams_lines_by_default(client: httpx.Client, service: Service) -> None:
    reply = client.post(
        "/api/chat", json={"model": MODEL_ID + ":latest", "messages": HI, "options": {"num_predict": 5}}
    )
    *pieces, last = lines(reply)
    said = [piece["message"] for piece in pieces]  # on a busy machine neighbouring pieces are one
    assert all(set(message) == {"role", "content"} and message["role"] == "assistant" for message in said)
    assert "".join(message["content"] for message in said) == "Hello, world"
    assert not any(piece["done"] for piece in pieces) and last["done"] and last["done_reason"] == "stop"
    assert (last["prompt_eval_count"], last["eval_count"]) == (USAGE.prompt_tokens, USAGE.completion_tokens)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"] - 2
    assert last["eval_duration"] > 0
    assert service.engine.received[-1].max_tokens == 5


def test_whole_answers(client: httpx.Client) -> None:
    body = client.post("/api/chat", json={"model": MODEL_ID, "messages": HI, "stream": False}).json()
    assert (body["message"]["content"], body["done"], body["model"]) == ("Hello, world", True, MODEL_ID)
    body = client.post("/api/generate", json={"model": MODEL_ID, "prompt": "hi", "stream": False}).json()
    assert (body["response"], body["done_reason"]) == ("Hello, world", "stop")
    assert body["eval_duration"] > 0, "clients divide by it"
    assert body["total_duration"] >= body["prompt_eval_duration"] + body["eval_duration"] - 2


def talkative() -> Script:
    """Thinks, answers, and calls two functions."""
    yield ReasoningDelta("hm")
    yield TextDelta("ok")
    yield ToolCallDelta(0, "a", "f", '{"x":')
    yield ToolCallDelta(0, arguments=" 1}")
    yield ToolCallDelta(1, "b", "g", "")
    yield Finished("tool_calls", USAGE)


@pytest.mark.parametrize("stream", [True, False])
def test_thinking_and_calls(client: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setitem(scripted.SCRIPTS, "talkative", talkative)
    said = [{"role": "user", "content": "talkative"}]
    reply = client.post("/api/chat", json={"model": MODEL_ID, "messages": said, "stream": stream})
    messages = [line["message"] for line in (lines(reply) if stream else [reply.json()])]
    assert "".join(message.get("thinking", "") for message in messages) == "hm"
    assert "".join(message["content"] for message in messages) == "ok"
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "f", "arguments": {"x": 1}},
        {"index": 1, "name": "g", "arguments": {}},
    ]


def test_silence_is_filled_with_space_that_parsers_skip(client: httpx.Client) -> None:
    said = [{"role": "user", "content": "slow_start"}]
    reply = client.post("/api/chat", json={"model": MODEL_ID, "messages": said})
    assert reply.text.startswith(" ")
    assert "".join(line["message"]["content"] for line in lines(reply)) == "Hello, world"


def test_raw_prompts_and_suffixes(client: httpx.Client, service: Service) -> None:
    body = {"model": MODEL_ID, "prompt": "def f", "stream": False}
    client.post("/api/generate", json={**body, "raw": True, "options": {"repeat_penalty": 1.5, "top_k": -1}})
    request = service.engine.received[-1]
    assert (request.prompt, request.sampling.repetition_penalty, request.sampling.top_k) == ("def f", 1.5, 0)
    client.post("/api/generate", json={**body, "suffix": "end"})
    assert service.engine.asked[-1] == FillInMiddle("def f", "end")
    assert service.engine.received[-1].prompt == (1, 5, 2, 3, 3) and service.engine.received[-1].stop_token_ids == (9,)


def test_nothing_to_answer_loads_the_model(client: httpx.Client, service: Service) -> None:
    before = len(service.engine.received)
    for path in ("/api/chat", "/api/generate"):
        body = client.post(path, json={"model": MODEL_ID, "keep_alive": -1}).json()
        assert (body["done"], body["done_reason"]) == (True, "load")
    assert len(service.engine.received) == before


def test_bodies_become_ours() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "tool_calls": [{"function": {"name": n, "arguments": {"ä": 1}}} for n in ("f", "g")]},
        {"role": "tool", "content": "of g", "tool_name": "g"},
        {"role": "tool", "content": "of f"},
        {"role": "assistant", "content": "done", "thinking": "hm"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    options = {"num_predict": -1, "temperature": 1, "num_ctx": 9, "stop": ["a"], "seed": 3}
    body = {"model": "m", "messages": messages, "tools": tools, "think": False, "options": options}
    ours = chat_body(OllamaChatBody.model_validate(body))
    said: Any = ours.pop("messages")
    assert ours == {
        "tools": tools, "enable_thinking": False,
        "temperature": 1.0, "stop": ["a"], "seed": 3,
    }  # fmt: skip
    assert [call["id"] for call in said[1]["tool_calls"]] == ["call_1_0", "call_1_1"]
    assert said[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"ä": 1}'}
    assert [message["tool_call_id"] for message in said[2:4]] == ["call_1_1", "call_1_0"]
    assert said[4]["reasoning_content"] == "hm"
    ours = generate_chat_body(GenerateBody.model_validate({"model": "m", "prompt": "p", "system": "s", "think": "low"}))
    assert [message["role"] for message in ours["messages"]] == ["system", "user"]  # type: ignore[attr-defined]
    assert ours["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/api/chat", {"model": "other", "messages": HI}, 404, "not served"),
        ("/api/chat", {"messages": HI}, 400, "model"),
        ("/api/chat", {"model": MODEL_ID, "messages": [{"role": "user", "images": ["x"]}]}, 400, "images"),
        ("/api/chat", {"model": MODEL_ID, "messages": HI, "options": {"top_p": 2}}, 400, "options.top_p"),
        ("/api/chat", {"model": MODEL_ID, "messages": [{"role": "user", "content": "fail_first"}]}, 400, "9000"),
        ("/api/generate", {"model": MODEL_ID, "prompt": "a", "images": ["x"]}, 400, "images"),
        ("/api/generate", {"model": MODEL_ID, "prompt": "a", "template": "x"}, 400, "template"),
        ("/api/generate", {"model": MODEL_ID, "prompt": "a", "context": [1]}, 400, "context"),
        ("/api/generate", {"model": MODEL_ID, "prompt": "a", "raw": True, "format": "json"}, 400, "format"),
        ("/api/generate", {"model": MODEL_ID, "prompt": "a", "raw": True, "format": {}}, 400, "format"),
        ("/api/show", {"model": "other"}, 404, "not served"),
        ("/api/pull", {"model": "other"}, 404, "route"),
    ],
)
def test_errors_have_ollamas_shape(client: httpx.Client, path: str, body: object, status: int, word: str) -> None:
    reply = client.post(path, json=body)
    error = reply.json()
    assert reply.status_code == status and set(error) == {"error"} and word in error["error"], error


def test_an_error_in_a_stream_is_its_last_line(client: httpx.Client) -> None:
    said = [{"role": "user", "content": "fail_midway"}]
    last = lines(client.post("/api/chat", json={"model": MODEL_ID, "messages": said}))[-1]
    assert last == {"error": "The engine failed."}


def test_an_overloaded_server_says_when_to_come_back(client: httpx.Client) -> None:
    told = "No memory for this prompt now. Try again in 7 seconds."
    for is_stream in (False, True):
        body = {"model": MODEL_ID, "messages": [{"role": "user", "content": "fail_full"}], "stream": is_stream}
        reply = client.post("/api/chat", json=body)
        assert (reply.status_code, reply.headers["retry-after"], reply.json()) == (503, "7", {"error": told})


def test_what_clients_look_up(client: httpx.Client) -> None:
    (tag,) = client.get("/api/tags").json()["models"]
    (loaded,) = client.get("/api/ps").json()["models"]
    assert tag["name"] == loaded["name"] == MODEL_ID and tag["digest"] == loaded["digest"]
    assert loaded["context_length"] == 4096
    shown = client.post("/api/show", json={"name": MODEL_ID}).json()
    assert shown["model_info"]["turboserve.context_length"] == 4096 and "completion" in shown["capabilities"]
    assert client.get("/api/version").json()["version"].count(".") == 2


def test_the_key_is_asked_for_in_ollamas_shape() -> None:
    with running(api_key="key") as service, connect_client(service) as client:
        reply = client.get("/api/tags")
        assert reply.status_code == 401 and set(orjson.loads(reply.content)) == {"error"}
        assert client.get("/api/tags", headers={"authorization": "Bearer key"}).status_code == 200
