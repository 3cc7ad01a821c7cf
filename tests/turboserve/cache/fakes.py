"""Caches that hold tokens and counted pages but no numbers, and a disk that is a dict.

Pages remember which tokens and whose they are, so that a test can see what was shared with whom.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turboserve.cache.holders import Conversation, Lease
from turboserve.cache.manager import Ask, CacheManager, ManagerLimits
from turboserve.cache.runtime import Caches, HeldPages
from turboserve.cache.store import Arrays, DiskStatus, Header, Meta, StoredEntry
from turboserve.errors import KVFormatError

RAW = 10  # bytes of an exact token
TOKEN_BYTES = {"f16": RAW, "8/8": 8, "8/4": 6, "4/4": 4, "4/3": 3, "3/3": 2}
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


@dataclass(frozen=True)
class FakeBytes:
    tokens: int = 0
    compressed: int = 0
    exact: int = 0
    slack: int = 0
    uncompressed: int = 0
    raw_equivalent: int = 0


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

    def measure(self, caches: Caches) -> FakeBytes:
        cache: FakeCache = caches[0]
        num, raw = len(cache.tokens), len(cache.tokens) * RAW
        if cache.runtime.fmt is None:
            return FakeBytes(num, uncompressed=raw, raw_equivalent=raw)
        page_bytes = PAGE * TOKEN_BYTES[cache.runtime.name]
        return FakeBytes(num, len(cache.pages) * page_bytes, cache.num_exact * RAW, raw_equivalent=raw)

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

    def totals(self) -> FakeBytes:
        compressed = sum(len(r.pool.references) * PAGE * TOKEN_BYTES[n] for n, r in self._runtimes.items())
        return FakeBytes(compressed=compressed + self.leaked, exact=sum(c.num_exact * RAW for c in self.live))

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


class FakeDisk:
    """Implements SessionDisk; `is_full` and `damaged` play its failures."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[Meta, Header, Arrays]] = {}
        self.is_full = False
        self.damaged: set[str] = set()

    def put(self, key: str, meta: Meta, header: Header, arrays: Arrays) -> bool:
        if self.is_full:
            return False
        self.files[key] = (meta, header, [a.copy() for a in arrays])
        return True

    def get(self, key: str) -> tuple[Meta, Header, Arrays] | None:
        return None if key in self.damaged else self.files.get(key)

    def delete(self, key: str) -> None:
        self.files.pop(key, None)

    def entries(self) -> list[StoredEntry]:
        return [StoredEntry(k, meta, 1) for k, (meta, _, _) in self.files.items()]

    def entry_bytes(self, key: str) -> int | None:
        return 1 if key in self.files else None

    def status(self) -> DiskStatus:
        return DiskStatus(not self.is_full, "full" if self.is_full else "", len(self.files), 1 << 30, len(self.files))

    def close(self) -> None:
        return None


@dataclass
class FakeRunning:
    """A request at work: its cache, as the manager asks for it."""

    lease: Lease

    @property
    def cache(self) -> FakeCache:
        cache: FakeCache = self.lease.caches[0]
        return cache

    def held_len(self) -> int:
        return len(self.cache.tokens)

    def held_tokens(self) -> list[int]:
        return list(self.cache.tokens)

    def usable_prefix(self, length: int) -> int:
        return self.lease.runtime.usable_prefix(self.lease.caches, length)

    def fork(self, length: int) -> Caches:
        return self.lease.runtime.fork(self.lease.caches, length)

    def measure(self) -> Any:
        return self.lease.runtime.measure(self.lease.caches)


def manager_for(family: FakeFamily, budget_bytes: int, disk: FakeDisk | None = None, **limits: Any) -> CacheManager:
    return CacheManager(family, budget_bytes, ManagerLimits(**limits), disk)


def try_lease(
    manager: CacheManager, prompt: list[int], num_tokens: int, now_s: float = 0.0, salt: str = "", **options: Any
) -> Lease | None:
    """Checks that what was found really is a beginning of the prompt, and makes it run."""
    lease = manager.try_lease(Ask(salt, prompt, num_tokens, **options), now_s)
    if lease is not None:
        assert lease.caches[0].tokens == prompt[: lease.cached_len] and lease.cached_len < len(prompt)
        manager.attach(lease, FakeRunning(lease))
    return lease


def lease_for(
    manager: CacheManager, prompt: list[int], num_tokens: int, now_s: float = 0.0, salt: str = "", **options: Any
) -> Lease:
    lease = try_lease(manager, prompt, num_tokens, now_s, salt, **options)
    assert lease is not None, "no room"
    return lease


def finish(manager: CacheManager, lease: Lease, tokens: list[int], now_s: float = 0.0) -> Conversation | None:
    """Compute up to `tokens` and end."""
    cache: FakeCache = lease.caches[0]
    cache.grow(tokens[len(cache.tokens) :])
    assert cache.tokens == tokens
    return manager.keep(lease, tokens, lease.caches, now_s)


def converse(
    manager: CacheManager, tokens: list[int], now_s: float = 0.0, salt: str = "", **options: Any
) -> Conversation | None:
    """A whole request whose cache ends up holding `tokens`."""
    lease = lease_for(manager, tokens, len(tokens) + 1, now_s, salt, **options)
    return finish(manager, lease, tokens, now_s)


def span(start: int, num: int) -> list[int]:
    return list(range(start, start + num))


def held(manager: CacheManager) -> list[int]:
    """First tokens of all idle conversations in memory."""
    return sorted(int(c.tokens[0]) for c in manager.store if c.caches is not None)
