"""The parts of a streamed reply on their way to the connection: by ASGI's messages, or written at once.

A message passes every layer between the route and the socket, and h11, which frames it: for each token of each stream
that was most of what the event loop did. Between a reply's begin and its end there is nothing for them to do.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from turboserve.api.patience import Patience

BODY_WRITER = "turboserve.body_writer"  # of scope["extensions"]


class BodyWriter:
    """Writes parts of one reply's body that others follow, without a wait and past the layers that only pass them on.

    `scope["extensions"][BODY_WRITER]` of each request. For replies without a length, which HTTP/1.1 sends in chunks;
    their begin and end go the usual way.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """Whether the reply has begun, is not over, and its reader keeps up."""
        cycle = self._cycle
        return (
            cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
        )

    def write(self, part: bytes) -> None:
        """Only while `is_open`; not an empty part, which would end the body."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


class StreamBody:
    """The parts of a streamed reply as they are sent, each within `timeout_s`. A context for the task that sends.

    The context ends in TimeoutError when the client has not taken earlier bytes in that time.
    """

    def __init__(self, send: Send, timeout_s: float, writer: BodyWriter | None = None) -> None:
        """writer: the connection's, where there is one below the application."""
        self._send = send
        self._limit = asyncio.timeout(None)
        self._patience = Patience(timeout_s, self._give_up)
        self._writer = writer
        self._has_begun = self._is_sending = False

    async def __aenter__(self) -> StreamBody:
        await self._limit.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        self._patience.close()
        await self._limit.__aexit__(*raised)

    async def begin(self, headers: list[tuple[bytes, bytes]], part: bytes) -> None:
        """Status and headers, and the first part, which may be empty."""
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send(part)
        self._has_begun = True

    async def send(self, part: bytes) -> None:
        """A part that others follow; an empty one is none."""
        if part:
            await self._patiently({"type": "http.response.body", "body": part, "more_body": True})

    @property
    def can_write(self) -> bool:
        """Whether `write` may be called: the beginning is out, and no earlier part waits for the reader."""
        return self._has_begun and not self._is_sending and self._writer is not None and self._writer.is_open

    def write(self, part: bytes) -> None:
        """As `send`, at once; only while `can_write`."""
        assert self._writer is not None, "there is no connection to write to"
        if part:
            self._writer.write(part)

    async def end(self, part: bytes) -> None:
        """The last part, which may be empty."""
        await self._patiently({"type": "http.response.body", "body": part, "more_body": False})

    async def _patiently(self, message: Message) -> None:
        self._is_sending = True
        self._patience.begin()
        await self._send(message)
        self._patience.end()
        self._is_sending = False

    def _give_up(self) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time())
