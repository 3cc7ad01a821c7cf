"""What callers say about sessions: names, formats, pages of a list, and the bodies of the session routes.

Owns the grammar of session ids and KV formats as they arrive; whether a session exists or a model can take
a format is the engine's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from turboquant_kv.codec.format_name import FORMAT_NAMES, UnsupportedFormatError, parse_format_name
from turboserve.api.chat_body import StrictModel
from turboserve.errors import InvalidRequestError, KVFormatError, SessionNotFoundError

SESSION_HEADER = "x-session-id"
# Fits into a path segment, a header and a log line without any quoting.
SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}", re.ASCII)
SESSION_ID_RULE = "1 to 128 of A-Z a-z 0-9 . _ : @ -, beginning with a letter or digit"
DEFAULT_PAGE, MAX_PAGE = 20, 100
MAX_TTL_S = 10 * 366 * 86_400.0  # ten years: beyond it somebody meant milliseconds


class ForkBody(StrictModel):
    """The body of `POST /v1/sessions/{id}/fork`: the new name; null or absent lets the server choose one."""

    id: str | None = None


class UpdateBody(StrictModel):
    """The body of `POST /v1/sessions/{id}`: null or absent leaves a value, a `ttl_s` of 0 takes the limit away."""

    pinned: bool | None = None
    ttl_s: Annotated[float, Field(ge=0, le=MAX_TTL_S)] | None = None


class EmptyBody(StrictModel):
    """The body of `POST /v1/sessions/{id}/pin` and `/unpin`: an object without fields."""


def _page_limit(value: object) -> object:
    """pydantic would also read `1_0`, ` 1` and `1.0` as numbers."""
    if isinstance(value, str) and not (re.fullmatch(r"[0-9]{1,4}", value, re.ASCII) and 1 <= int(value) <= MAX_PAGE):
        raise PydanticCustomError("page_limit", f"expected 1 to {MAX_PAGE}")
    return value


def _cursor(value: object) -> object:
    if isinstance(value, str) and not SESSION_ID.fullmatch(value):
        raise PydanticCustomError("session_id", f"expected {SESSION_ID_RULE}")
    return value


class PageQuery(BaseModel):
    """The query of `GET /v1/sessions`: how many, and which one they follow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), BeforeValidator(_page_limit)] = DEFAULT_PAGE
    after: Annotated[str, Field(pattern=f"^{SESSION_ID.pattern}$"), BeforeValidator(_cursor)] | None = None


def check_session_id(value: str, param: str = "session_id") -> str:
    """The id itself. Raises InvalidRequestError, which does not repeat it."""
    if not SESSION_ID.fullmatch(value):
        raise InvalidRequestError(f"{param}: expected {SESSION_ID_RULE}.", param=param)
    return value


def existing_session_id(value: str) -> str:
    """An id from a path. Raises SessionNotFoundError for one that no session can have."""
    if not SESSION_ID.fullmatch(value):
        raise SessionNotFoundError(value)
    return value


def chosen_session(body_value: str | None, header_values: Iterable[str]) -> str | None:
    """The one session that body and X-Session-Id name, None when neither does. Raises InvalidRequestError."""
    given = {*header_values, *([body_value] if body_value is not None else [])}
    if len(given) > 1:
        raise InvalidRequestError("session_id and X-Session-Id differ; give one of them.", param="session_id")
    return check_session_id(given.pop()) if given else None


def normal_kv_format(value: str | None) -> str | None:
    """The format's one spelling, None when none was given. Raises KVFormatError, which does not repeat it."""
    try:
        return None if value is None else parse_format_name(value)
    except UnsupportedFormatError:
        raise KVFormatError(f"kv_format: expected {FORMAT_NAMES}.") from None
