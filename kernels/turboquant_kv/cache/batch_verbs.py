"""What is done to all caches of a conversation, or of a batch, at once: layer by layer, in the model's order.

Whoever runs a model says it through these verbs and never layer by layer, so that one place can see, and repeat
elsewhere, all that happens to caches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from turboquant_kv.cache.rows_apart import merge_apart


class BatchVerbs:
    """Verbs over a list with one cache per layer. Holds nothing itself."""

    def prepare_rows(self, batch: Sequence[Any], lengths: Sequence[int], right_padding: Sequence[int]) -> None:
        """The next pass brings so many tokens of each row, with padding behind them."""
        for cache in batch:
            cache.prepare(lengths=lengths, right_padding=right_padding)

    def finalize_rows(self, batch: Sequence[Any]) -> None:
        """That pass is over."""
        for cache in batch:
            cache.finalize()

    def filter_rows(self, batch: Sequence[Any], indices: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        kept = mx.array(list(indices))  # as mlx-lm's own caches take them
        mx.eval(kept)
        for cache in batch:
            cache.filter(kept)

    def trim_rows(self, batch: Sequence[Any], counts: Sequence[int]) -> None:
        """Take so many tokens off each row's end."""
        for cache in batch:
            cache.trim_rows(counts)

    def extract_row(self, batch: Sequence[Any], index: int) -> list[Any]:
        """One row as a conversation of its own, sharing pages; the batch stays as it is."""
        return [cache.extract(index) for cache in batch]

    def merge_apart(self, singles: Sequence[Sequence[Any]]) -> list[Any]:
        """A batch whose rows are computed one by one (rows_apart.py)."""
        return merge_apart(singles)

    def copy(self, caches: Sequence[Any]) -> list[Any]:
        """The same conversation once more, sharing pages and arrays until one of the two is written."""
        return copy.deepcopy(list(caches))

    def cut_back(self, caches: Sequence[Any], num_tokens: int) -> bool:
        """Trim a conversation whose layers may hold different numbers of tokens; whether all hold so many now."""
        for cache in caches:
            surplus = cache.size() - num_tokens
            if surplus > 0 and cache.is_trimmable():
                cache.trim(surplus)
        return all(cache.size() == num_tokens for cache in caches)
