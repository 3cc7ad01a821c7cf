"""What one compressed KV cache looks like, and what it costs in bytes.

`KVFormat` and the codecs that it names are the single source of every byte count in the project: pools allocate by
them, budgets are planned with them and the printed ratios come from them. Loads no array library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .codec import Codec, ScaleKind
from .limits import (
    MIN_TRELLIS_DIM,
    SUPPORTED_BITS,
    SUPPORTED_HEAD_DIMS,
    UnsupportedFormatError,
    check_head_dim,
    code_bytes,
    stored_dim,
)
from .registry import codec_named
from .scalar import scalar_codec
from .trellis import TrellisCodec

__all__ = [
    "EXACT_ROWS_STEP",
    "SUPPORTED_BITS",
    "SUPPORTED_HEAD_DIMS",
    "Codec",
    "KVFormat",
    "ScaleKind",
    "UnsupportedFormatError",
    "check_head_dim",
    "code_bytes",
    "exact_capacity",
    "stored_dim",
]

PAGE_TOKENS, LONG_PAGE_TOKENS = 96, 128
# Values of at most so many bits have long pages: the newest page is exact, and what most of the loss comes from is the
# tokens right behind a page that has just been closed (docs/quality.md).
LONG_PAGE_BITS = 2

# Exact buffers grow by this many rows: a short conversation must not pay for a window it does not fill.
EXACT_ROWS_STEP = 8


def exact_capacity(num_rows: int, most: int) -> int:
    """Rows allocated to hold `num_rows` of at most `most`."""
    return min(most, -(-num_rows // EXACT_ROWS_STEP) * EXACT_ROWS_STEP)


@dataclass(frozen=True, slots=True, init=False)
class KVFormat:
    """Codecs and exact ends of a compressed KV cache. Immutable, compared by value.

    A sequence's tokens are laid out as

        [0, sink_tokens)                      exact, for ever
        [sink + i*page, sink + (i+1)*page)    page i: exact while a query's own position lies in it,
                                              compressed for every later query

    so what a query sees depends on positions alone, never on how the prompt was cut into chunks.
    """

    keys: Codec
    values: Codec
    page_tokens: int
    sink_tokens: int
    centred: bool
    rotation_seed: int

    def __init__(
        self,
        k_bits: int | str = 4,
        v_bits: int | str = 4,
        scale: ScaleKind = "unbiased",
        page_tokens: int | None = None,
        sink_tokens: int = 32,
        centred: bool = True,
        rotation_seed: int = 2504,
        *,
        keys: Codec | None = None,
        values: Codec | None = None,
    ) -> None:
        """k_bits, v_bits: a codec's name, for the scalar ones their bits; `keys` and `values` take their place.

        page_tokens None: as many as is usual for these values.

        Raises UnsupportedFormatError for codecs that registry.py does not make, for two whose scales differ in
        meaning, and for numbers of tokens that no page or sink can have.
        """
        keys = codec_named(str(k_bits), scale) if keys is None else keys
        values = codec_named(str(v_bits), scale) if values is None else values
        page_tokens = usual_page_tokens(values) if page_tokens is None else page_tokens
        fields = (keys, values, page_tokens, sink_tokens, centred, rotation_seed)
        for name, value in zip(self.__slots__, fields, strict=True):
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for codec in (self.keys, self.values):  # else what is saved could not be found again by its name
            named = codec_named(codec.name, codec.scale)
            if named != codec:
                raise UnsupportedFormatError(f"codec {codec.name!r} is {named}, not {codec}")
        if self.keys.scale != self.values.scale:
            raise UnsupportedFormatError(f"{self.keys} and {self.values}: their scales must mean the same")
        if self.page_tokens < 1 or self.page_tokens % 16:
            raise UnsupportedFormatError(f"page_tokens={self.page_tokens}: must be a positive multiple of 16")
        if self.sink_tokens < 0:
            raise UnsupportedFormatError(f"sink_tokens={self.sink_tokens}: must not be negative")

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """The format named like `4/3` (key codec / value codec) or `4`. Raises UnsupportedFormatError."""
        return cls().with_usual_pages(text)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> KVFormat:
        """Inverse of `to_dict`; missing entries take their defaults.

        Raises UnsupportedFormatError for what is no such dictionary, and for a codec whose tables have changed since.
        """
        if not isinstance(saved, Mapping) or not saved.keys() <= cls().to_dict().keys():
            raise UnsupportedFormatError(f"a saved KV format cannot be understood: {saved!r}")
        codecs = {side: str(saved[side]).partition("#")[0] for side in ("k_bits", "v_bits") if side in saved}
        try:
            fmt = cls(**{**saved, **codecs})
        except TypeError as exc:
            raise UnsupportedFormatError(f"a saved KV format cannot be understood: {exc}") from exc
        now = fmt.to_dict()
        if any(now[name] != value for name, value in saved.items()):
            raise UnsupportedFormatError(f"a KV format saved as {dict(saved)} is now {now}")
        return fmt

    def to_dict(self) -> dict[str, Any]:
        """What is saved with caches of this format and what fingerprints cover; JSON-able.

        `k_bits` and `v_bits` are the codecs' saved names: numbers for the scalar ones.
        """
        return {
            "k_bits": self.keys.saved_name,
            "v_bits": self.values.saved_name,
            "scale": self.scale,
            "page_tokens": self.page_tokens,
            "sink_tokens": self.sink_tokens,
            "centred": self.centred,
            "rotation_seed": self.rotation_seed,
        }

    @property
    def name(self) -> str:
        """Short name, key codec first: `4/3`."""
        return f"{self.keys.name}/{self.values.name}"

    @property
    def scale(self) -> ScaleKind:
        """What the stored scale of a vector means."""
        return self.keys.scale

    @property
    def k_bits(self) -> int:
        """Bits per coordinate of scalar keys. Raises UnsupportedFormatError for another codec."""
        return scalar_codec(self.keys, "k_bits").bits

    @property
    def v_bits(self) -> int:
        """Bits per coordinate of scalar values. Raises UnsupportedFormatError for another codec."""
        return scalar_codec(self.values, "v_bits").bits

    def with_(self, **changes: Any) -> KVFormat:
        """A copy with some of the arguments of KVFormat changed. Raises UnsupportedFormatError as that does."""
        scale = changes.pop("scale", self.scale)
        for side, bits in (("keys", "k_bits"), ("values", "v_bits")):
            name = str(changes.pop(bits, getattr(self, side).name))
            changes.setdefault(side, codec_named(name, scale))
        return replace(self, **changes)

    def with_codecs(self, text: str) -> KVFormat:
        """A copy with the codecs named like `4/3` or `4`; their scales mean what they meant.

        Raises UnsupportedFormatError.
        """
        keys, values = _codec_names(text)
        try:
            return self.with_(k_bits=keys, v_bits=values)
        except UnsupportedFormatError as exc:
            raise UnsupportedFormatError(f"KV format {text!r}: {exc}") from None

    def with_usual_pages(self, text: str) -> KVFormat:
        """As `with_codecs`, and where pages here are as usual for these values, they are as usual for those.

        Raises UnsupportedFormatError.
        """
        fmt = self.with_codecs(text)
        is_usual = self.page_tokens == usual_page_tokens(self.values)
        return fmt.with_(page_tokens=usual_page_tokens(fmt.values)) if is_usual else fmt

    def check_dims(self, k_dim: int, v_dim: int) -> None:
        """Raises UnsupportedFormatError for dimensions of stored keys and values that a codec cannot have."""
        for codec, dim in ((self.keys, k_dim), (self.values, v_dim)):
            check_head_dim(dim)
            if isinstance(codec, TrellisCodec) and dim < MIN_TRELLIS_DIM:
                raise UnsupportedFormatError(
                    f"head_dim {dim} is too short for codec {codec.name}, which needs {MIN_TRELLIS_DIM}: "
                    "choose one without a t, such as 4/4"
                )

    def token_bytes(self, num_kv_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one compressed token in one layer, all heads."""
        return num_kv_heads * (self.keys.vector_bytes(k_dim) + self.values.vector_bytes(v_dim))

    def page_bytes(self, num_kv_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one page in one layer, all heads."""
        return self.page_tokens * self.token_bytes(num_kv_heads, k_dim, v_dim)

    def num_pages(self, num_tokens: int) -> int:
        """Compressed pages held by a sequence of `num_tokens`; its last page stays exact."""
        return max(0, num_tokens - self.sink_tokens - 1) // self.page_tokens

    def exact_rows(self, num_tokens: int) -> int:
        """Rows of the exact buffers (sink and last page) of a sequence of `num_tokens`, as allocated."""
        sink = min(num_tokens, self.sink_tokens)
        tail = num_tokens - sink - self.num_pages(num_tokens) * self.page_tokens
        return exact_capacity(sink, self.sink_tokens) + exact_capacity(tail, self.page_tokens)

    def page_start(self, page_index: int) -> int:
        """Absolute position of the first token of a sequence's page."""
        return self.sink_tokens + page_index * self.page_tokens

    def page_room(self, position: int) -> int:
        """Tokens from `position` to its page's end, itself included; the sink's positions go on into the first page.

        None of them closes the page that it is in, so a sequence that took them can be cut back to any without loss.
        """
        if position < self.sink_tokens:
            return self.sink_tokens - position + self.page_tokens
        return self.page_tokens - (position - self.sink_tokens) % self.page_tokens

    def fingerprint(self) -> str:
        """Stable hash of every field that changes stored bytes or their meaning."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def usual_page_tokens(values: Codec) -> int:
    """Tokens of a page of a format with these values."""
    is_long = values.code_bytes(128) * 8 <= 128 * LONG_PAGE_BITS
    return LONG_PAGE_TOKENS if is_long else PAGE_TOKENS


def _codec_names(text: str) -> tuple[str, str]:
    """Those of keys and of values. Raises UnsupportedFormatError."""
    parts = text.strip().split("/")
    names = [part[1:] if len(part) == 2 and part[0] == "0" else part for part in parts]  # "04" is 4 bits, too
    if len(parts) not in (1, 2) or not all(names):
        raise UnsupportedFormatError(f"KV format {text!r}: expected KEY_CODEC/VALUE_CODEC such as 4/4 or 4/3t")
    return names[0], names[-1]
