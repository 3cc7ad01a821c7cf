"""Server processes under measurement: TurboServe and mlx_lm.server, asked through the same small client.

Owns starting, asking, reading resident memory and stopping. Linux only (/proc). What is measured is each script's own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 180.0
ASK_TIMEOUT_S = 600.0  # a cold prompt of thousands of tokens on two cores, behind eleven others
Messages = list[dict[str, str]]

# The rival gets the same fast BLAS: the comparison is of caches, not of matrix products.
RIVAL_PROGRAM = (
    "import sys; from turboquant_kv import blas; blas.interpose(); "
    "sys.argv = ['mlx_lm.server', *sys.argv[1:]]; from mlx_lm.server import main; main()"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """One streamed answer; `error` is what went wrong instead, "" when nothing did."""

    ttft_s: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    last_s: float = 0.0  # to the last piece of text
    num_pieces: int = 0  # of text, about one a token


@dataclass
class Served:
    """One server process and where it answers."""

    name: str
    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    def ask(self, messages: Messages, max_tokens: int, **options: Any) -> Reply:
        """A greedy streamed answer; the clock runs from sending to the first piece of text."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        started = time.perf_counter()
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=ASK_TIMEOUT_S) as response:
                if response.status_code != 200:
                    return Reply(error=f"status {response.status_code}: {response.read().decode()[:300]}")
                return _read_stream(response.iter_lines(), started)
        except httpx.HTTPError as exc:
            return Reply(error=f"{type(exc).__name__}: {exc}")

    def stats(self) -> dict[str, Any]:
        """TurboServe's statistics, which follow the engine within a quarter of a second."""
        time.sleep(0.3)
        stats: dict[str, Any] = httpx.get(f"{self.url}/v1/kv/stats", timeout=60).json()
        return stats

    @property
    def resident_bytes(self) -> int:
        """0 when the process has ended."""
        return self._status_bytes("VmRSS")

    def limit_growth(self, num_bytes: int) -> None:
        """From now on the process may allocate that much more, like a machine with no more memory than that."""
        most = self._status_bytes("VmData") + num_bytes
        resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (most, most))

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def _status_bytes(self, name: str) -> int:
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else 0


def _read_stream(lines: Iterator[str], started: float) -> Reply:
    ttft_s, last_s, error = 0.0, 0.0, ""
    parts: list[str] = []
    usage: dict[str, Any] = {}
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        error = error or str(event.get("error", ""))
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            text = (choice.get("delta") or {}).get("content") or ""
            if not ttft_s and (text or choice.get("finish_reason")):
                ttft_s = time.perf_counter() - started
            if text:
                last_s = time.perf_counter() - started
                parts.append(text)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if not ttft_s and not error:
        error = "the stream ended without an answer"
    return Reply(ttft_s, "".join(parts), usage.get("prompt_tokens", 0), cached, error, last_s, len(parts))


@contextmanager
def turboserve(cache_dir: Path, *flags: str) -> Iterator[Served]:
    """A TurboServe process with the embedded model."""
    port = free_port()
    command = [sys.executable, "-m", "turboserve", "serve", "--port", str(port), "--cache-dir", str(cache_dir), *flags]
    with _running("turboserve", command, port, "/ready") as served:
        yield served


@contextmanager
def mlx_lm_server(model_folder: Path, *flags: str) -> Iterator[Served]:
    """mlx-lm's own server with the same weights, its prompt cache on."""
    port = free_port()
    command = [sys.executable, "-c", RIVAL_PROGRAM, "--model", str(model_folder), "--port", str(port), *flags]
    with _running("mlx_lm.server", command, port, "/v1/models") as served:
        yield served


@contextmanager
def foreign_server(name: str, command: list[str]) -> Iterator[Served]:
    """Any server with OpenAI's API; of `command` each {port} becomes a free one."""
    port = free_port()
    with _running(name, [part.replace("{port}", str(port)) for part in command], port, "/v1/models") as served:
        yield served


@contextmanager
def _running(name: str, command: list[str], port: int, ready_path: str) -> Iterator[Served]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    served = Served(name, process, f"http://127.0.0.1:{port}")
    reader = threading.Thread(target=lambda: served.lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        _wait_until_ready(served, ready_path)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(timeout=10)


def _wait_until_ready(served: Served, path: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and served.is_alive:
        try:
            if httpx.get(served.url + path, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.1)
    raise SystemExit(f"{served.name} did not start:\n{''.join(served.lines)[-3000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
