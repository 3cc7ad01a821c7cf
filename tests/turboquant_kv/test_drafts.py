"""Steps of several rows with tokens that are cut off again: what stays is as if they had never been there."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_mixed import BACKENDS, BASE, FORMATS, Layer, attend
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.mixed_batch import merge_rows
from turboquant_kv.cache.model_runtimes import KVFamily


def held(cache: Any) -> Any:
    """All that a single cache stores; mlx-lm's own also has rows behind its tokens."""
    return cache.keys_and_values() if isinstance(cache, KVCache) else cache.state


def test_a_page_s_room_ends_where_the_next_token_would_close_it() -> None:
    sink, page = BASE.sink_tokens, BASE.page_tokens
    for position in range(sink + 3 * page):
        last = position + BASE.page_room(position) - 1
        assert (last + 1 - sink) % page == 0 and last >= sink
        assert position < sink or (position - sink) // page == (last - sink) // page


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("formats", [FORMATS, ["4/3"], ["4/4"] * 3, ["f16"] * 2], ids=lambda names: "+".join(names))
def test_rows_that_are_cut_by_different_numbers_go_on_as_if_alone(
    backend: str, dtype: Any, formats: list[str], rng: np.random.Generator
) -> None:
    """Every step has up to 8 tokens a row, padded on the right, and keeps some of them; over several pages."""
    layer = Layer(rng, backend, dtype)
    alone = [layer.new_row(fmt, int(n)) for fmt, n in zip(formats, rng.integers(1, 60, len(formats)), strict=True)]
    (batch,) = merge_rows([[c] for c in alone])
    error = 1e-5 if dtype == mx.float32 else 2e-2
    for _ in range(25):
        rooms = [batch.exact_room(b) for b in range(len(alone))]
        lens = [min(room, int(rng.integers(1, 9))) for room in rooms]
        kept = [int(rng.integers(1, n + 1)) for n in lens]
        k, v, q = layer.step(len(alone), max(lens))
        batch.prepare(lengths=lens, right_padding=[max(lens) - n for n in lens])
        out = attend(batch, k, v, q)
        batch.finalize()
        batch.trim_rows([n - keep for n, keep in zip(lens, kept, strict=True)])
        for b, cache in enumerate(alone):
            for t in range(kept[b]):
                part = slice(b, b + 1), slice(None), slice(t, t + 1)
                want = attend(cache, k[part], v[part], q[part])
                assert mx.allclose(out[part], want, atol=error, rtol=error), f"row {b}, token {t} of {lens[b]}"
        assert batch.offset.tolist() == [c.offset for c in alone]
    for b, cache in enumerate(alone):  # what is stored is the same to the bit
        for mine, want in zip(*(held(c) for c in (batch.extract(b), cache)), strict=True):
            same = mx.array_equal(mine, want) if isinstance(want, mx.array) else mine == want
            assert same, f"row {b}"
    layer.check()


def test_what_a_row_does_not_have_cannot_be_cut_off(rng: np.random.Generator) -> None:
    layer = Layer(rng, "cpu-numpy")
    (batch,) = merge_rows([[layer.new_row("4/4", 5)], [layer.new_row("f16", 9)]])
    for counts in ([6, 0], [0, 10], [-1, 0]):
        with pytest.raises(ValueError, match="cannot be cut"):
            batch.trim_rows(counts)
    assert batch.offset.tolist() == [5, 9]


@pytest.mark.parametrize("names", [["4/4", "4/3", "4/4"], ["4/4", "f16", "8/4"], ["f16", "f16"]])
def test_a_whole_model_s_rows_go_on_as_if_alone(names: list[str], rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE, backend="cpu-numpy")
    rows = []
    for name, n in zip(names, (40, 25, 70), strict=False):
        rows.append(family.runtime(name).make_cache())
        logits_of(model, rows[-1], random_tokens(rng, n), [])
    runtime = family.runtime("f16")
    alone = [runtime.merge_rows([row]) for row in rows]
    batch = runtime.merge_rows(rows)
    for _ in range(12):
        lens = [min(min(c.exact_room(b) for c in batch), int(rng.integers(1, 6))) for b in range(len(rows))]
        kept = [int(rng.integers(1, n + 1)) for n in lens]
        tokens = np.array([random_tokens(rng, max(lens)) for _ in rows])
        for cache in batch:
            cache.prepare(lengths=lens, right_padding=[max(lens) - n for n in lens])
        out = np.array(model(mx.array(tokens), cache=batch))
        for cache in batch:
            cache.finalize()
            cache.trim_rows([n - keep for n, keep in zip(lens, kept, strict=True)])
        for b, n in enumerate(kept):
            for t in range(n):
                want = np.array(model(mx.array(tokens[b : b + 1, t : t + 1]), cache=alone[b])[0, -1])
                assert np.linalg.norm(out[b, t] - want) / np.linalg.norm(want) < 2e-3
    for caches in (*rows, *alone, batch):
        runtime.release(caches)
    assert family.unique_bytes() == 0
    family.check_integrity()
