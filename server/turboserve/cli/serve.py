"""`turboserve serve`: backend, engine and HTTP put together, and what the operator is told meanwhile.

The port answers at once: `/health` says alive and `/ready` says no while the model loads. When loading fails
the server shuts down in order and the reason becomes the command's one-line error.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from turboserve import logs
from turboserve.api import http_server
from turboserve.api.app import create_app
from turboserve.cli.backend import device_name, keep_compiled_kernels, load_backend
from turboserve.errors import StartupError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

# Set by a router (`turboserve.fleet`) for the processes that it starts; no setting, because no operator sets it.
ROUTER_KEY_VARIABLE = "TURBOSERVE_ROUTER_KEY"

if TYPE_CHECKING:
    from turboserve.api.drain import Drain
    from turboserve.engine.engine import TurboEngine


def say(line: str) -> None:
    """Progress for whoever started the command; logs go to stderr, this to stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(settings: Settings) -> None:
    """Serve until a signal. Raises StartupError when the port, the backend or the model cannot be used."""
    logs.configure(settings.log_level, settings.log_json)
    listener = http_server.bind(settings)  # before the model: a busy port is worth knowing at once
    blas = load_backend()
    keep_compiled_kernels(settings.cache_dir)
    say(f"MLX on {device_name()}, BLAS: {blas.describe()}")
    _check_local_model(settings.model)
    telemetry = Telemetry()
    engine = _make_engine(settings, telemetry)
    router_key = os.environ.pop(ROUTER_KEY_VARIABLE, "")
    app = create_app(engine, settings, telemetry, router_key=router_key)
    drain = app.state.context.drain
    if router_key:
        threading.Thread(target=_follow_router, args=(drain,), name="router", daemon=True).start()
    starter = _Starter(engine, settings, drain, is_behind_router=bool(router_key))
    try:
        http_server.run(app, engine, settings, sock=listener, on_started=starter.begin)
    finally:
        engine.stop()  # answers under way had their grace period in `http_server.run`
    if starter.error is not None:
        raise starter.error


def _follow_router(drain: Drain) -> None:
    """Shut down when the router is gone, however it ended: it holds the other end of our standard input."""
    while os.read(sys.stdin.fileno(), 1024):
        continue
    drain.begin()


def _check_local_model(model: str) -> None:
    """Report a mistyped folder before anything starts. Raises StartupError. OWNER/NAME may be a download: later."""
    from turboserve.engine.model_config import read_config
    from turboserve.engine.model_folder import resolve_folder

    if model.count("/") != 1 or Path(model).expanduser().exists():
        read_config(resolve_folder(model))


def _make_engine(settings: Settings, telemetry: Telemetry) -> TurboEngine:
    # Late, because both import MLX, which must find the interposed BLAS.
    from turboserve.engine.engine import TurboEngine
    from turboserve.engine.loading import build_parts
    from turboserve.engine.model_folder import model_id_for

    model_id = model_id_for(settings.model, settings.served_model_name)
    return TurboEngine(settings, build_parts, model_id=model_id, telemetry=telemetry, progress=say)


class _Starter:
    """Starts the engine once the port answers, and waits for the model beside the HTTP server."""

    def __init__(self, engine: TurboEngine, settings: Settings, drain: Drain, *, is_behind_router: bool) -> None:
        self._engine, self._settings, self._drain = engine, settings, drain
        self._is_behind_router = is_behind_router
        self.error: StartupError | None = None

    def begin(self, url: str) -> None:
        self._engine.start()
        threading.Thread(target=self._wait, args=(url,), name="starter", daemon=True).start()

    def _wait(self, url: str) -> None:
        try:
            self._engine.wait_until_ready()
        except StartupError as exc:
            self.error = exc
            self._drain.begin()  # ends `http_server.run`
            return
        say(f"Ready: {self._engine.model_id} at {url}")  # a router reads this line
        if not self._is_behind_router:
            say(f"\n{curl_line(url, self._engine.model_id, self._settings)}\n")


def curl_line(url: str, model_id: str, settings: Settings) -> str:
    """A request to paste into a shell. The key itself is not printed: terminals are recorded."""
    body = f'{{"model": "{model_id}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = '-H "Authorization: Bearer $TURBOSERVE_API_KEY" ' if settings.api_key or settings.api_keys else ""
    return f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"
