"""Reads one JSON object from a request body, within limits.

Checks the media type, the size as declared and as received, that the text is strict JSON (orjson refuses NaN,
infinities, lone surrogates, invalid UTF-8, byte order marks and deep nesting), and that there is not more in it than
can be looked at quickly. A call into orjson or pydantic keeps Python's lock until it returns, on whichever thread it
runs: so strings, lists and values are counted before they are made. Large bodies are worked on beside the event loop.
Says nothing about what the object means; see `chat_request.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

import orjson
from starlette.requests import Request

from turboserve.errors import BodyTooLargeError, InvalidRequestError, MediaTypeError

BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")

INLINE_BYTES = 64 * 1024  # takes about a millisecond; a thread is worth its while only for more
# What orjson makes of so many takes it some 20 ms. The longest agents' histories have a tenth of them.
MAX_STRINGS = 100_000  # keys count as well
MAX_CONTAINERS = 30_000
MAX_VALUES = 500_000  # a prompt may be token ids
MAX_MEMBERS = 4096  # of one object: each that is unknown or wrong becomes an error of pydantic's
MAX_DEPTH = 250  # deeper, orjson cannot write it again

T = TypeVar("T")

_readers = ThreadPoolExecutor(1, thread_name_prefix="bodies")  # one: of several, all would want the same lock


async def read_json_object(request: Request, max_body_bytes: int, *, may_be_empty: bool = False) -> dict[str, object]:
    """The body as a dict. Raises MediaTypeError, BodyTooLargeError or InvalidRequestError.

    An empty body is {} where it `may_be_empty`; its media type is still asked for.

    Lets starlette's ClientDisconnect through when the client leaves before the body is complete.
    """
    return await read_as(request, max_body_bytes, lambda value: value, may_be_empty=may_be_empty)


async def read_as(
    request: Request, max_body_bytes: int, make: Callable[[dict[str, object]], T], *, may_be_empty: bool = False
) -> T:
    """What `make` makes of the body, on a thread if that may take long. Raises what it raises, and as above."""
    check_media_type(request)
    body = await read_body(request, max_body_bytes)
    return await beside_the_loop(len(body), lambda: make({} if may_be_empty and not body else parse_object(body)))


async def beside_the_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """The result of work on so many bytes, of which there is one at a time; of few bytes, at once."""
    if num_bytes <= INLINE_BYTES:
        return work()
    context = copy_context()  # the request's id in the log
    return await asyncio.get_running_loop().run_in_executor(_readers, lambda: context.run(work))


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
    check_counts(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        _check_is_utf8(body)
        raise InvalidRequestError(f"The body is not valid JSON: {exc}.") from exc
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    _check_shape(value)
    return value


def _check_is_utf8(body: bytes) -> None:
    """Raises InvalidRequestError: of any such body orjson says that its first character is a wrong surrogate."""
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequestError(
            f"The body is not valid UTF-8: the byte at position {exc.start} is no part of a character. "
            "JSON is sent as UTF-8, not as Latin-1 or UTF-16."
        ) from None


def check_counts(body: bytes) -> None:
    """Raises InvalidRequestError for JSON with more strings, containers or values than are looked at.

    What stands inside strings counts only where a count of the whole body's characters leaves a doubt.
    """
    if not _are_too_many(body.count(b'"') // 2, body.count(b"[") + body.count(b"{"), body.count(b",")):
        return
    num_strings = num_containers = num_values = place = 0
    while place < len(body):
        begin = body.find(b'"', place)
        begin = len(body) if begin < 0 else begin
        num_containers += body.count(b"[", place, begin) + body.count(b"{", place, begin)
        num_values += body.count(b",", place, begin)
        num_strings += begin < len(body)
        if _are_too_many(num_strings, num_containers, num_values):
            raise InvalidRequestError(
                f"The body has too many parts: at most {MAX_STRINGS:,} strings, {MAX_CONTAINERS:,} objects and lists, "
                f"and {MAX_VALUES:,} values are taken."
            )
        place = _string_end(body, begin)


def _are_too_many(num_strings: int, num_containers: int, num_values: int) -> bool:
    return num_strings > MAX_STRINGS or num_containers > MAX_CONTAINERS or num_values > MAX_VALUES


def _string_end(body: bytes, begin: int) -> int:
    """The place behind a string's closing quote, which an odd number of backslashes before it makes a part of it."""
    place = begin
    while (place := body.find(b'"', place + 1)) >= 0:
        first = place
        while body[first - 1] == 0x5C:  # a backslash
            first -= 1
        if (place - first) % 2 == 0:
            return place + 1
    return len(body)


def _check_shape(value: dict[str, object]) -> None:
    """Raises InvalidRequestError for objects with too many members and for deep nesting."""
    level: list[dict[str, object] | list[object]] = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(container, dict) and len(container) > MAX_MEMBERS for container in level):
            raise InvalidRequestError(f"An object in the body has more than {MAX_MEMBERS:,} members.")
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise InvalidRequestError(f"The body is nested too deeply: at most {MAX_DEPTH} levels.")
