"""What the checks of all Python clients share: running steps, asking for statistics, and validating streamed parts.

Runs in each client's own environment, so it imports nothing but the standard library. Knows no client.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CANCELLED_TIMEOUT_S = 10.0  # a cancelled answer is gone within a step, on a loaded machine too

WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_DESCRIPTION = "Get the weather in a city"
WEATHER_QUESTION = "What is the weather in Lisbon?"
WEATHER_RESULT = '{"temperature": 21, "condition": "sunny"}'
WEATHER_ANSWER = "It is 21 degrees and sunny in Lisbon."

PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON_QUESTION = "Extract name and age from this sentence as JSON: Paula is 31 years old."

# Answers that only end by their limit or by being cancelled, where the API has a schema and where it has extensions.
LONG_LIST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 3000}},
    "required": ["numbers"],
    "additionalProperties": False,
}
NEVER_ENDING: dict[str, Any] = {"ignore_eos": True}


@dataclass(frozen=True)
class Target:
    """The server under test: its address without a path, the served model and a key that it takes."""

    url: str
    model: str
    key: str

    def get(self, path: str) -> str:
        """A reply's text, asked for without any client."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            text: str = reply.read().decode()
            return text

    @contextmanager
    def expect_cancelled(self) -> Iterator[None]:
        """Raises AssertionError unless a running request was cancelled soon after the block left it."""
        before = self._num_cancelled()
        yield
        deadline = time.monotonic() + CANCELLED_TIMEOUT_S
        while self._num_cancelled() == before:
            assert time.monotonic() < deadline, f"nothing was cancelled in {CANCELLED_TIMEOUT_S:g} s"
            time.sleep(0.1)

    def _num_cancelled(self) -> float:
        counts = re.findall(r"^turboserve_request_cancelled_total\{.*\} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, counts))


Step = Callable[[Target], None]


def validated(part: Any) -> Any:
    """The streamed part of a pydantic type, checked: clients build theirs without looking at the values."""
    written = part.to_dict(mode="json", warnings=False) if hasattr(part, "to_dict") else part.model_dump()
    type(part).model_validate(written)
    return part


def all_validated(parts: Iterable[Any]) -> list[Any]:
    return [validated(part) for part in parts]


def run_steps(steps: Sequence[Step]) -> None:
    """The command line of a check, `URL MODEL KEY`: tries every step, prints each, exits with 1 if one failed."""
    url, model, key = sys.argv[1:]
    target = Target(url.rstrip("/"), model, key)
    num_failed = 0
    for step in steps:
        name = step.__name__.replace("_", " ")
        started = time.perf_counter()
        try:
            step(target)
        except Exception as exc:
            num_failed += 1
            print(f"FAILED  {name}: {type(exc).__name__}: {exc}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok      {name} ({time.perf_counter() - started:.1f} s)", flush=True)
    if num_failed:
        sys.exit(f"{num_failed} of {len(steps)} steps failed")
