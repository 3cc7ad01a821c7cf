"""The portable MLX backend: pages in MLX arrays, attention in MLX operations on the default device.

Lazy like everything in MLX; used on Metal and CUDA. Owns the page arrays; leaves the walk to tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import (
    AttentionCall,
    Backend,
    ExactBuffers,
    ExactRows,
    LayerShape,
    LayerStore,
    Means,
    PageIds,
    StepPlan,
    StepRows,
)
from turboquant_kv.backends.portable.canonical import CanonicalStorage
from turboquant_kv.backends.portable.kit import ArrayKit
from turboquant_kv.backends.portable.row_arrays import RowArrays, RowPlan
from turboquant_kv.backends.portable.tiles import SequenceAttention, TileSource
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat

# A GPU wants long tiles (launches cost more than scratch); 4096 tokens x 8 heads x 128 dims are 16 MiB.
TILE_TOKENS = 4096
# Arrays grow by a thirty-second, so at most 3% of a large pool is slack and a page is copied 32 times in all.
GROWTH_SHARE = 32
MIN_GROWTH_PAGES = 4


def row_look_up(table: npt.NDArray[np.float32]) -> Callable[[mx.array], mx.array]:
    """Rows of a float32 table by index."""
    rows = mx.array(table)
    return lambda index: rows[index]


KIT = ArrayKit(
    xp=mx,
    from_numpy=mx.array,
    to_numpy=np.array,
    to_floats=lambda rows: rows.astype(mx.float32),
    from_floats=lambda x, shape: x.astype(shape.dtype),
    look_up=row_look_up,
)


class GrowingArrays:
    """Page arrays that are replaced by larger ones: one side of one layer at a time, so the peak stays small."""

    def __init__(self, num_heads: int, dim: int, codec: Codec, page_tokens: int) -> None:
        lead = (0, num_heads, page_tokens)
        self._codes = mx.zeros((*lead, codec.code_bytes(dim)), mx.uint8)
        self._scales = mx.zeros(lead, mx.float16)

    @property
    def num_pages(self) -> int:
        return self._codes.shape[0]

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """Codes and scales of all pages."""
        return self._codes, self._scales

    @property
    def allocated_bytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def grown_to(self, num_pages: int) -> int:
        """Pages to make room for where `num_pages` are wanted."""
        return max(num_pages, self.num_pages + max(MIN_GROWTH_PAGES, self.num_pages // GROWTH_SHARE))

    def grow(self, num_pages: int) -> None:
        target = self.grown_to(num_pages)
        self._codes, self._scales = (
            mx.concatenate([old, mx.zeros((target - old.shape[0], *old.shape[1:]), old.dtype)])
            for old in (self._codes, self._scales)
        )
        mx.eval(self._codes, self._scales)

    def put(self, page_ids: PageIds, packed: mx.array, scales: mx.array) -> None:
        ids = mx.array(page_ids)
        self._codes[ids] = packed
        self._scales[ids] = scales

    def get(self, page_ids: PageIds) -> tuple[mx.array, mx.array]:
        ids = mx.array(page_ids)
        return self._codes[ids], self._scales[ids]


class MlxStore(CanonicalStorage, LayerStore):
    """One layer's pages in MLX arrays, attended over tile by tile in MLX operations."""

    def __init__(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> None:
        self._page_arrays: list[GrowingArrays] = []

        def new_arrays(heads: int, dim: int, codec: Codec) -> GrowingArrays:
            self._page_arrays.append(GrowingArrays(heads, dim, codec, fmt.page_tokens))
            return self._page_arrays[-1]

        super().__init__(KIT, shape, fmt, means, new_arrays)
        self._rows = RowArrays(mx, shape, lambda heads, n, dim: mx.zeros((heads, n, dim), shape.dtype), mx.array)

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def grow_rows(self, num_rows: int) -> None:
        self._rows.grow(num_rows)
        mx.eval(self._rows.k, self._rows.v)

    def put_rows(self, first: int, rows: ExactRows) -> None:
        self._rows.put(first, rows)

    def get_rows(self, first: int, num_rows: int) -> ExactRows:
        span = slice(first, first + num_rows)
        # a slice would keep all rows in memory, and from being written in place
        rows = ExactRows(*(mx.contiguous(x[:, span], allow_col_major=False) for x in (self._rows.k, self._rows.v)))
        mx.eval(*rows)
        return rows

    def move_rows(self, order: PageIds) -> None:
        self._rows.move(order)
        mx.eval(self._rows.k, self._rows.v)

    def exact(self) -> ExactBuffers:
        return self._rows.buffers

    def append(self, plan: StepPlan, keys: mx.array, values: mx.array) -> ExactBuffers:
        assert isinstance(plan, RowPlan)
        return self._rows.append(plan, keys, values, self.encode)

    def pending_arrays(self) -> list[mx.array]:
        return [self._rows.k, self._rows.v, *(array for side in self._page_arrays for array in side.arrays)]

    def attend(self, call: AttentionCall) -> mx.array:
        return attend_by_tiles(self, self.shape, call)


class MlxBackend(Backend):
    """Everything as MLX operations; correct on every device, fused kernels come beside it."""

    name = "mlx-ops"

    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        return MlxStore(shape, fmt, means)

    def prepare_step(self, rows: StepRows) -> StepPlan:
        return RowPlan(rows, mx.array)

    def from_mlx(self, x: mx.array) -> mx.array:
        return x

    def to_mlx(self, rows: mx.array, dtype: mx.Dtype) -> mx.array:
        return rows.astype(dtype)

    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        """Nothing to wait for: everything stays lazy."""


def attend_by_tiles(source: TileSource, shape: LayerShape, call: AttentionCall) -> mx.array:
    """LayerStore.attend in MLX operations over decoded tiles: any mask, any number of query rows."""
    q = call.queries.astype(mx.float32) * call.scale
    batch, num_q_heads, num_rows, _ = q.shape
    heads, v_dim = shape.num_kv_heads, shape.v_dim
    walk = SequenceAttention(mx, source, tile_tokens=TILE_TOKENS)
    sinks, mask = None if call.sinks is None else call.sinks.astype(mx.float32), call.mask
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mx.broadcast_to(mask, (batch, *mask.shape[1:]))
    outputs = []
    for b, view in enumerate(call.views):
        n = view.num_queries
        if n == 0:
            outputs.append(mx.zeros((num_q_heads, num_rows, v_dim), mx.float32))
            continue
        grouped = q[b, :, :n].reshape(heads, num_q_heads // heads, n, -1)
        row_mask = None if mask is None else mask[b][:, :n]
        result = walk.attend(grouped, view, call.exact, v_dim=v_dim, mask=row_mask, sinks=sinks, cap=call.cap)
        outputs.append(mx.pad(result.reshape(num_q_heads, n, v_dim), [(0, 0), (0, num_rows - n), (0, 0)]))
    return mx.stack(outputs).astype(call.queries.dtype)
