"""The fused kernels as Metal, run by the emulator, against the reference: shapes, dtypes, lengths, ragged batches."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import metal_kernel
from tests.turboquant_kv.histories import (
    History,
    expected,
    feed,
    new_cache,
    random_queries,
    random_rotary,
    relative_error,
)

from turboquant_kv.backends.base import LayerShape, Means, PageWrites
from turboquant_kv.backends.gpu import masked_prefill
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.codec import reference
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotation import rotation_matrix

# As in tests/turboquant_kv/test_backends.py, and for the same reasons.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 5e-3}

BACKEND = GpuBackend("metal", DecodeKernels("metal", metal_kernel), PageKernels("metal", metal_kernel))


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in a test attends through emulated Metal."""
    monkeypatch.setattr(caches, "choose_backend", lambda name: BACKEND)


def prefilled(
    fmt: KVFormat, history: History, stop: int, num_q: int, rng: np.random.Generator, means: Any
) -> TurboQuantKVCache:
    """A cache of the history's first tokens; its prefill is long enough not to be decode."""
    cache = new_cache(fmt, "gpu", means)
    q = random_queries(rng, num_q, stop, history.k.shape[2], history.dtype)
    feed(cache, history, 0, stop, q, 0.1)
    return cache


CASES = [  # query heads, KV heads, D, Dv, sink, page, bits, query rows, tokens
    (4, 2, 64, 64, 0, 16, (4, 4), 1, 41),
    (5, 1, 128, 128, 8, 16, (4, 3), 1, 90),
    (7, 1, 80, 80, 5, 16, (3, 3), 2, 77),
    (4, 2, 96, 128, 17, 32, (8, 4), 1, 130),
    (2, 1, 192, 112, 32, 16, (2, 2), 5, 83),
    (9, 1, 64, 256, 1, 48, (3, 8), 1, 160),
    (3, 3, 112, 64, 40, 16, (2, 4), 8, 33),
    (2, 1, 128, 80, 3, 16, ("3t", "2t"), 1, 77),
    (2, 2, 80, 96, 8, 32, ("2t", "3t"), 1, 90),
    (2, 1, 128, 64, 3, 16, ("4t", "3t"), 1, 77),
    (2, 2, 96, 80, 8, 32, ("4t", "4t"), 1, 90),
    (4, 2, 32, 48, 4, 32, (4, 4), 1, 150),
    (2, 1, 160, 32, 8, 16, (3, 4), 2, 90),
]


@pytest.mark.parametrize(
    ("dtype", "turns"), [(mx.float32, False), (mx.float16, False), (mx.bfloat16, False), (mx.float32, True)]
)
@pytest.mark.parametrize("case", CASES)
def test_decode_is_the_references(case: Any, dtype: Any, turns: bool, rng: np.random.Generator) -> None:
    num_q, num_kv, k_dim, v_dim, sink, page, (k_bits, v_bits), num_rows, num_tokens = case
    fmt = KVFormat(k_bits, v_bits, page_tokens=page, sink_tokens=sink)
    num_tokens += int(rng.integers(0, page))
    history = History.random(rng, num_kv, num_tokens + num_rows, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    history.steady(rng, fmt, means)
    cache = prefilled(fmt, history, num_tokens, num_q, rng, means)
    q = random_queries(rng, num_q, num_rows, k_dim, dtype)
    out = feed(cache, history, num_tokens, num_tokens + num_rows, q, 0.1)
    assert out.dtype == dtype
    assert relative_error(out, expected(history, q, fmt, num_tokens, 0.1, means)) < TOLERANCE[dtype]


def test_every_length_up_to_three_pages(rng: np.random.Generator) -> None:
    """From the first token on: empty parts, the sink filling, pages closing."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=4)
    history = History.random(rng, 1, 55, 64).steady(rng, fmt)
    cache = new_cache(fmt, "gpu")
    q = random_queries(rng, 2, 55, 64, mx.float32)
    want = expected(history, q, fmt, 0, 0.125, None)
    for p in range(55):
        out = feed(cache, history, p, p + 1, q[:, :, p : p + 1], 0.125)
        assert relative_error(out, want[:, :, p : p + 1]) < TOLERANCE[mx.float32]


def test_attention_sinks_join_the_denominator(rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 2, 71, 64).steady(rng, fmt)
    cache = prefilled(fmt, history, 70, 4, rng, None)
    q = random_queries(rng, 4, 1, 64, mx.float32)
    sinks = rng.standard_normal(4).astype(np.float32) + 2
    out = feed(cache, history, 70, 71, q, 0.125, sinks=mx.array(sinks))
    assert relative_error(out, expected(history, q, fmt, 70, 0.125, None, sinks=sinks)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("dims", [(64, 128), (256, 256), (80, 96)])
def test_capped_steps_are_the_references(dims: Any, rng: np.random.Generator) -> None:
    """A prompt in chunks, then several tokens, then one: prefill with a mask, decode, and rows that decode appends."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=12)
    history = History.random(rng, 2, 96, dims[0], dims[1], mx.float16)
    means = history.means(rng, random_rotary(rng, dims[0]))
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, "gpu", means)
    cap = float(rng.uniform(0.5, 3))
    for start, stop in itertools.pairwise([0, 9, 40, 90, 95, 96]):
        q = random_queries(rng, 4, stop - start, dims[0], mx.float16)
        sinks = rng.standard_normal(4).astype(np.float32) + 2 if start else None
        out = feed(cache, history, start, stop, q, 0.125, sinks=None if sinks is None else mx.array(sinks), cap=cap)
        seen = History(history.k[:, :stop], history.v[:, :stop], mx.float16)
        want = expected(seen, q, fmt, start, 0.125, means, sinks=sinks, cap=cap)
        # decoded histories are halves
        assert relative_error(out, want) < (1 if stop - start <= 8 else 4) * TOLERANCE[mx.float16]


