"""Prompts for models trained to fill in the middle: which tokens mark the parts, by the tokenizer's vocabulary.

Each family has a token before the text so far, one before the text behind the gap and one where the answer begins.
The texts themselves are tokenised as plain text: what looks like such a token in a file is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turboserve.errors import UnsupportedParameterError
from turboserve.messages import FillInMiddle, MiddlePrompt


@dataclass(frozen=True, slots=True)
class Marks:
    """One family's tokens in the order prefix, suffix, middle; `ends` are further ones behind which nothing belongs."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()


FAMILIES = (
    # Qwen2.5-Coder and its relatives, CodeGemma
    Marks(
        *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ends=("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    # StarCoder, StarCoder2, StableCode, Granite
    Marks(
        *("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ends=("<fim_pad>", "<file_sep>", "<repo_name>", "<|endoftext|>"),
    ),
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<fim-pad>", "<|endoftext|>")),  # SantaCoder
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),  # CodeLlama
    Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ends=("<|endoftext|>",)),  # CodeGeeX4
)


class MiddleFiller:
    """Builds prompts for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper around a transformers tokenizer."""
        self._tokenizer = tokenizer

    def prompt(self, question: FillInMiddle) -> MiddlePrompt:
        """The prompt. Raises UnsupportedParameterError where the vocabulary has no family's tokens."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        marks = next((m for m in FAMILIES if {m.prefix, m.suffix, m.middle} <= vocabulary.keys()), None)
        if marks is None:
            raise UnsupportedParameterError(
                "suffix: the served model has no tokens for filling in the middle; use a code model that does, such as "
                "Qwen2.5-Coder.",
                param="suffix",
            )
        tokens = (
            *self._tokenizer.encode("", add_special_tokens=True),
            vocabulary[marks.prefix],
            *self._plain(question.prefix),
            vocabulary[marks.suffix],
            *self._plain(question.suffix),
            vocabulary[marks.middle],
        )
        # A model that goes on behind the gap begins another part, or another file.
        ends = (marks.prefix, marks.suffix, marks.middle, *marks.ends)
        return MiddlePrompt(tokens, tuple(vocabulary[end] for end in ends if end in vocabulary))

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
