"""How much memory the bodies of all requests under way take: bounded, whoever sends them, and counted.

A body is there as bytes while it arrives and as text until its answer is complete, in a queue or out of it.
"""

from __future__ import annotations

from starlette.types import Message, Receive

from turboserve.errors import OverloadedError
from turboserve.telemetry import Telemetry

ASCII_COST = 2  # bytes of memory for each byte of a body: as it came, and as text
OTHER_COST = 5  # Python's texts have four bytes a character when one of them needs so many
RETRY_AFTER_S = 5


class HeldBytes:
    """What all requests of one server hold. Belongs to the event loop."""

    def __init__(self, max_bytes: int, telemetry: Telemetry) -> None:
        self._max_bytes, self._telemetry = max_bytes, telemetry
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises OverloadedError when that were too much in all."""
        if num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            self._telemetry.request_refused("held_bytes")
            raise OverloadedError(
                "The server holds as many bytes of requests as it may. Try again later.", retry_after_s=RETRY_AFTER_S
            )
        self._add(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self._add(-num_bytes)

    def _add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._telemetry.held_bytes(self._num_bytes)


class CountedBody:
    """One request's body on its way; `close` when its answer is complete."""

    def __init__(self, receive: Receive, held: HeldBytes) -> None:
        self._receive, self._held = receive, held
        self._num_bytes = 0

    async def receive(self) -> Message:
        """The next message. Raises OverloadedError when there is no room for what it brings."""
        message = await self._receive()
        body: bytes = message.get("body", b"")
        num_bytes = len(body) * (ASCII_COST if body.isascii() else OTHER_COST)
        self._held.take(num_bytes)
        self._num_bytes += num_bytes
        return message

    def close(self) -> None:
        """Nothing of it is needed any more."""
        self._held.give_back(self._num_bytes)
        self._num_bytes = 0
