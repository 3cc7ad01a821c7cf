"""Anthropic's routes: blocks, streams, tools, thinking, errors; held to the official client's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from tests.turboserve.api.conftest import Service, advice_of, connect_client, read_all, running
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S
from tests.turboserve.api.scripted_answers import THINKING_USAGE

from turboserve import errors
from turboserve.api.anthropic.replies import message_usage
from turboserve.messages import Constraint, SamplingParams, Tokenize

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USAGE = {"input_tokens": 15, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 0, "output_tokens": 9}


@pytest.fixture
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service.url, api_key="unused", max_retries=0, timeout=WAIT_S) as client:
        yield client


def say(client: httpx.Client, content: object = "hi", **parameters: object) -> httpx.Response:
    """One user message."""
    body = {"model": MODEL_ID, "max_tokens": 50, "messages": [{"role": "user", "content": content}], **parameters}
    return client.post("/v1/messages", json=body)


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """Events of a stream, each named as its type; all but pings and errors fit the client's types."""
    events = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events if event["type"] != "ping"]


def anthropic_error(reply: httpx.Response) -> tuple[int, str, str]:
    """Status, type and message, after checking the shape by the client's types."""
    body = reply.json()
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    if reply.status_code != 413:  # Anthropic documents its type, and the client's types lack it
        ErrorResponse.model_validate(body, strict=True)
    assert ("retry-after" in reply.headers) == (reply.status_code in (429, 503, 529))
    if reply.status_code in (503, 529):
        assert body["error"]["message"].endswith(advice_of(reply))
    return reply.status_code, body["error"]["type"], body["error"]["message"]


# --- whole answers


def test_whole_answer_is_a_message(client: httpx.Client) -> None:
    reply = say(client)
    message = Message.model_validate(reply.json(), strict=True)
    assert message.id == reply.headers["request-id"] and message.id.startswith("msg_")
    assert (message.model, message.stop_reason, message.stop_sequence) == (MODEL_ID, "end_turn", None)
    assert [block.type for block in message.content] == ["text"]
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 8, 3)
    assert reply.json()["usage"]["turboserve"]["session_id"] == "c1"


def test_blocks_of_thoughts_text_and_calls(client: httpx.Client) -> None:
    message = Message.model_validate(say(client, "think_and_call", tools=[WEATHER]).json(), strict=True)
    thinking, text, first, second = message.content
    assert thinking.type == "thinking" and thinking.thinking == "Let me look." and thinking.signature
    assert text.type == "text" and text.text == "I look."
    assert first.type == "tool_use" and (first.id, first.name, first.input) == ("call_a", "weather", {"city": "Örebro"})
    assert second.type == "tool_use" and second.input == {}
    assert message.stop_reason == "tool_use"
    assert {name: getattr(message.usage, name) for name in USAGE} == USAGE
    assert message.usage.output_tokens_details and message.usage.output_tokens_details.thinking_tokens == 4


