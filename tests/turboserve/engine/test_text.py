"""Streamed text: whole characters only, stop strings never shown, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboserve.engine.text import IncrementalDecoder, StopMatcher, TextStream
from turboserve.messages import TokenLogprob


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes; 256 is a control token without text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def stream(ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The pieces a client would be sent, and whether a stop string ended them."""
    text = TextStream(IncrementalDecoder(decode_bytes), stops)
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


@given(alphabet, stop_lists)
def test_the_stop_is_named_and_let_through_when_asked(text: str, stops: list[str]) -> None:
    without = TextStream(IncrementalDecoder(decode_bytes), stops)
    including = TextStream(IncrementalDecoder(decode_bytes), stops, include_stop=True)
    sent = [""] * 2
    for token in text.encode():
        results = without.add(token), including.add(token)
        sent = [before + result.text for before, result in zip(sent, results, strict=True)]
        assert results[0].stop == results[1].stop
        if results[0].stop is not None:
            assert results[0].stop in stops and sent[1] == sent[0] + results[0].stop
            return
    assert not any(stop in text for stop in stops)


# Tokens of several bytes each, cut anywhere; 256 has no text.
token_lists = st.lists(st.one_of(st.text("abé😀", min_size=1, max_size=3).map(str.encode), st.just(b"")), max_size=12)


@given(token_lists, st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3), st.integers(1, 3))
def test_logprobs_go_with_the_first_character_of_their_tokens_text(
    pieces: list[bytes], stops: list[str], num_cut: int
) -> None:
    """In order, none twice, none of text that is not sent; with the last text, all of a text that is sent in full."""
    tokens = [part for piece in pieces for part in (piece[:num_cut], piece[num_cut:]) if part or not piece]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")

    stream, sent, got = TextStream(IncrementalDecoder(decode), stops), "", list[int]()
    begins_at = []  # characters that are complete before each token
    for i in range(len(tokens)):
        begins_at.append(len(b"".join(tokens[:i]).decode("utf-8", errors="ignore")))
        result = stream.add(i, TokenLogprob("", b"", 0.0, i))
        sent += result.text
        got += [p.token_id for p in result.logprobs]
        assert got == [t for t in range(i + 1) if begins_at[t] < len(sent)]
        if result.stopped:
            return
    result = stream.flush()
    got += [p.token_id for p in result.logprobs]
    if not result.stopped:
        assert got == list(range(len(tokens)))
