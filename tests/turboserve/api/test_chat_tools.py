"""Tools and constraints: what of a body reaches the engine, what is refused, and how calls are answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.turboserve.api.conftest import Ask, Service, error_of
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S
from tests.turboserve.api.test_chat import events_of

from turboserve.messages import Constraint

HI = {"role": "user", "content": "hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time"}}
PLAIN_TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, 2)),
        ("auto", ("auto", None, 2)),
        ("none", ("none", None, 2)),
        ("required", ("required", None, 2)),
        ("any", ("required", None, 2)),
        (named("get_time"), ("required", "get_time", 2)),
        (allowed("auto", "get_time"), ("auto", None, 1)),
        (allowed("required", "get_time", "get_weather"), ("required", None, 2)),
    ],
)
def test_tools_reach_the_engine(ask: Ask, service: Service, choice: object, expected: tuple[object, ...]) -> None:
    assert ask(tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False).status_code == 200
    tools = service.engine.received[-1].tools
    assert tools is not None and not tools.is_parallel
    assert (tools.choice, tools.name, len(tools.functions)) == expected
    assert tools.functions[-1] == PLAIN_TIME
    if expected[2] == 2:
        assert tools.functions[0] == WEATHER


def test_no_tools_are_no_tool_use(ask: Ask, service: Service) -> None:
    bodies: tuple[dict[str, Any], ...] = (
        {},
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"functions": [], "tool_choice": "auto"},
    )
    for nothing in bodies:
        assert ask(**nothing).status_code == 200
        assert service.engine.received[-1].tools is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f"), "tools": []}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": named("get_time")}, "tool_choice.function.name"),
        (
            {"tools": [WEATHER], "tool_choice": allowed("auto", "get_weather", "f")},
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [WEATHER], "functions": [WEATHER["function"]]}, "functions"),
        ({"functions": [TIME["function"], TIME["function"]]}, "functions[1].name"),
        ({"function_call": {"name": "f"}}, "function_call.name"),
    ],
)
def test_bad_tools_are_400_with_their_place(ask: Ask, body: dict[str, Any], param: str) -> None:
    reply = ask(**body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


def test_whole_answer_with_calls(ask: Ask) -> None:
    reply = ask("calls", tools=[WEATHER, TIME])
    (choice,) = ChatCompletion.model_validate(reply.json(), strict=True).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert reply.json()["choices"][0]["message"]["tool_calls"] == CALLS
    alone = ask("one_call", tools=[WEATHER]).json()["choices"][0]["message"]
    assert alone["content"] is None and len(alone["tool_calls"]) == 1
    assert "function_call" not in alone and "tool_calls" not in ask().json()["choices"][0]["message"]


def test_streamed_calls_are_openais(ask: Ask) -> None:
    *events, done = events_of(ask("calls", tools=[WEATHER, TIME], stream=True))
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(event), strict=True) for event in events]
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    for index, call in enumerate(CALLS):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert first.function is not None and (first.id, first.type) == (call["id"], "function")
        assert (first.function.name, first.function.arguments) == (call["function"]["name"], "")  # type: ignore[index]
        assert all(piece.id is None and piece.type is None for piece in rest)
        arguments = [piece.function.arguments or "" for piece in rest if piece.function is not None]
        assert "".join(arguments) == call["function"]["arguments"]  # type: ignore[index]
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_call_that_arrives_at_once_begins_without_arguments(ask: Ask) -> None:
    chunks = [json.loads(event) for event in events_of(ask("one_call", tools=[WEATHER], stream=True))[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    begins, goes_on = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert begins["function"] == {"name": "get_weather", "arguments": ""}
    assert goes_on == {"index": 0, "function": {"arguments": '{"city": "Bern"}'}}


def test_openai_client_collects_streamed_calls(service: Service) -> None:
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=WAIT_S) as client,
        client.chat.completions.stream(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "calls"}],
            tools=[WEATHER, TIME],  # type: ignore[list-item]
        ) as stream,
    ):
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    got = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    assert got == [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in CALLS]  # type: ignore[index]


def test_legacy_functions_are_answered_in_their_shape(ask: Ask, service: Service) -> None:
    body = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
    reply = ask("calls", **body)
    tools = service.engine.received[-1].tools
    assert tools is not None and (tools.choice, tools.name, tools.is_parallel) == ("required", "get_weather", False)
    assert tools.functions == (WEATHER,)
    message = ChatCompletion.model_validate(reply.json(), strict=True).choices[0].message
    assert message.function_call is not None and message.tool_calls is None
    assert (message.function_call.name, message.function_call.arguments) == ("get_weather", '{"city": "Zürich"}')
    assert reply.json()["choices"][0]["finish_reason"] == "function_call"
    events = [json.loads(event) for event in events_of(ask("calls", stream=True, **body))[:-1]]
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    pieces = [c.choices[0].delta.function_call for c in chunks if c.choices[0].delta.function_call]
    assert (pieces[0].name, pieces[0].arguments) == ("get_weather", "")
    assert "".join(piece.arguments or "" for piece in pieces) == '{"city": "Zürich"}'
    assert chunks[-1].choices[0].finish_reason == "function_call"


def test_history_has_one_spelling(client: httpx.Client, service: Service) -> None:
    function = {"name": "f", "arguments": {"x": [1, "é"]}}
    messages = [
        {"role": "user", "content": "a", "id": "m1", "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "tool_calls": [{"function": function, "index": 0}], "reasoning": "hm"},
        {"role": "tool", "content": [{"type": "text", "text": "42", "cache_control": {}}], "tool_call_id": "call_1_0"},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": " "}},
        {"role": "function", "name": "g", "content": "7"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "audio": None},
        {"role": "user", "content": "so?"},
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    call = {"id": "call_1_0", "type": "function", "function": {"name": "f", "arguments": '{"x":[1,"é"]}'}}
    legacy = {"id": "call_3", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert service.engine.received[-1].messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "42", "tool_call_id": "call_1_0"},
        {"role": "assistant", "content": "", "tool_calls": [legacy]},
        {"role": "tool", "content": "7", "name": "g", "tool_call_id": "call_3"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "so?"},
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}}},
            Constraint("json_schema", json.dumps(CITY), "response_format.json_schema.schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "c"}}},
            Constraint("json_schema", "{}", "response_format.json_schema.schema"),
        ),
        (
            {"response_format": {"type": "json_object", "schema": CITY}},
            Constraint("json_schema", json.dumps(CITY), "response_format.schema"),
        ),
        ({"json_schema": CITY}, Constraint("json_schema", json.dumps(CITY), "json_schema")),
        ({"guided_json": CITY}, Constraint("json_schema", json.dumps(CITY), "guided_json")),
        ({"guided_json": json.dumps(CITY)}, Constraint("json_schema", json.dumps(CITY), "guided_json")),
        ({"guided_regex": "a+"}, Constraint("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Constraint("choice", '["a","b"]', "guided_choice")),
        ({"guided_grammar": 'start: "a"'}, Constraint("lark", 'start: "a"', "guided_grammar")),
        ({"guided_json": {}}, Constraint("json_schema", "{}", "guided_json")),  # any JSON
        ({"json_schema": {}}, Constraint("json_schema", "{}", "json_schema")),
        ({"guided_regex": None, "guided_choice": None, "guided_json": None, "guided_grammar": None}, None),
        (
            {"structured_outputs": {"json": CITY}},
            Constraint("json_schema", json.dumps(CITY), "structured_outputs.json"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Constraint("json_object", "", "structured_outputs.json_object"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["a"]}}, Constraint("choice", '["a"]', "structured_outputs.choice")),
        ({"structured_outputs": {"grammar": "g"}}, Constraint("lark", "g", "structured_outputs.grammar")),
        ({"structured_outputs": {"regex": None, "choice": None}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
    ],
)
def test_constraints_reach_the_engine(
    ask: Ask, service: Service, body: dict[str, Any], expected: Constraint | None
) -> None:
    assert ask(**body).status_code == 200
    got = service.engine.received[-1].constraint
    if expected is not None and expected.kind == "json_schema":
        assert got is not None and json.loads(got.text) == json.loads(expected.text)
        assert (got.kind, got.param) == (expected.kind, expected.param)
    else:
        assert got == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_json": "no JSON"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_json": ""}, "guided_json"),
        ({"guided_json": " "}, "guided_json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ],
)
def test_bad_constraints_are_400_with_their_place(ask: Ask, body: dict[str, Any], param: str) -> None:
    reply = ask(**body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


def test_an_empty_constraint_is_refused_with_what_to_send_instead(client: httpx.Client) -> None:
    """It used to be taken as absent: the answer was any text at all."""
    for path, prompt in (("/v1/chat/completions", {"messages": [HI]}), ("/v1/completions", {"prompt": "hi"})):
        empties: list[dict[str, Any]] = [{"guided_regex": ""}, {"guided_choice": []}]
        for empty in (*empties, {"structured_outputs": {"grammar": ""}}):
            error = error_of(client.post(path, json={**prompt, **empty}))
            assert str(error["message"]).endswith("must not be empty; leave it out, or send null, for any text.")


def test_an_empty_choice_is_refused_with_what_choices_may_be(ask: Ask) -> None:
    for body, place in (
        ({"guided_choice": ["", "a"]}, "guided_choice[0]"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
    ):
        reply = ask(**body)
        message = f"{place}: must not be empty; a choice is a text of 1 to 1000 characters."
        assert (reply.status_code, error_of(reply)["message"]) == (400, message)


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"properties": inner}
    return inner


def test_what_is_too_deep_to_be_written_again_is_400(client: httpx.Client) -> None:
    """Bodies could be read to a greater depth than anything behind them can be written again from."""
    deep = nested(400)
    call = {"function": {"name": "f", "arguments": deep}}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": deep}]}
    text = {"format": {"type": "json_schema", "name": "x", "schema": deep}}
    for path, body in (
        ("/v1/chat/completions", {"messages": [HI], "guided_json": deep}),
        ("/v1/chat/completions", {"messages": [HI], "tools": [{"function": {"name": "f", "parameters": deep}}]}),
        ("/v1/chat/completions", {"messages": [HI, {"role": "assistant", "tool_calls": [call]}, HI]}),
        ("/v1/messages", {"max_tokens": 1, "messages": [HI, use]}),
        ("/v1/responses", {"input": "hi", "text": text}),
        ("/v1/responses", {"input": "hi", "tools": [{"type": "function", "name": "x", "parameters": deep}]}),
        ("/api/chat", {"model": MODEL_ID, "messages": [HI, {"role": "assistant", "tool_calls": [call]}]}),
    ):
        reply = client.post(path, json=body)
        assert reply.status_code == 400 and "nested too deeply" in reply.text, (path, reply.text)


def test_tools_and_a_constraint_go_together(ask: Ask, service: Service) -> None:
    assert ask(tools=[WEATHER], response_format={"type": "json_object"}).status_code == 200
    got = service.engine.received[-1]
    assert got.tools is not None and got.constraint == Constraint("json_object")
