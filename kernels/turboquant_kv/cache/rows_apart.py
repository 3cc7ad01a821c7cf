"""Conversations that decode side by side and are computed one by one, for models whose batches cannot be trusted.

Rows keep the caches that they had alone, of whatever class and format, so a row gets what it gets alone.
`forward` runs the model over such a batch, or over any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.single_rows import SingleRows

Around = Callable[[Sequence[int]], AbstractContextManager[object]]


def _nothing(places: Sequence[int]) -> AbstractContextManager[object]:
    return nullcontext()


Model = Any  # an mlx-lm model: model(tokens (B, T), cache=[...]) -> logits (B, T, V)


class RowsApart(SingleRows):
    """Rows of one cache that are computed one by one."""


def merge_apart(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """One batch per cache, in lists as the model has them, over copies of these conversations' caches."""
    by_cache = zip(*(leaves(row) for row in rows), strict=True)
    return with_leaves(rows[0], [RowsApart.copied(caches) for caches in by_cache])


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
