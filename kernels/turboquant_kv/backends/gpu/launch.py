"""Launching a decode step: kernel objects made once per shape, one launch where the last block merges, else two.

Leaves the plan to plan.py, the text to source.py, pages and exact rows to gpu.py. The factory of kernels is
handed in, so that an emulator can stand for the device. A call costs Python time that a short context does not hide:
what can be kept is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle
from operator import sub
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.plan import (
    MAX_PARTS,
    NO_WINDOW,
    DecodeShape,
    Device,
    Figures,
    Tuning,
    arena_bytes,
    make_plan,
    split,
    table_layout,
    this_device,
    tuning_for,
    v_gap,
    variant_for,
)
from turboquant_kv.backends.gpu.source import (
    COMBINE_INPUTS,
    DECODE_INPUTS,
    FUSED_INPUTS,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    Variant,
    combine_body,
    constants_text,
    exact_inputs,
    header,
    lookup_text,
    mlx_factory,
    mma_body,
    portable_body,
    simd_body,
    table_text,
)
from turboquant_kv.codec.codebook import centroids
from turboquant_kv.codec.format import UnsupportedFormatError

LANE_COMBINE_THREADS = 256
# MLX runs launches of one CUDA graph at the same time where their data allows, and its graphs hold fewer than 255:
# within so many launches no array of counters comes twice.
NUM_COUNTERS = 256
MAX_ROW_GROUPS = 1024
PLANS_KEPT = 64
MAX_SETS = 8  # of exact rows that are read where they lie; more sequences' rows are joined first


# A step that closes no page: first query's position and window rows.
ONE_ROW_MORE: Figures = (1, 0, 0, 0, 0, 0, 0, 1)
_PlanKey = tuple[tuple[Figures, ...], int, float, int]


class LayerInputs(NamedTuple):
    """Arrays of one layer.

    pages: key codes and scales, value codes and scales. exact: sink keys and values, window keys and values, each
    (H, rows, D), for all sequences together or for each its own. k_constants: signs (D,), or the transposed rotation
    (D, D), then the means (H, D), flat float32; v_constants: the same for values, the rotation not transposed.
    """

    pages: tuple[mx.array, mx.array, mx.array, mx.array]
    exact: Sequence[mx.array]
    k_constants: mx.array
    v_constants: mx.array


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


class Plan(NamedTuple):
    """What all layers of a step share: the plan array of src/plan.h, and the launch that it describes."""

    array: mx.array
    row_groups: int
    grid: tuple[int, int, int]
    num_floats: int  # of all parts
    out_shape: tuple[int, int, int, int]


class DecodeKernels:
    """The kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(
        self,
        dialect: Dialect,
        factory: KernelFactory | None = None,
        tuning: Tuning | None = None,
        device: Device | None = None,
        variant: Variant | None = None,
    ) -> None:
        """factory, device: by default MLX's own. tuning, variant: instead of the shape's own (benchmarks, tests)."""
        self.dialect, self._factory, self._tuning = dialect, factory or mlx_factory(dialect), tuning
        self._device, self._variant = device, variant
        self._launches: dict[DecodeShape, DecodeLaunch] = {}
        self._counters = cycle([mx.array(np.zeros(MAX_ROW_GROUPS, np.uint32)) for _ in range(NUM_COUNTERS)])

    def launch_for(self, shape: DecodeShape) -> DecodeLaunch:
        """Raises UnsupportedFormatError for a shape without a kernel."""
        launch = self._launches.get(shape)
        if launch is None:
            variant = self._variant or variant_for(self.dialect, shape)
            tuning = self._tuning or tuning_for(shape, variant, self._device or this_device())
            launch = DecodeLaunch(self.dialect, shape, self._factory, variant, tuning, self._counters)
            self._launches[shape] = launch
        return launch


