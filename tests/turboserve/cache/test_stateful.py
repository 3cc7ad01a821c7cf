"""The whole cache memory against a simple model of it: random commands, a clock that only the test moves.

Budget, disk and caches are fakes; after every command all books must agree, no memory may be above the
budget, and no page may be held by two callers.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.turboserve.cache.fakes import (
    PAGE,
    RAW,
    FakeDisk,
    FakeEngine,
    FakeFamily,
    better_start,
    evict,
    memory_for,
    try_extend,
    try_lease,
)

from turboserve.cache.memory import Memory
from turboserve.cache.sessions import Lease
from turboserve.errors import (
    ContextLengthError,
    OverloadedError,
    QuotaExceededError,
    SessionBusyError,
    SessionExistsError,
    SessionNotFoundError,
)
from turboserve.messages import DeleteSession, ForkSession, SessionInfo, UpdateSession

BUDGET = 14 * PAGE * RAW  # of one format: 14 pages uncompressed, some 30 in 4/4
SALTS = st.sampled_from(["one", "two"])
NAMES = st.sampled_from(["s1", "s2", "s3"])
SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=4)


def tokens_of(segments: list[int], num_more: int) -> list[int]:
    """Prompts with common beginnings of more and less than a page."""
    parts = [1000 * s + i for s in segments for i in range(25)]
    return [*parts, *(7000 + i for i in range(num_more))]


class Engine(FakeEngine):
    """Moves whom it preempts to the machine's list of those that come back."""

    def __init__(self, memory: Memory, machine: Machine) -> None:
        super().__init__(memory)
        self._machine = machine

    def preempt(self, lease: Lease, now_s: float) -> None:
        entry = next(e for e in self._machine.running if e[0] is lease)
        self._machine.running.remove(entry)
        self._machine.preempted.append(entry)
        super().preempt(lease, now_s)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.family, self.disk = FakeFamily(), FakeDisk()
        self.now_s = 10.0
        self.running: list[tuple[Lease, list[int]]] = []
        self.preempted: list[tuple[Lease, list[int]]] = []
        self.pinned: set[tuple[str, str]] = set()
        self.damaged: set[tuple[str, str]] = set()  # names whose file may be of no use: nothing is promised
        self.memory = self.new_memory()

    def new_memory(self) -> Memory:
        memory = memory_for(
            self.family,
            BUDGET,
            self.disk,
            session_ttl_s=500.0,
            max_sessions_per_caller=3,
            max_session_bytes_per_caller=BUDGET * 3 // 4,
            allow_requantise=True,
        )
        self.engine = Engine(memory, self)
        return memory

    def any_running(self, index: int) -> tuple[Lease, list[int]]:
        return self.running[index % len(self.running)]

    @rule(
        salt=SALTS,
        segments=SEGMENTS,
        num_more=st.integers(0, 30),
        num_answer=st.integers(1, 60),
        kv_format=st.sampled_from([None, None, "f16", "8/4"]),
        session_id=st.one_of(st.none(), NAMES),
        cache_key=st.sampled_from([None, "k"]),
    )
    def start(self, salt: str, segments: list[int], num_more: int, num_answer: int, **options: Any) -> None:
        prompt = tokens_of(segments, num_more)
        try:
            room = len(prompt) + num_answer
            lease = try_lease(self.memory, prompt, room, self.now_s, salt, self.engine, **options)
        except (ContextLengthError, OverloadedError, QuotaExceededError):
            return
        if lease is not None:
            answer = [9000 + i for i in range(num_answer - 1)]
            self.running.append((lease, [*prompt, *answer]))
        else:
            assert self.memory.leases, "a request waits for nobody"

    @rule(
        salt=SALTS,
        segments=SEGMENTS,
        num_more=st.integers(0, 30),
        kv_format=st.sampled_from([None, None, "8/4"]),
        session_id=st.one_of(st.none(), NAMES),
    )
    def converse(self, salt: str, segments: list[int], num_more: int, **options: Any) -> None:
        """A whole request at once: most of real traffic, and what fills memory with idle conversations."""
        self.now_s += 1.0
        num_running = len(self.running)
        self.start(salt=salt, segments=segments, num_more=num_more, num_answer=5, cache_key=None, **options)
        if len(self.running) > num_running:
            self.compute(index=num_running, num=1000)
            self.end(index=num_running, is_kept=True)

    @precondition(lambda self: self.preempted)
    @rule()
    def resume(self) -> None:
        """A preempted request goes on from its tokens so far, whatever became of its cache."""
        lease, tokens = self.preempted[-1]
        prompt = tokens[: max(len(lease.prompt), lease.held_len + 1)]
        try:
            new = try_lease(
                self.memory, prompt, len(tokens) + 1, self.now_s, lease.salt, self.engine, order=lease.order
            )
        except (OverloadedError, QuotaExceededError):
            return
        if new is not None:
            self.preempted.pop()
            self.running.append((new, tokens))

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), num=st.integers(1, 60))
    def compute(self, index: int, num: int) -> None:
        lease, tokens = self.any_running(index)
        old = lease.caches
        better = better_start(self.memory, lease) if lease.held_len < len(lease.prompt) - 1 else None
        if better is not None:
            assert better[0][0].tokens == tokens[: better[1]]
            lease.runtime.release(old)
        cache = lease.caches[0]
        cache.grow(tokens[len(cache.tokens) :][:num])

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), num=st.integers(1, 100))
    def extend(self, index: int, num: int) -> None:
        lease, tokens = self.any_running(index)
        if try_extend(self.memory, lease, lease.reserved_tokens + num, self.now_s, self.engine):
            tokens += [9500 + len(tokens) + i for i in range(num)]

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), is_kept=st.booleans())
    def end(self, index: int, is_kept: bool) -> None:
        entry = self.any_running(index)
        self.running.remove(entry)
        lease, _ = entry
        if is_kept:
            self.memory.keep(lease, list(lease.caches[0].tokens), lease.caches, self.now_s)
        else:
            self.memory.drop(lease, lease.caches)

    @rule(seconds=st.sampled_from([0.5, 3.0, 100.0, 600.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.memory.expire(self.now_s)

    @rule(salt=SALTS, name=NAMES, new_name=st.one_of(st.none(), NAMES))
    def fork(self, salt: str, name: str, new_name: str | None) -> None:
        try:
            forked = self.memory.answer(ForkSession(salt, name, new_name), self.now_s)
        except (SessionNotFoundError, SessionExistsError, SessionBusyError, OverloadedError, QuotaExceededError):
            return
        assert isinstance(forked, SessionInfo) and forked.is_explicit and forked.tokens > 0

    @rule(salt=SALTS, name=NAMES, is_pinned=st.booleans())
    def pin(self, salt: str, name: str, is_pinned: bool) -> None:
        try:
            self.memory.answer(UpdateSession(salt, name, is_pinned=is_pinned), self.now_s)
        except (SessionNotFoundError, QuotaExceededError):
            return
        (self.pinned.add if is_pinned else self.pinned.discard)((salt, name))
        if self.memory.idle.get(salt, name) is None:
            self.pinned.discard((salt, name))  # not held yet: its request still runs, and may fail

    @rule(salt=SALTS, name=NAMES)
    def delete(self, salt: str, name: str) -> None:
        try:
            self.memory.answer(DeleteSession(salt, name), self.now_s)
            self.pinned.discard((salt, name))
        except (SessionNotFoundError, SessionBusyError):
            pass

    @rule(is_full=st.booleans(), is_hesitant=st.booleans())
    def disk_fills(self, is_full: bool, is_hesitant: bool) -> None:
        self.disk.is_full, self.disk.is_hesitant = is_full, is_hesitant

    @precondition(lambda self: self.disk.files)
    @rule(index=st.integers(0, 9))
    def disk_damages(self, index: int) -> None:
        key = list(self.disk.files)[index % len(self.disk.files)]  # keys are random, their order is not
        self.disk.damaged.add(key)
        meta = self.disk.files[key][0]
        self.damaged.add((meta["salt"], meta["session_id"]))

    @rule()
    def memory_runs_out(self) -> None:
        self.memory.drop_idle()
        self.pinned.clear()

    @rule(is_orderly=st.booleans())
    def restart(self, is_orderly: bool) -> None:
        """Killed, or stopped in order: then every idle conversation is written if the disk takes it."""
        if is_orderly:
            self.memory.write_all()
        written = {c.conversation_id for c in self.memory.idle if c.disk_key is not None}
        written |= {c.conversation_id for c in self.memory.idle if c.earlier_key is not None and c.session.is_explicit}
        for cache in list(self.family.live):
            cache.runtime.release([cache])
        self.running, self.preempted = [], []
        self.memory = self.new_memory()
        assert written <= {c.conversation_id for c in self.memory.idle}
        self.pinned = {(c.salt, c.conversation_id) for c in self.memory.idle if c.session.is_pinned} & self.pinned

    @invariant()
    def books_agree(self) -> None:
        self.memory.check_integrity([lease.caches for lease, _ in self.running])

    @invariant()
    def every_file_belongs_to_one_conversation(self) -> None:
        keys = [key for c in self.memory.idle for key in (c.disk_key, c.earlier_key) if key is not None]
        assert sorted(keys) == sorted(self.disk.files)

    @invariant()
    def memory_is_within_budget(self) -> None:
        assert self.family.allocated_bytes() <= BUDGET
        assert self.memory.committed_bytes <= BUDGET

    @invariant()
    def callers_share_nothing(self) -> None:
        owners: dict[tuple[str, int], str] = {}
        idle = [(c.salt, c.caches[0]) for c in self.memory.idle if c.caches is not None]
        for salt, cache in [*idle, *((lease.salt, lease.caches[0]) for lease, _ in self.running)]:
            for page in cache.pages:
                assert owners.setdefault((cache.runtime.name, page), salt) == salt

    @invariant()
    def caches_hold_what_is_said(self) -> None:
        for conversation in self.memory.idle:
            if conversation.caches is not None:
                assert conversation.caches[0].tokens == conversation.tokens.tolist()
        for lease, tokens in self.running:
            assert lease.caches[0].tokens == tokens[: lease.held_len]

    @invariant()
    def pinned_sessions_stay(self) -> None:
        assert all(self.memory.idle.get(*key) is not None for key in self.pinned - self.damaged)

    @invariant()
    def quotas_hold(self) -> None:
        for salt in ("one", "two"):
            named = {c.conversation_id for c in self.memory.idle.of(salt) if c.session.is_explicit}
            at_work = {x.conversation_id for x in self.memory.leases if x.salt == salt and x.session.is_explicit}
            assert len(named | at_work) <= 3

    def teardown(self) -> None:
        for lease, _ in self.running:
            self.memory.drop(lease, lease.caches)
        self.disk.is_full = True
        for conversation in list(self.memory.idle):
            evict(self.memory, conversation, "deleted")
        assert self.family.live == [] and not self.memory.leases
        assert self.memory.committed_bytes == 0, f"{self.family.totals()} left"


TestMemory = Machine.TestCase
TestMemory.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
