"""The Responses API: items, streams, tools, the store, background; held to the official client's own types."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.turboserve.api.conftest import Service, connect_client, error_of, running
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S

from turboserve.messages import Constraint, SamplingParams, ToolUse

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=WAIT_S) as client:
        yield client


def create(client: httpx.Client, input: object = "hi", **parameters: object) -> httpx.Response:
    return client.post("/v1/responses", json={"model": MODEL_ID, "input": input, **parameters})


def response_of(reply: httpx.Response) -> Response:
    """The response, after checking it by the client's types."""
    assert reply.status_code == 200, reply.text
    return Response.model_validate(reply.json(), strict=True)


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """Events of a stream, numbered, each named as its type and fitting the client's types."""
    events: list[dict[str, Any]] = []
    for block in reply.text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(events)
        EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


def without_repeats(events: list[dict[str, Any]]) -> list[str]:
    """Types of events in their order, a run of one type as one."""
    return [kind for kind, _ in groupby(event["type"] for event in events)]


def ended(client: httpx.Client, response_id: str, timeout_s: float = WAIT_S) -> Response:
    """A background response, once it has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        response = response_of(client.get(f"/v1/responses/{response_id}"))
        if response.status not in ("queued", "in_progress"):
            return response
        assert time.monotonic() < deadline, "the response does not end"
        time.sleep(0.01)


# --- whole answers


def test_whole_answer_is_a_response(client: httpx.Client) -> None:
    reply = create(client, metadata={"a": "b"}, instructions="Be brief.", temperature=0.5)
    response = response_of(reply)
    assert response.id == reply.headers["x-request-id"] and response.id.startswith("resp_")
    assert (response.status, response.output_text, response.model) == ("completed", "Hello, world", MODEL_ID)
    assert (response.metadata, response.instructions, response.temperature) == ({"a": "b"}, "Be brief.", 0.5)
    usage = response.usage
    assert usage is not None and (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (12, 3, 15)
    assert (usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (8, 4)
    assert reply.json()["usage"]["turboserve"]["session_id"] == "c1"


def test_thoughts_text_and_calls_are_items(client: httpx.Client) -> None:
    response = response_of(create(client, "think_and_call", tools=[WEATHER]))
    reasoning, message, first, second = response.output
    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "Let me look."
    assert message.type == "message" and response.output_text == "I look."
    assert first.type == "function_call" and (first.call_id, first.name) == ("call_a", "weather")
    assert json.loads(first.arguments) == {"city": "Örebro"}
    assert second.type == "function_call" and second.arguments == "{}"
    assert len({item.id for item in response.output}) == 4
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens == 4
    assert [tool.name for tool in response.tools] == ["weather"]  # type: ignore[union-attr]


def test_thoughts_are_the_summary_where_one_is_asked_for(client: httpx.Client) -> None:
    settings = {"summary": "auto", "effort": "low"}
    reasoning = response_of(create(client, "think_and_call", reasoning=settings)).output[0]
    assert reasoning.type == "reasoning" and reasoning.content is None
    assert [part.text for part in reasoning.summary] == ["Let me look."]
    events = events_of(create(client, "think_and_call", reasoning=settings, stream=True))
    assert without_repeats(events)[2:8] == [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ]


@pytest.mark.parametrize("script", ["cut_text", "cut_call", "think_only"])
def test_an_answer_that_is_cut_off_is_incomplete(client: httpx.Client, script: str) -> None:
    response = response_of(create(client, script))
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["incomplete"]  # type: ignore[union-attr]
    assert events_of(create(client, script, stream=True))[-1]["type"] == "response.incomplete"


def test_an_answer_without_a_word_is_a_response(client: httpx.Client) -> None:
    response = response_of(create(client, "silent"))
    assert (response.status, response.output, response.output_text) == ("completed", [], "")


def test_logprobs_come_where_they_are_asked_for(client: httpx.Client, service: Service) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    message = response_of(create(client, "with_logprobs", **asked)).output[0]
    assert service.engine.received[-1].num_top_logprobs == 1
    assert message.type == "message" and message.content[0].type == "output_text"
    yes, mark = message.content[0].logprobs or []
    assert (yes.token, yes.logprob, yes.bytes, yes.top_logprobs[0].token) == ("Yes", -0.5, list(b"Yes"), "No")
    assert (mark.token, mark.top_logprobs) == ("!", [])
    events = events_of(create(client, "with_logprobs", stream=True, **asked))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [logprob["token"] for event in deltas for logprob in event["logprobs"]] == ["Yes", "!"]
    create(client)
    assert service.engine.received[-1].num_top_logprobs is None


# --- streams


def test_stream_has_every_event_in_order(client: httpx.Client) -> None:
    reply = create(client, "think_and_call", tools=[WEATHER], stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply)
    item, part = "response.output_item", "response.content_part"
    arguments = "response.function_call_arguments"
    assert without_repeats(events) == [
        "response.created",
        "response.in_progress",
        f"{item}.added",
        f"{part}.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        f"{part}.done",
        f"{item}.done",
        f"{item}.added",
        f"{part}.added",
        "response.output_text.delta",
        "response.output_text.done",
        f"{part}.done",
        f"{item}.done",
        *[f"{item}.added", f"{arguments}.delta", f"{arguments}.done", f"{item}.done"] * 2,
        "response.completed",
    ]
    assert [e["output_index"] for e in events if e["type"] == f"{item}.added"] == [0, 1, 2, 3]
    for event in events:
        if "item_id" in event:
            added = next(
                e for e in events if e["type"] == f"{item}.added" and e["output_index"] == event["output_index"]
            )
            assert added["item"]["id"] == event["item_id"]
    done = [event["item"] for event in events if event["type"] == f"{item}.done"]
    final = events[-1]["response"]
    assert final["output"] == done and final["usage"]["output_tokens"] == 9
    pieces = [event["delta"] for event in events if event["type"] == f"{arguments}.delta"]
    assert "".join(pieces) == '{"city": "Örebro"}{}'
    whole = create(client, "think_and_call", tools=[WEATHER]).json()
    varying = ("id", "created_at", "completed_at", "output")
    assert {k: v for k, v in whole.items() if k not in varying} == {k: v for k, v in final.items() if k not in varying}


def test_a_late_failure_is_a_failed_response(client: httpx.Client) -> None:
    *_, last = events_of(create(client, "fail_thinking", stream=True))
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The engine failed."}
    assert response_of(client.get(f"/v1/responses/{last['response']['id']}")).status == "failed"


def test_silence_is_bridged_by_comments(client: httpx.Client) -> None:
    reply = create(client, "slow_start", stream=True)
    assert ": keep-alive" in reply.text and events_of(reply)[-1]["type"] == "response.completed"


# --- the official client


def test_the_client_goes_a_tool_round_trip(openai_client: openai.OpenAI, service: Service) -> None:
    tools: Any = [WEATHER]
    with openai_client.responses.stream(model=MODEL_ID, input="think_and_call", tools=tools) as stream:
        first = stream.get_final_response()
    history: list[Any] = [{"role": "user", "content": "think_and_call"}, *first.output]
    history.append({"type": "function_call_output", "call_id": "call_a", "output": "rain"})
    parts = [{"type": "input_text", "text": "no"}, {"type": "input_text", "text": "clock"}]
    history.append({"type": "function_call_output", "call_id": "call_b", "output": parts})
    second = openai_client.responses.create(model=MODEL_ID, input=history, tools=tools, instructions="Be brief.")
    assert second.output_text == "Hello, world"
    request = service.engine.received[-1]
    expected: tuple[dict[str, object], ...] = (
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
        {"role": "tool", "content": "no\nclock", "tool_call_id": "call_b", "name": "now"},
    )
    assert request.messages == ({"role": "system", "content": "Be brief."}, *expected)
    # The same by reference.
    outputs: Any = history[-2:]
    third = openai_client.responses.create(input=outputs, previous_response_id=first.id, tools=tools)
    assert third.previous_response_id == first.id
    continued = service.engine.received[-1]
    assert continued.messages == expected and continued.cache_key == first.id
    function = {name: WEATHER[name] for name in ("name", "description", "parameters", "strict")}
    assert continued.tools == ToolUse(({"type": "function", "function": function},))


def test_the_client_asks_lists_and_forgets(openai_client: openai.OpenAI) -> None:
    made = openai_client.responses.create(
        model=MODEL_ID, input=[{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}]
    )
    again = openai_client.responses.retrieve(made.id, include=["message.output_text.logprobs"])
    assert again == made
    listed = openai_client.responses.input_items.list(made.id, order="asc")
    assert [item.to_dict()["content"] for item in listed.data] == [[{"type": "input_text", "text": t}] for t in "ab"]
    pages = openai_client.responses.input_items.list(made.id, limit=1)
    assert [item.role for item in pages] == ["developer", "user"]  # type: ignore[union-attr]
    assert openai_client.responses.input_tokens.count(model=MODEL_ID, input="a b", instructions="c").input_tokens > 0
    openai_client.responses.delete(made.id)
    for ask in (
        openai_client.responses.retrieve,
        openai_client.responses.delete,
        openai_client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)


def test_the_client_runs_in_the_background(
    openai_client: openai.OpenAI, client: httpx.Client, service: Service
) -> None:
    started = openai_client.responses.create(model=MODEL_ID, input="burst", background=True)
    assert started.status == "queued" and started.background
    service.engine.wait_live()
    with pytest.raises(openai.BadRequestError, match="no answer that could be continued"):
        openai_client.responses.create(input="more", previous_response_id=started.id)
    assert openai_client.responses.retrieve(started.id).status in ("queued", "in_progress")
    cancelled = openai_client.responses.cancel(started.id)
    assert cancelled.status == "cancelled"
    service.engine.wait_idle()
    assert openai_client.responses.cancel(started.id).status == "cancelled"  # again: no harm
    other = openai_client.responses.create(model=MODEL_ID, input="slow_start", background=True)
    done = ended(client, other.id)
    assert (done.status, done.output_text) == ("completed", "Hello, world") and done.usage is not None
    assert openai_client.responses.cancel(other.id).status == "completed"
    failing = openai_client.responses.create(model=MODEL_ID, input="fail_first", background=True)
    failed = ended(client, failing.id)
    assert failed.status == "failed" and failed.error is not None and failed.error.code == "invalid_prompt"
    whole = openai_client.responses.create(model=MODEL_ID, input="hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        openai_client.responses.cancel(whole.id)


def test_a_deleted_background_response_runs_no_more(client: httpx.Client, service: Service) -> None:
    started = response_of(create(client, "forever", background=True))
    assert client.delete(f"/v1/responses/{started.id}").json() == {
        "id": started.id,
        "object": "response",
        "deleted": True,
    }
    service.wait_quiet()
    assert error_of(client.get(f"/v1/responses/{started.id}"))["code"] == "response_not_found"


def test_requests_that_the_engine_cancels_are_cancelled_responses(client: httpx.Client, service: Service) -> None:
    started = response_of(create(client, "chatter", background=True))
    service.engine.wait_live()
    service.engine.cancel(started.id)
    assert ended(client, started.id).status == "cancelled"
    # Whoever waits for the answer is told.
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(create, client, "chatter")
        service.engine.wait_live()
        service.engine.cancel(service.engine.received[-1].request_id)
        reply = waiting.result(timeout=WAIT_S)
    assert (reply.status_code, error_of(reply)["code"]) == (499, "request_cancelled")


def test_a_full_queue_refuses_the_background_too(
    client: httpx.Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "full", True)
        reply = create(client, background=True)
    assert (reply.status_code, error_of(reply)["code"]) == (503, "server_overloaded")


@pytest.mark.parametrize(
    ("input", "kind"),
    [("fail_first", openai.BadRequestError), ("fail_full", openai.InternalServerError)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises_typed_errors(
    openai_client: openai.OpenAI, input: str, kind: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(kind):
        openai_client.responses.create(model=MODEL_ID, input=input, stream=stream)


# --- what reaches the engine


def test_parameters_reach_the_engine(client: httpx.Client, service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    reply = create(
        client,
        temperature=0.25,
        top_p=0.5,
        max_output_tokens=33,
        reasoning={"effort": "high"},
        text={"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}, "verbosity": "low"},
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        session_id="s1",
        kv_format="4",
        prompt_cache_key="key",
        truncation="auto",
        service_tier="auto",
        store=True,
        user="u",
        include=["reasoning.encrypted_content"],
    )
    response = response_of(reply)
    request = service.engine.received[-1]
    assert request.sampling == SamplingParams(temperature=0.25, top_p=0.5)
    assert request.max_tokens == 33 and request.constraint == Constraint(
        "json_schema", json.dumps(schema), "text.format.schema"
    )
    assert request.template_kwargs == {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}
    assert request.tools is not None
    assert (request.tools.choice, request.tools.name, request.tools.is_parallel) == ("required", "weather", False)
    assert (request.session_id, request.kv_format, request.cache_key) == ("s1", "4/4", "key")
    assert response.truncation == "disabled" and not response.parallel_tool_calls
    assert reply.json()["text"]["format"] == {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    follow_up = create(client, "more", previous_response_id=response.id)
    assert follow_up.status_code == 200
    request = service.engine.received[-1]
    assert (request.session_id, request.kv_format, request.cache_key) == ("s1", "4/4", "key")
    assert [message["content"] for message in request.messages] == ["hi", "Hello, world", "more"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", ("none", None, 2)),
        ("auto", ("auto", None, 2)),
        ("required", ("required", None, 2)),
        ({"type": "function", "name": "now"}, ("required", "now", 2)),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}, ("auto", None, 1)),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]},
            ("required", None, 1),
        ),
    ],
    ids=str,
)
def test_tool_choices(client: httpx.Client, service: Service, choice: object, expected: tuple[object, ...]) -> None:
    response = response_of(create(client, tools=[WEATHER, {"type": "function", "name": "now"}], tool_choice=choice))
    tools = service.engine.received[-1].tools
    assert tools is not None and (tools.choice, tools.name, len(tools.functions)) == expected
    assert response.model_dump()["tool_choice"] == choice


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowing_no_tool_is_refused(client: httpx.Client, mode: str) -> None:
    """`required` could not be kept, and was answered in text."""
    choice = {"type": "allowed_tools", "mode": mode, "tools": []}
    reply = create(client, tools=[WEATHER], tool_choice=choice)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "tool_choice.tools")


def test_json_objects_are_asked_for(client: httpx.Client, service: Service) -> None:
    assert response_of(create(client, text={"format": {"type": "json_object"}})).text is not None
    assert service.engine.received[-1].constraint == Constraint("json_object", param="text.format")


def test_a_chain_remembers_all_turns_but_no_instructions(client: httpx.Client, service: Service) -> None:
    first = response_of(create(client, "one", instructions="First."))
    second = response_of(create(client, "two", previous_response_id=first.id, instructions="Second."))
    # What came before is part of those that continue it, and outlives it.
    assert client.delete(f"/v1/responses/{first.id}").status_code == 200
    create(client, "three", previous_response_id=second.id)
    request = service.engine.received[-1]
    said = [message["content"] for message in request.messages]
    assert said == ["one", "Hello, world", "two", "Hello, world", "three"]
    assert request.cache_key == first.id
    reply = create(client, "again", previous_response_id=first.id)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "previous_response_not_found")


def test_what_is_not_to_be_stored_is_not(client: httpx.Client, service: Service) -> None:
    for stream in (False, True):
        reply = create(client, store=False, stream=stream)
        assert service.engine.received[-1].cache_key is None
        missing = client.get(f"/v1/responses/{reply.headers['x-request-id']}")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "response_not_found")
    kept = create(client, stream=True).headers["x-request-id"]
    assert response_of(client.get(f"/v1/responses/{kept}")).output_text == "Hello, world"


def test_nobody_reaches_another_callers_responses() -> None:
    with running(api_key="one", api_keys=("two",)) as service, connect_client(service) as client:
        mine, others = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = client.post("/v1/responses", json={"input": "hi"}, headers=mine).json()["id"]
        path = f"/v1/responses/{made}"
        for reply in (
            client.get(path, headers=others),
            client.delete(path, headers=others),
            client.get(f"{path}/input_items", headers=others),
            client.post(f"{path}/cancel", json={}, headers=others),
        ):
            assert (reply.status_code, error_of(reply)["code"]) == (404, "response_not_found")
        reply = client.post("/v1/responses", json={"input": "hi", "previous_response_id": made}, headers=others)
        assert (reply.status_code, error_of(reply)["code"]) == (400, "previous_response_not_found")
        assert client.get(path, headers=mine).status_code == 200


def test_shutdown_ends_what_runs_in_the_background() -> None:
    with running() as service, connect_client(service) as client:
        create(client, "chatter", background=True)
        service.engine.wait_live()
        service.signal()
        service.thread.join(timeout=WAIT_S)
        assert not service.thread.is_alive()
        service.engine.wait_idle()


# --- refusals


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input": None}, "input", "invalid_request"),
        ({"input": []}, "input", "invalid_request"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", None),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", None),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_request"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", None),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "invalid_request"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "invalid_request"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type", None),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "invalid_request"),
        ({"temperature": 3}, "temperature", "invalid_request"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_request"),
        ({"prompt": {"id": "x"}}, "prompt", None),
        ({"conversation": "x"}, "conversation", None),
        ({"background": True, "store": False}, "background", "invalid_request"),
        ({"background": True, "stream": True}, "stream", None),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "previous_response_not_found"),
        ({"kv_format": "9/9"}, "kv_format", "kv_format_not_supported"),
    ],
    ids=str,
)
def test_what_is_refused(client: httpx.Client, change: dict[str, object], param: str, code: str | None) -> None:
    reply = client.post("/v1/responses", json={"input": "hi", **change})
    error = error_of(reply)
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code or "unsupported_parameter")


def test_queries_are_checked(client: httpx.Client) -> None:
    made = create(client).json()["id"]
    for query in ("limit=0", "limit=101", "order=up", "after=none"):
        reply = client.get(f"/v1/responses/{made}/input_items?{query}")
        assert (reply.status_code, error_of(reply)["param"]) == (400, query.partition("=")[0])
    assert error_of(client.get(f"/v1/responses/{made}?stream=true"))["param"] == "stream"
    assert client.post(f"/v1/responses/{made}/cancel").status_code == 415
    assert create(client, model="other").status_code == 404
