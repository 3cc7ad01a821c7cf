"""Turns an error into an HTTP response: the one place where status, envelope and headers meet."""

from __future__ import annotations

from starlette.responses import Response

from turboserve.api.kv_replies import Json
from turboserve.api.replies import dump
from turboserve.errors import EngineFailureError, TurboServeError

DEFAULT_RETRY_AFTER_S = 5  # OpenAI's client waits what we say, up to two minutes; short enough to feel alive
JSON_TYPE = "application/json"


def json_response(value: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status_code=status, headers=headers, media_type=JSON_TYPE)


def error_response(error: TurboServeError, headers: dict[str, str] | None = None) -> Response:
    """The envelope OpenAI clients expect, with Retry-After on 429 and 503 and the challenge on 401."""
    extra = dict(headers or {})
    if error.status in (429, 503):
        extra["Retry-After"] = str(error.retry_after_s or DEFAULT_RETRY_AFTER_S)
    if error.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return json_response(error.envelope(), error.status, extra)


def unexpected_failure(request_id: str) -> EngineFailureError:
    """What a caller is told about a bug of ours: where to look, and nothing else."""
    return EngineFailureError(f"Internal error; the server's log has details under {request_id}.")
