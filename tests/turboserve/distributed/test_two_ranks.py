"""Two real processes that serve one model: answers, bytes, load, sessions on disk, and what a lost one leaves."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.turboserve.distributed.processes import (
    Process,
    Ranks,
    launched_ranks,
    running_ranks,
    write_model,
)
from tests.turboserve.engine.fakes import request, run

from turboserve.engine.loading import build_parts
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.step_loop import StepLoop
from turboserve.settings import Settings

PROMPTS = ["Hello!", "What is the capital of France?", "Tell me a story about a dog and a cat. " * 8]
FORMAT = "4/3"
READY = r"Ready: \S+ at (http://\S+)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_model(folder / "model")


@pytest.fixture(scope="module")
def flags(folder: Path, model: Path) -> tuple[str, ...]:
    store = str(folder / "store")
    return str(model), "--kv-format", FORMAT, "--kv-budget", "64MiB", "--kv-store-dir", store, "--max-running", "8"


@pytest.fixture(scope="module")
def ranks(folder: Path, flags: tuple[str, ...]) -> Iterator[Ranks]:
    with running_ranks(folder, *flags, "--overlap", "on") as running:  # tokens go from device to device
        yield running


def ask(url: str, content: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def stats_of(url: str) -> dict[str, Any]:
    stats: dict[str, Any] = httpx.get(f"{url}/v1/kv/stats", timeout=30).json()
    return stats


@pytest.fixture(scope="module")
def alone(folder: Path, model: Path) -> tuple[list[str], float]:
    """Answers of one process that has the whole model, uncompressed, and the bytes of a token in FORMAT."""
    settings = Settings(model=str(model), kv_format=FORMAT, kv_budget="64MiB", cache_dir=folder / "alone")
    parts = build_parts(settings, lambda line: None)
    loop = StepLoop(parts, settings, NullTelemetry(), time.monotonic)
    asked = [request(str(i), prompt, max_tokens=32, kv_format="f16") for i, prompt in enumerate(PROMPTS)]
    return [sink.text for sink in run(loop, *asked)], parts.runtime.token_bytes


def test_greedy_answers_are_those_of_one_process(ranks: Ranks, alone: tuple[list[str], float]) -> None:
    assert [text_of(ask(ranks.url, prompt, kv_format="f16")) for prompt in PROMPTS] == alone[0]
    assert len(set(alone[0])) == len(PROMPTS) and all(alone[0])


def test_a_rank_holds_half_the_bytes(ranks: Ranks, alone: tuple[list[str], float]) -> None:
    stats = stats_of(ranks.url)
    assert stats["kv_format"] == FORMAT and stats["bytes_per_token"]["compressed"] * 2 == alone[1]
    assert stats["details"]["distributed"].startswith("2 ranks, books compared after ")


def test_embeddings_are_refused_in_one_line(ranks: Ranks) -> None:
    reply = httpx.post(f"{ranks.url}/v1/embeddings", json={"input": "hello", "model": "model"}, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "A model that is divided among ranks makes no embeddings."


def stream(url: str, content: str, most_lines: int | None = None, **more: Any) -> list[str]:
    """Its lines; left after so many."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True, **more}
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line:
                lines.append(line)
            if most_lines is not None and len(lines) >= most_lines:
                break
    return lines


def test_many_streams_that_fork_and_leave(ranks: Ranks) -> None:
    """More than run at once, within a budget that makes conversations give way."""

    def one(i: int) -> list[str]:
        content = f"{PROMPTS[i % 3]} {i // 4}"  # some begin alike
        session = {"session_id": f"s{i % 5}"} if i % 3 == 0 else {}
        return stream(ranks.url, content, 5 if i % 4 == 1 else None, max_tokens=10 + 3 * (i % 9), **session)

    with ThreadPoolExecutor(16) as pool:
        ended = list(pool.map(one, range(48)))
    busy = [i for i, lines in enumerate(ended) if lines and "session_busy" in lines[0]]
    assert len(busy) < 16
    for i, lines in enumerate(ended):
        assert i % 4 == 1 or i in busy or lines[-1] == "data: [DONE]", lines[-1]
    forked = httpx.post(f"{ranks.url}/v1/sessions/s0/fork", json={"id": "other"}, timeout=30)
    assert forked.status_code in (200, 201), forked.text
    text_of(ask(ranks.url, PROMPTS[0], session_id="other"))
    num_compared = int(stats_of(ranks.url)["details"]["distributed"].split()[5])
    assert num_compared > 48
    assert httpx.get(f"{ranks.url}/ready", timeout=10).status_code == 200


STORY = PROMPTS[2] * 3


def test_a_signal_to_any_rank_ends_all_in_order(folder: Path, ranks: Ranks) -> None:
    text_of(ask(ranks.url, STORY, session_id="kept"))
    ranks.processes[1].popen.send_signal(signal.SIGTERM)
    for process in ranks.processes:
        assert process.popen.wait(timeout=30) == 0, process.text
        assert "leaked" not in process.text  # nothing holds caches or weights to the end
    stored = [len(list((folder / "store" / f"rank-{rank}-of-2").rglob("*"))) for rank in (0, 1)]
    assert stored[0] == stored[1] > 1


@pytest.fixture(scope="module")
def launcher(folder: Path, flags: tuple[str, ...]) -> Iterator[Process]:
    """The same two ranks once more, by MLX's own launcher."""
    with launched_ranks(folder, *flags) as running:
        running.wait_for(READY)
        yield running


def test_sessions_are_restored_on_all_ranks(launcher: Process) -> None:
    url = launcher.wait_for(READY)[1]
    reply = ask(url, STORY, session_id="kept")
    text_of(reply)
    assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    assert stats_of(url)["events"]["restores"]["request"] == 1


def test_a_killed_rank_ends_streams_with_an_error_and_all_ranks(launcher: Process) -> None:
    """Long before they would have timed out; /ready says 503, and rank 0 exits with status 1."""
    url = launcher.wait_for(READY)[1]
    pid = int(launcher.wait_for(r"rank 1 of 2 follows rank 0, as process (\d+)")[1])
    ended: list[tuple[float, str]] = []
    has_begun = threading.Event()

    def read() -> None:
        body = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 1500, "stream": True}
        body["logit_bias"] = {"8185": -100}
        last = ""
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            for line in filter(None, reply.iter_lines()):
                has_begun.set()
                last = line
        ended.append((time.monotonic(), last))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert has_begun.wait(60)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    statuses = set[int]()
    while launcher.popen.poll() is None and time.monotonic() - began < 60:
        try:
            statuses.add(httpx.get(f"{url}/ready", timeout=5).status_code)
        except httpx.TransportError:
            break
        time.sleep(0.05)
    for reader in readers:
        reader.join(timeout=60)
    assert len(ended) == 3 and max(at_s for at_s, _ in ended) - began < 30
    for _, line in ended:
        error = json.loads(line.removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable" and "rank 1 of 2 is gone" in error["message"]
    assert 503 in statuses
    launcher.popen.wait(timeout=60)
    assert "turboserve: --distributed: rank 1 of 2 is gone" in launcher.text
    assert "Node with rank 0 exited with code 1" in launcher.text
