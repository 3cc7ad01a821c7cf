"""What kinds of routes may raise beside what any route may; `openapi.failures` takes them."""

from __future__ import annotations

from turboserve.errors import (
    BodyTooLargeError,
    ContextLengthError,
    EngineUnavailableError,
    KVFormatError,
    MediaTypeError,
    ModelNotFoundError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
    SessionNotFoundError,
    UnknownParameterError,
    UnsupportedParameterError,
)

OF_A_BODY = (MediaTypeError, BodyTooLargeError, UnknownParameterError)
OF_THE_ENGINE = (OverloadedError, EngineUnavailableError)
OF_A_SESSION = (SessionNotFoundError, *OF_THE_ENGINE)
OF_A_QUESTION = (UnsupportedParameterError, ModelNotFoundError, *OF_A_BODY, *OF_THE_ENGINE)
OF_AN_ANSWER = (
    *OF_A_QUESTION,
    ContextLengthError,
    KVFormatError,
    QuotaExceededError,
    RequestCancelledError,
)
