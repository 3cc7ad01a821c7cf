"""The pressure plan: what gives way, in which order, when a request needs more bytes than are free.

    1. forget nameless conversations that nobody pinned (one that is on disk already only leaves memory)
    2. requantise idle named sessions one step down, if the operator allows it
    3. spill named sessions to disk, pinned ones last; without a disk, forget those that nobody pinned
    4. preempt running requests, the youngest first, for the sake of older ones
    5. the newest conversations, which victims.py shields, go only when waiting would free nothing

Nothing is given up unless all that may be given up is enough. Pure: `plan` computes from figures what is
to be done; room.py does it, and the engine preempts. Waiting and refusing are for the asker.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from turboserve.cache.interfaces import HeldPages, Key
from turboserve.cache.victims import Candidate, order_victims

Action = Literal["evict", "unload", "requantise", "spill", "over_quota"]


class Step(NamedTuple):
    """One conversation gives way.

    evict        forgotten, as memory was short
    unload       leaves memory, its file stays
    requantise   converted to `kv_format`
    spill        written to disk, then unloaded
    over_quota   forgotten with its file, as its caller reached a limit
    """

    action: Action
    key: Key
    kv_format: str = ""


@dataclass(frozen=True, slots=True)
class Relief:
    """All that has to happen before there is room: first the engine preempts, then memory takes the steps in order.

    Free pages that nobody will fill are given back at the very end (ledger.py); how many they are is seen then.
    """

    preempt: tuple[int, ...] = ()  # orders of leases, the youngest first
    steps: tuple[Step, ...] = ()


NOTHING = Relief()


class Lower(NamedTuple):
    """A conversation's next format down, and its bytes in that."""

    kv_format: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AtWork:
    """A running request that may be preempted, and the idle conversation that it would leave."""

    order: int
    open_bytes: int
    left: Candidate
    pages: HeldPages | None


@dataclass(frozen=True, slots=True)
class State:
    """The figures that a plan is made from.

    missing_bytes: zero or less when there is room already. used_bytes: real memory taken now.
    shared: pages of which the newcomer becomes one more holder. over_quota: goes in any case, and first.
    is_alone: nobody else runs, so that waiting would free nothing.
    """

    budget_bytes: int
    missing_bytes: int
    used_bytes: int = 0
    idle: tuple[Candidate, ...] = ()
    younger: tuple[AtWork, ...] = ()  # the youngest first
    shared: HeldPages | None = None
    over_quota: Key | None = None
    is_alone: bool = True
    may_requantise: bool = False


class Details(Protocol):
    """What costs something to look up, asked only about those whose turn it is. Reading only."""

    def pages(self, key: Key) -> HeldPages | None: ...

    def lower(self, key: Key) -> Lower | None:
        """None when there is no lower format that this model can have."""
        ...


def plan(state: State, details: Details) -> Relief | None:
    """The least that makes room, in the order above; None when all that may be given up is not enough."""
    books = Books(state, details)
    first = books.let_go_over_quota()
    if books.missing_bytes <= 0:
        return Relief(steps=first)
    order = order_victims(books.idle, state.budget_bytes)
    last_resort = order.last_resort if state.is_alone else []
    if books.could_free([*order.ordinary, *last_resort]):
        return Relief(steps=(*first, *books.climb(order.ordinary), *books.climb(last_resort)))
    for num_preempted in range(1, len(state.younger) + 1):
        relief = _plan_preempting(state, details, num_preempted)
        if relief is not None:
            return relief
    return None


def _plan_preempting(state: State, details: Details, num_preempted: int) -> Relief | None:
    """As if that many of the youngest were idle already; then everybody idle may give way."""
    victims = state.younger[:num_preempted]
    left = {victim.left.key: victim for victim in victims}
    books = Books(
        replace(
            state,
            missing_bytes=state.missing_bytes - sum(v.open_bytes - v.left.own_bytes for v in victims),
            idle=(*(c for c in state.idle if c.key not in left), *(v.left for v in victims)),
        ),
        details,
        left,
    )
    steps = books.let_go_over_quota()
    order = order_victims(books.idle, state.budget_bytes)
    everyone = [*order.ordinary, *order.last_resort]
    if books.missing_bytes > 0 and not books.could_free(everyone):
        return None
    return Relief(tuple(victim.order for victim in victims), (*steps, *books.climb(everyone)))


class Release:
    """What giving up conversations, one after another, would free: a page goes with its last holder.

    Nothing is given up in here; it is a calculation over the pages' reference counts. `shared`: pages that
    get one more holder first.
    """

    def __init__(self, shared: HeldPages | None = None) -> None:
        self._taken: dict[Hashable, NDArray[np.int64]] = {}  # per pool and page: holders given up so far
        self.freed_bytes = 0
        self._count(shared, -1)

    def add(self, own_bytes: int, pages: HeldPages | None) -> int:
        """Count one more as given up; returns the bytes that this frees."""
        freed = own_bytes + self.would_free(pages)
        self._count(pages, 1)
        self.freed_bytes += freed
        return freed

    def _count(self, pages: HeldPages | None, more: int) -> None:
        """So many more of these pages' holders are given up."""
        for of_pool in () if pages is None else pages.each():
            if len(of_pool.ids):
                self._taken_of(of_pool)[of_pool.ids] += more

    def would_free(self, pages: HeldPages | None) -> int:
        """Bytes of those pages whose last holder would go."""
        freed = 0
        for of_pool in () if pages is None else pages.each():
            if len(of_pool.ids):
                taken = self._taken_of(of_pool)[of_pool.ids]
                freed += int(np.count_nonzero(of_pool.references - taken <= 1)) * of_pool.page_bytes
        return freed

    def copy(self) -> Release:
        """A calculation of its own that goes on from here."""
        other = Release()
        other._taken = {pool: taken.copy() for pool, taken in self._taken.items()}
        other.freed_bytes = self.freed_bytes
        return other

    def _taken_of(self, pages: HeldPages) -> NDArray[np.int64]:
        num_pages = int(pages.ids.max()) + 1
        taken = self._taken.get(pages.pool, np.zeros(0, np.int64))
        if len(taken) < num_pages:
            taken = np.concatenate([taken, np.zeros(max(num_pages, 2 * len(taken)) - len(taken), np.int64)])
            self._taken[pages.pool] = taken
        return taken


