"""Bytes of single tokens, joined, are the text's own: byte-level and SentencePiece vocabularies, and control tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tests.turboserve.engine.fakes import CharTokenizer, text_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboserve.engine.generation import DrawnLogprobs
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.token_texts import TokenTexts

TEXTS = ["Hello  wörld,\n\tfine day", "naïve 😀👩‍🚀 漢字", " <|end|> a<b>", "\u00a0\u00ad\x7f\x00 ok", ""]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS[:1], trainer)
    return finished(tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama's: single letters and some pairs, all else by bytes."""
    spellings = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"Helofinday", "fi", "\u2581fi"]
    vocab = {spelling: i for i, spelling in enumerate(spellings)}
    merges = [("f", "i"), ("\u2581", "fi")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finished(tokenizer)


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(params=["byte-level", "sentencepiece", "embedded"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "embedded":
        return AutoTokenizer.from_pretrained(str(EMBEDDED_DIR))
    return byte_level() if request.param == "byte-level" else sentencepiece_like()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = TokenTexts(tokenizer)
    pairs = [texts.text_and_bytes(token) for token in ids]
    assert b"".join(raw for _, raw in pairs) == text.encode()
    assert all(shown == raw.decode(errors="replace") for shown, raw in pairs)


def test_pieces_of_a_character_have_their_own_bytes(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    raws = [texts.text_and_bytes(token)[1] for token in tokenizer.encode("😀", add_special_tokens=False)]
    assert raws == [bytes([byte]) for byte in "😀".encode()]


def test_control_tokens_have_their_own_text(tokenizer: Any) -> None:
    for token, added in tokenizer.added_tokens_decoder.items():
        assert TokenTexts(tokenizer).text_and_bytes(token) == (str(added), str(added).encode())


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Any) -> None:
    assert TokenTexts(tokenizer).text_and_bytes(len(tokenizer) + 5) == ("", b"")


def test_a_tokenizer_that_only_decodes_is_asked_for_text() -> None:
    shown = TokenTexts(CharTokenizer()).logprob(7, DrawnLogprobs(-0.5, [(9, -0.25), (7, -0.5)]))
    assert (shown.text, shown.raw, shown.logprob, shown.token_id) == (text_of([7]), text_of([7]).encode(), -0.5, 7)
    assert [(p.text, p.logprob, p.token_id, p.top) for p in shown.top] == [
        (text_of([9]), -0.25, 9, ()),
        (text_of([7]), -0.5, 7, ()),
    ]
