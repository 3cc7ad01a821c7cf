"""How many bytes are held and promised, and when that last became less: the memory's only books.

    committed = pages in use, each once
              + exact rows of idle conversations
              + uncompressed layers of idle conversations
              + sum over leases of what they reserved and do not hold in pages yet

A lease's exact rows and uncompressed layers are counted in its reservation from start to end, so no
step of a running request can raise this sum. Shared pages count once, however many hold them.
"""

from __future__ import annotations

from collections.abc import Iterable

from turboserve.cache.interfaces import CacheFamily
from turboserve.cache.sessions import Conversation, Lease
from turboserve.cache.sizes import pages_bytes
from turboserve.errors import OverloadedError

RETRY_AFTER_S = 30  # advice to who found no room: about a long answer of those who have it


class Ledger:
    """Who holds memory within `budget_bytes`: idle conversations and leases.

    `generation` grows whenever committed bytes fell or may fall: who was told to wait need not ask before.
    """

    def __init__(self, family: CacheFamily, budget_bytes: int) -> None:
        self.family, self.budget_bytes = family, budget_bytes
        self.generation = 0
        self.leases: list[Lease] = []
        self._idle: dict[int, Conversation] = {}  # by identity
        # Of these, whose bytes stay as they are while they are here: added up anew for each request, thousands of idle
        # conversations would delay every first token.
        self._idle_exact_bytes = self._idle_plain_bytes = 0

    @property
    def in_memory(self) -> Iterable[Conversation]:
        """Idle conversations whose caches are in memory."""
        return self._idle.values()

    # --- who holds memory: one way in and one way out for either kind

    def hold(self, conversation: Conversation) -> None:
        """An idle conversation's caches are in memory from now on."""
        assert conversation.caches is not None and id(conversation) not in self._idle
        self._idle[id(conversation)] = conversation
        self._count(conversation, 1)

    def give_up(self, conversation: Conversation) -> None:
        """Give an idle conversation's memory back, if it has any; its caches are gone."""
        if conversation.caches is not None:
            del self._idle[id(conversation)]
            self._count(conversation, -1)
            self.family.runtime(conversation.kv_format).release(conversation.caches)
            conversation.caches = None
            self.generation += 1

    def _count(self, conversation: Conversation, sign: int) -> None:
        self._idle_exact_bytes += sign * conversation.kv.exact
        self._idle_plain_bytes += sign * (conversation.kv.uncompressed + conversation.kv.slack)

    def open(self, lease: Lease) -> None:
        """A request's room is promised from now on."""
        self.leases.append(lease)

    def close(self, lease: Lease) -> None:
        """A request's room is free again; its caches are somebody else's business."""
        self.leases.remove(lease)
        self.generation += 1

    def may_fall(self) -> None:
        """Something else happened that can make room: a pin was taken away, pages are shared now."""
        self.generation += 1

    # --- sums

    @property
    def held_bytes(self) -> int:
        """What pages and idle conversations take now, what is shared once."""
        # Exact rows that idle forks share count for each: whatever bounded them by all exact rows there are would
        # rise with those that running requests fill, and these are in their reservations.
        return self.family.totals().compressed + self._idle_exact_bytes + self._idle_plain_bytes

    @property
    def committed_bytes(self) -> int:
        """What is promised or held; it bounds what is allocated for tokens from above."""
        return self.held_bytes + sum(lease.open_bytes for lease in self.leases)

    @property
    def used_bytes(self) -> int:
        """What is taken now, promises left out; uncompressed leases count in full, as nobody counts their pages."""
        totals = self.family.totals()
        plain = self._idle_plain_bytes + sum(x.reserved_bytes for x in self.leases if not x.runtime.fmt)
        return totals.compressed + totals.exact + plain

    def check_integrity(self) -> None:
        """Raises AssertionError when the sums are not those of the conversations."""
        exact = sum(c.kv.exact for c in self._idle.values())
        plain = sum(c.kv.uncompressed + c.kv.slack for c in self._idle.values())
        assert (exact, plain) == (self._idle_exact_bytes, self._idle_plain_bytes), "bytes of idle conversations"

    def missing_bytes(self, extra_bytes: int = 0) -> int:
        """What must be given up so that `extra_bytes` more can be promised; zero or less when there is room."""
        return self.committed_bytes + extra_bytes - self.budget_bytes

    def no_room(self, needed_bytes: int, free_bytes: int) -> OverloadedError:
        """The refusal with its figures."""
        return OverloadedError.without_room(
            needed_bytes=needed_bytes,
            free_bytes=max(0, free_bytes),
            budget_bytes=self.budget_bytes,
            retry_after_s=RETRY_AFTER_S,
        )

    def give_back_slack(self, extra_bytes: int = 0) -> None:
        """Free pages are memory too: those that no lease will fill go back before they pass the budget.

        extra_bytes: about to be promised beside what is committed.
        """
        stranded = self._stranded_bytes()
        wanted = stranded + self.missing_bytes(extra_bytes) if stranded else 0
        if wanted > 0:
            self.family.trim(wanted)

    def _stranded_bytes(self) -> int:
        """Memory of free pages beyond those that running requests of the same format will yet fill."""
        slack = dict(self.family.slack_by_format())
        for lease in self.leases:
            if slack.get(lease.kv_format):
                filled = pages_bytes(lease.runtime, lease.written_len)
                slack[lease.kv_format] -= pages_bytes(lease.runtime, lease.reserved_tokens) - filled
        return sum(max(0, num_bytes) for num_bytes in slack.values())
