"""What `/openapi.json` and `/docs` say: FastAPI's document, and what it cannot see from the routes' signatures.

That is: bodies, which `body.py` reads strictly; the errors of every route; keys; and what a stream consists of.
Routes use `failures`, `json_body` and `stream_or_whole`; `ApiDescription` puts the document together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import copy
from functools import cached_property
from typing import Any, Literal

import orjson
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from turboserve import __version__
from turboserve.api.anthropic_errors import OVERLOADED_STATUS, anthropic_status, speaks_anthropic
from turboserve.api.chat_body import ChatBody
from turboserve.api.docs_page import docs_page
from turboserve.api.exception_replies import speaks_ollama
from turboserve.api.frontdoor import OPEN_PATHS
from turboserve.api.parameters import IGNORED_HEADER, undeclared_properties
from turboserve.api.reply_models import AnthropicError, ChatCompletionChunk, ErrorEnvelope
from turboserve.api.session_request import SESSION_HEADER, SESSION_ID, EmptyBody, ForkBody, UpdateBody
from turboserve.errors import (
    AuthenticationError,
    EngineFailureError,
    ForeignHostError,
    HeadersTooLargeError,
    InvalidRequestError,
    SlowRequestError,
    TurboServeError,
)

DESCRIPTION = "OpenAI's chat completions over compressed KV caches; docs/api.md has the words to these figures."
REF = "#/components/schemas/{model}"
EVENTS_TYPE = "text/event-stream"
BODIES = (ChatBody, ForkBody, UpdateBody, EmptyBody)

# What the front door, the connection or a bug of ours may answer, whatever the route.
EVERYWHERE: tuple[type[TurboServeError], ...] = (
    InvalidRequestError,
    ForeignHostError,
    SlowRequestError,
    HeadersTooLargeError,
    EngineFailureError,
)

Json = dict[str, Any]
Shape = tuple[type[BaseModel], Literal["validation", "serialization"]]

HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}},
    429: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    OVERLOADED_STATUS: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
}


def failures(*errors: type[TurboServeError], shape: type[BaseModel] = ErrorEnvelope) -> dict[int | str, Json]:
    """`responses` of a route that raises these errors beside those that any route can give; `shape`: as it writes them.

    `exception_replies.py` writes them so.
    """
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    for error in (*EVERYWHERE, *errors):
        by_status[error.status].append(f"`{error.code}`")
    return {
        status: {"model": shape, "description": ", ".join(codes), "headers": HEADERS.get(status, {})}
        for status, codes in sorted(by_status.items())
    }


def anthropic_failures(*errors: type[TurboServeError]) -> dict[int | str, Json]:
    """The same for a route that speaks Anthropic's API: its own envelope, and 529 for an overload."""
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    for error in (*EVERYWHERE, *errors):
        by_status[anthropic_status(error)].append(error.__name__.removesuffix("Error"))
    return {
        status: {"model": AnthropicError, "description": ", ".join(names), "headers": HEADERS.get(status, {})}
        for status, names in sorted(by_status.items())
    }


def json_body(model: type[BaseModel], *, may_be_empty: bool = False) -> Json:
    """`openapi_extra` of a route whose body `body.py` reads and `validation.py` holds to a model.

    That is one of BODIES, or of the `shapes` that the application hands to `ApiDescription`.
    """
    schema = {"$ref": REF.format(model=model.__name__)}
    return {"requestBody": {"required": not may_be_empty, "content": {"application/json": {"schema": schema}}}}


SESSION_PARAMETER: Json = {
    "name": SESSION_HEADER.title(),
    "in": "header",
    "description": "Names the conversation, as session_id in the body does; both only if equal.",
    "schema": {"type": "string", "pattern": f"^{SESSION_ID.pattern}$"},
}


def event_stream(event: type[BaseModel], words: str, *, ends_with_done: bool = False) -> Json:
    """The content of a reply that is server-sent events whose data have this shape, but a last `[DONE]`.

    Before OpenAPI 3.2 the schema of such a media type is the one of an event, as its reader has it.
    """
    schema = {"$ref": REF.format(model=event.__name__)}
    data: Json = {"type": "string"}
    if not ends_with_done:  # which is no JSON
        data |= {"contentMediaType": "application/json", "contentSchema": schema}
    fields = {"event": {"type": "string"}, "data": data}
    sent = {"type": "object", "description": words, "properties": fields, "required": ["data"]}
    return {EVENTS_TYPE: {"schema": sent, "x-event-schema": schema}}


