"""The GPU backend: attention and encoding on packed pages in fused kernels, for Metal and CUDA.

Owns page tables, the plans of steps, and which kernels a device gets; `details` names the path that a call takes. One
layer's arrays and launches are store.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import (
    LayerShape,
    LayerStore,
    Means,
    PageIds,
    StepInputs,
    StepPlan,
    StepRows,
)
from turboquant_kv.backends.gpu.device import MIN_CAPABILITY, compute_capability
from turboquant_kv.backends.gpu.figures import MIN_ELEMENTS
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels, DecodeLaunch
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.gpu.plan import NO_WINDOW
from turboquant_kv.backends.gpu.shape import MAX_QUERY_ROWS
from turboquant_kv.backends.gpu.source import Dialect
from turboquant_kv.backends.gpu.step_plan import GpuStepPlan
from turboquant_kv.backends.gpu.store import GpuStore, Kernels, StepKey, decode_shape, turning_of
from turboquant_kv.backends.gpu.turns import Turns
from turboquant_kv.backends.mlx_ops.backend import MlxBackend
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError


class GpuBackend(MlxBackend):
    """Fused kernels, and MLX operations for what they do not cover."""

    name = "gpu"

    def __init__(
        self,
        dialect: Dialect | None = None,
        kernels: DecodeKernels | None = None,
        page_kernels: PageKernels | None = None,
        flash_kernels: FlashKernels | None = None,
    ) -> None:
        """Kernels replace the device's own. Raises UnsupportedFormatError where there is no GPU that they run on."""
        dialect = dialect or device_dialect()
        self.kernels = Kernels(
            dialect,
            kernels or device_kernels(dialect),
            page_kernels or device_page_kernels(dialect),
            flash_kernels or device_flash_kernels(dialect),
        )
        self.name = f"gpu-{dialect}"
        self._turns: dict[tuple[str, int], Turns] = {}  # by rotation and length of sink
        self._latest: GpuStepPlan | None = None
        self._ways: Sequence[tuple[DecodeLaunch, float, int, float]] = ()  # how layers attended in the last decode step
        self._table_of: list[PageIds] = []
        self._table = mx.zeros((1, MIN_ELEMENTS), mx.int32)

    @property
    def details(self) -> str:
        """What runs where, for logs and statistics."""
        dialect = self.kernels.dialect
        return (
            f"decode attention (up to {MAX_QUERY_ROWS} query rows) and encoding: fused {dialect} kernels; "
            f"prefill over one layer's decoded histories at a time: {self.kernels.flash.details}; "
            "array masks and prefill of sliding windows: MLX operations"
        )

    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        """Raises UnsupportedFormatError for a geometry without a kernel: at load time, not at the first token."""
        decode_shape(shape.num_kv_heads, 1, shape.dtype, shape, fmt, turning_of(means, fmt))
        return GpuStore(shape, fmt, means, self.kernels, self._turns_of(means, fmt))

    def _turns_of(self, means: Means | None, fmt: KVFormat) -> Turns | None:
        if means is None or means.rotary is None or not fmt.centred:
            return None
        key = means.rotary.fingerprint(), fmt.sink_tokens
        if key not in self._turns:
            self._turns[key] = Turns(means.rotary, fmt.sink_tokens)
        return self._turns[key]

    def prepare_step(self, rows: StepRows) -> GpuStepPlan:
        table = self._page_table([view.page_ids for view in rows.views])
        if self._latest is not None and self._latest.rows.is_decode:
            self._ways = self._latest.used
        before = self._latest if self._latest is not None and len(self._latest.views) == len(rows.views) else None
        self._latest = GpuStepPlan(rows, table, before)
        return self._latest

    def step_key(self, stores: Sequence[LayerStore], plan: StepPlan) -> StepKey | None:
        assert isinstance(plan, GpuStepPlan)
        if len(self._ways) != 1 or not plan.rows.is_decode:
            return None  # not known yet, or not the same in all layers
        launch, scale, reach, cap = self._ways[0]
        if reach != NO_WINDOW or not launch.can_append:
            return None
        launch_plan = plan.plan_for(*self._ways[0])
        return StepKey(launch, scale, cap, launch_plan[1:], plan.page_table.shape[1])

    def step_inputs(self, stores: Sequence[LayerStore], plan: StepPlan) -> StepInputs:
        assert isinstance(plan, GpuStepPlan)
        key = self.step_key(stores, plan)
        assert key is not None
        layers = [store.step_arrays(plan, key.launch) for store in stores if isinstance(store, GpuStore)]
        return StepInputs(key, [plan.plan_for(*self._ways[0]).array, plan.page_table], layers)

    def _page_table(self, ids: list[PageIds]) -> mx.array:
        """(B, width) int32, rows padded; uploaded only when a sequence's pages have changed."""
        if len(ids) != len(self._table_of) or any(a is not b for a, b in zip(ids, self._table_of, strict=True)):
            longest = max(1, *(len(row) for row in ids))
            width = -(-longest // MIN_ELEMENTS) * MIN_ELEMENTS  # seldom another one, which would be another graph
            table = np.zeros((len(ids), width), np.int32)
            for row, pages in zip(table, ids, strict=True):
                row[: len(pages)] = pages
            self._table_of, self._table = ids, mx.array(table)
        return self._table


@cache
def device_kernels(dialect: Dialect) -> DecodeKernels:
    """The decode kernels of this machine's GPU: all layers and runtimes share them."""
    return DecodeKernels(dialect)


@cache
def device_page_kernels(dialect: Dialect) -> PageKernels:
    """The page kernels of this machine's GPU."""
    return PageKernels(dialect)


@cache
def device_flash_kernels(dialect: Dialect) -> FlashKernels:
    """The prefill kernels of this machine's GPU."""
    return FlashKernels(dialect)


def device_dialect() -> Dialect:
    """Of the kernels for this machine's GPU. Raises UnsupportedFormatError when it has none, or too old a one."""
    if mx.metal.is_available():
        return "metal"
    if not mx.cuda.is_available():
        raise UnsupportedFormatError("KV backend 'gpu' needs Metal or CUDA; MLX has neither here")
    if compute_capability() < MIN_CAPABILITY:
        wanted, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, compute_capability()))
        raise UnsupportedFormatError(f"KV backend 'gpu' needs compute capability {wanted}, this GPU has {found}")
    return "cuda"
