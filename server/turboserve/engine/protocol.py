"""What HTTP knows of the engine: submit, cancel, sessions, readiness, statistics. No MLX in here.

The engine thread answers through an `EventSink`; each request ends with exactly one
`Finished` or `Failed`, after which nothing more is delivered.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from turboquant_kv.kv_bytes import KVBytes
from turboserve.messages import (
    MAX_SHOWN_CONVERSATIONS,
    AdmissionStats,
    CacheEvents,
    CacheTier,
    ConversationStats,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    SamplingParams,
    SessionInfo,
    SessionPage,
    TextDelta,
    Usage,
)
from turboserve.messages import DiskStatus as DiskState
from turboserve.messages import Request as GenerationRequest

__all__ = [
    "MAX_SHOWN_CONVERSATIONS",
    "AdmissionStats",
    "CacheEvents",
    "CacheTier",
    "ConversationStats",
    "DiskState",
    "Engine",
    "EngineStats",
    "EngineTelemetry",
    "Event",
    "EventSink",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "KVBytes",
    "NullTelemetry",
    "SamplingParams",
    "SessionInfo",
    "SessionPage",
    "TextDelta",
    "Usage",
]


class EventSink(Protocol):
    """Receives events on the engine thread; must return at once and never raise."""

    def put(self, event: Event) -> None: ...


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
