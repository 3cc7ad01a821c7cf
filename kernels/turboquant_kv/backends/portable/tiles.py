"""Attention over one sequence, tile by tile, written once for NumPy and for MLX arrays.

Owns the order of the walk (sink, compressed pages, exact window), who sees what, and the online
softmax. Leaves out where pages live: a storage hands over decoded tiles. At no time is more than
one tile of the history in full precision.

The two array libraries share names for everything used here; `xp` is the module (numpy or mlx.core).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from turboquant_kv.backends.base import Array, ExactBuffers, ExactRows, PageIds, SequenceView
from turboquant_kv.codec.format import KVFormat

NEG_INF = float("-inf")


class Tile(NamedTuple):
    """Consecutive tokens ready for two matrix products, all float32.

    k (H, n, D) and v (H, n, Dv) in the basis of the state that takes them; compressed tiles hold
    centroids and bring their scales (H, n), exact ones None.
    """

    k: Array
    k_scales: Array | None
    v: Array
    v_scales: Array | None


class TileSource(Protocol):
    """What a storage must know for attention."""

    fmt: KVFormat
    window: int

    def tile(self, page_ids: PageIds) -> Tile: ...

    def exact_tile(self, rows: ExactRows) -> Tile: ...

    def rotate_queries(self, q: Array) -> Array:
        """q (H, R, D) to the keys' rotated basis."""
        ...

    def mean_scores(self, q: Array, first_page: int, num_pages: int) -> Array | None:
        """q (H, R, D), not rotated, times the mean of each key of a conversation's pages: (H, R, num_pages * page).

        None when keys are not centred.
        """
        ...

    def restore_output(self, rotated: Array, mass: Array) -> Array:
        """Sum of p * centroids (H, R, Dv) back to the model's basis, plus mass (H, R, 1) * mean_v."""
        ...


@dataclass(slots=True)
class OnlineSoftmax:
    """Running maximum, mass and weighted sum of a softmax that sees its keys in pieces.

    peak, mass (H, R, 1); total (H, R, Dv). Rows that saw nothing have peak -inf and mass 0.
    """

    xp: Any
    peak: Array
    mass: Array
    total: Array

    @classmethod
    def empty(cls, xp: Any, num_heads: int, num_rows: int, v_dim: int) -> OnlineSoftmax:
        return cls(
            xp,
            xp.full((num_heads, num_rows, 1), NEG_INF, dtype=xp.float32),
            xp.zeros((num_heads, num_rows, 1), dtype=xp.float32),
            xp.zeros((num_heads, num_rows, v_dim), dtype=xp.float32),
        )

    def absorb(self, scores: Array, v: Array, v_scales: Array | None) -> None:
        """Add keys with scores (H, R, n) and values v (H, n, Dv)."""
        xp = self.xp
        peak = xp.maximum(self.peak, scores.max(axis=-1, keepdims=True))
        finite_peak = xp.where(peak == NEG_INF, 0.0, peak)  # a row that sees nothing yet must not make NaN
        weights = xp.exp(scores - finite_peak)
        fade = xp.exp(self.peak - finite_peak)
        self.mass = self.mass * fade + weights.sum(axis=-1, keepdims=True)
        if v_scales is not None:
            weights = weights * v_scales[:, None, :]
        self.total = self.total * fade + weights @ v
        self.peak = peak


