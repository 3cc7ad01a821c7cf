"""`turboserve serve` with several models: the router's process, from the port to the last model's end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from turboserve import logs
from turboserve.api import http_server
from turboserve.fleet.app import create_router_app
from turboserve.fleet.fleet import Fleet
from turboserve.fleet.plan import Catalogue, make_catalogue
from turboserve.fleet.process import Launcher, StreamName, serve_command
from turboserve.machine_memory import detect_memory
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

logger = logging.getLogger("turboserve.fleet")


def run(settings: Settings) -> None:
    """Serve until a signal. Raises StartupError when the port cannot be used, or memory cannot be told."""
    logs.configure(settings.log_level, settings.log_json)
    listener = http_server.bind(settings)
    catalogue, budget_bytes = make_catalogue(settings, detect_memory())
    asyncio.run(serve(listener, catalogue, budget_bytes, settings, serve_command))


async def serve(
    listener: socket.socket, catalogue: Catalogue, budget_bytes: int, settings: Settings, launcher: Launcher
) -> None:
    """Answers on `listener` until a signal has been handled and every process has ended."""
    telemetry = Telemetry()
    output = Output(settings.log_json)
    fleet = Fleet(catalogue, budget_bytes, settings, launcher=launcher, on_output=output.pass_on)
    app = create_router_app(fleet, catalogue, settings, telemetry)
    server = http_server.make_server(app, settings)
    url = http_server.address_url(listener)
    names = ",".join(plan.name for plan in catalogue)
    logger.info("serving %s at %s within %d MiB", names, url, budget_bytes >> 20)
    _say(f"Ready: {names} at {url}")
    fleet.begin()
    try:
        await server.serve(sockets=[listener])
    finally:
        await fleet.stop()


class Output:
    """What models' processes say, passed on line by line; each line of a person's reading begins with the model."""

    def __init__(self, is_json: bool) -> None:
        self._is_json = is_json

    def pass_on(self, model_name: str, stream: StreamName, line: str) -> None:
        """JSON lines stay as they are: a program reads them."""
        if not line.strip():
            return
        if stream == "stdout":
            _say(f"[{model_name}] {line}")
            return
        sys.stderr.write((line if self._is_json and line.startswith("{") else f"[{model_name}] {line}") + "\n")
        sys.stderr.flush()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