class DecodeLaunch:
    """Decode attention of one shape."""

    def __init__(
        self,
        dialect: Dialect,
        shape: DecodeShape,
        factory: KernelFactory,
        variant: Variant,
        tuning: Tuning,
        counters: cycle[mx.array],
    ) -> None:
        """Nothing is compiled before the first call."""
        shape.check()
        self._dialect, self._shape, self._factory, self._counters = dialect, shape, factory, counters
        self._variant, self._tuning = variant, tuning
        self._fused = self._variant == "mma" and self._tuning.fused
        self._kernels: dict[tuple[str, int, mx.Dtype | None], Kernel] = {}
        self._rows = shape.live_rows(self._variant)
        self._groups_per_row = shape.num_chunks(self._variant) * shape.num_kv_heads
        self.max_sets = MAX_SETS if self._fused and shape.has_exact_mma else 1
        self._threads = (self._tuning.threads, 1, 1)
        self._fused_dtypes = [shape.dtype, mx.float32]
        self._plans: dict[_PlanKey, Plan] = {}

    def __call__(
        self,
        layer: LayerInputs,
        queries: mx.array,
        figures: tuple[Figures, ...],
        page_table: mx.array,
        *,
        scale: float,
        sinks: mx.array | None = None,
        reach: int = NO_WINDOW,
    ) -> mx.array:
        """Attention of queries (B, Hq, T, D), T <= 8, over each sequence; (B, Hq, T, Dv) in the queries' dtype.

        page_table (B, width) int32. sinks (Hq,) join the denominator. reach: keys that a query sees, itself included.
        Raises UnsupportedFormatError for other shapes.
        """
        shape, batch = self._shape, len(figures)
        if queries.shape != (batch, shape.num_q_heads, shape.num_rows, shape.k_dim):
            raise UnsupportedFormatError(f"queries {queries.shape} do not fit {shape}")
        plan = self._plan(figures, page_table.shape[1], scale, reach)
        if not self._fused or plan.row_groups > MAX_ROW_GROUPS:
            return self._twice(layer, queries, plan, page_table, sinks)
        # A list at once: this is the host's time of every layer and step.
        inputs = [
            *(queries, plan.array, page_table, *layer.pages, layer.k_constants, layer.v_constants),
            *(next(self._counters), *layer.exact),
        ]
        if sinks is not None:
            inputs.append(sinks)
        out: mx.array = self._kernel("fused", len(layer.exact) // 4, None if sinks is None else sinks.dtype)(
            inputs=inputs,
            grid=plan.grid,
            threadgroup=self._threads,
            output_shapes=[plan.out_shape, (plan.num_floats,)],
            output_dtypes=self._fused_dtypes,
        )[0]
        return out

    def _twice(
        self, layer: LayerInputs, queries: mx.array, plan: Plan, page_table: mx.array, sinks: mx.array | None
    ) -> mx.array:
        """Parts in one launch, their merge in another."""
        (parts,) = self._kernel("decode", len(layer.exact) // 4, None)(
            inputs=[queries, plan.array, page_table, *layer.pages, layer.k_constants, *layer.exact],
            grid=plan.grid,
            threadgroup=self._threads,
            output_shapes=[(plan.num_floats,)],
            output_dtypes=[mx.float32],
        )
        threads = combine_threads(self._shape.v_dim)
        batch, num_heads, num_rows, _ = plan.out_shape
        out: mx.array = self._kernel("combine", 1, None if sinks is None else sinks.dtype)(
            # any array stands for sinks that are not there
            inputs=[parts, plan.array, layer.v_constants if sinks is None else sinks, layer.v_constants],
            grid=(num_rows * threads, num_heads, batch),
            threadgroup=(threads, 1, 1),
            output_shapes=[plan.out_shape],
            output_dtypes=[self._shape.dtype],
        )[0]
        return out

    def _plan(self, figures: tuple[Figures, ...], width: int, scale: float, reach: int) -> Plan:
        """All layers of a step share it."""
        key = (figures, width, scale, reach)
        found = self._plans.get(key)
        if found is None:
            found = self._advanced(key) or self._new_plan(*key)
            if len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = found
        return found

    def _new_plan(self, figures: tuple[Figures, ...], width: int, scale: float, reach: int) -> Plan:
        shape, row_groups = self._shape, len(figures) * self._groups_per_row
        tiles, num_blocks = split(shape, self._variant, self._tuning, figures, reach)
        num_parts = num_blocks * row_groups
        return Plan(
            make_plan(figures, tiles, width, num_blocks, num_parts, scale, reach),
            row_groups,
            (self._threads[0] * num_blocks, shape.num_kv_heads, row_groups // shape.num_kv_heads),
            num_parts * self._rows * (shape.v_dim + 2),
            (len(figures), shape.num_q_heads, shape.num_rows, shape.v_dim),
        )

    def _advanced(self, key: _PlanKey) -> Plan | None:
        """The plan of a step before, if each sequence has one exact row more since, advanced by an addition on the GPU.

        An array that the host has written costs a CUDA device a page fault, about 180 us.
        """
        figures, width, scale, reach = key
        if reach != NO_WINDOW:
            return None  # a window moves the walk's first tile
        before = tuple(tuple(map(sub, row, ONE_ROW_MORE)) for row in figures)
        plan = self._plans.get((before, width, scale, reach))
        return None if plan is None else plan._replace(array=plan.array + _one_row_more(len(figures)))

    def _kernel(self, role: str, num_sets: int, sink_dtype: mx.Dtype | None) -> Kernel:
        kernel = self._kernels.get((role, num_sets, sink_dtype))
        if kernel is None:
            arguments = self._dialect, self._shape, self._variant
            if role == "combine":
                text = combine_text(*arguments, sink_dtype)
            else:
                text = decode_text(*arguments, self._tuning, role == "fused", num_sets, sink_dtype)
            kernel = self._kernels[role, num_sets, sink_dtype] = text.build(self._factory)
        return kernel


@lru_cache(maxsize=64)
def _one_row_more(batch: int) -> mx.array:
    """What a step adds to a plan."""
    return mx.array(np.array([0] * 8 + [*ONE_ROW_MORE] * batch, np.int32))


def combine_threads(v_dim: int) -> int:
    """Of the merging kernel: eight warps, or as many runs of whole warps over a row as 512 threads hold."""
    if is_power_of_two(v_dim):
        return LANE_COMBINE_THREADS
    width = -(-v_dim // 32) * 32
    return width * max(1, 512 // width)


def _common_constants(shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None) -> Constants:
    return {
        **{"G": shape.group, "HEADS": shape.num_kv_heads, "QROWS": shape.num_rows, "PAGE": shape.page_tokens},
        **{"ROWS": shape.rows_per_block(variant), "LIVE": shape.live_rows(variant), "SINK": shape.sink_tokens},
        **{"DV": shape.v_dim, "V_ROTATION": shape.v_dim if is_power_of_two(shape.v_dim) else shape.v_dim**2},
        **{"MAX_PARTS": MAX_PARTS, "USE_SINKS": sink_dtype is not None, "Out": shape.dtype},
    }


def decode_text(
    dialect: Dialect,
    shape: DecodeShape,
    variant: Variant,
    tuning: Tuning,
    fused: bool,
    num_sets: int,
    sink_dtype: mx.Dtype | None,
) -> KernelText:
    """The decode kernel of a shape; num_sets: of exact rows (gpu_source.exact_inputs)."""
    constants: dict[str, int | bool | mx.Dtype] = {
        **_common_constants(shape, variant, sink_dtype),
        **{"D": shape.k_dim, "KBITS": shape.k_bits, "VBITS": shape.v_bits},
        **{"K_ROTATION": shape.k_dim if is_power_of_two(shape.k_dim) else shape.k_dim**2},
        **{"Exact": shape.exact_dtype, "In": shape.dtype},
    }
    inputs, outputs = (FUSED_INPUTS, ("out", "parts")) if fused else (DECODE_INPUTS, ("parts",))
    inputs = (*inputs, *exact_inputs(num_sets))
    if fused and sink_dtype is not None:
        inputs = (*inputs, "sinks")
    books = centroids(shape.k_bits), centroids(shape.v_bits)
    if variant != "mma":
        tables = table_text("tq_k_book", books[0]) + table_text("tq_v_book", books[1])
        if variant == "simd":
            constants["Piece"] = mx.float32 if shape.dtype == mx.float32 else mx.float16  # of a matrix's operands
        body = simd_body() if variant == "simd" else portable_body(dialect)
        source = constants_text(dialect, constants) + body
        return KernelText(f"decode_{variant}", inputs, outputs, source, header(dialect, variant, tables))
    constants |= {"WARPS": tuning.warps, "TILE": tuning.tile, "STAGES": tuning.stages, "PITCH": tuning.pitch}
    constants |= {"V_GAP": v_gap(shape, tuning.tile), **table_layout(shape, tuning)}
    switches = {"FUSED": int(fused), "BULK": int(tuning.bulk), "NUM_SETS": num_sets}
    switches |= {"EXACT_MMA": int(shape.has_exact_mma)}
    source = mma_body(switches, exact_inputs(num_sets), "0.0f" if sink_dtype is None else "float(sinks[i])")
    tables = lookup_text("tq_k_book_at", books[0]) + lookup_text("tq_v_book_at", books[1])
    return KernelText(
        "decode_mma",
        inputs,
        outputs,
        constants_text(dialect, constants) + source,
        f"// {sink_dtype}\n{header(dialect, variant, tables)}",  # one name per type of the inputs
        arena_bytes(shape, tuning),
        (tuning.threads, tuning.resident),
    )


def combine_text(dialect: Dialect, shape: DecodeShape, variant: Variant, sink_dtype: mx.Dtype | None) -> KernelText:
    """The merging kernel of a shape."""
    width = -(-shape.v_dim // 32) * 32  # threads of one run over an output row: whole warps
    constants: Constants = {
        **_common_constants(shape, variant, sink_dtype),
        **{"WIDTH": width, "PARTS": combine_threads(shape.v_dim) // width},
    }
    body = combine_body(dialect, by_lanes=is_power_of_two(shape.v_dim))
    head = f"// {sink_dtype}\n{header(dialect, 'portable', '')}"
    source = constants_text(dialect, constants) + body
    return KernelText("combine", COMBINE_INPUTS, ("out",), source, head, contiguous=True)
