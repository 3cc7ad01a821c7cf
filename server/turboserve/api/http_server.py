"""Runs the application: binds the port, serves HTTP/1.1, shuts down in order.

The first SIGTERM or SIGINT begins draining: `/ready` and new requests get 503, running answers
have `shutdown_grace_s`, then end with an explicit error. A second signal does not wait.
Owns sockets and signals; starting and stopping the engine is the caller's business.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from turboserve.api.activation import inherited_listener
from turboserve.api.connection import connection_factory
from turboserve.api.drain import Drain
from turboserve.api.frontdoor import MAX_HEADER_BYTES
from turboserve.api.held_bytes import check_body_limits
from turboserve.api.security import check_exposure, is_loopback
from turboserve.descriptors import connection_limit, file_limit, files_for, raise_limit
from turboserve.engine.protocol import Engine
from turboserve.errors import StartupError
from turboserve.settings import Settings

logger = logging.getLogger("turboserve.api")

# Time for the last events to reach their readers once the grace period is over.
FLUSH_S = 1
BACKLOG = 2048  # connections that the system holds until they are accepted
ACCEPT_BATCH = 64  # of them at once: more could use up the process's files before the first is counted
COMPLAINT_EVERY_S = 60.0
# What a system is short of when it accepts no connection, and what helps.
SHORTAGES = {
    errno.EMFILE: "raise this process's limit of open files (ulimit -n N), or lower max_connections",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max on Linux, kern.maxfiles on macOS)",
    errno.ENOBUFS: "the system has no memory for them; end other programs, or lower max_connections",
    errno.ENOMEM: "the system has no memory for them; end other programs, or lower max_connections",
}


def bind(settings: Settings) -> socket.socket:
    """A listening socket: systemd's, where it handed one over, else on settings.host:port; port 0 takes any free one.

    Raises StartupError, in one line that names the fix, when that cannot or must not be done.
    Call it before loading a model, so that a busy port is reported at once.
    """
    check_exposure(settings)
    check_body_limits(settings)
    raise_limit()
    _warn_of_few_files(settings)
    if (sock := inherited_listener()) is not None:
        return _checked(sock, settings)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as exc:
        raise StartupError(_bind_failure(exc, settings)) from exc


def _checked(sock: socket.socket, settings: Settings) -> socket.socket:
    """`sock`, if it reaches as far as `settings.host` says, by which keys and Host headers are judged."""
    host = sock.getsockname()[0]
    if is_loopback(host) != is_loopback(settings.host):
        sock.close()
        raise StartupError(f"systemd's socket listens on {host}, and host is {settings.host}: set --host {host}.")
    return sock


def _warn_of_few_files(settings: Settings) -> None:
    limit, needed = file_limit(), files_for(settings.max_connections, is_router=bool(settings.models))
    if settings.max_connections and limit is not None and needed > limit:
        logger.warning(
            "max_connections = %d may need %d open files, and the limit is %d: raise it (ulimit -n %d), or allow fewer",
            settings.max_connections,
            needed,
            limit,
            needed,
        )


def _bind_failure(exc: OSError, settings: Settings) -> str:
    place = f"{settings.host}:{settings.port}"
    if exc.errno == errno.EADDRINUSE:
        return f"{place} is in use: stop the other server or pass another --port, such as {settings.port + 1}."
    if exc.errno == errno.EACCES:
        return f"Not allowed to listen on {place}: pass a --port of 1024 or more."
    return f"Cannot listen on {place} ({exc.strerror or exc}): pass --host with an address of this machine."


def address_url(sock: socket.socket) -> str:
    """The URL at which a bound socket answers, such as `http://127.0.0.1:8000`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Uvicorn's server, which closes its port and cuts streams on a signal, taught to drain first."""

    def __init__(self, config: uvicorn.Config, drain: Drain, grace_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._grace_s = grace_s
        self._expires_at: float | None = None
        self._complained_at = -COMPLAINT_EVERY_S
        self.last_signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, a few connections at a time."""
        asyncio.get_running_loop().set_exception_handler(self._on_loop_trouble)
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # asyncio has set its batch as the queue's length as well

    def _on_loop_trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Without files for new connections asyncio tries again every second, and would write a traceback each time."""
        exc = context.get("exception")
        cure = SHORTAGES.get(exc.errno or 0) if isinstance(exc, OSError) else None
        if not (isinstance(exc, OSError) and cure):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._complained_at >= COMPLAINT_EVERY_S:
            self._complained_at = time.monotonic()
            logger.error("no new connections for now (%s): %s", exc.strerror, cure)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. Unlike uvicorn's, it lets `run` return, so that the engine can be closed."""
        self.last_signal = sig
        self.force_exit = self._drain.draining
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called every 100 ms on the event loop; True ends serving."""
        stop = await super().on_tick(counter)
        return stop or (self._drain.draining and self._drained())

    def _drained(self) -> bool:
        now = time.monotonic()
        if self._expires_at is None:
            self._expires_at = now + self._grace_s
            logger.info("shutting down: %d answers under way", self._drain.num_running)
        if self._drain.num_running and now < self._expires_at and not self.force_exit:
            return False
        self._drain.expire()
        return True


def make_server(app: FastAPI, settings: Settings) -> DrainingServer:
    """A server not yet running; `serve(sockets=[...])` runs it on an event loop."""
    factory = connection_factory(
        request_timeout_s=settings.request_timeout_s,
        send_timeout_s=settings.send_timeout_s,
        telemetry=app.state.context.telemetry,
        max_connections=settings.max_connections or connection_limit(),
    )
    config = uvicorn.Config(
        app,
        http=factory,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=ACCEPT_BATCH,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=FLUSH_S,
    )
    return DrainingServer(config, app.state.context.drain, settings.shutdown_grace_s)


def run(
    app: FastAPI,
    engine: Engine,
    settings: Settings,
    *,
    sock: socket.socket | None = None,
    on_started: Callable[[str], None] | None = None,
) -> int | None:
    """Serves until a signal has been handled, then returns it; the engine is still the caller's to close.

    `sock` is what `bind` returned, if it has been called already. `on_started` gets the URL once
    connections are accepted. None: the shutdown began in another way. Raises StartupError.
    """
    listener = sock or bind(settings)
    server = make_server(app, settings)
    # The socket listens since `bind`: whoever connects from here on is answered.
    url = address_url(listener)
    logger.info("listening at %s: /health answers, the model %s is being loaded", url, engine.model_id)
    if on_started is not None:
        on_started(url)
    asyncio.run(server.serve(sockets=[listener]))
    return server.last_signal
