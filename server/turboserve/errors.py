"""Every error a caller can meet, each with its HTTP status and OpenAI error fields.

TurboServeError
├── InvalidRequestError          400  invalid_request_error
│   ├── ContextLengthError       400  context_length_exceeded
│   ├── UnsupportedParameterError
│   │                            400  unsupported_parameter
│   ├── UnknownParameterError    400  unknown_parameter
│   ├── KVFormatError            400  kv_format_not_supported
│   └── ForeignHostError         400  host_not_allowed
├── AuthenticationError          401  invalid_api_key
├── ModelNotFoundError           404  model_not_found
├── RouteNotFoundError           404  not_found
├── SessionNotFoundError         404  session_not_found
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
StartupError                          printed as one line by the CLI, never over HTTP
"""

from __future__ import annotations

from typing import Self


class TurboServeError(Exception):
    """Base of the tree. `message` is shown to the caller and must name the cure where there is one."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, object]:
        """The body OpenAI clients expect."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(TurboServeError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class UnknownParameterError(InvalidRequestError):
    code = "unknown_parameter"


class KVFormatError(InvalidRequestError):
    """A format that this server, this model or an existing session cannot take."""

    code = "kv_format_not_supported"

    def __init__(self, message: str, *, param: str | None = "kv_format", retry_after_s: int | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class ForeignHostError(InvalidRequestError):
    code = "host_not_allowed"


class AuthenticationError(TurboServeError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFoundError(TurboServeError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFoundError(TurboServeError):
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


class MethodNotAllowedError(TurboServeError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class SlowRequestError(TurboServeError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class SessionBusyError(TurboServeError):
    status = 409
    type = "invalid_request_error"
    code = "session_busy"


class SessionExistsError(TurboServeError):
    status = 409
    type = "invalid_request_error"
    code = "session_exists"


class QuotaExceededError(TurboServeError):
    """`param` names the setting that holds the quota."""

    status = 429
    type = "rate_limit_error"
    code = "quota_exceeded"


class BodyTooLargeError(TurboServeError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class MediaTypeError(TurboServeError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadersTooLargeError(TurboServeError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class RequestCancelledError(TurboServeError):
    status = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class EngineFailureError(TurboServeError):
    code = "engine_failure"


class OverloadedError(TurboServeError):
    status = 503
    type = "overloaded_error"
    code = "server_overloaded"

    @classmethod
    def without_room(
        cls, *, needed_bytes: int, free_bytes: int, budget_bytes: int, retry_after_s: int | None = None
    ) -> Self:
        """KV memory is full for now; says with which figures."""
        return cls(
            f"No KV memory now: this request needs {needed_bytes:,} bytes, {free_bytes:,} of the server's "
            f"{budget_bytes:,} are free. Try again later, or lower max_tokens.",
            retry_after_s=retry_after_s,
        )


class EngineUnavailableError(OverloadedError):
    code = "engine_unavailable"


class StartupError(Exception):
    """The server cannot start; the message is one line that names the fix."""
