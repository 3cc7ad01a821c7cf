"""One new token of each conversation in all layers of a model, computed by one call of who holds the model's weights.

Owns which caches allow that and the step's books; layer_cache.py is the same layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turboquant_kv.backends.base import LayerStore, StepPlan
from turboquant_kv.cache.key_balance import KeyBalance
from turboquant_kv.cache.layer_cache import CompressedCache
from turboquant_kv.cache.step import BatchStep


class TokenStep:
    """A step that has begun and that no layer has written yet. Ends by `done` or `undo`."""

    def __init__(self, step: BatchStep, caches: Sequence[CompressedCache]) -> None:
        pool = caches[0].source.pool
        assert pool is not None
        self._step, self._layers = step, [cache.source.layer for cache in caches]
        self.stores: list[LayerStore] = [pool.stores[layer] for layer in self._layers]
        self.balances: list[KeyBalance | None] = [pool.balances[layer] for layer in self._layers]

    @property
    def plan(self) -> StepPlan:
        """What the backend prepared for all layers."""
        return self._step.plan

    @property
    def positions(self) -> list[int]:
        """(B,) of the new tokens."""
        return self._step.before.lengths

    def done(self) -> None:
        """All layers have written."""
        self._step.done(*self._layers)

    def undo(self) -> None:
        """The step never happened."""
        self._step.undo()


def begin_token(caches: Sequence[Any], num_rows: int) -> TokenStep | None:
    """A step of one token of each of `num_rows` conversations in these layers' caches.

    None, and nothing is done, unless all of them are layers of one pool whose backend computes in NumPy's memory, with
    rows stored as the model has them. Raises as attention does.
    """
    if not caches or not all(isinstance(cache, CompressedCache) for cache in caches):
        return None
    pool = caches[0].source.pool
    if pool is None or not all(cache.source.pool is pool and cache.takes_tokens for cache in caches):
        return None
    if len({cache.source.layer for cache in caches}) != len(caches) or caches[0].num_conversations != num_rows:
        return None
    first = caches[0].begin_step(1)
    try:
        for cache in caches[1:]:
            if cache.begin_step(1) is not first:  # rows that are not the same conversations in all layers
                first.undo()
                return None
    except BaseException:
        first.undo()
        raise
    return TokenStep(first, caches)
