"""Storage in the canonical layout (docs/codec.md), written once for NumPy and for MLX arrays.

Owns centring and rotation around a codec's kernels (kernels.py). Leaves out where bytes are kept
(a backend's `PageArrays`) and the attention walk (tiles.py). `xp` is numpy or mlx.core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np

from turboquant_kv.backends.base import (
    Array,
    CanonicalPages,
    ExactRows,
    LayerShape,
    Means,
    PageIds,
    PageWrites,
)
from turboquant_kv.backends.portable.kernels import kernels_for
from turboquant_kv.backends.portable.kit import ArrayKit
from turboquant_kv.backends.portable.tiles import Tile
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import BLOCK_TOKENS
from turboquant_kv.codec.rotation import Which, rotation_matrix


class PageArrays(Protocol):
    """Codes (H, page, bytes) uint8 and scales (H, page) float16 of one side, by page id."""

    @property
    def num_pages(self) -> int: ...

    @property
    def allocated_bytes(self) -> int: ...

    def grow(self, num_pages: int) -> None: ...

    def put(self, page_ids: PageIds, packed: Array, scales: Array) -> None:
        """packed (P, H, page, bytes), scales (P, H, page)."""
        ...

    def get(self, page_ids: PageIds) -> tuple[Array, Array]:
        """The same shapes, copied."""
        ...


@cache
def _rotation(kit: ArrayKit, dim: int, seed: int, which: Which) -> Array:
    """One array for all layers."""
    return kit.from_numpy(rotation_matrix(dim, seed, which))


class Side:
    """Keys or values of one layer: rotation, codec and page arrays."""

    def __init__(self, kit: ArrayKit, which: Which, codec: Codec, dim: int, fmt: KVFormat, arrays: PageArrays) -> None:
        self._kit, self.dim, self.fmt, self.arrays = kit, dim, fmt, arrays
        self.rotation = _rotation(kit, dim, fmt.rotation_seed, which)
        self._kernels = kernels_for(kit, codec)

    def encode(self, page_ids: PageIds, rows: Array, mean: Array | None) -> None:
        """Write exact rows (H, P*page, D), less `mean` (broadcast against them), as pages."""
        x = self._kit.to_floats(rows)
        if mean is not None:
            x = x - mean
        pages = (rows.shape[0], len(page_ids), self.fmt.page_tokens)
        # Page by page: the last bit of a product may depend on how many rows there are, and a page's codes must not
        # depend on whose pages are encoded with it.
        packed, scales = self._kernels.encode(x.reshape(*pages, self.dim) @ self.rotation.T)
        self.arrays.put(page_ids, packed.reshape(*pages, -1).swapaxes(0, 1), scales.reshape(pages).swapaxes(0, 1))

    def unscaled(self, page_ids: PageIds) -> tuple[Array, Array]:
        """Decoded values before scaling (H, P*page, D) and scales (H, P*page), float32, rotated basis."""
        packed, scales = self.arrays.get(page_ids)
        num_heads = packed.shape[1]
        by_head = packed.swapaxes(0, 1).reshape(num_heads, -1, packed.shape[-1])
        by_head_scales = scales.swapaxes(0, 1).reshape(num_heads, -1).astype(self._kit.xp.float32)
        return self._kernels.decode(by_head, self.dim), by_head_scales

    def values_of(self, page_ids: PageIds, mean: Array | None) -> Array:
        """Decoded vectors (H, P*page, D), float32, in the model's basis; mean: as they were encoded."""
        c, s = self.unscaled(page_ids)
        x = (c * s[..., None]) @ self.rotation
        return x if mean is None else x + mean


