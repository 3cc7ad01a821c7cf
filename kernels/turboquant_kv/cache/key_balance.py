"""Factors between queries and keys: what a codec loses of a key is moved to where queries do not look.

A codec spreads its error evenly over a key's dims. Scores only see that error times the query, so dims on which keys
are large and queries small are kept needlessly well, and those on which queries are large spoil scores. Multiplying
keys by f and dividing queries by f, dim by dim, leaves every score as it is and moves the error: the error of a score
is least at f = sqrt(query size / key size). Both are averages over the pairs that the error can hurt: a pair of weight
p in attention counts p (1 - p), so neither tokens that nobody reads nor queries that stare at one token matter. Dims
that turn together have one factor, so that factors and turns commute and hold at every position.

Owns how factors are found and applied. Caches hold keys and exact rows so multiplied, and means do as well. Backends
know nothing of it, but for stores whose decode kernel does the multiplying (`LayerStore.balances`).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.cache.protocol import LayerInput
from turboquant_kv.codec.rotary import Rotary

NUM_ROUNDS = 2  # size of queries and of keys is weighted by the other's; it settles at once
# Sizes are those of one text. Full factors (1.0) and their roots (0.5) leave 3% more KL at 3t/2t on SmolLM2-135M.
SHRINKAGE = 0.75
MOST = 64.0  # half precision overflows at 65504
# Below this share of error taken away factors are not worth two multiplications a layer.
LEAST_GAIN = 0.05
RECENT_TOKENS = 48  # before a query; they are exact when it asks

Floats = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def find_factors(residuals: Floats, queries: Floats, weights: Floats, rotary: Rotary) -> Floats | None:
    """Factors (H, D) of a layer's keys, their geometric mean about 1; None where they gain little.

    residuals (H, T, D): keys less their means; queries (H, R, D), rows of all heads of a group; weights (H, R, T):
    attention p (1 - p), zero where the key is exact when the query asks.
    """
    k2, q2 = residuals.astype(np.float64) ** 2, queries.astype(np.float64) ** 2
    factors = np.ones((k2.shape[0], k2.shape[2]))
    for _ in range(NUM_ROUNDS):
        of_queries, of_keys = _sizes(k2, q2, weights, factors, rotary)
        factors = (of_queries / of_keys) ** 0.25
    factors = factors**SHRINKAGE
    factors /= np.exp(np.log(factors).mean(axis=1, keepdims=True))  # a common one changes nothing
    factors = np.clip(factors, 1 / MOST, MOST)
    before = _score_error(k2, q2, weights, np.ones_like(factors))
    if _score_error(k2, q2, weights, factors) >= (1 - LEAST_GAIN) * before:  # both are zero where nothing has weight
        return None
    return factors.astype(np.float32)


def attention_weights(
    scores: Floats, positions: npt.NDArray[np.int64], hidden: npt.NDArray[np.bool_], num_exact: int
) -> Floats:
    """p (1 - p) of scores (H, R, T) of queries at `positions` (R,), for keys from num_exact on: (H, R, T - num_exact).

    Zero for the keys that are hidden (R, T) from a query, and for its RECENT_TOKENS.
    """
    shown = np.where(hidden, -np.inf, scores)
    p = np.exp(shown - shown.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    is_recent = np.arange(scores.shape[-1]) > positions[:, None] - RECENT_TOKENS
    return np.where(is_recent, 0.0, p * (1 - p))[..., num_exact:].astype(np.float32)


def _sizes(k2: Float64, q2: Float64, weights: Floats, factors: Float64, rotary: Rotary) -> tuple[Float64, Float64]:
    """(H, D) each: mean squares of queries and of keys, one for dims that turn together, never zero."""
    key_norms, query_norms = (k2 * factors[:, None] ** 2).sum(-1), (q2 / factors[:, None] ** 2).sum(-1)
    of_queries = np.einsum("hr,hrd->hd", np.einsum("hrt,ht->hr", weights, key_norms), q2)
    of_keys = np.einsum("ht,htd->hd", np.einsum("hrt,hr->ht", weights, query_norms), k2)
    for sizes in (of_queries, of_keys):
        both = (sizes[:, rotary.first] + sizes[:, rotary.second]) / 2
        sizes[:, rotary.first], sizes[:, rotary.second] = both, both
        sizes += 1e-6 * sizes.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    return of_queries, of_keys


def _score_error(k2: Float64, q2: Float64, weights: Floats, factors: Float64) -> float:
    """Weighted squared error of scores, up to the codec's own constant."""
    key_norms, query_norms = (k2 * factors[:, None] ** 2).sum(-1), (q2 / factors[:, None] ** 2).sum(-1)
    return float(np.einsum("hrt,hr,ht->", weights, query_norms, key_norms, optimize=True))


class KeyBalance:
    """The factors of one layer's keys as MLX applies them."""

    def __init__(self, factors: Floats) -> None:
        """factors: (H, D), positive."""
        self._factors = factors
        self._arrays: dict[tuple[mx.Dtype, int], tuple[mx.array, mx.array]] = {}
        self._floats: dict[int, tuple[Floats, Floats]] = {}

    def to_store(self, step: LayerInput) -> LayerInput:
        """A layer's step with its keys multiplied and its queries divided."""
        keys, queries = self._of(step.keys.dtype, step.queries.shape[1])
        return step._replace(keys=step.keys * keys, queries=step.queries * queries.astype(step.queries.dtype))

    def floats_to_store(self, queries: Floats, keys: Floats) -> None:
        """The same in place, for queries (B, Hq, T, D) and keys (B, H, T, D) in NumPy's memory."""
        of_keys, of_queries = self.factors_of(queries.shape[1])
        keys *= of_keys[:, None]
        queries *= of_queries[:, None]

    def factors_of(self, num_q_heads: int) -> tuple[Floats, Floats]:
        """What keys (H, D) and queries (Hq, D) are multiplied by, in NumPy's memory."""
        if num_q_heads not in self._floats:
            keys, queries = (np.ascontiguousarray(np.array(x)[:, 0]) for x in self._of(mx.float32, num_q_heads))
            self._floats[num_q_heads] = keys, queries
        return self._floats[num_q_heads]

    def keys_to_store(self, keys: mx.array) -> mx.array:
        """Keys (..., H, T, D) of the model as stores hold them."""
        return keys * self._of(keys.dtype, len(self._factors))[0]

    def keys_from_store(self, keys: mx.array) -> mx.array:
        """The inverse."""
        return keys * self._of(keys.dtype, len(self._factors))[1]

    def _of(self, dtype: mx.Dtype, num_q_heads: int) -> tuple[mx.array, mx.array]:
        """What keys (H, 1, D) and queries (Hq, 1, D) are multiplied by."""
        if (dtype, num_q_heads) not in self._arrays:
            inverse = np.repeat(1 / self._factors, num_q_heads // len(self._factors), axis=0)
            both = tuple(mx.array(x[:, None].astype(np.float32)).astype(dtype) for x in (self._factors, inverse))
            mx.eval(*both)
            self._arrays[dtype, num_q_heads] = both[0], both[1]
        return self._arrays[dtype, num_q_heads]
