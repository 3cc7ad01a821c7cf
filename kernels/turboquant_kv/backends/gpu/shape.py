"""What a decode kernel is compiled for: heads, dims, bits, pages and types.

Owns the checks of what has a kernel, and how query rows share a thread block. Leaves out which variant is taken
(variants.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, UnsupportedFormatError, code_bytes
from turboquant_kv.codec.scalar import scalar_codec
from turboquant_kv.codec.trellis import TRELLIS_BITS, TrellisCodec

Variant = Literal["portable", "mma", "simd"]
"""Without matrices; on CUDA's tensor cores; on Metal's 8x8 matrices."""

MAX_QUERY_ROWS = 8  # per sequence; more is prefill


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def codec_kind(codec: Codec, reader: str) -> tuple[int, bool]:
    """Bits per coordinate, and whether they lie along a trellis. Raises UnsupportedFormatError for other codecs."""
    if isinstance(codec, TrellisCodec):
        return codec.bits, True
    return scalar_codec(codec, reader).bits, False


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a decode kernel is compiled for."""

    num_q_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    k_bits: int
    v_bits: int
    page_tokens: int
    sink_tokens: int
    num_rows: int  # query rows per sequence
    dtype: mx.Dtype  # of queries and output
    exact_dtype: mx.Dtype
    k_trellis: bool = False  # keys' and values' bits are a trellis codec's
    v_trellis: bool = False
    pairs: int = 0  # of key dims that turn with position, and take the mean with them
    neighbours: bool = False  # partners lie side by side, else `pairs` apart
    turn_parts: int = 1  # halves that stand for each factor of a turning mean's product, on tensor cores
    capped: bool = False  # scores have a cap, which the plan says

    def check(self) -> None:
        """Raises UnsupportedFormatError for a shape without a kernel: nothing is launched on a guess."""
        for name, value, known in (
            ("k_dim", self.k_dim, SUPPORTED_HEAD_DIMS),
            ("v_dim", self.v_dim, SUPPORTED_HEAD_DIMS),
            ("k_bits", self.k_bits, TRELLIS_BITS if self.k_trellis else SUPPORTED_BITS),
            ("v_bits", self.v_bits, TRELLIS_BITS if self.v_trellis else SUPPORTED_BITS),
            ("num_rows", self.num_rows, range(1, MAX_QUERY_ROWS + 1)),
        ):
            if value not in known:
                raise UnsupportedFormatError(f"no GPU kernel for {name}={value}")
        if self.num_q_heads % self.num_kv_heads or self.page_tokens % 16:
            raise UnsupportedFormatError(f"no GPU kernel for {self}")

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Tokens that a warp of the tensor-core variant takes at once; they never straddle a page."""
        return 32 if max(self.k_dim, self.v_dim) <= 128 and self.page_tokens % 32 == 0 else 16

    @property
    def has_mma(self) -> bool:
        """Whether the tensor-core variant covers it (on CUDA)."""
        dims = (self.k_dim, self.v_dim)
        if not has_whole_blocks(self, self.tile):
            return False
        return all(d % 16 == 0 and 64 <= d <= 256 for d in dims) and max(self.k_bits, self.v_bits) <= 4

    @property
    def has_simd(self) -> bool:
        """Whether the variant on 8x8 matrices covers it (on Metal)."""
        return max(self.k_dim, self.v_dim) <= 256

    @property
    def has_exact_mma(self) -> bool:
        """Whether its exact rows may use tensor cores as well."""
        return self.dtype == self.exact_dtype and self.dtype != mx.float32

    def rows_per_block(self, variant: Variant) -> int:
        """Query rows that share one unpacking; Metal's 32 KB of threadgroup memory hold four of 512 dims."""
        if variant != "portable":
            return 8
        return min(8 if max(self.k_dim, self.v_dim) <= 256 else 4, self.group * self.num_rows)

    def live_rows(self, variant: Variant) -> int:
        return min(self.rows_per_block(variant), self.group * self.num_rows)

    def num_chunks(self, variant: Variant) -> int:
        return -(-self.group * self.num_rows // self.rows_per_block(variant))


def has_whole_blocks(shape: DecodeShape, tile: int) -> bool:
    """Whether a block of a tile's values, which is copied as a whole, is pieces of 16 bytes (tensor-core variant)."""
    return tile // 4 * code_bytes(shape.v_dim, shape.v_bits) % 16 == 0
