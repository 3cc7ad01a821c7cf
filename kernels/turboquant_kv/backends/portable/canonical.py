"""Storage in the canonical layout (docs/codec.md), written once for NumPy and for MLX arrays.

Owns what the bytes mean: rotating, centring, encoding, decoding. Leaves out where they are kept
(a backend's `PageArrays`) and the attention walk (tiles.py). `xp` is numpy or mlx.core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import Array, CanonicalPages, ExactRows, LayerShape, Means, PageIds
from turboquant_kv.backends.portable import codes
from turboquant_kv.backends.portable.tiles import Tile
from turboquant_kv.codec.codebook import centroids
from turboquant_kv.codec.format import KVFormat
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


@dataclass(frozen=True, slots=True)
class ArrayKit:
    """How a backend's arrays differ from the other's, beyond `xp`."""

    xp: Any
    from_numpy: Callable[[npt.NDArray[Any]], Array]
    to_numpy: Callable[[Array], npt.NDArray[Any]]
    to_floats: Callable[[Array], Array]  # exact rows to float32
    from_floats: Callable[[Array, LayerShape], Array]  # and back to exact rows
    look_up: Callable[[npt.NDArray[np.float32]], Callable[[Array], Array]]  # table -> (indices -> rows, flattened)


@cache
def _rotation(kit: ArrayKit, dim: int, seed: int, which: Which) -> Array:
    """One array for all layers."""
    return kit.from_numpy(rotation_matrix(dim, seed, which))


@cache
def _tables(kit: ArrayKit, bits: int) -> tuple[Array, tuple[Array, Array], Callable[[Array], Array]]:
    """Centroids, the tables that find codes and the function that unpacks them, the same for all layers."""
    start_codes, limits = codes.search_grid(bits)
    search = kit.from_numpy(start_codes), kit.from_numpy(limits)
    return kit.from_numpy(centroids(bits)), search, kit.look_up(codes.unpacking_table(bits))


class Side:
    """Keys or values of one layer: rotation, mean, codebook and page arrays."""

    def __init__(
        self, kit: ArrayKit, which: Which, bits: int, dim: int, fmt: KVFormat, mean: Any, arrays: PageArrays
    ) -> None:
        self._kit, self.bits, self.dim, self.fmt, self.arrays = kit, bits, dim, fmt, arrays
        self.rotation = _rotation(kit, dim, fmt.rotation_seed, which)
        self.mean = kit.from_numpy(mean) if fmt.centred and mean is not None else None
        self._book, self._search, self._look_up = _tables(kit, bits)

    def encode(self, page_ids: PageIds, rows: Array) -> None:
        """Write exact rows (H, P*page, D) as pages."""
        x = self._kit.to_floats(rows)
        if self.mean is not None:
            x = x - self.mean[:, None]
        y = x @ self.rotation.T
        packed, scales = codes.encode(self._kit.xp, y, self.bits, self.fmt.scale, self._book, self._search)
        pages = (rows.shape[0], len(page_ids), self.fmt.page_tokens)
        self.arrays.put(page_ids, packed.reshape(*pages, -1).swapaxes(0, 1), scales.reshape(pages).swapaxes(0, 1))

    def centroids_of(self, page_ids: PageIds) -> tuple[Array, Array]:
        """Unscaled centroids (H, P*page, D) and scales (H, P*page), float32, rotated basis."""
        packed, scales = self.arrays.get(page_ids)
        num_heads = packed.shape[1]
        by_head = packed.swapaxes(0, 1).reshape(num_heads, -1, packed.shape[-1])
        decoded = self._look_up(codes.table_indices(self._kit.xp, by_head, self.bits))
        by_head_scales = scales.swapaxes(0, 1).reshape(num_heads, -1).astype(self._kit.xp.float32)
        return decoded.reshape(num_heads, -1, self.dim), by_head_scales

    def values_of(self, page_ids: PageIds) -> Array:
        """Decoded vectors (H, P*page, D), float32, in the model's basis."""
        c, s = self.centroids_of(page_ids)
        x = (c * s[..., None]) @ self.rotation
        return x if self.mean is None else x + self.mean[:, None]


class CanonicalStorage:
    """Pages of one layer; implements base.PageStorage and tiles.TileSource."""

    def __init__(
        self,
        kit: ArrayKit,
        shape: LayerShape,
        fmt: KVFormat,
        means: Means | None,
        new_arrays: Callable[[int, int, int], PageArrays],
    ) -> None:
        """new_arrays(num_heads, dim, bits) makes one side's arrays."""
        self._kit, self.shape, self.fmt = kit, shape, fmt
        heads = shape.num_kv_heads
        self._k = Side(
            kit, "k", fmt.k_bits, shape.k_dim, fmt, means and means.k, new_arrays(heads, shape.k_dim, fmt.k_bits)
        )
        self._v = Side(
            kit, "v", fmt.v_bits, shape.v_dim, fmt, means and means.v, new_arrays(heads, shape.v_dim, fmt.v_bits)
        )

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

    def encode(self, page_ids: PageIds, k: Array, v: Array) -> None:
        self._k.encode(page_ids, k)
        self._v.encode(page_ids, v)

    def decode(self, page_ids: PageIds) -> tuple[Array, Array]:
        k, v = self._k.values_of(page_ids), self._v.values_of(page_ids)
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
        return Tile(*self._k.centroids_of(page_ids), *self._v.centroids_of(page_ids))

    def exact_tile(self, rows: ExactRows) -> Tile:
        return Tile(self._kit.to_floats(rows.k), None, self._kit.to_floats(rows.v), None)

    def rotate_queries(self, q: Array) -> tuple[Array, Array | None]:
        mean = self._k.mean
        return q @ self._k.rotation.T, None if mean is None else q @ mean[..., None]

    def restore_output(self, rotated: Array, mass: Array) -> Array:
        out = rotated @ self._v.rotation
        return out if self._v.mean is None else out + mass * self._v.mean[:, None]
