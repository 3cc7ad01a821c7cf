"""The CPU backend: pages in NumPy arrays in the canonical layout, computed on at once (not lazily).

MLX arrays are read through zero-copy views. Owns the page slabs; leaves the walk to tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

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

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]

# Untouched pages of a slab cost address space only, so a slab can be far larger than what is held:
# the operating system provides memory on the first write. 1024 pages are 64K tokens.
SLAB_PAGES = 1024
# 1024 tokens x 2 heads x 128 dims of float32 are 1 MiB: decoded tiles stay in the second-level cache.
TILE_TOKENS = 1024

# Of exact rows; bfloat16, which NumPy lacks, as its bits.
NUMPY_DTYPES: dict[mx.Dtype, npt.DTypeLike] = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}


def as_rows(x: mx.array) -> Rows:
    """Zero-copy NumPy view; bfloat16, which NumPy lacks, as its bits in uint16. Evaluates x."""
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def as_floats(rows: Rows) -> Floats:
    """Exact rows (float32, float16 or bfloat16 bits) in float32."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def from_floats(x: Floats, dtype: mx.Dtype) -> Rows:
    """Inverse of as_floats for the rows of a model of this dtype; bfloat16 rounds to nearest even."""
    if dtype != mx.bfloat16:
        return x.astype(np.float16 if dtype == mx.float16 else np.float32)
    word = np.ascontiguousarray(x).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def row_look_up(table: Floats) -> Callable[[Rows], Floats]:
    """Rows of a (n, 1, 2 or 4) float32 table by index, flattened into the last axis."""
    # A row is 4, 8 or 16 bytes: taken as one item, NumPy copies it in a single move.
    item = {1: np.float32, 2: np.complex64, 4: np.complex128}[table.shape[1]]
    items: Rows = np.ascontiguousarray(table).view(item).ravel()
    return lambda index: np.take(items, index, mode="clip").view(np.float32)


KIT = ArrayKit(
    xp=np,
    from_numpy=lambda a: a,
    to_numpy=lambda a: a,
    to_floats=as_floats,
    from_floats=lambda x, shape: from_floats(x, shape.dtype),
    look_up=row_look_up,
)


class SlabArrays:
    """Page arrays in slabs that never move, so growing copies nothing."""

    def __init__(self, num_heads: int, dim: int, codec: Codec, page_tokens: int) -> None:
        self._scale_shape = (SLAB_PAGES, num_heads, page_tokens)
        self._code_shape = (*self._scale_shape, codec.code_bytes(dim))
        self._codes: list[npt.NDArray[np.uint8]] = []
        self._scales: list[npt.NDArray[np.float16]] = []
        self._page_bytes = num_heads * page_tokens * codec.vector_bytes(dim)
        self.num_pages = 0

    @property
    def allocated_bytes(self) -> int:
        """Of the pages that were ever given out; the rest of the last slab is untouched."""
        return self.num_pages * self._page_bytes

    def grow(self, num_pages: int) -> None:
        while len(self._codes) * SLAB_PAGES < num_pages:
            self._codes.append(np.empty(self._code_shape, np.uint8))
            self._scales.append(np.empty(self._scale_shape, np.float16))
        self.num_pages = num_pages

    def put(self, page_ids: PageIds, packed: Rows, scales: Rows) -> None:
        for i, (slab, index) in enumerate(self._places(page_ids)):
            self._codes[slab][index] = packed[i]
            self._scales[slab][index] = scales[i]

    def get(self, page_ids: PageIds) -> tuple[Rows, Rows]:
        if len(self._codes) == 1 or not len(page_ids):
            return (
                np.empty((0, *self._code_shape[1:]), np.uint8) if not self._codes else self._codes[0][page_ids],
                np.empty((0, *self._scale_shape[1:]), np.float16) if not self._scales else self._scales[0][page_ids],
            )
        places = self._places(page_ids)
        return (
            np.stack([self._codes[slab][index] for slab, index in places]),
            np.stack([self._scales[slab][index] for slab, index in places]),
        )

    def _places(self, page_ids: PageIds) -> list[tuple[int, int]]:
        return [divmod(int(page), SLAB_PAGES) for page in page_ids]


