"""Sessions: names, times to live, pins, quotas and hints."""

from __future__ import annotations

import pytest
from tests.turboserve.cache.fakes import (
    RAW,
    FakeDisk,
    FakeEngine,
    FakeFamily,
    ask_for,
    converse,
    finish,
    held,
    lease_for,
    memory_for,
    span,
    try_extend,
)

from turboserve.cache.memory import Lease, Memory
from turboserve.errors import (
    OverloadedError,
    QuotaExceededError,
    SessionBusyError,
    SessionExistsError,
    SessionNotFoundError,
)
from turboserve.messages import (
    DeleteSession,
    ForkSession,
    GetSession,
    ListSessions,
    SessionCommand,
    SessionInfo,
    SessionPage,
    UpdateSession,
)

ROOMY = 1_000_000


def info(memory: Memory, command: SessionCommand, now_s: float = 0.0) -> SessionInfo:
    answer = memory.answer(command, now_s)
    assert isinstance(answer, SessionInfo)
    return answer


def page(memory: Memory, limit: int, after: str | None, now_s: float) -> SessionPage:
    answer = memory.answer(ListSessions("", limit, after), now_s)
    assert isinstance(answer, SessionPage)
    return answer


def test_a_named_session_follows_its_last_request() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    converse(memory, span(0, 60), session_id="s")
    converse(memory, [*span(0, 40), *span(500, 50)], session_id="s")
    (only,) = memory.idle
    assert only.tokens.tolist() == [*span(0, 40), *span(500, 50)]
    assert only.session.is_explicit and only.session.num_requests == 2


def test_a_request_that_ends_early_does_not_shorten_its_session() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    converse(memory, span(0, 60), session_id="s")
    lease = lease_for(memory, span(0, 50), 70, session_id="s")
    finish(memory, lease, span(0, 49))
    assert [len(c.tokens) for c in memory.idle] == [60]


def test_a_nameless_request_never_takes_over_a_named_session() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    converse(memory, span(0, 60), session_id="s")
    lease = lease_for(memory, span(0, 80), 100)
    assert lease.cached_len == 60 and not lease.session.is_explicit
    finish(memory, lease, span(0, 90))
    assert sorted(len(c.tokens) for c in memory.idle) == [60, 90]


def test_a_nameless_conversation_asked_for_by_its_id_becomes_a_named_one() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    kept = converse(memory, span(0, 60))
    assert kept is not None and not kept.session.is_explicit
    converse(memory, [*span(0, 40), *span(500, 50)], session_id=kept.conversation_id)
    (only,) = memory.idle
    assert only.session is kept.session and only.session.is_explicit and len(only.tokens) == 90


def test_among_equals_the_callers_own_choice_is_continued() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    for name in ("s1", "s2"):
        converse(memory, [*span(0, 60), ord(name[1])], session_id=name)
    converse(memory, [*span(0, 60), 7], cache_key="k")
    prompt = [*span(0, 60), 9]
    for name in ("s1", "s2"):
        source = lease_for(memory, prompt, 70, session_id=name).source
        assert source is not None and source.session_id == name
    source = lease_for(memory, prompt, 70, cache_key="k").source
    assert source is not None and source.cache_key == "k"


def test_unused_sessions_expire_and_pinned_ones_only_by_their_own_time() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY, session_ttl_s=100.0)
    for i, name in enumerate(("short", "pinned", "both", "plain")):
        converse(memory, span(1000 * i, 30), 0.0, session_id=name)
    memory.answer(UpdateSession("", "short", ttl_s=10.0), 0.0)
    memory.answer(UpdateSession("", "pinned", is_pinned=True), 0.0)
    memory.answer(UpdateSession("", "both", is_pinned=True, ttl_s=50.0), 0.0)
    left = [sorted(s.session_id for s in page(memory, 9, None, t).sessions) for t in (9.0, 11.0, 51.0, 101.0)]
    assert left == [["both", "pinned", "plain", "short"], ["both", "pinned", "plain"], ["pinned", "plain"], ["pinned"]]
    assert memory.events().evictions["expired"] == 3
    with pytest.raises(SessionNotFoundError):
        memory.answer(GetSession("", "plain"), 102.0)


def test_a_time_of_zero_takes_the_limit_away() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    converse(memory, span(0, 30), 0.0, session_id="s")
    assert info(memory, UpdateSession("", "s", ttl_s=5.0), 0.0).ttl_s == 5.0
    assert info(memory, UpdateSession("", "s", ttl_s=0.0), 0.0).ttl_s is None


