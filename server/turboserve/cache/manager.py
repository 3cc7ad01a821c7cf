"""Who may use how many KV bytes: leases for running requests, conversations for idle ones.

Memory is decided before it is used. A request gets a lease for prompt and answer, starting from
the longest prefix already held; when it ends, its caches become an idle conversation. Idle
conversations give way, least recently used first, to leases that need room.

    committed = sum over idle conversations of their measured bytes
              + sum over leases of (bytes reserved - bytes shared with a conversation still held)

Committed never exceeds the budget. Pages shared between two idle conversations count for both,
so committed bounds what is allocated from above.

Used by the engine thread only; clocks are passed in.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from turboserve.cache.policy import Candidate, largest_fitting, plan_evictions
from turboserve.cache.runtime import CacheRuntime, Caches, peak_bytes, total_bytes
from turboserve.cache.sessions import Conversation, Match, SessionStore
from turboserve.errors import ContextLengthError

_MAX_SHOWN = 1 << 20  # longest prompt `can_ever_fit` searches for in messages


class CacheIntegrityError(AssertionError):
    """The manager's figures and the runtime's disagree: a bug in this project."""


@dataclass(slots=True, eq=False)
class Lease:
    """Room for one running request. `caches` belong to whoever runs it until the lease ends."""

    conversation_id: str
    salt: str
    caches: Caches
    cached_len: int
    reserved_tokens: int
    reserved_bytes: int
    source: Conversation | None = None
    source_bytes: int = 0  # of `reserved_bytes`, held by pages that `source` already has
    hits: int = 0


@dataclass(slots=True)
class CacheCounts:
    """How often prefixes were looked for and found, and conversations were dropped."""

    lookups: int = 0
    hits: int = 0
    cached_tokens: int = 0
    evictions: int = 0


@dataclass(slots=True)
class CacheManager:
    """Admission, prefix reuse and eviction within `budget_bytes`."""

    runtime: CacheRuntime
    budget_bytes: int
    store: SessionStore = field(init=False)
    leases: list[Lease] = field(default_factory=list)
    changes: int = 0  # grows whenever room may have been freed; a refused request need not ask again before
    counts: CacheCounts = field(default_factory=CacheCounts)

    def __post_init__(self) -> None:
        self.store = SessionStore(self.runtime)

    @property
    def committed_bytes(self) -> int:
        """What is promised or held, counted so that it bounds what is allocated from above."""
        idle = sum(c.kv_bytes for c in self.store)
        return idle + sum(self._lease_bytes(lease) for lease in self.leases)

    def largest_sequence(self, most: int = _MAX_SHOWN) -> int:
        """The longest sequence, at most `most` tokens, that fits the whole budget."""
        return largest_fitting(lambda n: peak_bytes(self.runtime, n), self.budget_bytes, most)

    def check_can_fit(self, num_tokens: int) -> None:
        """Raises ContextLengthError when that many tokens exceed the whole budget."""
        needed = peak_bytes(self.runtime, num_tokens)
        if needed > self.budget_bytes:
            raise ContextLengthError(
                f"This request needs {needed:,} bytes of KV cache for {num_tokens:,} tokens (prompt and answer), "
                f"but the server's budget is {self.budget_bytes:,} bytes, which holds "
                f"{self.largest_sequence(num_tokens):,} tokens. Shorten the prompt or lower max_tokens.",
                param="messages",
            )

    def try_lease(self, salt: str, prompt: Sequence[int], num_tokens: int, now_s: float) -> Lease | None:
        """Room for `num_tokens` starting from the longest held prefix of `prompt`; None: not now.

        Raises ContextLengthError when it could not be had with the whole budget.
        """
        self.check_can_fit(num_tokens)
        tokens = np.asarray(prompt, np.int32)
        match = self.store.find(salt, tokens)
        source_bytes = self._shared_bytes(match.usable_len) if match is not None else 0
        reserved = peak_bytes(self.runtime, num_tokens)
        victims = self._plan_room(reserved - source_bytes, match, source_bytes)
        if victims is None:
            return None
        lease = self._open_lease(salt, match, num_tokens, reserved, source_bytes, now_s)
        for victim in victims:
            self._evict(victim)
        self.counts.lookups += 1
        self.counts.hits += match is not None
        self.counts.cached_tokens += lease.cached_len
        return lease

    def try_extend(self, lease: Lease, num_tokens: int) -> bool:
        """Grow a lease to `num_tokens`; False leaves it as it was."""
        reserved = peak_bytes(self.runtime, num_tokens)
        victims = self._plan_room(reserved - lease.reserved_bytes, None, 0)
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim)
        lease.reserved_tokens, lease.reserved_bytes = num_tokens, max(reserved, lease.reserved_bytes)
        return True

    def keep(self, lease: Lease, tokens: Sequence[int], caches: Caches, now_s: float) -> None:
        """End a lease; its caches, holding exactly `tokens`, become an idle conversation."""
        self._close_lease(lease)
        array = np.asarray(tokens, np.int32)
        longer = self.store.continuation_of(lease.salt, array)
        if longer is not None or len(array) == 0:
            self.runtime.release(caches)
            return
        superseded = self.store.superseded_by(lease.salt, array, caches)
        for old in superseded:
            self.store.remove(old)
        taken = lease.conversation_id in self.store.ids()
        kept = Conversation(
            conversation_id=_new_id() if taken else lease.conversation_id,
            salt=lease.salt,
            tokens=array,
            caches=caches,
            kv=self.runtime.measure(caches),
            last_used_s=now_s,
            hits=lease.hits,
        )
        self.store.add(kept)
        self._repoint_leases(superseded, kept)
        self._shrink_to_budget()

    def drop(self, lease: Lease, caches: Caches | None) -> None:
        """End a lease and give its pages back."""
        self._close_lease(lease)
        if caches is not None:
            self.runtime.release(caches)

    def drop_idle(self) -> None:
        """Forget every idle conversation: shutdown, or memory ran out."""
        for conversation in list(self.store):
            self.store.remove(conversation)
        self.changes += 1

    def check_integrity(self, running: Sequence[Caches] = ()) -> None:
        """Raises CacheIntegrityError unless figures agree; `running`: the caches of all leases.

        What the runtime has allocated must be covered by what conversations and leases were
        measured to hold, and every stored figure must still be true.
        """
        for conversation in self.store:
            measured = total_bytes(self.runtime.measure(conversation.caches))
            if measured != conversation.kv_bytes:
                raise CacheIntegrityError(f"{conversation.kv_bytes} bytes booked, {measured} held by a conversation")
        if self.committed_bytes > self.budget_bytes:
            raise CacheIntegrityError(f"{self.committed_bytes} bytes committed of a budget of {self.budget_bytes}")
        held = sum(c.kv_bytes for c in self.store) + sum(total_bytes(self.runtime.measure(c)) for c in running)
        in_use = self.runtime.allocated_bytes() - self.runtime.slack_bytes()
        if in_use > held:
            raise CacheIntegrityError(f"{in_use} bytes in use, but only {held} held by anyone")
        self.runtime.check_integrity()

    def _lease_bytes(self, lease: Lease) -> int:
        is_shared = lease.source is not None and lease.source in self.store
        return lease.reserved_bytes - (lease.source_bytes if is_shared else 0)

    def _shared_bytes(self, num_tokens: int) -> int:
        """Bytes of the pages that a fork of `num_tokens` shares with its source; exact rows count as copied."""
        fmt = self.runtime.fmt
        if fmt is None:
            return 0
        return int(fmt.num_pages(num_tokens) * fmt.page_tokens * self.runtime.token_bytes)

    def _plan_room(self, extra_bytes: int, match: Match | None, match_bytes: int) -> list[Conversation] | None:
        """Conversations to drop so that `extra_bytes` more can be committed; None: not possible now."""
        needed = self.committed_bytes + extra_bytes - self.budget_bytes
        if needed <= 0:
            return []
        source = match.conversation if match is not None else None
        by_id = {c.conversation_id: c for c in self.store}
        candidates = [
            Candidate(
                conversation_id=c.conversation_id,
                gain_bytes=c.kv_bytes - self._leased_bytes(c) - (match_bytes if c is source else 0),
                last_used_s=c.last_used_s,
                is_source=c is source,
            )
            for c in by_id.values()
        ]
        chosen = plan_evictions(candidates, needed)
        return None if chosen is None else [by_id[i] for i in chosen]

    def _leased_bytes(self, conversation: Conversation) -> int:
        """Bytes that leases would have to count themselves were this conversation gone."""
        return sum(lease.source_bytes for lease in self.leases if lease.source is conversation)

    def _open_lease(
        self, salt: str, match: Match | None, num_tokens: int, reserved: int, source_bytes: int, now_s: float
    ) -> Lease:
        if match is None:
            caches = self.runtime.make_cache()
            lease = Lease(_new_id(), salt, caches, 0, num_tokens, reserved)
        else:
            source = match.conversation
            caches = self.runtime.fork(source.caches, match.usable_len)
            source.last_used_s = now_s
            source.hits += 1
            lease = Lease(
                conversation_id=source.conversation_id if match.is_continuation else _new_id(),
                salt=salt,
                caches=caches,
                cached_len=match.usable_len,
                reserved_tokens=num_tokens,
                reserved_bytes=reserved,
                source=source,
                source_bytes=source_bytes,
                hits=source.hits if match.is_continuation else 0,
            )
        self.leases.append(lease)
        return lease

    def _close_lease(self, lease: Lease) -> None:
        self.leases.remove(lease)
        self.changes += 1

    def _repoint_leases(self, gone: Sequence[Conversation], kept: Conversation) -> None:
        """Leases that share pages with a superseded conversation share them with its continuation."""
        for lease in self.leases:
            if lease.source in gone:
                lease.source = kept

    def _evict(self, conversation: Conversation) -> None:
        self.store.remove(conversation)
        self.counts.evictions += 1
        self.changes += 1

    def _shrink_to_budget(self) -> None:
        """Idle conversations that share pages count twice, so keeping one can pass the budget."""
        while self.committed_bytes > self.budget_bytes:
            idle = [c for c in self.store if c.kv_bytes > self._leased_bytes(c)]
            if not idle:
                return
            self._evict(min(idle, key=lambda c: c.last_used_s))


def _new_id() -> str:
    """Opaque: carries nothing of the conversation."""
    return secrets.token_hex(8)
