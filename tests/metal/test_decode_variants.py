"""Decode attention on Metal's matrices and its portable twin, on the same pages, against the float64 reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import metal_kernel, run_metal
from tests.turboquant_kv.histories import (
    History,
    check_balanced_decode,
    expected,
    new_cache,
    random_queries,
    random_rotary,
    relative_error,
    rounded,
)

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.figures import SequenceFigures
from turboquant_kv.backends.gpu.launch import DecodeKernels, DecodeLaunch, LayerInputs
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.gpu.plan import NO_WINDOW
from turboquant_kv.backends.gpu.shape import Variant
from turboquant_kv.backends.gpu.store import decode_shape
from turboquant_kv.backends.gpu.tuning import Tuning
from turboquant_kv.backends.gpu.variants import variant_for
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.codec.format import KVFormat

# As in tests/turboquant_kv/test_backends.py: operands in half cost 16-bit types nothing that their output shows.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 5e-3}
VARIANTS: tuple[Variant, ...] = ("portable", "simd")

BACKEND = GpuBackend("metal", DecodeKernels("metal", metal_kernel), PageKernels("metal", metal_kernel))


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "choose_backend", lambda name: BACKEND)


@cache
def kernels(variant: Variant) -> DecodeKernels:
    return DecodeKernels("metal", metal_kernel, variant=variant)


class Step:
    """A sequence with its latest rows appended: what a backend is given, for as many launches as a test wants."""

    def __init__(self, rng: np.random.Generator, fmt: KVFormat, history: History, num_rows: int, means: Any) -> None:
        self.start = history.num_tokens - num_rows
        self.fmt, self.history, self.means = fmt, history, means
        cache = new_cache(fmt, "gpu", means)
        if self.start:
            cache.append(*history.slice(0, self.start))
        num_heads, _, dim = history.k.shape
        pool = cache.source.get(LayerShape(num_heads, dim, history.v.shape[2], history.dtype))
        self.storage: Any = pool.stores[0]
        self.plan: Any = cache._step(pool, pool.shapes[0], num_rows).plan
        self.exact = self.storage.append(self.plan, *history.slice(self.start, history.num_tokens))

    def inputs(self, launch: DecodeLaunch) -> tuple[LayerInputs, tuple[SequenceFigures, ...]]:
        return self.storage.layer_inputs(self.exact, self.plan, launch), self.plan.figures

    def launch(self, made: DecodeKernels, q: mx.array, capped: bool = False) -> DecodeLaunch:
        heads, pairs = (q.shape[1], q.shape[2], q.dtype), self.storage._turning
        return made.launch_for(decode_shape(*heads, self.storage.shape, self.fmt, pairs, capped))

    def attend(
        self, made: DecodeKernels, q: mx.array, sinks: Any = None, reach: int = NO_WINDOW, cap: float = 0.0
    ) -> mx.array:
        launch = self.launch(made, q, cap > 0)
        layer, figures = self.inputs(launch)
        sinks = None if sinks is None else mx.array(sinks)
        return launch(layer, q, figures, self.plan.page_table, scale=0.1, sinks=sinks, reach=reach, cap=cap)

    def error(self, out: mx.array, q: mx.array, **options: Any) -> float:
        return relative_error(out, expected(self.history, q, self.fmt, self.start, 0.1, self.means, **options))


CASES = [  # query heads, KV heads, D, Dv, sink, page, bits, query rows, tokens, dtype
    (8, 1, 128, 128, 32, 64, (4, 4), 1, 300, mx.float16),
    (5, 1, 128, 64, 8, 16, (4, 3), 1, 90, mx.bfloat16),
    (7, 1, 80, 80, 5, 16, (3, 3), 2, 77, mx.float32),
    (4, 2, 96, 128, 17, 32, (3, 4), 4, 130, mx.float16),
    (2, 1, 192, 112, 32, 16, (2, 2), 5, 83, mx.float32),
    (12, 1, 64, 256, 1, 48, (3, 8), 1, 160, mx.bfloat16),
    (3, 3, 112, 64, 40, 16, (2, 4), 8, 33, mx.float32),
    (4, 1, 256, 192, 0, 64, (4, 2), 1, 200, mx.float16),
    (6, 2, 64, 96, 3, 32, (8, 2), 1, 100, mx.float32),
    (1, 1, 256, 80, 0, 16, (8, 3), 3, 50, mx.bfloat16),
    (3, 1, 192, 256, 7, 32, (3, 3), 1, 90, mx.float16),
    (1, 1, 112, 112, 4, 16, (3, 2), 1, 75, mx.float32),
    (2, 1, 80, 96, 4, 16, (2, 3), 2, 40, mx.float32),
    (4, 1, 128, 64, 4, 64, ("3t", "2t"), 1, 140, mx.float16),
    (2, 1, 256, 80, 0, 16, ("2t", "3t"), 2, 50, mx.float32),
    (3, 1, 96, 128, 9, 32, ("3t", "3t"), 1, 90, mx.bfloat16),
    (3, 1, 80, 112, 4, 16, ("2t", "2t"), 1, 75, mx.float32),
    (2, 1, 112, 192, 0, 48, ("3t", 4), 1, 100, mx.float32),
    (2, 1, 64, 256, 0, 16, (3, "3t"), 1, 60, mx.float32),
    (4, 1, 128, 128, 4, 64, ("4t", "3t"), 1, 140, mx.float16),
    (3, 1, 64, 80, 4, 16, ("4t", "4t"), 2, 75, mx.float32),
    (2, 1, 96, 112, 0, 48, ("4t", "4t"), 1, 100, mx.bfloat16),
    (2, 1, 256, 192, 9, 32, ("4t", "4t"), 1, 60, mx.float32),
]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_both_variants_are_the_references(case: Any, turns: bool, rng: np.random.Generator) -> None:
    num_q, num_kv, k_dim, v_dim, sink, page, (k_bits, v_bits), num_rows, num_tokens, dtype = case
    fmt = KVFormat(k_bits, v_bits, page_tokens=page, sink_tokens=sink)
    num_tokens += int(rng.integers(0, page)) + num_rows
    history = History.random(rng, num_kv, num_tokens, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    step = Step(rng, fmt, history.steady(rng, fmt, means), num_rows, means)
    q = random_queries(rng, num_q, num_rows, k_dim, dtype)
    for variant in VARIANTS:
        out = step.attend(kernels(variant), q)
        assert out.dtype == dtype
        assert step.error(out, q) < TOLERANCE[dtype], variant


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[7], CASES[9], CASES[13], CASES[22]])
def test_both_variants_cap_scores(case: Any, turns: bool, rng: np.random.Generator) -> None:
    """Of codes, sink and window, beyond a window as well; attention sinks are above the cap."""
    num_q, num_kv, k_dim, v_dim, sink, page, (k_bits, v_bits), num_rows, num_tokens, dtype = case
    fmt = KVFormat(k_bits, v_bits, page_tokens=page, sink_tokens=sink)
    num_tokens += int(rng.integers(0, page)) + num_rows
    history = History.random(rng, num_kv, num_tokens, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    step = Step(rng, fmt, history.steady(rng, fmt, means), num_rows, means)
    q = random_queries(rng, num_q, num_rows, k_dim, dtype)
    sinks = (rng.standard_normal(num_q) + 3).astype(np.float32)
    cap = float(rng.uniform(0.3, 1))
    for variant in VARIANTS:
        for reach in (num_tokens // 2, NO_WINDOW):
            out = step.attend(kernels(variant), q, sinks, reach, cap)
            assert step.error(out, q, sinks=sinks, window=reach, cap=cap) < TOLERANCE[dtype], variant
            assert step.error(out, q, sinks=sinks, window=reach) > 2 * TOLERANCE[dtype], "the cap must have mattered"


@pytest.mark.parametrize("cap", [1e-3, 0.5, 50.0])
def test_caps_of_scores_far_beyond_them(cap: float, rng: np.random.Generator) -> None:
    """Scores up to thousands, of either sign: none overflows. All are the cap's, or its negative, but few."""
    fmt = KVFormat(8, 8, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 1, 100, 64)
    history.k *= 300
    history = History(rounded(history.k, mx.float32), history.v, mx.float32)
    step = Step(rng, fmt, history.steady(rng, fmt), 1, None)
    q = random_queries(rng, 4, 1, 64, mx.float32)
    for variant in VARIANTS:
        # where a score lies near 0, float32 sums of large products decide
        assert step.error(step.attend(kernels(variant), q, cap=cap), q, cap=cap) < 5e-4, variant