def merge(compressed: Array, c: OnlineSoftmax, exact: OnlineSoftmax, sink_logits: Array | None) -> Array:
    """Both parts by log-sum-exp. compressed: c.total in the model's basis; sink_logits (H, R, 1)."""
    xp = c.xp
    peak = xp.maximum(c.peak, exact.peak)
    if sink_logits is not None:
        peak = xp.maximum(peak, sink_logits)
    peak = xp.where(peak == NEG_INF, 0.0, peak)
    weight_c, weight_e = xp.exp(c.peak - peak), xp.exp(exact.peak - peak)
    mass = c.mass * weight_c + exact.mass * weight_e
    if sink_logits is not None:
        mass = mass + xp.exp(sink_logits - peak)
    total = compressed * weight_c + exact.total * weight_e
    return total / xp.where(mass == 0.0, 1.0, mass)  # a row that may see nothing gives zeros


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which query rows may see which keys, by absolute position (format.py's rule)."""

    fmt: KVFormat
    positions: np.ndarray[Any, np.dtype[np.int64]]  # (T,) of the query rows
    window: int = 0  # keys that a query sees, its own included; 0: all before it

    @property
    def page_of_query(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return (self.positions - self.fmt.sink_tokens) // self.fmt.page_tokens

    def of_pages(self, first: int, last: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """(T, tokens of pages first..last-1), or None when all rows see all of them."""
        page_of_query, start = self.page_of_query, self.fmt.page_start(first)
        if page_of_query[0] >= last and self._reach(start):
            return None
        seen: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(first, last)[None] < page_of_query[:, None]
        seen = np.repeat(seen, self.fmt.page_tokens, axis=1)
        return seen & self._within(start + np.arange(seen.shape[1]))

    def _reach(self, position: int) -> bool:
        """Whether all rows' windows reach back to a position."""
        return not self.window or position > self.positions[-1] - self.window

    def _within(self, keys: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(T, n): whether keys at these positions are no further back than a row's window reaches."""
        first = self.positions - (self.window or self.positions[-1] + 1)
        within: np.ndarray[Any, np.dtype[np.bool_]] = keys[None] > first[:, None]
        return within

    def of_sink(self, num_keys: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        if self.positions[0] >= num_keys - 1 and self._reach(0):
            return None
        seen: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(num_keys)[None] <= self.positions[:, None]
        return seen & self._within(np.arange(num_keys))

    def of_window(self, start: int, num_keys: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        keys = np.arange(start, start + num_keys)
        if len(self.positions) == 1 and keys[-1] == self.positions[0] and self._reach(start):
            return None  # decode: the window is the query's own page, up to the query
        same_page = (keys - self.fmt.sink_tokens)[None] // self.fmt.page_tokens == self.page_of_query[:, None]
        seen: np.ndarray[Any, np.dtype[np.bool_]] = same_page & (keys[None] <= self.positions[:, None])
        return seen & self._within(keys)

    @property
    def first_page(self) -> int:
        """Of those that any row sees; none before it is looked at."""
        oldest = int(self.positions[0]) - self.window + 1 if self.window else 0
        return max(0, oldest - self.fmt.sink_tokens) // self.fmt.page_tokens


class ExtraMask:
    """A caller's mask (bool or additive) over absolute positions, cut to tiles as (H or 1, R, n)."""

    def __init__(self, xp: Any, mask: Array, num_kv_heads: int, num_groups: int, num_rows: int) -> None:
        """mask: (T, N), (1, T, N) or (Hq, T, N), already this sequence's."""
        if mask.ndim == 2:
            mask = mask[None]
        if mask.shape[0] == 1:
            self._mask = xp.concatenate([mask] * num_groups, axis=1)  # rows are group-major
        else:
            self._mask = mask.reshape(num_kv_heads, num_groups * num_rows, mask.shape[-1])
        self._xp = xp
        self._is_bool = "bool" in str(mask.dtype)

    def apply(self, scores: Array, start: int, num_keys: int) -> Array:
        part = self._mask[..., start : start + num_keys]
        if self._is_bool:
            return self._xp.where(part, scores, NEG_INF)
        return scores + part.astype(self._xp.float32)


class SequenceAttention:
    """Attention of one sequence's query rows over its view."""

    def __init__(self, xp: Any, source: TileSource, *, tile_tokens: int) -> None:
        self._xp = xp
        self._source = source
        self._tile_tokens = tile_tokens

    def attend(
        self,
        q: Array,
        view: SequenceView,
        exact_rows: ExactBuffers,
        *,
        v_dim: int,
        mask: Array | None,
        sinks: Array | None,
        cap: float = 0.0,
    ) -> Array:
        """q (H, G, T, D) float32, already scaled; mask (1 or Hq, T, N); sinks (Hq,); cap 0: none. To (H, G, T, Dv)."""
        xp = self._xp
        num_heads, num_groups, num_rows, _ = q.shape
        rows = q.reshape(num_heads, num_groups * num_rows, -1)
        extra = None if mask is None else ExtraMask(xp, mask, num_heads, num_groups, num_rows)
        positions = np.arange(view.q_start, view.q_start + num_rows)
        visible = Visibility(self._source.fmt, positions, self._source.window)

        exact = OnlineSoftmax.empty(xp, num_heads, rows.shape[1], v_dim)
        for tile, start, seen in self._exact_tiles(view, exact_rows, visible):
            scores = self._scores(rows, tile, None, cap, seen, extra, start, num_groups)
            exact.absorb(scores, tile.v, None)

        compressed = OnlineSoftmax.empty(xp, num_heads, rows.shape[1], v_dim)
        rotated, fmt = self._source.rotate_queries(rows), self._source.fmt
        for tile, start, seen in self._page_tiles(view, visible, rows.shape[1]):
            first_page, num_pages = (start - fmt.sink_tokens) // fmt.page_tokens, tile.k.shape[1] // fmt.page_tokens
            mean_scores = self._source.mean_scores(rows, first_page, num_pages)
            scores = self._scores(rotated, tile, mean_scores, cap, seen, extra, start, num_groups)
            compressed.absorb(scores, tile.v, tile.v_scales)

        restored = self._source.restore_output(compressed.total, compressed.mass)
        sink_logits = None
        if sinks is not None:
            sink_logits = xp.repeat(sinks.reshape(num_heads, num_groups, 1), num_rows, axis=1)
        out = merge(restored, compressed, exact, sink_logits)
        return out.reshape(num_heads, num_groups, num_rows, v_dim)

    def _exact_tiles(
        self, view: SequenceView, rows: ExactBuffers, visible: Visibility
    ) -> Iterator[tuple[Tile, int, Any]]:
        if view.sink is not None:
            span = slice(view.sink.first, view.sink.first + view.sink.num_rows)
            tile = self._source.exact_tile(ExactRows(rows.sink_k[:, span], rows.sink_v[:, span]))
            yield tile, 0, visible.of_sink(tile.k.shape[1])
        if view.window is not None:
            span = slice(view.window.first, view.window.first + view.window.num_rows)
            tile = self._source.exact_tile(ExactRows(rows.window_k[:, span], rows.window_v[:, span]))
            yield tile, view.window.start, visible.of_window(view.window.start, tile.k.shape[1])

    def _page_tiles(self, view: SequenceView, visible: Visibility, num_rows: int) -> Iterator[tuple[Tile, int, Any]]:
        fmt = self._source.fmt
        # Many query rows want fewer keys at a time: the score tile is what bounds the scratch.
        tokens = max(fmt.page_tokens, min(self._tile_tokens, (1 << 20) // num_rows))
        step = max(1, tokens // fmt.page_tokens)
        last_seen = int(visible.page_of_query[-1])
        num_pages = max(0, min(len(view.page_ids), last_seen))
        for first in range(visible.first_page, num_pages, step):
            last = min(first + step, num_pages)
            tile = self._source.tile(view.page_ids[first:last])
            yield tile, fmt.page_start(first), visible.of_pages(first, last)

    def _scores(
        self,
        q: Array,
        tile: Tile,
        offset: Array | None,
        cap: float,
        seen: Any,
        extra: ExtraMask | None,
        start: int,
        num_groups: int,
    ) -> Array:
        xp = self._xp
        scores = q @ tile.k.swapaxes(-1, -2)
        if tile.k_scales is not None:
            scores = scores * tile.k_scales[:, None, :]
        if offset is not None:
            scores = scores + offset
        if cap:
            scores = cap * xp.tanh(scores / cap)
        if seen is not None:
            seen_rows = xp.array(np.tile(seen, (num_groups, 1)))
            scores = xp.where(seen_rows[None], scores, NEG_INF)
        if extra is not None:
            scores = extra.apply(scores, start, tile.k.shape[1])
        return scores
