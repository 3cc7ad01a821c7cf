"""How much memory the bodies of all requests under way take: bounded, whoever sends them, and counted.

A body is there as bytes while it arrives and as text until its answer is complete, in a queue or out of it.
"""

from __future__ import annotations

from starlette.types import Message, Receive

from turboserve.api.body import MAX_CONTAINERS, MAX_STRINGS, MAX_VALUES
from turboserve.errors import BodyTooLargeError, OverloadedError, StartupError
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

ASCII_COST = 2  # bytes of memory for each byte of a body: as it came, and as text
WIDE_COST = 5  # Python's texts have four bytes a character when one of them needs so many
# What a value, a string and an object take in Python beside their text: measured, and the most that was seen.
VALUE_BYTES = 36
STRING_BYTES = 96  # as a key, with its place in the object
CONTAINER_BYTES = 192
RETRY_AFTER_S = 5
# What comes here goes to a file as it arrives, and is held by nobody.
IMPORT_PATH = "/v1/sessions/import"


def check_body_limits(settings: Settings) -> None:
    """Raises StartupError where the largest body that is taken could never be held."""
    if settings.max_body_bytes > settings.max_held_bytes:
        raise StartupError(
            f"max_body_bytes = {settings.max_body_bytes} is more than max_held_bytes = {settings.max_held_bytes}, "
            "which all bodies share: lower the first or raise the second."
        )


class HeldBytes:
    """What all requests of one server hold. Belongs to the event loop."""

    def __init__(self, max_bytes: int, telemetry: Telemetry) -> None:
        self._max_bytes, self._telemetry = max_bytes, telemetry
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """All that is held now."""
        return self._num_bytes

    def take(self, num_bytes: int, of_bytes: int) -> None:
        """So many more of a request that then holds `of_bytes` by itself.

        Raises OverloadedError when that were too much in all, BodyTooLargeError when it will always be.
        """
        if of_bytes > self._max_bytes:
            raise BodyTooLargeError(
                f"The body takes {of_bytes} bytes of memory or more, and this server holds {self._max_bytes} in all."
            )
        if num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            self._telemetry.request_refused("held_bytes")
            raise OverloadedError("The server holds as many bytes of requests as it may.", retry_after_s=RETRY_AFTER_S)
        self._add(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self._add(-num_bytes)

    def _add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._telemetry.held_bytes(self._num_bytes)


class CountedBody:
    """One request's body on its way; `close` when its answer is complete."""

    def __init__(self, receive: Receive, held: HeldBytes, path: str = "") -> None:
        self._receive, self._held, self._is_held = receive, held, path != IMPORT_PATH
        self._size = BodySize()
        self._num_bytes = 0

    async def receive(self) -> Message:
        """The next message. Raises OverloadedError or BodyTooLargeError when there is no room for what it brings."""
        message = await self._receive()
        if not self._is_held:
            return message
        self._size.add(message.get("body", b""))
        num_bytes = self._size.memory_bytes
        self._held.take(num_bytes - self._num_bytes, of_bytes=num_bytes)
        self._num_bytes = num_bytes
        return message

    def close(self) -> None:
        """Nothing of it is needed any more."""
        self._held.give_back(self._num_bytes)
        self._num_bytes = 0


class BodySize:
    """What a body of JSON will take in memory, from its bytes so far.

    Values, strings and containers are counted by their characters, also those inside texts, but no more of them than a
    body may have: so the sum is never too small.
    """

    def __init__(self) -> None:
        self._num_bytes = self._num_commas = self._num_quotes = self._num_openings = 0
        self._is_wide = False
        self._last = b""

    def add(self, part: bytes) -> None:
        """The body's next bytes."""
        self._num_bytes += len(part)
        self._num_commas += part.count(b",")
        self._num_quotes += part.count(b'"')
        self._num_openings += part.count(b"[") + part.count(b"{")
        # An escape may be of a wide character, and may have begun in the part before.
        self._is_wide = self._is_wide or not part.isascii() or b"\\u" in part or (self._last + part[:1]) == b"\\u"
        self._last = part[-1:] or self._last

    @property
    def memory_bytes(self) -> int:
        """Of the bytes, their text, and the values that are made of it."""
        return (
            self._num_bytes * (WIDE_COST if self._is_wide else ASCII_COST)
            + min(self._num_commas, MAX_VALUES) * VALUE_BYTES
            + min(self._num_quotes // 2, MAX_STRINGS) * STRING_BYTES
            + min(self._num_openings, MAX_CONTAINERS) * CONTAINER_BYTES
        )
