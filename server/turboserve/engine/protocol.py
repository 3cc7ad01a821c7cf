"""What HTTP knows of the engine: submit, cancel, sessions, readiness, statistics. No MLX in here.

The engine thread answers through an `EventSink`; each request ends with exactly one
`Finished` or `Failed`, after which nothing more is delivered.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from turboserve.errors import TurboServeError

FinishReason = Literal["stop", "length"]
CacheTier = Literal["running", "memory", "disk"]  # memory: idle, ready to continue; disk: not in memory

# Statistics name this many conversations, the largest first, however many are held: neither a reply
# nor a scrape may grow with the number of callers.
MAX_SHOWN_CONVERSATIONS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Bounds are enforced by the HTTP schema."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated chat completion. `tenant` is the server's own view of the caller, never a body field."""

    request_id: str
    messages: tuple[Mapping[str, object], ...]  # {"role": str, "content": str, ...}, content already plain text
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None  # None: up to the context length
    stop: tuple[str, ...] = ()
    tenant: str = ""
    tools: tuple[Mapping[str, object], ...] = ()
    session_id: str | None = None  # an explicit session: continued when it exists, created when not
    kv_format: str | None = None  # "4/3", "f16", ...; None: the session's own, else the server's
    cache_key: str | None = None  # OpenAI's prompt_cache_key: of equally long prefixes, prefer this one's


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Where a KV cache's bytes are. Sums of allocated arrays, not estimates.

    compressed: codes and scales of pages in use; exact: sink and tail windows as allocated;
    slack: allocated pages that hold no tokens; uncompressed: layers kept in mlx-lm's own caches.
    raw_equivalent: what the same tokens would take uncompressed in the model's dtype.
    """

    tokens: int = 0
    compressed: int = 0
    exact: int = 0
    slack: int = 0
    uncompressed: int = 0
    raw_equivalent: int = 0

    @property
    def total(self) -> int:
        return self.compressed + self.exact + self.slack + self.uncompressed

    @property
    def ratio(self) -> float:
        """Raw-equivalent over total; 1.0 for an empty cache."""
        return self.raw_equivalent / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request, and its conversation's KV bytes.

    session_id: under which the conversation can now be looked up, explicit or opaque; "" when it was not kept.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kv: KVBytes
    kv_format: str
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly decoded text; never a broken character, never part of a stop string."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    error: TurboServeError


Event = TextDelta | Finished | Failed


class EventSink(Protocol):
    """Receives events on the engine thread; must return at once and never raise."""

    def put(self, event: Event) -> None: ...


@dataclass(frozen=True, slots=True)
class ConversationStats:
    """One conversation as statistics show it.

    `conversation_id` is opaque and carries no text: an explicit session's name is its caller's own and
    is shown to that caller only, by `get_session`.
    """

    conversation_id: str
    tier: CacheTier
    kv: KVBytes
    hits: int
    idle_s: float
    kv_format: str = ""
    is_explicit: bool = False
    is_pinned: bool = False
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One caller's session. Times are Unix seconds.

    `kv` and `kv_format` say what it holds in memory, or held when it went to disk; `disk_bytes` what its
    file takes. `hits` counts requests that found part of their prompt here, `requests` those that ended here.
    """

    session_id: str
    is_explicit: bool
    tokens: int
    kv: KVBytes
    kv_format: str
    tier: CacheTier
    hits: int
    created_unix_s: float
    last_used_unix_s: float
    is_pinned: bool = False
    ttl_s: float | None = None  # counted from the last use; None: until memory is needed
    requests: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Some of a caller's sessions, by last use, newest first; `has_more` when others follow the last one."""

    sessions: tuple[SessionInfo, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class DiskState:
    """The disk store as statistics show it. `reason`: why it is off or takes no more; "" while it works."""

    is_enabled: bool = False
    is_writable: bool = False
    reason: str = ""
    bytes: int = 0
    limit_bytes: int = 0
    num_entries: int = 0
    num_damaged: int = 0  # files found damaged since the start, and dropped
    pending_bytes: int = 0  # in memory, outside the KV budget, until they are written


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """KV bytes estimated when requests were admitted beside those they took in the end."""

    num_requests: int = 0  # ended, and so in both sums
    estimated_bytes: int = 0
    actual_bytes: int = 0
    last_estimated_bytes: int = 0
    last_actual_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """What the cache manager did since start, counted by reason. Reasons are few and fixed, never a caller's text."""

    evictions: Mapping[str, int] = field(default_factory=dict)
    requantisations: Mapping[str, int] = field(default_factory=dict)
    spills: Mapping[str, int] = field(default_factory=dict)
    restores: Mapping[str, int] = field(default_factory=dict)
    preemptions: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent copy of the engine's state, taken between two steps."""

    model_id: str
    kv_format: str  # "4/3", or "f16" when nothing is compressed
    kv_backend: str  # "cpu-numpy", "mlx-ops", …
    model_dtype: str
    kv: KVBytes
    kv_budget_bytes: int
    kv_token_bytes: float  # one more token of a long conversation, all layers
    kv_token_raw_bytes: float
    max_context_tokens: int
    num_running: int
    num_waiting: int
    conversations: tuple[ConversationStats, ...] = ()  # the MAX_SHOWN_CONVERSATIONS largest
    layers_compressed: int = 0
    layers_uncompressed: int = 0
    details: Mapping[str, str] = field(default_factory=dict)  # codec, scale, calibration, BLAS, …
    num_conversations: Mapping[CacheTier, int] = field(default_factory=dict)
    kv_disk: KVBytes = KVBytes()  # what conversations on disk would take in memory, by kind
    kv_committed_bytes: int = 0  # held, or promised to running requests; never above the budget
    kv_scratch_bytes: int = 0  # the most that one step may allocate beside the budget
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    events: CacheEvents = CacheEvents()
    admission: AdmissionStats = AdmissionStats()
    integrity_failures: int = 0
    disk: DiskState = DiskState()


class Engine(Protocol):
    """The one owner of MLX. All methods are thread-safe and return at once."""

    @property
    def model_id(self) -> str: ...

    @property
    def created(self) -> int:
        """Unix seconds at which the model was loaded."""
        ...

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request. Raises OverloadedError when the queue is full, EngineUnavailableError when dead."""
        ...

    def cancel(self, request_id: str) -> None:
        """Free the request within one step; unknown ids are ignored. Ends with Failed(RequestCancelledError)."""
        ...

    def unready_reason(self) -> str | None:
        """None when a request submitted now would be worked on; otherwise why not."""
        ...

    def stats(self) -> EngineStats: ...

    # Sessions. `tenant` is the server's view of the caller: another caller's session is not found. The
    # futures are completed on the engine thread, with a TurboServeError where a method names one.

    def list_sessions(self, tenant: str, limit: int, after: str | None) -> Future[SessionPage]:
        """At most `limit` sessions following the one called `after`. SessionNotFoundError for an unknown `after`."""
        ...

    def get_session(self, tenant: str, session_id: str) -> Future[SessionInfo]:
        """SessionNotFoundError."""
        ...

    def fork_session(self, tenant: str, session_id: str, new_id: str | None) -> Future[SessionInfo]:
        """A new explicit session sharing all pages; None: an id of the engine's choice.

        SessionNotFoundError, SessionExistsError, QuotaExceededError, or OverloadedError without room.
        """
        ...

    def update_session(
        self, tenant: str, session_id: str, *, is_pinned: bool | None = None, ttl_s: float | None = None
    ) -> Future[SessionInfo]:
        """None leaves a value; a `ttl_s` of 0 takes the limit away. SessionNotFoundError, QuotaExceededError."""
        ...

    def delete_session(self, tenant: str, session_id: str) -> Future[None]:
        """Gives its memory and its file back. SessionNotFoundError, or SessionBusyError while a request runs in it."""
        ...


class EngineTelemetry(Protocol):
    """Counters the engine feeds; thread-safe, quick, never raising. Times are seconds."""

    def request_finished(self, reason: str, /) -> None: ...

    def request_failed(self, code: str, /) -> None:
        """A request that was being worked on ended with this error code."""
        ...

    def request_refused(self, reason: str, /) -> None:
        """A request was turned away with this error code before any work on it."""
        ...

    def request_cancelled(self, stage: str, /) -> None:
        """`stage` is `queued`, `prefill` or `decode`."""
        ...

    def observe_ttft(self, seconds: float, /) -> None: ...

    def observe_inter_token(self, seconds: float, /) -> None: ...

    def observe_queue_time(self, seconds: float, /) -> None: ...

    def observe_e2e(self, seconds: float, /) -> None: ...

    def add_prompt_tokens(self, num_tokens: int, num_cached: int, /) -> None:
        """`num_tokens` of a prompt in all, of which `num_cached` were not computed again."""
        ...

    def add_generation_tokens(self, num_tokens: int, /) -> None: ...


class NullTelemetry:
    """Counts nothing: the default where nobody asked for figures."""

    def request_finished(self, reason: str, /) -> None: ...

    def request_failed(self, code: str, /) -> None: ...

    def request_refused(self, reason: str, /) -> None: ...

    def request_cancelled(self, stage: str, /) -> None: ...

    def observe_ttft(self, seconds: float, /) -> None: ...

    def observe_inter_token(self, seconds: float, /) -> None: ...

    def observe_queue_time(self, seconds: float, /) -> None: ...

    def observe_e2e(self, seconds: float, /) -> None: ...

    def add_prompt_tokens(self, num_tokens: int, num_cached: int, /) -> None: ...

    def add_generation_tokens(self, num_tokens: int, /) -> None: ...