@lru_cache(maxsize=1)
def keep_numpy_single_threaded() -> None:
    """Give NumPy's own BLAS one thread: its idle workers spin, and would take the cores from MLX's."""
    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas" and "numpy" in library.filepath:
            library.set_num_threads(1)


class NumpyRowStore(LayerStore):
    """A layer's exact rows in NumPy arrays."""

    def _make_rows(self, shape: LayerShape) -> None:
        dtype = NUMPY_DTYPES[shape.dtype]
        self._rows = RowArrays(np, shape, lambda heads, n, dim: np.empty((heads, n, dim), dtype), lambda places: places)

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def grow_rows(self, num_rows: int) -> None:
        self._rows.grow(num_rows)

    def put_rows(self, first: int, rows: ExactRows) -> None:
        self._rows.put(first, rows)

    def get_rows(self, first: int, num_rows: int) -> ExactRows:
        span = slice(first, first + num_rows)
        return ExactRows(self._rows.k[:, span].copy(), self._rows.v[:, span].copy())

    def move_rows(self, order: PageIds) -> None:
        self._rows.move(order)

    def exact(self) -> ExactBuffers:
        return self._rows.buffers

    def append(self, plan: StepPlan, keys: mx.array, values: mx.array) -> ExactBuffers:
        assert isinstance(plan, RowPlan)
        return self._rows.append(plan, self._from_mlx(keys), self._from_mlx(values), self.encode)

    def _from_mlx(self, x: mx.array) -> Rows:
        return as_rows(x)


class NumpyStore(CanonicalStorage, NumpyRowStore):
    """One layer's pages in the canonical layout, attended over tile by tile."""

    def __init__(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> None:
        super().__init__(
            KIT, shape, fmt, means, lambda heads, dim, codec: SlabArrays(heads, dim, codec, fmt.page_tokens)
        )
        self._make_rows(shape)

    def attend(self, call: AttentionCall) -> mx.array:
        return attend_by_tiles(self, self.shape, call)


class NumpyBackend(Backend):
    """Readable and portable; the native kernels replace it where they are built."""

    name = "cpu-numpy"

    def __init__(self) -> None:
        keep_numpy_single_threaded()

    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        return NumpyStore(shape, fmt, means)

    def prepare_step(self, rows: StepRows) -> RowPlan:
        return RowPlan(rows, lambda places: places)

    def from_mlx(self, x: mx.array) -> Rows:
        return as_rows(x)

    def to_mlx(self, rows: Rows, dtype: mx.Dtype) -> mx.array:
        x = mx.array(np.ascontiguousarray(rows))
        return x.view(mx.bfloat16) if dtype == mx.bfloat16 else x

    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        mx.eval(*arrays)  # at once: each wait costs a thread switch


def attend_by_tiles(source: TileSource, shape: LayerShape, call: AttentionCall) -> mx.array:
    """LayerStore.attend in NumPy over decoded tiles: any mask, any number of query rows."""
    q = as_floats(as_rows(call.queries)) * np.float32(call.scale)
    batch, num_q_heads, num_rows, _ = q.shape
    heads, v_dim = shape.num_kv_heads, shape.v_dim
    walk = SequenceAttention(np, source, tile_tokens=TILE_TOKENS)
    mask = None if call.mask is None else as_mask(call.mask, batch)
    sinks = None if call.sinks is None else as_floats(as_rows(call.sinks))
    out = np.zeros((batch, num_q_heads, num_rows, v_dim), np.float32)
    for b, view in enumerate(call.views):
        n = view.num_queries
        if n == 0:
            continue
        grouped = q[b, :, :n].reshape(heads, num_q_heads // heads, n, -1)
        row_mask = None if mask is None else mask[b][:, :n]
        result = walk.attend(grouped, view, call.exact, v_dim=v_dim, mask=row_mask, sinks=sinks, cap=call.cap)
        out[b, :, :n] = result.reshape(num_q_heads, n, v_dim)
    return mx.array(out).astype(call.queries.dtype)


def as_mask(mask: mx.array, batch: int) -> Rows:
    """A mask of 2 to 4 dimensions as (B, 1 or Hq, T, N); additive ones in float32."""
    values: Rows = np.asarray(mask if mask.dtype == mx.bool_ else mask.astype(mx.float32))
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    return np.broadcast_to(values, (batch, *values.shape[1:]))
