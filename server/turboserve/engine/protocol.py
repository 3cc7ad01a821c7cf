"""The engine's door, as HTTP knows it: submit, cancel, session commands, readiness, statistics. No MLX in here.

What goes through it is in `turboserve.messages`. The engine thread answers through an `EventSink`; each
request ends with exactly one `Finished` or `Failed`, after which nothing more is delivered.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol, overload

from turboserve.messages import (
    CheckImport,
    DeleteSession,
    EngineStats,
    Event,
    ExportedSession,
    ExportSession,
    ForkSession,
    GetSession,
    GetSessionTree,
    ImportSession,
    ListSessions,
    Request,
    SamplingParams,
    SessionInfo,
    SessionPage,
    SessionTree,
    TextQuestion,
    UpdateSession,
)


class EventSink(Protocol):
    """Receives events on the engine thread; must return at once and never raise."""

    def put(self, event: Event) -> None:
        """Take the request's next event; a Finished or Failed is its last."""
        ...


class Engine(Protocol):
    """The one owner of MLX. All methods are thread-safe and return at once."""

    @property
    def model_id(self) -> str:
        """The name under which clients ask for the model."""
        ...

    @property
    def created(self) -> int:
        """Unix seconds at which the model was loaded."""
        ...

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What applies where a request says nothing: the model's own `generation_config.json`, else OpenAI's."""
        ...

    def submit(self, request: Request, sink: EventSink) -> None:
        """Queue a request. Raises OverloadedError when the queue is full, EngineUnavailableError when dead."""
        ...

    def cancel(self, request_id: str) -> None:
        """Free the request within one step; unknown ids are ignored. Ends with Failed(RequestCancelledError)."""
        ...

    def unready_reason(self) -> str | None:
        """None when a request submitted now would be worked on; otherwise why not."""
        ...

    def stats(self) -> EngineStats:
        """The latest copy of the engine's state; at most a fraction of a second old."""
        ...

    @overload
    def session(self, command: ListSessions) -> Future[SessionPage]: ...
    @overload
    def session(self, command: GetSession | ForkSession | UpdateSession) -> Future[SessionInfo]: ...
    @overload
    def session(self, command: GetSessionTree) -> Future[SessionTree]: ...
    @overload
    def session(self, command: ExportSession) -> Future[ExportedSession]: ...
    @overload
    def session(self, command: ImportSession) -> Future[SessionInfo]: ...
    @overload
    def session(self, command: DeleteSession | CheckImport) -> Future[None]:
        """Done on the engine thread between two steps. Another caller's session is not found.

        The future's exception is a TurboServeError: SessionNotFoundError (of ListSessions: for an unknown
        `after`), SessionExistsError and OverloadedError (ForkSession, without room), QuotaExceededError (ForkSession,
        UpdateSession), SessionBusyError (DeleteSession; ForkSession, ExportSession while its first prompt is read),
        SessionImportError, KVFormatError, SessionExistsError (CheckImport, ImportSession), or EngineUnavailableError
        before the engine is ready and after its end.
        """
        ...

    def ask(self, question: TextQuestion) -> Future[Any]:
        """Answered on the engine thread between two steps; with what, the question's docstring says.

        The future's exception is a TurboServeError: InvalidRequestError, or EngineUnavailableError as of `session`.
        """
        ...


class EngineTelemetry(Protocol):
    """Counters the engine feeds; thread-safe, quick, never raising. Times are seconds."""

    def request_finished(self, reason: str, /) -> None:
        """A request was answered in full; `reason` is `stop`, `length` or `tool_calls`."""
        ...

    def request_failed(self, code: str, /) -> None:
        """A request that was being worked on ended with this error code."""
        ...

    def request_refused(self, reason: str, /) -> None:
        """A request was turned away before any work: `queue_full`, `not_ready`, or the code of the error it got."""
        ...

    def request_cancelled(self, stage: str, /) -> None:
        """`stage` is `queued`, `prefill` or `decode`."""
        ...

    def observe_ttft(self, seconds: float, /) -> None:
        """Arrival of a request to its first token."""
        ...

    def observe_inter_token(self, seconds: float, num_requests: int, /) -> None:
        """Time between two tokens, of so many requests."""
        ...

    def observe_queue_time(self, seconds: float, /) -> None:
        """Arrival of a request to the start of its prefill."""
        ...

    def observe_e2e(self, seconds: float, /) -> None:
        """Arrival of a request to its last token."""
        ...

    def add_prompt_tokens(self, num_tokens: int, num_cached: int, /) -> None:
        """`num_tokens` of a prompt in all, of which `num_cached` were not computed again."""
        ...

    def add_generation_tokens(self, num_tokens: int, /) -> None:
        """That many tokens were generated."""
        ...

    def add_draft_tokens(self, num_drafted: int, num_accepted: int, /) -> None:
        """That many tokens were guessed ahead, of which so many were right."""
        ...


class NullTelemetry:
    """Counts nothing: the default where nobody asked for figures."""

    def request_finished(self, reason: str, /) -> None: ...

    def request_failed(self, code: str, /) -> None: ...

    def request_refused(self, reason: str, /) -> None: ...

    def request_cancelled(self, stage: str, /) -> None: ...

    def observe_ttft(self, seconds: float, /) -> None: ...

    def observe_inter_token(self, seconds: float, num_requests: int, /) -> None: ...

    def observe_queue_time(self, seconds: float, /) -> None: ...

    def observe_e2e(self, seconds: float, /) -> None: ...

    def add_prompt_tokens(self, num_tokens: int, num_cached: int, /) -> None: ...

    def add_generation_tokens(self, num_tokens: int, /) -> None: ...

    def add_draft_tokens(self, num_drafted: int, num_accepted: int, /) -> None: ...