def line_stream(line: type[BaseModel], media_type: str, words: str) -> Json:
    """The same of a reply that is lines of this shape."""
    schema = {"$ref": REF.format(model=line.__name__)}
    return {media_type: {"schema": {"type": "string", "description": words}, "x-event-schema": schema}}


def stream_or_whole(stream: Json) -> Json:
    """What a route answers that streams where the body says so; its whole reply is its response model."""
    return {"description": "The answer: whole, or as a stream when the body says stream.", "content": stream}


STREAM_OR_WHOLE: Json = {
    **stream_or_whole(
        event_stream(
            ChatCompletionChunk,
            "Events `data: {...}`, each a ChatCompletionChunk, then `data: [DONE]`. An error after the first byte is "
            "the last event instead, an ErrorEnvelope. Comment lines bridge silence.",
            ends_with_done=True,
        )
    ),
    "headers": {
        IGNORED_HEADER: {
            "schema": {"type": "string"},
            "required": False,
            "description": "Parameters of the body that had no say, separated by commas.",
        }
    },
}


class ApiDescription:
    """What one application says of its routes, made when it is first asked for."""

    def __init__(self, routes: Iterable[BaseRoute], *, needs_key: bool, shapes: Iterable[Shape] = ()) -> None:
        """`shapes`: bodies and stream events beside those of chat completions and sessions."""
        self._routes, self._needs_key, self._shapes = tuple(routes), needs_key, tuple(shapes)

    @cached_property
    def document(self) -> Json:
        """OpenAPI 3.1, as a dict that nobody changes."""
        routes = list(_one_method_each(self._routes))
        document = get_openapi(title="TurboServe", version=__version__, description=DESCRIPTION, routes=routes)
        components: Json = document.setdefault("components", {})
        components["schemas"] = _schemas(components.get("schemas", {}), self._shapes)
        if self._needs_key:
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; `failures` says what a bad query gets
                if self._needs_key and path not in OPEN_PATHS:
                    _ask_for_key(operation, _error_name(path))
        return document

    @cached_property
    def json(self) -> bytes:
        """The body of `/openapi.json`."""
        return orjson.dumps(self.document)

    @cached_property
    def page(self) -> str:
        """The HTML of `/docs`."""
        return docs_page(self.document)


def _one_method_each(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    """Copies of the routes, because FastAPI would give all methods of one route the same operation id."""
    for route in routes:
        if isinstance(route, APIRoute):
            for method in sorted(route.methods or ()):
                one = copy(route)
                one.methods = {method}
                one.unique_id = route.name + ("_head" if method == "HEAD" else "")
                yield one


def _schemas(replies: Json, shapes: Iterable[Shape]) -> Json:
    """Shapes of replies, as FastAPI collected them, with those of bodies and stream events."""
    models = [*((model, "validation") for model in BODIES), (ChatCompletionChunk, "serialization"), *shapes]
    _, definitions = models_json_schema(models, ref_template=REF)  # type: ignore[arg-type]  # it wants literals
    schemas = {**replies, **definitions["$defs"]}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas[ChatBody.__name__]["properties"] |= undeclared_properties()
    return dict(sorted(schemas.items()))


def _error_name(path: str) -> str:
    """Of the shape in which the routes at this path write errors."""
    if speaks_ollama(path):
        return "OllamaError"
    return (AnthropicError if speaks_anthropic(path) else ErrorEnvelope).__name__


def _ask_for_key(operation: Json, error_name: str) -> None:
    status = AuthenticationError.status
    envelope = {"schema": {"$ref": REF.format(model=error_name)}}
    operation["security"] = [{"key": []}, {"header": []}]
    operation["responses"][str(status)] = {
        "description": f"`{AuthenticationError.code}`",
        "headers": HEADERS[status],
        "content": {"application/json": envelope},
    }
