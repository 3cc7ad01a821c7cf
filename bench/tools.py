"""How well a model calls functions through a running server: 20 tasks, `auto` and `required`, temperature 0 and 1.

    python bench/tools.py URL [--model NAME] [--key KEY] [--choices auto required] [--temperatures 0 1] [--seeds 3]
                              [--one-call] [--at-once 1] [--json FILE] [--verbose]

Any server with OpenAI's chat completions will do. Of each choice and temperature the rows are:

    valid JSON        of the calls made, those whose arguments are a JSON object
    valid by schema   of the calls made, those of an offered function with arguments that fit its schema
    right functions   of the tasks, those with exactly the calls that the question asks for, by name
    right calls       of the tasks, those whose arguments are right as well

A call that the server left in the text, because it could not be read, counts as made and invalid. Tasks that need no
call are asked with `auto` alone. Strings are compared without regard to case. `required` promises calls that are valid,
which is its target where `max_tokens` does not cut them off; whether they are right is the model's business and has no
target.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
from _rows import Row, add_json_option, print_rows, write_rows

ASK_TIMEOUT_S = 1800.0  # a CPU that has other work as well
MAX_TOKENS = 256
TEXT_OF_A_CALL = re.compile(r'<tool_call>|"arguments"\s*:')


def function(name: str, description: str, properties: dict[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    """A function whose properties are required, but for the optional ones."""
    required = [key for key in properties if key not in optional]
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def number(description: str) -> dict[str, Any]:
    return {"type": "number", "description": description}


def integer(description: str) -> dict[str, Any]:
    return {"type": "integer", "description": description}


def one_of(description: str, *values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values), "description": description}


WEATHER = function("get_weather", "Get the current weather in a city", {"city": text("Name of the city")})
UNIT_WEATHER = function(
    "get_forecast",
    "Get the weather forecast of a city",
    {
        "city": text("Name of the city"),
        "days": integer("How many days"),
        "unit": one_of("Unit of temperature", "celsius", "fahrenheit"),
    },
)
EMAIL = function(
    "send_email", "Send an e-mail", {"to": text("Address of the receiver"), "subject": text("Subject of the e-mail")}
)
TIMER = function("set_timer", "Start a timer", {"minutes": integer("Length in minutes")})
CURRENCY = function(
    "convert_currency",
    "Convert an amount of money",
    {"amount": number("Amount"), "from": text("Currency code, such as EUR"), "to": text("Currency code, such as USD")},
)
LIGHT = function(
    "set_light",
    "Switch the light of a room",
    {"room": one_of("Room", "kitchen", "bedroom", "bathroom", "living_room"), "state": one_of("State", "on", "off")},
)
STOCK = function("get_stock_price", "Get the price of a share", {"symbol": text("Ticker symbol, such as AAPL")})
TRANSLATE = function(
    "translate",
    "Translate a word",
    {"word": text("The word"), "language": one_of("Target language", "french", "german", "spanish")},
)
READ_FILE = function("read_file", "Read a file", {"path": text("Path of the file")})
DELETE_FILE = function("delete_file", "Delete a file", {"path": text("Path of the file")})
TICKET = function(
    "create_ticket",
    "Create a support ticket",
    {"title": text("Title"), "priority": one_of("Priority", "low", "medium", "high")},
)
ADDRESS = function(
    "add_contact",
    "Add a contact to the address book",
    {
        "name": text("Name"),
        "address": {
            "type": "object",
            "properties": {"street": text("Street and number"), "city": text("City")},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
)
ORDER = function(
    "place_order",
    "Order products",
    {
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"product": text("Name of the product"), "quantity": integer("How many")},
                "required": ["product", "quantity"],
                "additionalProperties": False,
            },
        }
    },
)
ALL = [WEATHER, EMAIL, TIMER, CURRENCY, LIGHT, STOCK]

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A question, the functions offered with it, and the calls that answer it in any order; () for none."""

    kind: str
    question: str
    tools: list[dict[str, Any]]
    expected: tuple[Call, ...]


