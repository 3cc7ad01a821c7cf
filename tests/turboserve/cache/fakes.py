"""Caches that hold tokens and counted pages but no numbers, and a disk that is a dict.

Pages remember which tokens and whose they are, so that a test can see what was shared with whom.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import Arrays, Caches, Header, HeldPages, Meta, OwnDisk, StoredEntry
from turboserve.cache.memory import Ask, Growth, Memory, MemoryLimits, Question, Refuse, Restart, Start, Wait
from turboserve.cache.sessions import Conversation, Lease
from turboserve.errors import KVFormatError
from turboserve.messages import DiskStatus, Request

RAW = 10  # bytes of an exact token
TOKEN_BYTES = {"f16": RAW, "8/8": 8, "8/4": 6, "4/4": 4, "4t/3t": 3, "3t/2t": 2}
PAGE = 16


@dataclass(frozen=True)
class FakeFormat:
    name: str
    page_tokens: int = PAGE
    sink_tokens: int = 0

    def num_pages(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.sink_tokens - 1) // self.page_tokens

    def page_start(self, index: int) -> int:
        return self.sink_tokens + index * self.page_tokens


@dataclass
class FakePool:
    """Pages of one format: who holds them how often, and what is on them."""

    references: dict[int, int] = field(default_factory=dict)
    contents: dict[int, tuple[int, ...]] = field(default_factory=dict)
    ids: Any = field(default_factory=itertools.count)
    num_free: int = 0  # pages that were given back and still have memory

    def new(self, content: Sequence[int]) -> int:
        page = next(self.ids)
        self.num_free = max(0, self.num_free - 1)
        self.references[page], self.contents[page] = 1, tuple(content)
        return int(page)

    def free(self, page: int) -> None:
        self.references[page] -= 1
        assert self.references[page] >= 0
        if not self.references[page]:
            del self.references[page], self.contents[page]
            self.num_free += 1


class FakeCache:
    """One sequence: full pages in the pool, the rest exact; uncompressed when its format is f16."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.pages: list[int] = []
        self.tokens: list[int] = []
        self.is_live = True
        runtime.family.live.append(self)

    def grow(self, tokens: Iterable[int]) -> None:
        assert self.is_live, "a released cache was written"
        self.tokens += [int(t) for t in tokens]
        fmt = self.runtime.fmt
        if fmt is not None:
            while len(self.pages) < fmt.num_pages(len(self.tokens)):
                start = fmt.page_start(len(self.pages))
                self.pages.append(self.runtime.pool.new(self.tokens[start : start + PAGE]))

    @property
    def num_exact(self) -> int:
        return 0 if self.runtime.fmt is None else len(self.tokens) - len(self.pages) * PAGE


