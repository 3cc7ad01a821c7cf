"""Leases, prefix reuse and eviction, on caches that only count."""

from __future__ import annotations

import numpy as np
import pytest
from tests.turboserve.cache.fakes import (
    PAGE,
    RAW,
    FakeFamily,
    better_start,
    converse,
    finish,
    held,
    lease_for,
    memory_for,
    span,
    try_extend,
    try_lease,
)

from turboserve.cache.memory import CacheIntegrityError, Lease, Memory
from turboserve.errors import ContextLengthError
from turboserve.messages import MAX_SHOWN_CONVERSATIONS


@pytest.fixture
def plain() -> FakeFamily:
    """Uncompressed: every token costs RAW bytes, nothing is shared."""
    return FakeFamily("f16")


@pytest.fixture
def paged() -> FakeFamily:
    return FakeFamily("4/4")


def roomy(family: FakeFamily, num_tokens: int = 1000) -> Memory:
    return memory_for(family, num_tokens * RAW)


def test_a_longer_prompt_starts_from_the_kept_prefix(plain: FakeFamily) -> None:
    memory = roomy(plain)
    first = converse(memory, span(0, 50))
    assert first is not None
    got = lease_for(memory, span(0, 80), 100)
    assert got.cached_len == 50 and got.session.hits == 1
    assert got.conversation_id == first.conversation_id
    events = memory.events()
    assert (events.prefix_lookups, events.prefix_hits) == (2, 1)
    assert (events.prefix_query_tokens, events.prefix_hit_tokens) == (130, 50)


def test_the_last_prompt_token_is_never_taken_from_a_cache(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 50))
    assert lease_for(memory, span(0, 50), 60).cached_len == 49
    assert lease_for(memory, span(0, 40), 60).cached_len == 39


def test_only_usable_cuts_are_taken(paged: FakeFamily) -> None:
    memory = roomy(paged)
    converse(memory, span(0, 50))
    assert lease_for(memory, [*span(0, 45), 999], 60).cached_len == 32
    assert lease_for(memory, [*span(0, 50), 999], 60).cached_len == 50


def test_a_few_common_tokens_are_not_worth_a_fork(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 50))
    assert lease_for(memory, [*span(0, 10), *span(500, 40)], 60).cached_len == 0


def test_the_best_of_several_prefixes_wins_and_a_branch_gets_its_own_id(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 40))
    other = converse(memory, [*span(0, 30), *span(100, 30)])
    assert other is not None
    got = lease_for(memory, [*span(0, 30), *span(100, 20), 7], 80)
    assert got.cached_len == 50 and got.source is other.session
    assert got.conversation_id != other.conversation_id and got.session.hits == 0


def test_a_running_request_is_shared_as_far_as_it_is_computed(paged: FakeFamily) -> None:
    memory = roomy(paged)
    first = lease_for(memory, span(0, 200), 210)
    assert lease_for(memory, [*span(0, 150), 7], 160).cached_len == 0  # nothing is computed yet
    first.caches[0].grow(span(0, 100))
    second = lease_for(memory, [*span(0, 150), 8], 160)
    assert second.cached_len == 96 or second.cached_len == 100
    assert second.caches[0].pages == first.caches[0].pages[: len(second.caches[0].pages)]
    memory.check_integrity([x.caches for x in memory.leases])


def test_of_two_that_start_together_the_second_follows_the_first(paged: FakeFamily) -> None:
    memory = roomy(paged)
    first, second = lease_for(memory, span(0, 100), 110), lease_for(memory, [*span(0, 90), 7], 110)
    assert better_start(memory, second) is None
    first.caches[0].grow(span(0, 99))
    old = second.caches
    better = better_start(memory, second)
    assert better is not None and better[1] == 80 and second.cached_len == 80
    paged.runtime("4/4").release(old)
    memory.check_integrity([x.caches for x in memory.leases])
    assert better_start(memory, second) is None


def test_other_salts_see_nothing(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 50), salt="a")
    assert lease_for(memory, span(0, 60), 80, salt="b").cached_len == 0
    assert lease_for(memory, span(0, 60), 80, salt="a").cached_len == 50


