"""A prompt's rows get the same bits whatever the chunks that it is read in, at every level."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import History, feed, new_cache, random_queries

from turboquant_kv.backends.base import Means
from turboquant_kv.backends.native import backend
from turboquant_kv.backends.native.backend import load_kernels
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the native kernels are not built")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()
DIM, SCALE = 64, 0.125
LEAST = 9  # rows of a chunk; fewer are attended in integers, as decode steps are


def means_of(rng: np.random.Generator, kind: str, num_kv_heads: int) -> Means | None:
    if kind == "none":
        return None
    keys, values = (rng.normal(0, size, (num_kv_heads, DIM)).astype(np.float32) for size in (2.0, 0.1))
    return Means(
        keys, values, Rotary(1e4 ** (-np.arange(DIM // 2) / (DIM / 2)), 1, DIM // 2) if kind == "turn" else None
    )


def random_edges(rng: np.random.Generator, num_tokens: int) -> list[int]:
    edges = [0]
    while num_tokens - edges[-1] > 2 * LEAST:
        edges.append(int(rng.integers(edges[-1] + LEAST, min(edges[-1] + 150, num_tokens - LEAST) + 1)))
    return [*edges, num_tokens]


@pytest.mark.parametrize("means", ["none", "stay", "turn"])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("level", LEVELS)
def test_rows_get_the_same_bits_in_any_chunks(
    level: str, group: int, means: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "isa_choice", lambda: level)
    num_kv_heads, num_tokens = 2, int(rng.integers(140, 420))
    taken = means_of(rng, means, num_kv_heads)
    history = History.random(rng, num_kv_heads, num_tokens, DIM, dtype=mx.float32)
    queries = random_queries(rng, group * num_kv_heads, num_tokens, DIM, mx.float32)

    def read(edges: list[int]) -> Any:
        cache = new_cache(KVFormat(4, 4), "cpu-native", taken)
        parts = [feed(cache, history, a, b, queries[:, :, a:b], SCALE) for a, b in itertools.pairwise(edges)]
        return np.concatenate([np.array(part) for part in parts], axis=2)

    whole = read([0, num_tokens])
    for _ in range(4):
        edges = random_edges(rng, num_tokens)
        assert np.array_equal(read(edges), whole), edges