@dataclass
class FakeRuntime:
    family: FakeFamily
    name: str
    pool: FakePool = field(default_factory=FakePool)

    @property
    def fmt(self) -> FakeFormat | None:
        return None if self.name == "f16" else FakeFormat(self.name)

    @property
    def token_bytes(self) -> float:
        return float(TOKEN_BYTES[self.name])

    def make_cache(self) -> Caches:
        return [FakeCache(self)]

    def bytes_for(self, num_tokens: int) -> int:
        pages = 0 if self.fmt is None else self.fmt.num_pages(num_tokens)
        return pages * PAGE * TOKEN_BYTES[self.name] + (num_tokens - pages * PAGE) * RAW

    def measure(self, caches: Caches) -> KVBytes:
        cache: FakeCache = caches[0]
        num, raw = len(cache.tokens), len(cache.tokens) * RAW
        if cache.runtime.fmt is None:
            return KVBytes(num, uncompressed=raw, raw_equivalent=raw)
        page_bytes = PAGE * TOKEN_BYTES[cache.runtime.name]
        return KVBytes(num, len(cache.pages) * page_bytes, cache.num_exact * RAW, raw_equivalent=raw)

    def compressed_raw_bytes(self, num_tokens: int) -> int:
        return 0 if self.fmt is None else num_tokens * RAW

    def usable_prefix(self, caches: Caches, length: int) -> int:
        cache: FakeCache = caches[0]
        assert cache.is_live, "a released cache was asked"
        num = len(cache.tokens)
        if length >= num:
            return num
        if not self.family.is_cuttable:
            return 0
        fmt = cache.runtime.fmt
        return length if fmt is None or length >= len(cache.pages) * PAGE else length // PAGE * PAGE

    def fork(self, caches: Caches, length: int) -> Caches:
        cache: FakeCache = caches[0]
        assert cache.is_live and length == self.usable_prefix(caches, length)
        other = FakeCache(cache.runtime)
        other.pages = cache.pages[: length // PAGE]
        for page in other.pages:
            cache.runtime.pool.references[page] += 1
        other.tokens = cache.tokens[:length]
        return [other]

    def release(self, caches: Caches) -> None:
        cache: FakeCache = caches[0]
        if cache.is_live:
            cache.is_live = False
            self.family.live.remove(cache)
            for page in cache.pages:
                cache.runtime.pool.free(page)


class FakeFamily:
    """Every format of a model without weights."""

    def __init__(self, default: str = "4/4", *, is_cuttable: bool = True) -> None:
        self.default, self.is_cuttable = default, is_cuttable
        self.live: list[FakeCache] = []
        self._runtimes: dict[str, FakeRuntime] = {}
        self.leaked = 0

    def normalise(self, name: str) -> str:
        if name not in TOKEN_BYTES:
            raise KVFormatError(f"no format {name}")
        return name

    def runtime(self, name: str) -> FakeRuntime:
        return self._runtimes.setdefault(self.normalise(name), FakeRuntime(self, name))

    def totals(self) -> KVBytes:
        compressed = sum(len(r.pool.references) * PAGE * TOKEN_BYTES[n] for n, r in self._runtimes.items())
        return KVBytes(compressed=compressed + self.leaked, exact=sum(c.num_exact * RAW for c in self.live))

    def held_pages(self, caches: Caches) -> HeldPages | None:
        cache: FakeCache = caches[0]
        if cache.runtime.fmt is None:
            return None
        ids = np.array(cache.pages, np.int64)
        references = np.array([cache.runtime.pool.references[p] for p in cache.pages], np.int64)
        return HeldPages(cache.runtime.name, ids, references, PAGE * TOKEN_BYTES[cache.runtime.name])

    def can_cut(self, name: str) -> bool:
        return self.is_cuttable

    def convert(self, caches: Caches, source: str, target: str) -> Caches:
        new = self.runtime(target).make_cache()
        new[0].grow(caches[0].tokens)
        return new

    def fingerprints(self, name: str) -> Mapping[str, str]:
        return {"layout": "fake", "calibration": name}

    def export_caches(self, caches: Caches) -> tuple[Mapping[str, Any], Arrays]:
        return {"format": caches[0].runtime.name}, [np.array(caches[0].tokens, np.int32)]

    def import_caches(self, name: str, header: Mapping[str, Any], arrays: Arrays) -> Caches:
        if header["format"] != name:
            raise ValueError("another format")
        new = self.runtime(name).make_cache()
        new[0].grow(arrays[0].tolist())
        return new

    def allocated_bytes(self) -> int:
        """All memory, free pages included."""
        plain = sum(len(c.tokens) * RAW for c in self.live if c.runtime.fmt is None)
        totals = self.totals()
        return totals.compressed + totals.exact + plain + self.slack_bytes()

    def slack_bytes(self) -> int:
        return sum(self.slack_by_format().values())

    def slack_by_format(self) -> dict[str, int]:
        return {n: r.pool.num_free * PAGE * TOKEN_BYTES[n] for n, r in self._runtimes.items()}

    def trim(self, wanted_bytes: int) -> int:
        """Takes the most wasteful formats first, whole."""
        given = 0
        for name, slack in sorted(self.slack_by_format().items(), key=lambda item: -item[1]):
            if given < wanted_bytes:
                given += slack
                self._runtimes[name].pool.num_free = 0
        return given

    def check_integrity(self) -> None:
        for runtime in self._runtimes.values():
            held = [p for c in self.live if c.runtime is runtime for p in c.pages]
            assert all(held.count(p) == n for p, n in runtime.pool.references.items())


class FakeDisk(OwnDisk):
    """Implements SessionDisk; `is_full`, `is_hesitant` (says that it is writable, and takes nothing), `is_failing`
    (takes what it then cannot write) and `damaged` play its failures.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[Meta, Header, Arrays]] = {}
        self.is_full = self.is_hesitant = self.is_failing = False
        self.num_asked = 0
        self.damaged: set[str] = set()

    def put(self, key: str, meta: Meta, header: Header, arrays: Arrays) -> bool:
        self.num_asked += 1
        if self.is_full or self.is_hesitant:
            return False
        if self.is_failing:
            return True
        self.files[key] = (meta, header, [a.copy() for a in arrays])
        return True

    def get(self, key: str) -> tuple[Meta, Header, Arrays] | None:
        return None if key in self.damaged else self.files.get(key)

    def delete(self, key: str) -> None:
        self.files.pop(key, None)

    def entries(self) -> list[StoredEntry]:
        return [StoredEntry(k, meta, 1) for k, (meta, _, _) in self.files.items()]

    def entry(self, key: str) -> StoredEntry | None:
        return next((entry for entry in self.entries() if entry.key == key), None)

    def entry_bytes(self, key: str) -> int | None:
        return 1 if key in self.files else None

    def status(self) -> DiskStatus:
        return DiskStatus(True, not self.is_full, "full" if self.is_full else "", len(self.files), 1 << 30)

    def close(self) -> None:
        return None


@dataclass
class FakeRunning:
    """A request at work: its cache, as the memory asks for it."""

    lease: Lease

    @property
    def cache(self) -> FakeCache:
        cache: FakeCache = self.lease.caches[0]
        return cache

    def held_len(self) -> int:
        return len(self.cache.tokens)

    def written_len(self) -> int:
        return self.held_len()

    def held_tokens(self) -> list[int]:
        return list(self.cache.tokens)

    def usable_prefix(self, length: int) -> int:
        return self.lease.runtime.usable_prefix(self.lease.caches, length)

    def fork(self, length: int) -> Caches:
        return self.lease.runtime.fork(self.lease.caches, length)

    def measure(self) -> Any:
        return self.lease.runtime.measure(self.lease.caches)


MAX_ROUNDS = 8


class GuardedMemory(Memory):
    """Fails when it is entered again while it works: it must not call back into whoever runs requests."""

    _is_busy = False

    def _guarded(self, name: str, *args: Any, **options: Any) -> Any:
        assert not self._is_busy, f"{name} was called from within the memory"
        self._is_busy = True
        try:
            return getattr(Memory, name)(self, *args, **options)
        finally:
            self._is_busy = False


def _guard(name: str) -> None:
    def guarded(self: GuardedMemory, *args: Any, **options: Any) -> Any:
        return self._guarded(name, *args, **options)

    setattr(GuardedMemory, name, guarded)


for _name in ("verdict", "carry_out", "keep", "drop", "answer", "drop_idle", "refuse_waiting"):
    _guard(_name)


class FakeEngine:
    """Carries verdicts out as the step loop does. Owns nothing: a lease's caches are its request's."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.preempted: list[Lease] = []
        self.num_rounds = 0

    def obtain(self, question: Question, now_s: float) -> Lease | Wait | Refuse:
        """Ask until the verdict holds."""
        for _ in range(MAX_ROUNDS):
            self.num_rounds += 1
            verdict = self.memory.verdict(question, now_s)
            if not isinstance(verdict, Start):
                return verdict
            for order in verdict.relief.preempt:
                self.preempt(next(x for x in self.memory.leases if x.order == order), now_s)
            lease = self.memory.carry_out(verdict, now_s)
            if lease is not None:
                return lease
        return Wait(None)

    def preempt(self, lease: Lease, now_s: float) -> None:
        self.preempted.append(lease)
        self.memory.keep(lease, list(lease.caches[0].tokens), lease.caches, now_s, has_ended=False)


def memory_for(family: FakeFamily, budget_bytes: int, disk: FakeDisk | None = None, **limits: Any) -> Memory:
    return GuardedMemory(family, budget_bytes, MemoryLimits(**limits), disk)


def ask_for(
    prompt: list[int],
    num_tokens: int,
    salt: str = "",
    order: int | None = None,
    adapter: str = "",
    **options: Any,
) -> Ask:
    """options: session_id, kv_format, cache_key."""
    return Ask(Request("", (), tenant=salt, **options), prompt, num_tokens, order, adapter)


def try_lease(
    memory: Memory,
    prompt: list[int],
    num_tokens: int,
    now_s: float = 0.0,
    salt: str = "",
    engine: FakeEngine | None = None,
    **options: Any,
) -> Lease | None:
    """None: wait. Checks that what was found really is a beginning of the prompt, and makes it run."""
    memory.expire(now_s)
    got = (engine or FakeEngine(memory)).obtain(ask_for(prompt, num_tokens, salt, **options), now_s)
    if isinstance(got, Refuse):
        raise got.error
    if isinstance(got, Wait):
        return None
    assert got.caches[0].tokens == prompt[: got.cached_len] and got.cached_len < len(prompt)
    memory.attach(got, FakeRunning(got))
    return got


def lease_for(
    memory: Memory, prompt: list[int], num_tokens: int, now_s: float = 0.0, salt: str = "", **options: Any
) -> Lease:
    lease = try_lease(memory, prompt, num_tokens, now_s, salt, **options)
    assert lease is not None, "no room"
    return lease


def try_extend(memory: Memory, lease: Lease, num_tokens: int, now_s: float, engine: FakeEngine | None = None) -> bool:
    got = (engine or FakeEngine(memory)).obtain(Growth(lease, num_tokens), now_s)
    assert got is lease or isinstance(got, Wait)
    return got is lease


def better_start(memory: Memory, lease: Lease, now_s: float = 0.0) -> tuple[Caches, int] | None:
    """(caches, length) of a longer beginning; the caller releases those that the lease had."""
    got = FakeEngine(memory).obtain(Restart(lease), now_s)
    assert got is lease or isinstance(got, Wait)
    return (lease.caches, lease.cached_len) if got is lease else None


def finish(memory: Memory, lease: Lease, tokens: list[int], now_s: float = 0.0) -> Conversation | None:
    """Compute up to `tokens` and end."""
    cache: FakeCache = lease.caches[0]
    cache.grow(tokens[len(cache.tokens) :])
    assert cache.tokens == tokens
    return memory.keep(lease, tokens, lease.caches, now_s)


def converse(
    memory: Memory, tokens: list[int], now_s: float = 0.0, salt: str = "", **options: Any
) -> Conversation | None:
    """A whole request whose cache ends up holding `tokens`."""
    lease = lease_for(memory, tokens, len(tokens) + 1, now_s, salt, **options)
    return finish(memory, lease, tokens, now_s)


def evict(memory: Memory, conversation: Conversation, reason: str = "pressure") -> None:
    """Forget one, as memory itself does."""
    memory._idle.evict(conversation, reason)


def span(start: int, num: int) -> list[int]:
    return list(range(start, start + num))


def held(memory: Memory) -> list[int]:
    """First tokens of all idle conversations in memory."""
    return sorted(int(c.tokens[0]) for c in memory.idle if c.caches is not None)
