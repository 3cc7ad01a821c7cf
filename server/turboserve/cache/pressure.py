"""The pressure ladder: what gives way, in which order, when a request needs more bytes than are free.

    1. forget nameless conversations that nobody pinned (one that is on disk already only leaves memory)
    2. requantise idle named sessions one step down, if the operator allows it
    3. spill named sessions to disk, pinned ones last; without a disk, forget those that nobody pinned
    4. preempt running requests, the youngest first, for the sake of older ones
    5. the newest conversations, which the policy shields, go only when waiting would free nothing

Nothing is given up unless all that may be given up is enough. Waiting and refusing are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from turboserve.cache.counts import CacheCounts
from turboserve.cache.holders import Conversation, Lease
from turboserve.cache.ledger import Release, committed_bytes, stranded_bytes, used_bytes
from turboserve.cache.persistence import Persistence
from turboserve.cache.policy import Candidate, VictimOrder, next_format_down, order_victims
from turboserve.cache.runtime import CacheFamily
from turboserve.cache.sessions import SessionStore
from turboserve.errors import KVFormatError

log = logging.getLogger(__name__)

Preempt = Callable[[Lease], bool]
"""Ends that lease and queues its request again; False when it cannot."""


@dataclass(frozen=True, slots=True)
class Need:
    """Who needs room. `extra_bytes`: on top of what is committed, its lease included once that is open."""

    now_s: float
    extra_bytes: int = 0
    lease: Lease | None = None
    source: Conversation | None = None  # what it continues, given up after all others
    may_preempt: bool = False


@dataclass(slots=True)
class PressureLadder:
    """Frees bytes of one manager's conversations and leases."""

    family: CacheFamily
    store: SessionStore
    leases: list[Lease]
    persistence: Persistence
    counts: CacheCounts
    budget_bytes: int
    allow_requantise: bool
    preempt: Preempt | None = None
    wall_offset_s: float = 0.0

    def shortfall(self, need: Need) -> int:
        """Bytes missing; zero or less when there is room."""
        return committed_bytes(self.family, self.store, self.leases) + need.extra_bytes - self.budget_bytes

    def relieve(self, need: Need) -> bool:
        """Whether there is room now. False leaves everything idle as it was, less what preemption needed."""
        has_room = self.shortfall(need) <= 0 or self._free_room(need)
        if has_room:
            self._give_back_slack(need)
        return has_room

    def _give_back_slack(self, need: Need) -> None:
        """Free pages are memory too: those that no lease will fill go back before they pass the budget."""
        stranded = stranded_bytes(self.family, self.leases)
        wanted = stranded + self.shortfall(need) if stranded else 0
        if wanted > 0:
            self.family.trim(wanted)

    def _free_room(self, need: Need) -> bool:
        order = self._order(need)
        is_alone = all(lease is need.lease for lease in self.leases)
        last_resort = order.last_resort if is_alone else []  # with others at work, waiting frees something
        can_help = self._can_free([*order.ordinary, *last_resort], self.shortfall(need))
        if can_help and (self._climb(need, order.ordinary) or self._climb(need, last_resort)):
            return True
        return need.may_preempt and self._preempt_younger(need)

    def _climb(self, need: Need, victims: list[Conversation]) -> bool:
        """The first three steps over these conversations, in order."""
        nameless = [c for c in victims if not c.session.is_explicit and not c.session.is_pinned]
        named = [c for c in victims if c.session.is_explicit and not c.session.is_pinned]
        pinned = [c for c in victims if c.session.is_pinned]
        if self._forget(need, nameless):
            return True
        if self.allow_requantise and self._requantise(need, named):
            return True
        if self._spill(need, [*named, *pinned]):
            return True
        return self._forget(need, named)

    def _order(self, need: Need) -> VictimConversations:
        idle = {c.conversation_id + "\0" + c.salt: c for c in self.store if c.caches is not None}
        candidates = [
            Candidate(
                conversation_id=key,
                owner=c.salt,
                kv_bytes=c.kv_bytes,
                age_s=max(0.0, need.now_s - c.session.last_used_s),
                hits=c.session.hits,
                is_source=c is need.source,
            )
            for key, c in idle.items()
        ]
        order: VictimOrder = order_victims(candidates, self.budget_bytes)
        return VictimConversations([idle[k] for k in order.ordinary], [idle[k] for k in order.last_resort])

    def _can_free(self, victims: list[Conversation], num_bytes: int) -> bool:
        """Whether the first three steps could free that much."""
        release = Release(self.family)
        can_spill = self.persistence.is_writable
        for conversation in victims:
            if not conversation.session.is_pinned or can_spill or conversation.disk_key is not None:
                release.add(conversation)
                if release.freed_bytes >= num_bytes:
                    return True
        return False

    def _forget(self, need: Need, victims: list[Conversation]) -> bool:
        for conversation in self._worthwhile(victims):
            if conversation.disk_key is not None:
                self._unload(conversation)
            else:
                self.store.remove(conversation)
                self.counts.evictions["pressure"] += 1
            if self.shortfall(need) <= 0:
                return True
        return False

    def _worthwhile(self, victims: list[Conversation]) -> Iterator[Conversation]:
        """Those still in memory; ones whose pages all belong to others as well come last."""
        later = []
        for conversation in victims:
            if conversation.caches is None:
                continue
            if Release(self.family).add(conversation) > 0:
                yield conversation
            else:
                later.append(conversation)
        yield from later

    def _requantise(self, need: Need, victims: list[Conversation]) -> bool:
        return any(self._try_requantise(conversation) and self.shortfall(need) <= 0 for conversation in victims)

    def _try_requantise(self, conversation: Conversation) -> bool:
        """One step down, where that frees bytes and there is real memory for both versions meanwhile."""
        target = next_format_down(conversation.kv_format)
        if target is None or conversation.caches is None:
            return False
        try:
            new_bytes = self.family.runtime(target).bytes_for(len(conversation.tokens))
        except KVFormatError:
            return False
        used = used_bytes(self.family, self.store, self.leases)
        if Release(self.family).add(conversation) <= new_bytes or used + new_bytes > self.budget_bytes:
            return False
        source = conversation.kv_format
        converted = self.family.convert(conversation.caches, source, target)
        self.family.runtime(source).release(conversation.caches)
        self.persistence.forget(conversation)  # its file holds the old format
        conversation.caches, conversation.kv_format = converted, target
        conversation.kv = self.family.runtime(target).measure(converted)
        self.counts.requantisations[f"{source}>{target}"] += 1
        return True

    def _spill(self, need: Need, victims: list[Conversation]) -> bool:
        for conversation in victims:
            if conversation.caches is None or not self.persistence.save(conversation, self.wall_offset_s):
                continue
            self._unload(conversation)
            if self.shortfall(need) <= 0:
                return True
        return False

    def _unload(self, conversation: Conversation) -> None:
        self.store.unload(conversation)
        self.counts.spills["pressure"] += 1

    def _preempt_younger(self, need: Need) -> bool:
        """End the youngest leases that are younger than the one in need, one by one."""
        lease = need.lease
        if lease is None or self.preempt is None:
            return False
        for victim in sorted(self.leases, key=lambda other: other.order, reverse=True):
            if victim.order <= lease.order or not self.preempt(victim):
                continue
            self.counts.preemptions["growth"] += 1
            if self.shortfall(need) <= 0:
                return True
            order = self._order(need)
            if self._climb(need, [*order.ordinary, *order.last_resort]):
                return True
        return False


@dataclass(frozen=True, slots=True)
class VictimConversations:
    """VictimOrder with the conversations themselves."""

    ordinary: list[Conversation]
    last_resort: list[Conversation]
