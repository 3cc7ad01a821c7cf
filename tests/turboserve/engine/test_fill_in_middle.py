"""Prompts for filling in the middle, by the tokenizer's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from turboserve.engine.fill_in_middle import FAMILIES, Marks, MiddleFiller
from turboserve.errors import UnsupportedParameterError
from turboserve.messages import FillInMiddle


class MarkedTokenizer:
    """One token a character, and one for each mark; with a token before every text, if there is one."""

    def __init__(self, marks: tuple[str, ...], bos: int | None) -> None:
        self._vocabulary = {mark: 5000 + i for i, mark in enumerate(marks)}
        self._bos = [] if bos is None else [bos]

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]:
        assert split_special_tokens or not text, "what looks like a mark in a file is text"
        return (self._bos if add_special_tokens else []) + [ord(c) for c in text]


@pytest.mark.parametrize("marks", FAMILIES, ids=lambda marks: marks.prefix)
@pytest.mark.parametrize("bos", [None, 1])
def test_parts_are_in_order_and_ends_are_known(marks: Marks, bos: int | None) -> None:
    tokenizer = MarkedTokenizer((marks.prefix, marks.suffix, marks.middle, *marks.ends[:1]), bos)
    vocabulary = tokenizer.get_vocab()
    made = MiddleFiller(tokenizer).prompt(FillInMiddle("ab", marks.middle))
    assert list(made.tokens) == [
        *([] if bos is None else [bos]),
        *(vocabulary[marks.prefix], ord("a"), ord("b")),
        *(vocabulary[marks.suffix], *map(ord, marks.middle)),
        vocabulary[marks.middle],
    ]
    assert set(made.stop_token_ids) == set(vocabulary.values())


@pytest.mark.parametrize("marks", [(), ("<|fim_prefix|>", "<|fim_suffix|>"), ("<fim_prefix>", "<|fim_suffix|>")])
def test_other_models_say_so(marks: Any) -> None:
    with pytest.raises(UnsupportedParameterError) as refused:
        MiddleFiller(MarkedTokenizer(marks, None)).prompt(FillInMiddle("a", "b"))
    assert refused.value.param == "suffix"
