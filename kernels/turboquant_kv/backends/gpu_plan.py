"""What a decode kernel is compiled for, how its work is split over the GPU, and the figures it is told.

Owns shapes, their checks, tuning and the `plan` array. Leaves text to gpu_source.py and launches to gpu_launch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu_source import Dialect, Variant
from turboquant_kv.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, UnsupportedFormatError, code_bytes

TILE_TOKENS = 32  # the plan's unit
MAX_QUERY_ROWS = 8  # per sequence; more is prefill
MAX_PARTS = 256  # of one sequence: the combine kernel keeps a weight of each in shared memory
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634
# Kernel inputs of fewer elements would come in Metal's constant address space, and so as another kernel.
MIN_ELEMENTS = 8

Figures = tuple[int, ...]
"""One sequence as the kernels see it: first query's position, queries, pages, sink offset, sink rows, window offset,
window's position, window rows. Offsets are rows into the batch's joined exact arrays."""


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

    def check(self) -> None:
        """Raises UnsupportedFormatError for a shape without a kernel: nothing is launched on a guess."""
        for name, value, known in (
            ("k_dim", self.k_dim, SUPPORTED_HEAD_DIMS),
            ("v_dim", self.v_dim, SUPPORTED_HEAD_DIMS),
            ("k_bits", self.k_bits, SUPPORTED_BITS),
            ("v_bits", self.v_bits, SUPPORTED_BITS),
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
    def has_mma(self) -> bool:
        """Whether the tensor-core variant covers it (on CUDA)."""
        dims = (self.k_dim, self.v_dim)
        return all(d % 64 == 0 and d <= 256 for d in dims) and max(self.k_bits, self.v_bits) <= 4

    @property
    def has_exact_mma(self) -> bool:
        """Whether its exact rows may use tensor cores as well."""
        return self.dtype == self.exact_dtype and self.dtype != mx.float32

    def rows_per_block(self, variant: Variant) -> int:
        """Query rows that share one unpacking; Metal's 32 KB of threadgroup memory hold four of 512 dims."""
        if variant == "mma":
            return 8
        return min(8 if max(self.k_dim, self.v_dim) <= 256 else 4, self.group * self.num_rows)

    def live_rows(self, variant: Variant) -> int:
        return min(self.rows_per_block(variant), self.group * self.num_rows)

    def num_chunks(self, variant: Variant) -> int:
        return -(-self.group * self.num_rows // self.rows_per_block(variant))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a decode kernel is cut; measured figures are in docs/gpu.md."""

    warps: int = 4
    tile: int = 32  # tokens a warp takes at once (mma)
    stages: int = 2  # of those, how many lie in its ring (mma)
    blocks: int = 528  # thread blocks wanted in a launch: one wave
    fused: bool = True  # the last block of a row group merges, instead of a second launch (mma)

    @property
    def threads(self) -> int:
        return 32 * self.warps


PORTABLE = Tuning()
H100_PROCESSORS = 132


@lru_cache(maxsize=256)
def tuning_for(shape: DecodeShape, variant: Variant) -> Tuning:
    """Portable: a constant. Tensor cores: as many blocks as are resident at once on an H100."""
    if variant == "portable":
        return PORTABLE
    narrow = max(shape.k_dim, shape.v_dim) <= 128
    return Tuning(tile=32 if narrow else 16, stages=2, blocks=H100_PROCESSORS * (3 if narrow else 2))


def v_gap(shape: DecodeShape) -> int:
    """Bytes between pairs of value rows in shared memory: pairs must begin 32 or 96 bytes apart, modulo 128."""
    pair = 2 * code_bytes(shape.v_dim, shape.v_bits)
    return next(gap for gap in range(0, 128, 16) if (pair + gap) % 128 in (32, 96))


def arena_bytes(shape: DecodeShape, tuning: Tuning) -> int:
    """Dynamic shared memory of the tensor-core kernel (src/mma_shared.h has the same formulas)."""
    pairs = sum(1 << (2 * bits) for bits in {shape.k_bits, shape.v_bits})
    queries = 16 * (shape.k_dim + 8)
    unit = 16 * code_bytes(shape.k_dim, shape.k_bits) + 64
    unit += 8 * (2 * code_bytes(shape.v_dim, shape.v_bits) + v_gap(shape))
    rings = tuning.warps * tuning.stages * (tuning.tile // 16) * unit
    scratch = 32 * shape.k_dim if shape.k_dim & (shape.k_dim - 1) else 0  # queries in float, before the rings are used
    totals = tuning.warps * 8 * (shape.v_dim + 4) * 4
    finish = 8 * MAX_PARTS * 4 + tuning.warps * 8 * shape.v_dim * 4
    return max(128 * pairs + queries + max(rings, scratch), totals, finish)


def split(
    shape: DecodeShape, variant: Variant, tuning: Tuning, figures: Sequence[Figures], reach: int
) -> tuple[int, int]:
    """Tiles of 32 tokens per block and blocks per row group of the longest sequence, the exact rows' block included.

    Every block gets the same number of tokens, whatever the sequences' lengths, so that none waits for a long one.
    """
    unseen = [max(0, f[0] - shape.sink_tokens + 1 - reach) // TILE_TOKENS for f in figures]
    held = [-(-f[2] * shape.page_tokens // TILE_TOKENS) for f in figures]
    num_tiles = [max(0, n - before) for n, before in zip(held, unseen, strict=True)]
    least = max(1, tuning.warps * tuning.tile // TILE_TOKENS)  # a tile a warp
    longest = max(num_tiles, default=0)
    blocks = max(1, tuning.blocks // (shape.num_kv_heads * shape.num_chunks(variant)) - len(figures))
    tiles = max(least, -(-sum(num_tiles) // blocks), -(-longest // (MAX_PARTS - 1)))
    tiles = -(-tiles // least) * least
    return tiles, 1 + -(-longest // tiles)


def make_plan(
    figures: tuple[Figures, ...],
    tiles_per_block: int,
    table_width: int,
    num_blocks: int,
    num_parts: int,
    scale: float,
    reach: int,
) -> mx.array:
    """The plan array of src/plan.h."""
    scale_bits = int(np.float32(scale * LOG2_E).view(np.int32))
    head = (tiles_per_block, table_width, num_blocks, num_parts, scale_bits, reach, 0, 0)
    return mx.array(np.array([*head, *(x for row in figures for x in row)], np.int32))


def variant_for(dialect: Dialect, shape: DecodeShape) -> Variant:
    """Tensor cores where they are written for it, the portable body elsewhere."""
    return "mma" if dialect == "cuda" and shape.has_mma else "portable"
