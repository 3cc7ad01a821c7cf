"""`turboserve serve`: backend, engine and HTTP put together, and what the operator is told meanwhile.

The port answers at once: `/health` says alive and `/ready` says no while the model loads. When loading fails
the server shuts down in order and the reason becomes the command's one-line error.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from turboserve import logs
from turboserve.api import http_server
from turboserve.api.app import create_app
from turboserve.cli.backend import device_name, keep_compiled_kernels, load_backend
from turboserve.cli.figures import amount
from turboserve.cli.progress import Bars
from turboserve.cli.rank_guard import Guard, end_now
from turboserve.errors import StartupError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

# Set by a router (`turboserve.fleet`) for the processes that it starts; no setting, because no operator sets it.
ROUTER_KEY_VARIABLE = "TURBOSERVE_ROUTER_KEY"

if TYPE_CHECKING:
    from turboserve.api.drain import Drain
    from turboserve.engine.engine import TurboEngine
    from turboserve.messages import EngineStats


def run(settings: Settings, guard: Guard | None = None) -> None:
    """Serve until a signal. Raises StartupError when the port, the backend or the model cannot be used.

    guard: of a model whose other parts other processes have.
    """
    progress = Bars()
    logs.configure(settings.log_level, settings.log_json, progress.log_stream())
    listener = http_server.bind(settings)  # before the model: a busy port is worth knowing at once
    with progress.step("importing MLX"):
        blas = load_backend()
    keep_compiled_kernels(settings.cache_dir)
    progress(f"MLX on {device_name()}, BLAS: {blas.describe()}")
    _check_local_model(settings.model)
    telemetry = Telemetry()
    engine = _make_engine(settings, telemetry, progress, guard)
    router_key = os.environ.pop(ROUTER_KEY_VARIABLE, "")
    app = create_app(engine, settings, telemetry, router_key=router_key)
    drain = app.state.context.drain
    if guard is not None:
        guard.watch(engine, drain)
    if router_key:
        threading.Thread(target=_follow_router, args=(drain,), name="router", daemon=True).start()
    starter = _Starter(engine, settings, drain, progress, is_behind_router=bool(router_key))
    caught = None
    try:
        caught = http_server.run(app, engine, settings, sock=listener, on_started=starter.begin)
    except KeyboardInterrupt:  # before the HTTP server takes the signals
        caught = signal.SIGINT
    finally:
        if caught is not None and not starter.is_settled:
            progress.close()
            _leave_loading(caught)
        if guard is not None and guard.why is not None:
            end_now(guard.why)
        if guard is not None:
            guard.unwatch()
        if not engine.stop():  # answers under way had their grace period in `http_server.run`
            logging.shutdown()
            os._exit(1)  # an ordinary exit would wait for the thread that is stuck
    if starter.error is not None:
        raise starter.error


def _leave_loading(caught: int) -> NoReturn:
    """End now: nobody is served yet, and nothing but the process's end can stop what loads the model."""
    said = "by Ctrl-C" if caught == signal.SIGINT else f"by {signal.Signals(caught).name}"
    sys.stderr.write(
        f"turboserve: interrupted {said} while the model was loaded; start it again when you like, "
        "what was downloaded and measured is kept\n"
    )
    logging.shutdown()
    sys.stderr.flush()
    os._exit(128 + caught)


def _follow_router(drain: Drain) -> None:
    """Shut down when the router is gone, however it ended: it holds the other end of our standard input."""
    while os.read(sys.stdin.fileno(), 1024):
        continue
    drain.begin()


def _check_local_model(model: str) -> None:
    """Report a mistyped folder before anything starts. Raises StartupError. OWNER/NAME may be a download: later."""
    from turboserve.engine.model_config import read_config
    from turboserve.engine.model_folder import is_hub_name, resolve_folder

    if not is_hub_name(model):
        read_config(resolve_folder(model))


def _make_engine(settings: Settings, telemetry: Telemetry, progress: Bars, guard: Guard | None) -> TurboEngine:
    # Late, because both import MLX, which must find the interposed BLAS.
    from turboserve.engine.engine import TurboEngine
    from turboserve.engine.garbage import GarbageTimes
    from turboserve.engine.loading import build_parts
    from turboserve.engine.model_folder import model_id_for

    return TurboEngine(
        settings,
        build_parts if guard is None else guard.build,
        model_id=model_id_for(settings.model, settings.served_model_name),
        telemetry=telemetry,
        progress=progress,
        garbage=GarbageTimes(),
        on_death=(lambda: None) if guard is None else guard.on_death,
    )


class _Starter:
    """Starts the engine once the port answers, and waits for the model beside the HTTP server."""

    def __init__(
        self, engine: TurboEngine, settings: Settings, drain: Drain, progress: Bars, *, is_behind_router: bool
    ) -> None:
        self._engine, self._settings, self._drain, self._progress = engine, settings, drain, progress
        self._is_behind_router = is_behind_router
        self.error: StartupError | None = None
        self.is_settled = False  # the model is loaded, or cannot be

    def begin(self, url: str) -> None:
        self._engine.start()
        threading.Thread(target=self._wait, args=(url,), name="starter", daemon=True).start()

    def _wait(self, url: str) -> None:
        try:
            self._engine.wait_until_ready()
        except StartupError as exc:
            self.error, self.is_settled = exc, True
            self._drain.begin()  # ends `http_server.run`
            return
        self.is_settled = True
        if not self._is_behind_router:
            self._progress("")
        self._progress(f"Ready: {self._engine.model_id} at {url}")  # a router reads this line
        if not self._is_behind_router:
            for line in essential_lines(url, self._engine.stats()):
                self._progress(line)
            self._progress(f"\n{curl_line(url, self._engine.model_id, self._settings)}\n")


def essential_lines(url: str, stats: EngineStats) -> list[str]:
    """What somebody who starts a server for the first time looks for among the other lines."""
    return [
        f"  clients    {url}/v1, as the base URL of OpenAI's",
        f"  browser    {url}/ is the dashboard, {url}/docs the API",
        f"  KV caches  {stats.kv_format}, {amount(stats.kv_budget_bytes)} for all conversations",
    ]


def curl_line(url: str, model_id: str, settings: Settings) -> str:
    """A request to paste into a shell. The key itself is not printed: terminals are recorded."""
    body = f'{{"model": "{model_id}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = '-H "Authorization: Bearer $TURBOSERVE_API_KEY" ' if settings.api_key or settings.api_keys else ""
    return f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"
