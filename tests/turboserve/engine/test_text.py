"""Streamed text: whole characters only, stop strings never shown, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.engine.text import IncrementalDecoder, StopMatcher, TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes; 256 is a control token without text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def stream(ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The pieces a client would be sent, and whether a stop string ended them."""
    text = TextStream(decode_bytes, stops)
    pieces: list[str] = []
    for token in ids:
        result = text.add(token)
        pieces.append(result.text)
        if result.stopped:
            return pieces, True
    rest = text.flush()
    return [*pieces, rest.text], rest.stopped


unbroken = st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])


@given(st.text(unbroken))
def test_pieces_join_to_the_text_without_broken_characters(text: str) -> None:
    pieces, _ = stream(list(text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(st.text(unbroken, min_size=1), st.integers(1, 3))
def test_a_character_cut_short_ends_in_one_replacement(text: str, num_cut: int) -> None:
    whole = text + "😀"
    pieces, _ = stream(list(whole.encode())[:-num_cut])
    assert "".join(pieces) == text + "\ufffd"
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_a_long_broken_run_flushes_one_replacement() -> None:
    # Some tokenizers turn each missing byte of an unfinished character into its own U+FFFD.
    decoder = IncrementalDecoder(lambda ids: "".join(chr(i) if i < 128 else "\ufffd" for i in ids))
    assert [decoder.add(t) for t in (ord("o"), ord("k"), 200, 201)] == ["o", "k", "", ""]
    assert decoder.flush() == "\ufffd"


def test_bytes_that_never_become_text_do_not_block_what_follows() -> None:
    pieces, _ = stream([0xFF, 0xFE, ord("a"), ord("b")])
    assert "".join(pieces) == "\ufffd\ufffdab"


def test_control_tokens_have_no_text() -> None:
    pieces, _ = stream([ord("a"), 256, ord("b"), 256])
    assert "".join(pieces) == "ab"


alphabet = st.text(alphabet="abé", max_size=30)
stop_lists = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3)


@given(alphabet, stop_lists)
def test_output_is_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(list(text.encode()), stops)
    # Streaming sees characters one by one, so the stop that ends first wins.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first_end = min((end for end, _ in ends), default=None)
    start = min((at for end, at in ends if end == first_end), default=None)
    assert "".join(pieces) == (text if start is None else text[:start])
    assert stopped == bool(ends)


@given(alphabet, stop_lists)
def test_only_a_possible_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher, sent = StopMatcher(stops), ""
    for i, char in enumerate(text):
        result = matcher.add(char)
        sent += result.text
        if result.stopped:
            return
        held = text[len(sent) : i + 1]
        assert not held or any(s.startswith(held) and s != held for s in stops)


@pytest.mark.parametrize("pieces", [["xx<e", "nd>yy"], ["xx<end>yy"], ["xx", "<", "e", "n", "d", ">"]])
def test_a_stop_string_split_anywhere_is_found(pieces: list[str]) -> None:
    matcher, sent, stopped = StopMatcher(["<end>"]), "", False
    for piece in pieces:
        result = matcher.add(piece)
        sent, stopped = sent + result.text, result.stopped
        if stopped:
            break
    assert sent == "xx" and stopped


def test_what_looked_like_a_stop_is_sent_at_the_end() -> None:
    pieces, stopped = stream(list(b"price <en"), ["<end>"])
    assert "".join(pieces) == "price <en" and not stopped


def test_empty_stop_strings_stop_nothing() -> None:
    assert stream(list(b"abc"), ["", ""]) == (["a", "b", "c", ""], False)
