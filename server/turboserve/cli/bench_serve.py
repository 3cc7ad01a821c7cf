"""`turboserve bench serve`: load any OpenAI-compatible server, or two in turn, and print what its users would see.

Turns options into a plan and writes the reports; measuring is `bench_client`'s.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from turboserve.bench_client import plot, report
from turboserve.bench_client.asking import Target
from turboserve.bench_client.mix import Mix, Pace, Span
from turboserve.bench_client.session import Plan, measure
from turboserve.cli.config import UsageError
from turboserve.errors import StartupError

REQUESTS_PER_STREAM = 4
ROUNDS_OF_TWO = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """As given on the command line; None and "" were not given."""

    prompt_tokens: str = "300"
    answer_tokens: str = "128"
    shared_prefix: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    ignore_eos: str = ""
    seed: int | None = None
    streams: int = 8
    rate: float | None = None
    requests: int | None = None
    duration_s: float | None = None
    warm_up: int | None = None
    rounds: int | None = None
    timeout_s: float = 900.0

    def plan(self, num_servers: int) -> Plan:
        """The plan, with what was not given filled in. Raises UsageError."""
        mix = Mix(
            _option("--prompt-tokens", self.prompt_tokens, Span.parse),
            _option("--answer-tokens", self.answer_tokens, Span.parse),
            self.shared_prefix,
            self.temperature,
            self.top_p,
            _option("--ignore-eos", self.ignore_eos, end_tokens) if self.ignore_eos else (),
            # A new one each time: a server that has seen the prompts would answer from its caches.
            secrets.randbelow(1 << 31) if self.seed is None else self.seed,
        )
        _option("--shared-prefix", self.shared_prefix, lambda _: mix.check())
        for name, value in (("--rate", self.rate), ("--duration", self.duration_s), ("--timeout", self.timeout_s)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} {value:g}: expected a number above 0")
        requests = self.requests
        if requests is None and self.duration_s is None:
            requests = REQUESTS_PER_STREAM * self.streams
        return Plan(
            mix,
            Pace(self.streams, self.rate, requests, self.duration_s),
            self.rounds or (ROUNDS_OF_TWO if num_servers == 2 else 1),
            self.streams if self.warm_up is None else self.warm_up,
            self.timeout_s,
        )


def _option(name: str, value: object, parse: Callable[[str], T]) -> T:
    try:
        return parse(str(value))
    except ValueError as exc:
        raise UsageError(f"{name} {value}: {exc}") from exc


def end_tokens(text: str) -> tuple[int, ...]:
    """Ids such as `2,32000`, or those that the model in a folder names. Raises ValueError."""
    parts = text.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((Path(text) / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    raise ValueError("expected token ids such as 2,32000, or a model folder whose config names an eos_token_id")


def api_url(name: str, text: str) -> str:
    """The base URL without a slash at its end; /v1 where no path is given. Raises UsageError."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as exc:
        raise UsageError(f"{name} {text!r}: {exc}") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{name} {text!r}: expected a URL such as http://127.0.0.1:8000/v1")
    return str(url).rstrip("/") + ("/v1" if url.path in ("", "/") else "")


def run(plan: Plan, targets: list[Target], json_file: Path | None, plot_file: Path | None) -> int:
    """Measure, print the table, write the files; returns the exit status, 1 when a request failed."""
    for file in (json_file, plot_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist")  # better known now than after all the work
    servers = measure(plan, targets)
    print("\n".join(report.table(plan, servers)), flush=True)
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(report.as_json(plan, servers), indent=1, allow_nan=False) + "\n")
        if plot_file is not None:
            plot_file.write_text(plot.svg(report.headline(plan), servers))
    except OSError as exc:
        raise StartupError(f"the report could not be written: {exc}") from exc
    has_failed = any(server.has_failed for server in servers)
    if has_failed:
        sys.stderr.write("turboserve: requests FAILED; the table says how\n")
    return int(has_failed)