TASKS = (
    Task("single", "What is the weather in Paris right now?", [WEATHER], (("get_weather", {"city": "Paris"}),)),
    Task("single", "Set a timer for 15 minutes.", [TIMER], (("set_timer", {"minutes": 15}),)),
    Task("single", "What does a share of AAPL cost?", [STOCK], (("get_stock_price", {"symbol": "AAPL"}),)),
    Task("single", "Show me the file notes/plan.txt", [READ_FILE], (("read_file", {"path": "notes/plan.txt"}),)),
    Task(
        "arguments",
        "How many USD are 250 EUR?",
        [CURRENCY],
        (("convert_currency", {"amount": 250, "from": "EUR", "to": "USD"}),),
    ),
    Task(
        "arguments",
        'Send an e-mail to anna@example.com with the subject "Lunch tomorrow".',
        [EMAIL],
        (("send_email", {"to": "anna@example.com", "subject": "Lunch tomorrow"}),),
    ),
    Task("arguments", "Wake me in an hour and a half.", [TIMER], (("set_timer", {"minutes": 90}),)),
    Task("choosing", "What is the weather in Oslo?", ALL, (("get_weather", {"city": "Oslo"}),)),
    Task(
        "choosing",
        "Convert 99.5 GBP to JPY.",
        ALL,
        (("convert_currency", {"amount": 99.5, "from": "GBP", "to": "JPY"}),),
    ),
    Task("choosing", "What is the price of MSFT?", ALL, (("get_stock_price", {"symbol": "MSFT"}),)),
    Task(
        "choosing",
        "Please remove the file old/draft.md",
        [READ_FILE, DELETE_FILE, TICKET],
        (("delete_file", {"path": "old/draft.md"}),),
    ),
    Task(
        "enum", "Switch off the light in the kitchen.", [LIGHT], (("set_light", {"room": "kitchen", "state": "off"}),)
    ),
    Task(
        "enum",
        'Create a ticket with the title "Login broken" and high priority.',
        [TICKET],
        (("create_ticket", {"title": "Login broken", "priority": "high"}),),
    ),
    Task(
        "enum",
        "Give me the forecast for Rome for the next 3 days in celsius.",
        [UNIT_WEATHER],
        (("get_forecast", {"city": "Rome", "days": 3, "unit": "celsius"}),),
    ),
    Task(
        "nested",
        "Add Maria Silva, who lives at 12 Harbour Street in Lisbon, to my contacts.",
        [ADDRESS],
        (("add_contact", {"name": "Maria Silva", "address": {"street": "12 Harbour Street", "city": "Lisbon"}}),),
    ),
    Task(
        "nested",
        "Order 3 notebooks and 10 pencils.",
        [ORDER],
        (
            (
                "place_order",
                {"items": [{"product": "notebooks", "quantity": 3}, {"product": "pencils", "quantity": 10}]},
            ),
        ),
    ),
    Task(
        "parallel",
        "What is the weather in Madrid and in Vienna?",
        [WEATHER],
        (("get_weather", {"city": "Madrid"}), ("get_weather", {"city": "Vienna"})),
    ),
    Task(
        "parallel",
        "Translate the word house into French and into German.",
        [TRANSLATE],
        (
            ("translate", {"word": "house", "language": "french"}),
            ("translate", {"word": "house", "language": "german"}),
        ),
    ),
    Task("no call", "Write one sentence about the sea.", ALL, ()),
    Task("no call", "Thank you, that was all I wanted to know!", [WEATHER, STOCK], ()),
)


@dataclass(frozen=True)
class Verdict:
    """What one answer was worth. num_made counts the calls in it, num_json and num_fitting the valid ones of them."""

    num_made: int
    num_json: int
    num_fitting: int
    has_right_functions: bool
    is_right: bool