def test_a_continuation_replaces_what_it_continues(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 50))
    converse(memory, span(0, 70))
    assert [len(c.tokens) for c in memory.idle] == [70]
    assert converse(memory, span(0, 60)) is None or [len(c.tokens) for c in memory.idle] == [70]
    assert [len(c.tokens) for c in memory.idle] == [70]  # the shorter one is contained
    memory.check_integrity()


def test_two_answers_to_one_beginning_both_stay(plain: FakeFamily) -> None:
    memory = roomy(plain)
    converse(memory, span(0, 50))
    one, two = lease_for(memory, span(0, 60), 90), lease_for(memory, span(0, 60), 90)
    finish(memory, one, [*span(0, 60), 1, 1])
    finish(memory, two, [*span(0, 60), 2, 2])
    assert [len(c.tokens) for c in memory.idle] == [62, 62]
    memory.check_integrity()


def test_what_cannot_be_cut_back_is_kept_beside_its_continuation() -> None:
    family = FakeFamily("f16", is_cuttable=False)
    memory = roomy(family)
    converse(memory, span(0, 50))
    converse(memory, [*span(0, 40), 7])  # nothing to be had from the first
    finish(memory, lease_for(memory, [*span(0, 50), 7], 60), [*span(0, 50), 7, 8])
    # The first one's own continuation took its name; it could not be had back from the longer one otherwise.
    assert sorted(len(c.tokens) for c in memory.idle) == [41, 52]


def test_the_least_recently_used_give_way(plain: FakeFamily) -> None:
    memory = roomy(plain, 100)
    for i, start in enumerate((0, 100, 200)):
        converse(memory, span(start, 29), now_s=float(i))
    got = lease_for(memory, span(300, 20), 60, now_s=9.0)
    assert held(memory) == [200]
    assert memory.events().evictions["pressure"] == 2
    memory.check_integrity([got.caches])


def test_no_room_now_means_wait_and_nothing_is_evicted_for_nothing(plain: FakeFamily) -> None:
    memory = roomy(plain, 100)
    converse(memory, span(0, 20))
    running = lease_for(memory, span(100, 10), 70)
    changes = memory.generation
    assert try_lease(memory, span(200, 10), 60) is None
    assert len(list(memory.idle)) == 1 and memory.generation == changes
    memory.drop(running, running.caches)
    assert memory.generation > changes
    assert try_lease(memory, span(200, 10), 60) is not None


def test_what_can_never_fit_is_refused_with_the_numbers(plain: FakeFamily) -> None:
    memory = roomy(plain, 100)
    with pytest.raises(ContextLengthError) as caught:
        try_lease(memory, span(0, 90), 101)
    assert "1,010" in caught.value.message and "1,000" in caught.value.message and "100 tokens" in caught.value.message


def test_continuing_a_conversation_that_fills_the_budget_costs_only_what_is_new(paged: FakeFamily) -> None:
    memory = memory_for(paged, 40 * PAGE * 4 + 2 * PAGE * RAW)
    converse(memory, span(0, 38 * PAGE + 1))
    got = lease_for(memory, span(0, 38 * PAGE + 10), 39 * PAGE)
    assert got.cached_len == 38 * PAGE + 1 and len(list(memory.idle)) == 1
    assert memory.committed_bytes <= memory.budget_bytes


def test_shared_pages_count_once_however_many_hold_them(paged: FakeFamily) -> None:
    memory = roomy(paged)
    converse(memory, span(0, 4 * PAGE + 1))
    alone = memory.committed_bytes
    assert alone == 4 * PAGE * 4 + RAW
    first = lease_for(memory, span(0, 70), 70)
    with_one = memory.committed_bytes
    lease_for(memory, [*span(0, 65), 5, 6], 70)
    assert memory.committed_bytes - with_one == with_one - alone == first.reserved_bytes - 4 * PAGE * 4
    finish(memory, first, span(0, 69))
    assert len(list(memory.idle)) == 1
    assert memory.committed_bytes == 4 * PAGE * 4 + 5 * RAW + first.reserved_bytes - 4 * PAGE * 4