class CanonicalStorage:
    """Pages of one layer; with all of base.LayerStore but attention; implements tiles.TileSource."""

    def __init__(
        self,
        kit: ArrayKit,
        shape: LayerShape,
        fmt: KVFormat,
        means: Means | None,
        new_arrays: Callable[[int, int, Codec], PageArrays],
    ) -> None:
        """new_arrays(num_heads, dim, codec) makes one side's arrays.

        Raises UnsupportedFormatError for a codec without portable kernels.
        """
        self._kit, self.shape, self.fmt = kit, shape, fmt
        heads = shape.num_kv_heads
        k_arrays, v_arrays = new_arrays(heads, shape.k_dim, fmt.keys), new_arrays(heads, shape.v_dim, fmt.values)
        self._k = Side(kit, "k", fmt.keys, shape.k_dim, fmt, k_arrays)
        self._v = Side(kit, "v", fmt.values, shape.v_dim, fmt, v_arrays)
        self._means = means if fmt.centred else None
        self._v_mean = None if self._means is None else kit.from_numpy(self._means.v)[:, None]  # (H, 1, Dv)

    @property
    def num_pages(self) -> int:
        return self._k.arrays.num_pages

    @property
    def allocated_bytes(self) -> int:
        return self._k.arrays.allocated_bytes + self._v.arrays.allocated_bytes

    def grow(self, num_pages: int) -> None:
        if num_pages > self.num_pages:
            self._k.arrays.grow(num_pages)
            self._v.arrays.grow(num_pages)

    def _k_mean(self, numbers: PageIds) -> Array | None:
        """Of each token of pages that have these numbers in their conversations, (H, P*page, D)."""
        if self._means is None:
            return None
        return self._kit.from_numpy(self._means.k_rows(self.fmt, numbers))

    def encode(self, pages: PageWrites, k: Array, v: Array) -> None:
        rows = pages.rows(self.fmt.page_tokens)
        if len(rows) != k.shape[1] or rows[0] != 0 or (np.diff(rows) != 1).any():
            index = self._kit.from_numpy(rows)
            k, v = k[:, index], v[:, index]
        self._k.encode(pages.page_ids, k, self._k_mean(pages.numbers))
        self._v.encode(pages.page_ids, v, self._v_mean)

    def decode(self, page_ids: PageIds, first_page: int) -> tuple[Array, Array]:
        k = self._k.values_of(page_ids, self._k_mean(first_page + np.arange(len(page_ids))))
        v = self._v.values_of(page_ids, self._v_mean)
        return self._kit.from_floats(k, self.shape), self._kit.from_floats(v, self.shape)

    def read(self, page_ids: PageIds) -> CanonicalPages:
        k, v = self._k.arrays.get(page_ids), self._v.arrays.get(page_ids)
        return CanonicalPages(*(self._kit.to_numpy(a) for a in (*k, *v)))

    def write(self, page_ids: PageIds, pages: CanonicalPages) -> None:
        pages.check(self.shape, self.fmt)
        convert = self._kit.from_numpy
        self._k.arrays.put(page_ids, convert(pages.k_codes), convert(pages.k_scales))
        self._v.arrays.put(page_ids, convert(pages.v_codes), convert(pages.v_scales))

    def tile(self, page_ids: PageIds) -> Tile:
        return Tile(*self._k.unscaled(page_ids), *self._v.unscaled(page_ids))

    def exact_tile(self, rows: ExactRows) -> Tile:
        return Tile(self._kit.to_floats(rows.k), None, self._kit.to_floats(rows.v), None)

    def rotate_queries(self, q: Array) -> Array:
        return q @ self._k.rotation.T

    def mean_scores(self, q: Array, first_page: int, num_pages: int) -> Array | None:
        return (
            None
            if self._means is None
            else block_mean_scores(self._kit, self._means, self.fmt, q, first_page, num_pages)
        )

    def restore_output(self, rotated: Array, mass: Array) -> Array:
        out = rotated @ self._v.rotation
        return out if self._v_mean is None else out + mass * self._v_mean


def block_mean_scores(kit: ArrayKit, means: Means, fmt: KVFormat, q: Array, first_page: int, num_pages: int) -> Array:
    """q (H, R, D), not rotated, times each key's mean: (H, R, num_pages * page)."""
    num_blocks = num_pages * fmt.page_tokens // BLOCK_TOKENS
    blocks = kit.from_numpy(means.k_blocks(fmt.page_start(first_page), num_blocks))
    return kit.xp.repeat(q @ blocks.swapaxes(-1, -2), BLOCK_TOKENS, axis=-1)
