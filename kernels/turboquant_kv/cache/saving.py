"""A cache's state as a tree of MLX arrays and one header, for mlx-lm's prompt cache files.

Pages leave in the canonical layout, so a file written by one backend loads in another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import CanonicalPages, ExactRows, LayerShape, Means
from turboquant_kv.cache.sequence import LayerSequence
from turboquant_kv.codec.format import KVFormat

if TYPE_CHECKING:
    from turboquant_kv.cache.layer_cache import PoolSource, TurboQuantKVCache


def save_state(cache: TurboQuantKVCache) -> tuple[Any, ...]:
    """(header JSON, arrays ...): the format, geometry and means, sink rows, canonical pages, tail rows."""
    if cache.sequence is None:
        return (json.dumps({"format": cache.source.fmt.to_dict()}),)
    pool = cache.sequence.pool
    sink, pages, tail = cache.sequence.save()
    dtype = pool.shape.dtype

    def exact(rows: ExactRows | None) -> list[mx.array]:
        if rows is None:
            return [mx.zeros((0,)), mx.zeros((0,))]
        return [pool.backend.to_mlx(rows.k, dtype), pool.backend.to_mlx(rows.v, dtype)]

    header = {
        "format": pool.fmt.to_dict(),
        "shape": [pool.shape.num_kv_heads, pool.shape.k_dim, pool.shape.v_dim],
        "tail_start": cache.sequence.tail_start,
        "dtype": str(dtype).removeprefix("mlx.core."),
    }
    codes = [mx.array(a) for a in (pages.k_codes, pages.k_scales, pages.v_codes, pages.v_scales)]
    means = [mx.array(pool.means.k), mx.array(pool.means.v)] if pool.means else []
    return (json.dumps(header), *exact(sink), *codes, *exact(tail), *means)


def load_states(states: Sequence[Sequence[Any]]) -> list[TurboQuantKVCache]:
    """Inverse of save_state for rows of one batch, into one new pool.

    Raises ValueError when arrays contradict their header.
    """
    from turboquant_kv.cache.layer_cache import PoolSource, TurboQuantKVCache

    header = json.loads(states[0][0])
    means = None
    full = next((s for s in states if len(s) > 1), None)
    if full is not None and len(full) > 9:
        means = Means(np.array(full[9]), np.array(full[10]))
    source = PoolSource(KVFormat.from_dict(header["format"]), "auto", means)
    return [TurboQuantKVCache(source, _load_one(source, state)) for state in states]


def _load_one(source: PoolSource, state: Sequence[Any]) -> LayerSequence | None:
    if len(state) == 1:
        return None
    header = json.loads(state[0])
    if KVFormat.from_dict(header["format"]) != source.fmt:
        raise ValueError("saved rows of one batch have different formats")
    dtype = getattr(mx, header["dtype"])
    num_kv_heads, k_dim, v_dim = header["shape"]
    pool = source.get(LayerShape(num_kv_heads, k_dim, v_dim, dtype))

    def exact(k: mx.array, v: mx.array, start: int) -> ExactRows | None:
        if k.size == 0:
            return None
        if k.dtype != dtype or v.dtype != dtype:
            raise ValueError(f"exact rows are {k.dtype}, the header says {dtype}")
        return ExactRows(start, pool.backend.from_mlx(k), pool.backend.from_mlx(v))

    pages = CanonicalPages(*(np.array(a) for a in state[3:7]))
    sequence = LayerSequence(pool)
    sequence.load(exact(state[1], state[2], 0), pages, exact(state[7], state[8], header["tail_start"]))
    return sequence
