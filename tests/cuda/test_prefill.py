"""The prefill kernel's CUDA text on the CPU: against the reference, and column by column against format.py's rule."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda import test_kernels as kernels
from tests.cuda.emulator import cuda_kernel
from tests.turboquant_kv.histories import (
    History,
    as_float64,
    expected,
    feed,
    in_tiles,
    new_cache,
    random_queries,
    random_rotary,
    relative_error,
)

from turboquant_kv.backends.base import RowSpan, SequenceView, StepRows
from turboquant_kv.backends.gpu import flash as gpu_flash
from turboquant_kv.backends.gpu import prefill_plan
from turboquant_kv.backends.gpu import store as gpu
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.flash import FlashKernels, FlashShape
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.reference import exact_pairs

# Weights and outputs are rounded to the type, to one in 2^12 or 2^9; a code that float32 moves costs 2e-3 of one row.
TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 5e-3}
# Keys of such a test are ten times as long, and so is what rounding decoded ones to the type does to scores.
TURNING_TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 2e-2}

FLASH = FlashKernels("cuda", cuda_kernel)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in a test prefills through this kernel and no other way."""

    def refuse(*_: Any, **__: Any) -> mx.array:
        raise AssertionError("MLX's attention was called")

    backend = GpuBackend("cuda", kernels.BACKEND.kernels.decode, kernels.BACKEND.kernels.pages, FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    monkeypatch.setattr(gpu, "masked_attention", refuse)


CASES = [  # query heads, KV heads, D, Dv, sink, page, codecs, dtype, where chunks end
    (5, 1, 128, 128, 32, 64, (4, 3), mx.bfloat16, (20, 110, 170)),
    (2, 1, 128, 128, 32, 64, (4, 3), mx.float16, (130, 300)),
    (4, 1, 64, 64, 0, 64, (4, 3), mx.bfloat16, (64, 150)),
    (3, 1, 64, 64, 32, 96, ("4t", "3t"), mx.float16, (100, 260)),
    (8, 1, 64, 64, 32, 64, (4, 3), mx.float16, (97, 140)),
    (7, 1, 64, 64, 5, 16, (4, 3), mx.float16, (40, 70)),
    (4, 2, 64, 128, 70, 48, (4, 3), mx.float16, (50, 90, 170)),
    (1, 1, 256, 256, 32, 64, (4, 3), mx.bfloat16, (100, 180)),
    (3, 1, 80, 80, 32, 64, (4, 3), mx.float16, (60, 150)),
    (2, 1, 96, 112, 5, 32, (4, 3), mx.bfloat16, (40, 130)),
    (2, 2, 112, 96, 0, 16, (4, 3), mx.float16, (33, 90)),
    (2, 1, 192, 192, 32, 64, (4, 3), mx.bfloat16, (100, 170)),
    (2, 1, 192, 128, 8, 48, (4, 3), mx.float16, (90, 150)),
    (4, 2, 128, 64, 32, 64, ("3t", "2t"), mx.float16, (100, 170)),
    (2, 1, 96, 128, 5, 16, ("2t", "3t"), mx.bfloat16, (60, 110)),
    (2, 1, 160, 160, 32, 64, (4, 3), mx.float16, (60, 110)),
]


@pytest.mark.parametrize(
    ("case", "turns"), [*((case, False) for case in CASES), *((case, True) for case in (*CASES[3:10], *CASES[13:]))]
)
def test_prefill_is_the_references(case: Any, turns: bool, rng: np.random.Generator) -> None:
    num_q, num_kv, k_dim, v_dim, sink, page, codecs, dtype, ends = case
    fmt = KVFormat(codecs[0], codecs[1], page_tokens=page, sink_tokens=sink)
    ends = [n + int(rng.integers(0, 20)) for n in ends]
    history = History.random(rng, num_kv, ends[-1], k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    cache = new_cache(fmt, "gpu", means)
    for start, stop in itertools.pairwise([0, *ends]):
        q = random_queries(rng, num_q, stop - start, k_dim, dtype)
        sinks = (rng.standard_normal(num_q) + 2).astype(np.float32) if start else None
        out = feed(cache, history, start, stop, q, 0.1, sinks=None if sinks is None else mx.array(sinks))
        assert out.dtype == dtype
        seen = History(history.k[:, :stop], history.v[:, :stop], dtype)
        want = expected(seen, q, fmt, start, 0.1, means, sinks=sinks)
        assert relative_error(out, want) < (TURNING_TOLERANCE if turns else TOLERANCE)[dtype]


@pytest.mark.parametrize("case", [CASES[3], CASES[6], CASES[7], CASES[10], CASES[13]])
def test_capped_prefill_is_the_references(case: Any, rng: np.random.Generator) -> None:
    """Caps are of scores before the scale in the kernel; attention sinks stay as they are."""
    num_q, num_kv, k_dim, v_dim, sink, page, codecs, dtype, ends = case
    fmt = KVFormat(codecs[0], codecs[1], page_tokens=page, sink_tokens=sink)
    ends = [n + int(rng.integers(0, 20)) for n in ends]
    history = History.random(rng, num_kv, ends[-1], k_dim, v_dim, dtype)
    cache, scale = new_cache(fmt, "gpu"), float(rng.uniform(0.15, 0.3))
    cap = float(rng.uniform(0.3, 1))
    for start, stop in itertools.pairwise([0, *ends]):
        q = random_queries(rng, num_q, stop - start, k_dim, dtype)
        sinks = (rng.standard_normal(num_q) + 2).astype(np.float32) if start else None
        out = feed(cache, history, start, stop, q, scale, sinks=None if sinks is None else mx.array(sinks), cap=cap)
        seen = History(history.k[:, :stop], history.v[:, :stop], dtype)
        want = expected(seen, q, fmt, start, scale, None, sinks=sinks, cap=cap)
        assert relative_error(out, want) < TOLERANCE[dtype]
        plain = expected(seen, q, fmt, start, scale, None, sinks=sinks)
        assert relative_error(out, plain) > 2 * TOLERANCE[dtype], "the cap must have mattered"


def random_view(rng: np.random.Generator, fmt: KVFormat, q_start: int, num_queries: int) -> SequenceView:
    """What a step gives for these positions."""

    def rows(start: int, num_rows: int) -> RowSpan | None:
        return RowSpan(start, 0, num_rows) if num_rows else None

    length = q_start + num_queries
    first_page = max(0, q_start - fmt.sink_tokens) // fmt.page_tokens
    window_start = fmt.page_start(first_page)
    return SequenceView(
        *(q_start, num_queries, rng.permutation(fmt.num_pages(length))),
        *(rows(0, min(length, fmt.sink_tokens)), rows(window_start, max(0, length - window_start))),
    )


def alone(view: SequenceView, fmt: KVFormat, num_kv_heads: int, tile: int = 1) -> prefill_plan.PrefillGroup:
    """A pass of this sequence only."""
    (group,) = kernels.BACKEND.prepare_step(StepRows([view])).groups_for(fmt.page_tokens, num_kv_heads, tile)
    return group


@pytest.mark.parametrize(
    ("sink", "page", "dim"), [(32, 64, 64), (32, 96, 128), (7, 16, 80), (70, 48, 64), (0, 64, 256)]
)
def test_each_query_sees_its_columns_and_no_others(sink: int, page: int, dim: int, rng: np.random.Generator) -> None:
    """All scores are equal and the values one-hot, a KV head for every `dim` columns: outputs are the weights."""
    fmt = KVFormat(page_tokens=page, sink_tokens=sink)
    for q_start, num_queries in ((0, 9), (int(rng.integers(1, 60)), 70), (int(rng.integers(60, 200)), 140)):
        view = random_view(rng, fmt, q_start, num_queries)
        num_sink = 0 if view.sink is None else view.sink.num_rows
        window = np.arange(0 if view.window is None else view.window.num_rows)
        if view.window is not None:
            window += view.window.start
        coded = sink + np.arange(len(view.page_ids) * page)
        position = np.concatenate([np.arange(num_sink), coded, window])
        is_exact = np.ones(len(position), bool)
        is_exact[num_sink : num_sink + len(coded)] = False
        query = q_start + np.arange(num_queries)
        exact = exact_pairs(query, int(position.max()) + 1, fmt)[:, position]
        seen = (exact == is_exact) & (position <= query[:, None])  # (T, columns)
        assert (seen.sum(axis=1) == query + 1).all()

        num_heads = -(-len(position) // dim)
        values = np.zeros((num_heads, len(position), dim), np.float32)
        columns = np.arange(len(position))
        values[columns // dim, columns, columns % dim] = 1
        v = mx.array(values).astype(mx.float16)
        num_rows = num_queries + 3
        shape = FlashShape(num_heads, num_heads, dim, dim, page, sink, mx.float16)
        q = mx.ones((1, num_heads, num_rows, dim), mx.float16)
        tile = FLASH.tile(shape)
        rows, group = in_tiles(v, tile).reshape(-1, dim), alone(view, fmt, num_heads, tile)
        out = FLASH.attend(shape, q, (mx.zeros_like(rows), rows), group, scale=0.5, sinks=None)
        weights = as_float64(out)[0].transpose(1, 0, 2).reshape(num_rows, -1)
        assert not weights[:, len(position) :].any() and not weights[num_queries:].any()
        want = seen / seen.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights[:num_queries, : len(position)], want, rtol=2e-3)


@pytest.mark.parametrize(("warps", "stages"), [(8, 2), (8, 3), (4, 4)])
def test_other_blocks_compute_the_same(
    warps: int, stages: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WARPS and STAGES are there to be tuned."""
    monkeypatch.setattr(gpu_flash, "WARPS", warps)
    monkeypatch.setattr(gpu_flash, "STAGES", stages)
    backend = GpuBackend(
        "cuda", kernels.BACKEND.kernels.decode, kernels.BACKEND.kernels.pages, FlashKernels("cuda", cuda_kernel)
    )
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    history = History.random(rng, 1, 420, 64, dtype=mx.float16)
    cache = new_cache(KVFormat(), "gpu")
    for start, stop in ((0, 90), (90, 420)):
        q = random_queries(rng, 2, stop - start, 64, mx.float16)
        out = feed(cache, history, start, stop, q, 0.125)
        seen = History(history.k[:, :stop], history.v[:, :stop], mx.float16)
        assert relative_error(out, expected(seen, q, KVFormat(), start, 0.125, None)) < TOLERANCE[mx.float16]


def test_rows_of_a_batch_past_their_queries_are_zeros(rng: np.random.Generator) -> None:
    """A batch of prompts of different lengths, right-padded, as mlx-lm hands them over."""
    fmt = KVFormat(page_tokens=16, sink_tokens=8)
    lengths = [30, 47]
    histories = [History.random(rng, 1, max(lengths), 64, dtype=mx.float16) for _ in lengths]
    source = new_cache(fmt, "gpu").source
    batch = TurboQuantKVCache.merge([TurboQuantKVCache(source) for _ in lengths])
    batch.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
    q = mx.concatenate([random_queries(rng, 2, max(lengths), 64, mx.float16) for _ in lengths])
    news = [h.slice(0, max(lengths)) for h in histories]
    batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
    out = batch.attend(q, scale=0.125, mask="causal", sinks=None)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        want = expected(history, q[b : b + 1, :, :n], fmt, 0, 0.125, None)
        assert relative_error(out[b : b + 1, :, :n], want) < TOLERANCE[mx.float16]
        assert not mx.any(out[b, :, n:]).item()


@pytest.mark.parametrize("bound", [60, 1 << 30])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[6], CASES[9], CASES[11], CASES[13]])
def test_ragged_passes_are_the_references(
    case: Any, bound: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of any lengths, some of none, in one launch or in several, over what earlier passes have left of each."""
    num_q, num_kv, k_dim, v_dim, sink, page, codecs, dtype, _ = case
    monkeypatch.setattr(prefill_plan, "MAX_COLUMNS", bound)
    fmt = KVFormat(codecs[0], codecs[1], page_tokens=page, sink_tokens=sink)
    histories = [History.random(rng, num_kv, 400, k_dim, v_dim, dtype) for _ in range(4)]
    means = histories[0].means(rng, random_rotary(rng, k_dim))
    source = new_cache(fmt, "gpu", means).source
    batch = TurboQuantKVCache.merge([TurboQuantKVCache(source) for _ in histories])
    begun = np.zeros(4, int)
    for most in (30, 150, 40):
        lengths = rng.integers(9, most, 4)
        lengths[rng.integers(4)] = 0
        longest = int(lengths.max())
        batch.prepare(lengths=lengths.tolist(), right_padding=(longest - lengths).tolist())
        q = mx.concatenate([random_queries(rng, num_q, longest, k_dim, dtype) for _ in histories])
        news = [h.slice(n, n + longest) for h, n in zip(histories, begun.tolist(), strict=True)]
        batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
        sinks = (rng.standard_normal(num_q) + 2).astype(np.float32) if rng.random() < 0.5 else None
        out = batch.attend(q, scale=0.1, mask="causal", sinks=None if sinks is None else mx.array(sinks))
        for b, (start, n) in enumerate(zip(begun.tolist(), lengths.tolist(), strict=True)):
            seen = History(histories[b].k[:, : start + n], histories[b].v[:, : start + n], dtype)
            if n:
                want = expected(seen, q[b : b + 1, :, :n], fmt, start, 0.1, means, sinks=sinks)
                assert relative_error(out[b : b + 1, :, :n], want) < TURNING_TOLERANCE[dtype]
            assert not mx.any(out[b, :, n:]).item()
        begun += lengths


def test_large_scores_neither_overflow_nor_vanish(rng: np.random.Generator) -> None:
    """Peaks that rise from tile to tile by more than float32's exponent holds."""
    fmt = KVFormat(8, 8, page_tokens=64, sink_tokens=32)
    history = History.random(rng, 1, 250, 64, dtype=mx.float16)
    history.k *= np.linspace(0, 8, 250).round(2)[None, :, None]
    history = History(as_float64(history.slice(0, 250)[0])[0], history.v, mx.float16)
    q = random_queries(rng, 1, 250, 64, mx.float16)
    out = feed(new_cache(fmt, "gpu"), history, 0, 250, q, 1.0)
    want = expected(history, q, fmt, 0, 1.0, None)
    # weights are nearly one-hot: what 8 bits do to a score of 100 shows, an overflow would not stay so small
    assert relative_error(out, want) < 2e-2


def test_what_has_no_kernel_is_refused(rng: np.random.Generator) -> None:
    shape = FlashShape(2, 1, 64, 64, 64, 32, mx.float16)
    assert FLASH.has_kernel(shape)
    assert not FlashKernels("metal", cuda_kernel).has_kernel(shape)
    assert not FLASH.has_kernel(FlashShape(2, 1, 64, 64, 64, 32, mx.float32))
    assert not FLASH.has_kernel(FlashShape(2, 1, 512, 512, 64, 32, mx.float16))
    group = alone(random_view(rng, KVFormat(), 50, 20), KVFormat(), 1)
    q, rows = mx.zeros((1, 2, 20, 64), mx.float16), mx.zeros((70, 64), mx.float16)  # 32 and 38 exact rows
    assert FLASH.attend(shape, q, (rows, rows), group, scale=1.0, sinks=None).shape == q.shape
    for keys, scale, cap in (
        *((rows[1:], 1.0, 0.0), (rows.astype(mx.bfloat16), 1.0, 0.0)),
        *((rows, -1.0, 0.0), (rows, 1.0, 3.0)),  # compiled without a cap
    ):
        with pytest.raises(UnsupportedFormatError):
            FLASH.attend(shape, q, (keys, rows), group, scale=scale, sinks=None, cap=cap)