@pytest.mark.parametrize(
    ("script", "reason", "sequence", "content"),
    [
        ("stopped", "stop_sequence", "three", [{"type": "text", "text": "one two", "citations": None}]),
        ("cut_text", "max_tokens", None, [{"type": "text", "text": "It was a dark and", "citations": None}]),
        ("silent", "end_turn", None, []),
        (
            "cut_call",
            "max_tokens",
            None,
            [{"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Örebro", "days": [1, 2]}}],
        ),
    ],
)
def test_why_an_answer_ends(
    client: httpx.Client, script: str, reason: str, sequence: str | None, content: list[object]
) -> None:
    whole = say(client, script).json()
    assert (whole["stop_reason"], whole["stop_sequence"], whole["content"]) == (reason, sequence, content)
    ending = events_of(say(client, script, stream=True))[-2]
    assert ending["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


# --- streams


def test_stream_has_every_event_in_order(client: httpx.Client, service: Service) -> None:
    reply = say(client, "think_and_call", tools=[WEATHER], stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply)
    names = kinds(events)
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert events[1]["type"] == start and events[2]["type"] == "ping"
    opened = [event["content_block"]["type"] for event in events if event["type"] == start]
    assert opened == ["thinking", "text", "tool_use", "tool_use"]
    # Each block is opened, has its pieces and is closed before the next.
    index = -1
    for name, event in zip(names[1:-2], [e for e in events if e["type"] != "ping"][1:-2], strict=True):
        index += name == start
        assert event["index"] == index
    assert [name for name in names if name != delta][1:-2] == [start, stop] * 4
    pieces = [event["delta"] for event in events if event["type"] == delta]
    assert "".join(p["thinking"] for p in pieces if p["type"] == "thinking_delta") == "Let me look."
    assert "".join(p["text"] for p in pieces if p["type"] == "text_delta") == "I look."
    inputs = [p["partial_json"] for p in pieces if p["type"] == "input_json_delta"]
    assert "".join(inputs) == '{"city": "Örebro"}{}'
    assert [p["type"] for p in pieces].count("signature_delta") == 1
    assert events[-2]["usage"].items() >= USAGE.items()


def test_the_first_event_counts_the_prompt(client: httpx.Client, service: Service) -> None:
    (first, *_) = events_of(say(client, stream=True))
    question = service.engine.asked[-1]
    assert isinstance(question, Tokenize) and question.request == service.engine.received[-1]
    counted = client.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "hi"}]})
    assert first["message"]["usage"]["input_tokens"] == counted.json()["input_tokens"] > 0
    assert first["message"]["content"] == [] and first["message"]["stop_reason"] is None


def test_silence_is_bridged_by_pings(client: httpx.Client) -> None:
    events = events_of(say(client, "slow_start", stream=True))
    assert [event["type"] for event in events[:3]] == ["message_start", "ping", "ping"]


def test_thoughts_can_be_omitted(client: httpx.Client) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    events = events_of(say(client, "think_and_call", thinking=thinking, stream=True))
    pieces = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert pieces[0] == "signature_delta" and "thinking_delta" not in pieces
    first = say(client, "think_and_call", thinking=thinking).json()["content"][0]
    assert first["type"] == "thinking" and first["thinking"] == "" and first["signature"]


def test_a_late_failure_is_the_last_event(client: httpx.Client, claude: anthropic.Anthropic) -> None:
    *_, last = events_of(say(client, "fail_thinking", stream=True))
    ErrorResponse.model_validate(last, strict=True)
    assert last["error"] == {"type": "api_error", "message": "The engine failed."}
    with (
        pytest.raises(anthropic.APIStatusError, match="The engine failed"),
        claude.messages.stream(
            model=MODEL_ID, max_tokens=5, messages=[{"role": "user", "content": "fail_thinking"}]
        ) as stream,
    ):
        stream.until_done()


# --- the official client


