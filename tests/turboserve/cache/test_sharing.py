"""Callers: what one of them did is nothing to another, and everything to themselves.

A property in both directions. Never across: whatever others do, a caller finds exactly what they would
find alone. Always within: a caller's own beginnings are found whenever they are held.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.turboserve.cache.fakes import FakeFamily, converse, lease_for, manager_for

from turboserve.cache.desk import SessionDesk
from turboserve.cache.manager import CacheManager
from turboserve.cache.policy import common_prefix_len
from turboserve.cache.sessions import MIN_REUSED_TOKENS

ROOMY = 10_000_000
PROMPTS = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3).map(
    lambda parts: [100 * p + i for p in parts for i in range(20)]
)
CALLS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), PROMPTS), min_size=1, max_size=12)


def found_by(manager: CacheManager, calls: list[tuple[str, list[int]]], salt: str) -> list[int]:
    """Run all calls; how many tokens each of one caller's calls found."""
    found = []
    for now_s, (caller, prompt) in enumerate(calls):
        lease = lease_for(manager, prompt, len(prompt) + 1, float(now_s), caller)
        if caller == salt:
            found.append(lease.cached_len)
        manager.drop(lease, lease.caches)
        converse(manager, prompt, float(now_s), caller)
    return found


@given(CALLS)
@settings(deadline=None)
def test_a_caller_finds_what_they_would_find_alone(calls: list[tuple[str, list[int]]]) -> None:
    for salt in ("a", "b", "c"):
        together = found_by(manager_for(FakeFamily(), ROOMY), calls, salt)
        alone = found_by(manager_for(FakeFamily(), ROOMY), [c for c in calls if c[0] == salt], salt)
        assert together == alone


@given(CALLS)
@settings(deadline=None)
def test_a_caller_finds_all_of_their_own(calls: list[tuple[str, list[int]]]) -> None:
    """In a cache that can be cut anywhere, the longest common beginning of all of one's own earlier prompts."""
    manager = manager_for(FakeFamily("f16"), ROOMY)
    seen: list[tuple[str, list[int]]] = []
    for caller, prompt in calls:
        mine = [p for c, p in seen if c == caller]
        common = max((common_prefix_len(np.array(p, np.int32), np.array(prompt, np.int32)) for p in mine), default=0)
        expected = min(common, len(prompt) - 1)
        lease = lease_for(manager, prompt, len(prompt) + 1, salt=caller)
        assert lease.cached_len == (expected if expected >= MIN_REUSED_TOKENS else 0)
        manager.drop(lease, lease.caches)
        converse(manager, prompt, salt=caller)
        seen.append((caller, prompt))


@given(CALLS)
@settings(deadline=None)
def test_no_page_has_two_callers_and_equal_prompts_of_one_caller_share_theirs(
    calls: list[tuple[str, list[int]]],
) -> None:
    family = FakeFamily()
    manager = manager_for(family, ROOMY)
    for now_s, (caller, prompt) in enumerate(calls):
        converse(manager, prompt, float(now_s), caller)
    owners: dict[int, str] = {}
    contents: dict[tuple[str, tuple[int, ...]], int] = {}
    for conversation in manager.store:
        assert conversation.caches is not None
        cache = conversation.caches[0]
        for i, page in enumerate(cache.pages):
            assert owners.setdefault(page, conversation.salt) == conversation.salt
            beginning = (conversation.salt, tuple(cache.tokens[: 16 * (i + 1)]))
            assert contents.setdefault(beginning, page) == page, "the same beginning is held twice"


def test_names_are_each_callers_own() -> None:
    manager = manager_for(FakeFamily(), ROOMY)
    desk = SessionDesk(manager)
    converse(manager, list(range(40)), salt="a", session_id="chat")
    converse(manager, list(range(500, 580)), salt="b", session_id="chat")
    assert desk.get("a", "chat", 0.0).num_tokens == 40 and desk.get("b", "chat", 0.0).num_tokens == 80
    desk.delete("a", "chat")
    assert [v.session.session_id for v in desk.list_page("b", 9, None, 0.0)[0]] == ["chat"]
    assert desk.list_page("a", 9, None, 0.0) == ([], False)