def test_leases_grow_only_within_the_budget(plain: FakeFamily) -> None:
    memory = roomy(plain, 100)
    got = lease_for(memory, span(0, 10), 20)
    converse(memory, span(100, 40))
    assert try_extend(memory, got, 80, 1.0) and len(list(memory.idle)) == 0
    assert not try_extend(memory, got, 101, 1.0)
    assert got.reserved_tokens == 80 and memory.committed_bytes == 80 * RAW


def test_estimates_are_compared_with_what_was_used(plain: FakeFamily) -> None:
    memory = roomy(plain)
    finish(memory, lease_for(memory, span(0, 10), 50), span(0, 20))
    finish(memory, lease_for(memory, span(100, 10), 30), span(100, 30))
    admission = memory.admission()
    assert (admission.num_requests, admission.estimated_bytes, admission.actual_bytes) == (2, 800, 500)
    assert (admission.last_estimated_bytes, admission.last_actual_bytes) == (300, 300)


def test_a_leak_and_a_false_figure_are_noticed(paged: FakeFamily) -> None:
    memory = roomy(paged)
    converse(memory, span(0, 30))
    memory.check_integrity()
    paged.leaked = 1
    with pytest.raises(CacheIntegrityError):
        memory.check_integrity()
    paged.leaked = 0
    next(iter(memory.idle)).caches[0].grow([31])  # type: ignore[index]
    with pytest.raises(CacheIntegrityError):
        memory.check_integrity()
    assert memory.events().integrity_failures == 2


@pytest.mark.parametrize("name", ["f16", "4/4"])
def test_random_traffic_never_passes_the_budget_and_leaks_nothing(name: str, rng: np.random.Generator) -> None:
    family = FakeFamily(name)
    memory = memory_for(family, 400 * RAW)
    running: list[tuple[Lease, list[int]]] = []
    for step in range(400):
        if running and rng.random() < 0.5:
            got, tokens = running.pop(int(rng.integers(len(running))))
            if rng.random() < 0.7:
                finish(memory, got, tokens, float(step))
            else:
                memory.drop(got, got.caches)
        else:
            tokens = [*span(0, int(rng.integers(1, 60))), *span(int(rng.integers(100, 105)), int(rng.integers(1, 60)))]
            room = len(tokens) + int(rng.integers(1, 40))
            new = try_lease(memory, tokens, room, float(step), str(rng.integers(2)))
            if new is not None:
                running.append((new, tokens))
        assert memory.committed_bytes <= memory.budget_bytes
        assert family.allocated_bytes() <= memory.budget_bytes
        memory.check_integrity([x.caches for x in memory.leases])
    for got, _ in running:
        memory.drop(got, got.caches)
    memory.drop_idle()
    assert family.live == [] and memory.committed_bytes == 0


def test_free_pages_of_one_format_make_way_for_another(paged: FakeFamily) -> None:
    memory = memory_for(paged, 10 * PAGE * RAW)
    converse(memory, span(0, 300))
    memory.drop_idle()
    assert paged.slack_bytes() > PAGE * RAW
    got = lease_for(memory, span(1000, 20), 150, kv_format="f16")
    got.caches[0].grow(span(1000, 150))
    assert paged.allocated_bytes() <= memory.budget_bytes
    memory.drop(got, got.caches)
    converse(memory, span(0, 300))
    slack = paged.slack_bytes()
    memory.drop_idle()
    lease_for(memory, span(0, 200), 300)  # of the same format: what is free serves it
    assert paged.slack_bytes() > slack


def test_statistics_show_the_largest_whoever_works() -> None:
    memory = memory_for(FakeFamily("f16"), 1_000_000)
    converse(memory, span(0, 300), 0.0, session_id="large")
    small = [lease_for(memory, span(1000 * i, 5), 9) for i in range(1, MAX_SHOWN_CONVERSATIONS + 3)]
    for lease in small:
        lease.caches[0].grow(lease.prompt.tolist())
    shown = memory.holdings(1.0).conversations
    assert len(shown) == MAX_SHOWN_CONVERSATIONS and shown[0].kv.tokens == 300
    sizes = [c.kv.total for c in shown]
    assert sizes == sorted(sizes, reverse=True)
