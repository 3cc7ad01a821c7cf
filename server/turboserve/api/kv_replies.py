"""From the engine's messages to the replies about KV memory: statistics, sessions, pages of sessions.

Pure functions. Every list is bounded here, whatever the engine holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from turboquant_kv.kv_bytes import KVBytes
from turboserve.api.kv_reply_models import (
    AdmissionSums,
    BytesPerToken,
    ConversationObject,
    DiskObject,
    EventCounts,
    KVKinds,
    KVStatistics,
    KVTree,
    LayerCounts,
    PagesObject,
    PrefixTokens,
    QualityObject,
    RequestCounts,
    ReservedAndUsed,
    SessionList,
    SessionObject,
    TierCounts,
    TreeNode,
    TreeSession,
)
from turboserve.messages import (
    MAX_SHOWN_CONVERSATIONS,
    AdmissionStats,
    CacheEvents,
    ConversationStats,
    DiskStatus,
    EngineStats,
    FormatQuality,
    PageCounts,
    SessionInfo,
    SessionPage,
    SessionTree,
)


def kv_figures(kv: KVBytes) -> dict[str, Any]:
    """The four fields that say what one cache holds, where its bytes are, and how they compare uncompressed."""
    kinds = KVKinds(
        compressed=kv.compressed, exact=kv.exact, slack=kv.slack, uncompressed=kv.uncompressed, total=kv.total
    )
    return {
        "tokens": kv.tokens,
        "kv_bytes": kinds,
        "raw_equivalent_bytes": kv.raw_equivalent,
        "ratio": round(kv.ratio, 4),
    }


def largest(conversations: Iterable[ConversationStats]) -> list[ConversationStats]:
    """At most MAX_SHOWN_CONVERSATIONS, by bytes in memory and then on disk, largest first."""
    ranked = sorted(conversations, key=lambda held: (held.kv.total, held.disk_bytes), reverse=True)
    return ranked[:MAX_SHOWN_CONVERSATIONS]


def kv_statistics(stats: EngineStats) -> KVStatistics:
    """The reply of `GET /v1/kv/stats`."""
    events = stats.events
    return KVStatistics(
        model=stats.model_id,
        kv_format=stats.kv_format,
        kv_backend=stats.kv_backend,
        model_dtype=stats.model_dtype,
        kv_budget_bytes=stats.kv_budget_bytes,
        kv_committed_bytes=stats.kv_committed_bytes,
        kv_scratch_bytes=stats.kv_scratch_bytes,
        max_context_tokens=stats.max_context_tokens,
        bytes_per_token=BytesPerToken(compressed=stats.kv_token_bytes, raw=stats.kv_token_raw_bytes),
        layers=LayerCounts(compressed=stats.layers_compressed, uncompressed=stats.layers_uncompressed),
        requests=RequestCounts(running=stats.num_running, waiting=stats.num_waiting),
        **kv_figures(stats.kv),
        num_conversations=_tiers(stats),
        conversations=[_conversation(held) for held in largest(stats.conversations)],
        prefix_tokens=PrefixTokens(queried=events.prefix_query_tokens, hit=events.prefix_hit_tokens),
        events=_events(events),
        admission=_admission(stats.admission),
        integrity_failures=events.integrity_failures,
        disk=_disk(stats.disk, stats.kv_disk),
        quality=[_quality(measured) for measured in stats.quality],
        details=dict(stats.details),
    )


def _tiers(stats: EngineStats) -> TierCounts:
    counts = stats.num_conversations
    return TierCounts(running=counts.get("running", 0), memory=counts.get("memory", 0), disk=counts.get("disk", 0))


def _conversation(held: ConversationStats) -> ConversationObject:
    return ConversationObject(
        id=held.conversation_id,
        tier=held.tier,
        kv_format=held.kv_format,
        explicit=held.is_explicit,
        pinned=held.is_pinned,
        hits=held.hits,
        idle_s=round(held.idle_s, 3),
        **kv_figures(held.kv),
        disk_bytes=held.disk_bytes,
    )


def _events(events: CacheEvents) -> EventCounts:
    return EventCounts(**{kind: dict(getattr(events, kind)) for kind in EventCounts.model_fields})


def _admission(admission: AdmissionStats) -> AdmissionSums:
    last = ReservedAndUsed(estimated_bytes=admission.last_estimated_bytes, actual_bytes=admission.last_actual_bytes)
    return AdmissionSums(
        requests=admission.num_requests,
        estimated_bytes=admission.estimated_bytes,
        actual_bytes=admission.actual_bytes,
        last=last,
    )


def _disk(disk: DiskStatus, held: KVBytes) -> DiskObject:
    return DiskObject(
        enabled=disk.is_enabled,
        writable=disk.is_writable,
        reason=disk.reason,
        bytes=disk.num_bytes,
        limit_bytes=disk.limit_bytes,
        entries=disk.num_entries,
        damaged=disk.num_damaged,
        pending_bytes=disk.pending_bytes,
        **kv_figures(held),
    )


def _quality(measured: FormatQuality) -> QualityObject:
    return QualityObject(
        kv_format=measured.kv_format,
        kl_mean=measured.kl_mean,
        flips=measured.flips,
        perplexity_ratio=measured.perplexity_ratio,
        tokens=measured.num_tokens,
        measured_at=int(measured.measured_unix_s),
    )


def session_object(info: SessionInfo) -> SessionObject:
    """One session as its caller sees it; times are whole Unix seconds, as OpenAI's are."""
    return SessionObject(**_session_fields(info))


def session_tree(tree: SessionTree) -> KVTree:
    """The reply of `GET /v1/kv/tree`."""
    return KVTree(
        sessions=[TreeSession(**_session_fields(info), pages=_pages(pages)) for info, pages in tree.sessions],
        nodes=[
            TreeNode(parent=node.parent, tokens=node.tokens, kv_format=node.kv_format, sessions=list(node.session_ids))
            for node in tree.nodes
        ],
        has_more=tree.has_more,
    )


def _pages(pages: PageCounts | None) -> PagesObject | None:
    if pages is None:
        return None
    return PagesObject(compressed=pages.compressed, shared=pages.shared, exact_tokens=pages.exact_tokens)


def _session_fields(info: SessionInfo) -> dict[str, Any]:
    return dict(
        id=info.session_id,
        explicit=info.is_explicit,
        created_at=int(info.created_unix_s),
        last_used_at=int(info.last_used_unix_s),
        tier=info.tier,
        kv_format=info.kv_format,
        **{**kv_figures(info.kv), "tokens": info.tokens},
        disk_bytes=info.disk_bytes,
        hits=info.hits,
        requests=info.requests,
        pinned=info.is_pinned,
        ttl_s=info.ttl_s,
    )


def session_list(page: SessionPage) -> SessionList:
    """OpenAI's list object with its cursor fields."""
    ids = [info.session_id for info in page.sessions]
    return SessionList(
        data=[session_object(info) for info in page.sessions],
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=page.has_more,
    )
