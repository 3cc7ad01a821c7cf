"""EngineStats and SessionInfo from the cache manager's and the runner's own measurements. Changes nothing."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.desk import SessionView
from turboserve.cache.holders import Conversation, Lease
from turboserve.cache.manager import CacheManager
from turboserve.cache.runtime import CacheBytes, total_bytes
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.runner import Runner
from turboserve.engine.sequence import Sequence
from turboserve.messages import (
    MAX_SHOWN_CONVERSATIONS,
    AdmissionStats,
    CacheEvents,
    CacheTier,
    ConversationStats,
    DiskStatus,
    EngineStats,
    SessionInfo,
)

_KINDS = ("tokens", "compressed", "exact", "slack", "uncompressed", "raw_equivalent")


def kv_bytes(measured: CacheBytes) -> KVBytes:
    """The runtime's figures in the protocol's type, which HTTP may import."""
    return KVBytes(**{kind: getattr(measured, kind) for kind in _KINDS})


def session_info(view: SessionView, wall_offset_s: float) -> SessionInfo:
    """What a caller sees of a session; `wall_offset_s` turns the engine's seconds into Unix seconds."""
    session = view.session
    return SessionInfo(
        session_id=session.session_id,
        is_explicit=session.is_explicit,
        tokens=view.num_tokens,
        kv=kv_bytes(view.kv),
        kv_format=view.holder.kv_format,
        tier=_tier(view.holder),
        hits=session.hits,
        created_unix_s=session.created_s + wall_offset_s,
        last_used_unix_s=session.last_used_s + wall_offset_s,
        is_pinned=session.is_pinned,
        ttl_s=session.ttl_s,
        requests=session.num_requests,
        disk_bytes=view.disk_bytes,
    )


def take_snapshot(
    parts: EngineParts,
    runner: Runner,
    running: Iterable[Sequence],
    num_waiting: int,
    now_s: float,
    scratch_bytes: int = 0,
) -> EngineStats:
    """A consistent copy, taken between two steps.

    The total comes from the page pools: what conversations share counts once, in bytes and in its raw
    equivalent. Each conversation by itself is shown with all that it uses.
    """
    running = list(running)
    runtime, loaded, manager = parts.runtime, parts.loaded, parts.manager
    in_memory = [c for c in manager.store if c.caches is not None]
    on_disk = [c for c in manager.store if c.caches is None]
    at_work = [(s.lease, kv_bytes(runner.measure(s))) for s in running if s.lease is not None]
    counts = manager.counts
    return EngineStats(
        model_id=loaded.model_id,
        kv_format=manager.family.default,
        kv_backend=runtime.backend_name,
        model_dtype=loaded.dtype,
        kv=_total(parts, [*((x.kv_format, kv) for x, kv in at_work), *((c.kv_format, c.kv) for c in in_memory)]),
        kv_budget_bytes=manager.budget_bytes,
        kv_token_bytes=runtime.token_bytes,
        kv_token_raw_bytes=runtime.token_raw_bytes,
        max_context_tokens=loaded.max_context,
        num_running=len(running),
        num_waiting=num_waiting,
        conversations=_shown(at_work, [*in_memory, *on_disk], now_s),
        layers_compressed=runtime.layers_compressed,
        layers_uncompressed=runtime.layers_uncompressed,
        details={
            **loaded.details,
            **parts.details,
            "kv_allocated_bytes": str(manager.family.allocated_bytes()),
            "prefix_lookups": str(counts.lookups),
            "prefix_hits": str(counts.hits),
        },
        num_conversations={"running": len(at_work), "memory": len(in_memory), "disk": len(on_disk)},
        kv_disk=_sum(c.kv for c in on_disk),
        kv_committed_bytes=manager.committed_bytes,
        kv_scratch_bytes=scratch_bytes,
        events=_events(manager),
        admission=_admission(manager),
        disk=_disk(manager),
    )


