"""A model's decode step in this process: chained greedy steps by the clock, over caches of random content."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from turboquant_kv.backends.base import CanonicalPages
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.layer_contents import LayerContents, restore
from turboquant_kv.cache.runtime import KVRuntime


def chained_step_s(forward: Callable[[mx.array], mx.array], num_rows: int, num_steps: int) -> float:
    """Median seconds of a greedy step; the next one is handed over before the last one's tokens are read."""
    tokens = mx.ones((num_rows, 1), mx.int32)
    stamps = []
    for _ in range(num_steps + 3):
        following = mx.argmax(forward(tokens)[:, -1:], axis=-1)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        mx.eval(tokens)
        stamps.append(time.perf_counter())
        tokens = following
    mx.eval(tokens)
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[2:]))


def random_caches(runtime: KVRuntime, num_tokens: int) -> list[Any]:
    """Caches of about that many tokens with random content, the same in all layers."""
    caches = runtime.make_cache()
    fmt, rng = runtime.fmt, np.random.default_rng(0)
    paged: dict[int, LayerContents] = {}
    for cache, shape in zip(caches, runtime.shapes, strict=True):
        assert shape is not None
        heads, dims = shape.num_kv_heads, (shape.k_dim, shape.v_dim)
        if isinstance(cache, KVCache):
            cache.update_and_fetch(*(mx.random.normal((1, heads, num_tokens, d)).astype(shape.dtype) for d in dims))
            mx.eval(cache.keys, cache.values)
            continue
        assert isinstance(cache, TurboQuantKVCache) and fmt is not None
        if not paged:
            lead = (num_tokens - fmt.sink_tokens) // fmt.page_tokens, heads, fmt.page_tokens
            sides = []
            for codec, dim in zip((fmt.keys, fmt.values), dims, strict=True):
                sides.append(rng.integers(0, 256, (*lead, codec.code_bytes(dim)), np.uint8))
                sides.append(rng.uniform(0.5, 1.5, lead).astype(np.float16))
            sink, tail = (
                tuple(mx.random.normal((heads, n, d)).astype(shape.dtype) for d in dims) for n in (fmt.sink_tokens, 1)
            )
            shared = LayerContents(shape, sink, CanonicalPages(*sides), tail)  # type: ignore[arg-type]
        paged[cache.source.layer] = shared
    if paged:
        pool = next(cache.source.pool for cache in caches if isinstance(cache, TurboQuantKVCache))
        assert pool is not None
        sequence = restore(pool, paged)
        for cache in caches:
            if isinstance(cache, TurboQuantKVCache):
                cache.sequence = sequence.of_layer(cache.source.layer)
    return caches
