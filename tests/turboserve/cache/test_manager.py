"""Leases, prefix reuse and eviction, on a runtime that only counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.cache.manager import CacheIntegrityError, CacheManager, Lease
from turboserve.cache.policy import Candidate, common_prefix_len, largest_fitting, plan_evictions
from turboserve.errors import ContextLengthError

BYTES_PER_TOKEN = 10
PAGE = 16


@dataclass(frozen=True)
class FakeFormat:
    page_tokens: int = PAGE
    sink_tokens: int = 0

    def num_pages(self, num_tokens: int) -> int:
        return num_tokens // PAGE


@dataclass(frozen=True)
class FakeBytes:
    tokens: int
    compressed: int
    exact: int = 0
    slack: int = 0
    uncompressed: int = 0
    raw_equivalent: int = 0


@dataclass
class FakeRuntime:
    """Caches are one-item lists holding a token count; pages are shared when `fmt` is set."""

    fmt: FakeFormat | None = None
    token_bytes: float = BYTES_PER_TOKEN
    live: list[list[Any]] = field(default_factory=list)
    page: int = 1
    leaked: int = 0

    def make_cache(self) -> list[Any]:
        return self._born(0)

    def _born(self, num_tokens: int) -> list[Any]:
        caches = [num_tokens]
        self.live.append(caches)
        return caches

    def bytes_for(self, num_tokens: int) -> int:
        return num_tokens * BYTES_PER_TOKEN

    def measure(self, caches: list[Any]) -> FakeBytes:
        return FakeBytes(caches[0], caches[0] * BYTES_PER_TOKEN)

    def allocated_bytes(self) -> int:
        return sum(int(c[0]) * BYTES_PER_TOKEN for c in self.live) + self.leaked

    def slack_bytes(self) -> int:
        return 0

    def check_integrity(self) -> None:
        return None

    def usable_prefix(self, caches: list[Any], length: int) -> int:
        return min(length, int(caches[0])) // self.page * self.page

    def fork(self, caches: list[Any], length: int) -> list[Any]:
        return self._born(length)

    def release(self, caches: list[Any]) -> None:
        self.live = [c for c in self.live if c is not caches]


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


def manager_for(runtime: FakeRuntime, num_tokens: int) -> CacheManager:
    return CacheManager(runtime, num_tokens * BYTES_PER_TOKEN)


def lease(manager: CacheManager, prompt: list[int], num_tokens: int, now_s: float = 0.0, salt: str = "") -> Lease:
    got = manager.try_lease(salt, prompt, num_tokens, now_s)
    assert got is not None
    return got


def converse(manager: CacheManager, tokens: list[int], now_s: float = 0.0, salt: str = "") -> Lease:
    """A whole request whose cache ends up holding `tokens`."""
    got = lease(manager, tokens, len(tokens) + 1, now_s, salt)
    got.caches[0] = len(tokens)
    manager.keep(got, tokens, got.caches, now_s)
    return got


def span(start: int, num: int) -> list[int]:
    return list(range(start, start + num))


def test_a_longer_prompt_starts_from_the_kept_prefix(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    first = converse(manager, span(0, 50))
    got = lease(manager, span(0, 80), 100)
    assert got.cached_len == 50 and got.caches == [50] and got.hits == 1
    assert got.conversation_id == first.conversation_id
    assert (manager.counts.lookups, manager.counts.hits, manager.counts.cached_tokens) == (2, 1, 50)


def test_the_last_prompt_token_is_never_taken_from_a_cache(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50))
    assert lease(manager, span(0, 50), 60).cached_len == 49
    assert lease(manager, span(0, 40), 60).cached_len == 39


def test_only_usable_cuts_are_taken(runtime: FakeRuntime) -> None:
    runtime.page = 16
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50))
    assert lease(manager, [*span(0, 45), 999], 60).cached_len == 32


def test_a_few_common_tokens_are_not_worth_a_fork(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50))
    assert lease(manager, [*span(0, 10), *span(500, 40)], 60).cached_len == 0


def test_the_best_of_several_prefixes_wins_and_a_branch_gets_its_own_id(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 40))
    other = converse(manager, [*span(0, 30), *span(100, 30)])
    got = lease(manager, [*span(0, 30), *span(100, 20), 7], 80)
    assert got.cached_len == 50 and got.source is not None
    assert got.source.conversation_id == other.conversation_id != got.conversation_id and got.hits == 0


def test_other_salts_see_nothing(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50), salt="a")
    assert lease(manager, span(0, 60), 80, salt="b").cached_len == 0
    assert lease(manager, span(0, 60), 80, salt="a").cached_len == 50


def test_a_continuation_replaces_what_it_continues(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50))
    converse(manager, span(0, 70))
    assert [len(c.tokens) for c in manager.store] == [70]
    converse(manager, span(0, 60))  # shorter: already contained
    assert [len(c.tokens) for c in manager.store] == [70]
    manager.check_integrity()


def test_what_cannot_be_cut_back_is_kept_beside_its_continuation(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 50))
    runtime.page = 64
    converse(manager, span(0, 60))
    assert sorted(len(c.tokens) for c in manager.store) == [50, 60]


def test_the_least_recently_used_give_way(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 100)
    for i, start in enumerate((0, 100, 200)):
        converse(manager, span(start, 29), now_s=float(i))
    got = lease(manager, span(300, 20), 60, now_s=9.0)
    assert [int(c.tokens[0]) for c in manager.store] == [200]
    assert manager.counts.evictions == 2
    manager.check_integrity([got.caches])


def test_no_room_now_means_wait_and_nothing_is_evicted_for_nothing(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 100)
    converse(manager, span(0, 20))
    running = lease(manager, span(100, 10), 70)
    changes = manager.changes
    assert manager.try_lease("", span(200, 10), 60, 0.0) is None
    assert len(list(manager.store)) == 1 and manager.changes == changes
    manager.drop(running, running.caches)
    assert manager.changes > changes
    assert manager.try_lease("", span(200, 10), 60, 0.0) is not None


def test_what_can_never_fit_is_refused_with_the_numbers(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 100)
    with pytest.raises(ContextLengthError) as caught:
        manager.try_lease("", span(0, 90), 101, 0.0)
    assert "1,010" in caught.value.message and "1,000" in caught.value.message and "100 tokens" in caught.value.message


def test_continuing_a_conversation_that_fills_half_the_budget_works(runtime: FakeRuntime) -> None:
    runtime.fmt = FakeFormat()
    manager = manager_for(runtime, 100)
    converse(manager, span(0, 60))
    got = lease(manager, span(0, 70), 95)  # only beyond the 48 tokens in shared pages does it cost more
    assert got.cached_len == 60
    assert manager.committed_bytes <= manager.budget_bytes


def test_shared_pages_count_once_until_their_owner_goes(runtime: FakeRuntime) -> None:
    runtime.fmt = FakeFormat()
    manager = manager_for(runtime, 1000)
    converse(manager, span(0, 64))
    first, second = lease(manager, span(0, 70), 80), lease(manager, [*span(0, 64), 5, 6], 80)
    assert manager.committed_bytes == (64 + 2 * (80 - 64)) * BYTES_PER_TOKEN
    first.caches[0] = 75
    manager.keep(first, span(0, 75), first.caches, 1.0)
    assert second.source is not None and second.source in manager.store  # now shared with the continuation
    assert manager.committed_bytes == (75 + 80 - 64) * BYTES_PER_TOKEN


def test_leases_grow_only_within_the_budget(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 100)
    got = lease(manager, span(0, 10), 20)
    converse(manager, span(100, 40))
    assert manager.try_extend(got, 80) and len(list(manager.store)) == 0
    assert not manager.try_extend(got, 101)
    assert got.reserved_tokens == 80 and manager.committed_bytes == 800


def test_a_leak_and_a_false_figure_are_noticed(runtime: FakeRuntime) -> None:
    manager = manager_for(runtime, 100)
    converse(manager, span(0, 30))
    manager.check_integrity()
    runtime.leaked = 1
    with pytest.raises(CacheIntegrityError):
        manager.check_integrity()
    runtime.leaked = 0
    next(iter(manager.store)).caches[0] = 31
    with pytest.raises(CacheIntegrityError):
        manager.check_integrity()


def test_random_traffic_never_passes_the_budget_and_leaks_nothing(rng: np.random.Generator) -> None:
    runtime = FakeRuntime(fmt=FakeFormat())
    manager = manager_for(runtime, 400)
    running: list[tuple[Lease, list[int]]] = []
    for step in range(400):
        if running and rng.random() < 0.5:
            got, tokens = running.pop(int(rng.integers(len(running))))
            got.caches[0] = len(tokens)
            if rng.random() < 0.7:
                manager.keep(got, tokens, got.caches, float(step))
            else:
                manager.drop(got, got.caches)
        else:
            tokens = [*span(0, int(rng.integers(1, 60))), *span(int(rng.integers(100, 105)), int(rng.integers(1, 60)))]
            new = manager.try_lease(str(rng.integers(2)), tokens, len(tokens) + int(rng.integers(1, 40)), float(step))
            if new is not None:
                running.append((new, tokens))
        assert manager.committed_bytes <= manager.budget_bytes
    for got, _ in running:
        manager.drop(got, got.caches)
    manager.check_integrity()
    manager.drop_idle()
    assert runtime.live == [] and manager.committed_bytes == 0


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    num = common_prefix_len(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:num] == b[:num]
    assert num in (len(a), len(b)) or a[num] != b[num]


@given(st.integers(0, 300), st.integers(0, 5000))
def test_largest_fitting(most: int, budget: int) -> None:
    found = largest_fitting(lambda n: 100 + 16 * (n // 3), budget, most)
    assert found == max([n for n in range(1, most + 1) if 100 + 16 * (n // 3) <= budget], default=0)


def test_eviction_order_protects_the_source_and_skips_what_frees_nothing() -> None:
    candidates = [
        Candidate("source", 50, 0.0, True),
        Candidate("old", 50, 1.0, False),
        Candidate("useless", 0, 0.5, False),
        Candidate("new", 50, 2.0, False),
    ]
    assert plan_evictions(candidates, 0) == []
    assert plan_evictions(candidates, 60) == ["old", "new"]
    assert plan_evictions(candidates, 120) == ["old", "new", "source"]
    assert plan_evictions(candidates, 151) is None
