"""One streamed answer of any OpenAI-compatible server: when its pieces came, or what went wrong instead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

MAX_DETAIL = 300
# Reasoning is text that the user waits for like any other; servers disagree on its name.
TEXT_FIELDS = ("content", "reasoning", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server's API answers (ending in /v1 as a rule), and as what."""

    url: str
    model: str
    api_key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds since the round began.

    `sent_s` is when it was due, so that a client that is late does not flatter the server. `error` is the kind of
    failure, "" for none. Token counts are None where the server gives no usage.
    """

    index: int
    stream: int
    sent_s: float
    asked_prompt_tokens: int = 0
    asked_answer_tokens: int = 0
    ended_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str = ""
    detail: str = ""

    @property
    def num_tokens(self) -> int:
        """Of the answer, by the server's usage; without one, its pieces of text."""
        return len(self.chunk_s) if self.completion_tokens is None else self.completion_tokens

    def fail(self, kind: str, detail: str) -> None:
        """Only the first failure is the cause."""
        if not self.error:
            self.error, self.detail = kind, " ".join(detail.split())[:MAX_DETAIL]


@dataclass(slots=True)
class Clock:
    """Seconds since it was made."""

    began: float = field(default_factory=time.perf_counter)

    def __call__(self) -> float:
        return time.perf_counter() - self.began


async def ask(
    client: httpx.AsyncClient,
    target: Target,
    body: Mapping[str, Any],
    outcome: Outcome,
    clock: Clock,
    timeout_s: float,
) -> None:
    """Fill in `outcome` while the answer streams; `timeout_s` is for all of it."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream(
                "POST", f"{target.url}/chat/completions", content=orjson.dumps(body), headers=_headers(target)
            ) as response,
        ):
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.fail(f"HTTP {response.status_code}", error_message(text))
            else:
                await _read(response, outcome, clock)
    except (TimeoutError, httpx.TimeoutException):
        outcome.fail("timeout", f"no end within {timeout_s:g} s")
    except httpx.ConnectError as exc:
        outcome.fail("no connection", str(exc))
    except httpx.HTTPError as exc:
        outcome.fail("connection dropped", f"{type(exc).__name__}: {exc}")
    outcome.ended_s = clock()


def _headers(target: Target) -> dict[str, str]:
    return {"Content-Type": "application/json", **target.headers}


def error_message(text: str) -> str:
    """The message of an OpenAI error body; any other text as it is."""
    try:
        error = orjson.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text


async def _read(response: httpx.Response, outcome: Outcome, clock: Clock) -> None:
    """Events until the stream ends. A stream that just stops, without saying why, is a failure."""
    is_done = False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # comments keep the connection alive
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            is_done = True
            continue
        try:
            read_event(orjson.loads(data), outcome, clock())
        except (ValueError, AttributeError, TypeError):
            outcome.fail("malformed event", data)
    if not is_done and outcome.finish_reason is None:
        outcome.fail("stream cut short", f"ended after {len(outcome.chunk_s)} pieces of text without a finish_reason")


def read_event(event: dict[str, Any], outcome: Outcome, now_s: float) -> None:
    """Take over what one event says. Raises AttributeError or TypeError for one of another shape."""
    if event.get("error"):
        outcome.fail("error in the stream", error_message(orjson.dumps(event).decode()))
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in TEXT_FIELDS) or delta.get("tool_calls"):
            outcome.chunk_s.append(now_s)
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.completion_tokens = usage.get("completion_tokens")
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
