"""Verdicts: they change nothing, hold or are asked again a bounded number of times, and never call the engine."""

from __future__ import annotations

from typing import Any

import pytest
from tests.turboserve.cache.fakes import (
    MAX_ROUNDS,
    PAGE,
    RAW,
    FakeDisk,
    FakeEngine,
    FakeFamily,
    FakeRunning,
    ask_for,
    converse,
    finish,
    lease_for,
    memory_for,
    span,
    try_extend,
    try_lease,
)

from turboserve.cache.memory import Growth, Lease, Memory, Question, Refuse, Restart, Start, Wait
from turboserve.cache.persistence import SPILL_RETRY_S
from turboserve.cache.sizes import peak_bytes
from turboserve.errors import ContextLengthError
from turboserve.messages import GetSession, SessionInfo, UpdateSession

LENGTH = 6 * PAGE + 1
BYTES = 6 * PAGE * 4 + RAW


def everything_of(memory: Memory) -> list[object]:
    """All that a verdict could have changed."""
    family: Any = memory.family
    idle = [(c.key, c.kv, c.tier, c.kv_format, c.disk_key, c.session.hits, c.session.last_used_s) for c in memory.idle]
    leases = [(x.order, x.reserved_bytes, x.held_len, id(x.caches)) for x in memory.leases]
    pages = {name: dict(runtime.pool.references) for name, runtime in family._runtimes.items()}
    return [memory.generation, memory.committed_bytes, idle, leases, pages, len(family.live), memory.events()]


def crowded(**limits: Any) -> tuple[Memory, list[Lease]]:
    """A full memory: two running requests with pages in common, an idle one of each kind, one on disk."""
    memory = memory_for(FakeFamily(), 10_000, FakeDisk(), **limits)
    converse(memory, span(9000, LENGTH), 0.0, session_id="stored")
    memory.drop_idle()
    for i, name in enumerate((None, "named", "pinned")):
        converse(memory, span(1000 * i, LENGTH), 1.0 + i, session_id=name)
    memory.answer(UpdateSession("", "pinned", is_pinned=True), 4.0)
    leases = [lease_for(memory, [*span(5000, 40), i], 60, 5.0 + i) for i in range(2)]
    leases[0].caches[0].grow(span(5000, 40))
    memory.budget_bytes = memory.committed_bytes
    return memory, leases


def test_a_verdict_changes_nothing() -> None:
    memory, leases = crowded()
    questions: list[Question] = [
        ask_for(span(90_000, 5), 60),
        ask_for(span(0, LENGTH + 5), LENGTH + 50),
        ask_for(span(9000, LENGTH + 5), LENGTH + 50, session_id="stored"),
        ask_for(span(90_000, 5), 90, order=-1),
        Growth(leases[0], 200),
        Restart(leases[1]),
    ]
    before = everything_of(memory)
    kinds = []
    for question in questions:
        kinds.append(memory.verdict(question, 10.0))
        assert everything_of(memory) == before, question
    assert all(isinstance(verdict, Start) for verdict in kinds)
    assert kinds == [memory.verdict(question, 10.0) for question in questions], "the same question, the same verdict"
    assert isinstance(memory.verdict(Growth(leases[1], 900), 10.0), Wait)
    assert everything_of(memory) == before


def test_a_refusal_is_counted_and_changes_nothing_else() -> None:
    memory, _ = crowded()
    before = everything_of(memory)
    verdict = memory.verdict(ask_for(span(0, 5), 100_000), 10.0)
    assert isinstance(verdict, Refuse) and isinstance(verdict.error, ContextLengthError)
    assert memory.events().refusals["never_fits"] == 1 and everything_of(memory)[:-1] == before[:-1]


def test_a_limit_on_sessions_evicts_only_when_the_request_starts() -> None:
    memory = memory_for(FakeFamily(), 10_000, max_sessions_per_caller=1)
    converse(memory, span(0, LENGTH), session_id="old")
    verdict = memory.verdict(ask_for(span(500, 9), 20, session_id="new"), 1.0)
    assert isinstance(verdict, Start) and len(list(memory.idle)) == 1
    assert memory.carry_out(verdict, 1.0) is not None
    assert list(memory.idle) == [] and memory.events().evictions == {"quota": 1}


