"""A model's tokenizer as llguidance's: which bytes each token stands for, in a tree that masks are computed on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from turboserve.errors import UnsupportedParameterError


class Vocabulary:
    """The tokens of one model. Read by any thread once it is built.

    Its masks have `num_words` words of 32 bits: the model's logits, or the tokenizer's tokens where these are more.
    """

    def __init__(self, tokenizer: Any, vocab_len: int, end_tokens: Collection[int]) -> None:
        """Takes seconds of Python's lock with 150,000 tokens: for start-up.

        tokenizer: mlx-lm's TokenizerWrapper, or a fast tokenizer; vocab_len: of the model's logits. Raises
        UnsupportedParameterError for a tokenizer whose tokens llguidance cannot read.
        """
        fast = getattr(tokenizer, "_tokenizer", tokenizer)  # of the wrapper
        if not isinstance(fast, PreTrainedTokenizerFast):
            raise UnsupportedParameterError("This model's tokenizer cannot be constrained: it is not a fast tokenizer.")
        self.vocab_len = vocab_len
        self.len = max(vocab_len, len(fast))
        self.num_words = -(-self.len // 32)
        self.end_tokens = tuple(sorted(i for i in end_tokens if i < vocab_len))
        self.control_tokens: dict[str, int] = {str(token): int(i) for i, token in fast.added_tokens_decoder.items()}
        try:
            self.tokens = from_tokenizer(fast, n_vocab=self.len, eos_token=list(self.end_tokens) or None)
        except Exception as exc:  # of Rust, without a type of its own
            raise UnsupportedParameterError(f"This model's tokenizer cannot be constrained: {exc}"[:300]) from exc
