"""Pure decisions: who gives way first, which format comes next."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from turboserve.cache.victims import (
    FORMAT_STEPS,
    SHIELD_SHARE,
    Candidate,
    eviction_score,
    next_format_down,
    order_victims,
)


def names(victims: list[Candidate]) -> list[str]:
    return [name for _, name in (c.key for c in victims)]


def candidate(name: str, *, owner: str = "", kv_bytes: int = 100, age_s: float = 50.0, hits: int = 0) -> Candidate:
    return Candidate((owner, name), kv_bytes, age_s, hits)


def test_the_score_grows_with_age_and_bytes_and_falls_with_hits() -> None:
    base = candidate("a")
    assert eviction_score(candidate("b", age_s=60)) > eviction_score(base)
    assert eviction_score(candidate("b", kv_bytes=200)) > eviction_score(base)
    assert eviction_score(candidate("b", hits=1)) < eviction_score(base)
    # Twice as long unused weighs more than twice as large: recency is what predicts the next request.
    assert eviction_score(candidate("b", age_s=101)) > eviction_score(candidate("c", kv_bytes=200))


def test_the_newest_are_shielded_up_to_their_share() -> None:
    budget = 1000
    young = [candidate(f"y{i}", kv_bytes=50, age_s=i) for i in range(4)]
    order = order_victims([candidate("old", age_s=500), *young], budget)
    assert set(names(order.last_resort)) == {"y0", "y1"}  # 100 of at most 125 bytes
    assert names(order.ordinary) == ["old", "y3", "y2"]


def test_a_conversation_larger_than_the_shield_is_not_shielded() -> None:
    order = order_victims([candidate("huge", kv_bytes=900, age_s=0), candidate("small", age_s=9)], 1000)
    assert order.last_resort == [] and set(names(order.ordinary)) == {"huge", "small"}


def test_the_source_of_the_request_goes_after_all_ordinary_ones() -> None:
    source = Candidate(("", "source"), 400, 900.0, 0, is_source=True)
    order = order_victims([source, candidate("a", kv_bytes=400), candidate("b", kv_bytes=400, age_s=1)], 1000)
    assert names(order.ordinary) == ["a", "b", "source"]


def test_who_holds_more_than_an_equal_share_gives_way_first() -> None:
    flood = [candidate(f"f{i}", owner="greedy", kv_bytes=200, age_s=20 + i, hits=9) for i in range(4)]
    modest = [candidate(f"m{i}", owner="modest", kv_bytes=100, age_s=900 - i) for i in range(2)]
    order = order_victims([*flood, *modest], 1000)
    # 800 of 1000 bytes are the greedy caller's: down to 500 that caller pays, then scores decide.
    assert names(order.ordinary)[:2] == ["f3", "f2"] and names(order.ordinary)[2] == "m0"


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.uuids().map(str),
        owner=st.sampled_from("abc"),
        kv_bytes=st.integers(0, 500),
        age_s=st.floats(0, 1e4),
        hits=st.integers(0, 5),
    ),
    max_size=12,
)


@given(CANDIDATES, st.integers(1, 3000))
def test_everybody_is_ordered_once_and_the_shield_keeps_to_its_share(found: list[Candidate], budget: int) -> None:
    order = order_victims(found, budget)
    assert sorted([*names(order.ordinary), *names(order.last_resort)]) == sorted(names(found))
    assert sum(c.kv_bytes for c in order.last_resort) <= SHIELD_SHARE * budget
    ages = [c.age_s for c in order.last_resort]
    assert not ages or max(ages) <= min([c.age_s for c in order.ordinary], default=max(ages))


def test_formats_step_down_to_a_floor() -> None:
    assert all(next_format_down(a) == b for a, b in pairwise(FORMAT_STEPS))
    assert next_format_down(FORMAT_STEPS[-1]) is None and next_format_down("2/2") is None
