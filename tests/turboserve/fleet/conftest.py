"""A router on a free port whose models are scripts, run as an operator's would be but started in a moment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from turboserve.api import http_server
from turboserve.api.drain import Drain
from turboserve.fleet.app import create_router_app
from turboserve.fleet.fleet import Fleet
from turboserve.fleet.plan import ModelPlan, make_catalogue
from turboserve.fleet.process import Command
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import ModelEntry, Settings
from turboserve.telemetry import Telemetry

SCRIPT = Path(__file__).with_name("fake_model.py")
MEMORY = MemoryInfo(100 << 30, 100 << 30)
QUICK: dict[str, Any] = {
    "port": 0,
    "send_timeout_s": 5.0,
    "keepalive_interval_s": 0.1,
    "shutdown_grace_s": 0.5,
    "models_memory": "1000MB",
}

WAIT_S = 60.0  # for what must come about: generous, so that only a hang reaches it

How = dict[str, dict[str, Any]]


@dataclass
class Router:
    """A running router, its fleet and what its models' processes said."""

    url: str
    fleet: Fleet
    starts_file: Path
    go_file: Path
    drain: Drain
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def ask(self, model: str, *, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": model, **body}, timeout=WAIT_S)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=WAIT_S)

    def status(self, name: str) -> str:
        return str(self.get(f"/v1/models/{name}").json()["status"])

    def wait_for(self, name: str, status: str, timeout_s: float = WAIT_S) -> None:
        wait_until(lambda: self.status(name) == status, timeout_s)

    def go(self) -> None:
        """Lets models that wait for it (`go_file`) start, and end their streams."""
        self.go_file.touch()

    def starts(self, name: str) -> int:
        return self.starts_file.read_text().split().count(name) if self.starts_file.exists() else 0

    def kill(self, name: str) -> None:
        process = self.fleet[name].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


class Clock:
    """Stands still until a test moves it on."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The fleet's clock, by which it lets models alone and unloads idle ones."""
    clock = Clock()
    monkeypatch.setattr("turboserve.fleet.fleet.time", clock)
    return clock


Start = Callable[..., Router]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start({"a": {...}}, how={"a": {...}}, **settings)`: tables of models, how their scripts behave, settings.

    Models with `how={"a": {"waits": True}}` start, and end their streams, once the router's `go` is called.
    """
    with ExitStack() as stack:
        yield lambda tables, how=None, **settings: stack.enter_context(_running(tmp_path, tables, how or {}, settings))


@contextmanager
def _running(tmp_path: Path, tables: How, how: How, options: dict[str, Any]) -> Iterator[Router]:
    entries = {name: ModelEntry(**{"memory": 400_000_000, "kv_budget": "64MiB", **t}) for name, t in tables.items()}
    settings = Settings(**{**QUICK, "models": entries, **options})
    starts_file, go_file = tmp_path / "starts", tmp_path / "go"

    def launch(plan: ModelPlan, router_key: str) -> Command:
        behaves = how.get(plan.name, {})
        waits = {"go_file": str(go_file)} if behaves.get("waits") else {}
        script = json.dumps({"name": plan.name, "starts_file": str(starts_file), **waits, **behaves})
        return Command([sys.executable, str(SCRIPT), script], {**os.environ, "TURBOSERVE_ROUTER_KEY": router_key})

    listener = http_server.bind(settings)
    made: dict[str, Any] = {}
    begun = threading.Event()
    lines: list[tuple[str, str, str]] = []

    async def serve() -> None:
        catalogue, budget_bytes = make_catalogue(settings, MEMORY)
        fleet = Fleet(catalogue, budget_bytes, settings, launcher=launch, on_output=lambda *line: lines.append(line))
        app = create_router_app(fleet, catalogue, settings, Telemetry())
        made.update(fleet=fleet, server=http_server.make_server(app, settings), drain=app.state.context.drain)
        fleet.begin()
        begun.set()
        await made["server"].serve(sockets=[listener])
        await fleet.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert begun.wait(WAIT_S)
    router = Router(http_server.address_url(listener), made["fleet"], starts_file, go_file, made["drain"], lines)
    try:
        yield router
    finally:
        made["server"].handle_exit(signal.SIGTERM, None)
        thread.join(timeout=WAIT_S)
        assert not thread.is_alive(), "the router did not end"
        assert all(model.process is None for model in router.fleet)
