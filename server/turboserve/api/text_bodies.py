"""Bodies of the routes that turn text into tokens and back, in vLLM's spelling and in llama.cpp's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from turboserve.api.chat_body import FirstError, StrictModel
from turboserve.api.completion_body import MAX_PROMPT_TOKENS, PromptTokenId

ModelName = Annotated[str, Field(max_length=1024)]


class TokenizeBody(StrictModel):
    """A bare prompt; with `messages` the body is a chat completion's, and the tokens are those of its prompt.

    What is sent in `add_special_tokens` or `add_special` has to agree with how prompts are read here: tokens that
    the model's tokenizer puts before every text are always counted.
    """

    model: ModelName | None = None
    prompt: str | None = None
    content: Annotated[str | None, Field(description="The prompt as llama.cpp calls it.")] = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(StrictModel):
    """Token ids."""

    model: ModelName | None = None
    tokens: Annotated[list[PromptTokenId], FirstError(), Field(max_length=MAX_PROMPT_TOKENS)]
