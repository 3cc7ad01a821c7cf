"""Callers: what one of them did is nothing to another, and everything to themselves.

A property in both directions. Never across: whatever others do, a caller finds exactly what they would
find alone. Always within: a caller's own beginnings are found whenever they are held.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.turboserve.cache.fakes import FakeFamily, FakeRunning, converse, lease_for, memory_for, span

from turboserve.cache.memory import Memory
from turboserve.cache.prefix_index import MIN_REUSED_TOKENS
from turboserve.cache.radix import common_prefix_len
from turboserve.messages import DeleteSession, GetSession, ListSessions, SessionPage

ROOMY = 10_000_000
PROMPTS = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3).map(
    lambda parts: [100 * p + i for p in parts for i in range(20)]
)
CALLS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), PROMPTS), min_size=1, max_size=12)


def found_by(memory: Memory, calls: list[tuple[str, list[int]]], salt: str) -> list[int]:
    """Run all calls; how many tokens each of one caller's calls found."""
    found = []
    for now_s, (caller, prompt) in enumerate(calls):
        lease = lease_for(memory, prompt, len(prompt) + 1, float(now_s), caller)
        if caller == salt:
            found.append(lease.cached_len)
        memory.drop(lease, lease.caches)
        converse(memory, prompt, float(now_s), caller)
    return found


@given(CALLS)
@settings(deadline=None)
def test_a_caller_finds_what_they_would_find_alone(calls: list[tuple[str, list[int]]]) -> None:
    for salt in ("a", "b", "c"):
        together = found_by(memory_for(FakeFamily(), ROOMY), calls, salt)
        alone = found_by(memory_for(FakeFamily(), ROOMY), [c for c in calls if c[0] == salt], salt)
        assert together == alone


@given(CALLS)
@settings(deadline=None)
def test_a_caller_finds_all_of_their_own(calls: list[tuple[str, list[int]]]) -> None:
    """In a cache that can be cut anywhere, the longest common beginning of all of one's own earlier prompts."""
    memory = memory_for(FakeFamily("f16"), ROOMY)
    seen: list[tuple[str, list[int]]] = []
    for caller, prompt in calls:
        mine = [p for c, p in seen if c == caller]
        common = max((common_prefix_len(np.array(p, np.int32), np.array(prompt, np.int32)) for p in mine), default=0)
        expected = min(common, len(prompt) - 1)
        lease = lease_for(memory, prompt, len(prompt) + 1, salt=caller)
        assert lease.cached_len == (expected if expected >= MIN_REUSED_TOKENS else 0)
        memory.drop(lease, lease.caches)
        converse(memory, prompt, salt=caller)
        seen.append((caller, prompt))


@given(CALLS)
@settings(deadline=None)
def test_no_page_has_two_callers_and_equal_prompts_of_one_caller_share_theirs(
    calls: list[tuple[str, list[int]]],
) -> None:
    family = FakeFamily()
    memory = memory_for(family, ROOMY)
    for now_s, (caller, prompt) in enumerate(calls):
        converse(memory, prompt, float(now_s), caller)
    owners: dict[int, str] = {}
    contents: dict[tuple[str, tuple[int, ...]], int] = {}
    for conversation in memory.idle:
        assert conversation.caches is not None
        cache = conversation.caches[0]
        for i, page in enumerate(cache.pages):
            assert owners.setdefault(page, conversation.salt) == conversation.salt
            beginning = (conversation.salt, tuple(cache.tokens[: 16 * (i + 1)]))
            assert contents.setdefault(beginning, page) == page, "the same beginning is held twice"


def test_names_are_each_callers_own() -> None:
    memory = memory_for(FakeFamily(), ROOMY)
    converse(memory, list(range(40)), salt="a", session_id="chat")
    converse(memory, list(range(500, 580)), salt="b", session_id="chat")
    assert memory.answer(GetSession("a", "chat"), 0.0).tokens == 40  # type: ignore[union-attr]
    assert memory.answer(GetSession("b", "chat"), 0.0).tokens == 80  # type: ignore[union-attr]
    memory.answer(DeleteSession("a", "chat"), 0.0)
    theirs = memory.answer(ListSessions("b", 9), 0.0)
    assert isinstance(theirs, SessionPage) and [s.session_id for s in theirs.sessions] == ["chat"]
    assert memory.answer(ListSessions("a", 9), 0.0) == SessionPage()


def test_a_burst_asks_few_of_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question looks at every layer: with as many as there are requests, a burst waits for its square."""
    memory, asked = memory_for(FakeFamily(), ROOMY), 0
    usable_prefix = FakeRunning.usable_prefix

    def counted(self: FakeRunning, length: int) -> int:
        nonlocal asked
        asked += 1
        return usable_prefix(self, length)

    monkeypatch.setattr(FakeRunning, "usable_prefix", counted)
    num_requests, common = 40, span(0, 32)
    for i in range(num_requests):
        lease = lease_for(memory, [*common, *span(1000 + 100 * i, 20)], 60)
        lease.caches[0].grow([*common, *span(1000 + 100 * i, 20)][lease.cached_len :])
        assert lease.cached_len == (32 if i else 0)
    assert asked <= 2 * num_requests
