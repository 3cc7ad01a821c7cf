"""The GPU backend: fused decode attention straight on the packed pages, for Metal and CUDA.

Pages stay in the canonical layout (docs/gpu.md says why that costs nothing), in MLX arrays. Owns page tables and
exact rows as the kernels take them. Prefill (more than 8 query rows), array masks and encoding are the MLX operations
of mlx_ops.py over the same pages; `details` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import ExactRows, LayerShape, Means, PageIds, SequenceView
from turboquant_kv.backends.canonical import CanonicalStorage
from turboquant_kv.backends.gpu_launch import (
    MAX_QUERY_ROWS,
    MIN_ELEMENTS,
    DecodeShape,
    LayerInputs,
    RowFigures,
    decode_attention,
    variant_for,
)
from turboquant_kv.backends.gpu_source import DecodeKernels, Dialect, device_kernels
from turboquant_kv.backends.mlx_ops import KIT, GrowingArrays, MlxBackend
from turboquant_kv.codebook import centroids
from turboquant_kv.format import KVFormat, UnsupportedFormatError
from turboquant_kv.rotation import rotation_matrix


class OpenArrays(GrowingArrays):
    """Page arrays that kernels may read."""

    @property
    def codes(self) -> mx.array:
        return self._codes

    @property
    def scales(self) -> mx.array:
        return self._scales


class GpuStorage(CanonicalStorage):
    """Pages of one layer with everything else that its decode kernels read."""

    def __init__(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> None:
        self._arrays: list[OpenArrays] = []

        def new_arrays(heads: int, dim: int, bits: int) -> OpenArrays:
            self._arrays.append(OpenArrays(heads, dim, bits, fmt.page_tokens))
            return self._arrays[-1]

        super().__init__(KIT, shape, fmt, means, new_arrays)
        heads = shape.num_kv_heads
        k_turn = rotation_matrix(shape.k_dim, fmt.rotation_seed, "k")
        self._rotations = (
            mx.array(np.stack([k_turn, k_turn.T])),
            mx.array(rotation_matrix(shape.v_dim, fmt.rotation_seed, "v")),
        )
        centred = means is not None and fmt.centred
        self._means = (
            mx.array(means.k) if centred and means else mx.zeros((heads, shape.k_dim)),
            mx.array(means.v) if centred and means else mx.zeros((heads, shape.v_dim)),
        )
        self._books = mx.array(centroids(fmt.k_bits)), mx.array(centroids(fmt.v_bits))
        self._no_rows = mx.zeros((heads, 1, shape.k_dim), shape.dtype), mx.zeros((heads, 1, shape.v_dim), shape.dtype)
        self._table_of: list[PageIds] = []
        self._table = mx.zeros((1, MIN_ELEMENTS), mx.int32)

    def page_table(self, views: Sequence[SequenceView]) -> mx.array:
        """(B, width) int32, rows padded; uploaded only when a sequence's pages have changed."""
        ids = [view.page_ids for view in views]
        if len(ids) != len(self._table_of) or any(a is not b for a, b in zip(ids, self._table_of, strict=True)):
            width = max(MIN_ELEMENTS, *(len(row) for row in ids))
            table = np.zeros((len(ids), width), np.int32)
            for row, pages in zip(table, ids, strict=True):
                row[: len(pages)] = pages
            self._table_of, self._table = ids, mx.array(table)
        return self._table

    def layer_inputs(self, sink: tuple[mx.array, mx.array], window: tuple[mx.array, mx.array]) -> LayerInputs:
        if self.num_pages == 0:
            self.grow(1)  # kernels take no empty arrays
        k, v = self._arrays
        return LayerInputs(
            *(k.codes, k.scales, v.codes, v.scales, *self._rotations, *self._means, *self._books),
            *(*sink, *window),
        )

    def join(self, parts: Sequence[ExactRows | None]) -> tuple[tuple[mx.array, mx.array], list[int]]:
        """Exact rows of a batch behind each other, (H, rows, D) and (H, rows, Dv), and where each sequence's begin."""
        present = [rows for rows in parts if rows is not None]
        counts = [0 if rows is None else int(rows.k.shape[1]) for rows in parts]
        offsets = [sum(counts[:i]) for i in range(len(counts))]
        if not present:
            return self._no_rows, offsets
        if len(present) == 1:
            return (present[0].k, present[0].v), offsets
        k, v = (mx.concatenate([getattr(rows, side) for rows in present], axis=1) for side in ("k", "v"))
        return (k, v), offsets


class GpuBackend(MlxBackend):
    """Fused kernels for decoding, MLX operations for the rest."""

    name = "gpu"

    def __init__(self, dialect: Dialect | None = None, kernels: DecodeKernels | None = None) -> None:
        """Raises UnsupportedFormatError where MLX has neither Metal nor CUDA. `kernels` replaces the device's own."""
        self._dialect = dialect or _device_dialect()
        self._kernels = kernels
        self.name = f"gpu-{self._dialect}"

    @property
    def details(self) -> str:
        """What runs where, for logs and statistics."""
        return (
            f"decode attention (up to {MAX_QUERY_ROWS} query rows): fused {self._dialect} kernels; "
            "prefill, array masks and encoding: MLX operations on the same pages"
        )

    def new_storage(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> GpuStorage:
        """Raises UnsupportedFormatError for a geometry without a kernel: at load time, not at the first token."""
        decode_shape(shape.num_kv_heads, 1, shape.dtype, shape, fmt)
        return GpuStorage(shape, fmt, means)

    def attend(
        self,
        queries: mx.array,
        views: Sequence[SequenceView],
        storage: Any,
        *,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        if mask is not None or queries.shape[2] > MAX_QUERY_ROWS:
            return super().attend(queries, views, storage, scale=scale, mask=mask, sinks=sinks)
        shape = decode_shape(queries.shape[1], queries.shape[2], queries.dtype, storage.shape, storage.fmt)
        sink, sink_offsets = storage.join([view.sink for view in views])
        window, window_offsets = storage.join([view.window for view in views])
        rows = [
            RowFigures(
                *(view.q_start, view.num_queries, len(view.page_ids)),
                *(sink_offsets[i], _num_rows(view.sink)),
                *(window_offsets[i], 0 if view.window is None else view.window.start, _num_rows(view.window)),
            )
            for i, view in enumerate(views)
        ]
        return decode_attention(
            self._kernels or device_kernels(self._dialect, variant_for(self._dialect, shape)),
            shape,
            storage.layer_inputs(sink, window),
            queries,
            rows,
            storage.page_table(views),
            scale=scale,
            sinks=sinks,
        )


@lru_cache(maxsize=256)
def decode_shape(num_q_heads: int, num_rows: int, dtype: mx.Dtype, layer: LayerShape, fmt: KVFormat) -> DecodeShape:
    """What these queries' kernels are compiled for. Raises UnsupportedFormatError when there are none."""
    shape = DecodeShape(
        *(num_q_heads, layer.num_kv_heads, layer.k_dim, layer.v_dim, fmt.k_bits, fmt.v_bits),
        *(fmt.page_tokens, fmt.sink_tokens, num_rows, dtype, layer.dtype),
    )
    shape.check()
    return shape


def _num_rows(rows: ExactRows | None) -> int:
    return 0 if rows is None else int(rows.k.shape[1])


def _device_dialect() -> Dialect:
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    raise UnsupportedFormatError("KV backend 'gpu' needs Metal or CUDA; MLX has neither here")
