"""One layer's exact rows in two arrays, and what a step does with them, written once for NumPy and for MLX arrays.

Owns moving rows: between places, from a step's new keys and values, into a step's own window. Which rows go where is
decided for all layers at once (backends.base.StepRows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from turboquant_kv.backends.base import (
    Array,
    ExactBuffers,
    ExactRows,
    LayerShape,
    PageIds,
    PageWrites,
    StepPlan,
    StepRows,
)

Encode = Callable[[PageWrites, Array, Array], None]
"""Page ids and places, keys (H, rows, D) and values (H, rows, Dv)."""


class Move(NamedTuple):
    """Rows by number, as slices where they follow each other, else as arrays that index."""

    source: Any
    target: Any

    @classmethod
    def of(cls, pairs: PageIds, index: Callable[[PageIds], Any]) -> Move | None:
        """pairs (2, n): from and to; None without rows."""
        if not pairs.shape[1]:
            return None
        source, target = (index(places) if (span := _span(places)) is None else span for places in pairs)
        return cls(source, target)


class RowPlan(StepPlan):
    """Which rows a step moves, as one array library indexes them; made once for all layers."""

    def __init__(self, rows: StepRows, index: Callable[[PageIds], Any]) -> None:
        """index turns row numbers into what the library indexes by."""
        super().__init__(rows)
        self.copies = None if rows.copies is None else Move.of(rows.copies, index)
        self.writes = Move.of(rows.writes, index)
        self.num_window = 0
        self.held = self.new = None  # what the step's own window is made of: held rows and new ones
        if rows.window is not None:
            pairs, self.num_window = rows.window_pairs()
            self.held, self.new = (Move.of(side, index) for side in pairs)


class RowArrays:
    """Keys (H, rows, D) and values (H, rows, Dv) in the model's dtype."""

    def __init__(self, xp: Any, shape: LayerShape, new_rows: Callable[[int, int, int], Array], index: Any) -> None:
        """new_rows(H, n, D) makes an array, of whatever contents; index turns row numbers into what `xp` indexes by."""
        self._xp, self._new_rows, self._index = xp, new_rows, index
        self._dims = shape.num_kv_heads, shape.k_dim, shape.v_dim
        self.k, self.v = new_rows(shape.num_kv_heads, 0, shape.k_dim), new_rows(shape.num_kv_heads, 0, shape.v_dim)

    @property
    def num_rows(self) -> int:
        return int(self.k.shape[1])

    @property
    def buffers(self) -> ExactBuffers:
        return ExactBuffers(self.k, self.v, self.k, self.v)

    def grow(self, num_rows: int) -> None:
        """Hold at least so many rows; one side at a time, so that the peak stays small."""
        heads, k_dim, v_dim = self._dims
        more = num_rows - self.num_rows
        if more > 0:
            self.k = self._xp.concatenate([self.k, self._new_rows(heads, more, k_dim)], axis=1)
            self.v = self._xp.concatenate([self.v, self._new_rows(heads, more, v_dim)], axis=1)

    def put(self, first: int, rows: ExactRows) -> None:
        """Write rows from row `first` on."""
        span = slice(first, first + rows.num_rows)
        self.k[:, span], self.v[:, span] = rows.k, rows.v

    def move(self, order: PageIds) -> None:
        """Keep these rows, in this order."""
        index = self._index(order)
        self.k, self.v = self.k[:, index], self.v[:, index]

    def append(self, plan: RowPlan, keys: Array, values: Array, encode: Encode) -> ExactBuffers:
        """A step's keys (B, H, T, D) and values (B, H, T, Dv) to where they belong; the step's exact rows."""
        rows = plan.rows
        if plan.copies is not None:
            source, target = plan.copies
            self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]
        if rows.closed is not None:
            encode(rows.closed, self.k, self.v)
        k, v = self._flat(keys), self._flat(values)
        window = None
        if rows.window is not None:
            window = self._window(plan, self.k, k), self._window(plan, self.v, v)
            if rows.pages is not None:
                encode(rows.pages, *window)
        if plan.writes is not None:
            source, target = plan.writes
            self.k[:, target], self.v[:, target] = k[:, source], v[:, source]
        return self.buffers if window is None else ExactBuffers(self.k, self.v, *window)

    def _flat(self, new: Array) -> Array:
        """(B, H, T, D) as rows (H, B * T, D), row t of sequence b at b * T + t; copied only if need be."""
        batch, heads, num_new, dim = new.shape
        if batch == 1:
            return new.squeeze(0)
        if num_new == 1:
            return new.squeeze(2).swapaxes(0, 1)
        return new.swapaxes(0, 1).reshape(heads, batch * num_new, dim)

    def _window(self, plan: RowPlan, held: Array, new: Array) -> Array:
        """A step's own window: runs of held rows and of new ones behind each other."""
        assert plan.new is not None
        if plan.held is None and isinstance(plan.new.source, slice):
            return new[:, plan.new.source]
        heads, _, dim = new.shape
        window = self._new_rows(heads, plan.num_window, dim)
        for move, rows in ((plan.held, held), (plan.new, new)):
            if move is not None:
                window[:, move.target] = rows[:, move.source]
        return window


def _span(places: PageIds) -> slice | None:
    """The rows as a slice, if they follow each other."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places) or (len(places) > 1 and not (np.diff(places) == 1).all()):
        return None
    return slice(first, last + 1)
