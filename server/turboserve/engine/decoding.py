"""From one tokenizer's ids to an answer's text, by the cheapest way that gives what the tokenizer itself gives.

    bytewise   byte-level vocabularies (GPT-2's kind, nearly all of today's): a token's bytes are known, and joined
    backend    the Rust tokenizer beneath transformers' Python, over a short window of tokens
    tokenizer  transformers' own `decode`, over the same window

There is a token for each stream and step, and this was most of what its delivery cost. Which way is taken is tried out
when the model is loaded: a sample of tokens, and all added ones, have to come out the same.
"""

from __future__ import annotations

import codecs
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from turboserve.engine.text import REPLACEMENT, Decode, Decoder, IncrementalDecoder
from turboserve.engine.token_texts import TokenTexts, decoder_spec

log = logging.getLogger(__name__)

# A way that is wrong is wrong for a kind of token or for two that meet; some hundred tokens of each kind take 10 ms.
NUM_SAMPLES, SAMPLE_LEN = 64, 12
BYTEWISE, BACKEND, TOKENIZER = "bytewise", "backend", "tokenizer"


class BytesDecoder:
    """Implements text.Decoder for tokens whose bytes, joined, are the text."""

    num_held = 0  # whole characters come out at once

    def __init__(self, texts: TokenTexts, left_out: frozenset[int]) -> None:
        """left_out: tokens that have no text here."""
        self._text_and_bytes, self._left_out = texts.text_and_bytes, left_out
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False  # a character

    def add(self, token: int) -> str:
        if token in self._left_out:
            return ""
        text, raw = self._text_and_bytes(token)
        if not self._is_inside and REPLACEMENT not in text:
            return text
        new = self._utf8.decode(raw)
        self._is_inside = bool(self._utf8.getstate()[0])
        return new

    def flush(self) -> str:
        self._is_inside = False
        return self._utf8.decode(b"", final=True)


class Decoding:
    """The ways of one tokenizer, and which of them is taken."""

    def __init__(self, tokenizer: Any, texts: TokenTexts) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper around a transformers tokenizer."""
        self._tokenizer, self._texts = tokenizer, texts
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added = tokenizer.added_tokens_decoder
        self._special_ids = frozenset(int(i) for i, token in added.items() if token.special)
        self.way = TOKENIZER
        if hasattr(backend, "decode"):
            self._backend = backend
            samples = list(_samples(sorted(int(i) for i in added), backend.get_vocab_size()))
            ways = [BYTEWISE, BACKEND] if texts_are_bytes(tokenizer) else [BACKEND]
            self.way = next((way for way in ways if self._is_right(way, samples)), TOKENIZER)

    def _is_right(self, way: str, samples: Sequence[Sequence[int]]) -> bool:
        """Whether it gives each sample's text, with special tokens and without."""
        for skips in (False, True):
            expected, by_backend = self._tokenizer_decode(skips), self._backend_decode(skips)
            for ids in samples:
                ours = all_of(self._bytes_decoder(skips), ids) if way == BYTEWISE else by_backend(ids)
                if ours != expected(ids):
                    log.info("tokens are not decoded by way %s, which differs from the tokenizer's", way)
                    return False
        return True

    def decoder(self, *, skips_special: bool, left_out: frozenset[int] = frozenset()) -> Decoder:
        """Of a new answer. skips_special: special tokens have no text; left_out: nor have these."""
        if self.way == BYTEWISE:
            return self._bytes_decoder(skips_special, left_out)
        make = self._backend_decode if self.way == BACKEND else self._tokenizer_decode
        decode = make(skips_special)
        if not left_out:
            return IncrementalDecoder(decode)
        return IncrementalDecoder(lambda ids: decode([token for token in ids if token not in left_out]))

    def _bytes_decoder(self, skips_special: bool, left_out: frozenset[int] = frozenset()) -> BytesDecoder:
        return BytesDecoder(self._texts, left_out | self._special_ids if skips_special else left_out)

    def _backend_decode(self, skips_special: bool) -> Decode:
        decode = self._backend.decode

        def decoded(ids: Sequence[int]) -> str:
            text: str = decode(list(ids), skip_special_tokens=skips_special)
            return text

        return decoded

    def _tokenizer_decode(self, skips_special: bool) -> Decode:
        decode = self._tokenizer.decode

        def decoded(ids: Sequence[int]) -> str:
            text: str = decode(list(ids), skip_special_tokens=skips_special, clean_up_tokenization_spaces=False)
            return text

        return decoded


def texts_are_bytes(tokenizer: Any) -> bool:
    """Whether a fast tokenizer's decoder joins the tokens' bytes, and does nothing else."""
    return decoder_spec(tokenizer).get("type") == "ByteLevel"


def all_of(decoder: Decoder, ids: Iterable[int]) -> str:
    """The whole text of an answer."""
    return "".join([*map(decoder.add, ids), decoder.flush()])


def _samples(added: Sequence[int], vocab_len: int) -> Iterator[list[int]]:
    """Runs of tokens from the whole vocabulary, and every added token between two others."""
    rng = random.Random(0)
    for _ in range(NUM_SAMPLES):
        yield [rng.randrange(vocab_len) for _ in range(SAMPLE_LEN)]
    for start in range(0, len(added), SAMPLE_LEN):
        yield [token for one in added[start : start + SAMPLE_LEN] for token in (one, rng.randrange(vocab_len))]
