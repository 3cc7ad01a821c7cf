"""Launching a decode step: kernel objects made once per shape, one launch where the last block merges, else two.

Leaves the plan to plan.py, the text to decode_text.py, pages and exact rows to backend.py. The factory of kernels is
handed in, so that an emulator can stand for the device. A call costs Python time that a short context does not hide:
what can be kept is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.decode_text import combine_text, combine_threads, decode_text
from turboquant_kv.backends.gpu.device import Device, this_device
from turboquant_kv.backends.gpu.figures import SequenceFigures
from turboquant_kv.backends.gpu.plan import NO_WINDOW, Plan, PlanKey, StepPlans
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant
from turboquant_kv.backends.gpu.source import Dialect, Kernel, KernelFactory, mlx_factory
from turboquant_kv.backends.gpu.tuning import Tuning
from turboquant_kv.backends.gpu.variants import tuning_for, variant_for
from turboquant_kv.codec.format import UnsupportedFormatError

# MLX runs launches of one CUDA graph at the same time where their data allows, and its graphs hold fewer than 255:
# within so many launches no array of counters comes twice.
NUM_COUNTERS = 256
MAX_ROW_GROUPS = 1024
MAX_SETS = 8  # of exact rows that are read where they lie; more sequences' rows are joined first


class LayerInputs(NamedTuple):
    """Arrays of one layer.

    pages: key codes and scales, value codes and scales. exact: sink keys and values, window keys and values, each
    (H, rows, D), for all sequences together or for each its own. k_constants: signs (D,), or the transposed rotation
    (D, D), then the means (H, D), flat float32; v_constants: the same for values, the rotation not transposed.
    turns: of keys whose mean turns, a table of angles (turns.py) as the variant reads it.
    """

    pages: tuple[mx.array, mx.array, mx.array, mx.array]
    exact: Sequence[mx.array]
    k_constants: mx.array
    v_constants: mx.array
    turns: tuple[mx.array, ...] = ()


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
            device = self._device or this_device()
            variant = self._variant or variant_for(self.dialect, shape, device)
            tuning = self._tuning or tuning_for(shape, variant, device)
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
        self.max_sets = MAX_SETS if self._fused and shape.has_exact_mma else 1
        self._threads = (self._tuning.threads, 1, 1)
        self.reads_half_turns = self._variant == "mma"
        self._fused_dtypes = [shape.dtype, mx.float32]
        self.plans = StepPlans(shape, variant, tuning)

    def __call__(
        self,
        layer: LayerInputs,
        queries: mx.array,
        sequences: tuple[SequenceFigures, ...],
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
        shape, batch = self._shape, len(sequences)
        if queries.shape != (batch, shape.num_q_heads, shape.num_rows, shape.k_dim):
            raise UnsupportedFormatError(f"queries {queries.shape} do not fit {shape}")
        plan = self.plans.plan_for(PlanKey(sequences, page_table.shape[1], scale, reach))
        if not self._fused or plan.row_groups > MAX_ROW_GROUPS:
            return self._twice(layer, queries, plan, page_table, sinks)
        # A list at once: this is the host's time of every layer and step.
        inputs = [
            *(queries, plan.array, page_table, *layer.pages, layer.k_constants, layer.v_constants),
            *(next(self._counters), *layer.turns, *layer.exact),
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
            inputs=[queries, plan.array, page_table, *layer.pages, layer.k_constants, *layer.turns, *layer.exact],
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