def test_the_client_goes_a_tool_round_trip(claude: anthropic.Anthropic, service: Service) -> None:
    tools: Any = [WEATHER]
    history: list[Any] = [{"role": "user", "content": "think_and_call"}]
    with claude.messages.stream(model=MODEL_ID, max_tokens=99, tools=tools, messages=history) as stream:
        first = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert first.content[2].input == {"city": "Örebro"}  # type: ignore[union-attr]
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens) == (15, 5)
    results = [
        {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "rain"}]},
        {"type": "tool_result", "tool_use_id": "call_b", "content": "no clock", "is_error": True},
        {"type": "text", "text": "Thanks."},
    ]
    history += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = claude.messages.create(model=MODEL_ID, max_tokens=99, tools=tools, messages=history)
    assert second.content[0].text == "Hello, world"  # type: ignore[union-attr]
    request = service.engine.received[-1]
    assert request.messages == (
        {"role": "user", "content": "think_and_call"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Let me look.",
            "tool_calls": [
                {
                    "id": "call_a",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Örebro"}'},
                },
                {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "call_a", "name": "weather"},
        {"role": "tool", "content": "Error: no clock", "tool_call_id": "call_b", "name": "now"},
        {"role": "user", "content": "Thanks."},
    )
    assert request.tools is not None
    function = {"name": "weather", "parameters": WEATHER["input_schema"], "description": WEATHER["description"]}
    assert request.tools.functions == ({"type": "function", "function": function},)


def test_the_client_streams_and_counts(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "echo a b c"}]
    with claude.messages.stream(model=MODEL_ID, max_tokens=9, messages=messages) as stream:
        assert "".join(stream.text_stream) == "echo a b c "
    raw = claude.messages.create(model=MODEL_ID, max_tokens=9, messages=messages, stream=True)
    assert [event.type for event in raw][-1] == "message_stop"
    assert claude.messages.count_tokens(model=MODEL_ID, messages=messages, system="Be brief.").input_tokens > 0


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        ("fail_first", anthropic.BadRequestError, 400),
        ("fail_full", anthropic.InternalServerError, 529),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises_typed_errors(
    claude: anthropic.Anthropic, content: str, kind: type[anthropic.APIStatusError], status: int, stream: bool
) -> None:
    messages: Any = [{"role": "user", "content": content}]
    with pytest.raises(kind) as raised:
        claude.messages.create(model=MODEL_ID, max_tokens=9, messages=messages, stream=stream)
    assert raised.value.status_code == status and raised.value.request_id


# --- what reaches the engine


def test_parameters_reach_the_engine(client: httpx.Client, service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    reply = say(
        client,
        max_tokens=77,
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
        stop_sequences=["END", "."],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        metadata={"user_id": "u1"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        cache_control={"type": "ephemeral"},
        session_id="s1",
        kv_format="4",
    )
    assert reply.status_code == 200, reply.text
    request = service.engine.received[-1]
    assert request.messages[0] == {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert request.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=7)
    assert (request.max_tokens, request.stop, request.thinking_tokens) == (77, ("END", "."), 1024)
    assert request.template_kwargs == {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}
    assert request.constraint == Constraint("json_schema", json.dumps(schema), "output_config.format.schema")
    assert (request.session_id, request.kv_format, request.cache_key) == ("s1", "4/4", "u1")
    assert request.add_generation_prompt and not request.continue_final_message


def test_what_is_not_given_is_as_the_model_wants(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.engine, "sampling_defaults", SamplingParams(temperature=0.6, top_k=20), raising=False)
    assert say(client, top_k=5).status_code == 200
    request = service.engine.received[-1]
    assert request.sampling == SamplingParams(temperature=0.6, top_k=5)
    assert (request.tools, request.constraint, dict(request.template_kwargs)) == (None, None, {})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, ("required", "weather", False)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_tool_choices(client: httpx.Client, service: Service, choice: object, expected: tuple[object, ...]) -> None:
    tool = WEATHER | {"type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}
    assert say(client, tools=[tool], tool_choice=choice).status_code == 200
    tools = service.engine.received[-1].tools
    assert tools is not None and (tools.choice, tools.name, tools.is_parallel) == expected
    assert tools.functions[0]["function"]["strict"] is True  # type: ignore[index]


def test_a_last_answer_is_continued(client: httpx.Client, service: Service) -> None:
    messages = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": [{"type": "text", "text": "1,"}]},
    ]
    assert say(client, messages=messages).status_code == 200
    request = service.engine.received[-1]
    assert request.messages[-1] == {"role": "assistant", "content": "1,"}
    assert request.continue_final_message and not request.add_generation_prompt


def test_turns_of_one_role_become_one(client: httpx.Client, service: Service) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f"},
    ]
    assert say(client, messages=messages).status_code == 200
    assert service.engine.received[-1].messages == (
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "de"},
        {"role": "user", "content": "f"},
    )


# --- refusals


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"kv_format": "9/9"}, "kv_format"),
        ({"session_id": "!"}, "session_id"),
    ],
    ids=str,
)
def test_what_is_refused(client: httpx.Client, change: dict[str, object], needle: str) -> None:
    status, kind, message = anthropic_error(say(client, **change))
    assert (status, kind) == (400, "invalid_request_error") and needle in message


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ([{"type": "image", "source": {"type": "url", "url": "x"}}], "messages[0].content[0]: image"),
        ([{"type": "text", "text": "a"}, {"type": "document", "source": {}}], "messages[0].content[1]: document"),
        ([{"type": "tool_use", "id": "a", "name": "b", "input": {}}], "'tool_use' are not supported in user"),
        (
            [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}],
            "messages[0].content[0].content[0]: image",
        ),
        ([{"type": "text"}], "messages[0].content[0].text"),
    ],
    ids=str,
)
def test_blocks_that_are_refused(client: httpx.Client, content: object, needle: str) -> None:
    status, kind, message = anthropic_error(say(client, content))
    assert (status, kind) == (400, "invalid_request_error") and needle in message