def test_beyond_the_number_of_sessions_the_oldest_unpinned_one_goes() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY, max_sessions_per_caller=2)
    for i in range(3):
        converse(memory, span(1000 * i, 30), float(i), session_id=f"s{i}")
    converse(memory, span(9000, 30), 3.0, salt="other", session_id="s9")
    assert held(memory) == [1000, 2000, 9000] and memory.events().evictions["quota"] == 1
    for name in ("s1", "s2"):
        memory.answer(UpdateSession("", name, is_pinned=True), 3.0)
    with pytest.raises(QuotaExceededError) as caught:
        lease_for(memory, span(0, 30), 40, session_id="s0")
    assert caught.value.param == "max_sessions_per_caller" and caught.value.status == 429
    with pytest.raises(QuotaExceededError):
        memory.answer(ForkSession("", "s1", None), 4.0)
    assert lease_for(memory, span(1000, 40), 50, session_id="s1").cached_len == 30


def test_beyond_the_bytes_of_a_caller_their_own_oldest_go() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY, max_session_bytes_per_caller=100 * RAW)
    converse(memory, span(9000, 90), 0.0, salt="other")
    for i in range(4):
        converse(memory, span(1000 * i, 40), float(i))
    assert held(memory) == [2000, 3000, 9000]
    with pytest.raises(QuotaExceededError) as caught:
        lease_for(memory, span(0, 30), 101)
    assert caught.value.param == "max_session_bytes_per_caller" and "1,000" in caught.value.message


def test_pins_may_not_take_what_requests_need() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    converse(memory, span(0, 40), session_id="a")
    converse(memory, span(1000, 30), session_id="b")
    memory.answer(UpdateSession("", "a", is_pinned=True), 0.0)
    with pytest.raises(QuotaExceededError) as caught:
        memory.answer(UpdateSession("", "b", is_pinned=True), 0.0)
    assert caught.value.param == "kv_budget"
    assert not info(memory, GetSession("", "b")).is_pinned


def pin(memory: Memory, salt: str, session_id: str) -> None:
    memory.answer(UpdateSession(salt, session_id, is_pinned=True), 0.0)


def pinned_bytes(memory: Memory) -> int:
    return sum(c.kv_bytes for c in memory.idle if c.session.is_pinned)


def test_no_caller_can_pin_what_others_may_still_want_to() -> None:
    """Half of what the others' pins leave, and all together half of the budget."""
    memory = memory_for(FakeFamily("f16"), 1000 * RAW)
    for salt in ("a", "b", "c"):
        for i in range(20):
            converse(memory, span(1000 * i, 16), salt=salt, session_id=f"{i}")
    held = {}
    for salt in ("a", "b", "c"):
        with pytest.raises(QuotaExceededError, match="one caller") as caught:
            for i in range(20):
                pin(memory, salt, f"{i}")
        assert caught.value.param == "kv_budget" and "\n" not in caught.value.message
        held[salt] = sum(c.kv_bytes for c in memory.idle.of(salt) if c.session.is_pinned) // RAW
    assert held == {"a": 240, "b": 128, "c": 64}  # of 500: at most 250, then 130, then 66
    assert pinned_bytes(memory) <= 500 * RAW
    converse(memory, span(0, 17), 1.0, "a", session_id="0")  # it goes on, as before the others came
    memory.answer(UpdateSession("a", "0", is_pinned=False), 1.0)
    with pytest.raises(QuotaExceededError):
        pin(memory, "a", "0")


def test_whoever_is_alone_may_pin_half_of_the_budget() -> None:
    for salt, has_one_caller in (("", False), ("key", True)):
        memory = memory_for(FakeFamily("f16"), 100 * RAW, has_one_caller=has_one_caller)
        for name in ("s", "t"):
            converse(memory, span(ord(name), 25), salt=salt, session_id=name)
            pin(memory, salt, name)
        assert pinned_bytes(memory) == 50 * RAW


def test_a_pinned_session_does_not_grow_past_what_may_be_pinned() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    converse(memory, span(0, 20), session_id="s")
    pin(memory, "", "s")
    with pytest.raises(QuotaExceededError, match="pinned") as caught:
        lease_for(memory, span(0, 40), 51, session_id="s")
    assert caught.value.param == "kv_budget"
    assert info(memory, GetSession("", "s")).is_pinned
    lease = lease_for(memory, span(0, 40), 50, session_id="s")
    memory.drop(lease, lease.caches)
    memory.answer(UpdateSession("", "s", is_pinned=False), 0.0)
    converse(memory, span(0, 60), session_id="s")


