"""Heads whose dimension has no rotation: stored as vectors of the next dimension that has one, with zeros behind.

Zeros change no product of queries and keys, and what values have behind their end is cut off again. Pages and exact
rows cost what the stored dimension does, and are so counted; what is called uncompressed is counted without zeros.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.cache.protocol import LayerInput
from turboquant_kv.codec.format import stored_dim


def stored_shape(shape: LayerShape) -> LayerShape:
    """The geometry that a layer's pages and exact rows have. Raises UnsupportedFormatError (codec/limits.py)."""
    return replace(shape, k_dim=stored_dim(shape.k_dim), v_dim=stored_dim(shape.v_dim))


def stored_means(means: Means, shape: LayerShape) -> Means:
    """Means as they are taken off stored vectors; factors of what lies behind the true ones are 1."""
    factors = None
    if means.key_factors is not None:
        factors = widened_rows(means.key_factors - 1, shape.k_dim) + 1
    return Means(widened_rows(means.k, shape.k_dim), widened_rows(means.v, shape.v_dim), means.rotary, factors)


def widened_rows(x: npt.NDArray[np.float32], dim: int) -> npt.NDArray[np.float32]:
    """x (..., d) as (..., dim)."""
    wide = np.zeros((*x.shape[:-1], dim), np.float32)
    wide[..., : x.shape[-1]] = x
    return wide


def widened(x: mx.array, dim: int) -> mx.array:
    """x (..., d) as (..., dim)."""
    return x if x.shape[-1] == dim else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, dim - x.shape[-1])])


def widened_step(step: LayerInput, shape: LayerShape) -> LayerInput:
    """A step's keys, values and queries in a layer's stored dimensions."""
    keys, values, queries = step.keys, step.values, step.queries
    return step._replace(
        keys=widened(keys, shape.k_dim), values=widened(values, shape.v_dim), queries=widened(queries, shape.k_dim)
    )
