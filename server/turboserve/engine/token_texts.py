"""A token's own bytes and text, as logprobs show them: also of tokens that are pieces of a character.

Decoding a token by itself loses such bytes to U+FFFD, and with some tokenizers its leading space. So bytes are read
from the vocabulary's own spelling, of which there are two kinds in wide use: byte-level (each byte is one printable
character, as GPT-2 chose them) and SentencePiece's ("\u2581" is a space, "<0xE2>" a byte).
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from turboserve.engine.generation import DrawnLogprobs
from turboserve.engine.text import REPLACEMENT
from turboserve.messages import TokenLogprob

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of one tokenizer's tokens; each is worked out once."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: mlx-lm's TokenizerWrapper around a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.dumps(decoder_spec(tokenizer), ensure_ascii=False)
        self._latin_of = _latin_of_char() if "ByteLevel" in decoder else None
        self._is_sentencepiece = any(mark in decoder for mark in ("ByteFallback", "Metaspace", SPACE))
        self._known: dict[int, tuple[str, bytes]] = {}

    def logprob(self, token: int, logprobs: DrawnLogprobs) -> TokenLogprob:
        """As messages show what was drawn."""
        text, raw = self.text_and_bytes(token)
        top = tuple(TokenLogprob(*self.text_and_bytes(other), value, other) for other, value in logprobs.top)
        return TokenLogprob(text, raw, logprobs.drawn, token, top)

    def text_and_bytes(self, token: int) -> tuple[str, bytes]:
        """Bytes that are no text by themselves have U+FFFD in it."""
        known = self._known.get(token)
        if known is None:
            raw = self._bytes_of(token)
            known = self._known[token] = (raw.decode("utf-8", errors="replace"), raw)
        return known

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        spelling = self._spelling(token)
        if isinstance(spelling, bytes):
            return spelling
        if spelling is not None and self._latin_of is not None:
            with suppress(UnicodeEncodeError):  # a spelling of another kind
                return spelling.translate(self._latin_of).encode("latin-1")
        if spelling is not None and self._is_sentencepiece:
            byte = BYTE.fullmatch(spelling)
            return bytes([int(byte[1], 16)]) if byte else spelling.replace(SPACE, " ").encode()
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.encode()

    def _spelling(self, token: int) -> str | bytes | None:
        """None where the vocabulary has no such token: models pad theirs."""
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        spelling: str | bytes | None = convert(token) if convert is not None else None
        return spelling


def decoder_spec(tokenizer: Any) -> dict[str, Any]:
    """How a fast tokenizer's decoder describes itself; empty where there is none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return dict(json.loads(decoder.__getstate__())) if decoder is not None else {}


def _latin_of_char() -> dict[int, int]:
    """For str.translate: GPT-2's table, each character to the one whose Latin-1 code is the byte; others to none such.

    Printable bytes stand for themselves, the others for characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: ord(REPLACEMENT) for byte in others} | {0x100 + i: byte for i, byte in enumerate(others)}
