"""What a Metal decode kernel does per KV element (one dimension of a compressed key or value), counted by the emulator.

Owns the launches: two histories of one KV head, of which the longer one's surplus is the walk alone, without a block's
start and merge. Needs tests.metal.emulator (`PYTHONPATH=.`), g++ and x86-64. Leaves out what the counts mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from tests.metal.emulator import Report, run_metal
from tests.metal.emulator.counting import Operations

from turboquant_kv.backends.gpu.figures import SequenceFigures
from turboquant_kv.backends.gpu.launch import FENCE, DecodeKernels, LayerInputs
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant
from turboquant_kv.backends.gpu.tuning import Tuning
from turboquant_kv.codec.format import code_bytes

PAGE = 64
SHORT_PAGES, LONG_PAGES = 4, 20


@dataclass(frozen=True, slots=True)
class Counts:
    """Per KV element, summed over lanes. simd, matrix: operations times 32 lanes; bytes of reads as issued."""

    float_ops: float
    int_ops: float
    convert_ops: float
    special_ops: float
    simd_ops: float
    matrix_ops: float
    threadgroup_bytes: float


def count(dim: int, bits: tuple[int, int], num_rows: int, variant: Variant) -> Counts:
    """For heads of `dim` keys and values in float16, `num_rows` query heads on one KV head."""
    shape = DecodeShape(num_rows, 1, dim, dim, *bits, PAGE, 0, 1, mx.float16, mx.float16)
    short, long = (_report(shape, variant, num_pages) for num_pages in (SHORT_PAGES, LONG_PAGES))
    num_elements = (LONG_PAGES - SHORT_PAGES) * PAGE * 2 * dim
    assert short.operations is not None and long.operations is not None
    more = Operations(*(b - a for a, b in zip(short.operations, long.operations, strict=True)))
    return Counts(
        more.float_ops / num_elements,
        more.int_ops / num_elements,
        more.convert_ops / num_elements,
        more.special_ops / num_elements,
        32 * (long.simd_ops - short.simd_ops) / num_elements,
        32 * (long.matrix_ops - short.matrix_ops) / num_elements,
        (long.threadgroup_read_bytes - short.threadgroup_read_bytes) / num_elements,
    )


def _report(shape: DecodeShape, variant: Variant, num_pages: int) -> Report:
    """Of one decode launch over random pages, without exact rows."""
    reports: list[Report] = []

    def factory(name: str, source: str, header: str, **options: Any) -> Any:
        def call(*, output_dtypes: Any, **launch: Any) -> list[mx.array]:
            outputs, report = run_metal(
                name=name,
                source=source,
                header=header,
                output_dtypes=output_dtypes,
                count_ops=name.startswith("turboquant_decode"),
                **options,
                **launch,
            )
            reports.append(report)
            return [mx.array(out).astype(dtype) for out, dtype in zip(outputs, output_dtypes, strict=True)]

        return call

    rng = np.random.default_rng(1)

    def floats(*extents: int) -> mx.array:
        return mx.array(rng.standard_normal(extents).astype(np.float32) / 8)

    def side(dim: int, bits: int) -> tuple[mx.array, mx.array]:
        codes = rng.integers(0, 256, (num_pages, 1, PAGE, code_bytes(dim, bits))).astype(np.uint8)
        return mx.array(codes), mx.array(np.ones((num_pages, 1, PAGE), np.float16))

    kernels = DecodeKernels("metal", factory, Tuning(blocks=1), variant=variant)
    num_tokens = num_pages * PAGE
    nothing = [mx.zeros((1, 8, dim), mx.float16) for dim in (shape.k_dim, shape.v_dim)] * 2
    layer = LayerInputs(
        (*side(shape.k_dim, shape.k_bits), *side(shape.v_dim, shape.v_bits)),
        nothing,
        floats(2 * shape.k_dim),
        floats(2 * shape.v_dim),
        FENCE,
    )
    queries = floats(1, shape.num_q_heads, 1, shape.k_dim).astype(shape.dtype)
    table = np.zeros((1, max(8, num_pages)), np.int32)
    table[0, :num_pages] = np.arange(num_pages)
    sequence = SequenceFigures(
        q_start=num_tokens,
        num_queries=1,
        num_pages=num_pages,
        sink_offset=0,
        num_sink=0,
        window_offset=0,
        window_start=num_tokens,
        num_window=0,
    )
    kernels.launch_for(shape)(layer, queries, (sequence,), mx.array(table), scale=0.1)
    return reports[0]
