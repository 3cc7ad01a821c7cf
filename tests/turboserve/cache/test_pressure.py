"""The ladder's steps, in their order, and what each leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from tests.turboserve.cache.fakes import (
    PAGE,
    RAW,
    FakeDisk,
    FakeFamily,
    converse,
    finish,
    lease_for,
    manager_for,
    span,
    try_lease,
)

from turboserve.cache.desk import SessionDesk
from turboserve.cache.holders import Lease
from turboserve.cache.ledger import Release
from turboserve.cache.manager import CacheManager
from turboserve.cache.runtime import peak_bytes
from turboserve.errors import OverloadedError

# Conversations of 6 pages and one exact token: in 4/4 394 bytes, in 4/3 298.
LENGTH = 6 * PAGE + 1
BYTES = 6 * PAGE * 4 + RAW


def filled(num: int, *, spare: int = 0, disk: FakeDisk | None = None, **options: Any) -> CacheManager:
    """A budget of `num` conversations and `spare` bytes, all of it used: even ones nameless, odd ones named."""
    manager = manager_for(FakeFamily(), 10_000, disk, **options)
    for i in range(num):
        converse(manager, span(1000 * i, LENGTH), float(i), session_id=f"s{i}" if i % 2 else None)
    assert manager.committed_bytes == num * BYTES
    manager.budget_bytes = num * BYTES + spare
    return manager


def starts(manager: CacheManager) -> list[int]:
    return sorted(int(c.tokens[0]) // 1000 for c in manager.store if c.caches is not None)


def tiers(manager: CacheManager) -> dict[int, str]:
    return {int(c.tokens[0]) // 1000: "disk" if c.caches is None else c.kv_format for c in manager.store}


def need(manager: CacheManager, num_bytes: int, now_s: float = 100.0) -> Lease | None:
    """A lease that reserves that many bytes, or a few more."""
    runtime = manager.family.runtime("4/4")
    num_tokens = next(n for n in range(6, 9999) if peak_bytes(runtime, n) >= num_bytes)
    return try_lease(manager, span(90_000, 5), num_tokens, now_s)


def test_a_shared_page_is_freed_by_its_last_holder_only() -> None:
    manager = manager_for(FakeFamily(), 10_000)
    converse(manager, span(0, LENGTH), session_id="s")
    SessionDesk(manager).fork("", "s", "t", 1.0)
    release = Release(manager.family)
    assert [release.add(c) for c in manager.store] == [RAW, BYTES] and release.freed_bytes == BYTES + RAW
    lease = lease_for(manager, span(0, LENGTH + 9), LENGTH + 10)  # now a third one holds them
    assert sum(Release(manager.family).add(c) for c in manager.store) == 2 * RAW
    manager.budget_bytes = manager.committed_bytes
    assert need(manager, BYTES, 2.0) is None
    assert len(list(manager.store)) == 2, "nothing was given up for nothing"
    manager.drop(lease, lease.caches)


def test_nameless_conversations_go_first_the_oldest_of_them_first() -> None:
    manager = filled(8)
    assert need(manager, 2 * RAW) is not None
    assert starts(manager) == [1, 2, 3, 4, 5, 6, 7]
    assert manager.counts.evictions["pressure"] == 1 and not manager.counts.requantisations


def test_then_named_ones_are_requantised_only_if_the_operator_allows() -> None:
    for is_allowed in (True, False):
        manager = filled(4, spare=BYTES, allow_requantise=is_allowed)
        lease = need(manager, 3 * BYTES - 20)  # the nameless ones and what is spare give that
        assert lease is not None and starts(manager) == [1, 3] and not manager.counts.requantisations
        more = try_lease(manager, span(91_000, 5), 20, 101.0)
        if is_allowed:
            assert more is not None
            assert manager.counts.requantisations == {"4/4>4/3": 2} and starts(manager) == [1, 3]
        else:
            assert more is not None and len(starts(manager)) == 1


def test_a_requantised_session_goes_on_in_its_lower_format_unless_asked_otherwise() -> None:
    manager = filled(2, allow_requantise=True)
    manager.evict(next(c for c in manager.store if not c.session.is_explicit), "pressure")
    manager.budget_bytes = 2 * BYTES
    assert need(manager, BYTES + 1) is not None and tiers(manager) == {1: "4/3"}
    manager.budget_bytes = 10_000
    lease = lease_for(manager, span(1000, LENGTH + 9), 120, session_id="s1")
    assert (lease.kv_format, lease.cached_len) == ("4/3", LENGTH)
    strict = lease_for(manager, span(1000, LENGTH + 9), 120, session_id="s1", kv_format="4/4")
    assert (strict.kv_format, strict.cached_len) == ("4/4", 0)
    manager.check_integrity([lease.caches, strict.caches])


def test_then_named_ones_go_to_disk_and_come_back_whole() -> None:
    disk = FakeDisk()
    manager = filled(4, disk=disk)
    lease = need(manager, 3 * BYTES - 20)
    assert lease is not None and len(manager.leases) == 1
    assert tiers(manager) == {1: "disk", 3: "4/4"} and manager.counts.spills["pressure"] == 1
    manager.drop(lease, lease.caches)
    back = lease_for(manager, span(1000, LENGTH + 5), LENGTH + 9, 101.0)
    assert back.cached_len == LENGTH and manager.counts.restores["request"] == 1
    manager.check_integrity([back.caches])


def test_without_a_disk_named_ones_are_forgotten_and_pinned_ones_never() -> None:
    manager = filled(4)
    SessionDesk(manager).update("", "s1", 50.0, is_pinned=True, ttl_s=None)
    assert need(manager, 3 * BYTES - 20) is not None
    assert starts(manager) == [1]


def test_a_full_disk_is_as_none() -> None:
    disk = FakeDisk()
    disk.is_full = True
    manager = filled(4, disk=disk)
    assert need(manager, 3 * BYTES - 20) is not None
    assert starts(manager) == [3] and not manager.counts.spills


def test_what_pins_leave_no_room_for_is_refused_with_the_numbers() -> None:
    manager = filled(4)
    desk = SessionDesk(manager)
    for name in ("s1", "s3"):
        desk.update("", name, 50.0, is_pinned=True, ttl_s=None)
    with pytest.raises(OverloadedError) as caught:
        need(manager, 3 * BYTES)
    assert caught.value.status == 503 and caught.value.retry_after_s
    assert f"{manager.budget_bytes:,}" in caught.value.message and " 1,184 bytes" in caught.value.message
    assert manager.counts.refusals["no_room"] == 1
    assert starts(manager) == [0, 1, 2, 3], "nothing was given up for nothing"


def test_the_newest_stay_while_others_run_and_go_when_nobody_does() -> None:
    manager = manager_for(FakeFamily(), 16 * BYTES)
    other = need(manager, 12 * BYTES)
    assert other is not None
    converse(manager, span(0, LENGTH), 1.0)
    converse(manager, span(1000, LENGTH), 2.0)
    assert need(manager, 4 * BYTES, 3.0) is None  # both are within the shield, and the other lease will end
    assert starts(manager) == [0, 1]
    manager.drop(other, other.caches)
    assert need(manager, 15 * BYTES, 4.0) is not None
    assert starts(manager) == [1]


def test_growth_preempts_the_youngest_and_never_an_older_one() -> None:
    manager = manager_for(FakeFamily("f16"), 100 * RAW)
    leases = [lease_for(manager, span(1000 * i, 10), 30) for i in range(3)]
    preempted: list[Lease] = []

    def preempt(lease: Lease) -> bool:
        preempted.append(lease)
        manager.keep(lease, lease.caches[0].tokens, lease.caches, 5.0, has_ended=False)
        return True

    manager.on_preempt(preempt)
    assert manager.try_extend(leases[1], 50, 5.0) and preempted == [leases[2]]
    assert not manager.try_extend(leases[1], 80, 5.0) and preempted == [leases[2]]
    assert manager.try_extend(leases[0], 70, 5.0) and preempted == [leases[2], leases[1]]
    assert manager.counts.preemptions["growth"] == 2 and manager.admission.num_requests == 0


def test_preempted_work_is_found_again() -> None:
    manager = manager_for(FakeFamily("f16"), 200 * RAW)
    lease = lease_for(manager, span(0, 40), 60)
    lease.caches[0].grow(span(0, 50))
    manager.keep(lease, span(0, 50), lease.caches, 1.0, has_ended=False)
    again = lease_for(manager, span(0, 51), 60, order=lease.order)
    assert again.cached_len == 50 and again.order == lease.order and again.session is lease.session
    finish(manager, again, span(0, 55))
    assert again.session.num_requests == 1


def test_a_damaged_file_is_computed_again_and_counted() -> None:
    disk = FakeDisk()
    manager = filled(2, disk=disk)
    manager.budget_bytes = 10_000
    for conversation in manager.store:
        manager.persistence.save(conversation, 0.0)
    manager.drop_idle()
    assert set(tiers(manager).values()) == {"disk"}
    disk.damaged = set(disk.files)
    assert lease_for(manager, span(0, LENGTH + 9), 120).cached_len == 0
    assert manager.counts.restores["failed"] == 1 and tiers(manager) == {1: "disk"}
