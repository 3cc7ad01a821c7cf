"""The queue: who waits, who starts next, and what happens to those for whom there is no room.

Owns waiting requests. Order of arrival counts; a preempted request goes to the head again. A request
that has no room yet is not overtaken; one that had none for too long is refused with the figures.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

from turboserve.cache.manager import Ask, CacheManager, Lease
from turboserve.engine import scheduler
from turboserve.engine.prepare import Preparer, tokens_to_reserve
from turboserve.engine.sequence import Sequence, Stage

log = logging.getLogger(__name__)

Clock = Callable[[], float]
Fail = Callable[[Sequence, Exception], None]
Start = Callable[[Sequence, Lease], None]

# The head of the queue waits no longer than this for KV memory, unless its answer has begun. Long enough
# for a full answer of those who have it; a client that is told to come back is better off than one whose
# connection times out.
MAX_ROOM_WAIT_S = 120.0


class Admission:
    """Waiting requests of one loop; `start` and `fail` are the loop's."""

    def __init__(self, manager: CacheManager, preparer: Preparer, clock: Clock, start: Start, fail: Fail) -> None:
        self._manager, self._preparer, self._clock = manager, preparer, clock
        self._start, self._fail = start, fail
        self._waiting: deque[Sequence] = deque()
        self._refused_at_change: int | None = None  # the manager's change count when the head last got no lease

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def put_first(self, sequence: Sequence) -> None:
        """Queue a preempted request again; of several, the oldest ends up at the head."""
        self._waiting.appendleft(sequence)
        self._refused_at_change = None

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._refused_at_change = None  # another request is the head now

    def clear(self) -> None:
        self._waiting.clear()

    def admit(self, num_running: Callable[[], int], max_running: int) -> None:
        """Start waiting requests in order; at most one prompt is prepared."""
        prepared_one = False
        while self._waiting and scheduler.can_admit(num_running(), max_running):
            head = self._waiting[0]
            if not head.prompt:
                if prepared_one:
                    return
                prepared_one = True
                if not self._try_prepare(head):
                    continue
            if not self._try_start(head):
                return

    def _try_prepare(self, sequence: Sequence) -> bool:
        try:
            self._preparer.prepare(sequence)
        except Exception as exc:
            self._fail(sequence, exc)
            return False
        return True

    def _try_start(self, sequence: Sequence) -> bool:
        """Lease room and start; False when there is none now. A failing request is ended."""
        now_s = self._clock()
        since_s = sequence.roomless_since_s
        if since_s is not None and now_s - since_s > MAX_ROOM_WAIT_S and not sequence.answer:
            self._refuse(sequence)
            return True
        if self._refused_at_change == self._manager.changes:
            return False
        try:
            lease = self._manager.try_lease(_ask(sequence), now_s)
        except Exception as exc:
            self._fail(sequence, exc)
            return True
        self._refused_at_change = self._manager.changes if lease is None else None
        if lease is None:
            sequence.roomless_since_s = sequence.roomless_since_s or now_s
            return False
        self._waiting.remove(sequence)
        sequence.roomless_since_s = None
        self._start(sequence, lease)
        return True

    def _refuse(self, sequence: Sequence) -> None:
        manager = self._manager
        manager.counts.refusals["no_room"] += 1
        needed = manager.bytes_to_reserve(_ask(sequence))
        self._fail(sequence, manager.no_room(needed, manager.budget_bytes - manager.committed_bytes))


def _ask(sequence: Sequence) -> Ask:
    request = sequence.request
    assert sequence.stage is Stage.WAITING
    return Ask(
        salt=request.tenant,
        prompt=sequence.tokens(0, sequence.num_tokens),
        num_tokens=tokens_to_reserve(sequence),
        kv_format=request.kv_format,
        session_id=request.session_id,
        cache_key=request.cache_key,
        order=sequence.order,
    )
