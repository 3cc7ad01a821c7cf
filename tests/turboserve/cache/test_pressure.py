"""What gives way under pressure, in which order, and what each step leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.turboserve.cache.fakes import (
    PAGE,
    RAW,
    FakeDisk,
    FakeEngine,
    FakeFamily,
    converse,
    evict,
    finish,
    lease_for,
    memory_for,
    span,
    try_extend,
    try_lease,
)

from turboserve.cache.interfaces import HeldPages
from turboserve.cache.memory import Memory
from turboserve.cache.pressure import Release
from turboserve.cache.sessions import Lease
from turboserve.cache.sizes import peak_bytes, shared_pages
from turboserve.errors import OverloadedError
from turboserve.messages import ForkSession, UpdateSession

# Conversations of 6 pages and one exact token: in 4/4 394 bytes, in 4t/3t 298.
LENGTH = 6 * PAGE + 1
BYTES = 6 * PAGE * 4 + RAW


def filled(num: int, *, spare: int = 0, disk: FakeDisk | None = None, **options: Any) -> Memory:
    """A budget of `num` conversations and `spare` bytes, all of it used: even ones nameless, odd ones named."""
    memory = memory_for(FakeFamily(), 10_000, disk, **options)
    for i in range(num):
        converse(memory, span(1000 * i, LENGTH), float(i), session_id=f"s{i}" if i % 2 else None)
    assert memory.committed_bytes == num * BYTES
    memory.budget_bytes = num * BYTES + spare
    return memory


def starts(memory: Memory) -> list[int]:
    return sorted(int(c.tokens[0]) // 1000 for c in memory.idle if c.caches is not None)


def tiers(memory: Memory) -> dict[int, str]:
    return {int(c.tokens[0]) // 1000: "disk" if c.caches is None else c.kv_format for c in memory.idle}


def need(memory: Memory, num_bytes: int, now_s: float = 100.0) -> Lease | None:
    """A lease that reserves that many bytes, or a few more."""
    runtime = memory.family.runtime("4/4")
    num_tokens = next(n for n in range(6, 9999) if peak_bytes(runtime, n) >= num_bytes)
    return try_lease(memory, span(90_000, 5), num_tokens, now_s)


def pages_of_all(memory: Memory) -> Iterator[HeldPages | None]:
    return (memory.family.held_pages(c.caches) for c in memory.idle if c.caches is not None)


def give_up_all(memory: Memory, release: Release) -> list[int]:
    """What each conversation frees, one after another."""
    freed = [release.add(c.kv.exact, pages) for c, pages in zip(memory.idle, pages_of_all(memory), strict=True)]
    assert release.freed_bytes == sum(freed)
    return freed


def test_a_shared_page_is_freed_by_its_last_holder_only() -> None:
    memory = memory_for(FakeFamily(), 10_000)
    converse(memory, span(0, LENGTH), session_id="s")
    memory.answer(ForkSession("", "s", "t"), 1.0)
    assert give_up_all(memory, Release()) == [RAW, BYTES]
    shared = shared_pages(memory.family.runtime("4/4"), next(pages_of_all(memory)), LENGTH)
    assert give_up_all(memory, Release(shared)) == [RAW, RAW], "as if a third one held them"
    lease = lease_for(memory, span(0, LENGTH + 9), LENGTH + 10)  # now a third one holds them
    assert give_up_all(memory, Release()) == [RAW, RAW]
    memory.budget_bytes = memory.committed_bytes
    assert need(memory, BYTES, 2.0) is None
    assert len(list(memory.idle)) == 2, "nothing was given up for nothing"
    memory.drop(lease, lease.caches)


def test_nameless_conversations_go_first_the_oldest_of_them_first() -> None:
    memory = filled(8)
    assert need(memory, 2 * RAW) is not None
    assert starts(memory) == [1, 2, 3, 4, 5, 6, 7]
    assert memory.events().evictions["pressure"] == 1 and not memory.events().requantisations


def test_then_named_ones_are_requantised_only_if_the_operator_allows() -> None:
    for is_allowed in (True, False):
        memory = filled(4, spare=BYTES, allow_requantise=is_allowed)
        lease = need(memory, 3 * BYTES - 20)  # the nameless ones and what is spare give that
        assert lease is not None and starts(memory) == [1, 3] and not memory.events().requantisations
        more = try_lease(memory, span(91_000, 5), 20, 101.0)
        if is_allowed:
            assert more is not None
            assert memory.events().requantisations == {"4/4>4t/3t": 2} and starts(memory) == [1, 3]
        else:
            assert more is not None and len(starts(memory)) == 1


def test_a_requantised_session_goes_on_in_its_lower_format_unless_asked_otherwise() -> None:
    memory = filled(2, allow_requantise=True)
    evict(memory, next(c for c in memory.idle if not c.session.is_explicit))
    memory.budget_bytes = 2 * BYTES
    assert need(memory, BYTES + 1) is not None and tiers(memory) == {1: "4t/3t"}
    memory.budget_bytes = 10_000
    lease = lease_for(memory, span(1000, LENGTH + 9), 120, session_id="s1")
    assert (lease.kv_format, lease.cached_len) == ("4t/3t", LENGTH)
    strict = lease_for(memory, span(1000, LENGTH + 9), 120, session_id="s1", kv_format="4/4")
    assert (strict.kv_format, strict.cached_len) == ("4/4", 0)
    memory.check_integrity([lease.caches, strict.caches])


def test_then_named_ones_go_to_disk_and_come_back_whole() -> None:
    disk = FakeDisk()
    memory = filled(4, disk=disk)
    lease = need(memory, 3 * BYTES - 20)
    assert lease is not None and len(memory.leases) == 1
    assert tiers(memory) == {1: "disk", 3: "4/4"} and memory.events().spills["pressure"] == 1
    memory.drop(lease, lease.caches)
    back = lease_for(memory, span(1000, LENGTH + 5), LENGTH + 9, 101.0)
    assert back.cached_len == LENGTH and memory.events().restores["request"] == 1
    memory.check_integrity([back.caches])


def test_without_a_disk_named_ones_are_forgotten_and_pinned_ones_never() -> None:
    memory = filled(4)
    memory.answer(UpdateSession("", "s1", is_pinned=True), 50.0)
    assert need(memory, 3 * BYTES - 20) is not None
    assert starts(memory) == [1]


def test_a_full_disk_is_as_none() -> None:
    disk = FakeDisk()
    disk.is_full = True
    memory = filled(4, disk=disk)
    assert need(memory, 3 * BYTES - 20) is not None
    assert starts(memory) == [3] and not memory.events().spills


def test_what_pins_leave_no_room_for_is_refused_with_the_numbers() -> None:
    memory = filled(4)
    for name in ("s1", "s3"):
        memory.answer(UpdateSession("", name, is_pinned=True), 50.0)
    with pytest.raises(OverloadedError) as caught:
        need(memory, 3 * BYTES)
    assert caught.value.status == 503 and caught.value.retry_after_s
    assert f"{memory.budget_bytes:,}" in caught.value.message and " 1,184 bytes" in caught.value.message
    assert memory.events().refusals["no_room"] == 1
    assert starts(memory) == [0, 1, 2, 3], "nothing was given up for nothing"


def test_the_newest_stay_while_others_run_and_go_when_nobody_does() -> None:
    memory = memory_for(FakeFamily(), 16 * BYTES)
    other = need(memory, 12 * BYTES)
    assert other is not None
    converse(memory, span(0, LENGTH), 1.0)
    converse(memory, span(1000, LENGTH), 2.0)
    assert need(memory, 4 * BYTES, 3.0) is None  # both are within the shield, and the other lease will end
    assert starts(memory) == [0, 1]
    memory.drop(other, other.caches)
    assert need(memory, 15 * BYTES, 4.0) is not None
    assert starts(memory) == [1]


def test_growth_preempts_the_youngest_and_never_an_older_one() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    leases = [lease_for(memory, span(1000 * i, 10), 30) for i in range(3)]
    engine = FakeEngine(memory)
    assert try_extend(memory, leases[1], 50, 5.0, engine) and engine.preempted == [leases[2]]
    assert not try_extend(memory, leases[1], 80, 5.0, engine) and engine.preempted == [leases[2]]
    assert try_extend(memory, leases[0], 70, 5.0, engine) and engine.preempted == [leases[2], leases[1]]
    assert memory.events().preemptions["growth"] == 2 and memory.admission().num_requests == 0


def test_preempted_work_is_found_again() -> None:
    memory = memory_for(FakeFamily("f16"), 200 * RAW)
    lease = lease_for(memory, span(0, 40), 60)
    lease.caches[0].grow(span(0, 50))
    memory.keep(lease, span(0, 50), lease.caches, 1.0, has_ended=False)
    again = lease_for(memory, span(0, 51), 60, order=lease.order)
    assert again.cached_len == 50 and again.order == lease.order and again.session is lease.session
    finish(memory, again, span(0, 55))
    assert again.session.num_requests == 1


def test_a_damaged_file_is_computed_again_and_counted() -> None:
    disk = FakeDisk()
    memory = filled(2, disk=disk)
    memory.budget_bytes = 10_000
    memory.write_all()
    memory.drop_idle()
    assert set(tiers(memory).values()) == {"disk"}
    disk.damaged = set(disk.files)
    assert lease_for(memory, span(0, LENGTH + 9), 120).cached_len == 0
    assert memory.events().restores["failed"] == 1 and tiers(memory) == {1: "disk"}