def test_files_that_cannot_be_read_cost_one_round_each_and_no_more_than_a_step_has() -> None:
    memory = memory_for(FakeFamily(), 1_000_000, disk := FakeDisk())
    num_files = 2 * MAX_ROUNDS + 1
    for i in range(num_files):
        converse(memory, [*span(0, LENGTH), 7000 + i], float(i), session_id=f"s{i}")
    memory.drop_idle()
    disk.damaged = set(disk.files)
    engine, ask = FakeEngine(memory), ask_for([*span(0, LENGTH), 9], LENGTH + 9)
    for num_steps in range(1, 9):
        got = engine.obtain(ask, 100.0)
        assert engine.num_rounds <= num_steps * MAX_ROUNDS
        if not isinstance(got, Wait):
            break
        assert got.since is None, "asking again goes on where this stopped"
    assert isinstance(got, Lease) and got.cached_len == 0
    assert memory.events().restores["failed"] == num_files and engine.num_rounds == num_files + 1


def test_what_the_disk_refuses_is_done_without_it_and_not_offered_again_at_once() -> None:
    memory = memory_for(FakeFamily(), 10_000, disk := FakeDisk())
    disk.is_hesitant = True
    for i in range(3):
        converse(memory, span(1000 * i, LENGTH), float(i), session_id=f"s{i}")
    memory.budget_bytes, disk.num_asked = memory.committed_bytes, 0
    engine = FakeEngine(memory)
    lease = try_lease(memory, span(90_000, 5), 40, 100.0, engine=engine)
    assert lease is not None and engine.num_rounds == 2 and disk.num_asked == 1
    assert memory.events().evictions["pressure"] == 1, "its bytes were needed, and only forgetting gave them"
    memory.drop(lease, lease.caches)
    memory.budget_bytes = memory.committed_bytes
    assert try_lease(memory, span(90_000, 5), 9, 100.0 + SPILL_RETRY_S / 2) is not None and disk.num_asked == 1


def test_what_a_running_request_computed_meanwhile_is_found_by_the_same_kind_of_question() -> None:
    memory = memory_for(FakeFamily(), 10_000)
    first, second = lease_for(memory, span(0, 100), 110), lease_for(memory, [*span(0, 90), 7], 110)
    assert memory.verdict(Restart(second), 1.0) == Wait(None)
    first.caches[0].grow(span(0, 99))
    verdict = memory.verdict(Restart(second), 1.0)
    assert isinstance(verdict, Start) and verdict.match is not None and verdict.match.usable_len == 80
    memory.drop(first, first.caches)
    assert memory.carry_out(verdict, 1.0) is None, "it turned out differently"


def test_a_lease_keeps_the_format_that_its_caches_have_when_its_source_is_requantised() -> None:
    memory = memory_for(FakeFamily(), 10_000, allow_requantise=True)
    converse(memory, span(0, LENGTH), 0.0, session_id="s")
    promised = lease_for(memory, span(3000, 9), 200)  # nothing of it is computed: real memory for a conversion
    prompt = [*span(0, PAGE), 9]  # a page in common, five that only the source holds
    num_tokens = PAGE + 5
    memory.budget_bytes = memory.committed_bytes + peak(memory, num_tokens) - RAW
    got = FakeEngine(memory).obtain(ask_for(prompt, num_tokens), 1.0)
    assert isinstance(got, Lease) and got.cached_len == PAGE
    assert memory.events().requantisations == {"4/4>4t/3t": 1}
    assert got.kv_format == got.caches[0].runtime.name == "4/4"
    memory.attach(got, FakeRunning(got))
    memory.check_integrity([got.caches, promised.caches])


def test_nobody_is_preempted_in_vain() -> None:
    memory = memory_for(FakeFamily("f16"), 100 * RAW)
    oldest, _, youngest = (lease_for(memory, span(1000 * i, 10), 30) for i in range(3))
    converse(memory, span(5000, 9), 1.0)
    engine = FakeEngine(memory)
    assert not try_extend(memory, oldest, 101, 5.0, engine) and not try_extend(memory, youngest, 50, 5.0, engine)
    assert engine.preempted == [] and len(memory.leases) == 3 and len(list(memory.idle)) == 1


