"""A real server process with the embedded model, as an operator would start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from tests.turboserve.api.contract import Contract

START_TIMEOUT_S = 120  # generous: the suite may run on a loaded machine; bench/startup.py measures the real figure


@dataclass
class Server:
    """Where it answers, its process, everything it printed so far, and one client for all threads."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    @cached_property
    def contract(self) -> Contract:
        return Contract(httpx.get(f"{self.url}/openapi.json", timeout=30).json())

    def get(self, path: str) -> httpx.Response:
        """A reply that the server's own /openapi.json allows."""
        return self._ask("GET", path)

    def _ask(self, method: str, path: str) -> httpx.Response:
        reply = httpx.request(method, f"{self.url}{path}", timeout=30)
        self.contract.check(reply)
        return reply

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/v1/kv/stats").json()
        return stats

    def forget_sessions(self) -> None:
        """Delete every conversation that is kept."""
        self.wait_until_idle()
        while page := self.get("/v1/sessions?limit=100").json()["data"]:
            for session in page:
                self._ask("DELETE", f"/v1/sessions/{session['id']}")

    def wait_until_idle(self) -> dict[str, Any]:
        """The statistics once nothing runs or waits."""
        deadline = time.monotonic() + 60
        while True:
            stats = self.stats()
            if stats["requests"] == {"running": 0, "waiting": 0}:
                return stats
            assert time.monotonic() < deadline, f"still busy: {stats['requests']}"
            time.sleep(0.05)


@contextmanager
def running_server(cache_dir: Path, *flags: str, program: tuple[str, ...] = ("-m", "turboserve")) -> Iterator[Server]:
    """Start `turboserve serve` (`program` runs it) with these flags on a free port; ends it with SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--port", "0", "--cache-dir", str(cache_dir), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"},
    )
    server = Server("", process)
    reader = threading.Thread(target=_collect, args=(process, server.lines), daemon=True)
    reader.start()
    try:
        server.url = _wait_until_ready(server)
        yield server
    finally:
        server.client.close()
        process.terminate()
        process.wait(timeout=60)
        reader.join(timeout=10)
        assert process.stdout is not None
        process.stdout.close()


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    lines.extend(iter(process.stdout.readline, ""))


def _wait_until_ready(server: Server) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        if match := re.search(r"Ready: \S+ at (http://\S+)", "".join(server.lines)):
            return match.group(1)
        time.sleep(0.05)
    raise AssertionError("the server did not become ready:\n" + "".join(server.lines))
