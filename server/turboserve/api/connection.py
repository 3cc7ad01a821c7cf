"""Uvicorn's HTTP/1.1 connection with the deadlines and answers that it lacks.

Adds: 408 when a request takes too long to arrive, 431 for oversized headers, OpenAI-shaped
400 for broken framing, an abort for readers that stall, half-closed sockets as disconnects,
disconnects noticed even while a client pipelines, and a bound on connections.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from functools import partial
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from turboserve.api.anthropic_errors import anthropic_envelope, speaks_anthropic
from turboserve.api.connection_watch import ConnectionLimit, CountingTransport, ReaderWatch, bound_send_buffer
from turboserve.api.frontdoor import MAX_HEADER_BYTES
from turboserve.api.held_bytes import IMPORT_PATH
from turboserve.api.replies import dump, error_headers
from turboserve.api.stream_body import BODY_WRITER, BodyWriter
from turboserve.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    OverloadedError,
    SlowRequestError,
    TurboServeError,
)
from turboserve.telemetry import Telemetry

logger = logging.getLogger("turboserve.api")

MAX_PIPELINED_BYTES = 64 * 1024
# After a refusal we read on this long: closing with unread input would reset the connection
# and take the answer away from the client.
LINGER_S = 2.0
IMPORT_STEP_BYTES = 1 << 20  # of an exported session must arrive within the time that other requests have in all


class Connection(H11Protocol):
    """One client connection. `request_timeout_s` covers headers and body, `send_timeout_s` a stalled reader."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        request_timeout_s: float,
        send_timeout_s: float,
        telemetry: Telemetry,
        limit: ConnectionLimit,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._served, self.app = self.app, self._serve
        self._request_timeout_s = request_timeout_s
        self._send_timeout_s = send_timeout_s
        self._telemetry = telemetry
        self._limit = limit
        self._watch: ReaderWatch | None = None
        self._arrival_deadline: asyncio.TimerHandle | None = None
        self._lingering = False
        self._import_bytes = 0  # of an exported session, since its deadline was last moved on

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with what ASGI's messages cannot do."""
        if scope["http_version"] == "1.1":  # 1.0 knows no chunks
            scope["extensions"] = {BODY_WRITER: BodyWriter(self.cycle)}
        await self._served(scope, receive, send)

    # Arrival: a request must be complete within the deadline.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counting = CountingTransport(transport, lambda: watch.wrote())
        self._watch = watch = ReaderWatch(counting, self._send_timeout_s, self._stalled)
        super().connection_made(counting)  # type: ignore[arg-type]  # quacks like one
        # asyncio does so only for sockets created with an explicit protocol number; without it every
        # answer waits 40 ms for the client's delayed acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound_send_buffer(transport.get_extra_info("socket"))
        self._arm_arrival()
        if not self._limit.enter(self):
            self._refuse(OverloadedError("The server has as many connections as it can.", retry_after_s=5))

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered: whoever asks nothing, or not yet all of it, may be asked to come again."""
        return self.cycle is None or self.cycle.response_complete

    def give_way(self) -> None:
        """Another connection needs the place."""
        self._telemetry.http_disconnect("gave_way")
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        self._limit.touch(self)
        self._give_time_to_imports(len(data))
        if self._receiving():
            self._arm_arrival()
        super().data_received(data)
        if not self._receiving() or self._between_requests():
            self._disarm_arrival()
        self._keep_reading()

    def _give_time_to_imports(self, num_bytes: int) -> None:
        """An exported session may be far larger than any other body: it has the deadline for each of its parts."""
        if self.conn.their_state is not h11.SEND_BODY or self.scope["path"] != IMPORT_PATH:
            self._import_bytes = 0
            return
        self._import_bytes += num_bytes
        if self._import_bytes >= IMPORT_STEP_BYTES:
            self._import_bytes = 0
            self._disarm_arrival()

    def _receiving(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _arm_arrival(self) -> None:
        if self._arrival_deadline is None:
            self._arrival_deadline = self.loop.call_later(self._request_timeout_s, self._too_slow)

    def _disarm_arrival(self) -> None:
        if self._arrival_deadline is not None:
            self._arrival_deadline.cancel()
            self._arrival_deadline = None

    def _too_slow(self) -> None:
        self._arrival_deadline = None
        if self._between_requests():
            self.transport.close()  # connected and never said a word: nothing to answer
            return
        self._refuse(SlowRequestError(f"The request did not arrive within {self._request_timeout_s:g} s."))

    def _keep_reading(self) -> None:
        """Uvicorn stops reading when a client pipelines, and would then miss its departure."""
        waiting = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if not (waiting and self.flow.read_paused) or self.transport.is_closing():
            return
        if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    # Refusals below the application.

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn from its handler of h11's RemoteProtocolError, which knows the better status."""
        cause = sys.exc_info()[1]
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            self._refuse(HeadersTooLargeError(f"The headers are larger than {MAX_HEADER_BYTES} bytes."))
        else:
            self._refuse(InvalidRequestError("This is not valid HTTP/1.1."))

    def _refuse(self, error: TurboServeError) -> None:
        """Answers and closes; the application, if it already runs, sees a disconnect."""
        self._disarm_arrival()
        running = self.cycle is not None and not self.cycle.response_complete
        if running:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answerable = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if answerable and not self.transport.is_closing():
            self._telemetry.http_request("connection", error.status)
            self._write(error)
            self._linger()
        else:
            self.transport.close()

    def _write(self, error: TurboServeError) -> None:
        has_path = self.conn.their_state is h11.SEND_BODY  # else `scope` is of an earlier request, or missing
        is_anthropic = has_path and speaks_anthropic(self.scope["path"])
        body = dump(anthropic_envelope(error, None) if is_anthropic else error.envelope())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.encode(), value.encode()) for name, value in error_headers(error).items()),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")

    def _linger(self) -> None:
        self._lingering = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)

    # Departure.

    def eof_received(self) -> None:
        """A half-closed socket counts as gone: generation must not run for a reader that may not exist."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_arrival()
        self._limit.leave(self)
        if self._watch is not None:
            self._watch.stop()
        super().connection_lost(exc)

    # Stalled readers.

    def _stalled(self) -> None:
        self._telemetry.http_disconnect("stalled")
        logger.warning("the client stopped reading")
        self.transport.abort()


def connection_factory(
    *, request_timeout_s: float, send_timeout_s: float, telemetry: Telemetry, max_connections: int
) -> Any:
    """What uvicorn's `Config.http` takes: called with config, server_state, app_state and _loop."""
    return partial(
        Connection,
        request_timeout_s=request_timeout_s,
        send_timeout_s=send_timeout_s,
        telemetry=telemetry,
        limit=ConnectionLimit(max_connections),
    )
