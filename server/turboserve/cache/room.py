"""Making room: the figures for a pressure plan, and the plan's steps carried out.

What turns out differently (the disk does not take a conversation after all, a victim changed meanwhile)
is left out; whoever needs the room looks at the ledger afterwards, and asks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from turboserve.cache import pressure
from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import CacheFamily, HeldPages, Key
from turboserve.cache.ledger import Ledger
from turboserve.cache.persistence import Persistence
from turboserve.cache.prefix_index import Match
from turboserve.cache.pressure import AtWork, Lower, Relief, State, Step
from turboserve.cache.sessions import Conversation, Lease
from turboserve.cache.sizes import shared_pages
from turboserve.cache.tally import Tally
from turboserve.cache.victims import Candidate, next_format_down
from turboserve.errors import KVFormatError

# One plan is enough unless the disk refuses what it should take; the next ones then offer it less, or nothing.
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Need:
    """Who needs room for `extra_bytes` beside what is committed, and what is special about them.

    lease: the one that grows, if it is one. order: leases admitted later may be preempted, None: nobody may.
    source: what the needer begins with, and holds as well from then on; given up after all others.
    over_quota: goes first, in any case.
    """

    extra_bytes: int = 0
    lease: Lease | None = None
    order: int | None = None
    source: Match | None = None
    over_quota: Conversation | None = None


class Room:
    """Over one memory's idle conversations and leases. Is `pressure.Details` for its own plans."""

    def __init__(
        self, ledger: Ledger, idle: IdleConversations, persistence: Persistence, tally: Tally, *, may_requantise: bool
    ) -> None:
        self._ledger, self._idle, self._persistence, self._tally = ledger, idle, persistence, tally
        self._may_requantise = may_requantise

    @property
    def _family(self) -> CacheFamily:
        return self._ledger.family

    # --- deciding

    def plan(self, need: Need, now_s: float) -> Relief | None:
        """What must give way first; None: all that may would not be enough. Changes nothing."""
        leases, over_quota = self._ledger.leases, need.over_quota
        state = State(
            budget_bytes=self._ledger.budget_bytes,
            missing_bytes=self._ledger.missing_bytes(need.extra_bytes),
            over_quota=over_quota.key if over_quota is not None else None,
            is_alone=all(lease is need.lease for lease in leases),
            may_requantise=self._may_requantise,
        )
        if state.missing_bytes <= 0:
            return pressure.plan(state, self)
        state = replace(
            state,
            used_bytes=self._ledger.used_bytes,
            idle=tuple(self._candidates(need.source, now_s)),
            shared=self._shared(need.source),
        )
        relief = pressure.plan(state, self)
        order = need.order
        younger = [] if order is None else sorted((x for x in leases if x.order > order), key=lambda x: -x.order)
        if relief is not None or not younger:
            return relief
        can_spill = self._persistence.is_writable
        return pressure.plan(replace(state, younger=tuple(self._at_work(x, can_spill) for x in younger)), self)

    def _shared(self, source: Match | None) -> HeldPages | None:
        """Pages of an idle conversation that get one more holder."""
        if source is None or not isinstance(source.holder, Conversation):
            return None
        runtime = self._family.runtime(source.holder.kv_format)
        return shared_pages(runtime, self.pages(source.holder.key), source.usable_len)

    def _candidates(self, source: Match | None, now_s: float) -> Iterator[Candidate]:
        is_writable = self._persistence.is_writable
        for conversation in self._ledger.in_memory:
            session, kv = conversation.session, conversation.kv
            yield Candidate(
                key=conversation.key,
                kv_bytes=kv.total,
                age_s=max(0.0, now_s - session.last_used_s),
                hits=session.hits,
                own_bytes=kv.total - kv.compressed,
                is_named=session.is_explicit,
                is_pinned=session.is_pinned,
                has_file=conversation.disk_key is not None,
                can_spill=is_writable and self._persistence.may_take(conversation, now_s),
                is_source=source is not None and conversation is source.holder,
            )

    def _at_work(self, lease: Lease, can_spill: bool) -> AtWork:
        session, kv = lease.session, lease.measure()
        left = Candidate(
            key=lease.key,
            kv_bytes=kv.total,
            age_s=0.0,
            hits=session.hits,
            own_bytes=kv.total - kv.compressed,
            is_named=session.is_explicit,
            is_pinned=session.is_pinned,
            can_spill=can_spill,
        )
        return AtWork(lease.order, lease.open_bytes, left, self._pages_at_work(lease))

    def _pages_at_work(self, lease: Lease) -> HeldPages | None:
        running = lease.running
        if running is None:
            return self._family.held_pages(lease.caches)
        view = running.fork(running.usable_prefix(running.held_len()))
        try:
            pages = self._family.held_pages(view)
        finally:
            lease.runtime.release(view)
        # The view was one more holder.
        if pages is None:
            return None
        own, *others = (of_pool._replace(references=of_pool.references - 1) for of_pool in pages.each())
        return own._replace(others=tuple(others))

    def pages(self, key: Key) -> HeldPages | None:
        """Pages of an idle conversation in memory."""
        conversation = self._idle.get(*key)
        if conversation is None or conversation.caches is None:
            return None
        return self._family.held_pages(conversation.caches)

    def lower(self, key: Key) -> Lower | None:
        """An idle conversation's next format down; None when there is none."""
        conversation = self._idle.get(*key)
        target = next_format_down(conversation.kv_format) if conversation is not None else None
        if conversation is None or target is None:
            return None
        try:
            return Lower(target, self._family.runtime(target).bytes_for(len(conversation.tokens)))
        except KVFormatError:
            return None

    # --- doing

    def make(self, need: Need, now_s: float) -> bool:
        """Whether there is room now. False leaves everything as it was, but for what a disk's refusal made vain.

        `need` must not allow preemption: only the engine can preempt.
        """
        for _ in range(MAX_ROUNDS):
            relief = self.plan(need, now_s)
            if relief is None:
                return False
            self.carry_out(relief, now_s)
            if self._ledger.missing_bytes(need.extra_bytes) <= 0:
                self._ledger.give_back_slack(need.extra_bytes)
                return True
        return False

    def carry_out(self, relief: Relief, now_s: float) -> None:
        """Take a plan's steps in order."""
        for step in relief.steps:
            conversation = self._idle.get(*step.key)
            if conversation is not None:
                self._take(step, conversation, now_s)

    def _take(self, step: Step, conversation: Conversation, now_s: float) -> None:
        if step.action == "over_quota":
            self._idle.evict(conversation, "quota")
        elif conversation.caches is None:
            return  # it left memory meanwhile
        elif step.action == "requantise":
            self._requantise(conversation, step.kv_format)
        elif step.action == "spill":
            self._spill(conversation, now_s)
        elif conversation.disk_key is not None:
            self._idle.unload(conversation)
        elif not conversation.session.is_pinned:
            self._idle.fall_back(conversation, "pressure")

    def _spill(self, conversation: Conversation, now_s: float) -> None:
        if self._persistence.save(conversation):
            self._idle.unload(conversation)
        else:
            self._persistence.note_refusal(conversation, now_s)

    def _requantise(self, conversation: Conversation, target: str) -> None:
        source, runtime = conversation.kv_format, self._family.runtime(target)
        assert conversation.caches is not None
        new_bytes = runtime.bytes_for(len(conversation.tokens))
        if self._ledger.used_bytes + new_bytes > self._ledger.budget_bytes:
            return  # no real memory for both versions
        caches = self._family.convert(conversation.caches, source, target)
        self._idle.replace_caches(conversation, caches, target, runtime.measure(caches))
        self._tally.requantisations[f"{source}>{target}"] += 1
