"""Launching a decode step's two kernels: kernel objects made once per shape, shapes checked before launch.

Leaves the plan to gpu_plan.py, the text to gpu_source.py, pages and exact rows to gpu.py. The factory of kernels is
handed in, so that an emulator can stand for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from turboquant_kv.backends.gpu_plan import (
    NO_WINDOW,
    DecodeShape,
    Figures,
    Tuning,
    arena_bytes,
    plan_for,
    tuning_for,
    v_gap,
    variant_for,
)
from turboquant_kv.backends.gpu_source import (
    COMBINE_INPUTS,
    DECODE_INPUTS,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    Variant,
    combine_body,
    constants_text,
    decode_body,
    header,
    mlx_factory,
    table_text,
)
from turboquant_kv.codebook import centroids
from turboquant_kv.format import UnsupportedFormatError

LANE_COMBINE_THREADS = 256


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Arrays of one layer: pages as stored, constants of its rotations, exact rows (H, rows of the batch, D)."""

    pages: tuple[mx.array, mx.array, mx.array, mx.array]  # key codes and scales, value codes and scales
    exact: tuple[mx.array, mx.array, mx.array, mx.array]  # sink keys and values, window keys and values
    k_constants: mx.array  # signs (D,), or the transposed rotation (D, D), then the means (H, D); flat float32
    v_constants: mx.array  # the same for values, the rotation not transposed


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


class DecodeKernels:
    """The kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None, tuning: Tuning | None = None) -> None:
        """factory: by default MLX's own for the dialect. tuning: instead of the shape's own (benchmarks)."""
        self.dialect, self._factory, self._tuning = dialect, factory or mlx_factory(dialect), tuning
        self._launches: dict[DecodeShape, _Launch] = {}

    def launch_for(self, shape: DecodeShape) -> _Launch:
        launch = self._launches.get(shape)
        if launch is None:
            launch = self._launches[shape] = _Launch(self.dialect, shape, self._factory, self._tuning)
        return launch

    def attend(
        self,
        shape: DecodeShape,
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
        if queries.shape != (len(figures), shape.num_q_heads, shape.num_rows, shape.k_dim):
            raise UnsupportedFormatError(f"queries {queries.shape} do not fit {shape}")
        return self.launch_for(shape)(layer, queries, figures, page_table, scale, sinks, reach)


class _Launch:
    """Both launches of one shape."""

    def __init__(self, dialect: Dialect, shape: DecodeShape, factory: KernelFactory, tuning: Tuning | None) -> None:
        shape.check()
        self._dialect, self._shape, self._factory = dialect, shape, factory
        self._variant: Variant = variant_for(dialect, shape)
        self._tuning = tuning or tuning_for(shape, self._variant)
        self._by_lanes = is_power_of_two(shape.v_dim)
        self._width = -(-shape.v_dim // 32) * 32  # threads of one run over an output row: whole warps
        self._runs = max(1, 512 // self._width)  # that share a row's parts and hide the latency of reading them
        self._combine_threads = LANE_COMBINE_THREADS if self._by_lanes else self._width * self._runs
        self._decode = decode_text(dialect, shape, self._variant, self._tuning).build(factory)
        self._combine: dict[mx.Dtype | None, Kernel] = {}
        self._rows = shape.live_rows(self._variant)
        self._f32 = [mx.float32]
        self._threads = (self._tuning.threads, 1, 1)

    def _combine_for(self, sink_dtype: mx.Dtype | None) -> Kernel:
        kernel = self._combine.get(sink_dtype)
        if kernel is None:
            constants: Constants = {
                **_common_constants(self._shape, self._variant),
                **{"USE_SINKS": sink_dtype is not None, "Out": self._shape.dtype},
                **{"WIDTH": self._width, "PARTS": self._runs, "MAX_PARTS": 256},
            }
            body = constants_text(self._dialect, constants) + combine_body(self._dialect, by_lanes=self._by_lanes)
            head = f"// {sink_dtype}\n{header(self._dialect, 'portable', '')}"  # one name per type of the inputs
            text = KernelText("combine", COMBINE_INPUTS, ("out",), body, head, contiguous=True)
            kernel = self._combine[sink_dtype] = text.build(self._factory)
        return kernel

    def __call__(
        self,
        layer: LayerInputs,
        queries: mx.array,
        figures: tuple[Figures, ...],
        page_table: mx.array,
        scale: float,
        sinks: mx.array | None,
        reach: int,
    ) -> mx.array:
        shape, batch = self._shape, len(figures)
        width = page_table.shape[1]
        plan, num_blocks = plan_for(shape, self._variant, self._tuning, figures, width, scale, reach)
        num_groups = batch * shape.num_chunks(self._variant)
        num_parts = num_groups * shape.num_kv_heads * num_blocks
        (parts,) = self._decode(
            inputs=[queries, plan, page_table, *layer.pages, *layer.exact, layer.k_constants],
            grid=(self._threads[0] * num_blocks, shape.num_kv_heads, num_groups),
            threadgroup=self._threads,
            output_shapes=[(num_parts * self._rows * (shape.v_dim + 2),)],
            output_dtypes=self._f32,
        )
        out: mx.array
        (out,) = self._combine_for(None if sinks is None else sinks.dtype)(
            # any array stands for sinks that are not there
            inputs=[parts, plan, layer.v_constants if sinks is None else sinks, layer.v_constants],
            grid=(shape.num_rows * self._combine_threads, shape.num_q_heads, batch),
            threadgroup=(self._combine_threads, 1, 1),
            output_shapes=[(batch, shape.num_q_heads, shape.num_rows, shape.v_dim)],
            output_dtypes=[shape.dtype],
        )
        return out


def _common_constants(shape: DecodeShape, variant: Variant) -> dict[str, int | bool | mx.Dtype]:
    return {
        **{"G": shape.group, "HEADS": shape.num_kv_heads, "QROWS": shape.num_rows, "PAGE": shape.page_tokens},
        **{"ROWS": shape.rows_per_block(variant), "LIVE": shape.live_rows(variant), "SINK": shape.sink_tokens},
        **{"DV": shape.v_dim, "V_ROTATION": shape.v_dim if is_power_of_two(shape.v_dim) else shape.v_dim**2},
    }


def decode_text(dialect: Dialect, shape: DecodeShape, variant: Variant, tuning: Tuning) -> KernelText:
    """The decode kernel of a shape."""
    constants: dict[str, int | bool | mx.Dtype] = {
        **_common_constants(shape, variant),
        **{"D": shape.k_dim, "KBITS": shape.k_bits, "VBITS": shape.v_bits},
        **{"K_ROTATION": shape.k_dim if is_power_of_two(shape.k_dim) else shape.k_dim**2},
        **{"Exact": shape.exact_dtype, "In": shape.dtype},
    }
    shared = 0
    if variant == "mma":
        constants |= {"WARPS": tuning.warps, "TILE": tuning.tile, "STAGES": tuning.stages, "V_GAP": v_gap(shape)}
        shared = arena_bytes(shape, tuning)
    tables = table_text("tq_k_book", centroids(shape.k_bits)) + table_text("tq_v_book", centroids(shape.v_bits))
    body = decode_body(dialect, variant, exact_mma=shape.has_exact_mma)
    return KernelText(
        f"decode_{variant}",
        DECODE_INPUTS,
        ("parts",),
        constants_text(dialect, constants) + body,
        header(dialect, variant, tables),
        shared,
    )
