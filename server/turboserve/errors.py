"""Every error a caller can meet, each with its HTTP status and OpenAI error fields.

TurboServeError
├── InvalidRequestError          400  invalid_request_error
│   ├── ContextLengthError       400  context_length_exceeded
│   ├── UnsupportedParameterError
│   │                            400  unsupported_parameter
│   ├── UnknownParameterError    400  unknown_parameter
│   ├── PreviousResponseError    400  previous_response_not_found
│   ├── KVFormatError            400  kv_format_not_supported
│   ├── SessionImportError       400  session_not_importable
│   └── ForeignHostError         400  host_not_allowed
├── AuthenticationError          401  invalid_api_key
├── ModelNotFoundError           404  model_not_found
├── RouteNotFoundError           404  not_found
├── SessionNotFoundError         404  session_not_found
├── ResponseNotFoundError        404  response_not_found
├── RequestNotFoundError         404  request_not_found
├── MethodNotAllowedError        405  method_not_allowed
├── SlowRequestError             408  request_timeout
├── SessionBusyError             409  session_busy
├── SessionExistsError           409  session_exists
├── BodyTooLargeError            413  request_too_large
├── MediaTypeError               415  unsupported_media_type
├── QuotaExceededError           429  quota_exceeded (with Retry-After)
├── HeadersTooLargeError         431  headers_too_large
├── RequestCancelledError        499  request_cancelled
├── EngineFailureError           500  engine_failure
└── OverloadedError              503  server_overloaded (with Retry-After)
    └── EngineUnavailableError   503  engine_unavailable
        └── ModelUnavailableError
                                 503  model_unavailable
StartupError                          printed as one line by the CLI, never over HTTP
"""

from __future__ import annotations

import re
from typing import Self

DEFAULT_RETRY_AFTER_S = 5  # OpenAI's client waits what we say, up to two minutes; short enough to feel alive


class TurboServeError(Exception):
    """Base of the tree. `message` is shown to the caller, as `told`, and must name the cure where there is one."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def wait_s(self) -> int | None:
        """What Retry-After says, in seconds; None: a reply with this error has no such header."""
        return (self.retry_after_s or DEFAULT_RETRY_AFTER_S) if self.status in (429, 503) else None

    @property
    def told(self) -> str:
        """The message as callers read it."""
        return self.message

    def envelope(self) -> dict[str, object]:
        """The body OpenAI clients expect."""
        return {"error": {"message": self.told, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(TurboServeError):
    """The request is malformed, or a value is out of range; `param` names it where there is one."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer can never fit, whatever else the server holds."""

    code = "context_length_exceeded"


class UnsupportedParameterError(InvalidRequestError):
    """A known parameter of OpenAI's API that this server does not implement."""

    code = "unsupported_parameter"


class UnknownParameterError(InvalidRequestError):
    """A parameter that no API has: a misspelling must not go unnoticed."""

    code = "unknown_parameter"


class PreviousResponseError(InvalidRequestError):
    """The response to continue is not kept, or is not complete."""

    code = "previous_response_not_found"


class KVFormatError(InvalidRequestError):
    """A format that this server, this model or an existing session cannot take."""

    code = "kv_format_not_supported"

    def __init__(self, message: str, *, param: str | None = "kv_format", retry_after_s: int | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class SessionImportError(InvalidRequestError):
    """An exported session that this server cannot take; `param` says what is wrong with it.

    `model`, `adapter`, `kv_format`, `layout` or `calibration`: of another kind than here. `file`: torn or altered.
    """

    code = "session_not_importable"

    @classmethod
    def broken(cls, why: str) -> Self:
        """Of a file that is torn, altered or none."""
        return cls(f"This is no whole exported session: {why[:300]}. Nothing was taken; export it again.", param="file")


class ForeignHostError(InvalidRequestError):
    """The Host header names a server that this is not."""

    code = "host_not_allowed"


class AuthenticationError(TurboServeError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFoundError(TurboServeError):
    """Another model than the served one was asked for; nothing is looked up."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFoundError(TurboServeError):
    """No route has this path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class SessionNotFoundError(TurboServeError):
    """Also for a session of another caller: that it exists is nobody else's business."""

    status = 404
    type = "invalid_request_error"
    code = "session_not_found"

    def __init__(self, session_id: str, *, param: str | None = "session_id") -> None:
        super().__init__(f"There is no session {session_id[:128]!r}; it may have expired.", param=param)


class ResponseNotFoundError(TurboServeError):
    """Also for a response of another caller."""

    status = 404
    type = "invalid_request_error"
    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"There is no response {response_id[:128]!r}; it may have expired, or was not stored.")


class RequestNotFoundError(TurboServeError):
    """Also for a request of another caller, and for one that has ended."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class MethodNotAllowedError(TurboServeError):
    """The path exists, with other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class SlowRequestError(TurboServeError):
    """Headers and body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class SessionBusyError(TurboServeError):
    """A request runs in the session, so that it cannot be deleted or forked now."""

    status = 409
    type = "invalid_request_error"
    code = "session_busy"


class SessionExistsError(TurboServeError):
    """The name for a new session is taken."""

    status = 409
    type = "invalid_request_error"
    code = "session_exists"


class QuotaExceededError(TurboServeError):
    """`param` names the setting that holds the quota."""

    status = 429
    type = "rate_limit_error"
    code = "quota_exceeded"


class BodyTooLargeError(TurboServeError):
    """The body passes the server's limit, declared or not."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class MediaTypeError(TurboServeError):
    """The body is not declared as uncompressed JSON in UTF-8."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadersTooLargeError(TurboServeError):
    """The headers pass the server's limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class RequestCancelledError(TurboServeError):
    """The caller took the request back, or left."""

    status = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class EngineFailureError(TurboServeError):
    """A bug, or a computation that failed; details are in the log only."""

    code = "engine_failure"


class OverloadedError(TurboServeError):
    """Queue or memory is full for now; `retry_after_s` says when to come back.

    So does the text that callers read, `told`, with the same number, which `message` leaves out.
    """

    status = 503
    type = "overloaded_error"
    code = "server_overloaded"

    @property
    def told(self) -> str:
        return f"{self.message.rstrip('.')}. Try again in {self.wait_s} second{'' if self.wait_s == 1 else 's'}."

    @classmethod
    def without_room(
        cls, *, needed_bytes: int, free_bytes: int, budget_bytes: int, retry_after_s: int | None = None
    ) -> Self:
        """KV memory is full for now; says with which figures."""
        return cls(
            f"No KV memory now: this request needs {needed_bytes:,} bytes, {free_bytes:,} of the server's "
            f"{budget_bytes:,} are free. A lower max_tokens needs less.",
            retry_after_s=retry_after_s,
        )


class EngineUnavailableError(OverloadedError):
    """The engine is loading, dead or shutting down."""

    code = "engine_unavailable"

    @classmethod
    def not_ready(cls, reason: str) -> Self:
        """No request is worked on now. `reason` is a clause without a full stop."""
        return cls(f"The engine is not ready: {reason}.")


class ModelUnavailableError(EngineUnavailableError):
    """One of several models cannot be loaded, or its process ended; the others are not affected."""

    code = "model_unavailable"


def without_advice(told: str) -> tuple[str, int | None]:
    """The message of what a caller was told, and the seconds after which to come back; None: it has no such advice."""
    found = re.search(r" Try again in (\d{1,6}) seconds?\.$", told)
    return (told[: found.start()], int(found[1])) if found else (told, None)


class StartupError(Exception):
    """The server cannot start; the message is one line that names the fix."""