def test_capped_queries_are_prefilled_in_parts(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as scores may be in memory."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 2, 90, 64).steady(rng, fmt)
    q = random_queries(rng, 4, 90, 64, mx.float32)
    want = expected(history, q, fmt, 0, 0.125, None, cap=1.0)
    for most in (1, 4 * 90 * 7, 1 << 30):
        monkeypatch.setattr(masked_prefill, "MOST_SCORES", most)
        out = feed(new_cache(fmt, "gpu"), history, 0, 90, q, 0.125, cap=1.0)
        assert relative_error(out, want) < TOLERANCE[mx.float32]


def test_a_ragged_batch_equals_each_row_alone(rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    lengths = [int(n) for n in rng.permutation([3, 30, 75, 200])]
    histories = [History.random(rng, 2, n + 1, 64, dtype=mx.float16).steady(rng, fmt) for n in lengths]
    source = new_cache(fmt, "gpu").source
    rows = []
    for history, n in zip(histories, lengths, strict=True):
        row = TurboQuantKVCache(source)
        feed(row, history, 0, n, random_queries(rng, 4, n, 64, mx.float16), 0.125)
        rows.append(row)
    batch = TurboQuantKVCache.merge(rows)
    q = mx.concatenate([random_queries(rng, 4, 1, 64, mx.float16) for _ in rows])
    news = [h.slice(n, n + 1) for h, n in zip(histories, lengths, strict=True)]
    batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
    out = batch.attend(q, scale=0.125, mask=None, sinks=None)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        want = expected(history, q[b : b + 1], fmt, n, 0.125, None)
        assert relative_error(out[b : b + 1], want) < TOLERANCE[mx.float16]


def test_ragged_prompts_are_prefilled_in_one_pass(rng: np.random.Generator) -> None:
    """Right-padded, one of them empty, over what each has: rows past a prompt's tokens are zeros."""
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
    lengths = rng.permutation([[11, 40], [0, 75], [33, 0], [60, 30]])
    histories = [History.random(rng, 2, 200, 64, dtype=mx.float16).steady(rng, fmt) for _ in lengths]
    source = new_cache(fmt, "gpu").source
    batch = TurboQuantKVCache.merge([TurboQuantKVCache(source) for _ in lengths])
    for starts, news in zip((np.zeros(4, int), lengths[:, 0]), lengths.T, strict=True):
        longest = int(news.max())
        batch.prepare(lengths=news.tolist(), right_padding=(longest - news).tolist())
        rows = [h.slice(n, n + longest) for h, n in zip(histories, starts.tolist(), strict=True)]
        batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*rows, strict=True)))
        q = mx.concatenate([random_queries(rng, 4, longest, 64, mx.float16) for _ in rows])
        out = batch.attend(q, scale=0.125, mask="causal", sinks=None)
        for b, (start, n) in enumerate(zip(starts.tolist(), news.tolist(), strict=True)):
            seen = History(histories[b].k[:, : start + n], histories[b].v[:, : start + n], mx.float16)
            if n:
                want = expected(seen, q[b : b + 1, :, :n], fmt, start, 0.125, None)
                assert relative_error(out[b : b + 1, :, :n], want) < TOLERANCE[mx.float16]
            assert not mx.any(out[b, :, n:]).item()