def _shown(
    at_work: list[tuple[Lease, KVBytes]], idle: list[Conversation], now_s: float
) -> tuple[ConversationStats, ...]:
    """Running ones, then idle ones, of each the largest; no more than a reply should hold."""
    running = heapq.nlargest(MAX_SHOWN_CONVERSATIONS, at_work, key=lambda item: item[1].total)
    largest = heapq.nlargest(MAX_SHOWN_CONVERSATIONS - len(running), idle, key=lambda c: total_bytes(c.kv))
    return (
        *(_conversation(lease, kv, 0.0) for lease, kv in running),
        *(_conversation(c, kv_bytes(c.kv), max(0.0, now_s - c.session.last_used_s)) for c in largest),
    )


def _conversation(holder: Lease | Conversation, kv: KVBytes, idle_s: float) -> ConversationStats:
    session = holder.session
    return ConversationStats(
        conversation_id=session.public_id,
        tier=_tier(holder),
        kv=kv,
        hits=session.hits,
        idle_s=idle_s,
        kv_format=holder.kv_format,
        is_explicit=session.is_explicit,
        is_pinned=session.is_pinned,
        disk_bytes=holder.disk_bytes if isinstance(holder, Conversation) else 0,
    )


def _tier(holder: Lease | Conversation) -> CacheTier:
    if isinstance(holder, Lease):
        return "running"
    return "disk" if holder.caches is None else "memory"


def _events(manager: CacheManager) -> CacheEvents:
    counts = manager.counts
    return CacheEvents(
        evictions=Counter(counts.evictions),
        requantisations=Counter(counts.requantisations),
        spills=Counter(counts.spills),
        restores=Counter(counts.restores),
        preemptions=Counter(counts.preemptions),
        refusals=Counter(counts.refusals),
        prefix_lookups=counts.lookups,
        prefix_hits=counts.hits,
        prefix_query_tokens=counts.query_tokens,
        prefix_hit_tokens=counts.cached_tokens,
        integrity_failures=counts.integrity_failures,
    )


def _admission(manager: CacheManager) -> AdmissionStats:
    admission = manager.admission
    return AdmissionStats(
        num_requests=admission.num_requests,
        estimated_bytes=admission.estimated_bytes,
        actual_bytes=admission.actual_bytes,
        last_estimated_bytes=admission.last_estimated_bytes,
        last_actual_bytes=admission.last_actual_bytes,
    )


def _disk(manager: CacheManager) -> DiskStatus:
    if manager.disk is None:
        return DiskStatus(reason="no kv_store_dir is set")
    status = manager.disk.status()
    return DiskStatus(
        is_enabled=True,
        is_writable=status.is_writable,
        reason=status.reason,
        num_bytes=status.num_bytes,
        limit_bytes=status.limit_bytes,
        num_entries=status.num_entries,
        num_damaged=status.num_damaged,
        pending_bytes=status.pending_bytes,
    )


def _sum(parts: Iterable[CacheBytes]) -> KVBytes:
    held = list(parts)
    return KVBytes(**{kind: sum(getattr(kv, kind) for kv in held) for kind in _KINDS})


def _total(parts: EngineParts, conversations: list[tuple[str, CacheBytes]]) -> KVBytes:
    """All formats' pools, plus what conversations (format, bytes) hold in layers that are not compressed."""
    family = parts.manager.family
    pooled = family.totals()
    formats = {name for name, _ in conversations}
    pooled_token_bytes = {name: family.runtime(name).compressed_raw_bytes(1) for name in formats}
    return KVBytes(
        tokens=pooled.tokens + sum(kv.tokens for name, kv in conversations if not pooled_token_bytes[name]),
        compressed=pooled.compressed,
        exact=pooled.exact,
        slack=pooled.slack,
        uncompressed=sum(kv.uncompressed for _, kv in conversations),
        raw_equivalent=pooled.raw_equivalent
        + sum(kv.raw_equivalent - kv.tokens * pooled_token_bytes[name] for name, kv in conversations),
    )
