"""The whole server as its users see it: streaming clients at temperature 1, beside mlx_lm.server with the same weights.

    PYTHONPATH=. python bench/serving.py MODEL_FOLDER --json serving.json
    PYTHONPATH=. python bench/serving.py MODEL_FOLDER --streams 1 8 32 --prompt-tokens 1000 --formats f16 4/4 4/3

Real processes asked over HTTP, one after the other in one run. Each client sends a prompt of its own and reads its
answer to the end; answers are kept from ending early by a bias against the model's end tokens. A warm-up of as many
clients comes first, so that compiling kernels is no part of the figures. Owns the clients and the rows; processes are
_servers.py's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Served, mlx_lm_server, turboserve
from mlx_lm.utils import load_tokenizer

WORDS = ("stone", "river", "lamp", "seven", "green", "quiet", "window", "paper", "engine", "salt", "winter", "bright")


@dataclass(frozen=True, slots=True)
class Answer:
    """One client's figures; times in seconds since all clients were let go."""

    ttft_s: float
    end_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What every client asks for."""

    prompt_tokens: int
    answer_tokens: int
    end_tokens: tuple[int, ...]

    def body(self, client: int, model: str) -> dict[str, Any]:
        """A prompt that no other client begins with, of about the wanted length."""
        words = [WORDS[(client * 7 + i * (i + client + 3)) % len(WORDS)] for i in range(self.prompt_tokens)]
        return {
            "model": model,
            "messages": [{"role": "user", "content": f"Client {client}: " + " ".join(words)}],
            "max_tokens": self.answer_tokens,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in self.end_tokens},
        }


def run(served: Served, model: str, load: Load, num_streams: int, first_client: int) -> list[Answer]:
    """All clients at once. Raises SystemExit when one of them gets no answer."""
    answers: list[Answer | Exception] = []
    start = threading.Barrier(num_streams + 1)
    began: list[float] = []

    def one(client: int) -> None:
        body = load.body(client, model)
        start.wait()
        try:
            answers.append(read(served, body, began[0]))
        except Exception as exc:
            answers.append(exc)

    threads = [threading.Thread(target=one, args=(first_client + i,)) for i in range(num_streams)]
    for thread in threads:
        thread.start()
    began.append(time.perf_counter())
    start.wait()
    for thread in threads:
        thread.join()
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    if failed:
        raise SystemExit(f"{served.name}: {len(failed)} of {num_streams} clients failed: {failed[0]!r}")
    return [answer for answer in answers if isinstance(answer, Answer)]


def read(served: Served, body: dict[str, Any], began: float) -> Answer:
    """One streamed answer. Raises httpx.HTTPError, or RuntimeError for an error in the stream."""
    ttft_s, num_chunks, usage = 0.0, 0, dict[str, Any]()
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=900) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.read().decode()[:300]}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("error"):
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            if any((choice.get("delta") or {}).get("content") for choice in event.get("choices", ())):
                num_chunks += 1
                ttft_s = ttft_s or time.perf_counter() - began
    return Answer(ttft_s, time.perf_counter() - began, int(usage.get("completion_tokens") or num_chunks))


def measured(served: Served, model: str, load: Load, streams: list[int]) -> dict[int, tuple[float, float]]:
    """(tokens/s of all clients together, median seconds to the first text) by number of streams."""
    figures = {}
    for num_streams in streams:
        run(served, model, load, num_streams, 1000 * num_streams)
        answers = run(served, model, load, num_streams, 2000 * num_streams)
        rate = sum(answer.num_tokens for answer in answers) / max(answer.end_s for answer in answers)
        figures[num_streams] = rate, statistics.median(answer.ttft_s for answer in answers)
        print(f"{served.name} {num_streams} streams: {rate:.1f} tokens/s, {figures[num_streams][1]:.3f} s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--formats", nargs="+", default=["4/4"])
    add_json_option(parser)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    load = Load(arguments.prompt_tokens, arguments.answer_tokens, tuple(int(i) for i in tokenizer.eos_token_ids))
    name, path = arguments.model.resolve().name, str(arguments.model)
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        with mlx_lm_server(arguments.model) as served:
            rival = measured(served, path, load, arguments.streams)
        for fmt in arguments.formats:
            server: AbstractContextManager[Served] = turboserve(Path(cache_dir), path, "--kv-format", fmt)
            with server as served:
                ours = measured(served, name, load, arguments.streams)
            for n, (rate, ttft_s) in ours.items():
                base_rate, base_ttft_s = rival[n]
                rows.append(Row.plain(f"{fmt}, {n} streams: all tokens/s beside mlx_lm.server", rate, "1/s", base_rate))
                rows.append(Row.plain(f"{fmt}, {n} streams: median TTFT", ttft_s, "s", base_ttft_s))
    print_rows(rows)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
