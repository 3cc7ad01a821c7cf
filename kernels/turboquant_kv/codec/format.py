"""What one compressed KV cache looks like, and what it costs in bytes.

`KVFormat` is the single source of every byte count in the project: pools allocate by it,
budgets are planned with it and the printed ratios come from it. It holds no arrays.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

ScaleKind = Literal["unbiased", "norm", "least_squares", "plain"]
"""What the one stored 16-bit scalar of a vector means (see docs/codec.md)."""

SUPPORTED_BITS = (2, 3, 4, 8)
SUPPORTED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
SCALE_BYTES = 2  # one float16 per vector
# Exact buffers grow by this many rows: a short conversation must not pay for a window it does not fill.
EXACT_ROWS_STEP = 8


class UnsupportedFormatError(ValueError):
    """A bit width, head dimension or option that no codec path implements."""


def code_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one vector's packed codes; tight, so 3 bits cost 3 bits."""
    return head_dim * bits // 8


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one stored vector: packed codes and its scale."""
    return code_bytes(head_dim, bits) + SCALE_BYTES


def exact_capacity(num_rows: int, most: int) -> int:
    """Rows allocated to hold `num_rows` of at most `most`."""
    return min(most, -(-num_rows // EXACT_ROWS_STEP) * EXACT_ROWS_STEP)


def check_head_dim(head_dim: int) -> None:
    """Raises UnsupportedFormatError unless a Hadamard rotation of this size is implemented."""
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise UnsupportedFormatError(
            f"head_dim {head_dim} has no rotation here; supported: {', '.join(map(str, SUPPORTED_HEAD_DIMS))}. "
            "Serve this model with --kv-format f16."
        )


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Bits, scale and exact ends of a compressed KV cache.

    A sequence's tokens are laid out as

        [0, sink_tokens)                      exact, for ever
        [sink + i*page, sink + (i+1)*page)    page i: exact while a query's own position lies in it,
                                              compressed for every later query

    so what a query sees depends on positions alone, never on how the prompt was cut into chunks.
    """

    k_bits: int = 4
    v_bits: int = 4
    scale: ScaleKind = "unbiased"
    page_tokens: int = 64
    sink_tokens: int = 32
    centred: bool = True
    rotation_seed: int = 2504

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits not in SUPPORTED_BITS:
                raise UnsupportedFormatError(f"{name}={bits}: supported bit widths are 2, 3, 4 and 8")
        if self.scale not in get_args(ScaleKind):
            raise UnsupportedFormatError(f"scale={self.scale!r}: supported are {', '.join(get_args(ScaleKind))}")
        if self.page_tokens < 1 or self.page_tokens % 16:
            raise UnsupportedFormatError(f"page_tokens={self.page_tokens}: must be a positive multiple of 16")
        if self.sink_tokens < 0:
            raise UnsupportedFormatError(f"sink_tokens={self.sink_tokens}: must not be negative")

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """The format named like `4/3` (key bits / value bits) or `4`. Raises UnsupportedFormatError."""
        parts = text.strip().split("/")
        if len(parts) not in (1, 2) or not all(p.isascii() and p.isdigit() and len(p) < 3 for p in parts):
            raise UnsupportedFormatError(f"KV format {text!r}: expected KEY_BITS/VALUE_BITS such as 4/4 or 4/3")
        return cls(k_bits=int(parts[0]), v_bits=int(parts[-1]))

    @property
    def name(self) -> str:
        """Short name, key bits first: `4/3`."""
        return f"{self.k_bits}/{self.v_bits}"

    def with_(self, **changes: object) -> KVFormat:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def token_bytes(self, num_kv_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one compressed token in one layer, all heads."""
        return num_kv_heads * (vector_bytes(k_dim, self.k_bits) + vector_bytes(v_dim, self.v_bits))

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

    def fingerprint(self) -> str:
        """Stable hash of every field that changes stored bytes or their meaning."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