def test_every_length_up_to_three_pages(rng: np.random.Generator) -> None:
    """No page at all, tiles of 32 that are half full, at the end nine pages, which fill the page table."""
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=4)
    history = History.random(rng, 1, 170, 64).steady(rng, fmt)
    for num_tokens in (*range(1, 54, 4), 20, 21, 36, 37, 149 + int(rng.integers(0, 16))):
        seen = History(history.k[:, :num_tokens], history.v[:, :num_tokens], history.dtype)
        step, q = Step(rng, fmt, seen, 1, None), random_queries(rng, 4, 1, 64, mx.float32)
        assert step.error(step.attend(kernels("simd"), q), q) < TOLERANCE[mx.float32], num_tokens


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_sinks_and_lanes_in_any_order(variant: Variant, turns: bool, rng: np.random.Generator) -> None:
    """Windows end in the walk, in the sink and nowhere; backwards, lanes race and read too early without barriers."""

    def backwards(*args: Any, **kwargs: Any) -> Any:
        def call(output_dtypes: Any, **launch: Any) -> list[mx.array]:
            names = dict(zip(("name", "input_names", "output_names", "source", "header"), args, strict=False))
            outputs, _ = run_metal(**names, **kwargs, **launch, output_dtypes=output_dtypes, reverse=True)
            return [mx.array(out).astype(dtype) for out, dtype in zip(outputs, output_dtypes, strict=True)]

        return call

    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 1, 330 + int(rng.integers(0, 16)), 64)
    means = history.means(rng, random_rotary(rng, 64)) if turns else None
    step = Step(rng, fmt, history.steady(rng, fmt, means), 2, means)
    q = random_queries(rng, 3, 2, 64, mx.float32)
    sinks = rng.standard_normal(3).astype(np.float32) + 2
    # few blocks at a time, so that the simdgroups of each go round their loop
    narrow = DecodeKernels("metal", metal_kernel, Tuning(blocks=1), variant=variant)
    for made in (narrow, DecodeKernels("metal", backwards, variant=variant)):
        for reach in (2, 20, 150, 325, NO_WINDOW):
            out = step.attend(made, q, sinks, reach)
            assert step.error(out, q, sinks=sinks, window=reach) < TOLERANCE[mx.float32], reach


