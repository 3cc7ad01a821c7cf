"""The JSON about KV memory: one cache's bytes, the statistics of the engine, sessions and pages of them.

Pure functions from engine messages to plain dicts. Every list is bounded here, whatever the engine holds.
"""

from __future__ import annotations

from collections.abc import Iterable

from turboserve.engine.protocol import (
    MAX_SHOWN_CONVERSATIONS,
    AdmissionStats,
    CacheEvents,
    CacheTier,
    ConversationStats,
    DiskState,
    EngineStats,
    KVBytes,
    SessionInfo,
    SessionPage,
)

Json = dict[str, object]
TIERS: tuple[CacheTier, ...] = ("running", "memory", "disk")
EVENT_KINDS = ("evictions", "requantisations", "spills", "restores", "preemptions", "refusals")


def kv_json(kv: KVBytes) -> Json:
    """Where one cache's bytes are, what they would be uncompressed, and the true ratio."""
    return {
        "tokens": kv.tokens,
        "kv_bytes": {**kinds_json(kv), "total": kv.total},
        "raw_equivalent_bytes": kv.raw_equivalent,
        "ratio": round(kv.ratio, 4),
    }


def kinds_json(kv: KVBytes) -> dict[str, int]:
    return {"compressed": kv.compressed, "exact": kv.exact, "slack": kv.slack, "uncompressed": kv.uncompressed}


def largest(conversations: Iterable[ConversationStats]) -> list[ConversationStats]:
    """At most MAX_SHOWN_CONVERSATIONS, by bytes in memory and then on disk, largest first."""
    ranked = sorted(conversations, key=lambda held: (held.kv.total, held.disk_bytes), reverse=True)
    return ranked[:MAX_SHOWN_CONVERSATIONS]


def kv_stats_json(stats: EngineStats) -> Json:
    """`GET /v1/kv/stats`."""
    return {
        "object": "kv.stats",
        "model": stats.model_id,
        "kv_format": stats.kv_format,
        "kv_backend": stats.kv_backend,
        "model_dtype": stats.model_dtype,
        "kv_budget_bytes": stats.kv_budget_bytes,
        "kv_committed_bytes": stats.kv_committed_bytes,
        "kv_scratch_bytes": stats.kv_scratch_bytes,
        "max_context_tokens": stats.max_context_tokens,
        "bytes_per_token": {"compressed": stats.kv_token_bytes, "raw": stats.kv_token_raw_bytes},
        "layers": {"compressed": stats.layers_compressed, "uncompressed": stats.layers_uncompressed},
        "requests": {"running": stats.num_running, "waiting": stats.num_waiting},
        **kv_json(stats.kv),
        "num_conversations": {tier: stats.num_conversations.get(tier, 0) for tier in TIERS},
        "conversations": [conversation_json(held) for held in largest(stats.conversations)],
        "prefix_tokens": {"queried": stats.events.prefix_query_tokens, "hit": stats.events.prefix_hit_tokens},
        "events": events_json(stats.events),
        "admission": admission_json(stats.admission),
        "integrity_failures": stats.events.integrity_failures,
        "disk": disk_json(stats.disk, stats.kv_disk),
        "details": dict(stats.details),
    }


def conversation_json(held: ConversationStats) -> Json:
    return {
        "id": held.conversation_id,
        "tier": held.tier,
        "kv_format": held.kv_format,
        "explicit": held.is_explicit,
        "pinned": held.is_pinned,
        "hits": held.hits,
        "idle_s": round(held.idle_s, 3),
        **kv_json(held.kv),
        "disk_bytes": held.disk_bytes,
    }


def events_json(events: CacheEvents) -> Json:
    """Each kind of event with its counts by reason."""
    return {kind: dict(getattr(events, kind)) for kind in EVENT_KINDS}


def admission_json(admission: AdmissionStats) -> Json:
    return {
        "requests": admission.num_requests,
        "estimated_bytes": admission.estimated_bytes,
        "actual_bytes": admission.actual_bytes,
        "last": {"estimated_bytes": admission.last_estimated_bytes, "actual_bytes": admission.last_actual_bytes},
    }


def disk_json(disk: DiskState, held: KVBytes) -> Json:
    """The store's files, and what the conversations in it would take in memory."""
    return {
        "enabled": disk.is_enabled,
        "writable": disk.is_writable,
        "reason": disk.reason,
        "bytes": disk.num_bytes,
        "limit_bytes": disk.limit_bytes,
        "entries": disk.num_entries,
        "damaged": disk.num_damaged,
        "pending_bytes": disk.pending_bytes,
        **kv_json(held),
    }


def session_json(info: SessionInfo) -> Json:
    """One session as its caller sees it; times are Unix seconds, as OpenAI's are."""
    return {
        "id": info.session_id,
        "object": "session",
        "explicit": info.is_explicit,
        "created_at": int(info.created_unix_s),
        "last_used_at": int(info.last_used_unix_s),
        "tier": info.tier,
        "kv_format": info.kv_format,
        **kv_json(info.kv),
        "tokens": info.tokens,
        "disk_bytes": info.disk_bytes,
        "hits": info.hits,
        "requests": info.requests,
        "pinned": info.is_pinned,
        "ttl_s": info.ttl_s,
    }


def session_page_json(page: SessionPage) -> Json:
    """OpenAI's list object with its cursor fields."""
    ids = [info.session_id for info in page.sessions]
    return {
        "object": "list",
        "data": [session_json(info) for info in page.sessions],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": page.has_more,
    }


def session_deleted_json(session_id: str) -> Json:
    return {"id": session_id, "object": "session.deleted", "deleted": True}
