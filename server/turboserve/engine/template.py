"""Chat messages to token ids through the model's own chat template.

The template runs in transformers' sandboxed Jinja environment. Owns the guard against control
tokens in message text; leaves validation of the messages' shape to the HTTP schema.

A control token's text ("<|im_end|>") inside a message must stay text, or a user could close
their turn and open a system one. Such occurrences are swapped for neutral placeholders before
the template is rendered and tokenised as ordinary text afterwards. Only tokens flagged as
special by the tokenizer are guarded: markup such as "<tool_call>" is part of what people and
models legitimately write.

A model without a template gets the plain form

    User: ...
    Assistant: ...
    Assistant:
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from turboserve.errors import InvalidRequestError

Message = Mapping[str, object]


class ChatTemplate:
    """Renders and tokenises conversations for one tokenizer; not thread-safe, since tokenizers are not."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper around a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._control = _control_pattern(tokenizer)

    def encode(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Token ids of the conversation up to where the assistant answers.

        Raises InvalidRequestError when the template refuses the messages or nothing remains.
        """
        guard = _Guard(self._control, messages, tools)
        plain_messages = [{**message, **guard.swap_fields(message)} for message in messages]
        plain_tools = [guard.swap(tool) for tool in tools]
        if self._tokenizer.has_chat_template:
            ids = self._encode_pieces(guard.split(self._render(plain_messages, plain_tools)), with_bos=False)
        else:
            ids = self._encode_pieces(guard.split(_plain_form(plain_messages)), with_bos=True)
        if not ids:
            raise InvalidRequestError("The prompt is empty.", param="messages")
        return ids

    def _render(self, messages: list[dict[str, object]], tools: list[Any]) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, tokenize=False
            )
        except Exception as exc:  # templates are programs: anything can come out of one
            reason = str(exc).strip() or type(exc).__name__
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {reason[:500]}", param="messages"
            ) from exc
        if not isinstance(rendered, str):
            raise InvalidRequestError("The model's chat template did not produce text.", param="messages")
        return rendered

    def _encode_pieces(self, pieces: list[tuple[str, bool]], *, with_bos: bool) -> list[int]:
        ids: list[int] = []
        for index, (text, is_literal) in enumerate(pieces):
            ids += self._tokenizer.encode(
                text, add_special_tokens=with_bos and index == 0, split_special_tokens=is_literal
            )
        return ids


class _Guard:
    """Swaps control-token texts for placeholders that no message contains, and back."""

    def __init__(self, control: re.Pattern[str] | None, messages: Sequence[Message], tools: Sequence[Message]) -> None:
        self._control = control
        self._literals: list[str] = []
        everything = repr((messages, tools))
        # Letters and digits only, so that no template filter or JSON escape changes them.
        self._mark = secrets.token_hex(8)
        while self._mark in everything:
            self._mark = secrets.token_hex(8)

    def swap_fields(self, message: Message) -> dict[str, object]:
        return {key: self.swap(value) for key, value in message.items() if key != "role"}

    def swap(self, value: Any) -> Any:
        """A copy of nested strings, lists and mappings without control-token texts."""
        if isinstance(value, str):
            return self._control.sub(self._placeholder, value) if self._control else value
        if isinstance(value, Mapping):
            return {key: self.swap(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.swap(item) for item in value]
        return value

    def _placeholder(self, match: re.Match[str]) -> str:
        self._literals.append(match.group())
        return f"{self._mark}x{len(self._literals) - 1}x"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Rendered text as (text, is a literal control-token text) pieces, in order."""
        pieces: list[tuple[str, bool]] = []
        for index, part in enumerate(re.split(rf"{self._mark}x(\d+)x", rendered)):
            text = self._literals[int(part)] if index % 2 else part
            if text:
                pieces.append((text, bool(index % 2)))
        return pieces


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((t for t in texts if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _plain_form(messages: Sequence[Message]) -> str:
    lines = [f"{str(m['role']).capitalize()}: {m.get('content') or ''}\n" for m in messages]
    return "".join(lines) + "Assistant:"
