"""Bodies and queries against their pydantic models; pydantic's complaints become our errors, naming the parameter.

Messages never quote what was sent: it may be a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from turboserve.api.chat_body import MAX_STOP_CHARS
from turboserve.errors import InvalidRequestError, UnknownParameterError

Body = TypeVar("Body", bound=BaseModel)

QUOTE = "'"
CONSTRAINTS = ("guided_", "structured_outputs.")  # where empty may have been meant as "none"


def validated(model: type[Body], body: Mapping[str, object], *, is_strict: bool = False) -> Body:
    """The body as a model. Raises InvalidRequestError or UnknownParameterError, naming the parameter.

    With `is_strict` an open model takes no unknown field, at any depth, and no 1.0 for an integer.
    """
    try:
        return model.model_validate(body, extra="forbid" if is_strict else None, context={"is_strict": is_strict})
    except ValidationError as exc:
        # pydantic's text quotes the input; `from None` keeps prompts out of tracebacks.
        errors = exc.errors(include_url=False, include_input=False)
        raise complaint(errors, body) from None


def json_text(value: object, param: str) -> str:
    """A part of a body as JSON again. Raises InvalidRequestError for what was read, but is too deep to be written."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise InvalidRequestError(f"{param}: nested too deeply.", param=param) from None


def complaint(errors: Sequence[ErrorDetails], body: Mapping[str, object]) -> InvalidRequestError:
    """The first error; for a union such as `content`, of the branch that got furthest into the value.

    That is one that only found too many or too few items; the others found the first item wrong.
    """
    same_field = [(error, json_path(error, body)) for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return _explain(*max(same_field, key=lambda pair: (pair[0]["type"] in ("too_long", "too_short"), len(pair[1]))))


def _explain(error: ErrorDetails, path: tuple[int | str, ...]) -> InvalidRequestError:
    param = path_text(path)
    if error["type"] == "extra_forbidden":
        return UnknownParameterError(f"Unknown parameter: {param}.", param=param)
    if error["type"] == "missing":
        return InvalidRequestError(f"Missing required parameter: {param}.", param=param)
    if error["type"].startswith("union_tag"):
        return _of_a_tag(error, param)
    if error["type"] in ("too_short", "string_too_short"):  # no list and no text has to be longer than 1
        return InvalidRequestError(f"{param}: {_instead_of_empty(param)}.", param=param)
    if param.startswith("messages[") and param.endswith("].type"):
        return InvalidRequestError(f"{param}: only text content is supported.", param=param)
    if param.startswith("tool") and param.endswith(".type"):
        return InvalidRequestError(f"{param}: only functions are supported.", param=param)
    return InvalidRequestError(f"{param}: {error['msg']}.", param=param)


def _of_a_tag(error: ErrorDetails, param: str) -> InvalidRequestError:
    """A role or type that is missing or unknown. pydantic's text would quote what was sent."""
    context = error["ctx"]
    param = f"{param}.{context['discriminator'].strip(QUOTE)}"
    if "expected_tags" not in context:
        return InvalidRequestError(f"Missing required parameter: {param}.", param=param)
    return InvalidRequestError(f"{param}: expected {context['expected_tags']}.", param=param)


def _instead_of_empty(param: str) -> str:
    if param == "messages":
        return 'send at least one, such as {"role": "user", "content": "Hello"}'
    if param.startswith(CONSTRAINTS) and param.endswith("]"):
        return f"must not be empty; a choice is a text of 1 to {MAX_STOP_CHARS} characters"
    if param.startswith(CONSTRAINTS):
        return "must not be empty; leave it out, or send null, for any text"
    return "must not be empty"


def json_path(error: ErrorDetails, body: Mapping[str, object]) -> tuple[int | str, ...]:
    """The error's place in the caller's JSON, without the union branches that pydantic puts in between."""
    path: list[int | str] = []
    value: object = body
    for depth, part in enumerate(error["loc"], start=1):
        if _holds(value, part):
            value = value[part]  # type: ignore[index]
        elif not (error["type"] == "missing" and depth == len(error["loc"])):
            continue
        path.append(part)
    return tuple(path)


def _holds(value: object, part: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, Mapping) and part in value


def path_text(path: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`, at most 200 characters."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]
