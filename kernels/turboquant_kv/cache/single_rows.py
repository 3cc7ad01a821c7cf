"""Conversations that stand side by side in caches of their own: the verbs of a batch that do not compute.

Who attends over them, and how, is up to those that own such rows: mixed_batch.py and rows_apart.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from turboquant_kv.cache.protocol import AttendingCache, row_indices


class SingleRows:
    """Single-conversation caches of one kind, row by row."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)

    @classmethod
    def copied(cls, rows: Sequence[Any]) -> Self:
        """Over copies, each made by itself: a conversation may come twice."""
        return cls([copy.deepcopy(row) for row in rows])

    def extend(self, other: Self) -> None:
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
        """Of every row; for mlx-lm programs that evaluate it between steps."""
        return [row.state for row in self.rows]
