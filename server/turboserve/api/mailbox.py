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
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from turboserve.api.patience import Patience
from turboserve.errors import OverloadedError
from turboserve.messages import Delta, Event, Failed, Finished, ReasoningDelta, TextDelta, ToolCallDelta

# A reader a megabyte of text behind is not reading; its stream has hit the send timeout or soon will.
MAX_PENDING_CHARS = 1 << 20
FEW_STREAMS = 8  # up to so many get every token by itself, however fast it follows
MANY_STREAMS = 32  # beyond so many, intervals grow with their number, so that wakings do not
DELTA_CHARS, LOGPROB_CHARS = 16, 64  # what a delta, and each of its logprobs, counts as beside its text


class _Waker:
    """Wakes the readers on one event loop: all that got something between two of its turns by one call into it.

    A call from another thread writes to a socket: for each token of each stream that was the engine's largest expense.
    While there are many readers, those that wait for no beginning or end are woken together, once an interval: each
    waking takes Python time that the engine's thread then waits for. Twice as many as MANY_STREAMS are woken half as
    often.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._due: list[Mailbox] = []
        self._held: list[Mailbox] = []  # those that are woken at the interval's end
        self._timer: asyncio.TimerHandle | None = None
        self._told_s = 0.0  # when all were woken
        self.num_open = 0  # mailboxes

    def wake(self, mailbox: Mailbox) -> None:
        """Any thread: tell the mailbox's reader on its loop, soon."""
        with self._lock:
            self._due.append(mailbox)
            if len(self._due) > 1:
                return
        try:
            if (loop := self._loop()) is not None:
                loop.call_soon_threadsafe(self._tell_due)
        except RuntimeError:  # the loop has closed: the server is exiting and nobody waits any more
            return

    def _tell_due(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        loop = self._loop()
        if loop is None or not due:
            return
        now_s = loop.time()
        next_s = self._told_s + max(mailbox.interval_s for mailbox in due) * max(1.0, self.num_open / MANY_STREAMS)
        if self.num_open <= FEW_STREAMS or now_s >= next_s:
            self._told_s = now_s
            self._tell([*self._held, *due])
            return
        self._held += [mailbox for mailbox in due if mailbox.can_wait]
        for mailbox in due:
            if not mailbox.can_wait:
                mailbox.tell()
        if self._held and self._timer is None:
            self._timer = loop.call_at(next_s, self._tell_held)

    def _tell_held(self) -> None:
        loop, self._timer = self._loop(), None
        if loop is not None:
            self._told_s = loop.time()
            self._tell(self._held)

    def _tell(self, mailboxes: list[Mailbox]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._held = []
        for mailbox in mailboxes:
            mailbox.tell()


class Outlet(Protocol):
    """Takes deltas on the event loop, as they come, in place of a reader who would have to be woken for each."""

    @property
    def is_open(self) -> bool:
        """Whether a delta can be taken now, without waiting."""
        ...

    def take(self, delta: Delta) -> None:
        """The next one. What it raises is raised to the reader."""
        ...


_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = WeakKeyDictionary()


class Mailbox:
    """An `EventSink` whose other end is awaited on the event loop that made it, and closed there.

    The first `Finished` or `Failed` closes it; whatever arrives later is dropped.
    """

    def __init__(self, interval_s: float = 0.0) -> None:
        """interval_s: while there are many, deltas are handed over at most so often; 0: as they come."""
        loop = asyncio.get_running_loop()
        self._waker = _wakers.setdefault(loop, _Waker(loop))
        self._waker.num_open += 1
        self.interval_s = interval_s
        self._has_begun = self._is_closed = False
        self._loop = loop
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._outlet: Outlet | None = None  # of the reader who waits
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
            if isinstance(event, (Finished, Failed)):
                self._ending, wake = event, True
            else:
                self._deltas.append(event)
                self._num_chars += _size(event)
                if self._num_chars > MAX_PENDING_CHARS:
                    self._ending, wake = Failed(OverloadedError("The client reads too slowly.")), True
        if wake:
            self._waker.wake(self)

    def close(self) -> None:
        """On the loop: nobody reads any more. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._waker.num_open -= 1

    @property
    def can_wait(self) -> bool:
        """Whether there is neither a beginning nor an end to hand over."""
        return self._has_begun and self._ending is None

    def tell(self) -> None:
        """On the loop: whoever waits in `next` looks again, or their outlet takes what has come."""
        self._has_begun = True
        reader = self._reader
        if reader is None or reader.done():
            return
        outlet = self._outlet
        try:
            while outlet is not None and outlet.is_open:
                event = self._take()
                if isinstance(event, (Finished, Failed)):
                    break
                if event is not None:
                    outlet.take(event)
                if not (self._deltas or self._merged or self._ending):  # what comes from here on is told again
                    if self._silence is not None:
                        self._silence.begin()
                    return
        except Exception as exc:
            reader.set_exception(exc)
            return
        reader.set_result(None)

    async def next(self, silence_s: float | None = None, outlet: Outlet | None = None) -> Event | None:
        """The next delta with all that continues it so far, or the ending; None after `silence_s` without either.

        One reader at a time, who always says the same `silence_s`. After the ending has been returned once, it is
        returned again. outlet: while it is open, deltas that come after the call go there instead.
        """
        if silence_s is not None and self._silence is None:
            self._silence = Patience(silence_s, self._be_silent)
        while (event := self._take()) is None:
            self._reader, self._outlet = self._loop.create_future(), outlet
            if self._silence is not None:
                self._silence.begin()
            try:
                await self._reader
            finally:
                self._reader = self._outlet = None
                if self._silence is not None:
                    self._silence.end()
            if self._is_silent:
                self._is_silent = False
                return self._take()
        return event

    def _be_silent(self) -> None:
        self._is_silent = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _take(self) -> Event | None:
        if self._merged:
            return self._merged.popleft()
        with self._lock:
            deltas, self._deltas, self._num_chars = self._deltas, [], 0
            if not deltas:
                return self._ending
        if len(deltas) == 1:
            return deltas[0]
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
    if type(delta) is TextDelta and not delta.logprobs:  # nearly always, and once a token
        return DELTA_CHARS + len(delta.text)
    if isinstance(delta, ToolCallDelta):
        return DELTA_CHARS + len(delta.name) + len(delta.arguments)
    num_logprobs = sum(1 + len(one.top) for one in delta.logprobs) if isinstance(delta, TextDelta) else 0
    return DELTA_CHARS + len(delta.text) + LOGPROB_CHARS * num_logprobs
