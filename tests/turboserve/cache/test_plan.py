"""The pressure plan by itself: a pure function of figures, checked against the pages that it was computed from."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turboserve.cache.interfaces import HeldPages, Key
from turboserve.cache.pressure import AtWork, Lower, Relief, State, Step, plan
from turboserve.cache.victims import Candidate

PAGE_BYTES = 100
BUDGET = 2000
PageIds = frozenset[int]


@dataclass
class World:
    """Idle conversations and running requests with the pages that each holds; `Details` for plans about it."""

    idle: dict[Key, tuple[Candidate, PageIds]] = field(default_factory=dict)
    younger: list[tuple[Candidate, PageIds, int]] = field(default_factory=list)  # and what they reserved beyond
    others: PageIds = frozenset()  # held by requests that stay
    lower_bytes: int | None = None

    def references(self) -> Counter[int]:
        holders = [*(ids for _, ids in self.idle.values()), *(ids for _, ids, _ in self.younger), self.others]
        return Counter(page for ids in holders for page in ids)

    def held(self, ids: PageIds) -> HeldPages:
        pages = sorted(ids)
        references = self.references()
        return HeldPages("pool", np.array(pages, np.int64), np.array([references[p] for p in pages]), PAGE_BYTES)

    def pages(self, key: Key) -> HeldPages | None:
        return self.held(self.idle[key][1])

    def lower(self, key: Key) -> Lower | None:
        return None if self.lower_bytes is None else Lower("3t/2t", self.lower_bytes)

    def state(self, missing_bytes: int, **options: Any) -> State:
        return State(
            budget_bytes=BUDGET,
            missing_bytes=missing_bytes,
            used_bytes=BUDGET,
            idle=tuple(candidate for candidate, _ in self.idle.values()),
            younger=tuple(
                AtWork(10 - i, open_bytes + left.own_bytes, left, self.held(ids))
                for i, (left, ids, open_bytes) in enumerate(self.younger)
            ),
            **options,
        )

    def freed_by(self, relief: Relief) -> int:
        """Carry it out, and count who holds what instead of calculating with references. Promises are left out."""
        for _ in relief.preempt:
            left, ids, _ = self.younger.pop(0)
            self.idle[left.key] = (left, ids)
        before = self.held_bytes()
        for step in relief.steps:
            del self.idle[step.key]
        return before - self.held_bytes()

    def held_bytes(self) -> int:
        return len(self.references()) * PAGE_BYTES + sum(c.own_bytes for c, _ in self.idle.values())


def candidate(name: str, own_bytes: int, ids: PageIds, owner: str = "", **options: Any) -> Candidate:
    return Candidate((owner, name), own_bytes + len(ids) * PAGE_BYTES, own_bytes=own_bytes, **options)


PAGES = st.frozensets(st.integers(0, 11), max_size=5)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World(others=draw(PAGES))
    for i in range(draw(st.integers(0, 6))):
        ids = draw(PAGES)
        one = candidate(
            f"c{i}",
            draw(st.integers(0, 90)),
            ids,
            draw(st.sampled_from("ab")),
            age_s=draw(st.floats(0, 100)),
            hits=draw(st.integers(0, 3)),
            is_named=draw(st.booleans()),
            is_pinned=draw(st.booleans()),
            has_file=draw(st.booleans()),
            can_spill=draw(st.booleans()),
        )
        world.idle[one.key] = (one, ids)
    for i in range(draw(st.integers(0, 3))):
        ids = draw(PAGES)
        left = candidate(f"r{i}", draw(st.integers(0, 90)), ids, age_s=0.0, hits=0, is_named=draw(st.booleans()))
        world.younger.append((left, ids, draw(st.integers(0, 200))))
    return world


@given(worlds(), st.integers(-50, 900), st.booleans())
def test_the_same_figures_give_the_same_plan_and_stay_as_they_are(world: World, missing: int, is_alone: bool) -> None:
    state, before = world.state(missing, is_alone=is_alone), copy.deepcopy(world)
    first, second = plan(state, world), plan(state, world)
    assert first == second
    assert world == before and repr(state) == repr(before.state(missing, is_alone=is_alone))


@given(worlds(), st.integers(1, 900), st.booleans())
def test_a_plan_frees_what_is_missing_and_takes_only_what_may_go(world: World, missing: int, is_alone: bool) -> None:
    relief = plan(world.state(missing, is_alone=is_alone), world)
    if relief is None:
        return
    assert relief.preempt == tuple(10 - i for i in range(len(relief.preempt))), "the youngest first"
    promised = sum(open_bytes for _, _, open_bytes in world.younger[: len(relief.preempt)])
    candidates = {c.key: c for c, _ in world.idle.values()} | {c.key: c for c, _, _ in world.younger}
    assert len({step.key for step in relief.steps}) == len(relief.steps)
    for step in relief.steps:
        one = candidates[step.key]
        assert step.action != "evict" or not (one.is_pinned or one.has_file)
        assert step.action != "unload" or one.has_file
        assert step.action != "spill" or one.can_spill or one.has_file
    assert promised + world.freed_by(relief) >= missing


@given(worlds(), st.integers(1, 900))
def test_without_a_plan_not_even_everything_would_be_enough(world: World, missing: int) -> None:
    state = world.state(missing)
    if plan(state, world) is None:
        promised = sum(open_bytes for _, _, open_bytes in world.younger)
        may_go = [c for c, _ in world.idle.values()] + [c for c, _, _ in world.younger]
        everything = Relief(
            tuple(victim.order for victim in state.younger),
            tuple(Step("evict", c.key) for c in may_go if c.may_give_way),
        )
        assert promised + world.freed_by(everything) < missing


@given(worlds(), st.integers(1, 900))
def test_nobody_is_preempted_while_idle_conversations_are_enough(world: World, missing: int) -> None:
    without = plan(replace(world.state(missing), younger=()), world)
    relief = plan(world.state(missing), world)
    assert without is None or relief == without
    if relief is not None and relief.preempt:
        fewer = replace(world.state(missing), younger=world.state(missing).younger[: len(relief.preempt) - 1])
        assert plan(fewer, world) is None, "one fewer would have been enough"


def test_who_is_over_a_quota_goes_first_and_what_it_frees_counts() -> None:
    world = World()
    for name, ids in (("old", frozenset({1, 2})), ("new", frozenset({3}))):
        one = candidate(name, 10, ids, age_s=5.0, hits=0, is_named=True, can_spill=True)
        world.idle[one.key] = (one, ids)
    assert plan(world.state(210, over_quota=("", "old")), world) == Relief(steps=(Step("over_quota", ("", "old")),))
    more = plan(world.state(211, over_quota=("", "old")), world)
    assert more == Relief(steps=(Step("over_quota", ("", "old")), Step("spill", ("", "new"))))
    assert plan(world.state(-5, over_quota=("", "gone")), world) == Relief(steps=(Step("over_quota", ("", "gone")),))


def test_what_the_newcomer_shares_is_not_freed_by_its_source() -> None:
    world = World()
    ids = frozenset({1, 2, 3})
    source = candidate("s", 10, ids, age_s=5.0, hits=0, is_source=True)
    world.idle[source.key] = (source, ids)
    shared = world.held(frozenset({1, 2}))
    assert plan(world.state(110, shared=shared), world) == Relief(steps=(Step("evict", source.key),))
    assert plan(world.state(111, shared=shared), world) is None


def test_what_was_requantised_may_still_go_without_its_file() -> None:
    """Its file holds the old format: without a disk that takes the new one, it is forgotten for good."""
    world = World(lower_bytes=50)
    ids = frozenset({1, 2})
    one = candidate("s", 0, ids, age_s=5.0, hits=0, is_named=True, has_file=True)
    world.idle[one.key] = (one, ids)
    relief = plan(replace(world.state(180), used_bytes=0, may_requantise=True), world)
    assert relief == Relief(steps=(Step("requantise", one.key, "3t/2t"), Step("evict", one.key)))
    assert plan(world.state(180), world) == Relief(steps=(Step("spill", one.key),))
