"""Who may use how many KV bytes: leases for running requests, conversations for idle ones.

Memory is decided before it is used. A request gets a lease for prompt and answer, starting from the
longest prefix that its caller already has, be it idle, running or on disk; when it ends, its caches
become an idle conversation. What gives way under pressure is pressure.py's business, what is counted
ledger.py's. Committed bytes never exceed the budget.

Used by the engine thread only; clocks are passed in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from turboserve.cache import integrity, leasing
from turboserve.cache.counts import AdmissionCounts, CacheCounts
from turboserve.cache.holders import Conversation, Lease, RunningCaches, Session, new_id
from turboserve.cache.integrity import CacheIntegrityError
from turboserve.cache.leasing import Ask
from turboserve.cache.ledger import committed_bytes
from turboserve.cache.persistence import Persistence
from turboserve.cache.policy import Tokens, common_prefix_len, largest_fitting
from turboserve.cache.pressure import Need, Preempt, PressureLadder
from turboserve.cache.quota import Quotas
from turboserve.cache.runtime import CacheFamily, Caches, peak_bytes, total_bytes
from turboserve.cache.sessions import SessionStore
from turboserve.cache.store import SessionDisk
from turboserve.errors import ContextLengthError, OverloadedError

__all__ = ["Ask", "CacheIntegrityError", "CacheManager", "Lease", "ManagerLimits"]

log = logging.getLogger(__name__)

_MAX_SHOWN = 1 << 20  # longest prompt `check_can_fit` searches for in messages

# A conversation that was found again is likely to be found after a restart too: worth a file.
HOT_HITS = 1

EXPIRY_INTERVAL_S = 1.0  # finer than anybody sets a time to live


@dataclass(frozen=True, slots=True)
class ManagerLimits:
    """What an operator allows. Zero means no limit."""

    session_ttl_s: float = 0.0
    max_sessions_per_caller: int = 0
    max_session_bytes_per_caller: int = 0
    allow_requantise: bool = False


@dataclass(slots=True)
class CacheManager:
    """Admission, prefix reuse, sessions and pressure within `budget_bytes`."""

    family: CacheFamily
    budget_bytes: int
    limits: ManagerLimits = ManagerLimits()
    disk: SessionDisk | None = None
    wall_offset_s: float = 0.0  # Unix seconds less the engine's
    store: SessionStore = field(init=False)
    leases: list[Lease] = field(default_factory=list)
    changes: int = 0  # grows whenever room may have been freed; a refused request need not ask again before
    counts: CacheCounts = field(default_factory=CacheCounts)
    admission: AdmissionCounts = field(default_factory=AdmissionCounts)
    persistence: Persistence = field(init=False)
    quotas: Quotas = field(init=False)
    orders: itertools.count[int] = field(default_factory=itertools.count)
    _preempt: Preempt | None = None
    _expired_s: float = 0.0

    def __post_init__(self) -> None:
        self.store = SessionStore(self.family)
        self.persistence = Persistence(self.family, self.disk, self.counts)
        self.quotas = Quotas(self)
        for conversation in self.persistence.stored_conversations(self.wall_offset_s):
            self._adopt(conversation)

    @property
    def committed_bytes(self) -> int:
        """What is promised or held, counted so that it bounds what is allocated from above."""
        return committed_bytes(self.family, self.store, self.leases)

    @property
    def ladder(self) -> PressureLadder:
        """Over the present state and budget."""
        return PressureLadder(
            self.family,
            self.store,
            self.leases,
            self.persistence,
            self.counts,
            self.budget_bytes,
            self.limits.allow_requantise,
            self._preempt,
            self.wall_offset_s,
        )

    def on_preempt(self, preempt: Callable[[Lease], bool]) -> None:
        """Who can end a lease for the sake of an older one."""
        self._preempt = preempt

    # --- what could ever fit

    def largest_sequence(self, most: int = _MAX_SHOWN, kv_format: str | None = None) -> int:
        """The longest sequence, at most `most` tokens, that fits the whole budget."""
        runtime = self.family.runtime(kv_format or self.family.default)
        return largest_fitting(lambda n: peak_bytes(runtime, n), self.budget_bytes, most)

    def check_can_fit(self, num_tokens: int, kv_format: str | None = None) -> None:
        """Raises ContextLengthError when that many tokens exceed the whole budget."""
        name = kv_format or self.family.default
        needed = peak_bytes(self.family.runtime(name), num_tokens)
        if needed > self.budget_bytes:
            self.counts.refusals["never_fits"] += 1
            raise ContextLengthError(
                f"This request needs {needed:,} bytes of KV cache for {num_tokens:,} tokens (prompt and answer) in "
                f"{name}, but the server's budget is {self.budget_bytes:,} bytes, which holds "
                f"{self.largest_sequence(num_tokens, name):,} tokens. Shorten the prompt or lower max_tokens.",
                param="messages",
            )

    def format_for(self, salt: str, session_id: str | None, kv_format: str | None) -> str:
        """The format a request's cache is to have. Raises KVFormatError."""
        if kv_format is not None:
            return self.family.normalise(kv_format)
        held = self.store.get(salt, session_id) if session_id is not None else None
        return self.family.default if held is None else held.wanted_format

    # --- leases

    def try_lease(self, ask: Ask, now_s: float) -> Lease | None:
        """Room for an ask, starting from the longest prefix that its caller has; None: wait.

        Raises ContextLengthError when it could not be had with the whole budget, QuotaExceededError, and
        OverloadedError when waiting would free nothing.
        """
        return leasing.try_lease(self, ask, now_s)

    def try_extend(self, lease: Lease, num_tokens: int, now_s: float) -> bool:
        """Grow a lease to `num_tokens`, at the cost of younger ones if need be; False leaves it as it was."""
        return leasing.try_extend(self, lease, num_tokens, now_s)

    def better_start(self, lease: Lease) -> tuple[Caches, int] | None:
        """(caches, length) of a longer prefix than it holds, once another request computed one; the caller swaps."""
        return leasing.better_start(self, lease)

    def bytes_to_reserve(self, ask: Ask) -> int:
        """Without what it might share."""
        name = self.format_for(ask.salt, ask.session_id, ask.kv_format)
        return peak_bytes(self.family.runtime(name), ask.num_tokens)

    def no_room(self, needed_bytes: int, free_bytes: int) -> OverloadedError:
        """The refusal with its figures."""
        return OverloadedError.without_room(
            needed_bytes=needed_bytes, free_bytes=max(0, free_bytes), budget_bytes=self.budget_bytes, retry_after_s=30
        )

    def attach(self, lease: Lease, running: RunningCaches) -> None:
        """From now on the lease's caches are told about, and may be forked, through `running`."""
        lease.running = running

    def keep(
        self, lease: Lease, tokens: Sequence[int], caches: Caches, now_s: float, *, has_ended: bool = True
    ) -> Conversation | None:
        """End a lease; its caches, holding exactly `tokens`, become an idle conversation, which is returned.

        None: what they hold is held already, and they were released.
        """
        kv = lease.runtime.measure(caches)
        if has_ended:
            self.admission.add(lease.reserved_bytes, total_bytes(kv))
        self.close_lease(lease)
        session = lease.session
        session.last_used_s = now_s
        session.num_requests += has_ended
        array = np.asarray(tokens, np.int32)
        existing = self.store.get(lease.salt, lease.conversation_id)
        if existing is not None and not session.is_explicit and not _is_one_line(array, existing.tokens):
            session, existing = _branch_of(session, now_s), None  # another branch of it ended first
        kept = Conversation(session, array, lease.kv_format, lease.wanted_format, caches, kv)
        if self._is_held_already(kept, existing):
            lease.runtime.release(caches)
            return existing
        if existing is not None:
            self.evict(existing, "superseded")
        self.store.add(kept)
        for old in self.store.superseded_by(kept):
            self.evict(old, "superseded")
        self._after_keep(kept, now_s)
        return kept

    def _is_held_already(self, kept: Conversation, existing: Conversation | None) -> bool:
        if len(kept.tokens) == 0:
            return True
        if existing is not None:  # a request that was cancelled early must not shorten its session
            return len(kept.tokens) < len(existing.tokens) and _is_one_line(kept.tokens, existing.tokens)
        return self.store.continuation_of(kept) is not None

    def _after_keep(self, kept: Conversation, now_s: float) -> None:
        session = kept.session
        self.quotas.shrink(kept.salt, kept)
        is_worth_a_file = session.is_explicit or session.is_pinned or session.hits >= HOT_HITS
        if is_worth_a_file and kept in self.store and self.persistence.save(kept, self.wall_offset_s):
            self.counts.spills["idle"] += 1
        self.ladder.relieve(Need(now_s))

    def try_take_in(self, conversation: Conversation, now_s: float) -> bool:
        """Hold an idle conversation that was forked from another; False, and it is released, without room."""
        self.store.add(conversation)
        if not self.ladder.relieve(Need(now_s, source=conversation)) or conversation not in self.store:
            if conversation in self.store:
                self.store.remove(conversation)
            return False
        self._after_keep(conversation, now_s)
        return True

    def load(self, conversation: Conversation, now_s: float) -> bool:
        """From disk to memory, if there is room; a file that cannot be read is forgotten."""
        if not self.ladder.relieve(Need(now_s, extra_bytes=total_bytes(conversation.kv))):
            return False
        if self.persistence.load(conversation):
            return True
        self.evict(conversation, "unreadable")
        return False

    def drop(self, lease: Lease, caches: Caches | None) -> None:
        """End a lease and give its pages back."""
        self.close_lease(lease)
        if caches is not None:
            lease.runtime.release(caches)

    # --- conversations

    def drop_idle(self) -> None:
        """Give all idle memory back, as memory ran out; what is on disk stays there."""
        for conversation in list(self.store):
            if conversation.disk_key is not None:
                self.store.unload(conversation)
            else:
                self.evict(conversation, "out_of_memory")
        self.changes += 1

    def expire(self, now_s: float) -> None:
        """Forget sessions past their time to live, pinned ones only if the time is their own."""
        if now_s - self._expired_s < EXPIRY_INTERVAL_S:
            return
        self._expired_s = now_s
        busy = {id(lease.session) for lease in self.leases}
        for conversation in list(self.store):
            session = conversation.session
            ttl_s = session.ttl_s or (0.0 if session.is_pinned else self.limits.session_ttl_s)
            is_over = bool(ttl_s) and now_s - session.last_used_s > ttl_s and id(session) not in busy
            if is_over or self.persistence.is_lost(conversation):
                self.evict(conversation, "expired")

    def persist_all(self) -> None:
        """Before the process ends: a file for every idle conversation that has none."""
        for conversation in sorted(self.store, key=lambda c: c.session.last_used_s, reverse=True):
            if conversation.caches is not None and self.persistence.save(conversation, self.wall_offset_s):
                self.counts.spills["idle"] += 1

    def close(self) -> None:
        """The process ends: write what has no file yet, and give the disk back."""
        self.persist_all()
        if self.disk is not None:
            self.disk.close()

    def evict(self, conversation: Conversation, reason: str) -> None:
        """Forget it, its file included."""
        self.persistence.forget(conversation)
        self.store.remove(conversation)
        self.counts.evictions[reason] += 1
        self.changes += 1

    def _adopt(self, conversation: Conversation) -> None:
        """A conversation that an earlier process left on disk; of two versions the later one counts."""
        held = self.store.get(conversation.salt, conversation.conversation_id)
        if held is not None:
            older, newer = sorted((held, conversation), key=lambda c: c.session.last_used_s)
            self.persistence.forget(older)
            if newer is held:
                return
            self.store.remove(held)
        self.store.add(conversation)

    def close_lease(self, lease: Lease, *, has_freed: bool = True) -> None:
        self.store.leave(lease)
        self.leases.remove(lease)
        self.changes += has_freed

    def check_integrity(self, running: Sequence[Caches] = ()) -> None:
        """Raises CacheIntegrityError unless all figures agree; `running`: the caches of all leases."""
        try:
            integrity.check(self.family, self.store, self.leases, self.budget_bytes, running)
        except AssertionError:
            self.counts.integrity_failures += 1
            raise


def _is_one_line(a: Tokens, b: Tokens) -> bool:
    """Whether the longer one begins with all of the shorter."""
    return common_prefix_len(a, b) == min(len(a), len(b))


def _branch_of(session: Session, now_s: float) -> Session:
    session_id = new_id()
    return Session(session_id, session.salt, now_s, now_s, cache_key=session.cache_key, public_id=session_id)
