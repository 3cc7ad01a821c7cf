"""EngineStats from the cache manager's and the runner's own measurements. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from turboserve.cache.runtime import CacheBytes
from turboserve.engine.parts import EngineParts
from turboserve.engine.protocol import ConversationStats, EngineStats, KVBytes
from turboserve.engine.runner import Runner
from turboserve.engine.sequence import Sequence


def kv_bytes(measured: CacheBytes) -> KVBytes:
    """The runtime's figures in the protocol's type, which HTTP may import."""
    return KVBytes(
        tokens=measured.tokens,
        compressed=measured.compressed,
        exact=measured.exact,
        slack=measured.slack,
        uncompressed=measured.uncompressed,
        raw_equivalent=measured.raw_equivalent,
    )


def kv_format_name(parts: EngineParts) -> str:
    fmt = parts.runtime.fmt
    return "f16" if fmt is None else str(fmt.name)


def take_snapshot(
    parts: EngineParts, runner: Runner, running: Iterable[Sequence], num_waiting: int, now_s: float
) -> EngineStats:
    """A consistent copy, taken between two steps.

    The total comes from the page pools: what conversations share counts once, in bytes and in its raw
    equivalent. Each conversation by itself is shown with all that it uses.
    """
    running = list(running)
    conversations = (*_running_stats(runner, running), *_idle_stats(parts, now_s))
    runtime, loaded, manager = parts.runtime, parts.loaded, parts.manager
    counts = manager.counts
    return EngineStats(
        model_id=loaded.model_id,
        kv_format=kv_format_name(parts),
        kv_backend=runtime.backend_name,
        model_dtype=loaded.dtype,
        kv=_total(parts, [c.kv for c in conversations]),
        kv_budget_bytes=manager.budget_bytes,
        kv_token_bytes=runtime.token_bytes,
        kv_token_raw_bytes=runtime.token_raw_bytes,
        max_context_tokens=loaded.max_context,
        num_running=len(running),
        num_waiting=num_waiting,
        conversations=conversations,
        layers_compressed=runtime.layers_compressed,
        layers_uncompressed=runtime.layers_uncompressed,
        details={
            **loaded.details,
            **parts.details,
            "kv_committed_bytes": str(manager.committed_bytes),
            "kv_allocated_bytes": str(runtime.allocated_bytes()),
            "prefix_lookups": str(counts.lookups),
            "prefix_hits": str(counts.hits),
            "prefix_cached_tokens": str(counts.cached_tokens),
            "evictions": str(counts.evictions),
        },
    )


def _running_stats(runner: Runner, running: Iterable[Sequence]) -> list[ConversationStats]:
    return [
        ConversationStats(s.lease.conversation_id, "running", kv_bytes(runner.measure(s)), s.lease.hits, 0.0)
        for s in running
        if s.lease is not None
    ]


def _idle_stats(parts: EngineParts, now_s: float) -> list[ConversationStats]:
    return [
        ConversationStats(c.conversation_id, "memory", kv_bytes(c.kv), c.hits, max(0.0, now_s - c.last_used_s))
        for c in parts.manager.store
    ]


def _total(parts: EngineParts, conversations: list[KVBytes]) -> KVBytes:
    """All compressed layers' pools, plus what conversations hold in layers that are not compressed."""
    runtime = parts.runtime
    pooled = runtime.totals()
    raw = sum(c.raw_equivalent - runtime.compressed_raw_bytes(c.tokens) for c in conversations)
    return KVBytes(
        tokens=pooled.tokens if runtime.layers_compressed else sum(c.tokens for c in conversations),
        compressed=pooled.compressed,
        exact=pooled.exact,
        slack=pooled.slack,
        uncompressed=sum(c.uncompressed for c in conversations),
        raw_equivalent=pooled.raw_equivalent + raw,
    )