def test_a_call_without_its_result_is_no_beginning_of_an_answer(client: httpx.Client) -> None:
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [call]}]
    assert "tool_result" in anthropic_error(say(client, messages=messages))[2]


def test_errors_of_every_stage_have_the_shape(client: httpx.Client, service: Service) -> None:
    assert anthropic_error(say(client, model="other"))[:2] == (404, "not_found_error")
    assert anthropic_error(client.get("/v1/messages"))[:2] == (405, "invalid_request_error")
    assert anthropic_error(client.get("/v1/messages/none"))[:2] == (404, "not_found_error")
    assert anthropic_error(client.post("/v1/messages", content="{}"))[:2] == (415, "invalid_request_error")
    huge = anthropic_error(say(client, "x" * service.settings.max_body_bytes))
    assert huge[:2] == (413, "request_too_large")
    foreign = client.post("/v1/messages", json={}, headers={"host": "evil.example"})
    assert anthropic_error(foreign)[:2] == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.ContextLengthError("long"), 400, "invalid_request_error"),
        (errors.QuotaExceededError("full"), 429, "rate_limit_error"),
        (errors.RequestCancelledError("cancelled"), 499, "invalid_request_error"),
        (errors.OverloadedError("busy"), 529, "overloaded_error"),
        (errors.EngineUnavailableError("dead"), 503, "api_error"),
        (errors.EngineFailureError("a bug"), 500, "api_error"),
        (RuntimeError("a bug"), 500, "api_error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_engine_have_the_shape(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, kind: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "submit", refuse)
        assert anthropic_error(say(client))[:2] == (status, kind)


def test_a_count_that_fails_counts_nothing(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream goes on without; the question's own route answers the error."""
    failed: Future[object] = Future()
    failed.set_exception(errors.EngineUnavailableError("dead"))
    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "ask", lambda question: failed)
        first, *_, last = events_of(say(client, stream=True))
        counted = client.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "hi"}]})
    assert first["message"]["usage"]["input_tokens"] == 0 and last["type"] == "message_stop"
    assert anthropic_error(counted)[:2] == (503, "api_error")


# --- keys


def test_the_key_comes_in_either_header() -> None:
    with running(api_key="right", api_keys=("second",)) as service, connect_client(service) as client:

        def status(path: str = "/v1/messages", **headers: str) -> int:
            body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
            return client.post(
                path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
            ).status_code

        assert status(x_api_key="right") == 200
        tenant = service.engine.received[-1].tenant
        assert status(authorization="Bearer right") == 200 and service.engine.received[-1].tenant == tenant
        assert status(x_api_key="second", authorization="Bearer wrong") == 200
        assert service.engine.received[-1].tenant != tenant
        # Where both headers hold a key, Authorization decides.
        assert status(x_api_key="second", authorization="Bearer right") == 200
        assert service.engine.received[-1].tenant == tenant
        assert status("/v1/chat/completions", x_api_key="right") == 200
        for wrong in (
            {},
            {"x_api_key": ""},
            {"x_api_key": "wrong"},
            {"authorization": "right"},
            {"x_api_key": "right2"},
        ):
            assert status(**wrong) == 401
        reply = client.post("/v1/messages", json={})
        assert anthropic_error(reply)[:2] == (401, "authentication_error")
        claude = anthropic.Anthropic(base_url=service.url, api_key="wrong", max_retries=0)
        with claude, pytest.raises(anthropic.AuthenticationError):
            claude.messages.create(model=MODEL_ID, max_tokens=5, messages=[{"role": "user", "content": "hi"}])


def test_usage_of_a_prompt_that_was_all_cached() -> None:
    usage = message_usage(replace(THINKING_USAGE, cached_tokens=20))
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (0, 20)


def test_a_body_that_never_comes_is_refused_in_the_shape(service: Service) -> None:
    """The connection answers that, and no route."""
    with service.connect() as sock:
        lines = ["POST /v1/messages HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9"]
        sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n{")
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    error = ErrorResponse.model_validate_json(body)
    assert error.error.type == "invalid_request_error"
