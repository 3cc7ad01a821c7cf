"""An answer's text is what the tokenizer makes of all its tokens, by whichever way they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.turboserve.engine.fakes import CharTokenizer, text_of
from tests.turboserve.engine.test_token_texts import byte_level, sentencepiece_like
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboserve.engine.decoding import BACKEND, BYTEWISE, TOKENIZER, Decoding, all_of
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.text import IncrementalDecoder
from turboserve.engine.token_texts import TokenTexts


def decoding(tokenizer: Any) -> Decoding:
    return Decoding(tokenizer, TokenTexts(tokenizer))


TOKENIZERS = {
    "byte-level": (byte_level(), BYTEWISE),
    "embedded": (AutoTokenizer.from_pretrained(str(EMBEDDED_DIR)), BYTEWISE),
    "sentencepiece": (sentencepiece_like(), BACKEND),
}
DECODINGS = {name: decoding(tokenizer) for name, (tokenizer, _) in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_cheapest_way_that_is_right_is_taken(name: str) -> None:
    assert DECODINGS[name].way == TOKENIZERS[name][1]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_decode_as_by_the_tokenizer(name: str, skips: bool, data: st.DataObject) -> None:
    tokenizer, way = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    decoder = DECODINGS[name].decoder(skips_special=skips)
    whole = tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    if way == BYTEWISE:
        assert all_of(decoder, ids) == whole
    else:
        window = IncrementalDecoder(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False))
        )
        assert all_of(decoder, ids) == all_of(window, ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_characters_come_whole_and_as_soon_as_they_can(text: str) -> None:
    tokenizer, _ = TOKENIZERS["byte-level"]
    decoder, raw = DECODINGS["byte-level"].decoder(skips_special=True), b""
    sent = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        sent += decoder.add(token)
        raw += TokenTexts(tokenizer).text_and_bytes(token)[1]
        assert sent == raw.decode(errors="ignore")
    assert decoder.flush() == "" and sent == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_are_left_out_have_no_text(name: str) -> None:
    tokenizer, _ = TOKENIZERS[name]
    ids = tokenizer.encode("Hello fine", add_special_tokens=False)
    special = next(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    mixed = [token for one in ids for token in (special, one)]
    decoder = DECODINGS[name].decoder(skips_special=False, left_out=frozenset({special}))
    assert all_of(decoder, mixed) == tokenizer.decode(ids)


def test_a_cut_character_is_one_replacement_and_the_decoder_goes_on() -> None:
    tokenizer, _ = TOKENIZERS["byte-level"]
    *begun, _ = tokenizer.encode("😀", add_special_tokens=False)
    decoder = DECODINGS["byte-level"].decoder(skips_special=True)
    assert [*map(decoder.add, begun), decoder.flush()] == [""] * len(begun) + ["\ufffd"]
    (letter,) = tokenizer.encode("H", add_special_tokens=False)
    assert decoder.add(letter) == "H"


class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers is untyped
    """Does more than its backend: some models' classes do."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return str(super().decode(*args, **kwargs)).upper()


def test_a_tokenizer_that_does_more_is_asked_itself() -> None:
    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer)
    found = decoding(tokenizer)
    assert found.way == TOKENIZER
    assert all_of(found.decoder(skips_special=True), tokenizer.encode("Hello fine")) == "HELLO FINE"


def test_a_decoder_that_does_more_than_join_bytes_is_asked_itself() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("H", 1, 0)])
    found = decoding(tokenizer)
    assert found.way == BACKEND
    assert all_of(found.decoder(skips_special=True), tokenizer.encode("Hello")) == "ello"


def test_a_tokenizer_without_a_backend_is_asked_itself() -> None:
    class Plain(CharTokenizer):
        def decode(self, ids: Sequence[int], **options: Any) -> str:
            assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return super().decode(ids)

    found = decoding(Plain())
    assert found.way == TOKENIZER and all_of(found.decoder(skips_special=True), [1, 2, 3]) == text_of([1, 2, 3])
