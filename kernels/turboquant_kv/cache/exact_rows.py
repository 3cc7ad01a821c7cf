"""ExactRegion: exact rows of one conversation's sink or tail, in all of its layers, counted and shared by forks.

Owns when rows are copied: forks share a region until one of them writes, and a region that is too small is replaced by
a larger one. A replacement copies each layer's old rows when that layer first writes to it.
"""

from __future__ import annotations

from collections.abc import Collection

from turboquant_kv.backends.base import Array, ExactRows
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import exact_capacity


class ExactRegion:
    """Buffers k (H, capacity, D) and v (H, capacity, Dv) per layer, made when the layer first writes.

    Its bytes, in all its layers, are in the pool's books from the start to the last holder's `release`.
    """

    __slots__ = ("_k", "_nbytes", "_num_holders", "_num_rows", "_old", "_pool", "_v", "capacity")

    def __init__(
        self, pool: PagePool, layers: Collection[int], capacity: int, old: tuple[ExactRegion, int] | None = None
    ) -> None:
        """Held once. old: a region and how many of its rows come first in this one."""
        self._pool, self.capacity, self._old = pool, capacity, old
        self._k: dict[int, Array] = {}
        self._v: dict[int, Array] = {}
        self._num_holders, self._num_rows = 1, 0
        self._nbytes = capacity * sum(pool.shapes[layer].raw_token_bytes for layer in layers)
        pool.exact_bytes += self._nbytes

    @property
    def is_shared(self) -> bool:
        return self._num_holders > 1

    def hold(self) -> None:
        """One more conversation has these rows."""
        self._num_holders += 1

    def release(self) -> None:
        """One conversation less; the last one takes rows and bytes with it."""
        self._num_holders -= 1
        assert self._num_holders >= 0, "exact rows were released twice"
        if self._num_holders == 0:
            self._pool.exact_bytes -= self._nbytes
            self._pool.num_exact_rows -= self._num_rows
            self._k, self._v, self._old = {}, {}, None

    def write(self, layer: int, start: int, k: Array, v: Array) -> None:
        """A layer's rows k (H, T, D), v (H, T, Dv) from row `start` on; needs no other holder."""
        backend = self._pool.backend
        if layer not in self._k:
            self._open(layer)
        self._k[layer] = backend.write_rows(self._k[layer], start, k)
        self._v[layer] = backend.write_rows(self._v[layer], start, v)
        num_rows = start + int(k.shape[1])
        if num_rows != self._num_rows:
            self._pool.num_exact_rows += num_rows - self._num_rows
            self._num_rows = num_rows

    def _open(self, layer: int) -> None:
        """A layer's buffers, with the rows of the region that this one replaces."""
        shape, backend = self._pool.shapes[layer], self._pool.backend
        self._k[layer] = backend.empty_rows(shape.num_kv_heads, self.capacity, shape.k_dim, shape.dtype)
        self._v[layer] = backend.empty_rows(shape.num_kv_heads, self.capacity, shape.v_dim, shape.dtype)
        if self._old is not None:
            region, num_rows = self._old
            old = region.rows(layer, 0, num_rows)
            self._k[layer] = backend.write_rows(self._k[layer], 0, old.k)
            self._v[layer] = backend.write_rows(self._v[layer], 0, old.v)

    def settle(self) -> None:
        """All layers have written: the region that this one replaces is not needed any more."""
        self._old = None

    def rows(self, layer: int, first_position: int, num_rows: int) -> ExactRows:
        """A layer's first rows; nothing is copied."""
        return ExactRows(first_position, self._k[layer], self._v[layer], num_rows)

    def arrays(self, layer: int) -> list[Array]:
        """A layer's buffers, none before it has written."""
        return [self._k[layer], self._v[layer]] if layer in self._k else []


def grown(
    region: ExactRegion | None, layers: Collection[int], pool: PagePool, num_rows: int, num_new: int, most: int
) -> ExactRegion:
    """A region that takes `num_new` rows behind the first `num_rows`: the same one if nobody shares it and it has room.

    `most`: rows that it will ever hold. A new one is held once; the old one stays held.
    """
    wanted = exact_capacity(num_rows + num_new, most)
    if region is None:
        return ExactRegion(pool, layers, wanted)
    if not region.is_shared and region.capacity >= num_rows + num_new:
        return region
    old = (region, num_rows) if num_rows else None
    return ExactRegion(pool, layers, max(wanted, region.capacity), old)
