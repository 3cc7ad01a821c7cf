"""An answer that max_tokens cuts in the middle of a character: it ends in one U+FFFD, and its session goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.turboserve.engine.fakes import CharTokenizer, Sink, add, make_loop, make_parts, request
from tests.turboserve.engine.test_sessions import FMT, store

from turboserve.engine.step_loop import StepLoop
from turboserve.engine.token_rules import Mask
from turboserve.messages import TextDelta

TEXT = "aé€😀b"  # characters of one, two, three, four bytes


class ByteTokenizer(CharTokenizer):
    """A token is a byte."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return bytes(ids).decode(errors="replace")


class Forced:
    """Only these tokens, one after another."""

    is_complete = False

    def __init__(self, tokens: bytes) -> None:
        self._tokens = list(tokens)

    def fill(self, mask: Mask) -> bool:
        mask[:] = 0
        token = self._tokens[0]
        mask[token // 32] = np.uint32(1 << (token % 32))
        return True

    def accept(self, token: int) -> None:
        assert token == self._tokens.pop(0)


def byte_loop(model: Any, **options: Any) -> StepLoop:
    parts = make_parts(model, fmt=FMT, **options)
    return make_loop(replace(parts, loaded=replace(parts.loaded, tokenizer=ByteTokenizer())))


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()


@pytest.mark.parametrize("num_tokens", range(1, len(TEXT.encode()) + 1))
def test_an_unfinished_character_comes_once_at_the_very_end(model: Any, num_tokens: int) -> None:
    whole = TEXT.encode()[:num_tokens].decode(errors="ignore")
    is_cut = whole.encode() != TEXT.encode()[:num_tokens]
    loop = byte_loop(model)
    asked = request("a", "Say it.", max_tokens=num_tokens)
    beside = request("b", "Another one.", max_tokens=len(TEXT.encode()))
    cut, other = add(loop, asked, beside, rules=[Forced(TEXT.encode()), Forced(TEXT.encode())])
    finish(loop)
    assert cut.text == whole + "\ufffd" * is_cut
    assert not any("\ufffd" in text for text in texts(cut)[:-1])
    assert (cut.finished.reason, cut.finished.usage.completion_tokens) == ("length", num_tokens)
    assert other.text == TEXT


def texts(sink: Sink) -> list[str]:
    return [event.text for event in sink.events if isinstance(event, TextDelta)]


def test_a_session_that_ends_within_a_character_goes_on_also_after_a_restart(model: Any, tmp_path: Path) -> None:
    loop = byte_loop(model, disk=store(tmp_path))
    (first,) = add(loop, request("a", "Say it slowly.", max_tokens=8, session_id="s"), rules=[Forced(TEXT.encode())])
    finish(loop)
    assert first.text == "aé€\ufffd"
    loop.close()
    again = byte_loop(model, disk=store(tmp_path))
    follow_up = request("b", "Say it slowly." + first.text + "?", max_tokens=4, session_id="s")
    (second,) = add(again, follow_up, rules=[Forced("😀".encode())])
    finish(again)
    assert second.text == "😀"
    assert second.finished.usage.cached_tokens >= len("Say it slowly.aé€")
    again.check_integrity()
    again.close()
