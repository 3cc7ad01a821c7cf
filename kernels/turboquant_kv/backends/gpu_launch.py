"""Launching a decode step: how work is split over the GPU, what the kernels are told, shapes checked before launch.

Owns the plan, the figures that go along (`meta`) and the two launches. Leaves pages and exact rows to gpu.py and the
kernels' text to gpu_source.py; the kernels are handed in, so that an emulator can stand for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu_source import DecodeKernels, Dialect, Variant
from turboquant_kv.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, UnsupportedFormatError

THREADS = 128  # of a decode block: four warps
TILE_TOKENS = 32
MAX_QUERY_ROWS = 8  # per sequence; more is prefill
MAX_PARTS = 256  # of one sequence: the combine kernel keeps a weight of each in shared memory
# About four resident blocks on each of an H100's 132 multiprocessors; other devices get the same, rather many, blocks.
TARGET_BLOCKS = 528
MIN_TILES = 4  # one per warp
LOG2_E = 1.4426950408889634
# Kernel inputs of fewer elements would come in Metal's constant address space, and so as another kernel.
MIN_ELEMENTS = 8


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

    def rows_per_block(self, variant: Variant) -> int:
        """Query rows that share one unpacking; Metal's 32 KB of threadgroup memory hold four of 512 dims."""
        if variant == "mma":
            return 8
        return min(8 if max(self.k_dim, self.v_dim) <= 256 else 4, self.group * self.num_rows)

    def num_chunks(self, variant: Variant) -> int:
        return -(-self.group * self.num_rows // self.rows_per_block(variant))


@dataclass(frozen=True, slots=True)
class RowFigures:
    """One sequence as the kernels see it; offsets are rows into the batch's joined exact arrays."""

    q_start: int
    num_queries: int
    num_pages: int
    sink_offset: int
    num_sink: int
    window_offset: int
    window_start: int
    num_window: int

    def as_tuple(self) -> tuple[int, ...]:
        return (
            *(self.q_start, self.num_queries, self.num_pages, self.sink_offset),
            *(self.num_sink, self.window_offset, self.window_start, self.num_window),
        )


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Arrays of one layer: pages as stored, constants of its rotation, exact rows (H, rows of the batch, D)."""

    k_codes: mx.array
    k_scales: mx.array
    v_codes: mx.array
    v_scales: mx.array
    k_rotation: mx.array  # (2, D, D): R and its transpose
    v_rotation: mx.array  # (Dv, Dv)
    k_mean: mx.array  # (H, D)
    v_mean: mx.array
    k_book: mx.array
    v_book: mx.array
    sink_k: mx.array
    sink_v: mx.array
    window_k: mx.array
    window_v: mx.array


def split(shape: DecodeShape, variant: Variant, num_tiles: Sequence[int]) -> tuple[int, int]:
    """Tiles of 32 tokens per block and blocks per row group of the longest sequence, the exact rows' block included.

    Every block gets the same number of tokens, whatever the sequences' lengths, so that none waits for a long one.
    """
    blocks = max(1, TARGET_BLOCKS // (shape.num_kv_heads * shape.num_chunks(variant)))
    longest = max(num_tiles, default=0)
    tiles = max(MIN_TILES, -(-sum(num_tiles) // blocks), -(-longest // (MAX_PARTS - 1)))
    tiles = -(-tiles // MIN_TILES) * MIN_TILES
    return tiles, 1 + -(-longest // tiles)


@lru_cache(maxsize=16)
def _meta(head: tuple[int, ...], rows: tuple[tuple[int, ...], ...]) -> mx.array:
    """The figures as an array; all layers of a step share it."""
    return mx.array(np.array([*head, *(0 for _ in range(8 - len(head))), *(x for row in rows for x in row)], np.int32))


@lru_cache(maxsize=16)
def _params(scale: float) -> mx.array:
    return mx.array([scale * LOG2_E], dtype=mx.float32)


def decode_attention(
    kernels: DecodeKernels,
    shape: DecodeShape,
    layer: LayerInputs,
    queries: mx.array,
    rows: Sequence[RowFigures],
    page_table: mx.array,
    *,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of queries (B, Hq, T, D), T <= 8, over each sequence; (B, Hq, T, Dv) in the queries' dtype.

    page_table (B, width) int32. sinks (Hq,) join the denominator. Raises UnsupportedFormatError for other shapes.
    """
    batch = len(rows)
    if queries.shape != (batch, shape.num_q_heads, shape.num_rows, shape.k_dim):
        raise UnsupportedFormatError(f"queries {queries.shape} do not fit {shape}")
    variant = kernels.variant
    num_tiles = [-(-row.num_pages * shape.page_tokens // TILE_TOKENS) for row in rows]
    tiles_per_block, num_blocks = split(shape, variant, num_tiles)
    meta = _meta((tiles_per_block, page_table.shape[1], num_blocks), tuple(row.as_tuple() for row in rows))
    totals, stats = _launch_decode(kernels, shape, layer, queries, meta, page_table, scale, batch, num_blocks)
    return _launch_combine(kernels, shape, layer, totals, stats, meta, sinks, batch)


def _launch_decode(
    kernels: DecodeKernels,
    shape: DecodeShape,
    layer: LayerInputs,
    queries: mx.array,
    meta: mx.array,
    page_table: mx.array,
    scale: float,
    batch: int,
    num_blocks: int,
) -> tuple[mx.array, mx.array]:
    num_groups, num_rows = batch * shape.num_chunks(kernels.variant), shape.rows_per_block(kernels.variant)
    parts = (num_groups, shape.num_kv_heads, num_blocks, num_rows)
    inputs = [
        *(queries, _params(scale), meta, page_table, layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales),
        *(layer.sink_k, layer.sink_v, layer.window_k, layer.window_v),
        *(layer.k_rotation, layer.k_mean, layer.k_book, layer.v_book),
    ]
    totals, stats = kernels.decode(
        inputs=inputs,
        template=_decode_template(shape, kernels.variant),
        grid=(THREADS * num_blocks, shape.num_kv_heads, num_groups),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(*parts, shape.v_dim), (*parts, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return totals, stats


def _launch_combine(
    kernels: DecodeKernels,
    shape: DecodeShape,
    layer: LayerInputs,
    totals: mx.array,
    stats: mx.array,
    meta: mx.array,
    sinks: mx.array | None,
    batch: int,
) -> mx.array:
    threads = combine_width(shape.v_dim) * combine_runs(shape.v_dim)
    unread = layer.v_mean  # any array stands for sinks that are not there
    out: mx.array
    (out,) = kernels.combine(
        inputs=[totals, stats, meta, unread if sinks is None else sinks, layer.v_rotation, layer.v_mean],
        template=_combine_template(shape, kernels.variant, None if sinks is None else sinks.dtype),
        grid=(shape.num_rows * threads, shape.num_q_heads, batch),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch, shape.num_q_heads, shape.num_rows, shape.v_dim)],
        output_dtypes=[shape.dtype],
    )
    return out


def combine_width(v_dim: int) -> int:
    """Threads of one run over an output row: whole warps."""
    return -(-v_dim // 32) * 32


def combine_runs(v_dim: int) -> int:
    """Runs that share a row's parts; 512 threads hide the latency of reading them."""
    return max(1, 512 // combine_width(v_dim))


@lru_cache(maxsize=256)
def _decode_template(shape: DecodeShape, variant: Variant) -> list[tuple[str, object]]:
    template = [
        *_common_template(shape, variant),
        *(("D", shape.k_dim), ("DV", shape.v_dim), ("KBITS", shape.k_bits), ("VBITS", shape.v_bits)),
        *(("SINK", shape.sink_tokens), ("LIVE", min(shape.rows_per_block(variant), shape.group * shape.num_rows))),
        ("Exact", shape.exact_dtype),
    ]
    if variant == "mma":  # a longer tile hides more latency, but two of 192 or 256 dims do not fit the registers
        template.append(("TILE", 32 if max(shape.k_dim, shape.v_dim) <= 128 else 16))
    template.append(("In", shape.dtype))  # not used: MLX's CUDA names compiled kernels by their template values alone
    return template


@lru_cache(maxsize=256)
def _combine_template(shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None) -> list[tuple[str, object]]:
    return [
        *_common_template(shape, variant),
        *(("DV", shape.v_dim), ("WIDTH", combine_width(shape.v_dim)), ("PARTS", combine_runs(shape.v_dim))),
        *(("MAX_PARTS", MAX_PARTS), ("USE_SINKS", sink_dtype is not None), ("Out", shape.dtype)),
        ("Sink", sink_dtype or mx.float32),  # for the compiled kernel's name, as above
    ]


def _common_template(shape: DecodeShape, variant: Variant) -> list[tuple[str, object]]:
    return [
        *(("G", shape.group), ("HEADS", shape.num_kv_heads), ("QROWS", shape.num_rows)),
        *(("ROWS", shape.rows_per_block(variant)), ("PAGE", shape.page_tokens)),
    ]


def variant_for(dialect: Dialect, shape: DecodeShape) -> Variant:
    """Tensor cores where they are written for it, the portable body elsewhere."""
    return "mma" if dialect == "cuda" and shape.has_mma else "portable"
