"""Sessions: names, times to live, pins, quotas and hints."""

from __future__ import annotations

import pytest
from tests.turboserve.cache.fakes import (
    RAW,
    FakeDisk,
    FakeFamily,
    converse,
    finish,
    held,
    lease_for,
    manager_for,
    span,
)

from turboserve.cache.desk import SessionDesk
from turboserve.errors import (
    QuotaExceededError,
    SessionBusyError,
    SessionExistsError,
    SessionNotFoundError,
)

ROOMY = 1_000_000


def test_a_named_session_follows_its_last_request() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    converse(manager, span(0, 60), session_id="s")
    converse(manager, [*span(0, 40), *span(500, 50)], session_id="s")
    (only,) = manager.store
    assert only.tokens.tolist() == [*span(0, 40), *span(500, 50)]
    assert only.session.is_explicit and only.session.num_requests == 2


def test_a_request_that_ends_early_does_not_shorten_its_session() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    converse(manager, span(0, 60), session_id="s")
    lease = lease_for(manager, span(0, 50), 70, session_id="s")
    finish(manager, lease, span(0, 49))
    assert [len(c.tokens) for c in manager.store] == [60]


def test_a_nameless_request_never_takes_over_a_named_session() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    converse(manager, span(0, 60), session_id="s")
    lease = lease_for(manager, span(0, 80), 100)
    assert lease.cached_len == 60 and not lease.session.is_explicit
    finish(manager, lease, span(0, 90))
    assert sorted(len(c.tokens) for c in manager.store) == [60, 90]


def test_a_nameless_conversation_asked_for_by_its_id_becomes_a_named_one() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    kept = converse(manager, span(0, 60))
    assert kept is not None and not kept.session.is_explicit
    converse(manager, [*span(0, 40), *span(500, 50)], session_id=kept.conversation_id)
    (only,) = manager.store
    assert only.session is kept.session and only.session.is_explicit and len(only.tokens) == 90


def test_among_equals_the_callers_own_choice_is_continued() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    for name in ("s1", "s2"):
        converse(manager, [*span(0, 60), ord(name[1])], session_id=name)
    converse(manager, [*span(0, 60), 7], cache_key="k")
    prompt = [*span(0, 60), 9]
    for name in ("s1", "s2"):
        source = lease_for(manager, prompt, 70, session_id=name).source
        assert source is not None and source.session_id == name
    source = lease_for(manager, prompt, 70, cache_key="k").source
    assert source is not None and source.cache_key == "k"


def test_unused_sessions_expire_and_pinned_ones_only_by_their_own_time() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY, session_ttl_s=100.0)
    desk = SessionDesk(manager)
    for i, name in enumerate(("short", "pinned", "both", "plain")):
        converse(manager, span(1000 * i, 30), 0.0, session_id=name)
    desk.update("", "short", 0.0, is_pinned=None, ttl_s=10.0)
    desk.update("", "pinned", 0.0, is_pinned=True, ttl_s=None)
    desk.update("", "both", 0.0, is_pinned=True, ttl_s=50.0)
    left = [sorted(v.session.session_id for v in desk.list_page("", 9, None, t)[0]) for t in (9.0, 11.0, 51.0, 101.0)]
    assert left == [["both", "pinned", "plain", "short"], ["both", "pinned", "plain"], ["pinned", "plain"], ["pinned"]]
    assert manager.counts.evictions["expired"] == 3
    with pytest.raises(SessionNotFoundError):
        desk.get("", "plain", 102.0)


def test_a_time_of_zero_takes_the_limit_away() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    desk = SessionDesk(manager)
    converse(manager, span(0, 30), 0.0, session_id="s")
    assert desk.update("", "s", 0.0, is_pinned=None, ttl_s=5.0).session.ttl_s == 5.0
    assert desk.update("", "s", 0.0, is_pinned=None, ttl_s=0.0).session.ttl_s is None


def test_beyond_the_number_of_sessions_the_oldest_unpinned_one_goes() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY, max_sessions_per_caller=2)
    desk = SessionDesk(manager)
    for i in range(3):
        converse(manager, span(1000 * i, 30), float(i), session_id=f"s{i}")
    converse(manager, span(9000, 30), 3.0, salt="other", session_id="s9")
    assert held(manager) == [1000, 2000, 9000] and manager.counts.evictions["quota"] == 1
    for name in ("s1", "s2"):
        desk.update("", name, 3.0, is_pinned=True, ttl_s=None)
    with pytest.raises(QuotaExceededError) as caught:
        lease_for(manager, span(0, 30), 40, session_id="s0")
    assert caught.value.param == "max_sessions_per_caller" and caught.value.status == 429
    with pytest.raises(QuotaExceededError):
        desk.fork("", "s1", None, 4.0)
    assert lease_for(manager, span(1000, 40), 50, session_id="s1").cached_len == 30


