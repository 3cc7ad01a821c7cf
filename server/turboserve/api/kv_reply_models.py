"""The shapes of replies about KV memory: one cache's figures, sessions, statistics; and what all shapes share.

Built in `kv_replies.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from turboserve.messages import MAX_SHOWN_CONVERSATIONS, CacheTier

# --- fields that several replies share

NumTokens = Annotated[int, Field(description="Tokens held.")]
RawBytes = Annotated[int, Field(description="What the same tokens would take uncompressed, in the model's dtype.")]
Ratio = Annotated[float, Field(description="raw_equivalent_bytes over kv_bytes.total; 1 for nothing.")]
KVFormatName = Annotated[str, Field(description="Key bits and value bits such as 4/3, or f16: not compressed.")]
UnixSeconds = Annotated[int, Field(description="Unix time in seconds.")]
Tier = Annotated[CacheTier, Field(description="running: a request works on it; memory: idle; disk: not in memory.")]
CountsByReason = dict[str, int]


class Reply(BaseModel):
    """Base of all shapes; immutable once built."""

    model_config = ConfigDict(frozen=True)


class KVKinds(Reply):
    """Bytes of a KV cache by kind, sums of allocated arrays."""

    compressed: Annotated[int, Field(description="Codes and scales of pages in use.")]
    exact: Annotated[int, Field(description="Windows kept in the model's dtype.")]
    slack: Annotated[int, Field(description="Allocated pages that hold no tokens.")]
    uncompressed: Annotated[int, Field(description="Layers that cannot be compressed.")]
    total: int


# --- sessions


class SessionObject(Reply):
    """One session, as its own caller sees it."""

    id: str
    object: Literal["session"] = "session"
    explicit: Annotated[bool, Field(description="Its caller chose the name.")]
    created_at: UnixSeconds
    last_used_at: UnixSeconds
    tier: Tier
    kv_format: KVFormatName
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio
    disk_bytes: int
    hits: Annotated[int, Field(description="Requests that found part of their prompt here.")]
    requests: Annotated[int, Field(description="Requests whose answer ended here.")]
    pinned: bool
    ttl_s: Annotated[float | None, Field(description="Seconds from the last use; null: the server's own limit.")]


class SessionList(Reply):
    """By last use, newest first; pass `last_id` as `after` for the following page."""

    object: Literal["list"] = "list"
    data: list[SessionObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedSession(Reply):
    """The session is gone, its memory and its file given back."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


# --- the tree of sessions


class PagesObject(Reply):
    """What a session's cache is made of."""

    compressed: Annotated[int, Field(description="Pages of codes.")]
    shared: Annotated[int, Field(description="Of them, those that other sessions hold too.")]
    exact_tokens: Annotated[int, Field(description="Tokens in the model's dtype: the first ones and the latest.")]


class TreeSession(SessionObject):
    """A session with its pages; null while it runs, and of one that is on disk alone."""

    pages: PagesObject | None


class TreeNode(Reply):
    """A point up to which sessions have the same tokens, or where one ends."""

    parent: Annotated[int | None, Field(description="Its place in the list; null: nothing before it is shared.")]
    tokens: Annotated[int, Field(description="From the beginning to here.")]
    kv_format: KVFormatName
    sessions: Annotated[list[str], Field(description="Ids of those that end here.")]


class KVTree(Reply):
    """How the caller's sessions share their beginnings; of the newest ones, if there are many."""

    object: Literal["kv.tree"] = "kv.tree"
    sessions: list[TreeSession]
    nodes: Annotated[list[TreeNode], Field(description="Each behind its parent.")]
    has_more: Annotated[bool, Field(description="Older sessions are left out.")]


# --- KV statistics


class BytesPerToken(Reply):
    """Bytes of one more token of a long conversation, all layers."""

    compressed: float
    raw: float


class LayerCounts(Reply):
    """The model's layers, by how their keys and values are kept."""

    compressed: int
    uncompressed: int


class RequestCounts(Reply):
    """Requests in the engine now."""

    running: int
    waiting: int


class TierCounts(Reply):
    """Conversations held now, by where they are."""

    running: int
    memory: int
    disk: int


class ConversationObject(Reply):
    """One conversation as statistics show it: its id is opaque, also where its caller gave it a name."""

    id: str
    tier: Tier
    kv_format: KVFormatName
    explicit: bool
    pinned: bool
    hits: int
    idle_s: float
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio
    disk_bytes: int


class PrefixTokens(Reply):
    """Prompt tokens since the start: looked up in kept caches, and found there."""

    queried: int
    hit: int


class EventCounts(Reply):
    """Since the start, each kind by reason."""

    evictions: CountsByReason
    requantisations: CountsByReason
    spills: CountsByReason
    restores: CountsByReason
    preemptions: CountsByReason
    refusals: CountsByReason


class ReservedAndUsed(Reply):
    """Bytes reserved at admission, and bytes held in the end."""

    estimated_bytes: int
    actual_bytes: int


class AdmissionSums(Reply):
    """Bytes reserved beside bytes held in the end, summed over ended requests, and of the last one."""

    requests: int
    estimated_bytes: int
    actual_bytes: int
    last: ReservedAndUsed


class DiskObject(Reply):
    """The store's files, and what the conversations in it would take in memory."""

    enabled: bool
    writable: bool
    reason: Annotated[str, Field(description="Why it is off or takes no more; empty while it works.")]
    bytes: int
    limit_bytes: int
    entries: int
    damaged: int
    pending_bytes: int
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio


class QualityObject(Reply):
    """What `turboserve eval` measured of a format on this model, against the uncompressed one: means over texts."""

    kv_format: KVFormatName
    kl_mean: Annotated[float, Field(description="Of the next-token distributions, in nats.")]
    flips: Annotated[float, Field(description="Share of positions whose likeliest token differs.")]
    perplexity_ratio: float
    tokens: Annotated[int, Field(description="Over how many.")]
    measured_at: UnixSeconds


class KVStatistics(Reply):
    """KV memory in all, and of the largest conversations."""

    object: Literal["kv.stats"] = "kv.stats"
    model: str
    kv_format: KVFormatName
    kv_backend: str
    model_dtype: str
    kv_budget_bytes: int
    kv_committed_bytes: Annotated[int, Field(description="Held, or promised to running requests.")]
    kv_scratch_bytes: Annotated[int, Field(description="The most that one step may allocate beside the budget.")]
    max_context_tokens: int
    bytes_per_token: BytesPerToken
    layers: LayerCounts
    requests: RequestCounts
    tokens: NumTokens
    kv_bytes: KVKinds
    raw_equivalent_bytes: RawBytes
    ratio: Ratio
    num_conversations: TierCounts
    conversations: Annotated[list[ConversationObject], Field(max_length=MAX_SHOWN_CONVERSATIONS)]
    prefix_tokens: PrefixTokens
    events: EventCounts
    admission: AdmissionSums
    integrity_failures: Annotated[int, Field(description="Should stay 0.")]
    disk: DiskObject
    quality: Annotated[list[QualityObject], Field(description="Of formats evaluated before the model was loaded.")]
    details: dict[str, str]
