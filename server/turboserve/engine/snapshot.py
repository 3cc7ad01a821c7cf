"""EngineStats from the cache manager's and the runner's own measurements. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

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

    The total sums conversations, so pages that several of them share count for each, with their
    raw equivalent too; pages that nobody uses now are added as slack.
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
        kv=_total((c.kv for c in conversations), runtime.slack_bytes()),
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
        ConversationStats(c.conversation_id, "idle", kv_bytes(c.kv), c.hits, max(0.0, now_s - c.last_used_s))
        for c in parts.manager.store
    ]


def _total(parts: Iterable[KVBytes], slack: int) -> KVBytes:
    sums = {f.name: 0 for f in fields(KVBytes)}
    sums["slack"] = slack
    for part in parts:
        for name in sums:
            sums[name] += getattr(part, name)
    return KVBytes(**sums)
