"""All text in what a request asks to be read: messages, functions, bare prompts, inputs.

Looks no further into it than its caller asks, since prompts may have megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from turboserve.messages import Embed, Request, TextQuestion, ToolUse

LONG_CHARS = 1 << 16  # takes some ten milliseconds to tokenise


def is_long(asked: Request | TextQuestion) -> bool:
    """Whether reading the prompt of this request or question takes more than moments."""
    if isinstance(asked, Embed):
        return _has_more(asked.inputs, LONG_CHARS)
    request = asked if isinstance(asked, Request) else getattr(asked, "request", None)
    return request is not None and _has_more((request.prompt, request.messages, request.tools), LONG_CHARS)


def beginning(value: object, num_chars: int) -> str | None:
    """The first characters of all text in nested values; None when there are fewer."""
    parts: list[str] = []
    left = num_chars
    for part in _parts_of(value):
        if isinstance(part, str):
            parts.append(part[:left])
            left -= len(part)
            if left <= 0:
                return "".join(parts)
    return None


def _has_more(value: object, num_chars: int) -> bool:
    """Whether there are more characters and token ids in nested values."""
    for part in _parts_of(value):
        num_chars -= len(part)
        if num_chars < 0:
            return True
    return False


def _parts_of(value: object) -> Iterator[str | tuple[int, ...]]:
    """Each text in nested values in its order, keys of mappings too, and each tuple of token ids."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str) or (isinstance(one, tuple) and one and isinstance(one[0], int)):
            yield one
        elif isinstance(one, Mapping):
            pending += [item for pair in reversed(list(one.items())) for item in reversed(pair)]
        elif isinstance(one, list | tuple):
            pending += reversed(one)
        elif isinstance(one, ToolUse):
            pending.append(one.functions)
