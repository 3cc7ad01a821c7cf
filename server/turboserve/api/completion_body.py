"""The body of `POST /v1/completions`: a bare prompt that is continued, without any chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from turboserve.api.body import MAX_VALUES
from turboserve.api.chat_body import INT32_MAX, MAX_CHOICES, FirstError, SamplingBody

MAX_PROMPTS = 128
MAX_LOGPROBS = 5  # OpenAI's limit on this route
MAX_PROMPT_TOKENS = MAX_VALUES - 10_000  # what else a body has is among its values as well

PromptTokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[PromptTokenId], FirstError(), Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]


class CompletionBody(SamplingBody):
    """One prompt or several, as text or as token ids; each gets `n` answers, the i-th one's j-th at index i*n+j."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], FirstError(), Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], FirstError(), Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: Annotated[
        str | None, Field(description="Text behind the answer, for models with tokens for filling in the middle.")
    ] = None
    echo: Annotated[bool | None, Field(description="The prompt's text is put before each answer.")] = None
    logprobs: Annotated[
        int | None, Field(ge=0, le=MAX_LOGPROBS, description="Likeliest tokens beside each drawn one.")
    ] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="Only equal to `n`.")] = None


def texts_or_ids(value: str | Sequence[int | str | Sequence[int]]) -> tuple[str | tuple[int, ...], ...]:
    """The prompts or inputs of a body, each a text or token ids."""
    if isinstance(value, str):
        return (value,)
    ids = tuple(item for item in value if isinstance(item, int))
    if ids:
        return (ids,)
    return tuple(item if isinstance(item, str) else tuple(item) for item in value if not isinstance(item, int))
