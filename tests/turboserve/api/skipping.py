"""An event loop on whose clock nothing takes time but waiting, which is over at once."""

from __future__ import annotations

import asyncio
import selectors


class _Skipping(selectors.DefaultSelector):
    """Goes on to the next timer instead of waiting for it."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.skipped_s += max(timeout or 0.0, 0.0)
        return super().select(None if timeout is None else 0)


class SkippingLoop(asyncio.SelectorEventLoop):
    """Counts the timers it was given; a machine that is slow for seconds changes nothing of what happens when."""

    num_timers = 0

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.skipped_s

    def call_at(self, *args: object, **kwargs: object) -> asyncio.TimerHandle:
        self.num_timers += 1
        return super().call_at(*args, **kwargs)  # type: ignore[arg-type]
