"""From the engine thread to the event loop: one request's events, coalesced and bounded.

The engine's `put` returns at once and never blocks on a slow reader: text that has not been
picked up yet is merged into one delta, so the mailbox holds at most one delta and one ending.
"""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakKeyDictionary, ref

from turboserve.errors import OverloadedError
from turboserve.messages import Event, Failed, Finished, TextDelta

# A reader a megabyte of text behind is not reading; its stream has hit the send timeout or soon will.
MAX_PENDING_CHARS = 1 << 20


class _Waker:
    """Wakes the readers on one event loop: all that got something between two of its turns by one call into it.

    A call from another thread writes to a socket: for each token of each stream that was the engine's largest expense.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._due: list[asyncio.Event] = []

    def wake(self, event: asyncio.Event) -> None:
        """Any thread: set the event on its loop, soon."""
        with self._lock:
            self._due.append(event)
            if len(self._due) > 1:
                return
        try:
            if (loop := self._loop()) is not None:
                loop.call_soon_threadsafe(self._set_all)
        except RuntimeError:  # the loop has closed: the server is exiting and nobody waits any more
            return

    def _set_all(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for event in due:
            event.set()


_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = WeakKeyDictionary()


class Mailbox:
    """An `EventSink` whose other end is awaited on the event loop that made it.

    The first `Finished` or `Failed` closes it; whatever arrives later is dropped.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._waker = _wakers.setdefault(loop, _Waker(loop))
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._num_chars = 0
        self._ending: Finished | Failed | None = None

    @property
    def finished(self) -> bool:
        """True once the engine has said that the request is complete."""
        return isinstance(self._ending, Finished)

    def put(self, event: Event) -> None:
        """Any thread. Never blocks and never raises."""
        with self._lock:
            if self._ending is not None:
                return
            wake = not self._parts
            if isinstance(event, TextDelta):
                self._parts.append(event.text)
                self._num_chars += len(event.text)
                if self._num_chars > MAX_PENDING_CHARS:
                    self._ending, wake = Failed(OverloadedError("The client reads too slowly.")), True
            else:
                self._ending, wake = event, True
        if wake:
            self._waker.wake(self._arrived)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """All text so far as one delta, or the ending; None after `timeout_s` of silence.

        After the ending has been returned once, it is returned again.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (event := self._take()) is None:
                    await self._arrived.wait()
        except TimeoutError:
            return None
        return event

    def _take(self) -> Event | None:
        with self._lock:
            self._arrived.clear()
            if self._parts:
                text, self._parts, self._num_chars = "".join(self._parts), [], 0
                return TextDelta(text)
            return self._ending