class Books:
    """A plan in the making: what is still missing after the steps so far. Works on copies, changes nothing real."""

    def __init__(self, state: State, details: Details, preempted: dict[Key, AtWork] | None = None) -> None:
        self._state, self._details, self._preempted = state, details, preempted or {}
        self._release = Release(state.shared)
        self._lowered: dict[Key, int] = {}  # bytes of those that were requantised
        self._gone: set[Key] = set()
        self.missing_bytes, self._used_bytes = state.missing_bytes, state.used_bytes

    @property
    def idle(self) -> list[Candidate]:
        """Those still in memory."""
        return [c for c in self._state.idle if c.key not in self._gone]

    def let_go_over_quota(self) -> tuple[Step, ...]:
        """The step for who goes in any case; on disk it frees nothing."""
        key = self._state.over_quota
        if key is None:
            return ()
        for candidate in self._state.idle:
            if candidate.key == key:
                self._give_up(candidate)
        return (Step("over_quota", key),)

    def could_free(self, victims: Sequence[Candidate]) -> bool:
        """Whether all of these together are enough."""
        release = self._release.copy()
        wanted = release.freed_bytes + self.missing_bytes
        for candidate in victims:
            if candidate.may_give_way:
                release.add(candidate.own_bytes, self._pages(candidate))
                if release.freed_bytes >= wanted:
                    return True
        return False

    def climb(self, victims: Sequence[Candidate]) -> list[Step]:
        """The first three steps over these conversations in order, until nothing is missing."""
        nameless = [c for c in victims if not c.is_named and not c.is_pinned]
        named = [c for c in victims if c.is_named and not c.is_pinned]
        pinned = [c for c in victims if c.is_pinned]
        steps = list(self._forget(nameless))
        if self._state.may_requantise:
            steps += self._requantise(named)
        steps += self._spill([*named, *pinned])
        return [*steps, *self._forget(named)]

    def _forget(self, victims: Sequence[Candidate]) -> Iterator[Step]:
        for candidate in self._worthwhile(victims):
            if self.missing_bytes <= 0:
                return
            self._give_up(candidate)
            yield Step("unload" if self._has_file(candidate) else "evict", candidate.key)

    def _worthwhile(self, victims: Sequence[Candidate]) -> Iterator[Candidate]:
        """Those still in memory; ones whose bytes all belong to others as well come last."""
        later = []
        for candidate in victims:
            if candidate.key in self._gone:
                continue
            if candidate.own_bytes + self._release.would_free(self._pages(candidate)) > 0:
                yield candidate
            else:
                later.append(candidate)
        yield from later

    def _requantise(self, victims: Sequence[Candidate]) -> Iterator[Step]:
        """One step down each, where that frees bytes and there is real memory for both versions meanwhile."""
        for candidate in victims:
            if self.missing_bytes <= 0:
                return
            lower = self._details.lower(candidate.key)
            if lower is None:
                continue
            pages = self._pages(candidate)
            frees = candidate.own_bytes + self._release.would_free(pages)
            if frees <= lower.num_bytes or self._used_bytes + lower.num_bytes > self._state.budget_bytes:
                continue
            self._release.add(candidate.own_bytes, pages)
            self._book(frees - lower.num_bytes)
            self._lowered[candidate.key] = lower.num_bytes
            yield Step("requantise", candidate.key, lower.kv_format)

    def _spill(self, victims: Sequence[Candidate]) -> Iterator[Step]:
        for candidate in victims:
            if self.missing_bytes <= 0:
                return
            if candidate.can_spill or self._has_file(candidate):
                self._give_up(candidate)
                yield Step("spill", candidate.key)

    def _has_file(self, candidate: Candidate) -> bool:
        """A file holds the old format of one that is requantised, and goes with that."""
        return candidate.has_file and candidate.key not in self._lowered

    def _give_up(self, candidate: Candidate) -> None:
        self._gone.add(candidate.key)
        lowered = self._lowered.get(candidate.key)
        self._book(self._release.add(candidate.own_bytes, self._pages(candidate)) if lowered is None else lowered)

    def _book(self, freed_bytes: int) -> None:
        self.missing_bytes -= freed_bytes
        self._used_bytes -= freed_bytes

    def _pages(self, candidate: Candidate) -> HeldPages | None:
        victim = self._preempted.get(candidate.key)
        return self._details.pages(candidate.key) if victim is None else victim.pages
