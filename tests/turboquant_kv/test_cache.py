"""The caches' verbs: chunking, batching, forking, cutting, saving, and the bytes they own up to."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from tests.turboquant_kv.histories import (
    History,
    as_float64,
    expected,
    feed,
    new_cache,
    random_cuts,
    random_queries,
    relative_error,
)

from turboquant_kv.cache import seam as attention
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.codec.format import KVFormat

BACKENDS = ("cpu-numpy", "cpu-native", "mlx-ops")
FMT = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
DIM, HEADS, Q_HEADS, SCALE = 64, 2, 4, 0.125
ROUNDING = 1e-5  # relative; orders of summing in float32, measured below 1e-6


def draw(rng: np.random.Generator, num_tokens: int, dtype: Any = mx.float32) -> History:
    """A history whose codes are the same however its rows are cut (as long as no means are taken off)."""
    return History.random(rng, HEADS, num_tokens, DIM, dtype=dtype).steady(rng, FMT)


def filled(
    history: History, backend: str, stop: int, rng: np.random.Generator, means: Any = None, cuts: int = 3
) -> TurboQuantKVCache:
    cache = new_cache(FMT, backend, means)
    edges = random_cuts(rng, stop, cuts)
    for a, b in itertools.pairwise(edges):
        feed(cache, history, a, b, random_queries(rng, Q_HEADS, b - a, DIM, history.dtype), SCALE)
    return cache


def step(cache: TurboQuantKVCache, history: History, rng_seed: int, tokens: int = 1) -> mx.array:
    """Append the history's next tokens and attend with queries that depend on the seed alone."""
    q = random_queries(np.random.default_rng(rng_seed), Q_HEADS, tokens, DIM, history.dtype)
    return feed(cache, history, cache.offset, cache.offset + tokens, q, SCALE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_chunks(backend: str, rng: np.random.Generator) -> None:
    history = draw(rng, 120)
    a, b = (filled(history, backend, 110, rng, cuts=n) for n in (1, 7))
    assert relative_error(step(a, history, 1, 5), as_float64(step(b, history, 1, 5))) < ROUNDING
    pages = [c.sequence.pool.stores[0].read(c.sequence.page_ids) for c in (a, b) if c.sequence]
    assert (pages[0].k_codes == pages[1].k_codes).all()
    assert len(a.sequence.page_ids) == len(b.sequence.page_ids) == FMT.num_pages(115)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_unequal_rows_equals_each_alone(backend: str, rng: np.random.Generator) -> None:
    lengths = [1, 23, 64, 7]
    histories = [draw(rng, n + 4) for n in lengths]
    # Rows of one batch share one pool, as the caches of one model do.
    first = new_cache(FMT, backend)
    singles = [first] + [TurboQuantKVCache(first.source) for _ in lengths[1:]]
    for cache, history, n in zip(singles, histories, lengths, strict=True):
        feed(cache, history, 0, n, random_queries(rng, Q_HEADS, n, DIM, mx.float32), SCALE)
    batch = TurboQuantKVCache.merge(singles)
    assert batch.offset.tolist() == lengths
    for i in range(3):
        q = mx.concatenate([random_queries(rng, Q_HEADS, 1, DIM, mx.float32) for _ in lengths])
        k, v = (
            mx.concatenate(list(side))
            for side in zip(*(h.slice(n + i, n + i + 1) for h, n in zip(histories, lengths, strict=True)), strict=True)
        )
        batch.update_and_fetch(k, v)
        out = batch.attend(q, scale=SCALE, mask=batch.make_mask(1), sinks=None)
        for b, (cache, history) in enumerate(zip(singles, histories, strict=True)):
            alone = feed(cache, history, cache.offset, cache.offset + 1, q[b : b + 1], SCALE)
            assert mx.array_equal(out[b : b + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_right_padded_prompt_equals_each_alone(backend: str, rng: np.random.Generator) -> None:
    lengths, chunk = [5, 41, 28], 16
    longest = max(lengths)
    histories = [draw(rng, longest) for _ in lengths]
    first = new_cache(FMT, backend)
    batch = BatchTurboQuantKVCache(first.source, [None] * len(lengths))
    batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    q = mx.concatenate([random_queries(rng, Q_HEADS, longest, DIM, mx.float32) for _ in lengths])
    outputs = []
    for a in range(0, longest, chunk):
        b = min(longest, a + chunk)
        k, v = (mx.concatenate(list(side)) for side in zip(*(h.slice(a, b) for h in histories), strict=True))
        batch.update_and_fetch(k, v)
        outputs.append(batch.attend(q[:, :, a:b], scale=SCALE, mask=batch.make_mask(b - a), sinks=None))
    batch.finalize()
    out = mx.concatenate(outputs, axis=2)
    assert batch.offset.tolist() == lengths
    for row, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        short = History(history.k[:, :n], history.v[:, :n], mx.float32)
        want = expected(short, q[row : row + 1, :, :n], FMT, 0, SCALE, None)
        assert relative_error(out[row : row + 1, :, :n], want) < ROUNDING


def test_extend_filter_and_extract_move_rows_and_give_memory_back(rng: np.random.Generator) -> None:
    histories = [draw(rng, n) for n in (30, 60, 45)]
    first = new_cache(FMT, "cpu-numpy")
    caches = [first, TurboQuantKVCache(first.source), TurboQuantKVCache(first.source)]
    for cache, history in zip(caches, histories, strict=True):
        n = history.num_tokens
        feed(cache, history, 0, n, random_queries(rng, Q_HEADS, n, DIM, mx.float32), SCALE)
    pool = first.source.pool
    assert pool is not None
    used = pool.num_used
    batch = TurboQuantKVCache.merge(caches[:2])
    batch.extend(TurboQuantKVCache.merge(caches[2:]))
    assert batch.offset.tolist() == [30, 60, 45]
    assert pool.num_used == used, "merging shares pages"
    alone = batch.extract(1)
    for cache in caches:
        cache.release()
    batch.filter([2])
    assert batch.offset.tolist() == [45]
    assert alone.offset == 60
    assert pool.num_used == FMT.num_pages(45) + FMT.num_pages(60)
    alone.release()
    batch.filter([])
    assert pool.num_used == 0
    assert pool.exact_bytes == 0
    pool.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_share_pages_and_then_go_their_own_ways(backend: str, rng: np.random.Generator) -> None:
    history, other = draw(rng, 100), draw(rng, 100)
    cache = filled(history, backend, 70, rng)
    pool = cache.source.pool
    assert pool is not None
    used, exact_bytes = pool.num_used, pool.exact_bytes
    fork = copy.deepcopy(cache)
    assert (pool.num_used, pool.exact_bytes) == (used, exact_bytes), "a fork copies nothing"
    for _ in range(25):
        step(fork, other, 5)
    fresh = filled(history, backend, 70, np.random.default_rng(0), cuts=1)
    assert relative_error(step(cache, history, 9), as_float64(step(fresh, history, 9))) < ROUNDING
    pool.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [0, 3, 8, 24, 40, 69, 70])
def test_cutting_at_exact_places_loses_nothing(backend: str, keep: int, rng: np.random.Generator) -> None:
    history = draw(rng, 120)
    cache = filled(history, backend, 70, rng)
    assert cache.sequence is not None
    assert cache.sequence.exact_cut(keep) == keep
    assert cache.trim(70 - keep) == 70 - keep
    assert cache.offset == keep
    fresh = filled(history, backend, keep, np.random.default_rng(1), cuts=1) if keep else new_cache(FMT, backend)
    assert relative_error(step(cache, history, 3, 40), as_float64(step(fresh, history, 3, 40))) < ROUNDING
    if cache.source.pool:
        cache.source.pool.check_integrity()


def test_exact_cut_falls_back_to_the_page_start(rng: np.random.Generator) -> None:
    cache = filled(draw(rng, 100), "cpu-numpy", 70, rng)
    assert cache.sequence is not None
    assert cache.sequence.tail_start == 56
    assert [cache.sequence.exact_cut(n) for n in (5, 8, 9, 23, 24, 55, 56, 57, 99)] == [5, 8, 8, 8, 24, 40, 56, 57, 70]


def test_cutting_inside_a_page_keeps_its_decoded_tokens(rng: np.random.Generator) -> None:
    history = draw(rng, 100)
    cache = filled(history, "cpu-numpy", 70, rng)
    before = cache.sequence.pool.stores[0].read(cache.sequence.page_ids)  # type: ignore[union-attr]
    cache.trim(70 - 30)
    assert cache.offset == 30
    _, tail = cache.sequence.exact_ends()  # type: ignore[union-attr]
    assert tail is not None
    error = np.linalg.norm(tail.k - history.k[:, 24:30]) / np.linalg.norm(history.k[:, 24:30])
    assert 0.02 < error < 0.2, "decoded through 4-bit codes: close, and not exact"
    assert (before.k_codes[0] == cache.sequence.pages().k_codes[0]).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_saved_by_mlx_lm_and_restored_bit_for_bit(
    backend: str, dtype: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    attention.install()
    history = draw(rng, 120, dtype=dtype)
    caches = [filled(history, backend, n, rng, history.means(rng)) for n in (100, 5)] + [new_cache(FMT, backend)]
    path = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(path, caches)
    restored = mlx_lm_cache.load_prompt_cache(path)
    assert [c.offset for c in restored] == [100, 5, 0]
    for old, new in zip(caches[:2], restored[:2], strict=True):
        assert new.nbytes == old.nbytes
        expected_out = step(old, history, 4, 10)
        out = step(new, history, 4, 10)
        if backend == "cpu-native":  # restored caches run on the default device's backend
            assert mx.array_equal(out, expected_out)
        else:
            assert relative_error(out, as_float64(expected_out)) < 1e-2


def test_a_damaged_state_is_refused(rng: np.random.Generator) -> None:
    state = list(filled(draw(rng, 100), "cpu-numpy", 100, rng).state)
    with pytest.raises(ValueError, match="k_codes"):
        TurboQuantKVCache.from_state([*state[:3], state[3][..., :-1], *state[4:]])
    with pytest.raises(ValueError, match="header"):
        TurboQuantKVCache.from_state([state[0], state[1].astype(mx.float16), *state[2:]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_those_of_the_arrays(backend: str, rng: np.random.Generator) -> None:
    cache = filled(draw(rng, 100), backend, 100, rng)
    pool = cache.source.pool
    assert pool is not None and cache.sequence is not None
    pages = pool.stores[0].read(cache.sequence.page_ids)
    code_and_scale_bytes = sum(a.nbytes for a in (pages.k_codes, pages.k_scales, pages.v_codes, pages.v_scales))
    rows = pool.stores[0].get_rows(0, pool.stores[0].num_rows)
    free = pool.exact.num_free
    exact_bytes = (rows.k.nbytes + rows.v.nbytes) * (rows.num_rows - free) // rows.num_rows
    assert cache.nbytes == code_and_scale_bytes + exact_bytes
    assert exact_bytes == pool.exact_bytes == FMT.exact_rows(100) * HEADS * 2 * DIM * 4
    held = pool.stores[0].allocated_bytes + rows.k.nbytes + rows.v.nbytes
    assert pool.slack_bytes == held - cache.nbytes, "pages and rows that memory is held for and nobody uses"
    assert len(cache.sequence.page_ids) * FMT.page_bytes(HEADS, DIM, DIM) == code_and_scale_bytes
    assert pool.allocated_bytes == cache.nbytes + pool.slack_bytes


def test_pages_are_reused_after_release(rng: np.random.Generator) -> None:
    history = draw(rng, 100)
    cache = filled(history, "cpu-numpy", 100, rng)
    pool = cache.source.pool
    assert pool is not None
    held = pool.stores[0].allocated_bytes
    cache.release()
    cache.release()
    assert pool.num_used == 0
    again = TurboQuantKVCache(cache.source)
    feed(again, history, 0, 100, random_queries(rng, Q_HEADS, 100, DIM, mx.float32), SCALE)
    assert pool.stores[0].allocated_bytes == held


def test_dropping_a_cache_gives_its_pages_back(rng: np.random.Generator) -> None:
    cache = filled(draw(rng, 100), "cpu-numpy", 100, rng)
    pool = cache.source.pool
    assert pool is not None
    assert pool.num_used > 0
    del cache
    assert pool.num_used == 0
    assert pool.exact_bytes == 0


def test_a_failed_encode_leaks_no_page(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    history = draw(rng, 200)
    cache = filled(history, "cpu-numpy", 70, rng)
    pool = cache.source.pool
    assert pool is not None
    used = pool.num_used

    def fail(*_: Any) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(pool.stores[0], "encode", fail)
        with pytest.raises(MemoryError):
            feed(cache, history, 70, 120, random_queries(rng, Q_HEADS, 50, DIM, mx.float32), SCALE)
    assert pool.num_used == used
    cache.trim(cache.offset - 70)
    fresh = filled(history, "cpu-numpy", 70, np.random.default_rng(1))
    assert relative_error(step(cache, history, 2), as_float64(step(fresh, history, 2))) < ROUNDING


def test_tokens_that_were_never_asked_about_can_be_dropped(rng: np.random.Generator) -> None:
    """A step that failed between update and attention is undone by trimming."""
    history = draw(rng, 80)
    cache = filled(history, "cpu-numpy", 70, rng)
    cache.update_and_fetch(*history.slice(70, 75))
    assert cache.offset == 75
    assert cache.trim(2) == 2
    assert cache.offset == 73
    assert cache.trim(5) == 5
    assert cache.offset == 68
    fresh = filled(history, "cpu-numpy", 68, np.random.default_rng(1))
    assert relative_error(step(cache, history, 2), as_float64(step(fresh, history, 2))) < ROUNDING


def test_misuse_is_refused_by_name(rng: np.random.Generator) -> None:
    history = draw(rng, 50)
    cache = new_cache(FMT, "cpu-numpy")
    assert not hasattr(cache, "bits")
    assert not hasattr(TurboQuantKVCache.merge([cache]), "bits")
    with pytest.raises(UnsupportedModelError, match="without new keys"):
        cache.attend(random_queries(rng, Q_HEADS, 1, DIM, mx.float32), scale=1.0, mask=None, sinks=None)
    cache.update_and_fetch(*history.slice(0, 4))
    with pytest.raises(UnsupportedModelError, match="scaled_dot_product_attention"):
        cache.update_and_fetch(*history.slice(4, 5))
    assert cache.offset == 4
    with pytest.raises(UnsupportedModelError, match="without a causal mask"):
        cache.attend(random_queries(rng, Q_HEADS, 4, DIM, mx.float32), scale=1.0, mask=None, sinks=None)
    with pytest.raises(UnsupportedModelError, match="shares raw keys and values"):
        cache.keys_and_values()
