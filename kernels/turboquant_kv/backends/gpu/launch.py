"""Launching a decode step: kernel objects made once per shape, one launch where the last block merges, else two.

Leaves the plan to plan.py, the text to decode_text.py, pages and exact rows to store.py. The factory of kernels is
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
from turboquant_kv.backends.gpu.figures import MIN_ELEMENTS, SequenceFigures
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


# Stands for a launch's being done; eight elements, because Metal has another kernel for fewer.
FENCE_SHAPE = (MIN_ELEMENTS,)
# From NumPy: an operation would belong to the stream of the thread that imports this.
FENCE = mx.array(np.zeros(FENCE_SHAPE, np.float32))


class LayerInputs(NamedTuple):
    """Arrays of one layer.

    pages: key codes and scales, value codes and scales. exact: sink keys and values, window keys and values, each
    (H, rows, D), of all sequences. k_constants: signs (D,), or the transposed rotation (D, D), then the means (H, D),
    flat float32, and where keys are balanced what keys (H, D) and queries (H, D) are multiplied by; v_constants: the
    same for values, the rotation not transposed. fence: of the launch before on these
    arrays, FENCE for the first. turns: of keys whose mean turns, a table of angles (turns.py) as the variant reads it.
    """

    pages: tuple[mx.array, mx.array, mx.array, mx.array]
    exact: Sequence[mx.array]
    k_constants: mx.array
    v_constants: mx.array
    fence: mx.array
    turns: tuple[mx.array, ...] = ()


def _exact(layer: LayerInputs, new_rows: tuple[mx.array, mx.array] | None) -> Sequence[mx.array]:
    """Arrays of exact rows as the kernel takes them, and new rows."""
    return layer.exact if new_rows is None else (*layer.exact[:2], *new_rows)


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
        self._kernels: dict[tuple[str, bool, mx.Dtype | None, bool], Kernel] = {}
        # Blocks of one head's other query rows would read what one of them is writing.
        self.can_append = shape.num_rows == 1 and shape.num_chunks(variant) == 1
        self._threads = (self._tuning.threads, 1, 1)
        self.reads_half_turns = self._variant == "mma"
        self._fused_dtypes = [shape.dtype, mx.float32, mx.float32]
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
        cap: float = 0.0,
    ) -> mx.array:
        """Attention of queries (B, Hq, T, D), T <= 8, over each sequence; (B, Hq, T, Dv) in the queries' dtype.

        page_table (B, width) int32. sinks (Hq,) join the denominator. reach: keys that a query sees, itself included.
        cap: of the scores, read by a launch whose shape is capped. Raises UnsupportedFormatError for other shapes.
        """
        plan = self.plans.plan_for(PlanKey(sequences, page_table.shape[1], scale, reach, cap))
        return self.run(layer, queries, plan, page_table, sinks=sinks)[0]

    def run(
        self,
        layer: LayerInputs,
        queries: mx.array,
        plan: Plan,
        page_table: mx.array,
        *,
        new_rows: tuple[mx.array, mx.array] | None = None,
        sinks: mx.array | None = None,
        balanced: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """The same by a plan, and the launch's fence. Raises UnsupportedFormatError for other shapes.

        new_rows: keys (B, H, 1, D) and values (B, H, 1, Dv), which are written where the sequences' exact rows end.
        balanced: queries and new keys are the model's, and multiplied here by the layer's factors.
        """
        shape = self._shape
        if queries.shape != (plan.out_shape[0], shape.num_q_heads, shape.num_rows, shape.k_dim):
            raise UnsupportedFormatError(f"queries {queries.shape} do not fit {shape}")
        if not self._fused or plan.row_groups > MAX_ROW_GROUPS:
            return self._twice(layer, queries, plan, page_table, new_rows, sinks, balanced)
        # A list at once: this is the host's time of every layer and step.
        inputs = [
            *(queries, plan.array, page_table, *layer.pages, layer.k_constants, layer.fence, layer.v_constants),
            *(next(self._counters), *layer.turns, *_exact(layer, new_rows)),
        ]
        if sinks is not None:
            inputs.append(sinks)
        out, _, fence = self._kernel("fused", new_rows is not None, None if sinks is None else sinks.dtype, balanced)(
            inputs=inputs,
            grid=plan.grid,
            threadgroup=self._threads,
            output_shapes=[plan.out_shape, (plan.num_floats,), FENCE_SHAPE],
            output_dtypes=self._fused_dtypes,
        )
        return out, fence

    def _twice(
        self,
        layer: LayerInputs,
        queries: mx.array,
        plan: Plan,
        page_table: mx.array,
        new_rows: tuple[mx.array, mx.array] | None,
        sinks: mx.array | None,
        balanced: bool,
    ) -> tuple[mx.array, mx.array]:
        """Parts in one launch, their merge in another."""
        parts, fence = self._kernel("decode", new_rows is not None, None, balanced)(
            inputs=[
                *(queries, plan.array, page_table, *layer.pages, layer.k_constants, layer.fence),
                *(*layer.turns, *_exact(layer, new_rows)),
            ],
            grid=plan.grid,
            threadgroup=self._threads,
            output_shapes=[(plan.num_floats,), FENCE_SHAPE],
            output_dtypes=[mx.float32, mx.float32],
        )
        threads = combine_threads(self._shape.v_dim)
        batch, num_heads, num_rows, _ = plan.out_shape
        out: mx.array = self._kernel("combine", False, None if sinks is None else sinks.dtype)(
            # any array stands for sinks that are not there
            inputs=[parts, plan.array, layer.v_constants if sinks is None else sinks, layer.v_constants],
            grid=(num_rows * threads, num_heads, batch),
            threadgroup=(threads, 1, 1),
            output_shapes=[plan.out_shape],
            output_dtypes=[self._shape.dtype],
        )[0]
        return out, fence

    def _kernel(self, role: str, appends: bool, sink_dtype: mx.Dtype | None, balanced: bool = False) -> Kernel:
        key = role, appends, sink_dtype, balanced
        kernel = self._kernels.get(key)
        if kernel is None:
            arguments = self._dialect, self._shape, self._variant
            if role == "combine":
                text = combine_text(*arguments, sink_dtype)
            else:
                text = decode_text(*arguments, self._tuning, role == "fused", appends, sink_dtype, balanced)
            kernel = self._kernels[key] = text.build(self._factory)
        return kernel
