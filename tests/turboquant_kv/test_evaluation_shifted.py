"""A text at an offset: positions, keys and codes are those that it would have behind so many other tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.histories import encode_pages
from tests.turboquant_kv.test_runtime import random_tokens

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache import seam
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary
from turboquant_kv.evaluation.comparison import log_probabilities
from turboquant_kv.evaluation.shifted import ShiftedCache, at_offset, shifted

FMT = KVFormat(4, 4, page_tokens=16, sink_tokens=8)


def read(model: Any, caches: list[Any], tokens: list[int], cuts: list[int]) -> np.ndarray:
    """(T, V) log-probabilities, in chunks."""
    ends = [*cuts, len(tokens)]
    parts = [log_probabilities(model, [tokens[a:b]], caches)[0] for a, b in zip([0, *cuts], ends, strict=True)]
    return np.concatenate([np.array(part) for part in parts])


def test_keys_stand_where_so_many_tokens_before_them_would_put_them(rng: np.random.Generator) -> None:
    """Keys of the first layer are those of the same tokens behind 100 others: no attention lies before them."""
    model, filler, tokens = small_models.dense(), random_tokens(rng, 100), random_tokens(rng, 30)
    whole, shorter = make_prompt_cache(model), make_prompt_cache(model)
    read(model, whole, filler + tokens, [100])
    read(model, at_offset(shorter, 100, [True, True]), tokens, [7, 8])
    expected, got = (np.array(c[0].keys_and_values()[0]) for c in (whole, shorter))
    np.testing.assert_allclose(got, expected[:, :, 100:], atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sliding", "recurrent", "with_sinks", "capped"])
def test_an_uncompressed_run_does_not_change(kind: str, rng: np.random.Generator) -> None:
    model, tokens = small_models.EVERY_KIND[kind](), random_tokens(rng, 60)
    shapes = KVRuntime(model, None).shapes
    seam.install()
    here = read(model, make_prompt_cache(model), tokens, [20, 21])
    caches = at_offset(make_prompt_cache(model), 3000, [shape is not None for shape in shapes])
    assert any(isinstance(cache, ShiftedCache) for cache in caches)
    np.testing.assert_allclose(read(model, caches, tokens, [20, 21]), here, atol=2e-3)


def test_compressed_and_affine_caches_attend_as_before_but_over_other_codes(rng: np.random.Generator) -> None:
    model, tokens = small_models.dense(), random_tokens(rng, 90)
    runtime = KVRuntime(model, FMT)
    exact = read(model, make_prompt_cache(model), tokens, [40])
    for make in (runtime.make_cache, lambda: [QuantizedKVCache(64, 4) for _ in range(2)]):
        here = read(model, make(), tokens, [40])
        far = read(model, at_offset(make(), 5000, [True, True]), tokens, [40])
        assert np.abs(far - here).max() > 1e-4
        assert np.abs(far - exact).mean() < 3 * np.abs(here - exact).mean()


def test_keys_that_nobody_attends_over_are_still_noticed() -> None:
    model = small_models.dense()
    cache = ShiftedCache(KVRuntime(model, FMT).make_cache()[0], 10)
    keys = mx.zeros((1, 2, 1, 64))
    cache.update_and_fetch(keys, keys)
    with pytest.raises(UnsupportedModelError):
        cache.update_and_fetch(keys, keys)


def test_a_turned_mean_follows_the_shift(rng: np.random.Generator) -> None:
    """Pages are coded as if they were pages further on, for whole pages of shift, and for any shift by its mean."""
    rotary = Rotary(10000.0 ** (-np.arange(32) / 32), 1, 32, amplitude=1.25)
    k, v = (5 * rng.standard_normal((2, 2, 64))).astype(np.float32)
    means = Means(k, v, rotary)
    num_pages, skipped = 3, 125
    shift = skipped * FMT.page_tokens
    moved = shifted(Calibration({0: means}, ""), shift).layers[0]
    odd = shifted(Calibration({0: means}, ""), shift + 5).layers[0]
    for position in (0, 7, 300):
        np.testing.assert_allclose(moved.k_blocks(position, 4), means.k_blocks(position + shift, 4), atol=1e-4)
        np.testing.assert_allclose(odd.k_blocks(position, 4), means.k_blocks(position + shift + 5, 4), atol=1e-4)
    backend = choose_backend("cpu-numpy")
    shape = LayerShape(2, 64, 64, mx.float32)
    keys = means.k_rows(FMT, skipped + np.arange(num_pages)) + rng.standard_normal((2, num_pages * FMT.page_tokens, 64))
    rows = [backend.from_mlx(mx.array(keys[None].astype(np.float32)))[0]] * 2
    ids = np.arange(num_pages)
    decoded = []
    for of_page, used in ((skipped, means), (0, moved), (0, means)):
        store = backend.new_store(shape, FMT, used)
        store.grow(num_pages)
        encode_pages(store, ids, of_page, *rows)
        decoded.append(np.array(store.decode(ids, of_page)[0]))
    there, here, unshifted = (np.square(x - keys).mean() for x in decoded)
    assert here == pytest.approx(there, rel=0.02)
    assert unshifted > 3 * there


def test_a_mean_that_does_not_turn_stays(rng: np.random.Generator) -> None:
    k, v = rng.standard_normal((2, 2, 64)).astype(np.float32)
    means = Means(k, v)
    assert shifted(Calibration({4: means}, "text"), 999).layers[4] is means
