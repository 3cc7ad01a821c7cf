"""Reads one JSON object from a request body, within limits.

Checks the media type, the size as declared and as received, and that the text is strict JSON:
orjson refuses NaN, infinities, lone surrogates, invalid UTF-8, byte order marks and deep nesting.
Says nothing about what the object means; see `chat_request.py`.
"""

from __future__ import annotations

import orjson
from starlette.requests import Request

from turboserve.errors import BodyTooLargeError, InvalidRequestError, MediaTypeError

BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


async def read_json_object(request: Request, max_body_bytes: int, *, may_be_empty: bool = False) -> dict[str, object]:
    """The body as a dict. Raises MediaTypeError, BodyTooLargeError or InvalidRequestError.

    An empty body is {} where it `may_be_empty`; its media type is still asked for.

    Lets starlette's ClientDisconnect through when the client leaves before the body is complete.
    """
    check_media_type(request)
    body = await read_body(request, max_body_bytes)
    return {} if may_be_empty and not body else parse_object(body)


def check_media_type(request: Request) -> None:
    """Only `application/json` passes: a web page cannot send that to us without asking (CSRF)."""
    media_type, _, rest = request.headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise MediaTypeError("Send the body with the header 'Content-Type: application/json'.")
    charset = rest.lower().replace('"', "").replace(" ", "").partition("charset=")[2]
    if charset not in ("", "utf-8", "utf8"):
        raise MediaTypeError("Send the body as UTF-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("Send the body uncompressed: Content-Encoding is not supported.")


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLargeError as soon as the limit is known to be passed."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_body_bytes:
        raise _too_large(max_body_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_body_bytes:
            raise _too_large(max_body_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_body_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than the {max_body_bytes} bytes this server accepts.")


def parse_object(body: bytes) -> dict[str, object]:
    """The JSON object in these bytes. Raises InvalidRequestError, which gives a position and never quotes them."""
    if not body.strip():
        raise InvalidRequestError("The body is empty; send a JSON object.")
    if body.startswith(BOMS):
        raise InvalidRequestError("The body starts with a byte order mark; send plain UTF-8.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequestError(f"The body is not valid JSON: {exc}.") from exc
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    try:
        orjson.dumps(value)  # what cannot be written again overflows recursions behind us
    except orjson.JSONEncodeError as exc:
        raise InvalidRequestError("The body is nested too deeply: at most 250 levels.") from exc
    return value
