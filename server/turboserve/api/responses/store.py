"""Responses that can be asked for again or continued: in memory, bounded for each caller, forgotten in time.

Belongs to the event loop. A caller's least recently used responses give way to its own newer ones, never to others';
one that still runs in the background stays.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from turboserve.api.responses.replies import ResponseWriter
from turboserve.errors import ResponseNotFoundError

Json = dict[str, object]


@dataclass(slots=True)
class StoredResponse:
    """One response: what was said before it, what it was asked, what it answers, and how to continue it."""

    tenant: str
    writer: ResponseWriter
    history: tuple[Json, ...]  # items of the conversation before `items`
    items: tuple[Json, ...]  # of its own input
    session_id: str | None = None
    kv_format: str | None = None
    cache_key: str | None = None
    is_background: bool = False
    task: asyncio.Task[None] | None = None  # while it runs in the background
    expires_at: float = 0.0
    num_bytes: int = field(default=0)

    @property
    def response_id(self) -> str:
        return self.writer.response_id

    @property
    def conversation(self) -> tuple[Json, ...]:
        """Items of everything said, the answer included."""
        return (*self.history, *self.items, *self.writer.output)

    @property
    def is_running(self) -> bool:
        return not self.writer.has_ended


class ResponseStore:
    """Responses by caller and id."""

    def __init__(
        self, max_count: int, max_bytes: int, ttl_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """At most `max_count` and `max_bytes` for each caller; `ttl_s` counts from the creation, 0: for ever."""
        self._max_count, self._max_bytes, self._ttl_s, self._clock = max_count, max_bytes, ttl_s, clock
        self._kept: defaultdict[str, OrderedDict[str, StoredResponse]] = defaultdict(OrderedDict)

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, or count anew the bytes of one that has ended; others of its caller may give way."""
        kept = self._kept[stored.tenant]
        if stored.response_id not in kept:
            stored.expires_at = self._clock() + self._ttl_s if self._ttl_s else float("inf")
        # What a response shares with those that it continues is counted for each: any of them can be the last that
        # holds it.
        stored.num_bytes = len(orjson.dumps([stored.writer.reply().model_dump(), *stored.conversation]))
        kept[stored.response_id] = stored
        kept.move_to_end(stored.response_id)
        self._make_room(kept)

    def get(self, tenant: str, response_id: str) -> StoredResponse:
        """A caller's own response. Raises ResponseNotFoundError."""
        self._forget_expired()
        kept = self._kept.get(tenant)
        if kept is None or response_id not in kept:
            raise ResponseNotFoundError(response_id)
        kept.move_to_end(response_id)
        return kept[response_id]

    def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response; one that runs is cancelled. Raises ResponseNotFoundError."""
        stored = self.get(tenant, response_id)
        if stored.task is not None:
            stored.task.cancel()
        del self._kept[tenant][response_id]

    def holds(self, stored: StoredResponse) -> bool:
        """Whether it is still kept."""
        return stored.response_id in self._kept.get(stored.tenant, {})

    def num_bytes(self, tenant: str) -> int:
        """What a caller's responses take."""
        return sum(stored.num_bytes for stored in self._kept.get(tenant, {}).values())

    def _make_room(self, kept: OrderedDict[str, StoredResponse]) -> None:
        self._forget_expired()
        num_bytes = sum(stored.num_bytes for stored in kept.values())
        for response_id, stored in list(kept.items()):
            if len(kept) <= self._max_count and num_bytes <= self._max_bytes:
                return
            if not stored.is_running:
                del kept[response_id]
                num_bytes -= stored.num_bytes

    def _forget_expired(self) -> None:
        now = self._clock()
        for kept in self._kept.values():
            for response_id in [key for key, one in kept.items() if one.expires_at <= now and not one.is_running]:
                del kept[response_id]
