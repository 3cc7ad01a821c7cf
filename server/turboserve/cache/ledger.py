"""How many bytes are held and promised, and what giving conversations up would free.

    committed = pages in use, each once
              + exact rows of idle conversations
              + uncompressed layers of idle conversations
              + sum over leases of what they reserved and do not hold in pages yet

A lease's exact rows and uncompressed layers are counted in its reservation from start to end, so no
step of a running request can raise this sum. Shared pages count once, however many hold them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from turboserve.cache.holders import Conversation, Lease
from turboserve.cache.runtime import CacheFamily, pages_bytes


def held_bytes(family: CacheFamily, idle: Iterable[Conversation]) -> int:
    """Bytes that pages and idle conversations take now, what is shared once."""
    totals = family.totals()
    exact = uncompressed = 0
    for conversation in idle:
        if conversation.caches is not None:
            exact += conversation.kv.exact
            uncompressed += conversation.kv.uncompressed + conversation.kv.slack
    # Exact rows that idle forks share count for each: whatever bounded them by all exact rows there are would rise
    # with those that running requests fill, and these are in their reservations.
    return totals.compressed + exact + uncompressed


def committed_bytes(family: CacheFamily, idle: Iterable[Conversation], leases: Sequence[Lease]) -> int:
    """What is promised or held; it bounds what is allocated for tokens from above."""
    return held_bytes(family, idle) + sum(lease.open_bytes for lease in leases)


def used_bytes(family: CacheFamily, idle: Iterable[Conversation], leases: Sequence[Lease]) -> int:
    """What is taken now, promises left out; uncompressed leases count in full, as nobody counts their pages."""
    totals = family.totals()
    plain = sum(c.kv.uncompressed + c.kv.slack for c in idle if c.caches is not None)
    return totals.compressed + totals.exact + plain + sum(x.reserved_bytes for x in leases if x.runtime.fmt is None)


def stranded_bytes(family: CacheFamily, leases: Sequence[Lease]) -> int:
    """Memory of free pages beyond those that running requests of the same format will yet fill."""
    slack = dict(family.slack_by_format())
    for lease in leases:
        if slack.get(lease.kv_format):
            to_come = pages_bytes(lease.runtime, lease.reserved_tokens) - pages_bytes(lease.runtime, lease.held_len)
            slack[lease.kv_format] -= to_come
    return sum(max(0, num_bytes) for num_bytes in slack.values())


class Release:
    """What giving up conversations, one after another, would free: a page goes with its last holder.

    Nothing is given up in here; it is a calculation over the pages' reference counts.
    """

    def __init__(self, family: CacheFamily) -> None:
        self._family = family
        self._taken: dict[Hashable, NDArray[np.int64]] = {}  # per pool and page: holders given up so far
        self.freed_bytes = 0

    def add(self, conversation: Conversation) -> int:
        """Count one more as given up; returns the bytes that this frees."""
        if conversation.caches is None:
            return 0
        kv = conversation.kv
        freed = kv.exact + kv.uncompressed + kv.slack + self._pages_freed(conversation)
        self.freed_bytes += freed
        return freed

    def _pages_freed(self, conversation: Conversation) -> int:
        assert conversation.caches is not None
        pages = self._family.held_pages(conversation.caches)
        if pages is None or not len(pages.ids):
            return 0
        taken = self._taken_of(pages.pool, int(pages.ids.max()) + 1)
        num_last = int(np.count_nonzero(pages.references - taken[pages.ids] <= 1))
        taken[pages.ids] += 1
        return num_last * pages.page_bytes

    def _taken_of(self, pool: Hashable, num_pages: int) -> NDArray[np.int64]:
        taken = self._taken.get(pool, np.zeros(0, np.int64))
        if len(taken) < num_pages:
            taken = np.concatenate([taken, np.zeros(max(num_pages, 2 * len(taken)) - len(taken), np.int64)])
            self._taken[pool] = taken
        return taken
