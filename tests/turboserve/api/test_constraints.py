"""Constraints under chat completions' names on every other route that answers, beside what its own protocol has."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.turboserve.api.conftest import Service
from tests.turboserve.api.scripted import MODEL_ID

from turboserve.messages import Constraint

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "responses": ("/v1/responses", {"input": "hi"}),
    "messages": ("/v1/messages", {"max_tokens": 5, "messages": HI}),
    "chat": ("/api/chat", {"model": MODEL_ID, "messages": HI, "stream": False}),
    "generate": ("/api/generate", {"model": MODEL_ID, "prompt": "hi", "stream": False}),
    "raw": ("/api/generate", {"model": MODEL_ID, "prompt": "hi", "raw": True, "stream": False}),
}
SCHEMA = {"type": "object"}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
SCHEMA_PARAM = "response_format.json_schema.schema"
SCHEMA_TEXT = '{"type":"object"}'
REGEX = {"guided_regex": "a+"}

# (route, what its own field is sent as, how its own field is named)
OWN: list[tuple[str, dict[str, Any], str]] = [
    ("responses", {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, "text.format.schema"),
    (
        "messages",
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "output_config.format.schema",
    ),
    ("messages", {"output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format.schema"),
    ("chat", {"format": "json"}, "format"),
    ("chat", {"format": SCHEMA}, "format"),
    ("generate", {"format": SCHEMA}, "format"),
]


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"guided_json": SCHEMA}, Constraint("json_schema", SCHEMA_TEXT, "guided_json")),
        ({"guided_json": SCHEMA_TEXT}, Constraint("json_schema", SCHEMA_TEXT, "guided_json")),
        (REGEX, Constraint("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Constraint("choice", '["a","b"]', "guided_choice")),
        ({"guided_grammar": 'start: "a"'}, Constraint("lark", 'start: "a"', "guided_grammar")),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", SCHEMA_TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"regex": None}}, None),
        ({"json_schema": SCHEMA}, Constraint("json_schema", SCHEMA_TEXT, "json_schema")),
        ({"response_format": JSON_SCHEMA}, Constraint("json_schema", SCHEMA_TEXT, SCHEMA_PARAM)),
        ({"response_format": {"type": "text"}, "guided_regex": None}, None),
    ],
    ids=str,
)
def test_constraints_reach_the_engine(
    client: httpx.Client, service: Service, route: str, body: dict[str, Any], expected: Constraint | None
) -> None:
    """They used to be dropped: the answer was any text at all."""
    path, usual = BODIES[route]
    reply = client.post(path, json={**usual, **body})
    assert reply.status_code == 200, reply.text
    assert service.engine.received[-1].constraint == expected


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({**REGEX, "guided_choice": ["a"]}, "guided_choice: guided_regex constrains"),
        ({"guided_json": "no JSON"}, "guided_json: "),
        ({"guided_regex": ""}, "guided_regex: must not be empty; leave it out"),
        ({"structured_outputs": {}}, "structured_outputs: "),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]: "),
    ],
    ids=str,
)
def test_bad_constraints_are_400_with_their_place(
    client: httpx.Client, route: str, body: dict[str, Any], named: str
) -> None:
    path, usual = BODIES[route]
    reply = client.post(path, json={**usual, **body})
    assert (reply.status_code, message_of(reply)[: len(named)]) == (400, named)


@pytest.mark.parametrize(("route", "own", "name"), OWN, ids=str)
def test_a_field_of_the_routes_own_and_another_are_400(
    client: httpx.Client, service: Service, route: str, own: dict[str, Any], name: str
) -> None:
    path, usual = BODIES[route]
    reply = client.post(path, json={**usual, **own, **REGEX})
    assert (reply.status_code, message_of(reply)) == (400, f"guided_regex: {name} constrains the answer already.")
    assert client.post(path, json={**usual, **own}).status_code == 200
    constraint = service.engine.received[-1].constraint
    assert constraint is not None and constraint.param == name


def test_both_names_of_anthropics_format_are_400(client: httpx.Client) -> None:
    """The older one used to be dropped."""
    path, usual = BODIES["messages"]
    wanted = {"type": "json_schema", "schema": SCHEMA}
    reply = client.post(path, json={**usual, "output_config": {"format": wanted}, "output_format": wanted})
    message = "output_format.schema: output_config.format.schema constrains the answer already."
    assert (reply.status_code, message_of(reply)) == (400, message)


def test_prompts_are_counted_with_constraints(client: httpx.Client) -> None:
    for path, body in (
        ("/v1/responses/input_tokens", {"input": "hi"}),
        ("/v1/messages/count_tokens", {"messages": HI}),
    ):
        assert client.post(path, json={**body, **REGEX}).status_code == 200
        assert client.post(path, json={**body, "guided_regex": ""}).status_code == 400


def message_of(reply: httpx.Response) -> str:
    """The message of an error, in any of the protocols' shapes."""
    error = reply.json().get("error", {})
    return str(error if isinstance(error, str) else error.get("message"))
