"""Errors in the shape of Anthropic's API, for the routes that speak it.

Apart from the package `anthropic`, because the front door and the connection answer before any route is chosen.
"""

from __future__ import annotations

from typing import Literal

from turboserve.errors import (
    AuthenticationError,
    BodyTooLargeError,
    EngineUnavailableError,
    OverloadedError,
    QuotaExceededError,
    TurboServeError,
)

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "overloaded_error",
    "api_error",
]
OVERLOADED_STATUS = 529  # Anthropic's own; its clients tell it apart from a server that is down


def speaks_anthropic(path: str) -> bool:
    """Whether the routes at this path, known or not, are Anthropic's."""
    path = path.removeprefix("/v1")
    return path == "/messages" or path.startswith("/messages/")


def anthropic_status(error: TurboServeError | type[TurboServeError]) -> int:
    """The HTTP status of an error on these routes."""
    kind = error if isinstance(error, type) else type(error)
    is_down = issubclass(kind, EngineUnavailableError)
    return OVERLOADED_STATUS if issubclass(kind, OverloadedError) and not is_down else error.status


def anthropic_envelope(error: TurboServeError, request_id: str | None) -> dict[str, object]:
    """The body that Anthropic's clients expect. The message names the parameter, for which there is no field."""
    return {
        "type": "error",
        "error": {"type": _type(error), "message": error.told},
        "request_id": request_id,
    }


def _type(error: TurboServeError) -> ErrorType:
    match error:
        case AuthenticationError():
            return "authentication_error"
        case BodyTooLargeError():
            return "request_too_large"
        case QuotaExceededError():
            return "rate_limit_error"
        case EngineUnavailableError():
            return "api_error"
        case OverloadedError():
            return "overloaded_error"
    if error.status == 404:
        return "not_found_error"
    return "invalid_request_error" if error.status < 500 else "api_error"
