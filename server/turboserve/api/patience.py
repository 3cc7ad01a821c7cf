"""A time limit that costs nothing while it is kept.

Every token of every stream waits for the engine and then for its reader, each within a limit. A timer for each of these
waits was the event loop's largest expense; here one timer looks, now and then, at when the present wait began.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Patience:
    """Calls `on_end` once one wait has lasted for `limit_s`. On the event loop that made it only."""

    def __init__(self, limit_s: float, on_end: Callable[[], None]) -> None:
        self._limit_s, self._on_end = limit_s, on_end
        self._loop = asyncio.get_running_loop()
        self._since_s: float | None = None  # None: nothing is waited for
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins now."""
        self._since_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since_s + self._limit_s, self._look)

    def end(self) -> None:
        """What was waited for is there."""
        self._since_s = None

    def close(self) -> None:
        """Nothing will be waited for any more."""
        self._since_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._since_s is None:
            return  # the next wait sets a timer
        end_s = self._since_s + self._limit_s
        if self._loop.time() < end_s:
            self._timer = self._loop.call_at(end_s, self._look)
        else:
            self._since_s = None
            self._on_end()