@pytest.mark.parametrize("num_q", [4, 10])
def test_a_ragged_batch_equals_each_row_alone(num_q: int, rng: np.random.Generator) -> None:
    """Groups of two and of five: the backend's own choice takes one variant for each."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    lengths = [int(n) for n in rng.permutation([3, 30, 75, 200])]
    histories = [History.random(rng, 2, n + 1, 64, dtype=mx.float16).steady(rng, fmt) for n in lengths]
    source = new_cache(fmt, "gpu").source
    rows = []
    for history, n in zip(histories, lengths, strict=True):
        rows.append(TurboQuantKVCache(source))
        rows[-1].append(*history.slice(0, n))
    batch = TurboQuantKVCache.merge(rows)
    q = mx.concatenate([random_queries(rng, num_q, 1, 64, mx.float16) for _ in rows])
    news = [h.slice(n, n + 1) for h, n in zip(histories, lengths, strict=True)]
    batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
    out = batch.attend(q, scale=0.125, mask=None, sinks=None)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        want = expected(history, q[b : b + 1], fmt, n, 0.125, None)
        assert relative_error(out[b : b + 1], want) < TOLERANCE[mx.float16]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("dims", [(64, 128), (80, 64)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_are_balanced_where_they_are_appended(
    variant: Variant, dims: tuple[int, int], turns: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = GpuBackend("metal", kernels(variant), BACKEND.kernels.pages)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    fmt, dtype = KVFormat("4t", 3, page_tokens=32, sink_tokens=4), mx.bfloat16 if turns else mx.float16
    # a code that rounding moves to its neighbour costs as much as on other devices
    check_balanced_decode(rng, monkeypatch, fmt, 8, dims, dtype, turns, 2e-2)


def test_wide_groups_take_matrices() -> None:
    def chosen(num_q: int, num_rows: int, dim: int) -> Variant:
        shape = decode_shape(num_q, num_rows, mx.float16, LayerShape(1, dim, dim, mx.float16), KVFormat())
        return variant_for("metal", shape)

    assert [chosen(g, 1, 128) for g in (1, 2, 3, 8)] == ["portable", "portable", "simd", "simd"]
    assert [chosen(1, rows, 128) for rows in (1, 8)] == ["portable", "simd"]
    assert chosen(8, 1, 512) == "portable"