def test_long_histories_are_split_over_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than one, the last one short; many lanes of the combine kernel take part."""
    fmt = KVFormat(3, 4, page_tokens=16, sink_tokens=0)
    history = History.random(rng, 1, 1500 + int(rng.integers(0, 64)), 64).steady(rng, fmt)
    cache = prefilled(fmt, history, history.num_tokens - 1, 2, rng, None)
    q = random_queries(rng, 2, 1, 64, mx.float32)
    out = feed(cache, history, history.num_tokens - 1, history.num_tokens, q, 0.125)
    want = expected(history, q, fmt, history.num_tokens - 1, 0.125, None)
    assert relative_error(out, want) < TOLERANCE[mx.float32]


def test_strided_queries_are_read_where_they_lie(rng: np.random.Generator) -> None:
    """Models hand over transposed views: (B, T, Hq, D) seen as (B, Hq, T, D)."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=4)
    history = History.random(rng, 2, 52, 64).steady(rng, fmt)
    cache = prefilled(fmt, history, 50, 4, rng, None)
    q = mx.array(rng.standard_normal((1, 2, 4, 64)).astype(np.float32)).transpose(0, 2, 1, 3)
    out = feed(cache, history, 50, 52, q, 0.125)
    assert relative_error(out, expected(history, q, fmt, 50, 0.125, None)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("dims", [(64, 128), (80, 96), (112, 192), (512, 256)])
@pytest.mark.parametrize("bits", [(4, 3), (2, 8), ("3t", "2t"), ("4t", "3t")])
def test_prefill_in_chunks_is_the_references(bits: Any, dims: Any, rng: np.random.Generator) -> None:
    """Encoding, decoding and the mask: chunks begin in the sink, within a page and at one."""
    fmt = KVFormat(bits[0], bits[1], page_tokens=16, sink_tokens=12)
    history = History.random(rng, 2, 90, dims[0], dims[1], mx.float16)
    means = history.means(rng)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, "gpu", means)
    q = random_queries(rng, 4, 90, dims[0], mx.float16)
    want = expected(history, q, fmt, 0, 0.125, means)  # whose rows do not depend on cuts
    for start, stop in itertools.pairwise([0, 9, 40, 60, 90]):
        out = feed(cache, history, start, stop, q[:, :, start:stop], 0.125)
        assert relative_error(out, want[:, :, start:stop]) < TOLERANCE[mx.float16]


CODED = [  # dim, codec, scale
    *((64, 4, "unbiased"), (128, 3, "norm"), (256, 2, "least_squares"), (64, 8, "plain"), (512, 3, "unbiased")),
    *((80, 3, "unbiased"), (96, 4, "least_squares"), (112, 2, "norm"), (192, 8, "plain"), (112, 3, "unbiased")),
    *((64, "3t", "unbiased"), (128, "2t", "norm"), (256, "3t", "least_squares"), (512, "2t", "plain")),
    *((80, "3t", "plain"), (96, "2t", "unbiased"), (112, "3t", "unbiased"), (192, "2t", "least_squares")),
    *((64, "4t", "least_squares"), (128, "4t", "unbiased"), (256, "4t", "norm"), (512, "4t", "plain")),
    *((80, "4t", "unbiased"), (96, "4t", "plain"), (112, "4t", "norm"), (192, "4t", "unbiased")),
]


@pytest.mark.parametrize("case", CODED)
def test_codes_are_the_references(case: Any, rng: np.random.Generator) -> None:
    """Float32 moves a value over a threshold now and then; scales of other vectors agree to a float16's last bits."""
    dim, name, scale = case
    x = rng.standard_normal((2, 48, dim)).astype(np.float32)
    mean = rng.standard_normal((2, dim)).astype(np.float32)
    x[1, 3] = mean[1]  # centred it is nothing at all
    fmt = KVFormat(name, name, scale=scale, page_tokens=16)
    storage = BACKEND.new_store(LayerShape(2, dim, dim, mx.float32), fmt, Means(mean, mean))
    storage.grow(5)
    storage.encode(PageWrites.following(np.array([4, 0, 2]), 0, fmt.page_tokens), mx.array(x), mx.array(x))
    pages = storage.read(np.array([4, 0, 2]))
    want = reference.encode(x, fmt.keys, rotation_matrix(dim, fmt.rotation_seed, "k"), mean[:, None])
    got = pages.k_codes.transpose(1, 0, 2, 3).reshape(2, 48, -1)
    same = fmt.keys.decode(got, dim) == fmt.keys.decode(want.codes, dim)
    assert same.mean() > 0.999
    got_scales = pages.k_scales.transpose(1, 0, 2).reshape(2, 48)
    unmoved = same.all(axis=-1)
    np.testing.assert_allclose(got_scales[unmoved], want.scales[unmoved], rtol=2e-3)