def test_a_pin_of_a_session_at_work_counts_what_is_reserved_for_it() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    lease = lease_for(memory, span(0, 20), 60, session_id="s")
    with pytest.raises(QuotaExceededError):
        pin(memory, "", "s")
    memory.drop(lease, lease.caches)
    lease = lease_for(memory, span(0, 20), 40, session_id="s")
    pin(memory, "", "s")
    converse(memory, span(500, 15), session_id="t")
    with pytest.raises(QuotaExceededError):
        pin(memory, "", "t")
    finish(memory, lease, span(0, 30))
    pin(memory, "", "t")


def test_pins_on_disk_count_for_they_come_back() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW, FakeDisk())
    for i in range(3):
        converse(memory, span(1000 * i, 20), session_id=f"{i}")
    pin(memory, "", "0")
    pin(memory, "", "1")
    memory.drop_idle()
    with pytest.raises(QuotaExceededError):
        pin(memory, "", "2")
    converse(memory, span(0, 25), 1.0, session_id="0")  # within the limit still
    assert {c.conversation_id for c in memory.idle if c.session.is_pinned} == {"0", "1"}


def test_an_answer_that_outgrows_its_pin_loses_it() -> None:
    """Its length was not known when it began; what is pinned stays within the limit."""
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    converse(memory, span(0, 20), session_id="s")
    pin(memory, "", "s")
    lease = lease_for(memory, span(0, 30), 40, session_id="s")
    assert try_extend(memory, lease, 80, 0.0)
    finish(memory, lease, span(0, 75))
    assert not info(memory, GetSession("", "s")).is_pinned and pinned_bytes(memory) == 0


def test_forks_share_every_page_and_live_apart() -> None:
    family = FakeFamily()
    memory = memory_for(family, ROOMY)
    converse(memory, span(0, 100), session_id="s")
    before = memory.committed_bytes
    fork = info(memory, ForkSession("", "s", "t"), 1.0)
    assert fork.tokens == 100 and memory.committed_bytes == before + fork.kv.exact
    with pytest.raises(SessionExistsError) as caught:
        memory.answer(ForkSession("", "s", "t"), 1.0)
    assert caught.value.param == "id", "the body's field"
    with pytest.raises(SessionNotFoundError):
        memory.answer(ForkSession("", "nobody", None), 1.0)
    finish(memory, lease_for(memory, span(0, 120), 130, session_id="t"), span(0, 125))
    assert {c.conversation_id: len(c.tokens) for c in memory.idle} == {"s": 100, "t": 125}
    memory.answer(DeleteSession("", "s"), 0.0)
    memory.check_integrity()
    assert family.runtime("4/4").pool.references  # the fork's


def test_a_session_at_work_is_shown_running_and_cannot_be_deleted() -> None:
    memory = memory_for(FakeFamily(), ROOMY)
    lease = lease_for(memory, span(0, 50), 60, session_id="s")
    with pytest.raises(SessionBusyError):
        memory.answer(ForkSession("", "s", None), 0.0)  # nothing is computed
    lease.caches[0].grow(span(0, 30))
    shown = info(memory, GetSession("", "s"))
    assert shown.tier == "running" and shown.tokens == 30
    with pytest.raises(SessionBusyError):
        memory.answer(DeleteSession("", "s"), 0.0)
    assert info(memory, ForkSession("", "s", "t"), 0.0).tokens == 30
    memory.check_integrity([lease.caches])


def test_pages_of_a_list_follow_each_other_without_gaps() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY)
    for i in range(7):
        converse(memory, span(1000 * i, 30), float(i), session_id=f"s{i}")
    seen: list[str] = []
    after, has_more = None, True
    while has_more:
        found = page(memory, 3, after, 9.0)
        seen += [s.session_id for s in found.sessions]
        after, has_more = seen[-1], found.has_more
    assert seen == [f"s{i}" for i in reversed(range(7))]
    with pytest.raises(SessionNotFoundError):
        page(memory, 3, "gone", 9.0)


def test_after_a_restart_the_later_of_two_files_of_one_session_counts() -> None:
    disk = FakeDisk()
    memory = memory_for(FakeFamily(), ROOMY, disk)
    kept = converse(memory, span(0, 100), 1.0, session_id="s")
    assert kept is not None and kept.disk_key is not None
    (old,) = disk.files.items()
    converse(memory, span(0, 150), 2.0, session_id="s")
    disk.files["another"] = old[1]  # of a server that wrote every turn under a name of its own, and was killed
    again = memory_for(FakeFamily(), ROOMY, disk)
    assert [len(c.tokens) for c in again.idle] == [150] and len(disk.files) == 1
    assert lease_for(again, span(0, 160), 170, 3.0, session_id="s").cached_len == 150


