"""What the memory holds, for statistics: bytes by kind and place, and the largest conversations. Changes nothing."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, starmap

from turboquant_kv.kv_bytes import NO_BYTES, KVBytes
from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import CacheFamily, SessionDisk
from turboserve.cache.ledger import Ledger
from turboserve.cache.sessions import Conversation, Holder
from turboserve.messages import MAX_SHOWN_CONVERSATIONS, CacheTier, ConversationStats, DiskStatus


@dataclass(frozen=True, slots=True)
class Holdings:
    """Everything held at one moment.

    kv: in memory, what conversations share counted once, in bytes and in its raw equivalent; kv_disk: what
    those on disk would take there. conversations: the MAX_SHOWN_CONVERSATIONS largest, each with all that it uses.
    """

    kv: KVBytes
    kv_disk: KVBytes
    num_conversations: Mapping[CacheTier, int]
    conversations: tuple[ConversationStats, ...]


def holdings(ledger: Ledger, idle: IdleConversations, now_s: float) -> Holdings:
    """As they are now; every running cache is measured once."""
    at_work = [(lease, lease.measure()) for lease in ledger.leases]
    in_memory = [c for c in idle if c.caches is not None]
    on_disk = [c for c in idle if c.caches is None]
    kv_by_format = [*((x.kv_format, kv) for x, kv in at_work), *((c.kv_format, c.kv) for c in in_memory)]
    return Holdings(
        kv=_total(ledger.family, kv_by_format),
        kv_disk=sum((c.kv for c in on_disk), NO_BYTES),
        num_conversations={"running": len(at_work), "memory": len(in_memory), "disk": len(on_disk)},
        conversations=_shown(at_work, [*in_memory, *on_disk], now_s),
    )


def _shown(
    at_work: Iterable[tuple[Holder, KVBytes]], idle: list[Conversation], now_s: float
) -> tuple[ConversationStats, ...]:
    """The largest, by bytes in memory and then on disk; no more than a reply should hold."""
    everyone = chain(
        ((lease, kv, 0.0) for lease, kv in at_work), ((c, c.kv, max(0.0, now_s - c.session.last_used_s)) for c in idle)
    )
    shown = heapq.nlargest(MAX_SHOWN_CONVERSATIONS, everyone, key=lambda item: (item[1].total, _disk_bytes(item[0])))
    return tuple(starmap(_stats, shown))


def _disk_bytes(holder: Holder) -> int:
    return holder.disk_bytes if isinstance(holder, Conversation) else 0


def _stats(holder: Holder, kv: KVBytes, idle_s: float) -> ConversationStats:
    session = holder.session
    return ConversationStats(
        conversation_id=session.public_id,
        tier=holder.tier,
        kv=kv,
        hits=session.hits,
        idle_s=idle_s,
        kv_format=holder.kv_format,
        is_explicit=session.is_explicit,
        is_pinned=session.is_pinned,
        disk_bytes=_disk_bytes(holder),
    )


def _total(family: CacheFamily, kv_by_format: list[tuple[str, KVBytes]]) -> KVBytes:
    """All formats' pools, plus what conversations hold in layers that are not compressed."""
    pooled = family.totals()
    formats = {name for name, _ in kv_by_format}
    pooled_token_bytes = {name: family.runtime(name).compressed_raw_bytes(1) for name in formats}
    return KVBytes(
        tokens=pooled.tokens + sum(kv.tokens for name, kv in kv_by_format if not pooled_token_bytes[name]),
        compressed=pooled.compressed,
        exact=pooled.exact,
        slack=pooled.slack,
        uncompressed=sum(kv.uncompressed for _, kv in kv_by_format),
        raw_equivalent=pooled.raw_equivalent
        + sum(kv.raw_equivalent - kv.tokens * pooled_token_bytes[name] for name, kv in kv_by_format),
    )


def disk_status(disk: SessionDisk | None) -> DiskStatus:
    """The disk's own, or why there is none."""
    return DiskStatus(reason="no kv_store_dir is set") if disk is None else disk.status()
