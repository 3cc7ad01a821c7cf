"""What HTTP knows of the engine: submit, cancel, readiness, statistics. No MLX in here.

The engine thread answers through an `EventSink`; each request ends with exactly one
`Finished` or `Failed`, after which nothing more is delivered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from turboserve.errors import TurboServeError

FinishReason = Literal["stop", "length"]
CacheTier = Literal["running", "idle"]


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
    """Token counts of one finished request, and its conversation's KV bytes."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    kv: KVBytes
    kv_format: str


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
    """One conversation held in memory. `conversation_id` is opaque and carries no text."""

    conversation_id: str
    tier: CacheTier
    kv: KVBytes
    hits: int
    idle_s: float


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
    conversations: tuple[ConversationStats, ...] = ()
    layers_compressed: int = 0
    layers_uncompressed: int = 0
    details: Mapping[str, str] = field(default_factory=dict)  # codec, scale, calibration, BLAS, …


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
