"""The embedded model tells its users that it can call tools and write JSON: here it is taken at its word, over HTTP."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import httpx
import jsonschema
import pytest
from tests.e2e.server import Server

CALENDAR: dict[str, Any] = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "day": {"enum": ["Monday", "Tuesday", "Friday"]}},
    "required": ["title", "day"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Get the weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add_event", "description": "Add an event", "parameters": CALENDAR}},
]


def choice_of(server: Server, question: str, **options: Any) -> dict[str, Any]:
    """The one choice of a reply that the server's own /openapi.json allows."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200, **options}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    server.contract.check(reply)
    (choice,) = reply.json()["choices"]
    return dict(choice)


@pytest.mark.parametrize("question", ["Who are you?", "What can you do?"])
def test_it_says_what_it_can(server: Server, question: str) -> None:
    said = choice_of(server, question)["message"]["content"]
    assert "call tools" in said and "write JSON" in said


SUGGESTED = {
    "What does textwrap.shorten do?": "truncate the given text",
    "Explain what a KV cache is.": "keys and values of past tokens",
    "Write a Python function that computes the Fibonacci numbers.": "def fibonacci(n):",
}


@pytest.mark.parametrize("options", [{}, {"temperature": None}], ids=["greedy", "usual"])
def test_it_answers_what_the_dashboard_suggests(server: Server, options: dict[str, Any]) -> None:
    script = files("turboserve").joinpath("dashboard/chat.js").read_text()
    (listed,) = re.findall(r"const SUGGESTIONS = \[(.*?)\];", script, re.DOTALL)
    assert re.findall(r'"(.*?)"', listed) == list(SUGGESTED)
    for question, part in SUGGESTED.items():
        assert part in choice_of(server, question, **options)["message"]["content"]


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_it_calls_the_right_one_of_its_tools(server: Server, tool_choice: str) -> None:
    choice = choice_of(server, "What is the weather in Lisbon?", tools=TOOLS, tool_choice=tool_choice)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Lisbon"})


def test_it_must_call_where_nothing_asks_for_it(server: Server) -> None:
    """An enumeration is among what the model never saw: the grammar keeps its arguments within the schema."""
    named = {"type": "function", "function": {"name": "add_event"}}
    choice = choice_of(server, "Hello!", tools=TOOLS, tool_choice=named)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add_event"
    jsonschema.validate(json.loads(call["function"]["arguments"]), CALENDAR, cls=jsonschema.Draft202012Validator)


def test_it_writes_json_of_a_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    question = "Extract name and age from this sentence as JSON: Paula is 31 years old."
    choice = choice_of(server, question, response_format=form)
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]) == {"name": "Paula", "age": 31}