def test_pages_that_stay_with_an_older_request_are_not_counted_as_freed_by_preempting_a_younger_one() -> None:
    memory = memory_for(FakeFamily(), 100_000)
    oldest = lease_for(memory, span(0, LENGTH), LENGTH + 5)
    oldest.caches[0].grow(span(0, LENGTH))
    younger = lease_for(memory, [*span(0, LENGTH), 7], LENGTH + 5)
    assert younger.cached_len == LENGTH
    younger.caches[0].grow([7])
    memory.budget_bytes = memory.committed_bytes + 50
    engine = FakeEngine(memory)
    freed = younger.open_bytes + 50  # its reservation; its pages are the older one's too
    most = max(n for n in range(LENGTH, 2 * LENGTH) if peak(memory, n) - oldest.reserved_bytes <= freed)
    assert not try_extend(memory, oldest, most + 1, 5.0, engine) and engine.preempted == []
    assert try_extend(memory, oldest, most, 5.0, engine) and engine.preempted == [younger]
    memory.check_integrity([oldest.caches])


def peak(memory: Memory, num_tokens: int) -> int:
    return peak_bytes(memory.family.runtime("4/4"), num_tokens)


def test_a_request_with_a_common_beginning_waits_for_no_page_that_it_shares() -> None:
    memory = memory_for(FakeFamily(), 10_000)
    converse(memory, span(0, LENGTH), 0.0)
    needed = 3 * RAW + PAGE * RAW
    memory.budget_bytes = memory.committed_bytes + needed - RAW  # the source's exact row is not shared, and may go
    ask = ask_for(span(0, LENGTH + 2), LENGTH + 2 + PAGE)
    assert isinstance(memory.verdict(ask, 1.0), Start)
    memory.budget_bytes -= 4 * RAW  # less than the shared pages take
    assert isinstance(memory.verdict(ask, 1.0), Refuse)


class MeddlingRunning(FakeRunning):
    """An engine that acts when it is only asked to look."""

    memory: Memory

    def measure(self) -> Any:
        self.memory.drop(self.lease, self.lease.caches)
        return super().measure()


def test_the_guard_notices_whoever_enters_the_memory_again() -> None:
    memory = memory_for(FakeFamily(), 10_000)
    lease = lease_for(memory, span(0, 20), 40, session_id="s")
    meddling = MeddlingRunning(lease)
    meddling.memory = memory
    assert isinstance(memory.answer(GetSession("", "s"), 0.0), SessionInfo)
    memory.attach(lease, meddling)
    with pytest.raises(AssertionError, match="from within the memory"):
        memory.answer(GetSession("", "s"), 0.0)
    memory.attach(lease, FakeRunning(lease))
    finish(memory, lease, span(0, 30))


class LookedAt(FakeRunning):
    """Remembers what was asked of a running request."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("lease", "cache", "asked"):
            object.__getattribute__(self, "asked").add(name)
        return super().__getattribute__(name)


def test_of_running_requests_the_memory_only_looks_at_their_caches() -> None:
    memory = memory_for(FakeFamily(), 4 * BYTES, FakeDisk())
    asked: set[str] = set()
    leases = []
    for i in range(3):
        lease = lease_for(memory, span(1000 * i, LENGTH), LENGTH + 1)
        looked_at = LookedAt(lease)
        object.__setattr__(looked_at, "asked", asked)
        memory.attach(lease, looked_at)
        lease.caches[0].grow(span(1000 * i, LENGTH))
        leases.append(lease)
    engine = FakeEngine(memory)
    assert try_extend(memory, leases[0], 3 * LENGTH, 1.0, engine) and engine.preempted == [leases[2], leases[1]]
    assert asked == {"held_len", "written_len", "usable_prefix", "fork", "measure"}
    assert not any(callable(value) for value in vars(memory).values()), "the memory keeps nothing that it could call"
