"""From the engine thread to the event loop: one request's events, coalesced and bounded.

The engine's `put` returns at once and never blocks on a slow reader: deltas that have not been
picked up yet are merged where they continue each other, and what is pending is bounded.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import replace
from itertools import groupby
from weakref import WeakKeyDictionary, ref

from turboserve.api.patience import Patience
from turboserve.errors import OverloadedError
from turboserve.messages import Delta, Event, Failed, Finished, ReasoningDelta, TextDelta, ToolCallDelta

# A reader a megabyte of text behind is not reading; its stream has hit the send timeout or soon will.
MAX_PENDING_CHARS = 1 << 20
DELTA_CHARS, LOGPROB_CHARS = 16, 64  # what a delta, and each of its logprobs, counts as beside its text


class _Waker:
    """Wakes the readers on one event loop: all that got something between two of its turns by one call into it.

    A call from another thread writes to a socket: for each token of each stream that was the engine's largest expense.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._due: list[Mailbox] = []

    def wake(self, mailbox: Mailbox) -> None:
        """Any thread: tell the mailbox's reader on its loop, soon."""
        with self._lock:
            self._due.append(mailbox)
            if len(self._due) > 1:
                return
        try:
            if (loop := self._loop()) is not None:
                loop.call_soon_threadsafe(self._tell_all)
        except RuntimeError:  # the loop has closed: the server is exiting and nobody waits any more
            return

    def _tell_all(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for mailbox in due:
            mailbox.tell()


_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = WeakKeyDictionary()


class Mailbox:
    """An `EventSink` whose other end is awaited on the event loop that made it.

    The first `Finished` or `Failed` closes it; whatever arrives later is dropped.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._waker = _wakers.setdefault(loop, _Waker(loop))
        self._loop = loop
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._is_silent = False
        self._silence: Patience | None = None
        self._lock = threading.Lock()
        self._deltas: list[Delta] = []
        self._merged: deque[Delta] = deque()
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
            wake = not self._deltas
            if isinstance(event, Finished | Failed):
                self._ending, wake = event, True
            else:
                self._deltas.append(event)
                self._num_chars += _size(event)
                if self._num_chars > MAX_PENDING_CHARS:
                    self._ending, wake = Failed(OverloadedError("The client reads too slowly.")), True
        if wake:
            self._waker.wake(self)

    def tell(self) -> None:
        """On the loop: whoever waits in `next` looks again."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self, silence_s: float | None = None) -> Event | None:
        """The next delta with all that continues it so far, or the ending; None after `silence_s` without either.

        One reader at a time, who always says the same `silence_s`. After the ending has been returned once, it is
        returned again.
        """
        if silence_s is not None and self._silence is None:
            self._silence = Patience(silence_s, self._be_silent)
        while (event := self._take()) is None:
            self._reader = self._loop.create_future()
            if self._silence is not None:
                self._silence.begin()
            try:
                await self._reader
            finally:
                self._reader = None
                if self._silence is not None:
                    self._silence.end()
            if self._is_silent:
                self._is_silent = False
                return self._take()
        return event

    def _be_silent(self) -> None:
        self._is_silent = True
        self.tell()

    def _take(self) -> Event | None:
        if self._merged:
            return self._merged.popleft()
        with self._lock:
            deltas, self._deltas, self._num_chars = self._deltas, [], 0
            if not deltas:
                return self._ending
        self._merged.extend(merged(deltas))
        return self._merged.popleft()


def merged(deltas: list[Delta]) -> list[Delta]:
    """The same in order, each run of deltas that continue each other as one."""
    if len(deltas) == 1:
        return deltas
    return [_joined(list(run)) for _, run in groupby(deltas, _thread_of)]


def _thread_of(delta: Delta) -> tuple[type, int]:
    return type(delta), delta.index if isinstance(delta, ToolCallDelta) else 0


def _joined(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    first = run[0]
    if isinstance(first, ToolCallDelta):
        return replace(first, arguments="".join(d.arguments for d in run if isinstance(d, ToolCallDelta)))
    text = "".join(d.text for d in run if isinstance(d, TextDelta | ReasoningDelta))
    if isinstance(first, ReasoningDelta):
        return ReasoningDelta(text)
    return TextDelta(text, tuple(one for d in run if isinstance(d, TextDelta) for one in d.logprobs))


def _size(delta: Delta) -> int:
    if isinstance(delta, ToolCallDelta):
        return DELTA_CHARS + len(delta.name) + len(delta.arguments)
    num_logprobs = sum(1 + len(one.top) for one in delta.logprobs) if isinstance(delta, TextDelta) else 0
    return DELTA_CHARS + len(delta.text) + LOGPROB_CHARS * num_logprobs