def judge(task: Task, message: dict[str, Any]) -> Verdict:
    """The verdict on an answer's message in OpenAI's shape."""
    raw = [call["function"] for call in message.get("tool_calls") or ()]
    num_made = len(raw) or bool(TEXT_OF_A_CALL.search(message.get("content") or ""))
    calls = [(call["name"], arguments) for call in raw if (arguments := _json_object(call["arguments"])) is not None]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
    num_fitting = sum(name in schemas and _fits(arguments, schemas[name]) for name, arguments in calls)
    names = sorted(call["name"] for call in raw)
    has_right_functions = names == sorted(name for name, _ in task.expected) and num_made == len(raw)
    is_right = has_right_functions and _sorted_calls(calls) == _sorted_calls(task.expected)
    return Verdict(num_made, len(calls), num_fitting, has_right_functions, is_right)


def _json_object(written: str) -> dict[str, Any] | None:
    try:
        value = json.loads(written)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def _sorted_calls(calls: Iterable[Call]) -> list[str]:
    """In a form in which equal calls are equal: without case, 15.0 as 15, in one order."""
    return sorted(json.dumps([name, _plain(arguments)], sort_keys=True) for name, arguments in calls)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip().casefold() if isinstance(value, str) else value


@dataclass(frozen=True)
class Asked:
    """One request to be made."""

    task: Task
    choice: str
    temperature: float
    seed: int


def ask(client: httpx.Client, model: str, asked: Asked, is_parallel: bool, verbose: bool) -> Verdict:
    """Raises httpx.HTTPStatusError where the server refuses."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": asked.task.question}],
        "tools": asked.task.tools,
        "tool_choice": asked.choice,
        "parallel_tool_calls": is_parallel,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "max_tokens": MAX_TOKENS,
    }
    reply = client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    message = reply.json()["choices"][0]["message"]
    verdict = judge(asked.task, message)
    if verbose:
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        mark = "right" if verdict.is_right else "wrong"
        print(f"{mark} {asked.choice} T={asked.temperature:g} {asked.task.question!r}: {calls or message['content']!r}")
    return verdict


def rows_of(name: str, verdicts: Sequence[Verdict], validity: float | None) -> list[Row]:
    """The four shares; `validity` is the target of the first two."""
    num_made = sum(verdict.num_made for verdict in verdicts)
    rows = []
    if num_made:
        num_json, num_fitting = (sum(getattr(v, field) for v in verdicts) for field in ("num_json", "num_fitting"))
        rows.append(Row.at_least(f"{name}: valid JSON", num_json / num_made, "share", validity))
        rows.append(Row.at_least(f"{name}: valid by schema", num_fitting / num_made, "share", validity))
    num_named, num_right = sum(v.has_right_functions for v in verdicts), sum(v.is_right for v in verdicts)
    rows.append(Row.plain(f"{name}: right functions", num_named / len(verdicts), "share"))
    rows.append(Row.plain(f"{name}: right calls", num_right / len(verdicts), "share"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server's address, without /v1")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--key", default="none")
    parser.add_argument("--choices", nargs="+", default=["auto", "required"], choices=["auto", "required"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, default=3, help="answers to each task at temperatures above 0 [3]")
    parser.add_argument("--one-call", action="store_true", help="parallel_tool_calls false: parallel tasks go wrong")
    parser.add_argument("--at-once", type=int, default=1, help="requests at a time; more only helps a GPU [1]")
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    add_json_option(parser)
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.key}"}
    with httpx.Client(base_url=args.url, headers=headers, timeout=ASK_TIMEOUT_S) as client:
        model = args.model or client.get("/v1/models").json()["data"][0]["id"]
        rows: list[Row] = []
        for choice in args.choices:
            tasks = [task for task in TASKS if task.expected or choice == "auto"]
            for temperature in args.temperatures:
                seeds = args.seeds if temperature else 1
                todo = [Asked(task, choice, temperature, seed) for task in tasks for seed in range(seeds)]
                with ThreadPoolExecutor(args.at_once) as pool:
                    verdicts = list(
                        pool.map(lambda asked: ask(client, model, asked, not args.one_call, args.verbose), todo)
                    )
                new = rows_of(f"{choice}, T={temperature:g}", verdicts, 1.0 if choice == "required" else None)
                print_rows(new)
                rows += new
                write_rows(args.json, rows)  # after each, so that an interrupted run leaves what it has


if __name__ == "__main__":
    main()
