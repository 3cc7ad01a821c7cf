"""The one place where whatever was raised becomes an answer: our errors, the framework's, and bugs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from turboserve.api.anthropic_errors import anthropic_envelope, anthropic_status, speaks_anthropic
from turboserve.api.replies import JSON_TYPE, dump, error_response
from turboserve.api.validation import complaint
from turboserve.errors import (
    EngineFailureError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    TurboServeError,
)

logger = logging.getLogger("turboserve.api")

# Registered with FastAPI; everything else is a bug and reaches the front door.
EXPECTED = (TurboServeError, HTTPException, RequestValidationError, ClientDisconnect)


async def answer_exception(request: Request, exc: Exception) -> Response:
    """The envelope for any exception: Anthropic's and Ollama's on their routes, else OpenAI's.

    A client that left while it was sending gets 499, which only the log and the metrics read. Of a bug the
    caller is told where to look, and nothing else; the log has its traceback.
    """
    match exc:
        case TurboServeError():
            return _written(exc, request)
        case ClientDisconnect():
            return Response(status_code=499)
        case HTTPException():
            return _written(_of_the_router(exc, request.method), request, exc.headers)
        case RequestValidationError():
            return _written(_of_the_query(exc, request), request)
    logger.error("unexpected failure", exc_info=exc)
    request_id = request.scope["state"]["request_id"]
    error = EngineFailureError(f"Internal error; the server's log has details under {request_id}.")
    return _written(error, request)


def speaks_ollama(path: str) -> bool:
    """Whether the routes at this path, known or not, are Ollama's."""
    return path.startswith("/api/")


def _written(error: TurboServeError, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    response, path = error_response(error, headers), request.scope["path"]
    if speaks_anthropic(path):
        body, status = anthropic_envelope(error, request.scope["state"]["request_id"]), anthropic_status(error)
    elif speaks_ollama(path):
        body, status = {"error": error.told}, error.status
    else:
        return response
    kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    return Response(dump(body), status, kept, JSON_TYPE)


def _of_the_router(exc: HTTPException, method: str) -> TurboServeError:
    if exc.status_code == 404:
        return RouteNotFoundError("There is no such route; GET / lists them.")
    if exc.status_code == 405:
        return MethodNotAllowedError(f"{method[:16]!a} is not allowed on this route.")
    return InvalidRequestError("The request could not be understood.")


def _of_the_query(exc: RequestValidationError, request: Request) -> TurboServeError:
    errors = [
        ErrorDetails(type=error["type"], loc=error["loc"][1:], msg=error["msg"], input=None)  # loc without "query"
        for error in exc.errors()
    ]
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")  # a misspelt name before a bad value
    return complaint(errors, request.query_params)
