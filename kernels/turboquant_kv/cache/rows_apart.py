"""Conversations that decode side by side and are computed one by one, for models whose batches cannot be trusted.

Rows keep the caches that they had alone, of whatever class and format, so a row gets what it gets alone.
`forward` runs the model over such a batch, or over any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.protocol import AttendingCache, row_indices

Around = Callable[[Sequence[int]], AbstractContextManager[object]]


def _nothing(places: Sequence[int]) -> AbstractContextManager[object]:
    return nullcontext()


Model = Any  # an mlx-lm model: model(tokens (B, T), cache=[...]) -> logits (B, T, V)


class RowsApart:
    """Single-conversation caches of one kind, row by row; has the verbs of a batch that do not compute."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)

    def extend(self, other: RowsApart) -> None:
        """Take over the other batch's rows; it is empty afterwards."""
        self.rows += other.rows
        other.rows = []

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; the others' memory is given back."""
        kept = [self.rows[i] for i in row_indices(batch_indices)]
        for row in self.rows:
            if isinstance(row, AttendingCache) and not any(row is other for other in kept):
                row.release()
        self.rows = kept

    def extract(self, idx: int) -> Any:
        """Row `idx` as a single cache; pages and arrays are shared until one of the two is written."""
        return copy.deepcopy(self.rows[idx])

    def pending_arrays(self) -> list[Any]:
        """What is still to be computed, as `mx.eval` takes it."""
        return [row.pending_arrays() if isinstance(row, AttendingCache) else row.state for row in self.rows]

    def release(self) -> None:
        """Give all rows' memory back now; the batch is empty afterwards."""
        self.filter([])

    @property
    def nbytes(self) -> int:
        return sum(int(row.nbytes) for row in self.rows if not row.empty())

    @property
    def state(self) -> list[Any]:
        """Of every row."""
        return [row.state for row in self.rows]


def merge_apart(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """One batch per cache, in lists as the model has them, over copies of these conversations' caches."""
    by_cache = zip(*(leaves(row) for row in rows), strict=True)
    return with_leaves(rows[0], [RowsApart([copy.deepcopy(cache) for cache in caches]) for caches in by_cache])


def forward(model: Model, tokens: mx.array, batch: Sequence[Any], around: Around = _nothing) -> mx.array:
    """Logits (B, T, V) of tokens (B, T) over a batch with one cache per layer; rows that are apart one by one.

    around: entered while a pass is computed, told the places of its rows.
    """
    places, caches = range(tokens.shape[0]), leaves(batch)
    if not any(isinstance(cache, RowsApart) for cache in caches):
        with around(places):
            logits: mx.array = model(tokens, cache=batch)
        return logits
    rows = []
    for i in places:
        with around([i]):
            rows.append(model(tokens[i : i + 1], cache=with_leaves(batch, [cache.rows[i] for cache in caches])))
    return mx.concatenate(rows)
