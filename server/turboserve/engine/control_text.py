"""Keeps control text in what callers write from becoming control tokens.

A marker's text ("<|im_end|>", "<tool_response>") inside a message must stay text, or a user could close
their turn and open a system one, or forge a function's result. Such occurrences are swapped for neutral placeholders
before the template is rendered, and tokenised as ordinary text afterwards. Guarded are all special tokens, and added
tokens that the template or the answer's parser treats as markup, special or not.

What an assistant wrote earlier may hold the markers of its reasoning, which templates look for; nothing else in it is
markup: calls come as `tool_calls`, and their markers from the template.

A marker that is no token of its own, but several, looks the same whoever wrote it; no tokeniser can tell them apart.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turboserve.engine.tools.markup import Markup

Message = Mapping[str, object]


class ControlTexts:
    """Of one tokenizer."""

    def __init__(self, markup: Markup) -> None:
        thinking = (markup.think_start, markup.think_end)
        self._strict = _pattern(markup.control)
        self._lenient = _pattern(text for text in markup.control if text not in thinking)
        self._special = markup.special
        self._literal_ids: dict[tuple[str, bool], list[int]] = {}  # a model has few control texts

    def guard(self, *everything: object) -> Guard:
        """For one prompt, made of `everything`."""
        return Guard(self._strict, self._lenient, everything)

    def encode_literal(self, tokenizer: Any, text: str, *, with_bos: bool) -> list[int]:
        """Tokens of one guarded text, none of them a control token."""
        known = self._literal_ids.get((text, with_bos))
        if known is None:
            known = self._literal_ids[text, with_bos] = self._encode_literal(tokenizer, text, with_bos=with_bos)
        return known

    def _encode_literal(self, tokenizer: Any, text: str, *, with_bos: bool) -> list[int]:
        if text in self._special:
            pieces: Sequence[str] = [text]
        elif self._strict is None or not self._strict.search(text[1:]):
            pieces = [text[:1], text[1:]]  # tokenizers look for added tokens that are not special whatever one asks
        else:
            pieces = text
        ids: list[int] = []
        for index, piece in enumerate(p for p in pieces if p):
            ids += tokenizer.encode(piece, add_special_tokens=with_bos and index == 0, split_special_tokens=True)
        return ids


_INDEX = re.compile(r"x(\d+)x")  # what follows the mark in a placeholder


class Guard:
    """Swaps control texts for placeholders that no message contains, and back."""

    def __init__(
        self, strict: re.Pattern[str] | None, lenient: re.Pattern[str] | None, everything: Sequence[object]
    ) -> None:
        self._strict, self._lenient = strict, lenient
        self._literals: list[str] = []
        written = repr(everything)
        # Letters and digits only, so that no template filter or JSON escape changes them.
        self.mark = secrets.token_hex(8)
        while self.mark in written:
            self.mark = secrets.token_hex(8)

    def swap_message(self, message: Message) -> dict[str, object]:
        """A copy without control texts; the role and the names of its fields are the server's own."""
        lenient = self._lenient if message.get("role") == "assistant" else self._strict
        return {
            key: value if key == "role" else self._swap(value, lenient if key == "content" else self._strict)
            for key, value in message.items()
        }

    def swap(self, value: Any) -> Any:
        """A copy of nested strings, lists and mappings, their keys too, without control texts."""
        return self._swap(value, self._strict)

    def _swap(self, value: Any, pattern: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._placeholder, value) if pattern else value
        if isinstance(value, Mapping):
            return {self._swap(key, pattern): self._swap(item, pattern) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._swap(item, pattern) for item in value]
        return value

    def _placeholder(self, match: re.Match[str]) -> str:
        self._literals.append(match.group())
        return f"{self.mark}x{len(self._literals) - 1}x"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Rendered text as (text, is a guarded control text) pieces, in order."""
        pieces: list[tuple[str, bool]] = []
        first, *others = rendered.split(self.mark)  # a pattern of a new mark would be compiled for each prompt
        if first:
            pieces.append((first, False))
        for part in others:
            index = _INDEX.match(part)
            if index is None:  # a template cut it
                pieces.append((self.mark + part, False))
                continue
            pieces.append((self._literals[int(index[1])], True))
            if text := part[index.end() :]:
                pieces.append((text, False))
        return pieces


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = "|".join(map(re.escape, texts))  # longest first, as `Markup.control` is
    return re.compile(alternatives) if alternatives else None
