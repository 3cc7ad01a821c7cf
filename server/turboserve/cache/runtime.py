"""What the cache manager needs from `turboquant_kv.runtime.KVRuntime`, as types.

Caches are opaque here: one list per sequence, one item per layer. Tests pass a small fake.
"""

from __future__ import annotations

from typing import Any, Protocol

Caches = list[Any]


class CacheBytes(Protocol):
    """Where one sequence's bytes are; the fields add up to what is allocated for it."""

    @property
    def tokens(self) -> int: ...
    @property
    def compressed(self) -> int: ...
    @property
    def exact(self) -> int: ...
    @property
    def slack(self) -> int: ...
    @property
    def uncompressed(self) -> int: ...
    @property
    def raw_equivalent(self) -> int: ...


class CacheRuntime(Protocol):
    """Makes, measures, shares and frees sequences' caches. Used by the engine thread only."""

    @property
    def fmt(self) -> Any | None:
        """KVFormat, or None when nothing is compressed."""
        ...

    @property
    def token_bytes(self) -> float: ...

    def make_cache(self) -> Caches: ...

    def bytes_for(self, num_tokens: int) -> int: ...

    def measure(self, caches: Caches) -> CacheBytes: ...

    def allocated_bytes(self) -> int: ...

    def slack_bytes(self) -> int:
        """The part of allocated_bytes that holds no tokens."""
        ...

    def check_integrity(self) -> None: ...

    def usable_prefix(self, caches: Caches, length: int) -> int: ...

    def fork(self, caches: Caches, length: int) -> Caches: ...

    def release(self, caches: Caches) -> None: ...


def total_bytes(kv: CacheBytes) -> int:
    """All bytes of one sequence."""
    return kv.compressed + kv.exact + kv.slack + kv.uncompressed


def peak_bytes(runtime: CacheRuntime, num_tokens: int) -> int:
    """The most bytes a sequence holds on its way to `num_tokens`; never falls as that grows.

    A sequence is largest when its exact tail is a whole page, just before the page is compressed:
    `bytes_for` falls there, and a reservation must not.
    """
    fmt = runtime.fmt
    if fmt is None or num_tokens < fmt.sink_tokens:
        return runtime.bytes_for(num_tokens)
    last_full_tail = fmt.sink_tokens + (num_tokens - fmt.sink_tokens) // fmt.page_tokens * fmt.page_tokens
    return max(runtime.bytes_for(num_tokens), runtime.bytes_for(last_full_tail))