def test_beyond_the_bytes_of_a_caller_their_own_oldest_go() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY, max_session_bytes_per_caller=100 * RAW)
    converse(manager, span(9000, 90), 0.0, salt="other")
    for i in range(4):
        converse(manager, span(1000 * i, 40), float(i))
    assert held(manager) == [2000, 3000, 9000]
    with pytest.raises(QuotaExceededError) as caught:
        lease_for(manager, span(0, 30), 101)
    assert caught.value.param == "max_session_bytes_per_caller" and "1,000" in caught.value.message


def test_pins_may_not_take_what_requests_need() -> None:
    manager = manager_for(FakeFamily("f16"), 100 * RAW)
    desk = SessionDesk(manager)
    converse(manager, span(0, 40), session_id="a")
    converse(manager, span(1000, 30), session_id="b")
    desk.update("", "a", 0.0, is_pinned=True, ttl_s=None)
    with pytest.raises(QuotaExceededError) as caught:
        desk.update("", "b", 0.0, is_pinned=True, ttl_s=None)
    assert caught.value.param == "kv_budget"
    assert not desk.get("", "b", 0.0).session.is_pinned


def test_forks_share_every_page_and_live_apart() -> None:
    family = FakeFamily()
    manager = manager_for(family, ROOMY)
    desk = SessionDesk(manager)
    converse(manager, span(0, 100), session_id="s")
    before = manager.committed_bytes
    view = desk.fork("", "s", "t", 1.0)
    assert view.num_tokens == 100 and manager.committed_bytes == before + view.kv.exact
    with pytest.raises(SessionExistsError):
        desk.fork("", "s", "t", 1.0)
    with pytest.raises(SessionNotFoundError):
        desk.fork("", "nobody", None, 1.0)
    finish(manager, lease_for(manager, span(0, 120), 130, session_id="t"), span(0, 125))
    assert {c.conversation_id: len(c.tokens) for c in manager.store} == {"s": 100, "t": 125}
    desk.delete("", "s")
    manager.check_integrity()
    assert family.runtime("4/4").pool.references  # the fork's


def test_a_session_at_work_is_shown_running_and_cannot_be_deleted() -> None:
    manager = manager_for(FakeFamily(), ROOMY)
    desk = SessionDesk(manager)
    lease = lease_for(manager, span(0, 50), 60, session_id="s")
    with pytest.raises(SessionBusyError):
        desk.fork("", "s", None, 0.0)  # nothing is computed
    lease.caches[0].grow(span(0, 30))
    view = desk.get("", "s", 0.0)
    assert view.holder is lease and view.num_tokens == 30
    with pytest.raises(SessionBusyError):
        desk.delete("", "s")
    assert desk.fork("", "s", "t", 0.0).num_tokens == 30
    manager.check_integrity([lease.caches])


def test_pages_of_a_list_follow_each_other_without_gaps() -> None:
    manager = manager_for(FakeFamily("f16"), ROOMY)
    desk = SessionDesk(manager)
    for i in range(7):
        converse(manager, span(1000 * i, 30), float(i), session_id=f"s{i}")
    seen: list[str] = []
    after, has_more = None, True
    while has_more:
        views, has_more = desk.list_page("", 3, after, 9.0)
        seen += [v.session.session_id for v in views]
        after = seen[-1]
    assert seen == [f"s{i}" for i in reversed(range(7))]
    with pytest.raises(SessionNotFoundError):
        desk.list_page("", 3, "gone", 9.0)


def test_after_a_restart_the_later_of_two_files_of_one_session_counts() -> None:
    disk = FakeDisk()
    manager = manager_for(FakeFamily(), ROOMY, disk)
    kept = converse(manager, span(0, 100), 1.0, session_id="s")
    assert kept is not None and kept.disk_key is not None
    (old,) = disk.files.items()
    converse(manager, span(0, 150), 2.0, session_id="s")
    disk.files[old[0]] = old[1]  # killed before the old file was deleted
    again = manager_for(FakeFamily(), ROOMY, disk)
    assert [len(c.tokens) for c in again.store] == [150] and len(disk.files) == 1
    assert lease_for(again, span(0, 160), 170, 3.0, session_id="s").cached_len == 150


def test_a_pin_is_written_to_the_file_that_is_there_already() -> None:
    disk = FakeDisk()
    manager = manager_for(FakeFamily(), ROOMY, disk)
    converse(manager, span(0, 100), 1.0, session_id="s")
    manager.drop_idle()
    SessionDesk(manager).update("", "s", 2.0, is_pinned=True, ttl_s=7.0)
    again = manager_for(FakeFamily(), ROOMY, disk)
    (session,) = [c.session for c in again.store]
    assert session.is_pinned and session.ttl_s == 7.0 and len(disk.files) == 1