def test_a_pin_is_written_to_the_file_that_is_there_already() -> None:
    disk = FakeDisk()
    memory = memory_for(FakeFamily(), ROOMY, disk)
    converse(memory, span(0, 100), 1.0, session_id="s")
    memory.drop_idle()
    memory.answer(UpdateSession("", "s", is_pinned=True, ttl_s=7.0), 2.0)
    again = memory_for(FakeFamily(), ROOMY, disk)
    (session,) = [c.session for c in again.idle]
    assert session.is_pinned and session.ttl_s == 7.0 and len(disk.files) == 1


@pytest.mark.parametrize("tokens", [span(0, 100), span(0, 150), span(0, 60)], ids=["same", "longer", "another"])
def test_what_could_not_be_written_leaves_the_session_as_its_file_has_it(tokens: list[int]) -> None:
    disk = FakeDisk()
    memory = memory_for(FakeFamily(), ROOMY, disk)
    converse(memory, span(0, 100), 1.0, session_id="s", kv_format="8/4")
    before = dict(disk.files)
    disk.is_failing = True
    tokens = [*tokens[:-1], 7] if len(tokens) < 100 else tokens
    converse(memory, tokens, 2.0, session_id="s", kv_format="4/4")
    assert info(memory, GetSession("", "s")).kv_format == "4/4" and disk.files == before
    memory.drop_idle()
    disk.is_failing = False
    lease = lease_for(memory, [*tokens, 9], 200, 3.0, session_id="s", kv_format="4/4")
    assert lease.cached_len == 0, "the file is of other caches"
    memory.drop(lease, lease.caches)
    shown = info(memory, GetSession("", "s"))
    assert (shown.kv_format, shown.tokens, shown.tier) == ("8/4", 100, "disk")
    lease = lease_for(memory, [*span(0, 100), 9], 200, 4.0, session_id="s", kv_format="8/4")
    assert lease.cached_len == 100
    memory.drop(lease, lease.caches)
    memory.check_integrity()


def test_a_fork_that_is_refused_costs_no_session() -> None:
    memory = memory_for(FakeFamily("f16"), ROOMY, max_sessions_per_caller=2)
    converse(memory, span(0, 40), 0.0, session_id="old")
    converse(memory, span(1000, 40), 1.0, session_id="new")
    memory.answer(UpdateSession("", "new", is_pinned=True), 2.0)
    lease = lease_for(memory, span(5000, 10), 20, salt="other")
    memory.budget_bytes = memory.committed_bytes - 1
    before = {c.conversation_id for c in memory.idle}
    with pytest.raises(OverloadedError):
        memory.answer(ForkSession("", "new", "fork"), 3.0)
    assert {c.conversation_id for c in memory.idle} == before
    memory.budget_bytes = ROOMY
    assert info(memory, ForkSession("", "new", "fork"), 3.0).session_id == "fork"
    assert {c.conversation_id for c in memory.idle} == {"new", "fork"}, "beyond two, the oldest went"
    memory.check_integrity([lease.caches])


def test_a_fork_of_an_unreadable_file_says_that_the_session_is_gone() -> None:
    disk = FakeDisk()
    memory = memory_for(FakeFamily(), ROOMY, disk)
    converse(memory, span(0, 100), 0.0, session_id="s")
    memory.write_all()
    memory.drop_idle()
    disk.damaged.update(disk.files)
    with pytest.raises(SessionNotFoundError):
        memory.answer(ForkSession("", "s", "t"), 0.5)
    assert memory.events().refusals["no_room"] == 0


def test_a_preempted_request_is_counted_once() -> None:
    memory = memory_for(FakeFamily(), ROOMY)
    converse(memory, span(0, 100), 0.0, session_id="s")
    lease = lease_for(memory, span(0, 120), 130, 1.0, session_id="s")
    lease.caches[0].grow(span(lease.cached_len, 120 - lease.cached_len))
    before, hits = memory.events(), lease.session.hits
    memory.keep(lease, span(0, 120), lease.caches, 2.0, has_ended=False)
    again = FakeEngine(memory).obtain(ask_for(span(0, 120), 130, order=lease.order, session_id="s"), 3.0)
    assert isinstance(again, Lease) and again.cached_len > 0
    after = memory.events()
    assert (after.prefix_lookups, after.prefix_hit_tokens) == (before.prefix_lookups, before.prefix_hit_tokens)
    assert again.session.hits == hits


def test_what_has_a_file_already_is_not_counted_as_written_again() -> None:
    memory = memory_for(FakeFamily(), ROOMY, FakeDisk())
    converse(memory, span(0, 100), 0.0, session_id="s")
    written = memory.events().spills["idle"]
    assert written == 1
    memory.write_all()
    assert memory.events().spills["idle"] == written
