"""The held-out prompts and texts, how an answer is judged, and which of them a short run takes.

Nothing here loads a model: `evaluate.py` asks the questions, this module knows the right answers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from turboserve.models.tiny import HELDOUT_PATH

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One held-out conversation. `prompt_id` counts within the kind: `memory-7`."""

    prompt_id: str
    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    check: dict[str, Any]
    answer: str


@dataclass(frozen=True, slots=True)
class Text:
    """The beginning of one held-out document."""

    source: str
    text: str


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def load_prompts(path: Path = HELDOUT_PATH / "prompts.jsonl") -> list[Prompt]:
    """All prompts, in the file's order."""
    prompts, num_of_kind = [], defaultdict[str, int](int)
    for item in _lines(path):
        kind = item["kind"]
        prompts.append(Prompt(prompt_id=f"{kind}-{num_of_kind[kind]}", **item))
        num_of_kind[kind] += 1
    return prompts


def load_texts(path: Path = HELDOUT_PATH / "texts.jsonl") -> list[Text]:
    """All texts, in the file's order."""
    return [Text(**item) for item in _lines(path)]


def select(prompts: Iterable[Prompt], kinds: tuple[str, ...] = ("",), limit: int | None = None) -> list[Prompt]:
    """Prompts whose kind begins with one of `kinds`, at most `limit` of each, spread evenly and always the same.

    Evenly, because needles are ordered by depth: the first few would all lie near the start.
    """
    by_kind = defaultdict[str, list[Prompt]](list)
    for prompt in prompts:
        if prompt.kind.startswith(kinds):
            by_kind[prompt.kind].append(prompt)
    return [prompt for group in by_kind.values() for prompt in spread(group, limit)]


def spread(items: list[T], limit: int | None) -> list[T]:
    """`limit` items at the middles of as many equal stretches; all of them without a limit."""
    if limit is None or limit >= len(items):
        return items
    return [items[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit)]


def tool_calls(answer: str) -> list[Any] | None:
    """The tool calls of an answer, or None where one is not valid JSON."""
    try:
        return [json.loads(part.split("</tool_call>")[0]) for part in answer.split("<tool_call>")[1:]]
    except json.JSONDecodeError:
        return None


def is_right(check: dict[str, Any], answer: str) -> bool:
    """Whether an answer passes a prompt's check. Raises ValueError for a check of unknown kind."""
    kind, value = check["kind"], check["value"]
    if kind == "contains":
        return bool(value in answer)
    if kind in ("exact", "no_tool"):
        return bool(answer.strip() == value)
    if kind == "tool":
        return bool(tool_calls(answer) == value)
    if kind == "json":
        try:
            return bool(json.loads(answer) == value)
        except json.JSONDecodeError:
            return False
    raise ValueError(f"check of unknown kind {kind!r}")
